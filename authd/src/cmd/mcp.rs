//! `authd mcp`: an agent's way to an MCP server, where the agent starts a program and speaks to its standard input and output.
//!
//! A pipe to the daemon, and nothing else: what the lines say is read there. The server is started there too, by nobody
//! but the daemon, so that an agent gets no way around the gateway by this command.

use std::{path::Path, process::ExitCode};

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{HeaderMap, Method, Request, Response, StatusCode, body::Incoming, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    io::{self, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};

use super::shown::Shown;
use crate::{
    cli::McpQuestion,
    client::{self, Target},
    control::{LOCAL_HOST, mcp::http},
};

/// Until the daemon has let the agent in.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);
const ANSWER_BYTES: usize = 64 << 10;

pub fn run(config: Option<&Path>, question: McpQuestion) -> anyhow::Result<ExitCode> {
    let socket = match super::settings(config) {
        Ok(settings) => settings.control.socket,
        Err(code) => return Ok(code),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let shown = Shown::read(question.token_file.as_deref(), question.dpop_key.as_deref())?;
    let result = runtime.block_on(async {
        let server = match question.server {
            Some(server) => server,
            None => server_of(&socket, &question.command).await?,
        };
        pipe(&socket, &server, shown).await
    });
    // Reading standard input is a thread that nobody can wake.
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

/// Which server of the policy the command starts.
async fn server_of(socket: &Path, command: &[String]) -> anyhow::Result<String> {
    let target = Target::Socket(socket.to_owned());
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    let body = serde_json::to_vec(&json!({ "command": command }))?;
    let answer = client::ask(&target, None, Method::POST, http::PATH, headers, body).await?;
    let body: Value = serde_json::from_slice(&answer.body).context("the answer is no JSON")?;
    if answer.status != StatusCode::OK {
        return Err(refused(&body));
    }
    Ok(body["server"].as_str().context("the answer names a server")?.to_owned())
}

/// The daemon's answer, and with it the connection.
async fn begin(socket: &Path, server: &str, mut shown: Shown) -> anyhow::Result<Response<Incoming>> {
    let path = format!("{}/{server}/stdio", http::PATH);
    let target = Target::Socket(socket.to_owned());
    loop {
        let stream =
            UnixStream::connect(socket).await.with_context(|| format!("connecting to {}", socket.display()))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection.with_upgrades());
        let mut request = Request::post(&path)
            .header(header::HOST, LOCAL_HOST)
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, http::UPGRADE)
            .body(Full::new(Bytes::new()))
            .with_context(|| format!("`{server}` is no server's name"))?;
        request.headers_mut().extend(shown.headers(&target, &path)?);
        let answer = timeout(PATIENCE, sender.send_request(request)).await.context("the daemon does not answer")??;
        if !shown.again(answer.status(), answer.headers()) {
            return Ok(answer);
        }
    }
}

async fn pipe(socket: &Path, server: &str, shown: Shown) -> anyhow::Result<()> {
    let response = begin(socket, server, shown).await?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let body = Limited::new(response.into_body(), ANSWER_BYTES).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!(error)).context("the answer")?.to_bytes();
        return Err(refused(&serde_json::from_slice(&body).unwrap_or_default()));
    }
    let upgraded = TokioIo::new(hyper::upgrade::on(response).await?);
    let (mut from_daemon, mut to_daemon) = io::split(upgraded);
    let there = async {
        io::copy(&mut io::stdin(), &mut to_daemon).await?;
        // The agent is done: the daemon ends what is left, and with it the other direction.
        to_daemon.shutdown().await
    };
    let mut output = io::stdout();
    let back = async {
        let mut piece = vec![0; 64 << 10];
        loop {
            let length = io::AsyncReadExt::read(&mut from_daemon, &mut piece).await?;
            if length == 0 {
                return std::io::Result::Ok(());
            }
            output.write_all(&piece[..length]).await?;
            output.flush().await?;
        }
    };
    tokio::pin!(back);
    tokio::select! {
        result = &mut back => result?,
        result = there => {
            result?;
            back.await?;
        }
    }
    Ok(())
}

fn refused(body: &Value) -> anyhow::Error {
    let reason = body["reason"].as_str().unwrap_or("unknown");
    anyhow::anyhow!("refused ({reason}): {}", body["detail"].as_str().unwrap_or_default())
}
