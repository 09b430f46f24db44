//! `authd run`

use std::{path::Path, process::ExitCode};

use super::{BAD_CONFIG, print_diagnostics, settings};
use crate::daemon::{DaemonError, supervisor};

pub fn run(config: Option<&Path>, detach_on_exit: bool) -> anyhow::Result<ExitCode> {
    let config = match settings(config) {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match runtime.block_on(supervisor::run(config, detach_on_exit)) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(DaemonError::Policy(diagnostics)) => {
            print_diagnostics(&diagnostics);
            Ok(ExitCode::from(BAD_CONFIG))
        }
        Err(error) => Err(error.into()),
    }
}
