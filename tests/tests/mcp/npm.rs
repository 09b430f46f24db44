//! Agent and server are the npm package `@modelcontextprotocol/sdk`: protocol versions with sessions.

use std::time::Duration;

use anyhow::Result;
use authd::control::mcp::Limits;
use authd_tests::mcp::{HttpServer, Options, Peer, Serving, TOKEN, Upstream, peer, wait};
use serde_json::{Value, json};

pub struct Pair {
    pub server: HttpServer,
    pub gateway: Serving,
}

impl Pair {
    pub fn start(mode: &str, options: Options) -> Result<Self> {
        let server = HttpServer::start("server.mjs", mode)?;
        let gateway = Serving::start(&[("tools", Upstream::Url(server.url.clone()))], options)?;
        Ok(Self { server, gateway })
    }

    /// An agent that has begun a session.
    pub fn client(&self, caller: &str) -> Result<Peer> {
        let mut client = peer("client.mjs", &[&self.gateway.url("tools"), caller])?;
        client.ask(json!({ "do": "connect" }))?;
        Ok(client)
    }
}

#[test]
fn an_agent_lists_and_calls_what_it_may() -> Result<()> {
    for mode in ["http", "json"] {
        let pair = Pair::start(mode, Options::default())?;
        let mut client = pair.client("a")?;
        let names = client.names()?;
        assert!(names.contains(&"add".to_owned()) && !names.contains(&"secret".to_owned()), "{names:?}");
        assert_eq!(client.text("add", json!({ "a": 2, "b": 40 }))?, "42");
        let denied = client.call("secret", json!({}))?;
        assert_eq!(denied["is_error"], true);
        assert!(denied["text"].as_str().unwrap_or_default().contains("nobody may know the secret"), "{denied}");
        assert_eq!(denied["meta"]["authd/reason"], "action_denied");
        let seen = pair.server.seen()?;
        assert!(!seen.contains("of-the-agent") && seen.contains(&format!("Bearer {TOKEN}")), "{seen}");
        assert!(pair.gateway.script.outcomes("add")[0].starts_with("Answered { is_error: false"));
        assert!(pair.gateway.script.outcomes("secret")[0].starts_with("Denied"));
    }
    Ok(())
}

#[test]
fn a_call_tells_of_its_progress() -> Result<()> {
    let pair = Pair::start("http", Options::default())?;
    let mut client = pair.client("a")?;
    let done = client.ask(json!({ "do": "call", "name": "count", "arguments": { "to": 3 }, "progress": true }))?;
    assert_eq!(done["text"], "counted to 3");
    let steps: Vec<&Value> = done["progress"].as_array().into_iter().flatten().map(|told| &told["progress"]).collect();
    assert_eq!(steps, [1, 2, 3]);
    Ok(())
}

#[test]
fn a_call_waits_for_its_approval_and_is_made_then() -> Result<()> {
    let pair = Pair::start("http", Options::default())?;
    let mut client = pair.client("a")?;
    assert_eq!(client.text("refund", json!({ "amount": "50" }))?, "refunded 50");
    let call = json!({ "do": "call", "name": "refund", "arguments": { "amount": "100" }, "progress": true });
    let number = client.begin(call)?;
    pair.gateway.script.wait_for_calls("refund", 3)?;
    assert_eq!(pair.gateway.script.outcomes("refund").len(), 1, "it was made already");
    pair.gateway.script.approve("approval-100");
    let done = client.wait(number)?["result"].take();
    assert_eq!(done["text"], "refunded 100");
    assert_eq!(done["progress"][0]["message"], "waiting for approval approval-100");
    Ok(())
}

#[test]
fn a_call_that_nobody_approves_names_its_approval() -> Result<()> {
    let limits = Limits { approval: Duration::from_millis(300), ..Limits::default() };
    let pair = Pair::start("http", Options { limits, ..Options::default() })?;
    let mut client = pair.client("a")?;
    let result = client.call("refund", json!({ "amount": "100" }))?;
    assert_eq!(result["is_error"], true);
    assert_eq!(result["meta"]["authd/approval"], "approval-100");
    assert!(result["text"].as_str().unwrap_or_default().contains("approval-100"), "{result}");
    assert_eq!(pair.gateway.script.outcomes("refund"), ["Unapproved { approval: \"approval-100\" }"]);
    pair.gateway.script.approve("approval-100");
    assert_eq!(client.text("refund", json!({ "amount": "100" }))?, "refunded 100");
    Ok(())
}

