//! Runs the tests in stages, counts them, and ends with one line that says how it went.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{check, demo, fuzz, others, run, setup, vm};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Stage {
    /// Formatting, lints, documentation, layout number
    Check,
    /// Tests that need no privileges
    Host,
    /// Every fuzz target for a moment, from its corpus on
    Fuzz,
    /// Tests of the real daemon in cgroups and network namespaces of their own; as root
    Root,
    /// The same in virtual machines with other kernels
    Vm,
}

/// Why a test may be skipped on the machine itself, whose kernel is whatever it is. What else is skipped fails; so does
/// every skip on the kernels of [`vm::KERNELS`], which have all that the tests need.
const EXPECTED_SKIPS: [&str; 3] =
    ["BPF LSM programs cannot be loaded here", "this kernel has no MPTCP", "io_uring is not available here"];

/// How one stage went.
#[derive(Default, Debug)]
pub struct Outcome {
    pub stage: String,
    pub passed: usize,
    pub failed: Vec<String>,
    pub skipped: Vec<String>,
}

impl Outcome {
    pub fn new(stage: &str) -> Self {
        Self { stage: stage.to_owned(), ..Self::default() }
    }

    pub fn record(&mut self, what: &str, result: Result<()>) {
        match result {
            Ok(()) => {
                println!("{}: {what}: ok", self.stage);
                self.passed += 1;
            }
            Err(error) => {
                println!("{}: {what}: FAILED: {error:#}", self.stage);
                self.failed.push(format!("{}: {what}", self.stage));
            }
        }
    }

    /// Reads one line of a test program: libtest's, or one that looks like it.
    pub fn line(&mut self, line: &str) {
        let line = line.trim();
        if let Some(skip) = line.strip_prefix("SKIP ") {
            self.skipped.push(format!("{}: {skip}", self.stage));
            let expected = self.stage == "root" && EXPECTED_SKIPS.iter().any(|expected| skip.contains(expected));
            if !expected {
                self.failed.push(format!("{}: not expected to be skipped: {skip}", self.stage));
            }
        } else if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" ----")) {
            self.failed.push(format!("{}: {}", self.stage, name.trim_end_matches(" stdout")));
        } else if let Some((_, counts)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". ")) {
            let count = |what: &str| -> Option<usize> {
                counts.split("; ").find_map(|part| part.strip_suffix(what)?.trim().parse().ok())
            };
            self.passed += count("passed").unwrap_or_default();
        }
    }
}

pub fn run(workspace: &Path, stage: Option<Stage>, filter: Option<&str>) -> Result<ExitCode> {
    let wants = |this: Stage| stage.is_none_or(|stage| stage == this);
    setup::run(setup::For::Testing)?;
    let mut outcomes = Vec::new();
    let mut timed = |name: &str, outcome: Result<Outcome>, started: Instant| {
        let outcome = outcome.unwrap_or_else(|error| {
            println!("{name}: FAILED: {error:#}");
            Outcome { failed: vec![format!("{name}: {error:#}")], ..Outcome::new(name) }
        });
        println!("stage {name} took {} s", started.elapsed().as_secs());
        outcomes.push(outcome);
    };
    if wants(Stage::Check) {
        let started = Instant::now();
        timed("check", check::run(workspace), started);
    }
    if wants(Stage::Host) {
        let started = Instant::now();
        timed("host", host(workspace), started);
    }
    if wants(Stage::Fuzz) {
        let started = Instant::now();
        timed("fuzz", fuzzed(workspace), started);
    }
    if wants(Stage::Root) || wants(Stage::Vm) {
        let started = Instant::now();
        match Programs::build(workspace) {
            Err(error) => timed("build", Err(error), started),
            Ok(programs) => {
                if wants(Stage::Root) {
                    let started = Instant::now();
                    timed("root", root(workspace, &programs, filter), started);
                }
                if wants(Stage::Vm) {
                    let started = Instant::now();
                    for (kernel, outcome) in vm::run_all(workspace, &programs, filter) {
                        timed(&format!("vm {kernel}"), outcome, started);
                    }
                }
            }
        }
    }
    Ok(report(&outcomes))
}

