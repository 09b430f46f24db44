//! The interfaces' program in the kernel against the same function over an image: test runs with random policies, listeners,
//! flows, grants and frames. Compared: whether the frame passes, what is remembered of its flow, and every sum.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
};

use anyhow::{Context, Result, ensure};
use authd::{
    daemon::{cgroupfs::Base, clock},
    dataplane::{
        object::{self, Hooks, Object, Sizes},
        ring,
        writer::Writer,
    },
    grants::Command,
    policy::{
        compile::{Moment, Options, Registry, compile},
        diagnostic::Source,
        image::View,
        load::texts,
        network::from_ip,
    },
};
use authd_common::{
    address::Address,
    nic::{Behind, Ruling, Sockets, flow_of, network_offset, rule},
    parse::{Packet, parse, plain},
    reason::{REASON_SLOTS, Reason},
    syn::{self, LABELS, NodeKey, NodeKeyId, Speaker, Speakers, Spoken, mac, option, syn_key},
    tables::{
        Cell, Counter, Flow, FlowKey, Grant, GrantKey, IPPROTO_TCP, IPPROTO_UDP, Listener, NO_RULE, PortEntry, Slot,
        UNMANAGED, VouchedKey, listener_flags, nic, port_flags, port_slot, role, root_flags,
    },
};
use authd_tests::{daemon::emulated, frames, meaning, sandbox::Sandbox};
use aya::programs::{Program, TestRun, TestRunOptions};
use libtest_mimic::Trial;
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use rand::{RngExt, SeedableRng, rngs::SmallRng, seq::IndexedRandom};

use crate::{Verdict, interfaces, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("frames_of_scapy_are_judged_as_it_expects", frames_of_scapy_are_judged_as_it_expects),
        trial("interfaces_rule_as_the_library_does", interfaces_rule_as_the_library_does),
        trial("the_verifier_walks_no_further_than_stated", the_verifier_walks_no_further_than_stated),
    ]
}

const FRAMES: u64 = 2_000_000;
/// An emulated machine takes some fifty times as long.
const FRAMES_EMULATED: u64 = 20_000;
const FRAMES_PER_POLICY: u64 = 10_000;
const NETNS: u64 = 4711;
/// Half of the kernel's limit: what nears that loads on one kernel and not on the next. Linux 6.1 walks the most.
const INSTRUCTIONS: u32 = 500_000;

const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;

fn the_verifier_walks_no_further_than_stated() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    let object = object::load(sandbox.pins(), &Sizes::default(), Hooks::SocketsAndInterfaces)?;
    for program in &object.programs {
        // Linux 5.16 and later say it.
        let walked = program.verified.context("the kernel says how far its verifier walked")?;
        println!("{}: {walked} instructions verified", program.name);
        ensure!(walked < INSTRUCTIONS, "{}: {walked}", program.name);
    }
    Ok(Verdict::Ran)
}

/// Made by `tests/frames/make.py`, which also says what it expects of each.
pub const SCAPY: &[u8] = include_bytes!("../../frames/scapy.pcap");
const EXPECTED: &str = include_str!("../../frames/expected.txt");

/// What is expected of each frame of the capture, and what it is.
pub fn expected() -> Vec<(&'static str, &'static str)> {
    EXPECTED.lines().filter_map(|line| line.split_once('\t')).collect()
}

/// Frames of a capture in libpcap's first format, little endian.
fn captured(mut file: &[u8]) -> Vec<&[u8]> {
    let mut frames = Vec::new();
    file = &file[24..];
    while let Some((header, rest)) = file.split_first_chunk::<16>() {
        let length = u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize;
        frames.push(&rest[..length]);
        file = &rest[length..];
    }
    frames
}

