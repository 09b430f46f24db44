//! Two nodes, each with an authd of its own, joined by a pair of interfaces: callers of one are known at the other by what
//! their SYNs say.

mod forged;
mod more;

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::fs::PermissionsExt,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use authd::{
    audit::record::Record,
    daemon::status::{self, NodeSession, Outbound},
    digest::Digest,
};
use authd_tests::{
    daemon::{Daemon, PATIENCE, emulated},
    probe::Running,
    sandbox::Sandbox,
    trust::{Authority, serial_of},
    wire::{self, Wire},
};
use jiff::Timestamp;
use libtest_mimic::Trial;
use rcgen::SanType;
use rustls::pki_types::{CertificateDer, pem::PemObject};

use self::forged::Stolen;
use crate::{Verdict, reload::wait_until, trial};

pub fn trials() -> Vec<Trial> {
    // What kernels may differ in.
    let mut trials = vec![
        trial("callers_are_known_at_interfaces_of_another_node", callers_are_known_at_interfaces),
        trial(
            "what_a_syn_says_is_refused_at_interfaces_unless_all_of_it_is_true",
            forged::forgeries_are_refused_at_interfaces,
        ),
        trial("what_a_syn_says_is_refused_unless_all_of_it_is_true", forged::forgeries_are_refused),
        trial("keys_follow_each_other_without_a_lost_connection", keys_follow_each_other),
    ];
    // What they have no part in takes an emulated machine too long.
    if !emulated() {
        trials.extend([
            trial("callers_are_known_on_another_node", callers_are_known_on_another_node),
            trial("nodes_go_on_when_one_of_them_restarts", nodes_go_on_when_one_restarts),
            trial("a_node_that_lost_everything_is_spoken_to_again", a_node_that_lost_everything),
            trial("a_caller_elsewhere_can_be_revoked", a_caller_elsewhere_can_be_revoked),
            trial("a_nodes_word_is_revoked_by_the_certificate_that_it_shows_now", revoked_by_the_certificate_of_now),
            trial("a_new_list_of_the_issuer_ends_a_nodes_word", a_new_list_ends_a_nodes_word),
            trial("a_policy_takes_back_what_a_node_may_say", a_policy_takes_back_what_a_node_may_say),
            trial("what_a_node_said_ends_with_its_session", what_a_node_said_ends),
            trial("a_caller_elsewhere_shows_more_than_its_nodes_word", more::shows_more_than_a_word),
            trial("interfaces_tell_who_lacks_proofs_from_who_lacks_a_word", more::lacking_proofs_and_a_word),
        ]);
    }
    // Another clock takes a library of others, which emulated machines have not.
    if Path::new(FAKETIME).exists() {
        trials.push(trial("nodes_whose_clocks_differ_by_minutes_understand_each_other", clocks_may_differ));
    }
    trials
}

/// Of Debian's package `faketime`.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

const POLICY: &str = r#"
trust_domain = "example.org"
[[authority]]
name = "nodes"
bundle = "nodes.crt"
trust_domain = "example.org"
[[node]]
name = "a"
spiffe_id = "spiffe://example.org/node/a"
address = "192.0.2.1:7443"
networks = ["192.0.2.1", "2001:db8::1"]
speaks_for = ["spiffe://example.org/web", "spiffe://example.org/batch"]
[[node]]
name = "b"
spiffe_id = "spiffe://example.org/node/b"
address = "192.0.2.2:7443"
networks = ["192.0.2.2", "2001:db8::2"]
[[workload]]
name = "web"
kind = "service"
cgroup = "/web"
[[workload]]
name = "batch"
kind = "service"
cgroup = "/batch"
[[workload]]
name = "cron"
kind = "service"
cgroup = "/cron"
[[workload]]
name = "db"
kind = "service"
cgroup = "/db"
[[peer]]
name = "web-elsewhere"
spiffe_id = "spiffe://example.org/web"
[[service]]
name = "sql"
workload = "db"
ports = ["tcp/7001", "tcp/7002"]
[[service]]
name = "sql-of-b"
addresses = ["192.0.2.2", "2001:db8::2"]
ports = ["tcp/7001", "tcp/7002"]
[[rule]]
name = "out"
from = ["web", "batch", "cron"]
to = ["sql-of-b"]
[[rule]]
name = "web-sql"
from = ["web-elsewhere"]
to = ["sql"]
require = ["node"]
"#;

