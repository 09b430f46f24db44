//! What the kernel's live slots mean, for a daemon that starts again.
//!
//! Enters and leaves: grants. Never: a proof itself; only what was proven, in words.
//!
//! Grants come by the thousand and are renewed all the time, so that their rows are written without waiting for the disk; the
//! next [`Store::flush`] or durable change puts them there. Both ways of losing the last of them are safe. A row that was lost
//! leaves a slot that nothing explains, and the daemon that starts ends such a slot. A removal that was lost leaves a row whose
//! slot has ended or has another serial number by now, which is no grant either. What must not be lost, that a grant was
//! revoked, is a revocation, and those are on disk before anything is said.

use std::{fmt, net::IpAddr, str::FromStr};

use jiff::Timestamp;
use redb::{ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use super::{Store, StoreError, decode, encode, row};
use crate::digest::{read_hex, write_hex};

pub(super) const TABLE: TableDefinition<u128, &[u8]> = TableDefinition::new("grants");
/// Bytes of a row at most.
const MAX_ROW: usize = 16 << 10;

/// 128 random bits, as 32 hexadecimal digits. Whoever knows an id may end the grant's own use, and no more.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GrantId(u128);

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the id of a grant has 32 hexadecimal digits")]
pub struct GrantIdError;

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    pub id: GrantId,
    pub rule: String,
    /// Number of the rule, as the kernel's tables have it.
    pub rule_number: u32,
    pub holder: Holder,
    pub slot: u32,
    /// Number of the grant in its slot.
    pub serial: u32,
    pub issued: Timestamp,
    pub expires: Timestamp,
    /// No renewal goes further.
    pub max_expires: Timestamp,
    /// `/proc/sys/kernel/random/boot_id`: slots end with the kernel that holds them.
    pub boot: String,
    /// What was proven, for records: issuer, subject, ids and hashes.
    pub proofs: serde_json::Value,
}

/// Whose it is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Holder {
    /// All instances of a workload.
    Workload { workload: u32 },
    /// One instance of it, by the number of its cgroup.
    Instance { workload: u32, cgroup: u64 },
    /// A caller that is known by its address, as it is seen in a network namespace.
    Address { address: IpAddr, netns: u64 },
}

impl GrantId {
    pub fn from_random(bytes: [u8; 16]) -> Self {
        Self(u128::from_be_bytes(bytes))
    }
}

impl Grant {
    fn is_over(&self, now: Timestamp, boot: &str) -> bool {
        self.expires <= now || self.boot != boot
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
                table.insert(grant.id.0, value.as_slice())?;
            }
            Ok(())
        })
    }

    pub fn remove_grants(&self, ids: impl IntoIterator<Item = GrantId>) -> Result<(), StoreError> {
        self.write_later(|transaction| {
            let mut table = transaction.open_table(TABLE)?;
            for id in ids {
                table.remove(id.0)?;
            }
            Ok(())
        })
    }

    pub fn grants(&self) -> Result<Vec<Grant>, StoreError> {
        self.read(|transaction| {
            let mut all = Vec::new();
            for entry in transaction.open_table(TABLE)?.iter()? {
                let (key, value) = entry?;
                let id = GrantId(key.value());
                let grant: Grant = decode(&TABLE, id, value.value())?;
                if grant.id != id {
                    return Err(row(&TABLE, id, "it holds another one"));
                }
                all.push(grant);
            }
            Ok(all)
        })
    }

    /// Removes grants that expired, and those of another run of the kernel. Returns how many.
    pub fn prune_grants(&self, now: Timestamp, boot: &str) -> Result<usize, StoreError> {
        let over: Vec<GrantId> = self.grants()?.iter().filter(|g| g.is_over(now, boot)).map(|g| g.id).collect();
        let count = over.len();
        if count > 0 {
            self.remove_grants(over)?;
        }
        Ok(count)
    }
}

impl fmt::Display for GrantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0.to_be_bytes())
    }
}

impl fmt::Debug for GrantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for GrantId {
    type Err = GrantIdError;

    fn from_str(text: &str) -> Result<Self, GrantIdError> {
        let bytes = read_hex(text).and_then(|bytes| <[u8; 16]>::try_from(bytes).ok());
        bytes.map(Self::from_random).ok_or(GrantIdError)
    }
}

impl TryFrom<String> for GrantId {
    type Error = GrantIdError;

    fn try_from(text: String) -> Result<Self, GrantIdError> {
        text.parse()
    }
}

impl From<GrantId> for String {
    fn from(id: GrantId) -> Self {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::Scratch;

    fn grant(number: u8) -> Grant {
        Grant {
            id: GrantId::from_random([number; 16]),
            rule: "write".to_owned(),
            rule_number: 3,
            holder: Holder::Instance { workload: 2, cgroup: 4711 },
            slot: u32::from(number),
            serial: 9,
            issued: "2026-11-23T12:00:00Z".parse().unwrap(),
            expires: "2026-11-23T12:05:00Z".parse().unwrap(),
            max_expires: "2026-11-23T13:00:00Z".parse().unwrap(),
            boot: "b".to_owned(),
            proofs: serde_json::json!({ "token": { "issuer": "corp", "jti_sha256": "00" } }),
        }
    }

    #[test]
    fn grants_are_there_at_once_and_after_a_restart() {
        let (scratch, store) = Scratch::with_store();
        let address = Holder::Address { address: "fd00::1".parse().unwrap(), netns: u64::MAX };
        let all = [
            grant(1),
            Grant { holder: address, ..grant(2) },
            Grant { holder: Holder::Workload { workload: 0 }, ..grant(3) },
        ];
        store.put_grants(&all).unwrap();
        store.remove_grants([all[2].id]).unwrap();
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
        let later = Grant { expires: grant(1).max_expires, ..grant(3) };
        store.put_grants(&[grant(1), elsewhere, later.clone()]).unwrap();
        assert_eq!(store.prune_grants(grant(1).expires, "b").unwrap(), 2);
        assert_eq!(store.grants().unwrap(), [later]);
    }

    #[test]
    fn a_grant_that_is_too_large_leaves_the_others_of_its_call_out_too() {
        let (_scratch, store) = Scratch::with_store();
        let large = Grant { proofs: serde_json::json!("x".repeat(MAX_ROW)), ..grant(2) };
        let error = store.put_grants(&[grant(1), large]).unwrap_err();
        assert_eq!(error.reason(), "store_entry_too_long");
        assert_eq!(store.grants().unwrap(), []);
        store.put_grants(&[grant(1)]).unwrap();
    }

    #[test]
    fn ids_have_one_spelling() {
        let id = GrantId::from_random(std::array::from_fn(|at| at as u8));
        assert_eq!(id.to_string(), "000102030405060708090a0b0c0d0e0f");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!("0".parse::<GrantId>(), Err(GrantIdError));
    }
}
