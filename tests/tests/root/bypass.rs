//! Ways around the gate, each tried by a real process in a managed cgroup.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, ensure};
use authd_tests::{daemon::Daemon, probe::Outcome, sandbox::Sandbox};
use libtest_mimic::Trial;

use crate::{Verdict, basics::POLICY, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("mapped_addresses_are_ipv4_addresses", mapped_addresses_are_ipv4_addresses),
        trial("datagrams_are_decided_whatever_call_sends_them", datagrams_are_decided_whatever_call_sends_them),
        trial("raw_and_ping_sockets_are_refused", raw_and_ping_sockets_are_refused),
        trial("packet_sockets_are_refused_where_lsm_programs_run", packet_sockets_are_refused_where_lsm_programs_run),
        trial("tcp_fast_open_does_not_carry_data_out", tcp_fast_open_does_not_carry_data_out),
        trial("mptcp_is_decided_as_tcp", mptcp_is_decided_as_tcp),
        trial("mptcp_subflows_are_decided_too", mptcp_subflows_are_decided_too),
        trial("io_uring_is_decided_like_system_calls", io_uring_is_decided_like_system_calls),
        trial("crafted_packets_are_judged_by_their_headers", crafted_packets_are_judged_by_their_headers),
        trial("a_socket_passed_between_cgroups_needs_both", a_socket_passed_between_cgroups_needs_both),
        trial("a_socket_keeps_its_identity_when_its_process_moves", a_socket_keeps_its_identity_when_its_process_moves),
        trial("a_child_cgroup_is_its_parents_workload", a_child_cgroup_is_its_parents_workload),
        trial("another_network_namespace_is_no_way_out", another_network_namespace_is_no_way_out),
        trial("a_new_cgroup_is_never_nobodys", a_new_cgroup_is_never_nobodys),
        trial("connections_older_than_authd_are_decided", connections_older_than_authd_are_decided),
    ]
}

const AGENT: &str = "/agents/a1";

/// The usual policy, with servers on allowed (7001, 7002) and on denied ports (7003, 7004), on both loopback addresses.
struct Scene {
    _servers: Vec<authd_tests::probe::Running>,
    daemon: Daemon,
    sandbox: Sandbox,
}

impl Scene {
    fn new() -> Result<Self> {
        let (sandbox, daemon) = Sandbox::with_policy(POLICY)?;
        let mut servers = Vec::new();
        for address in ["127.0.0.1", "[::1]"] {
            for (kind, port) in [("serve-tcp", 7001), ("serve-udp", 7002), ("serve-tcp", 7003), ("serve-udp", 7004)] {
                servers.push(sandbox.spawn("/servers", &[kind, &format!("{address}:{port}")])?);
            }
        }
        Ok(Self { _servers: servers, daemon, sandbox })
    }

    fn agent(&self, arguments: &[&str]) -> Result<Outcome> {
        self.sandbox.probe(AGENT, arguments)
    }

    fn must_pass(&self, arguments: &[&str]) -> Result<()> {
        let outcome = self.agent(arguments)?;
        ensure!(outcome.ok, "{arguments:?} should pass: {outcome:?}\n{}", self.daemon.log());
        Ok(())
    }

    /// Refused at once, as an application sees it.
    fn must_be_refused(&self, arguments: &[&str]) -> Result<()> {
        let outcome = self.agent(arguments)?;
        ensure!(outcome.is_eperm(), "{arguments:?} should be refused: {outcome:?}");
        Ok(())
    }
}

/// Starting the daemon takes long in an emulated machine, and these tests leave it as it was: they share one.
static SHARED: Mutex<Option<Arc<Scene>>> = Mutex::new(None);

fn shared() -> Result<Arc<Scene>> {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(scene) = &*shared {
        return Ok(scene.clone());
    }
    let scene = Arc::new(Scene::new()?);
    *shared = Some(scene.clone());
    Ok(scene)
}

/// Ends the shared daemon; a static is never dropped.
pub fn end() {
    *SHARED.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

fn mapped_addresses_are_ipv4_addresses() -> Result<Verdict> {
    let scene = shared()?;
    for address in ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"] {
        scene.must_pass(&["tcp", &format!("{address}:7001")])?;
        scene.must_be_refused(&["tcp", &format!("{address}:7003")])?;
        scene.must_pass(&["udp", &format!("{address}:7002")])?;
        scene.must_be_refused(&["udp", &format!("{address}:7004")])?;
    }
    Ok(Verdict::Ran)
}

