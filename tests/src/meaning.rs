//! What a policy means, written a second time and without any of authd's code: each question goes through all rules, as a
//! person would who reads docs/POLICY.md. Slow, and meant to be obviously right. Also makes up policies and questions.

use std::{
    collections::BTreeSet,
    fmt::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use jiff::{Timestamp, tz::TimeZone};
use rand::{RngExt, rngs::SmallRng, seq::IndexedRandom};

const TCP: u8 = 6;
const UDP: u8 = 17;

/// A verdict, in the words of records.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Judgement {
    pub verdict: &'static str,
    pub reason: &'static str,
    pub rule: Option<String>,
}

fn judged(verdict: &'static str, reason: &'static str, rule: Option<&Rule>) -> Judgement {
    Judgement { verdict, reason, rule: rule.map(|r| r.name.clone()) }
}

#[derive(Clone, Debug)]
pub struct Workload {
    pub name: String,
    pub kind: &'static str,
    pub observe: bool,
    pub inbound: Option<&'static str>,
}

#[derive(Clone, Debug)]
pub struct Peer {
    pub name: String,
    pub networks: Vec<(IpAddr, u8)>,
}

#[derive(Clone, Copy, Debug)]
pub enum Ports {
    Range(u8, u16, u16),
    Protocol(u8),
    Any,
}

#[derive(Clone, Debug)]
pub struct Service {
    pub name: String,
    pub workload: Option<usize>,
    /// `None`: loopback, of a local service.
    pub addresses: Option<Vec<(IpAddr, u8)>>,
    pub ports: Vec<Ports>,
}

#[derive(Clone, Debug)]
pub enum From {
    Any,
    Unmanaged,
    Workload(usize),
    Peer(usize),
}

#[derive(Clone, Debug)]
pub enum To {
    Any,
    Service(usize),
}

#[derive(Clone, Debug)]
pub struct When {
    /// Monday first.
    pub days: [bool; 7],
    /// Minutes of the day.
    pub hours: Option<(u16, u16)>,
    pub zone: &'static str,
}

#[derive(Clone, Debug)]
pub struct Rule {
    pub name: String,
    pub from: Vec<From>,
    pub to: Vec<To>,
    pub deny: bool,
    pub observe: bool,
    pub require: Vec<&'static str>,
    pub when: Option<When>,
}

/// A policy.
#[derive(Clone, Debug)]
pub struct Meaning {
    pub observe: bool,
    pub workloads: Vec<Workload>,
    pub peers: Vec<Peer>,
    pub services: Vec<Service>,
    pub rules: Vec<Rule>,
    pub failsafe: Vec<(u8, u16)>,
    pub builtin: bool,
}

/// Names of rules of which there are live grants.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// Of the caller itself: of its workload, or its address.
    pub own: BTreeSet<String>,
    /// Of the caller for whom another node vouches.
    pub vouched: BTreeSet<String>,
}

/// Who calls in.
#[derive(Clone, Copy, Debug)]
pub enum Caller {
    Workload(usize),
    Unmanaged,
    Remote(IpAddr, Word),
}

/// What a caller's node says of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Word {
    /// Who it is.
    Vouched,
    /// Nothing that counts, and why.
    Lacking(&'static str),
}

/// What is known of a caller without a grant.
#[derive(Clone, Copy)]
enum Known {
    /// This kernel knows it by its cgroup.
    Attested,
    Elsewhere(Word),
}

fn contains((network, bits): &(IpAddr, u8), address: IpAddr) -> bool {
    let (bits, host_bits) = match (network, address) {
        (IpAddr::V4(_), IpAddr::V4(_)) => (u32::from(*bits), 32),
        (IpAddr::V6(_), IpAddr::V6(_)) => (u32::from(*bits), 128),
        _ => return false,
    };
    let number = |address: IpAddr| match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    (number(*network) ^ number(address)).checked_shr(host_bits - bits).unwrap_or(0) == 0
}

impl Ports {
    fn contain(&self, protocol: u8, port: u16) -> bool {
        match *self {
            Ports::Range(of, first, last) => protocol == of && first <= port && port <= last,
            Ports::Protocol(of) => protocol == of,
            Ports::Any => true,
        }
    }
}

