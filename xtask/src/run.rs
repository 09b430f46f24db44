//! Running other programs.

use std::{
    path::Path,
    process::{Command, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
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

/// Does something with each of several, so many at a time. What comes of them is in their order.
pub fn side_by_side<T: Sync, R: Send>(at_once: usize, several: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let worker = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(one) = several.get(index) else { break };
            let result = work(one);
            done.lock().unwrap_or_else(PoisonError::into_inner).push((index, result));
        }
    };
    thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(worker);
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
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

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::side_by_side;

    #[test]
    fn as_many_as_wanted_are_done_at_a_time_and_all_in_the_end() {
        // Nobody passes alone.
        let both = Barrier::new(2);
        let doubled = side_by_side(2, &[3, 1, 2, 4], |number| {
            both.wait();
            number * 2
        });
        assert_eq!(doubled, [6, 2, 4, 8]);
    }
}
