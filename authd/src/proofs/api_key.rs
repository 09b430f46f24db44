//! API keys: secrets that were handed out once, for callers that can do no better.
//!
//! Enters: the keys that exist, and what a caller presents, from where and for what. Leaves: a verified key, or the reason why
//! not. Never: a secret; what is kept is its hash.
//!
//! Whoever does not show the right secret learns nothing about a key: that it expired, was revoked or belongs elsewhere is
//! said to its holder only, and only the holder's own uses count against its rate.

pub mod rate;
pub mod text;

use std::{collections::HashMap, fmt, net::IpAddr};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use self::{
    rate::{Bucket, Rate},
    text::KeyId,
};
use crate::{
    digest::Digest,
    policy::network::{Network, from_ip},
};

/// Keys at one time, living and dead. Bounds what the set takes in memory.
pub const MAX_KEYS: usize = 10_000;
/// How long a key lives if nobody says otherwise, as the command line writes it.
pub const DEFAULT_LIFETIME: &str = "90d";
/// How long a key can live: a leap year.
pub const MAX_LIFETIME: SignedDuration = SignedDuration::from_hours(366 * 24);
/// Dead keys are listed for so long, for those who ask what became of one.
pub const KEPT_AFTER_EXPIRY: SignedDuration = SignedDuration::from_hours(90 * 24);
/// Entries of each list of a scope.
pub const MAX_SCOPE: usize = 64;

/// What is kept of a key.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiKey {
    pub id: KeyId,
    /// What it is for, in the words of who made it.
    pub name: String,
    /// SHA-256 of the secret.
    pub digest: Digest,
    pub created: Timestamp,
    /// Every key has an end.
    pub expires: Timestamp,
    /// User who made it.
    pub created_by: u32,
    pub scope: Scope,
    pub revoked: Option<KeyRevoked>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyRevoked {
    pub at: Timestamp,
    pub by: u32,
}

/// What a key is good for. An empty list does not limit.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scope {
    /// Rules for which it counts as a proof.
    pub rules: Vec<String>,
    /// Where it can be used from.
    pub networks: Vec<Network>,
    /// Local workloads that can use it.
    pub workloads: Vec<String>,
    pub rate: Option<Rate>,
}

/// A key whose holder showed its secret, in a place and for a purpose that are in its scope. Only `ApiKeys::check` makes one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VerifiedApiKey {
    id: KeyId,
    name: String,
    expires: Timestamp,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ApiKeyError {
    // What was presented is no key.
    #[error("this is no API key: it is cut short or mistyped")]
    Malformed,
    #[error("there is no such API key")]
    Unknown,
    // The key is dead.
    #[error("the API key expired")]
    Expired,
    #[error("the API key was revoked")]
    Revoked,
    // The holder does with it what it is not for.
    #[error("the API key is not for this rule")]
    WrongRule,
    #[error("the API key cannot be used from this network")]
    WrongNetwork,
    #[error("the API key is not for this workload")]
    WrongWorkload,
    #[error("the API key was used too often")]
    RateLimited,
}

impl ApiKeyError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Malformed => "api_key_malformed",
            Self::Unknown => "api_key_unknown",
            Self::Expired => "api_key_expired",
            Self::Revoked => "api_key_revoked",
            Self::WrongRule => "api_key_wrong_rule",
            Self::WrongNetwork => "api_key_wrong_network",
            Self::WrongWorkload => "api_key_wrong_workload",
            Self::RateLimited => "api_key_rate_limited",
        }
    }
}

/// A key that cannot be added.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ApiKeySetError {
    #[error("an API key with the id {0} exists already")]
    Duplicate(KeyId),
    #[error("there are {MAX_KEYS} API keys already; dead ones go {} days after their expiry", KEPT_AFTER_EXPIRY.as_hours() / 24)]
    Full,
}

impl ApiKeySetError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Duplicate(_) => "api_key_duplicate",
            Self::Full => "api_keys_full",
        }
    }
}

/// All keys.
#[derive(Default)]
pub struct ApiKeys {
    keys: HashMap<KeyId, Entry>,
}

struct Entry {
    key: ApiKey,
    /// Full again after a restart: a limit of a minute is not worth a write for each use.
    bucket: Bucket,
    last_used: Option<Timestamp>,
    /// `last_used` is newer than what was written.
    unwritten: bool,
}

impl ApiKeys {
    /// Whether a key with this id could be added.
    pub fn admits(&self, id: KeyId) -> Result<(), ApiKeySetError> {
        if self.keys.contains_key(&id) {
            return Err(ApiKeySetError::Duplicate(id));
        }
        if self.keys.len() < MAX_KEYS { Ok(()) } else { Err(ApiKeySetError::Full) }
    }

