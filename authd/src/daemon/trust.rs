//! What the daemon keeps about proofs: API keys, approvals, and the store under all of it.
//!
//! Enters: what operators ask for. Leaves: changes that are on disk. Never: a secret; whoever makes a key sends its hash.

use std::{net::IpAddr, path::Path};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::{
    decisions::{approvals::State, kept::Kept},
    digest::Digest,
    grants::proof,
    ipc::{PresentedKey, Refusal},
    policy::model::{Model, is_name},
    proofs::api_key::{ApiKey, ApiKeySetError, ApiKeys, KeyRevoked, MAX_LIFETIME, MAX_SCOPE, Scope, text::KeyId},
    store::{
        Store, StoreError,
        revocations::{Revocation, Revocations},
        revoked::Revoked,
    },
};

/// A key that an operator wants.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewKey {
    pub id: KeyId,
    pub digest: Digest,
    pub name: String,
    pub scope: Scope,
    pub lifetime_seconds: u64,
}

/// A key as it is shown: all but the hash.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ListedKey {
    pub id: KeyId,
    pub name: String,
    pub created: Timestamp,
    pub expires: Timestamp,
    pub created_by: u32,
    pub scope: Scope,
    pub revoked: Option<KeyRevoked>,
    /// Up to a second old, and lost with a crash.
    pub last_used: Option<Timestamp>,
}

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    // The request is wrong.
    #[error("`{0}` cannot be the name of a key: use 1 to 64 letters, digits, `-`, `_` and `.`")]
    Name(String),
    #[error("a key lives for one second to {} days", MAX_LIFETIME.as_hours() / 24)]
    Lifetime,
    #[error("the policy in force has no {kind} `{name}`")]
    UnknownName { kind: &'static str, name: String },
    #[error("a key has at most {MAX_SCOPE} rules, networks and workloads each")]
    Scope,
    #[error("there is no API key {0}: see `authd key list`")]
    NoSuchKey(KeyId),
    #[error(transparent)]
    Set(#[from] ApiKeySetError),
    // The store refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the daemon started without its store, and takes no changes: {0}")]
    Unusable(String),
}

impl KeyError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Name(_) => "api_key_bad_name",
            Self::Lifetime => "api_key_bad_lifetime",
            Self::UnknownName { .. } => "api_key_unknown_name",
            Self::Scope => "api_key_bad_scope",
            Self::NoSuchKey(_) => "api_key_not_found",
            Self::Set(error) => error.reason(),
            Self::Store(error) => error.reason(),
            Self::Unusable(_) => "store_unusable",
        }
    }
}

pub struct Trust {
    store: Store,
    keys: ApiKeys,
    revocations: Revocations,
    approvals: Kept,
}

impl Trust {
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        let store = Store::open(directory)?;
        let mut keys = ApiKeys::default();
        for (key, last_used) in store.api_keys()? {
            let id = key.id;
            if let Err(error) = keys.insert(key, last_used) {
                // The store holds one key under each id, and takes no more than fit.
                tracing::error!(%error, key = %id, "an API key is left out");
            }
        }
        let revocations = Revocations::load(&store)?;
        let approvals = Kept::load(&store)?;
        Ok(Self { store, keys, revocations, approvals })
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Calls that wait for a person's yes, with where their changes are kept.
    pub fn approvals(&mut self) -> (&mut Kept, &Store) {
        (&mut self.approvals, &self.store)
    }

    /// Calls that wait for it now.
    pub fn waiting(&self) -> u64 {
        self.approvals.approvals().list().iter().filter(|entry| entry.state == State::Pending).count() as u64
    }

    /// Whether something that exists since a time was revoked.
    pub fn is_revoked(&self, what: &Revoked, since: Option<Timestamp>) -> bool {
        self.revocations.find(what, since).is_some()
    }

    /// In force at once, and on disk when it returns.
    pub fn revoke(&mut self, revocation: Revocation) -> Result<(), StoreError> {
        self.revocations.revoke(&self.store, vec![revocation])
    }

    /// Takes a revocation back. What was issued before stays refused.
    pub fn reinstate(&mut self, what: &Revoked, now: Timestamp) -> Result<bool, StoreError> {
        let not_before = what.is_source().then_some(now);
        self.revocations.undo(&self.store, what, not_before)
    }

