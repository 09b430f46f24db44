//! What the daemon keeps in its state directory, besides audit records.
//!
//! Enters and leaves: numbers of names, the last policy that was in force, records that others left. Each file is replaced
//! as a whole, so that a crash leaves the old one or the new one.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    audit::record::Record,
    policy::{compile::Registry, diagnostic::Source},
};

const REGISTRY: &str = "registry.json";
const POLICY: &str = "policy-in-force.json";
const TRIED: &str = "policy-on-trial.json";
const PENDING: &str = "pending-records.jsonl";
const LOCK: &str = "lock";

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: io::Error },
    #[error(
        "{path} is damaged ({error}): put a copy back, or remove it; names in older records lose their meaning then"
    )]
    Damaged { path: PathBuf, error: serde_json::Error },
    #[error("another authd runs with the state directory {0}")]
    Locked(PathBuf),
}

/// The directory, held by this daemon alone.
pub struct State {
    directory: PathBuf,
    _lock: Flock<File>,
}

/// What must go on where it stood.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Persistent {
    pub registry: Registry,
    /// Kernel events whose loss a record told of.
    pub lost_told: u64,
}

/// Files of a policy that somebody has to confirm, and of the one before.
#[derive(Clone, Debug, PartialEq)]
pub struct Tried {
    pub tried: Vec<Source>,
    pub before: Vec<Source>,
}

#[derive(Serialize, Deserialize)]
struct StoredTried {
    tried: Vec<StoredSource>,
    before: Vec<StoredSource>,
}

#[derive(Serialize, Deserialize)]
struct StoredSource {
    name: String,
    text: String,
}

impl State {
    pub fn open(directory: &Path) -> Result<Self, StateError> {
        let of = |error| StateError::Io { path: directory.to_owned(), error };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(of)?;
        let path = directory.join(LOCK);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| StateError::Io { path, error })?;
        let lock =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| StateError::Locked(directory.to_owned()))?;
        Ok(Self { directory: directory.to_owned(), _lock: lock })
    }

    pub fn persistent(&self) -> Result<Persistent, StateError> {
        self.read(REGISTRY).map(Option::unwrap_or_default)
    }

    pub fn keep(&self, persistent: &Persistent) -> Result<(), StateError> {
        self.replace(REGISTRY, persistent)
    }

    /// The files of the policy that was last put into force.
    pub fn policy(&self) -> Result<Option<Vec<Source>>, StateError> {
        let stored: Option<Vec<StoredSource>> = self.read(POLICY)?;
        Ok(stored.map(loaded))
    }

    pub fn keep_policy(&self, sources: &[Source]) -> Result<(), StateError> {
        self.replace(POLICY, &stored(sources))
    }

    pub fn tried(&self) -> Result<Option<Tried>, StateError> {
        let stored: Option<StoredTried> = self.read(TRIED)?;
        Ok(stored.map(|s| Tried { tried: loaded(s.tried), before: loaded(s.before) }))
    }

    pub fn keep_tried(&self, Tried { tried, before }: &Tried) -> Result<(), StateError> {
        self.replace(TRIED, &StoredTried { tried: stored(tried), before: stored(before) })
    }

    pub fn forget_tried(&self) -> Result<(), StateError> {
        let path = self.directory.join(TRIED);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StateError::Io { path, error }),
            _ => Ok(()),
        }
    }

    /// Records that a command left while no daemon could take them.
    pub fn take_pending(&self) -> Vec<Record> {
        let path = self.directory.join(PENDING);
        let taken = self.directory.join("pending-records.taken");
        if fs::rename(&path, &taken).is_err() {
            return Vec::new();
        }
        let text = fs::read_to_string(&taken).unwrap_or_default();
        let _ = fs::remove_file(&taken);
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StateError> {
        let path = self.directory.join(name);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StateError::Io { path, error }),
        };
        serde_json::from_slice(&text).map(Some).map_err(|error| StateError::Damaged { path, error })
    }

    fn replace<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StateError> {
        let path = self.directory.join(name);
        let beside = self.directory.join(format!("{name}.new"));
        let of = |error| StateError::Io { path: path.clone(), error };
        let text = serde_json::to_vec(value).map_err(|error| StateError::Damaged { path: path.clone(), error })?;
        let mut file =
            OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&beside).map_err(of)?;
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(of)?;
        fs::rename(&beside, &path).map_err(of)
    }
}

fn stored(sources: &[Source]) -> Vec<StoredSource> {
    sources.iter().map(|s| StoredSource { name: s.name.to_string(), text: s.text.to_string() }).collect()
}

fn loaded(stored: Vec<StoredSource>) -> Vec<Source> {
    stored.into_iter().map(|s| Source { name: s.name.into(), text: s.text.into() }).collect()
}

/// Leaves a record for the daemon that runs, or the next one.
pub fn leave_record(directory: &Path, record: &Record) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let mut file = OpenOptions::new().create(true).append(true).mode(0o600).open(directory.join(PENDING))?;
    let mut line = serde_json::to_vec(record)?;
    line.push(b'\n');
    file.write_all(&line)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("authd-state-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    #[test]
    fn a_second_daemon_is_refused() {
        let path = scratch("lock");
        let first = State::open(&path).unwrap();
        assert!(matches!(State::open(&path), Err(StateError::Locked(_))));
        drop(first);
        assert!(State::open(&path).is_ok());
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn a_damaged_file_is_an_error_and_not_an_empty_start() {
        let path = scratch("damaged");
        let state = State::open(&path).unwrap();
        fs::write(path.join(REGISTRY), "{").unwrap();
        assert!(matches!(state.persistent(), Err(StateError::Damaged { .. })));
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn records_left_by_others_are_taken_once() {
        let path = scratch("pending");
        let state = State::open(&path).unwrap();
        leave_record(&path, &Record::about("panic_open", "by hand")).unwrap();
        assert_eq!(state.take_pending().len(), 1);
        assert!(state.take_pending().is_empty());
        fs::remove_dir_all(&path).unwrap();
    }
}
