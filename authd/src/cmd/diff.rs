//! `authd diff`

use std::{path::Path, process::ExitCode};

use super::{BAD_CONFIG, print_diagnostics, settings};
use crate::{
    daemon::clock,
    policy::{diff::diff, load},
};

pub fn run(config: Option<&Path>, old: &Path, new: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let config = match settings(config) {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let (before, after) = (load::directory(old), load::directory(new));
    let (Some(old), Some(new)) = (&before.model, &after.model) else {
        print_diagnostics(&before.diagnostics);
        print_diagnostics(&after.diagnostics);
        return Ok(ExitCode::from(BAD_CONFIG));
    };
    let changes = diff(old, new, &config.options, clock::moment())?;
    if json {
        println!("{}", serde_json::to_string(&changes)?);
    } else {
        for change in &changes {
            println!(
                "{} -> {} ({}): {} becomes {}",
                change.from, change.service, change.to, change.before, change.after
            );
        }
        println!("{} verdicts change", changes.len());
    }
    Ok(ExitCode::SUCCESS)
}
