//! An agent that speaks in lines: what `authd mcp` pipes through.
//!
//! Enters: lines. Leaves: lines. Never: a request that waits for another one; and no more of them at once than may be.

use std::{sync::Arc, time::Duration};

use tokio::{
    io::{AsyncBufRead, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader},
    sync::mpsc,
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    Gateway,
    conversation::{Conversation, QUEUE},
    events::{Refusal, Told},
    gate::Agent,
    headers,
    message::{FromAgent, Id, MessageError, RpcError},
    methods,
    stdio::line,
};

/// A stream that broke is opened again after so long, so many times in a row.
const AGAIN: Duration = Duration::from_secs(1);
const TRIES: u32 = 5;
/// A session of lines is used as long as it is there.
const USED: Duration = Duration::from_secs(60);
/// For answers that are under way when an agent ends its stream.
const LAST: Duration = Duration::from_secs(1);

/// Serves one agent until it ends its stream.
pub async fn serve(
    gateway: &Gateway,
    conversation: &Arc<Conversation>,
    agent: &Agent,
    input: impl AsyncRead + Unpin + Send,
    output: impl AsyncWrite + Unpin + Send + 'static,
    used: impl Fn(),
) {
    let talk = talk(gateway, conversation, agent, BufReader::new(input), output);
    let stay = async {
        loop {
            sleep(USED).await;
            used();
        }
    };
    tokio::select! {
        () = talk => {}
        () = stay => {}
    }
}

async fn talk(
    gateway: &Gateway,
    conversation: &Arc<Conversation>,
    agent: &Agent,
    mut input: impl AsyncBufRead + Unpin,
    output: impl AsyncWrite + Unpin + Send + 'static,
) {
    let (lines, to_write) = mpsc::channel(QUEUE);
    let mut others = JoinSet::new();
    others.spawn(write(output, to_write));
    let mut requests = JoinSet::new();
    loop {
        let next = tokio::select! {
            next = line(&mut input, gateway.limits.agent_message) => next,
            // Agents start a program again that ended; one that only refuses they keep.
            () = conversation.finished() => break,
        };
        let bytes = match next {
            Ok(Some(bytes)) => bytes,
            Ok(None) => break,
            Err(error) => {
                // What follows cannot be told from what was too long.
                let error = RpcError::new(super::message::INVALID_REQUEST, "mcp_bad_stream", error.to_string());
                let _ = lines.send(error.to_value(None).to_string()).await;
                break;
            }
        };
        while requests.try_join_next().is_some() {}
        if bytes.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let heard = said(gateway, conversation, agent, &bytes, &lines, &mut requests);
        match heard.await {
            Ok(true) => drop(others.spawn(listen(conversation.clone(), agent.clone(), lines.clone()))),
            Ok(false) => {}
            Err((error, id)) => drop(lines.send(error.to_value(id.as_ref()).to_string()).await),
        }
    }
    // What is about to be answered still is.
    let _ = timeout(LAST, async { while requests.join_next().await.is_some() {} }).await;
    requests.abort_all();
    others.abort_all();
}

/// `true`: from now on the server may say something by itself.
async fn said(
    gateway: &Gateway,
    conversation: &Arc<Conversation>,
    agent: &Agent,
    bytes: &[u8],
    lines: &mpsc::Sender<String>,
    requests: &mut JoinSet<()>,
) -> Result<bool, (RpcError, Option<Id>)> {
    let parsed = FromAgent::parse(bytes, gateway.limits.agent_message);
    let message = parsed.map_err(|error: MessageError| (RpcError::from(&error), None))?;
    let id = match &message {
        FromAgent::Request(request) => Some(request.id.clone()),
        FromAgent::Notification(_) | FromAgent::Response(_) => None,
    };
    let era = headers::era_of(&message).map_err(|error| (error, id.clone()))?;
    match message {
        FromAgent::Request(request) => {
            let (told, heard) = mpsc::channel(QUEUE);
            requests.spawn(conversation.clone().request(agent.clone(), era, request, None, told));
            requests.spawn(pipe(heard, id, lines.clone()));
        }
        // They have no answer, not even a bad one.
        FromAgent::Notification(notification) => {
            let begins = notification.method == methods::INITIALIZED;
            let told = conversation.notify(agent, notification).await;
            match told {
                Ok(()) => return Ok(begins),
                Err(Refusal { error, .. }) => tracing::debug!(error = error.message, "a notification to an MCP server"),
            }
        }
        FromAgent::Response(response) => {
            if let Err(Refusal { error, .. }) = conversation.respond(agent, response).await {
                tracing::debug!(error = error.message, "a response to an MCP server");
            }
        }
    }
    Ok(false)
}

/// What the server says by itself.
async fn listen(conversation: Arc<Conversation>, agent: Agent, lines: mpsc::Sender<String>) {
    let (mut tries, mut after) = (0, None::<String>);
    while tries < TRIES && !conversation.has_ended() {
        match conversation.listen(agent.clone(), after.as_deref()).await {
            Ok(mut heard) => {
                while let Some(Told::Heard(heard)) = heard.recv().await {
                    tries = 0;
                    after = heard.id.or(after);
                    if let Some(message) = heard.message
                        && lines.send(message.text().to_owned()).await.is_err()
                    {
                        return;
                    }
                }
            }
            // The server has no such stream, and will have none.
            Err(refusal) if refusal.status.is_client_error() => return,
            Err(_) => {}
        }
        tries += 1;
        sleep(AGAIN).await;
    }
}

async fn pipe(mut heard: mpsc::Receiver<Told>, id: Option<Id>, lines: mpsc::Sender<String>) {
    while let Some(told) = heard.recv().await {
        let text = match told {
            Told::Heard(heard) => heard.message.map(|message| message.text().to_owned()),
            Told::Refused(refusal) => Some(refusal.error.to_value(id.as_ref()).to_string()),
        };
        if let Some(text) = text
            && lines.send(text).await.is_err()
        {
            return;
        }
    }
}

async fn write(mut output: impl AsyncWrite + Unpin, mut lines: mpsc::Receiver<String>) {
    while let Some(mut line) = lines.recv().await {
        line.push('\n');
        if output.write_all(line.as_bytes()).await.is_err() || output.flush().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::control::mcp::methods::Era;

    #[test]
    fn a_line_says_its_version_in_itself() {
        let era = |meta: Value| {
            let message =
                serde_json::json!({ "jsonrpc": "2.0", "id": 1, "method": "ping", "params": { "_meta": meta } });
            headers::era_of(&FromAgent::parse(message.to_string().as_bytes(), 4096).unwrap()).map_err(|e| e.code)
        };
        assert_eq!(era(serde_json::json!({})), Ok(Era::Handshake));
        let key = "io.modelcontextprotocol/protocolVersion";
        assert_eq!(era(serde_json::json!({ key: "2026-07-28" })), Ok(Era::Stateless));
        assert_eq!(era(serde_json::json!({ key: "2025-11-25" })), Err(-32022));
        assert_eq!(era(serde_json::json!({ key: 1 })), Err(-32022));
    }
}