const V4: &str = "192.0.2.2:7001";
const V6: &str = "[2001:db8::2]:7001";

struct Node {
    daemon: Daemon,
    sandbox: Sandbox,
}

impl Node {
    /// One whose clock is ahead of the others' by so many minutes.
    fn new(
        sandbox: Sandbox,
        authority: &Authority,
        name: &str,
        address: &str,
        settings: &str,
        ahead: Option<i32>,
    ) -> Result<Self> {
        std::fs::write(sandbox.policy_directory().join("nodes.crt"), authority.pem())?;
        // Its listener is called by nodes, which know it by its SPIFFE ID, and by callers, who know it by its address.
        let id = format!("spiffe://example.org/node/{name}");
        let names = vec![SanType::URI(id.as_str().try_into()?), SanType::IpAddress(address.parse()?)];
        authority.issue(sandbox.directory(), "node", names)?;
        let file = |name: &str| sandbox.directory().join(name);
        sandbox.add_settings(&format!(
            "control.listen = \"{address}:7443\"\ncontrol.certificate = {:?}\ncontrol.key = {:?}\n{settings}",
            file("node.pem"),
            file("node.key"),
        ))?;
        sandbox.write_policy(POLICY)?;
        let environment = ahead.map(|minutes| ahead_by(&sandbox, minutes)).transpose()?.unwrap_or_default();
        let daemon = Daemon::start_inside_with(&sandbox, &environment)?;
        wait_until("the control process", || Ok(daemon.status()?.control_ready)).with_context(|| daemon.log())?;
        Ok(Self { daemon, sandbox })
    }
}

/// What puts a daemon's clock of people ahead, and its control process's. Elapsed time stays what it is.
fn ahead_by(sandbox: &Sandbox, minutes: i32) -> Result<Vec<(&'static str, String)>> {
    let offset = format!("{minutes:+}m");
    let control = sandbox.directory().join("control.sh");
    let binary = authd_tests::daemon::binary();
    std::fs::write(
        &control,
        format!(
            "#!/bin/sh\nexec env LD_PRELOAD={FAKETIME} FAKETIME={offset} FAKETIME_DONT_FAKE_MONOTONIC=1 \
             FAKETIME_DISABLE_SHM=1 {} \"$@\"\n",
            binary.display()
        ),
    )?;
    std::fs::set_permissions(&control, std::fs::Permissions::from_mode(0o755))?;
    Ok(vec![
        ("LD_PRELOAD", FAKETIME.to_owned()),
        ("FAKETIME", offset),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ("FAKETIME_DISABLE_SHM", "1".to_owned()),
        ("AUTHD_TEST_CONTROL", control.display().to_string()),
    ])
}

/// Workloads of `a` call what `b` guards.
struct Pair {
    a: Node,
    b: Node,
    authority: Authority,
    _servers: Vec<Running>,
}

impl Pair {
    fn new(settings: &str, of_b: &str) -> Result<Self> {
        Self::with_clock(settings, of_b, None)
    }

