//! Who is at the other end of a local connection: the process, and the cgroup that it is in.
//!
//! Enters: an accepted Unix stream socket, or one of TCP on loopback. Leaves: a cgroup, as the kernel names it; of TCP, the one in
//! which the other socket was made. Never: belief in a process number alone,
//! which may be another process's by the time it is looked at. Since Linux 6.5 the kernel hands out a descriptor of the
//! very process that connected (SO_PEERPIDFD). Before, the process that has the number now must be seen to hold the other
//! end of this connection: then it is the one to answer for it, whoever had the number before.

use std::{
    fs, io,
    net::TcpStream,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns},
    sys::{
        socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, getsockopt, recv, sendto, socket,
            sockopt::PeerCredentials,
        },
        stat::fstat,
    },
};

use super::sockets::{
    diag::Diag,
    message::{Owner, Protocol, Socket},
};
use crate::policy::network::from_ip;

#[derive(Debug, thiserror::Error)]
pub enum AttestError {
    #[error("the process that connected is gone")]
    Gone,
    #[error("the process with the number of the one that connected does not hold the connection")]
    NotTheHolder,
    #[error("the process is in no cgroup of version 2")]
    NoCgroup,
    #[error("the kernel does not tell who holds the connection: {0}; on kernels before 6.5 load the module unix_diag")]
    Unknown(io::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl AttestError {
    /// Stable name for answers and records.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Gone => "caller_gone",
            Self::NotTheHolder => "caller_not_the_holder",
            Self::NoCgroup => "caller_without_cgroup",
            Self::Unknown(_) | Self::Io(_) => "caller_unknown",
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attested {
    /// 0: of a TCP connection, whose socket anybody may have by now.
    pub pid: u32,
    pub uid: u32,
    /// Path below the root of cgroup v2.
    pub cgroup: String,
}

/// The process that connected, and its cgroup, both of the same moment.
pub fn attest(connection: BorrowedFd<'_>) -> Result<Attested, AttestError> {
    let credentials = getsockopt(&connection, PeerCredentials).map_err(io::Error::from)?;
    match peer_pidfd(connection) {
        Ok(process) => attest_by_descriptor(process.as_fd(), credentials.uid()),
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => attest_by_number(connection),
        // What connected was gone before it was accepted.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENODATA | libc::EINVAL)) => {
            Err(AttestError::Gone)
        }
        Err(error) => Err(error.into()),
    }
}

/// The cgroup in which the other end of a loopback TCP connection was made, by its number, and its user. In the network namespace of
/// the calling thread.
pub fn maker(connection: &TcpStream) -> Result<Owner, AttestError> {
    let (ours, theirs) = (connection.local_addr()?, connection.peer_addr()?);
    let (ours_at, theirs_at) = (from_ip(ours.ip().to_canonical()), from_ip(theirs.ip().to_canonical()));
    let socket = Socket {
        protocol: Protocol::Tcp,
        local: theirs_at,
        local_port: theirs.port(),
        remote: ours_at,
        remote_port: ours.port(),
        interface: 0,
        // Any: no two sockets have both ends in common.
        cookie: u64::MAX,
    };
    let unknown = |error: &dyn std::fmt::Display| AttestError::Unknown(io::Error::other(error.to_string()));
    let mut diag = Diag::open().map_err(|error| unknown(&error))?;
    diag.owner(&socket).map_err(|error| unknown(&error))?.ok_or(AttestError::Gone)
}

/// By the kernel's descriptor of the process.
fn attest_by_descriptor(process: BorrowedFd<'_>, uid: u32) -> Result<Attested, AttestError> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", process.as_raw_fd()))?;
    let number = info.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse::<i64>().ok());
    let pid = number.and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0).ok_or(AttestError::Gone)?;
    let cgroup = cgroup_of(pid)?;
    // Alive after the reading, so what was read was this process's.
    if has_ended(process)? {
        return Err(AttestError::Gone);
    }
    Ok(Attested { pid, uid, cgroup })
}

/// By the process number and the connection's other end.
fn attest_by_number(connection: BorrowedFd<'_>) -> Result<Attested, AttestError> {
    let credentials = getsockopt(&connection, PeerCredentials).map_err(io::Error::from)?;
    let pid = u32::try_from(credentials.pid()).ok().filter(|pid| *pid != 0).ok_or(AttestError::Gone)?;
    let process = open_process(pid)?;
    let own = fstat(connection).map_err(io::Error::from)?.st_ino;
    let netlink = diagnostics(connection).map_err(AttestError::Unknown)?;
    let other = other_end(netlink.as_fd(), own).map_err(AttestError::Unknown)?.ok_or(AttestError::Gone)?;
    if !holds(pid, other)? {
        return Err(AttestError::NotTheHolder);
    }
    let cgroup = cgroup_of(pid)?;
    if has_ended(process.as_fd())? {
        return Err(AttestError::Gone);
    }
    Ok(Attested { pid, uid: credentials.uid(), cgroup })
}

