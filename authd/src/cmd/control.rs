//! `authd control`: the process that talks to callers, started by the daemon with its end of the channel as standard input.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
    process::ExitCode,
};

use crate::control::{
    self,
    sandbox::{self, Cell},
};

/// Threads that verify; handshakes are most of their work.
const THREADS: usize = 4;

pub fn run(uid: u32, gid: u32, root: &Path) -> ExitCode {
    match serve(uid, gid, root) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "the control process ends");
            ExitCode::from(super::FAILED)
        }
    }
}

fn serve(uid: u32, gid: u32, root: &Path) -> Result<(), control::ControlError> {
    let channel: OwnedFd = std::io::stdin().as_fd().try_clone_to_owned()?;
    // Everything that is given up is given up before there is a second thread.
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS);
    sandbox::enter(&Cell { uid, gid, root: root.to_owned() })?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    // As a task like the others: on this thread, each message would wake one that only wakes another.
    runtime.block_on(async { tokio::spawn(control::run(channel)).await.map_err(std::io::Error::other)? })
}