impl Service {
    fn is_at(&self, address: IpAddr) -> bool {
        match &self.addresses {
            Some(networks) => networks.iter().any(|network| contains(network, address)),
            None => address.is_loopback(),
        }
    }

    fn has(&self, protocol: u8, port: u16) -> bool {
        self.ports.iter().any(|ports| ports.contain(protocol, port))
    }
}

impl When {
    pub fn holds(&self, at: Timestamp) -> bool {
        let local = at.to_zoned(TimeZone::get(self.zone).expect("zones of tests exist"));
        let today = local.weekday().to_monday_zero_offset() as usize;
        let minute = local.hour() as u16 * 60 + local.minute() as u16;
        match self.hours {
            None => self.days[today],
            Some((start, end)) if start < end => self.days[today] && start <= minute && minute < end,
            // Past midnight: what began yesterday is still yesterday's.
            Some((start, end)) => (self.days[today] && minute >= start) || (self.days[(today + 6) % 7] && minute < end),
        }
    }
}

impl Rule {
    fn in_force(&self, at: Timestamp) -> bool {
        self.when.as_ref().is_none_or(|when| when.holds(at))
    }
}

impl Meaning {
    /// May a workload open a flow?
    pub fn outbound(
        &self,
        workload: usize,
        to: IpAddr,
        protocol: u8,
        port: u16,
        at: Timestamp,
        held: &Held,
    ) -> Judgement {
        let applies = |rule: &&Rule| {
            rule.in_force(at)
                && rule.from.iter().any(|from| match from {
                    From::Any => true,
                    From::Workload(named) => *named == workload,
                    From::Unmanaged | From::Peer(_) => false,
                })
                && rule.to.iter().any(|object| match object {
                    To::Any => true,
                    To::Service(named) => self.services[*named].is_at(to) && self.services[*named].has(protocol, port),
                })
        };
        let mut rules: Vec<&Rule> = self.rules.iter().filter(applies).collect();
        rules.sort_by(|a, b| a.name.cmp(&b.name));
        let builtin = |name: &str| Rule {
            name: name.to_owned(),
            from: Vec::new(),
            to: Vec::new(),
            deny: false,
            observe: false,
            require: Vec::new(),
            when: None,
        };
        let (dns, dhcp) = (builtin("builtin/loopback-dns"), builtin("builtin/dhcp"));
        if self.builtin {
            if to.is_loopback() && port == 53 && (protocol == TCP || protocol == UDP) {
                rules.push(&dns);
            }
            let v4 = to == IpAddr::V4(Ipv4Addr::BROADCAST);
            let v6 = to == IpAddr::V6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2));
            // Either port at either address: both stay on the link.
            if (v4 || v6) && protocol == UDP && (port == 67 || port == 547) {
                rules.push(&dhcp);
            }
        }
        self.in_mode(workload, sum(&rules, Known::Attested, held))
    }

    /// May a caller open a flow to a workload's port?
    pub fn inbound(
        &self,
        workload: usize,
        caller: Caller,
        protocol: u8,
        port: u16,
        at: Timestamp,
        held: &Held,
    ) -> Judgement {
        let own = &self.workloads[workload];
        let automatic = own.kind == "agent" || own.kind == "job";
        if self.failsafe.contains(&(protocol, port)) && !automatic {
            return judged("allowed", "failsafe", None);
        }
        let guards: Vec<usize> = (0..self.services.len())
            .filter(|s| self.services[*s].workload == Some(workload) && self.services[*s].has(protocol, port))
            .collect();
        if guards.is_empty() {
            let closed = own.inbound.map_or(automatic, |inbound| inbound == "closed");
            let open = judged("allowed", "unguarded", None);
            return if closed { self.in_mode(workload, judged("denied", "inbound_closed", None)) } else { open };
        }
        let applies = |rule: &&Rule| {
            rule.in_force(at)
                && rule.from.iter().any(|from| match (from, caller) {
                    (From::Any, _) | (From::Unmanaged, Caller::Unmanaged) => true,
                    (From::Workload(named), Caller::Workload(calls)) => *named == calls,
                    (From::Peer(named), Caller::Remote(address, _)) => {
                        self.peers[*named].networks.iter().any(|network| contains(network, address))
                    }
                    _ => false,
                })
                && rule.to.iter().any(|object| match object {
                    To::Any => true,
                    To::Service(named) => guards.contains(named),
                })
        };
        let mut rules: Vec<&Rule> = self.rules.iter().filter(applies).collect();
        rules.sort_by(|a, b| a.name.cmp(&b.name));
        let known = match caller {
            Caller::Workload(_) | Caller::Unmanaged => Known::Attested,
            Caller::Remote(_, word) => Known::Elsewhere(word),
        };
        self.in_mode(workload, sum(&rules, known, held))
    }

    /// In observe mode what would be denied is let through, and told.
    fn in_mode(&self, workload: usize, judgement: Judgement) -> Judgement {
        if judgement.verdict == "denied" && (self.observe || self.workloads[workload].observe) {
            return Judgement { verdict: "observed", ..judgement };
        }
        judgement
    }

    /// Whether rules come into force or stop at least twice within a span, to the minute.
    pub fn changes_twice(&self, from: Timestamp, to: Timestamp) -> bool {
        let state = |at: Timestamp| self.rules.iter().map(|rule| rule.in_force(at)).collect::<Vec<_>>();
        let (mut at, mut last, mut changes) = (from, state(from), 0);
        while at < to && changes < 2 {
            at = at.checked_add(jiff::SignedDuration::from_secs(60)).expect("tests' times are near").min(to);
            let now = state(at);
            if now != last {
                changes += 1;
            }
            last = now;
        }
        changes >= 2
    }
}

