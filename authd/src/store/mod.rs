//! What must survive a restart: revocations, API keys, grants, approvals, what this node signs with. One file, transactional,
//! with one owner.
//!
//! Enters: entries. Leaves: the same, after a crash too. Never: an empty start instead of lost entries. A file that is damaged,
//! missing or older than what was acknowledged is an error that names the remedy, and whoever sees it trusts nobody.
//!
//! Two files: `store.redb`, and beside it `store.mark`, which says that a store was made here and how many of its changes were
//! acknowledged. A change counts as acknowledged when both are on disk. Commits are in two phases, so that a bad page in the
//! newest state is damage, and never a silent step back to the state before; the mark tells of every other step back, such as
//! an old copy that was put in place.

pub mod approvals;
mod file;
pub mod grants;
pub mod issuing;
pub mod keys;
pub mod revocations;
pub mod revoked;

use std::{
    fmt::Display,
    io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use redb::{
    Database, Durability, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, TableHandle,
    WriteTransaction,
};
use serde::{Serialize, de::DeserializeOwned};

use self::revocations::RevokedError;

const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// Key of [`META`]: the layout of the tables.
const SCHEMA_KEY: &str = "schema";
/// Key of [`META`]: how many changes were committed that had to be on disk.
const CHANGES_KEY: &str = "changes";
/// Raised with every change of the tables or of what is in them.
const SCHEMA: u64 = 2;
type Migration = fn(&WriteTransaction) -> Result<(), Fault>;
/// The n-th makes schema n + 1 of schema n, inside the transaction in which the version is raised.
const MIGRATIONS: [Migration; SCHEMA as usize - 1] = [add_tables];

/// Entries are small and read once, at the start: redb's own default is a gigabyte.
const CACHE_BYTES: usize = 8 << 20;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    // The place is wrong.
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: io::Error },
    #[error("{path} {problem}: it must be root's alone; {remedy}")]
    Unsafe { path: PathBuf, problem: &'static str, remedy: &'static str },
    #[error("{0} is in use by another process")]
    InUse(PathBuf),
    // The file is wrong.
    #[error(
        "{store} is missing, and {mark} says that there was one: put a copy back; if it is lost, and with it every revocation and API key, remove {mark} to begin with an empty one"
    )]
    Missing { store: PathBuf, mark: PathBuf },
    #[error(
        "{path} is damaged ({detail}): put a copy back; if there is none, and every revocation and API key is lost, remove it and its mark ({mark}) to begin with an empty one"
    )]
    Damaged { path: PathBuf, mark: PathBuf, detail: String },
    #[error(
        "{path} is older than it was: it has {found} changes, and {acknowledged} were acknowledged. Put the newer file back; if it is lost, and with it the latest revocations, remove {mark} to go on with this one"
    )]
    RolledBack { path: PathBuf, mark: PathBuf, found: u64, acknowledged: u64 },
    #[error("{path} was written by a newer authd (schema {found}, this one knows {SCHEMA}): start that one")]
    Newer { path: PathBuf, found: u64 },
    // The disk refuses.
    #[error("{path} cannot be written, nothing of this change is kept: {error}")]
    Write { path: PathBuf, error: String },
    // The caller asks for what cannot be kept.
    #[error(transparent)]
    Revoked(#[from] RevokedError),
    #[error("a {what} has at most {most} bytes")]
    TooLong { what: &'static str, most: usize },
}

impl StoreError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Io { .. } => "store_unreadable",
            Self::Unsafe { .. } => "store_unsafe",
            Self::InUse(_) => "store_in_use",
            Self::Missing { .. } => "store_missing",
            Self::Damaged { .. } => "store_damaged",
            Self::RolledBack { .. } => "store_rolled_back",
            Self::Newer { .. } => "store_newer",
            Self::Write { .. } => "store_write_failed",
            Self::Revoked(error) => error.reason(),
            Self::TooLong { .. } => "store_entry_too_long",
        }
    }
}

pub struct Store {
    paths: file::Paths,
    state: Mutex<State>,
}

struct State {
    /// `None` after a failed write: redb wants to be opened again then, which happens with the next use.
    database: Option<Database>,
    changes: u64,
    /// There are commits that are not on disk yet.
    unwritten: bool,
}

