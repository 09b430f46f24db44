//! What operators see of the way from a caller to a grant, and back: how handshakes, proofs and questions to issuers ended, how
//! fast revocations were, when certificates end.
//!
//! Enters: what control counted, which may be invented; what this process decided and measured. Leaves: Prometheus' text.
//! Never: a label that is neither in a fixed list nor a name of the policy in force.

pub mod agents;
pub mod histogram;
pub mod results;

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use self::{
    histogram::Histogram,
    results::{ACCEPTED, Checked, Fetched},
};
use super::{Daemon, granting::Effect, status::family};
use crate::{
    grants::proof::Shown,
    ipc::{Counted, Ending, Refusal},
    policy::model::Model,
};

type Results = BTreeMap<String, u64>;

/// Counted since the daemon started: control may end and start again meanwhile.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Metrics {
    pub handshakes: Results,
    /// Requests of other nodes for sessions.
    pub node_sessions: Results,
    pub proofs: BTreeMap<Checked, Results>,
    /// Tokens whose verification was remembered.
    pub token_cache_hits: u64,
    /// By issuer.
    pub fetches: BTreeMap<String, BTreeMap<Fetched, Results>>,
    /// Tokens of this node's own that were asked for.
    #[serde(default)]
    pub exchanges: Results,
    #[serde(default)]
    pub agents: agents::Agents,
    /// From the decision until no packet passes.
    pub cut: Histogram,
    /// From the decision until the last socket was closed.
    pub closed: Histogram,
    /// When the first of an authority's certificates ends, in seconds of Unix time.
    pub bundles_end: BTreeMap<String, u64>,
    /// When the first of an authority's revocation lists is due for an update.
    pub lists_due: BTreeMap<String, u64>,
    /// When the first certificate of the listener's chain ends.
    pub listener_ends: Option<u64>,
}

impl Daemon {
    /// What control counted since it last said so.
    pub fn counted(&mut self, counts: Vec<(Counted, u32)>) {
        self.metrics.counted(&self.active.prepared.model, counts);
    }

    /// When what control read of the policy's files ends.
    pub fn ends(&mut self, ends: Vec<(Ending, Option<Timestamp>)>) {
        self.metrics.ends(&self.active.prepared.model, ends);
    }
}

impl Metrics {
    fn counted(&mut self, model: &Model, counts: Vec<(Counted, u32)>) {
        for (what, times) in counts {
            let counter = match what {
                Counted::Handshake { result } => of(&mut self.handshakes, results::handshake(&result)),
                Counted::NodeSession { result } => of(&mut self.node_sessions, results::node_session(&result)),
                Counted::Proof { proof, result } => self.proof(proof, proof.result_of_control(&result)),
                Counted::CachedToken => &mut self.token_cache_hits,
                Counted::Webhook { result } => of(&mut self.agents.webhook, results::notice(&result)),
                Counted::Fetch { issuer, kind, result } => {
                    // Of the policy before this one, or invented.
                    if !model.issuers.iter().any(|known| known.name == issuer) {
                        continue;
                    }
                    let results = self.fetches.entry(issuer).or_default().entry(kind).or_default();
                    of(results, kind.result(&result))
                }
            };
            *counter = counter.saturating_add(times.into());
        }
    }

    fn ends(&mut self, model: &Model, ends: Vec<(Ending, Option<Timestamp>)>) {
        for (what, at) in ends {
            // Whatever ended before 1970 ended.
            let at = at.map(|at| u64::try_from(at.as_second()).unwrap_or(0));
            let (map, authority) = match what {
                Ending::Bundle { authority } => (&mut self.bundles_end, authority),
                Ending::Lists { authority } => (&mut self.lists_due, authority),
                Ending::Listener => {
                    self.listener_ends = at;
                    continue;
                }
            };
            match at {
                Some(at) if model.authorities.iter().any(|known| known.name == authority) => {
                    map.insert(authority, at);
                }
                _ => drop(map.remove(&authority)),
            }
        }
    }

