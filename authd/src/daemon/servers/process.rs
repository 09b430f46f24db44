//! One server: started in its cgroup, watched, ended with all that it started.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{self, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    fcntl::OFlag,
    sys::signal::{Signal, kill},
    unistd::{Gid, Pid, Uid, User, getgrouplist, pipe2},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::unix::pipe,
    process::{Child, ChildStderr, Command},
    time::timeout,
};

/// A server whose input has ended has so long to end itself, and again so long after SIGTERM.
const PATIENCE: Duration = Duration::from_secs(2);
/// What one writes to its standard error stands in the daemon's log: lines, and octets of each.
const LINES: usize = 200;
const LINE: usize = 512;
/// What one may have, with all that it starts: the file of a cgroup, its controller, and the most.
const BOUNDS: [(&str, &str, u64); 2] = [("pids.max", "pids", 512), ("memory.max", "memory", 4 << 30)];
/// Processes that were killed are gone after a moment.
const GONE: Duration = Duration::from_millis(10);
const GONE_TRIES: usize = 200;

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("there is no user `{0}`")]
    NoUser(String),
    #[error("`{0}` is root: MCP servers run as users without privileges")]
    Root(String),
    #[error("{0}: {1}")]
    Cgroup(PathBuf, io::Error),
    #[error("running {0}: {1}")]
    Run(String, io::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What to start. All of it is the policy's.
pub struct Plan {
    pub argv: Vec<String>,
    pub user: String,
    pub environment: BTreeMap<String, String>,
}

/// Who it is.
struct Owner {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

impl Owner {
    fn find(name: &str) -> Result<Self, StartError> {
        let number = name.parse::<u32>().ok();
        let user = match number {
            Some(uid) => User::from_uid(Uid::from_raw(uid)),
            None => User::from_name(name),
        };
        let owner = match (user.map_err(io::Error::from)?, number) {
            (Some(user), _) => {
                let name = std::ffi::CString::new(user.name).map_err(io::Error::from)?;
                let groups = getgrouplist(&name, user.gid).map_err(io::Error::from)?;
                Self { uid: user.uid, gid: user.gid, groups }
            }
            // Numbers do not have to be in any list of users.
            (None, Some(uid)) => Self { uid: Uid::from_raw(uid), gid: Gid::from_raw(uid), groups: Vec::new() },
            (None, None) => return Err(StartError::NoUser(name.to_owned())),
        };
        if owner.uid.is_root() { Err(StartError::Root(name.to_owned())) } else { Ok(owner) }
    }
}

pub struct Process {
    child: Child,
    /// Its other end is closed when nobody has use for the server.
    life: pipe::Receiver,
    errors: Option<ChildStderr>,
}

/// Starts it. Besides, the ends of its pipes: where its input is written, where its output is read, and what keeps it alive.
pub fn start(plan: &Plan, cgroup: &Path) -> Result<(Process, [OwnedFd; 3]), StartError> {
    let Owner { uid, gid, groups } = Owner::find(&plan.user)?;
    let members = cgroup.join("cgroup.procs");
    let members = OpenOptions::new().write(true).open(&members).map_err(|error| StartError::Cgroup(members, error))?;
    let pair = || pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from);
    let ((input, to_input), (from_output, output), (life, alive)) = (pair()?, pair()?, pair()?);
    let (program, arguments) = plan.argv.split_first().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(&plan.environment)
        .current_dir("/")
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(output))
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let groups: Vec<libc::gid_t> = groups.iter().map(|gid| gid.as_raw()).collect();
    let (uid, gid) = (uid.as_raw(), gid.as_raw());
    // SAFETY: system calls alone, and none of them allocates: that is what a forked child may do.
    unsafe {
        command.pre_exec(move || {
            let done = |result: libc::c_long| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
            // Into the cgroup first: nothing of the server runs anywhere else.
            done(libc::write(members.as_raw_fd(), c"0".as_ptr().cast(), 1) as libc::c_long)?;
            done(libc::setsid().into())?;
            done(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
            done(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
            done(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
            done(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
            done(libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC))
        });
    }
    let mut child = command.spawn().map_err(|error| StartError::Run(program.clone(), error))?;
    let errors = child.stderr.take();
    Ok((Process { child, life: pipe::Receiver::from_owned_fd(life)?, errors }, [to_input, from_output, alive]))
}

impl Process {
    pub fn pid(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }

    /// Until it has ended, by itself or because nobody has use for it any more; how.
    pub async fn watch(mut self, name: &str) -> String {
        let errors = self.errors.take();
        let log = async {
            if let Some(errors) = errors {
                log(name, errors).await;
            }
            std::future::pending().await
        };
        tokio::select! {
            how = self.end() => how,
            how = log => how,
        }
    }

    async fn end(&mut self) -> String {
        let told = |status: io::Result<ExitStatus>| status.map_or_else(|error| error.to_string(), |s| s.to_string());
        tokio::select! {
            status = self.child.wait() => return told(status),
            () = closed(&mut self.life) => {}
        }
        // Its input has ended too, which is how servers are told to end (MCP, Lifecycle, Shutdown).
        if let Ok(status) = timeout(PATIENCE, self.child.wait()).await {
            return told(status);
        }
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            // Not waited for yet: the number is its own.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        match timeout(PATIENCE, self.child.wait()).await {
            Ok(status) => told(status),
            Err(_) => "killed: it did not end when it was told to".to_owned(),
        }
    }
}

async fn closed(life: &mut pipe::Receiver) {
    let mut octets = [0; 64];
    while life.read(&mut octets).await.is_ok_and(|length| length > 0) {}
}

/// What a server says besides its messages is for whoever runs it.
async fn log(name: &str, errors: ChildStderr) {
    let mut errors = BufReader::new(errors);
    let mut lines = 0;
    let mut line = Vec::new();
    loop {
        let piece = match errors.fill_buf().await {
            Ok(piece) if !piece.is_empty() => piece,
            _ => return,
        };
        let end = piece.iter().position(|octet| *octet == b'\n');
        let taken = end.unwrap_or(piece.len());
        let room = LINE - line.len();
        line.extend_from_slice(&piece[..taken.min(room)]);
        errors.consume(taken + usize::from(end.is_some()));
        if end.is_some() {
            lines += 1;
            if lines <= LINES {
                let text = String::from_utf8_lossy(&line);
                tracing::info!(server = name, text = %text.escape_debug(), "an MCP server's log");
            }
            if lines == LINES {
                tracing::info!(server = name, "what this MCP server logs besides is left out");
            }
            line.clear();
        }
    }
}

/// Lets what is below a cgroup be bounded, as far as it may be itself.
pub fn share(cgroup: &Path) {
    let given = fs::read_to_string(cgroup.join("cgroup.controllers")).unwrap_or_default();
    for (_, controller, _) in BOUNDS {
        if given.split_whitespace().any(|known| known == controller) {
            put(&cgroup.join("cgroup.subtree_control"), &format!("+{controller}"));
        }
    }
}

/// Bounds what is in a cgroup, where there are controllers for that.
pub fn bound(cgroup: &Path) {
    for (file, _, most) in BOUNDS {
        put(&cgroup.join(file), &most.to_string());
    }
}

fn put(file: &Path, value: &str) {
    let written = OpenOptions::new().write(true).open(file).and_then(|mut file| file.write_all(value.as_bytes()));
    if let Err(error) = written {
        tracing::debug!(%error, file = %file.display(), "an MCP server is not bounded");
    }
}

/// Ends all that is left in a cgroup, and removes it.
pub async fn remove(cgroup: &Path) {
    for _ in 0..GONE_TRIES {
        match kill_and_remove(cgroup) {
            Ok(()) => return,
            Err(_) => tokio::time::sleep(GONE).await,
        }
    }
    tracing::warn!(cgroup = %cgroup.display(), "a cgroup cannot be removed");
}

/// The same at once, as far as it goes: where nothing else can be done meanwhile.
pub fn clear(cgroup: &Path) -> io::Result<()> {
    let mut result = kill_and_remove(cgroup);
    for _ in 0..GONE_TRIES {
        if result.is_ok() {
            break;
        }
        std::thread::sleep(GONE);
        result = kill_and_remove(cgroup);
    }
    result
}

fn kill_and_remove(cgroup: &Path) -> io::Result<()> {
    match kill_all(cgroup) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.and_then(|()| remove_tree(cgroup)),
    }
}

/// All that is in a cgroup.
pub fn kill_all(cgroup: &Path) -> io::Result<()> {
    fs::write(cgroup.join("cgroup.kill"), "1")
}

fn remove_tree(cgroup: &Path) -> io::Result<()> {
    for entry in fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(cgroup)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_root_by_another_name() {
        for root in ["root", "0", "000"] {
            assert!(matches!(Owner::find(root), Err(StartError::Root(_))), "{root}");
        }
        assert!(matches!(Owner::find("no such user"), Err(StartError::NoUser(_))));
        let owner = Owner::find("4000001").unwrap();
        assert_eq!((owner.uid.as_raw(), owner.gid.as_raw(), owner.groups.len()), (4_000_001, 4_000_001, 0));
    }
    #[test]
    fn bounds_are_set_where_there_are_controllers() {
        let cgroup = std::env::temp_dir().join(format!("authd-bounds-{}", std::process::id()));
        fs::create_dir_all(&cgroup).unwrap();
        for (file, text) in
            [("cgroup.controllers", "cpu pids\n"), ("cgroup.subtree_control", ""), ("pids.max", ""), ("other", "")]
        {
            fs::write(cgroup.join(file), text).unwrap();
        }
        share(&cgroup);
        bound(&cgroup);
        let read = |file: &str| fs::read_to_string(cgroup.join(file)).ok();
        let found = ["cgroup.subtree_control", "pids.max", "memory.max"].map(read);
        fs::remove_dir_all(&cgroup).unwrap();
        assert_eq!(found, [Some("+pids".to_owned()), Some("512".to_owned()), None]);
    }
}
