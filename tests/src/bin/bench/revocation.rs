//! From the decision to revoke one grant of a thousand to its last packet and to the end of its last socket, while all flows
//! are in use: by the daemon, and by nothing but the system calls that it cannot do without, on other grants of the thousand.
//!
//! The daemon says when it decided. An instance's UDP connection sends without a pause: the kernel's receive timestamp tells
//! the last datagram that came through, its sender when the first was refused. Its TCP connections wait, and note the error.

use std::{
    fs,
    net::SocketAddr,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use authd::{
    daemon::{
        admin::{Answer, Request, client},
        granting::Effect,
    },
    dataplane::{
        object::{self, Sizes},
        sockets::message::{self, Protocol, Socket},
    },
    policy::network::from_ip,
    store::revoked::Revoked,
};
use authd_common::tables::{Grant, GrantKey, Slot, names};
use authd_tests::{
    daemon::Daemon,
    probe::{Running, Watched},
    sandbox::Sandbox,
    trust::{ISSUER, Issuer},
};
use aya::maps::{Array, HashMap, Map, MapData};
use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, send};
use serde_json::json;

use crate::compare::Comparison;

const INSTANCES: u32 = 1_000;
/// Of each: one UDP, the others TCP.
const FLOWS: u32 = 10;
const SERVER: &str = "127.0.0.1:7106";

/// Instances that end by either way.
struct Effort {
    each: u32,
}

const FULL: Effort = Effort { each: 480 };
const QUICK: Effort = Effort { each: 120 };

/// A sender that sends without a pause does so within this time, unless another program has its processor.
const PAUSE: u64 = 100_000;

/// How instances' flows ended: ns from the decision.
#[derive(Default)]
struct Samples {
    /// 0 if the last packet came before it.
    delivered: Vec<f64>,
    aborted: Vec<f64>,
}

pub fn run(quick: bool) -> Result<Vec<Comparison>> {
    let effort = if quick { QUICK } else { FULL };
    let mut scene = Scene::new()?;
    let (mut ours, mut raw) = (Samples::default(), Samples::default());
    let (mut cut, mut closed, mut update) = (Vec::new(), Vec::new(), Vec::new());
    for turn in 0..effort.each {
        // In turns, from both ends of the table.
        let told = scene.revoke(turn, &mut ours)?;
        cut.push(told.cut_microseconds as f64 * 1e3);
        closed.push(told.microseconds as f64 * 1e3);
        update.push(scene.cut(INSTANCES - 1 - turn, &mut raw)?);
    }
    let alive = u64::from(FLOWS) * u64::from(INSTANCES - 2 * effort.each);
    let after = scene.crowd.again()?;
    ensure!(after.count == alive, "others died too: {} of {alive} live: {}", after.count, after.detail);

    println!(
        "the sender had a processor at {} of {} revocations, and at {} of {} map updates; only these say how long packets passed",
        ours.delivered.len(),
        effort.each,
        raw.delivered.len(),
        effort.each
    );
    ensure!(!ours.delivered.is_empty() && !raw.delivered.is_empty(), "the machine is too busy to say anything");
    let mut results = Vec::new();
    for ((percentile, at), met) in [("p50", 0.5), ("p99", 0.99)].into_iter().zip([false, true]) {
        let mut compare = |what: &str, ours: &[f64], theirs: (&[f64], f64), budget: f64| {
            let name = format!("{what}, {percentile}");
            let budget = met.then_some(budget).filter(|budget| budget.is_finite());
            results.push(Comparison::of_quantiles("revocation", name, (ours, at), theirs, budget));
        };
        let one = (&update[..], 0.5);
        compare("decision to slot emptied, against one map update", &cut, one, f64::NAN);
        compare("decision to last packet delivered, against one map update", &ours.delivered, one, 10.0);
        compare("raw map update to last packet delivered, against itself", &raw.delivered, one, f64::NAN);
        let destroy = (&raw.aborted[..], at);
        compare("decision to last of 10 sockets destroyed, against raw", &closed, destroy, f64::NAN);
        compare("decision to ECONNABORTED on the last of 10 sockets, against raw", &ours.aborted, destroy, 2.0);
    }
    Ok(results)
}

struct Scene {
    crowd: Running,
    server: Running,
    /// sock_diag(7), in the network of the connections.
    diag: OwnedFd,
    slots: Array<MapData, Slot>,
    grants: HashMap<MapData, GrantKey, Grant>,
    _daemon: Daemon,
    // Dropped last: the others live in it.
    sandbox: Sandbox,
}

