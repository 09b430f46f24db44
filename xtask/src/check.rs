//! What a reader of the code relies on: formatting, lints, documentation, and a layout number that means something.

use std::{
    collections::BTreeSet,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{
    ebpf::{self, Toolchain},
    run,
    test::Outcome,
};

/// Files that define what kernel and daemon share.
const SHARED: [&str; 7] = [
    "authd-common/src/address.rs",
    "authd-common/src/event.rs",
    "authd-common/src/names.rs",
    "authd-common/src/nodes.rs",
    "authd-common/src/reason.rs",
    "authd-common/src/tables.rs",
    "authd-common/src/tables/grants.rs",
];
const LOCK: &str = "authd-common/abi.lock";

pub fn run(workspace: &Path) -> Result<Outcome> {
    let mut outcome = Outcome::new("check");
    outcome.record("formatting", run::must(&mut run::cargo_command(workspace, &["fmt", "--all", "--check"])));
    let clippy = ["clippy", "--workspace", "--exclude", "authd-ebpf", "--all-targets"];
    outcome.record(
        "lints of the host crates",
        run::must(run::cargo_command(workspace, &clippy).args(["--", "-D", "warnings"])),
    );
    outcome.record("lints of the kernel crate", kernel_lints(workspace));
    let doc = ["doc", "--workspace", "--exclude", "authd-ebpf", "--no-deps", "--document-private-items"];
    outcome.record("documentation", run::must(run::cargo_command(workspace, &doc).env("RUSTDOCFLAGS", "-D warnings")));
    outcome.record("layout number", abi(workspace));
    outcome.record("reasons are documented", reasons(workspace));
    Ok(outcome)
}

fn kernel_lints(workspace: &Path) -> Result<()> {
    let toolchain = Toolchain::find()?;
    let target = run::target_directory(workspace).join("ebpf-clippy");
    let mut command = ebpf::cargo(&toolchain, workspace, &target, "clippy");
    if toolchain == Toolchain::Debian {
        // rustup's clippy is of another compiler than the one that knows the target.
        command.env("CARGO_BUILD_RUSTC_WORKSPACE_WRAPPER", "/usr/bin/clippy-driver").arg("--release");
        command = as_check(command);
    } else {
        command.arg("--release");
    }
    command.args(["--package", "authd-ebpf"]);
    run::must(&mut command)
}

/// `cargo check` with the wrapper does what `cargo clippy` does, with a driver of our choice.
fn as_check(clippy: Command) -> Command {
    let mut command = Command::new(clippy.get_program());
    let arguments = clippy.get_args().map(|argument| if argument == "clippy" { "check".as_ref() } else { argument });
    command.args(arguments);
    for (name, value) in clippy.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.env("CLIPPY_ARGS", "-Dwarnings__CLIPPY_HACKERY__");
    if let Some(directory) = clippy.get_current_dir() {
        command.current_dir(directory);
    }
    command
}

/// The number in the source, and a fingerprint of everything that it stands for.
fn fingerprint(workspace: &Path) -> Result<String> {
    let source = |path: &str| fs::read_to_string(workspace.join(path)).with_context(|| path.to_owned());
    let library = source("authd-common/src/lib.rs")?;
    let version = library
        .lines()
        .find_map(|line| line.strip_prefix("pub const ABI_VERSION: u32 = ")?.strip_suffix(';'))
        .context("authd-common/src/lib.rs says ABI_VERSION")?;
    let mut hasher = DefaultHasher::new();
    for path in SHARED {
        for line in source(path)?.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//")) {
            // Names and sentences are not layout.
            line.hash(&mut hasher);
        }
    }
    Ok(format!("version {version}\nlayout {:016x}\n", hasher.finish()))
}

fn abi(workspace: &Path) -> Result<()> {
    let now = fingerprint(workspace)?;
    let locked = fs::read_to_string(workspace.join(LOCK)).with_context(|| format!("{LOCK}: run `cargo xtask abi`"))?;
    if now == locked {
        return Ok(());
    }
    if now.lines().next() == locked.lines().next() {
        bail!("the shared layout changed under an unchanged ABI_VERSION: raise it, then run `cargo xtask abi`");
    }
    bail!("ABI_VERSION changed: run `cargo xtask abi`");
}

pub fn write_abi(workspace: &Path) -> Result<()> {
    let now = fingerprint(workspace)?;
    fs::write(workspace.join(LOCK), &now)?;
    print!("{LOCK}:\n{now}");
    Ok(())
}

/// Every reason has a line for operators: those of verdicts, and those that errors name.
fn reasons(workspace: &Path) -> Result<()> {
    let source = fs::read_to_string(workspace.join("authd-common/src/reason.rs"))?;
    let text = fs::read_to_string(workspace.join("docs/REASONS.md")).context("docs/REASONS.md")?;
    let of_verdicts = source.lines().filter_map(|line| {
        let (_, rest) = line.trim().strip_suffix("\";")?.split_once(" = ")?;
        Some(rest.split_once(", \"")?.1.to_owned())
    });
    let mut names: BTreeSet<String> = of_verdicts.collect();
    let sources = run::output(Command::new("find").arg(workspace.join("authd/src")).args(["-name", "*.rs"]))?;
    for path in sources.lines() {
        names.extend(reasons_of_errors(&fs::read_to_string(path)?));
    }
    let missing: Vec<String> = names.into_iter().filter(|name| !text.contains(&format!("`{name}`"))).collect();
    if !missing.is_empty() {
        bail!("docs/REASONS.md does not explain {}", missing.join(", "));
    }
    Ok(())
}

/// Names in the methods `reason`, and where a refusal is made with its name.
fn reasons_of_errors(source: &str) -> Vec<String> {
    let source = source.split("#[cfg(test)]").next().unwrap_or_default();
    let mut names = Vec::new();
    let mut inside = false;
    let mut words = |text: &str| {
        let quoted = text.split('"').skip(1).step_by(2);
        let is_name = |word: &&str| !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c == '_');
        names.extend(quoted.filter(is_name).map(str::to_owned));
    };
    for line in source.lines() {
        if line.contains("fn reason(&self)") || line.contains("fn revoked_reason(") {
            inside = true;
        } else if line == "    }" || line == "}" {
            inside = false;
        } else if inside {
            words(line);
        }
        for call in ["refusal(", "unauthorized(", "forbidden(", "StatusCode::"] {
            if let Some((_, rest)) = line.split_once(call) {
                words(rest.split_inclusive("\",").next().unwrap_or_default());
            }
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::reasons_of_errors;

    #[test]
    fn reasons_are_found_where_they_are_named() {
        let source = "fn other(&self) {\n\"not_one\"\n}\n    pub fn reason(&self) -> &'static str {\n        match self {\n\
                      A => \"first_reason\",\n        }\n    }\nlet x = \"nor_this\";\nrefusal(\"second\", \"text\")\n";
        assert_eq!(reasons_of_errors(source), ["first_reason", "second"]);
    }
}
