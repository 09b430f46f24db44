//! The programs in the kernel against the same verdict function over an image: test runs of the packet hooks, with random
//! policies and packets. Compared: action, event with reason, rule and ends, counters.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
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
        compile::{Options, Registry, compile},
        diagnostic::Source,
        image::Image,
        load::texts,
    },
};
use authd_common::{
    address::Address,
    event::{Event, direction, kind},
    parse::{Packet, packet_flags, parse},
    tables::{
        ALTERNATIVES, Counter, DenialKey, Grant, GrantKey, IPPROTO_UDP, IdentityEntry, PENDING, Slot, Tables,
        UNMANAGED, identity_flags, port_flags, tag_flags,
    },
    verdict::{FarEnd, Opener, Verdict, decide_packet_in, decide_packet_out},
};
use authd_tests::{daemon::emulated, frames, meaning, netns::Netns, sandbox::Sandbox};
use aya::programs::{Program, TestRun, TestRunOptions};
use libtest_mimic::Trial;
use rand::{RngExt, SeedableRng, rngs::SmallRng};

use crate::{Verdict as Ran, trial};

pub fn trials() -> Vec<Trial> {
    vec![trial("the_kernel_decides_as_the_library_does", the_kernel_decides_as_the_library_does)]
}

/// Of each kind: random bytes, and packets with a structure.
const FRAMES: u64 = 100_000;
/// An emulated machine takes some fifty times as long.
const FRAMES_EMULATED: u64 = 5_000;
const FRAMES_PER_POLICY: u64 = 2_000;
/// The size of `struct __sk_buff`, and where its `ifindex` lies (include/uapi/linux/bpf.h).
const CONTEXT: usize = 192;
const IFINDEX: usize = 40;
const LOOPBACK: u32 = 1;
/// A sender's instance, where it has one.
const INSTANCE: u64 = 77;
/// A type that nobody uses (IEEE 802, local experiments): newer kernels refuse to run what claims to be IP and is short.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// This process in another cgroup, for as long as this lives: its new sockets, and those of test runs, belong to it.
pub struct Moved {
    back: PathBuf,
}

impl Moved {
    pub fn to(cgroup: &Path) -> Result<Self> {
        let mount = authd::daemon::cgroupfs::mount_point().context("cgroup v2 is mounted")?;
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::")).context("a process has a cgroup")?;
        let back = mount.join(own.trim_start_matches('/'));
        fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())?;
        Ok(Self { back })
    }
}

impl Drop for Moved {
    fn drop(&mut self) {
        let _ = fs::write(self.back.join("cgroup.procs"), std::process::id().to_string());
    }
}

fn the_kernel_decides_as_the_library_does() -> Result<Ran> {
    let sandbox = Sandbox::new()?;
    let frames = if emulated() { FRAMES_EMULATED } else { FRAMES };
    sandbox.netns.ip(&["link", "add", "near", "type", "veth", "peer", "name", "far"])?;
    let own = sandbox.cgroup.child("/fuzz")?;
    let _moved = Moved::to(&own)?;
    let compared = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                enter(&sandbox.netns)?;
                compare(&sandbox, &own, frames)
            })
            .join()
            .map_err(|panic| std::panic::resume_unwind(panic))
            .and_then(|result| result)
    })?;
    println!("{compared} packets compared");
    ensure!(compared == 2 * frames);
    Ok(Ran::Ran)
}

fn enter(netns: &Netns) -> Result<()> {
    Ok(nix::sched::setns(fs::File::open(netns.path())?, nix::sched::CloneFlags::CLONE_NEWNET)?)
}

/// Who the sender of the packets is under one policy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Who {
    Managed(u32),
    Unmanaged,
    /// Below a cgroup with patterns, and not known yet.
    Pending,
}

impl Who {
    fn number(self) -> u32 {
        match self {
            Self::Managed(number) => number,
            Self::Unmanaged => UNMANAGED,
            Self::Pending => PENDING,
        }
    }
}

struct Bench {
    object: Object,
    writer: Writer,
    cgroup: u64,
    elsewhere: u32,
    /// What the kernel's counters should say, by reason.
    counters: HashMap<u16, Counter>,
    grants: HashMap<GrantKey, Grant>,
    /// Ends and serials, by slot.
    slots: HashMap<u32, Slot>,
    /// Loopback flows to guarded ports that this cgroup has sent on: a packet that arrives on one is its own.
    sent: HashSet<Flow>,
}

