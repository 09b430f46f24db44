//! What every release has to survive: an agent that makes a bad call on somebody's behalf, and an account in the wrong hands.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use authd_tests::{daemon::binary, probe::Running, trust::ISSUER};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use super::exchange::{Key, OWN, Scene};
use crate::{Verdict, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("an_agent_that_acts_for_somebody_goes_no_further", an_agent_that_acts_for_somebody_goes_no_further),
        trial("an_approval_needs_a_fresh_token_of_somebody_else", an_approval_needs_a_fresh_token_of_somebody_else),
        trial("a_persons_token_ends_permits_and_approvals", a_persons_token_ends_permits_and_approvals),
        trial("a_compromised_account_is_cut_off_everywhere", a_compromised_account_is_cut_off_everywhere),
    ]
}

const A: &str = "/agents/a";
const B: &str = "/agents/b";
const LEAD: &str = "40001";

const POLICY: &str = r#"
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
max_ttl = "1h"
[[service]]
name = "payments"
addresses = ["127.0.0.0/8"]
ports = ["tcp/7101"]
[[service]]
name = "accounts"
addresses = ["127.0.0.0/8"]
ports = ["tcp/7102"]
[[delegation]]
name = "agents-for-people"
actors = ["agent"]
issuer = "corp"
audiences = ["payments"]
scopes = ["payments:refund", "payments:read"]
ttl = "10m"
[[tool]]
name = "refund"
service = "payments"
permit = "agents-refund"
arguments = { amount = "long", order = "string" }
[[tool]]
name = "close-account"
service = "accounts"
permit = "agents-close"
arguments = { account = "string" }
[[approvers]]
name = "leads"
users = ["40001"]
issuer = "corp"
audience = "approvals"
subjects = ["alice", "lead"]
acr = ["phr"]
max_age = "5m"
[[rule]]
name = "agents-refund"
from = ["agent"]
to = ["payments"]
require = ["action", "token"]
token = { issuer = "own", audience = "payments", scopes = ["payments:refund"], bound = true }
[[rule]]
name = "agents-close"
from = ["agent"]
to = ["accounts"]
require = ["action", "approval", "token"]
token = { issuer = "own", audience = "payments", bound = true }
"#;

const ACTIONS: &str = r#"
@id("small-refunds")
permit (principal in Kind::"agent", action == Action::"refund", resource)
when { context has subject && context.subject.issuer == "corp" && context.arguments.amount <= 50 };
@id("large-refunds") @approval("leads")
permit (principal in Kind::"agent", action == Action::"refund", resource)
when { context has subject && context.arguments.amount > 50 && context.arguments.amount <= 5000 };
"#;

impl Scene {
    fn act(&self, cgroup: &str, token: &str, key: &Key, tool: &str, arguments: &Value) -> Result<Value> {
        let (file, key, arguments) = (self.file(token)?, key.path(), arguments.to_string());
        let of_token = ["--token-file", &file, "--dpop-key", &key];
        let call = ["act", "--json", "--tool", tool, "--arguments", &arguments];
        let outcome = self.sandbox.authd_in(cgroup, &[&call[..], &of_token].concat())?;
        serde_json::from_str(outcome.detail.trim()).with_context(|| format!("{outcome:?}\n{}", self.daemon.log()))
    }

    fn decided(&self, cgroup: &str, token: &str, key: &Key, amount: u32, expected: &str) -> Result<Value> {
        let answer = self.act(cgroup, token, key, "refund", &json!({ "amount": amount, "order": "o-17" }))?;
        ensure!(answer["reason"] == expected, "{expected} was expected of {amount}: {answer}\n{}", self.daemon.log());
        Ok(answer)
    }

    fn waits(&self, cgroup: &str, token: &str, key: &Key, amount: u32) -> Result<String> {
        let answer = self.decided(cgroup, token, key, amount, "action_needs_approval")?;
        Ok(answer["approval"].as_str().context("an approval")?.to_owned())
    }

    /// A lead's yes, with a token. The answer.
    fn approve(&self, id: &str, token: &str) -> Result<Value> {
        let (authd, settings) = (binary().display().to_string(), self.sandbox.settings().display().to_string());
        let file = self.file(token)?;
        let user = ["--uid", LEAD, "run", "--", &authd, "--config", &settings];
        let what = ["approve", "grant", id, "--token-file", &file, "--json"];
        let outcome = self.sandbox.probe("/people", &[&user[..], &what].concat())?;
        let text = outcome.detail.lines().next().unwrap_or_default();
        serde_json::from_str(text).with_context(|| format!("{outcome:?}\n{}", self.daemon.log()))
    }