/// Whether a rule asks for another node's word.
fn asks_node(rule: &Rule) -> bool {
    !rule.deny && rule.require.contains(&"node")
}

/// What rules that apply say together.
fn sum(rules: &[&Rule], known: Known, held: &Held) -> Judgement {
    let first = |which: &dyn Fn(&Rule) -> bool| rules.iter().copied().find(|rule| which(rule));
    let attested = matches!(known, Known::Attested);
    let free = |rule: &Rule| rule.require.iter().all(|proof| *proof == "cgroup" && attested);
    // What somebody showed is worth nothing where a node's word is asked for, and the other way round.
    let proven = |rule: &Rule| match known {
        _ if free(rule) => true,
        Known::Elsewhere(Word::Vouched) if asks_node(rule) => held.vouched.contains(&rule.name),
        _ => !asks_node(rule) && held.own.contains(&rule.name),
    };
    let lacking = lacking(rules, known);
    let denied = first(&|rule| rule.deny && !rule.observe);
    let watched = first(&|rule| rule.deny && rule.observe);
    // Who may pass anyway is not said to pass on a grant, nor who showed proofs on a node's word.
    let allowed = first(&|rule| !rule.deny && free(rule))
        .or(first(&|rule| !rule.deny && proven(rule) && !asks_node(rule)))
        .or(first(&|rule| !rule.deny && proven(rule)));
    let unproven_watched = first(&|rule| !rule.deny && rule.observe && !proven(rule));
    let unproven = first(&|rule| !rule.deny && !rule.observe && !proven(rule));
    if denied.is_some() {
        return judged("denied", "denied_by_rule", denied);
    }
    if allowed.is_some() || unproven_watched.is_some() {
        return match (watched, allowed) {
            (Some(_), _) => judged("observed", "denied_by_rule", watched),
            (None, Some(_)) => judged("allowed", "rule", allowed),
            (None, None) => judged("observed", lacking, unproven_watched),
        };
    }
    if unproven.is_some() {
        return judged("denied", lacking, unproven);
    }
    judged("denied", "no_rule", None)
}

/// Why a caller without what rules ask for does not pass.
fn lacking(rules: &[&Rule], known: Known) -> &'static str {
    let shows = |rule: &Rule| rule.require.iter().any(|proof| !matches!(*proof, "cgroup" | "node"));
    match known {
        Known::Elsewhere(word) if rules.iter().copied().any(asks_node) => match word {
            // Some rule may name it, and ask for more.
            Word::Vouched if rules.iter().copied().any(|rule| asks_node(rule) && shows(rule)) => "proof_required",
            Word::Vouched => "caller_not_named",
            // Who says nothing may have meant to show what another rule asks for.
            Word::Lacking("node_identity_missing") if rules.iter().any(|rule| shows(rule) && !asks_node(rule)) => {
                "proof_required"
            }
            Word::Lacking(reason) => reason,
        },
        _ => "proof_required",
    }
}

// ---- The policy's text.

