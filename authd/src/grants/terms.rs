//! Whether somebody may have a grant of a rule, for the proofs that were verified.
//!
//! Enters: a rule, who asks, what was proven, the time. Leaves: until when the proofs carry a grant, or what lacks. Never:
//! the verification of a proof. Dataplane asks this of every grant that control wants, whatever control says it checked.

use std::{fmt::Write, net::IpAddr};

use jiff::Timestamp;

use super::proof::{Shown, Token};
use crate::{
    digest::Digest,
    policy::{
        compile::is_in_force,
        file::Proof,
        model::{Model, MtlsRequirement, Peer, Rule, Subject, TokenRequirement},
        network::from_ip,
    },
    proofs::x509::{identity::VerifiedCertificate, spiffe::SpiffeId},
};

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub enum Claimant<'a> {
    /// A workload of this node, by its index, with the SPIFFE ID of the instance.
    Workload {
        index: usize,
        spiffe_id: &'a str,
    },
    Address(IpAddr),
    /// Somebody whose request a proxy passes on: known by what it proves, and not by where it calls from.
    Forwarded,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unmet {
    // Whoever asks for this rule.
    #[error("the rule asks for no proof that could be shown here")]
    NotGrantable,
    #[error("the rule is not about this caller")]
    NotTheCaller,
    #[error("the rule is not in force now")]
    NotNow,
    // What was shown.
    #[error("the rule requires a proof of the kind `{}`", .0.name())]
    Missing(Proof),
    #[error("the proof of the kind `{}` has ended", .0.name())]
    Over(Proof),
    #[error("the certificate is not one that the rule is about")]
    Certificate,
    #[error("the token is of another issuer")]
    Issuer,
    #[error("the token is for another audience")]
    Audience,
    #[error("the token lacks a scope")]
    Scope,
    #[error("the token is about another subject")]
    Subject,
    #[error("the rule takes bound tokens only")]
    NotBound,
}

impl Unmet {
    /// Stable name for answers and records.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotGrantable => "rule_not_grantable",
            Self::NotTheCaller => "rule_not_for_caller",
            Self::NotNow => "rule_not_in_force",
            Self::Missing(Proof::Mtls) => "certificate_missing",
            Self::Missing(Proof::Token) => "authorization_missing",
            Self::Missing(Proof::ApiKey) => "api_key_missing",
            Self::Missing(Proof::Node) => "node_identity_missing",
            Self::Missing(Proof::Approval) => "approval_missing",
            Self::Missing(_) => "proof_missing",
            Self::Over(_) => "proof_over",
            Self::Certificate => "certificate_not_allowed",
            Self::Issuer => "token_wrong_issuer",
            Self::Audience => "token_wrong_audience",
            Self::Scope => "token_wrong_scope",
            Self::Subject => "token_wrong_subject",
            Self::NotBound => "token_not_bound",
        }
    }
}

/// Until when the proofs carry a grant of the rule.
pub fn check(
    rule: &Rule,
    model: &Model,
    claimant: Claimant<'_>,
    proofs: &[Shown],
    now: Timestamp,
) -> Result<Timestamp, Unmet> {
    if !rule.is_opened() {
        return Err(Unmet::NotGrantable);
    }
    if !is_in_force(rule, now) {
        return Err(Unmet::NotNow);
    }
    let is_local = matches!(claimant, Claimant::Workload { .. });
    let mut limit = Timestamp::MAX;
    for required in &rule.require {
        if *required == Proof::Cgroup && is_local {
            continue;
        }
        let shown = proofs.iter().find(|shown| shown.kind() == *required).ok_or(Unmet::Missing(*required))?;
        if shown.not_after() <= now {
            return Err(Unmet::Over(*required));
        }
        limit = limit.min(shown.not_after());
        if let Shown::Token(token) = shown {
            check_token(token, rule.token.as_ref().ok_or(Unmet::NotGrantable)?, model)?;
        }
    }
    let certificate = proofs.iter().find_map(|shown| match shown {
        Shown::Mtls(certificate) => Some(&**certificate),
        _ => None,
    });
    let word = proofs.iter().find_map(|shown| match shown {
        Shown::Node(vouched) if rule.is_vouched() => Some(&vouched.spiffe_id),
        _ => None,
    });
    let named = rule.from.iter().any(|subject| is_claimant(*subject, model, claimant, certificate, word));
    if !named {
        // From the right place, with the certificate of somebody else.
        let is_near = matches!(claimant, Claimant::Forwarded) || may_ask(rule, model, claimant);
        return Err(if is_near && certificate.is_some() { Unmet::Certificate } else { Unmet::NotTheCaller });
    }
    if rule.require.contains(&Proof::Mtls) {
        let certificate = certificate.ok_or(Unmet::Missing(Proof::Mtls))?;
        if !is_meant(certificate, rule.mtls.as_ref(), model, claimant, word) {
            return Err(Unmet::Certificate);
        }
    }
    Ok(limit)
}

