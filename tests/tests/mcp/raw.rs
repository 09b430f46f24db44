//! What no proper agent says, and what no proper gateway passes on.

use anyhow::{Context, Result};
use authd::control::mcp::{Limits, session::Bounds};
use authd_tests::mcp::{Answer, HttpServer, Options, Serving, Upstream, lock, raw, raw_until};
use serde_json::{Value, json};

use crate::npm::Pair;

pub const ACCEPT: (&str, &str) = ("Accept", "application/json, text/event-stream");
pub const JSON: (&str, &str) = ("Content-Type", "application/json");
pub const A: (&str, &str) = ("X-Test-Caller", "a");

pub fn begin(gateway: &Serving, headers: &[(&str, &str)]) -> Result<Answer> {
    let params =
        json!({ "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": { "name": "x", "version": "1" } });
    let message = json!({ "jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params });
    gateway.raw("POST", "tools", &[&[ACCEPT, JSON], headers].concat(), &message.to_string())
}

/// One message in a session of its own.
fn said(pair: &Pair, message: &str) -> Result<Answer> {
    let begun = begin(&pair.gateway, &[A])?;
    let session = begun.header("mcp-session-id").context("a session")?;
    pair.gateway.raw("POST", "tools", &[ACCEPT, JSON, A, ("Mcp-Session-Id", session)], message)
}

#[test]
fn nothing_of_either_side_is_carried_to_the_other() -> Result<()> {
    let pair = Pair::start("json", Options::default())?;
    let own = [A, ("Cookie", "agent=secret"), ("Authorization", "Bearer of-the-agent"), ("X-Agent", "secret")];
    let begun = begin(&pair.gateway, &own)?;
    assert_eq!(begun.status, 200);
    let session = begun.header("mcp-session-id").context("a session")?;
    assert!(!begun.head.contains("upstream") && !begun.head.to_lowercase().contains("set-cookie"), "{}", begun.head);
    let list = r#"{"jsonrpc":"2.0","id":1,"method":"tools/list"}"#;
    let headers = [&own[..], &[ACCEPT, JSON, ("Mcp-Session-Id", session), ("Mcp-Param-X", "y")]].concat();
    let listed = pair.gateway.raw("POST", "tools", &headers, list)?;
    assert_eq!(listed.status, 200);
    assert!(!listed.head.contains("upstream") && listed.header("mcp-session-id").is_none(), "{}", listed.head);
    let seen: Value = serde_json::from_str(&pair.server.seen()?)?;
    let mut names = std::collections::BTreeSet::new();
    for request in seen.as_array().context("a list")? {
        let headers: Vec<&str> =
            request["headers"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        names.extend(headers.chunks(2).map(|pair| pair[0].to_lowercase()));
        assert!(!headers.contains(&session), "{headers:?}");
    }
    let allowed = [
        "accept",
        "authorization",
        "content-length",
        "content-type",
        "host",
        "mcp-protocol-version",
        "mcp-session-id",
        "user-agent",
    ];
    assert_eq!(names.iter().map(String::as_str).collect::<Vec<_>>(), allowed);
    Ok(())
}

#[test]
fn a_message_that_can_be_read_in_two_ways_reaches_nobody() -> Result<()> {
    let pair = Pair::start("json", Options::default())?;
    for (message, reason) in [
        (r#"[{"jsonrpc":"2.0","id":1,"method":"tools/list"}]"#, "mcp_batch"),
        (
            r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"add","name":"secret"}}"#,
            "json_duplicate_member",
        ),
        (
            r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":{"value":1,"v\u0061lue":2}}}"#,
            "json_duplicate_member",
        ),
        (
            r#"{"jsonrpc":"2.0","id":1,"method":"ping","Method":"tools/call","params":{"name":"secret"}}"#,
            "mcp_alike_members",
        ),
        (
            r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","Name":"secret"}}"#,
            "mcp_alike_members",
        ),
    ] {
        let answer = said(&pair, message)?;
        assert_eq!(answer.status, 400, "{message}: {answer:?}");
        assert_eq!(answer.json()?["error"]["data"]["reason"], reason, "{message}");
    }
    assert!(lock(&pair.gateway.script.asked).is_empty());
    Ok(())
}

#[test]
fn a_call_is_a_call_however_its_method_is_written() -> Result<()> {
    let pair = Pair::start("json", Options::default())?;
    let call = |method: &str| {
        let message =
            format!(r#"{{"jsonrpc":"2.0","id":1,"method":"{method}","params":{{"name":"secret","arguments":{{}}}}}}"#);
        said(&pair, &message)?.json()
    };
    let escaped = call(r"\u0074ools\/c\u0061ll")?;
    assert_eq!(escaped["result"]["isError"], true, "{escaped}");
    assert_eq!(lock(&pair.gateway.script.asked).len(), 1);
    for method in ["Tools/call", "tools/call ", "tools//call", "tools/callx", "tools", "rpc.tools/call"] {
        assert_eq!(call(method)?["error"]["code"], -32601, "{method}");
    }
    assert_eq!(lock(&pair.gateway.script.asked).len(), 1);
    Ok(())
}

#[test]
fn a_session_is_its_callers_alone() -> Result<()> {
    let pair = Pair::start("json", Options::default())?;
    let begun = begin(&pair.gateway, &[A])?;
    let session = begun.header("mcp-session-id").context("a session")?;
    let list = r#"{"jsonrpc":"2.0","id":1,"method":"tools/list"}"#;
    for (method, body) in [("POST", list), ("GET", ""), ("DELETE", "")] {
        let headers = [ACCEPT, JSON, ("X-Test-Caller", "b"), ("Mcp-Session-Id", session)];
        assert_eq!(pair.gateway.raw(method, "tools", &headers, body)?.status, 404, "{method}");
        let headers = [ACCEPT, JSON, A, ("Mcp-Session-Id", "upstream-1")];
        assert_eq!(pair.gateway.raw(method, "tools", &headers, body)?.status, 404, "{method}");
        assert_eq!(pair.gateway.raw(method, "tools", &[ACCEPT, JSON, A], body)?.status, 400, "{method}");
    }
    let ours = [ACCEPT, JSON, A, ("Mcp-Session-Id", session)];
    assert_eq!(pair.gateway.raw("POST", "tools", &ours, list)?.status, 200);
    let other_version = [&ours[..], &[("MCP-Protocol-Version", "2025-06-18")]].concat();
    assert_eq!(pair.gateway.raw("POST", "tools", &other_version, list)?.status, 400);
    Ok(())
}

#[test]
fn requests_that_are_no_agents_are_refused() -> Result<()> {
    let limits = Limits { agent_message: 10_000, ..Limits::default() };
    let pair = Pair::start("json", Options { limits, ..Options::default() })?;
    let status =
        |headers: &[(&str, &str)], body: &str| anyhow::Ok(pair.gateway.raw("POST", "tools", headers, body)?.status);
    assert_eq!(begin(&pair.gateway, &[A, ("Origin", "http://evil.example")])?.status, 403);
    assert_eq!(begin(&pair.gateway, &[A, ("Origin", "null")])?.status, 403);
    let ping = r#"{"jsonrpc":"2.0","id":1,"method":"ping"}"#;
    assert_eq!(status(&[("Accept", "application/json"), JSON, A], ping)?, 406);
    assert_eq!(status(&[ACCEPT, ("Content-Type", "text/plain"), A], ping)?, 415);
    let long = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"ping","params":{{"x":"{}"}}}}"#, "x".repeat(10_000));
    assert_eq!(status(&[ACCEPT, JSON, A], &long)?, 413);
    assert_eq!(status(&[ACCEPT, JSON, A, ("MCP-Protocol-Version", "2031-01-01")], ping)?, 400);
    assert_eq!(pair.gateway.raw("PUT", "tools", &[ACCEPT, JSON, A], ping)?.status, 405);
    assert_eq!(pair.gateway.raw("POST", "other", &[ACCEPT, JSON, A], ping)?.status, 404);
    assert_eq!(pair.server.seen()?, "[]");
    Ok(())
}

#[test]
fn an_answer_that_nobody_asked_for_is_refused() -> Result<()> {
    let pair = Pair::start("json", Options::default())?;
    let answer = said(&pair, r#"{"jsonrpc":"2.0","id":0,"result":{}}"#)?;
    assert_eq!((answer.status, &answer.json()?["error"]["data"]["reason"]), (400, &json!("mcp_not_asked")));
    assert_eq!(said(&pair, r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#)?.status, 202);
    assert_eq!(said(&pair, r#"{"jsonrpc":"2.0","method":"notifications/other"}"#)?.status, 400);
    Ok(())
}

#[test]
fn a_caller_has_so_many_sessions_and_no_more() -> Result<()> {
    let bounds = Bounds { per_caller: 2, all: 3, ..Bounds::default() };
    let pair = Pair::start("json", Options { bounds, ..Options::default() })?;
    let statuses = ["a", "a", "a", "b", "c"].map(|caller| begin(&pair.gateway, &[("X-Test-Caller", caller)]));
    let statuses: Vec<u16> = statuses.into_iter().map(|answer| answer.map(|a| a.status)).collect::<Result<_>>()?;
    assert_eq!(statuses, [200, 200, 503, 200, 503]);
    Ok(())
}

#[test]
fn who_has_to_show_a_token_learns_where_to_get_one() -> Result<()> {
    let pair = Pair::start("json", Options { challenges: true, ..Options::default() })?;
    let refused = begin(&pair.gateway, &[("X-Test-Caller", "stranger")])?;
    let metadata = "https://node.example.org:7443/.well-known/oauth-protected-resource/v1/mcp/tools";
    assert_eq!(refused.status, 401);
    assert_eq!(refused.header("www-authenticate"), Some(format!("Bearer resource_metadata=\"{metadata}\"").as_str()));
    let path = "/.well-known/oauth-protected-resource/v1/mcp/tools";
    let found = raw(pair.gateway.address, "GET", path, &[], "")?.json()?;
    assert_eq!(found["resource"], "https://node.example.org:7443/v1/mcp/tools");
    assert_eq!(found["authorization_servers"], json!(["https://idp.example.org"]));
    let call = r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"secret"}}"#;
    let denied = said(&pair, call)?;
    assert_eq!(denied.status, 403);
    let challenge = denied.header("www-authenticate").unwrap_or_default();
    assert!(challenge.contains("error=\"insufficient_scope\", scope=\"secrets:read\""), "{challenge}");
    Ok(())
}

#[test]
fn a_stream_that_broke_goes_on_where_it_was() -> Result<()> {
    let pair = Pair::start("resumable", Options::default())?;
    let begun = begin(&pair.gateway, &[A])?;
    let session = begun.header("mcp-session-id").context("a session")?;
    let headers = [ACCEPT, JSON, A, ("Mcp-Session-Id", session), ("MCP-Protocol-Version", "2025-11-25")];
    let initialized = r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#;
    assert_eq!(pair.gateway.raw("POST", "tools", &headers, initialized)?.status, 202);
    let call = json!({ "jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {
        "name": "count", "arguments": { "to": 20 }, "_meta": { "progressToken": "p" } } });
    let path = "/v1/mcp/tools";
    let (text, stream) = raw_until(pair.gateway.address, "POST", path, &headers, &call.to_string(), "\"progress\":2")?;
    drop(stream);
    // What was read at once may be more than that event, and may end within another one.
    let (whole, _) = text.rsplit_once("\n\n").context("an event")?;
    let last = whole.lines().rev().find_map(|line| line.strip_prefix("id: ")).context("an event's id")?;
    let tells = |text: &str, n: u32| text.contains(&format!("\"progress\":{n},"));
    let heard = (2..20).rev().find(|n| tells(whole, *n)).context("progress")?;
    std::thread::sleep(std::time::Duration::from_millis(200));
    let resume = [&headers[..], &[("Last-Event-ID", last)]].concat();
    let (text, _stream) = raw_until(pair.gateway.address, "GET", path, &resume, "", "counted to 20")?;
    assert!(tells(&text, heard + 1) && !tells(&text, heard), "{heard} was heard: {text}");
    assert!(pair.gateway.script.outcomes("count")[0].starts_with("Answered { is_error: false"));
    Ok(())
}

#[test]
fn headers_of_the_stateless_version_must_agree_with_the_body() -> Result<()> {
    let server = HttpServer::start("server.py", "http")?;
    let gateway = Serving::start(&[("tools", Upstream::Url(server.url.clone()))], Options::default())?;
    let meta = json!({
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {},
        "io.modelcontextprotocol/clientInfo": { "name": "x", "version": "1" },
    });
    let params = json!({ "name": "secret", "arguments": {}, "_meta": meta });
    let call = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params }).to_string();
    let version = ("MCP-Protocol-Version", "2026-07-28");
    let (method, name) = (("Mcp-Method", "tools/call"), ("Mcp-Name", "secret"));
    for wrong in [
        &[version, ("Mcp-Method", "ping"), name][..],
        &[version, method, ("Mcp-Name", "add")],
        &[version, method],
        &[version, name],
        &[method, name],
        &[version, method, name, ("Mcp-Param-Region", "eu")],
    ] {
        let answer = gateway.raw("POST", "tools", &[&[ACCEPT, JSON, A], wrong].concat(), &call)?;
        assert_eq!((answer.status, answer.code()), (400, Some(-32020)), "{wrong:?}: {answer:?}");
    }
    assert!(lock(&gateway.script.asked).is_empty());
    let right = [ACCEPT, JSON, A, version, method, name];
    let denied = gateway.raw("POST", "tools", &right, &call)?.json()?;
    assert_eq!((&denied["result"]["isError"], &denied["result"]["resultType"]), (&json!(true), &json!("complete")));
    let begin = call.replace("tools/call", "initialize");
    let answer = gateway.raw("POST", "tools", &[ACCEPT, JSON, A, version, ("Mcp-Method", "initialize")], &begin)?;
    assert_eq!((answer.status, answer.code()), (404, Some(-32601)));
    assert_eq!(server.seen()?, "[]");
    Ok(())
}
