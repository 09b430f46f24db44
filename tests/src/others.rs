//! Programs of others: an authorization server, a receiver of webhooks, and proxies. `cargo xtask test` fetches them, and says where they are.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread::{sleep, spawn},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::daemon::PATIENCE;

/// Where they are. Without: nobody fetched them, as on the emulated machines, which have no network.
pub fn directory() -> Option<PathBuf> {
    std::env::var_os("AUTHD_OTHERS").map(PathBuf::from)
}

pub fn program(name: &str) -> Result<String> {
    let path = directory().context("AUTHD_OTHERS says where the programs of others are")?.join(name);
    ensure!(path.exists(), "{} is there", path.display());
    Ok(path.display().to_string())
}

/// The npm package `oidc-provider`, on loopback. See `tests/oauth/issuer.mjs`.
pub struct AuthorizationServer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    pub issuer: String,
    pub jwks_uri: String,
    pub introspection: String,
    pub audience: String,
    pub secret: String,
}

impl AuthorizationServer {
    pub fn start() -> Result<Self> {
        let mut child = Command::new("node")
            .arg(program("oauth/issuer.mjs")?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("starting node")?;
        let input = child.stdin.take().context("the pipe was asked for")?;
        let output = BufReader::new(child.stdout.take().context("the pipe was asked for")?);
        let nothing = String::new;
        let (issuer, jwks_uri, introspection, audience, secret) =
            (nothing(), nothing(), nothing(), nothing(), nothing());
        let mut server = Self { child, input, output, issuer, jwks_uri, introspection, audience, secret };
        let ready = server.ask(&serde_json::json!({ "do": "ready" }))?;
        let text = |name: &str| ready[name].as_str().map(str::to_owned).with_context(|| ready.to_string());
        server.issuer = text("issuer")?;
        server.jwks_uri = text("jwks_uri")?;
        server.introspection = text("introspection")?;
        server.audience = text("audience")?;
        server.secret = text("secret")?;
        Ok(server)
    }

    pub fn ask(&mut self, what: &Value) -> Result<Value> {
        writeln!(self.input, "{what}")?;
        let mut line = String::new();
        // The library prints notices of its own.
        while !line.starts_with('{') {
            line.clear();
            ensure!(self.output.read_line(&mut line)? > 0, "the authorization server ended");
        }
        let answer: Value = serde_json::from_str(&line)?;
        if let Some(error) = answer.get("error") {
            bail!("{what}: {error}");
        }
        Ok(answer)
    }

    /// One text of an answer.
    pub fn text(&mut self, what: &Value, name: &str) -> Result<String> {
        let answer = self.ask(what)?;
        Ok(answer[name].as_str().with_context(|| answer.to_string())?.to_owned())
    }
}

impl Drop for AuthorizationServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A receiver of webhooks, with the npm package `standardwebhooks`, on loopback. See `tests/oauth/hook.mjs`.
pub struct WebhookReceiver {
    child: Child,
    lines: Receiver<String>,
    pub port: u16,
}

impl WebhookReceiver {
    pub fn start(certificate: &Path, key: &Path, secret: &Path) -> Result<Self> {
        let mut child = Command::new("node")
            .arg(program("oauth/hook.mjs")?)
            .args([certificate, key, secret])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting node")?;
        let output = BufReader::new(child.stdout.take().context("the pipe was asked for")?);
        let (line, lines) = channel();
        spawn(move || output.lines().map_while(Result::ok).try_for_each(|text| line.send(text)));
        let mut receiver = Self { child, lines, port: 0 };
        let port = receiver.received()?["port"].as_u64().context("a port")?;
        receiver.port = port.try_into()?;
        Ok(receiver)
    }

    /// What came, and whether it verified. Waits for it.
    pub fn received(&self) -> Result<Value> {
        let line = self.lines.recv_timeout(PATIENCE).context("nothing came to the receiver of webhooks")?;
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for WebhookReceiver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until somebody listens.
pub fn wait_for_listener(connect: impl Fn() -> std::io::Result<TcpStream>) -> Result<()> {
    let started = Instant::now();
    while let Err(error) = connect() {
        if started.elapsed() > PATIENCE {
            return Err(error).context("nobody listens");
        }
        sleep(Duration::from_millis(50));
    }
    Ok(())
}
