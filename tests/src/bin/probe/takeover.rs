//! A control process that somebody took over: it enters the sandbox as the real one does, and then does what its callers say.
//!
//! A caller writes one line: a message for dataplane, as JSON, with `"CONNECTION"` where its own connection's number belongs;
//! or `raw TEXT`, or `sandbox`. It gets one line: what dataplane answered, or what the sandbox let it do.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Write},
    os::{
        fd::{FromRawFd, OwnedFd, RawFd},
        unix::{fs::symlink, net::UnixStream},
    },
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use authd::control::sandbox;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde_json::{Value, json};

/// Standard input is the socket to dataplane.
const DATAPLANE: RawFd = 0;

pub fn run(uid: u32, gid: u32, root: PathBuf) -> Result<()> {
    let before = Before { parent: nix::unistd::getppid().as_raw(), descriptors: descriptors()? };
    // It waits for nothing else.
    nix::fcntl::fcntl(io::stdin(), nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()))?;
    sandbox::enter(&sandbox::Cell { uid, gid, root })?;
    let mut callers = BTreeMap::new();
    loop {
        let Some((message, attached)) = hear()? else { return Ok(()) };
        match (message["message"].as_str(), attached) {
            (Some("settings"), _) => say(json!({ "message": "ready", "generation": 1 }).to_string().as_bytes())?,
            (Some("connected"), Some(connection)) => {
                let number = message["connection"].as_u64().context("connections have numbers")?;
                obey(number, &connection, &mut callers, &before)?;
            }
            // Somebody revoked something: it claims to have forgotten.
            (Some("forget"), _) => {
                say(json!({ "message": "forgotten", "question": message["question"] }).to_string().as_bytes())?;
            }
            _ => {
                let asked = message["question"].as_u64().unwrap_or_default();
                let caller: Option<UnixStream> = callers.remove(&asked);
                if let Some(mut caller) = caller {
                    writeln!(caller, "{message}")?;
                }
            }
        }
    }
}

/// What can be found out only before the sandbox is entered.
struct Before {
    parent: i32,
    /// Those that the parent left open, besides standard input, output and error.
    descriptors: String,
}

fn descriptors() -> Result<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let path = entry?.path();
        let number: RawFd = path.file_name().and_then(|name| name.to_str()).and_then(|n| n.parse().ok()).unwrap_or(-1);
        // The one with which this directory is read is gone again.
        if number > 2
            && let Ok(target) = std::fs::read_link(&path)
            && !target.ends_with("fd")
        {
            found.push(target.display().to_string());
        }
    }
    Ok(found.join(" "))
}

/// Does what one caller says. The answer comes at once, or later if dataplane is asked.
fn obey(
    number: u64,
    mut connection: &UnixStream,
    callers: &mut BTreeMap<u64, UnixStream>,
    before: &Before,
) -> Result<()> {
    let mut line = String::new();
    BufReader::new(connection).read_line(&mut line)?;
    let line = line.trim_end();
    if line == "sandbox" {
        writeln!(connection, "{}", json!(attempts(before)))?;
        return Ok(());
    }
    if let Some(raw) = line.strip_prefix("raw ") {
        return say(raw.as_bytes());
    }
    let text = line.replace("\"CONNECTION\"", &number.to_string());
    if let Some(question) = serde_json::from_str::<Value>(&text).ok().and_then(|message| message["question"].as_u64()) {
        callers.insert(question, connection.try_clone()?);
    }
    say(text.as_bytes())
}

/// What may be tried in here, and what came of it: `ok`, or the error.
fn attempts(before: &Before) -> BTreeMap<&'static str, String> {
    let told = |result: io::Result<()>| match result {
        Ok(()) => "ok".to_owned(),
        Err(error) => {
            error.raw_os_error().map_or(error.to_string(), |code| format!("{:?}", nix::errno::Errno::from_raw(code)))
        }
    };
    let call = |number: libc::c_long, arguments: [libc::c_long; 3]| {
        // SAFETY: no argument is the address of memory that the call would write to; the attempts are to fail.
        let result = unsafe { libc::syscall(number, arguments[0], arguments[1], arguments[2], 0, 0, 0) };
        told(if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) })
    };
    let parent = libc::c_long::from(before.parent);
    let netlink = libc::c_long::from(libc::AF_NETLINK);
    let packet = libc::c_long::from(libc::AF_PACKET);
    let raw = libc::c_long::from(libc::SOCK_RAW);
    BTreeMap::from([
        ("read the policy", told(File::open("/etc/authd/authd.toml").map(drop))),
        ("read passwords", told(File::open("/etc/shadow").map(drop))),
        ("leave its root", told(File::open("/../proc/1/environ").map(drop))),
        ("write in its root", told(File::create("/left-behind").map(drop))),
        ("link in its root", told(symlink("/etc", Path::new("/link")))),
        ("bpf", call(libc::SYS_bpf, [0, 0, 0])),
        ("ptrace", call(libc::SYS_ptrace, [libc::c_long::from(libc::PTRACE_ATTACH as i32), parent, 0])),
        ("kill", call(libc::SYS_kill, [parent, 0, 0])),
        ("chroot", call(libc::SYS_chroot, [c"/".as_ptr() as libc::c_long, 0, 0])),
        ("become root", call(libc::SYS_setuid, [0, 0, 0])),
        ("new namespaces", call(libc::SYS_unshare, [libc::c_long::from(libc::CLONE_NEWUSER), 0, 0])),
        ("mount", call(libc::SYS_mount, [0, 0, 0])),
        ("execute", call(libc::SYS_execve, [c"/authd".as_ptr() as libc::c_long, 0, 0])),
        ("fork", call(libc::SYS_clone, [libc::c_long::from(libc::SIGCHLD), 0, 0])),
        ("netlink", call(libc::SYS_socket, [netlink, raw, 0])),
        ("packets", call(libc::SYS_socket, [packet, raw, 0])),
        ("io_uring", call(libc::SYS_io_uring_setup, [1, 0, 0])),
        ("another process's descriptors", call(libc::SYS_pidfd_open, [parent, 0, 0])),
        // The parent's descriptors are not here.
        ("inherited descriptors", before.descriptors.clone()),
    ])
}

fn say(bytes: &[u8]) -> Result<()> {
    sendmsg::<()>(DATAPLANE, &[IoSlice::new(bytes)], &[], MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// The next message; `None` when dataplane is gone.
fn hear() -> Result<Option<(Value, Option<UnixStream>)>> {
    let mut bytes = vec![0; authd::ipc::MAX_MESSAGE];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut attached = None;
    let length = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<()>(DATAPLANE, &mut parts, Some(&mut space), MsgFlags::empty())?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(descriptors) = control {
                // SAFETY: the kernel just made these descriptors for this process, and nobody else has them.
                attached = descriptors.first().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
            }
        }
        message.bytes
    };
    if length == 0 {
        return Ok(None);
    }
    let message = serde_json::from_slice(&bytes[..length])?;
    let connection = attached.map(UnixStream::from);
    if let Some(connection) = &connection {
        connection.set_nonblocking(false)?;
    }
    Ok(Some((message, connection)))
}