fn peer_pidfd(connection: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // include/uapi/asm-generic/socket.h
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut fd: libc::c_int = -1;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option writes one descriptor into the integer, whose size is given.
    let result = unsafe {
        let value: *mut libc::c_int = &raw mut fd;
        libc::getsockopt(connection.as_raw_fd(), libc::SOL_SOCKET, SO_PEERPIDFD, value.cast(), &raw mut length)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so this is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn open_process(pid: u32) -> Result<OwnedFd, AttestError> {
    // SAFETY: takes numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    if fd < 0 {
        let error = io::Error::last_os_error();
        return Err(if error.raw_os_error() == Some(libc::ESRCH) { AttestError::Gone } else { error.into() });
    }
    // SAFETY: the call succeeded, so this is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// A process's descriptor becomes readable when the process ends (pidfd_open(2)).
fn has_ended(process: BorrowedFd<'_>) -> io::Result<bool> {
    let mut polled = [PollFd::new(process, PollFlags::POLLIN)];
    Ok(poll(&mut polled, PollTimeout::ZERO)? != 0)
}

fn cgroup_of(pid: u32) -> Result<String, AttestError> {
    let text = match fs::read_to_string(format!("/proc/{pid}/cgroup")) {
        Ok(text) => text,
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
            return Err(AttestError::Gone);
        }
        Err(error) => return Err(error.into()),
    };
    let path = text.lines().find_map(|line| line.strip_prefix("0::")).ok_or(AttestError::NoCgroup)?;
    // What the kernel says of a process whose cgroup was removed.
    if path.ends_with(" (deleted)") { Err(AttestError::NoCgroup) } else { Ok(path.to_owned()) }
}

/// Whether a process has a socket among its descriptors.
fn holds(pid: u32, socket: u64) -> Result<bool, AttestError> {
    let link = format!("socket:[{socket}]");
    let entries = match fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(AttestError::Gone),
        Err(error) => return Err(error.into()),
    };
    Ok(entries
        .filter_map(Result::ok)
        .any(|entry| fs::read_link(entry.path()).is_ok_and(|target| target.as_os_str() == link.as_str())))
}

/// A socket of sock_diag(7) in the network namespace of a connection. Both ends of a Unix connection are in the one of who
/// connected, and are told of in no other.
fn diagnostics(connection: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // include/uapi/linux/sockios.h
    const SIOCGSKNS: libc::c_ulong = 0x894c;
    let open = || {
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)
            .map_err(io::Error::from)
    };
    // SAFETY: takes no argument, returns a descriptor.
    let fd = unsafe { libc::ioctl(connection.as_raw_fd(), SIOCGSKNS) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so this is a new descriptor that nobody else owns.
    let namespace = unsafe { OwnedFd::from_raw_fd(fd) };
    if fstat(&namespace)?.st_ino == fs::metadata("/proc/self/ns/net")?.ino() {
        return open();
    }
    // A thread that entered another namespace is no use for anything else.
    let inside = std::thread::Builder::new().spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        open()
    })?;
    inside.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
}

