//! Servers behind pipes, and agents that speak through `authd mcp`.

use std::{collections::BTreeSet, path::PathBuf};

use anyhow::{Context, Result, bail};
use authd_tests::mcp::{HttpServer, Options, Peer, Serving, Upstream, command, peer, wait};
use serde_json::json;

fn server_command(name: &str) -> Result<Vec<String>> {
    Ok([command(name)?, vec!["stdio".to_owned()]].concat())
}

fn client(gateway: &Serving, caller: &str) -> Result<Peer> {
    let mut client = peer("client.mjs", &[&gateway.url("tools"), caller])?;
    client.ask(json!({ "do": "connect" }))?;
    Ok(client)
}

#[test]
fn each_session_has_a_process_of_its_own() -> Result<()> {
    let gateway = Serving::start(&[("tools", Upstream::Command(server_command("server.mjs")?))], Options::default())?;
    let (mut one, mut two) = (client(&gateway, "a")?, client(&gateway, "a")?);
    let processes = BTreeSet::from([one.text("pid", json!({}))?, two.text("pid", json!({}))?]);
    assert_eq!(processes.len(), 2);
    let names = one.names()?;
    assert!(names.contains(&"add".to_owned()) && !names.contains(&"secret".to_owned()), "{names:?}");
    assert_eq!(one.call("secret", json!({}))?["is_error"], true);
    assert_eq!(one.text("ask", json!({ "question": "?" }))?, "the model says: 42 (?)");
    let done = two.ask(json!({ "do": "call", "name": "count", "arguments": { "to": 3 }, "progress": true }))?;
    assert_eq!((&done["text"], done["progress"].as_array().map(Vec::len)), (&json!("counted to 3"), Some(3)));
    one.text("grow", json!({ "name": "new" }))?;
    wait("a notification", || one.ask(json!({ "do": "notified" })).is_ok_and(|n| n[0] == "tools/list_changed"))?;
    one.ask(json!({ "do": "terminate" }))?;
    two.ask(json!({ "do": "terminate" }))?;
    for process in processes {
        wait("the process ends", || !PathBuf::from(format!("/proc/{process}/fd/0")).exists())?;
    }
    Ok(())
}

#[test]
fn a_cancelled_call_ends_at_a_process_too() -> Result<()> {
    let gateway = Serving::start(&[("tools", Upstream::Command(server_command("server.mjs")?))], Options::default())?;
    let mut client = client(&gateway, "a")?;
    let number = client.begin(json!({ "do": "call", "name": "sleep", "arguments": { "name": "first" } }))?;
    gateway.script.wait_for_calls("sleep", 1)?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    client.ask(json!({ "do": "cancel", "call": number }))?;
    wait("it was cancelled", || client.text("cancelled", json!({})).is_ok_and(|text| text == "first"))?;
    wait("a report", || gateway.script.outcomes("sleep") == ["Cancelled { sent: true }"])
}

#[test]
fn an_agent_of_the_stateless_version_begins_a_session_where_a_process_answers() -> Result<()> {
    let gateway = Serving::start(&[("tools", Upstream::Command(server_command("server.py")?))], Options::default())?;
    for program in ["client.py", "client2.mjs"] {
        let mut client = peer(program, &["auto", &gateway.url("tools"), "a"])?;
        assert_eq!(client.ask(json!({ "do": "connect" }))?["version"], "2025-11-25", "{program}");
        assert_eq!(client.text("add", json!({ "a": 2, "b": 40 }))?, "42");
        assert_eq!(client.call("secret", json!({}))?["is_error"], true);
    }
    Ok(())
}

#[test]
fn a_process_that_dies_ends_its_session_with_an_error() -> Result<()> {
    let gateway = Serving::start(&[("tools", Upstream::Command(server_command("server.mjs")?))], Options::default())?;
    let mut client = client(&gateway, "a")?;
    let failed = client.fails(json!({ "do": "call", "name": "die", "arguments": {} }))?;
    assert!(failed["message"].as_str().unwrap_or_default().contains("mcp_server_session_ended"), "{failed}");
    assert_eq!(gateway.script.outcomes("die"), ["Failed { reason: \"mcp_server_session_ended\" }"]);
    let next = client.fails(json!({ "do": "call", "name": "add", "arguments": { "a": 1, "b": 1 } }))?;
    assert_eq!(next["code"], 404, "{next}");
    Ok(())
}

/// A gateway on a Unix socket, and the settings that lead there.
struct Daemon {
    gateway: Serving,
    directory: PathBuf,
    authd: String,
}

