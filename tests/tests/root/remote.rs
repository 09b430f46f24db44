//! Callers from outside the node, over a pair of interfaces.

use anyhow::{Result, ensure};
use authd_tests::sandbox::Sandbox;
use libtest_mimic::Trial;

use crate::{Verdict, trial};

pub fn trials() -> Vec<Trial> {
    vec![trial("remote_callers_are_known_by_their_network", remote_callers_are_known_by_their_network)]
}

const POLICY: &str = r#"
trust_domain = "example.org"

[[workload]]
name = "db"
kind = "service"
cgroup = "/db"

[[workload]]
name = "agent"
kind = "agent"
cgroup = "/agent"

[[peer]]
name = "office"
networks = ["192.0.2.0/25", "2001:db8::/80"]

[[service]]
name = "sql"
workload = "db"
ports = ["tcp/7001", "udp/7002"]

[[service]]
name = "far"
addresses = ["192.0.2.2", "2001:db8::2"]
ports = ["tcp/7003"]

[[rule]]
name = "office-sql"
from = ["office"]
to = ["sql"]

[[rule]]
name = "agent-far"
from = ["agent"]
to = ["far"]
"#;

fn remote_callers_are_known_by_their_network() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    let far = sandbox.another_netns("far")?;
    // The far end has one address inside the peer's networks and one outside, of each family.
    sandbox.netns.join(
        &far,
        ("near0", "far0"),
        (
            &["192.0.2.1/24", "2001:db8::1/64"],
            &["192.0.2.2/24", "192.0.2.200/24", "2001:db8::2/64", "2001:db8::1:0:0:2/64"],
        ),
    )?;
    sandbox.write_policy(POLICY)?;
    let daemon = sandbox.start()?;
    let _v4 = sandbox.spawn("/db", &["serve-tcp", "192.0.2.1:7001"])?;
    let _v6 = sandbox.spawn("/db", &["serve-tcp", "[2001:db8::1]:7001"])?;
    let _udp = sandbox.spawn("/db", &["serve-udp", "192.0.2.1:7002"])?;
    let _ssh = sandbox.spawn("/db", &["serve-tcp", "192.0.2.1:22"])?;
    let _agents = sandbox.spawn("/agent", &["serve-tcp", "192.0.2.1:7004"])?;

    let _far = sandbox.spawn_in("/elsewhere", &far, &["serve-tcp", "192.0.2.2:7003"])?;
    let _far_closed = sandbox.spawn_in("/elsewhere", &far, &["serve-tcp", "192.0.2.2:7005"])?;

    for (from, to, passes) in [
        ("192.0.2.2:0", "192.0.2.1:7001", true),
        ("192.0.2.200:0", "192.0.2.1:7001", false),
        ("[2001:db8::2]:0", "[2001:db8::1]:7001", true),
        ("[2001:db8::1:0:0:2]:0", "[2001:db8::1]:7001", false),
        // The failsafe list is for services, not for agents.
        ("192.0.2.200:0", "192.0.2.1:22", true),
        ("192.0.2.2:0", "192.0.2.1:7004", false),
    ] {
        let limit = if passes { "20000" } else { "500" };
        let arguments = ["tcp", to, "--from", from, "--timeout-ms", limit];
        // A blocking connect waits for minutes: the attempt is given up from outside.
        let mut attempt = sandbox.spawn_quietly_in("/elsewhere", &far, &arguments)?;
        let outcome = attempt.next_within(std::time::Duration::from_millis(if passes { 20_000 } else { 1_500 }))?;
        ensure!(outcome.is_some_and(|outcome| outcome.ok) == passes, "{from} to {to}\n{}", daemon.log());
    }
    let outcome = sandbox.probe_in("/elsewhere", &far, &["udp", "192.0.2.1:7002"])?;
    ensure!(outcome.ok, "{outcome:?}");
    let outcome = sandbox.probe("/agent", &["tcp", "192.0.2.2:7003"])?;
    ensure!(outcome.ok, "{outcome:?}");
    let outcome = sandbox.probe("/agent", &["tcp", "192.0.2.2:7005"])?;
    ensure!(outcome.is_eperm(), "{outcome:?}");

    let denied = daemon.wait_for("the stranger", |r| {
        r.event == "flow_denied" && r.remote_address.is_some_and(|a| a.to_string() == "192.0.2.200")
    })?;
    ensure!(
        denied.direction.as_deref() == Some("inbound") && denied.reason.as_deref() == Some("no_rule"),
        "{denied:?}"
    );
    ensure!(denied.workload.as_deref() == Some("db") && denied.peer_workload.is_none(), "{denied:?}");
    daemon.wait_for("the closed agent", |r| r.reason.as_deref() == Some("inbound_closed"))?;
    daemon.wait_for("the failsafe", |r| r.reason.as_deref() == Some("failsafe"))?;
    Ok(Verdict::Ran)
}
