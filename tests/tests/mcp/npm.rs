//! Agent and server are the npm package `@modelcontextprotocol/sdk`: protocol versions with sessions.

use anyhow::Result;
use authd_tests::mcp::{HttpServer, Options, Peer, Serving, TOKEN, Upstream, peer};
use serde_json::json;

struct Pair {
    server: HttpServer,
    gateway: Serving,
}

impl Pair {
    fn start(mode: &str, options: Options) -> Result<Self> {
        let server = HttpServer::start("server.mjs", mode)?;
        let gateway = Serving::start(&[("tools", Upstream::Url(server.url.clone()))], options)?;
        Ok(Self { server, gateway })
    }

    fn client(&self, caller: &str) -> Result<Peer> {
        peer("client.mjs", &[&self.gateway.url("tools"), caller])
    }
}

#[test]
fn an_agent_lists_and_calls_what_it_may() -> Result<()> {
    for mode in ["http", "json"] {
        let pair = Pair::start(mode, Options::default())?;
        let mut client = pair.client("a")?;
        let connected = client.ask(json!({ "do": "connect" }))?;
        assert_eq!(connected["server"], "tools");
        let session = connected["session"].as_str().unwrap_or_default();
        assert!(session.len() == 32 && !session.contains("upstream"), "{session}");
        let listed = client.ask(json!({ "do": "list" }))?;
        let names: Vec<&str> = listed.as_array().into_iter().flatten().filter_map(|name| name.as_str()).collect();
        assert!(names.contains(&"add") && !names.contains(&"secret"), "{names:?}");
        assert_eq!(client.call("add", json!({ "a": 2, "b": 40 }))?["text"], "42");
        let denied = client.call("secret", json!({}))?;
        assert_eq!(denied["is_error"], true);
        assert!(denied["text"].as_str().unwrap_or_default().contains("nobody may know the secret"), "{denied}");
        let seen = pair.server.seen()?;
        assert!(!seen.contains("of-the-agent") && seen.contains(&format!("Bearer {TOKEN}")), "{seen}");
    }
    Ok(())
}
