//! Tokens that are exchanged for narrower ones: what an agent gets, what it does not, and what ends it.

use std::{collections::BTreeSet, fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use authd::{
    client::{self, Target},
    proofs::jws,
};
use authd_tests::{
    daemon::Daemon,
    others::{self, AuthorizationServer},
    probe::Running,
    sandbox::Sandbox,
    trust::{Authority, ISSUER, Issuer},
};
use libtest_mimic::Trial;
use serde_json::{Map, Value, json};

use crate::{Verdict, reload::wait_until, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("an_agent_acts_as_far_as_it_was_given", an_agent_acts_as_far_as_it_was_given),
        trial("nobody_gets_a_token_that_no_delegation_gives", nobody_gets_more),
        trial("what_a_token_was_exchanged_for_ends_it", what_a_token_was_exchanged_for_ends_it),
        trial("an_agent_that_is_revoked_has_no_tokens", an_agent_that_is_revoked_has_no_tokens),
        trial("a_node_signs_with_another_key", a_node_signs_with_another_key),
        trial("a_peer_acts_by_its_certificate", a_peer_acts_by_its_certificate),
    ]
}

pub const OWN: &str = "https://authd.test:7443";
const A: &str = "/agents/a.scope";
const B: &str = "/agents/b.scope";
const WRITER: &str = "/writers/w";

const POLICY: &str = r#"
trust_domain = "example.org"
[[workload]]
name = "agent"
kind = "agent"
cgroup = "/agents/*"
tenant = "acme"
[[workload]]
name = "writer"
kind = "agent"
cgroup = "/writers/*"
tenant = "acme"
[[workload]]
name = "service"
kind = "service"
cgroup = "/service"
[[issuer]]
name = "corp"
kind = "jwt"
issuer = "https://idp.example.org"
jwks_file = "jwks.json"
algorithms = ["ES256"]
max_ttl = "1h"
[[authority]]
name = "ca"
bundle = "ca.crt"
trust_domain = "example.org"
[[peer]]
name = "remote-agent"
kind = "agent"
spiffe_id = "spiffe://example.org/elsewhere/agent"
tenant = "acme"
[[service]]
name = "ledger"
addresses = ["127.0.0.0/8"]
ports = ["tcp/7101"]
[[delegation]]
name = "agents-for-people"
actors = ["agent", "remote-agent"]
issuer = "corp"
subjects = ["alice", "bob"]
audiences = ["ledger", "spiffe://example.org/writer/w"]
scopes = ["ledger:read", "ledger:write"]
ttl = "2m"
[[delegation]]
name = "writers-for-agents"
actors = ["writer"]
issuer = "own"
audiences = ["ledger"]
scopes = ["ledger:read"]
depth = 2
hands_on = ["agent"]
[[rule]]
name = "read-ledger"
from = ["agent", "writer"]
to = ["ledger"]
require = ["cgroup", "token"]
token = { issuer = "own", audience = "ledger", scopes = ["ledger:read"], bound = true }
"#;

pub struct Scene {
    pub sandbox: Sandbox,
    pub daemon: Daemon,
    pub issuer: Issuer,
    pub authority: Authority,
    _server: Running,
}

/// A file with a key, and what proves with it.
pub struct Key(PathBuf);

impl Scene {
    fn new() -> Result<Self> {
        Self::started("", Sandbox::start)
    }

    pub fn started(settings: &str, start: impl FnOnce(&Sandbox) -> Result<Daemon>) -> Result<Self> {
        Self::of_policy(POLICY, "", settings, start)
    }

    /// One whose action policy says something.
    pub fn with(policy: &str, actions: &str) -> Result<Self> {
        Self::of_policy(policy, actions, "", Sandbox::start)
    }

