//! Proofs that open flows, and what closes them again: real callers, the real control process, real connections.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use authd_tests::{
    daemon::{Daemon, emulated},
    probe::Outcome,
    sandbox::Sandbox,
    trust::{Authority, Issuer},
};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::{Verdict, lifecycle::CAPABILITIES, reload::wait_until, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("each_proof_opens_its_flow_and_no_other", each_proof_opens_its_flow_and_no_other),
        trial("revocation_ends_what_rests_on_it_and_nothing_else", revocation_ends_what_rests_on_it_and_nothing_else),
        trial("one_grant_of_a_thousand_is_revoked_under_traffic", one_grant_of_a_thousand_is_revoked),
        trial("the_units_capabilities_are_enough_for_grants", the_units_capabilities_are_enough_for_grants),
        trial("a_grant_ends_on_time_with_the_daemon_dead", a_grant_ends_on_time_with_the_daemon_dead),
        trial("grants_outlive_a_restart_and_can_be_revoked_after_it", grants_outlive_a_restart),
        trial("a_held_connection_goes_on_when_its_grant_appears", a_held_connection_goes_on),
        trial("nobody_waits_for_proofs_with_somebody_elses_socket", nobody_waits_with_somebody_elses_socket),
        trial("a_grant_that_is_kept_carries_its_flows_on", a_kept_grant_carries_its_flows_on),
        trial("grants_go_by_instance_for_agents", grants_go_by_instance_for_agents),
    ]
}

/// In which kernels have no part.
pub fn of_callers() -> Vec<Trial> {
    vec![
        trial("layered_proofs_are_all_required", layered_proofs_are_all_required),
        trial("a_stolen_token_is_worth_nothing_elsewhere", a_stolen_token_is_worth_nothing_elsewhere),
        trial("grants_end_with_the_terms_they_were_given_under", grants_end_with_their_terms),
        trial("control_is_started_again_and_grants_go_on", control_is_started_again),
        trial("no_secret_is_written_anywhere", no_secret_is_written_anywhere),
    ]
}

const POLICY: &str = r#"
trust_domain = "example.org"
[[workload]]
name = "one"
kind = "service"
cgroup = "/callers/one"
[[workload]]
name = "two"
kind = "service"
cgroup = "/callers/two"
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
[[authority]]
name = "ca"
bundle = "ca.crt"
trust_domain = "example.org"
[[service]]
name = "by-token"
addresses = ["127.0.0.0/8", "::1"]
ports = ["tcp/7101", "udp/7101"]
[[service]]
name = "by-certificate"
addresses = ["127.0.0.0/8"]
ports = ["tcp/7102"]
[[service]]
name = "by-key"
addresses = ["127.0.0.0/8"]
ports = ["tcp/7103"]
[[service]]
name = "layered"
addresses = ["127.0.0.0/8"]
ports = ["tcp/7104"]
[[service]]
name = "crowded"
addresses = ["127.0.0.0/8"]
ports = ["tcp/7106", "udp/7106"]
[[service]]
name = "held"
addresses = ["127.0.0.0/8"]
ports = ["tcp/7105"]
[[rule]]
name = "token"
from = ["one", "two", "agent"]
to = ["by-token"]
require = ["token"]
token = { issuer = "corp", audience = "ledger", scopes = ["ledger:write"] }
grant_ttl = "10m"
[[rule]]
name = "certificate"
from = ["one", "two"]
to = ["by-certificate"]
require = ["mtls"]
[[rule]]
name = "key"
from = ["one", "two"]
to = ["by-key"]
require = ["api-key"]
[[rule]]
name = "both"
from = ["one", "two"]
to = ["layered"]
require = ["mtls", "token"]
token = { issuer = "corp", audience = "ledger", bound = true }
[[rule]]
name = "crowd"
from = ["agent"]
to = ["crowded"]
require = ["token"]
token = { issuer = "corp", audience = "ledger" }
grant_ttl = "1h"
[[rule]]
name = "patient"
from = ["one"]
to = ["held"]
require = ["token"]
token = { issuer = "corp", audience = "ledger" }
pending = "hold"
[[rule]]
name = "free"
from = ["two"]
to = ["held"]
"#;

pub const ONE: &str = "/callers/one";
pub const TWO: &str = "/callers/two";

