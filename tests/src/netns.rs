//! A network namespace of one's own, with its loopback up.

use std::{
    fs::File,
    panic::resume_unwind,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use anyhow::{Result, bail};
use nix::sched::{CloneFlags, setns};

pub struct Netns {
    name: String,
    path: PathBuf,
}

impl Netns {
    pub fn new(name: &str) -> Result<Self> {
        ip(&["netns", "add", name])?;
        let netns = Self { name: name.to_owned(), path: Path::new("/run/netns").join(name) };
        netns.ip(&["link", "set", "lo", "up"])?;
        Ok(netns)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `ip` with arguments, inside.
    pub fn ip(&self, arguments: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.name], arguments].concat())
    }

    /// Does something inside, on a thread of its own: the calling one stays where it is.
    pub fn within<T: Send>(&self, action: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let netns = File::open(&self.path)?;
        let inside = move || {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
            action()
        };
        thread::scope(|scope| scope.spawn(inside).join().unwrap_or_else(|panic| resume_unwind(panic)))
    }

    /// Joins two namespaces with a pair of interfaces, each with its addresses.
    pub fn join(&self, other: &Self, names: (&str, &str), addresses: (&[&str], &[&str])) -> Result<()> {
        self.ip(&["link", "add", names.0, "type", "veth", "peer", "name", names.1, "netns", &other.name])?;
        for (netns, name, addresses) in [(self, names.0, addresses.0), (other, names.1, addresses.1)] {
            for address in addresses {
                let mut command = vec!["address", "add", address, "dev", name];
                if address.contains(':') {
                    command.push("nodad");
                }
                netns.ip(&command)?;
            }
            netns.ip(&["link", "set", name, "up"])?;
        }
        Ok(())
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = ip(&["netns", "delete", &self.name]);
    }
}

/// Runs `ip`; what it complains about is the error.
pub fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output()?;
    if !output.status.success() {
        bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
