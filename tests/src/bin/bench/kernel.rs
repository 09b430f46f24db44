//! The kernel programs against empty ones of their types that run for the very same calls and packets, and connections with
//! authd against connections without.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    thread,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use authd::{
    daemon::{cgroupfs::Base, clock},
    dataplane::{
        attach,
        object::{self, Hooks, Sizes},
        ring,
        writer::Writer,
    },
    policy::{
        compile::{Options, Registry, compile},
        diagnostic::Source,
        load::texts,
    },
};
use authd_common::tables::IdentityEntry;
use authd_tests::{cgroup::Cgroup, sandbox::Sandbox};
use aya::{programs::loaded_programs, sys::Stats};

use crate::{
    compare::{Comparison, Pairs},
    worker::{Worker, obey},
};

const ECHO: &str = "127.0.0.1:7001";
const SINK: &str = "127.0.0.1:7003";
const UDP: &str = "127.0.0.1:7002";

/// How much of each kind of traffic makes one measurement.
struct Effort {
    slices: usize,
    connects: u64,
    exchanges: u64,
    datagrams: u64,
    pairs: usize,
}

const FULL: Effort = Effort { slices: 100, connects: 1_000, exchanges: 4_000, datagrams: 4_000, pairs: 400 };
const QUICK: Effort = Effort { slices: 30, connects: 400, exchanges: 2_000, datagrams: 2_000, pairs: 60 };

/// Types and attach types of include/uapi/linux/bpf.h.
const EMPTY: [(&str, u32, u32); 6] = [
    ("sock_create", 9, 2),
    ("connect4", 18, 10),
    ("sendmsg4", 18, 14),
    ("sockops", 13, 3),
    ("egress", 8, 1),
    ("ingress", 8, 0),
];

/// What runs for a connection that opens and closes.
const EVERY_CONNECT: [&str; 5] = ["sock_create", "connect4", "sockops", "egress", "ingress"];

pub fn run(quick: bool) -> Result<Vec<Comparison>> {
    let effort = if quick { QUICK } else { FULL };
    let mut results = Vec::new();
    let mut scenes = Vec::new();
    for rules in [10, 1_000, 100_000] {
        let scene = Scene::new(rules)?;
        for (name, pairs) in &scene.programs(&effort)? {
            // The packets of an open connection are what the design sets a budget for.
            let budget = name.starts_with("established").then_some(1.8);
            results.push(compared(format!("{name}, {rules} rules"), pairs, budget));
        }
        let (connect, unmanaged) = scene.connections(&effort)?;
        results.push(compared(format!("connect and close, {rules} rules"), &connect, Some(1.03)));
        results.push(compared(format!("connect and close, unmanaged, {rules} rules"), &unmanaged, None));
        scenes.push(scene);
    }
    for hook in ["egress", "ingress"] {
        let drift = drift(&scenes[2], &scenes[0], hook, &effort)?;
        results.push(compared(format!("established {hook}, 100000 against 10 rules"), &drift, Some(1.05)));
    }
    Ok(results)
}

fn compared(name: String, pairs: &[(f64, f64)], budget: Option<f64>) -> Comparison {
    Comparison::of_pairs("kernel", name, pairs, budget)
}

/// What the number of rules adds to an open connection's packets: the same program in two scenes, in turns.
fn drift(many: &Scene, few: &Scene, hook: &str, effort: &Effort) -> Result<Pairs> {
    let _enabled = aya::sys::enable_stats(Stats::RunTime)?;
    let order = format!("exchange {}", effort.exchanges);
    let program = [format!("authd_{hook}")];
    let one = |scene: &Scene| Ok::<f64, anyhow::Error>(scene.means(&scene.managed, &order, &program)?[0]);
    (0..2 * effort.slices)
        .map(|turn| match turn % 2 {
            0 => Ok((one(many)?, one(few)?)),
            _ => {
                let few = one(few)?;
                Ok((one(many)?, few))
            }
        })
        .collect()
}