pub struct Scene {
    pub sandbox: Sandbox,
    pub daemon: Daemon,
    issuer: Issuer,
    authority: Authority,
    _servers: Vec<authd_tests::probe::Running>,
}

impl Scene {
    fn new() -> Result<Self> {
        Self::with_settings("")
    }

    fn with_settings(settings: &str) -> Result<Self> {
        Self::started(settings, Sandbox::start)
    }

    pub fn started(settings: &str, start: impl FnOnce(&Sandbox) -> Result<Daemon>) -> Result<Self> {
        let sandbox = Sandbox::new()?;
        sandbox.add_settings(settings)?;
        let issuer = Issuer::new("k1")?;
        let authority = Authority::new("tests")?;
        fs::write(sandbox.policy_directory().join("jwks.json"), issuer.jwks()?)?;
        fs::write(sandbox.policy_directory().join("ca.crt"), authority.pem())?;
        sandbox.write_policy(POLICY)?;
        let daemon = start(&sandbox)?;
        wait_until("the control process", || Ok(daemon.status()?.control_ready)).with_context(|| daemon.log())?;
        let mut servers = Vec::new();
        for port in 7101..=7105 {
            servers.push(sandbox.spawn("/servers", &["serve-tcp", &format!("127.0.0.1:{port}")])?);
        }
        servers.push(sandbox.spawn("/servers", &["serve-udp", "127.0.0.1:7101"])?);
        Ok(Self { sandbox, daemon, issuer, authority, _servers: servers })
    }

    fn file(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.sandbox.directory().join(name);
        fs::write(&path, text)?;
        Ok(path)
    }

    fn token(&self, changed: &Value) -> Result<PathBuf> {
        self.file(&format!("token-{:x}", rand::random::<u32>()), &self.issuer.token(changed)?)
    }

    /// `authd grant` from a cgroup: the answer, as JSON.
    fn ask(&self, cgroup: &str, rule: &str, more: &[&str]) -> Result<Value> {
        let outcome = self.sandbox.authd_in(cgroup, &[&["grant", "--json", "--rule", rule], more].concat())?;
        serde_json::from_str(outcome.detail.trim()).with_context(|| format!("{outcome:?}\n{}", self.daemon.log()))
    }

    fn granted(&self, cgroup: &str, rule: &str, more: &[&str]) -> Result<String> {
        let answer = self.ask(cgroup, rule, more)?;
        Ok(answer["id"].as_str().with_context(|| format!("{answer}\n{}", self.daemon.log()))?.to_owned())
    }

    fn refused(&self, cgroup: &str, rule: &str, more: &[&str], reason: &str) -> Result<()> {
        let answer = self.ask(cgroup, rule, more)?;
        ensure!(answer["reason"] == reason, "{reason} was expected of {cgroup} {rule} {more:?}: {answer}");
        self.daemon.wait_for(reason, |r| r.event == "grant_refused" && r.reason.as_deref() == Some(reason))?;
        Ok(())
    }

    fn tcp(&self, cgroup: &str, port: u16) -> Result<Outcome> {
        self.sandbox.probe(cgroup, &["tcp", &format!("127.0.0.1:{port}")])
    }

    pub fn opens(&self, cgroup: &str, port: u16) -> Result<()> {
        let outcome = self.tcp(cgroup, port)?;
        ensure!(outcome.ok, "{cgroup} to {port}: {outcome:?}\n{}", self.daemon.log());
        Ok(())
    }

    pub fn is_closed(&self, cgroup: &str, port: u16) -> Result<()> {
        let outcome = self.tcp(cgroup, port)?;
        ensure!(outcome.is_eperm(), "{cgroup} to {port}: {outcome:?}");
        Ok(())
    }

    fn certificate(&self, workload: &str) -> Result<(String, String, [u8; 32])> {
        let name = format!("{workload}-{:x}", rand::random::<u32>());
        let id = format!("spiffe://example.org/{workload}");
        let fingerprint = self.authority.issue_spiffe(self.sandbox.directory(), &name, &id)?;
        let path = |end: &str| self.sandbox.directory().join(format!("{name}.{end}")).display().to_string();
        Ok((path("pem"), path("key"), fingerprint))
    }