    /// Forgets what another policy named.
    pub(super) fn retain(&mut self, model: &Model) {
        self.agents.retain(model);
        self.fetches.retain(|name, _| model.issuers.iter().any(|issuer| issuer.name == *name));
        for map in [&mut self.bundles_end, &mut self.lists_due] {
            map.retain(|name, _| model.authorities.iter().any(|authority| authority.name == *name));
        }
    }

    /// Somebody asked for a token of this node's own; reasons are this process's.
    pub(super) fn exchanged(&mut self, refusal: Option<&Refusal>) {
        let result = refusal.map_or(ACCEPTED, |refusal| &refusal.reason);
        count(self.exchanges.entry(result.to_owned()).or_default());
    }

    /// Proofs that this process had the last word about: what control refuses itself, it counts itself.
    pub(super) fn decided(&mut self, shown: &[Shown], refusal: Option<&Refusal>) {
        let kinds: Vec<Checked> = shown.iter().flat_map(Checked::of).copied().collect();
        let refused = refusal.and_then(|refusal| Some((Checked::refused_as(&refusal.reason)?, &refusal.reason)));
        // A key that is refused is not among the proofs; anything else is, or was not shown.
        let refused = refused.filter(|(proof, _)| *proof == Checked::ApiKey || kinds.contains(proof));
        for proof in kinds.into_iter().filter(|proof| refused.is_none_or(|(refused, _)| refused != *proof)) {
            count(self.proof(proof, ACCEPTED));
        }
        if let Some((proof, reason)) = refused {
            count(self.proof(proof, proof.result(reason)));
        }
    }

    /// Another node asked for a session, and what this process said to that.
    pub(super) fn node_asked(&mut self, refusal: Option<&Refusal>) {
        let result = refusal.map_or(ACCEPTED, |refusal| results::node_session(&refusal.reason));
        count(of(&mut self.node_sessions, result));
    }

    /// What a revocation did. One that ended no grant was not measured.
    pub(super) fn revoked(&mut self, effect: &Effect) {
        if effect.grants > 0 {
            self.cut.add(effect.cut_microseconds);
            self.closed.add(effect.microseconds);
        }
    }

    fn proof(&mut self, proof: Checked, result: &'static str) -> &mut u64 {
        of(self.proofs.entry(proof).or_default(), result)
    }

    pub(super) fn write(&self, out: &mut String) {
        let label = |result: &String| format!("{{result=\"{result}\"}}");
        let handshakes = self.handshakes.iter().map(|(result, count)| (label(result), *count));
        family(out, "authd_tls_handshakes_total", "counter", "TLS handshakes, by how they ended.", handshakes);
        let exchanges = self.exchanges.iter().map(|(result, count)| (label(result), *count));
        family(
            out,
            "authd_tokens_exchanged_total",
            "counter",
            "Tokens of this node's own that were asked for.",
            exchanges,
        );
        self.agents.write(out);
        let sessions = self.node_sessions.iter().map(|(result, count)| (label(result), *count));
        family(out, "authd_node_sessions_total", "counter", "Requests of other nodes for sessions.", sessions);
        let proofs = self.proofs.iter().flat_map(|(proof, results)| {
            let label = move |result| format!("{{proof=\"{}\",result=\"{result}\"}}", proof.name());
            results.iter().map(move |(result, count)| (label(result), *count))
        });
        family(out, "authd_proof_checks_total", "counter", "Proofs that were looked at.", proofs);
        let hits = [(String::new(), self.token_cache_hits)];
        family(out, "authd_token_cache_hits_total", "counter", "Tokens whose verification was remembered.", hits);
        let fetches = self.fetches.iter().flat_map(|(issuer, kinds)| {
            kinds.iter().flat_map(move |(kind, results)| {
                let kind = kind.name();
                let label = move |result| format!("{{issuer=\"{issuer}\",kind=\"{kind}\",result=\"{result}\"}}");
                results.iter().map(move |(result, count)| (label(result), *count))
            })
        });
        family(out, "authd_fetches_total", "counter", "Questions to issuers.", fetches);
        self.cut.write(out, "authd_revocation_cut_seconds", "From a revocation's decision until no packet passes.");
        self.closed.write(out, "authd_revocation_seconds", "From a revocation's decision to the last closed socket.");
        let bundles = self.bundles_end.iter();
        let bundles = bundles.map(|(name, at)| (format!("{{certificate=\"authority\",authority=\"{name}\"}}"), *at));
        let listener = self.listener_ends.map(|at| ("{certificate=\"listener\",authority=\"\"}".to_owned(), at));
        let ends = bundles.chain(listener);
        let name = "authd_certificate_not_after_timestamp_seconds";
        family(out, name, "gauge", "When the first certificate of a file ends.", ends);
        let due = self.lists_due.iter().map(|(name, at)| (format!("{{authority=\"{name}\"}}"), *at));
        let name = "authd_crl_next_update_timestamp_seconds";
        family(out, name, "gauge", "When the first revocation list of an authority is due.", due);
    }
}

