//! Which results a metric can have: fixed lists, so that no label is anybody's text, and there are not more of them than here.
//!
//! Enters: what a process that may have been taken over calls a result. Leaves: a name of these lists, or [`OTHER`].

use serde::{Deserialize, Serialize};

use crate::grants::proof::{Binding, Shown};

pub const OK: &str = "ok";
pub const ACCEPTED: &str = "accepted";
/// A name that is in no list.
pub const OTHER: &str = "other";

/// A proof that was looked at. The names are those of records; a DPoP proof comes with a token.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Checked {
    Mtls,
    Token,
    Dpop,
    ApiKey,
}

/// What an issuer is asked for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fetched {
    Jwks,
    Introspection,
}

type Names = &'static [&'static str];

const HANDSHAKE: Names = &[OK, "handshake_failed", "handshake_timeout", "wrong_server_name", "unavailable"];
const NOTICE: Names = &[OK, "failed"];
/// Of a node that asks for a session, besides those of its certificate.
const NODE_SESSION: Names = &[
    ACCEPTED,
    "node_unknown",
    "node_not_remote",
    "tls13_required",
    "too_many_sessions",
    "session_over",
    "store_unusable",
    "unavailable",
];
const JSON: Names =
    &["json_oversize", "json_depth", "json_members", "json_duplicate_member", "json_syntax", "json_not_object"];
/// Of what is signed: tokens and DPoP proofs.
const SIGNED: Names = &[
    "token_oversize",
    "token_malformed",
    "token_encoding",
    "header_malformed",
    "kid_malformed",
    "alg_none",
    "alg_symmetric",
    "alg_not_allowed",
    "crit_unsupported",
    "payload_unencoded",
    "header_key_reference",
    "header_embedded_key",
    "header_key_missing",
];
const TOKEN: Names = &[
    "authorization_missing",
    "authorization_repeated",
    "authorization_malformed",
    "authorization_scheme",
    "kid_unknown",
    "kid_missing",
    "kid_ambiguous",
    "key_algorithm_mismatch",
    "signature_invalid",
    "token_type_mismatch",
    "claim_missing",
    "claim_malformed",
    "issuer_mismatch",
    "audience_mismatch",
    "scope_insufficient",
    "subject_not_allowed",
    "token_expired",
    "token_not_yet_valid",
    "token_issued_in_future",
    "token_long_lived",
    "token_inactive",
    "introspection_malformed",
    "keys_unavailable",
    "keys_stale",
    "confirmation_unsupported",
    // In whose hands it is.
    "token_not_bound",
    "bound_certificate_missing",
    "bound_certificate_mismatch",
    "dpop_bound_as_bearer",
    "dpop_not_bound",
    "dpop_key_mismatch",
    // Found by dataplane.
    "token_wrong_issuer",
    "token_wrong_audience",
    "token_wrong_scope",
    "token_wrong_subject",
    "token_revoked",
    "issuer_revoked",
];
const DPOP: Names = &[
    "dpop_missing",
    "dpop_repeated",
    "dpop_type",
    "dpop_signature_invalid",
    "dpop_claim_malformed",
    "dpop_method_mismatch",
    "dpop_uri_mismatch",
    "dpop_too_old",
    "dpop_in_future",
    "dpop_token_mismatch",
    "dpop_nonce_missing",
    "dpop_nonce_unknown",
    "dpop_nonce_old",
    "dpop_replayed",
    "dpop_key_quota",
    "dpop_memory_full",
    // Of the key in its header.
    "jwk_private",
    "jwk_symmetric",
    "jwk_unsupported",
    "jwk_usage",
    "jwk_malformed",
    "jwk_weak_rsa",
    "jwk_point",
];
const MTLS: Names = &[
    "certificate_missing",
    "no_certificate",
    "malformed_certificate",
    "malformed_name",
    "many_uris",
    "bad_spiffe_id",
    "ca_as_leaf",
    "issuer_not_ca",
    "wrong_key_usage",
    "unknown_issuer",
    "bad_signature",
    "path_too_long",
    "name_constraint",
    "wrong_trust_domain",
    "certificate_expired",
    "certificate_not_yet_valid",
    "anchor_expired",
    "anchor_not_yet_valid",
    "crl_missing",
    "crl_expired",
    "bad_crl",
    "chain_too_long",
    "chain_too_large",
    "chain_too_complex",
    "weak_key",
    "unsupported_key",
    "unsupported_algorithm",
    "unsupported_extension",
    "unsupported_certificate",
    // By its issuer, or found by dataplane.
    "certificate_revoked",
    "certificate_not_allowed",
    "spiffe_id_revoked",
];
const API_KEY: Names = &[
    "api_key_missing",
    "api_key_malformed",
    "api_key_unknown",
    "api_key_expired",
    "api_key_revoked",
    "api_key_wrong_rule",
    "api_key_wrong_network",
    "api_key_wrong_workload",
    "api_key_rate_limited",
];
/// An issuer does not answer, or answers with something else.
const ISSUER: Names = &[
    "issuer_unreachable",
    "issuer_bad_status",
    "issuer_answer_oversize",
    "issuer_address_private",
    "issuer_misconfigured",
];
const KEY_SET: Names = &["jwks_shape", "jwks_too_many_keys", "jwks_private_material", "jwks_no_usable_key"];

