//! The interfaces' program against the least that there is (a program that drops), against a frame that is read and looked up,
//! and, with frames that really come from one interface to another, against what else drops there.

use std::{
    collections::HashMap,
    fmt::Write as _,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use authd::{
    daemon::{cgroupfs::Base, clock},
    dataplane::{
        bpf::{XdpMode, link_xdp},
        object::{self, Hooks, Loaded, Object, Sizes},
        writer::Writer,
    },
    grants,
    policy::{
        compile::{Options, Registry, compile},
        diagnostic::Source,
        load::texts,
    },
};
use authd_common::{
    address::Address,
    nic::{Behind, flow_of, network_offset},
    parse::parse,
    syn::{self, NodeKey, NodeKeyId, Speaker},
    tables::{Flow, FlowKey, Grant, Listener, VouchedKey, role},
};
use authd_tests::{netns::Netns, sandbox::Sandbox};
use aya::{
    Ebpf,
    maps::HashMap as Map,
    programs::{Program, TestRun, TestRunAttrs, TestRunOptions},
};

use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
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
const QUICK: Effort = Effort { runs: 50_000, pairs: 40, frames: 400_000, floods: 6, rules: &[10, 1_000_000] };

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const FRIEND: [u8; 4] = [192, 0, 2, 2];
const GRANTED: [u8; 4] = [192, 0, 2, 3];
const STRANGER: [u8; 4] = [198, 18, 0, 1];
const VOUCHER: [u8; 4] = [192, 0, 2, 4];

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
            if what == VOUCHED {
                let pairs = floor.compare(&node, &frame, passes, "floor_hash", &effort)?;
                let name = format!("{what}, {rules} rules, against a look-up and a hash");
                results.push(compared(name, &pairs, Some(1.3)));
            }
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
fn frames() -> [(&'static str, Vec<u8>, bool); 7] {
    [
        ("established", tcp(FRIEND, 7001, ACK), true),
        ("established by a grant", tcp(GRANTED, 7002, ACK), true),
        ("SYN that may", tcp(FRIEND, 7001, SYN), true),
        ("SYN that may not", tcp(STRANGER, 7001, SYN), false),
        ("unguarded port", tcp(STRANGER, 9999, ACK), true),
        (VOUCHED, introduced(SECRET), true),
        ("SYN with a forged identity", introduced([SECRET[0], SECRET[1] ^ 1]), false),
    ]
}

const VOUCHED: &str = "SYN of somebody for whom a node vouches";
/// Also in the program that it is compared with.
const SECRET: [u64; 2] = [1, 2];
const LABEL: u32 = 5;
const KEY_ID: u32 = 7;

/// A SYN to 192.0.2.1 that says who sends it.
fn introduced(secret: [u64; 2]) -> Vec<u8> {
    let ends = ((Address::v4(VOUCHER), 40_000), (Address::v4([192, 0, 2, 1]), 7003));
    let said = syn::option(syn::mac(secret, &syn::syn_key(ends.0, ends.1, 0), KEY_ID, LABEL), KEY_ID, LABEL);
    let mut frame = tcp(VOUCHER, 7003, SYN);
    frame.truncate(54);
    frame[46] = 0x90;
    frame.extend(said.iter().flat_map(|word| word.to_ne_bytes()));
    frame
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
        let mut object = object::load(sandbox.pins(), &sizes, Hooks::SocketsAndInterfaces)?;
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
    let image = compile(&model, &mut registry, &options, clock::moment())?;
    let base = Base::find(Some(sandbox.cgroup.path()))?;
    writer.load(&image, &HashMap::new(), base.level, 0)?;
    writer.set_netns(netns);
    let workload = registry.workloads.number("db").context("the workload has a number")?;
    let grant = Grant { slot: 1, serial: 1 };
    writer.follow(&[grants::Command::Fill { grant, rule: 1, until: u64::MAX }])?;
    let nodes = &mut writer.maps_mut().nodes;
    nodes.speakers.insert(LABEL, Speaker { until: u64::MAX, node: 1, reserved: 0 }, 0)?;
    nodes.keys.insert(NodeKeyId { node: 1, key_id: KEY_ID }, NodeKey { secret: SECRET, until: u64::MAX }, 0)?;
    let vouched = Grant { slot: 2, serial: 1 };
    let rule = registry.rules.number("web-words").context("the rule has a number")?;
    let set = image.sets.iter().find(|(_, rules)| rules.contains(&rule)).context("a cell asks for the rule")?.0;
    writer.follow(&[
        grants::Command::Fill { grant: vouched, rule, until: u64::MAX },
        grants::Command::Vouch { key: VouchedKey { set: *set, label: LABEL }, grant: vouched },
    ])?;
    for port in [7001, 7002, 7003] {
        let listener = Listener { epoch: 0, cgroup: 1, workload, flags: 0 };
        let called = key(&tcp(FRIEND, port, SYN), netns)?.callee();
        writer.maps_mut().listeners.insert(called, listener, 0)?;
    }
    let generation = writer.generation();
    for (source, port, grant) in [(FRIEND, 7001, Grant::NONE), (GRANTED, 7002, grant)] {
        let flow = Flow { until: 0, grant, generation, role: u32::from(role::SERVER), ..Flow::default() };
        writer.maps_mut().flows.insert(key(&tcp(source, port, ACK), netns)?, flow, 0)?;
    }
    Ok(())
}

fn policy(rules: usize) -> String {
    let mut text = String::from(
        "trust_domain = \"example.org\"\n[[workload]]\nname = \"db\"\nkind = \"service\"\ncgroup = \"/db\"\n\
         [[peer]]\nname = \"friend\"\nnetworks = [\"192.0.2.2\", \"192.0.2.3\"]\n\
         [[service]]\nname = \"sql\"\nworkload = \"db\"\nports = [\"tcp/7001\", \"tcp/7002\"]\n\
         [[rule]]\nname = \"friend-sql\"\nfrom = [\"friend\"]\nto = [\"sql\"]\n\
         [[authority]]\nname = \"nodes\"\nbundle = \"nodes.crt\"\ntrust_domain = \"example.org\"\n\
         [[node]]\nname = \"far\"\nspiffe_id = \"spiffe://example.org/node/far\"\n\
         speaks_for = [\"spiffe://example.org/web\"]\n\
         [[peer]]\nname = \"web\"\nspiffe_id = \"spiffe://example.org/web\"\n\
         [[service]]\nname = \"words\"\nworkload = \"db\"\nports = [\"tcp/7003\"]\n\
         [[rule]]\nname = \"web-words\"\nfrom = [\"web\"]\nto = [\"words\"]\nrequire = [\"node\"]\n",
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
    sandbox.netns.join(&far, ("near1", "far1"), (&["192.0.2.1/24"], &["192.0.2.2/24"]))?;
    let sizes = sizes(10);
    let mut object = object::load(sandbox.pins(), &sizes, Hooks::SocketsAndInterfaces)?;
    let mut writer = Writer::new(object.take_maps(), sizes)?;
    prepare(&mut writer, &sandbox, 10, sandbox_netns(&sandbox)?)?;
    let ours = object.take_xdp().context("it was asked for")?;
    let drop_all = floor.program("floor_drop")?.fd()?.try_clone()?;
    let scene = Scene { sandbox: &sandbox, far: &far, frames: effort.frames };
    let stranger = tcp(STRANGER, 7001, SYN);
    let forged = introduced([SECRET[0], SECRET[1] ^ 1]);
    let mut results = Vec::new();
    for (what, sender, frame) in [
        ("SYNs by one stranger", "floor_send", &stranger),
        ("SYNs by strangers without number", "floor_send_spoofed", &stranger),
        ("SYNs with a forged identity", "floor_send", &forged),
    ] {
        let sender = floor.program(sender)?;
        let pairs = in_turns(
            effort.floods,
            || scene.of_program(ours.fd.as_fd(), sender, frame),
            || scene.of_program(drop_all.as_fd(), sender, frame),
        )?;
        ensure!(writer.take_drops()?.packets() > 0, "nothing was dropped by authd's program");
        results.push(compared(format!("flood of {what}, against a plain drop"), &pairs, Some(1.0 / 0.7)));
    }
    let spoofed = floor.program("floor_send_spoofed")?;
    for other in [Other::Nftables, Other::XdpFilter] {
        let Some(_guard) = other.start(&sandbox.netns)? else {
            println!("not compared with {}: it is not installed", other.name());
            continue;
        };
        let pairs = in_turns(
            effort.floods,
            || scene.of_program(ours.fd.as_fd(), spoofed, &stranger),
            || scene.flood("near1", "far1", spoofed, &stranger),
        )?;
        results.push(compared(
            format!("flood of SYNs by strangers without number, against {}", other.name()),
            &pairs,
            None,
        ));
    }
    results.extend(friends(floor, &ours, effort)?);
    Ok(results)
}

struct Scene<'a> {
    sandbox: &'a Sandbox,
    far: &'a Netns,
    frames: u32,
}

impl Scene<'_> {
    /// ns for each frame that a program drops.
    fn of_program(&self, program: BorrowedFd<'_>, sender: &Program, frame: &[u8]) -> Result<f64> {
        let index = index(&self.sandbox.netns, "near0")?;
        let link = self.sandbox.netns.within(|| Ok(link_xdp(program, index, XdpMode::Native)?))?;
        let result = self.flood("near0", "far0", sender, frame);
        drop(link);
        result
    }

    fn flood(&self, near: &str, far: &str, sender: &Program, frame: &[u8]) -> Result<f64> {
        let before = received(&self.sandbox.netns, near)?;
        let elapsed = send(self.far, far, sender, frame, self.frames)?;
        let arrived = received(&self.sandbox.netns, near)? - before;
        ensure!(arrived >= u64::from(self.frames) * 9 / 10, "{arrived} of {} frames arrived", self.frames);
        Ok(elapsed.as_nanos() as f64 / arrived as f64)
    }
}

/// What else drops packets of strangers at an interface.
#[derive(Clone, Copy)]
enum Other {
    /// A set of 100,000 addresses that may, at the ingress hook.
    Nftables,
    /// Of Debian's xdp-tools: one address that may.
    XdpFilter,
}

impl Other {
    fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables with a set of 100,000",
            Self::XdpFilter => "xdp-filter",
        }
    }

    /// At `near1`, until what is returned is dropped. `None` if it is not installed.
    fn start(self, netns: &Netns) -> Result<Option<Guard>> {
        let path = netns.path().display().to_string();
        let (program, arguments, input): (_, &[&str], _) = match self {
            Self::Nftables => ("/usr/sbin/nft", &["-f", "-"], nftables()),
            Self::XdpFilter => ("/usr/sbin/xdp-filter", &["load", "near1", "--policy", "deny"], String::new()),
        };
        if !Path::new(program).exists() {
            return Ok(None);
        }
        if let Self::Nftables = self {
            // Else frames do not become packets there.
            netns.within(|| receive_offload("near1"))?;
        }
        run_inside(&path, program, arguments, &input)?;
        if let Self::XdpFilter = self {
            run_inside(&path, program, &["ip", "192.0.2.2"], "")?;
        }
        Ok(Some(Guard { other: self, path }))
    }
}