    /// A token that a lead got for approvals, a moment ago.
    fn fresh(&self, subject: &str, changed: &Value) -> Result<(String, String)> {
        let mut claims = json!({ "aud": "approvals", "acr": "phr", "auth_time": jiff::Timestamp::now().as_second() });
        for (name, value) in changed.as_object().into_iter().flatten() {
            claims[name] = value.clone();
        }
        self.of(subject, &claims)
    }

    fn person(&self, subject: &str) -> Result<(String, String)> {
        self.of(subject, &json!({ "aud": ["payments"], "scope": "payments:refund payments:read" }))
    }

    fn closed(&self, cgroup: &str, port: u16) -> Result<()> {
        let outcome = self.sandbox.probe(cgroup, &["tcp", &format!("127.0.0.1:{port}")])?;
        ensure!(outcome.is_eperm(), "{cgroup} to {port}: {outcome:?}");
        Ok(())
    }
}

/// The third scenario: one bad call, on somebody's behalf, and then everything else that comes to mind.
fn an_agent_that_acts_for_somebody_goes_no_further() -> Result<Verdict> {
    let scene = Scene::with(POLICY, ACTIONS)?;
    let _accounts = scene.sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7102"])?;
    let (key, other) = (scene.key()?, scene.key()?);
    let (alice, _) = scene.person("alice")?;
    let token = scene.exchanged(A, &alice, &key, &[])?;
    // The bad call.
    let close = json!({ "account": "0017" });
    let answer = scene.act(A, &token, &key, "close-account", &close)?;
    ensure!(answer["decision"] == "deny" && answer["reason"] == "action_not_permitted", "{answer}");
    scene.decided(A, &token, &key, 5001, "action_not_permitted")?;
    // Straight to the tool, by every door.
    scene.closed(A, 7101)?;
    scene.closed(A, 7102)?;
    let run = |command: &[&str]| scene.sandbox.probe(A, &[&["run", "--"], command].concat());
    let shell = "curl -sS -m 2 http://127.0.0.1:7102/ || exec 3<>/dev/tcp/127.0.0.1/7102";
    for tried in [
        run(&["sh", "-c", shell])?,
        scene.sandbox.probe(A, &["socket", "raw"])?,
        scene.sandbox.probe(A, &["child-cgroup", "inner", "127.0.0.1:7102"])?,
        scene.sandbox.probe(A, &["fast-open", "127.0.0.1:7102"])?,
        scene.sandbox.probe(A, &["uring", "127.0.0.1:7102"])?,
        scene.sandbox.probe(A, &["udp", "127.0.0.1:7102"])?,
    ] {
        ensure!(!tried.ok, "{tried:?}");
    }
    // With tokens that it has, or found: the person's, another agent's, its own without the key, none at all.
    let rule = |token: &str, key: Option<&Key>, more: &[&str]| -> Result<Value> {
        let file = scene.file(token)?;
        let key = key.map(Key::path);
        let mut arguments = vec!["grant", "--json", "--rule", "agents-refund", "--token-file", &file];
        arguments.extend(key.iter().flat_map(|key| ["--dpop-key", key.as_str()]));
        arguments.extend(more);
        let outcome = scene.sandbox.authd_in(A, &arguments)?;
        serde_json::from_str(outcome.detail.trim()).with_context(|| format!("{outcome:?}"))
    };
    for token in [&alice, &token] {
        let answer = rule(token, Some(&key), &[])?;
        ensure!(answer["id"].is_null() && answer["reason"].is_string(), "{answer}");
    }
    let answer = scene.act(A, &alice, &key, "refund", &json!({ "amount": 1, "order": "o" }))?;
    ensure!(answer["decision"] != "allow" && answer["reason"] == "token_wrong_issuer", "the person's own: {answer}");
    let of_b = scene.exchanged(B, &alice, &other, &[])?;
    let answer = scene.act(A, &of_b, &other, "refund", &json!({ "amount": 1, "order": "o" }))?;
    ensure!(answer["reason"] == "token_of_another_actor", "{answer}");
    let answer = scene.act(A, &token, &other, "refund", &json!({ "amount": 1, "order": "o" }))?;
    ensure!(answer["reason"] == "dpop_key_mismatch", "{answer}");
    let outcome = scene
        .sandbox
        .authd_in(A, &["act", "--json", "--tool", "refund", "--arguments", "{\"amount\":1,\"order\":\"o\"}"])?;
    ensure!(outcome.detail.contains("action_not_permitted"), "for nobody: {outcome:?}");
    scene.closed(A, 7101)?;
    // An approved call: with one argument changed, by another agent, twice, and after the policy changed.
    let id = scene.waits(A, &token, &key, 120)?;
    let (lead, _) = scene.fresh("lead", &json!({}))?;
    let answer = scene.approve(&id, &lead)?;
    ensure!(answer["state"] == "granted", "{answer}");
    ensure!(scene.waits(A, &token, &key, 121)? != id);
    ensure!(scene.waits(B, &of_b, &other, 120)? != id);
    scene.closed(A, 7101)?;
    scene.decided(A, &token, &key, 120, "action_permitted")?;
    ensure!(scene.sandbox.probe(A, &["tcp", "127.0.0.1:7101"])?.ok, "what was approved");
    scene.closed(A, 7101)?;
    let second = scene.waits(A, &token, &key, 120)?;
    ensure!(second != id, "an approval is for one call");
    let answer = scene.approve(&second, &lead)?;
    ensure!(answer["state"] == "granted", "{answer}");
    fs::write(scene.sandbox.policy_directory().join("actions.cedar"), format!("{ACTIONS}\n// another\n"))?;
    scene.daemon.must_apply()?;
    ensure!(scene.waits(A, &token, &key, 120)? != second, "another policy asks anew");
    scene.closed(A, 7101)?;
    Ok(Verdict::Ran)
}

