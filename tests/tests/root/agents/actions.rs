//! Agents ask before they act: what the action policy allows opens exactly that, what a person has to approve waits for him, and
//! nothing else that an agent tries gets around.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use authd_tests::{
    daemon::{Daemon, binary},
    probe::{Outcome, Running},
    sandbox::Sandbox,
};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::{Verdict, reload::wait_until, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("an_allowed_action_opens_one_connection", an_allowed_action_opens_one_connection),
        trial("a_permit_lets_so_many_bytes_pass", a_permit_lets_so_many_bytes_pass),
        trial("a_caller_who_is_called_at_once_stays_one", a_caller_who_is_called_at_once_stays_one),
        trial("what_a_syn_carried_is_not_had_again", what_a_syn_carried_is_not_had_again),
        trial("datagrams_pass_on_a_permit_too", datagrams_pass_on_a_permit_too),
        trial("a_call_waits_for_a_person", a_call_waits_for_a_person),
        trial("an_approval_is_for_one_call_as_it_was", an_approval_is_for_one_call_as_it_was),
        trial("only_people_whom_the_policy_names_approve", only_people_whom_the_policy_names_approve),
        trial("approvals_outlive_a_restart", approvals_outlive_a_restart),
        trial("an_agent_with_one_bad_call_gets_nowhere", an_agent_with_one_bad_call_gets_nowhere),
        trial("an_agent_that_is_revoked_loses_its_permits", an_agent_that_is_revoked_loses_its_permits),
    ]
}

/// Kernels have no part in it.
pub fn of_callers() -> Vec<Trial> {
    vec![trial(
        "no_approval_is_used_up_without_room_for_the_permit",
        no_approval_is_used_up_without_room_for_the_permit,
    )]
}

pub const A: &str = "/agents/a";
const B: &str = "/agents/b";
const LEAD: &str = "40001";
const OTHER: &str = "40002";

pub const POLICY: &str = r#"
trust_domain = "example.org"
[[workload]]
name = "agent"
kind = "agent"
cgroup = "/agents/*"
[[service]]
name = "payments"
addresses = ["127.0.0.0/8", "::1"]
ports = ["tcp/7101", "udp/7101"]
[[service]]
name = "files"
addresses = ["127.0.0.0/8"]
ports = ["tcp/7102"]
[[tool]]
name = "refund"
service = "payments"
permit = "agents-refund"
arguments = { amount = "decimal", order = "string" }
[[tool]]
name = "fetch"
service = "files"
permit = "agents-fetch"
[[tool]]
name = "shell"
arguments = { command = "string" }
[[approvers]]
name = "leads"
users = ["40001"]
valid = "1h"
[[rule]]
name = "agents-refund"
from = ["agent"]
to = ["payments"]
require = ["action"]
grant_ttl = "10m"
[[rule]]
name = "agents-fetch"
from = ["agent"]
to = ["files"]
require = ["action"]
grant_ttl = "15m"
permit = { connections = 3, bytes = "64KiB" }
"#;

pub const ACTIONS: &str = r#"
@id("small-refunds")
permit (principal in Kind::"agent", action == Action::"refund", resource)
when { context.arguments.amount.lessThanOrEqual(decimal("50.0")) };
@id("large-refunds") @approval("leads")
permit (principal in Kind::"agent", action == Action::"refund", resource)
when { context.arguments.amount.lessThanOrEqual(decimal("5000.0")) };
@id("fetch")
permit (principal in Kind::"agent", action == Action::"fetch", resource);
@id("no-shells")
forbid (principal, action == Action::"shell", resource);
"#;

struct Scene {
    sandbox: Sandbox,
    daemon: Daemon,
    servers: Vec<Running>,
}

impl Scene {
    fn new() -> Result<Self> {
        Self::with_settings("")
    }

