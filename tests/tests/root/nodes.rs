//! Two nodes, each with an authd of its own, joined by a pair of interfaces: callers of one are known at the other by what
//! their SYNs say.

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
};
use authd_common::{
    address::Address,
    syn::{LabelKey, Voice, mac, option, syn_key},
    tables::names,
};
use authd_tests::{
    daemon::{Daemon, PATIENCE},
    probe::Running,
    sandbox::Sandbox,
    trust::Authority,
    wire::{self, Wire},
};
use aya::maps::{HashMap, Map, MapData};
use jiff::Timestamp;
use libtest_mimic::Trial;

use crate::{Verdict, reload::wait_until, trial};

pub fn trials() -> Vec<Trial> {
    // What kernels may differ in.
    let mut trials = vec![
        trial("callers_are_known_at_interfaces_of_another_node", callers_are_known_at_interfaces),
        trial("what_a_syn_says_is_refused_at_interfaces_unless_all_of_it_is_true", forgeries_are_refused_at_interfaces),
        trial("what_a_syn_says_is_refused_unless_all_of_it_is_true", forgeries_are_refused),
        trial("keys_follow_each_other_without_a_lost_connection", keys_follow_each_other),
    ];
    // What they have no part in takes an emulated machine too long.
    if std::env::var_os("AUTHD_EMULATED").is_none() {
        trials.extend([
            trial("callers_are_known_on_another_node", callers_are_known_on_another_node),
            trial("nodes_go_on_when_one_of_them_restarts", nodes_go_on_when_one_restarts),
            trial("a_node_that_lost_everything_is_spoken_to_again", a_node_that_lost_everything),
            trial("a_caller_elsewhere_can_be_revoked", a_caller_elsewhere_can_be_revoked),
            trial("a_policy_takes_back_what_a_node_may_say", a_policy_takes_back_what_a_node_may_say),
            trial("what_a_node_said_ends_with_its_session", what_a_node_said_ends),
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
        authority.issue_spiffe(sandbox.directory(), "node", &format!("spiffe://example.org/node/{name}"))?;
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
        let pair = Self { a, b, _servers: servers };
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
    let rounds = if std::env::var_os("AUTHD_EMULATED").is_some() { 1 } else { 3 };
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

/// Octets of a SYN of `a`'s, from its IP header on, behind which nobody waits for an answer.
#[derive(Clone)]
struct Syn {
    source: [u8; 4],
    port: u16,
    sequence: u32,
    option: Vec<u8>,
    flags: u8,
}

impl Syn {
    fn new(option: &[u32; 4], port: u16, sequence: u32) -> Self {
        let option = option.iter().flat_map(|word| word.to_ne_bytes()).collect();
        Self { source: [192, 0, 2, 1], port, sequence, option, flags: 0x02 }
    }

    fn frame(&self, to: [u8; 6]) -> Vec<u8> {
        let words = (20 + self.option.len()) / 4;
        let mut tcp = [self.port.to_be_bytes(), 7001_u16.to_be_bytes()].concat();
        tcp.extend(self.sequence.to_be_bytes());
        tcp.extend([0, 0, 0, 0, (words as u8) << 4, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(&self.option);
        let pseudo = [&self.source[..], &[192, 0, 2, 2, 0, 6], &(tcp.len() as u16).to_be_bytes(), &tcp].concat();
        tcp[16..18].copy_from_slice(&checksum(&pseudo).to_be_bytes());
        let mut ip = vec![0x45, 0];
        ip.extend((20 + tcp.len() as u16).to_be_bytes());
        ip.extend([0, 0, 0, 0, 64, 6, 0, 0]);
        ip.extend([self.source, [192, 0, 2, 2]].concat());
        let sum = checksum(&ip).to_be_bytes();
        ip[10..12].copy_from_slice(&sum);
        [&to[..], &[2, 0, 0, 0, 0, 9, 8, 0], &ip, &tcp].concat()
    }
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

/// What `a` has of its session with `b`.
struct Stolen {
    secret: [u64; 2],
    key_id: u32,
    web: u32,
    batch: u32,
}

impl Stolen {
    /// From the kernel's tables, as root of `a` could.
    fn from(a: &Node) -> Result<Self> {
        let sizes = authd::dataplane::object::Sizes::default();
        let directory = authd::dataplane::object::maps_directory(a.sandbox.pins(), &sizes);
        let open = |name: &str| MapData::from_pin(directory.join(name)).with_context(|| name.to_owned());
        let voices: HashMap<_, u32, Voice> = Map::HashMap(open(names::VOICES)?).try_into()?;
        let labels: HashMap<_, LabelKey, u32> = Map::HashMap(open(names::LABELS)?).try_into()?;
        let voice = voices.iter().next().context("there is a session")??.1;
        let mut known: Vec<(LabelKey, u32)> = labels.iter().collect::<Result<_, _>>()?;
        known.retain(|(key, _)| key.bank == voice.bank);
        // Numbers of workloads are in the order of the policy.
        known.sort_by_key(|(key, _)| key.workload);
        let [(_, web), (_, batch)] = known[..] else { anyhow::bail!("labels: {known:?}") };
        Ok(Self { secret: voice.secret, key_id: voice.key_id, web, batch })
    }

    fn syn(&self, label: u32, port: u16, sequence: u32) -> Syn {
        let ends = ((Address::v4([192, 0, 2, 1]), port), (Address::v4([192, 0, 2, 2]), 7001));
        let mac = mac(self.secret, &syn_key(ends.0, ends.1, sequence), self.key_id, label);
        Syn::new(&option(mac, self.key_id, label), port, sequence)
    }
}

fn forgeries_are_refused() -> Result<Verdict> {
    forgeries("")
}

fn forgeries_are_refused_at_interfaces() -> Result<Verdict> {
    forgeries("interfaces = [\"far0\"]\n")
}

fn forgeries(of_b: &str) -> Result<Verdict> {
    let pair = Pair::new("control.node_session_seconds = 3600\n", of_b)?;
    // Whose port it is, is known from now on.
    pair.connects("/web", V4)?;
    let stolen = Stolen::from(&pair.a)?;
    let to = pair.b.sandbox.netns.within(|| wire::mac("far0"))?;
    let send = |syn: &Syn| pair.a.sandbox.netns.within(|| Wire::open("near0")?.send(&syn.frame(to)));
    let (port, sequence) = (40_000, 0x1234_5678);
    let sound = stolen.syn(stolen.web, port, sequence);
    let answered = |syn: &Syn| -> Result<bool> {
        let ports = [7001_u16.to_be_bytes(), syn.port.to_be_bytes()].concat();
        let is_answer = |frame: &[u8]| frame.get(34..38) == Some(&ports[..]) && frame.get(47) == Some(&0x12);
        pair.a.sandbox.netns.within(|| {
            let watch = Wire::watch("near0")?;
            Wire::open("near0")?.send(&syn.frame(to))?;
            Ok(watch.next(Duration::from_millis(1_000), is_answer)?.is_some())
        })
    };
    // What follows is refused for what is changed, and for nothing else.
    ensure!(answered(&sound)?, "{}", pair.logs());
    let changed = |change: &dyn Fn(&mut Syn)| {
        let mut syn = sound.clone();
        change(&mut syn);
        syn
    };
    let other_key = Stolen { secret: [stolen.secret[0] ^ 1, stolen.secret[1]], ..stolen };
    let mut cases: Vec<(&str, Syn)> = vec![
        ("node_mac_wrong", other_key.syn(stolen.web, port, sequence)),
        ("node_mac_wrong", changed(&|syn| syn.source = [192, 0, 2, 200])),
        ("node_mac_wrong", changed(&|syn| syn.port += 1)),
        ("node_mac_wrong", changed(&|syn| syn.sequence += 1)),
        ("node_key_unknown", Stolen { key_id: stolen.key_id ^ 0x80, ..stolen }.syn(stolen.web, port, sequence)),
        ("node_key_unknown", stolen.syn(stolen.web ^ 1, port, sequence)),
        ("node_identity_missing", changed(&|syn| syn.option.clear())),
        ("node_identity_missing", changed(&|syn| syn.option[0] = 254)),
        ("node_identity_missing", changed(&|syn| syn.option[3] ^= 1)),
        // Not the last of the header: somebody put something behind it.
        ("node_identity_missing", changed(&|syn| syn.option.extend([1, 1, 1, 1]))),
        ("node_identity_missing", changed(&|syn| syn.option.truncate(12))),
        ("caller_not_named", stolen.syn(stolen.batch, port, sequence)),
    ];
    // Each octet of what authenticates; a key or a label that nobody has is as good as a wrong one.
    cases.extend((4..12).map(|octet| ("node_mac_wrong", changed(&|syn| syn.option[octet] ^= 0x10))));
    let mut meant: BTreeMap<&str, u64> = BTreeMap::new();
    for (reason, _) in &cases {
        *meant.entry(reason).or_default() += 1;
    }
    let told = || -> Result<BTreeMap<&str, u64>> {
        meant.keys().map(|reason| Ok((*reason, denials(&pair.b, reason)?))).collect()
    };
    ensure!(told()?.values().all(|count| *count == 0), "{:?}", told()?);
    let is_answer = |frame: &[u8]| frame.get(34..36) == Some(&7001_u16.to_be_bytes()) && frame.get(47) == Some(&0x12);
    let watch = pair.a.sandbox.netns.within(|| Wire::watch("near0"))?;
    cases.iter().try_for_each(|(_, syn)| send(syn))?;
    wait_until("the refusals", || Ok(told()?.values().sum::<u64>() >= cases.len() as u64))
        .with_context(|| format!("{:?}", told()))?;
    ensure!(told()? == meant, "{:?}, not {meant:?}", told()?);
    ensure!(watch.next(Duration::from_millis(200), is_answer)?.is_none(), "a forgery is answered");
    // A flood of forged SYNs with the caller's own address does not keep the caller out.
    pair.a.sandbox.netns.within(|| {
        let wire = Wire::open("near0")?;
        (0..2_000).try_for_each(|n| wire.send(&other_key.syn(stolen.web, 1_024 + n, sequence).frame(to)))
    })?;
    pair.connects("/web", V4)?;
    replayed(&pair, &answered)?;
    Ok(Verdict::Ran)
}

/// A SYN that was seen on its way is worth nothing once its connection came about, whatever became of that.
fn replayed(pair: &Pair, answered: &dyn Fn(&Syn) -> Result<bool>) -> Result<()> {
    let is_syn = |frame: &[u8]| frame.get(36..38) == Some(&7001_u16.to_be_bytes()) && frame.get(47) == Some(&0x02);
    let watch = pair.a.sandbox.netns.within(|| Wire::watch("near0"))?;
    pair.connects("/web", V4)?;
    let seen = watch.next(PATIENCE, is_syn)?.context("a SYN passes")?;
    let tcp = &seen[34..];
    let length = usize::from(tcp[12] >> 4) * 4;
    let syn = Syn {
        source: [192, 0, 2, 1],
        port: u16::from_be_bytes([tcp[0], tcp[1]]),
        sequence: u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]),
        option: tcp[20..length].to_vec(),
        flags: 0x02,
    };
    ensure!(syn.option.len() > 16 && syn.option[syn.option.len() - 16..][..4] == [253, 16, 0xa0, 0x7d], "{tcp:02x?}");
    let before = denials(&pair.b, "node_replay")?;
    ensure!(!answered(&syn)?, "a SYN is answered twice");
    wait_until("the replay", || Ok(denials(&pair.b, "node_replay")? > before))
}

fn denials(node: &Node, reason: &str) -> Result<u64> {
    let records = node.daemon.records()?;
    let denied = records.iter().filter(|r| r.event == "flow_denied" && r.reason.as_deref() == Some(reason));
    Ok(denied.filter_map(|r| r.count).sum())
}

/// As the shortest sessions that there can be allow.
const SHORT: &str = "control.node_session_seconds = 4\n";

fn keys_follow_each_other() -> Result<Verdict> {
    let pair = Pair::new(SHORT, "interfaces = [\"far0\"]\n")?;
    let sink = "192.0.2.2:7002";
    let _sink = pair.b.sandbox.spawn("/db", &["serve-sink", sink])?;
    let sessions =
        || -> Result<usize> { Ok(pair.b.daemon.records()?.iter().filter(|r| r.event == "node_admitted").count()) };
    let before = sessions()?;
    let load = pair.a.sandbox.spawn_in("/web", &pair.a.sandbox.netns, &["hammer", sink, "--threads", "2"])?;
    wait_until("four more keys", || Ok(sessions()? >= before + 4)).with_context(|| pair.logs())?;
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
    let mut pair = Pair::new("control.node_session_seconds = 3600\n", "")?;
    pair.connects("/web", V4)?;
    pair.b.daemon.terminate()?;
    authd::daemon::remove_enforcement(pair.b.sandbox.pins())?;
    pair.b.daemon = Daemon::start_inside(&pair.b.sandbox)?;
    let sessions = |pair: &Pair| -> Result<usize> {
        Ok(pair.b.daemon.records()?.iter().filter(|r| r.event == "node_admitted").count())
    };
    let before = 1;
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
