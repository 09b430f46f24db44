//! Builds what the tests consist of.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::run;

/// For every cargo command of the tests: what else it selected would have other features of what they share, and be
/// compiled once more.
pub const PACKAGES: [&str; 8] =
    ["--package", "authd", "--package", "authd-common", "--package", "xtask", "--package", "authd-tests"];
/// What runs as root, in a cgroup and a network of its own.
pub const BINARIES: [&str; 6] = ["--bin", "authd", "--bin", "authd-probe", "--bin", "authd-demo"];

/// The daemon, and what is run beside it.
pub struct Programs {
    pub authd: PathBuf,
    pub probe: PathBuf,
    /// Of one package and one file each, in the order of their names.
    suites: Vec<Suite>,
}

/// A test program.
pub struct Suite {
    /// Of a library, a program or a file in `tests/`.
    pub name: String,
    /// Where cargo would run it.
    package: PathBuf,
    program: PathBuf,
}

impl Programs {
    /// Only these tests, or all of them.
    pub fn build(workspace: &Path, only: Option<&str>) -> Result<Self> {
        let mut command = run::cargo_command(workspace, &["test", "--no-run"]);
        command.args(PACKAGES).arg("--message-format=json-render-diagnostics");
        if let Some(only) = only {
            command.args(["--test", only]);
        }
        let mut suites = Vec::new();
        for line in run::output(&mut command)?.lines() {
            let message = serde_json::from_str(line).with_context(|| format!("cargo says: {line}"))?;
            suites.extend(Suite::of(&message));
        }
        // Second, as nearly all of it was built for the tests, with more of the compiler's work at once.
        run::must(run::cargo_command(workspace, &["build"]).args(PACKAGES).args(BINARIES))?;
        suites.sort_by(|a, b| (&a.package, &a.name).cmp(&(&b.package, &b.name)));
        let target = run::target_directory(workspace).join("debug");
        Ok(Self { authd: target.join("authd"), probe: target.join("authd-probe"), suites })
    }

    pub fn suites(&self) -> impl Iterator<Item = &Suite> {
        self.suites.iter()
    }

    pub fn suite(&self, name: &str) -> Result<&Suite> {
        self.suites().find(|suite| suite.name == name).with_context(|| format!("no test program is called {name}"))
    }
}

impl Suite {
    /// One that a message of cargo tells of: <https://doc.rust-lang.org/cargo/reference/external-tools.html#artifact-messages>.
    fn of(message: &Value) -> Option<Self> {
        if message["profile"]["test"] != true {
            return None;
        }
        let manifest = Path::new(message["manifest_path"].as_str()?);
        Some(Self {
            name: message["target"]["name"].as_str()?.to_owned(),
            package: manifest.parent()?.to_owned(),
            program: message["executable"].as_str()?.into(),
        })
    }

    pub fn program(&self) -> &Path {
        &self.program
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.current_dir(&self.package);
        command
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Suite;

    #[test]
    fn test_programs_are_those_that_cargo_made_for_testing() {
        let message = |test: bool, executable: Option<&str>| {
            json!({
                "reason": "compiler-artifact",
                "manifest_path": "/w/authd/Cargo.toml",
                "target": { "kind": ["test"], "name": "cli" },
                "profile": { "test": test },
                "executable": executable,
            })
        };
        let suite = Suite::of(&message(true, Some("/t/cli-1"))).unwrap();
        assert_eq!((suite.name.as_str(), suite.package.to_str()), ("cli", Some("/w/authd")));
        assert!(Suite::of(&message(false, Some("/t/authd"))).is_none());
        assert!(Suite::of(&message(true, None)).is_none());
        assert!(Suite::of(&json!({ "reason": "build-finished", "success": true })).is_none());
    }
}