impl Daemon {
    fn start(name: &str, servers: &[(&str, Upstream)]) -> Result<Self> {
        let authd = std::env::var("AUTHD_BIN").context("AUTHD_BIN says where authd is")?;
        let directory = std::env::temp_dir().join(format!("authd-mcp-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory)?;
        let socket = directory.join("workload.sock");
        let settings = format!("[control]\nsocket = \"{}\"\n", socket.display());
        std::fs::write(directory.join("authd.toml"), settings)?;
        let gateway = Serving::start(servers, Options { socket: Some(socket), ..Options::default() })?;
        Ok(Self { gateway, directory, authd })
    }

    fn client(&self, program: &str, before: &[&str], arguments: &[&str]) -> Result<Peer> {
        let settings = self.directory.join("authd.toml").display().to_string();
        let ours = [before, &["stdio", &self.authd, "--config", &settings, "mcp"], arguments].concat();
        peer(program, &ours)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

#[test]
fn an_agent_reaches_a_server_of_http_through_authd_mcp() -> Result<()> {
    let (npm, python) = (HttpServer::start("server.mjs", "http")?, HttpServer::start("server.py", "http")?);
    let servers = [("npm", Upstream::Url(npm.url.clone())), ("python", Upstream::Url(python.url.clone()))];
    let daemon = Daemon::start("http", &servers)?;
    let mut client = daemon.client("client.mjs", &[], &["npm"])?;
    client.ask(json!({ "do": "connect" }))?;
    assert!(!client.names()?.contains(&"secret".to_owned()));
    assert_eq!(client.text("add", json!({ "a": 2, "b": 40 }))?, "42");
    assert_eq!(client.call("secret", json!({}))?["is_error"], true);
    assert_eq!(client.text("ask", json!({ "question": "?" }))?, "the model says: 42 (?)");
    let done = client.ask(json!({ "do": "call", "name": "count", "arguments": { "to": 3 }, "progress": true }))?;
    assert_eq!(done["progress"].as_array().map(Vec::len), Some(3));
    let mut n = 0;
    wait("a notification", || {
        n += 1;
        let grown = client.text("grow", json!({ "name": format!("new-{n}") }));
        grown.is_ok() && client.ask(json!({ "do": "notified" })).is_ok_and(|n| n[0] == "tools/list_changed")
    })?;
    client.ask(json!({ "do": "close" }))?;
    wait("the session ends", || daemon.gateway.sessions.is_empty())?;
    // The stateless version, whose headers only the gateway can write here.
    for (program, mode, version) in [
        ("client.py", "auto", "2026-07-28"),
        ("client.py", "legacy", "2025-11-25"),
        ("client2.mjs", "auto", "2026-07-28"),
    ] {
        let mut client = daemon.client(program, &[mode], &["python"])?;
        assert_eq!(client.ask(json!({ "do": "connect" }))?["version"], version, "{program} {mode}");
        assert!(!client.names()?.contains(&"secret".to_owned()));
        assert_eq!(client.text("route", json!({ "region": "Zürich" }))?, "routed to Zürich");
        assert_eq!(client.call("secret", json!({}))?["is_error"], true);
    }
    Ok(())
}

#[test]
fn what_becomes_of_a_call_is_reported_even_if_its_agent_is_gone() -> Result<()> {
    let servers = [("tools", Upstream::Command(server_command("server.mjs")?))];
    let daemon = Daemon::start("gone", &servers)?;
    let mut client = daemon.client("client.mjs", &[], &["tools"])?;
    client.ask(json!({ "do": "connect" }))?;
    client.begin(json!({ "do": "call", "name": "sleep", "arguments": { "name": "first" } }))?;
    daemon.gateway.script.wait_for_calls("sleep", 1)?;
    drop(client);
    wait("a report", || daemon.gateway.script.outcomes("sleep").len() == 1)?;
    wait("the session ends", || daemon.gateway.sessions.is_empty())
}

#[test]
fn an_agent_starts_a_server_of_the_policy_by_its_command() -> Result<()> {
    let (npm, python) = (server_command("server.mjs")?, server_command("server.py")?);
    let servers = [("npm", Upstream::Command(npm.clone())), ("python", Upstream::Command(python.clone()))];
    let daemon = Daemon::start("command", &servers)?;
    for (program, before, command) in [
        ("client.mjs", &[][..], &npm),
        ("client.py", &["legacy"], &python),
        ("client.py", &["auto"], &python),
        ("client2.mjs", &["auto"], &python),
    ] {
        let command: Vec<&str> = std::iter::once("--").chain(command.iter().map(String::as_str)).collect();
        let mut client = daemon.client(program, before, &command)?;
        client.ask(json!({ "do": "connect" }))?;
        assert!(!client.names()?.contains(&"secret".to_owned()), "{program}");
        assert_eq!(client.text("add", json!({ "a": 2, "b": 40 }))?, "42");
        assert_eq!(client.call("secret", json!({}))?["is_error"], true);
    }
    let settings = daemon.directory.join("authd.toml");
    let other = [&npm[..], &["--more".to_owned()]].concat();
    let run = std::process::Command::new(&daemon.authd)
        .arg("--config")
        .arg(settings)
        .args(["mcp", "--"])
        .args(other)
        .output()?;
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    if run.status.success() || !said.contains("mcp_server_unknown") {
        bail!("{said}");
    }
    Ok(())
}