    fn with_settings(settings: &str) -> Result<Self> {
        let sandbox = Sandbox::new()?;
        sandbox.add_settings(settings)?;
        fs::write(sandbox.policy_directory().join("actions.cedar"), ACTIONS)?;
        sandbox.write_policy(POLICY)?;
        let daemon = sandbox.start()?;
        wait_until("the control process", || Ok(daemon.status()?.control_ready)).with_context(|| daemon.log())?;
        let serve = |how: &str, port: u16| sandbox.spawn("/servers", &[how, &format!("127.0.0.1:{port}")]);
        let servers = vec![
            serve("serve-tcp", 7101)?,
            serve("serve-udp", 7101)?,
            serve("serve-tcp", 7102)?,
            serve("serve-tcp", 7103)?,
        ];
        Ok(Self { sandbox, daemon, servers })
    }

    /// `authd act` from a cgroup: the answer, as JSON.
    fn act(&self, cgroup: &str, tool: &str, arguments: &Value) -> Result<Value> {
        let arguments = arguments.to_string();
        let outcome = self.sandbox.authd_in(cgroup, &["act", "--json", "--tool", tool, "--arguments", &arguments])?;
        serde_json::from_str(outcome.detail.trim()).with_context(|| format!("{outcome:?}\n{}", self.daemon.log()))
    }

    fn decided(&self, cgroup: &str, tool: &str, arguments: &Value, expected: &str) -> Result<Value> {
        let answer = self.act(cgroup, tool, arguments)?;
        let what =
            format!("{} {}", answer["decision"].as_str().unwrap_or("?"), answer["reason"].as_str().unwrap_or("?"));
        ensure!(what == expected, "{expected} was expected of {tool} {arguments}: {answer}\n{}", self.daemon.log());
        let reason = answer["reason"].as_str().map(str::to_owned);
        self.daemon.wait_for(expected, |r| r.event == "action_decided" && r.reason == reason)?;
        Ok(answer)
    }

    fn allowed(&self, cgroup: &str, tool: &str, arguments: &Value) -> Result<Value> {
        self.decided(cgroup, tool, arguments, "allow action_permitted")
    }

    fn pending(&self, cgroup: &str, arguments: &Value) -> Result<String> {
        let answer = self.decided(cgroup, "refund", arguments, "pending action_needs_approval")?;
        Ok(answer["approval"].as_str().context("an approval")?.to_owned())
    }

    fn last_records(&self) -> Result<String> {
        let records = self.daemon.records()?;
        let last = records.iter().rev().take(8).filter_map(|record| serde_json::to_string(record).ok());
        Ok(last.collect::<Vec<_>>().join("\n"))
    }

    fn tcp(&self, cgroup: &str, port: u16) -> Result<Outcome> {
        self.sandbox.probe(cgroup, &["tcp", &format!("127.0.0.1:{port}")])
    }

    fn opens(&self, cgroup: &str, port: u16) -> Result<()> {
        let outcome = self.tcp(cgroup, port)?;
        ensure!(outcome.ok, "{cgroup} to {port}: {outcome:?}\n{}", self.last_records()?);
        Ok(())
    }

    /// Exchanges until the permit's 64 KiB are over. Each takes some hundred bytes of packets, in both directions.
    fn spends_a_permit(&self, connection: &[&str]) -> Result<()> {
        let mut held = self.sandbox.spawn(A, connection)?;
        let mut exchanges = 0;
        while held.again()?.ok {
            exchanges += 1;
            ensure!(exchanges < 2_000, "64 KiB are over\n{}", self.last_records()?);
        }
        ensure!(exchanges > 50, "{exchanges}");
        self.daemon.wait_for("the end", |r| r.event == "flow_cut" && r.reason.as_deref() == Some("permit_spent"))?;
        Ok(())
    }

    fn is_closed(&self, cgroup: &str, port: u16) -> Result<()> {
        let outcome = self.tcp(cgroup, port)?;
        ensure!(outcome.is_eperm(), "{cgroup} to {port}: {outcome:?}\n{}", self.daemon.log());
        Ok(())
    }

    /// `authd approve` as a user, from somewhere.
    fn approve(&self, cgroup: &str, uid: &str, arguments: &[&str]) -> Result<Value> {
        let (authd, settings) = (binary().display().to_string(), self.sandbox.settings().display().to_string());
        let user = ["--uid", uid, "run", "--", &authd];
        let command = [&user[..], &["--config", &settings, "approve"], arguments, &["--json"]].concat();
        let outcome = self.sandbox.probe(cgroup, &command)?;
        let text = outcome.detail.lines().next().unwrap_or_default();
        serde_json::from_str(text).with_context(|| format!("{outcome:?}\n{}", self.daemon.log()))
    }

