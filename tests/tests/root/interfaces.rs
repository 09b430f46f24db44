//! Guarded services behind a guarded interface: what comes from outside is judged before the stack sees it.

use std::{
    net::{SocketAddr, UdpSocket},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use authd::{
    audit::record::Record,
    dataplane::{
        bpf::{self, XdpMode},
        object::{self, Hooks, Sizes},
    },
};
use authd_tests::{
    daemon::{Daemon, PATIENCE},
    netns::Netns,
    probe::Running,
    sandbox::Sandbox,
    wire::{self, Wire},
};
use libtest_mimic::Trial;

use crate::{Verdict, frames, reload::wait_until, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("an_interface_drops_what_no_rule_lets_in", an_interface_drops_what_no_rule_lets_in),
        trial("every_dropped_packet_is_counted", every_dropped_packet_is_counted),
        trial("a_flood_is_counted_to_the_last_packet", a_flood_is_counted_to_the_last_packet),
        trial("explain_says_of_frames_what_interfaces_do", explain_says_of_frames_what_interfaces_do),
        trial("flows_go_on_when_their_interface_is_guarded", flows_go_on_when_their_interface_is_guarded),
        trial(
            "services_older_than_authd_are_guarded_at_interfaces",
            services_older_than_authd_are_guarded_at_interfaces,
        ),
        trial(
            "an_interface_without_a_driver_for_it_is_guarded_in_the_stack",
            an_interface_without_a_driver_for_it_is_guarded_in_the_stack,
        ),
        trial("answers_to_a_guarded_port_are_no_calls", answers_to_a_guarded_port_are_no_calls),
        trial("an_interface_is_guarded_when_it_appears", an_interface_is_guarded_when_it_appears),
        trial("another_program_keeps_its_interface", another_program_keeps_its_interface),
        trial("a_port_that_changes_hands_is_judged_anew", a_port_that_changes_hands_is_judged_anew),
    ]
}

pub const POLICY: &str = r#"
trust_domain = "example.org"

[[workload]]
name = "db"
kind = "service"
cgroup = "/db"

[[workload]]
name = "time"
kind = "service"
cgroup = "/time"

[[peer]]
name = "office"
networks = ["192.0.2.0/25", "2001:db8::/80"]

[[service]]
name = "sql"
workload = "db"
ports = ["tcp/7001", "udp/7002"]

[[service]]
name = "clock"
workload = "time"
ports = ["udp/7123"]

[[service]]
name = "upstream"
addresses = ["192.0.2.200"]
ports = ["udp/7123"]

[[rule]]
name = "office-sql"
from = ["office"]
to = ["sql"]

[[rule]]
name = "office-clock"
from = ["office"]
to = ["clock"]

[[rule]]
name = "time-upstream"
from = ["time"]
to = ["upstream"]
"#;

/// A node whose interface `near0` leads to a far end that has one address inside the peer's networks and one outside.
struct Node {
    daemon: Daemon,
    far: Netns,
    sandbox: Sandbox,
}

impl Node {
    fn new(interfaces: &str) -> Result<Self> {
        let sandbox = Sandbox::new()?;
        let far = sandbox.another_netns("far")?;
        // What is sent from there is what tests send.
        far.within(|| Ok(std::fs::write("/proc/sys/net/ipv6/conf/default/router_solicitations", "0")?))?;
        join(&sandbox, &far)?;
        sandbox.write_policy(POLICY)?;
        sandbox.add_settings(interfaces)?;
        let daemon = Daemon::start_inside(&sandbox)?;
        Ok(Self { daemon, far, sandbox })
    }

    /// A connection from outside comes about.
    fn connects(&self, from: &str, to: &str) -> Result<()> {
        let outcome = self.attempt(from, to)?.next_within(PATIENCE)?;
        ensure!(outcome.as_ref().is_some_and(|o| o.ok), "{from} to {to}: {outcome:?}\n{}", self.daemon.log());
        Ok(())
    }

    /// None does, for as long as a second SYN takes. It is tried for as long as the attempt is kept.
    fn is_kept_out(&self, from: &str, to: &str) -> Result<Running> {
        let mut attempt = self.attempt(from, to)?;
        let outcome = attempt.next_within(Duration::from_millis(1_500))?;
        ensure!(outcome.as_ref().is_none_or(|o| !o.ok), "{from} to {to} comes about\n{}", self.daemon.log());
        Ok(attempt)
    }

