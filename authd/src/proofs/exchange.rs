//! Token exchange (RFC 8693): what a token may say that lets somebody act for somebody else.
//!
//! Enters: a verified token, who wants to act by it, what is asked for, what the policy lets that one have. Leaves: the claims of
//! a narrower token. Never: a signature, or claims that say more, to more, or for longer than the token that was shown.
//!
//! The new token is about the same subject. Who acts stands in `act`, outermost, around whoever acted before (4.1); it is bound
//! to that one's certificate or key, so that handing it on is worth nothing.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value};

use super::claims::{Confirmation, VerifiedToken};

/// Actors that a token may name, whatever a policy says.
pub const DEEPEST: usize = 8;

/// Who wants to act.
#[derive(Clone, Copy, Debug)]
pub struct Actor<'a> {
    /// Of the token that it would get; the issuer by whom actors are known here.
    pub issuer: &'a str,
    /// Its SPIFFE ID.
    pub subject: &'a str,
    /// What it showed that it holds.
    pub holds: &'a Confirmation,
}

/// What a request asks for (2.1). Nothing asked means as much as there is.
#[derive(Clone, Debug, Default)]
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
    /// Who may hand its own part on: SPIFFE IDs of actors.
    pub of_actors: Vec<String>,
}

/// Claims of the new token.
#[derive(Clone, Debug, PartialEq)]
pub struct Exchanged {
    pub subject: String,
    pub audience: Vec<String>,
    pub scopes: Vec<String>,
    pub issued_at: Timestamp,
    pub expires: Timestamp,
    pub confirmation: Confirmation,
    pub act: Map<String, Value>,
    pub may_act: Option<Map<String, Value>>,
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
    #[error("the token has expired")]
    Over,
    #[error("the new token would be bound to nothing: show a certificate or a DPoP proof")]
    Unbound,
    #[error("the token, or the policy, does not reach this audience")]
    Audience,
    #[error("the token, or the policy, does not give this scope")]
    Scope,
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
            Self::Over => "token_expired",
            Self::Unbound => "exchange_unbound",
            Self::Audience => "exchange_audience",
            Self::Scope => "exchange_scope",
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
        && !allowed.of_actors.iter().any(|named| named == last)
    {
        return Err(ExchangeError::MayNotHandOn);
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
    let mut act =
        Map::from_iter([("iss".to_owned(), Value::from(actor.issuer)), ("sub".to_owned(), Value::from(actor.subject))]);
    if let Some(before) = &token.act {
        act.insert("act".to_owned(), Value::from(before.clone()));
    }
    Ok(Exchanged {
        subject,
        audience: audience.filter(|named| !named.is_empty()).ok_or(ExchangeError::Audience)?,
        scopes: scopes.ok_or(ExchangeError::Scope)?,
        issued_at: now,
        expires,
        confirmation: *actor.holds,
        act,
        // Whoever was said to be the only one stays that.
        may_act: token.may_act.clone(),
    })
}

/// What is asked for, if all of it is there on both sides; if nothing is, what is there on both.
fn narrowed(token: &[String], allowed: &[String], asked: Option<&Vec<String>>) -> Option<Vec<String>> {
    let is_there = |name: &&String| token.contains(name) && allowed.contains(name);
    match asked {
        Some(asked) => asked.iter().all(|name| is_there(&name)).then(|| asked.clone()),
        None => Some(token.iter().filter(is_there).cloned().collect()),
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
fn actors(act: Option<&Map<String, Value>>) -> Result<Vec<&str>, ExchangeError> {
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
        }
    }

    fn actor(subject: &str) -> Actor<'_> {
        Actor { issuer: OWN, subject, holds: &HOLDS }
    }

    fn allowed() -> Allowed {
        Allowed {
            audience: names(&["ledger", "wiki", "files"]),
            scopes: names(&["read", "write", "delete"]),
            lifetime: Duration::from_secs(300),
            depth: 2,
            of_actors: names(&[AGENT]),
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

    fn some(of: &'static [&'static str]) -> impl Strategy<Value = Vec<String>> {
        proptest::sample::subsequence(of, 0..=of.len()).prop_map(|names| names.into_iter().map(str::to_owned).collect())
    }

    const AUDIENCES: &[&str] = &["ledger", "wiki", "mail", "files"];
    const SCOPES: &[&str] = &["read", "write", "admin", "delete"];

    fn step() -> impl Strategy<Value = (bool, Asked, Allowed, u64)> {
        let asked = (some(AUDIENCES), proptest::option::of(some(SCOPES)), proptest::option::of(0..2_000_u64));
        let allowed = (some(AUDIENCES), some(SCOPES), 1..2_000_u64, 0..12_usize, any::<bool>());
        (any::<bool>(), asked, allowed, 0..120_u64).prop_map(|(which, asked, allowed, wait)| {
            let (audience, scopes, lifetime) = asked;
            let asked = Asked { audience, scopes, lifetime: lifetime.map(Duration::from_secs) };
            let (audience, scopes, lifetime, depth, hands_on) = allowed;
            let of_actors = if hands_on { names(&[AGENT, OTHER]) } else { Vec::new() };
            (
                which,
                asked,
                Allowed { audience, scopes, lifetime: Duration::from_secs(lifetime), depth, of_actors },
                wait,
            )
        })
    }

    proptest! {
        /// Whoever exchanges what for what, in whatever order: never more scope, audience or time than the first token had,
        /// never about somebody else, and never without saying who acts.
        #[test]
        fn no_sequence_of_exchanges_gives_more(steps in proptest::collection::vec(step(), 1..12)) {
            let first = token();
            let (mut held, mut now) = (first.clone(), noon());
            for (which, asked, allowed, wait) in steps {
                now += SignedDuration::from_secs(wait as i64);
                let who = if which { AGENT } else { OTHER };
                let Ok(got) = exchange(&held, &actor(who), &asked, &allowed, now) else { continue };
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
                    confirmation: got.confirmation, act: Some(got.act), may_act: got.may_act, ..held
                };
            }
        }
    }
}