fn network_text((address, bits): &(IpAddr, u8)) -> String {
    format!("{address}/{bits}")
}

fn list<T>(items: &[T], text: impl Fn(&T) -> String) -> String {
    let items: Vec<String> = items.iter().map(|item| format!("{:?}", text(item))).collect();
    format!("[{}]", items.join(", "))
}

impl Meaning {
    /// As a policy file. Workload N has cgroup `/wN`.
    pub fn text(&self) -> String {
        let mut text = format!("trust_domain = \"example.org\"\nmode = \"{}\"\n", mode(self.observe));
        let mut line = |line: String| {
            text.push_str(&line);
            text.push('\n');
        };
        line("[[authority]]\nname = \"pki\"\nbundle = \"ca.pem\"".to_owned());
        for (index, workload) in self.workloads.iter().enumerate() {
            let Workload { name, kind, observe, inbound } = workload;
            line(format!("[[workload]]\nname = \"{name}\"\nkind = \"{kind}\"\ncgroup = \"/w{index}\""));
            line(format!("mode = \"{}\"\nraw_sockets = true", mode(*observe)));
            if let Some(inbound) = inbound {
                line(format!("inbound = \"{inbound}\""));
            }
        }
        for Peer { name, networks } in &self.peers {
            line(format!("[[peer]]\nname = \"{name}\"\nnetworks = {}", list(networks, network_text)));
        }
        for Service { name, workload, addresses, ports } in &self.services {
            line(format!("[[service]]\nname = \"{name}\"\nports = {}", list(ports, port_text)));
            if let Some(workload) = workload {
                line(format!("workload = \"{}\"", self.workloads[*workload].name));
            }
            if let Some(addresses) = addresses {
                line(format!("addresses = {}", list(addresses, network_text)));
            }
        }
        for rule in &self.rules {
            let from = list(&rule.from, |from| match from {
                From::Any => "any".to_owned(),
                From::Unmanaged => "unmanaged".to_owned(),
                From::Workload(index) => self.workloads[*index].name.clone(),
                From::Peer(index) => self.peers[*index].name.clone(),
            });
            let to = list(&rule.to, |to| match to {
                To::Any => "any".to_owned(),
                To::Service(index) => self.services[*index].name.clone(),
            });
            let action = if rule.deny { "deny" } else { "allow" };
            line(format!("[[rule]]\nname = \"{}\"\nfrom = {from}\nto = {to}\naction = \"{action}\"", rule.name));
            line(format!("mode = \"{}\"", mode(rule.observe)));
            if !rule.require.is_empty() {
                line(format!("require = {}", list(&rule.require, |proof| (*proof).to_owned())));
            }
            if let Some(when) = &rule.when {
                line(when_text(when));
            }
        }
        text
    }
}

fn mode(observe: bool) -> &'static str {
    if observe { "observe" } else { "enforce" }
}

fn port_text(ports: &Ports) -> String {
    let name = |protocol: u8| if protocol == TCP { "tcp" } else { "udp" };
    match *ports {
        Ports::Range(protocol, 0, u16::MAX) => name(protocol).to_owned(),
        Ports::Range(protocol, first, last) if first == last => format!("{}/{first}", name(protocol)),
        Ports::Range(protocol, first, last) => format!("{}/{first}-{last}", name(protocol)),
        Ports::Protocol(number) => format!("proto/{number}"),
        Ports::Any => "any".to_owned(),
    }
}

fn when_text(when: &When) -> String {
    const NAMES: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
    let days: Vec<&str> = (0..7).filter(|day| when.days[*day]).map(|day| NAMES[day]).collect();
    let mut text = format!("when = {{ days = {}, zone = \"{}\"", list(&days, |d| (*d).to_owned()), when.zone);
    if let Some((start, end)) = when.hours {
        let _ = write!(text, ", hours = \"{:02}:{:02}-{:02}:{:02}\"", start / 60, start % 60, end / 60, end % 60);
    }
    text + " }"
}

// ---- Policies and questions that somebody might come up with.

