//! Who or what counts for nothing any more: in memory for every check, and in the store for the next start.
//!
//! Enters: revocations. Leaves: whether a credential, a caller or an issuer is among them. Never: a way to lose one; whatever
//! fails, the narrower state is the one in force.
//!
//! A workload, a peer or an issuer that is revoked stays so, with all that it was or will be given, until the revocation is
//! undone. Undoing can leave a limit behind: what was issued or granted before stays dead, and only what is new counts.

use std::collections::HashMap;

use jiff::{SignedDuration, Timestamp};
use redb::{ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

pub use super::revoked::{Revoked, RevokedError, Serial};
use super::{Store, StoreError, decode, encode, row};

pub(super) const TABLE: TableDefinition<&str, &[u8]> = TableDefinition::new("revocations");
/// Bytes of an explanation at most.
const MAX_TEXT: usize = 1024;
/// An entry outlives its credential by so much: clocks differ, and checks have leeway.
const PRUNE_AFTER: SignedDuration = SignedDuration::from_hours(24);

/// One entry.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revocation {
    pub what: Revoked,
    pub at: Timestamp,
    /// User who revoked it.
    pub by: u32,
    /// Why, in the words of who revoked it.
    pub text: String,
    /// When the credential is dead by itself: the entry can go then. `None`: never.
    pub until: Option<Timestamp>,
    /// Only what was issued or granted before is refused. `None`: all of it. Only for sources ([`Revoked::is_source`]).
    pub not_before: Option<Timestamp>,
}

/// All of them, for checks in constant time.
#[derive(Clone, Default)]
pub struct Revocations {
    entries: HashMap<Revoked, Revocation>,
}

impl Revocation {
    /// Of everything, for ever.
    pub fn new(what: Revoked, at: Timestamp, by: u32, text: impl Into<String>) -> Self {
        Self { what, at, by, text: text.into(), until: None, not_before: None }
    }

    /// Whether something that was issued or granted at a time is refused. What does not say when is refused.
    pub fn covers(&self, issued: Option<Timestamp>) -> bool {
        match (self.not_before, issued) {
            (Some(not_before), Some(issued)) => issued < not_before,
            _ => true,
        }
    }

    fn is_over(&self, now: Timestamp) -> bool {
        self.until.is_some_and(|until| now.duration_since(until) > PRUNE_AFTER)
    }

    /// Both at once: a second revocation never lets anything pass that the first one refuses. Who, when and why are the first's,
    /// unless the second refuses more.
    fn joined(self, other: Self) -> Self {
        // `None` is the widest of both limits.
        let widest = |a: Option<Timestamp>, b: Option<Timestamp>| a.zip(b).map(|(a, b)| a.max(b));
        let until = widest(self.until, other.until);
        let not_before = widest(self.not_before, other.not_before);
        let same = until == self.until && not_before == self.not_before;
        Self { until, not_before, ..if same { self } else { other } }
    }
}

impl Revocations {
    pub fn load(store: &Store) -> Result<Self, StoreError> {
        let entries = store.revocations()?;
        Ok(Self { entries: entries.into_iter().map(|entry| (entry.what.clone(), entry)).collect() })
    }

    /// The revocation that refuses something issued or granted at a time (`None`: it does not say when), if there is one.
    pub fn find(&self, what: &Revoked, issued: Option<Timestamp>) -> Option<&Revocation> {
        self.entries.get(what).filter(|entry| entry.covers(issued))
    }

    /// Revokes, and returns when it is on disk.
    ///
    /// It is in force in memory even when the store refuses (its disk is full, say): the error then says that a restart would
    /// lose it. Revoking again never lets anything pass that is refused already.
    pub fn revoke(&mut self, store: &Store, entries: Vec<Revocation>) -> Result<(), StoreError> {
        let mut joined = Vec::with_capacity(entries.len());
        for entry in entries {
            entry.check()?;
            joined.push(entry);
        }
        for entry in &mut joined {
            let before = self.entries.get(&entry.what).cloned();
            if let Some(before) = before {
                *entry = before.joined(entry.clone());
            }
            self.entries.insert(entry.what.clone(), entry.clone());
        }
        store.put_revocations(&joined)
    }

