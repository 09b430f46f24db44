//! An agent that speaks in lines: what `authd mcp` pipes through.
//!
//! Enters: lines. Leaves: lines. Never: a request that waits for another one; and no more of them at once than may be.

use std::{io, sync::Arc, time::Duration};

use http::StatusCode;
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
    message::{FromAgent, INVALID_REQUEST, Id, MessageError, RpcError},
    methods,
    stdio::{line, skip},
};

/// A stream that broke is opened again after so long, and while that fails twice as long after each time, up to the last.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_AT_LAST: Duration = Duration::from_secs(60);
/// A session of lines is used as long as it is there.
const USED: Duration = Duration::from_secs(60);
/// Who says more than it may waits so long, and what it says next behind it.
const TOO_OFTEN: Duration = Duration::from_millis(50);
/// Who says more than a message without an end of the line has lost its way.
const LONGEST: usize = 64 << 20;
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
    let mut writer = tokio::spawn(write(output, to_write));
    let (mut requests, mut listener) = (JoinSet::new(), JoinSet::new());
    // Each request has two.
    let most = 2 * gateway.limits.in_flight;
    loop {
        let step = async {
            let bytes = match next(&mut input, &mut requests, most, gateway, agent).await {
                Ok(Some(bytes)) => bytes,
                Ok(None) => return false,
                Err(error) => {
                    let is_long = error.kind() == io::ErrorKind::InvalidData;
                    let error = RpcError::new(INVALID_REQUEST, "mcp_bad_stream", error.to_string());
                    let _ = lines.send(error.to_value(None).to_string()).await;
                    return is_long && skip(&mut input, LONGEST).await.unwrap_or(false);
                }
            };
            match said(gateway, conversation, agent, &bytes, &lines, &mut requests).await {
                Ok(begins) => {
                    while listener.try_join_next().is_some() {}
                    // One hears all that there is.
                    if begins && listener.is_empty() {
                        listener.spawn(listen(conversation.clone(), agent.clone(), lines.clone()));
                    }
                }
                Err((error, id)) => drop(lines.send(error.to_value(id.as_ref()).to_string()).await),
            }
            true
        };
        let goes_on = tokio::select! {
            biased;
            // Agents start a program again that ended; one that only refuses they keep.
            () = conversation.finished() => false,
            () = lines.closed() => false,
            goes_on = step => goes_on,
        };
        if !goes_on {
            break;
        }
    }
    listener.abort_all();
    // What is about to be answered still is.
    let _ = timeout(LAST, async {
        while requests.join_next().await.is_some() {}
        while listener.join_next().await.is_some() {}
        drop(lines);
        let _ = (&mut writer).await;
    })
    .await;
    requests.abort_all();
    writer.abort();
}