fn of<'a>(results: &'a mut Results, result: &'static str) -> &'a mut u64 {
    results.entry(result.to_owned()).or_default()
}

fn count(counter: &mut u64) {
    *counter = counter.saturating_add(1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        daemon::{granting::refusal, status::Status},
        digest::Digest,
        grants::proof::{ApiKey, Binding, Token},
        policy::{diagnostic::Source, load::texts},
        proofs::testing,
    };

    const POLICY: &str = r#"
        trust_domain = "example.org"
        [[authority]]
        name = "ca"
        bundle = "ca.crt"
        [[issuer]]
        name = "corp"
        kind = "jwt"
        issuer = "https://idp.example.org"
        jwks_url = "https://idp.example.org/keys"
        algorithms = ["ES256"]
    "#;

    fn model(policy: &str) -> Model {
        let policy = texts(vec![Source { name: "p.toml".into(), text: policy.into() }]);
        policy.model.unwrap_or_else(|| panic!("{:?}", policy.diagnostics))
    }

    fn handshake(result: &str) -> Counted {
        Counted::Handshake { result: result.to_owned() }
    }

    fn node_session(result: &str) -> Counted {
        Counted::NodeSession { result: result.to_owned() }
    }

    fn fetch(issuer: &str, result: &str) -> Counted {
        Counted::Fetch { issuer: issuer.to_owned(), kind: Fetched::Jwks, result: result.to_owned() }
    }

    fn proof(proof: Checked, result: &str) -> Counted {
        Counted::Proof { proof, result: result.to_owned() }
    }

    fn token(bound_to: Vec<Binding>) -> Shown {
        Shown::Token(Box::new(Token {
            ends_with: Vec::new(),
            subject_issuer: None,
            actors: Vec::new(),
            issuer: "corp".into(),
            iss: "https://idp.example.org".into(),
            subject: None,
            client_id: None,
            audience: Vec::new(),
            scopes: Vec::new(),
            jti: None,
            hash: Digest::from_bytes([1; 32]),
            key_id: None,
            bound_to,
            issued_at: None,
            not_after: Timestamp::MAX,
        }))
    }

    fn certificate() -> Shown {
        Shown::Mtls(Box::new(testing::certificate("ca", "spiffe://example.org/a", Timestamp::MAX)))
    }

    fn key() -> Shown {
        Shown::ApiKey(ApiKey { id: "2e3n8nazzq".parse().unwrap(), name: "k".into(), not_after: Timestamp::MAX })
    }

    fn samples(metrics: &Metrics) -> Vec<String> {
        let mut text = String::new();
        metrics.write(&mut text);
        let always = ["#", "authd_revocation", "authd_approvals_waiting", "authd_mcp_servers_running"];
        let is_sample = |line: &&str| !always.iter().any(|start| line.starts_with(start));
        text.lines().filter(is_sample).map(str::to_owned).collect()
    }

    #[test]
    fn counts_are_added_to_what_there_is_and_stay_at_their_end() {
        let (model, mut metrics) = (model(POLICY), Metrics::default());
        metrics
            .counted(&model, vec![(handshake("ok"), 2), (handshake("handshake_failed"), 1), (Counted::CachedToken, 3)]);
        metrics.counted(&model, vec![(handshake("ok"), u32::MAX), (handshake("ok"), u32::MAX)]);
        assert_eq!(metrics.handshakes["ok"], 2 + 2 * u64::from(u32::MAX));
        metrics.handshakes.insert("ok".to_owned(), u64::MAX - 1);
        metrics.counted(&model, vec![(handshake("ok"), 5), (Counted::CachedToken, 0)]);
        assert_eq!((metrics.handshakes["ok"], metrics.token_cache_hits), (u64::MAX, 3));
    }

    #[test]
    fn metrics_are_written_as_prometheus_reads_them() {
        let (model, mut metrics) = (model(POLICY), Metrics::default());
        let counts = [
            (handshake("ok"), 2),
            (handshake("wrong_server_name"), 1),
            (node_session("tls13_required"), 2),
            (proof(Checked::Token, "signature_invalid"), 4),
            (proof(Checked::ApiKey, "api_key_malformed"), 1),
            (Counted::CachedToken, 3),
            (fetch("corp", "ok"), 1),
            (fetch("corp", "jwks_shape"), 2),
        ];
        metrics.counted(&model, counts.into());
        let at = |second| Timestamp::from_second(second).ok();
        let authority = || "ca".to_owned();
        let ends = [
            (Ending::Bundle { authority: authority() }, at(1_900_000_000)),
            (Ending::Lists { authority: authority() }, at(1_800_000_000)),
            (Ending::Listener, at(1_850_000_000)),
        ];
        metrics.ends(&model, ends.into());
        metrics.node_asked(None);
        metrics.node_asked(Some(&refusal("too_many_sessions", "")));
        assert_eq!(
            samples(&metrics),
            [
                "authd_tls_handshakes_total{result=\"ok\"} 2",
                "authd_tls_handshakes_total{result=\"wrong_server_name\"} 1",
                "authd_node_sessions_total{result=\"accepted\"} 1",
                "authd_node_sessions_total{result=\"tls13_required\"} 2",
                "authd_node_sessions_total{result=\"too_many_sessions\"} 1",
                "authd_proof_checks_total{proof=\"token\",result=\"signature_invalid\"} 4",
                "authd_proof_checks_total{proof=\"api-key\",result=\"api_key_malformed\"} 1",
                "authd_token_cache_hits_total 3",
                "authd_fetches_total{issuer=\"corp\",kind=\"jwks\",result=\"jwks_shape\"} 2",
                "authd_fetches_total{issuer=\"corp\",kind=\"jwks\",result=\"ok\"} 1",
                "authd_certificate_not_after_timestamp_seconds{certificate=\"authority\",authority=\"ca\"} 1900000000",
                "authd_certificate_not_after_timestamp_seconds{certificate=\"listener\",authority=\"\"} 1850000000",
                "authd_crl_next_update_timestamp_seconds{authority=\"ca\"} 1800000000",
            ]
        );
        // The command line gets them as JSON.
        let status = Status { control: metrics, ..Status::default() };
        let read: Status = serde_json::from_str(&serde_json::to_string(&status).unwrap()).unwrap();
        assert_eq!(read.metrics(), status.metrics());
    }

    #[test]
    fn whoever_takes_control_over_adds_no_text_and_little_memory() {
        let (model, mut metrics) = (model(POLICY), Metrics::default());
        for number in 0..10_000 {
            let text = format!("x{number}\"}} 1\nauthd_x");
            let names = |issuer: &str| [fetch(issuer, &text), fetch(&text, "ok"), fetch("", "ok")];
            let proofs = [Checked::Mtls, Checked::Token, Checked::Dpop, Checked::ApiKey].map(|kind| proof(kind, &text));
            let counts = names("corp").into_iter().chain(proofs).chain([
                handshake(&text),
                node_session(&text),
                Counted::Webhook { result: text.clone() },
            ]);
            metrics.counted(&model, counts.map(|what| (what, 1)).collect());
            let invented = [Ending::Bundle { authority: text.clone() }, Ending::Lists { authority: text }];
            metrics.ends(&model, invented.map(|what| (what, Some(Timestamp::MAX))).into());
        }
        let samples = samples(&metrics);
        assert_eq!(samples.len(), 9, "{samples:?}");
        assert!(samples.iter().all(|line| line.contains("result=\"other\"} 10000") || line.ends_with("hits_total 0")));
        // It compares no API keys.
        metrics.counted(
            &model,
            vec![(proof(Checked::ApiKey, ACCEPTED), 1), (proof(Checked::ApiKey, "api_key_revoked"), 1)],
        );
        assert_eq!(metrics.proofs[&Checked::ApiKey], Results::from([("other".to_owned(), 10_002)]));
    }

    #[test]
    fn a_decision_counts_each_proof_once() {
        let decided = |shown: &[Shown], reason: Option<&str>| {
            let mut metrics = Metrics::default();
            metrics.decided(shown, reason.map(|reason| refusal(reason, "")).as_ref());
            let of = |(proof, results): (Checked, Results)| {
                results.into_iter().map(move |(result, count)| format!("{} {result} {count}", proof.name()))
            };
            metrics.proofs.into_iter().flat_map(of).collect::<Vec<_>>().join(", ")
        };
        let both = [certificate(), token(vec![Binding::Certificate])];
        assert_eq!(decided(&both, None), "mtls accepted 1, token accepted 1");
        assert_eq!(decided(&[token(vec![Binding::Dpop])], None), "token accepted 1, dpop accepted 1");
        assert_eq!(decided(&[key()], None), "api-key accepted 1");
        assert_eq!(decided(&both, Some("token_revoked")), "mtls accepted 1, token token_revoked 1");
        assert_eq!(decided(&both, Some("certificate_not_allowed")), "mtls certificate_not_allowed 1, token accepted 1");
        assert_eq!(decided(&[certificate()], Some("api_key_expired")), "mtls accepted 1, api-key api_key_expired 1");
        // What is wrong is no proof's fault, or one's that was not shown.
        assert_eq!(decided(&both, Some("grants_full")), "mtls accepted 1, token accepted 1");
        assert_eq!(decided(&both[1..], Some("spiffe_id_revoked")), "token accepted 1");
        assert_eq!(decided(&[], Some("rule_unknown")), "");
    }

    #[test]
    fn only_revocations_that_ended_something_are_measured() {
        let mut metrics = Metrics::default();
        metrics.revoked(&Effect { cut_microseconds: 1, microseconds: 2, ..Effect::default() });
        assert_eq!((metrics.cut.count(), metrics.closed.count()), (0, 0));
        metrics.revoked(&Effect { grants: 3, cut_microseconds: 40, microseconds: 300, ..Effect::default() });
        let mut text = String::new();
        metrics.write(&mut text);
        assert!(
            text.contains("authd_revocation_cut_seconds_sum 0.00004\nauthd_revocation_cut_seconds_count 1\n"),
            "{text}"
        );
        assert!(text.contains("authd_revocation_seconds_sum 0.0003\nauthd_revocation_seconds_count 1\n"), "{text}");
    }

    #[test]
    fn ends_are_those_of_the_policy_in_force() {
        let (model_now, mut metrics) = (model(POLICY), Metrics::default());
        let bundle = |name: &str, at| vec![(Ending::Bundle { authority: name.to_owned() }, at)];
        metrics.ends(&model_now, bundle("ca", Timestamp::from_second(7).ok()));
        metrics.ends(&model_now, bundle("another", Timestamp::from_second(8).ok()));
        assert_eq!(metrics.bundles_end, BTreeMap::from([("ca".to_owned(), 7)]));
        metrics.ends(&model_now, bundle("ca", Some(Timestamp::MIN)));
        assert_eq!(metrics.bundles_end["ca"], 0);
        // A file that cannot be read any more.
        metrics.ends(&model_now, bundle("ca", None));
        assert!(metrics.bundles_end.is_empty());
        metrics.ends(&model_now, bundle("ca", Some(Timestamp::MAX)));
        metrics.counted(&model_now, vec![(fetch("corp", "ok"), 1)]);
        metrics.retain(&model("trust_domain = \"example.org\""));
        assert!(metrics.bundles_end.is_empty() && metrics.fetches.is_empty());
    }
}