    pub fn revocations(&self) -> Vec<Revocation> {
        self.revocations.list().into_iter().cloned().collect()
    }

    /// Whether a key counts for a rule: where it came from, and whose it is, included.
    pub fn check_key(
        &mut self,
        now: Timestamp,
        key: &PresentedKey,
        source: Option<IpAddr>,
        rule: &str,
        workload: Option<&str>,
    ) -> Result<proof::ApiKey, Refusal> {
        let checked = self.keys.check_digest(now, key.id, &key.hash, source, rule, workload);
        let key = checked.map_err(|error| Refusal { reason: error.reason().to_owned(), message: error.to_string() })?;
        Ok(proof::ApiKey { id: key.id(), name: key.name().to_owned(), not_after: key.expires() })
    }

    pub fn keys(&self) -> Vec<ListedKey> {
        self.keys.list().into_iter().map(|(key, last_used)| ListedKey::new(key, last_used)).collect()
    }

    /// A key works when it is on disk.
    pub fn create_key(&mut self, now: Timestamp, by: u32, model: &Model, new: NewKey) -> Result<ListedKey, KeyError> {
        let NewKey { id, digest, name, scope, lifetime_seconds } = new;
        if !is_name(&name) {
            return Err(KeyError::Name(name));
        }
        check_scope(&scope, model)?;
        let lifetime = i64::try_from(lifetime_seconds).map(SignedDuration::from_secs).unwrap_or(SignedDuration::MAX);
        let allowed = SignedDuration::from_secs(1)..=MAX_LIFETIME;
        let expires = Some(lifetime).filter(|l| allowed.contains(l)).and_then(|l| now.checked_add(l).ok());
        let expires = expires.ok_or(KeyError::Lifetime)?;
        let forgotten = self.keys.prune(now);
        if !forgotten.is_empty() {
            self.store.remove_api_keys(&forgotten)?;
        }
        self.keys.admits(id)?;
        let key = ApiKey { id, name, digest, created: now, expires, created_by: by, scope, revoked: None };
        self.store.put_api_key(&key)?;
        let listed = ListedKey::new(&key, None);
        self.keys.insert(key, None)?;
        Ok(listed)
    }

    /// The key is refused from now on, even if the store then refuses to keep that: the error says so, and only a restart would
    /// forget it.
    pub fn revoke_key(&mut self, now: Timestamp, by: u32, id: KeyId) -> Result<ListedKey, KeyError> {
        let key = self.keys.revoke(id, KeyRevoked { at: now, by }).ok_or(KeyError::NoSuchKey(id))?;
        self.store.put_api_key(key)?;
        Ok(ListedKey::new(key, None))
    }

    /// Puts on disk what could wait.
    pub fn settle(&mut self) -> Result<(), StoreError> {
        let used = self.keys.take_used();
        if !used.is_empty() {
            self.store.put_used(&used)?;
        }
        self.store.flush()
    }
}

impl ListedKey {
    fn new(key: &ApiKey, last_used: Option<Timestamp>) -> Self {
        let ApiKey { id, name, digest: _, created, expires, created_by, scope, revoked } = key.clone();
        Self { id, name, created, expires, created_by, scope, revoked, last_used }
    }

    /// `active`, `expired` or `revoked`.
    pub fn state(&self, now: Timestamp) -> &'static str {
        match self.revoked {
            Some(_) => "revoked",
            None if now >= self.expires => "expired",
            None => "active",
        }
    }
}

/// A name that the policy does not have is a typing error: the key would be good for nothing.
fn check_scope(scope: &Scope, model: &Model) -> Result<(), KeyError> {
    let Scope { rules, networks, workloads, rate: _ } = scope;
    if [rules.len(), networks.len(), workloads.len()].iter().any(|length| *length > MAX_SCOPE) {
        return Err(KeyError::Scope);
    }
    let unknown = |kind, name: &String| KeyError::UnknownName { kind, name: name.clone() };
    if let Some(name) = rules.iter().find(|name| !model.rules.iter().any(|rule| rule.name == **name)) {
        return Err(unknown("rule", name));
    }
    match workloads.iter().find(|name| !model.workloads.iter().any(|workload| workload.name == **name)) {
        Some(name) => Err(unknown("workload", name)),
        None => Ok(()),
    }
}
