//! `authd revoke`: at once, to the packet; and what is revoked.

use std::{path::Path, process::ExitCode};

use anyhow::Context;

use super::{ask, settings, unexpected};
use crate::{
    cli::RevokeQuestion,
    config::Config,
    daemon::admin::{Answer, Request},
    store::revoked::Revoked,
};

pub fn run(config: Option<&Path>, question: RevokeQuestion) -> anyhow::Result<ExitCode> {
    let config = match settings(config) {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let RevokeQuestion { kind, value, reason, undo, list, json } = question;
    let Some(kind) = kind.filter(|_| !list) else { return show(&config, json) };
    let what = Revoked::parse(&kind, &value.join(" ")).context("nothing was revoked")?;
    let request = if undo { Request::Reinstate { what } } else { Request::Revoke { what, text: reason } };
    match ask(&config, &request)? {
        Answer::Revoked(effect) => {
            if json {
                println!("{}", serde_json::to_string(&effect)?);
            } else {
                println!(
                    "{} grants ended within {} us; {} flows cut, {} sockets closed within {} us",
                    effect.grants, effect.cut_microseconds, effect.flows, effect.destroyed, effect.microseconds
                );
                if effect.left > 0 {
                    println!("{} sockets stay open; their packets are dropped. The log says why", effect.left);
                }
            }
            Ok(ExitCode::SUCCESS)
        }
        Answer::Reinstated { found: true } => {
            println!("taken back; what was issued before stays refused");
            Ok(ExitCode::SUCCESS)
        }
        Answer::Reinstated { found: false } => {
            eprintln!("authd: it was not revoked");
            Ok(ExitCode::from(super::FAILED))
        }
        other => Err(unexpected(other)),
    }
}

fn show(config: &Config, json: bool) -> anyhow::Result<ExitCode> {
    let revocations = match ask(config, &Request::Revocations)? {
        Answer::Revocations { revocations } => revocations,
        other => return Err(unexpected(other)),
    };
    if json {
        println!("{}", serde_json::to_string(&revocations)?);
        return Ok(ExitCode::SUCCESS);
    }
    for entry in revocations {
        let since = entry.not_before.map_or(String::new(), |time| format!(", what was issued before {time}"));
        println!("{} at {} by uid {}{since}  {}", entry.what, entry.at, entry.by, entry.text);
    }
    Ok(ExitCode::SUCCESS)
}
