//! Token exchange (RFC 8693): what a token may say that lets somebody act for somebody else.
//!
//! Enters: a verified token, who wants to act by it, what is asked for, what the policy lets that one have. Leaves: the claims of
//! a narrower token. Never: a signature, or claims that say more, to more, or for longer than the token that was shown.
//!
//! The new token is about the same subject. Who acts stands in `act`, outermost, around whoever acted before (4.1); it is bound
//! to that one's certificate or key, so that handing it on is worth nothing.
//!
//! A token that is bound itself is exchanged by whoever has its key, and by those whom it names as its audience: they get it from
//! its holder in the course of their work, and cannot show a key that is not theirs.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::claims::{Confirmation, VerifiedToken};
use crate::policy::model::INSTANCE;

/// Actors that a token may name, whatever a policy says.
pub const DEEPEST: usize = 8;
/// Bytes of all names in a new token: it travels in a header.
const MAX_NAMES: usize = 4096;

/// Who wants to act.
#[derive(Clone, Copy, Debug)]
pub struct Actor<'a> {
    /// Of the token that it would get; the issuer by whom actors are known here.
    pub issuer: &'a str,
    /// Its SPIFFE ID.
    pub subject: &'a str,
    pub tenant: Option<&'a str>,
    /// What it showed that it holds.
    pub holds: &'a Confirmation,
}

/// What a request asks for (2.1). Nothing asked means as much as there is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    pub audience: Vec<String>,
    pub scopes: Option<Vec<String>>,
    pub lifetime: Option<Duration>,
}

/// What the policy lets an actor have of such tokens.
#[derive(Clone, Debug)]
pub struct Allowed {
    pub audience: Vec<String>,
    pub scopes: Vec<String>,
    pub lifetime: Duration,
    /// Actors that the new token may name.
    pub depth: usize,
    /// Who may hand its own part on: SPIFFE IDs of actors; `{instance}` in one stands for any name.
    pub of_actors: Vec<String>,
    /// Whether the one who handed its part on may be of another tenant.
    pub across_tenants: bool,
}

/// Claims of the new token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exchanged {
    pub subject: String,
    pub audience: Vec<String>,
    pub scopes: Vec<String>,
    pub issued_at: Timestamp,
    pub expires: Timestamp,
    pub confirmation: Confirmation,
    pub act: Map<String, Value>,
    pub may_act: Option<Map<String, Value>>,
    pub tenant: Option<String>,
    /// Who calls the subject so: the issuer of the first token.
    pub subject_issuer: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ExchangeError {
    #[error("the token names nobody to act for")]
    NoSubject,
    #[error("the token's `act` or `may_act` cannot be understood")]
    Malformed,
    #[error("the token says who may act by it, and this is somebody else")]
    MayNotAct,
    #[error("the token is somebody's who acts for another one, and may not hand that on")]
    MayNotHandOn,
    #[error("more would act for each other than the policy allows")]
    TooDeep,
    #[error("whoever acts by the token is of another tenant")]
    OtherTenant,
    #[error("the token is bound to a certificate or key that was not shown, and is not for this caller")]
    BoundToAnother,
    #[error("the token has expired")]
    Over,
    #[error("the new token would be bound to nothing: show a certificate or a DPoP proof")]
    Unbound,
    #[error("the token, or the policy, does not reach this audience")]
    Audience,
    #[error("the token, or the policy, does not give this scope")]
    Scope,
    #[error("the new token would be too long: ask for less")]
    TooLong,
}

impl ExchangeError {
    /// Stable name for records.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NoSubject => "exchange_no_subject",
            Self::Malformed => "exchange_malformed",
            Self::MayNotAct => "exchange_may_not_act",
            Self::MayNotHandOn => "exchange_may_not_hand_on",
            Self::TooDeep => "exchange_too_deep",
            Self::OtherTenant => "exchange_other_tenant",
            Self::BoundToAnother => "exchange_bound_to_another",
            Self::Over => "token_expired",
            Self::Unbound => "exchange_unbound",
            Self::Audience => "exchange_audience",
            Self::Scope => "exchange_scope",
            Self::TooLong => "exchange_too_long",
        }
    }

    /// The error of the answer (RFC 8693, 2.2.2; RFC 6749, 5.2).
    pub fn code(self) -> &'static str {
        match self {
            Self::Audience => "invalid_target",
            Self::Scope => "invalid_scope",
            _ => "invalid_request",
        }
    }
}