/// The inode number of the socket that a Unix socket is connected to. `None` if it is closed.
fn other_end(netlink: BorrowedFd<'_>, own: u64) -> io::Result<Option<u64>> {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const NLM_F_REQUEST: u16 = 1;
    const NLMSG_ERROR: u16 = 2;
    const UDIAG_SHOW_PEER: u32 = 4;
    const UNIX_DIAG_PEER: u16 = 2;
    const HEADER: usize = 16;
    const MESSAGE: usize = 16;
    let own = u32::try_from(own).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    // `struct nlmsghdr` and `struct unix_diag_req`; the cookie of all ones asks for none.
    let mut request = Vec::with_capacity(40);
    request.extend(40_u32.to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend(NLM_F_REQUEST.to_ne_bytes());
    request.extend([0; 8]);
    request.extend([libc::AF_UNIX as u8, 0, 0, 0]);
    request.extend(u32::MAX.to_ne_bytes());
    request.extend(own.to_ne_bytes());
    request.extend(UDIAG_SHOW_PEER.to_ne_bytes());
    request.extend([0xff; 8]);
    sendto(netlink.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = [0; 4096];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let answer = answer.get(..length).unwrap_or_default();
    let truncated = || io::Error::from(io::ErrorKind::UnexpectedEof);
    if u16_at(answer, 4).ok_or_else(truncated)? == NLMSG_ERROR {
        let code = u32_at(answer, HEADER).ok_or_else(truncated)? as i32;
        return match -code {
            libc::ENOENT if code != 0 => Ok(None),
            code => Err(io::Error::from_raw_os_error(code)),
        };
    }
    let mut at = HEADER + MESSAGE;
    while let (Some(length), Some(kind)) = (u16_at(answer, at), u16_at(answer, at + 2)) {
        if kind == UNIX_DIAG_PEER {
            return Ok(u32_at(answer, at + 4).map(u64::from));
        }
        // A length without its own header would go on for ever.
        at += usize::from(length).max(4).next_multiple_of(4);
    }
    Ok(None)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::{UnixListener, UnixStream},
        process::{Command, Stdio},
    };

    use super::*;

    struct Listening(UnixListener, std::path::PathBuf);

    impl Listening {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("authd-attest-{}-{name}", std::process::id()));
            let _ = fs::remove_file(&path);
            Self(UnixListener::bind(&path).unwrap(), path)
        }
    }

    impl Drop for Listening {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.1);
        }
    }

    fn own_cgroup() -> Option<String> {
        fs::read_to_string("/proc/self/cgroup").unwrap().lines().find_map(|l| Some(l.strip_prefix("0::")?.to_owned()))
    }

    #[test]
    fn a_caller_is_known_by_its_process_both_ways() {
        let Some(cgroup) = own_cgroup() else { return };
        let listening = Listening::new("self");
        let _client = UnixStream::connect(&listening.1).unwrap();
        let (server, _) = listening.0.accept().unwrap();
        let by_number = attest_by_number(server.as_fd()).unwrap();
        assert_eq!((by_number.pid, by_number.cgroup.as_str()), (std::process::id(), cgroup.as_str()));
        assert_eq!(attest(server.as_fd()).unwrap(), by_number);
    }

    /// A child connects, leaves the connection to this process, and ends: nobody is there to be attested.
    #[test]
    fn a_caller_that_ended_is_nobody() {
        let listening = Listening::new("gone");
        let (keep, give) = UnixStream::pair().unwrap();
        // The connection is made by a process that is gone when it is looked at; this one only holds it.
        let script = format!(
            "import socket,array\ns=socket.socket(socket.AF_UNIX);s.connect({:?})\n\
             t=socket.socket(fileno=0);t.sendmsg([b'x'],[(socket.SOL_SOCKET,socket.SCM_RIGHTS,array.array('i',[s.fileno()]))])",
            listening.1.to_str().unwrap()
        );
        let mut child = Command::new("python3")
            .args(["-c", &script])
            .stdin(Stdio::from(OwnedFd::from(give)))
            .spawn()
            .expect("python3 is part of every test machine");
        let (server, _) = listening.0.accept().unwrap();
        child.wait().unwrap();
        let mut keep = keep;
        let _ = keep.write(b"");
        assert!(matches!(attest(server.as_fd()), Err(AttestError::Gone)), "{:?}", attest(server.as_fd()));
        assert!(matches!(attest_by_number(server.as_fd()), Err(AttestError::Gone)));
        let _ = keep.read(&mut [0; 1]);
    }

    /// The connector lives, and another process holds the connection: by the number alone that would be a confusion.
    #[test]
    fn the_number_of_a_process_that_does_not_hold_the_connection_is_refused() {
        let listening = Listening::new("other");
        let client = UnixStream::connect(&listening.1).unwrap();
        let (server, _) = listening.0.accept().unwrap();
        let netlink = diagnostics(server.as_fd()).unwrap();
        let other = other_end(netlink.as_fd(), fstat(server.as_fd()).unwrap().st_ino).unwrap().unwrap();
        assert!(holds(std::process::id(), other).unwrap());
        assert!(!holds(1, other).unwrap_or(false));
        drop(client);
        assert!(!holds(std::process::id(), other).unwrap());
    }

    #[test]
    fn a_process_without_a_cgroup_of_version_two_is_nobody() {
        assert!(matches!(cgroup_of(u32::MAX / 2), Err(AttestError::Gone)));
    }
}