    fn of_policy(
        policy: &str,
        actions: &str,
        settings: &str,
        start: impl FnOnce(&Sandbox) -> Result<Daemon>,
    ) -> Result<Self> {
        let sandbox = Sandbox::new()?;
        sandbox.add_settings(settings)?;
        sandbox.add_settings(&format!("issuer.url = \"{OWN}\"\n"))?;
        let issuer = Issuer::new("k1")?;
        let authority = Authority::new("tests")?;
        fs::write(sandbox.policy_directory().join("jwks.json"), issuer.jwks()?)?;
        fs::write(sandbox.policy_directory().join("ca.crt"), authority.pem())?;
        let address = rcgen::SanType::IpAddress("192.0.2.1".parse()?);
        authority.issue(sandbox.directory(), "listener", vec![address])?;
        fs::write(sandbox.policy_directory().join("actions.cedar"), actions)?;
        sandbox.write_policy(policy)?;
        let daemon = start(&sandbox)?;
        wait_until("the control process", || Ok(daemon.status()?.control_ready)).with_context(|| daemon.log())?;
        let server = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7101"])?;
        Ok(Self { sandbox, daemon, issuer, authority, _server: server })
    }

    pub fn file(&self, text: &str) -> Result<String> {
        let path = self.sandbox.directory().join(format!("file-{:x}", rand::random::<u64>()));
        fs::write(&path, text)?;
        Ok(path.display().to_string())
    }

    pub fn key(&self) -> Result<Key> {
        Ok(Key(self.file(&rcgen::KeyPair::generate()?.serialize_pem())?.into()))
    }

    /// A person's token.
    pub fn of(&self, subject: &str, changed: &Value) -> Result<(String, String)> {
        let jti = format!("{:x}", rand::random::<u128>());
        let mut claims = json!({ "sub": subject, "jti": jti, "scope": "ledger:read ledger:write admin",
            "aud": ["ledger", "wiki", "spiffe://example.org/writer/w"] });
        for (name, value) in changed.as_object().into_iter().flatten() {
            claims[name] = value.clone();
        }
        Ok((self.issuer.token(&claims)?, jti))
    }

    /// `authd token exchange` from a cgroup: the answer, as JSON.
    pub fn exchange(&self, cgroup: &str, token: &str, key: Option<&Key>, more: &[&str]) -> Result<Value> {
        let file = self.file(token)?;
        let mut arguments = vec!["token", "exchange", "--json", "--subject-token-file", &file];
        let path = key.map(Key::path);
        if let Some(path) = &path {
            arguments.extend(["--dpop-key", path.as_str()]);
        }
        arguments.extend(more);
        let outcome = self.sandbox.authd_in(cgroup, &arguments)?;
        serde_json::from_str(outcome.detail.trim()).with_context(|| format!("{outcome:?}\n{}", self.daemon.log()))
    }

    pub fn exchanged(&self, cgroup: &str, token: &str, key: &Key, more: &[&str]) -> Result<String> {
        let answer = self.exchange(cgroup, token, Some(key), more)?;
        let token = answer["access_token"].as_str();
        Ok(token.with_context(|| format!("{answer}\n{}", self.daemon.log()))?.to_owned())
    }

    pub fn refused(&self, cgroup: &str, token: &str, key: Option<&Key>, more: &[&str], why: [&str; 2]) -> Result<()> {
        let answer = self.exchange(cgroup, token, key, more)?;
        ensure!(answer["error"] == why[0] && answer["reason"] == why[1], "{why:?} was expected: {answer}");
        let is_it = |event: &str| matches!(event, "token_exchanged" | "caller_refused");
        self.daemon.wait_for(why[1], |r| is_it(&r.event) && r.reason.as_deref() == Some(why[1]))?;
        Ok(())
    }

    pub fn grant(&self, cgroup: &str, token: &str, key: &Key) -> Result<Value> {
        let (file, key) = (self.file(token)?, key.path());
        let arguments = ["grant", "--json", "--rule", "read-ledger", "--token-file", &file, "--dpop-key", &key];
        let outcome = self.sandbox.authd_in(cgroup, &arguments)?;
        serde_json::from_str(outcome.detail.trim()).with_context(|| format!("{outcome:?}\n{}", self.daemon.log()))
    }

    pub fn granted(&self, cgroup: &str, token: &str, key: &Key) -> Result<()> {
        let answer = self.grant(cgroup, token, key)?;
        ensure!(answer["id"].is_string(), "{answer}\n{}", self.daemon.log());
        Ok(())
    }

    pub fn not_granted(&self, cgroup: &str, token: &str, key: &Key, reason: &str) -> Result<()> {
        let answer = self.grant(cgroup, token, key)?;
        ensure!(answer["reason"] == reason, "{reason} was expected: {answer}");
        Ok(())
    }

