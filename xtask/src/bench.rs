//! `cargo xtask bench`: builds with optimisations, and hands over to the benchmark.

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{
    ebpf::{self, Toolchain},
    run, setup,
};

#[derive(Clone, Copy, ValueEnum)]
pub enum Part {
    /// The kernel programs, and connections with and without them
    Kernel,
    /// The interfaces' program, and frames between two interfaces
    Xdp,
    /// From the decision to the last packet and the last socket
    Revocation,
    /// Handshakes, token checks and grants
    Control,
    /// Decisions about actions, beside bare Cedar
    Actions,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Xdp => "xdp",
            Self::Revocation => "revocation",
            Self::Control => "control",
            Self::Actions => "actions",
        }
    }
}

pub fn run(workspace: &Path, part: Part, quick: bool, json: Option<&Path>) -> Result<ExitCode> {
    if !run::is_root() {
        bail!("needs root: it loads programs into the kernel and makes a cgroup of its own");
    }
    setup::run(setup::For::Running)?;
    let programs = ["--bin", "authd", "--bin", "authd-probe", "--bin", "authd-bench"];
    run::cargo(
        workspace,
        &[&["build", "--package", "authd", "--package", "authd-tests"], &programs[..]].concat(),
        true,
    )?;
    let mut command = Command::new(run::target_directory(workspace).join("release").join("authd-bench"));
    command.arg(part.name());
    if matches!(part, Part::Xdp) {
        command.env("AUTHD_FLOOR", floor(workspace)?);
    }
    if quick {
        command.arg("--quick");
    }
    if let Some(json) = json {
        command.arg("--json").arg(json);
    }
    let status = command.status().context("starting the benchmark")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Builds what the interfaces' program is compared with.
fn floor(workspace: &Path) -> Result<PathBuf> {
    let target = run::target_directory(workspace).join("floor");
    let mut command = ebpf::cargo(&Toolchain::find()?, workspace, &target, "build");
    command.args(["--release", "--package", "authd-ebpf", "--bin", "authd-floor", "--features", "floor"]);
    run::must(&mut command)?;
    Ok(target.join("bpfel-unknown-none/release/authd-floor"))
}