impl Store {
    /// Opens the store of a directory, or makes one where none ever was. Everything in it is read once: what opens is whole.
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        let paths = file::Paths::new(directory);
        paths.check_directory()?;
        let mark = paths.read_mark()?;
        if mark.is_none() && !paths.exists()? {
            paths.create()?;
        }
        let (database, changes) = paths.open(mark)?;
        paths.write_mark(changes)?;
        let store = Self { state: Mutex::new(State { database: Some(database), changes, unwritten: false }), paths };
        store.revocations()?;
        store.api_keys()?;
        store.grants()?;
        store.signing_keys()?;
        store.issued_tokens()?;
        store.approvals()?;
        Ok(store)
    }

    /// Puts on disk what was left for later.
    pub fn flush(&self) -> Result<(), StoreError> {
        let mut state = self.state();
        if state.unwritten { self.commit(&mut state, Durability::Immediate, |_| Ok(())) } else { Ok(()) }
    }

    fn read<T>(&self, body: impl FnOnce(&ReadTransaction) -> Result<T, Fault>) -> Result<T, StoreError> {
        let mut state = self.state();
        let database = self.database(&mut state)?;
        let read = || body(&database.begin_read()?);
        read().map_err(|fault| self.paths.explain(fault))
    }

    /// A change that is on disk when this returns, in the store and in its mark.
    fn write_now<T>(&self, body: impl FnOnce(&WriteTransaction) -> Result<T, Fault>) -> Result<T, StoreError> {
        let mut state = self.state();
        let changes = state.changes + 1;
        let written = self.commit(&mut state, Durability::Immediate, |transaction| {
            transaction.open_table(META)?.insert(CHANGES_KEY, changes)?;
            body(transaction)
        })?;
        state.changes = changes;
        self.paths.write_mark(changes)?;
        Ok(written)
    }

    /// A change that is visible when this returns, and on disk with the next one that has to be, or the next [`Store::flush`].
    fn write_later<T>(&self, body: impl FnOnce(&WriteTransaction) -> Result<T, Fault>) -> Result<T, StoreError> {
        self.commit(&mut self.state(), Durability::None, body)
    }

    fn commit<T>(
        &self,
        state: &mut State,
        durability: Durability,
        body: impl FnOnce(&WriteTransaction) -> Result<T, Fault>,
    ) -> Result<T, StoreError> {
        let database = self.database(state)?;
        let write = || -> Result<T, Fault> {
            let mut transaction = database.begin_write()?;
            transaction.set_two_phase_commit(true);
            transaction.set_durability(durability)?;
            let written = body(&transaction)?;
            transaction.commit()?;
            Ok(written)
        };
        match write() {
            Ok(written) => {
                state.unwritten = matches!(durability, Durability::None);
                Ok(written)
            }
            Err(fault) => {
                // What the caller asked for was wrong, or redb refuses to go on with a file that it could not write.
                if matches!(fault, Fault::Database(_)) {
                    state.database = None;
                }
                Err(self.paths.explain_write(fault))
            }
        }
    }

    fn database<'a>(&self, state: &'a mut State) -> Result<&'a Database, StoreError> {
        let database = match state.database.take() {
            Some(database) => database,
            None => {
                // A commit whose end was not seen may have come through.
                let (database, changes) = self.paths.open(Some(state.changes))?;
                state.changes = changes;
                state.unwritten = false;
                database
            }
        };
        Ok(state.database.insert(database))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A transaction that panicked was rolled back.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Err(error) = self.flush() {
            tracing::error!(%error, "the last changes of the store are not on disk");
        }
    }
}

/// What can go wrong inside a transaction.
enum Fault {
    Database(redb::Error),
    Store(StoreError),
    /// A row that is not what its table holds.
    Row(String),
    Newer(u64),
}

macro_rules! faults_of_the_database {
    ($($error:ty),*) => {
        $(impl From<$error> for Fault {
            fn from(error: $error) -> Self {
                Self::Database(error.into())
            }
        })*
    };
}