/// What the actor gets for a token.
pub fn exchange(
    token: &VerifiedToken,
    actor: &Actor<'_>,
    asked: &Asked,
    allowed: &Allowed,
    now: Timestamp,
) -> Result<Exchanged, ExchangeError> {
    let subject = token.subject.clone().ok_or(ExchangeError::NoSubject)?;
    if token.may_act.as_ref().is_some_and(|may| !is_named(may, actor)) {
        return Err(ExchangeError::MayNotAct);
    }
    let before = actors(token.act.as_ref())?;
    if let Some(last) = before.first()
        && *last != actor.subject
        && !allowed.of_actors.iter().any(|named| is_meant(named, last))
    {
        return Err(ExchangeError::MayNotHandOn);
    }
    let is_of_a_node = token.issuer == actor.issuer;
    if is_of_a_node && token.tenant.as_deref() != actor.tenant && !allowed.across_tenants {
        return Err(ExchangeError::OtherTenant);
    }
    if !is_in_right_hands(token, actor) {
        return Err(ExchangeError::BoundToAnother);
    }
    if before.len() >= allowed.depth.min(DEEPEST) {
        return Err(ExchangeError::TooDeep);
    }
    if actor.holds.is_none() {
        return Err(ExchangeError::Unbound);
    }
    let lifetime = asked.lifetime.unwrap_or(allowed.lifetime).min(allowed.lifetime);
    let end = SignedDuration::try_from(lifetime).ok().and_then(|lifetime| now.checked_add(lifetime).ok());
    // A leeway is for clocks that differ, and not for another token.
    let expires = end.into_iter().chain(token.expires).min().ok_or(ExchangeError::Over)?;
    if expires <= now {
        return Err(ExchangeError::Over);
    }
    let audience =
        narrowed(&token.audience, &allowed.audience, Some(&asked.audience).filter(|named| !named.is_empty()));
    let scopes = narrowed(&token.scopes, &allowed.scopes, asked.scopes.as_ref());
    let act = chain(actor, token.act.as_ref());
    // Where another issuer's token says so, it is only that one's word.
    let subject_issuer = token.subject_issuer.as_ref().filter(|_| is_of_a_node).unwrap_or(&token.issuer).clone();
    let audience = audience.filter(|named| !named.is_empty()).ok_or(ExchangeError::Audience)?;
    let scopes = scopes.ok_or(ExchangeError::Scope)?;
    let objects = token.may_act.iter().chain([&act]).map(|object| Value::from(object.clone()).to_string().len());
    let names = audience.iter().chain(&scopes).chain([&subject, &subject_issuer]).map(String::len).chain(objects);
    if names.sum::<usize>() > MAX_NAMES {
        return Err(ExchangeError::TooLong);
    }
    Ok(Exchanged {
        subject,
        audience,
        scopes,
        issued_at: now,
        expires,
        confirmation: *actor.holds,
        act,
        // Whoever was said to be the only one stays that.
        may_act: token.may_act.clone(),
        tenant: actor.tenant.map(str::to_owned),
        subject_issuer,
    })
}

/// Who acts, around whoever acted before: of those, who they are, and nothing else that their tokens say of them.
fn chain(actor: &Actor<'_>, before: Option<&Map<String, Value>>) -> Map<String, Value> {
    let named = [("iss", actor.issuer), ("sub", actor.subject)];
    let mut act = Map::from_iter(named.map(|(name, value)| (name.to_owned(), Value::from(value))));
    let inner = before.map(chain_of);
    act.extend(inner.map(|inner| ("act".to_owned(), Value::from(inner))));
    act
}

/// As deep as [`actors`] allowed.
fn chain_of(act: &Map<String, Value>) -> Map<String, Value> {
    let kept = ["iss", "sub"].into_iter().filter_map(|name| Some((name, act.get(name).filter(|v| v.is_string())?)));
    let mut found = Map::from_iter(kept.map(|(name, value)| (name.to_owned(), value.clone())));
    if let Some(Value::Object(inner)) = act.get("act") {
        found.insert("act".to_owned(), Value::from(chain_of(inner)));
    }
    found
}