struct Guard {
    other: Other,
    path: String,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = match self.other {
            Other::Nftables => run_inside(&self.path, "/usr/sbin/nft", &["flush", "ruleset"], ""),
            Other::XdpFilter => run_inside(&self.path, "/usr/sbin/xdp-filter", &["unload", "near1"], ""),
        };
    }
}

fn nftables() -> String {
    let mut text = String::from("table netdev bench {\nset may {\ntype ipv4_addr\nelements = {\n");
    for n in 1..=100_000_u32 {
        let _ = writeln!(text, "{},", Ipv4Addr::from(0x0a00_0000 | n));
    }
    text.push_str("}\n}\nchain in {\ntype filter hook ingress device \"near1\" priority 0; policy drop;\n");
    text.push_str("ip saddr @may accept\n}\n}\n");
    text
}

fn run_inside(netns: &str, program: &str, arguments: &[&str], input: &str) -> Result<()> {
    let mut child = Command::new("nsenter")
        .arg(format!("--net={netns}"))
        .arg(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()?;
    child.stdin.take().context("its input")?.write_all(input.as_bytes())?;
    let status = child.wait()?;
    ensure!(status.success(), "{program}: {status}");
    Ok(())
}

/// ethtool(8), `-K INTERFACE gro on`: a veth polls for packets only then, or with a program.
fn receive_offload(interface: &str) -> Result<()> {
    const ETHTOOL_SGRO: u32 = 0x2c;
    let mut value = [ETHTOOL_SGRO, 1];
    // SAFETY: an all-zero `ifreq` is one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: the request names an interface and points at an `ethtool_value`.
    let failed = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    ensure!(failed == 0, "{}", std::io::Error::last_os_error());
    Ok(())
}

/// Connections of one who may, through an interface that is flooded by one who may not: against the same without a flood, and
/// against the same while an interface is flooded that nobody uses, since who makes the frames has a processor for himself.
fn friends(floor: &Floor, ours: &Loaded, effort: &Effort) -> Result<Vec<Comparison>> {
    let sandbox = Sandbox::new()?;
    let far = sandbox.another_netns("far")?;
    sandbox.netns.join(&far, ("near0", "far0"), (&["192.0.2.1/24"], &["192.0.2.2/24"]))?;
    sandbox.netns.join(&far, ("near1", "far1"), (&[], &[]))?;
    let drop_all = floor.program("floor_drop")?.fd()?.try_clone()?;
    let (near0, near1) = (index(&sandbox.netns, "near0")?, index(&sandbox.netns, "near1")?);
    let _links = sandbox.netns.within(|| {
        Ok([link_xdp(ours.fd.as_fd(), near0, XdpMode::Native)?, link_xdp(drop_all.as_fd(), near1, XdpMode::Native)?])
    })?;
    let server = sandbox.netns.within(|| Ok(TcpListener::bind("192.0.2.1:7001")?))?;
    thread::spawn(move || {
        let _ = only_on(0);
        server.incoming().for_each(drop)
    });
    let sender = floor.program("floor_send")?;
    let measure = |flooded: Option<&str>| friend(&far, sender, flooded);
    let mut results = Vec::new();
    for (against, other) in [("no flood", None), ("a flood elsewhere", Some("far1"))] {
        let pairs = in_turns(effort.floods, || measure(Some("far0")), || measure(other))?;
        let name = format!("connections through a flooded interface, against {against}");
        results.push(compared(name, &pairs, Some(1.0 / 0.9)));
    }
    Ok(results)
}

/// ns for each connection, while an interface is flooded by the other processor.
fn friend(far: &Netns, sender: &Program, flooded: Option<&str>) -> Result<f64> {
    const WINDOW: Duration = Duration::from_millis(1_000);
    /// Frames that are made at once: no more than the queue of an interface has room for.
    const BURST: u32 = 64;
    let over = AtomicBool::new(false);
    let frame = tcp(STRANGER, 7001, SYN);
    thread::scope(|scope| {
        let flood = scope.spawn(|| -> Result<()> {
            only_on(1)?;
            let Some(interface) = flooded else { return Ok(()) };
            far.within(|| {
                while !over.load(Ordering::Relaxed) {
                    send_here(interface, sender, &frame, BURST)?;
                }
                Ok(())
            })
        });
        let connections = far.within(|| {
            only_on(0)?;
            let started = Instant::now();
            let mut connections = 0_u32;
            while started.elapsed() < WINDOW {
                let mut stream = TcpStream::connect("192.0.2.1:7001")?;
                // Until the server has taken and closed it: else its queue fills up, and SYNs are lost there.
                let _ = stream.read(&mut [0])?;
                // With a reset, so that no port waits for TIME_WAIT.
                let linger = libc::linger { l_onoff: 1, l_linger: 0 };
                nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger)?;
                connections += 1;
            }
            Ok(started.elapsed().as_nanos() as f64 / f64::from(connections))
        });
        over.store(true, Ordering::Relaxed);
        flood.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        connections
    })
}