faults_of_the_database!(
    redb::CommitError,
    redb::DatabaseError,
    redb::SetDurabilityError,
    redb::StorageError,
    redb::TableError,
    redb::TransactionError
);

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// The layout, brought up to date, and the number of changes.
fn prepare(transaction: &WriteTransaction) -> Result<u64, Fault> {
    let found = {
        let meta = transaction.open_table(META)?;
        let found = meta.get(SCHEMA_KEY)?.map(|value| value.value());
        found.ok_or_else(|| row(&META, SCHEMA_KEY, "missing"))?
    };
    let done = found.checked_sub(1).and_then(|done| usize::try_from(done).ok());
    let steps = match done {
        _ if found > SCHEMA => return Err(Fault::Newer(found)),
        Some(done) => MIGRATIONS.iter().skip(done),
        None => return Err(row(&META, SCHEMA_KEY, "0 is no version")),
    };
    for step in steps {
        step(transaction)?;
    }
    let mut meta = transaction.open_table(META)?;
    meta.insert(SCHEMA_KEY, SCHEMA)?;
    let changes = meta.get(CHANGES_KEY)?.map(|value| value.value());
    changes.ok_or_else(|| row(&META, CHANGES_KEY, "missing"))
}

/// Makes all tables, empty.
fn initialize(transaction: &WriteTransaction) -> Result<(), Fault> {
    let mut meta = transaction.open_table(META)?;
    meta.insert(SCHEMA_KEY, SCHEMA)?;
    meta.insert(CHANGES_KEY, 0)?;
    transaction.open_table(revocations::TABLE)?;
    transaction.open_table(keys::TABLE)?;
    transaction.open_table(keys::USED)?;
    transaction.open_table(grants::TABLE)?;
    add_tables(transaction)
}

