//! Processes that do as they are told, line by line, and say how long it took.

use std::{
    io::{BufRead, BufReader, Write, stdin, stdout},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{Mutex, PoisonError},
    time::Instant,
};

use anyhow::{Context, Result, bail};

/// One, seen from outside.
pub struct Worker {
    child: Child,
    pipes: Mutex<(ChildStdin, BufReader<ChildStdout>)>,
}

impl Worker {
    /// This program, as one of its hidden parts.
    pub fn start(arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("starting a worker")?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else { bail!("no pipes") };
        let worker = Self { child, pipes: (input, BufReader::new(output)).into() };
        worker.ask("hello")?;
        Ok(worker)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Tells it what to do; returns how many ns that took.
    pub fn ask(&self, order: &str) -> Result<f64> {
        let (input, output) = &mut *self.pipes.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(input, "{order}")?;
        let mut line = String::new();
        output.read_line(&mut line)?;
        line.trim().parse().with_context(|| format!("a worker said {line:?} to {order}"))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One, from inside: does what it is told, which is a word and a number, until nobody is left who tells it. What it does may
/// prepare for a while and returns when it really began.
pub fn obey(mut act: impl FnMut(&str, u64) -> Result<Instant>) -> Result<()> {
    for line in stdin().lock().lines() {
        let line = line?;
        let (what, number) = line.split_once(' ').unwrap_or((&line, "0"));
        let number = number.parse()?;
        let started = if what == "hello" { Instant::now() } else { act(what, number)? };
        writeln!(stdout(), "{}", started.elapsed().as_nanos())?;
    }
    Ok(())
}
