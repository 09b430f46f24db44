//! The interfaces' program against the least that there is (a program that drops), against a frame that is read and looked up,
//! and, with frames that really come from one interface to another, against what else drops there.

use std::{
    collections::HashMap,
    fmt::Write as _,
    net::Ipv4Addr,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use authd::{
    daemon::{cgroupfs::Base, clock},
    dataplane::{
        bpf::{XdpMode, link_xdp},
        object::{self, Object, Sizes},
        writer::Writer,
    },
    grants::Command,
    policy::{
        compile::{Options, Registry, compile},
        diagnostic::Source,
        load::texts,
    },
};
use authd_common::{
    nic::{Behind, flow_of, network_offset},
    parse::parse,
    tables::{Flow, FlowKey, Grant, Listener, role},
};
use authd_tests::{netns::Netns, sandbox::Sandbox};
use aya::{
    Ebpf,
    maps::HashMap as Map,
    programs::{Program, TestRun, TestRunAttrs, TestRunOptions},
};

use crate::compare::{Comparison, Pairs};

struct Effort {
    /// Test runs of which one measurement is made, and measurements.
    runs: u32,
    pairs: usize,
    /// Frames of one flood, and floods.
    frames: u32,
    floods: usize,
    rules: &'static [usize],
}

const FULL: Effort =
    Effort { runs: 200_000, pairs: 200, frames: 2_000_000, floods: 20, rules: &[10, 1_000, 1_000_000] };
const QUICK: Effort = Effort { runs: 50_000, pairs: 40, frames: 400_000, floods: 6, rules: &[10, 100_000] };

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const FRIEND: [u8; 4] = [192, 0, 2, 2];
const GRANTED: [u8; 4] = [192, 0, 2, 3];
const STRANGER: [u8; 4] = [198, 18, 0, 1];

pub fn run(quick: bool) -> Result<Vec<Comparison>> {
    let effort = if quick { QUICK } else { FULL };
    let mut floor = Floor::load()?;
    let mut results = Vec::new();
    let mut nodes = Vec::new();
    for rules in effort.rules {
        let node = Node::new(*rules)?;
        for (what, frame, passes) in frames() {
            let budget = what.starts_with("established").then_some(1.25);
            let pairs = floor.compare(&node, &frame, passes, "floor_lookup", &effort)?;
            results.push(compared(format!("{what}, {rules} rules, against a look-up"), &pairs, budget));
        }
        nodes.push(node);
    }
    let (few, many) = (&nodes[0], &nodes[nodes.len() - 1]);
    for (what, frame, _) in frames() {
        let pairs: Pairs = in_turns(effort.pairs, || many.measure(&frame, &effort), || few.measure(&frame, &effort))?;
        let budget = what.starts_with("established").then_some(1.05);
        results.push(compared(format!("{what}, most against fewest rules"), &pairs, budget));
    }
    drop(nodes);
    results.extend(floods(&mut floor, &effort)?);
    Ok(results)
}

fn compared(name: String, pairs: &[(f64, f64)], budget: Option<f64>) -> Comparison {
    Comparison::of_pairs("xdp", name, pairs, budget)
}

/// Neither always comes first.
fn in_turns(
    pairs: usize,
    mut ours: impl FnMut() -> Result<f64>,
    mut theirs: impl FnMut() -> Result<f64>,
) -> Result<Pairs> {
    (0..pairs)
        .map(|turn| match turn % 2 {
            0 => Ok((ours()?, theirs()?)),
            _ => {
                let theirs = theirs()?;
                Ok((ours()?, theirs))
            }
        })
        .collect()
}

/// What is measured: a name, a frame, and whether it passes.
fn frames() -> [(&'static str, Vec<u8>, bool); 5] {
    [
        ("established", tcp(FRIEND, 7001, ACK), true),
        ("established by a grant", tcp(GRANTED, 7002, ACK), true),
        ("SYN that may", tcp(FRIEND, 7001, SYN), true),
        ("SYN that may not", tcp(STRANGER, 7001, SYN), false),
        ("unguarded port", tcp(STRANGER, 9999, ACK), true),
    ]
}

/// A frame to 192.0.2.1.
fn tcp(source: [u8; 4], port: u16, flags: u8) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    frame.extend([0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0]);
    frame.extend(source);
    frame.extend([192, 0, 2, 1]);
    frame.extend(40_000_u16.to_be_bytes());
    frame.extend(port.to_be_bytes());
    frame.extend([0; 8]);
    frame.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    // The least that Ethernet carries.
    frame.resize(60, 0);
    frame
}

fn key(frame: &[u8], netns: u64) -> Result<FlowKey> {
    let at = network_offset(frame).context("an IP packet")?;
    let packet = parse(&Behind { frame, at }).map_err(|reason| anyhow::anyhow!("{reason:?}"))?;
    Ok(flow_of(&packet, netns))
}

/// authd's tables and its program, attached nowhere.
struct Node {
    object: Object,
    _writer: Writer,
    _sandbox: Sandbox,
}

impl Node {
    fn new(rules: usize) -> Result<Self> {
        let sandbox = Sandbox::new()?;
        let sizes = sizes(rules);
        let mut object = object::load(sandbox.pins(), &sizes)?;
        let mut writer = Writer::new(object.take_maps(), sizes)?;
        prepare(&mut writer, &sandbox, rules, sandbox_netns(&sandbox)?)?;
        Ok(Self { object, _writer: writer, _sandbox: sandbox })
    }

    fn measure(&self, frame: &[u8], effort: &Effort) -> Result<f64> {
        let program = self.object.program("authd_xdp").context("authd_xdp")?;
        Ok(test_run(program, frame, effort.runs)?.1)
    }
}

fn sizes(rules: usize) -> Sizes {
    let room = u32::try_from(rules).unwrap_or(u32::MAX).saturating_mul(4).max(65_536);
    Sizes { addresses: room, cells: room.saturating_mul(2), ..Sizes::default() }
}

fn sandbox_netns(sandbox: &Sandbox) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    // Any number will do: nobody else uses these tables.
    Ok(std::fs::metadata(sandbox.netns.path())?.ino())
}

