//! New policies under running traffic.

use std::{collections::BTreeMap, fmt::Write, time::Instant};

use anyhow::{Context, Result, ensure};
use authd_tests::{daemon::PATIENCE, probe::Outcome, sandbox::Sandbox};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;

use crate::{Verdict, basics::POLICY, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("an_open_connection_is_cut_and_resumes", an_open_connection_is_cut_and_resumes),
        trial("a_caller_is_known_anew_under_a_new_policy", a_caller_is_known_anew_under_a_new_policy),
        trial("generations_never_mix_under_load", generations_never_mix_under_load),
    ]
}

/// In which kernels have no part.
pub fn of_callers() -> Vec<Trial> {
    vec![
        trial("a_bad_policy_changes_nothing_and_is_told", a_bad_policy_changes_nothing_and_is_told),
        trial("a_policy_on_trial_goes_back_unless_confirmed", a_policy_on_trial_goes_back_unless_confirmed),
        trial(
            "a_policy_that_changed_by_itself_can_be_put_on_trial",
            a_policy_that_changed_by_itself_can_be_put_on_trial,
        ),
        trial(
            "what_does_not_fit_is_refused_before_anything_changes",
            what_does_not_fit_is_refused_before_anything_changes,
        ),
    ]
}

const AGENT: &str = "/agents/a1";