fn datagrams_are_decided_whatever_call_sends_them() -> Result<Verdict> {
    let scene = shared()?;
    for address in ["127.0.0.1", "[::1]"] {
        let (allowed, denied) = (format!("{address}:7002"), format!("{address}:7004"));
        for how in ["sendto", "sendmsg", "sendmmsg", "connected"] {
            scene.must_pass(&["udp", &allowed, "--how", how])?;
            scene.must_be_refused(&["udp", &denied, "--how", how])?;
        }
        for how in ["connected-elsewhere", "after-decoy"] {
            scene.must_be_refused(&["udp", &denied, "--how", how, "--decoy", &allowed])?;
        }
    }
    Ok(Verdict::Ran)
}

fn raw_and_ping_sockets_are_refused() -> Result<Verdict> {
    let scene = shared()?;
    scene.must_be_refused(&["socket", "raw"])?;
    let crafter = scene.sandbox.probe("/crafters", &["socket", "raw"])?;
    ensure!(crafter.ok, "a workload with raw_sockets may: {crafter:?}");
    for address in ["127.0.0.1", "::1"] {
        // For ICMPv6 the kernel does not tell the sender that its packet was dropped.
        let outcome = scene.agent(&["ping", address])?;
        ensure!(outcome.is_eperm() || (address == "::1" && outcome.errno == "TIMEOUT"), "{address}: {outcome:?}");
        let unmanaged = scene.sandbox.probe("/servers", &["ping", address])?;
        ensure!(unmanaged.ok, "others may ping: {unmanaged:?}");
    }
    let denied = scene.daemon.wait_for("the raw socket", |r| r.reason.as_deref() == Some("raw_socket"))?;
    ensure!(denied.workload.as_deref() == Some("agent"), "{denied:?}");
    Ok(Verdict::Ran)
}

fn packet_sockets_are_refused_where_lsm_programs_run() -> Result<Verdict> {
    let scene = shared()?;
    if !scene.daemon.status()?.refused.is_empty() {
        return Ok(Verdict::Skipped("BPF LSM programs cannot be loaded here"));
    }
    scene.must_be_refused(&["socket", "packet"])?;
    scene.must_be_refused(&["socket", "packet-dgram"])?;
    let unmanaged = scene.sandbox.probe("/servers", &["socket", "packet"])?;
    ensure!(unmanaged.ok, "others may: {unmanaged:?}");
    scene.daemon.wait_for("the packet socket", |r| r.reason.as_deref() == Some("socket_family"))?;
    Ok(Verdict::Ran)
}

fn tcp_fast_open_does_not_carry_data_out() -> Result<Verdict> {
    let scene = shared()?;
    for address in ["127.0.0.1", "[::1]"] {
        scene.must_pass(&["fast-open", &format!("{address}:7001")])?;
        scene.must_be_refused(&["fast-open", &format!("{address}:7003")])?;
    }
    Ok(Verdict::Ran)
}

fn mptcp_is_decided_as_tcp() -> Result<Verdict> {
    let scene = shared()?;
    if scene.sandbox.probe("/servers", &["mptcp", "127.0.0.1:7001"])?.errno == "EPROTONOSUPPORT" {
        return Ok(Verdict::Skipped("this kernel has no MPTCP"));
    }
    for address in ["127.0.0.1", "[::1]"] {
        scene.must_pass(&["mptcp", &format!("{address}:7001")])?;
        scene.must_be_refused(&["mptcp", &format!("{address}:7003")])?;
    }
    Ok(Verdict::Ran)
}