/// A service that some addresses may call, one of them with a grant, among many other rules.
fn prepare(writer: &mut Writer, sandbox: &Sandbox, rules: usize, netns: u64) -> Result<()> {
    let read = texts(vec![Source { name: "bench.toml".into(), text: policy(rules).into() }]);
    let faults: Vec<String> = read.diagnostics.iter().map(|d| d.render(false)).collect();
    let model = read.model.with_context(|| faults.join("\n"))?;
    let options = Options { interfaces: true, ..Options::default() };
    let mut registry = Registry::default();
    registry.assign(&model, &options);
    let image = compile(&model, &registry, &options, clock::moment())?;
    let base = Base::find(Some(sandbox.cgroup.path()))?;
    writer.load(&image, &HashMap::new(), base.level, 0)?;
    writer.set_netns(netns);
    let workload = registry.workloads.number("db").context("the workload has a number")?;
    let grant = Grant { slot: 1, serial: 1 };
    writer.follow(&[Command::Fill { grant, until: u64::MAX }])?;
    for port in [7001, 7002] {
        let listener = Listener { epoch: 0, cgroup: 1, workload, flags: 0 };
        let called = key(&tcp(FRIEND, port, SYN), netns)?.callee();
        writer.maps_mut().listeners.insert(called, listener, 0)?;
    }
    let generation = writer.generation();
    for (source, port, grant) in [(FRIEND, 7001, Grant::NONE), (GRANTED, 7002, grant)] {
        let flow = Flow { until: 0, grant, generation, role: u32::from(role::SERVER) };
        writer.maps_mut().flows.insert(key(&tcp(source, port, ACK), netns)?, flow, 0)?;
    }
    Ok(())
}

fn policy(rules: usize) -> String {
    let mut text = String::from(
        "trust_domain = \"example.org\"\n[[workload]]\nname = \"db\"\nkind = \"service\"\ncgroup = \"/db\"\n\
         [[peer]]\nname = \"friend\"\nnetworks = [\"192.0.2.2\", \"192.0.2.3\"]\n\
         [[service]]\nname = \"sql\"\nworkload = \"db\"\nports = [\"tcp/7001\", \"tcp/7002\"]\n\
         [[rule]]\nname = \"friend-sql\"\nfrom = [\"friend\"]\nto = [\"sql\"]\n",
    );
    // Each of them lets another address in.
    for n in 1..rules {
        let address = Ipv4Addr::from(0x0a00_0000 | n as u32);
        let _ = write!(
            text,
            "[[peer]]\nname = \"p{n}\"\nnetworks = [\"{address}\"]\n\
             [[rule]]\nname = \"r{n}\"\nfrom = [\"p{n}\"]\nto = [\"sql\"]\n"
        );
    }
    text
}

/// What is compared with.
struct Floor(Ebpf);

impl Floor {
    fn load() -> Result<Self> {
        let path = std::env::var_os("AUTHD_FLOOR").context("AUTHD_FLOOR says where what is compared with lies")?;
        let mut ebpf = Ebpf::load(&std::fs::read(path)?)?;
        for (_, program) in ebpf.programs_mut() {
            let Program::Xdp(program) = program else { anyhow::bail!("another type of program") };
            program.load()?;
        }
        let mut flows: Map<_, FlowKey, Flow> = Map::try_from(ebpf.map_mut("FLOOR_FLOWS").context("a map")?)?;
        for (_, frame, _) in frames() {
            flows.insert(key(&frame, 0)?, Flow::default(), 0)?;
        }
        Ok(Self(ebpf))
    }

    fn program(&self, name: &str) -> Result<&Program> {
        self.0.program(name).with_context(|| format!("no {name}"))
    }

