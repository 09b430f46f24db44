//! The binary: arguments, logging, exit codes.

use std::{io, process::ExitCode};

use authd::{
    cli::{Cli, Command, ExplainCommand, TokenCommand},
    cmd,
};
use clap::Parser;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Records go to stdout; what the daemon says of itself goes to stderr.
    let filter = EnvFilter::try_from_env("AUTHD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(cmd::colours(&io::stderr()))
        .init();
    if let Command::Control { uid, gid, root } = &cli.command {
        return cmd::control::run(*uid, *gid, root);
    }
    let config = cli.config.as_deref();
    let result = match cli.command {
        Command::Run { detach_on_exit } => cmd::run::run(config, detach_on_exit),
        Command::Apply { confirm, json } => cmd::apply::run(config, confirm, json),
        Command::Confirm => cmd::apply::confirm(config),
        Command::Check { directory, json, strict } => cmd::check::run(config, directory, json, strict),
        Command::Explain { command: Some(ExplainCommand::Action(question)), .. } => cmd::action::run(config, question),
        Command::Explain { pcap: Some(capture), json, .. } => cmd::explain::frames(config, &capture, json),
        Command::Explain { from, to, at, policy, json, .. } => {
            let question =
                cmd::explain::Question { from: from.unwrap_or_default(), to: to.unwrap_or_default(), at, policy };
            cmd::explain::run(config, question, json)
        }
        Command::Diff { old, new, json } => cmd::diff::run(config, &old, &new, json),
        Command::Schema { of, policy } => cmd::schema::run(of, policy.as_deref()),
        Command::Status { json, prometheus } => cmd::status::run(config, json, prometheus),
        Command::Flows { follow, last, json } => cmd::flows::run(config, follow, last, json),
        Command::Key { command } => cmd::key::run(config, command),
        Command::Cert { command } => cmd::cert::run(config, command),
        Command::Token(TokenCommand::Verify(question)) => cmd::token::verify(config, *question),
        Command::Token(TokenCommand::Inspect { file }) => cmd::token::inspect(&file),
        Command::Token(TokenCommand::Exchange(question)) => cmd::exchange::run(config, &question),
        Command::Token(TokenCommand::Keys { rotate, json }) => cmd::exchange::keys(config, rotate, json),
        Command::Grant(question) => cmd::grant::run(config, question),
        Command::Act(question) => cmd::act::run(config, &question),
        Command::Whoami { caller, json } => cmd::whoami::run(config, &caller, json),
        Command::Mcp(question) => cmd::mcp::run(config, question),
        Command::Revoke(question) => cmd::revoke::run(config, question),
        Command::Approve(command) => cmd::approve::run(config, command),
        Command::Control { .. } => unreachable!("it was run above, before anything else"),
        Command::PanicOpen { yes } => cmd::panic_open::run(config, yes),
    };
    result.unwrap_or_else(|error| {
        eprintln!("authd: {error:#}");
        ExitCode::from(cmd::FAILED)
    })
}
