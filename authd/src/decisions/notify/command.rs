//! Runs the operator's program for each message.
//!
//! Enters: a program with its arguments, as the settings have them, and messages. Leaves: how it went, in the log and in counters.
//! Never: a shell; an environment; anything of a message among the arguments; more programs at once, or for longer, than here.

use std::{
    ffi::OsString,
    io,
    process::{ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::{
    io::AsyncWriteExt,
    process::{Child, Command},
    sync::Semaphore,
    time::timeout,
};

/// How long one may run.
const LIMIT: Duration = Duration::from_secs(10);
/// How many run at one time.
const AT_ONCE: usize = 4;
/// How many messages wait, those that are being told included.
const WAITING: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum HookError {
    #[error("it cannot be started: {0}")]
    NotStarted(io::Error),
    #[error("it ended with {0}")]
    Failed(ExitStatus),
    #[error("it did not end within {} s, and was killed", .0.as_secs())]
    TooSlow(Duration),
    #[error("{WAITING} messages wait for it")]
    TooMany,
}

impl HookError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotStarted(_) => "hook_not_started",
            Self::Failed(_) => "hook_failed",
            Self::TooSlow(_) => "hook_too_slow",
            Self::TooMany => "hook_backlog",
        }
    }
}

/// A program that is told. Clones share what is counted.
#[derive(Clone)]
pub struct Hook {
    inner: Arc<Inner>,
}

struct Inner {
    program: OsString,
    arguments: Vec<OsString>,
    limit: Duration,
    at_once: Semaphore,
    waiting: Arc<Semaphore>,
    told: AtomicU64,
    failed: AtomicU64,
}

/// Messages until now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    pub told: u64,
    pub failed: u64,
}

impl Hook {
    /// `None` where there is no program.
    pub fn new(command: &[String]) -> Option<Self> {
        Self::with(command, LIMIT, AT_ONCE, WAITING)
    }

    fn with(command: &[String], limit: Duration, at_once: usize, waiting: usize) -> Option<Self> {
        let (program, arguments) = command.split_first()?;
        let inner = Inner {
            program: program.into(),
            arguments: arguments.iter().map(Into::into).collect(),
            limit,
            at_once: Semaphore::new(at_once),
            waiting: Arc::new(Semaphore::new(waiting)),
            told: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        };
        Some(Self { inner: Arc::new(inner) })
    }

    /// Tells the program of a message, which it reads on its standard input. Returns at once, within a runtime.
    pub fn tell(&self, message: Vec<u8>) {
        let inner = self.inner.clone();
        let Ok(place) = self.inner.waiting.clone().try_acquire_owned() else {
            return inner.count(Err(HookError::TooMany));
        };
        tokio::spawn(async move {
            // It is never closed.
            let turn = inner.at_once.acquire().await;
            inner.count(inner.run(&message).await);
            drop((turn, place));
        });
    }

    pub fn counts(&self) -> Counts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts { told: of(&self.inner.told), failed: of(&self.inner.failed) }
    }
}

impl Inner {
    async fn run(&self, message: &[u8]) -> Result<(), HookError> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).env_clear().current_dir("/").kill_on_drop(true);
        // Its own group: what it started goes with it.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(HookError::NotStarted)?;
        match timeout(self.limit, told(&mut child, message)).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(HookError::Failed(status)),
            Ok(Err(error)) => Err(HookError::NotStarted(error)),
            Err(_) => {
                // Its number is still its own: nobody has waited for it.
                if let Some(group) = child.id().and_then(|id| i32::try_from(id).ok()) {
                    let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
                }
                let _ = child.wait().await;
                Err(HookError::TooSlow(self.limit))
            }
        }
    }

    fn count(&self, result: Result<(), HookError>) {
        match result {
            Ok(()) => drop(self.told.fetch_add(1, Ordering::Relaxed)),
            Err(error) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                let (program, reason) = (self.program.display(), error.reason());
                tracing::warn!(%error, reason, %program, "people were not told that a call waits for them");
            }
        }
    }
}

