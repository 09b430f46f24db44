//! People are told that a call waits for them: by the operator's program, and by a webhook that a library of others verifies.

use std::fs;

use anyhow::{Context, Result, ensure};
use authd_tests::{
    others::{self, WebhookReceiver},
    sandbox::Sandbox,
    trust::Authority,
};
use libtest_mimic::Trial;
use serde_json::Value;

use super::actions::{A, ACTIONS, POLICY, refund};
use crate::{Verdict, reload::wait_until, trial};

/// Only where the programs of others were fetched: emulated machines have no network.
pub fn trials() -> Vec<Trial> {
    if others::directory().is_none() {
        return Vec::new();
    }
    vec![trial("people_are_told_of_calls_that_wait", people_are_told_of_calls_that_wait)]
}

/// The example of the standard's own libraries.
const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

fn people_are_told_of_calls_that_wait() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    let file = |name: &str| sandbox.directory().join(name);
    let (roots, secret, told) = (file("roots.pem"), file("secret"), file("told"));
    let authority = Authority::new("tests")?;
    authority.issue(sandbox.directory(), "hook", vec![rcgen::SanType::IpAddress("127.0.0.1".parse()?)])?;
    fs::write(&roots, authority.pem())?;
    fs::write(&secret, SECRET)?;
    let receiver = WebhookReceiver::start(&file("hook.pem"), &file("hook.key"), &secret)?;
    sandbox.add_settings(&format!(
        "control.server_authorities = {roots:?}\napprovals.command = [\"/usr/bin/tee\", \"-a\", {told:?}]\n\
         approvals.webhook = \"https://127.0.0.1:{}/hook?team=payments\"\napprovals.webhook_secret_file = {secret:?}\n",
        receiver.port
    ))?;
    fs::write(sandbox.policy_directory().join("actions.cedar"), ACTIONS)?;
    sandbox.write_policy(POLICY)?;
    let daemon = sandbox.start()?;
    wait_until("the control process", || Ok(daemon.status()?.control_ready)).with_context(|| daemon.log())?;

    let arguments = refund("120.00").to_string();
    let ask = || -> Result<Value> {
        let call = ["act", "--json", "--tool", "refund", "--arguments", &arguments];
        Ok(serde_json::from_str(sandbox.authd_in(A, &call)?.detail.trim())?)
    };
    let (answer, again) = (ask()?, ask()?);
    let id = answer["approval"].as_str().with_context(|| answer.to_string())?;
    ensure!(again["approval"] == id, "{again}");

    // Nobody takes it the first time: it comes again, signed for a later time, and is the same message.
    let (first, second) = (receiver.received()?, receiver.received()?);
    ensure!(first["payload"].is_object() && first == second, "{first}, then {second}\n{}", daemon.log());
    ensure!(first["id"] == format!("approval-requested-{id}"), "{first}");
    let payload = &first["payload"];
    ensure!(
        payload["id"] == id && payload["event"] == "approval_requested" && payload["tool"] == "refund",
        "{payload}"
    );
    ensure!(payload["agent"]["workload"] == "agent" && payload["approvers"][0] == "leads", "{payload}");
    let canonical = r#"{"amount":"120.00","order":"o-17"}"#;
    ensure!(payload["arguments"] == canonical, "{payload}");

    // Once, however often the call is tried; with the very same words.
    let mut told_program = Value::Null;
    wait_until("the program", || {
        let written = fs::read_to_string(&told).unwrap_or_default();
        Ok(serde_json::from_str(&written).map(|value| told_program = value).is_ok())
    })?;
    ensure!(told_program == *payload, "{told_program}");
    Ok(Verdict::Ran)
}