/// The last lines: what failed, what was skipped, and the sum.
pub fn report(outcomes: &[Outcome]) -> ExitCode {
    println!();
    for outcome in outcomes {
        for skipped in &outcome.skipped {
            println!("skipped: {skipped}");
        }
    }
    for outcome in outcomes {
        for failed in &outcome.failed {
            println!("failed: {failed}");
        }
    }
    let passed: usize = outcomes.iter().map(|o| o.passed).sum();
    let failed: usize = outcomes.iter().map(|o| o.failed.len()).sum();
    let skipped: usize = outcomes.iter().map(|o| o.skipped.len()).sum();
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    // Nothing passed: nothing was tested.
    if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn host(workspace: &Path) -> Result<Outcome> {
    let mut outcome = Outcome::new("host");
    let packages = ["test", "--package", "authd", "--package", "authd-common", "--package", "xtask", "--no-fail-fast"];
    stream(&mut run::cargo_command(workspace, &packages), &mut outcome)?;
    let own = ["test", "--package", "authd-tests", "--lib", "--test", "policy", "--test", "decide", "--no-fail-fast"];
    stream(&mut run::cargo_command(workspace, &own), &mut outcome)?;
    let others = others::fetch_mcp(workspace)?;
    run::cargo(workspace, &["build", "--package", "authd", "--bin", "authd"], false)?;
    let mut mcp =
        run::cargo_command(workspace, &["test", "--package", "authd-tests", "--test", "mcp", "--no-fail-fast"]);
    mcp.env("AUTHD_OTHERS", others).env("AUTHD_BIN", run::target_directory(workspace).join("debug/authd"));
    stream(&mut mcp, &mut outcome)?;
    Ok(outcome)
}

/// So many inputs for each target, besides those of the corpus.
const FUZZ_RUNS: &str = "100000";

fn fuzzed(workspace: &Path) -> Result<Outcome> {
    let mut outcome = Outcome::new("fuzz");
    let program = fuzz::build(workspace)?;
    for target in fuzz::targets(workspace)? {
        outcome.record(&target, fuzz::fuzz(workspace, &program, &target, &["-runs", FUZZ_RUNS]));
    }
    Ok(outcome)
}

fn root(workspace: &Path, programs: &Programs, filter: Option<&str>) -> Result<Outcome> {
    if !run::is_root() {
        bail!("needs root: it makes cgroups and network namespaces of its own");
    }
    let mut outcome = Outcome::new("root");
    let others = others::fetch(workspace)?;
    others::fetch_mcp(workspace)?;
    let mut command = Command::new(&programs.tests);
    command
        .env("AUTHD_OTHERS", others)
        .env("AUTHD_BIN", &programs.authd)
        .env("AUTHD_PROBE", &programs.probe)
        .args(["--color", "never"])
        .args(filter);
    stream(&mut command, &mut outcome)?;
    if filter.is_none() {
        // What the README tells people to run first.
        outcome.record("the demo's verdicts are the expected ones", run::must(&mut demo::command(workspace)));
    }
    Ok(outcome)
}

/// Runs a test program, shows what it prints, counts. A program that fails without a failed test is a failure by itself.
fn stream(command: &mut Command, outcome: &mut Outcome) -> Result<()> {
    let before = outcome.failed.len();
    let shown = run::show(command);
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("starting {shown}"))?;
    let lines = BufReader::new(child.stdout.take().context("the pipe was asked for")?).lines();
    for line in lines {
        let line = line?;
        println!("{line}");
        outcome.line(&line);
    }
    let status = child.wait()?;
    if !status.success() && outcome.failed.len() == before {
        outcome.failed.push(format!("{shown}: {status}"));
    }
    Ok(())
}

/// What the root tests consist of.
pub struct Programs {
    pub authd: PathBuf,
    pub probe: PathBuf,
    pub tests: PathBuf,
}

impl Programs {
    pub fn build(workspace: &Path) -> Result<Self> {
        let build = ["build", "--package", "authd", "--package", "authd-tests", "--bins"];
        run::cargo(workspace, &build, false)?;
        let test = ["test", "--package", "authd-tests", "--test", "root", "--no-run", "--message-format=json"];
        let messages = run::output(&mut run::cargo_command(workspace, &test))?;
        let tests = messages
            .lines()
            .filter(|line| line.contains("\"name\":\"root\""))
            .find_map(|line| line.split_once("\"executable\":\"")?.1.split('"').next())
            .context("cargo names the test program that it built")?;
        let target = run::target_directory(workspace).join("debug");
        Ok(Self { authd: target.join("authd"), probe: target.join("authd-probe"), tests: tests.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_and_names_of_test_programs_are_counted() {
        let mut outcome = Outcome::new("root");
        outcome.line("running 4 tests");
        outcome.line("test a ... ok");
        outcome.line("test d ... 17 things were measured");
        outcome.line("ok");
        outcome.line("SKIP c: BPF LSM programs cannot be loaded here");
        outcome.line("---- b stdout ----");
        outcome
            .line("test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s");
        assert_eq!((outcome.passed, outcome.skipped.len()), (2, 1));
        assert_eq!(outcome.failed, ["root: b"]);
    }

    #[test]
    fn an_unexpected_skip_is_a_failure() {
        let mut outcome = Outcome::new("root");
        outcome.line("SKIP c: no mood today");
        assert_eq!(outcome.failed.len(), 1);
        let mut outcome = Outcome::new("vm 6.1");
        outcome.line("SKIP c: BPF LSM programs cannot be loaded here");
        assert_eq!(outcome.failed.len(), 1);
    }
}
