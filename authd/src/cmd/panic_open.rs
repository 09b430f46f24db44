//! `authd panic-open`

use std::{
    io::{self, IsTerminal, Write},
    path::Path,
    process::ExitCode,
};

use anyhow::Context;

use super::{FAILED, settings};
use crate::{
    audit::record::Record,
    daemon::{remove_enforcement, state},
};

pub fn run(config: Option<&Path>, yes: bool) -> anyhow::Result<ExitCode> {
    let config = match settings(config) {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    if !yes {
        if !io::stdin().is_terminal() {
            eprintln!("panic-open lets all traffic pass; add --yes to do it from a script");
            return Ok(ExitCode::from(FAILED));
        }
        print!("Detach every program of authd and let all traffic pass? [y/N] ");
        io::stdout().flush()?;
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        if !matches!(answer.trim(), "y" | "Y" | "yes") {
            return Ok(ExitCode::from(FAILED));
        }
    }
    // Detaching comes first: the record must not be able to prevent it.
    let detached = remove_enforcement(&config.pins).with_context(|| format!("removing {}", config.pins.display()))?;
    let mut record = Record::about("panic_open", format!("{detached} programs detached by hand"));
    record.uid = Some(nix::unistd::getuid().as_raw());
    record.pid = Some(std::process::id());
    if let Err(error) = state::leave_record(&config.state, &record) {
        eprintln!("detached, but the record could not be left in {}: {error}", config.state.display());
    }
    println!("{detached} programs detached: nothing is enforced until authd is started again");
    Ok(ExitCode::SUCCESS)
}