/// What is asked for, if all of it is there on both sides; if nothing is, what is there on both.
fn narrowed(token: &[String], allowed: &[String], asked: Option<&Vec<String>>) -> Option<Vec<String>> {
    let is_there = |name: &&String| token.contains(name) && allowed.contains(name);
    match asked {
        Some(asked) => asked.iter().all(|name| is_there(&name)).then(|| asked.clone()),
        None => Some(token.iter().filter(is_there).cloned().collect()),
    }
}

/// Whether the caller has every key that the token is bound to, or is whom the token is for.
fn is_in_right_hands(token: &VerifiedToken, actor: &Actor<'_>) -> bool {
    let Confirmation { x5t_s256, jkt } = &token.confirmation;
    let has = |bound: &Option<[u8; 32]>, held: &Option<[u8; 32]>| bound.is_none() || bound == held;
    let holds = has(x5t_s256, &actor.holds.x5t_s256) && has(jkt, &actor.holds.jkt);
    holds || token.audience.iter().any(|named| named == actor.subject)
}

/// Whether an actor's SPIFFE ID is one that the policy names.
fn is_meant(named: &str, actor: &str) -> bool {
    match named.split_once(INSTANCE) {
        None => named == actor,
        Some((before, after)) => actor
            .strip_prefix(before)
            .and_then(|rest| rest.strip_suffix(after))
            .is_some_and(|instance| !instance.is_empty() && !instance.contains('/')),
    }
}

/// RFC 8693, 4.4: its members together identify who may act. One that cannot be compared is nobody's.
fn is_named(may_act: &Map<String, Value>, actor: &Actor<'_>) -> bool {
    let fits = |(name, value): (&String, &Value)| match name.as_str() {
        "sub" => value == actor.subject,
        "iss" => value == actor.issuer,
        _ => false,
    };
    may_act.contains_key("sub") && may_act.iter().all(fits)
}

