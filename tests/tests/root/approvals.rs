//! Approvals from the command line to the disk, through the real daemon.

use anyhow::{Context, Result, ensure};
use authd::{
    decisions::{
        approvals::{Approver, Group},
        call::{Agent, Arguments, Call},
        kept::{Kept, Wanted},
    },
    digest::Digest,
    store::Store,
};
use authd_tests::{daemon::Daemon, sandbox::Sandbox};
use jiff::{SignedDuration, Timestamp};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::{Verdict, basics::POLICY, trial};

pub fn trials() -> Vec<Trial> {
    vec![trial("another_policy_ends_approvals_for_good", another_policy_ends_approvals_for_good)]
}

/// A call that was approved under a policy which is not in force any more. Returns its id.
fn approve_under_another_policy(sandbox: &Sandbox) -> Result<String> {
    let store = Store::open(&sandbox.directory().join("state"))?;
    let mut kept = Kept::load(&store)?;
    let (now, policy) = (Timestamp::now(), Digest::of(b"another policy"));
    let hour = SignedDuration::from_hours(1);
    let group = Group {
        name: "leads".to_owned(),
        users: [(0, "root".to_owned())].into(),
        step_up: None,
        ttl: hour,
        valid: hour,
        may_be_subject: false,
    };
    kept.policy_changed(&store, now, policy, [group]).1?;
    let agent = Agent {
        workload: "agent".to_owned(),
        cgroup: "/agents/a1".to_owned(),
        instance: 1,
        spiffe_id: "spiffe://example.org/agent/a1".to_owned(),
    };
    let arguments = Arguments::read("{\"amount\":\"120.00\",\"note\":\"\u{202e}\"}".as_bytes())?;
    let call = Call { tool: "refund".to_owned(), arguments, agent, delegation: None, policy };
    let wanted = Wanted { call, uid: 2001, approvers: vec!["leads".to_owned()], policies: Vec::new() };
    let id = kept.request(&store, now, wanted)?.id;
    let approver = Approver { approvers: None, uid: 0, token: None, text: String::new() };
    kept.grant(&store, now, &id, approver)?;
    Ok(id.to_string())
}

fn list(daemon: &Daemon) -> Result<Vec<Value>> {
    let output = daemon.command(&["approve", "list", "--json"])?;
    ensure!(output.status.success(), "{output:?}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn another_policy_ends_approvals_for_good() -> Result<Verdict> {
    let (sandbox, mut daemon) = Sandbox::with_policy(POLICY)?;
    ensure!(list(&daemon)?.is_empty());
    daemon.terminate()?;
    let id = approve_under_another_policy(&sandbox)?;

    let mut daemon = sandbox.start()?;
    let before = list(&daemon)?;
    let [listed] = &before[..] else { anyhow::bail!("{before:?}") };
    ensure!(listed["id"] == id.as_str() && listed["state"] == "policy_changed", "{listed}");
    let ended = daemon.wait_for("the end", |r| r.event == "approval_cancelled")?;
    ensure!(ended.reason.as_deref() == Some("approval_policy_changed") && ended.workload.as_deref() == Some("agent"));
    ensure!(ended.message.is_some_and(|message| message.contains(&id) && message.contains("`refund`")));

    let shown = String::from_utf8(daemon.command(&["approve", "show", &id])?.stdout)?;
    ensure!(shown.contains("ended: the policy was replaced") && shown.contains("\"note\": \"\\u202e\""), "{shown}");
    let json: Value = serde_json::from_slice(&daemon.command(&["approve", "show", &id, "--json"])?.stdout)?;
    ensure!(json["arguments"] == "{\"amount\":\"120.00\",\"note\":\"\u{202e}\"}" && json["by"]["uid"] == 0, "{json}");

    for (arguments, reason) in [
        (["approve", "grant", &id], "approval_policy_changed"),
        (["approve", "deny", &id], "approval_policy_changed"),
        (["approve", "grant", "0123456789ab"], "approval_unknown"),
        (["approve", "show", "0123456789ab"], "approval_unknown"),
    ] {
        let output = daemon.command(&arguments)?;
        let told = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(1) && told.contains(reason), "{arguments:?}: {told}");
    }
    let refused = daemon.wait_for("a refusal", |r| r.event == "approval_refused")?;
    ensure!(refused.uid == Some(0) && refused.reason.as_deref() == Some("approval_policy_changed"), "{refused:?}");

    daemon.kill_hard()?;
    let daemon = sandbox.start()?;
    ensure!(list(&daemon)? == before, "ended is ended");
    let count = daemon.records()?.iter().filter(|record| record.event == "approval_cancelled").count();
    ensure!(count == 1, "{count} records");
    let left = listed["until"].as_str().context("a time")?.parse::<Timestamp>()?;
    ensure!(left <= Timestamp::now());
    Ok(Verdict::Ran)
}