    fn with_clock(settings: &str, of_b: &str, ahead: Option<i32>) -> Result<Self> {
        let (a, b) = (Sandbox::new()?, Sandbox::new()?);
        let addresses = (&["192.0.2.1/24", "2001:db8::1/64"][..], &["192.0.2.2/24", "2001:db8::2/64"][..]);
        a.netns.join(&b.netns, ("near0", "far0"), addresses)?;
        let authority = Authority::new("nodes")?;
        let b = Node::new(b, &authority, "b", "192.0.2.2", &[settings, of_b].concat(), ahead)?;
        let a = Node::new(a, &authority, "a", "192.0.2.1", settings, None)?;
        let servers = [V4, V6].map(|at| b.sandbox.spawn("/db", &["serve-tcp", at]));
        let servers = servers.into_iter().collect::<Result<_>>()?;
        let pair = Self { a, b, authority, _servers: servers };
        pair.a.daemon.wait_for("the session", |r| r.event == "node_accepts").with_context(|| pair.logs())?;
        Ok(pair)
    }

    fn logs(&self) -> String {
        format!("a: {}\nb: {}", self.a.daemon.log(), self.b.daemon.log())
    }

    fn connects(&self, from: &str, to: &str) -> Result<()> {
        let outcome = self.attempt(from, to)?.next_within(PATIENCE)?;
        ensure!(outcome.as_ref().is_some_and(|o| o.ok), "{from} to {to}: {outcome:?}\n{}", self.logs());
        Ok(())
    }

    /// None does, for as long as a second SYN takes.
    fn is_kept_out(&self, from: &str, to: &str) -> Result<()> {
        let outcome = self.attempt(from, to)?.next_within(Duration::from_millis(1_500))?;
        ensure!(outcome.as_ref().is_none_or(|o| !o.ok), "{from} to {to} comes about\n{}", self.logs());
        Ok(())
    }

    fn attempt(&self, from: &str, to: &str) -> Result<Running> {
        self.a.sandbox.spawn_quietly_in(from, &self.a.sandbox.netns, &["tcp", to, "--timeout-ms", "20000"])
    }

    fn is_denied_for(&self, reason: &str) -> Result<Record> {
        self.b
            .daemon
            .wait_for(reason, |r| r.event == "flow_denied" && r.reason.as_deref() == Some(reason))
            .with_context(|| self.logs())
    }
}

fn callers_are_known_on_another_node() -> Result<Verdict> {
    callers_are_known("")
}

fn callers_are_known_at_interfaces() -> Result<Verdict> {
    callers_are_known("interfaces = [\"far0\"]\n")
}

fn callers_are_known(of_b: &str) -> Result<Verdict> {
    let pair = Pair::new("", of_b)?;
    let rounds = if emulated() { 1 } else { 3 };
    for round in 0..rounds {
        for to in [V4, V6] {
            pair.connects("/web", to).with_context(|| format!("round {round}"))?;
        }
        for who in ["/batch", "/cron", "/elsewhere"] {
            for to in [V4, V6] {
                pair.is_kept_out(who, to)?;
            }
        }
    }
    let opened = pair.b.daemon.wait_for("the flow", |r| {
        r.event == "flow_opened" && r.direction.as_deref() == Some("inbound") && r.local_port == Some(7001)
    })?;
    ensure!(opened.rule.as_deref() == Some("web-sql") && opened.workload.as_deref() == Some("db"), "{opened:?}");
    ensure!(opened.peer_node.as_deref() == Some("a") && opened.peer_key_id.is_some(), "{opened:?}");
    ensure!(opened.peer_spiffe_id.as_deref() == Some("spiffe://example.org/web"), "{opened:?}");
    ensure!(opened.grant.is_some(), "{opened:?}");
    let denied = pair.is_denied_for("caller_not_named")?;
    ensure!(denied.local_port == Some(7001), "{denied:?}");
    pair.is_denied_for("node_identity_missing")?;
    is_told_of(&pair)?;
    if of_b.is_empty() {
        ensure!(denied.peer_spiffe_id.as_deref() == Some("spiffe://example.org/batch"), "{denied:?}");
    }
    Ok(Verdict::Ran)
}