    fn granted(&self, id: &str) -> Result<()> {
        let answer = self.approve("/people", LEAD, &["grant", id])?;
        ensure!(answer["state"] == "granted", "{answer}");
        Ok(())
    }

    fn not_granted(&self, cgroup: &str, uid: &str, id: &str, reason: &str) -> Result<()> {
        let answer = self.approve(cgroup, uid, &["grant", id])?;
        ensure!(answer["reason"] == reason, "{reason} was expected: {answer}");
        Ok(())
    }
}

pub fn refund(amount: &str) -> Value {
    json!({ "amount": amount, "order": "o-17" })
}

fn an_allowed_action_opens_one_connection() -> Result<Verdict> {
    let scene = Scene::new()?;
    scene.is_closed(A, 7101)?;
    let answer = scene.allowed(A, "refund", &refund("49.99"))?;
    ensure!(answer["policies"] == json!(["small-refunds"]) && answer["permit"]["rule"] == "agents-refund", "{answer}");
    let permit = answer["permit"]["id"].as_str().context("a permit")?.to_owned();
    // Nobody else's, and for nothing else.
    scene.is_closed(B, 7101)?;
    scene.is_closed(A, 7102)?;
    scene.opens(A, 7101)?;
    let opened =
        scene.daemon.wait_for("the flow", |r| r.event == "flow_opened" && r.grant.as_ref() == Some(&permit))?;
    ensure!(opened.rule.as_deref() == Some("agents-refund"), "{opened:?}");
    scene.is_closed(A, 7101)?;
    // It ends with its one flow.
    scene.daemon.wait_for("its end", |r| r.event == "permit_used" && r.grant.as_ref() == Some(&permit))?;
    let decided = scene.daemon.wait_for("the decision", |r| r.event == "action_decided")?;
    let called = decided.proofs.iter().find(|told| told.proof == "action").context("what was called")?;
    ensure!(called.tool.as_deref() == Some("refund") && called.policies == ["small-refunds"], "{called:?}");
    ensure!(decided.grant.as_ref() == Some(&permit) && decided.workload.as_deref() == Some("agent"), "{decided:?}");

    // Two at once are two, in whatever order they are used.
    for _ in 0..2 {
        scene.allowed(A, "refund", &refund("1.00"))?;
    }
    let mut held = scene.sandbox.spawn(A, &["hold-tcp", "127.0.0.1:7101"])?;
    scene.opens(A, 7101)?;
    let closed = scene.tcp(A, 7101)?;
    ensure!(closed.is_eperm(), "{closed:?}");
    scene.daemon.wait_for("why", |r| r.event == "flow_denied" && r.reason.as_deref() == Some("permit_used"))?;
    // A flow goes on under the next generation, and takes nothing anew.
    scene.daemon.must_apply()?;
    scene.sandbox.write_policy(&format!(
        "{POLICY}\n# another generation\n[[workload]]\nname = \"x\"\nkind = \"job\"\ncgroup = \"/x\"\n"
    ))?;
    scene.daemon.must_apply()?;
    let outcome = held.again()?;
    ensure!(outcome.ok, "{outcome:?}");
    // Nobody listened: nothing was used.
    scene.allowed(A, "fetch", &json!({}))?;
    Ok(Verdict::Ran)
}

fn a_permit_lets_so_many_bytes_pass() -> Result<Verdict> {
    let scene = Scene::new()?;
    scene.allowed(A, "fetch", &json!({}))?;
    scene.spends_a_permit(&["hold-tcp", "127.0.0.1:7102"])?;
    scene.is_closed(A, 7102)?;
    // Three connections of another one.
    scene.allowed(A, "fetch", &json!({}))?;
    for _ in 0..3 {
        scene.opens(A, 7102)?;
    }
    scene.is_closed(A, 7102)?;
    Ok(Verdict::Ran)
}