impl Checked {
    const ALL: [Self; 4] = [Self::Mtls, Self::Token, Self::Dpop, Self::ApiKey];

    /// What was looked at for a proof that was accepted.
    pub fn of(shown: &Shown) -> &'static [Self] {
        match shown {
            Shown::Mtls(_) => &[Self::Mtls],
            Shown::Token(token) if token.bound_to.contains(&Binding::Dpop) => &[Self::Token, Self::Dpop],
            Shown::Token(_) => &[Self::Token],
            Shown::ApiKey(_) => &[Self::ApiKey],
            Shown::Node(_) | Shown::Action(_) | Shown::Approval(_) => &[],
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Mtls => "mtls",
            Self::Token => "token",
            Self::Dpop => "dpop",
            Self::ApiKey => "api-key",
        }
    }

    fn results(self) -> &'static [Names] {
        match self {
            Self::Mtls => &[&[ACCEPTED], MTLS],
            Self::Token => &[&[ACCEPTED], TOKEN, SIGNED, JSON, ISSUER],
            Self::Dpop => &[&[ACCEPTED], DPOP, SIGNED, JSON],
            Self::ApiKey => &[&[ACCEPTED], API_KEY],
        }
    }

    pub fn result(self, name: &str) -> &'static str {
        find(self.results(), name).unwrap_or(OTHER)
    }

    /// The same of what control says. Secrets of API keys it never compares.
    pub fn result_of_control(self, name: &str) -> &'static str {
        match (self, name) {
            (Self::ApiKey, "api_key_missing" | "api_key_malformed") => self.result(name),
            (Self::ApiKey, _) => OTHER,
            _ => self.result(name),
        }
    }

    /// What a refusal of dataplane's is about, if it is about a proof.
    pub fn refused_as(reason: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|proof| find(proof.results(), reason).is_some())
    }
}

impl Fetched {
    pub fn name(self) -> &'static str {
        match self {
            Self::Jwks => "jwks",
            Self::Introspection => "introspection",
        }
    }

    fn results(self) -> &'static [Names] {
        match self {
            Self::Jwks => &[&[OK], ISSUER, KEY_SET, JSON],
            Self::Introspection => &[&[OK, "introspection_malformed"], ISSUER],
        }
    }

    pub fn result(self, name: &str) -> &'static str {
        find(self.results(), name).unwrap_or(OTHER)
    }
}

pub fn handshake(name: &str) -> &'static str {
    find(&[HANDSHAKE], name).unwrap_or(OTHER)
}

