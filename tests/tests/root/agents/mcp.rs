//! Agents and servers of others, unmodified, on both sides of the MCP gateway of the real daemon.

use std::{fs, net::TcpListener, process::Command};

use anyhow::{Context, Result, ensure};
use authd::proofs::jws;
use authd_tests::{
    daemon::{Daemon, binary},
    mcp::{HttpServer, Peer, command},
    others::{self, AuthorizationServer},
    probe,
    sandbox::Sandbox,
};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use super::exchange::{self, OWN};
use crate::{Verdict, reload::wait_until, trial};

/// Only where the programs of others were fetched: emulated machines have no network.
pub fn trials() -> Vec<Trial> {
    if others::directory().is_none() {
        return Vec::new();
    }
    vec![
        trial("agents_call_tools_through_the_gateway", agents_call_tools_through_the_gateway),
        trial("agents_come_over_loopback_too", agents_come_over_loopback_too),
        trial("an_agent_calls_tools_for_somebody", an_agent_calls_tools_for_somebody),
        trial("a_policy_ends_what_the_gateway_lets_pass", a_policy_ends_what_the_gateway_lets_pass),
    ]
}

const A: &str = "/agents/a";
const AUDIENCE: &str = "https://tools.example.org";
const LEAD: &str = "40001";

const ACTIONS: &str = r#"
@id("sums")
permit (principal in Kind::"agent", action == Action::"add", resource);
@id("large-refunds") @approval("leads")
permit (principal in Kind::"agent", action == Action::"refund", resource);
"#;

struct Scene {
    sandbox: Sandbox,
    daemon: Daemon,
    server: HttpServer,
}

impl Scene {
    fn new(program: &str) -> Result<Self> {
        Self::with(program, "", "")
    }

    fn with(program: &str, more: &str, settings: &str) -> Result<Self> {
        let sandbox = Sandbox::new()?;
        sandbox.add_settings(&format!("issuer.url = \"{OWN}\"\n{settings}"))?;
        let server = HttpServer::start(program, "http")?;
        fs::write(sandbox.policy_directory().join("actions.cedar"), ACTIONS)?;
        sandbox.write_policy(&format!(
            r#"
trust_domain = "example.org"
[[workload]]
name = "agent"
kind = "agent"
cgroup = "/agents/*"
[[workload]]
name = "service"
kind = "service"
cgroup = "/service"
[[mcp_server]]
name = "tools"
url = "{}"
audience = "{AUDIENCE}"
scopes = ["tools:call"]
[[tool]]
name = "add"
server = "tools"
arguments = {{ a = "long", b = "long" }}
[[tool]]
name = "refund"
server = "tools"
arguments = {{ amount = "string" }}
[[approvers]]
name = "leads"
users = ["{LEAD}"]
{more}
"#,
            server.url
        ))?;
        let daemon = sandbox.start()?;
        wait_until("the control process", || Ok(daemon.status()?.control_ready)).with_context(|| daemon.log())?;
        Ok(Self { sandbox, daemon, server })
    }

    /// An agent in a cgroup, which starts `authd mcp` as it would start any server.
    fn agent(&self, cgroup: &str, program: &str, mode: &[&str]) -> Result<Peer> {
        let cgroup = self.sandbox.cgroup.child(cgroup)?;
        self.daemon.status()?;
        let (authd, settings) = (binary().display().to_string(), self.sandbox.settings().display().to_string());
        let mut probe = Command::new(probe::binary());
        probe.arg("--cgroup").arg(&cgroup).arg("--netns").arg(self.sandbox.netns.path()).args(["exec", "--"]);
        probe.args(command(program)?).args(mode).args(["stdio", &authd, "--config", &settings, "mcp", "tools"]);
        Peer::start(&mut probe)
    }

    fn approve(&self, id: &str) -> Result<()> {
        let (authd, settings) = (binary().display().to_string(), self.sandbox.settings().display().to_string());
        let user = ["--uid", LEAD, "run", "--"];
        let command = [&user[..], &[&authd, "--config", &settings, "approve", "grant", id]].concat();
        let outcome = self.sandbox.probe("/people", &command)?;
        ensure!(outcome.ok, "{outcome:?}");
        Ok(())
    }

