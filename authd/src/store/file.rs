//! The two files of the store, and what must hold of them before they are believed.
//!
//! Enters: a directory. Leaves: an open database that is whole, and how many changes its mark acknowledges. Never: a database
//! that was made because one could not be read.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::unistd::geteuid;
use redb::{Builder, Database, Durability, backends::FileBackend};

use super::{CACHE_BYTES, Fault, StoreError, initialize, prepare};

const STORE: &str = "store.redb";
const MARK: &str = "store.mark";
/// Others, and the group, may neither read nor write.
const PRIVATE: u32 = 0o600;
const FOR_OTHERS: u32 = 0o077;
const WRITE_FOR_OTHERS: u32 = 0o022;
/// A number of 20 digits and the end of its line.
const MARK_BYTES: u64 = 21;

pub struct Paths {
    directory: PathBuf,
    store: PathBuf,
    mark: PathBuf,
}

impl Paths {
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), store: directory.join(STORE), mark: directory.join(MARK) }
    }

    /// Whoever could write to the directory could replace the store by an older one, mark included.
    pub fn check_directory(&self) -> Result<(), StoreError> {
        let found = fs::metadata(&self.directory).map_err(|error| io_error(&self.directory, error))?;
        let wrong = |problem, remedy| Err(StoreError::Unsafe { path: self.directory.clone(), problem, remedy });
        if !found.is_dir() {
            return wrong("is no directory", "name one as `state` in the settings");
        }
        if found.uid() != geteuid().as_raw() {
            return wrong("belongs to another user", "change its owner");
        }
        if found.mode() & WRITE_FOR_OTHERS != 0 {
            return wrong("can be written by others", "use `chmod 700`");
        }
        Ok(())
    }

    pub fn exists(&self) -> Result<bool, StoreError> {
        match fs::symlink_metadata(&self.store) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(io_error(&self.store, error)),
        }
    }

    /// Makes an empty store. It gets its name when it is whole.
    pub fn create(&self) -> Result<(), StoreError> {
        let beside = self.directory.join(format!("{STORE}.new"));
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error(&beside, error)),
            _ => {}
        }
        let file = options().create_new(true).open(&beside).map_err(|error| io_error(&beside, error))?;
        let fill = || -> Result<(), Fault> {
            let database = Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(FileBackend::new(file)?)?;
            let mut transaction = database.begin_write()?;
            transaction.set_two_phase_commit(true);
            initialize(&transaction)?;
            Ok(transaction.commit()?)
        };
        fill().map_err(|fault| self.explain_write(fault))?;
        fs::rename(&beside, &self.store).map_err(|error| io_error(&self.store, error))?;
        self.sync_directory()
    }

    /// Opens what is there, every page of it verified, in the current layout, and no older than its mark.
    pub fn open(&self, mark: Option<u64>) -> Result<(Database, u64), StoreError> {
        let file = match options().custom_flags(nix::libc::O_NOFOLLOW).open(&self.store) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::Missing { store: self.store.clone(), mark: self.mark.clone() });
            }
            Err(error) => return Err(io_error(&self.store, error)),
        };
        let found = file.metadata().map_err(|error| io_error(&self.store, error))?;
        let wrong = |problem, remedy| Err(StoreError::Unsafe { path: self.store.clone(), problem, remedy });
        if !found.is_file() {
            return wrong("is no file", "put the store back");
        }
        if found.uid() != geteuid().as_raw() {
            return wrong("belongs to another user", "make sure that it is authd's own, and change its owner");
        }
        if found.mode() & FOR_OTHERS != 0 {
            return wrong("is open to others", "make sure that nobody changed it, and use `chmod 600`");
        }
        if found.len() == 0 {
            // redb would take it for a new one.
            return Err(self.damaged("it is empty"));
        }
        let open = || -> Result<(Database, u64), Fault> {
            let mut builder = Builder::new();
            builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
            let database = builder.create_with_backend(FileBackend::new(file)?)?;
            let mut transaction = database.begin_write()?;
            transaction.set_two_phase_commit(true);
            transaction.set_durability(Durability::Immediate)?;
            let changes = prepare(&transaction)?;
            transaction.commit()?;
            Ok((database, changes))
        };
        let (database, changes) = open().map_err(|fault| self.explain(fault))?;
        match mark {
            Some(acknowledged) if changes < acknowledged => {
                let (path, mark) = (self.store.clone(), self.mark.clone());
                Err(StoreError::RolledBack { path, mark, found: changes, acknowledged })
            }
            _ => Ok((database, changes)),
        }
    }

    /// How many changes were acknowledged; `None` if there never was a store.
    pub fn read_mark(&self) -> Result<Option<u64>, StoreError> {
        let file = match options().custom_flags(nix::libc::O_NOFOLLOW).open(&self.mark) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error(&self.mark, error)),
        };
        let mut text = String::new();
        let read = file.take(MARK_BYTES + 1).read_to_string(&mut text);
        match read {
            Err(error) if error.kind() != io::ErrorKind::InvalidData => return Err(io_error(&self.mark, error)),
            _ => {}
        }
        let number = text.strip_suffix('\n').filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
        let number = number.and_then(|digits| digits.parse().ok());
        number.map(Some).ok_or_else(|| self.damaged("its mark holds no number"))
    }

    /// On disk when it returns.
    pub fn write_mark(&self, changes: u64) -> Result<(), StoreError> {
        let beside = self.directory.join(format!("{MARK}.new"));
        let write = || -> io::Result<()> {
            let mut file = options().create(true).truncate(true).open(&beside)?;
            file.write_all(format!("{changes}\n").as_bytes())?;
            file.sync_all()?;
            fs::rename(&beside, &self.mark)
        };
        write().map_err(|error| io_error(&self.mark, error))?;
        self.sync_directory()
    }

    fn sync_directory(&self) -> Result<(), StoreError> {
        File::open(&self.directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|error| io_error(&self.directory, error))
    }

    pub fn explain_write(&self, fault: Fault) -> StoreError {
        match fault {
            Fault::Database(error) if !is_damage(&error) => {
                StoreError::Write { path: self.store.clone(), error: error.to_string() }
            }
            fault => self.explain(fault),
        }
    }

    pub fn explain(&self, fault: Fault) -> StoreError {
        match fault {
            Fault::Store(error) => error,
            Fault::Row(detail) => self.damaged(detail),
            Fault::Newer(found) => StoreError::Newer { path: self.store.clone(), found },
            Fault::Database(redb::Error::DatabaseAlreadyOpen) => StoreError::InUse(self.store.clone()),
            Fault::Database(redb::Error::Io(error)) if !is_cut_short(&error) => io_error(&self.store, error),
            Fault::Database(error) => self.damaged(error.to_string()),
        }
    }

    fn damaged(&self, detail: impl Into<String>) -> StoreError {
        StoreError::Damaged { path: self.store.clone(), mark: self.mark.clone(), detail: detail.into() }
    }
}

/// What the file says, as opposed to what the disk does.
fn is_damage(error: &redb::Error) -> bool {
    match error {
        redb::Error::Io(error) => is_cut_short(error),
        redb::Error::Corrupted(_) | redb::Error::TableDoesNotExist(_) | redb::Error::TableTypeMismatch { .. } => true,
        _ => false,
    }
}

fn is_cut_short(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(PRIVATE);
    options
}

fn io_error(path: &Path, error: io::Error) -> StoreError {
    StoreError::Io { path: path.to_owned(), error }
}