/// Whether people were told.
pub fn notice(name: &str) -> &'static str {
    find(&[NOTICE], name).unwrap_or(OTHER)
}

pub fn node_session(name: &str) -> &'static str {
    find(&[NODE_SESSION, MTLS], name).unwrap_or(OTHER)
}

fn find(lists: &[Names], name: &str) -> Option<&'static str> {
    lists.iter().copied().flatten().copied().find(|known| *known == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reasons of these sections that no proof and no fetch ends with: those of the command line, of files that make the
    /// policy bad, and the name that a challenge has.
    const OTHERS: [&str; 21] = [
        "issuer_unknown",
        "issuer_ambiguous",
        "introspection_only",
        "unreadable_file",
        "use_dpop_nonce",
        "malformed_bundle",
        "bundle_too_large",
        "no_anchor",
        "anchor_not_ca",
        "private_key_in_bundle",
        "malformed_crl",
        "unsupported_crl",
        "crl_too_large",
        "no_crl",
        "api_key_bad_name",
        "api_key_bad_lifetime",
        "api_key_bad_scope",
        "api_key_unknown_name",
        "api_key_duplicate",
        "api_keys_full",
        "api_key_not_found",
    ];

    /// docs/REASONS.md is compared with the code by `cargo xtask test check`, and this with docs/REASONS.md.
    #[test]
    fn every_reason_of_a_proof_is_a_result() {
        const TEXT: &str = include_str!("../../../../docs/REASONS.md");
        let mut seen = 0;
        for section in
            TEXT.split("\n## ").filter(|text| text.starts_with("Proofs that") || text.starts_with("API keys"))
        {
            let rows = section.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
            for name in rows.flat_map(|cell| cell.split('`').step_by(2)).filter(|name| !name.is_empty()) {
                let is_result = Checked::refused_as(name).is_some() || Fetched::Jwks.result(name) == name;
                assert!(is_result != OTHERS.contains(&name), "`{name}`: in no list of results, or in both");
                seen += 1;
            }
        }
        assert!(seen > 120, "{seen} names");
        // And no list has a name that nobody explains.
        let all = Checked::ALL.iter().flat_map(|proof| proof.results());
        let all = all
            .chain(Fetched::Jwks.results())
            .chain(Fetched::Introspection.results())
            .copied()
            .chain([HANDSHAKE, NODE_SESSION]);
        for name in all.flatten().filter(|name| ![OK, ACCEPTED].contains(name)) {
            assert!(TEXT.contains(&format!("`{name}`")), "{name}");
        }
    }

    #[test]
    fn no_text_of_others_becomes_a_result() {
        for text in ["", "ok ", "OK", "other", "x\"} 1\nauthd_x 1", "../ok", &"ok".repeat(10_000)] {
            assert_eq!((handshake(text), node_session(text)), (OTHER, OTHER));
            for proof in Checked::ALL {
                assert_eq!(proof.result(text), OTHER);
            }
            assert_eq!((Fetched::Jwks.result(text), Fetched::Introspection.result(text)), (OTHER, OTHER));
        }
        // Nor is the result of one a result of another.
        assert_eq!((handshake("token_expired"), Checked::Mtls.result("token_expired")), (OTHER, OTHER));
        assert_eq!(Checked::Token.result("token_expired"), "token_expired");
    }

    #[test]
    fn dataplanes_refusals_are_about_one_proof_or_none() {
        for (reason, proof) in [
            ("certificate_not_allowed", Some(Checked::Mtls)),
            ("token_revoked", Some(Checked::Token)),
            ("issuer_revoked", Some(Checked::Token)),
            ("api_key_revoked", Some(Checked::ApiKey)),
            ("workload_revoked", None),
            ("rule_not_for_caller", None),
            ("grants_full", None),
            ("store_unusable", None),
        ] {
            assert_eq!(Checked::refused_as(reason), proof, "{reason}");
        }
    }
}