/// What each of the two says of the other one.
fn is_told_of(pair: &Pair) -> Result<()> {
    let of = |node: &Node, name: &str| -> Result<status::Node> {
        let found = node.daemon.status()?.nodes.into_iter().find(|known| known.name == name);
        found.with_context(|| format!("no node {name}"))
    };
    let mut found = String::new();
    // A key may follow another one meanwhile.
    wait_until("the same session at both ends", || {
        let (at_a, at_b) = (of(&pair.a, "b")?, of(&pair.b, "a")?);
        found = format!("{at_a:?} {at_b:?}");
        let (Outbound::Session(spoken), Some(heard)) = (at_a.outbound, at_b.inbound.session) else { return Ok(false) };
        let holds = |session: NodeSession, seconds| (1..=seconds).contains(&session.seconds_left);
        // Who speaks stops somewhat earlier.
        let same = spoken.key_id == heard.key_id && holds(spoken, 540) && holds(heard, 600);
        Ok(same && !at_a.inbound.may_speak && at_b.inbound.may_speak && at_b.inbound.callers == 2)
    })
    .with_context(|| found.clone())?;
    for (node, name) in [(&pair.a, "a"), (&pair.b, "b")] {
        let own = of(node, name)?;
        ensure!(matches!(own.outbound, Outbound::Own), "{own:?}");
    }
    let printed =
        |node: &Node, how: &[&str]| -> Result<String> { Ok(String::from_utf8(node.daemon.command(how)?.stdout)?) };
    for (node, expected) in [
        (&pair.a, ["  a                      this node\n", "  b                      told who calls (key "]),
        (
            &pair.b,
            ["  a                      not told who calls (no session); speaks for 2 callers (key ", "this node\n"],
        ),
    ] {
        let text = printed(node, &["status"])?;
        let (_, text) = text.split_once("\nnodes\n").context("nodes")?;
        ensure!(expected.iter().all(|line| text.contains(line)), "{text}");
    }
    let (at_a, at_b) = (printed(&pair.a, &["status", "--prometheus"])?, printed(&pair.b, &["status", "--prometheus"])?);
    let samples = |text: &str| -> Vec<String> {
        text.lines().filter(|line| line.starts_with("authd_node_")).map(str::to_owned).collect()
    };
    let (at_a, at_b) = (samples(&at_a), samples(&at_b));
    let begins = |samples: &[String], text: &str| samples.iter().any(|sample| sample.starts_with(text));
    let left = "authd_node_session_remaining_seconds";
    ensure!(begins(&at_a, &format!("{left}{{node=\"b\",direction=\"outbound\"}} ")), "{at_a:?}");
    ensure!(at_a.iter().all(|sample| !sample.contains("node=\"a\"")), "{at_a:?}");
    ensure!(begins(&at_b, &format!("{left}{{node=\"a\",direction=\"outbound\"}} 0")), "{at_b:?}");
    ensure!(begins(&at_b, &format!("{left}{{node=\"a\",direction=\"inbound\"}} ")), "{at_b:?}");
    ensure!(begins(&at_b, "authd_node_callers{node=\"a\"} 2"), "{at_b:?}");
    ensure!(begins(&at_b, "authd_node_sessions_total{result=\"accepted\"} "), "{at_b:?}");
    Ok(())
}

fn denials(node: &Node, reason: &str) -> Result<u64> {
    let records = node.daemon.records()?;
    let denied = records.iter().filter(|r| r.event == "flow_denied" && r.reason.as_deref() == Some(reason));
    Ok(denied.filter_map(|r| r.count).sum())
}

/// Sessions that are renewed every few seconds.
const SHORT: &str = "control.node_session_seconds = 8\n";
/// An emulated machine under load is too slow to renew these always in time.
const SHORT_EMULATED: &str = "control.node_session_seconds = 16\n";

