//! The program that tries things from inside a cgroup, seen from outside.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

/// How an attempt went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Outcome {
    /// It did what was tried: connected, was answered.
    pub ok: bool,
    /// Name of the error, such as `EPERM`.
    pub errno: String,
    /// The step that failed, or what else there is to say.
    pub detail: String,
    /// Things counted, such as datagrams received.
    pub count: u64,
}

impl Outcome {
    /// Refused by the hook of a system call: EPERM at once.
    pub fn is_eperm(&self) -> bool {
        !self.ok && self.errno == "EPERM"
    }
}

/// How an instance's connections died, in ns since 1970.
#[derive(Debug, Serialize, Deserialize)]
pub struct Watched {
    /// When the first packet was refused.
    pub refused: u64,
    /// When each socket's error was seen.
    pub aborted: Vec<u64>,
}

pub fn binary() -> PathBuf {
    match std::env::var_os("AUTHD_PROBE") {
        Some(path) => path.into(),
        None => crate::daemon::beside("authd-probe"),
    }
}

fn command(cgroup: &Path, netns: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.arg("--cgroup").arg(cgroup).arg("--netns").arg(netns).args(arguments);
    command
}

/// Runs an attempt to its end.
pub fn once(cgroup: &Path, netns: &Path, arguments: &[&str]) -> Result<Outcome> {
    let output = command(cgroup, netns, arguments).stderr(Stdio::inherit()).output().context("starting the probe")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().last().with_context(|| format!("probe {arguments:?} said nothing: {}", output.status))?;
    serde_json::from_str(last).with_context(|| format!("probe {arguments:?} said {last}"))
}

/// A probe that goes on. Ended when dropped.
pub struct Running {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Running {
    /// Starts it and waits for its first word.
    pub fn start(cgroup: &Path, netns: &Path, arguments: &[&str]) -> Result<Self> {
        let mut running = Self::start_quietly(cgroup, netns, arguments)?;
        let first = running.heard()?;
        if !first.ok {
            bail!("probe {arguments:?}: {first:?}");
        }
        Ok(running)
    }

    /// Starts it without waiting.
    pub fn start_quietly(cgroup: &Path, netns: &Path, arguments: &[&str]) -> Result<Self> {
        let mut child = command(cgroup, netns, arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the probe")?;
        let output = BufReader::new(child.stdout.take().context("the pipe was asked for")?);
        Ok(Self { input: child.stdin.take(), child, output })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it says next.
    pub fn heard(&mut self) -> Result<Outcome> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("a probe said {line:?}"))
    }

    /// What it says next, if it does so in time.
    pub fn next_within(&mut self, patience: Duration) -> Result<Option<Outcome>> {
        let mut waiting = [PollFd::new(self.output.get_ref().as_fd(), PollFlags::POLLIN)];
        let milliseconds = PollTimeout::try_from(patience.as_millis()).unwrap_or(PollTimeout::MAX);
        if self.output.buffer().is_empty() && poll(&mut waiting, milliseconds)? == 0 {
            return Ok(None);
        }
        self.heard().map(Some)
    }

    /// Tells it to do its thing once more, and waits for what comes of it.
    pub fn again(&mut self) -> Result<Outcome> {
        self.tell("")?;
        self.heard()
    }

    pub fn tell(&mut self, line: &str) -> Result<()> {
        let input = self.input.as_mut().context("its input is closed")?;
        writeln!(input, "{line}")?;
        Ok(input.flush()?)
    }

    /// Closes its input, which is its sign to end, and waits for its last word.
    pub fn finish(mut self) -> Result<Outcome> {
        self.input = None;
        let mut text = String::new();
        self.output.read_to_string(&mut text)?;
        self.child.wait()?;
        let last = text.lines().last().context("the probe said nothing at its end")?;
        serde_json::from_str(last).with_context(|| format!("a probe said {last}"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