/// Who acts, the present one first (4.1).
pub fn actors(act: Option<&Map<String, Value>>) -> Result<Vec<&str>, ExchangeError> {
    let mut found = Vec::new();
    let mut next = act;
    while let Some(act) = next {
        found.push(act.get("sub").and_then(Value::as_str).ok_or(ExchangeError::Malformed)?);
        if found.len() > DEEPEST {
            return Err(ExchangeError::TooDeep);
        }
        next = match act.get("act") {
            None => None,
            Some(Value::Object(inner)) => Some(inner),
            Some(_) => return Err(ExchangeError::Malformed),
        };
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const OWN: &str = "spiffe://example.org/authd/node-1";
    const AGENT: &str = "spiffe://example.org/agents/research";
    const OTHER: &str = "spiffe://example.org/agents/writer";
    const HOLDS: Confirmation = Confirmation { x5t_s256: Some([1; 32]), jkt: None };

    fn noon() -> Timestamp {
        "2026-11-26T12:00:00Z".parse().unwrap()
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn object(value: Value) -> Map<String, Value> {
        match value {
            Value::Object(map) => map,
            other => panic!("{other} is no object"),
        }
    }

    fn token() -> VerifiedToken {
        let expires = noon() + SignedDuration::from_mins(10);
        VerifiedToken {
            issuer_name: "corp".into(),
            issuer: "https://idp.example.org".into(),
            subject: Some("alice".into()),
            client_id: None,
            audience: names(&["ledger", "wiki", "mail"]),
            scopes: names(&["read", "write", "admin"]),
            jti: None,
            key_id: None,
            token_hash: [0; 32],
            issued_at: None,
            expires: Some(expires),
            not_after: expires + SignedDuration::from_secs(30),
            confirmation: Confirmation::default(),
            act: None,
            may_act: None,
            tenant: None,
            subject_issuer: None,
            acr: None,
            auth_time: None,
        }
    }

    fn actor(subject: &str) -> Actor<'_> {
        Actor { issuer: OWN, subject, tenant: Some("acme"), holds: &HOLDS }
    }

    fn allowed() -> Allowed {
        Allowed {
            audience: names(&["ledger", "wiki", "files"]),
            scopes: names(&["read", "write", "delete"]),
            lifetime: Duration::from_secs(300),
            depth: 2,
            of_actors: names(&[AGENT]),
            across_tenants: false,
        }
    }

    fn refusal(change: impl FnOnce(&mut VerifiedToken, &mut Asked, &mut Allowed)) -> &'static str {
        let (mut token, mut asked, mut allowed) = (token(), Asked::default(), allowed());
        change(&mut token, &mut asked, &mut allowed);
        match exchange(&token, &actor(AGENT), &asked, &allowed, noon()) {
            Ok(exchanged) => panic!("{exchanged:?}"),
            Err(error) => error.reason(),
        }
    }

    #[test]
    fn nothing_asked_gives_what_token_and_policy_have_in_common() {
        let got = exchange(&token(), &actor(AGENT), &Asked::default(), &allowed(), noon()).unwrap();
        assert_eq!((got.subject.as_str(), got.confirmation), ("alice", HOLDS));
        assert_eq!((got.audience, got.scopes), (names(&["ledger", "wiki"]), names(&["read", "write"])));
        assert_eq!(got.expires, noon() + SignedDuration::from_mins(5));
        assert_eq!(Value::from(got.act), json!({ "iss": OWN, "sub": AGENT }));
        // What ends sooner ends sooner, and a leeway is not part of it.
        let later = noon() + SignedDuration::from_mins(9);
        let got = exchange(&token(), &actor(AGENT), &Asked::default(), &allowed(), later).unwrap();
        assert_eq!(got.expires, noon() + SignedDuration::from_mins(10));
    }

    #[test]
    fn each_way_to_more_is_refused() {
        assert_eq!(refusal(|_, asked, _| asked.audience = names(&["ledger", "mail"])), "exchange_audience");
        assert_eq!(refusal(|_, asked, _| asked.audience = names(&["files"])), "exchange_audience");
        assert_eq!(refusal(|token, _, _| token.audience = names(&["mail"])), "exchange_audience");
        assert_eq!(refusal(|_, asked, _| asked.scopes = Some(names(&["read", "admin"]))), "exchange_scope");
        assert_eq!(refusal(|_, asked, _| asked.scopes = Some(names(&["delete"]))), "exchange_scope");
        assert_eq!(refusal(|token, _, _| token.expires = Some(noon())), "token_expired");
        assert_eq!(refusal(|_, asked, _| asked.lifetime = Some(Duration::ZERO)), "token_expired");
        assert_eq!(refusal(|token, _, _| token.subject = None), "exchange_no_subject");
        let unbound = Actor { holds: &Confirmation::default(), ..actor(AGENT) };
        let error = exchange(&token(), &unbound, &Asked::default(), &allowed(), noon()).unwrap_err();
        assert_eq!(error.reason(), "exchange_unbound");
        let codes = [ExchangeError::Audience, ExchangeError::Scope, ExchangeError::MayNotAct].map(ExchangeError::code);
        assert_eq!(codes, ["invalid_target", "invalid_scope", "invalid_request"]);
    }

    #[test]
    fn only_who_may_act_does() {
        let with = |may: Value| {
            move |token: &mut VerifiedToken, _: &mut Asked, _: &mut Allowed| token.may_act = Some(object(may))
        };
        for may in [
            json!({ "sub": OTHER }),
            json!({ "sub": AGENT, "iss": "https://idp.example.org" }),
            json!({ "iss": OWN }),
            json!({}),
            json!({ "sub": [AGENT] }),
            // Nobody here can tell who that is.
            json!({ "sub": AGENT, "client_id": "research" }),
        ] {
            assert_eq!(refusal(with(may.clone())), "exchange_may_not_act", "{may}");
        }
        for may in [json!({ "sub": AGENT }), json!({ "sub": AGENT, "iss": OWN })] {
            let token = VerifiedToken { may_act: Some(object(may.clone())), ..token() };
            let got = exchange(&token, &actor(AGENT), &Asked::default(), &allowed(), noon()).unwrap();
            assert_eq!(got.may_act.map(Value::from), Some(may));
        }
    }

    #[test]
    fn who_acts_for_somebody_hands_on_only_what_the_policy_says() {
        let of = |act: Value| VerifiedToken { act: Some(object(act)), ..token() };
        let ask = |token: &VerifiedToken, who: &str, allowed: &Allowed| {
            exchange(token, &actor(who), &Asked::default(), allowed, noon()).map_err(ExchangeError::reason)
        };
        let first = of(json!({ "sub": AGENT }));
        let got = ask(&first, OTHER, &allowed()).unwrap();
        assert_eq!(Value::from(got.act), json!({ "iss": OWN, "sub": OTHER, "act": { "sub": AGENT } }));
        let nobody = Allowed { of_actors: Vec::new(), ..allowed() };
        assert_eq!(ask(&first, OTHER, &nobody), Err("exchange_may_not_hand_on"));
        assert!(ask(&first, AGENT, &nobody).is_ok(), "it goes on acting by itself");
        // Only the outermost acts now; whoever stands inside is history (RFC 8693, 4.1).
        assert_eq!(
            ask(&of(json!({ "sub": OTHER, "act": { "sub": AGENT } })), "x", &allowed()),
            Err("exchange_may_not_hand_on")
        );
        assert_eq!(
            ask(&of(json!({ "sub": AGENT, "act": { "sub": OTHER } })), OTHER, &allowed()),
            Err("exchange_too_deep")
        );
        for act in
            [json!({}), json!({ "sub": 7 }), json!({ "sub": AGENT, "act": "x" }), json!({ "sub": AGENT, "act": {} })]
        {
            assert_eq!(ask(&of(act.clone()), OTHER, &allowed()), Err("exchange_malformed"), "{act}");
        }
        let deep = (0..20).fold(json!({ "sub": AGENT }), |inner, _| json!({ "sub": AGENT, "act": inner }));
        let far = Allowed { depth: usize::MAX, ..allowed() };
        assert_eq!(ask(&of(deep), OTHER, &far), Err("exchange_too_deep"));
    }

    #[test]
    fn a_bound_token_is_exchanged_by_its_holder_and_by_whom_it_is_for() {
        let ask = |confirmation: Confirmation, audience: &[&str], holds: &Confirmation| {
            let token = VerifiedToken { confirmation, audience: names(audience), ..token() };
            exchange(&token, &Actor { holds, ..actor(AGENT) }, &Asked::default(), &allowed(), noon())
                .map(|got| got.confirmation)
                .map_err(ExchangeError::reason)
        };
        let both = Confirmation { x5t_s256: Some([1; 32]), jkt: Some([2; 32]) };
        let key = Confirmation { x5t_s256: None, jkt: Some([2; 32]) };
        for (bound, holds, refused) in [
            (both, both, false),
            (HOLDS, both, false),
            (key, both, false),
            (both, HOLDS, true),
            (both, key, true),
            (key, HOLDS, true),
        ] {
            let expected = if refused { Err("exchange_bound_to_another") } else { Ok(holds) };
            assert_eq!(ask(bound, &["ledger"], &holds), expected, "{bound:?} {holds:?}");
            // The new one is bound to whoever asks, even so.
            assert_eq!(ask(bound, &["ledger", AGENT], &holds), Ok(holds));
            assert_eq!(ask(bound, &["ledger", OTHER], &holds), expected);
        }
    }

    #[test]
    fn what_one_tenants_agent_was_given_stays_there() {
        let token = VerifiedToken { issuer: OWN.into(), tenant: Some("acme".into()), ..token() };
        let ask = |token: &VerifiedToken, tenant, across_tenants| {
            let actor = Actor { tenant, ..actor(AGENT) };
            exchange(token, &actor, &Asked::default(), &Allowed { across_tenants, ..allowed() }, noon())
                .map(|got| got.tenant)
                .map_err(ExchangeError::reason)
        };
        assert_eq!(ask(&token, Some("acme"), false), Ok(Some("acme".into())));
        for tenant in [None, Some("other")] {
            assert_eq!(ask(&token, tenant, false), Err("exchange_other_tenant"));
            assert_eq!(ask(&token, tenant, true), Ok(tenant.map(str::to_owned)));
        }
        // Whatever others call a tenant.
        let foreign = VerifiedToken { issuer: "https://idp.example.org".into(), ..token };
        assert_eq!(ask(&foreign, Some("other"), false), Ok(Some("other".into())));
    }

    #[test]
    fn a_name_of_the_policy_stands_for_its_instances() {
        let named = "spiffe://example.org/agents/{instance}";
        assert!(is_meant(named, "spiffe://example.org/agents/a-1.scope") && is_meant(AGENT, AGENT));
        for other in
            ["spiffe://example.org/agents/", "spiffe://example.org/agents/a/b", "spiffe://example.org/x", named]
        {
            assert_eq!(is_meant(named, other), other == named, "{other}");
        }
        assert!(!is_meant(AGENT, OTHER));
        assert!(!is_meant("spiffe://example.org/a/{instance}/b", "spiffe://example.org/a/b"));
    }

    #[test]
    fn a_token_does_not_outgrow_a_header() {
        let long: Vec<String> = (0..64).map(|n| format!("https://{n}.{}.example.org", "x".repeat(100))).collect();
        let reason = refusal(|token, _, allowed| {
            token.audience = long.clone();
            allowed.audience = long.clone();
        });
        assert_eq!(reason, "exchange_too_long");
    }

    fn some(of: &'static [&'static str]) -> impl Strategy<Value = Vec<String>> {
        proptest::sample::subsequence(of, 0..=of.len()).prop_map(|names| names.into_iter().map(str::to_owned).collect())
    }

    const AUDIENCES: &[&str] = &["ledger", "wiki", "mail", "files", AGENT, OTHER];
    const SCOPES: &[&str] = &["read", "write", "admin", "delete"];

    fn step() -> impl Strategy<Value = (bool, Asked, Allowed, u64)> {
        let asked = (some(AUDIENCES), proptest::option::of(some(SCOPES)), proptest::option::of(0..2_000_u64));
        let allowed = (some(AUDIENCES), some(SCOPES), 1..2_000_u64, 0..12_usize, any::<bool>(), any::<bool>());
        (any::<bool>(), asked, allowed, 0..120_u64).prop_map(|(which, asked, allowed, wait)| {
            let (audience, scopes, lifetime) = asked;
            let asked = Asked { audience, scopes, lifetime: lifetime.map(Duration::from_secs) };
            let (audience, scopes, lifetime, depth, hands_on, across_tenants) = allowed;
            let of_actors = if hands_on { names(&[AGENT, OTHER]) } else { Vec::new() };
            (
                which,
                asked,
                Allowed { audience, scopes, lifetime: Duration::from_secs(lifetime), depth, of_actors, across_tenants },
                wait,
            )
        })
    }

    proptest! {
        /// Whoever exchanges what for what, in whatever order: never more scope, audience or time than the first token had,
        /// never about somebody else, never for another tenant unless the policy says so, and never without saying who acts.
        #[test]
        fn no_sequence_of_exchanges_gives_more(steps in proptest::collection::vec(step(), 1..12)) {
            let first = token();
            let (mut held, mut now) = (VerifiedToken { audience: names(AUDIENCES), ..first }, noon());
            let first = held.clone();
            for (which, asked, allowed, wait) in steps {
                now += SignedDuration::from_secs(wait as i64);
                let (who, tenant, key) = if which { (AGENT, Some("acme"), 1) } else { (OTHER, None, 2) };
                let holds = Confirmation { x5t_s256: Some([key; 32]), jkt: None };
                let actor = Actor { tenant, holds: &holds, ..actor(who) };
                let Ok(got) = exchange(&held, &actor, &asked, &allowed, now) else { continue };
                prop_assert!(held.issuer != OWN || held.tenant == got.tenant || allowed.across_tenants);
                prop_assert!(held.confirmation.is_none() || held.confirmation == holds || held.audience.iter().any(|a| a == who));
                prop_assert!(got.audience.iter().all(|name| first.audience.contains(name) && held.audience.contains(name)));
                prop_assert!(got.scopes.iter().all(|name| first.scopes.contains(name) && held.scopes.contains(name)));
                prop_assert!(!got.audience.is_empty() && got.expires > now);
                prop_assert!(Some(got.expires) <= held.expires && Some(got.expires) <= first.expires);
                prop_assert_eq!(Some(&got.subject), first.subject.as_ref());
                prop_assert_eq!(got.act.get("sub"), Some(&Value::from(who)));
                prop_assert_eq!(got.act.get("act").cloned(), held.act.clone().map(Value::from));
                prop_assert!(actors(Some(&got.act)).unwrap().len() <= allowed.depth.min(DEEPEST));
                held = VerifiedToken {
                    audience: got.audience, scopes: got.scopes, expires: Some(got.expires), not_after: got.expires,
                    issuer: OWN.into(), tenant: got.tenant,
                    confirmation: got.confirmation, act: Some(got.act), may_act: got.may_act, ..held
                };
            }
        }
    }
}