async fn told(child: &mut Child, message: &[u8]) -> io::Result<ExitStatus> {
    if let Some(mut input) = child.stdin.take() {
        // One that does not read it all may still know what to do: its exit status says so.
        let _ = input.write_all(message).await;
    }
    child.wait().await
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf, time::Instant};

    use super::*;
    use crate::store::tests::Scratch;

    const SHORT: Duration = Duration::from_secs(1);

    fn shell(script: &str) -> Vec<String> {
        ["/bin/sh", "-c", script].map(str::to_owned).to_vec()
    }

    async fn run(command: &[String], message: &[u8]) -> Result<(), &'static str> {
        run_for(LIMIT, command, message).await
    }

    async fn run_for(limit: Duration, command: &[String], message: &[u8]) -> Result<(), &'static str> {
        let hook = Hook::with(command, limit, 1, 1).unwrap();
        hook.inner.run(message).await.map_err(|error| error.reason())
    }

    fn file(scratch: &Scratch, name: &str) -> (PathBuf, String) {
        let path = scratch.0.join(name);
        (path.clone(), path.display().to_string())
    }

    #[tokio::test]
    async fn the_program_gets_the_message_and_nothing_else() {
        let scratch = Scratch::new();
        let (path, name) = file(&scratch, "out");
        let script = format!(
            "cat > {name}; tr '\\0' '\\n' < /proc/self/environ >> {name}; pwd >> {name}; echo \"$0 $#\" >> {name}"
        );
        let mut command = shell(&script);
        command.extend(["$(touch /nowhere)".to_owned(), "; exit 1".to_owned()]);
        assert_eq!(run(&command, b"{\"id\":\"$(exit 1)\"}\n").await, Ok(()));
        // PWD is what this shell itself sets for its children.
        let lines = fs::read_to_string(path).unwrap();
        let lines: Vec<&str> =
            lines.lines().filter(|line| !line.starts_with("PWD=") && !line.starts_with("_=")).collect();
        assert_eq!(lines, ["{\"id\":\"$(exit 1)\"}", "/", "$(touch /nowhere) 1"]);
    }

    #[tokio::test]
    async fn failures_have_names() {
        assert_eq!(run(&shell("exit 3"), b"").await, Err("hook_failed"));
        assert_eq!(run(&["/there/is/none".to_owned()], b"").await, Err("hook_not_started"));
        // One that reads nothing of a long message is not at fault.
        assert_eq!(run(&shell("exec true"), &vec![b'x'; 1 << 20]).await, Ok(()));
        assert!(Hook::new(&[]).is_none());
    }

    #[tokio::test]
    async fn one_that_does_not_end_is_killed_with_all_that_it_started() {
        let scratch = Scratch::new();
        let (path, name) = file(&scratch, "pid");
        let started = Instant::now();
        let script = format!("sleep 60 & echo $! > {name}; wait");
        assert_eq!(run_for(SHORT, &shell(&script), b"").await, Err("hook_too_slow"));
        // One that never reads blocks nobody either.
        assert_eq!(run_for(SHORT, &shell("exec sleep 60"), &vec![b'x'; 1 << 20]).await, Err("hook_too_slow"));
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
        let pid: i32 = fs::read_to_string(path).unwrap().trim().parse().unwrap();
        let is_gone = || {
            let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            state.is_empty() || state.contains(") Z ")
        };
        for _ in 0..100 {
            if is_gone() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{pid} lives");
    }

    #[tokio::test]
    async fn only_so_many_run_and_wait_and_the_rest_is_counted() {
        let scratch = Scratch::new();
        let (_, name) = file(&scratch, "running");
        // Each fails if another one runs beside it.
        let script = format!("mkdir {name} || exit 1; sleep 0.1; rmdir {name}");
        let hook = Hook::with(&shell(&script), Duration::from_secs(10), 1, 3).unwrap();
        for _ in 0..5 {
            hook.tell(b"{}".to_vec());
        }
        let all = Counts { told: 3, failed: 2 };
        for _ in 0..500 {
            if hook.counts() == all {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(hook.counts(), all);
        hook.tell(b"{}".to_vec());
        while hook.counts() == all {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(hook.counts(), Counts { told: 4, failed: 2 }, "there is room again");
    }
}