/// Both ends of a connection can send the SYN (RFC 9293, 3.5): here they are the same socket. Who called has not become a server,
/// whose packets no permit counts.
fn a_caller_who_is_called_at_once_stays_one() -> Result<Verdict> {
    let scene = Scene::new()?;
    let at = "127.0.0.9:7102";
    let alone = scene.sandbox.probe(A, &["tcp", at, "--from", at])?;
    ensure!(alone.is_eperm(), "{alone:?}");
    scene.allowed(A, "fetch", &json!({}))?;
    scene.spends_a_permit(&["hold-tcp", at, "--from", at])?;
    Ok(Verdict::Ran)
}

/// Whoever does not want to be answered could send the same request again and again.
fn what_a_syn_carried_is_not_had_again() -> Result<Verdict> {
    let mut scene = Scene::new()?;
    scene.servers.clear();
    scene.allowed(A, "refund", &refund("1.00"))?;
    for _ in 0..3 {
        let outcome = scene.tcp(A, 7101)?;
        ensure!(outcome.errno == "ECONNREFUSED", "nothing was used: {outcome:?}\n{}", scene.last_records()?);
    }
    let outcome = scene.sandbox.probe(A, &["fast-open", "127.0.0.1:7101"])?;
    ensure!(!outcome.ok && !outcome.is_eperm(), "{outcome:?}");
    scene.is_closed(A, 7101)?;
    Ok(Verdict::Ran)
}

fn datagrams_pass_on_a_permit_too() -> Result<Verdict> {
    let scene = Scene::new()?;
    let udp = |cgroup: &str| scene.sandbox.probe(cgroup, &["udp", "127.0.0.1:7101"]);
    ensure!(!udp(A)?.ok);
    scene.allowed(A, "refund", &refund("1.00"))?;
    let outcome = udp(A)?;
    ensure!(outcome.ok, "{outcome:?}\n{}", scene.daemon.log());
    let outcome = udp(A)?;
    ensure!(!outcome.ok, "one exchange: {outcome:?}");
    // Packets of 33 bytes, each counted once: of 140, four pass, and no fifth.
    let few = POLICY.replace("grant_ttl = \"10m\"", "grant_ttl = \"10m\"\npermit = { bytes = \"140B\" }");
    scene.sandbox.write_policy(&few)?;
    scene.daemon.must_apply()?;
    scene.allowed(A, "refund", &refund("1.00"))?;
    let mut held = scene.sandbox.spawn(A, &["hold-udp", "127.0.0.1:7101"])?;
    let (second, third) = (held.again()?, held.again()?);
    ensure!(second.ok && !third.ok, "{second:?}, {third:?}\n{}", scene.last_records()?);
    Ok(Verdict::Ran)
}