    pub fn insert(&mut self, key: ApiKey, last_used: Option<Timestamp>) -> Result<(), ApiKeySetError> {
        self.admits(key.id)?;
        self.keys.insert(key.id, Entry { key, bucket: Bucket::default(), last_used, unwritten: false });
        Ok(())
    }

    /// Whether the presented key counts as a proof for a rule, now, for a caller at an address (none for a local one) that may
    /// be a local workload.
    ///
    /// The work is the same for an id that exists and for one that does not: one look-up, one hash, one comparison in constant
    /// time. Ids are no secrets, but neither is there a reason to tell which of them exist.
    pub fn check(
        &mut self,
        now: Timestamp,
        presented: &str,
        source: Option<IpAddr>,
        rule: &str,
        workload: Option<&str>,
    ) -> Result<VerifiedApiKey, ApiKeyError> {
        let parts = text::parse(presented).ok_or(ApiKeyError::Malformed)?;
        self.check_digest(now, parts.id, &parts.digest(), source, rule, workload)
    }

    /// The same, of a key that another process took apart: its id, and the hash of its secret.
    pub fn check_digest(
        &mut self,
        now: Timestamp,
        id: KeyId,
        digest: &Digest,
        source: Option<IpAddr>,
        rule: &str,
        workload: Option<&str>,
    ) -> Result<VerifiedApiKey, ApiKeyError> {
        const NOBODY: Digest = Digest::from_bytes([0; 32]);
        let entry = self.keys.get_mut(&id);
        let expected = entry.as_ref().map_or(NOBODY, |entry| entry.key.digest);
        let same = verify_slices_are_equal(expected.as_bytes(), digest.as_bytes()).is_ok();
        let Some(entry) = entry.filter(|_| same) else { return Err(ApiKeyError::Unknown) };
        let Entry { key, bucket, .. } = entry;
        if key.revoked.is_some() {
            return Err(ApiKeyError::Revoked);
        }
        if now >= key.expires {
            return Err(ApiKeyError::Expired);
        }
        key.scope.admits(source, rule, workload)?;
        // Last, so that whoever stole a key cannot use up the rate from a place where the key is worth nothing.
        if key.scope.rate.is_some_and(|rate| !bucket.take(now, rate)) {
            return Err(ApiKeyError::RateLimited);
        }
        entry.last_used = Some(now);
        entry.unwritten = true;
        Ok(VerifiedApiKey { id: entry.key.id, name: entry.key.name.clone(), expires: entry.key.expires })
    }

    pub fn get(&self, id: KeyId) -> Option<&ApiKey> {
        self.keys.get(&id).map(|entry| &entry.key)
    }

    /// All keys with the time of their last use, oldest first.
    pub fn list(&self) -> Vec<(&ApiKey, Option<Timestamp>)> {
        let mut all: Vec<_> = self.keys.values().map(|entry| (&entry.key, entry.last_used)).collect();
        all.sort_by_key(|(key, _)| (key.created, key.id));
        all
    }

    /// Takes effect with the next check. Returns the key as it is now; the first revocation of a key is the one that counts.
    pub fn revoke(&mut self, id: KeyId, revoked: KeyRevoked) -> Option<&ApiKey> {
        let key = &mut self.keys.get_mut(&id)?.key;
        key.revoked.get_or_insert(revoked);
        Some(key)
    }

    /// Times of use since this was asked last, to be written now and then.
    pub fn take_used(&mut self) -> Vec<(KeyId, Timestamp)> {
        let used = |entry: &mut Entry| {
            let at = entry.last_used.filter(|_| entry.unwritten)?;
            entry.unwritten = false;
            Some((entry.key.id, at))
        };
        self.keys.values_mut().filter_map(used).collect()
    }

    /// Forgets keys that have been dead for long. Returns which.
    pub fn prune(&mut self, now: Timestamp) -> Vec<KeyId> {
        let forgotten = self.keys.extract_if(|_, entry| now.duration_since(entry.key.expires) > KEPT_AFTER_EXPIRY);
        forgotten.map(|(id, _)| id).collect()
    }
}

impl Scope {
    /// A limit on something that is not known about the caller is not met.
    fn admits(&self, source: Option<IpAddr>, rule: &str, workload: Option<&str>) -> Result<(), ApiKeyError> {
        let source = source.map(from_ip);
        let from_there = |network: &Network| source.is_some_and(|source| network.contains(&source));
        if !self.networks.is_empty() && !self.networks.iter().any(from_there) {
            return Err(ApiKeyError::WrongNetwork);
        }
        if !self.workloads.is_empty() && !self.workloads.iter().any(|w| Some(w.as_str()) == workload) {
            return Err(ApiKeyError::WrongWorkload);
        }
        if !self.rules.is_empty() && !self.rules.iter().any(|r| r == rule) {
            return Err(ApiKeyError::WrongRule);
        }
        Ok(())
    }
}

