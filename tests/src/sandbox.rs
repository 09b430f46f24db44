//! Everything of one's own at once: cgroup, network, directories, pins; removed at the end, and by the next one if this one
//! was killed.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result};
use authd::{
    daemon::{
        admin::{Request, client},
        cgroupfs, remove_enforcement,
    },
    dataplane::object::{Sizes, maps_directory},
};
use aya::{
    Pod,
    maps::{HashMap, Map, MapData},
};

use crate::{
    cgroup::{self, Cgroup, PREFIX},
    daemon::Daemon,
    netns::{Netns, ip},
    probe::{self, Outcome, Running},
};

pub struct Sandbox {
    pub name: String,
    pub cgroup: Cgroup,
    pub netns: Netns,
    directory: PathBuf,
    pins: PathBuf,
}

impl Sandbox {
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        mount_bpffs()?;
        clean_up_after_others();
        let name = format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(&name);
        fs::create_dir_all(directory.join("policy.d"))?;
        let pins = Path::new("/sys/fs/bpf").join(&name);
        let sandbox = Self { cgroup: Cgroup::new(&name)?, netns: Netns::new(&name)?, directory, pins, name };
        let settings = format!(
            "cgroup = {:?}\npolicy = {:?}\npins = {:?}\nstate = {:?}\nsocket = {:?}\naudit = {:?}\nmetrics = {:?}\n\
             control.socket = {:?}\ncontrol.root = {:?}\ncontrol.user = \"nobody\"\n",
            sandbox.cgroup.path(),
            sandbox.directory.join("policy.d"),
            sandbox.pins,
            sandbox.directory.join("state"),
            sandbox.directory.join("admin.sock"),
            sandbox.audit_file(),
            sandbox.directory.join("metrics.prom"),
            sandbox.directory.join("workload.sock"),
            sandbox.directory.join("control"),
        );
        fs::write(sandbox.settings(), settings)?;
        Ok(sandbox)
    }

    /// One with a policy and a daemon.
    pub fn with_policy(policy: &str) -> Result<(Self, Daemon)> {
        let sandbox = Self::new()?;
        sandbox.write_policy(policy)?;
        let daemon = sandbox.start()?;
        Ok((sandbox, daemon))
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn pins(&self) -> &Path {
        &self.pins
    }

    /// Entries of one of the kernel's hash tables.
    pub fn table<K: Pod, V: Pod>(&self, name: &str) -> Result<Vec<(K, V)>> {
        let pin = maps_directory(&self.pins, &Sizes::default()).join(name);
        let data = MapData::from_pin(&pin).with_context(|| pin.display().to_string())?;
        let map: HashMap<_, K, V> = Map::from_map_data(data)?.try_into()?;
        Ok(map.iter().collect::<Result<_, _>>()?)
    }

    pub fn policy_directory(&self) -> PathBuf {
        self.directory.join("policy.d")
    }

    pub fn settings(&self) -> PathBuf {
        self.directory.join("authd.toml")
    }

    pub fn audit_file(&self) -> PathBuf {
        self.directory.join("audit.jsonl")
    }

    /// Adds lines to the daemon's settings.
    pub fn add_settings(&self, text: &str) -> Result<()> {
        let before = fs::read_to_string(self.settings())?;
        Ok(fs::write(self.settings(), before + text)?)
    }

    /// Replaces the policy as careful tools do: a new file, renamed into place.
    pub fn write_policy(&self, policy: &str) -> Result<()> {
        let path = self.policy_directory().join("policy.toml");
        let beside = self.policy_directory().join(".policy.toml.new");
        fs::write(&beside, policy)?;
        Ok(fs::rename(beside, path)?)
    }

    pub fn start(&self) -> Result<Daemon> {
        Daemon::start(self, &[])
    }

    /// A cgroup that the daemon, if one runs, has seen: a new one is pending until then, and how long depends on the
    /// machine's load.
    fn known(&self, path: &str) -> Result<PathBuf> {
        let is_new = !self.cgroup.path().join(path.trim_start_matches('/')).exists();
        let cgroup = self.cgroup.child(path)?;
        if is_new {
            // Whoever asks for the status gets it of the tree as it is.
            let _ = client::ask(&self.directory.join("admin.sock"), &Request::Status);
        }
        Ok(cgroup)
    }

    /// Does one thing in a cgroup, in the sandbox's network, and says how it went.
    pub fn probe(&self, cgroup: &str, arguments: &[&str]) -> Result<Outcome> {
        let cgroup = self.known(cgroup)?;
        probe::once(&cgroup, self.netns.path(), arguments)
    }

    /// Runs authd's own command line in a cgroup. What it prints is the outcome's detail.
    pub fn authd_in(&self, cgroup: &str, arguments: &[&str]) -> Result<Outcome> {
        self.authd_in_netns(cgroup, &self.netns, arguments)
    }

    pub fn authd_in_netns(&self, cgroup: &str, netns: &Netns, arguments: &[&str]) -> Result<Outcome> {
        let (binary, settings) = (crate::daemon::binary(), self.settings());
        let binary = binary.to_str().context("a path")?;
        let settings = settings.to_str().context("a path")?;
        let command = [&["run", "--", binary, "--config", settings], arguments].concat();
        self.probe_in(cgroup, netns, &command)
    }

    /// Starts something that goes on, such as a server, and waits until it is ready.
    pub fn spawn(&self, cgroup: &str, arguments: &[&str]) -> Result<Running> {
        self.spawn_in(cgroup, &self.netns, arguments)
    }

    pub fn spawn_in(&self, cgroup: &str, netns: &Netns, arguments: &[&str]) -> Result<Running> {
        let cgroup = self.known(cgroup)?;
        Running::start(&cgroup, netns.path(), arguments)
    }

    pub fn spawn_quietly_in(&self, cgroup: &str, netns: &Netns, arguments: &[&str]) -> Result<Running> {
        let cgroup = self.known(cgroup)?;
        Running::start_quietly(&cgroup, netns.path(), arguments)
    }

    pub fn probe_in(&self, cgroup: &str, netns: &Netns, arguments: &[&str]) -> Result<Outcome> {
        let cgroup = self.known(cgroup)?;
        probe::once(&cgroup, netns.path(), arguments)
    }

    /// A second network namespace.
    pub fn another_netns(&self, suffix: &str) -> Result<Netns> {
        Netns::new(&format!("{}-{suffix}", self.name))
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let _ = remove_enforcement(&self.pins);
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn mount_bpffs() -> Result<()> {
    use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
    let path = Path::new("/sys/fs/bpf");
    if statfs(path)?.filesystem_type() != BPF_FS_MAGIC {
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("bpf"), path, Some("bpf"), flags, None::<&str>).context("mounting a BPF file system")?;
    }
    Ok(())
}

/// Removes what sandboxes left whose owners are gone.
pub fn clean_up_after_others() {
    let is_left = |name: &str| {
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        owner.is_some_and(|pid| pid != std::process::id() && !Path::new(&format!("/proc/{pid}")).exists())
    };
    let left = |directory: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries
            .map(|entry| entry.path())
            .filter(|path| path.file_name().is_some_and(|n| is_left(&n.to_string_lossy())))
            .collect()
    };
    for pins in left(Path::new("/sys/fs/bpf")) {
        let _ = remove_enforcement(&pins);
    }
    if let Some(mount) = cgroupfs::mount_point() {
        for path in left(&mount) {
            let _ = cgroup::remove(&path);
        }
    }
    for netns in left(Path::new("/run/netns")) {
        let _ = ip(&["netns", "delete", &netns.file_name().unwrap_or_default().to_string_lossy()]);
    }
    for directory in left(&std::env::temp_dir()) {
        let _ = fs::remove_dir_all(directory);
    }
}