/// Whether a rule that asks for a node's word opens to the caller of this SPIFFE ID. Neither where it calls from nor the
/// time is asked here: both are in the kernel's cells, which list the rule where it holds.
pub fn vouched(rule: &Rule, model: &Model, spiffe_id: &SpiffeId) -> bool {
    let fits = |subject: &Subject| match *subject {
        Subject::Any => true,
        Subject::Peer(index) => is_vouched_for(&model.peers[index], spiffe_id),
        Subject::Unmanaged | Subject::Workload(_) => false,
    };
    rule.is_vouched() && rule.from.iter().any(fits)
}

/// Whether a peer is the caller of this SPIFFE ID.
fn is_vouched_for(peer: &Peer, spiffe_id: &SpiffeId) -> bool {
    let named = peer.spiffe_id.as_ref().is_none_or(|id| id == spiffe_id);
    // Nobody vouches for these.
    named && peer.dns.is_none() && peer.subject.is_none()
}

/// Whether the rule is about this caller at all, as far as that shows before anything is proven.
pub fn may_ask(rule: &Rule, model: &Model, claimant: Claimant<'_>) -> bool {
    rule.from.iter().any(|subject| match (*subject, claimant) {
        (Subject::Any, _) => true,
        (Subject::Workload(named), Claimant::Workload { index, .. }) => named == index,
        (Subject::Peer(peer), Claimant::Address(address)) => calls_from(model, peer, address),
        _ => false,
    })
}

fn is_claimant(
    subject: Subject,
    model: &Model,
    claimant: Claimant<'_>,
    certificate: Option<&VerifiedCertificate>,
    word: Option<&SpiffeId>,
) -> bool {
    match (subject, claimant) {
        (Subject::Any, _) => true,
        (Subject::Workload(named), Claimant::Workload { index, .. }) => named == index,
        (Subject::Peer(index), Claimant::Address(address)) => {
            let peer = &model.peers[index];
            let named = match word {
                Some(spiffe_id) => is_vouched_for(peer, spiffe_id),
                None => !peer.has_certificate() || certificate.is_some_and(|found| peer.is_named_by(found)),
            };
            named && calls_from(model, index, address)
        }
        (Subject::Peer(index), Claimant::Forwarded) => {
            certificate.is_some_and(|certificate| model.peers[index].is_named_by(certificate))
        }
        _ => false,
    }
}

/// A peer without networks may call from anywhere.
fn calls_from(model: &Model, peer: usize, address: IpAddr) -> bool {
    let networks = &model.peers[peer].networks;
    networks.is_empty() || networks.iter().any(|network| network.contains(&from_ip(address)))
}

