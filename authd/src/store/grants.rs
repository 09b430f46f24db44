//! What the kernel's live slots mean, for a daemon that starts again.
//!
//! Enters and leaves: grants. Never: a proof itself; only what was proven, in words.
//!
//! Grants come by the thousand and are renewed all the time, so that their rows are written without waiting for the disk; the
//! next [`Store::flush`] or durable change puts them there. Both ways of losing the last of them are safe. A row that was lost
//! leaves a slot that nothing explains, and the daemon that starts ends such a slot. A removal that was lost leaves a row whose
//! slot has ended or has another serial number by now, which is no grant either. What must not be lost, that a grant was
//! revoked, is a revocation, and those are on disk before anything is said.

use jiff::Timestamp;
use redb::{ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use super::{Store, StoreError, decode, encode, row};
use crate::grants::{Given, Id as GrantId};

pub(super) const TABLE: TableDefinition<u128, &[u8]> = TableDefinition::new("grants");
/// Bytes of a row at most.
const MAX_ROW: usize = 16 << 10;

/// A grant, and what the kernel's tables have of it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    pub given: Given,
    /// Numbers of the rule, and of the workload that holds it.
    pub rule_number: u32,
    pub workload_number: u32,
    pub slot: u32,
    /// Number of the grant in its slot.
    pub serial: u32,
    /// `/proc/sys/kernel/random/boot_id`: slots end with the kernel that holds them.
    pub boot: String,
}

impl Grant {
    fn is_over(&self, now: Timestamp, boot: &str) -> bool {
        self.given.until <= now || self.boot != boot
    }
}

impl Store {
    /// Adds grants, or replaces those with the same ids, in one transaction.
    pub fn put_grants<'a>(&self, grants: impl IntoIterator<Item = &'a Grant>) -> Result<(), StoreError> {
        self.write_later(|transaction| {
            let mut table = transaction.open_table(TABLE)?;
            for grant in grants {
                let value = encode(grant)?;
                if value.len() > MAX_ROW {
                    return Err(StoreError::TooLong { what: "grant with its proofs", most: MAX_ROW }.into());
                }
                table.insert(number(grant.given.id), value.as_slice())?;
            }
            Ok(())
        })
    }

    pub fn remove_grants(&self, ids: impl IntoIterator<Item = GrantId>) -> Result<(), StoreError> {
        self.write_later(|transaction| {
            let mut table = transaction.open_table(TABLE)?;
            for id in ids {
                table.remove(number(id))?;
            }
            Ok(())
        })
    }

    pub fn grants(&self) -> Result<Vec<Grant>, StoreError> {
        self.read(|transaction| {
            let mut all = Vec::new();
            for entry in transaction.open_table(TABLE)?.iter()? {
                let (key, value) = entry?;
                let id = GrantId(key.value().to_be_bytes());
                let grant: Grant = decode(&TABLE, id, value.value())?;
                if grant.given.id != id {
                    return Err(row(&TABLE, id, "it holds another one"));
                }
                all.push(grant);
            }
            Ok(all)
        })
    }

    /// Removes grants that expired, and those of another run of the kernel. Returns how many.
    pub fn prune_grants(&self, now: Timestamp, boot: &str) -> Result<usize, StoreError> {
        let over: Vec<GrantId> = self.grants()?.iter().filter(|g| g.is_over(now, boot)).map(|g| g.given.id).collect();
        let count = over.len();
        if count > 0 {
            self.remove_grants(over)?;
        }
        Ok(count)
    }
}

fn number(id: GrantId) -> u128 {
    u128::from_be_bytes(id.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{grants::Holder, store::tests::Scratch};

    fn grant(number: u8) -> Grant {
        let holder = Holder::Workload { name: "w".to_owned(), cgroup: "/w".to_owned(), instance: 4711 };
        let given = Given {
            id: GrantId([number; 16]),
            rule: "write".to_owned(),
            holder,
            proofs: Vec::new(),
            terms: 7,
            issued: "2026-11-23T12:00:00Z".parse().unwrap(),
            until: "2026-11-23T12:05:00Z".parse().unwrap(),
            permit: None,
        };
        let slot = u32::from(number);
        Grant { given, rule_number: 3, workload_number: 2, slot, serial: 9, boot: "b".to_owned() }
    }

    #[test]
    fn grants_are_there_at_once_and_after_a_restart() {
        let (scratch, store) = Scratch::with_store();
        let holder = Holder::Address { address: "fd00::1".parse().unwrap(), netns: u64::MAX };
        let second = Given { holder, ..grant(2).given };
        let all = [grant(1), Grant { given: second, ..grant(2) }, grant(3)];
        store.put_grants(&all).unwrap();
        store.remove_grants([all[2].given.id]).unwrap();
        assert_eq!(store.grants().unwrap(), all[..2]);
        drop(store);
        assert_eq!(scratch.open().unwrap().grants().unwrap(), all[..2]);
    }

    #[test]
    fn a_revocation_takes_the_grants_before_it_to_the_disk() {
        use crate::store::revocations::{Revocation, Revocations};
        let (scratch, store) = Scratch::with_store();
        store.put_grants(&[grant(1)]).unwrap();
        let revocation = Revocation::new("peer p".parse().unwrap(), Timestamp::UNIX_EPOCH, 0, "");
        Revocations::default().revoke(&store, vec![revocation]).unwrap();
        store.put_grants(&[grant(2)]).unwrap();
        // As a killed process leaves it: nothing more reaches the disk.
        let copy = scratch.copy();
        assert_eq!(copy.open().unwrap().grants().unwrap(), [grant(1)]);
        store.flush().unwrap();
        assert_eq!(scratch.copy().open().unwrap().grants().unwrap(), [grant(1), grant(2)]);
    }

    #[test]
    fn expired_grants_and_those_of_another_boot_go() {
        let (_scratch, store) = Scratch::with_store();
        let elsewhere = Grant { boot: "a".to_owned(), ..grant(2) };
        let until = "2026-11-23T13:00:00Z".parse().unwrap();
        let later = Grant { given: Given { until, ..grant(3).given }, ..grant(3) };
        store.put_grants(&[grant(1), elsewhere, later.clone()]).unwrap();
        assert_eq!(store.prune_grants(grant(1).given.until, "b").unwrap(), 2);
        assert_eq!(store.grants().unwrap(), [later]);
    }

    #[test]
    fn a_grant_that_is_too_large_leaves_the_others_of_its_call_out_too() {
        let (_scratch, store) = Scratch::with_store();
        let large = Grant { given: Given { rule: "x".repeat(MAX_ROW), ..grant(2).given }, ..grant(2) };
        let error = store.put_grants(&[grant(1), large]).unwrap_err();
        assert_eq!(error.reason(), "store_entry_too_long");
        assert_eq!(store.grants().unwrap(), []);
        store.put_grants(&[grant(1)]).unwrap();
    }
}