/// Source and destination.
type Flow = (Address, u16, Address, u16);

fn compare(sandbox: &Sandbox, own: &Path, frames: u64) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let base = Base::find(Some(sandbox.cgroup.path()))?;
    let sizes = Sizes { identities: 1024, addresses: 4096, cells: 65_536, ..Sizes::default() };
    let mut object = object::load(sandbox.pins(), &sizes, Hooks::Sockets)?;
    ensure!(object.take_xdp().is_none(), "no interface, no program for it");
    let writer = Writer::new(object.take_maps(), sizes)?;
    let cgroup = fs::metadata(own)?.ino();
    let elsewhere = nix::net::if_::if_nametoindex("near")?;
    let mut bench = Bench {
        object,
        writer,
        cgroup,
        elsewhere,
        counters: HashMap::new(),
        grants: HashMap::new(),
        slots: HashMap::new(),
        sent: HashSet::new(),
    };
    let mut on_grants = 0;
    let mut compared = 0;
    for seed in 0..(2 * frames).div_ceil(FRAMES_PER_POLICY) {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut policy = meaning::policy(&mut random, true);
        if seed % 2 == 0 {
            // Else few packets come to a grant.
            let asking = policy.rules.iter().filter(|rule| rule.require.iter().any(|proof| *proof != "cgroup")).count();
            let free = policy.rules.iter_mut().filter(|rule| !rule.deny && rule.require.is_empty());
            free.take(ALTERNATIVES.saturating_sub(asking)).for_each(|rule| rule.require.push("api-key"));
        }
        let source = Source { name: "random.toml".into(), text: policy.text().into() };
        let model = texts(vec![source]).model.with_context(|| format!("refused:\n{}", policy.text()))?;
        let options =
            Options { failsafe: policy.failsafe.clone(), builtin_rules: policy.builtin, ..Options::default() };
        let mut registry = Registry::default();
        registry.assign(&model, &options);
        let image = compile(&model, &mut registry, &options, clock::moment())?;
        let workload = random.random_range(0..policy.workloads.len());
        let number = registry.workloads.number(&format!("w{workload}")).context("every workload has a number")?;
        let who = match random.random_range(0..10) {
            0 => Who::Unmanaged,
            1 => Who::Pending,
            _ => Who::Managed(number),
        };
        let instance = if random.random_bool(0.5) { 0 } else { INSTANCE };
        let identities: HashMap<u64, IdentityEntry> = match who {
            Who::Managed(workload) => HashMap::from([(cgroup, IdentityEntry { workload, flags: 0, instance })]),
            Who::Unmanaged => HashMap::new(),
            Who::Pending => HashMap::from([(
                base.id()?,
                IdentityEntry { workload: UNMANAGED, flags: identity_flags::OPEN, instance: 0 },
            )]),
        };
        bench.writer.load(&image, &identities, base.level, 0)?;
        let rules: Vec<u32> = model.rules.iter().filter_map(|rule| registry.rules.number(&rule.name)).collect();
        bench.give_grants(&mut random, &rules, who)?;
        for n in 0..FRAMES_PER_POLICY.min(2 * frames - compared) {
            let packet = if n % 2 == 0 { frames::random(&mut random) } else { frames::structured(&mut random) };
            let outbound = random.random_bool(0.5);
            let on_loopback = random.random_bool(0.3);
            let context = || {
                let way = if outbound { "out" } else { "in" };
                format!(
                    "seed {seed}, packet {n} {way}, loopback {on_loopback}, {who:?}\n{packet:02x?}\n{}",
                    policy.text()
                )
            };
            on_grants +=
                u64::from(bench.one(&image, who, instance, &packet, outbound, on_loopback).with_context(context)?);
            compared += 1;
        }
        bench.take_grants()?;
        bench.compare_counters().with_context(|| format!("seed {seed}"))?;
    }
    // The few packets of an emulated machine may miss them all.
    ensure!(on_grants > 100 || frames < FRAMES, "of {compared} verdicts {on_grants} rest on a grant");
    Ok(compared)
}

/// What the hook should do with a packet of a new socket.
struct Expected {
    passes: bool,
    /// Verdict, and whether the ends of the packet are told.
    event: Option<(Verdict, Option<Packet>)>,
}

