//! `authd apply`

use std::{path::Path, process::ExitCode};

use super::{BAD_CONFIG, ask, settings, unexpected};
use crate::daemon::admin::{Answer, Request};

pub fn run(config: Option<&Path>, json: bool) -> anyhow::Result<ExitCode> {
    let config = match settings(config) {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let applied = match ask(&config, &Request::Apply)? {
        Answer::Applied(applied) => applied,
        other => return Err(unexpected(other)),
    };
    if json {
        println!("{}", serde_json::to_string(&applied)?);
    } else if applied.ok {
        let warnings = match applied.warnings {
            0 => String::new(),
            n => format!("; {n} warnings, see `authd check`"),
        };
        println!(
            "generation {} in force: {} entries written in {} us{warnings}",
            applied.generation, applied.written, applied.microseconds
        );
    } else {
        for error in &applied.errors {
            eprintln!("{error}\n");
        }
        eprintln!("policy refused; generation {} stays in force", applied.generation);
    }
    Ok(if applied.ok { ExitCode::SUCCESS } else { ExitCode::from(BAD_CONFIG) })
}