    fn compare(&mut self, node: &Node, frame: &[u8], passes: bool, with: &str, effort: &Effort) -> Result<Pairs> {
        let ours = node.object.program("authd_xdp").context("authd_xdp")?;
        let theirs = self.program(with)?;
        let (returned, _) = test_run(ours, frame, 1)?;
        ensure!(returned == if passes { 2 } else { 1 }, "the program returned {returned}");
        in_turns(
            effort.pairs,
            || Ok(test_run(ours, frame, effort.runs)?.1),
            || Ok(test_run(theirs, frame, effort.runs)?.1),
        )
    }
}

/// What it returns, and ns of each run.
fn test_run(program: &Program, frame: &[u8], runs: u32) -> Result<(u32, f64)> {
    let Program::Xdp(program) = program else { anyhow::bail!("another type of program") };
    let options = TestRunOptions { data_in: Some(frame), repeat: runs, ..TestRunOptions::new() };
    let result = program.test_run(options)?;
    Ok((result.return_value, result.duration.as_nanos() as f64))
}

/// Frames that come over a pair of interfaces as fast as they can be made, and are all dropped.
fn floods(floor: &mut Floor, effort: &Effort) -> Result<Vec<Comparison>> {
    let sandbox = Sandbox::new()?;
    let far = sandbox.another_netns("far")?;
    sandbox.netns.join(&far, ("near0", "far0"), (&["192.0.2.1/24"], &["192.0.2.2/24"]))?;
    let sizes = sizes(10);
    let mut object = object::load(sandbox.pins(), &sizes)?;
    let mut writer = Writer::new(object.take_maps(), sizes)?;
    prepare(&mut writer, &sandbox, 10, sandbox_netns(&sandbox)?)?;
    let ours = object.take_xdp();
    let theirs = floor.program("floor_drop")?.fd()?.try_clone()?;
    let mut results = Vec::new();
    for (what, sender) in [("one stranger", "floor_send"), ("strangers without number", "floor_send_spoofed")] {
        let sender = floor.program(sender)?;
        let flood = |program: std::os::fd::BorrowedFd<'_>| -> Result<f64> {
            let index = index(&sandbox.netns, "near0")?;
            let link = sandbox.netns.within(|| Ok(link_xdp(program, index, XdpMode::Native)?))?;
            let before = received(&sandbox.netns)?;
            let elapsed = send(&far, sender, effort.frames)?;
            let arrived = received(&sandbox.netns)? - before;
            drop(link);
            ensure!(arrived >= u64::from(effort.frames) * 9 / 10, "{arrived} of {} frames arrived", effort.frames);
            Ok(elapsed.as_nanos() as f64 / arrived as f64)
        };
        let mut pairs = Pairs::new();
        for turn in 0..effort.floods {
            let pair = match turn % 2 {
                0 => (flood(ours.fd.as_fd())?, flood(theirs.as_fd())?),
                _ => {
                    let theirs = flood(theirs.as_fd())?;
                    (flood(ours.fd.as_fd())?, theirs)
                }
            };
            pairs.push(pair);
            ensure!(writer.take_drops()?.packets() > 0, "nothing was dropped by authd's program");
        }
        results.push(compared(format!("flood of SYNs by {what}, against a plain drop"), &pairs, Some(1.0 / 0.7)));
    }
    Ok(results)
}

fn index(netns: &Netns, name: &str) -> Result<u32> {
    netns.within(|| Ok(nix::net::if_::if_nametoindex(name)?))
}

/// Frames that the interface has received, whatever became of them.
fn received(netns: &Netns) -> Result<u64> {
    netns.within(|| {
        let text = std::fs::read_to_string("/proc/thread-self/net/dev")?;
        let line = text.lines().find_map(|line| line.trim().strip_prefix("near0:")).context("near0 is there")?;
        line.split_whitespace().nth(1).context("a number of packets")?.parse().context("a number")
    })
}

/// Makes frames leave the far interface.
fn send(far: &Netns, sender: &Program, frames: u32) -> Result<Duration> {
    let Program::Xdp(sender) = sender else { anyhow::bail!("another type of program") };
    let frame = tcp(STRANGER, 7001, SYN);
    far.within(|| {
        let index = nix::net::if_::if_nametoindex("far0")?;
        // `struct xdp_md`: the frame, and the interface that it came by, where XDP_TX sends it back.
        let mut context = [0_u8; 24];
        context[4..8].copy_from_slice(&(frame.len() as u32).to_ne_bytes());
        context[12..16].copy_from_slice(&index.to_ne_bytes());
        let options = TestRunOptions {
            data_in: Some(&frame),
            ctx_in: Some(&context),
            repeat: frames,
            attrs: TestRunAttrs::new().xdp_live_frames(64),
            ..TestRunOptions::new()
        };
        let started = Instant::now();
        sender.test_run(options)?;
        Ok(started.elapsed())
    })
}