pub fn wait_until(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let started = Instant::now();
    while !condition()? {
        ensure!(started.elapsed() < PATIENCE, "waited for {what}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    Ok(())
}

fn a_bad_policy_changes_nothing_and_is_told() -> Result<Verdict> {
    let (sandbox, daemon) = Sandbox::with_policy(POLICY)?;
    let _server = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7001"])?;
    // The file change alone is enough.
    sandbox.write_policy(&POLICY.replace("open-tcp\", \"open-udp\"]", "no-such-service\"]"))?;
    wait_until("the refusal", || Ok(!daemon.status()?.last_reload.ok))?;
    let status = daemon.status()?;
    ensure!(status.generation == 1 && status.last_reload.failures >= 1, "{:?}", status.last_reload);
    ensure!(status.last_reload.errors[0].contains("no-such-service"), "{:?}", status.last_reload);
    ensure!(daemon.log().contains("the policy is refused"), "{}", daemon.log());
    let outcome = sandbox.probe(AGENT, &["tcp", "127.0.0.1:7001"])?;
    ensure!(outcome.ok, "{outcome:?}");
    daemon.wait_for("the refusal", |r| r.event == "policy_rejected" && r.generation == Some(1))?;
    let metrics = sandbox.directory().join("metrics.prom");
    wait_until("the metric", || {
        Ok(std::fs::read_to_string(&metrics).is_ok_and(|text| text.contains("\nauthd_policy_last_reload_success 0\n")))
    })?;
    let output = daemon.command(&["apply"])?;
    ensure!(output.status.code() == Some(64), "{output:?}");
    ensure!(String::from_utf8_lossy(&output.stderr).contains("policy.toml:"), "{output:?}");
    ensure!(daemon.command(&["status"])?.status.code() == Some(1));

    // Another good one comes into force: by itself, by signal, on request.
    sandbox.write_policy(&format!("{POLICY}\n# 1\n"))?;
    wait_until("the next generation", || Ok(daemon.status()?.last_reload.ok))?;
    let by_itself = daemon.status()?.generation;
    ensure!(by_itself > 1);
    daemon.signal(Signal::SIGHUP)?;
    wait_until("the next generation", || Ok(daemon.status()?.generation > by_itself))?;
    let by_signal = daemon.status()?.generation;
    ensure!(daemon.command(&["apply"])?.status.success());
    ensure!(daemon.status()?.generation > by_signal);
    Ok(Verdict::Ran)
}

fn an_open_connection_is_cut_and_resumes() -> Result<Verdict> {
    let (sandbox, daemon) = Sandbox::with_policy(POLICY)?;
    let _tcp = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7001"])?;
    let _udp = sandbox.spawn("/servers", &["serve-udp", "127.0.0.1:7002"])?;
    let mut tcp = sandbox.spawn(AGENT, &["hold-tcp", "127.0.0.1:7001"])?;
    let mut udp = sandbox.spawn(AGENT, &["hold-udp", "127.0.0.1:7002"])?;
    ensure!(tcp.again()?.ok && udp.again()?.ok);
    sandbox.write_policy(&POLICY.replace(r#"from = ["agent", "crafter"]"#, r#"from = ["crafter"]"#))?;
    // The daemon may see the file first, and come to the same policy twice.
    let without = daemon.must_apply()?.generation;
    let (cut_tcp, cut_udp) = (tcp.again()?, udp.again()?);
    ensure!(!cut_tcp.ok && cut_tcp.errno == "TIMEOUT", "{cut_tcp:?}");
    ensure!(cut_udp.is_eperm(), "{cut_udp:?}");
    let cut = daemon.wait_for("the cut", |r| r.event == "flow_cut" && r.protocol.as_deref() == Some("tcp"))?;
    ensure!(cut.reason.as_deref() == Some("no_rule") && cut.generation.is_some_and(|cut| cut > 1), "{cut:?}");
    sandbox.write_policy(POLICY)?;
    daemon.must_apply()?;
    wait_until("the connection to go on", || Ok(tcp.again()?.ok))?;
    ensure!(udp.again()?.ok);
    daemon.wait_for("the resumption", |r| r.event == "flow_resumed" && r.generation > Some(without))?;
    Ok(Verdict::Ran)
}

/// The caller's cgroup becomes another workload's, which may go out to the address, and is not let in by the guard.
/// The agent may no longer reach the server.
fn closed() -> String {
    POLICY.replace(r#"from = ["agent", "crafter"]"#, r#"from = ["crafter"]"#)
}

fn a_policy_on_trial_goes_back_unless_confirmed() -> Result<Verdict> {
    let (sandbox, mut daemon) = Sandbox::with_policy(POLICY)?;
    let _server = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7001"])?;
    let reaches = || Ok::<_, anyhow::Error>(sandbox.probe(AGENT, &["tcp", "127.0.0.1:7001"])?.ok);
    ensure!(reaches()? && !daemon.command(&["confirm"])?.status.success());

    // Nobody confirms it.
    sandbox.write_policy(&closed())?;
    let output = daemon.command(&["apply", "--confirm", "5s"])?;
    ensure!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("it goes back"), "{output:?}");
    ensure!(!reaches()?);
    ensure!(daemon.status()?.trial.is_some_and(|trial| trial.contains("on trial")));
    daemon.wait_for("the way back", |r| r.event == "policy_rolled_back")?;
    wait_until("the policy before", reaches)?;
    ensure!(daemon.status()?.trial.is_some_and(|trial| trial.contains("not confirmed")));

    // It does not come back by itself: not when its files are touched, and not with another daemon.
    let generation = daemon.status()?.generation;
    sandbox.write_policy(&closed())?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    ensure!(daemon.status()?.generation == generation && reaches()?);
    daemon.kill_hard()?;
    daemon = sandbox.start()?;
    ensure!(reaches()? && !daemon.status()?.last_reload.ok, "{}", daemon.log());
    // Who insists has his way.
    ensure!(daemon.command(&["apply"])?.status.success());
    ensure!(!reaches()? && daemon.status()?.trial.is_none());

    // A daemon that is killed meanwhile goes back, too.
    sandbox.write_policy(POLICY)?;
    daemon.must_apply()?;
    sandbox.write_policy(&closed())?;
    ensure!(daemon.command(&["apply", "--confirm", "10m"])?.status.success());
    ensure!(!reaches()?);
    daemon.kill_hard()?;
    daemon = sandbox.start()?;
    ensure!(reaches()?, "{}", daemon.log());

    // Nor does what was not confirmed come back because the directory holds nothing that is sound.
    sandbox.write_policy(&closed())?;
    daemon.must_apply()?;
    sandbox.write_policy(POLICY)?;
    daemon.must_apply()?;
    sandbox.write_policy(&closed())?;
    ensure!(daemon.command(&["apply", "--confirm", "10m"])?.status.success());
    sandbox.write_policy("trust_domain = ")?;
    daemon.kill_hard()?;
    daemon = sandbox.start()?;
    ensure!(reaches()? && !daemon.status()?.last_reload.ok, "{}", daemon.log());

    // And this one is confirmed.
    sandbox.write_policy(&format!("{}\n# another\n", closed()))?;
    ensure!(daemon.command(&["apply", "--confirm", "5s"])?.status.success());
    ensure!(daemon.command(&["confirm"])?.status.success());
    daemon.wait_for("the confirmation", |r| r.event == "policy_confirmed")?;
    std::thread::sleep(std::time::Duration::from_secs(6));
    ensure!(!reaches()? && daemon.status()?.trial.is_none());
    // The same once more is no other policy: there is nothing to go back to.
    let output = daemon.command(&["apply", "--confirm", "1s"])?;
    ensure!(String::from_utf8_lossy(&output.stdout).contains("it stays"), "{output:?}");
    std::thread::sleep(std::time::Duration::from_secs(2));
    ensure!(!reaches()?);
    Ok(Verdict::Ran)
}

fn a_policy_that_changed_by_itself_can_be_put_on_trial() -> Result<Verdict> {
    let (sandbox, daemon) = Sandbox::with_policy(POLICY)?;
    let _server = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7001"])?;
    let reaches = || Ok::<_, anyhow::Error>(sandbox.probe(AGENT, &["tcp", "127.0.0.1:7001"])?.ok);
    sandbox.write_policy(&closed())?;
    wait_until("the next generation", || Ok(daemon.status()?.generation >= 2))?;
    ensure!(!reaches()?);
    ensure!(daemon.command(&["apply", "--confirm", "5s"])?.status.success());
    // Corrections while it is on trial do not move what it goes back to.
    let generation = daemon.status()?.generation;
    sandbox.write_policy(&format!("{}\n# corrected\n", closed()))?;
    wait_until("the corrected one", || Ok(daemon.status()?.generation > generation))?;
    wait_until("the policy before", reaches)?;
    Ok(Verdict::Ran)
}

fn a_caller_is_known_anew_under_a_new_policy() -> Result<Verdict> {
    let (sandbox, daemon) = Sandbox::with_policy(POLICY)?;
    let _tcp = sandbox.spawn("/guarded", &["serve-tcp", "127.0.0.1:7005"])?;
    let _udp = sandbox.spawn("/guarded", &["serve-udp", "127.0.0.1:7005"])?;
    let mut tcp = sandbox.spawn(AGENT, &["hold-tcp", "127.0.0.1:7005"])?;
    let mut udp = sandbox.spawn(AGENT, &["hold-udp", "127.0.0.1:7005"])?;
    ensure!(tcp.again()?.ok && udp.again()?.ok);
    let newcomer = r#"
[[workload]]
name = "newcomer"
kind = "agent"
cgroup = "/agents/a1"
[[service]]
name = "address-only"
addresses = ["127.0.0.0/8"]
ports = ["tcp/7005", "udp/7005"]
[[rule]]
name = "newcomer-out"
from = ["newcomer"]
to = ["address-only"]
"#;
    sandbox.write_policy(&format!("{POLICY}{newcomer}"))?;
    daemon.must_apply()?;
    let (cut_tcp, cut_udp) = (tcp.again()?, udp.again()?);
    ensure!(!cut_tcp.ok && !cut_udp.ok, "{cut_tcp:?} {cut_udp:?}\n{}", daemon.log());
    let cut = daemon.wait_for("the cut", |r| r.event == "flow_cut" && r.direction.as_deref() == Some("inbound"))?;
    ensure!(cut.peer_workload.as_deref() == Some("newcomer"), "{cut:?}");
    Ok(Verdict::Ran)
}

/// The usual policy with many other things in it, so that every class has another number, and with one more port allowed.
fn other_policy() -> Result<String> {
    let mut policy = POLICY.replace(r#"ports = ["tcp/7001"]"#, r#"ports = ["tcp/7001", "tcp/7007"]"#);
    for n in 0..40 {
        write!(
            policy,
            "[[workload]]\nname = \"a{n}\"\nkind = \"job\"\ncgroup = \"/jobs/{n}\"\n\
             [[service]]\nname = \"a{n}\"\naddresses = [\"127.0.{n}.0/24\", \"10.{n}.0.0/16\"]\nports = [\"tcp/{}\", \"tcp/7003\"]\n\
             [[rule]]\nname = \"a{n}\"\nfrom = [\"a{n}\"]\nto = [\"a{n}\"]\n",
            6000 + n
        )?;
    }
    Ok(policy)
}

fn counts(outcome: &Outcome) -> Result<BTreeMap<String, u64>> {
    serde_json::from_str(&outcome.detail).with_context(|| format!("{outcome:?}"))
}

fn generations_never_mix_under_load() -> Result<Verdict> {
    let (sandbox, daemon) = Sandbox::with_policy(POLICY)?;
    let mut servers = Vec::new();
    for port in [7001, 7003, 7007] {
        servers.push(sandbox.spawn("/servers", &["serve-sink", &format!("127.0.0.1:{port}")])?);
    }
    let targets = ["hammer", "127.0.0.1:7001", "127.0.0.1:7003", "127.0.0.1:7007", "--threads", "2"];
    let mut managed = sandbox.spawn(AGENT, &targets)?;
    let unmanaged = sandbox.spawn("/servers", &["hammer", "127.0.0.1:7003", "--threads", "1"])?;
    let other = other_policy()?;
    let started = Instant::now();
    let mut flips = 0;
    // An emulated machine attempts fewer in the same time: it flips longer.
    while flips < 100 || managed.again()?.count < 10_000 {
        sandbox.write_policy(if flips % 2 == 0 { &other } else { POLICY })?;
        daemon.must_apply()?;
        flips += 1;
    }
    let seconds = started.elapsed().as_secs_f64();
    let (managed, unmanaged) = (managed.finish()?, unmanaged.finish()?);
    let attempts = managed.count + unmanaged.count;
    let rate = attempts as f64 / seconds;
    println!(
        "{attempts} connections attempted in {seconds:.1} s, {rate:.0} a second, while generations flipped {flips} times"
    );
    ensure!(daemon.status()?.generation >= 101);
    let both = counts(&managed)?;
    for (result, count) in &both {
        let right = match result.as_str() {
            "7001 ok" | "7003 EPERM" | "7007 ok" | "7007 EPERM" => true,
            // Allowed by the old generation in connect(), and dropped as a packet by the new one: cut while it opened.
            "7007 EINPROGRESS" => *count <= 100,
            _ => false,
        };
        ensure!(right, "{count} times {result}\n{managed:?}\n{}", daemon.log());
    }

    ensure!(both.contains_key("7007 ok") && both.contains_key("7007 EPERM"), "both generations were met: {managed:?}");
    let others = counts(&unmanaged)?;
    ensure!(others.len() == 1 && others.contains_key("7003 ok"), "nobody else notices: {unmanaged:?}");
    Ok(Verdict::Ran)
}

fn what_does_not_fit_is_refused_before_anything_changes() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    sandbox.add_settings("[limits]\ncells = 64\naddresses = 64\n")?;
    sandbox.write_policy(POLICY)?;
    let daemon = sandbox.start()?;
    let _server = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7001"])?;
    sandbox.write_policy(&other_policy()?)?;
    let applied = daemon.apply()?;
    ensure!(!applied.ok && applied.generation == 1, "{applied:?}");
    ensure!(applied.errors[0].contains("limits."), "says what to raise: {applied:?}");
    let outcome = sandbox.probe(AGENT, &["tcp", "127.0.0.1:7001"])?;
    ensure!(outcome.ok, "{outcome:?}");
    ensure!(sandbox.probe(AGENT, &["tcp", "127.0.0.1:7007"])?.is_eperm());
    // A new cgroup is still known, under the policy in force.
    let outcome = sandbox.probe("/agents/later", &["tcp", "127.0.0.1:7001"])?;
    ensure!(outcome.ok, "{outcome:?}");
    Ok(Verdict::Ran)
}