fn keys_follow_each_other() -> Result<Verdict> {
    let settings = if emulated() { SHORT_EMULATED } else { SHORT };
    let pair = Pair::new(settings, "interfaces = [\"far0\"]\n")?;
    let sink = "192.0.2.2:7002";
    let _sink = pair.b.sandbox.spawn("/db", &["serve-sink", sink])?;
    let load = pair.a.sandbox.spawn_in("/web", &pair.a.sandbox.netns, &["hammer", sink, "--threads", "2"])?;
    // Not by the records: with a line for each connection they are long.
    let mut used = BTreeSet::new();
    wait_until("four more keys", || {
        let nodes = pair.b.daemon.status()?.nodes;
        used.extend(nodes.into_iter().filter_map(|node| node.inbound.session).map(|session| session.key_id));
        Ok(used.len() >= 5)
    })
    .with_context(|| pair.logs())?;
    let told = load.finish()?;
    let results: BTreeMap<String, u64> = serde_json::from_str(&told.detail)?;
    ensure!(results.keys().all(|result| result == "7002 ok"), "{results:?}\n{}", pair.logs());
    let records = pair.b.daemon.records()?;
    let refused: Vec<&Record> = records.iter().filter(|r| r.event == "flow_denied").collect();
    ensure!(refused.is_empty(), "{refused:?}");
    let keys: BTreeSet<u32> =
        records.iter().filter(|r| r.event == "flow_opened").filter_map(|r| r.peer_key_id).collect();
    ensure!(keys.len() >= 3, "{keys:?}");
    println!("{} connections under {} keys", results.values().sum::<u64>(), keys.len());
    Ok(Verdict::Ran)
}

fn nodes_go_on_when_one_restarts() -> Result<Verdict> {
    let mut pair = Pair::new("control.node_session_seconds = 20\n", "")?;
    pair.connects("/web", V4)?;
    for who in ["b", "a"] {
        let node = if who == "b" { &mut pair.b } else { &mut pair.a };
        node.daemon.kill_hard()?;
        pair.connects("/web", V4).with_context(|| format!("{who} is down"))?;
        pair.is_kept_out("/batch", V4)?;
        let node = if who == "b" { &mut pair.b } else { &mut pair.a };
        node.daemon = Daemon::start_inside(&node.sandbox)?;
        for _ in 0..2 {
            pair.connects("/web", V4).with_context(|| format!("{who} is up again"))?;
            pair.is_kept_out("/batch", V4)?;
            let sessions = |node: &Node, event: &str| -> Result<usize> {
                Ok(node.daemon.records()?.iter().filter(|r| r.event == event).count())
            };
            let before = sessions(&pair.b, "node_admitted")?;
            wait_until("another session", || Ok(sessions(&pair.b, "node_admitted")? > before))
                .with_context(|| pair.logs())?;
        }
    }
    pair.connects("/web", V4)?;
    Ok(Verdict::Ran)
}

/// As after a machine's start: keys and callers of the sessions before are gone, long before these would be renewed.
fn a_node_that_lost_everything() -> Result<Verdict> {
    let mut pair = Pair::new(LONG, "")?;
    pair.connects("/web", V4)?;
    let sessions = |pair: &Pair| -> Result<usize> {
        Ok(pair.b.daemon.records()?.iter().filter(|r| r.event == "node_admitted").count())
    };
    pair.b.daemon.terminate()?;
    let before = sessions(&pair)?;
    authd::daemon::remove_enforcement(pair.b.sandbox.pins())?;
    pair.b.daemon = Daemon::start_inside(&pair.b.sandbox)?;
    wait_until("another session", || Ok(sessions(&pair)? > before)).with_context(|| pair.logs())?;
    wait_until("a connection", || {
        Ok(pair.attempt("/web", V4)?.next_within(Duration::from_secs(5))?.is_some_and(|outcome| outcome.ok))
    })
    .with_context(|| pair.logs())?;
    pair.is_kept_out("/batch", V4)?;
    Ok(Verdict::Ran)
}