/// A server tells its second address, and the kernel connects to it by itself: from a worker thread, which is in no
/// cgroup of anybody's.
fn mptcp_subflows_are_decided_too() -> Result<Verdict> {
    const POLICY: &str = r#"
trust_domain = "example.org"
[[workload]]
name = "agent"
kind = "agent"
cgroup = "/agent"
[[service]]
name = "far"
addresses = ["192.0.2.2"]
ports = ["tcp/7001"]
[[rule]]
name = "agent-far"
from = ["agent"]
to = ["far"]
"#;
    let sandbox = Sandbox::new()?;
    let far = sandbox.another_netns("far")?;
    let addresses: (&[&str], &[&str]) = (&["192.0.2.1/24", "198.51.100.1/24"], &["192.0.2.2/24", "198.51.100.2/24"]);
    sandbox.netns.join(&far, ("near0", "far0"), addresses)?;
    let prepared = sandbox
        .netns
        .ip(&["mptcp", "limits", "set", "subflows", "2", "add_addr_accepted", "2"])
        .and_then(|()| far.ip(&["mptcp", "limits", "set", "subflows", "2", "add_addr_accepted", "2"]))
        .and_then(|()| far.ip(&["mptcp", "endpoint", "add", "198.51.100.2", "dev", "far0", "signal"]));
    if prepared.is_err() {
        return Ok(Verdict::Skipped("this kernel has no MPTCP"));
    }
    sandbox.write_policy(POLICY)?;
    let daemon = sandbox.start()?;
    let _server = sandbox.spawn_in("/elsewhere", &far, &["serve-mptcp", "0.0.0.0:7001"])?;
    let joins = || -> Result<u64> {
        let counted = sandbox.probe_in("/elsewhere", &far, &["counter", "MPTcpExt", "MPJoinSynRx"])?;
        ensure!(counted.ok, "{counted:?}");
        Ok(counted.count)
    };
    // Somebody whom no policy names opens the second subflow: it would work.
    let mut free = sandbox.spawn("/elsewhere", &["hold-mptcp", "192.0.2.2:7001"])?;
    let started = std::time::Instant::now();
    while joins()? == 0 {
        ensure!(free.again()?.ok && started.elapsed() < authd_tests::daemon::PATIENCE, "no second subflow is tried");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    drop(free);
    let before = joins()?;
    let mut agent = sandbox.spawn("/agent", &["hold-mptcp", "192.0.2.2:7001"])?;
    ensure!(agent.again()?.ok, "the first subflow passes");
    let denied = daemon.wait_for("the second subflow", |r| {
        r.event == "flow_denied" && r.remote_address.is_some_and(|a| a.to_string() == "198.51.100.2")
    })?;
    ensure!(denied.workload.as_deref() == Some("agent") && denied.reason.as_deref() == Some("no_rule"), "{denied:?}");
    ensure!(agent.again()?.ok, "and goes on");
    ensure!(joins()? == before, "nothing of the second one arrived");
    Ok(Verdict::Ran)
}

fn io_uring_is_decided_like_system_calls() -> Result<Verdict> {
    let scene = shared()?;
    let outcome = scene.sandbox.probe("/servers", &["uring", "127.0.0.1:7001"])?;
    if outcome.detail.starts_with("io_uring_setup") {
        return Ok(Verdict::Skipped("io_uring is not available here"));
    }
    for address in ["127.0.0.1", "[::1]"] {
        scene.must_pass(&["uring", &format!("{address}:7001")])?;
        scene.must_be_refused(&["uring", &format!("{address}:7003")])?;
        scene.must_pass(&["uring-send", &format!("{address}:7002")])?;
        scene.must_be_refused(&["uring-send", &format!("{address}:7004")])?;
    }
    Ok(Verdict::Ran)
}

fn crafted_packets_are_judged_by_their_headers() -> Result<Verdict> {
    let scene = shared()?;
    let craft = |to: &str, shape: &str| scene.sandbox.probe("/crafters", &["crafted", to, "--shape", shape]);
    for address in ["127.0.0.1", "[::1]"] {
        let (allowed, denied) = (format!("{address}:7002"), format!("{address}:7004"));
        let outcome = craft(&allowed, "plain")?;
        ensure!(outcome.ok, "a plain packet to an allowed port passes: {outcome:?}\n{}", scene.daemon.log());
        let outcome = craft(&denied, "plain")?;
        ensure!(outcome.is_eperm(), "a plain packet to a denied port: {outcome:?}");
        let outcome = craft(&allowed, "fragments")?;
        ensure!(outcome.is_eperm(), "fragments hide ports: {outcome:?}");
    }
    let outcome = craft("127.0.0.1:7002", "options")?;
    ensure!(outcome.is_eperm(), "IPv4 options: {outcome:?}");
    let outcome = craft("[::1]:7002", "destination-options")?;
    ensure!(outcome.ok, "extension headers are followed: {outcome:?}");
    for shape in ["destination-options", "routing", "many-headers"] {
        let outcome = craft("[::1]:7004", shape)?;
        ensure!(outcome.is_eperm(), "{shape}: {outcome:?}");
    }
    for shape in ["routing", "many-headers"] {
        let outcome = craft("[::1]:7002", shape)?;
        ensure!(outcome.is_eperm(), "{shape}, even to an allowed port: {outcome:?}");
    }
    for reason in ["fragment", "ip_options", "routing_header", "extension_headers"] {
        scene.daemon.wait_for(reason, |r| r.event == "flow_denied" && r.reason.as_deref() == Some(reason))?;
    }
    Ok(Verdict::Ran)
}

fn a_socket_passed_between_cgroups_needs_both() -> Result<Verdict> {
    let scene = shared()?;
    for (lender, user, who) in
        [("/servers", AGENT, "made outside, used inside"), (AGENT, "/servers", "made inside, used outside")]
    {
        for (port, passes) in [(7001, true), (7003, false)] {
            let path = scene.sandbox.directory().join(format!("lend-{port}-{}", lender.len()));
            let path = path.to_string_lossy();
            let _lender = scene.sandbox.spawn(lender, &["lend-socket", &path])?;
            let outcome = scene.sandbox.probe(user, &["use-socket", &path, &format!("127.0.0.1:{port}")])?;
            ensure!(outcome.ok == passes && (passes || outcome.is_eperm()), "{who}, port {port}: {outcome:?}");
        }
    }
    Ok(Verdict::Ran)
}

fn a_socket_keeps_its_identity_when_its_process_moves() -> Result<Verdict> {
    let scene = shared()?;
    let servers = scene.sandbox.cgroup.child("/servers")?;
    let servers = servers.to_string_lossy();
    scene.must_be_refused(&["move-then-connect", &servers, "127.0.0.1:7003"])?;
    scene.must_pass(&["move-then-connect", &servers, "127.0.0.1:7001"])?;
    scene.must_be_refused(&["exec-then-connect", "127.0.0.1:7003"])?;
    scene.must_pass(&["exec-then-connect", "127.0.0.1:7001"])?;
    // The other way round: what was made outside, and is open, stays its maker's.
    let agent = scene.sandbox.cgroup.child(AGENT)?;
    let outcome =
        scene.sandbox.probe("/servers", &["connect-then-move", "127.0.0.1:7003", &agent.to_string_lossy()])?;
    ensure!(outcome.ok, "{outcome:?}");
    Ok(Verdict::Ran)
}

fn a_child_cgroup_is_its_parents_workload() -> Result<Verdict> {
    let scene = shared()?;
    scene.must_be_refused(&["child-cgroup", "inner", "127.0.0.1:7003"])?;
    scene.must_be_refused(&["child-cgroup", "one/two/three", "127.0.0.1:7003"])?;
    scene.must_pass(&["child-cgroup", "one/two/four", "127.0.0.1:7001"])?;
    Ok(Verdict::Ran)
}

fn another_network_namespace_is_no_way_out() -> Result<Verdict> {
    let scene = shared()?;
    let other = scene.sandbox.another_netns("other")?;
    let _open = scene.sandbox.spawn_in("/servers", &other, &["serve-tcp", "127.0.0.1:7001"])?;
    let _closed = scene.sandbox.spawn_in("/servers", &other, &["serve-tcp", "127.0.0.1:7003"])?;
    let path = other.path().to_string_lossy();
    scene.must_pass(&["enter-then-connect", &path, "127.0.0.1:7001"])?;
    scene.must_be_refused(&["enter-then-connect", &path, "127.0.0.1:7003"])?;
    Ok(Verdict::Ran)
}

fn a_new_cgroup_is_never_nobodys() -> Result<Verdict> {
    let scene = shared()?;
    let parent = scene.sandbox.cgroup.child("/agents")?;
    let outcome = scene
        .sandbox
        .probe("/servers", &["race-cgroups", &parent.to_string_lossy(), "127.0.0.1:7003", "--times", "200"])?;
    ensure!(outcome.ok && outcome.detail == r#"{"EPERM":200}"#, "{outcome:?}");
    Ok(Verdict::Ran)
}

fn connections_older_than_authd_are_decided() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    sandbox.write_policy(POLICY)?;
    let mut servers = Vec::new();
    for (kind, port) in [("serve-tcp", 7001), ("serve-udp", 7002), ("serve-tcp", 7003), ("serve-udp", 7004)] {
        servers.push(sandbox.spawn("/servers", &[kind, &format!("127.0.0.1:{port}")])?);
    }
    servers.push(sandbox.spawn("/guarded", &["serve-tcp", "127.0.0.1:7005"])?);
    let mut allowed = sandbox.spawn(AGENT, &["hold-tcp", "127.0.0.1:7001"])?;
    let mut denied = sandbox.spawn(AGENT, &["hold-tcp", "127.0.0.1:7003"])?;
    let mut allowed_udp = sandbox.spawn(AGENT, &["hold-udp", "127.0.0.1:7002"])?;
    let mut denied_udp = sandbox.spawn(AGENT, &["hold-udp", "127.0.0.1:7004"])?;
    let mut guarded = sandbox.spawn(AGENT, &["hold-tcp", "127.0.0.1:7005"])?;
    let mut unmanaged = sandbox.spawn("/servers", &["hold-tcp", "127.0.0.1:7005"])?;
    let daemon = sandbox.start()?;
    for (name, running, passes) in [
        ("allowed", &mut allowed, true),
        ("denied", &mut denied, false),
        ("allowed udp", &mut allowed_udp, true),
        ("denied udp", &mut denied_udp, false),
        ("guarded, by a workload that may", &mut guarded, true),
        ("guarded, by nobody's", &mut unmanaged, false),
    ] {
        let outcome = running.again()?;
        ensure!(outcome.ok == passes, "{name}: {outcome:?}\n{}", daemon.log());
    }
    Ok(Verdict::Ran)
}