fn frames_of_scapy_are_judged_as_it_expects() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    let base = Base::find(Some(sandbox.cgroup.path()))?;
    let sizes = Sizes::default();
    let mut object = object::load(sandbox.pins(), &sizes, Hooks::SocketsAndInterfaces)?;
    let mut writer = Writer::new(object.take_maps(), sizes)?;
    writer.set_netns(NETNS);
    let source = Source { name: "policy.toml".into(), text: interfaces::POLICY.into() };
    let model = texts(vec![source]).model.context("the policy is sound")?;
    let options = Options { interfaces: true, ..Options::default() };
    let mut registry = Registry::default();
    registry.assign(&model, &options);
    let image = compile(&model, &mut registry, &options, clock::moment())?;
    writer.load(&image, &HashMap::new(), base.level, 0)?;
    let workload = registry.workloads.number("db").context("the workload has a number")?;
    let mut mirror = Mirror::default();
    for address in [from_ip("192.0.2.1".parse()?), from_ip("2001:db8::1".parse()?)] {
        for (protocol, port) in [(IPPROTO_TCP, 7001), (IPPROTO_UDP, 7002)] {
            let nobody = (Address::UNSPECIFIED, 0);
            let key = FlowKey::new(NETNS, protocol, nobody, (address, port));
            let listener = Listener { epoch: 0, cgroup: 1, workload, flags: 0 };
            writer.maps_mut().listeners.insert(key, listener, 0)?;
            mirror.listeners.insert(key, listener);
        }
    }
    let view = image.at(clock::monotonic()).numbered(writer.generation());
    let Some(Program::Xdp(program)) = object.program("authd_xdp") else { anyhow::bail!("no authd_xdp") };
    let (frames, expected) = (captured(SCAPY), expected());
    ensure!(frames.len() == expected.len() && frames.len() > 200, "{} frames", frames.len());
    for (frame, (meant, what)) in frames.into_iter().zip(expected) {
        let found = match rule(&view, &mirror, frame) {
            Ruling::Untouched => "untouched".to_owned(),
            Ruling::Refused { verdict, .. } => format!("dropped {}", verdict.reason.name()),
            _ => "passes".to_owned(),
        };
        ensure!(found == meant, "{what}: {found}, not {meant}\n{frame:02x?}");
        let options = TestRunOptions { data_in: Some(frame), ..TestRunOptions::new() };
        let returned = program.test_run(options)?.return_value;
        let meant = if meant.starts_with("dropped") { XDP_DROP } else { XDP_PASS };
        ensure!(returned == meant, "{what}: the kernel returned {returned}\n{frame:02x?}");
    }
    Ok(Verdict::Ran)
}

fn interfaces_rule_as_the_library_does() -> Result<Verdict> {
    // Each CPU has its own sums.
    let thread = Pid::from_raw(0);
    let all = sched_getaffinity(thread)?;
    let mut one = CpuSet::new();
    one.set(0)?;
    sched_setaffinity(thread, &one)?;
    let result = compare_rulings();
    sched_setaffinity(thread, &all)?;
    result
}

fn compare_rulings() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    let frames = if emulated() { FRAMES_EMULATED } else { FRAMES };
    let base = Base::find(Some(sandbox.cgroup.path()))?;
    let sizes = Sizes { identities: 1024, addresses: 4096, cells: 65_536, flows: 262_144, ..Sizes::default() };
    let mut object = object::load(sandbox.pins(), &sizes, Hooks::SocketsAndInterfaces)?;
    let mut writer = Writer::new(object.take_maps(), sizes)?;
    writer.set_netns(NETNS);
    let mut bench = Bench { object, writer, mirror: Mirror::default(), rulings: BTreeMap::new() };
    for seed in 0..frames.div_ceil(FRAMES_PER_POLICY) {
        bench.one_policy(seed, &base).with_context(|| format!("seed {seed}"))?;
    }
    println!("{frames} frames compared: {:?}", bench.rulings);
    let replayed = rulings_of(&bench, "replayed");
    ensure!(replayed >= frames / 200_000, "{replayed} frames were replayed");
    for kind in ["untouched", "known", "passes", "refused", "vouched", "vouched before"] {
        // The few frames of an emulated machine are enough for these, too.
        ensure!(rulings_of(&bench, kind) > frames / 1000, "{kind} hardly occurs: {:?}", bench.rulings);
    }
    Ok(Verdict::Ran)
}

fn rulings_of(bench: &Bench, kind: &str) -> u64 {
    bench.rulings.get(kind).copied().unwrap_or(0)
}