fn an_approval_needs_a_fresh_token_of_somebody_else() -> Result<Verdict> {
    let scene = Scene::with(POLICY, ACTIONS)?;
    let key = scene.key()?;
    let (alice, _) = scene.person("alice")?;
    let token = scene.exchanged(A, &alice, &key, &[])?;
    let id = scene.waits(A, &token, &key, 120)?;
    // Nobody is asked about a call whose rule would refuse it all the same, and nobody's yes is used up by one.
    let reader = scene.exchanged(A, &alice, &key, &["--scope", "payments:read"])?;
    scene.decided(A, &reader, &key, 120, "token_wrong_scope")?;
    scene.decided(A, &reader, &key, 122, "token_wrong_scope")?;
    let count = scene.daemon.records()?.iter().filter(|record| record.event == "approval_requested").count();
    ensure!(count == 1, "{count} approvals asked for");
    let now = jiff::Timestamp::now().as_second();
    let thumbprint = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
    for (subject, changed, reason) in [
        // For whom the agent acts, in the name that the issuer has for her.
        ("alice", json!({}), "approval_by_subject"),
        ("mallory", json!({}), "approval_wrong_subject"),
        ("lead", json!({ "acr": "pwd" }), "approval_acr"),
        ("lead", json!({ "auth_time": now - 600 }), "approval_auth_time"),
        // What he has for other purposes, and perhaps gave to an agent.
        ("lead", json!({ "aud": "payments" }), "approval_wrong_audience"),
        ("lead", json!({ "cnf": { "jkt": thumbprint } }), "dpop_bound_as_bearer"),
        ("lead", json!({ "iss": "https://x.example" }), "issuer_unknown"),
    ] {
        let answer = scene.approve(&id, &scene.fresh(subject, &changed)?.0)?;
        ensure!(answer["reason"] == reason, "{reason} was expected of {subject} {changed}: {answer}");
    }
    let (lost, jti) = scene.fresh("lead", &json!({}))?;
    scene.authd(&["revoke", "token", ISSUER, &jti])?;
    let answer = scene.approve(&id, &lost)?;
    ensure!(answer["reason"] == "token_revoked", "{answer}");
    scene.decided(A, &token, &key, 120, "action_needs_approval")?;
    let answer = scene.approve(&id, &scene.fresh("lead", &json!({}))?.0)?;
    ensure!(answer["state"] == "granted", "{answer}");
    scene.decided(A, &reader, &key, 120, "token_wrong_scope")?;
    // Who calls the subject so is gone from what people may act for: what waits for her sake ends.
    scene.authd(&["revoke", "issuer", ISSUER])?;
    scene.daemon.wait_for("the end of the approval", |r| {
        r.event == "approval_cancelled" && r.reason.as_deref() == Some("approval_revoked")
    })?;
    Ok(Verdict::Ran)
}