/// A rule that says nothing of certificates means, of a workload, the one that names it: of this node's, or of one that
/// another node vouches for.
fn is_meant(
    certificate: &VerifiedCertificate,
    requirement: Option<&MtlsRequirement>,
    model: &Model,
    claimant: Claimant<'_>,
    word: Option<&SpiffeId>,
) -> bool {
    let asks = requirement
        .is_some_and(|asked| !(asked.spiffe_ids.is_empty() && asked.dns.is_empty() && asked.subjects.is_empty()));
    let met = requirement.is_none_or(|asked| asked.is_met_by(certificate, &model.authorities));
    let own = match claimant {
        Claimant::Workload { spiffe_id, .. } => Some(spiffe_id),
        Claimant::Address(_) | Claimant::Forwarded => word.map(SpiffeId::as_str),
    };
    let is_own = |own: &str| certificate.spiffe_id.as_ref().is_some_and(|id| id.as_str() == own);
    met && (asks || own.is_none_or(is_own))
}

/// Whether a token is the one that a rule asks for.
pub fn check_token(token: &Token, asked: &TokenRequirement, model: &Model) -> Result<(), Unmet> {
    let issuer = model.issuers.get(asked.issuer).ok_or(Unmet::Issuer)?;
    if token.issuer != issuer.name {
        return Err(Unmet::Issuer);
    }
    if asked.audience.as_ref().is_some_and(|audience| !token.audience.contains(audience)) {
        return Err(Unmet::Audience);
    }
    if !asked.scopes.iter().all(|scope| token.scopes.contains(scope)) {
        return Err(Unmet::Scope);
    }
    if !asked.subjects.is_empty() && !token.subject.as_ref().is_some_and(|subject| asked.subjects.contains(subject)) {
        return Err(Unmet::Subject);
    }
    if asked.bound && token.bound_to.is_empty() {
        return Err(Unmet::NotBound);
    }
    Ok(())
}