/// Programs attached to a cgroup of their own, and processes that make traffic there and beside it.
struct Scene {
    managed: Worker,
    unmanaged: Worker,
    outside: Worker,
    _server: Worker,
    writer: std::cell::RefCell<Writer>,
    empty: std::cell::RefCell<Vec<OwnedFd>>,
    /// Programs' numbers by name.
    programs: HashMap<String, u32>,
    // Dropped last: the workers live in these.
    _beside: Cgroup,
    _sandbox: Sandbox,
}

impl Scene {
    fn new(rules: usize) -> Result<Self> {
        let sandbox = Sandbox::new()?;
        let beside = Cgroup::new(&format!("{}-beside", sandbox.name))?;
        let inside = sandbox.cgroup.child("/bench")?;
        let nobodys = sandbox.cgroup.child("/nobodys")?;

        let read = texts(vec![Source { name: "bench.toml".into(), text: policy(rules).into() }]);
        let faults: Vec<String> = read.diagnostics.iter().map(|d| d.render(false)).collect();
        let model = read.model.with_context(|| faults.join("\n"))?;
        let options = Options::default();
        let mut registry = Registry::default();
        registry.assign(&model, &options);
        let image = compile(&model, &mut registry, &options, clock::moment())?;
        let base = Base::find(Some(sandbox.cgroup.path()))?;
        let sizes = Sizes::default();
        let mut object = object::load(sandbox.pins(), &sizes, Hooks::Sockets)?;
        let mut writer = Writer::new(object.take_maps(), sizes)?;
        let number = registry.workloads.number("bench").context("the workload has a number")?;
        let entry = IdentityEntry { workload: number, flags: 0, instance: 0 };
        let identities = HashMap::from([(fs::metadata(&inside)?.ino(), entry)]);
        writer.load(&image, &identities, base.level, 0)?;
        attach::attach(&mut object, sandbox.cgroup.path(), sandbox.pins())?;

        let mut programs: HashMap<String, u32> = object.programs.iter().map(|p| (p.name.clone(), p.id)).collect();
        let cgroup = fs::File::open(sandbox.cgroup.path())?;
        let mut empty = Vec::new();
        for (hook, of, at) in EMPTY {
            let name = format!("empty_{hook}");
            let before = numbered(&name);
            empty.push(attach_empty(&name, of, at, cgroup.as_fd())?);
            let new = numbered(&name).into_iter().find(|id| !before.contains(id));
            programs.insert(name, new.context("a program that was loaded has a number")?);
        }
        let netns = sandbox.netns.path();
        let server = start(beside.path(), netns)?;
        server.ask("serve")?;
        Ok(Self {
            managed: start(&inside, netns)?,
            unmanaged: start(&nobodys, netns)?,
            outside: start(beside.path(), netns)?,
            _server: server,
            writer: writer.into(),
            empty: std::cell::RefCell::new(empty),
            programs,
            _beside: beside,
            _sandbox: sandbox,
        })
    }

    /// ns per run of each program and of the empty one beside it, slice by slice.
    fn programs(&self, effort: &Effort) -> Result<BTreeMap<String, Pairs>> {
        let _enabled = aya::sys::enable_stats(Stats::RunTime)?;
        let mut measured: BTreeMap<String, Pairs> = BTreeMap::new();
        for _ in 0..effort.slices {
            let connect = format!("connect {}", effort.connects);
            for (what, worker, order, hooks) in [
                ("connect", &self.managed, connect.clone(), &EVERY_CONNECT[..]),
                ("unmanaged connect", &self.unmanaged, connect, &EVERY_CONNECT),
                ("established", &self.managed, format!("exchange {}", effort.exchanges), &["egress", "ingress"]),
                ("datagram", &self.managed, format!("datagram {}", effort.datagrams), &["sendmsg4", "egress"]),
            ] {
                let both = |hook: &&str| [format!("authd_{hook}"), format!("empty_{hook}")];
                let names: Vec<String> = hooks.iter().flat_map(both).collect();
                let means = self.means(worker, &order, &names)?;
                for (hook, pair) in hooks.iter().zip(means.chunks(2)) {
                    measured.entry(format!("{what} {hook}")).or_default().push((pair[0], pair[1]));
                }
            }
        }
        Ok(measured)
    }