    pub fn passes(&self, cgroup: &str, passes: bool) -> Result<()> {
        let outcome = self.sandbox.probe(cgroup, &["tcp", "127.0.0.1:7101"])?;
        ensure!((outcome.ok) == passes, "{outcome:?}");
        Ok(())
    }

    /// What anybody can ask of the local socket.
    pub fn get(&self, path: &str) -> Result<Value> {
        let target = Target::Socket(self.sandbox.directory().join("workload.sock"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(serde_json::from_slice(&runtime.block_on(client::get(&target, path))?.body)?)
    }

    pub fn kids(&self) -> Result<BTreeSet<String>> {
        let keys = self.get("/v1/jwks")?;
        let kids = keys["keys"].as_array().context("a key set")?.iter();
        Ok(kids.filter_map(|key| key["kid"].as_str().map(str::to_owned)).collect())
    }

    pub fn authd(&self, arguments: &[&str]) -> Result<()> {
        let output = self.daemon.command(arguments)?;
        ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

impl Key {
    pub fn path(&self) -> String {
        self.0.display().to_string()
    }
}

fn claims(token: &str) -> Result<(Map<String, Value>, Map<String, Value>)> {
    Ok(jws::inspect(token)?)
}

fn an_agent_acts_as_far_as_it_was_given() -> Result<Verdict> {
    let scene = Scene::new()?;
    let (key, other) = (scene.key()?, scene.key()?);
    let (alice, _) = scene.of("alice", &json!({}))?;
    scene.passes(A, false)?;
    let answer = scene.exchange(A, &alice, Some(&key), &["--audience", "ledger", "--scope", "ledger:read"])?;
    let (expires_in, token) = (answer["expires_in"].as_u64(), answer["access_token"].as_str().context("a token")?);
    ensure!(answer["token_type"] == "DPoP" && answer["scope"] == "ledger:read", "{answer}");
    ensure!(answer["issued_token_type"] == "urn:ietf:params:oauth:token-type:access_token", "{answer}");
    ensure!(expires_in.is_some_and(|seconds| (100..=120).contains(&seconds)), "{answer}");
    let (header, said) = claims(token)?;
    ensure!(header["typ"] == "at+jwt" && scene.kids()?.contains(header["kid"].as_str().unwrap_or_default()));
    let me = "spiffe://example.org/agent/a";
    for (name, value) in [
        ("iss", json!(OWN)),
        ("sub", json!("alice")),
        ("aud", json!(["ledger"])),
        ("scope", json!("ledger:read")),
        ("client_id", json!(me)),
        ("act", json!({ "iss": OWN, "sub": me })),
        ("urn:authd:tenant", json!("acme")),
    ] {
        ensure!(said[name] == value, "{name}: {}", said[name]);
    }
    ensure!(said["cnf"]["jkt"].is_string() && said["cnf"].as_object().is_some_and(|cnf| cnf.len() == 1), "{said:?}");
    let record = scene.daemon.wait_for("the exchange", |r| r.event == "token_exchanged")?;
    let issued = record.issued.context("what was issued")?;
    ensure!(record.delegation.as_deref() == Some("agents-for-people") && record.workload.as_deref() == Some("agent"));
    ensure!(issued.actors == [me] && issued.scopes == ["ledger:read"] && issued.subject.as_deref() == Some("alice"));
    ensure!(record.proofs[0].issuer.as_deref() == Some(ISSUER), "{:?}", record.proofs);

    // Of use to the agent that got it, with the key that it is bound to.
    scene.not_granted(A, token, &other, "dpop_key_mismatch")?;
    scene.not_granted(B, token, &key, "token_of_another_actor")?;
    scene.granted(A, token, &key)?;
    scene.passes(A, true)?;
    scene.passes(B, false)?;

    // Handed to whom it names, for less: the chain is in the token.
    let writers = scene.key()?;
    let wide = scene.exchanged(A, &alice, &key, &[])?;
    let handed = scene.exchanged(WRITER, &wide, &writers, &[])?;
    let (_, said) = claims(&handed)?;
    ensure!(said["act"]["sub"] == "spiffe://example.org/writer/w" && said["act"]["act"]["sub"] == me, "{said:?}");
    ensure!(said["aud"] == json!(["ledger"]) && said["scope"] == "ledger:read" && said["sub"] == "alice", "{said:?}");
    scene.granted(WRITER, &handed, &writers)?;
    scene.passes(WRITER, true)?;
    // And no further.
    scene.refused(WRITER, &handed, Some(&writers), &[], ["invalid_request", "exchange_too_deep"])?;
    scene.refused(WRITER, token, Some(&writers), &[], ["invalid_request", "exchange_bound_to_another"])?;

    // Anybody can verify it: the metadata leads to the keys.
    let metadata = scene.get("/.well-known/oauth-authorization-server")?;
    ensure!(metadata["issuer"] == OWN && metadata["jwks_uri"] == format!("{OWN}/v1/jwks"), "{metadata}");
    if others::directory().is_some() {
        let mut jose = AuthorizationServer::start()?;
        let verified = jose.ask(&json!({
            "do": "verify", "token": handed, "keys": scene.get("/v1/jwks")?, "issuer": OWN, "audience": "ledger",
        }))?;
        ensure!(verified["claims"]["sub"] == "alice" && verified["typ"] == "at+jwt", "{verified}");
        let wrong = json!({
            "do": "verify", "token": handed, "keys": scene.get("/v1/jwks")?, "issuer": OWN, "audience": "wiki",
        });
        ensure!(jose.ask(&wrong).is_err(), "it is for nobody else");
    }
    Ok(Verdict::Ran)
}

fn nobody_gets_more() -> Result<Verdict> {
    let scene = Scene::new()?;
    let key = scene.key()?;
    let key = Some(&key);
    let (alice, _) = scene.of("alice", &json!({}))?;
    let invalid = |reason| ["invalid_request", reason];
    let not_allowed = ["unauthorized_client", "exchange_not_allowed"];
    scene.refused("/service", &alice, key, &[], not_allowed)?;
    scene.refused("/elsewhere", &alice, key, &[], ["invalid_client", "caller_unmanaged"])?;
    scene.refused(A, &scene.of("mallory", &json!({}))?.0, key, &[], not_allowed)?;
    scene.refused(A, &alice, None, &[], invalid("exchange_unbound"))?;
    scene.refused(A, &alice, key, &["--audience", "wiki"], ["invalid_target", "exchange_audience"])?;
    scene.refused(A, &alice, key, &["--scope", "admin"], ["invalid_scope", "exchange_scope"])?;
    scene.refused(A, &alice, key, &["--scope", "ledger:read", "--scope", "x"], ["invalid_scope", "exchange_scope"])?;
    let forged = Issuer::new("k1")?.token(&json!({ "sub": "alice", "aud": "ledger" }))?;
    scene.refused(A, &forged, key, &[], invalid("signature_invalid"))?;
    let past = json!({ "exp": jiff::Timestamp::now().as_second() - 60 });
    scene.refused(A, &scene.of("alice", &past)?.0, key, &[], invalid("token_expired"))?;
    scene.refused(
        A,
        &scene.of("alice", &json!({ "iss": "https://x.example" }))?.0,
        key,
        &[],
        invalid("issuer_unknown"),
    )?;
    let bound = json!({ "cnf": { "jkt": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA" } });
    scene.refused(A, &scene.of("alice", &bound)?.0, key, &[], invalid("exchange_bound_to_another"))?;
    let may_act = |who: &str| json!({ "may_act": { "sub": who } });
    let (for_b, _) = scene.of("alice", &may_act("spiffe://example.org/agent/b"))?;
    scene.refused(A, &for_b, key, &[], invalid("exchange_may_not_act"))?;
    // A token that says who may act lets that one, and lives no longer than the person's.
    let mut soon = may_act("spiffe://example.org/agent/a");
    soon["exp"] = (jiff::Timestamp::now().as_second() + 60).into();
    let answer = scene.exchange(A, &scene.of("alice", &soon)?.0, key, &[])?;
    ensure!(answer["expires_in"].as_u64().is_some_and(|seconds| seconds <= 60), "{answer}");
    Ok(Verdict::Ran)
}

fn what_a_token_was_exchanged_for_ends_it() -> Result<Verdict> {
    let mut scene = Scene::new()?;
    let (key, writers) = (scene.key()?, scene.key()?);
    let (alice, jti) = scene.of("alice", &json!({}))?;
    let (bob, _) = scene.of("bob", &json!({}))?;
    let child = scene.exchanged(A, &alice, &key, &[])?;
    let grandchild = scene.exchanged(WRITER, &child, &writers, &[])?;
    let of_bob = scene.exchanged(B, &bob, &key, &[])?;
    for (cgroup, token, key) in [(A, &child, &key), (WRITER, &grandchild, &writers), (B, &of_bob, &key)] {
        scene.granted(cgroup, token, key)?;
    }
    let mut open = Vec::new();
    for cgroup in [A, WRITER, B] {
        open.push(scene.sandbox.spawn(cgroup, &["hold-tcp", "127.0.0.1:7101"])?);
    }
    // Also of a daemon that was started again.
    scene.daemon.terminate()?;
    scene.daemon = scene.sandbox.start()?;
    wait_until("the control process", || Ok(scene.daemon.status()?.control_ready))?;
    scene.granted(A, &child, &key)?;
    scene.authd(&["revoke", "token", ISSUER, &jti])?;
    for cgroup in [A, WRITER] {
        scene.passes(cgroup, false)?;
    }
    scene.passes(B, true)?;
    scene.not_granted(A, &child, &key, "token_revoked")?;
    scene.not_granted(WRITER, &grandchild, &writers, "token_revoked")?;
    scene.granted(B, &of_bob, &key)?;
    scene.refused(A, &alice, Some(&key), &[], ["invalid_request", "token_revoked"])?;
    scene.refused(WRITER, &child, Some(&writers), &[], ["invalid_request", "token_revoked"])?;
    let [first, second, third] = open.try_into().map_err(|_| anyhow::anyhow!("three"))?;
    for (mut held, lives) in [(first, false), (second, false), (third, true)] {
        let outcome = held.again()?;
        ensure!((outcome.ok) == lives, "{outcome:?}");
    }
    Ok(Verdict::Ran)
}

fn an_agent_that_is_revoked_has_no_tokens() -> Result<Verdict> {
    let scene = Scene::new()?;
    let (key, writers) = (scene.key()?, scene.key()?);
    let (alice, _) = scene.of("alice", &json!({}))?;
    let child = scene.exchanged(A, &alice, &key, &[])?;
    let grandchild = scene.exchanged(WRITER, &child, &writers, &[])?;
    let other = scene.exchanged(B, &alice, &key, &[])?;
    scene.granted(WRITER, &grandchild, &writers)?;
    scene.granted(B, &other, &key)?;
    // Its own part is in the writer's chain.
    scene.authd(&["revoke", "instance", A])?;
    scene.not_granted(A, &child, &key, "workload_revoked")?;
    scene.refused(A, &alice, Some(&key), &[], ["invalid_request", "workload_revoked"])?;
    scene.passes(WRITER, false)?;
    scene.not_granted(WRITER, &grandchild, &writers, "workload_revoked")?;
    scene.passes(B, true)?;
    scene.authd(&["revoke", "agent", "agent"])?;
    scene.passes(B, false)?;
    scene.refused(B, &alice, Some(&key), &[], ["invalid_request", "workload_revoked"])?;
    Ok(Verdict::Ran)
}

fn a_node_signs_with_another_key() -> Result<Verdict> {
    let scene = Scene::new()?;
    let key = scene.key()?;
    let (alice, _) = scene.of("alice", &json!({}))?;
    let kid = |token: &str| anyhow::Ok(claims(token)?.0["kid"].as_str().context("a kid")?.to_owned());
    let before = scene.exchanged(A, &alice, &key, &[])?;
    scene.authd(&["token", "keys", "--rotate"])?;
    wait_until("the next key", || Ok(scene.kids()?.len() == 2))?;
    let after = scene.exchanged(A, &alice, &key, &[])?;
    ensure!(kid(&before)? != kid(&after)?, "another key signs");
    for token in [&before, &after] {
        scene.granted(A, token, &key)?;
    }
    let mut held = scene.sandbox.spawn(A, &["hold-tcp", "127.0.0.1:7101"])?;
    // The key that signs now is lost: its tokens and what rests on them end, and another one signs.
    scene.authd(&["revoke", "issuer-key", OWN, &kid(&after)?])?;
    wait_until("a third key", || {
        let kids = scene.kids()?;
        Ok(kids.len() == 2 && !kids.contains(&kid(&after)?))
    })?;
    scene.not_granted(A, &after, &key, "kid_unknown")?;
    let third = scene.exchanged(A, &alice, &key, &[])?;
    ensure!(scene.kids()?.contains(&kid(&third)?));
    scene.granted(A, &third, &key)?;
    scene.authd(&["revoke", "issuer", OWN])?;
    scene.passes(A, false)?;
    ensure!(!held.again()?.ok, "what rested on it is cut");
    scene.not_granted(A, &before, &key, "issuer_revoked")?;
    Ok(Verdict::Ran)
}

/// On the listener, who acts is known by its certificate, to which its token is bound.
fn a_peer_acts_by_its_certificate() -> Result<Verdict> {
    let mut far = None;
    let scene = Scene::started("", |sandbox| {
        let netns = sandbox.another_netns("far")?;
        sandbox.netns.join(&netns, ("near0", "far0"), (&["192.0.2.1/24"], &["192.0.2.2/24"]))?;
        far = Some(netns);
        let file = |name: &str| sandbox.directory().join(name);
        sandbox.add_settings(&format!(
            "control.listen = \"192.0.2.1:7443\"\ncontrol.certificate = {:?}\ncontrol.key = {:?}\n",
            file("listener.pem"),
            file("listener.key"),
        ))?;
        Daemon::start_inside(sandbox)
    })?;
    let far = far.context("a namespace")?;
    let certificate = |id: &str| {
        let name = format!("cert-{:x}", rand::random::<u32>());
        let fingerprint = scene.authority.issue_spiffe(scene.sandbox.directory(), &name, id)?;
        let path = |end: &str| scene.sandbox.directory().join(format!("{name}.{end}")).display().to_string();
        anyhow::Ok(([path("pem"), path("key")], fingerprint))
    };
    let ca = scene.file(&scene.authority.pem())?;
    let ask = |token: &str, more: &[&str]| {
        let file = scene.file(token)?;
        let to = ["token", "exchange", "--json", "--subject-token-file", &file, "--url", "https://192.0.2.1:7443"];
        let outcome = scene.sandbox.authd_in_netns("/elsewhere", &far, &[&to[..], &["--ca", &ca], more].concat())?;
        serde_json::from_str::<Value>(outcome.detail.trim())
            .with_context(|| format!("{outcome:?}\n{}", scene.daemon.log()))
    };
    let (alice, _) = scene.of("alice", &json!({}))?;
    let ([cert, key], fingerprint) = certificate("spiffe://example.org/elsewhere/agent")?;
    let mine = ["--cert", cert.as_str(), "--key", key.as_str()];
    let answer = ask(&alice, &mine)?;
    ensure!(answer["token_type"] == "Bearer", "{answer}");
    let (_, said) = claims(answer["access_token"].as_str().context("a token")?)?;
    ensure!(said["act"]["sub"] == "spiffe://example.org/elsewhere/agent", "{said:?}");
    ensure!(said["cnf"]["x5t#S256"] == authd::proofs::base64url::encode(fingerprint), "{said:?}");
    // Nobody, somebody else, somebody of a stranger's.
    let answer = ask(&alice, &[])?;
    ensure!(answer["error"] == "invalid_client" && answer["reason"] == "exchange_unknown_actor", "{answer}");
    let ([cert, key], _) = certificate("spiffe://example.org/elsewhere/other")?;
    let answer = ask(&alice, &["--cert", &cert, "--key", &key])?;
    ensure!(answer["error"] == "unauthorized_client" && answer["reason"] == "exchange_not_allowed", "{answer}");
    let stranger = Authority::new("stranger")?;
    stranger.issue_spiffe(scene.sandbox.directory(), "stranger", "spiffe://example.org/elsewhere/agent")?;
    let path = |end: &str| scene.sandbox.directory().join(format!("stranger.{end}")).display().to_string();
    let answer = ask(&alice, &["--cert", &path("pem"), "--key", &path("key")])?;
    ensure!(answer["error"] == "invalid_client" && answer["reason"] == "unknown_issuer", "{answer}");
    scene.authd(&["revoke", "peer", "remote-agent"])?;
    let answer = ask(&alice, &mine)?;
    ensure!(answer["reason"] == "peer_revoked", "{answer}");
    Ok(Verdict::Ran)
}
