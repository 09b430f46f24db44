//! Links between the interfaces' program and the interfaces that are guarded.
//!
//! A link is pinned under its interface's number, so that it outlives the daemon. An interface that is not there yet, or that
//! another program has, is tried again with each [`Interfaces::keep`]: what hangs on it meanwhile is the sockets' hooks.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
};

use nix::{errno::Errno, net::if_::if_nametoindex};

use super::{
    attach::links_directory,
    bpf::{self, XdpMode},
    object::Loaded,
};

/// What the names of the pins begin with.
const PREFIX: &str = "xdp_";

/// How one interface is guarded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Guard {
    Attached(XdpMode),
    /// Why not.
    Open(String),
}

impl Guard {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Attached(XdpMode::Native) => "native",
            Self::Attached(XdpMode::Generic) => "generic",
            Self::Open(_) => "unguarded",
        }
    }
}

pub struct Interfaces {
    links: PathBuf,
    /// Name, and how it is guarded now.
    guards: Vec<(String, Guard)>,
    /// What guards them; nothing where nothing is to be guarded.
    program: Option<Loaded>,
}

impl Interfaces {
    /// None is guarded yet. Links of interfaces that are not to be guarded any more are removed.
    pub fn new(names: &[String], program: Option<Loaded>, pins: &Path) -> io::Result<Self> {
        let links = links_directory(pins);
        let wanted: Vec<u32> = names.iter().filter_map(|name| if_nametoindex(name.as_str()).ok()).collect();
        for path in pinned(&links)? {
            if !index_of(&path).is_some_and(|index| wanted.contains(&index)) {
                fs::remove_file(path)?;
            }
        }
        let guards = names.iter().map(|name| (name.clone(), Guard::Open("not tried yet".to_owned()))).collect();
        Ok(Self { links, guards, program })
    }

    pub fn guards(&self) -> &[(String, Guard)] {
        &self.guards
    }

    pub fn program(&self) -> Option<&Loaded> {
        self.program.as_ref()
    }

    /// Puts the program where it is not, in place of an earlier one without a moment with none. Returns what changed.
    pub fn attach(&mut self) -> Vec<(String, Guard)> {
        self.refresh(attach)
    }

    /// The same for those that are unguarded, or whose link is gone.
    pub fn keep(&mut self) -> Vec<(String, Guard)> {
        self.refresh(|links, name, program| match attached(links, name) {
            Some(mode) => Ok(mode),
            None => attach(links, name, program),
        })
    }

    fn refresh(&mut self, guard: impl Fn(&Path, &str, &Loaded) -> Result<XdpMode, String>) -> Vec<(String, Guard)> {
        let mut changes = Vec::new();
        let Some(program) = &self.program else { return changes };
        for (name, is) in &mut self.guards {
            let now = match guard(&self.links, name, program) {
                Ok(mode) => Guard::Attached(mode),
                Err(why) => Guard::Open(why),
            };
            if *is != now {
                *is = now.clone();
                changes.push((name.clone(), now));
            }
        }
        changes
    }
}

fn attach(links: &Path, name: &str, program: &Loaded) -> Result<XdpMode, String> {
    let index = if_nametoindex(name).map_err(|_| "there is no such interface".to_owned())?;
    for mode in [XdpMode::Native, XdpMode::Generic] {
        let path = pin_of(links, index, mode);
        if !path.exists() {
            continue;
        }
        if interface_of(&path) == Some(index) {
            let replaced = bpf::open_pin(&path).and_then(|link| bpf::replace_program(link.as_fd(), program.fd.as_fd()));
            return replaced.map(|()| mode).map_err(|error| format!("its program cannot be replaced: {error}"));
        }
        // Its interface is gone; this is another one that has its number.
        fs::remove_file(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    let mut failed = String::new();
    for mode in [XdpMode::Native, XdpMode::Generic] {
        match bpf::link_xdp(program.fd.as_fd(), index, mode) {
            Ok(link) => {
                let path = pin_of(links, index, mode);
                return match bpf::pin(link.as_fd(), &path) {
                    Ok(()) => Ok(mode),
                    Err(error) => Err(format!("pinning its link at {}: {error}", path.display())),
                };
            }
            Err(error) => failed = refusal(&error),
        }
    }
    Err(failed)
}

/// Why the kernel does not attach a program.
fn refusal(error: &io::Error) -> String {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EBUSY | Errno::EEXIST) => {
            "another XDP program has it (`ip link` shows which): detach that one, or leave the interface out".to_owned()
        }
        _ => format!("the kernel does not attach an XDP program: {error}"),
    }
}

/// How an interface is guarded, if its link is there and whole.
fn attached(links: &Path, name: &str) -> Option<XdpMode> {
    let index = if_nametoindex(name).ok()?;
    [XdpMode::Native, XdpMode::Generic]
        .into_iter()
        .find(|mode| interface_of(&pin_of(links, index, *mode)) == Some(index))
}

fn pin_of(links: &Path, index: u32, mode: XdpMode) -> PathBuf {
    let mode = if mode == XdpMode::Native { "native" } else { "generic" };
    links.join(format!("{PREFIX}{index}_{mode}"))
}

fn index_of(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.strip_prefix(PREFIX)?.split('_').next()?.parse().ok()
}

fn pinned(links: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(links) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>()?;
    Ok(paths.into_iter().filter(|path| index_of(path).is_some()).collect())
}

/// The interface on which a pinned link hangs, from its fdinfo; 0 if it is gone.
fn interface_of(path: &Path) -> Option<u32> {
    let link = bpf::open_pin(path).ok()?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", link.as_raw_fd())).ok()?;
    info.lines().find_map(|line| line.strip_prefix("ifindex:")?.trim().parse().ok())
}