/// Source, destination, protocol and port.
type Kind = (Address, Address, (u8, u16));

/// What the kernel's tables should say.
#[derive(Default)]
struct Mirror {
    epoch: u64,
    listeners: HashMap<FlowKey, Listener>,
    flows: RefCell<HashMap<FlowKey, Flow>>,
    grants: HashMap<GrantKey, Grant>,
    vouched: HashMap<VouchedKey, Grant>,
    slots: HashMap<u32, Slot>,
    speakers: HashMap<u32, Speaker>,
    keys: HashMap<NodeKeyId, NodeKey>,
    spoken: RefCell<HashMap<FlowKey, Spoken>>,
    /// SYNs that passed because of what they say.
    believed: Vec<Vec<u8>>,
    counters: HashMap<u16, Counter>,
    /// Reason, packets and bytes.
    drops: HashMap<Kind, (u16, u64, u64)>,
    /// Packets and bytes by reason, of a kind that was refused for another one before.
    other_drops: HashMap<u16, (u64, u64)>,
}

impl Sockets for Mirror {
    fn netns(&self) -> u64 {
        NETNS
    }

    fn flow(&self, key: &FlowKey) -> Option<Flow> {
        self.flows.borrow().get(key).copied()
    }

    fn listener(&self, key: &FlowKey) -> Option<Listener> {
        self.listeners.get(key).copied().filter(|listener| listener.epoch == self.epoch)
    }

    /// Test runs happen in a namespace without connections of these addresses.
    fn is_connected(&self, _: &Packet) -> bool {
        false
    }
}

impl Mirror {
    fn drop(&mut self, kind: Kind, reason: u16, bytes: u64) {
        match self.drops.get_mut(&kind) {
            Some((known, packets, sum)) if *known == reason => (*packets, *sum) = (*packets + 1, *sum + bytes),
            None if !self.other_drops.contains_key(&reason) => drop(self.drops.insert(kind, (reason, 1, bytes))),
            _ => {
                let (packets, sum) = self.other_drops.entry(reason).or_default();
                (*packets, *sum) = (*packets + 1, *sum + bytes);
            }
        }
    }
}

impl Speakers for Mirror {
    fn speaker(&self, label: u32) -> Option<Speaker> {
        self.speakers.get(&label).copied()
    }

    fn node_key(&self, id: &NodeKeyId) -> Option<NodeKey> {
        self.keys.get(id).copied()
    }

    fn spoken(&self, key: &FlowKey) -> Option<Spoken> {
        self.spoken.borrow().get(key).copied()
    }

    fn time(&self) -> u64 {
        clock::monotonic()
    }
}

struct Bench {
    object: Object,
    writer: Writer,
    mirror: Mirror,
    rulings: BTreeMap<&'static str, u64>,
}

