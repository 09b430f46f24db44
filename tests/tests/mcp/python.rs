//! Agents and servers of the PyPI package `mcp` and of the npm packages of its second generation: the stateless version.

use anyhow::{Context, Result};
use authd_tests::mcp::{HttpServer, Options, Peer, Serving, TOKEN, Upstream, lock, peer, wait};
use serde_json::json;

struct Pair {
    server: HttpServer,
    gateway: Serving,
}

impl Pair {
    fn start() -> Result<Self> {
        let server = HttpServer::start("server.py", "http")?;
        let gateway = Serving::start(&[("tools", Upstream::Url(server.url.clone()))], Options::default())?;
        Ok(Self { server, gateway })
    }

    fn client(&self, program: &str, mode: &str, version: &str) -> Result<Peer> {
        let mut client = peer(program, &[mode, &self.gateway.url("tools"), "a"])?;
        let connected = client.ask(json!({ "do": "connect" }))?;
        assert_eq!(connected["version"], version, "{program} {mode}");
        Ok(client)
    }
}

#[test]
fn agents_of_both_kinds_of_versions_list_and_call_what_they_may() -> Result<()> {
    let pair = Pair::start()?;
    for (program, mode, version) in [
        ("client.py", "auto", "2026-07-28"),
        ("client.py", "legacy", "2025-11-25"),
        ("client2.mjs", "auto", "2026-07-28"),
        ("client2.mjs", "legacy", "2025-11-25"),
    ] {
        let mut client = pair.client(program, mode, version)?;
        let names = client.names()?;
        assert!(names.contains(&"add".to_owned()) && !names.contains(&"secret".to_owned()), "{names:?}");
        assert_eq!(client.text("add", json!({ "a": 2, "b": 40 }))?, "42");
        let denied = client.call("secret", json!({}))?;
        assert_eq!(denied["is_error"], true, "{program} {mode}");
        assert!(denied["text"].as_str().unwrap_or_default().contains("nobody may know the secret"), "{denied}");
    }
    let seen = pair.server.seen()?;
    assert!(!seen.contains("of-the-agent") && seen.contains(&format!("Bearer {TOKEN}")), "{seen}");
    Ok(())
}

#[test]
fn a_stateless_call_is_held_approved_and_tells_of_its_progress() -> Result<()> {
    let pair = Pair::start()?;
    let mut client = pair.client("client.py", "auto", "2026-07-28")?;
    let call = json!({ "do": "call", "name": "refund", "arguments": { "amount": "100" }, "progress": true });
    let number = client.begin(call)?;
    pair.gateway.script.wait_for_calls("refund", 2)?;
    pair.gateway.script.approve("approval-100");
    let done = client.wait(number)?["result"].take();
    assert_eq!(done["text"], "refunded 100", "{done}");
    assert_eq!(done["progress"][0]["message"], "waiting for approval approval-100");
    let done = client.ask(json!({ "do": "call", "name": "count", "arguments": { "to": 3 }, "progress": true }))?;
    assert_eq!((&done["text"], done["progress"].as_array().map(Vec::len)), (&json!("counted to 3"), Some(3)));
    Ok(())
}

#[test]
fn a_stateless_call_that_goes_on_is_asked_about_again() -> Result<()> {
    let pair = Pair::start()?;
    for mode in ["auto", "legacy"] {
        let mut client = pair.client("client.py", mode, if mode == "auto" { "2026-07-28" } else { "2025-11-25" })?;
        assert_eq!(client.text("ask", json!({ "question": "the answer?" }))?, "the model says: 42 (the answer?)");
    }
    let asked = lock(&pair.gateway.script.asked);
    let [first, second, legacy] = &asked[..] else { panic!("{asked:?}") };
    assert!(first.rest.is_empty() && legacy.rest.is_empty());
    assert!(second.rest.contains_key("inputResponses"), "{:?}", second.rest);
    Ok(())
}

#[test]
fn a_stateless_call_is_cancelled_by_the_end_of_its_stream() -> Result<()> {
    let pair = Pair::start()?;
    let mut client = pair.client("client.py", "auto", "2026-07-28")?;
    let number = client.begin(json!({ "do": "call", "name": "sleep", "arguments": { "name": "first" } }))?;
    pair.gateway.script.wait_for_calls("sleep", 1)?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    client.ask(json!({ "do": "cancel", "call": number }))?;
    wait("it was cancelled", || client.text("cancelled", json!({})).is_ok_and(|text| text == "first"))?;
    wait("a report", || pair.gateway.script.outcomes("sleep") == ["Cancelled { sent: true }"])
}

#[test]
fn names_and_arguments_are_mirrored_into_headers() -> Result<()> {
    let pair = Pair::start()?;
    for program in ["client.py", "client2.mjs"] {
        let mut client = pair.client(program, "auto", "2026-07-28")?;
        client.names()?;
        assert_eq!(client.text("route", json!({ "region": "Zürich" }))?, "routed to Zürich");
        assert_eq!(client.text("grüße", json!({}))?, "grüße zurück");
    }
    let seen = pair.server.seen()?;
    let encoded = ["mcp-param-region", "=?base64?WsO8cmljaA==?=", "=?base64?Z3LDvMOfZQ==?="];
    for text in encoded {
        assert!(seen.contains(text), "{text}: {seen}");
    }
    let method = seen.find("mcp-method").context("a header")?;
    assert!(method > 0);
    Ok(())
}
