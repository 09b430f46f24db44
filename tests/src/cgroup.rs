//! A cgroup subtree of one's own, below the root of cgroup v2 and never the root itself.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context, Result};
use authd::daemon::cgroupfs;

/// Names of all subtrees of tests begin with this, and go on with the pid of their owner.
pub const PREFIX: &str = "authd-own-";

pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    pub fn new(name: &str) -> Result<Self> {
        let mount = cgroupfs::mount_point().context("no cgroup v2 is mounted")?;
        let path = mount.join(name);
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a cgroup below this one; one that exists is as good.
    pub fn child(&self, path: &str) -> Result<PathBuf> {
        let path = self.path.join(path.trim_start_matches('/'));
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = remove(&self.path);
    }
}

/// Ends what runs in a subtree, and removes it.
pub fn remove(path: &Path) -> io::Result<()> {
    for _ in 0..100 {
        kill(path);
        if remove_tree(path).is_ok() {
            return Ok(());
        }
        sleep(Duration::from_millis(20));
    }
    fs::remove_dir(path)
}

fn kill(path: &Path) {
    // Linux 5.14: one write ends the whole subtree.
    let _ = fs::write(path.join("cgroup.kill"), "1");
}

fn remove_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}