impl Bench {
    /// Grants of the sender and of callers from elsewhere: some live, some revoked, some of another one's slot.
    fn give_grants(&mut self, random: &mut SmallRng, rules: &[u32], who: Who) -> Result<()> {
        let callers: Vec<Address> =
            (0..20).filter_map(|_| Some(parse(frames::structured(random).as_slice()).ok()?.source)).collect();
        let local = |scope| (who.number(), scope, Address::UNSPECIFIED);
        let remote = callers.iter().map(|address| (UNMANAGED, 0, *address));
        let holders: Vec<_> = [local(0), local(INSTANCE)].into_iter().chain(remote).collect();
        let mut commands = Vec::new();
        for (workload, scope, address) in holders {
            for rule in rules.iter().filter(|_| random.random_bool(0.4)).copied().collect::<Vec<_>>() {
                let grant = Grant { slot: self.slots.len() as u32 + 1, serial: random.random_range(1..1000) };
                let (until, serial) = match random.random_range(0..6) {
                    0 => (0, grant.serial),
                    1 => (u64::MAX, grant.serial + 1),
                    _ => (u64::MAX, grant.serial),
                };
                let key = GrantKey { rule, workload, scope, address };
                if self.grants.contains_key(&key) {
                    continue;
                }
                commands.push(Command::Fill { grant: Grant { serial, ..grant }, rule, until });
                commands.push(Command::Point { key, grant });
                self.grants.insert(key, grant);
                self.slots.insert(grant.slot, Slot { until, serial, rule });
            }
        }
        Ok(self.writer.follow(&commands)?)
    }

    fn take_grants(&mut self) -> Result<()> {
        let unpoint = self.grants.drain().map(|(key, _)| Command::Unpoint { key });
        let empty = self.slots.drain().map(|(slot, _)| Command::Empty { slot });
        let commands: Vec<Command> = unpoint.chain(empty).collect();
        Ok(self.writer.follow(&commands)?)
    }

    /// Returns whether the verdict rests on a grant.
    fn one(
        &mut self,
        image: &Image,
        who: Who,
        instance: u64,
        packet: &[u8],
        outbound: bool,
        on_loopback: bool,
    ) -> Result<bool> {
        let expected = self.expected(image, who, instance, packet, outbound, on_loopback);
        if let Some((verdict, _)) = &expected.event {
            let counter = self.counters.entry(verdict.reason.code()).or_default();
            counter.verdicts += 1;
            let refused = told_as(&expected) == kind::DENIED;
            counter.bytes += if refused { packet.len() as u64 } else { 0 };
        }
        let returned = self.run(packet, outbound, on_loopback)?;
        ensure!(returned == u32::from(expected.passes), "returned {returned}, not {}", u32::from(expected.passes));
        let mut events = ring::drain(&mut self.writer.maps_mut().events, 4);
        ensure!(events.len() <= 1, "one packet, {} events: {events:?}", events.len());
        match (events.pop(), &expected.event) {
            (None, None) => Ok(false),
            (Some(event), None) => anyhow::bail!("an event of what should be silent: {event:?}"),
            (None, Some((verdict, _))) => anyhow::bail!("no event of {verdict:?}"),
            (Some(event), Some((verdict, told))) => {
                self.forget_denial(&event)?;
                self.check_event(&event, &expected, verdict, told.as_ref(), who, outbound)?;
                Ok(verdict.grant.is_some())
            }
        }
    }

    fn check_event(
        &self,
        event: &Event,
        expected: &Expected,
        verdict: &Verdict,
        told: Option<&Packet>,
        who: Who,
        outbound: bool,
    ) -> Result<()> {
        let unread = Packet::UNREAD;
        let packet = told.unwrap_or(&unread);
        let source = (packet.source, packet.source_port);
        let destination = (packet.destination, packet.destination_port);
        let (local, remote) = if outbound { (source, destination) } else { (destination, source) };
        let found = (event.kind, event.action, event.reason, event.rule, event.direction, event.count);
        let way = if outbound { direction::OUT } else { direction::IN };
        let meant = (told_as(expected), verdict.action.code(), verdict.reason.code(), verdict.rule, way, 1);
        ensure!(found == meant, "kind, action, reason, rule, direction, count: {found:?} is not {meant:?}: {event:?}");
        let found = (event.local, event.local_port, event.remote, event.remote_port, event.protocol);
        let meant = (local.0, local.1, remote.0, remote.1, packet.protocol);
        ensure!(found == meant, "ends: {found:?} is not {meant:?}");
        let found = (event.workload, event.cgroup, event.generation, event.grant);
        let meant = (who.number(), self.cgroup, self.writer.generation(), verdict.grant);
        ensure!(found == meant, "workload, cgroup, generation, grant: {found:?} is not {meant:?}");
        Ok(())
    }

