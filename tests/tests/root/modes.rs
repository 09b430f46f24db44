//! Modes, schedules, the guarded side, and what the command line says of it.

use anyhow::{Context, Result, ensure};
use authd_tests::{daemon::Daemon, sandbox::Sandbox};
use libtest_mimic::Trial;

use crate::{Verdict, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("modes_schedules_and_guards_decide_as_written", modes_schedules_and_guards_decide_as_written),
        trial("an_exchange_of_datagrams_has_an_end", an_exchange_of_datagrams_has_an_end),
        trial("repeated_denials_are_told_with_their_number", repeated_denials_are_told_with_their_number),
    ]
}

const POLICY: &str = r#"
trust_domain = "example.org"

[[workload]]
name = "strict"
kind = "service"
cgroup = "/strict"

[[workload]]
name = "watched"
kind = "service"
cgroup = "/watched"
mode = "observe"

[[workload]]
name = "db"
kind = "service"
cgroup = "/db"

[[workload]]
name = "agent"
kind = "agent"
cgroup = "/agent"

[[service]]
name = "plain"
addresses = ["127.0.0.1"]
ports = ["tcp/7001"]

[[service]]
name = "proven"
addresses = ["127.0.0.1"]
ports = ["tcp/7002"]

[[service]]
name = "proven-observed"
addresses = ["127.0.0.1"]
ports = ["tcp/7003"]

[[service]]
name = "forbidden"
addresses = ["127.0.0.1"]
ports = ["tcp/7004"]

[[service]]
name = "never"
addresses = ["127.0.0.1"]
ports = ["tcp/7006"]

[[service]]
name = "denied-observed"
addresses = ["127.0.0.1"]
ports = ["tcp/7007"]

[[service]]
name = "db-sql"
workload = "db"
ports = ["tcp/7005"]

[[authority]]
name = "pki"
bundle = "ca.pem"

[[rule]]
name = "a-plain"
from = ["strict"]
to = ["plain"]

[[rule]]
name = "b-proven"
from = ["strict"]
to = ["proven"]
require = ["mtls"]

[[rule]]
name = "c-proven-observed"
from = ["strict"]
to = ["proven-observed"]
require = ["mtls"]
mode = "observe"

[[rule]]
name = "d-all"
from = ["strict"]
to = ["forbidden", "denied-observed"]

[[rule]]
name = "e-forbidden"
from = ["any"]
to = ["forbidden"]
action = "deny"

[[rule]]
name = "f-denied-observed"
from = ["any"]
to = ["denied-observed"]
action = "deny"
mode = "observe"

[[rule]]
name = "g-db"
from = ["strict", "unmanaged"]
to = ["db-sql"]

[[rule]]
name = "h-never"
from = ["strict"]
to = ["never"]
when = { hours = "HOURS" }
"#;

/// Half an hour of the day, twelve hours from now, and a moment in it.
fn far_hours() -> Result<(String, String)> {
    let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    let far = now.checked_add(jiff::Span::new().hours(12))?;
    let inside = far.with().minute(10).build()?.timestamp();
    Ok((format!("{:02}:00-{:02}:30", far.hour(), far.hour()), inside.to_string()))
}

fn modes_schedules_and_guards_decide_as_written() -> Result<Verdict> {
    let (hours, then) = far_hours()?;
    let (sandbox, daemon) = Sandbox::with_policy(&POLICY.replace("HOURS", &hours))?;
    let mut servers = Vec::new();
    for port in [7001, 7002, 7003, 7004, 7006, 7007] {
        servers.push(sandbox.spawn("/elsewhere", &["serve-tcp", &format!("127.0.0.1:{port}")])?);
    }
    servers.push(sandbox.spawn("/db", &["serve-tcp", "127.0.0.1:7005"])?);
    servers.push(sandbox.spawn("/db", &["serve-tcp", "127.0.0.1:7008"])?);
    servers.push(sandbox.spawn("/agent", &["serve-tcp", "127.0.0.1:7009"])?);

    // Who, which port, what happens (`+` passes, `-` refused at once, `.` no answer), why, by which rule.
    let expected = [
        ("strict", 7001, '+', "rule", Some("a-plain")),
        ("strict", 7002, '-', "proof_required", Some("b-proven")),
        ("strict", 7003, '+', "proof_required", Some("c-proven-observed")),
        ("strict", 7004, '-', "denied_by_rule", Some("e-forbidden")),
        ("strict", 7005, '+', "rule", Some("g-db")),
        ("strict", 7006, '-', "no_rule", None),
        ("strict", 7007, '+', "denied_by_rule", Some("f-denied-observed")),
        ("strict", 7008, '-', "no_rule", None),
        ("watched", 7001, '+', "no_rule", None),
        ("watched", 7004, '+', "denied_by_rule", Some("e-forbidden")),
        // Its own denial is observed, the database's is not.
        ("watched", 7005, '.', "no_rule", None),
        ("agent", 7001, '-', "no_rule", None),
        ("unmanaged", 7001, '+', "unmanaged", None),
        ("unmanaged", 7005, '+', "rule", Some("g-db")),
        // The database guards one port; the others are open. An agent accepts nobody.
        ("unmanaged", 7008, '+', "unguarded", None),
        ("unmanaged", 7009, '.', "inbound_closed", None),
    ];
    for (who, port, happens, reason, rule) in expected {
        let to = format!("127.0.0.1:{port}");
        let cgroup = if who == "unmanaged" { "/elsewhere".to_owned() } else { format!("/{who}") };
        let patience = if happens == '.' { "400" } else { "10000" };
        let outcome = sandbox.probe(&cgroup, &["tcp", &to, "--timeout-ms", patience])?;
        let happened = match (outcome.ok, outcome.errno.as_str()) {
            (true, _) => '+',
            (_, "EPERM") => '-',
            (_, "TIMEOUT") => '.',
            _ => '?',
        };
        ensure!(happened == happens, "{who} to {port}: {outcome:?} instead of {happens}\n{}", daemon.log());
        if who == "unmanaged" || port == 7009 {
            continue;
        }
        let explained = explain(&daemon, who, &format!("{to}/tcp"))?;
        ensure!(explained["reason"] == reason, "{who} to {port}: {explained}");
        ensure!(explained["rule"].as_str() == rule, "{who} to {port}: {explained}");
        let verdict = match happens {
            '+' if reason == "rule" => "allowed",
            '+' => "observed",
            _ => "denied",
        };
        ensure!(explained["verdict"] == verdict, "{who} to {port}: {explained}");
        daemon.wait_for(&format!("{who} to {port}: {reason}"), |r| {
            let outbound = r.workload.as_deref() == Some(who) && r.remote_port == Some(port);
            let inbound = r.peer_workload.as_deref() == Some(who) && r.local_port == Some(port);
            (outbound || inbound) && r.reason.as_deref() == Some(reason) && r.rule.as_deref() == rule
        })?;
    }
    let inside = explain_at(&daemon, "strict", "127.0.0.1:7006/tcp", Some(&then))?;
    ensure!(inside["verdict"] == "allowed" && inside["rule"] == "h-never", "{inside}");
    ensure!(
        explain(&daemon, "strict", "127.0.0.1:7006/tcp")?["steps"][0]["others"].to_string().contains("not in force")
    );

    let status = daemon.command(&["status"])?;
    let text = String::from_utf8(status.stdout)?;
    ensure!(status.status.success() && text.contains("enforcing below") && text.contains("authd_egress"), "{text}");
    let flows = String::from_utf8(daemon.command(&["flows", "--last", "1000"])?.stdout)?;
    ensure!(flows.contains("f-denied-observed") && flows.contains("observed"), "{flows}");
    Ok(Verdict::Ran)
}