/// Certificates have times of day. What is agreed upon has none.
fn clocks_may_differ() -> Result<Verdict> {
    for minutes in [7, -7] {
        let pair = Pair::with_clock("control.node_session_seconds = 6\n", "", Some(minutes))?;
        let started = pair.b.daemon.wait_for("the start", |r| r.event == "daemon_started")?;
        let off = started.time.parse::<Timestamp>()?.duration_since(Timestamp::now()).as_mins();
        ensure!((off - i64::from(minutes)).abs() <= 1, "its clock is off by {off} minutes");
        let sessions =
            || -> Result<usize> { Ok(pair.b.daemon.records()?.iter().filter(|r| r.event == "node_admitted").count()) };
        for _ in 0..3 {
            pair.connects("/web", V4).with_context(|| format!("{minutes} minutes"))?;
            pair.is_kept_out("/batch", V4)?;
            let before = sessions()?;
            wait_until("another session", || Ok(sessions()? > before)).with_context(|| pair.logs())?;
        }
    }
    Ok(Verdict::Ran)
}

/// The other node is gone: what it said holds no longer than it was to, and nobody says anything in its name.
fn what_a_node_said_ends() -> Result<Verdict> {
    let mut pair = Pair::new(SHORT, "")?;
    pair.connects("/web", V4)?;
    let stolen = Stolen::from(&pair.a)?;
    let mut held = pair.a.sandbox.spawn_in("/web", &pair.a.sandbox.netns, &["hold-tcp", V4])?;
    ensure!(held.again()?.ok);
    pair.a.daemon.kill_hard()?;
    pair.b.daemon.wait_for("the end", |r| r.event == "grant_expired").with_context(|| pair.logs())?;
    ensure!(!held.again()?.ok, "it goes on");
    pair.is_kept_out("/web", V4)?;
    pair.is_denied_for("node_identity_missing")?;
    let to = pair.b.sandbox.netns.within(|| wire::mac("far0"))?;
    let late = stolen.syn(stolen.web, 40_000, 7);
    pair.a.sandbox.netns.within(|| Wire::open("near0")?.send(&late.frame(to)))?;
    pair.is_denied_for("node_key_expired")?;
    Ok(Verdict::Ran)
}

fn a_caller_elsewhere_can_be_revoked() -> Result<Verdict> {
    let pair = Pair::new(SHORT, "interfaces = [\"far0\"]\n")?;
    let mut held = pair.a.sandbox.spawn_in("/web", &pair.a.sandbox.netns, &["hold-tcp", V4])?;
    ensure!(held.again()?.ok);
    let output = pair.b.daemon.command(&["revoke", "spiffe-id", "spiffe://example.org/web"])?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(!held.again()?.ok, "it goes on");
    let is_cut = |r: &Record| r.event == "grant_revoked" && r.reason.as_deref() == Some("spiffe_id_revoked");
    let revoked = pair.b.daemon.wait_for("the grant's end", is_cut)?;
    ensure!(revoked.peer_node.as_deref() == Some("a"), "{revoked:?}");
    // Neither now nor with the next sessions.
    for _ in 0..2 {
        pair.is_kept_out("/web", V4)?;
        std::thread::sleep(Duration::from_secs(4));
    }
    Ok(Verdict::Ran)
}

/// `a` shows another certificate, which its authd reads by itself, and `b` hears of it with the session that follows at once.
fn renew_certificate(pair: &Pair) -> Result<[u8; 32]> {
    let id = "spiffe://example.org/node/a";
    let hash = pair.authority.issue_spiffe(pair.a.sandbox.directory(), "node", id)?;
    let shows = |r: &Record| r.proofs.iter().any(|proof| proof.certificate_sha256 == Some(Digest::from_bytes(hash)));
    pair.b.daemon.wait_for("a session", |r| r.event == "node_admitted" && shows(r)).with_context(|| pair.logs())?;
    Ok(hash)
}

/// Sessions hold for an hour: nothing ends by itself meanwhile.
const LONG: &str = "control.node_session_seconds = 3600\n";

