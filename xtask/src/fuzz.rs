//! Runs the fuzz targets. libFuzzer needs to know which code an input reaches, which rustc's LLVM tells without a nightly
//! compiler; only authd's own crates are asked to.

use std::{
    fs,
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail};

use crate::{programs::PACKAGES, run};

/// Set for the compiler's wrapper, which is this program.
const WRAPPING: &str = "AUTHD_FUZZ_WRAPPER";
const INSTRUMENTED: [&str; 4] = ["authd", "authd_common", "authd_tests", "authd_fuzz"];
/// As cargo-fuzz passes them where no sanitizer is wanted, but not for one codegen unit: each has tables of its own, which the
/// linker joins, and on several processors several are compiled.
const COVERAGE: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cdebug-assertions",
];

/// Called by cargo as `xtask RUSTC ARGUMENTS`: compiles, and is done.
pub fn as_compiler() -> Result<Option<ExitCode>> {
    if std::env::var_os(WRAPPING).is_none() {
        return Ok(None);
    }
    let mut arguments = std::env::args_os().skip(1);
    let mut command = Command::new(arguments.next().context("cargo names the compiler")?);
    let arguments: Vec<_> = arguments.collect();
    let name = arguments.iter().skip_while(|a| *a != "--crate-name").nth(1).and_then(|name| name.to_str());
    command.args(&arguments).env_remove(WRAPPING);
    if name.is_some_and(|name| INSTRUMENTED.contains(&name)) {
        command.args(COVERAGE);
    }
    let status = command.status().with_context(|| format!("starting {}", run::show(&command)))?;
    Ok(Some(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }))
}

pub fn run(workspace: &Path, only: Option<&str>, seconds: u32) -> Result<ExitCode> {
    let program = build(workspace)?;
    let corpus = workspace.join("tests/corpus");
    for target in targets(workspace)?.iter().filter(|target| only.is_none_or(|only| only == *target)) {
        run::must(&mut command(workspace, &program, target, &["-max_total_time", &seconds.to_string()])?)
            .with_context(|| format!("{target}: the input is kept in {}", corpus.join(target).display()))?;
        println!("fuzz: {target}: ok");
    }
    Ok(ExitCode::SUCCESS)
}

pub fn build(workspace: &Path) -> Result<std::path::PathBuf> {
    let mut command =
        run::cargo_command(workspace, &["build", "--bin", "authd-fuzz", "--features", "authd-tests/fuzz"]);
    command.args(PACKAGES).env("RUSTC_WORKSPACE_WRAPPER", std::env::current_exe()?).env(WRAPPING, "1");
    run::must(&mut command)?;
    Ok(run::target_directory(workspace).join("debug/authd-fuzz"))
}

/// As the source names them.
pub fn targets(workspace: &Path) -> Result<Vec<String>> {
    let source = fs::read_to_string(workspace.join("tests/src/bin/fuzz.rs"))?;
    let names = source.lines().filter_map(|line| line.strip_prefix("    (\"")?.split_once('"')).map(|(name, _)| name);
    let names: Vec<String> = names.map(str::to_owned).collect();
    if names.is_empty() { bail!("tests/src/bin/fuzz.rs names no targets") } else { Ok(names) }
}

/// One target, from its corpus on. What makes it fail is added to the corpus: the next run begins with it.
pub fn command(workspace: &Path, program: &Path, target: &str, limit: &[&str; 2]) -> Result<Command> {
    let corpus = workspace.join("tests/corpus").join(target);
    fs::create_dir_all(&corpus)?;
    let work = run::target_directory(workspace).join("fuzz").join(target);
    fs::create_dir_all(&work)?;
    let mut command = Command::new(program);
    command
        .env("AUTHD_FUZZ_TARGET", target)
        .arg(format!("{}={}", limit[0], limit[1]))
        .args(["-max_len=8192", "-timeout=20", "-rss_limit_mb=2048", "-verbosity=0", "-print_final_stats=1"])
        .arg(format!("-artifact_prefix={}/", corpus.display()))
        // New inputs go to the first directory.
        .arg(&work)
        .arg(&corpus);
    Ok(command)
}