    /// The token that the server got last.
    fn shown(&self) -> Result<String> {
        let seen = self.server.seen()?;
        let (_, rest) = seen.rsplit_once("Bearer ").with_context(|| seen.clone())?;
        let is_of_token = |c: &char| c.is_ascii_alphanumeric() || "-_.".contains(*c);
        Ok(rest.chars().take_while(is_of_token).collect())
    }
}

fn agents_call_tools_through_the_gateway() -> Result<Verdict> {
    for (server, agents) in [
        ("server.mjs", &[("client.mjs", &[][..])][..]),
        ("server.py", &[("client.py", &["auto"][..]), ("client2.mjs", &["auto"])]),
    ] {
        let mut jose = AuthorizationServer::start()?;
        let scene = Scene::new(server)?;
        for (program, mode) in agents {
            let mut agent = scene.agent(A, program, mode)?;
            agent.ask(json!({ "do": "connect" }))?;
            let mut names = agent.names()?;
            names.sort();
            ensure!(names == ["add", "refund"], "{program}: {names:?}");
            ensure!(agent.text("add", json!({ "a": 2, "b": 40 }))? == "42");
            // What no policy permits, and what does not fit, never comes to the server.
            for (tool, arguments) in [("secret", json!({})), ("add", json!({ "a": 2, "b": 40, "c": 1 }))] {
                let denied = agent.call(tool, arguments)?;
                ensure!(denied["is_error"] == true, "{program} {tool}: {denied}");
            }
            // What a person approves while it waits.
            let number = agent.begin(json!({ "do": "call", "name": "refund", "arguments": { "amount": program } }))?;
            let waiting = || -> Result<Option<String>> {
                let list = scene.daemon.command(&["approve", "list", "--json"])?;
                let list: Value = serde_json::from_slice(&list.stdout)?;
                let entry = list.as_array().into_iter().flatten().find(|entry| entry["state"] == "pending");
                Ok(entry.and_then(|entry| entry["id"].as_str()).map(str::to_owned))
            };
            wait_until("the question", || Ok(waiting()?.is_some()))?;
            scene.approve(&waiting()?.context("an approval")?)?;
            let answer = agent.wait(number)?;
            ensure!(answer["result"]["text"] == format!("refunded {program}"), "{program}: {answer}");
        }
        // The node's own token, and nothing of the agent's.
        let (header, claims) = jws::inspect(&scene.shown()?)?;
        ensure!(header["typ"] == "at+jwt" && claims["aud"] == json!([AUDIENCE]), "{claims:?}");
        ensure!(claims["sub"] == "spiffe://example.org/agent/a" && claims["scope"] == "tools:call", "{claims:?}");
        ensure!(!scene.server.seen()?.contains("of-the-agent"), "the agent's own token goes nowhere");
        scene.daemon.wait_for("the end of a call", |r| {
            r.event == "mcp_call_ended"
                && r.reason.as_deref() == Some("answered")
                && r.workload.as_deref() == Some("agent")
        })?;
        let target = authd::client::Target::Socket(scene.sandbox.directory().join("workload.sock"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let keys: Value = serde_json::from_slice(&runtime.block_on(authd::client::get(&target, "/v1/jwks"))?.body)?;
        jose.ask(&json!({
            "do": "verify", "token": scene.shown()?, "keys": keys, "issuer": OWN, "audience": AUDIENCE,
        }))?;
    }
    Ok(Verdict::Ran)
}

/// Agents that speak HTTP over TCP alone are known by the cgroups of their sockets.
fn agents_come_over_loopback_too() -> Result<Verdict> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let more = format!(
        "[[service]]\nname = \"gateway\"\naddresses = [\"127.0.0.1\"]\nports = [\"tcp/{port}\"]\n\
         [[rule]]\nname = \"agents-to-the-gateway\"\nfrom = [\"agent\"]\nto = [\"gateway\"]\n"
    );
    let scene = Scene::with("server.mjs", &more, &format!("mcp.listen = \"127.0.0.1:{port}\"\n"))?;
    let url = format!("http://127.0.0.1:{port}/v1/mcp/tools");
    // In the daemon's own network, as loopback is.
    let inside = |cgroup: &str, program: &[String]| -> Result<Command> {
        let cgroup = scene.sandbox.cgroup.child(cgroup)?;
        scene.daemon.status()?;
        let mut probe = Command::new(probe::binary());
        probe.arg("--cgroup").arg(&cgroup).args(["--netns", "/proc/self/ns/net", "exec", "--"]).args(program);
        Ok(probe)
    };
    for (program, mode) in [("client.mjs", &[][..]), ("client2.mjs", &["auto"]), ("client.py", &["auto"])] {
        let mut command_line = inside(A, &command(program)?)?;
        let mut agent = Peer::start(command_line.args(mode).arg(&url))?;
        agent.ask(json!({ "do": "connect" })).with_context(|| scene.daemon.log())?;
        ensure!(agent.text("add", json!({ "a": 2, "b": 40 }))? == "42", "{program}");
        ensure!(agent.call("secret", json!({}))?["is_error"] == true, "{program}");
    }
    let record = scene.daemon.wait_for("who called", |r| r.event == "action_decided")?;
    ensure!(record.cgroup.as_deref() == Some(A) && record.workload.as_deref() == Some("agent"), "{record:?}");
    // Nobody of the policy, nobody under another name, and nothing else.
    let curl = |cgroup: &str, arguments: &[&str]| -> Result<String> {
        let all = [&["curl", "-sS", "-m", "5", "-o", "-", "-w", " %{http_code}"][..], arguments].concat();
        let all: Vec<String> = all.into_iter().map(str::to_owned).collect();
        let output = inside(cgroup, &all)?.output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
    };
    let body = r#"{"jsonrpc":"2.0","id":1,"method":"ping"}"#;
    let headers = ["-H", "Content-Type: application/json", "-H", "Accept: application/json, text/event-stream"];
    let post = [&headers[..], &["-d", body]].concat();
    let at = |path: &str| format!("http://127.0.0.1:{port}{path}");
    let (mcp, grants, whoami) = (at("/v1/mcp/tools"), at("/v1/grants"), at("/v1/whoami"));
    for (cgroup, arguments, told) in [
        ("/elsewhere", [&post[..], &[&mcp]].concat(), "caller_unmanaged"),
        (A, [&post[..], &["-H", "Host: rebound.example", &mcp]].concat(), "mcp_host"),
        (A, [&post[..], &["-H", "Origin: https://rebound.example", &mcp]].concat(), "mcp_origin"),
        (A, vec![whoami.as_str()], "only MCP is spoken here"),
        (A, vec!["-X", "POST", grants.as_str()], "only MCP is spoken here"),
    ] {
        let answer = curl(cgroup, &arguments)?;
        ensure!(answer.contains(told), "{told} was expected: {answer}");
    }
    let answer = curl("/service", &[&post[..], &[&mcp]].concat())?;
    ensure!(!answer.contains("result"), "its rules do not let it come here: {answer}");
    Ok(Verdict::Ran)
}

/// For whom it acts, the server is told; what it may do there is what that one's token allows.
fn an_agent_calls_tools_for_somebody() -> Result<Verdict> {
    let server = HttpServer::start("server.mjs", "http")?;
    let policy = format!(
        r#"
trust_domain = "example.org"
[[workload]]
name = "agent"
kind = "agent"
cgroup = "/agents/*"
[[issuer]]
name = "corp"
kind = "jwt"
issuer = "https://idp.example.org"
jwks_file = "jwks.json"
algorithms = ["ES256"]
[[delegation]]
name = "agents-for-people"
actors = ["agent"]
issuer = "corp"
audiences = ["authd"]
scopes = ["tools:call"]
[[mcp_server]]
name = "tools"
url = "{}"
audience = "{AUDIENCE}"
scopes = ["tools:admin", "tools:call"]
[[tool]]
name = "add"
server = "tools"
arguments = {{ a = "long", b = "long" }}
"#,
        server.url
    );
    let actions = r#"
permit (principal, action == Action::"add", resource)
when { context has subject && context.subject.issuer == "corp" && context.subject.id == "alice" };
"#;
    let scene = exchange::Scene::with(&policy, actions)?;
    let key = scene.key()?;
    let agent = |token: &str| -> Result<Peer> {
        let cgroup = scene.sandbox.cgroup.child(A)?;
        let (authd, settings) = (binary().display().to_string(), scene.sandbox.settings().display().to_string());
        let mut probe = Command::new(probe::binary());
        probe.arg("--cgroup").arg(&cgroup).arg("--netns").arg(scene.sandbox.netns.path()).args(["exec", "--"]);
        probe.args(command("client.mjs")?).args(["stdio", &authd, "--config", &settings, "mcp", "tools"]);
        probe.args(["--token-file", &scene.file(token)?, "--dpop-key", &key.path()]);
        let mut peer = Peer::start(&mut probe)?;
        peer.ask(json!({ "do": "connect" })).with_context(|| scene.daemon.log())?;
        Ok(peer)
    };
    let of = |person: &str| scene.of(person, &json!({ "aud": ["authd"], "scope": "tools:call tools:other" }));
    let ((alice, jti), (bob, _)) = (of("alice")?, of("bob")?);
    let exchanged = |token: &str| scene.exchanged(A, token, &key, &[]);
    let mut for_bob = agent(&exchanged(&bob)?)?;
    ensure!(for_bob.call("add", json!({ "a": 2, "b": 40 }))?["is_error"] == true, "bob may not");
    let mut for_alice = agent(&exchanged(&alice)?)?;
    ensure!(for_alice.text("add", json!({ "a": 2, "b": 40 }))? == "42");
    let seen = server.seen()?;
    let is_of_token = |c: &char| c.is_ascii_alphanumeric() || "-_.".contains(*c);
    let shown: Vec<Value> = seen
        .split("Bearer ")
        .skip(1)
        .filter_map(|rest| jws::inspect(&rest.chars().take_while(is_of_token).collect::<String>()).ok())
        .map(|(_, claims)| Value::from(claims))
        .collect();
    let last = shown.iter().rev().find(|claims| claims["sub"] == "alice").with_context(|| seen.clone())?;
    ensure!(last["act"]["sub"] == "spiffe://example.org/agent/a" && last["scope"] == "tools:call", "{last}");
    ensure!(
        last["aud"] == json!([AUDIENCE]) && last["urn:authd:subject_issuer"] == authd_tests::trust::ISSUER,
        "{last}"
    );
    scene.authd(&["revoke", "token", authd_tests::trust::ISSUER, &jti])?;
    let denied = for_alice.call("add", json!({ "a": 2, "b": 40 }));
    ensure!(!denied.is_ok_and(|denied| denied["is_error"] != true), "her token was revoked");
    Ok(Verdict::Ran)
}

fn a_policy_ends_what_the_gateway_lets_pass() -> Result<Verdict> {
    let scene = Scene::new("server.mjs")?;
    let mut stranger = scene.agent("/service", "client.mjs", &[])?;
    ensure!(stranger.ask(json!({ "do": "connect" })).is_err(), "no policy lets it call a tool");
    let mut agent = scene.agent(A, "client.mjs", &[])?;
    agent.ask(json!({ "do": "connect" }))?;
    ensure!(agent.text("add", json!({ "a": 2, "b": 40 }))? == "42");
    let forbids = format!("{ACTIONS}\nforbid (principal, action == Action::\"add\", resource);\n");
    fs::write(scene.sandbox.policy_directory().join("actions.cedar"), forbids)?;
    scene.daemon.must_apply()?;
    wait_until("the next policy", || Ok(agent.call("add", json!({ "a": 2, "b": 40 }))?["is_error"] == true))?;
    fs::write(scene.sandbox.policy_directory().join("actions.cedar"), ACTIONS)?;
    scene.daemon.must_apply()?;
    wait_until("the policy before", || Ok(agent.call("add", json!({ "a": 2, "b": 40 }))?["is_error"] != true))?;
    let output = scene.daemon.command(&["revoke", "agent", "agent"])?;
    ensure!(output.status.success(), "{output:?}");
    let denied = agent.call("add", json!({ "a": 2, "b": 40 }))?;
    ensure!(
        denied["is_error"] == true && denied["text"].as_str().is_some_and(|text| text.contains("revoked")),
        "{denied}"
    );
    Ok(Verdict::Ran)
}
