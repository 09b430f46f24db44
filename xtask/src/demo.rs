//! `cargo xtask demo`: builds, and hands over to the demo program.

use std::{
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail};

use crate::{
    programs::{BINARIES, PACKAGES},
    run, setup,
};

pub fn run(workspace: &Path, hold: bool) -> Result<ExitCode> {
    if !run::is_root() {
        bail!("needs root: it makes a cgroup and a network namespace of its own, and loads programs into the kernel");
    }
    setup::run(setup::For::Running)?;
    run::must(run::cargo_command(workspace, &["build"]).args(PACKAGES).args(BINARIES))?;
    let mut command = command(workspace);
    if hold {
        command.arg("--hold");
    }
    let status = command.status().context("starting the demo")?;
    if status.code().is_none() {
        // It was killed, and could not remove what it had made.
        run::must(self::command(workspace).arg("--clean"))?;
    }
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The demo program, once it is built.
pub fn command(workspace: &Path) -> Command {
    let target = run::target_directory(workspace).join("debug");
    let mut command = Command::new(target.join("authd-demo"));
    command.env("AUTHD_BIN", target.join("authd")).env("AUTHD_PROBE", target.join("authd-probe"));
    command.env("AUTHD_PACKAGING", workspace.join("packaging"));
    command
}