    /// A blocking connect waits for minutes: whoever does not want to wait ends it.
    fn attempt(&self, from: &str, to: &str) -> Result<Running> {
        let arguments = ["tcp", to, "--from", from, "--timeout-ms", "20000"];
        self.sandbox.spawn_quietly_in("/elsewhere", &self.far, &arguments)
    }

    /// Sends datagrams from outside, all of which are answered.
    fn asks(&self, from: &str, to: &str, count: usize) -> Result<()> {
        let answered = self.datagrams(from, to, count, PATIENCE)?;
        ensure!(answered == count, "{answered} of {count} answers\n{}", self.daemon.log());
        Ok(())
    }

    /// The same, and none is.
    fn asks_in_vain(&self, from: &str, to: &str, count: usize) -> Result<()> {
        let answered = self.datagrams(from, to, count, Duration::from_millis(500))?;
        ensure!(answered == 0, "{answered} answers\n{}", self.daemon.log());
        Ok(())
    }

    fn datagrams(&self, from: &str, to: &str, count: usize, patience: Duration) -> Result<usize> {
        let (from, to): (SocketAddr, SocketAddr) = (from.parse()?, to.parse()?);
        self.far.within(move || {
            let socket = UdpSocket::bind(from)?;
            socket.set_read_timeout(Some(patience))?;
            let mut answer = [0; 64];
            let mut answered = 0;
            for n in 0..count {
                socket.send_to(&n.to_be_bytes(), to)?;
                // No more than its queue holds.
                if patience == PATIENCE && socket.recv_from(&mut answer).is_ok() {
                    answered += 1;
                }
            }
            if patience != PATIENCE && socket.recv_from(&mut answer).is_ok() {
                answered += 1;
            }
            Ok(answered)
        })
    }

    fn waits_for_mode(&self, mode: &str) -> Result<()> {
        wait_until(mode, || Ok(self.mode()? == mode))
    }

    fn mode(&self) -> Result<String> {
        Ok(self.daemon.status()?.interfaces.first().map(|i| i.mode.clone()).unwrap_or_default())
    }
}

fn join(sandbox: &Sandbox, far: &Netns) -> Result<()> {
    sandbox.netns.join(
        far,
        ("near0", "far0"),
        (
            &["192.0.2.1/24", "2001:db8::1/64"],
            &["192.0.2.2/24", "192.0.2.200/24", "2001:db8::2/64", "2001:db8::1:0:0:2/64"],
        ),
    )
}

const GUARDED: &str = "interfaces = [\"near0\"]\n";

fn is_drop(record: &Record) -> bool {
    record.event == "flow_denied" && record.hook.as_deref() == Some("xdp")
}

fn comes_from(record: &Record, address: &str) -> bool {
    record.remote_address.is_some_and(|a| a.to_string() == address)
}

fn an_interface_drops_what_no_rule_lets_in() -> Result<Verdict> {
    let node = Node::new(GUARDED)?;
    ensure!(node.mode()? == "native", "{:?}\n{}", node.daemon.status()?.interfaces, node.daemon.log());
    let _v4 = node.sandbox.spawn("/db", &["serve-tcp", "192.0.2.1:7001"])?;
    let _v6 = node.sandbox.spawn("/db", &["serve-tcp", "[2001:db8::1]:7001"])?;
    let _ssh = node.sandbox.spawn("/db", &["serve-tcp", "192.0.2.1:22"])?;
    let _other = node.sandbox.spawn("/elsewhere", &["serve-tcp", "192.0.2.1:7009"])?;
    let mut kept_out = Vec::new();
    for _ in 0..2 {
        for (from, to, passes) in [
            ("192.0.2.2:0", "192.0.2.1:7001", true),
            ("192.0.2.200:0", "192.0.2.1:7001", false),
            ("[2001:db8::2]:0", "[2001:db8::1]:7001", true),
            ("[2001:db8::1:0:0:2]:0", "[2001:db8::1]:7001", false),
            // The failsafe list, and what nobody guards.
            ("192.0.2.200:0", "192.0.2.1:22", true),
            ("192.0.2.200:0", "192.0.2.1:7009", true),
        ] {
            if passes { node.connects(from, to)? } else { kept_out.push(node.is_kept_out(from, to)?) }
        }
    }
    for source in ["192.0.2.200", "2001:db8::1:0:0:2"] {
        let dropped = node.daemon.wait_for("the drop", |r| is_drop(r) && comes_from(r, source))?;
        ensure!(
            dropped.reason.as_deref() == Some("no_rule") && dropped.workload.as_deref() == Some("db"),
            "{dropped:?}"
        );
        ensure!(dropped.local_port == Some(7001) && dropped.protocol.as_deref() == Some("tcp"), "{dropped:?}");
        ensure!(dropped.direction.as_deref() == Some("inbound") && dropped.count.is_some_and(|n| n > 0), "{dropped:?}");
    }
    let allowed = node.daemon.records()?.iter().filter(|r| is_drop(r) && comes_from(r, "192.0.2.2")).count();
    ensure!(allowed == 0);
    Ok(Verdict::Ran)
}

