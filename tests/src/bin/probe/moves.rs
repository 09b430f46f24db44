//! Sockets and processes that change the cgroup or the network namespace, or the process.

use std::{
    fs::{self, File},
    io::{self, IoSlice, IoSliceMut, Read},
    net::{SocketAddr, TcpStream},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use authd_tests::probe::Outcome;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use super::{
    Attempt, Kind, Step, connect_and_reset, enter_cgroup, exchange, ready,
    sockets::{checked, connect_fd, socket_of},
    tcp, wait,
};

pub fn lend_socket(path: &Path) -> Result<()> {
    let listener = UnixListener::bind(path)?;
    ready();
    let (stream, _) = listener.accept()?;
    let socket = socket_of(Kind::Tcp).map_err(|failure| failure.error)?;
    let fds = [socket.as_raw_fd()];
    sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(b"x")],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::empty(),
        None,
    )?;
    // The socket must be received before it is closed here.
    let _ = io::stdin().read(&mut [0]);
    Ok(())
}

pub fn use_socket(path: &Path, to: SocketAddr) -> Attempt {
    let stream = UnixStream::connect(path).step("connect to the lender")?;
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(RawFd);
    let message =
        recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty()).step("receive a socket")?;
    let fd = message.cmsgs().step("read the message")?.find_map(|message| match message {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    let fd = fd.ok_or_else(|| io::Error::other("no socket came")).step("receive a socket")?;
    // SAFETY: the kernel just made this descriptor for us, and nobody else here knows of it.
    connected(unsafe { OwnedFd::from_raw_fd(fd) }, to)
}

fn connected(socket: OwnedFd, to: SocketAddr) -> Attempt {
    connect_fd(socket.as_raw_fd(), to).step("connect")?;
    exchange(&mut TcpStream::from(socket), wait())
}

fn move_to(cgroup: &Path) -> Attempt {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).step("move to the other cgroup")
}

pub fn move_then_connect(cgroup: &Path, to: SocketAddr) -> Attempt {
    let socket = socket_of(Kind::Tcp)?;
    move_to(cgroup)?;
    connected(socket, to)
}

pub fn connect_then_move(to: SocketAddr, cgroup: &Path) -> Attempt {
    let mut stream = TcpStream::connect_timeout(&to, wait()).step("connect")?;
    move_to(cgroup)?;
    exchange(&mut stream, wait())
}

pub fn child_cgroup(name: &str, to: SocketAddr) -> Attempt {
    let own = fs::read_to_string("/proc/self/cgroup").step("find the own cgroup")?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default().trim_start_matches('/');
    let mount = authd::daemon::cgroupfs::mount_point().unwrap_or_default();
    let child = mount.join(own).join(name);
    fs::create_dir_all(&child).step("make a cgroup")?;
    move_to(&child)?;
    tcp(to, None, wait())
}

pub fn exec_then_connect(to: SocketAddr) -> Attempt {
    let socket = socket_of(Kind::Tcp)?;
    // SAFETY: no pointers.
    checked(unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_SETFD, 0) }).step("keep the socket open")?;
    let own = std::env::current_exe().step("find the own program")?;
    let fd = socket.as_raw_fd().to_string();
    let output = Command::new(own).args(["connect-inherited", &fd, &to.to_string()]).output().step("exec")?;
    let outcome: Outcome = serde_json::from_slice(&output.stdout).map_err(io::Error::other).step("hear the child")?;
    if outcome.ok {
        return Ok(());
    }
    let error = match outcome.errno.as_str() {
        "EPERM" => io::Error::from_raw_os_error(libc::EPERM),
        other => io::Error::other(other.to_owned()),
    };
    Err(error).step("connect in the child")
}

pub fn connect_inherited(fd: RawFd, to: SocketAddr) -> Attempt {
    // SAFETY: the parent left this descriptor open for us, and nothing else here uses it.
    connected(unsafe { OwnedFd::from_raw_fd(fd) }, to)
}

pub fn enter_then_connect(other: &PathBuf, to: SocketAddr) -> Attempt {
    let file = File::open(other).step("open the other namespace")?;
    nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).step("setns")?;
    tcp(to, None, wait())
}

/// How many of many new cgroups let a connection through. Each child moves into a cgroup that did not exist a moment ago and
/// connects at once: there must be no moment in which it is nobody's.
pub fn race_cgroups(parent: &Path, to: SocketAddr, times: u32) -> Result<Outcome> {
    let mut through = 0;
    let mut errors = std::collections::BTreeMap::<String, u32>::new();
    let started = Instant::now();
    for turn in 0..times {
        let cgroup = parent.join(format!("race-{turn}"));
        fs::create_dir(&cgroup)?;
        enter_cgroup(&cgroup)?;
        match connect_and_reset(to) {
            Ok(()) => through += 1,
            Err(error) => {
                let name = format!("{:?}", nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or_default()));
                *errors.entry(name).or_default() += 1;
            }
        }
        enter_cgroup(parent.parent().context("a parent")?)?;
        // A cgroup whose process has just left is busy for a moment.
        while fs::remove_dir(&cgroup).is_err() && started.elapsed() < Duration::from_secs(120) {
            thread::sleep(Duration::from_millis(1));
        }
    }
    let detail = serde_json::to_string(&errors)?;
    Ok(Outcome { ok: through == 0, count: through, detail, errno: String::new() })
}