fn a_call_waits_for_a_person() -> Result<Verdict> {
    let scene = Scene::new()?;
    scene.decided(A, "refund", &refund("5000.01"), "deny action_not_permitted")?;
    let id = scene.pending(A, &refund("120.00"))?;
    ensure!(scene.pending(A, &refund("120.00"))? == id, "the same call is the same question");
    scene.is_closed(A, 7101)?;
    let shown = scene.approve("/people", LEAD, &["show", &id])?;
    ensure!(shown["tool"] == "refund" && shown["arguments"] == r#"{"amount":"120.00","order":"o-17"}"#, "{shown}");
    scene.granted(&id)?;
    scene.is_closed(A, 7101)?;
    let answer = scene.allowed(A, "refund", &refund("120.00"))?;
    ensure!(answer["approval"] == id.as_str() && answer["policies"] == json!(["large-refunds"]), "{answer}");
    scene.opens(A, 7101)?;
    let decided = scene.daemon.wait_for("the decision", |r| {
        r.event == "action_decided" && r.proofs.iter().any(|told| told.proof == "approval")
    })?;
    let yes = decided.proofs.iter().find(|told| told.proof == "approval").context("the approval")?;
    ensure!(yes.uid == Some(40001), "{yes:?}");
    // A no is one, for as long as somebody would have waited.
    let id = scene.pending(A, &refund("121.00"))?;
    let answer = scene.approve("/people", LEAD, &["deny", &id])?;
    ensure!(answer["state"] == "denied", "{answer}");
    scene.decided(A, "refund", &refund("121.00"), "deny approval_denied")?;
    Ok(Verdict::Ran)
}

fn an_approval_is_for_one_call_as_it_was() -> Result<Verdict> {
    let scene = Scene::new()?;
    let id = scene.pending(A, &refund("120.00"))?;
    scene.granted(&id)?;
    // Another argument, another agent: other calls.
    ensure!(scene.pending(A, &refund("120.01"))? != id);
    ensure!(scene.pending(A, &json!({ "amount": "120.00", "order": "o-18" }))? != id);
    ensure!(scene.pending(B, &refund("120.00"))? != id);
    scene.decided(A, "refund", &json!({ "amount": "1.00", "order": "o", "more": 1 }), "deny action_bad_arguments")?;
    scene.allowed(A, "refund", &refund("120.00"))?;
    // The same one twice.
    let second = scene.pending(A, &refund("120.00"))?;
    ensure!(second != id);
    scene.granted(&second)?;
    // After the policy changed.
    fs::write(scene.sandbox.policy_directory().join("actions.cedar"), format!("{ACTIONS}\n// another policy\n"))?;
    scene.daemon.must_apply()?;
    wait_until("the control process", || Ok(scene.daemon.status()?.control_ready))?;
    let third = scene.pending(A, &refund("120.00"))?;
    ensure!(third != second);
    scene.daemon.wait_for("its end", |r| {
        r.event == "approval_cancelled" && r.reason.as_deref() == Some("approval_policy_changed")
    })?;
    Ok(Verdict::Ran)
}

fn only_people_whom_the_policy_names_approve() -> Result<Verdict> {
    let scene = Scene::new()?;
    let id = scene.pending(A, &refund("120.00"))?;
    scene.not_granted("/people", OTHER, &id, "approval_not_approver")?;
    // An agent whose process runs as an approver is no approver.
    scene.not_granted(A, LEAD, &id, "approval_by_workload")?;
    let answer = scene.approve("/people", OTHER, &["show", &id])?;
    ensure!(answer["reason"] == "approval_unknown", "{answer}");
    let answer = scene.approve("/people", OTHER, &["list"])?;
    ensure!(answer["approvals"].as_array().or(answer.as_array()).is_some_and(Vec::is_empty), "{answer}");
    // Nor is a workload an operator that approves, though it runs as root and has the operators' socket.
    let (authd, settings) = (binary().display().to_string(), scene.sandbox.settings().display().to_string());
    for how in [&["grant", &id][..], &["deny", &id], &["list"]] {
        let command = [&["run", "--", &authd, "--config", &settings, "approve"], how, &["--json"]].concat();
        let outcome = scene.sandbox.probe(A, &command)?;
        ensure!(!outcome.ok && outcome.detail.contains("approval_by_workload"), "{how:?}: {outcome:?}");
    }
    // Root is an operator, and no approver unless the policy says so.
    let output = scene.daemon.command(&["approve", "grant", &id, "--json"])?;
    let answer: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(answer["reason"] == "approval_not_approver", "{answer}");
    scene.pending(A, &refund("120.00"))?;
    scene.granted(&id)?;
    Ok(Verdict::Ran)
}

/// A yes that nothing could be made of is kept for later.
fn no_approval_is_used_up_without_room_for_the_permit() -> Result<Verdict> {
    let scene = Scene::with_settings("limits.grants = 16\n")?;
    let id = scene.pending(A, &refund("120.00"))?;
    scene.granted(&id)?;
    for _ in 0..16 {
        scene.allowed(A, "refund", &refund("1.00"))?;
    }
    scene.decided(A, "refund", &refund("120.00"), "deny grants_full")?;
    // With its connection the first one ends, and its slot rests for a second.
    scene.opens(A, 7101)?;
    let mut answer = Value::Null;
    wait_until("room again", || {
        answer = scene.act(A, "refund", &refund("120.00"))?;
        Ok(answer["decision"] == "allow")
    })?;
    ensure!(answer["approval"] == id.as_str(), "{answer}");
    Ok(Verdict::Ran)
}

fn approvals_outlive_a_restart() -> Result<Verdict> {
    let mut scene = Scene::new()?;
    let (granted, used) = (scene.pending(A, &refund("120.00"))?, scene.pending(A, &refund("121.00"))?);
    scene.granted(&granted)?;
    scene.granted(&used)?;
    scene.allowed(A, "refund", &refund("121.00"))?;
    scene.daemon.kill_hard()?;
    scene.daemon = scene.sandbox.start()?;
    wait_until("the control process", || Ok(scene.daemon.status()?.control_ready))?;
    ensure!(scene.pending(A, &refund("121.00"))? != used, "what was used stays used");
    scene.allowed(A, "refund", &refund("120.00"))?;
    scene.opens(A, 7101)?;
    Ok(Verdict::Ran)
}

/// The third of the scenarios that every release has to survive.
fn an_agent_with_one_bad_call_gets_nowhere() -> Result<Verdict> {
    let scene = Scene::new()?;
    scene.decided(A, "shell", &json!({ "command": "rm -rf /" }), "deny action_forbidden")?;
    scene.decided(A, "refund", &refund("999999.0"), "deny action_not_permitted")?;
    scene.decided(A, "no-such-tool", &json!({}), "deny action_unknown_tool")?;
    // It has a permit for one thing, and tries everything else.
    scene.allowed(A, "fetch", &json!({}))?;
    scene.is_closed(A, 7101)?;
    scene.is_closed(A, 7103)?;
    let run = |cgroup: &str, command: &[&str]| scene.sandbox.probe(cgroup, &[&["run", "--"], command].concat());
    let curl = run(A, &["sh", "-c", "curl -sS -m 2 http://127.0.0.1:7101/ || exec 3<>/dev/tcp/127.0.0.1/7101"])?;
    ensure!(!curl.ok, "{curl:?}");
    let packet = scene.sandbox.probe(A, &["socket", "raw"])?;
    ensure!(!packet.ok, "{packet:?}");
    let udp = scene.sandbox.probe(A, &["udp", "127.0.0.1:7101"])?;
    ensure!(!udp.ok, "{udp:?}");
    for how in ["fast-open", "mptcp", "uring", "exec-then-connect"] {
        let outcome = scene.sandbox.probe(A, &[how, "127.0.0.1:7101"])?;
        ensure!(!outcome.ok, "{how}: {outcome:?}");
    }
    // A child in a cgroup of its own is the same agent, and has the same permit at most.
    let child = scene.sandbox.probe(A, &["child-cgroup", "inner", "127.0.0.1:7101"])?;
    ensure!(!child.ok, "{child:?}");
    // Another agent's socket, and its own in another's hands.
    let other = scene.sandbox.probe(B, &["tcp", "127.0.0.1:7102"])?;
    ensure!(other.is_eperm(), "{other:?}");
    let inside = scene.sandbox.cgroup.path().join("agents/b");
    let moved = scene.sandbox.probe(A, &["move-then-connect", &inside.display().to_string(), "127.0.0.1:7102"])?;
    ensure!(!moved.ok, "{moved:?}");
    // What it may, it still can.
    scene.opens(A, 7102)?;
    Ok(Verdict::Ran)
}

fn an_agent_that_is_revoked_loses_its_permits() -> Result<Verdict> {
    let scene = Scene::new()?;
    let id = scene.pending(A, &refund("120.00"))?;
    scene.granted(&id)?;
    scene.allowed(A, "fetch", &json!({}))?;
    let mut held = scene.sandbox.spawn(A, &["hold-tcp", "127.0.0.1:7102"])?;
    let output = scene.daemon.command(&["revoke", "instance", A])?;
    ensure!(output.status.success(), "{output:?}");
    std::thread::sleep(Duration::from_millis(10));
    ensure!(!held.again()?.ok, "its connection is cut");
    scene.is_closed(A, 7102)?;
    scene.decided(A, "fetch", &json!({}), "deny workload_revoked")?;
    scene.decided(A, "refund", &refund("120.00"), "deny workload_revoked")?;
    scene.allowed(B, "fetch", &json!({}))?;
    Ok(Verdict::Ran)
}