fn every_dropped_packet_is_counted() -> Result<Verdict> {
    const COUNT: usize = 1000;
    let node = Node::new(GUARDED)?;
    let _server = node.sandbox.spawn("/db", &["serve-udp", "192.0.2.1:7002"])?;
    node.asks("192.0.2.2:0", "192.0.2.1:7002", 10)?;
    node.asks_in_vain("192.0.2.200:0", "192.0.2.1:7002", COUNT)?;
    let denied = || -> Result<Vec<Record>> {
        Ok(node.daemon.records()?.into_iter().filter(|r| comes_from(r, "192.0.2.200")).collect())
    };
    let count = |records: &[Record]| records.iter().filter_map(|r| r.count).sum::<u64>();
    let sent = COUNT as u64 - node.far.within(|| wire::unsent("far0"))?;
    wait_until("the drops", || Ok(count(&denied()?) >= sent))?;
    // None is counted twice.
    std::thread::sleep(Duration::from_secs(2));
    let denied = denied()?;
    let count = count(&denied);
    ensure!(count == sent, "{count} of {sent}: {denied:#?}");
    let at_socket = denied.iter().filter(|r| !is_drop(r)).filter_map(|r| r.count).sum::<u64>();
    // Who has the port was learned from those that were allowed.
    ensure!(at_socket == 0, "{at_socket} came to the socket");
    // Address, port, length and what was sent: 20 + 8 + 8 bytes each.
    let bytes: u64 = denied.iter().filter_map(|r| r.bytes_in).sum();
    ensure!(bytes == 36 * sent, "{bytes} bytes");
    Ok(Verdict::Ran)
}

fn a_flood_is_counted_to_the_last_packet() -> Result<Verdict> {
    const ONE: u64 = 20_000;
    const MANY: u64 = 30_000;
    let node = Node::new(GUARDED)?;
    let _server = node.sandbox.spawn("/db", &["serve-tcp", "192.0.2.1:7001"])?;
    node.connects("192.0.2.2:0", "192.0.2.1:7001")?;
    let mut held =
        node.sandbox.spawn_in("/elsewhere", &node.far, &["hold-tcp", "192.0.2.1:7001", "--from", "192.0.2.2:0"])?;
    let mac = node.sandbox.netns.within(|| wire::mac("near0"))?;
    let begun = Instant::now();
    let unsent = node.far.within(|| {
        let wire = Wire::open("far0")?;
        for n in 0..ONE.max(MANY) {
            if n < ONE {
                wire.send(&syn(mac, [192, 0, 2, 200]))?;
            }
            if n < MANY {
                // More senders than the kernel's table has room for.
                wire.send(&syn(mac, (0xc612_0000 | n as u32).to_be_bytes()))?;
            }
        }
        // Before anybody else sends: of what is not the flood's, some may find no room either.
        wire::unsent("far0")
    })?;
    let sent = ONE + MANY - unsent;
    ensure!(held.again()?.ok);
    let denied = |daemon: &Daemon| -> Result<Vec<Record>> {
        Ok(daemon.records()?.into_iter().filter(|r| r.event == "flow_denied").collect())
    };
    let count = |records: &[Record]| records.iter().filter_map(|r| r.count).sum::<u64>();
    let started = Instant::now();
    while count(&denied(&node.daemon)?) < sent && started.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(200));
    }
    std::thread::sleep(Duration::from_secs(2));
    let records = denied(&node.daemon)?;
    ensure!(count(&records) == sent && sent > ONE, "{} of {sent}", count(&records));
    ensure!(records.iter().all(is_drop), "some packets came to the socket");
    let from_one: Vec<Record> = records.iter().filter(|r| comes_from(r, "192.0.2.200")).cloned().collect();
    // While the table is emptied there is no room for whoever comes: his packets of that second are counted by reason alone.
    ensure!((1..=ONE).contains(&count(&from_one)), "{} of {ONE}", count(&from_one));
    ensure!(records.iter().any(|r| r.sources.is_some()), "no crowd is told of");
    // A second has 64 names, a crowd, and those for which there was no room, however many packets there were.
    let most = (begun.elapsed().as_secs() + 1) * 66;
    ensure!(records.len() as u64 <= most, "{} records, not {most}", records.len());
    Ok(Verdict::Ran)
}