    /// ns per run of each of these programs while a worker does as it is told.
    fn means(&self, worker: &Worker, order: &str, names: &[String]) -> Result<Vec<f64>> {
        let before = statistics();
        worker.ask(order)?;
        let after = statistics();
        self.empty_the_ring();
        let mean = |name: &String| {
            let of = |all: &HashMap<u32, (u64, u64)>| all.get(&self.programs[name]).copied().unwrap_or_default();
            let ((before, ran_before), (after, ran_after)) = (of(&before), of(&after));
            ensure!(ran_after > ran_before + 100, "{name} ran {} times for {order}", ran_after - ran_before);
            Ok((after - before) as f64 / (ran_after - ran_before) as f64)
        };
        names.iter().map(mean).collect()
    }

    /// ns per connection: managed, and unmanaged below authd, against one that authd is not attached to.
    fn connections(&self, effort: &Effort) -> Result<(Pairs, Pairs)> {
        // The empty programs have done their part.
        self.empty.borrow_mut().clear();
        let (mut managed, mut unmanaged) = (Vec::new(), Vec::new());
        let order = format!("connect {}", effort.connects);
        let one = |worker: &Worker| -> Result<f64> {
            let took = worker.ask(&order)?;
            self.empty_the_ring();
            Ok(took / effort.connects as f64)
        };
        for turn in 0..effort.pairs {
            // Neither always comes first.
            let (a, b, c) = match turn % 2 {
                0 => (one(&self.managed)?, one(&self.outside)?, one(&self.unmanaged)?),
                _ => {
                    let (c, b, a) = (one(&self.unmanaged)?, one(&self.outside)?, one(&self.managed)?);
                    (a, b, c)
                }
            };
            managed.push((a, b));
            unmanaged.push((c, b));
        }
        Ok((managed, unmanaged))
    }

    /// A full ring would make programs cheaper.
    fn empty_the_ring(&self) {
        ring::drain(&mut self.writer.borrow_mut().maps_mut().events, usize::MAX);
    }
}

/// As many rules as asked for, of one workload per ten; the one that is measured has its share.
fn policy(rules: usize) -> String {
    let workloads = (rules / 10).max(1);
    let mut text = String::from(
        "trust_domain = \"example.org\"\n[[workload]]\nname = \"bench\"\nkind = \"service\"\ncgroup = \"/bench\"\n\
         [[service]]\nname = \"own\"\naddresses = [\"127.0.0.1\"]\nports = [\"tcp/7001\", \"udp/7002\", \"tcp/7003\"]\n\
         [[rule]]\nname = \"own\"\nfrom = [\"bench\"]\nto = [\"own\"]\n",
    );
    for n in 1..workloads {
        let _ = write!(text, "[[workload]]\nname = \"w{n}\"\nkind = \"job\"\ncgroup = \"/w/{n}\"\n");
    }
    for n in 1..rules {
        let from = match n % workloads {
            0 => "bench".to_owned(),
            n => format!("w{n}"),
        };
        let (a, b, c) = (n >> 16 & 0xff, n >> 8 & 0xff, n & 0xff);
        let port = 1000 + n % 100;
        let _ = write!(
            text,
            "[[service]]\nname = \"s{n}\"\naddresses = [\"10.{a}.{b}.{c}\"]\nports = [\"tcp/{port}\"]\n\
             [[rule]]\nname = \"r{n}\"\nfrom = [\"{from}\"]\nto = [\"s{n}\"]\n"
        );
    }
    text
}

/// What the kernel keeps of a program's name (BPF_OBJ_NAME_LEN, with its zero).
fn kept(name: &str) -> &str {
    name.get(..15).unwrap_or(name)
}

/// Time in ns and number of runs of every program, by its number.
fn statistics() -> HashMap<u32, (u64, u64)> {
    // A program that goes away meanwhile is none of ours.
    let programs = loaded_programs().filter_map(Result::ok);
    programs.map(|program| (program.id(), (program.run_time().as_nanos() as u64, program.run_count()))).collect()
}

/// Numbers of the programs with a name, as the kernel keeps it.
fn numbered(name: &str) -> Vec<u32> {
    let programs = loaded_programs().filter_map(Result::ok);
    programs.filter(|program| program.name_as_str() == Some(kept(name))).map(|program| program.id()).collect()
}