    /// Takes a revocation back, first on disk. With `not_before`, what a source gave out before stays refused. Returns whether
    /// there was one.
    pub fn undo(&mut self, store: &Store, what: &Revoked, not_before: Option<Timestamp>) -> Result<bool, StoreError> {
        let Some(entry) = self.entries.get(what) else { return Ok(false) };
        match not_before {
            Some(_) => {
                let entry = Revocation { not_before, ..entry.clone() };
                entry.check()?;
                store.put_revocations(std::slice::from_ref(&entry))?;
                self.entries.insert(what.clone(), entry);
            }
            None => {
                store.remove_revocations(std::slice::from_ref(what))?;
                self.entries.remove(what);
            }
        }
        Ok(true)
    }

    /// Forgets entries whose credential has been dead by itself for a day. Returns how many.
    pub fn prune(&mut self, store: &Store, now: Timestamp) -> Result<usize, StoreError> {
        let over: Vec<Revoked> = self.entries.values().filter(|e| e.is_over(now)).map(|e| e.what.clone()).collect();
        if !over.is_empty() {
            store.remove_revocations(&over)?;
        }
        over.iter().for_each(|what| drop(self.entries.remove(what)));
        Ok(over.len())
    }

    /// Newest first.
    pub fn list(&self) -> Vec<&Revocation> {
        let mut all: Vec<&Revocation> = self.entries.values().collect();
        all.sort_by(|a, b| b.at.cmp(&a.at).then_with(|| a.what.to_string().cmp(&b.what.to_string())));
        all
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

impl Revocation {
    /// What would not be read back is not written.
    fn check(&self) -> Result<(), StoreError> {
        let written: Revoked = self.what.to_string().parse()?;
        if written != self.what {
            let expected = "it has no unambiguous spelling";
            let value = self.what.to_string();
            return Err(RevokedError::Value { kind: self.what.kind(), value, expected }.into());
        }
        if self.not_before.is_some() && !self.what.is_source() {
            let expected = "only a source of credentials can be revoked up to a time";
            let value = self.what.to_string();
            return Err(RevokedError::Value { kind: self.what.kind(), value, expected }.into());
        }
        if self.text.len() > MAX_TEXT { Err(StoreError::TooLong { what: "reason", most: MAX_TEXT }) } else { Ok(()) }
    }
}

impl Store {
    pub fn revocations(&self) -> Result<Vec<Revocation>, StoreError> {
        self.read(|transaction| {
            let table = transaction.open_table(TABLE)?;
            let mut all = Vec::new();
            for entry in table.iter()? {
                let (key, value) = entry?;
                let entry: Revocation = decode(&TABLE, key.value(), value.value())?;
                if entry.what.to_string() != key.value() {
                    return Err(row(&TABLE, key.value(), "it holds another one"));
                }
                all.push(entry);
            }
            Ok(all)
        })
    }

    /// On disk when it returns.
    fn put_revocations(&self, entries: &[Revocation]) -> Result<(), StoreError> {
        self.write_now(|transaction| {
            let mut table = transaction.open_table(TABLE)?;
            for entry in entries {
                table.insert(entry.what.to_string().as_str(), encode(entry)?.as_slice())?;
            }
            Ok(())
        })
    }

    fn remove_revocations(&self, entries: &[Revoked]) -> Result<(), StoreError> {
        self.write_now(|transaction| {
            let mut table = transaction.open_table(TABLE)?;
            for what in entries {
                table.remove(what.to_string().as_str())?;
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::Scratch;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn noon() -> Timestamp {
        at("2026-11-23T12:00:00Z")
    }

    fn what(text: &str) -> Revoked {
        text.parse().unwrap()
    }

    fn entry(text: &str) -> Revocation {
        Revocation::new(what(text), noon(), 0, "stolen")
    }

    /// What the next start would know.
    fn again(scratch: &Scratch, store: Store) -> (Store, Revocations) {
        drop(store);
        let store = scratch.open().unwrap();
        let revocations = Revocations::load(&store).unwrap();
        (store, revocations)
    }

    #[test]
    fn what_was_revoked_stays_so_after_a_restart() {
        let (scratch, store) = Scratch::with_store();
        let mut revocations = Revocations::default();
        let token = entry("token https://idp.example.org t1");
        revocations.revoke(&store, vec![token.clone(), entry("workload agent")]).unwrap();
        let (_store, revocations) = again(&scratch, store);
        assert_eq!(revocations.find(&token.what, Some(noon())), Some(&token));
        assert!(revocations.find(&what("workload agent"), Some(at("2030-01-01T00:00:00Z"))).is_some(), "until undone");
        assert!(revocations.find(&what("token https://other.example.org t1"), None).is_none());
        assert!(revocations.find(&what("agent agent"), None).is_none());
        assert_eq!(revocations.len(), 2);
    }

    #[test]
    fn undoing_can_leave_what_was_issued_before_refused() {
        let (scratch, store) = Scratch::with_store();
        let mut revocations = Revocations::default();
        let issuer = what("issuer https://idp.example.org");
        revocations.revoke(&store, vec![entry(&issuer.to_string())]).unwrap();
        assert!(revocations.undo(&store, &issuer, Some(noon())).unwrap());
        let (store, mut revocations) = again(&scratch, store);
        assert!(revocations.find(&issuer, Some(at("2026-11-23T11:59:59Z"))).is_some());
        assert!(revocations.find(&issuer, None).is_some(), "what does not say when it was issued is refused");
        assert!(revocations.find(&issuer, Some(noon())).is_none());
        assert!(revocations.undo(&store, &issuer, None).unwrap());
        let (store, mut revocations) = again(&scratch, store);
        assert!(revocations.is_empty());
        assert!(!revocations.undo(&store, &issuer, None).unwrap());
    }

    #[test]
    fn revoking_again_never_lets_more_pass() {
        let (_scratch, store) = Scratch::with_store();
        let mut revocations = Revocations::default();
        let peer = what("peer p");
        let narrow = |not_before: &str| Revocation { not_before: Some(at(not_before)), ..entry("peer p") };
        revocations.revoke(&store, vec![narrow("2026-11-20T00:00:00Z")]).unwrap();
        revocations.revoke(&store, vec![narrow("2026-11-10T00:00:00Z")]).unwrap();
        assert!(revocations.find(&peer, Some(at("2026-11-19T00:00:00Z"))).is_some());
        revocations.revoke(&store, vec![entry("peer p"), narrow("2026-11-21T00:00:00Z")]).unwrap();
        assert!(revocations.find(&peer, Some(at("2099-01-01T00:00:00Z"))).is_some());
        let short = Revocation { until: Some(noon()), ..entry("peer p") };
        revocations.revoke(&store, vec![short]).unwrap();
        assert_eq!(revocations.prune(&store, at("2099-01-01T00:00:00Z")).unwrap(), 0);
    }

    #[test]
    fn entries_go_a_day_after_their_credential_died_by_itself() {
        let (scratch, store) = Scratch::with_store();
        let mut revocations = Revocations::default();
        let token = Revocation { until: Some(noon()), ..entry("token https://idp.example.org t1") };
        revocations.revoke(&store, vec![token, entry("key 05afmv0nt4")]).unwrap();
        assert_eq!(revocations.prune(&store, at("2026-11-24T12:00:00Z")).unwrap(), 0);
        assert_eq!(revocations.prune(&store, at("2026-11-24T12:00:01Z")).unwrap(), 1);
        let (_store, revocations) = again(&scratch, store);
        assert_eq!(revocations.list(), [&entry("key 05afmv0nt4")]);
    }

    #[test]
    fn what_could_not_be_read_back_is_not_written() {
        let (scratch, store) = Scratch::with_store();
        let mut revocations = Revocations::default();
        let odd = |what| vec![entry("peer good"), Revocation::new(what, noon(), 0, "")];
        for what in [
            Revoked::Token { issuer: "a b".to_owned(), jti: "c".to_owned() },
            Revoked::Token { issuer: "a".to_owned(), jti: "c\n".to_owned() },
            Revoked::Workload(String::new()),
            Revoked::Instance("/a/../b".to_owned()),
        ] {
            let error = revocations.revoke(&store, odd(what)).unwrap_err();
            assert_eq!(error.reason(), "revocation_bad_value");
        }
        let mut token = entry("token-hash ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        token.not_before = Some(noon());
        assert!(revocations.revoke(&store, vec![token]).is_err(), "one credential has no before");
        let long = Revocation { text: "x".repeat(MAX_TEXT + 1), ..entry("peer p") };
        assert_eq!(revocations.revoke(&store, vec![long]).unwrap_err().reason(), "store_entry_too_long");
        assert!(again(&scratch, store).1.is_empty(), "all of a call or nothing");
    }
}