impl Bench {
    fn one_policy(&mut self, seed: u64, base: &Base) -> Result<()> {
        let mut random = SmallRng::seed_from_u64(seed);
        let policy = meaning::policy(&mut random, true);
        let source = Source { name: "random.toml".into(), text: policy.text().into() };
        let model = texts(vec![source]).model.with_context(|| format!("refused:\n{}", policy.text()))?;
        let options = Options { failsafe: policy.failsafe.clone(), builtin_rules: policy.builtin, interfaces: true };
        let mut registry = Registry::default();
        registry.assign(&model, &options);
        // Some random policies ask for more than a cell can hold, which is refused.
        // Whatever day it is: what is compared depends on the seed alone.
        let moment = Moment { wall: "2026-01-05T12:00:30Z".parse()?, monotonic: clock::monotonic() };
        let Ok(mut image) = compile(&model, &mut registry, &options, moment) else { return Ok(()) };
        image.flags |= root_flags::HEARS;
        image.cells.values_mut().for_each(|cell| ask_nodes(&mut random, cell));
        self.writer.load(&image, &HashMap::new(), base.level, 0)?;
        let rules: Vec<u32> = model.rules.iter().filter_map(|rule| registry.rules.number(&rule.name)).collect();
        let workloads: Vec<u32> = (0..policy.workloads.len())
            .filter_map(|w| registry.workloads.number(&format!("w{w}")))
            .chain([UNMANAGED])
            .collect();
        self.mirror.epoch = random.random_range(0..1 << 20);
        self.writer.maps_mut().nic.set(nic::EPOCH as usize, self.mirror.epoch);
        self.give_grants(&mut random, &rules)?;
        self.meet_nodes(&mut random, &rules)?;
        let generation = self.writer.generation();
        let guarded: Vec<(u8, u16)> = [IPPROTO_TCP, IPPROTO_UDP]
            .into_iter()
            .flat_map(|protocol| (0..=u16::MAX).map(move |port| (protocol, port)))
            .filter(|(protocol, port)| image.ports.get(&port_slot(*protocol, *port)).is_some_and(is_guarded))
            .collect();
        for n in 0..FRAMES_PER_POLICY {
            let packet = match (random.random_range(0..8), guarded.choose(&mut random)) {
                (0, _) => frames::random(&mut random),
                // Else few frames would concern anybody.
                (1..6, Some((protocol, port))) => frames::structured_to(&mut random, *protocol, *port),
                _ => frames::structured(&mut random),
            };
            let mut frame = ethernet(&mut random, &packet);
            if random.random_ratio(1, 4) {
                self.introduce(&mut random, &mut frame);
            } else if random.random_ratio(1, 8)
                && let Some(earlier) = self.mirror.believed.choose(&mut random)
            {
                frame = earlier.clone();
                if random.random_bool(0.5) {
                    complete(&mut frame);
                }
            }
            self.place(&mut random, &frame, &workloads, generation)?;
            self.one(image.at(clock::monotonic()).numbered(generation), &frame)
                .with_context(|| format!("frame {n}\n{frame:02x?}\n{}", policy.text()))?;
        }
        self.compare_sums()?;
        self.forget()
    }

    fn give_grants(&mut self, random: &mut SmallRng, rules: &[u32]) -> Result<()> {
        let mut commands = Vec::new();
        let callers: Vec<Address> =
            (0..200).filter_map(|_| Some(parse(frames::structured(random).as_slice()).ok()?.source)).collect();
        for address in callers {
            for rule in rules.iter().filter(|_| random.random_bool(0.5)).copied().collect::<Vec<_>>() {
                let grant = Grant { slot: self.mirror.slots.len() as u32 + 1, serial: random.random_range(1..1000) };
                let until = if random.random_bool(0.7) { u64::MAX } else { 0 };
                let key = GrantKey { rule, workload: UNMANAGED, scope: NETNS, address };
                if self.mirror.grants.contains_key(&key) {
                    continue;
                }
                commands.push(Command::Fill { grant, rule, until });
                commands.push(Command::Point { key, grant });
                self.mirror.grants.insert(key, grant);
                self.mirror.slots.insert(grant.slot, Slot { until, serial: grant.serial, rule });
            }
        }
        Ok(self.writer.follow(&commands)?)
    }

    /// Another node's keys and callers, and grants of some of them.
    fn meet_nodes(&mut self, random: &mut SmallRng, rules: &[u32]) -> Result<()> {
        let over = clock::over();
        for node in 0..4 {
            for key_id in [0, 1, 200, 255] {
                let until = if random.random_bool(0.7) { u64::MAX } else { over };
                let key = NodeKey { secret: random.random(), until };
                self.mirror.keys.insert(NodeKeyId { node, key_id }, key);
                self.writer.maps_mut().nodes.keys.insert(NodeKeyId { node, key_id }, key, 0)?;
            }
        }
        let mut commands = Vec::new();
        for label in [1, 2, 3, 0x00ff_ffff, 0x0012_3456] {
            let until = if random.random_bool(0.8) { u64::MAX } else { over };
            let speaker = Speaker { until, node: random.random_range(0..4), reserved: 0 };
            self.mirror.speakers.insert(label, speaker);
            self.writer.maps_mut().nodes.speakers.insert(label, speaker, 0)?;
            for set in SETS.filter(|_| random.random_bool(0.7)).collect::<Vec<_>>() {
                let Some(rule) = rules.choose(random).copied() else { continue };
                let grant = Grant { slot: self.mirror.slots.len() as u32 + 1, serial: random.random_range(1..1000) };
                let until = if random.random_bool(0.8) { u64::MAX } else { 0 };
                let key = VouchedKey { set, label };
                commands.push(Command::Fill { grant, rule, until });
                commands.push(Command::Vouch { key, grant });
                self.mirror.vouched.insert(key, grant);
                self.mirror.slots.insert(grant.slot, Slot { until, serial: grant.serial, rule });
            }
        }
        Ok(self.writer.follow(&commands)?)
    }