/// Few, and near each other's edges: questions should often hit the same networks as policies.
pub fn address(random: &mut SmallRng) -> IpAddr {
    const V4: [[u8; 4]; 12] = [
        [10, 0, 0, 0],
        [10, 0, 0, 1],
        [10, 0, 1, 255],
        [10, 0, 2, 0],
        [10, 255, 255, 255],
        [11, 0, 0, 0],
        [127, 0, 0, 1],
        [127, 255, 255, 255],
        [192, 0, 2, 7],
        [255, 255, 255, 255],
        [0, 0, 0, 0],
        [224, 0, 0, 1],
    ];
    const V6: [[u16; 8]; 9] = [
        [0; 8],
        [0, 0, 0, 0, 0, 0, 0, 1],
        [0xfd00, 0, 0, 0, 0, 0, 0, 0],
        [0xfd00, 0, 0, 0, 0, 0, 0, 1],
        [0xfd00, 0, 0, 1, 0, 0, 0, 0],
        [0xfd00, 1, 0, 0, 0, 0, 0, 0],
        [0xff02, 0, 0, 0, 0, 0, 1, 2],
        // NAT64 and the deprecated IPv4-compatible form: IPv6 all the same.
        [0x64, 0xff9b, 0, 0, 0, 0, 0x0a00, 1],
        [0, 0, 0, 0, 0, 0, 0x0a00, 1],
    ];
    match random.random_range(0..20) {
        0 => IpAddr::V4(Ipv4Addr::from_bits(random.random())),
        1 => IpAddr::V6(Ipv6Addr::from_bits(random.random())),
        2..=13 => IpAddr::V4(Ipv4Addr::from(*V4.choose(random).expect("not empty"))),
        _ => IpAddr::V6(Ipv6Addr::from(*V6.choose(random).expect("not empty"))),
    }
}

pub fn port(random: &mut SmallRng) -> u16 {
    const USUAL: [u16; 16] = [1, 22, 53, 67, 80, 81, 443, 546, 547, 1023, 1024, 5432, 7443, 8000, 8100, 65535];
    if random.random_ratio(1, 10) { random.random() } else { *USUAL.choose(random).expect("not empty") }
}

pub fn protocol(random: &mut SmallRng) -> u8 {
    match random.random_range(0..10) {
        0..=4 => TCP,
        5..=7 => UDP,
        8 => *[1, 58, 47, 50, 132, 2].choose(random).expect("not empty"),
        _ => random.random(),
    }
}

fn network(random: &mut SmallRng) -> (IpAddr, u8) {
    let lengths: (&[u8], &[u8]) = (&[0, 7, 8, 15, 23, 24, 31, 32], &[0, 7, 16, 64, 96, 127, 128]);
    match address(random) {
        IpAddr::V4(v4) => {
            let bits = *lengths.0.choose(random).expect("not empty");
            (
                IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() & u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0))),
                bits,
            )
        }
        IpAddr::V6(v6) => {
            let bits = *lengths.1.choose(random).expect("not empty");
            let network = v6.to_bits() & u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0);
            let network = Ipv6Addr::from_bits(network);
            // What only looks like IPv4 is refused by policies.
            if network.to_ipv4_mapped().is_some() && bits >= 96 {
                (IpAddr::V6(Ipv6Addr::LOCALHOST), 128)
            } else {
                (IpAddr::V6(network), bits)
            }
        }
    }
}

fn networks(random: &mut SmallRng) -> Vec<(IpAddr, u8)> {
    (0..random.random_range(1..4)).map(|_| network(random)).collect()
}

fn ports(random: &mut SmallRng) -> Ports {
    let with_ports = if random.random_ratio(2, 3) { TCP } else { UDP };
    match random.random_range(0..8) {
        0..=2 => {
            let port = port(random).max(1);
            Ports::Range(with_ports, port, port)
        }
        3..=4 => {
            let (a, b) = (port(random).max(1), port(random).max(1));
            Ports::Range(with_ports, a.min(b), a.max(b))
        }
        5 => Ports::Range(with_ports, 0, u16::MAX),
        6 => match protocol(random) {
            TCP | UDP => Ports::Protocol(1),
            other => Ports::Protocol(other),
        },
        _ => Ports::Any,
    }
}

fn when(random: &mut SmallRng) -> When {
    let mut days = [false; 7];
    for _ in 0..random.random_range(1..5) {
        days[random.random_range(0..7)] = true;
    }
    let hours = random.random_ratio(4, 5).then(|| {
        let start = random.random_range(0..24 * 60);
        let end = random.random_range(1..=24 * 60);
        if start == end { (start, end - 1) } else { (start, end) }
    });
    // A schedule of no minute at all is not one.
    let hours = hours.filter(|(start, end)| start != end);
    let zone = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe"];
    When { days, hours, zone: zone.choose(random).expect("not empty") }
}

