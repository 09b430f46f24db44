//! What the daemon is for, once through: let pass, refuse, tell.

use anyhow::{Result, ensure};
use authd_tests::sandbox::Sandbox;
use libtest_mimic::Trial;

use crate::{Verdict, trial};

pub fn trials() -> Vec<Trial> {
    vec![trial("flows_are_let_through_refused_and_told", flows_are_let_through_refused_and_told)]
}

pub const POLICY: &str = r#"
trust_domain = "example.org"

[[workload]]
name = "agent"
kind = "agent"
cgroup = "/agents/*"
tenant = "acme"

[[workload]]
name = "crafter"
kind = "service"
cgroup = "/crafters"
raw_sockets = true

[[workload]]
name = "guarded"
kind = "service"
cgroup = "/guarded"

[[service]]
name = "open-tcp"
addresses = ["127.0.0.0/8", "::1"]
ports = ["tcp/7001"]

[[service]]
name = "open-udp"
addresses = ["127.0.0.0/8", "::1"]
ports = ["udp/7002"]

[[service]]
name = "guarded-tcp"
workload = "guarded"
ports = ["tcp/7005", "udp/7005"]

[[rule]]
name = "agents-open"
from = ["agent", "crafter"]
to = ["open-tcp", "open-udp"]

[[rule]]
name = "agents-guarded"
from = ["agent"]
to = ["guarded-tcp"]
"#;

fn flows_are_let_through_refused_and_told() -> Result<Verdict> {
    let (sandbox, daemon) = Sandbox::with_policy(POLICY)?;
    let _open = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7001"])?;
    let _closed = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7003"])?;
    let _guarded = sandbox.spawn("/guarded", &["serve-tcp", "127.0.0.1:7005"])?;

    let allowed = sandbox.probe("/agents/a1", &["tcp", "127.0.0.1:7001"])?;
    ensure!(allowed.ok, "{allowed:?}\n{}", daemon.log());
    let denied = sandbox.probe("/agents/a1", &["tcp", "127.0.0.1:7003"])?;
    ensure!(denied.is_eperm(), "{denied:?}");
    let guarded = sandbox.probe("/agents/a1", &["tcp", "127.0.0.1:7005"])?;
    ensure!(guarded.ok, "{guarded:?}");
    let unmanaged = sandbox.probe("/servers", &["tcp", "127.0.0.1:7005", "--timeout-ms", "300"])?;
    ensure!(unmanaged.errno == "TIMEOUT", "{unmanaged:?}");
    let untouched = sandbox.probe("/servers", &["tcp", "127.0.0.1:7003"])?;
    ensure!(untouched.ok, "{untouched:?}");

    let opened = daemon.wait_for("the allowed flow", |r| r.event == "flow_opened" && r.remote_port == Some(7001))?;
    ensure!(opened.workload.as_deref() == Some("agent"), "{opened:?}");
    ensure!(opened.spiffe_id.as_deref() == Some("spiffe://example.org/agent/a1"), "{opened:?}");
    ensure!(opened.rule.as_deref() == Some("agents-open"), "{opened:?}");
    ensure!(opened.tenant.as_deref() == Some("acme"), "{opened:?}");
    ensure!(opened.cgroup.as_deref() == Some("/agents/a1"), "{opened:?}");
    ensure!(opened.command.as_deref() == Some("authd-probe"), "{opened:?}");
    ensure!(opened.pid.is_some() && opened.generation == Some(1), "{opened:?}");
    let closed = daemon.wait_for("its end", |r| r.event == "flow_closed" && r.socket == opened.socket)?;
    ensure!(closed.bytes_out >= Some(5) && closed.bytes_in >= Some(5), "{closed:?}");
    ensure!(closed.packets_out > Some(2) && closed.packets_in > Some(2) && closed.duration_ns > Some(0), "{closed:?}");
    let denied = daemon.wait_for("the denied flow", |r| r.event == "flow_denied" && r.remote_port == Some(7003))?;
    ensure!(denied.reason.as_deref() == Some("no_rule") && denied.rule.is_none(), "{denied:?}");
    let refused = daemon.wait_for("the refused caller", |r| r.event == "flow_denied" && r.local_port == Some(7005))?;
    ensure!(refused.workload.as_deref() == Some("guarded"), "{refused:?}");
    ensure!(refused.peer_workload.as_deref() == Some("unmanaged"), "{refused:?}");
    let inbound = daemon.wait_for("the guarded flow", |r| r.event == "flow_opened" && r.local_port == Some(7005))?;
    ensure!(inbound.peer_workload.as_deref() == Some("agent"), "{inbound:?}");
    ensure!(inbound.peer_spiffe_id.as_deref() == Some("spiffe://example.org/agent/a1"), "{inbound:?}");
    ensure!(inbound.rule.as_deref() == Some("agents-guarded"), "{inbound:?}");
    Ok(Verdict::Ran)
}
