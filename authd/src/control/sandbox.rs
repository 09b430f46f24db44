//! What the control process gives up before it hears from anybody.
//!
//! Enters: root, with the capabilities of its parent. Leaves: an unprivileged user in an almost empty root directory, without
//! capabilities and without a way to new ones, that can make the system calls of a network server and no others. Never back.

use std::{
    collections::BTreeMap,
    io,
    os::unix::fs::chroot,
    path::{Path, PathBuf},
};

use nix::{
    sys::resource::{Resource, setrlimit},
    unistd::{Gid, Uid, chdir, setgroups, setresgid, setresuid},
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Memory that is written to, in bytes: thousands of connections and sessions at all their limits do not come near it.
const MOST_MEMORY: u64 = 4 << 30;

/// Who to be, and where.
#[derive(Clone, Debug)]
pub struct Cell {
    pub uid: u32,
    pub gid: u32,
    pub root: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("changing the root directory to {0}: {1}")]
    Root(PathBuf, io::Error),
    #[error("giving up privileges: {0}")]
    Privileges(io::Error),
    #[error("privileges are still there: {0}")]
    Kept(&'static str),
    #[error("the system call filter: {0}")]
    Filter(String),
}

/// Gives everything up. Threads made later inherit it; there must be none yet.
pub fn enter(cell: &Cell) -> Result<(), SandboxError> {
    let of_root = |error| SandboxError::Root(cell.root.clone(), error);
    chroot(&cell.root).map_err(of_root)?;
    chdir(Path::new("/")).map_err(|error| of_root(error.into()))?;
    let of = |error: nix::Error| SandboxError::Privileges(error.into());
    let (uid, gid) = (Uid::from_raw(cell.uid), Gid::from_raw(cell.gid));
    setgroups(&[gid]).map_err(of)?;
    setresgid(gid, gid, gid).map_err(of)?;
    setresuid(uid, uid, uid).map_err(of)?;
    // Changing the user clears these (prctl(2)).
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).map_err(of)?;
    nix::sys::prctl::set_dumpable(false).map_err(of)?;
    nix::sys::prctl::set_no_new_privs().map_err(of)?;
    drop_capabilities()?;
    // Who leads it to hold more ends it. It is started again, and what was granted holds meanwhile.
    setrlimit(Resource::RLIMIT_DATA, MOST_MEMORY, MOST_MEMORY).map_err(of)?;
    if nix::unistd::setuid(Uid::from_raw(0)).is_ok() {
        return Err(SandboxError::Kept("it could become root again"));
    }
    filter()
}

/// Empties the effective, permitted and inheritable sets. Changing from root to another user did that already, unless some
/// secure bit says otherwise; the bounding set does not matter to a process without new privileges.
fn drop_capabilities() -> Result<(), SandboxError> {
    // `struct __user_cap_header_struct` of version 3, and two data structures, all zero.
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let mut header = Header { version: VERSION_3, pid: 0 };
    let data = [0_u32; 6];
    // SAFETY: both point at what capset(2) reads: a header of version 3 and its two data structures.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    if result == 0 { Ok(()) } else { Err(SandboxError::Privileges(io::Error::last_os_error())) }
}

/// System calls of an asynchronous network server: sockets, memory, time, threads. No exec, no ptrace, no mount, no bpf, no
/// io_uring, no descriptor of another process. What is not listed fails with EPERM, so that a library's attempt at something
/// optional does not end the process.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_connect,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpeername,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_ioctl,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_pipe2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_socket,
    libc::SYS_statx,
    libc::SYS_tgkill,
    libc::SYS_uname,
    libc::SYS_write,
    libc::SYS_writev,
];

fn filter() -> Result<(), SandboxError> {
    let of = |error: seccompiler::BackendError| SandboxError::Filter(error.to_string());
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    // Threads, and not processes: CLONE_THREAD has to be among the flags. glibc falls back to this call from clone3, whose
    // flags a filter cannot see.
    let thread = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Qword,
        SeccompCmpOp::MaskedEq(libc::CLONE_THREAD as u64),
        libc::CLONE_THREAD as u64,
    );
    rules.insert(libc::SYS_clone3, Vec::new());
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![thread.map_err(of)?]).map_err(of)?]);
    // Internet and Unix sockets only: no netlink, no packets, no vsock.
    let family = |family: i32| {
        let condition =
            SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, u64::from(family.unsigned_abs()));
        SeccompRule::new(vec![condition.map_err(of)?]).map_err(of)
    };
    rules.insert(libc::SYS_socket, vec![family(libc::AF_INET)?, family(libc::AF_INET6)?, family(libc::AF_UNIX)?]);
    // tokio wakes itself through one.
    rules.insert(libc::SYS_socketpair, vec![family(libc::AF_UNIX)?]);
    let arch = std::env::consts::ARCH.try_into().map_err(of)?;
    let filter = SeccompFilter::new(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow, arch);
    let program: BpfProgram = filter.map_err(of)?.try_into().map_err(of)?;
    // glibc tries clone3 first, and takes ENOSYS, but not EPERM, as a reason to fall back.
    let no_clone3 = SeccompFilter::new(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        arch,
    );
    let no_clone3: BpfProgram = no_clone3.map_err(of)?.try_into().map_err(of)?;
    let apply = |program: &BpfProgram| {
        seccompiler::apply_filter(program).map_err(|error| SandboxError::Filter(error.to_string()))
    };
    // Of two filters the stricter action holds. The second one installed forbids installing any further.
    apply(&no_clone3)?;
    apply(&program)
}