/// A policy. Small, so that rules meet each other; every feature occurs often.
pub fn policy(random: &mut SmallRng, scheduled: bool) -> Meaning {
    let kinds = ["service", "job", "agent", "gateway", "person"];
    let workloads: Vec<Workload> = (0..random.random_range(1..6))
        .map(|n| Workload {
            name: format!("w{n}"),
            kind: kinds.choose(random).expect("not empty"),
            observe: random.random_ratio(1, 6),
            inbound: *[None, None, Some("open"), Some("closed")].choose(random).expect("not empty"),
        })
        .collect();
    let peers: Vec<Peer> =
        (0..random.random_range(0..4)).map(|n| Peer { name: format!("p{n}"), networks: networks(random) }).collect();
    let services: Vec<Service> = (0..random.random_range(1..7))
        .map(|n| {
            let workload = random.random_ratio(1, 2).then(|| random.random_range(0..workloads.len()));
            let addresses = (workload.is_none() || random.random_ratio(1, 2)).then(|| networks(random));
            let ports = (0..random.random_range(1..4)).map(|_| ports(random)).collect();
            Service { name: format!("s{n}"), workload, addresses, ports }
        })
        .collect();
    let guarded: Vec<usize> = (0..services.len()).filter(|s| services[*s].workload.is_some()).collect();
    let has_tcp =
        |s: &&usize| services[**s].ports.iter().any(|ports| matches!(ports, Ports::Range(TCP, ..) | Ports::Any));
    let over_tcp: Vec<usize> = guarded.iter().filter(has_tcp).copied().collect();
    let rules = (0..random.random_range(0..9))
        .map(|_| {
            let by_node = !over_tcp.is_empty() && random.random_ratio(1, 8);
            let from: Vec<From> = (0..random.random_range(1..4))
                .map(|_| match random.random_range(0..10) {
                    _ if by_node && !peers.is_empty() && random.random_ratio(2, 3) => {
                        From::Peer(random.random_range(0..peers.len()))
                    }
                    _ if by_node => From::Any,
                    0 => From::Any,
                    1 => From::Unmanaged,
                    2..=3 if !peers.is_empty() => From::Peer(random.random_range(0..peers.len())),
                    _ => From::Workload(random.random_range(0..workloads.len())),
                })
                .collect();
            // Nobody here can enforce what peers and unmanaged processes do elsewhere.
            let only_here = from.iter().any(|from| matches!(from, From::Peer(_) | From::Unmanaged));
            let to = (0..random.random_range(1..4))
                .map(|_| match (random.random_range(0..8), only_here) {
                    _ if by_node => To::Service(*over_tcp.choose(random).expect("not empty")),
                    (0, _) => To::Any,
                    (_, false) => To::Service(random.random_range(0..services.len())),
                    (_, true) => guarded.choose(random).map_or(To::Any, |service| To::Service(*service)),
                })
                .collect();
            let deny = random.random_ratio(1, 4);
            let require: &[&[&str]] = &[&[], &[], &[], &["cgroup"], &["mtls"], &["cgroup", "mtls"], &["api-key"]];
            Rule {
                // Names in no order: the order of rules must not matter.
                name: format!("r{:08x}", random.random::<u32>()),
                from,
                to,
                deny,
                observe: random.random_ratio(1, 4),
                require: match (deny, by_node) {
                    (true, _) => Vec::new(),
                    (false, true) if random.random_ratio(1, 3) => vec!["api-key", "node"],
                    (false, true) => vec!["node"],
                    (false, false) => require.choose(random).expect("not empty").to_vec(),
                },
                when: (scheduled && random.random_ratio(1, 3)).then(|| when(random)),
            }
        })
        .collect();
    Meaning {
        observe: random.random_ratio(1, 8),
        workloads,
        peers,
        services,
        rules,
        failsafe: if random.random_bool(0.5) { vec![(TCP, 22), (TCP, 7443)] } else { vec![(UDP, 53), (TCP, 8000)] },
        builtin: random.random_bool(0.7),
    }
}