fn explain_says_of_frames_what_interfaces_do() -> Result<Verdict> {
    let node = Node::new(GUARDED)?;
    let _servers = [
        node.sandbox.spawn("/db", &["serve-tcp", "192.0.2.1:7001"])?,
        node.sandbox.spawn("/db", &["serve-tcp", "[2001:db8::1]:7001"])?,
        node.sandbox.spawn("/db", &["serve-udp", "192.0.2.1:7002"])?,
        node.sandbox.spawn("/db", &["serve-udp", "[2001:db8::1]:7002"])?,
    ];
    // Who has the ports is learned from who calls them.
    node.connects("192.0.2.2:0", "192.0.2.1:7001")?;
    node.connects("[2001:db8::2]:0", "[2001:db8::1]:7001")?;
    node.asks("192.0.2.2:0", "192.0.2.1:7002", 1)?;
    node.asks("[2001:db8::2]:0", "[2001:db8::1]:7002", 1)?;
    let capture = node.sandbox.directory().join("scapy.pcap");
    std::fs::write(&capture, frames::SCAPY)?;
    let path = capture.to_str().unwrap_or_default();
    let output = node.daemon.command(&["explain", "--pcap", path, "--json"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<serde_json::Value> =
        String::from_utf8(output.stdout)?.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let expected = frames::expected();
    ensure!(lines.len() == expected.len(), "{} lines", lines.len());
    for (number, (line, (meant, what))) in lines.iter().zip(expected).enumerate() {
        let (verdict, reason) =
            (line["verdict"].as_str().unwrap_or_default(), line["reason"].as_str().unwrap_or_default());
        let found = match (verdict, reason) {
            ("passes", "untouched") => "untouched".to_owned(),
            ("passes", _) => "passes".to_owned(),
            (_, reason) => format!("dropped {reason}"),
        };
        ensure!(found == meant && line["frame"] == number + 1, "{what}: {line}");
        if found == "dropped no_rule" {
            ensure!(line["workload"] == "db", "{what}: {line}");
        }
    }
    // For people, a line each.
    let output = node.daemon.command(&["explain", "--pcap", path])?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(text.contains("dropped  192.0.2.200:40000 -> 192.0.2.1:7001/tcp: no_rule, to db"), "{text}");
    // What is no capture is refused, and so is one that is cut.
    for length in [0, 10, frames::SCAPY.len() - 5] {
        std::fs::write(&capture, &frames::SCAPY[..length])?;
        let output = node.daemon.command(&["explain", "--pcap", path])?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1) && error.contains("no capture that can be read"), "{length}: {error}");
    }
    Ok(Verdict::Ran)
}

