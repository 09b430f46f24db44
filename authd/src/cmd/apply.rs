//! `authd apply`, `authd confirm`

use std::{path::Path, process::ExitCode};

use super::{BAD_CONFIG, FAILED, ask, settings, unexpected};
use crate::daemon::admin::{Answer, Request};

pub fn run(config: Option<&Path>, confirm: Option<u32>, json: bool) -> anyhow::Result<ExitCode> {
    let config = match settings(config) {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let applied = match ask(&config, &Request::Apply { confirm })? {
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
        match &applied.goes_back {
            Some(time) => println!("it goes back to the one before at {time} unless you call `authd confirm`"),
            None if confirm.is_some() => println!("no other policy was in force lately: it stays"),
            None => {}
        }
    } else {
        for error in &applied.errors {
            eprintln!("{error}\n");
        }
        eprintln!("policy refused; generation {} stays in force", applied.generation);
    }
    Ok(if applied.ok { ExitCode::SUCCESS } else { ExitCode::from(BAD_CONFIG) })
}

/// Keeps the policy that is on trial.
pub fn confirm(config: Option<&Path>) -> anyhow::Result<ExitCode> {
    let config = match settings(config) {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    match ask(&config, &Request::Confirm)? {
        Answer::Confirmed { found: true } => {
            println!("it stays");
            Ok(ExitCode::SUCCESS)
        }
        Answer::Confirmed { found: false } => {
            eprintln!("no policy is on trial");
            Ok(ExitCode::from(FAILED))
        }
        other => Err(unexpected(other)),
    }
}
