//! `authd flows`

use std::{
    io::{self, BufRead, IsTerminal, Write},
    path::Path,
    process::ExitCode,
};

use anyhow::Context;

use super::{colours, settings};
use crate::{
    audit::record::Record,
    daemon::admin::{Request, client},
};

pub fn run(config: Option<&Path>, follow: bool, last: usize, json: bool) -> anyhow::Result<ExitCode> {
    let config = match settings(config) {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let request = Request::Flows { follow, last };
    let lines = client::open(&config.socket, &request)
        .with_context(|| format!("asking the daemon on {} (does it run?)", config.socket.display()))?;
    let mut out = io::stdout();
    let colours = colours(&out);
    if !json && out.is_terminal() {
        println!("{}", heading());
    }
    for line in lines.lines() {
        let line = line?;
        let written = match (json, serde_json::from_str::<Record>(&line)) {
            (false, Ok(record)) if record.event.starts_with("flow_") => writeln!(out, "{}", row(&record, colours)),
            (false, _) => continue,
            (true, _) => writeln!(out, "{line}"),
        };
        match written {
            // Whoever read along has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
            result => result?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub fn heading() -> String {
    format!(
        "{:<15} {:<8} {:<8} {:<22} {:<46} {:<18} {}",
        "TIME", "EVENT", "VERDICT", "WORKLOAD", "FLOW", "REASON", "RULE"
    )
}

/// One record on one line.
pub fn row(record: &Record, colours: bool) -> String {
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
    let time = record.time.get(11..26).unwrap_or(&record.time);
    let event = record.event.strip_prefix("flow_").unwrap_or(&record.event);
    let verdict = text(&record.verdict);
    let repeated = match record.count {
        Some(count) if count > 1 => format!(" x{count}"),
        _ => String::new(),
    };
    let totals = match (record.bytes_out, record.bytes_in, record.duration_ns) {
        (Some(sent), Some(received), Some(ns)) => {
            format!("  {sent} B out, {received} B in, {:.3} s", ns as f64 / 1e9)
        }
        _ => String::new(),
    };
    let (on, off) = match (colours, verdict.as_str()) {
        (false, _) => ("", ""),
        (_, "allowed") => ("\x1b[32m", "\x1b[0m"),
        (_, "observed") => ("\x1b[33m", "\x1b[0m"),
        _ => ("\x1b[31m", "\x1b[0m"),
    };
    format!(
        "{time:<15} {event:<8} {on}{verdict:<8}{off} {:<22} {:<46} {:<18} {}{repeated}{totals}",
        text(&record.workload),
        flow(record),
        text(&record.reason),
        text(&record.rule)
    )
}

fn flow(record: &Record) -> String {
    let end = |address: &Option<std::net::IpAddr>, port: Option<u16>| match (address, port) {
        (Some(address), Some(port)) => std::net::SocketAddr::new(*address, port).to_string(),
        (Some(address), None) => address.to_string(),
        (None, Some(port)) => format!("*:{port}"),
        (None, None) => "*".to_owned(),
    };
    let remote = end(&record.remote_address, record.remote_port);
    // Whom another node vouches for is no workload here.
    let remote = match record.peer_workload.as_ref().or(record.peer_spiffe_id.as_ref()) {
        Some(peer) => format!("{peer} {remote}"),
        None => remote,
    };
    let protocol = record.protocol.as_deref().unwrap_or("-");
    match record.direction.as_deref() {
        Some("inbound") => format!("<- {remote} on {protocol}/{}", record.local_port.unwrap_or_default()),
        _ => format!("-> {remote} {protocol}"),
    }
}
