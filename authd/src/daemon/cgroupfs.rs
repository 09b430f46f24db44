//! Where cgroup v2 is.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use authd_common::identity::MAX_DEPTH;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error(
        "no cgroup v2 is mounted: `mount -t cgroup2 none /sys/fs/cgroup`, or boot with systemd.unified_cgroup_hierarchy=1"
    )]
    NotMounted,
    #[error("{0} is no directory of cgroup v2")]
    NotCgroup(PathBuf),
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: io::Error },
    #[error("{0} lies deeper than the {MAX_DEPTH} levels that authd tells apart")]
    TooDeep(PathBuf),
}

/// The cgroup to enforce, and how deep below the root of cgroup v2 it lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    pub path: PathBuf,
    pub level: u32,
    /// Its path below the root of cgroup v2, as /proc/PID/cgroup shows paths; empty for the root itself.
    own: String,
}

impl Base {
    /// The configured cgroup, or the root.
    pub fn find(configured: Option<&Path>) -> Result<Self, CgroupError> {
        let mount = mount_point().ok_or(CgroupError::NotMounted)?;
        let path = configured.unwrap_or(&mount);
        let canonical = fs::canonicalize(path).map_err(|error| CgroupError::Io { path: path.to_owned(), error })?;
        let is_cgroup = statfs(&canonical).is_ok_and(|s| s.filesystem_type() == CGROUP2_SUPER_MAGIC);
        let below = canonical.strip_prefix(&mount);
        let (true, Ok(below)) = (is_cgroup, below) else { return Err(CgroupError::NotCgroup(canonical)) };
        let level = below.components().count() as u32;
        if level >= MAX_DEPTH {
            return Err(CgroupError::TooDeep(canonical));
        }
        let own = if level == 0 { String::new() } else { format!("/{}", below.display()) };
        Ok(Self { own, path: canonical, level })
    }

    /// A path below the root of cgroup v2, as one below this cgroup: `/` is this one itself. `None` if it lies elsewhere.
    pub fn below(&self, path: &str) -> Option<String> {
        let rest = path.strip_prefix(&self.own)?;
        match rest.as_bytes().first() {
            None => Some("/".to_owned()),
            Some(b'/') => Some(rest.to_owned()),
            Some(_) => None,
        }
    }

    /// The opposite: a path below this cgroup, as one below the root of cgroup v2.
    pub fn above(&self, path: &str) -> String {
        if path == "/" && !self.own.is_empty() { self.own.clone() } else { format!("{}{path}", self.own) }
    }

    /// Number of the cgroup's directory.
    pub fn id(&self) -> io::Result<u64> {
        Ok(fs::metadata(&self.path)?.ino())
    }
}

/// From /proc/self/mountinfo: `ID PARENT DEV ROOT MOUNTPOINT OPTIONS ... - TYPE SOURCE OPTIONS` (proc(5)).
pub fn mount_point() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(|line| {
        let (head, tail) = line.split_once(" - ")?;
        let mut fields = head.split(' ');
        let (root, point) = (fields.nth(3)?, fields.next()?);
        (tail.split(' ').next() == Some("cgroup2") && root == "/").then(|| PathBuf::from(point))
    })
}
