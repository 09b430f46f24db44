//! `authd status`

use std::{path::Path, process::ExitCode};

use super::{FAILED, ask, settings, unexpected};
use crate::daemon::admin::{Answer, Request};

pub fn run(config: Option<&Path>, json: bool, prometheus: bool) -> anyhow::Result<ExitCode> {
    let config = match settings(config) {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let status = match ask(&config, &Request::Status)? {
        Answer::Status(status) => status,
        other => return Err(unexpected(other)),
    };
    match (json, prometheus) {
        (true, _) => println!("{}", serde_json::to_string(&status)?),
        (_, true) => print!("{}", status.metrics()),
        _ => print!("{status}"),
    }
    // A script that asks wants to know whether all is well.
    let well = status.enforcing && status.last_reload.ok && status.store_error.is_none();
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}
