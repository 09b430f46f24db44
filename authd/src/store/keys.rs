//! API keys, and when they were last used.
//!
//! Enters and leaves: keys as they are kept, without their secrets. Never: a secret.

use jiff::Timestamp;
use redb::{ReadableTable, TableDefinition};

use super::{Store, StoreError, decode, encode, row};
use crate::proofs::api_key::{ApiKey, text::KeyId};

pub(super) const TABLE: TableDefinition<&str, &[u8]> = TableDefinition::new("api_keys");
/// Milliseconds since 1970. A table of its own, so that a use never rewrites what a key is allowed to do.
pub(super) const USED: TableDefinition<&str, i64> = TableDefinition::new("api_keys_used");

impl Store {
    /// Adds a key, or replaces the one with its id. On disk when it returns.
    pub fn put_api_key(&self, key: &ApiKey) -> Result<(), StoreError> {
        self.write_now(|transaction| {
            let mut table = transaction.open_table(TABLE)?;
            table.insert(key.id.to_string().as_str(), encode(key)?.as_slice())?;
            Ok(())
        })
    }

    pub fn remove_api_keys(&self, ids: &[KeyId]) -> Result<(), StoreError> {
        self.write_now(|transaction| {
            let mut table = transaction.open_table(TABLE)?;
            let mut used = transaction.open_table(USED)?;
            for id in ids {
                let id = id.to_string();
                table.remove(id.as_str())?;
                used.remove(id.as_str())?;
            }
            Ok(())
        })
    }

    /// All keys, with the time of their last use.
    pub fn api_keys(&self) -> Result<Vec<(ApiKey, Option<Timestamp>)>, StoreError> {
        self.read(|transaction| {
            let used = transaction.open_table(USED)?;
            let mut all = Vec::new();
            for entry in transaction.open_table(TABLE)?.iter()? {
                let (id, value) = entry?;
                let key: ApiKey = decode(&TABLE, id.value(), value.value())?;
                if key.id.to_string() != id.value() {
                    return Err(row(&TABLE, id.value(), "it holds another one"));
                }
                let last = used.get(id.value())?.map(|at| Timestamp::from_millisecond(at.value()));
                let last = last.transpose().map_err(|error| row(&USED, id.value(), error))?;
                all.push((key, last));
            }
            Ok(all)
        })
    }

    /// Notes uses. What a crash loses of them is worth no wait for the disk at each use of a key.
    pub fn put_used(&self, uses: &[(KeyId, Timestamp)]) -> Result<(), StoreError> {
        self.write_later(|transaction| {
            let mut used = transaction.open_table(USED)?;
            for (id, at) in uses {
                used.insert(id.to_string().as_str(), at.as_millisecond())?;
            }
            Ok(())
        })
    }
}
