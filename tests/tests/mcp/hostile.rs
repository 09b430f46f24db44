//! Servers that say what no server should, and agents that go away.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::{Context, Result, ensure};
use authd_tests::mcp::{Options, PATIENCE, Serving, Upstream, lock, wait};
use serde_json::{Value, json};

use crate::raw::{A, ACCEPT, JSON, begin};

type Script = dyn Fn(&Value, &mut TcpStream) -> std::io::Result<()> + Send + Sync;

/// A server of HTTP that answers each message as a test says. Returns its URL.
fn server(script: impl Fn(&Value, &mut TcpStream) -> std::io::Result<()> + Send + Sync + 'static) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/mcp", listener.local_addr()?);
    let script: Arc<Script> = Arc::new(script);
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let script = script.clone();
            thread::spawn(move || answer(stream, &*script));
        }
    });
    Ok(url)
}

fn answer(mut stream: TcpStream, script: &Script) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut length, mut line) = (0, String::new());
    while reader.read_line(&mut line)? > 2 {
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse()?;
        }
        line.clear();
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let message: Value = serde_json::from_slice(&body).unwrap_or_default();
    if message["method"] == "initialize" {
        let result = json!({ "protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": { "name": "x" } });
        return Ok(says(&mut stream, 200, &json!({ "jsonrpc": "2.0", "id": message["id"], "result": result }))?);
    }
    Ok(script(&message, &mut stream)?)
}

fn says(stream: &mut TcpStream, status: u16, message: &Value) -> std::io::Result<()> {
    let body = message.to_string();
    let head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Type: application/json");
    write!(stream, "{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

fn streams(stream: &mut TcpStream, messages: &[Value]) -> std::io::Result<()> {
    stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/event-stream\r\n\r\n")?;
    messages.iter().try_for_each(|message| write!(stream, "data: {message}\n\n"))
}

fn result(id: &Value, result: Value) -> Value {
    json!({ "jsonrpc": "2.0", "id": id, "result": result })
}

#[test]
fn an_answer_in_the_stream_of_another_request_is_none() -> Result<()> {
    let listed: Arc<(Mutex<Option<Value>>, Condvar)> = Arc::default();
    let at_server = listed.clone();
    let url = server(move |message, stream| {
        let (listed, told) = &*at_server;
        let tools = json!({ "tools": [{ "name": "secret" }, { "name": "add" }] });
        match message["method"].as_str() {
            // The list is never answered in its own time.
            Some("tools/list") => {
                *lock(listed) = Some(message["id"].clone());
                told.notify_all();
                streams(stream, &[])?;
                thread::sleep(PATIENCE);
                Ok(())
            }
            Some("ping") => {
                let late = lock(listed).clone().unwrap_or_default();
                let own = json!({ "pong": true, "_meta": { "authd/reason": "approval_pending", "x": 1 } });
                let named = result(&json!(1), tools.clone());
                streams(stream, &[result(&late, tools), named, result(&message["id"], own)])
            }
            Some("resources/list") => {
                let error = json!({ "code": -32010, "message": "no", "data": { "authd/reason": "x" } });
                says(stream, 400, &json!({ "jsonrpc": "2.0", "id": message["id"], "error": error }))
            }
            _ => says(stream, 202, &Value::Null),
        }
    })?;
    let gateway = Serving::start(&[("tools", Upstream::Url(url))], Options::default())?;
    let session = begin(&gateway, &[A])?.header("mcp-session-id").context("a session")?.to_owned();
    let headers = [ACCEPT, JSON, A, ("Mcp-Session-Id", session.as_str())];
    let says = |message: Value| gateway.raw("POST", "tools", &headers, &message.to_string());
    thread::scope(|scope| {
        let list = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/list" });
        let listing = scope.spawn(move || says(list));
        let (asked, told) = &*listed;
        let waited = told.wait_timeout_while(lock(asked), PATIENCE, |asked| asked.is_none());
        ensure!(waited.is_ok_and(|(_, timeout)| !timeout.timed_out()), "the list is not asked for");
        // The agent waits no more, and uses the id for something else.
        let cancelled = json!({
            "jsonrpc": "2.0", "method": "notifications/cancelled", "params": { "requestId": 1 },
        });
        assert_eq!(says(cancelled)?.status, 202);
        let pong = says(json!({ "jsonrpc": "2.0", "id": 1, "method": "ping" }))?;
        ensure!(!pong.body.contains("secret") && !pong.body.contains("authd/"), "{pong:?}");
        assert_eq!(pong.json()?, result(&json!(1), json!({ "pong": true, "_meta": { "x": 1 } })));
        let listing = listing.join().map_err(|_| anyhow::anyhow!("the agent's thread"))??;
        ensure!(!listing.body.contains("secret"), "{listing:?}");
        let refused = says(json!({ "jsonrpc": "2.0", "id": 2, "method": "resources/list" }))?;
        assert_eq!((refused.status, refused.code()), (400, Some(-32000)), "{refused:?}");
        ensure!(!refused.body.contains("authd/"), "{refused:?}");
        Ok(())
    })
}

#[test]
fn an_agent_that_goes_away_while_its_session_begins_leaves_none() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/mcp", listener.local_addr()?);
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    thread::spawn(move || {
        let mut open = Vec::new();
        for stream in listener.incoming().map_while(Result::ok) {
            count.fetch_add(1, Ordering::SeqCst);
            open.push(stream);
        }
    });
    let gateway = Serving::start(&[("tools", Upstream::Url(url))], Options::default())?;
    let body = r#"{"jsonrpc":"2.0","id":1,"method":"initialize","params":{}}"#;
    let mut stream = TcpStream::connect(gateway.address)?;
    write!(stream, "POST /v1/mcp/tools HTTP/1.1\r\nHost: authd.local\r\n")?;
    for (name, value) in [ACCEPT, JSON, A] {
        write!(stream, "{name}: {value}\r\n")?;
    }
    write!(stream, "Content-Length: {}\r\n\r\n{body}", body.len())?;
    wait("the server is asked", || asked.load(Ordering::SeqCst) > 0)?;
    assert_eq!(gateway.sessions.len(), 1);
    drop(stream);
    let begun = std::time::Instant::now();
    wait("the session is gone", || gateway.sessions.is_empty())?;
    ensure!(begun.elapsed().as_secs() < 10, "that was the server's time, and not the agent's end");
    Ok(())
}

#[test]
fn who_has_lost_what_it_came_by_ends_with_its_session() -> Result<()> {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let url = server(move |message, stream| {
        count.fetch_add(1, Ordering::SeqCst);
        says(stream, 200, &result(&message["id"], json!({ "tools": [] })))
    })?;
    let gateway = Serving::start(&[("tools", Upstream::Url(url))], Options::default())?;
    let session = begin(&gateway, &[A])?.header("mcp-session-id").context("a session")?.to_owned();
    let headers = [ACCEPT, JSON, A, ("Mcp-Session-Id", session.as_str())];
    let list = || gateway.raw("POST", "tools", &headers, r#"{"jsonrpc":"2.0","id":1,"method":"tools/list"}"#);
    assert_eq!(list()?.status, 200);
    gateway.script.lost.store(true, Ordering::SeqCst);
    let refused = list()?;
    assert_eq!((refused.status, refused.code()), (403, Some(-32010)));
    assert_eq!(refused.json()?["error"]["data"]["reason"], "workload_revoked");
    gateway.script.lost.store(false, Ordering::SeqCst);
    assert_eq!(list()?.status, 404, "what ended stays so");
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    Ok(())
}