    pub fn revoke(&self, arguments: &[&str]) -> Result<Value> {
        let output = self.daemon.command(&[&["revoke", "--json"], arguments].concat())?;
        ensure!(output.status.success(), "{output:?}");
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

fn each_proof_opens_its_flow_and_no_other() -> Result<Verdict> {
    let scene = Scene::new()?;
    for port in 7101..=7104 {
        scene.is_closed(ONE, port)?;
    }
    scene.daemon.wait_for("the refusal", |r| {
        r.event == "flow_denied" && r.reason.as_deref() == Some("proof_required") && r.rule.as_deref() == Some("token")
    })?;
    let token = scene.token(&json!({}))?;
    let token = token.to_str().context("a path")?;
    let grant = scene.granted(ONE, "token", &["--token-file", token])?;
    scene.opens(ONE, 7101)?;
    let udp = scene.sandbox.probe(ONE, &["udp", "127.0.0.1:7101"])?;
    ensure!(udp.ok, "{udp:?}");
    let opened =
        scene.daemon.wait_for("the flow", |r| r.event == "flow_opened" && r.grant.as_deref() == Some(&grant))?;
    ensure!(opened.rule.as_deref() == Some("token") && opened.reason.as_deref() == Some("rule"), "{opened:?}");
    let issued = scene.daemon.wait_for("the grant", |r| r.event == "grant_issued")?;
    let proof = issued.proofs.first().with_context(|| format!("{issued:?}"))?;
    ensure!(proof.issuer.as_deref() == Some(authd_tests::trust::ISSUER) && proof.jti_sha256.is_some(), "{issued:?}");
    ensure!(issued.workload.as_deref() == Some("one") && issued.grant.as_deref() == Some(&grant), "{issued:?}");
    // Nobody else, and nothing else.
    scene.is_closed(TWO, 7101)?;
    scene.is_closed(ONE, 7102)?;

    let (cert, key, _) = scene.certificate("one")?;
    scene.granted(ONE, "certificate", &["--cert", &cert, "--key", &key])?;
    scene.opens(ONE, 7102)?;
    scene.is_closed(TWO, 7102)?;
    // A certificate that names another workload.
    scene.refused(TWO, "certificate", &["--cert", &cert, "--key", &key], "certificate_not_allowed")?;
    scene.refused(TWO, "certificate", &[], "certificate_missing")?;
    let stranger = Authority::new("stranger")?;
    stranger.issue_spiffe(scene.sandbox.directory(), "stranger", "spiffe://example.org/two")?;
    let path = |end: &str| scene.sandbox.directory().join(format!("stranger.{end}")).display().to_string();
    scene.refused(TWO, "certificate", &["--cert", &path("pem"), "--key", &path("key")], "unknown_issuer")?;

    let made = scene.daemon.command(&["key", "create", "--name", "k", "--rule", "key", "--workload", "one"])?;
    ensure!(made.status.success(), "{made:?}");
    let text = String::from_utf8(made.stdout)?;
    let file = scene.file("key", text.trim())?;
    let file = file.to_str().context("a path")?;
    scene.granted(ONE, "key", &["--api-key-file", file])?;
    scene.opens(ONE, 7103)?;
    scene.refused(TWO, "key", &["--api-key-file", file], "api_key_wrong_workload")?;
    scene.refused(TWO, "key", &[], "api_key_missing")?;
    let mut other = text.trim().to_owned();
    other.pop();
    let cut = scene.file("cut", &other)?;
    scene.refused(TWO, "key", &["--api-key-file", cut.to_str().context("a path")?], "api_key_malformed")?;

    // Whom no rule names, and whom nobody knows.
    scene.refused("/agents/a", "certificate", &["--cert", &cert, "--key", &key], "rule_not_for_caller")?;
    scene.refused("/servers", "token", &["--token-file", token], "caller_unmanaged")?;
    let answer = scene.ask(ONE, "no-such-rule", &[])?;
    ensure!(answer["reason"] == "rule_unknown", "{answer}");
    Ok(Verdict::Ran)
}

fn layered_proofs_are_all_required() -> Result<Verdict> {
    let scene = Scene::new()?;
    let (cert, key, fingerprint) = scene.certificate("one")?;
    let thumbprint = authd::proofs::base64url::encode(fingerprint);
    let bound = scene.token(&json!({ "cnf": { "x5t#S256": thumbprint } }))?;
    let bound = bound.to_str().context("a path")?;
    let plain = scene.token(&json!({}))?;
    let plain = plain.to_str().context("a path")?;
    scene.refused(ONE, "both", &["--token-file", bound], "certificate_missing")?;
    scene.refused(ONE, "both", &["--cert", &cert, "--key", &key], "authorization_missing")?;
    scene.refused(ONE, "both", &["--cert", &cert, "--key", &key, "--token-file", plain], "token_not_bound")?;
    let (other_cert, other_key, _) = scene.certificate("one")?;
    scene.refused(
        ONE,
        "both",
        &["--cert", &other_cert, "--key", &other_key, "--token-file", bound],
        "bound_certificate_mismatch",
    )?;
    scene.is_closed(ONE, 7104)?;
    scene.granted(ONE, "both", &["--cert", &cert, "--key", &key, "--token-file", bound])?;
    scene.opens(ONE, 7104)?;
    for (changed, reason) in [
        (json!({ "aud": "other" }), "audience_mismatch"),
        (json!({ "scope": "ledger:read" }), "scope_insufficient"),
        (json!({ "iss": "https://other.example.org" }), "issuer_mismatch"),
        (json!({ "exp": 1_700_000_000, "iat": 1_699_999_000 }), "token_expired"),
        (json!({ "nbf": 4_000_000_000_u64 }), "token_not_yet_valid"),
    ] {
        let token = scene.token(&changed)?;
        scene.refused(TWO, "token", &["--token-file", token.to_str().context("a path")?], reason)?;
    }
    let forged = scene.file("forged", &Issuer::new("k1")?.token(&json!({}))?)?;
    scene.refused(TWO, "token", &["--token-file", forged.to_str().context("a path")?], "signature_invalid")?;
    Ok(Verdict::Ran)
}

/// The first of the scenarios that every release has to survive.
fn a_stolen_token_is_worth_nothing_elsewhere() -> Result<Verdict> {
    let scene = Scene::new()?;
    let (cert, key, fingerprint) = scene.certificate("one")?;
    let thumbprint = authd::proofs::base64url::encode(fingerprint);
    let token = scene.token(&json!({ "jti": "stolen", "cnf": { "x5t#S256": thumbprint } }))?;
    let token = token.to_str().context("a path")?;
    let all = ["--cert", &cert, "--key", &key, "--token-file", token];
    scene.granted(ONE, "both", &all)?;
    scene.opens(ONE, 7104)?;
    // Another workload, without the key: as it is, and with a certificate of its own.
    scene.refused(TWO, "token", &["--token-file", token], "bound_certificate_missing")?;
    let (own_cert, own_key, _) = scene.certificate("two")?;
    let own = ["--cert", own_cert.as_str(), "--key", own_key.as_str(), "--token-file", token];
    scene.refused(TWO, "both", &own, "bound_certificate_mismatch")?;
    scene.is_closed(TWO, 7104)?;
    // After its revocation: at the door, and to the packet.
    scene.daemon.wait_for("the first flow's end", |r| r.event == "flow_closed" && r.remote_port == Some(7104))?;
    let mut held = scene.sandbox.spawn(ONE, &["hold-tcp", "127.0.0.1:7104"])?;
    ensure!(held.again()?.ok);
    let effect = scene.revoke(&["token", "https://idp.example.org", "stolen", "--reason", "it was stolen"])?;
    ensure!(effect["grants"] == 1 && effect["flows"] == 1 && effect["destroyed"] == 1, "{effect}");
    let cut = held.again()?;
    ensure!(!cut.ok, "{cut:?}");
    scene.is_closed(ONE, 7104)?;
    scene.refused(ONE, "both", &all, "token_revoked")?;
    let ended = scene.daemon.wait_for("the end", |r| r.event == "grant_revoked")?;
    ensure!(ended.reason.as_deref() == Some("token_revoked"), "{ended:?}");
    Ok(Verdict::Ran)
}

fn one_grant_of_a_thousand_is_revoked() -> Result<Verdict> {
    // An emulated machine takes some fifty times as long.
    let (instances, flows): (u32, u32) = if emulated() { (100, 5) } else { (1000, 10) };
    let scene = Scene::new()?;
    let _server = scene.sandbox.spawn("/servers", &["serve-crowd", "127.0.0.1:7106"])?;
    // As long as the issuer's may live.
    let now = jiff::Timestamp::now().as_second();
    let token = scene.token(&json!({ "iat": now, "exp": now + 3500 }))?;
    let parent = scene.sandbox.cgroup.child("/agents")?;
    let mut crowd = scene.sandbox.spawn(
        "/agents/first",
        &[
            "crowd",
            "--parent",
            parent.to_str().context("a path")?,
            "--socket",
            scene.sandbox.directory().join("workload.sock").to_str().context("a path")?,
            "--token-file",
            token.to_str().context("a path")?,
            "--rule",
            "crowd",
            "--instances",
            &instances.to_string(),
            "--flows",
            &flows.to_string(),
            "127.0.0.1:7106",
        ],
    )?;
    let all = u64::from(instances) * u64::from(flows);
    let before = crowd.again()?;
    ensure!(before.count == all, "{before:?}\n{}", scene.daemon.log());
    let mut dead = 0;
    for (number, instance) in [instances / 2, 0, instances - 1].into_iter().enumerate() {
        let effect = scene.revoke(&["instance", &format!("/agents/a{instance}")])?;
        ensure!(effect["grants"] == 1 && effect["flows"] == flows && effect["destroyed"] == flows, "{effect}");
        dead += u64::from(flows);
        let after = crowd.again()?;
        let told: Value = serde_json::from_str(&after.detail)?;
        ensure!(told.as_object().is_some_and(|told| told.len() == number + 1), "others are dead too: {told}");
        let errors = told[instance.to_string()].as_object().with_context(|| told.to_string())?;
        // Whichever call met the destroyed socket is told why, the next, or one that sends a datagram, that it is no longer
        // connected. A datagram may be refused before its socket is destroyed.
        let expected = ["ECONNABORTED", "EPIPE", "EDESTADDRREQ", "EPERM"];
        let named = errors.keys().all(|name| expected.contains(&name.as_str()));
        ensure!(named && after.count == all - dead, "{after:?}");
        println!(
            "of {all} flows, {flows} cut within {} us, closed within {} us",
            effect["cut_microseconds"], effect["microseconds"]
        );
    }
    Ok(Verdict::Ran)
}

/// Another user's process, in another network namespace, and a daemon that may no more than its unit lets it.
fn the_units_capabilities_are_enough_for_grants() -> Result<Verdict> {
    let kept = CAPABILITIES.map(|(_, number)| number);
    let scene = Scene::started("", |sandbox| Daemon::start_with_capabilities(sandbox, &kept))?;
    let token = scene.token(&json!({ "jti": "a" }))?;
    let token = token.to_str().context("a path")?;
    scene.granted(ONE, "token", &["--token-file", token])?;
    let mut held = scene.sandbox.spawn(ONE, &["hold-tcp", "127.0.0.1:7101"])?;
    ensure!(held.again()?.ok);
    let effect = scene.revoke(&["token", "https://idp.example.org", "a"])?;
    ensure!(effect["destroyed"] == 1 && effect["left"] == 0, "{effect}\n{}", scene.daemon.log());
    ensure!(!held.again()?.ok);
    let status = fs::read_to_string(format!("/proc/{}/status", scene.daemon.control_pid()?))?;
    let limits = fs::read_to_string(format!("/proc/{}/limits", scene.daemon.control_pid()?))?;
    let memory = limits.lines().find(|line| line.starts_with("Max data size")).context("a limit")?;
    ensure!(memory.split_whitespace().filter(|word| *word == "4294967296").count() == 2, "{memory}");
    for none in ["CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        ensure!(status.contains(none), "control has {status}");
    }
    ensure!(!status.contains("Uid:\t0"), "control is root: {status}");
    Ok(Verdict::Ran)
}

fn revocation_ends_what_rests_on_it_and_nothing_else() -> Result<Verdict> {
    let scene = Scene::new()?;
    let (first, second) = (scene.token(&json!({ "jti": "a" }))?, scene.token(&json!({ "jti": "b" }))?);
    let (first, second) = (first.to_str().context("a path")?, second.to_str().context("a path")?);
    scene.granted(ONE, "token", &["--token-file", first])?;
    scene.granted(TWO, "token", &["--token-file", second])?;
    let mut of_one = scene.sandbox.spawn(ONE, &["hold-tcp", "127.0.0.1:7101"])?;
    let mut of_two = scene.sandbox.spawn(TWO, &["hold-tcp", "127.0.0.1:7101"])?;
    let mut datagrams = scene.sandbox.spawn(ONE, &["hold-udp", "127.0.0.1:7101"])?;
    ensure!(of_one.again()?.ok && of_two.again()?.ok && datagrams.again()?.ok);
    let effect = scene.revoke(&["token", "https://idp.example.org", "a"])?;
    ensure!(effect["grants"] == 1 && effect["flows"] == 2, "{effect}\n{}", scene.daemon.log());
    let (tcp, udp) = (of_one.again()?, datagrams.again()?);
    // The socket is destroyed, so that the application learns it at once instead of waiting.
    ensure!(!tcp.ok && tcp.errno != "TIMEOUT" && !udp.ok, "{tcp:?} {udp:?}");
    ensure!(of_two.again()?.ok, "another's grant is untouched");
    scene.opens(TWO, 7101)?;
    scene.is_closed(ONE, 7101)?;
    // A workload, with whatever it shows; and what is issued after it was taken back counts again.
    let effect = scene.revoke(&["workload", "two"])?;
    ensure!(effect["grants"] == 1, "{effect}");
    ensure!(!of_two.again()?.ok);
    scene.refused(TWO, "token", &["--token-file", second], "workload_revoked")?;
    let undone = scene.daemon.command(&["revoke", "--undo", "workload", "two"])?;
    ensure!(undone.status.success(), "{undone:?}");
    scene.granted(TWO, "token", &["--token-file", second])?;
    scene.opens(TWO, 7101)?;
    // The issuer: everything it said.
    scene.revoke(&["issuer", "https://idp.example.org"])?;
    scene.is_closed(TWO, 7101)?;
    let third = scene.token(&json!({}))?;
    scene.refused(TWO, "token", &["--token-file", third.to_str().context("a path")?], "issuer_revoked")?;
    let listed = scene.daemon.command(&["revoke", "--list"])?;
    let listed = String::from_utf8(listed.stdout)?;
    ensure!(listed.contains("issuer https://idp.example.org"), "{listed}");
    Ok(Verdict::Ran)
}

fn a_grant_ends_on_time_with_the_daemon_dead() -> Result<Verdict> {
    let mut scene = Scene::new()?;
    let token = scene.token(&json!({}))?;
    let token = token.to_str().context("a path")?;
    let life = if emulated() { 30 } else { 6 };
    scene.granted(ONE, "token", &["--token-file", token, "--seconds", &life.to_string()])?;
    let mut held = scene.sandbox.spawn(ONE, &["hold-tcp", "127.0.0.1:7101"])?;
    ensure!(held.again()?.ok);
    scene.daemon.kill_hard()?;
    std::thread::sleep(Duration::from_secs(life + 1));
    ensure!(!held.again()?.ok, "its packets are dropped");
    scene.is_closed(ONE, 7101)?;
    Ok(Verdict::Ran)
}

fn grants_outlive_a_restart() -> Result<Verdict> {
    let mut scene = Scene::new()?;
    let token = scene.token(&json!({ "jti": "kept" }))?;
    let grant = scene.granted(ONE, "token", &["--token-file", token.to_str().context("a path")?])?;
    let mut held = scene.sandbox.spawn(ONE, &["hold-tcp", "127.0.0.1:7101"])?;
    ensure!(held.again()?.ok);
    scene.daemon.terminate()?;
    scene.opens(ONE, 7101)?;
    scene.daemon = scene.sandbox.start()?;
    ensure!(held.again()?.ok, "it is untouched");
    scene.opens(ONE, 7101)?;
    ensure!(scene.daemon.status()?.grants.live == 1, "{:?}", scene.daemon.status()?.grants);
    // The daemon did not see this flow open: it looks at the kernel's sockets.
    let effect = scene.revoke(&["grant", &grant])?;
    ensure!(effect["grants"] == 1 && effect["destroyed"].as_u64() >= Some(1), "{effect}\n{}", scene.daemon.log());
    let cut = held.again()?;
    ensure!(!cut.ok && cut.errno != "TIMEOUT", "{cut:?}");
    scene.is_closed(ONE, 7101)?;
    Ok(Verdict::Ran)
}

fn a_held_connection_goes_on() -> Result<Verdict> {
    let scene = Scene::with_settings("hold_seconds = 60\n")?;
    let token = scene.token(&json!({}))?;
    let mut waiting = scene.sandbox.spawn_quietly_in(
        ONE,
        &scene.sandbox.netns,
        &["tcp", "127.0.0.1:7105", "--timeout-ms", "90000"],
    )?;
    scene.daemon.wait_for("the wait", |r| r.event == "flow_held" && r.remote_port == Some(7105))?;
    scene.granted(ONE, "patient", &["--token-file", token.to_str().context("a path")?])?;
    let outcome = waiting.heard()?;
    ensure!(outcome.ok, "{outcome:?}\n{}", scene.daemon.log());
    scene.daemon.wait_for("the flow", |r| r.event == "flow_opened" && r.remote_port == Some(7105))?;
    Ok(Verdict::Ran)
}

/// Packets are judged as the socket's owner's, who needs no proof: holding the connection would let it through.
fn nobody_waits_with_somebody_elses_socket() -> Result<Verdict> {
    let scene = Scene::new()?;
    let path = scene.sandbox.directory().join("lent");
    let path = path.to_str().context("a path")?;
    scene.opens(TWO, 7105)?;
    for lender in ["/servers", TWO] {
        let _lender = scene.sandbox.spawn(lender, &["lend-socket", path])?;
        let outcome = scene.sandbox.probe(ONE, &["use-socket", path, "127.0.0.1:7105"])?;
        ensure!(outcome.is_eperm(), "{lender}: {outcome:?}\n{}", scene.daemon.log());
        fs::remove_file(path)?;
    }
    Ok(Verdict::Ran)
}

fn a_kept_grant_carries_its_flows_on() -> Result<Verdict> {
    let scene = Scene::new()?;
    let token = scene.token(&json!({}))?;
    let (binary, settings) = (authd_tests::daemon::binary(), scene.sandbox.settings());
    let path = |path: &std::path::Path| path.display().to_string();
    let (binary, settings, token) = (path(&binary), path(&settings), path(&token));
    let life = if emulated() { "20" } else { "4" };
    let keep = ["--config", &settings, "grant", "--keep", "--rule", "token", "--token-file", &token, "--seconds", life];
    let command = [&["exec", "--", &binary], &keep[..]].concat();
    let _keeper = scene.sandbox.spawn_quietly_in(ONE, &scene.sandbox.netns, &command)?;
    scene.daemon.wait_for("the first grant", |r| r.event == "grant_issued")?;
    let mut held = scene.sandbox.spawn(ONE, &["hold-tcp", "127.0.0.1:7101"])?;
    // Packets bring it to light that the first grant is over.
    wait_until("a second and a third grant, and that the flow goes over", || {
        ensure!(held.again()?.ok, "the flow was cut\n{}", scene.daemon.log());
        let records = scene.daemon.records()?;
        let count = |event: &str| records.iter().filter(|record| record.event == event).count();
        Ok(count("grant_issued") >= 3 && count("flow_regranted") >= 2)
    })?;
    ensure!(!scene.daemon.records()?.iter().any(|record| record.event == "flow_cut"));
    Ok(Verdict::Ran)
}

fn grants_go_by_instance_for_agents() -> Result<Verdict> {
    let scene = Scene::new()?;
    let token = scene.token(&json!({}))?;
    scene.is_closed("/agents/b", 7101)?;
    scene.granted("/agents/a", "token", &["--token-file", token.to_str().context("a path")?])?;
    scene.opens("/agents/a", 7101)?;
    scene.opens("/agents/a/child", 7101)?;
    scene.is_closed("/agents/b", 7101)?;
    Ok(Verdict::Ran)
}

fn grants_end_with_their_terms() -> Result<Verdict> {
    let scene = Scene::new()?;
    let token = scene.token(&json!({}))?;
    scene.granted(ONE, "token", &["--token-file", token.to_str().context("a path")?])?;
    scene.opens(ONE, 7101)?;
    // Another rule changes nothing; this one, asking for more, ends what was given for less.
    scene.sandbox.write_policy(&POLICY.replace(r#"ports = ["tcp/7103"]"#, r#"ports = ["tcp/7103", "tcp/7106"]"#))?;
    scene.daemon.must_apply()?;
    scene.opens(ONE, 7101)?;
    scene.sandbox.write_policy(&POLICY.replace(r#"scopes = ["ledger:write"]"#, r#"scopes = ["ledger:admin"]"#))?;
    scene.daemon.must_apply()?;
    scene.is_closed(ONE, 7101)?;
    scene.daemon.wait_for("the end", |r| r.event == "grant_outdated")?;
    Ok(Verdict::Ran)
}

fn control_is_started_again() -> Result<Verdict> {
    let scene = Scene::new()?;
    let token = scene.token(&json!({}))?;
    let token = token.to_str().context("a path")?;
    scene.granted(ONE, "token", &["--token-file", token])?;
    let child = scene.daemon.control_pid()?;
    let status = fs::read_to_string(format!("/proc/{child}/status"))?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    ensure!(field("CapPrm:") == "0000000000000000" && field("CapEff:") == "0000000000000000", "{status}");
    ensure!(field("NoNewPrivs:") == "1" && field("Seccomp:") == "2", "{status}");
    ensure!(!field("Uid:").split_whitespace().any(|uid| uid == "0"), "{status}");
    let root = fs::read_dir(format!("/proc/{child}/root"))?.flatten().map(|entry| entry.file_name());
    let root: Vec<_> = root.collect();
    ensure!(root == ["etc"], "what it sees of the file system: {root:?}");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), nix::sys::signal::Signal::SIGKILL)?;
    scene.opens(ONE, 7101)?;
    scene.daemon.wait_for("its end", |r| r.event == "control_ended")?;
    wait_until("another control process", || Ok(scene.daemon.status()?.control_ready))?;
    ensure!(scene.daemon.control_pid()? != child);
    scene.granted(TWO, "token", &["--token-file", token])?;
    scene.opens(TWO, 7101)?;
    Ok(Verdict::Ran)
}

fn no_secret_is_written_anywhere() -> Result<Verdict> {
    let scene = Scene::new()?;
    let made = scene.daemon.command(&["key", "create", "--name", "k"])?;
    let key = String::from_utf8(made.stdout)?.trim().to_owned();
    let token = scene.issuer.token(&json!({ "jti": "a-rather-long-token-id" }))?;
    let refused = Issuer::new("k1")?.token(&json!({}))?;
    for (secret, rule, option) in
        [(&key, "key", "--api-key-file"), (&token, "token", "--token-file"), (&refused, "token", "--token-file")]
    {
        let file = scene.file("secret", secret)?;
        scene.ask(ONE, rule, &[option, file.to_str().context("a path")?])?;
        fs::remove_file(file)?;
    }
    scene.daemon.wait_for("the refusal", |r| r.reason.as_deref() == Some("signature_invalid"))?;
    let secret_part = key.rsplit('_').next().context("a key has parts")?.to_owned();
    let signature = token.rsplit('.').next().context("a token has parts")?.to_owned();
    let bad_signature = refused.rsplit('.').next().context("a token has parts")?.to_owned();
    let mut written = vec![scene.sandbox.audit_file(), scene.sandbox.directory().join("metrics.prom")];
    written.extend(fs::read_dir(scene.sandbox.directory().join("state"))?.flatten().map(|entry| entry.path()));
    let mut all = scene.daemon.log().into_bytes();
    for path in written {
        all.extend(fs::read(path).unwrap_or_default());
    }
    for secret in [&secret_part, &signature, &bad_signature] {
        ensure!(!all.windows(secret.len()).any(|part| part == secret.as_bytes()), "a secret was written");
    }
    let records = fs::read_to_string(scene.sandbox.audit_file())?;
    ensure!(!records.contains("a-rather-long-token-id"), "records have the hash of a token's id");
    ensure!(records.contains("grant_issued") && records.contains("signature_invalid"), "{records}");
    Ok(Verdict::Ran)
}
