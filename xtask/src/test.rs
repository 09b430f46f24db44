//! Runs the tests in stages, counts them, and ends with one line that says how it went.

use std::{
    io::{BufRead, BufReader},
    num::NonZero,
    path::Path,
    process::{Command, ExitCode, Stdio},
    thread,
    time::Instant,
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{check, demo, fuzz, others, programs::Programs, run, setup, vm};

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

    /// Of the same stage.
    fn add(&mut self, part: Self) {
        self.passed += part.passed;
        self.failed.extend(part.failed);
        self.skipped.extend(part.skipped);
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
    if wants(Stage::Fuzz) {
        let started = Instant::now();
        timed("fuzz", fuzzed(workspace), started);
    }
    let only = matches!(stage, Some(Stage::Root | Stage::Vm)).then_some(ROOT);
    let started = Instant::now();
    let programs = (wants(Stage::Host) || only.is_some()).then(|| Programs::build(workspace, only));
    match programs {
        None => {}
        Some(Err(error)) => timed("build", Err(error), started),
        Some(Ok(programs)) => {
            println!("building the tests took {} s", started.elapsed().as_secs());
            if wants(Stage::Host) {
                let started = Instant::now();
                timed("host", host(workspace, &programs), started);
            }
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

/// The test program of the stages `root` and `vm`.
pub const ROOT: &str = "root";
/// The one that needs programs of others.
const MCP: &str = "mcp";

fn host(workspace: &Path, programs: &Programs) -> Result<Outcome> {
    let mut outcome = Outcome::new("host");
    for suite in programs.suites().filter(|suite| suite.name != ROOT) {
        let mut command = suite.command();
        if suite.name == MCP {
            command.env("AUTHD_OTHERS", others::fetch_mcp(workspace)?).env("AUTHD_BIN", &programs.authd);
        }
        stream(&mut command, "", &mut outcome)?;
    }
    Ok(outcome)
}

/// So many inputs for each target, besides those of the corpus.
const FUZZ_RUNS: &str = "100000";

fn fuzzed(workspace: &Path) -> Result<Outcome> {
    let mut outcome = Outcome::new("fuzz");
    let program = fuzz::build(workspace)?;
    let targets = fuzz::targets(workspace)?;
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let results = run::side_by_side(processors, &targets, |target| {
        let mut command = fuzz::command(workspace, &program, target, &["-runs", FUZZ_RUNS])?;
        let output = command.output().with_context(|| format!("starting {}", run::show(&command)))?;
        if !output.status.success() {
            let (says, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            bail!("{}\n{says}{errors}", output.status);
        }
        Ok(())
    });
    for (target, result) in targets.iter().zip(results) {
        outcome.record(target, result);
    }
    Ok(outcome)
}

/// How many processes share the root tests: most of their time they wait.
const SHARES: usize = 2;

fn root(workspace: &Path, programs: &Programs, filter: Option<&str>) -> Result<Outcome> {
    if !run::is_root() {
        bail!("needs root: it makes cgroups and network namespaces of its own");
    }
    let others = others::fetch(workspace)?;
    others::fetch_mcp(workspace)?;
    let tests = programs.suite(ROOT)?;
    let of = if filter.is_some() { 1 } else { SHARES };
    let shares: Vec<usize> = (0..of).collect();
    let results = run::side_by_side(of, &shares, |share| {
        let mut outcome = Outcome::new("root");
        let mut command = tests.command();
        command
            .env("AUTHD_OTHERS", &others)
            .env("AUTHD_BIN", &programs.authd)
            .env("AUTHD_PROBE", &programs.probe)
            .env("AUTHD_SHARE", format!("{share}/{of}"))
            .args(["--color", "never"])
            .args(filter);
        let shown = if of == 1 { String::new() } else { format!("  {}/{of} | ", share + 1) };
        stream(&mut command, &shown, &mut outcome)?;
        anyhow::Ok(outcome)
    });
    let mut outcome = Outcome::new("root");
    for result in results {
        outcome.add(result?);
    }
    if filter.is_none() {
        // What the README tells people to run first.
        outcome.record("the demo's verdicts are the expected ones", run::must(&mut demo::command(workspace)));
    }
    Ok(outcome)
}

/// Runs a test program, shows what it prints after its name, counts. A program that fails without a failed test is a
/// failure by itself.
fn stream(command: &mut Command, name: &str, outcome: &mut Outcome) -> Result<()> {
    let before = outcome.failed.len();
    let shown = run::show(command);
    println!("{name}{shown}");
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("starting {shown}"))?;
    let lines = BufReader::new(child.stdout.take().context("the pipe was asked for")?).lines();
    for line in lines {
        let line = line?;
        println!("{name}{line}");
        outcome.line(&line);
    }
    let status = child.wait()?;
    if !status.success() && outcome.failed.len() == before {
        outcome.failed.push(format!("{shown}: {status}"));
    }
    Ok(())
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
