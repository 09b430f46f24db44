//! What this node signs with, and what it signed.
//!
//! Enters: keys, tokens' descriptions. Leaves: the same after a restart. Never: a token's text.
//!
//! Keys are on disk before they are used. Tokens are written without waiting for the disk: one that a crash loses is refused from
//! then on, which is the safe side.

use redb::{ReadableTable, TableDefinition};

use super::{Store, StoreError, decode, encode, row};
use crate::issuing::{
    Issued,
    ring::{Changes, Kept},
};

pub(super) const KEYS: TableDefinition<&str, &[u8]> = TableDefinition::new("signing_keys");
pub(super) const ISSUED: TableDefinition<&str, &[u8]> = TableDefinition::new("issued_tokens");

impl Store {
    pub fn signing_keys(&self) -> Result<Vec<Kept>, StoreError> {
        self.read(|transaction| {
            let mut all = Vec::new();
            for entry in transaction.open_table(KEYS)?.iter()? {
                let (key, value) = entry?;
                let kept: Kept = decode(&KEYS, key.value(), value.value())?;
                if kept.kid != key.value() {
                    return Err(row(&KEYS, key.value(), "it holds another one"));
                }
                all.push(kept);
            }
            Ok(all)
        })
    }

    /// On disk when it returns.
    pub fn change_signing_keys(&self, changes: &Changes) -> Result<(), StoreError> {
        self.write_now(|transaction| {
            let mut table = transaction.open_table(KEYS)?;
            for kept in &changes.kept {
                table.insert(kept.kid.as_str(), encode(kept)?.as_slice())?;
            }
            for kid in &changes.removed {
                table.remove(kid.as_str())?;
            }
            Ok(())
        })
    }

    pub fn issued_tokens(&self) -> Result<Vec<Issued>, StoreError> {
        self.read(|transaction| {
            let mut all = Vec::new();
            for entry in transaction.open_table(ISSUED)?.iter()? {
                let (key, value) = entry?;
                let issued: Issued = decode(&ISSUED, key.value(), value.value())?;
                if issued.jti != key.value() {
                    return Err(row(&ISSUED, key.value(), "it holds another one"));
                }
                all.push(issued);
            }
            Ok(all)
        })
    }

    pub fn put_issued_token(&self, issued: &Issued) -> Result<(), StoreError> {
        self.write_later(|transaction| {
            let mut table = transaction.open_table(ISSUED)?;
            table.insert(issued.jti.as_str(), encode(issued)?.as_slice())?;
            Ok(())
        })
    }

    pub fn remove_issued_tokens(&self, ids: &[String]) -> Result<(), StoreError> {
        self.write_later(|transaction| {
            let mut table = transaction.open_table(ISSUED)?;
            for jti in ids {
                table.remove(jti.as_str())?;
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use jiff::Timestamp;

    use super::*;
    use crate::{digest::Digest, issuing::ring::Ring, store::tests::Scratch};

    #[test]
    fn keys_and_tokens_are_there_after_a_restart() {
        let (scratch, store) = Scratch::with_store();
        let ring = Ring::new(Vec::new(), Duration::from_secs(60)).unwrap();
        let first = ring.due(Timestamp::UNIX_EPOCH).unwrap();
        store.change_signing_keys(&first).unwrap();
        // As a killed process leaves it.
        assert_eq!(scratch.copy().open().unwrap().signing_keys().unwrap(), first.kept);
        let second = Changes { removed: vec![first.kept[0].kid.clone()], ..ring.due(Timestamp::UNIX_EPOCH).unwrap() };
        store.change_signing_keys(&second).unwrap();
        let issued = |jti: &str| Issued {
            jti: jti.into(),
            kid: "k".into(),
            hash: Digest::of(b"x"),
            delegation: "d".into(),
            actor: "spiffe://example.org/a".into(),
            share: "workload a".into(),
            token: crate::issuing::tests::token("alice", Timestamp::UNIX_EPOCH),
            ends_with: vec![("peer p".parse().unwrap(), None), ("issuer i".parse().unwrap(), Some(Timestamp::MAX))],
        };
        store.put_issued_token(&issued("1")).unwrap();
        store.put_issued_token(&issued("2")).unwrap();
        store.remove_issued_tokens(&["1".to_owned()]).unwrap();
        drop(store);
        let store = scratch.open().unwrap();
        assert_eq!(store.signing_keys().unwrap(), second.kept);
        assert_eq!(store.issued_tokens().unwrap(), [issued("2")]);
    }
}