/// In words, for records and lists.
impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rules, networks, workloads, rate } = self;
        let networks: Vec<String> = networks.iter().map(Network::to_string).collect();
        let listed = |what: &str, names: &[String]| match names {
            [] => format!("any {what}"),
            names => format!("{what} {}", names.join(", ")),
        };
        let (rules, networks) = (listed("rule", rules), listed("network", &networks));
        write!(f, "{rules}; {networks}; {}", listed("workload", workloads))?;
        rate.map_or(Ok(()), |rate| write!(f, "; {rate}"))
    }
}

impl VerifiedApiKey {
    pub fn id(&self) -> KeyId {
        self.id
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Nothing that rests on the key lives longer.
    pub fn expires(&self) -> Timestamp {
        self.expires
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{text::SecretKey, *};

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn noon() -> Timestamp {
        at("2026-11-23T12:00:00Z")
    }

    fn here() -> Option<IpAddr> {
        Some("10.1.2.3".parse().unwrap())
    }

    fn secret(seed: u8) -> SecretKey {
        SecretKey::generate(&std::array::from_fn(|at| seed.wrapping_mul(31).wrapping_add(at as u8)))
    }

    fn key(secret: &SecretKey, scope: Scope) -> ApiKey {
        let (id, digest) = secret.public().unwrap();
        ApiKey {
            id,
            name: "deploy".to_owned(),
            digest,
            created: at("2026-11-01T00:00:00Z"),
            expires: at("2026-12-01T00:00:00Z"),
            created_by: 0,
            scope,
            revoked: None,
        }
    }

    fn set(scope: Scope) -> (ApiKeys, SecretKey) {
        let (mut keys, secret) = (ApiKeys::default(), secret(1));
        keys.insert(key(&secret, scope), None).unwrap();
        (keys, secret)
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_key_without_limits_is_good_for_every_rule_from_everywhere() {
        let (mut keys, secret) = set(Scope::default());
        let verified = keys.check(noon(), secret.reveal(), None, "any-rule", None).unwrap();
        assert_eq!((verified.name(), verified.expires()), ("deploy", at("2026-12-01T00:00:00Z")));
        assert!(keys.check(noon(), secret.reveal(), here(), "other", Some("agent")).is_ok());
    }

    #[test]
    fn a_wrong_secret_and_an_unknown_id_are_told_apart_by_nobody() {
        let (mut keys, _) = set(Scope::default());
        // A well-formed key with the id of a known one.
        let mut randomness: [u8; text::RANDOMNESS] = std::array::from_fn(|at| 31u8.wrapping_add(at as u8));
        randomness[text::RANDOMNESS - 1] ^= 1;
        let forged = SecretKey::generate(&randomness);
        assert_eq!(forged.public().unwrap().0, secret(1).public().unwrap().0);
        for presented in [forged, secret(2)] {
            let refused = keys.check(noon(), presented.reveal(), here(), "r", None);
            assert_eq!(refused, Err(ApiKeyError::Unknown));
        }
    }

    #[test]
    fn expiry_is_exact() {
        let (mut keys, secret) = set(Scope::default());
        assert!(keys.check(at("2026-11-30T23:59:59.999999999Z"), secret.reveal(), None, "r", None).is_ok());
        let late = keys.check(at("2026-12-01T00:00:00Z"), secret.reveal(), None, "r", None);
        assert_eq!(late, Err(ApiKeyError::Expired));
    }

    #[test]
    fn a_revoked_key_is_refused_from_the_same_moment() {
        let (mut keys, secret) = set(Scope::default());
        assert!(keys.check(noon(), secret.reveal(), None, "r", None).is_ok());
        let (id, _) = secret.public().unwrap();
        keys.revoke(id, KeyRevoked { at: noon(), by: 0 }).unwrap();
        assert_eq!(keys.check(noon(), secret.reveal(), None, "r", None), Err(ApiKeyError::Revoked));
        let again = keys.revoke(id, KeyRevoked { at: at("2026-11-24T00:00:00Z"), by: 7 }).unwrap();
        assert_eq!(again.revoked, Some(KeyRevoked { at: noon(), by: 0 }));
        assert_eq!(keys.revoke("zzzzzzzzzz".parse().unwrap(), KeyRevoked { at: noon(), by: 0 }), None);
    }

    #[test]
    fn each_limit_of_a_scope_has_its_own_reason() {
        let (mut keys, secret) = set(Scope {
            rules: names(&["read", "list"]),
            networks: vec![Network::parse("10.1.0.0/16").unwrap(), Network::parse("fd00::/8").unwrap()],
            workloads: names(&["agent"]),
            rate: None,
        });
        let mut check = |source: Option<&str>, rule, workload| {
            let source = source.map(|text| text.parse().unwrap());
            keys.check(noon(), secret.reveal(), source, rule, workload).map(|_| ())
        };
        assert_eq!(check(Some("10.1.2.3"), "read", Some("agent")), Ok(()));
        assert_eq!(check(Some("::ffff:10.1.2.3"), "list", Some("agent")), Ok(()));
        assert_eq!(check(Some("fd00::1"), "list", Some("agent")), Ok(()));
        assert_eq!(check(Some("10.2.0.1"), "read", Some("agent")), Err(ApiKeyError::WrongNetwork));
        assert_eq!(check(None, "read", Some("agent")), Err(ApiKeyError::WrongNetwork));
        assert_eq!(check(Some("10.1.2.3"), "write", Some("agent")), Err(ApiKeyError::WrongRule));
        assert_eq!(check(Some("10.1.2.3"), "read", Some("other")), Err(ApiKeyError::WrongWorkload));
        assert_eq!(check(Some("10.1.2.3"), "read", None), Err(ApiKeyError::WrongWorkload));
    }

    #[test]
    fn only_good_uses_count_against_the_rate() {
        let rate = Rate::per_minute(2);
        let (mut keys, secret) = set(Scope { rules: names(&["read"]), rate, ..Scope::default() });
        for _ in 0..10 {
            let wrong = keys.check(noon(), secret.reveal(), None, "write", None);
            assert_eq!(wrong, Err(ApiKeyError::WrongRule));
        }
        let mut use_it = || keys.check(noon(), secret.reveal(), None, "read", None).map(|_| ());
        assert_eq!([use_it(), use_it(), use_it()], [Ok(()), Ok(()), Err(ApiKeyError::RateLimited)]);
        assert!(keys.check(at("2026-11-23T12:00:30Z"), secret.reveal(), None, "read", None).is_ok());
    }

    #[test]
    fn uses_are_told_once_and_refusals_are_no_uses() {
        let (mut keys, secret) = set(Scope { rules: names(&["read"]), ..Scope::default() });
        assert!(keys.check(noon(), secret.reveal(), None, "write", None).is_err());
        assert_eq!(keys.take_used(), []);
        assert!(keys.check(noon(), secret.reveal(), None, "read", None).is_ok());
        assert_eq!(keys.take_used(), [(secret.public().unwrap().0, noon())]);
        assert_eq!(keys.take_used(), []);
        assert_eq!(keys.list()[0].1, Some(noon()));
    }

    #[test]
    fn an_id_is_given_once_and_the_set_has_an_end() {
        let (mut keys, secret) = set(Scope::default());
        let again = key(&secret, Scope::default());
        assert_eq!(keys.insert(again.clone(), None), Err(ApiKeySetError::Duplicate(again.id)));
        for number in 1..MAX_KEYS {
            let digits: String = format!("{number:010}");
            keys.insert(ApiKey { id: digits.parse().unwrap(), ..again.clone() }, None).unwrap();
        }
        let one_more = ApiKey { id: "zzzzzzzzzz".parse().unwrap(), ..again };
        assert_eq!(keys.insert(one_more, None), Err(ApiKeySetError::Full));
    }

    #[test]
    fn keys_are_forgotten_long_after_they_died() {
        let (mut keys, secret) = set(Scope::default());
        assert_eq!(keys.prune(at("2027-03-01T00:00:00Z")), []);
        assert_eq!(keys.prune(at("2027-03-01T00:00:01Z")), [secret.public().unwrap().0]);
        assert!(keys.list().is_empty());
    }

    #[test]
    fn debugging_output_has_no_secret() {
        let (mut keys, secret) = set(Scope::default());
        let verified = keys.check(noon(), secret.reveal(), None, "r", None);
        let shown = format!("{verified:?} {:?}", keys.list());
        assert!(shown.contains("deploy") && !shown.contains(&secret.reveal()[17..57]));
    }

    proptest! {
        #[test]
        fn odd_texts_are_refused_and_nothing_panics(text in any::<String>()) {
            let (mut keys, _) = set(Scope::default());
            let result = keys.check(noon(), &text, here(), &text, Some(&text));
            prop_assert_eq!(result, Err(ApiKeyError::Malformed));
        }

        #[test]
        fn stored_keys_are_read_back(rules in proptest::collection::vec("[a-z]{1,8}", 0..4), rate in proptest::option::of(1u32..1_000_000)) {
            let scope = Scope { rules, rate: rate.and_then(Rate::per_minute), ..Scope::default() };
            let key = key(&secret(3), scope);
            let text = serde_json::to_string(&key).unwrap();
            prop_assert_eq!(serde_json::from_str::<ApiKey>(&text).unwrap(), key);
        }
    }
}
