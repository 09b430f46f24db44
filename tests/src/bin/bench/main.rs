//! What authd costs, as ratios of times within one run: lower is better, and what is compared takes turns.

mod actions;
mod compare;
mod control;
mod kernel;
mod revocation;
mod worker;
mod xdp;

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    part: Part,
}

#[derive(clap::Args)]
struct How {
    /// Less exact, under two minutes
    #[arg(long)]
    quick: bool,
    /// Also write the results to this file
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Part {
    /// The kernel programs, and connections with and without them
    Kernel(How),
    /// The interfaces' program, and frames between two interfaces
    Xdp(How),
    /// From the decision to the last packet and the last socket, with 10,000 flows of 1,000 grants
    Revocation(How),
    /// Handshakes, token checks and grants
    Control(How),
    /// Decisions about actions, beside bare Cedar
    Actions(How),
    /// Makes the kernel part's traffic, in a cgroup and a network; told what to do line by line
    #[command(hide = true)]
    Worker { cgroup: PathBuf, netns: PathBuf },
    /// A TLS server that is nothing but one
    #[command(hide = true)]
    BareTls(control::handshakes::Bare),
    /// Asks for grants from a cgroup; told how many line by line
    #[command(hide = true)]
    Asker(control::grants::Asker),
    /// Asks about actions from a cgroup
    #[command(hide = true)]
    Agent(actions::Agent),
}

fn main() -> Result<()> {
    let (results, how) = match Cli::parse().part {
        Part::Worker { cgroup, netns } => return kernel::worker(&cgroup, &netns),
        Part::BareTls(bare) => return bare.run(),
        Part::Asker(asker) => return asker.run(),
        Part::Agent(agent) => return agent.run(),
        Part::Kernel(how) => (kernel::run(how.quick)?, how),
        Part::Xdp(how) => (xdp::run(how.quick)?, how),
        Part::Revocation(how) => (revocation::run(how.quick)?, how),
        Part::Control(how) => (control::run(how.quick)?, how),
        Part::Actions(how) => (actions::run(how.quick)?, how),
    };
    compare::print(&results);
    if let Some(path) = how.json {
        fs::write(&path, serde_json::to_string_pretty(&results)? + "\n").context("writing the results")?;
    }
    Ok(())
}