    /// Makes a SYN of a TCP frame that says who sends it, mostly truly.
    fn introduce(&self, random: &mut SmallRng, frame: &mut Vec<u8>) {
        let Some(at) = network_offset(frame.as_slice()) else { return };
        let Ok(packet) = parse(&Behind { frame: frame.as_slice(), at }) else { return };
        let begin = at + packet.transport as usize * 4;
        if packet.protocol != IPPROTO_TCP || packet.transport == 0 || frame.len() < begin + 20 {
            return;
        }
        let sequence: u32 = random.random();
        let key_id: u32 = [0, 1, 200, 255, 7].choose(random).copied().unwrap_or_default();
        let label: u32 = [1, 2, 3, 0x00ff_ffff, 0x0012_3456, 0, 9].choose(random).copied().unwrap_or_default();
        let node = self.mirror.speakers.get(&label).map_or(0, |speaker| speaker.node);
        let secret = self.mirror.keys.get(&NodeKeyId { node, key_id }).map_or([0; 2], |key| key.secret);
        let (source, destination) =
            ((packet.source, packet.source_port), (packet.destination, packet.destination_port));
        let mac = mac(secret, &syn_key(source, destination, sequence), key_id, label & (LABELS - 1));
        let mut said: Vec<u8> = option(mac, key_id, label).iter().flat_map(|word| word.to_ne_bytes()).collect();
        if random.random_ratio(1, 8) {
            let (at, bit) = (random.random_range(0..syn::OPTION), random.random_range(0..8));
            said[at] ^= 1 << bit;
        }
        frame[begin + 4..begin + 8].copy_from_slice(&sequence.to_be_bytes());
        frame[begin + 13] = 0x02;
        // Mostly at the header's end, now and then where that seems to be.
        let words = random.random_range(0..=6);
        frame.splice(begin + 20.., vec![1; words * 4].into_iter().chain(said));
        let length = if random.random_ratio(1, 16) { random.random_range(0..16) } else { 9 + words as u8 };
        frame[begin + 12] = length << 4;
        if random.random_ratio(1, 16) {
            frame.truncate(random.random_range(begin..frame.len()));
        }
    }

    /// Somebody who listens where a frame goes, or a flow that it belongs to.
    fn place(&mut self, random: &mut SmallRng, frame: &[u8], workloads: &[u32], generation: u32) -> Result<()> {
        let Some(at) = network_offset(frame) else { return Ok(()) };
        let Ok(packet) = parse(&Behind { frame, at }) else { return Ok(()) };
        ensure!(plain(&Behind { frame, at }).is_none_or(|plain| plain == packet), "{packet:?}");
        let key = flow_of(&packet, NETNS);
        let called = key.callee();
        if random.random_bool(0.7) && !self.mirror.listeners.contains_key(&called) {
            let listener = Listener {
                epoch: self.mirror.epoch + u64::from(random.random_ratio(1, 8)),
                cgroup: 1,
                workload: workloads.choose(random).copied().unwrap_or(UNMANAGED),
                flags: if random.random_ratio(1, 16) { listener_flags::SHARED } else { 0 },
            };
            self.mirror.listeners.insert(called, listener);
            self.writer.maps_mut().listeners.insert(called, listener, 0)?;
        }
        if random.random_ratio(1, 8) {
            let slots: Vec<Grant> = self.mirror.grants.values().copied().take(8).collect();
            let flow = Flow {
                until: [0, 0, 1, u64::MAX].choose(random).copied().unwrap_or_default(),
                grant: if random.random_bool(0.5) {
                    Grant::NONE
                } else {
                    slots.choose(random).copied().unwrap_or_default()
                },
                generation: generation - u32::from(random.random_ratio(1, 4)),
                role: u32::from(if random.random_ratio(1, 8) { role::CLIENT } else { role::SERVER }),
                ..Flow::default()
            };
            self.mirror.flows.borrow_mut().insert(key, flow);
            self.writer.maps_mut().flows.insert(key, flow, 0)?;
        }
        Ok(())
    }

