//! Running other programs.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

/// A command, as a person would type it.
pub fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Runs to the end; an exit code other than 0 is an error.
pub fn must(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {}", show(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", show(command));
    }
    Ok(())
}

/// What a command prints; an exit code other than 0 is an error.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output().with_context(|| format!("starting {}", show(command)))?;
    if !output.status.success() {
        bail!("{} failed: {}", show(command), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether a command runs and ends well, without a word.
pub fn works(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// cargo in the workspace; `--locked` where nobody would see a changed lock file.
pub fn cargo(workspace: &Path, arguments: &[&str], release: bool) -> Result<()> {
    let mut command = cargo_command(workspace, arguments);
    if release {
        command.arg("--release");
    }
    must(&mut command)
}

pub fn cargo_command(workspace: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(workspace).args(arguments);
    // Formatting resolves nothing, and does not know the word.
    if is_ci() && arguments.first() != Some(&"fmt") {
        command.arg("--locked");
    }
    if is_ci() {
        // Nothing will be compiled a second time.
        command.env("CARGO_INCREMENTAL", "0");
    }
    command
}

pub fn is_ci() -> bool {
    std::env::var_os("CI").is_some()
}

pub fn is_root() -> bool {
    output(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0")
}

/// Where cargo puts what it builds.
pub fn target_directory(workspace: &Path) -> std::path::PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(directory) => workspace.join(directory),
        None => workspace.join("target"),
    }
}