impl Scene {
    fn new() -> Result<Self> {
        let sandbox = Sandbox::new()?;
        let issuer = Issuer::new("k1")?;
        fs::write(sandbox.policy_directory().join("jwks.json"), issuer.jwks()?)?;
        sandbox.write_policy(&policy())?;
        let daemon = sandbox.start()?;
        let token = sandbox.directory().join("token");
        let hour = jiff::Timestamp::now().as_second() + 3_600;
        fs::write(&token, issuer.token(&json!({ "exp": hour }))?)?;
        let server = sandbox.spawn("/servers", &["serve-crowd", SERVER])?;
        let (parent, socket) = (sandbox.cgroup.child("/agents")?, sandbox.directory().join("workload.sock"));
        let crowd = sandbox.spawn(
            "/agents/first",
            &[
                "crowd",
                "--parent",
                parent.to_str().context("a path")?,
                "--socket",
                socket.to_str().context("a path")?,
                "--token-file",
                token.to_str().context("a path")?,
                "--rule",
                "crowd",
                "--instances",
                &INSTANCES.to_string(),
                "--flows",
                &FLOWS.to_string(),
                SERVER,
            ],
        )?;
        let maps = object::maps_directory(sandbox.pins(), &Sizes::default());
        let pinned = |name: &str| MapData::from_pin(maps.join(name)).context(name.to_owned());
        let slots = Array::try_from(Map::Array(pinned(names::SLOTS)?))?;
        let grants = HashMap::try_from(Map::HashMap(pinned(names::GRANTS)?))?;
        let (of, kind) = (AddressFamily::Netlink, SockType::Raw);
        let (flags, protocol) = (SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag);
        let diag = sandbox.netns.within(|| Ok(socket::socket(of, kind, flags, protocol)?))?;
        Ok(Self { crowd, server, diag, slots, grants, _daemon: daemon, sandbox })
    }

    /// Ends an instance's grant by the daemon. Returns what it says of it.
    fn revoke(&mut self, instance: u32, samples: &mut Samples) -> Result<Effect> {
        let ends = self.watch(instance)?;
        let what = Revoked::Instance(format!("/agents/a{instance}"));
        let request = Request::Revoke { what, text: "benchmark".to_owned() };
        let effect = match client::ask(&self.sandbox.directory().join("admin.sock"), &request)? {
            Answer::Revoked(effect) => effect,
            other => bail!("{other:?}"),
        };
        ensure!(effect.grants == 1 && effect.destroyed == FLOWS as usize, "{effect:?}");
        let decided = u64::try_from(effect.decided.as_nanosecond())?;
        self.died(&ends, decided, samples)?;
        Ok(effect)
    }

    /// Ends an instance's grant by one map update, and its sockets by one message (SOCK_DESTROY, sock_diag(7)). Returns how
    /// long the first took, in ns.
    fn cut(&mut self, instance: u32, samples: &mut Samples) -> Result<f64> {
        let ends = self.watch(instance)?;
        let directory = self.sandbox.cgroup.path().join(format!("agents/a{instance}"));
        let scope = fs::metadata(directory)?.ino();
        let entry = self.grants.iter().filter_map(Result::ok).find(|(key, _)| key.scope == scope);
        let (_, grant) = entry.context("the instance has a grant")?;
        let mut message = Vec::new();
        for (at, end) in ends.iter().enumerate() {
            message::put_destroy(&mut message, at as u32, &end_of(at, *end)?);
        }
        let cut = now();
        self.slots.set(grant.slot, Slot { until: 0, serial: grant.serial, rule: grant.slot }, 0)?;
        let update = now() - cut;
        send(self.diag.as_raw_fd(), &message, MsgFlags::empty())?;
        self.died(&ends, cut, samples)?;
        Ok(update as f64)
    }

    fn watch(&mut self, instance: u32) -> Result<Vec<SocketAddr>> {
        self.crowd.tell(&format!("watch {instance}"))?;
        let armed = self.crowd.heard()?;
        ensure!(armed.ok, "{armed:?}");
        Ok(serde_json::from_str(&armed.detail)?)
    }

    fn died(&mut self, ends: &[SocketAddr], cut: u64, samples: &mut Samples) -> Result<()> {
        let watched: Watched = serde_json::from_str(&self.crowd.heard()?.detail)?;
        self.server.tell(&format!("last {}", ends.first().context("an end")?.port()))?;
        let last = self.server.heard()?;
        ensure!(last.ok, "nothing was delivered at all");
        let since = |at: u64| at as f64 - cut as f64;
        if watched.refused.saturating_sub(last.count) < PAUSE {
            samples.delivered.push(since(last.count).max(0.0));
        }
        let aborted = watched.aborted.iter().max().context("an end")?;
        samples.aborted.push(since(*aborted));
        Ok(())
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}

/// One end of an instance's connection, by its place among them.
fn end_of(at: usize, end: SocketAddr) -> Result<Socket> {
    let server: SocketAddr = SERVER.parse()?;
    Ok(Socket {
        protocol: if at == 0 { Protocol::Udp } else { Protocol::Tcp },
        local: from_ip(end.ip()),
        local_port: end.port(),
        remote: from_ip(server.ip()),
        remote_port: server.port(),
        interface: 0,
        // INET_DIAG_NOCOOKIE: whichever socket has these ends.
        cookie: u64::MAX,
    })
}

fn policy() -> String {
    format!(
        r#"
trust_domain = "example.org"
[[workload]]
name = "agent"
kind = "agent"
cgroup = "/agents/*"
[[issuer]]
name = "corp"
kind = "jwt"
issuer = "{ISSUER}"
jwks_file = "jwks.json"
algorithms = ["ES256"]
max_ttl = "2h"
[[service]]
name = "crowded"
addresses = ["127.0.0.1"]
ports = ["tcp/7106", "udp/7106"]
[[rule]]
name = "crowd"
from = ["agent"]
to = ["crowded"]
require = ["token"]
token = {{ issuer = "corp", audience = "ledger" }}
grant_ttl = "1h"
"#
    )
}