fn explain(daemon: &Daemon, from: &str, to: &str) -> Result<serde_json::Value> {
    explain_at(daemon, from, to, None)
}

fn explain_at(daemon: &Daemon, from: &str, to: &str, at: Option<&str>) -> Result<serde_json::Value> {
    let mut arguments = vec!["explain", "--from", from, "--to", to, "--json"];
    if let Some(at) = at {
        arguments.extend(["--at", at]);
    }
    let output = daemon.command(&arguments)?;
    let text = String::from_utf8(output.stdout)?;
    serde_json::from_str(&text).with_context(|| format!("{text}{}", String::from_utf8_lossy(&output.stderr)))
}

fn an_exchange_of_datagrams_has_an_end() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    sandbox.add_settings("conversation_idle_seconds = 5\n")?;
    sandbox.write_policy(crate::basics::POLICY)?;
    let daemon = sandbox.start()?;
    let _server = sandbox.spawn("/servers", &["serve-udp", "127.0.0.1:7002"])?;
    let mut client = sandbox.spawn("/agents/a1", &["hold-udp", "127.0.0.1:7002"])?;
    for _ in 0..4 {
        ensure!(client.again()?.ok);
    }
    let opened = daemon.wait_for("the exchange", |r| r.event == "flow_opened" && r.remote_port == Some(7002))?;
    ensure!(opened.protocol.as_deref() == Some("udp") && opened.rule.as_deref() == Some("agents-open"), "{opened:?}");
    let closed = daemon.wait_for("its end", |r| r.event == "flow_closed" && r.socket == opened.socket)?;
    ensure!(closed.packets_out == Some(5) && closed.packets_in == Some(5), "{closed:?}");
    // Five bytes, and the headers of UDP and IPv4.
    ensure!(closed.bytes_out == Some(5 * 33) && closed.bytes_in == Some(5 * 33), "{closed:?}");
    Ok(Verdict::Ran)
}

fn repeated_denials_are_told_with_their_number() -> Result<Verdict> {
    let (sandbox, daemon) = Sandbox::with_policy(crate::basics::POLICY)?;
    let hammer = sandbox.spawn("/agents/a1", &["hammer", "127.0.0.1:7003", "--threads", "2"])?;
    std::thread::sleep(std::time::Duration::from_millis(300));
    let done = hammer.finish()?;
    let counted = |daemon: &Daemon| -> Result<u64> { Ok(daemon.status()?.reasons["no_rule"].verdicts) };
    ensure!(counted(&daemon)? == done.count, "{} counted, {done:?}", counted(&daemon)?);
    // Every denial is in some record, and few records are enough.
    let told = |daemon: &Daemon| -> Result<(u64, usize)> {
        let records = daemon.records()?;
        let denied: Vec<u64> = records.iter().filter(|r| r.event == "flow_denied").filter_map(|r| r.count).collect();
        Ok((denied.iter().sum(), denied.len()))
    };
    let started = std::time::Instant::now();
    while told(&daemon)?.0 < done.count && started.elapsed() < authd_tests::daemon::PATIENCE {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let (sum, records) = told(&daemon)?;
    ensure!(sum == done.count && records < 20, "{sum} told in {records} records, {done:?}");
    Ok(Verdict::Ran)
}