/// A frame that asks for a connection to 192.0.2.1:7001.
fn syn(to: [u8; 6], source: [u8; 4]) -> Vec<u8> {
    let mut frame = to.to_vec();
    frame.extend([2, 0, 0, 0, 0, 2, 8, 0]);
    frame.extend([0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0]);
    frame.extend(source);
    frame.extend([192, 0, 2, 1, 0x9c, 0x40, 0x1b, 0x59, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
    frame
}

fn flows_go_on_when_their_interface_is_guarded() -> Result<Verdict> {
    let mut node = Node::new("")?;
    let _server = node.sandbox.spawn("/db", &["serve-tcp", "192.0.2.1:7001"])?;
    let mut held =
        node.sandbox.spawn_in("/elsewhere", &node.far, &["hold-tcp", "192.0.2.1:7001", "--from", "192.0.2.2:0"])?;
    ensure!(held.again()?.ok);
    node.daemon.terminate()?;
    node.sandbox.add_settings(GUARDED)?;
    node.daemon = Daemon::start_inside(&node.sandbox)?;
    ensure!(node.mode()? == "native");
    for _ in 0..3 {
        ensure!(held.again()?.ok, "{}", node.daemon.log());
    }
    // The program stays while the daemon is away, and is replaced in place when there is one again.
    let before = node.daemon.status()?.interfaces[0].program;
    node.daemon.kill_hard()?;
    ensure!(held.again()?.ok);
    let _trying = node.is_kept_out("192.0.2.200:0", "192.0.2.1:7001")?;
    node.daemon = Daemon::start_inside(&node.sandbox)?;
    ensure!(node.daemon.status()?.interfaces[0].program != before);
    ensure!(held.again()?.ok);
    node.connects("192.0.2.2:0", "192.0.2.1:7001")?;
    // The rule goes, and with it the flow.
    node.sandbox.write_policy(&POLICY.replace("192.0.2.0/25", "198.51.100.0/24"))?;
    node.daemon.must_apply()?;
    held.tell("")?;
    ensure!(held.next_within(Duration::from_secs(1))?.is_none_or(|outcome| !outcome.ok));
    Ok(Verdict::Ran)
}

fn services_older_than_authd_are_guarded_at_interfaces() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    let far = sandbox.another_netns("far")?;
    join(&sandbox, &far)?;
    let _tcp = sandbox.spawn("/db", &["serve-tcp", "192.0.2.1:7001"])?;
    let _udp = sandbox.spawn("/db", &["serve-udp", "192.0.2.1:7002"])?;
    sandbox.write_policy(POLICY)?;
    sandbox.add_settings(GUARDED)?;
    let daemon = Daemon::start_inside(&sandbox)?;
    let node = Node { daemon, far, sandbox };
    node.connects("192.0.2.2:0", "192.0.2.1:7001")?;
    let _trying = node.is_kept_out("192.0.2.200:0", "192.0.2.1:7001")?;
    node.asks("192.0.2.2:0", "192.0.2.1:7002", 3)?;
    node.asks_in_vain("192.0.2.200:0", "192.0.2.1:7002", 3)?;
    for port in [7001, 7002] {
        node.daemon
            .wait_for("the drop", |r| is_drop(r) && r.local_port == Some(port) && comes_from(r, "192.0.2.200"))?;
    }
    Ok(Verdict::Ran)
}

fn an_interface_without_a_driver_for_it_is_guarded_in_the_stack() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    let far = sandbox.another_netns("far")?;
    sandbox.netns.join(&far, ("near0", "far0"), (&[], &["192.0.2.2/24", "192.0.2.200/24"]))?;
    // A name that a file's name on a BPF file system could not be.
    for command in [
        &["link", "add", "near.br", "type", "bridge"][..],
        &["link", "set", "near0", "master", "near.br"],
        &["address", "add", "192.0.2.1/24", "dev", "near.br"],
        &["link", "set", "near.br", "up"],
    ] {
        sandbox.netns.ip(command)?;
    }
    sandbox.write_policy(POLICY)?;
    sandbox.add_settings("interfaces = [\"near.br\"]\n")?;
    let daemon = Daemon::start_inside(&sandbox)?;
    let node = Node { daemon, far, sandbox };
    ensure!(node.mode()? == "generic", "{:?}", node.daemon.status()?.interfaces);
    let _server = node.sandbox.spawn("/db", &["serve-tcp", "192.0.2.1:7001"])?;
    node.connects("192.0.2.2:0", "192.0.2.1:7001")?;
    let _trying = node.is_kept_out("192.0.2.200:0", "192.0.2.1:7001")?;
    node.daemon.wait_for("the drop", |r| is_drop(r) && comes_from(r, "192.0.2.200"))?;
    let text = String::from_utf8(node.daemon.command(&["status"])?.stdout)?;
    ensure!(text.contains("near.br") && text.contains("generic, program"), "{text}");
    let metrics = node.daemon.command(&["status", "--prometheus"])?;
    let metrics = String::from_utf8(metrics.stdout)?;
    ensure!(metrics.contains("authd_interface_guarded{interface=\"near.br\",mode=\"generic\"} 1"), "{metrics}");
    Ok(Verdict::Ran)
}