/// The leading members of `union bpf_attr` for BPF_PROG_LOAD.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// And for BPF_LINK_CREATE.
#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;

/// A program that lets everything pass, attached for as long as the descriptor lives.
fn attach_empty(name: &str, of: u32, at: u32, cgroup: BorrowedFd<'_>) -> Result<OwnedFd> {
    // `r0 = 1; exit`, as `struct bpf_insn`.
    static PASS: [u64; 2] = [0x0000_0001_0000_00b7, 0x95];
    let mut load = ProgLoad {
        prog_type: of,
        insn_cnt: PASS.len() as u32,
        insns: PASS.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        expected_attach_type: at,
        ..ProgLoad::default()
    };
    let name = kept(name);
    load.prog_name[..name.len()].copy_from_slice(name.as_bytes());
    let program = bpf(BPF_PROG_LOAD, &mut load).with_context(|| format!("loading {name}"))?;
    let mut link = LinkCreate {
        prog_fd: program.as_raw_fd() as u32,
        target_fd: cgroup.as_raw_fd() as u32,
        attach_type: at,
        ..LinkCreate::default()
    };
    bpf(BPF_LINK_CREATE, &mut link).with_context(|| format!("attaching {name}"))
}

fn bpf<T>(command: libc::c_int, attr: &mut T) -> std::io::Result<OwnedFd> {
    // SAFETY: the attributes are the prefix of `union bpf_attr` that the command reads, with their size, and what they
    // point at lives until the call returns.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: both commands return a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

// ---- Processes that make traffic.

fn start(cgroup: &Path, netns: &Path) -> Result<Worker> {
    let path = |path: &Path| path.to_str().map(str::to_owned).context("a path");
    Worker::start(&["worker", &path(cgroup)?, &path(netns)?])
}

pub fn worker(cgroup: &Path, netns: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())?;
    nix::sched::setns(fs::File::open(netns)?, nix::sched::CloneFlags::CLONE_NEWNET)?;
    let (echo, sink, udp): (SocketAddr, SocketAddr, SocketAddr) = (ECHO.parse()?, SINK.parse()?, UDP.parse()?);
    let mut open: Option<TcpStream> = None;
    obey(|what, number| {
        let started;
        match what {
            "serve" => {
                serve(echo, sink, udp)?;
                started = Instant::now();
            }
            "connect" => {
                started = Instant::now();
                for _ in 0..number {
                    let stream = TcpStream::connect(sink)?;
                    // With a reset, so that no port waits for TIME_WAIT.
                    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
                    nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger)?;
                }
            }
            "exchange" => {
                let stream = match &mut open {
                    Some(stream) => stream,
                    none => none.insert(TcpStream::connect(echo)?),
                };
                stream.set_nodelay(true)?;
                let mut buffer = [0; 64];
                started = Instant::now();
                for _ in 0..number {
                    stream.write_all(&buffer)?;
                    stream.read_exact(&mut buffer)?;
                }
            }
            "datagram" => {
                let socket = UdpSocket::bind("127.0.0.1:0")?;
                started = Instant::now();
                for _ in 0..number {
                    socket.send_to(b"hello", udp)?;
                }
            }
            other => bail!("what is {other:?}?"),
        }
        Ok(started)
    })
}

/// Echoes on connections, closes others, swallows datagrams.
fn serve(echo: SocketAddr, sink: SocketAddr, udp: SocketAddr) -> Result<()> {
    let (echo, sink, udp) = (TcpListener::bind(echo)?, TcpListener::bind(sink)?, UdpSocket::bind(udp)?);
    // A full queue would make callers try again after a second. The limit is the network namespace's own.
    let queue = nix::sys::socket::Backlog::new(4_096)?;
    fs::write("/proc/sys/net/core/somaxconn", "4096")?;
    nix::sys::socket::listen(&sink, queue)?;
    thread::spawn(move || {
        for stream in echo.incoming() {
            let Ok(mut stream) = stream else { continue };
            thread::spawn(move || {
                let mut buffer = [0; 64];
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..n]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    thread::spawn(move || sink.incoming().for_each(drop));
    thread::spawn(move || {
        let mut buffer = [0; 64];
        while udp.recv(&mut buffer).is_ok() {}
    });
    Ok(())
}
