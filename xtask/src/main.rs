//! One command per intent. Each says what it does; all start from the workspace's root.

mod bench;
mod check;
mod demo;
mod ebpf;
mod fuzz;
mod others;
mod programs;
mod run;
mod setup;
mod test;
mod vm;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

/// Tasks of authd's developers, operators who try it, and CI.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install or find what building and testing needs. Does nothing where all is there
    Setup,
    /// Build the daemon, with the kernel object in it
    Build {
        #[arg(long)]
        release: bool,
    },
    /// Formatting, lints of host and kernel crates, documentation, layout number
    Check,
    /// Feed every parser that sees bytes from outside with whatever reaches new code in it
    Fuzz {
        /// One of them; else all
        target: Option<String>,
        /// For each
        #[arg(long, default_value_t = 60)]
        seconds: u32,
    },
    /// Write the fingerprint of the shared layout, after ABI_VERSION was raised
    Abi,
    /// Run the tests: all, or one stage
    Test {
        #[arg(value_enum)]
        stage: Option<test::Stage>,
        /// Only root tests whose name contains this
        #[arg(long)]
        filter: Option<String>,
    },
    /// Watch authd let workloads through and refuse them, in a network and a cgroup of its own
    Demo {
        /// Keep it running, to try things from another shell
        #[arg(long)]
        hold: bool,
    },
    /// Measure, as ratios within one run
    Bench {
        #[arg(value_enum, default_value_t = bench::Part::Kernel)]
        part: bench::Part,
        /// Less exact, under two minutes
        #[arg(long)]
        quick: bool,
        /// Also write the results to this file
        #[arg(long)]
        json: Option<PathBuf>,
    },
}

fn main() -> Result<ExitCode> {
    let workspace = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let workspace = workspace.parent().context("xtask lies in the workspace")?;
    if let Some(status) = fuzz::as_compiler()? {
        return Ok(status);
    }
    match Cli::parse().command {
        Task::Setup => setup::run(setup::For::Testing).map(|()| ExitCode::SUCCESS),
        Task::Build { release } => {
            setup::run(setup::For::Building)?;
            run::cargo(workspace, &["build", "--package", "authd"], release)?;
            Ok(ExitCode::SUCCESS)
        }
        Task::Check => {
            setup::run(setup::For::Building)?;
            Ok(test::report(&[check::run(workspace)?]))
        }
        Task::Fuzz { target, seconds } => fuzz::run(workspace, target.as_deref(), seconds),
        Task::Abi => check::write_abi(workspace).map(|()| ExitCode::SUCCESS),
        Task::Test { stage, filter } => test::run(workspace, stage, filter.as_deref()),
        Task::Demo { hold } => demo::run(workspace, hold),
        Task::Bench { part, quick, json } => bench::run(workspace, part, quick, json.as_deref()),
    }
}