fn revoked_by_the_certificate_of_now() -> Result<Verdict> {
    let pair = Pair::new(LONG, "")?;
    let first = pair.b.daemon.wait_for("the session", |r| r.event == "node_admitted")?;
    let first = first.proofs.first().and_then(|proof| proof.certificate_sha256).context("a certificate")?;
    let now = renew_certificate(&pair)?;
    let mut held = pair.a.sandbox.spawn_in("/web", &pair.a.sandbox.netns, &["hold-tcp", V4])?;
    ensure!(held.again()?.ok);
    let revoke = |certificate: String| -> Result<()> {
        let output = pair.b.daemon.command(&["revoke", "cert", &certificate])?;
        ensure!(output.status.success(), "{output:?}");
        Ok(())
    };
    // The one before is no part of what the node says now.
    revoke(first.to_string())?;
    ensure!(held.again()?.ok, "it is cut\n{}", pair.logs());
    revoke(Digest::from_bytes(now).to_string())?;
    ensure!(!held.again()?.ok, "it goes on");
    pair.is_kept_out("/web", V4)?;
    Ok(Verdict::Ran)
}

fn a_new_list_ends_a_nodes_word() -> Result<Verdict> {
    let pair = Pair::new(LONG, "")?;
    let list = |serials: &[Vec<u8>]| -> Result<()> {
        Ok(std::fs::write(pair.b.sandbox.policy_directory().join("nodes.crl"), pair.authority.list(serials)?)?)
    };
    list(&[])?;
    let with_list = POLICY.replace("bundle = \"nodes.crt\"", "bundle = \"nodes.crt\"\ncrl_files = [\"nodes.crl\"]");
    pair.b.sandbox.write_policy(&with_list)?;
    pair.b.daemon.must_apply()?;
    renew_certificate(&pair)?;
    let mut held = pair.a.sandbox.spawn_in("/web", &pair.a.sandbox.netns, &["hold-tcp", V4])?;
    ensure!(held.again()?.ok);
    let pem = std::fs::read(pair.a.sandbox.directory().join("node.pem"))?;
    let certificate = CertificateDer::from_pem_slice(&pem)?;
    list(&[serial_of(&certificate)?])?;
    let is_ended = |r: &Record| r.event == "grant_revoked" && r.reason.as_deref() == Some("certificate_revoked");
    pair.b.daemon.wait_for("the grant's end", is_ended).with_context(|| pair.logs())?;
    ensure!(!held.again()?.ok, "it goes on");
    pair.is_kept_out("/web", V4)?;
    // Nobody gets it back because something else changes.
    let before = pair.b.daemon.status()?.grants.grants_issued;
    pair.b.sandbox.write_policy(&format!("{with_list}# changed\n"))?;
    pair.b.daemon.must_apply()?;
    ensure!(pair.b.daemon.status()?.grants.grants_issued == before, "{}", pair.logs());
    Ok(Verdict::Ran)
}

fn a_policy_takes_back_what_a_node_may_say() -> Result<Verdict> {
    let pair = Pair::new(SHORT, "")?;
    for (said, instead) in [
        // What the node may say, and whom the rule names.
        ("\"spiffe://example.org/web\", ", ""),
        ("spiffe_id = \"spiffe://example.org/web\"", "spiffe_id = \"spiffe://example.org/batch\""),
    ] {
        pair.b.sandbox.write_policy(POLICY)?;
        pair.b.daemon.must_apply()?;
        // Until the next session nobody is known.
        let came = |pair: &Pair| pair.attempt("/web", V4)?.next_within(PATIENCE);
        wait_until("a connection", || Ok(came(&pair)?.is_some_and(|outcome| outcome.ok)))
            .with_context(|| pair.logs())?;
        let mut held = pair.a.sandbox.spawn_in("/web", &pair.a.sandbox.netns, &["hold-tcp", V4])?;
        let changed = POLICY.replace(said, instead);
        ensure!(changed != POLICY);
        pair.b.sandbox.write_policy(&changed)?;
        pair.b.daemon.must_apply()?;
        ensure!(!held.again()?.ok, "it goes on without {said}");
        pair.is_kept_out("/web", V4)?;
    }
    Ok(Verdict::Ran)
}
