//! Calls that wait for a yes, that have one, and what became of others within a day.
//!
//! Enters and leaves: entries. Never: an approval that can be used again because a crash forgot that it was used.
//!
//! What a person said, and that it was used, is on disk when it returns. That somebody asked can wait: whoever lost it asks again.

use redb::{ReadableTable, TableDefinition, WriteTransaction};

use super::{Fault, Store, StoreError, decode, encode, row};
use crate::decisions::approvals::{Entry, Id};

pub(super) const TABLE: TableDefinition<&str, &[u8]> = TableDefinition::new("approvals");
/// Bytes of a row at most: the arguments, each of which may need an escape, and who asks for whom.
const MAX_ROW: usize = 512 << 10;

/// Schema 2.
pub(super) fn add_table(transaction: &WriteTransaction) -> Result<(), Fault> {
    transaction.open_table(TABLE)?;
    Ok(())
}

impl Store {
    /// Adds entries, or replaces those with the same ids. On disk when it returns.
    pub fn put_approvals<'a>(&self, entries: impl IntoIterator<Item = &'a Entry>) -> Result<(), StoreError> {
        self.write_now(|transaction| put(transaction, entries))
    }

    /// The same, on disk with the next change that has to be.
    pub fn put_approvals_later<'a>(&self, entries: impl IntoIterator<Item = &'a Entry>) -> Result<(), StoreError> {
        self.write_later(|transaction| put(transaction, entries))
    }

    pub fn remove_approvals<'a>(&self, ids: impl IntoIterator<Item = &'a Id>) -> Result<(), StoreError> {
        self.write_later(|transaction| {
            let mut table = transaction.open_table(TABLE)?;
            for id in ids {
                table.remove(id.to_string().as_str())?;
            }
            Ok(())
        })
    }

    pub fn approvals(&self) -> Result<Vec<Entry>, StoreError> {
        self.read(|transaction| {
            let mut all = Vec::new();
            for entry in transaction.open_table(TABLE)?.iter()? {
                let (key, value) = entry?;
                let entry: Entry = decode(&TABLE, key.value(), value.value())?;
                if entry.id.to_string() != key.value() {
                    return Err(row(&TABLE, key.value(), "it holds another one"));
                }
                all.push(entry);
            }
            Ok(all)
        })
    }
}

fn put<'a>(transaction: &WriteTransaction, entries: impl IntoIterator<Item = &'a Entry>) -> Result<(), Fault> {
    let mut table = transaction.open_table(TABLE)?;
    for entry in entries {
        let value = encode(entry)?;
        if value.len() > MAX_ROW {
            return Err(StoreError::TooLong { what: "call that waits for an approval", most: MAX_ROW }.into());
        }
        table.insert(entry.id.to_string().as_str(), value.as_slice())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        decisions::approvals::{State, tests::entry},
        store::{META, SCHEMA, SCHEMA_KEY, tests::Scratch},
    };

    #[test]
    fn entries_are_there_at_once_and_after_a_restart() {
        let (scratch, store) = Scratch::with_store();
        let all = [entry(1), entry(2), entry(3)];
        store.put_approvals_later(&all).unwrap();
        store.remove_approvals([&all[2].id]).unwrap();
        assert_eq!(store.approvals().unwrap(), all[..2]);
        drop(store);
        assert_eq!(scratch.open().unwrap().approvals().unwrap(), all[..2]);
    }

    #[test]
    fn what_was_said_is_on_disk_when_it_returns_and_takes_along_what_waited() {
        let (scratch, store) = Scratch::with_store();
        store.put_approvals_later(&[entry(1)]).unwrap();
        // As a killed process leaves it.
        assert_eq!(scratch.copy().open().unwrap().approvals().unwrap(), []);
        store.put_approvals(&[entry(2)]).unwrap();
        assert_eq!(scratch.copy().open().unwrap().approvals().unwrap(), [entry(1), entry(2)]);
    }

    #[test]
    fn a_store_of_before_there_were_approvals_opens_with_none() {
        let (scratch, store) = Scratch::with_store();
        let revocation = "peer p".parse().unwrap();
        let revocation = crate::store::revocations::Revocation::new(revocation, jiff::Timestamp::UNIX_EPOCH, 0, "");
        crate::store::revocations::Revocations::default().revoke(&store, vec![revocation]).unwrap();
        store
            .write_now(|transaction| {
                transaction.delete_table(TABLE)?;
                transaction.open_table(META)?.insert(SCHEMA_KEY, 1)?;
                Ok(())
            })
            .unwrap();
        drop(store);
        let store = scratch.open().unwrap();
        assert_eq!((store.approvals().unwrap().len(), store.revocations().unwrap().len()), (0, 1));
        let schema = store.read(|transaction| Ok(transaction.open_table(META)?.get(SCHEMA_KEY)?.map(|v| v.value())));
        assert_eq!(schema.unwrap(), Some(SCHEMA));
        store.put_approvals(&[entry(1)]).unwrap();
    }

    #[test]
    fn a_row_that_means_nothing_is_damage() {
        let good = serde_json::to_value(entry(1)).unwrap();
        let change = |pointer: &str, value: serde_json::Value| {
            let mut row = good.clone();
            *row.pointer_mut(pointer).unwrap() = value;
            row
        };
        for row in [
            change("/id", "000000000002".into()),
            change("/call/arguments", "{\"a\": 1}".into()),
            change("/state/state", "approved".into()),
            change("/requested", "yesterday".into()),
            serde_json::Value::Null,
        ] {
            let (scratch, store) = Scratch::with_store();
            store
                .write_now(|transaction| {
                    let key = entry(1).id.to_string();
                    transaction.open_table(TABLE)?.insert(key.as_str(), row.to_string().as_bytes())?;
                    Ok(())
                })
                .unwrap();
            drop(store);
            assert_eq!(scratch.open().err().map(|error| error.reason()), Some("store_damaged"), "{row}");
        }
    }

    #[test]
    fn the_largest_call_fits() {
        use crate::decisions::call::{Arguments, LIMITS};
        let (_scratch, store) = Scratch::with_store();
        // Each of its characters is an escape in the row.
        let text = format!("{{\"a\":\"{}\"}}", "\\\"".repeat(LIMITS.bytes / 2 - 4));
        let mut large = entry(1);
        large.call.arguments = Arguments::read(text.as_bytes()).unwrap();
        store.put_approvals(&[large.clone()]).unwrap();
        assert_eq!(store.approvals().unwrap(), [large.clone()]);
        large.policies = vec!["x".repeat(MAX_ROW)];
        large.state = State::Pending;
        assert_eq!(store.put_approvals(&[large]).unwrap_err().reason(), "store_entry_too_long");
    }
}