    fn one(&mut self, view: View<'_>, frame: &[u8]) -> Result<()> {
        let Bench { object, writer, mirror, rulings } = self;
        let (grants, vouched, slots) = (&mirror.grants, &mirror.vouched, &mirror.slots);
        let view = view
            .with_grants(|key| grants.get(&key).copied(), |slot| slots.get(&slot).copied())
            .with_vouched(|key| vouched.get(&key).copied());
        let ruling = rule(&view, mirror, frame);
        drop(view);
        let kind = match ruling {
            Ruling::Untouched => "untouched",
            Ruling::Known => "known",
            Ruling::Passes { .. } => "passes",
            Ruling::Connected => "connected",
            Ruling::Refused { .. } => "refused",
        };
        *rulings.entry(kind).or_default() += 1;
        let Some(Program::Xdp(program)) = object.program("authd_xdp") else { anyhow::bail!("no authd_xdp") };
        let options = TestRunOptions { data_in: Some(frame), ..TestRunOptions::new() };
        let returned = program.test_run(options)?.return_value;
        let meant = if ruling.passes() { XDP_PASS } else { XDP_DROP };
        ensure!(returned == meant, "returned {returned}, not {meant}: {ruling:?}");
        let Some(at) = network_offset(frame) else { return Ok(()) };
        let Ok(packet) = parse(&Behind { frame, at }) else { return Ok(()) };
        match ruling {
            Ruling::Passes { spoken: Some((key, spoken)), .. } => {
                *rulings.entry("vouched").or_default() += 1;
                // The handshake of some comes to its end.
                let used = key.protocol % 2;
                let kept = writer.maps().nodes.spoken.get(&key, 0)?;
                ensure!(kept == spoken, "remembered {kept:?}, not {spoken:?}");
                mirror.believed.push(frame.to_vec());
                mirror.spoken.borrow_mut().insert(key, Spoken { used, ..spoken });
                writer.maps_mut().nodes.spoken.insert(key, Spoken { used, ..spoken }, 0)?;
            }
            Ruling::Passes { remember: Some(flow), .. } => {
                if flow.label != 0 {
                    *rulings.entry("vouched before").or_default() += 1;
                }
                let key = flow_of(&packet, NETNS);
                mirror.flows.borrow_mut().insert(key, flow);
                let kept = writer.maps().flows.get(&key, 0)?;
                ensure!(kept == flow, "remembered {kept:?}, not {flow:?}");
            }
            Ruling::Refused { verdict, .. } => {
                if verdict.reason == Reason::NodeReplay {
                    *rulings.entry("replayed").or_default() += 1;
                }
                let (reason, bytes) = (verdict.reason.code(), (frame.len() - at) as u64);
                let counter = mirror.counters.entry(reason).or_default();
                counter.verdicts += 1;
                counter.bytes += bytes;
                let key = (packet.source, packet.destination, (packet.protocol, packet.destination_port));
                mirror.drop(key, reason, bytes);
            }
            _ => {}
        }
        Ok(())
    }

