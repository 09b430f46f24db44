//! Commands, one verb per file. Each returns an exit code; what goes wrong besides is an error for people.

pub mod act;
pub mod action;
pub mod apply;
pub mod approve;
mod capture;
pub mod cert;
pub mod check;
pub mod control;
pub mod diff;
pub mod exchange;
pub mod explain;
pub mod flows;
pub mod grant;
pub mod key;
pub mod mcp;
pub mod panic_open;
pub mod revoke;
pub mod run;
pub mod schema;
mod shown;
pub mod status;
pub mod token;
pub mod whoami;

use std::{
    io::{self, IsTerminal},
    path::Path,
    process::ExitCode,
};

use anyhow::Context;

use crate::{
    config::Config,
    daemon::admin::{Answer, Request, client},
    policy::diagnostic::Diagnostic,
};

/// Something did not work.
pub const FAILED: u8 = 1;
/// Configuration or policy is wrong.
pub const BAD_CONFIG: u8 = 64;

/// Settings, or the exit code after saying what is wrong with them.
pub fn settings(path: Option<&Path>) -> Result<Config, ExitCode> {
    Config::read(path).map_err(|diagnostic| {
        print_diagnostics(&[diagnostic]);
        ExitCode::from(BAD_CONFIG)
    })
}

pub fn print_diagnostics(diagnostics: &[Diagnostic]) {
    let colours = colours(&io::stderr());
    for diagnostic in diagnostics {
        eprintln!("{}\n", diagnostic.render(colours));
    }
}

/// Colours are for terminals, and not for those who do not want them (no-color.org).
pub fn colours(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn ask(config: &Config, request: &Request) -> anyhow::Result<Answer> {
    let socket = &config.socket;
    client::ask(socket, request).with_context(|| format!("asking the daemon on {} (does it run?)", socket.display()))
}

/// What only a broken daemon would answer.
fn unexpected(answer: Answer) -> anyhow::Error {
    match answer {
        Answer::Error { message } => anyhow::anyhow!(message),
        _ => anyhow::anyhow!("the daemon answered another question: is it of another version?"),
    }
}