/// The calling thread runs on one processor.
fn only_on(processor: usize) -> Result<()> {
    let mut one = CpuSet::new();
    one.set(processor)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &one)?)
}

fn index(netns: &Netns, name: &str) -> Result<u32> {
    netns.within(|| Ok(nix::net::if_::if_nametoindex(name)?))
}

/// Frames that an interface has received, whatever became of them.
fn received(netns: &Netns, interface: &str) -> Result<u64> {
    netns.within(|| {
        let text = std::fs::read_to_string("/proc/thread-self/net/dev")?;
        let of = |line: &str| line.trim().strip_prefix(interface)?.strip_prefix(':').map(str::to_owned);
        let line = text.lines().find_map(of).context("the interface is there")?;
        line.split_whitespace().nth(1).context("a number of packets")?.parse().context("a number")
    })
}

/// Makes frames leave a far interface.
fn send(far: &Netns, interface: &str, sender: &Program, frame: &[u8], frames: u32) -> Result<Duration> {
    far.within(|| send_here(interface, sender, frame, frames))
}

fn send_here(interface: &str, sender: &Program, frame: &[u8], frames: u32) -> Result<Duration> {
    let Program::Xdp(sender) = sender else { anyhow::bail!("another type of program") };
    let index = nix::net::if_::if_nametoindex(interface)?;
    // `struct xdp_md`: the frame, and the interface that it came by, where XDP_TX sends it back.
    let mut context = [0_u8; 24];
    context[4..8].copy_from_slice(&(frame.len() as u32).to_ne_bytes());
    context[12..16].copy_from_slice(&index.to_ne_bytes());
    let options = TestRunOptions {
        data_in: Some(frame),
        ctx_in: Some(&context),
        repeat: frames,
        attrs: TestRunAttrs::new().xdp_live_frames(64),
        ..TestRunOptions::new()
    };
    let started = Instant::now();
    sender.test_run(options)?;
    Ok(started.elapsed())
}
