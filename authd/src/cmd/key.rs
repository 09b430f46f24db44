//! `authd key`

use std::{
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

use anyhow::{Context, anyhow};
use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use jiff::Timestamp;
use zeroize::Zeroizing;

use super::{ask, settings, unexpected};
use crate::{
    cli::KeyCommand,
    daemon::{
        admin::{Answer, Request},
        trust::{ListedKey, NewKey},
    },
    proofs::api_key::{
        Scope,
        text::{RANDOMNESS, SecretKey},
    },
};

pub fn run(config: Option<&Path>, command: KeyCommand) -> anyhow::Result<ExitCode> {
    let config = match settings(config) {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let ask = |request| ask(&config, &request);
    match command {
        KeyCommand::Create { name, rule, network, workload, expires, rate, json } => {
            let secret = generate()?;
            let (id, digest) = secret.public().context("a generated key is well-formed")?;
            let scope = Scope { rules: rule, networks: network, workloads: workload, rate };
            let lifetime_seconds = expires.as_secs().unsigned_abs();
            let new = NewKey { id, digest, name, scope, lifetime_seconds };
            // The daemon gets the hash. The secret goes from here to the terminal, and nowhere else.
            match ask(Request::KeyCreate(Box::new(new)))? {
                Answer::KeyCreated(key) => show_secret(&key, &secret, json)?,
                other => return Err(unexpected(other)),
            }
        }
        KeyCommand::List { json } => match ask(Request::KeyList)? {
            Answer::Keys { keys } if json => println!("{}", serde_json::to_string(&keys)?),
            Answer::Keys { keys } => print!("{}", table(&keys, Timestamp::now())),
            other => return Err(unexpected(other)),
        },
        KeyCommand::Revoke { id } => match ask(Request::KeyRevoke { id })? {
            Answer::KeyRevoked(key) => println!("key {} (`{}`) is revoked", key.id, key.name),
            other => return Err(unexpected(other)),
        },
    }
    Ok(ExitCode::SUCCESS)
}

fn generate() -> anyhow::Result<SecretKey> {
    let mut randomness = Zeroizing::new([0; RANDOMNESS]);
    SystemRandom::new().fill(randomness.as_mut()).map_err(|_| anyhow!("there is no randomness"))?;
    Ok(SecretKey::generate(&randomness))
}

fn show_secret(key: &ListedKey, secret: &SecretKey, json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        let (key_text, id, expires) = (secret.reveal(), key.id, key.expires);
        writeln!(out, "{{\"id\":\"{id}\",\"key\":\"{key_text}\",\"expires\":\"{expires}\"}}")?;
    } else {
        writeln!(out, "{}", secret.reveal())?;
    }
    out.flush()?;
    eprintln!("key {} (`{}`) works until {}", key.id, key.name, key.expires);
    eprintln!("it is shown this once: authd keeps its hash only");
    Ok(())
}

fn table(keys: &[ListedKey], now: Timestamp) -> String {
    let second = |time: Timestamp| format!("{time:.0}");
    let row = |id: &str, name: &str, state: &str, expires: &str, used: &str, scope: &str| {
        format!("{id:<10} {name:<20} {state:<8} {expires:<20} {used:<20} {scope}\n")
    };
    let heading = row("ID", "NAME", "STATE", "EXPIRES", "LAST USED", "SCOPE");
    let rows = keys.iter().map(|key| {
        let used = key.last_used.map_or_else(|| "never".to_owned(), second);
        let (id, expires) = (key.id.to_string(), second(key.expires));
        row(&id, &key.name, key.state(now), &expires, &used, &key.scope.to_string())
    });
    std::iter::once(heading).chain(rows).collect()
}
