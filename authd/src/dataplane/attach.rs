//! Links between programs and the cgroup that is enforced: made, adopted, replaced in place, verified, removed.
//!
//! A link is pinned, so that enforcement outlives the daemon. Removing the pin of a link that no process holds detaches it.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
};

use aya::programs::{
    CgroupAttachMode, Program, ProgramError,
    links::{FdLink, LinkError, PinnedLink},
};

use super::{bpf, object::Object};

#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: io::Error },
    #[error("attaching {name}: {error}")]
    Attach { name: String, error: ProgramError },
    #[error("pinning the link of {name}: {error}")]
    Pin { name: String, error: aya::pin::PinError },
    #[error("the link of {name}: {error}")]
    Link { name: String, error: LinkError },
    #[error("replacing the program in the link of {name}: {error}")]
    Replace { name: String, error: io::Error },
    #[error("the link of {name} carries another program than the one just put there")]
    NotOurs { name: String },
}

/// One program that enforces now.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Attached {
    pub program: String,
    pub program_id: u32,
    pub link_id: u32,
    pub verified_instructions: Option<u32>,
}

/// The directory of pinned links.
pub fn links_directory(pins: &Path) -> PathBuf {
    pins.join("links")
}

/// Puts every loaded program for a cgroup into its link. A link that is pinned already gets the new program in place, without a moment
/// in which none is attached; the others are made. Then looks whether the kernel agrees.
pub fn attach(object: &mut Object, cgroup: &Path, pins: &Path) -> Result<Vec<Attached>, AttachError> {
    let links = links_directory(pins);
    fs::create_dir_all(&links).map_err(|error| AttachError::Io { path: links.clone(), error })?;
    let cgroup_fd = File::open(cgroup).map_err(|error| AttachError::Io { path: cgroup.to_owned(), error })?;
    let names: Vec<String> = object.programs.iter().filter(|p| !p.xdp).map(|p| p.name.clone()).collect();
    let mut attached = Vec::new();
    for name in names {
        let path = links.join(&name);
        if path.exists() && links_to(&path, cgroup)? {
            let link = bpf::open_pin(&path).map_err(|error| AttachError::Io { path: path.clone(), error })?;
            let loaded = object.loaded(&name);
            match bpf::replace_program(link.as_fd(), loaded.fd.as_fd()) {
                Ok(()) => {}
                // Tracing links, which LSM programs have, know no update: made anew beside the old one, which goes then.
                Err(_) if loaded.lsm => renew(object, &name, &cgroup_fd, &path)?,
                Err(error) => return Err(AttachError::Replace { name, error }),
            }
        } else {
            renew(object, &name, &cgroup_fd, &path)?;
        }
        attached.push(verify(object, &name, &path)?);
    }
    Ok(attached)
}

/// Detaches everything, in an order that refuses rather than half-decides: entry points of new flows last.
pub fn detach(pins: &Path) -> io::Result<usize> {
    let links = links_directory(pins);
    let mut removed = 0;
    let entries = match fs::read_dir(&links) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    for entry in entries {
        fs::remove_file(entry?.path())?;
        removed += 1;
    }
    fs::remove_dir(&links)?;
    Ok(removed)
}

/// Whether a pinned link hangs on this cgroup. A link without a cgroup (LSM) is ours wherever it is.
fn links_to(path: &Path, cgroup: &Path) -> Result<bool, AttachError> {
    use std::os::unix::fs::MetadataExt;
    let of = |error| AttachError::Io { path: path.to_owned(), error };
    let link = bpf::open_pin(path).map_err(of)?;
    let wanted = fs::metadata(cgroup).map_err(|error| AttachError::Io { path: cgroup.to_owned(), error })?.ino();
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", link.as_raw_fd())).map_err(of)?;
    Ok(cgroup_of(&info).is_none_or(|id| id == wanted))
}

/// The cgroup of a link, from its fdinfo.
fn cgroup_of(fdinfo: &str) -> Option<u64> {
    fdinfo.lines().find_map(|line| line.strip_prefix("cgroup_id:")?.trim().parse().ok())
}

fn renew(object: &mut Object, name: &str, cgroup: &File, path: &Path) -> Result<(), AttachError> {
    let link = new_link(object, name, cgroup)?;
    // No dot: the BPF file system reserves names that have one.
    let beside = path.with_file_name(format!("new_{name}"));
    let _ = fs::remove_file(&beside);
    link.pin(&beside).map_err(|error| AttachError::Pin { name: name.to_owned(), error })?;
    // The rename drops the old link, if there was one, only after the new one is in force.
    fs::rename(&beside, path).map_err(|error| AttachError::Io { path: path.to_owned(), error })
}

fn new_link(object: &mut Object, name: &str, cgroup: &File) -> Result<FdLink, AttachError> {
    // "Single" asks for no flags: links stack beside other owners' links by themselves.
    const MODE: CgroupAttachMode = CgroupAttachMode::Single;
    let attach_failed = |error| AttachError::Attach { name: name.to_owned(), error };
    let link_failed = |error| AttachError::Link { name: name.to_owned(), error };
    let program = object.program_mut(name);
    Ok(match program {
        Program::CgroupSkb(p) => {
            let kind = p.expected_attach_type().unwrap_or_else(|| unreachable!("sections name the direction"));
            let id = p.attach(cgroup, kind, MODE).map_err(attach_failed)?;
            p.take_link(id).map_err(attach_failed)?.try_into().map_err(link_failed)?
        }
        Program::CgroupSock(p) => {
            let id = p.attach(cgroup, MODE).map_err(attach_failed)?;
            p.take_link(id).map_err(attach_failed)?.try_into().map_err(link_failed)?
        }
        Program::CgroupSockAddr(p) => {
            let id = p.attach(cgroup, MODE).map_err(attach_failed)?;
            p.take_link(id).map_err(attach_failed)?.try_into().map_err(link_failed)?
        }
        Program::SockOps(p) => {
            let id = p.attach(cgroup, MODE).map_err(attach_failed)?;
            p.take_link(id).map_err(attach_failed)?.try_into().map_err(link_failed)?
        }
        Program::Lsm(p) => {
            let id = p.attach().map_err(attach_failed)?;
            p.take_link(id).map_err(attach_failed)?.into()
        }
        other => unreachable!("the object has no program of type {:?}", other.prog_type()),
    })
}

/// Asks the kernel which program the link carries.
fn verify(object: &Object, name: &str, path: &Path) -> Result<Attached, AttachError> {
    let link_failed = |error| AttachError::Link { name: name.to_owned(), error };
    let link: FdLink = PinnedLink::from_pin(path).map_err(link_failed)?.into();
    let info = link.info().map_err(link_failed)?;
    let loaded = object.loaded(name);
    if loaded.id != info.program_id() {
        return Err(AttachError::NotOurs { name: name.to_owned() });
    }
    Ok(Attached {
        program: name.to_owned(),
        program_id: info.program_id(),
        link_id: info.id(),
        verified_instructions: loaded.verified,
    })
}

#[cfg(test)]
mod tests {
    use super::cgroup_of;

    #[test]
    fn fdinfo_names_the_cgroup_of_a_link() {
        assert_eq!(cgroup_of("pos:\t0\nlink_type:\tcgroup\ncgroup_id:\t4711\nattach_type:\t1\n"), Some(4711));
        assert_eq!(cgroup_of("link_type:\ttracing\n"), None);
    }
}