/// The next line that says something, once there is room for what comes of it, and the agent may say one more.
async fn next(
    input: &mut (impl AsyncBufRead + Unpin),
    requests: &mut JoinSet<()>,
    most: usize,
    gateway: &Gateway,
    agent: &Agent,
) -> io::Result<Option<Vec<u8>>> {
    loop {
        while requests.try_join_next().is_some() {}
        // An agent that does not read what it is told is not heard either.
        while requests.len() > most {
            requests.join_next().await;
        }
        let line = line(input, gateway.limits.agent_message).await;
        if let Ok(Some(bytes)) = &line
            && bytes.iter().all(u8::is_ascii_whitespace)
        {
            continue;
        }
        while !matches!(line, Ok(None)) && !agent.gate.admits() {
            sleep(TOO_OFTEN).await;
        }
        return line;
    }
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
            // Before the next line is read: it may cancel this one.
            let begun = conversation.begin(agent.clone(), era, request, None).map_err(|error| (error, id.clone()))?;
            let (told, heard) = mpsc::channel(QUEUE);
            requests.spawn(conversation.clone().follow(begun, told));
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
    let (mut pause, mut after) = (AGAIN, None::<String>);
    while !conversation.has_ended() {
        match conversation.listen(agent.clone(), after.as_deref()).await {
            Ok(mut heard) => {
                pause = AGAIN;
                while let Some(Told::Heard(heard)) = heard.recv().await {
                    after = heard.id.or(after);
                    if let Some(message) = heard.message
                        && lines.send(message.text().to_owned()).await.is_err()
                    {
                        return;
                    }
                }
            }
            // The server has no such stream, and will have none; or no session any more.
            Err(Refusal { status: StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED, .. }) => return,
            Err(Refusal { error, .. }) => tracing::debug!(error = error.message, "a stream of an MCP server"),
        }
        sleep(pause).await;
        pause = AGAIN_AT_LAST.min(2 * pause);
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
    use std::sync::atomic::Ordering;

    use serde_json::{Value, json};
    use tokio::io::{DuplexStream, duplex};

    use super::*;
    use crate::control::{
        mcp::{
            Limits,
            methods::Era,
            testing::{SOON, Talk},
        },
        verifier::lock,
    };

    /// Serves an agent, whose input and output these are.
    fn serve_one(talk: &Talk, room: usize) -> (DuplexStream, DuplexStream, tokio::task::JoinHandle<()>) {
        let ((to, input), (output, from)) = (duplex(room), duplex(room));
        let (conversation, agent) = (talk.conversation.clone(), talk.agent.clone());
        let served = tokio::spawn(async move {
            serve(conversation.gateway(), &conversation, &agent, input, output, || {}).await;
        });
        (to, from, served)
    }

    fn unknown(id: usize) -> String {
        format!("{}\n", json!({ "jsonrpc": "2.0", "id": id, "method": "unknown" }))
    }

    #[tokio::test]
    async fn an_agent_that_does_not_read_is_not_heard() {
        let limits = Limits { in_flight: 4, ..Limits::default() };
        let talk = Talk::new(limits);
        let (mut to, from, served) = serve_one(&talk, 256);
        let mut taken = 0;
        while let Ok(written) = timeout(Duration::from_millis(300), to.write_all(unknown(taken).as_bytes())).await {
            written.unwrap();
            taken += 1;
            assert!(taken < 100, "what comes of so much is kept somewhere");
        }
        // It reads at last, and everything was kept; what it had written half is no line.
        let mut from = BufReader::new(from);
        for _ in 0..taken {
            let answer = timeout(SOON, line(&mut from, 4096)).await.unwrap().unwrap().unwrap();
            let answer: Value = serde_json::from_slice(&answer).unwrap();
            assert_eq!(answer["error"]["code"], -32601);
        }
        drop(to);
        timeout(SOON, served).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_call_that_is_cancelled_at_once_is_not_made() {
        let mut talk = Talk::new(Limits::default());
        let (mut to, _from, _served) = serve_one(&talk, 4096);
        let call = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": { "name": "t" } });
        let params = json!({ "requestId": 1 });
        let cancelled = json!({ "jsonrpc": "2.0", "method": "notifications/cancelled", "params": params });
        let ping = json!({ "jsonrpc": "2.0", "id": 2, "method": "ping" });
        to.write_all(format!("{call}\n{cancelled}\n{ping}\n").as_bytes()).await.unwrap();
        assert_eq!(talk.server().await.reads().await.unwrap()["method"], "ping");
        timeout(SOON, async {
            while lock(&talk.gate.reports).is_empty() {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap();
        assert_eq!(*lock(&talk.gate.reports), [("t".to_owned(), "cancelled".to_owned())]);
    }

    #[tokio::test]
    async fn a_stream_that_is_refused_once_is_opened_later() {
        let mut talk = Talk::new(Limits::default());
        let (mut to, from, _served) = serve_one(&talk, 4096);
        to.write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}\n").await.unwrap();
        let mut server = talk.server().await;
        let id = server.reads().await.unwrap()["id"].take();
        server.answers(&id, json!({})).await;
        let mut from = BufReader::new(from);
        timeout(SOON, line(&mut from, 4096)).await.unwrap().unwrap().unwrap();
        let other = talk.conversation.listen(talk.agent.clone(), None).await.unwrap();
        to.write_all(b"{\"jsonrpc\":\"2.0\",\"method\":\"notifications/initialized\"}\n").await.unwrap();
        assert_eq!(server.reads().await.unwrap()["method"], "notifications/initialized");
        sleep(Duration::from_millis(100)).await;
        drop(other);
        sleep(Duration::from_millis(100)).await;
        server.says(json!({ "jsonrpc": "2.0", "method": "notifications/tools/list_changed" })).await;
        let heard = timeout(SOON, line(&mut from, 4096)).await.unwrap().unwrap().unwrap();
        let heard: Value = serde_json::from_slice(&heard).unwrap();
        assert_eq!(heard["method"], "notifications/tools/list_changed");
    }

    #[tokio::test]
    async fn a_line_that_is_too_long_ends_no_session() {
        let talk = Talk::new(Limits { agent_message: 100, ..Limits::default() });
        let (mut to, from, _served) = serve_one(&talk, 4096);
        let mut from = BufReader::new(from);
        let long = format!("{{\"{}\":1}}\n{}", "a".repeat(1 << 16), unknown(2));
        let writes = async { to.write_all(long.as_bytes()).await.unwrap() };
        let reads = async {
            for (id, code) in [(Value::Null, -32600), (json!(2), -32601)] {
                let answer = timeout(SOON, line(&mut from, 4096)).await.unwrap().unwrap().unwrap();
                let answer: Value = serde_json::from_slice(&answer).unwrap();
                assert_eq!((&answer["id"], &answer["error"]["code"]), (&id, &json!(code)));
            }
        };
        tokio::join!(writes, reads);
    }

    #[tokio::test]
    async fn a_session_ends_while_its_agent_does_not_read() {
        let talk = Talk::new(Limits { in_flight: 1, ..Limits::default() });
        let (mut to, _unread, served) = serve_one(&talk, 64);
        // Refused before it becomes a request: there is nothing to do but to say so.
        for _ in 0..8 {
            let _ = timeout(Duration::from_millis(50), to.write_all(b"no JSON\n")).await;
        }
        assert!(!served.is_finished());
        talk.conversation.end().await;
        timeout(SOON, served).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn an_agent_says_no_more_at_a_time_than_it_may() {
        let talk = Talk::new(Limits::default());
        let (mut to, from, _served) = serve_one(&talk, 4096);
        let mut from = BufReader::new(from);
        talk.gate.is_busy.store(true, Ordering::SeqCst);
        to.write_all(unknown(1).as_bytes()).await.unwrap();
        assert!(timeout(Duration::from_millis(200), line(&mut from, 4096)).await.is_err());
        talk.gate.is_busy.store(false, Ordering::SeqCst);
        assert!(timeout(SOON, line(&mut from, 4096)).await.unwrap().unwrap().is_some());
    }

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