    fn compare_sums(&mut self) -> Result<()> {
        let kernel = ring::counters(&self.writer.maps().counters)?;
        for code in 0..REASON_SLOTS as u16 {
            let (found, meant) = (kernel[code as usize], self.mirror.counters.get(&code).copied().unwrap_or_default());
            ensure!(found == meant, "counter of reason {code}: {found:?} is not {meant:?}");
        }
        let drops = self.writer.take_drops()?;
        let others: HashMap<_, _> = drops.others.iter().map(|(reason, d)| (*reason, (d.packets, d.bytes))).collect();
        ensure!(others == self.mirror.other_drops, "{others:?} is not {:?}", self.mirror.other_drops);
        let found: HashMap<_, _> = drops
            .known
            .iter()
            .map(|(key, sum)| ((key.source, key.destination, key.port()), (sum.reason, sum.packets, sum.bytes)))
            .collect();
        ensure!(found == self.mirror.drops, "drops: {} kinds, not {}", found.len(), self.mirror.drops.len());
        ensure!(self.writer.take_drops()?.known.is_empty());
        self.mirror.drops.clear();
        self.mirror.other_drops.clear();
        Ok(())
    }

    fn forget(&mut self) -> Result<()> {
        let maps = self.writer.maps_mut();
        self.mirror.believed.clear();
        for key in self.mirror.keys.drain().map(|(key, _)| key) {
            maps.nodes.keys.remove(&key)?;
        }
        for label in self.mirror.speakers.drain().map(|(label, _)| label) {
            maps.nodes.speakers.remove(&label)?;
        }
        for key in self.mirror.spoken.borrow_mut().drain().map(|(key, _)| key) {
            maps.nodes.spoken.remove(&key)?;
        }
        for key in self.mirror.listeners.drain().map(|(key, _)| key) {
            maps.listeners.remove(&key)?;
        }
        for key in self.mirror.flows.borrow_mut().drain().map(|(key, _)| key) {
            maps.flows.remove(&key)?;
        }
        let unpoint = self.mirror.grants.drain().map(|(key, _)| Command::Unpoint { key });
        let unvouch = self.mirror.vouched.drain().map(|(key, _)| Command::Unvouch { key });
        let empty = self.mirror.slots.drain().map(|(slot, _)| Command::Empty { slot });
        let commands: Vec<Command> = unpoint.chain(unvouch).chain(empty).collect();
        Ok(self.writer.follow(&commands)?)
    }
}

/// Makes the end of the handshake of a SYN.
fn complete(frame: &mut [u8]) {
    let Some(at) = network_offset(&*frame) else { return };
    let Ok(packet) = parse(&Behind { frame: &*frame, at }) else { return };
    let begin = at + packet.transport as usize * 4;
    let sequence = syn_sequence(frame, begin).wrapping_add(1);
    frame[begin + 4..begin + 8].copy_from_slice(&sequence.to_be_bytes());
    frame[begin + 13] = 0x10;
}

fn syn_sequence(frame: &[u8], begin: usize) -> u32 {
    let octets = frame[begin + 4..].first_chunk().copied().unwrap_or_default();
    u32::from_be_bytes(octets)
}

/// Sets of rules of which callers of other nodes have grants.
const SETS: std::ops::Range<u32> = 1..9;

/// Turns some of the rules that ask for proofs into ones that ask another node.
fn ask_nodes(random: &mut SmallRng, cell: &mut Cell) {
    for phase in [&mut cell.first, &mut cell.second] {
        let there = phase.granted_by.iter().take_while(|rule| **rule != NO_RULE).count();
        let first = random.random_range(0..=there);
        if first < there {
            phase.granted_by[first..].fill(NO_RULE);
            phase.vouched = random.random_range(SETS);
        }
    }
}

fn is_guarded(entry: &PortEntry) -> bool {
    entry.flags & port_flags::GUARDED != 0
}

/// A frame with a packet behind up to three tags, now and then of a type that does not fit.
fn ethernet(random: &mut SmallRng, packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    let tags = [0, 0, 0, 0, 1, 1, 2, 3].choose(random).copied().unwrap_or_default();
    for _ in 0..tags {
        frame.extend([[0x81, 0x00], [0x88, 0xa8]].choose(random).copied().unwrap_or_default());
        frame.extend(random.random::<u16>().to_be_bytes());
    }
    let kind: [u8; 2] = match (packet[0] >> 4, random.random_range(0..32)) {
        (_, 0) => random.random(),
        (4, 1) | (6, 2..) => [0x86, 0xdd],
        _ => [0x08, 0x00],
    };
    frame.extend(kind);
    frame.extend(packet);
    frame
}