fn answers_to_a_guarded_port_are_no_calls() -> Result<Verdict> {
    let node = Node::new(GUARDED)?;
    let _upstream = node.sandbox.spawn_in("/elsewhere", &node.far, &["serve-udp", "192.0.2.200:7123"])?;
    let arguments = ["udp", "192.0.2.200:7123", "--called-at", "192.0.2.1:7123"];
    let mut asking = node.sandbox.spawn_quietly_in("/time", &node.sandbox.netns, &arguments)?;
    // Who has the port is learned from a call that is answered; then the same socket asks somebody who may not call it.
    wait_until("an answer", || Ok(node.datagrams("192.0.2.2:0", "192.0.2.1:7123", 1, Duration::from_secs(3))? == 1))?;
    let outcome = asking.next_within(Duration::from_secs(20))?;
    ensure!(outcome.as_ref().is_some_and(|outcome| outcome.ok), "{outcome:?}\n{}", node.daemon.log());
    Ok(Verdict::Ran)
}

fn an_interface_is_guarded_when_it_appears() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    let far = sandbox.another_netns("far")?;
    sandbox.write_policy(POLICY)?;
    sandbox.add_settings(GUARDED)?;
    let daemon = Daemon::start_inside(&sandbox)?;
    let node = Node { daemon, far, sandbox };
    ensure!(node.mode()? == "unguarded");
    node.daemon.wait_for("what is missing", |r| r.event == "interface_unguarded")?;
    let drops = || -> Result<usize> {
        Ok(node.daemon.records()?.iter().filter(|r| is_drop(r) && comes_from(r, "192.0.2.200")).count())
    };
    for _ in 0..2 {
        let before = drops()?;
        join(&node.sandbox, &node.far)?;
        node.waits_for_mode("native")?;
        let server = node.sandbox.spawn("/db", &["serve-tcp", "192.0.2.1:7001"])?;
        node.connects("192.0.2.2:0", "192.0.2.1:7001")?;
        let trying = node.is_kept_out("192.0.2.200:0", "192.0.2.1:7001")?;
        wait_until("the drop", || Ok(drops()? > before))?;
        drop((trying, server));
        node.sandbox.netns.ip(&["link", "delete", "near0"])?;
        node.waits_for_mode("unguarded")?;
    }
    Ok(Verdict::Ran)
}

fn another_program_keeps_its_interface() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    let far = sandbox.another_netns("far")?;
    join(&sandbox, &far)?;
    // Some program of somebody else's: authd's own, attached by other hands.
    let other = Sandbox::new()?;
    let program = object::load(other.pins(), &Sizes::default(), Hooks::SocketsAndInterfaces)?
        .take_xdp()
        .context("it was asked for")?;
    let theirs = sandbox.netns.within(|| {
        let index = nix::net::if_::if_nametoindex("near0")?;
        Ok(bpf::link_xdp(program.fd.as_fd(), index, XdpMode::Generic)?)
    })?;
    sandbox.write_policy(POLICY)?;
    sandbox.add_settings(GUARDED)?;
    let daemon = Daemon::start_inside(&sandbox)?;
    let interface = daemon.status()?.interfaces.remove(0);
    ensure!(interface.mode == "unguarded" && interface.why.is_some_and(|why| why.contains("another XDP program")));
    let node = Node { daemon, far, sandbox };
    // The socket's own hook is there all the same.
    let _server = node.sandbox.spawn("/db", &["serve-tcp", "192.0.2.1:7001"])?;
    node.connects("192.0.2.2:0", "192.0.2.1:7001")?;
    let _trying = node.is_kept_out("192.0.2.200:0", "192.0.2.1:7001")?;
    drop(theirs);
    node.waits_for_mode("native")?;
    Ok(Verdict::Ran)
}

fn a_port_that_changes_hands_is_judged_anew() -> Result<Verdict> {
    let node = Node::new(GUARDED)?;
    let server = node.sandbox.spawn("/db", &["serve-tcp", "192.0.2.1:7001"])?;
    let trying = [(); 2].map(|()| node.is_kept_out("192.0.2.200:0", "192.0.2.1:7001"));
    node.daemon.wait_for("the drop", |r| is_drop(r) && comes_from(r, "192.0.2.200"))?;
    for attempt in trying {
        drop(attempt?);
    }
    drop(server);
    // Nobody's: authd does not touch it.
    let _other = node.sandbox.spawn("/elsewhere", &["serve-tcp", "192.0.2.1:7001"])?;
    node.connects("192.0.2.200:0", "192.0.2.1:7001")?;
    Ok(Verdict::Ran)
}