    fn run(&self, packet: &[u8], outbound: bool, on_loopback: bool) -> Result<u32> {
        let name = if outbound { "authd_egress" } else { "authd_ingress" };
        let Some(Program::CgroupSkb(program)) = self.object.program(name) else { anyhow::bail!("no {name}") };
        let mut frame = vec![0; 12];
        frame.extend(ETHERTYPE);
        frame.extend(packet);
        let mut context = [0; CONTEXT];
        let interface = if on_loopback { LOOPBACK } else { self.elsewhere };
        context[IFINDEX..IFINDEX + 4].copy_from_slice(&interface.to_ne_bytes());
        let options = TestRunOptions { data_in: Some(&frame), ctx_in: Some(&context), ..TestRunOptions::new() };
        Ok(program.test_run(options)?.return_value)
    }

    /// The next denial like this one is to be told too.
    fn forget_denial(&mut self, event: &Event) -> Result<()> {
        let key = DenialKey {
            cgroup: event.cgroup,
            remote: event.remote,
            port: if event.direction == direction::OUT { event.remote_port } else { event.local_port },
            reason: event.reason,
            protocol: event.protocol,
            direction: event.direction,
            action: event.action,
            flags: event.flags & tag_flags::VOUCHED,
        };
        self.writer.take_denial(&key)?;
        Ok(())
    }

    fn compare_counters(&self) -> Result<()> {
        let kernel = ring::counters(&self.writer.maps().counters)?;
        for (code, found) in kernel.iter().enumerate() {
            let meant = self.counters.get(&(code as u16)).copied().unwrap_or_default();
            ensure!(*found == meant, "counter of reason {code}: {found:?} is not {meant:?}");
        }
        Ok(())
    }
}

/// A packet that cannot be trusted is refused (or would be), one that passes opens an exchange.
fn told_as(expected: &Expected) -> u8 {
    match &expected.event {
        Some((verdict, Some(_))) if verdict.action.passes() => kind::OPENED,
        _ => kind::DENIED,
    }
}

impl Bench {
    fn expected(
        &mut self,
        image: &Image,
        who: Who,
        instance: u64,
        packet: &[u8],
        outbound: bool,
        on_loopback: bool,
    ) -> Expected {
        let (grants, slots) = (&self.grants, &self.slots);
        let view = image.at(clock::monotonic());
        let view = view.with_grants(|key| grants.get(&key).copied(), |slot| slots.get(&slot).copied());
        let instance = if let Who::Managed(_) = who { instance } else { 0 };
        let root = image.root();
        let silent = |passes| Expected { passes, event: None };
        if who == Who::Unmanaged {
            return silent(true);
        }
        let parsed = parse(packet);
        let unfit = if outbound { packet_flags::UNFIT_OUT } else { packet_flags::UNFIT_IN };
        let sound = match &parsed {
            Ok(packet) => packet.unfit(unfit).is_none().then_some(*packet),
            Err(_) => None,
        };
        let is_datagram = |packet: &Packet| packet.protocol == IPPROTO_UDP && on_loopback;
        let flow = |packet: Packet| (packet.source, packet.source_port, packet.destination, packet.destination_port);
        let flow = sound.filter(is_datagram).map(flow);
        let verdict = if outbound {
            let guarded = |flow: &Flow| view.port(&root, IPPROTO_UDP, flow.3).flags & port_flags::GUARDED != 0;
            self.sent.extend(flow.filter(guarded));
            let opener = Opener { workload: who.number(), instance };
            decide_packet_out(&view, &root, &opener, &parsed)
        } else {
            // Without ports nobody can tell a call from an answer: it passes, and opens nothing.
            if sound.is_some_and(|packet| packet.protocol != IPPROTO_UDP) {
                return silent(true);
            }
            let source = sound.map_or(Address::UNSPECIFIED, |packet| packet.source);
            let own = flow.is_some_and(|flow| self.sent.contains(&flow));
            let caller = match (on_loopback, own) {
                (false, _) => FarEnd::remote(source, 0),
                (true, false) => FarEnd::local(UNMANAGED, 0),
                (true, true) => FarEnd::local(who.number(), instance),
            };
            decide_packet_in(&view, &root, who.number(), &parsed, &caller)
        };
        Expected { passes: verdict.action.passes(), event: Some((verdict, sound)) }
    }
}