#[test]
fn what_the_server_says_by_itself_arrives() -> Result<()> {
    let pair = Pair::start("http", Options::default())?;
    let mut client = pair.client("a")?;
    // The stream is opened by the client after its own time.
    let mut n = 0;
    wait("a notification", || {
        n += 1;
        let grown = client.text("grow", json!({ "name": format!("new-{n}") }));
        let notified = client.ask(json!({ "do": "notified" }));
        grown.is_ok() && notified.is_ok_and(|notified| notified[0] == "tools/list_changed")
    })?;
    assert!(client.names()?.contains(&"new-1".to_owned()));
    Ok(())
}

#[test]
fn a_server_may_ask_the_agents_model() -> Result<()> {
    let pair = Pair::start("http", Options::default())?;
    let mut client = pair.client("a")?;
    assert_eq!(client.text("ask", json!({ "question": "the answer?" }))?, "the model says: 42 (the answer?)");
    Ok(())
}

#[test]
fn a_cancelled_call_ends_at_the_server() -> Result<()> {
    let pair = Pair::start("http", Options::default())?;
    let mut client = pair.client("a")?;
    let number = client.begin(json!({ "do": "call", "name": "sleep", "arguments": { "name": "first" } }))?;
    pair.gateway.script.wait_for_calls("sleep", 1)?;
    // The call has to reach the server, or it would be cancelled before it was sent.
    wait("the call is sent", || pair.server.seen().is_ok_and(|seen| seen.matches("POST").count() >= 3))?;
    std::thread::sleep(Duration::from_millis(200));
    client.ask(json!({ "do": "cancel", "call": number }))?;
    wait("it was cancelled", || client.text("cancelled", json!({})).is_ok_and(|text| text == "first"))?;
    wait("a report", || pair.gateway.script.outcomes("sleep") == ["Cancelled { sent: true }"])
}

#[test]
fn a_call_that_is_cancelled_before_its_approval_is_never_made() -> Result<()> {
    let pair = Pair::start("http", Options::default())?;
    let mut client = pair.client("a")?;
    let number = client.begin(json!({ "do": "call", "name": "refund", "arguments": { "amount": "77" } }))?;
    pair.gateway.script.wait_for_calls("refund", 1)?;
    client.ask(json!({ "do": "cancel", "call": number }))?;
    wait("a report", || pair.gateway.script.outcomes("refund") == ["Cancelled { sent: false }"])?;
    pair.gateway.script.approve("approval-77");
    // Longer than until the gate would be asked again.
    std::thread::sleep(Duration::from_millis(3500));
    assert_eq!(pair.gateway.script.outcomes("refund").len(), 1);
    Ok(())
}

#[test]
fn a_servers_message_without_end_is_cut() -> Result<()> {
    for mode in ["http", "json"] {
        let limits = Limits { server_message: 64 << 10, ..Limits::default() };
        let pair = Pair::start(mode, Options { limits, ..Options::default() })?;
        let mut client = pair.client("a")?;
        assert_eq!(client.text("big", json!({ "bytes": 60 << 10 }))?.len(), 60 << 10);
        let number = client.begin(json!({ "do": "call", "name": "big", "arguments": { "bytes": 1 << 20 } }))?;
        let failed = client.wait(number)?;
        assert!(failed["error"]["message"].as_str().unwrap_or_default().contains("longer than 65536"), "{failed}");
        assert!(pair.gateway.script.outcomes("big")[1].contains("mcp_server_message_oversize"));
        assert_eq!(client.text("add", json!({ "a": 1, "b": 1 }))?, "2");
    }
    Ok(())
}

#[test]
fn a_session_that_was_ended_is_gone_on_both_sides() -> Result<()> {
    let pair = Pair::start("http", Options::default())?;
    let mut client = pair.client("a")?;
    assert_eq!(pair.gateway.sessions.len(), 1);
    client.ask(json!({ "do": "terminate" }))?;
    assert!(pair.gateway.sessions.is_empty());
    wait("the server's session ends", || pair.server.seen().is_ok_and(|seen| seen.contains("DELETE")))
}

#[test]
fn a_session_that_the_server_forgot_is_begun_anew() -> Result<()> {
    let pair = Pair::start("json", Options::default())?;
    let mut client = pair.client("a")?;
    assert_eq!(client.text("forget", json!({}))?, "all sessions");
    let add = json!({ "do": "call", "name": "add", "arguments": { "a": 1, "b": 1 } });
    assert_eq!(client.fails(add.clone())?["code"], 404);
    let posts = |seen: String| seen.matches("POST").count();
    let before = posts(pair.server.seen()?);
    assert_eq!(client.fails(add)?["code"], 404);
    // The server is not asked again and again.
    assert_eq!(posts(pair.server.seen()?), before);
    assert_eq!(pair.client("a")?.text("add", json!({ "a": 1, "b": 1 }))?, "2");
    Ok(())
}
