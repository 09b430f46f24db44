//! `cargo xtask bench`: builds with optimisations, and hands over to the benchmark.

use std::{
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{run, setup};

#[derive(Clone, Copy, ValueEnum)]
pub enum Part {
    /// The kernel programs, and connections with and without them
    Kernel,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
        }
    }
}

pub fn run(workspace: &Path, part: Part, quick: bool, json: Option<&Path>) -> Result<ExitCode> {
    if !run::is_root() {
        bail!("needs root: it loads programs into the kernel and makes a cgroup of its own");
    }
    setup::run(setup::For::Running)?;
    run::cargo(workspace, &["build", "--package", "authd-tests", "--bin", "authd-bench"], true)?;
    let mut command = Command::new(run::target_directory(workspace).join("release").join("authd-bench"));
    command.arg(part.name());
    if quick {
        command.arg("--quick");
    }
    if let Some(json) = json {
        command.arg("--json").arg(json);
    }
    let status = command.status().context("starting the benchmark")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