/// What schema 1 did not have.
fn add_tables(transaction: &WriteTransaction) -> Result<(), Fault> {
    transaction.open_table(issuing::KEYS)?;
    transaction.open_table(issuing::ISSUED)?;
    approvals::add_table(transaction)
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, Fault> {
    serde_json::to_vec(value).map_err(|error| Fault::Row(format!("a new row: {error}")))
}

fn decode<T: DeserializeOwned>(table: &impl TableHandle, key: impl Display, value: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(value).map_err(|error| row(table, key, error))
}

/// A row that is not what its table holds.
fn row(table: &impl TableHandle, key: impl Display, problem: impl Display) -> Fault {
    Fault::Row(format!("`{key}` in table `{}`: {problem}", table.name()))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{
        fs,
        os::unix::fs::PermissionsExt,
        sync::atomic::{AtomicU32, Ordering},
    };

    use jiff::Timestamp;

    use super::{
        revocations::{Revocation, Revocations},
        *,
    };

    /// A directory of its own, removed at the end.
    pub struct Scratch(pub PathBuf);

    impl Scratch {
        pub fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let name = format!("authd-store-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let path = std::env::temp_dir().join(name);
            let _ = fs::remove_dir_all(&path);
            fs::create_dir(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
            Self(path)
        }

        pub fn with_store() -> (Self, Store) {
            let scratch = Self::new();
            let store = scratch.open().unwrap();
            (scratch, store)
        }

        pub fn open(&self) -> Result<Store, StoreError> {
            Store::open(&self.0)
        }

        /// The files as they are on disk now, elsewhere.
        pub fn copy(&self) -> Self {
            let copy = Self::new();
            for name in ["store.redb", "store.mark"] {
                fs::copy(self.0.join(name), copy.0.join(name)).unwrap();
            }
            copy
        }

        pub fn store(&self) -> PathBuf {
            self.0.join("store.redb")
        }

        fn mark(&self) -> PathBuf {
            self.0.join("store.mark")
        }

        fn reason(&self) -> &'static str {
            self.open().err().map_or("none", |error| error.reason())
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn revoke(store: &Store, number: usize) {
        let what = format!("peer p{number}").parse().unwrap();
        let entry = Revocation::new(what, Timestamp::UNIX_EPOCH, 0, "");
        Revocations::default().revoke(store, vec![entry]).unwrap();
    }

    #[test]
    fn files_are_for_their_owner_only() {
        let before = nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        let (scratch, store) = Scratch::with_store();
        revoke(&store, 1);
        nix::sys::stat::umask(before);
        for path in [scratch.store(), scratch.mark()] {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        fs::set_permissions(scratch.store(), fs::Permissions::from_mode(0o640)).unwrap();
        drop(store);
        assert_eq!(scratch.reason(), "store_unsafe");
        fs::set_permissions(scratch.store(), fs::Permissions::from_mode(0o600)).unwrap();
        fs::set_permissions(&scratch.0, fs::Permissions::from_mode(0o770)).unwrap();
        assert_eq!(scratch.reason(), "store_unsafe");
        fs::set_permissions(&scratch.0, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(scratch.reason(), "none");
    }

    #[test]
    fn a_store_that_is_gone_is_not_replaced_by_an_empty_one() {
        let (scratch, store) = Scratch::with_store();
        revoke(&store, 1);
        drop(store);
        fs::remove_file(scratch.store()).unwrap();
        let error = scratch.open().err().unwrap();
        assert_eq!(error.reason(), "store_missing");
        assert!(error.to_string().contains("store.mark") && !scratch.store().exists(), "{error}");
        // The remedy that the error names.
        fs::remove_file(scratch.mark()).unwrap();
        assert!(scratch.open().unwrap().revocations().unwrap().is_empty());
    }

    #[test]
    fn an_old_copy_is_noticed() {
        let (scratch, store) = Scratch::with_store();
        revoke(&store, 1);
        drop(store);
        let old = scratch.copy();
        let store = scratch.open().unwrap();
        revoke(&store, 2);
        drop(store);
        fs::copy(old.store(), scratch.store()).unwrap();
        let error = scratch.open().err().unwrap();
        assert!(matches!(error, StoreError::RolledBack { found: 1, acknowledged: 2, .. }), "{error}");
        fs::remove_file(scratch.mark()).unwrap();
        assert_eq!(scratch.open().unwrap().revocations().unwrap().len(), 1);
    }

    #[test]
    fn a_crash_before_the_mark_was_written_is_no_damage() {
        let (scratch, store) = Scratch::with_store();
        let mark = fs::read(scratch.mark()).unwrap();
        revoke(&store, 1);
        drop(store);
        fs::write(scratch.mark(), mark).unwrap();
        assert_eq!(scratch.open().unwrap().revocations().unwrap().len(), 1);
        fs::remove_file(scratch.mark()).unwrap();
        fs::write(scratch.0.join("store.redb.new"), "half a file").unwrap();
        assert_eq!(scratch.open().unwrap().revocations().unwrap().len(), 1);
        assert_eq!(fs::read_to_string(scratch.mark()).unwrap(), "1\n");
    }

    #[test]
    fn a_first_start_that_was_cut_short_is_done_again() {
        let scratch = Scratch::new();
        fs::write(scratch.0.join("store.redb.new"), "half a file").unwrap();
        assert_eq!(scratch.reason(), "none");
        assert!(!scratch.0.join("store.redb.new").exists());
    }

    #[test]
    fn empty_truncated_and_foreign_files_are_damage() {
        let (scratch, store) = Scratch::with_store();
        (0..50).for_each(|number| revoke(&store, number));
        drop(store);
        let whole = fs::read(scratch.store()).unwrap();
        let lengths = [0, 1, 9, 63, 64, 320, 4095, 4096, 8192, whole.len() / 2, whole.len() - 4096, whole.len() - 1];
        for length in lengths {
            fs::write(scratch.store(), &whole[..length]).unwrap();
            assert_eq!(scratch.reason(), "store_damaged", "cut to {length} bytes");
        }
        fs::write(scratch.store(), "no database").unwrap();
        assert_eq!(scratch.reason(), "store_damaged");
        for mark in ["", "7", "x\n", "-1\n", "99999999999999999999999\n", "1\n2\n"] {
            fs::write(scratch.store(), &whole).unwrap();
            fs::write(scratch.mark(), mark).unwrap();
            assert_eq!(scratch.reason(), "store_damaged", "{mark:?}");
        }
        fs::write(scratch.mark(), "50\n").unwrap();
        assert_eq!(scratch.open().unwrap().revocations().unwrap().len(), 50);
    }

    #[test]
    fn a_flipped_bit_is_damage_or_changes_nothing() {
        let (scratch, store) = Scratch::with_store();
        (0..50).for_each(|number| revoke(&store, number));
        drop(store);
        let whole = fs::read(scratch.store()).unwrap();
        let mark = fs::read(scratch.mark()).unwrap();
        // Every byte of the header, and a sample of the others.
        let places = (0..320).chain((320..whole.len()).step_by(997));
        let mut damaged = 0;
        for place in places {
            let mut bytes = whole.clone();
            bytes[place] ^= 1 << (place % 8);
            fs::write(scratch.store(), &bytes).unwrap();
            fs::write(scratch.mark(), &mark).unwrap();
            match scratch.open() {
                Ok(store) => assert_eq!(store.revocations().unwrap().len(), 50, "byte {place}"),
                Err(error) => {
                    assert!(matches!(error.reason(), "store_damaged" | "store_rolled_back"), "byte {place}: {error}");
                    damaged += 1;
                }
            }
        }
        assert!(damaged > 20, "{damaged}");
    }

    #[test]
    fn a_row_that_means_nothing_is_damage() {
        for (key, value) in [("peer p", "{}"), ("peer p", "not JSON"), ("peer other", VALID)] {
            let (scratch, store) = Scratch::with_store();
            store
                .write_now(|transaction| {
                    transaction.open_table(revocations::TABLE)?.insert(key, value.as_bytes())?;
                    Ok(())
                })
                .unwrap();
            drop(store);
            assert_eq!(scratch.reason(), "store_damaged", "{key} {value}");
        }
    }

    const VALID: &str =
        r#"{"what":"peer p","at":"2026-11-23T12:00:00Z","by":0,"text":"","until":null,"not_before":null}"#;

    #[test]
    fn another_schema_is_not_guessed_at() {
        for (schema, reason) in [(SCHEMA + 1, "store_newer"), (u64::MAX, "store_newer"), (0, "store_damaged")] {
            let (scratch, store) = Scratch::with_store();
            store
                .write_now(|transaction| {
                    transaction.open_table(META)?.insert(SCHEMA_KEY, schema)?;
                    Ok(())
                })
                .unwrap();
            drop(store);
            assert_eq!(scratch.reason(), reason, "schema {schema}");
        }
    }

    #[test]
    fn one_process_at_a_time_has_it_open() {
        let (scratch, _store) = Scratch::with_store();
        assert_eq!(scratch.reason(), "store_in_use");
    }

    #[test]
    fn a_link_in_the_place_of_the_store_is_not_followed() {
        let (scratch, store) = Scratch::with_store();
        drop(store);
        let elsewhere = Scratch::new();
        fs::rename(scratch.store(), elsewhere.store()).unwrap();
        std::os::unix::fs::symlink(elsewhere.store(), scratch.store()).unwrap();
        assert_eq!(scratch.reason(), "store_unreadable");
    }

    #[test]
    fn api_keys_and_their_uses_survive() {
        use crate::proofs::api_key::{ApiKey, KeyRevoked, Scope, rate::Rate};
        let (scratch, store) = Scratch::with_store();
        let scope = Scope {
            rules: vec!["read".to_owned()],
            networks: vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()],
            workloads: vec![],
            rate: Rate::per_minute(60),
        };
        let mut key = ApiKey {
            id: "05afmv0nt4".parse().unwrap(),
            name: "deploy".to_owned(),
            digest: crate::digest::Digest::of(b"x"),
            created: Timestamp::UNIX_EPOCH,
            expires: Timestamp::UNIX_EPOCH,
            created_by: 0,
            scope,
            revoked: None,
        };
        store.put_api_key(&key).unwrap();
        key.revoked = Some(KeyRevoked { at: Timestamp::UNIX_EPOCH, by: 5 });
        store.put_api_key(&key).unwrap();
        let at = Timestamp::from_millisecond(1_800_000_000_123).unwrap();
        store.put_used(&[(key.id, at)]).unwrap();
        drop(store);
        let store = scratch.open().unwrap();
        assert_eq!(store.api_keys().unwrap(), [(key.clone(), Some(at))]);
        store.remove_api_keys(&[key.id]).unwrap();
        assert_eq!(store.api_keys().unwrap(), []);
    }
}