/// What a rule asks for, as one number: grants given under other terms end when the terms change. Whom it names is in the
/// kernel's cells, but for callers for whom other nodes vouch: [`vouched`] has to be asked again of each.
pub fn digest(rule: &Rule, model: &Model) -> u64 {
    let mut text = String::new();
    for proof in &rule.require {
        // Writing to a string cannot fail.
        let _ = write!(text, "{} ", proof.name());
    }
    if let Some(token) = &rule.token {
        let TokenRequirement { issuer, audience, scopes, bound, subjects } = token;
        let issuer = model.issuers.get(*issuer).map(|issuer| (&issuer.name, &issuer.issuer, &issuer.check));
        let _ = write!(text, "token {issuer:?} {audience:?} {scopes:?} {bound} {subjects:?} ");
    }
    if let Some(permit) = &rule.permit {
        let _ = write!(text, "permit {permit:?} ");
    }
    if let Some(mtls) = &rule.mtls {
        let MtlsRequirement { authority, spiffe_ids, dns, subjects } = mtls;
        let authority = authority.and_then(|index| model.authorities.get(index)).map(|authority| &authority.name);
        let _ = write!(text, "mtls {authority:?} {spiffe_ids:?} {dns:?} {subjects:?}");
    }
    let [a, b, c, d, e, f, g, h, ..] = *Digest::of(text.as_bytes()).as_bytes();
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;
    use crate::{
        grants::proof::{ApiKey, Binding, Vouched},
        policy::{diagnostic::Source, load::texts},
        proofs::testing,
    };

    const POLICY: &str = r#"
        trust_domain = "example.org"
        [[workload]]
        name = "one"
        kind = "service"
        cgroup = "/one"
        [[workload]]
        name = "two"
        kind = "service"
        cgroup = "/two"
        [[issuer]]
        name = "corp"
        kind = "jwt"
        issuer = "https://idp.example.org"
        jwks_file = "jwks.json"
        algorithms = ["ES256"]
        [[authority]]
        name = "ca"
        bundle = "ca.crt"
        trust_domain = "example.org"
        [[authority]]
        name = "other"
        bundle = "other.crt"
        trust_domain = "other.example"
        [[peer]]
        name = "partner"
        networks = ["192.0.2.0/24"]
        spiffe_id = "spiffe://other.example/billing"
        [[peer]]
        name = "office"
        networks = ["198.51.100.0/24"]
        [[service]]
        name = "ledger"
        addresses = ["10.0.0.1"]
        ports = ["tcp/1"]
        [[service]]
        name = "api"
        workload = "two"
        ports = ["tcp/2"]
        [[rule]]
        name = "token"
        from = ["one"]
        to = ["ledger"]
        require = ["cgroup", "token"]
        token = { issuer = "corp", audience = "ledger", scopes = ["r", "w"], subjects = ["alice"], bound = true }
        [[rule]]
        name = "own"
        from = ["one"]
        to = ["ledger"]
        require = ["mtls"]
        [[rule]]
        name = "named"
        from = ["one"]
        to = ["ledger"]
        require = ["mtls"]
        mtls = { authority = "ca", spiffe_id = "spiffe://example.org/shared" }
        [[rule]]
        name = "partners"
        from = ["partner", "office"]
        to = ["api"]
        require = ["mtls"]
        [[rule]]
        name = "free"
        from = ["one"]
        to = ["api"]
        [[rule]]
        name = "key"
        from = ["one"]
        to = ["api"]
        require = ["api-key"]
        when = { days = ["mon"], hours = "08:00-18:00" }
        [[peer]]
        name = "payments"
        networks = ["203.0.113.0/24"]
        spiffe_id = "spiffe://example.org/payments"
        [[peer]]
        name = "refunds"
        networks = ["203.0.113.0/24"]
        spiffe_id = "spiffe://example.org/refunds"
        [[rule]]
        name = "vouched"
        from = ["any"]
        to = ["api"]
        require = ["node"]
        [[rule]]
        name = "vouched-office"
        from = ["office"]
        to = ["api"]
        require = ["node"]
        [[rule]]
        name = "vouched-payments"
        from = ["payments", "refunds"]
        to = ["api"]
        require = ["node"]
        [[rule]]
        name = "both"
        from = ["payments"]
        to = ["api"]
        require = ["node", "mtls"]
        [[rule]]
        name = "both-shared"
        from = ["any"]
        to = ["api"]
        require = ["mtls", "node"]
        mtls = { authority = "ca", spiffe_id = "spiffe://example.org/shared" }
    "#;

    /// A Monday, at noon.
    fn noon() -> Timestamp {
        "2026-11-23T12:00:00Z".parse().unwrap()
    }

    fn model() -> Model {
        let policy = texts(vec![Source { name: "p.toml".into(), text: POLICY.into() }]);
        policy.model.unwrap_or_else(|| panic!("{:?}", policy.diagnostics))
    }

    const ONE: Claimant<'_> = Claimant::Workload { index: 0, spiffe_id: "spiffe://example.org/one" };
    const TWO: Claimant<'_> = Claimant::Workload { index: 1, spiffe_id: "spiffe://example.org/two" };

    fn ask(rule: &str, claimant: Claimant<'_>, proofs: &[Shown], now: Timestamp) -> Result<Timestamp, &'static str> {
        let model = model();
        let rule = model.rules.iter().find(|known| known.name == rule).unwrap();
        check(rule, &model, claimant, proofs, now).map_err(|unmet| unmet.reason())
    }

    fn hour() -> Timestamp {
        noon() + SignedDuration::from_hours(1)
    }

    fn token(change: impl FnOnce(&mut Token)) -> Shown {
        let mut token = Token {
            issuer: "corp".into(),
            iss: "https://idp.example.org".into(),
            subject: Some("alice".into()),
            client_id: None,
            audience: vec!["other".into(), "ledger".into()],
            scopes: vec!["w".into(), "r".into(), "x".into()],
            jti: None,
            hash: Digest::from_bytes([1; 32]),
            key_id: None,
            bound_to: vec![Binding::Dpop],
            ends_with: Vec::new(),
            subject_issuer: None,
            actors: Vec::new(),
            issued_at: None,
            not_after: hour(),
        };
        change(&mut token);
        Shown::Token(Box::new(token))
    }

    fn certificate(authority: &str, id: &str) -> Shown {
        Shown::Mtls(Box::new(testing::certificate(authority, id, hour())))
    }

    #[test]
    fn a_token_is_compared_with_the_rule_once_more() {
        assert_eq!(ask("token", ONE, &[token(|_| {})], noon()), Ok(hour()));
        type Change = fn(&mut Token);
        let changes: [(&str, Change); 7] = [
            ("token_wrong_issuer", |token| token.issuer = "other".into()),
            ("token_wrong_audience", |token| token.audience = vec!["other".into()]),
            ("token_wrong_scope", |token| token.scopes = vec!["r".into()]),
            ("token_wrong_subject", |token| token.subject = Some("bob".into())),
            ("token_wrong_subject", |token| token.subject = None),
            ("token_not_bound", |token| token.bound_to = Vec::new()),
            ("proof_over", |token| token.not_after = noon()),
        ];
        for (reason, change) in changes {
            assert_eq!(ask("token", ONE, &[token(change)], noon()), Err(reason));
        }
        assert_eq!(ask("token", ONE, &[], noon()), Err("authorization_missing"));
        let key = ApiKey { id: "2e3n8nazzq".parse().unwrap(), name: "k".into(), not_after: hour() };
        assert_eq!(ask("token", ONE, &[Shown::ApiKey(key)], noon()), Err("authorization_missing"));
    }

    #[test]
    fn a_rule_is_for_those_whom_it_names() {
        let proofs = [token(|_| {})];
        assert_eq!(ask("token", TWO, &proofs, noon()), Err("rule_not_for_caller"));
        // Who is not of this node has no cgroup to show.
        assert_eq!(ask("token", Claimant::Address([192, 0, 2, 1].into()), &proofs, noon()), Err("proof_missing"));
        assert_eq!(ask("token", Claimant::Forwarded, &proofs, noon()), Err("proof_missing"));
        let own = [certificate("ca", "spiffe://example.org/one")];
        assert_eq!(ask("own", TWO, &own, noon()), Err("rule_not_for_caller"));
        assert_eq!(ask("key", Claimant::Forwarded, &[], noon()), Err("api_key_missing"));
        assert_eq!(ask("free", ONE, &proofs, noon()), Err("rule_not_grantable"));
        let model = model();
        let may =
            |name: &str, claimant| may_ask(model.rules.iter().find(|r| r.name == name).unwrap(), &model, claimant);
        assert!(may("token", ONE) && !may("token", TWO));
        assert!(may("partners", Claimant::Address([192, 0, 2, 1].into())));
        assert!(!may("partners", Claimant::Address([203, 0, 113, 1].into())) && !may("partners", ONE));
    }

    #[test]
    fn a_certificate_names_its_caller_or_whom_the_rule_says() {
        let own = [certificate("ca", "spiffe://example.org/one")];
        let shared = [certificate("ca", "spiffe://example.org/shared")];
        assert_eq!(ask("own", ONE, &own, noon()), Ok(hour()));
        assert_eq!(ask("own", ONE, &shared, noon()), Err("certificate_not_allowed"));
        assert_eq!(ask("named", ONE, &shared, noon()), Ok(hour()));
        assert_eq!(ask("named", ONE, &own, noon()), Err("certificate_not_allowed"));
        let of_other = [certificate("other", "spiffe://example.org/shared")];
        assert_eq!(ask("named", ONE, &of_other, noon()), Err("certificate_not_allowed"));
        assert_eq!(ask("own", ONE, &[], noon()), Err("certificate_missing"));
    }

    #[test]
    fn a_peer_calls_from_its_networks_with_its_certificate() {
        let partner = [certificate("other", "spiffe://other.example/billing")];
        let stranger = [certificate("other", "spiffe://other.example/other")];
        let inside = Claimant::Address([192, 0, 2, 7].into());
        let outside = Claimant::Address([203, 0, 113, 7].into());
        let office = Claimant::Address([198, 51, 100, 7].into());
        assert_eq!(ask("partners", inside, &partner, noon()), Ok(hour()));
        assert_eq!(ask("partners", inside, &stranger, noon()), Err("certificate_not_allowed"));
        assert_eq!(ask("partners", outside, &partner, noon()), Err("rule_not_for_caller"));
        // A peer that is known by its network may show any good certificate.
        assert_eq!(ask("partners", office, &stranger, noon()), Ok(hour()));
        // Through a proxy only the certificate says who it is.
        assert_eq!(ask("partners", Claimant::Forwarded, &partner, noon()), Ok(hour()));
        assert_eq!(ask("partners", Claimant::Forwarded, &stranger, noon()), Err("certificate_not_allowed"));
    }

    #[test]
    fn a_rule_gives_nothing_outside_its_hours() {
        let key = ApiKey { id: "2e3n8nazzq".parse().unwrap(), name: "k".into(), not_after: Timestamp::MAX };
        let key = [Shown::ApiKey(key)];
        assert_eq!(ask("key", ONE, &key, noon()), Ok(Timestamp::MAX));
        let evening = noon() + SignedDuration::from_hours(7);
        assert_eq!(ask("key", ONE, &key, evening), Err("rule_not_in_force"));
    }

    #[test]
    fn a_nodes_word_counts_for_whom_the_rule_names() {
        let model = model();
        let opens = |name: &str, id: &str| {
            let rule = model.rules.iter().find(|rule| rule.name == name).unwrap();
            vouched(rule, &model, &id.parse().unwrap())
        };
        for id in ["spiffe://example.org/payments", "spiffe://example.org/one", "spiffe://other.example/billing"] {
            assert!(opens("vouched", id) && opens("vouched-office", id), "{id}");
            assert_eq!(opens("vouched-payments", id), id.ends_with("/payments"), "{id}");
            // What has to be shown is not replaced by a node's word, and what is denied or free needs none.
            for rule in ["token", "own", "named", "partners", "free", "key"] {
                assert!(!opens(rule, id), "{rule} opens to {id}");
            }
        }
        assert!(opens("vouched-payments", "spiffe://example.org/refunds"));
        for id in ["spiffe://example.org/payments/a", "spiffe://example.org/payment", "spiffe://other.example/payments"]
        {
            assert!(!opens("vouched-payments", id), "{id}");
        }
    }

    #[test]
    fn a_peer_for_which_no_node_vouches_is_nobody_to_a_vouched_rule() {
        let mut model = model();
        let rule = model.rules.iter().find(|rule| rule.name == "vouched-payments").unwrap().clone();
        let id: SpiffeId = "spiffe://example.org/payments".parse().unwrap();
        let payments = model.peers.iter().position(|peer| peer.name == "payments").unwrap();
        assert!(vouched(&rule, &model, &id));
        model.peers[payments].subject = Some("CN=payments".into());
        assert!(!vouched(&rule, &model, &id));
        model.peers[payments].subject = None;
        model.peers[payments].dns = Some("payments.example.org".parse().unwrap());
        assert!(!vouched(&rule, &model, &id));
        let denial = Rule { deny: true, from: vec![Subject::Any], ..rule.clone() };
        let local = Rule { from: vec![Subject::Workload(0), Subject::Unmanaged], ..rule.clone() };
        for rule in [denial, local] {
            assert!(!vouched(&rule, &model, &id), "{rule:?}");
        }
    }

    #[test]
    fn nobody_gets_a_grant_by_asking_where_a_nodes_word_is_all() {
        let shown = [certificate("ca", "spiffe://example.org/payments"), token(|_| {})];
        let near = Claimant::Address([203, 0, 113, 7].into());
        for rule in ["vouched", "vouched-office", "vouched-payments"] {
            for claimant in [ONE, TWO, near, Claimant::Address([198, 51, 100, 7].into()), Claimant::Forwarded] {
                assert_eq!(ask(rule, claimant, &shown, noon()), Err("rule_not_grantable"), "{rule} {claimant:?}");
                assert_eq!(ask(rule, claimant, &[], noon()), Err("rule_not_grantable"), "{rule} {claimant:?}");
            }
        }
    }

    fn word(id: &str) -> Shown {
        let certificate = testing::certificate("ca", "spiffe://example.org/node/a", hour());
        Shown::Node(Box::new(Vouched { node: "a".into(), spiffe_id: id.parse().unwrap(), certificate }))
    }

    /// A node's word and a certificate, of one and the same caller, from where the rule says.
    #[test]
    fn a_nodes_word_and_what_is_shown_have_to_be_of_one_caller() {
        let (near, far) = (Claimant::Address([203, 0, 113, 7].into()), Claimant::Address([198, 51, 100, 7].into()));
        let (payments, refunds) = ("spiffe://example.org/payments", "spiffe://example.org/refunds");
        let of = |id| certificate("ca", id);
        assert_eq!(ask("both", near, &[word(payments), of(payments)], noon()), Ok(hour()));
        for (claimant, shown, reason) in [
            (near, vec![of(payments)], "node_identity_missing"),
            (near, vec![word(payments)], "certificate_missing"),
            (near, vec![word(refunds), of(payments)], "certificate_not_allowed"),
            (near, vec![word(payments), of(refunds)], "certificate_not_allowed"),
            (far, vec![word(payments), of(payments)], "rule_not_for_caller"),
            (ONE, vec![of(payments)], "node_identity_missing"),
            (Claimant::Forwarded, vec![of(payments)], "node_identity_missing"),
        ] {
            assert_eq!(ask("both", claimant, &shown, noon()), Err(reason), "{claimant:?} {shown:?}");
        }
        assert_eq!(ask("both", near, &[word(payments), of(payments)], hour()), Err("proof_over"));
        // Where the rule says whose certificate it is, that one may be another's than the caller's.
        let shared = of("spiffe://example.org/shared");
        assert_eq!(ask("both-shared", far, &[word(refunds), shared.clone()], noon()), Ok(hour()));
        assert_eq!(ask("both-shared", far, &[word(refunds), of(refunds)], noon()), Err("certificate_not_allowed"));
        assert_eq!(ask("both-shared", far, &[shared], noon()), Err("node_identity_missing"));
        // Where it asks for no node's word, one is worth nothing.
        assert_eq!(ask("partners", near, &[word(payments), of(payments)], noon()), Err("rule_not_for_caller"));
    }

    #[test]
    fn whom_else_a_vouched_rule_names_changes_nothing_for_a_caller() {
        const REFUNDS: &str = "spiffe://example.org/refunds";
        let changed = |change: fn(&mut Model)| {
            let mut model = model();
            change(&mut model);
            let rule = model.rules.iter().find(|rule| rule.name == "vouched-payments").unwrap();
            (digest(rule, &model), vouched(rule, &model, &REFUNDS.parse().unwrap()))
        };
        let before = changed(|_| {});
        assert!(before.1);
        assert_eq!(before, changed(|model| renamed(model, Some("spiffe://example.org/payments2"))));
        assert_eq!(before, changed(|model| rule_of(model).from.push(Subject::Any)));
        assert_eq!(before, changed(|model| rule_of(model).from.reverse()));
        // The rule asks for the same, and not of this one.
        assert_eq!((before.0, false), changed(|model| rule_of(model).from.truncate(1)));
        // It asks for more.
        assert_ne!(before.0, changed(|model| rule_of(model).require.push(Proof::ApiKey)).0);
    }

    fn rule_of(model: &mut Model) -> &mut Rule {
        model.rules.iter_mut().find(|rule| rule.name == "vouched-payments").unwrap()
    }

    fn renamed(model: &mut Model, id: Option<&str>) {
        let peer = model.peers.iter_mut().find(|peer| peer.name == "payments").unwrap();
        peer.spiffe_id = id.map(|id| id.parse().unwrap());
    }

    #[test]
    fn other_terms_have_another_digest() {
        let model = model();
        let mut digests: Vec<u64> = model.rules.iter().map(|rule| digest(rule, &model)).collect();
        let again: Vec<u64> = model.rules.iter().map(|rule| digest(rule, &model)).collect();
        assert_eq!(digests, again);
        digests.sort_unstable();
        digests.dedup();
        // `own` and `partners` ask for the same, and so do the three that ask for a node's word alone.
        assert_eq!(digests.len(), model.rules.len() - 3);
    }
}