fn a_persons_token_ends_permits_and_approvals() -> Result<Verdict> {
    let scene = Scene::with(POLICY, ACTIONS)?;
    let key = scene.key()?;
    let kid = |token: &str| -> Result<String> {
        let (header, _) = authd::proofs::jws::inspect(token)?;
        Ok(header["kid"].as_str().context("a kid")?.to_owned())
    };
    type Revoke<'a> = &'a dyn Fn(&str, &str) -> Result<()>;
    let ways: [(&str, Revoke<'_>); 3] = [
        ("the person's token", &|_, jti| scene.authd(&["revoke", "token", ISSUER, jti])),
        ("the signing key", &|token, _| scene.authd(&["revoke", "issuer-key", OWN, &kid(token)?])),
        ("the agent", &|_, _| scene.authd(&["revoke", "agent", "agent"])),
    ];
    for (what, revoke) in ways {
        let (alice, jti) = scene.person("alice")?;
        let token = scene.exchanged(A, &alice, &key, &[])?;
        scene.decided(A, &token, &key, 10, "action_permitted")?;
        let mut held = scene.sandbox.spawn(A, &["hold-tcp", "127.0.0.1:7101"])?;
        scene.decided(A, &token, &key, 11, "action_permitted")?;
        revoke(&token, &jti).context(what)?;
        // An open connection, a permit that nobody used yet, the token.
        ensure!(!held.again()?.ok, "{what}: its connection is cut");
        scene.closed(A, 7101).context(what)?;
        let answer = scene.act(A, &token, &key, "refund", &json!({ "amount": 12, "order": "o" }))?;
        ensure!(answer["decision"] != "allow", "{what}: {answer}");
    }
    Ok(Verdict::Ran)
}

const ACCOUNT: &str = "/account";
const ACCOUNTS_POLICY: &str = r#"
trust_domain = "example.org"
[[workload]]
name = "account"
kind = "service"
cgroup = "/account"
[[workload]]
name = "neighbour"
kind = "service"
cgroup = "/neighbour"
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
[[authority]]
name = "ca"
bundle = "ca.crt"
trust_domain = "example.org"
[[service]]
name = "ledger"
addresses = ["127.0.0.0/8"]
ports = ["tcp/7101"]
[[service]]
name = "mail"
addresses = ["127.0.0.0/8"]
ports = ["tcp/7102"]
[[service]]
name = "backup"
addresses = ["127.0.0.0/8"]
ports = ["tcp/7103"]
[[service]]
name = "vault"
addresses = ["127.0.0.0/8"]
ports = ["tcp/7104"]
[[delegation]]
name = "agents-for-people"
actors = ["agent"]
issuer = "corp"
audiences = ["ledger"]
scopes = ["read"]
[[tool]]
name = "pay"
service = "vault"
[[rule]]
name = "by-token"
from = ["account"]
to = ["ledger"]
require = ["token"]
token = { issuer = "corp", audience = "ledger", scopes = ["read"], subjects = ["account"] }
grant_ttl = "10m"
[[rule]]
name = "by-certificate"
from = ["account"]
to = ["mail"]
require = ["mtls"]
grant_ttl = "10m"
[[rule]]
name = "by-key"
from = ["account"]
to = ["backup"]
require = ["api-key"]
grant_ttl = "10m"
[[rule]]
name = "neighbours"
from = ["neighbour"]
to = ["vault"]
require = ["token"]
token = { issuer = "corp", audience = "vault" }
"#;

/// The second scenario: somebody has all that an account has, and runs as it.
fn a_compromised_account_is_cut_off_everywhere() -> Result<Verdict> {
    let scene = Scene::with(ACCOUNTS_POLICY, "permit (principal in Kind::\"agent\", action, resource);\n")?;
    let _servers: Vec<Running> = ["127.0.0.1:7102", "127.0.0.1:7103", "127.0.0.1:7104"]
        .map(|at| scene.sandbox.spawn("/servers", &["serve-tcp", at]))
        .into_iter()
        .collect::<Result<_>>()?;
    let (token, _) = scene.of("account", &json!({ "aud": ["ledger"], "scope": "read" }))?;
    let token_file = scene.file(&token)?;
    scene.authority.issue_spiffe(scene.sandbox.directory(), "account", "spiffe://example.org/account")?;
    let path = |name: &str| scene.sandbox.directory().join(name).display().to_string();
    let (cert, cert_key) = (path("account.pem"), path("account.key"));
    let made = scene.daemon.command(&["key", "create", "--name", "k", "--rule", "by-key", "--workload", "account"])?;
    let api_key = scene.file(&String::from_utf8(made.stdout)?)?;
    let grant = |cgroup: &str, rule: &str, proofs: &[&str]| -> Result<Value> {
        let arguments = [&["grant", "--json", "--rule", rule], proofs].concat();
        let outcome = scene.sandbox.authd_in(cgroup, &arguments)?;
        serde_json::from_str(outcome.detail.trim()).with_context(|| format!("{outcome:?}\n{}", scene.daemon.log()))
    };
    let proofs: [(&str, &[&str], u16); 3] = [
        ("by-token", &["--token-file", &token_file], 7101),
        ("by-certificate", &["--cert", &cert, "--key", &cert_key], 7102),
        ("by-key", &["--api-key-file", &api_key], 7103),
    ];
    let mut held = Vec::new();
    for (rule, shown, port) in proofs {
        let answer = grant(ACCOUNT, rule, shown)?;
        ensure!(answer["id"].is_string(), "{rule}: {answer}");
        held.push(scene.sandbox.spawn(ACCOUNT, &["hold-tcp", &format!("127.0.0.1:{port}")])?);
    }
    // Whatever it was not given: other services, other proofs, other people's names.
    scene.closed(ACCOUNT, 7104)?;
    for (rule, shown) in [
        ("neighbours", &["--token-file", &token_file][..]),
        ("by-token", &["--cert", &cert, "--key", &cert_key]),
        ("by-certificate", &["--token-file", &token_file]),
        ("by-key", &["--token-file", &token_file]),
    ] {
        let answer = grant(ACCOUNT, rule, shown)?;
        ensure!(answer["id"].is_null() && answer["reason"].is_string(), "{rule}: {answer}");
    }
    // Its secrets are worth nothing elsewhere.
    for (rule, shown, _) in proofs {
        for cgroup in ["/neighbour", "/elsewhere"] {
            let answer = grant(cgroup, rule, shown)?;
            ensure!(answer["id"].is_null() && answer["reason"].is_string(), "{rule} of {cgroup}: {answer}");
        }
    }
    let key = scene.key()?;
    let (alice, _) = scene.of("alice", &json!({ "aud": ["ledger"], "scope": "read" }))?;
    let answer = scene.exchange(ACCOUNT, &alice, Some(&key), &[])?;
    ensure!(answer["reason"] == "exchange_not_allowed", "it acts for nobody: {answer}");
    let outcome = scene.sandbox.authd_in(ACCOUNT, &["act", "--json", "--tool", "pay", "--arguments", "{}"])?;
    ensure!(outcome.detail.contains("action_not_permitted"), "{outcome:?}");
    let outcome = scene.sandbox.probe(ACCOUNT, &["--uid", "40009", "run", "--", "ls", &path("admin.sock")])?;
    ensure!(outcome.ok, "it sees the operators' socket: {outcome:?}");
    let authd = binary().display().to_string();
    let settings = scene.sandbox.settings().display().to_string();
    let ask = ["--uid", "40009", "run", "--", &authd, "--config", &settings, "revoke", "workload", "neighbour"];
    let outcome = scene.sandbox.probe(ACCOUNT, &ask)?;
    ensure!(!outcome.ok, "operators are root: {outcome:?}");
    for tried in [
        scene.sandbox.probe(ACCOUNT, &["child-cgroup", "inner", "127.0.0.1:7104"])?,
        scene.sandbox.probe(ACCOUNT, &["socket", "raw"])?,
        scene.sandbox.probe(ACCOUNT, &["uring", "127.0.0.1:7104"])?,
        scene.sandbox.probe(ACCOUNT, &["fast-open", "127.0.0.1:7104"])?,
        scene.sandbox.probe(ACCOUNT, &["udp", "127.0.0.1:7104"])?,
    ] {
        ensure!(!tried.ok, "{tried:?}");
    }
    for connection in &mut held {
        ensure!(connection.again()?.ok, "what it may, it still can");
    }
    // One word, and it is out: of what is open, and of what could be opened again with any proof.
    scene.authd(&["revoke", "workload", "account"])?;
    for connection in &mut held {
        ensure!(!connection.again()?.ok, "all of it is cut");
    }
    for (rule, shown, port) in proofs {
        scene.closed(ACCOUNT, port)?;
        let answer = grant(ACCOUNT, rule, shown)?;
        ensure!(answer["reason"] == "workload_revoked", "{rule}: {answer}");
    }
    ensure!(Path::new(&token_file).exists());
    Ok(Verdict::Ran)
}
