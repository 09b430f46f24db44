//! Tries things from inside a cgroup and a network namespace, each the way that an attacker or an application would, and says
//! in one line of JSON how it went.

mod crowd;
mod crowd_server;
mod takeover;

use std::{
    fs::{self, File},
    io::{self, BufRead, IoSlice, IoSliceMut, Read, Write},
    mem,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use authd_tests::probe::Outcome;
use clap::{Parser, Subcommand};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

#[derive(Parser)]
struct Cli {
    /// Cgroup to enter first.
    #[arg(long)]
    cgroup: Option<PathBuf>,
    /// Network namespace to enter first.
    #[arg(long)]
    netns: Option<PathBuf>,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// As authd's control process, if somebody took it over.
    Control {
        #[arg(long)]
        uid: u32,
        #[arg(long)]
        gid: u32,
        #[arg(long)]
        root: PathBuf,
    },
    /// Writes a line to a Unix socket; the detail is the line that comes back.
    Say {
        socket: PathBuf,
        line: String,
    },
    /// A program, to its end; says what it printed.
    Run {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Becomes another program.
    Exec {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Many instances with a grant each, and many connections of each.
    Crowd(crowd::Crowd),
    /// Echo server for many connections.
    ServeCrowd {
        at: SocketAddr,
    },
    /// HTTP server whose answers repeat the request's first line and headers.
    ServeHttp {
        at: SocketAddr,
    },
    /// Echo server. Says what it received, line by line.
    ServeTcp {
        at: SocketAddr,
    },
    ServeUdp {
        at: SocketAddr,
    },
    /// Accepts and closes, as fast as it can.
    ServeSink {
        at: SocketAddr,
    },
    /// Connect, send, and wait for the echo.
    Tcp {
        to: SocketAddr,
        #[arg(long)]
        from: Option<SocketAddr>,
        #[arg(long, default_value_t = 1000)]
        timeout_ms: u64,
    },
    /// Connect once; then, for every line of input, send and wait for the echo.
    HoldTcp {
        to: SocketAddr,
        #[arg(long)]
        from: Option<SocketAddr>,
    },
    /// Connect and close as often as possible until the input ends. Says how often it worked.
    Hammer {
        to: Vec<SocketAddr>,
        #[arg(long)]
        threads: usize,
    },
    /// A datagram, and the wait for its echo.
    Udp {
        to: SocketAddr,
        #[arg(long, default_value = "sendto")]
        how: How,
        #[arg(long)]
        decoy: Option<SocketAddr>,
    },
    /// One exchange over the same socket for every line of input.
    HoldUdp {
        to: SocketAddr,
    },
    /// Only make a socket of this kind.
    Socket {
        kind: Kind,
    },
    /// An ICMP echo request by a ping socket.
    Ping {
        to: IpAddr,
    },
    FastOpen {
        to: SocketAddr,
    },
    Mptcp {
        to: SocketAddr,
    },
    /// One of the kernel's counters in this network namespace (/proc/net/netstat).
    Counter {
        family: String,
        name: String,
    },
    /// Makes a socket; then, for every line of input, tries to connect this one.
    RetryTcp {
        to: SocketAddr,
    },
    /// The echo server, over MPTCP.
    ServeMptcp {
        at: SocketAddr,
    },
    /// As `hold-tcp`, over MPTCP.
    HoldMptcp {
        to: SocketAddr,
    },
    Uring {
        to: SocketAddr,
    },
    UringSend {
        to: SocketAddr,
    },
    /// A UDP datagram made by hand, in some unusual packet.
    Crafted {
        to: SocketAddr,
        #[arg(long)]
        shape: Shape,
    },
    /// Receive a socket over a Unix socket, and connect it.
    UseSocket {
        path: PathBuf,
        to: SocketAddr,
    },
    /// Make a TCP socket, and hand it to whoever asks on a Unix socket.
    LendSocket {
        path: PathBuf,
    },
    /// Make a TCP socket, move to another cgroup, connect.
    MoveThenConnect {
        cgroup: PathBuf,
        to: SocketAddr,
    },
    /// Connect, move to another cgroup, exchange.
    ConnectThenMove {
        to: SocketAddr,
        cgroup: PathBuf,
    },
    /// Make a child cgroup, move there, connect.
    ChildCgroup {
        name: String,
        to: SocketAddr,
    },
    /// Make a TCP socket, execute another program with it, connect there.
    ExecThenConnect {
        to: SocketAddr,
    },
    /// The second half of it.
    ConnectInherited {
        fd: RawFd,
        to: SocketAddr,
    },
    /// Enter another network namespace, and connect there.
    EnterThenConnect {
        other: PathBuf,
        to: SocketAddr,
    },
    /// Fork children that make their own cgroups and connect at once, many times.
    RaceCgroups {
        parent: PathBuf,
        to: SocketAddr,
        #[arg(long)]
        times: u32,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum How {
    Sendto,
    Sendmsg,
    Sendmmsg,
    /// connect() to it, then send.
    Connected,
    /// connect() to the decoy, then sendto() elsewhere.
    ConnectedElsewhere,
    /// sendto() the decoy first, so that a verdict is remembered.
    AfterDecoy,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    Raw,
    Ping,
    Packet,
    PacketDgram,
    Tcp,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Shape {
    /// As the kernel would send it.
    Plain,
    /// In two IP fragments.
    Fragments,
    /// With IPv4 options.
    Options,
    /// Behind an IPv6 destination options header.
    DestinationOptions,
    /// With an IPv6 routing header.
    Routing,
    /// Behind nine IPv6 extension headers.
    ManyHeaders,
}

const WAIT: Duration = Duration::from_millis(1000);

fn main() -> Result<()> {
    let cli = Cli::parse();
    if let Some(netns) = &cli.netns {
        enter_netns(netns)?;
    }
    if let Some(cgroup) = &cli.cgroup {
        enter_cgroup(cgroup)?;
    }
    let outcome = match cli.action {
        Action::Exec { command } => return become_program(&command),
        Action::Crowd(crowd) => return crowd::run(&crowd),
        Action::ServeCrowd { at } => return crowd_server::run(at),
        Action::ServeHttp { at } => return serve_http(&TcpListener::bind(at)?),
        Action::ServeTcp { at } => return echo(TcpListener::bind(at)?),
        Action::ServeUdp { at } => return serve_udp(at),
        Action::ServeSink { at } => return serve_sink(at),
        Action::HoldTcp { to, from } => return hold_tcp(connect(to, from, WAIT)),
        Action::RetryTcp { to } => return retry_tcp(to),
        Action::HoldMptcp { to } => return hold_tcp(connect_mptcp(to)),
        Action::HoldUdp { to } => return hold_udp(to),
        Action::LendSocket { path } => return lend_socket(&path),
        Action::Hammer { to, threads } => return hammer(&to, threads),
        Action::Tcp { to, from, timeout_ms } => tcp(to, from, Duration::from_millis(timeout_ms)),
        Action::Udp { to, how, decoy } => udp(to, how, decoy),
        Action::Socket { kind } => socket_of(kind).map(drop),
        Action::Ping { to } => ping(to),
        Action::FastOpen { to } => fast_open(to),
        Action::Mptcp { to } => mptcp(to),
        Action::ServeMptcp { at } => return serve_mptcp(at),
        Action::Counter { family, name } => return counter(&family, &name),
        Action::Uring { to } => uring_connect(to),
        Action::UringSend { to } => uring_send(to),
        Action::Control { uid, gid, root } => return takeover::run(uid, gid, root),
        Action::Say { socket, line } => {
            say(&say_to(&socket, &line)?);
            return Ok(());
        }
        Action::Run { command } => {
            say(&run(&command)?);
            return Ok(());
        }
        Action::Crafted { to, shape } => crafted(to, shape),
        Action::UseSocket { path, to } => use_socket(&path, to),
        Action::MoveThenConnect { cgroup, to } => move_then_connect(&cgroup, to),
        Action::ConnectThenMove { to, cgroup } => connect_then_move(to, &cgroup),
        Action::ChildCgroup { name, to } => child_cgroup(&name, to),
        Action::ExecThenConnect { to } => exec_then_connect(to),
        Action::ConnectInherited { fd, to } => connect_inherited(fd, to),
        Action::EnterThenConnect { other, to } => enter_then_connect(&other, to),
        Action::RaceCgroups { parent, to, times } => {
            say(&race_cgroups(&parent, to, times)?);
            return Ok(());
        }
    };
    say(&outcome_of(outcome));
    Ok(())
}

/// A step that failed, with the system's error.
struct Failure {
    step: &'static str,
    error: io::Error,
}

type Attempt = Result<(), Failure>;

trait Step<T> {
    fn step(self, step: &'static str) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &'static str) -> Result<T, Failure> {
        self.map_err(|error| Failure { step, error: error.into() })
    }
}

fn outcome_of(attempt: Attempt) -> Outcome {
    match attempt {
        Ok(()) => Outcome { ok: true, ..Outcome::default() },
        Err(Failure { step, error }) => {
            let errno = match error.raw_os_error() {
                Some(code) => format!("{:?}", nix::errno::Errno::from_raw(code)),
                None if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
                    "TIMEOUT".to_owned()
                }
                None => format!("{:?}", error.kind()),
            };
            let errno = if errno == "EAGAIN" { "TIMEOUT".to_owned() } else { errno };
            Outcome { ok: false, errno, detail: format!("{step}: {error}"), count: 0 }
        }
    }
}

fn say(outcome: &Outcome) {
    let mut out = io::stdout().lock();
    let line = serde_json::to_string(outcome).unwrap_or_default();
    // Who listened has gone: this process is about to end too.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// ns since 1970.
fn nanoseconds(seconds: u64, rest: u64) -> u64 {
    seconds * 1_000_000_000 + rest
}

fn now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    nanoseconds(since.as_secs(), since.subsec_nanos().into())
}

fn ready() {
    say(&Outcome { ok: true, detail: "ready".to_owned(), ..Outcome::default() });
}

fn enter_netns(path: &PathBuf) -> Result<()> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    Ok(nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET)?)
}

fn enter_cgroup(path: &std::path::Path) -> Result<()> {
    fs::write(path.join("cgroup.procs"), std::process::id().to_string()).with_context(|| path.display().to_string())
}

// Servers.

fn echo(listener: TcpListener) -> Result<()> {
    ready();
    thread::spawn(end_with_input);
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = stream.read(&mut buffer) {
                if stream.write_all(&buffer[..n]).is_err() {
                    break;
                }
            }
        });
    }
    Ok(())
}

fn serve_sink(at: SocketAddr) -> Result<()> {
    const BACKLOG: i32 = 16_384;
    fs::write("/proc/sys/net/core/somaxconn", BACKLOG.to_string())?;
    let listener = TcpListener::bind(at)?;
    // SAFETY: no pointers. A second call only changes the length of the queue (listen(2)).
    checked(unsafe { libc::listen(listener.as_raw_fd(), BACKLOG) })?;
    ready();
    thread::spawn(end_with_input);
    loop {
        // A connection that was reset before it was accepted is nobody's concern.
        let _ = listener.accept();
    }
}

fn serve_udp(at: SocketAddr) -> Result<()> {
    let socket = UdpSocket::bind(at)?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    ready();
    let (ended, end) = std::sync::mpsc::channel();
    thread::spawn(move || {
        read_to_end();
        let _ = ended.send(());
    });
    let mut count = 0;
    let mut buffer = [0; 65536];
    while end.try_recv().is_err() {
        if let Ok((n, from)) = socket.recv_from(&mut buffer) {
            count += 1;
            let _ = socket.send_to(&buffer[..n], from);
        }
    }
    say(&Outcome { ok: true, count, ..Outcome::default() });
    Ok(())
}

fn read_to_end() {
    let mut rest = Vec::new();
    let _ = io::stdin().read_to_end(&mut rest);
}

fn end_with_input() {
    read_to_end();
    ready();
    std::process::exit(0);
}

// TCP.

fn exchange(stream: &mut TcpStream, wait: Duration) -> Attempt {
    stream.set_read_timeout(Some(wait)).step("set a limit")?;
    stream.write_all(b"hello").step("send")?;
    let mut buffer = [0; 5];
    stream.read_exact(&mut buffer).step("wait for the echo")
}

fn tcp(to: SocketAddr, from: Option<SocketAddr>, timeout: Duration) -> Attempt {
    exchange(&mut connect(to, from, timeout)?, timeout)
}

fn connect(to: SocketAddr, from: Option<SocketAddr>, timeout: Duration) -> Result<TcpStream, Failure> {
    let Some(from) = from else { return TcpStream::connect_timeout(&to, timeout).step("connect") };
    let socket = new_socket(to, libc::SOCK_STREAM, 0)?;
    bind_fd(socket.as_raw_fd(), from).step("bind")?;
    connect_fd(socket.as_raw_fd(), to).step("connect")?;
    Ok(TcpStream::from(socket))
}

fn hold_tcp(connected: Result<TcpStream, Failure>) -> Result<()> {
    let mut stream = match connected {
        Ok(stream) => stream,
        Err(failure) => {
            say(&outcome_of(Err(failure)));
            return Ok(());
        }
    };
    say(&outcome_of(exchange(&mut stream, WAIT)));
    for line in io::stdin().lock().lines() {
        line?;
        say(&outcome_of(exchange(&mut stream, WAIT)));
    }
    Ok(())
}

fn run(command: &[String]) -> Result<Outcome> {
    let (program, arguments) = command.split_first().context("a program")?;
    let output = Command::new(program).args(arguments).output()?;
    let detail = [output.stdout, output.stderr].concat();
    let detail = String::from_utf8_lossy(&detail).into_owned();
    Ok(Outcome { ok: output.status.success(), detail, ..Outcome::default() })
}

fn say_to(socket: &Path, line: &str) -> Result<Outcome> {
    let mut stream = UnixStream::connect(socket)?;
    writeln!(stream, "{line}")?;
    let mut answer = String::new();
    io::BufReader::new(stream).read_line(&mut answer)?;
    Ok(Outcome { ok: !answer.is_empty(), detail: answer, ..Outcome::default() })
}

fn become_program(command: &[String]) -> Result<()> {
    let (program, arguments) = command.split_first().context("a program")?;
    Err(std::os::unix::process::CommandExt::exec(Command::new(program).args(arguments)).into())
}

fn serve_http(listener: &TcpListener) -> Result<()> {
    say(&Outcome { ok: true, ..Outcome::default() });
    for stream in listener.incoming() {
        let mut reader = io::BufReader::new(stream?);
        let mut head = String::new();
        while reader.read_line(&mut head)? > 2 {}
        let length = head.len();
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{head}");
        reader.into_inner().write_all(answer.as_bytes())?;
    }
    Ok(())
}

/// Counts of connections that worked; the detail names every error that came up, with its number.
fn hammer(targets: &[SocketAddr], threads: usize) -> Result<()> {
    use std::{
        collections::BTreeMap,
        sync::{
            Arc, Mutex,
            atomic::{AtomicBool, AtomicU64, Ordering},
        },
    };
    // As much as there is time for, and not what the daemon under test needs to start.
    // SAFETY: takes numbers.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) };
    let stop = Arc::new(AtomicBool::new(false));
    let attempts = Arc::new(AtomicU64::new(0));
    let results: Arc<Mutex<BTreeMap<String, u64>>> = Arc::default();
    ready();
    let workers: Vec<_> = (0..threads)
        .map(|thread| {
            let (stop, attempts, results, targets) =
                (stop.clone(), attempts.clone(), results.clone(), targets.to_vec());
            thread::spawn(move || {
                let mut own: BTreeMap<String, u64> = BTreeMap::new();
                let mut at = thread;
                while !stop.load(Ordering::Relaxed) {
                    let to = targets[at % targets.len()];
                    at += 1;
                    let result = match connect_and_reset(to) {
                        Ok(()) => format!("{} ok", to.port()),
                        Err(error) => {
                            let code = error.raw_os_error().unwrap_or_default();
                            format!("{} {:?}", to.port(), nix::errno::Errno::from_raw(code))
                        }
                    };
                    *own.entry(result).or_default() += 1;
                    attempts.fetch_add(1, Ordering::Relaxed);
                }
                let mut all = results.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                for (result, count) in own {
                    *all.entry(result).or_default() += count;
                }
            })
        })
        .collect();
    // A line asks for the number of attempts so far; the end of input ends it.
    for line in io::stdin().lock().lines() {
        line?;
        say(&Outcome { ok: true, count: attempts.load(Ordering::Relaxed), ..Outcome::default() });
    }
    stop.store(true, Ordering::Relaxed);
    for worker in workers {
        let _ = worker.join();
    }
    let results = results.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let count = attempts.load(Ordering::Relaxed);
    say(&Outcome { ok: true, count, detail: serde_json::to_string(&*results)?, ..Outcome::default() });
    Ok(())
}

/// Ends with a reset, so that no port waits for TIME_WAIT.
fn connect_and_reset(to: SocketAddr) -> io::Result<()> {
    let socket = new_socket(to, libc::SOCK_STREAM, 0).map_err(|failure| failure.error)?;
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    set_option(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &linger)?;
    // EINPROGRESS after this long, instead of ETIMEDOUT after minutes.
    let patience = libc::timeval { tv_sec: 2, tv_usec: 0 };
    set_option(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_SNDTIMEO, &patience)?;
    connect_fd(socket.as_raw_fd(), to)
}

// UDP.

fn wildcard(to: SocketAddr) -> SocketAddr {
    match to {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, 0)),
    }
}

fn udp(to: SocketAddr, how: How, decoy: Option<SocketAddr>) -> Attempt {
    let socket = UdpSocket::bind(wildcard(to)).step("bind")?;
    socket.set_read_timeout(Some(WAIT)).step("set a limit")?;
    let mut buffer = [0; 64];
    match how {
        How::Sendto => drop(socket.send_to(b"hello", to).step("sendto")?),
        How::Sendmsg => {
            let to = nix::sys::socket::SockaddrStorage::from(to);
            sendmsg(socket.as_raw_fd(), &[IoSlice::new(b"hello")], &[], MsgFlags::empty(), Some(&to))
                .step("sendmsg")?;
        }
        How::Sendmmsg => sendmmsg(socket.as_raw_fd(), to).step("sendmmsg")?,
        How::Connected => {
            socket.connect(to).step("connect")?;
            socket.send(b"hello").step("send")?;
        }
        How::ConnectedElsewhere => {
            socket.connect(decoy.unwrap_or(to)).step("connect to the decoy")?;
            socket.send_to(b"hello", to).step("sendto")?;
        }
        How::AfterDecoy => {
            socket.send_to(b"hello", decoy.unwrap_or(to)).step("sendto the decoy")?;
            socket.recv(&mut buffer).step("wait for the decoy's echo")?;
            socket.send_to(b"hello", to).step("sendto")?;
        }
    }
    socket.recv(&mut buffer).step("wait for the echo").map(drop)
}

fn hold_udp(to: SocketAddr) -> Result<()> {
    let socket = UdpSocket::bind(wildcard(to))?;
    socket.set_read_timeout(Some(WAIT))?;
    let exchange = || -> Attempt {
        socket.send_to(b"hello", to).step("sendto")?;
        socket.recv(&mut [0; 64]).step("wait for the echo").map(drop)
    };
    say(&outcome_of(exchange()));
    for line in io::stdin().lock().lines() {
        line?;
        say(&outcome_of(exchange()));
    }
    Ok(())
}

fn retry_tcp(to: SocketAddr) -> Result<()> {
    let socket = new_socket(to, libc::SOCK_STREAM, 0).map_err(|failure| failure.error)?;
    ready();
    for line in io::stdin().lock().lines() {
        line?;
        say(&outcome_of(connect_fd(socket.as_raw_fd(), to).step("connect")));
    }
    Ok(())
}

// Unusual sockets.

fn socket_of(kind: Kind) -> Result<OwnedFd, Failure> {
    let (family, kind, protocol) = match kind {
        Kind::Raw => (libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW),
        Kind::Ping => (libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP),
        Kind::Packet => (libc::AF_PACKET, libc::SOCK_RAW, 0x0300),
        Kind::PacketDgram => (libc::AF_PACKET, libc::SOCK_DGRAM, 0x0300),
        Kind::Tcp => (libc::AF_INET, libc::SOCK_STREAM, 0),
    };
    raw_socket(family, kind, protocol).step("socket")
}

fn raw_socket(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the result is checked before it becomes an owned descriptor.
    unsafe {
        let fd = libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

fn new_socket(to: SocketAddr, kind: i32, protocol: i32) -> Result<OwnedFd, Failure> {
    let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    raw_socket(family, kind, protocol).step("socket")
}

/// An address as the kernel reads it.
struct Address {
    storage: libc::sockaddr_storage,
    length: libc::socklen_t,
}

impl Address {
    fn new(address: SocketAddr) -> Self {
        // SAFETY: plain data; all zeroes is a value.
        let mut storage: libc::sockaddr_storage = unsafe { mem::zeroed() };
        let length = match address {
            SocketAddr::V4(v4) => {
                let own = libc::sockaddr_in {
                    sin_family: libc::AF_INET as u16,
                    sin_port: v4.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                    sin_zero: [0; 8],
                };
                // SAFETY: `sockaddr_storage` is larger than, and aligned for, every kind of address.
                unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(own) };
                size_of::<libc::sockaddr_in>()
            }
            SocketAddr::V6(v6) => {
                let own = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as u16,
                    sin6_port: v6.port().to_be(),
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                    sin6_scope_id: 0,
                };
                // SAFETY: as above.
                unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(own) };
                size_of::<libc::sockaddr_in6>()
            }
        };
        Self { storage, length: length as libc::socklen_t }
    }

    fn pointer(&self) -> *const libc::sockaddr {
        (&raw const self.storage).cast()
    }
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn connect_fd(fd: RawFd, to: SocketAddr) -> io::Result<()> {
    let to = Address::new(to);
    // SAFETY: the address lives until the call returns, and its length is its own.
    checked(unsafe { libc::connect(fd, to.pointer(), to.length) }).map(drop)
}

fn bind_fd(fd: RawFd, to: SocketAddr) -> io::Result<()> {
    let to = Address::new(to);
    // SAFETY: as for `connect_fd`.
    checked(unsafe { libc::bind(fd, to.pointer(), to.length) }).map(drop)
}

fn sendto_fd(fd: RawFd, data: &[u8], flags: i32, to: SocketAddr) -> io::Result<()> {
    let to = Address::new(to);
    // SAFETY: as for `connect_fd`; the data's length is its own.
    let sent = unsafe { libc::sendto(fd, data.as_ptr().cast(), data.len(), flags, to.pointer(), to.length) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn set_option<T>(fd: RawFd, level: i32, name: i32, value: &T) -> io::Result<()> {
    // SAFETY: the value lives until the call returns, and its size is its own.
    checked(unsafe { libc::setsockopt(fd, level, name, std::ptr::from_ref(value).cast(), size_of::<T>() as u32) })
        .map(drop)
}

fn sendmmsg(fd: RawFd, to: SocketAddr) -> io::Result<()> {
    let mut to = Address::new(to);
    let mut data = *b"hello";
    let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    // SAFETY: plain data; all zeroes is a value.
    let mut message: libc::mmsghdr = unsafe { mem::zeroed() };
    message.msg_hdr.msg_name = (&raw mut to.storage).cast();
    message.msg_hdr.msg_namelen = to.length;
    message.msg_hdr.msg_iov = &raw mut part;
    message.msg_hdr.msg_iovlen = 1;
    // SAFETY: one message, whose parts live until the call returns.
    checked(unsafe { libc::sendmmsg(fd, &raw mut message, 1, 0) }).map(drop)
}

fn wait_readable(fd: RawFd) -> io::Result<()> {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry.
    match checked(unsafe { libc::poll(&raw mut poll, 1, WAIT.as_millis() as i32) })? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

/// Waits for an echo on any kind of connected socket.
fn echo_on(fd: RawFd) -> Attempt {
    wait_readable(fd).step("wait for the echo")?;
    let mut buffer = [0_u8; 64];
    // SAFETY: the buffer's length is its own.
    let got = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    match got {
        1.. => Ok(()),
        0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof)).step("wait for the echo"),
        _ => Err(io::Error::last_os_error()).step("wait for the echo"),
    }
}

fn ping(to: IpAddr) -> Attempt {
    let to = SocketAddr::new(to, 0);
    // Who may make ping sockets is a setting of the namespace.
    let _ = fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
    let (protocol, kind) = if to.is_ipv4() { (libc::IPPROTO_ICMP, 8) } else { (libc::IPPROTO_ICMPV6, 128) };
    let socket = new_socket(to, libc::SOCK_DGRAM, protocol)?;
    sendto_fd(socket.as_raw_fd(), &[kind, 0, 0, 0, 0, 1, 0, 1], 0, to).step("sendto")?;
    echo_on(socket.as_raw_fd())
}

fn fast_open(to: SocketAddr) -> Attempt {
    let _ = fs::write("/proc/sys/net/ipv4/tcp_fastopen", "1543");
    let socket = new_socket(to, libc::SOCK_STREAM, 0)?;
    sendto_fd(socket.as_raw_fd(), b"hello", libc::MSG_FASTOPEN, to).step("sendto")?;
    echo_on(socket.as_raw_fd())
}

const IPPROTO_MPTCP: i32 = 262;

fn connect_mptcp(to: SocketAddr) -> Result<TcpStream, Failure> {
    let _ = fs::write("/proc/sys/net/mptcp/enabled", "1");
    let socket = new_socket(to, libc::SOCK_STREAM, IPPROTO_MPTCP)?;
    connect_fd(socket.as_raw_fd(), to).step("connect")?;
    Ok(TcpStream::from(socket))
}

fn mptcp(to: SocketAddr) -> Attempt {
    exchange(&mut connect_mptcp(to)?, WAIT)
}

/// A line of names is followed by a line of values.
fn counter(family: &str, name: &str) -> Result<()> {
    let text = fs::read_to_string("/proc/thread-self/net/netstat")?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(family)?.strip_prefix(": "));
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else { anyhow::bail!("no family {family}") };
    let value = names.split(' ').zip(values.split(' ')).find(|(n, _)| *n == name).context("no such counter")?.1;
    say(&Outcome { ok: true, count: value.parse()?, ..Outcome::default() });
    Ok(())
}

fn serve_mptcp(at: SocketAddr) -> Result<()> {
    let socket = new_socket(at, libc::SOCK_STREAM, IPPROTO_MPTCP).map_err(|failure| failure.error)?;
    bind_fd(socket.as_raw_fd(), at)?;
    // SAFETY: no pointers.
    checked(unsafe { libc::listen(socket.as_raw_fd(), 16) })?;
    echo(TcpListener::from(socket))
}

// io_uring.

fn submit(ring: &mut io_uring::IoUring, entry: &io_uring::squeue::Entry) -> io::Result<()> {
    // SAFETY: what the entry points at lives in the caller until the completion below was taken.
    unsafe { ring.submission().push(entry) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let result = ring.completion().next().map_or(-libc::EIO, |done| done.result());
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
}

fn uring_connect(to: SocketAddr) -> Attempt {
    let mut ring = io_uring::IoUring::new(4).step("io_uring_setup")?;
    let socket = new_socket(to, libc::SOCK_STREAM, 0)?;
    let address = Address::new(to);
    let fd = io_uring::types::Fd(socket.as_raw_fd());
    let connect = io_uring::opcode::Connect::new(fd, address.pointer(), address.length).build();
    submit(&mut ring, &connect).step("connect")?;
    let mut stream = TcpStream::from(socket);
    exchange(&mut stream, WAIT)
}

fn uring_send(to: SocketAddr) -> Attempt {
    let mut ring = io_uring::IoUring::new(4).step("io_uring_setup")?;
    let socket = new_socket(to, libc::SOCK_DGRAM, 0)?;
    let mut address = Address::new(to);
    let mut data = *b"hello";
    let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    // SAFETY: plain data; all zeroes is a value.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_name = (&raw mut address.storage).cast();
    message.msg_namelen = address.length;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    let send = io_uring::opcode::SendMsg::new(io_uring::types::Fd(socket.as_raw_fd()), &raw const message).build();
    submit(&mut ring, &send).step("sendmsg")?;
    echo_on(socket.as_raw_fd())
}

// Packets made by hand.

fn crafted(to: SocketAddr, shape: Shape) -> Attempt {
    let listener = UdpSocket::bind(SocketAddr::new(to.ip(), 0)).step("bind for the echo")?;
    listener.set_read_timeout(Some(WAIT)).step("set a limit")?;
    let from = listener.local_addr().step("the own address")?;
    let socket = new_socket(to, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    if to.is_ipv6() {
        // The kernel takes the packet as it is (raw(7), ipv6(7)).
        set_option(socket.as_raw_fd(), libc::IPPROTO_IPV6, libc::IPV6_HDRINCL, &1_i32).step("IPV6_HDRINCL")?;
    }
    for packet in packets(from, to, shape) {
        sendto_fd(socket.as_raw_fd(), &packet, 0, SocketAddr::new(to.ip(), 0)).step("sendto")?;
    }
    listener.recv(&mut [0; 64]).step("wait for the echo").map(drop)
}

fn packets(from: SocketAddr, to: SocketAddr, shape: Shape) -> Vec<Vec<u8>> {
    let mut datagram = Vec::new();
    datagram.extend(from.port().to_be_bytes());
    datagram.extend(to.port().to_be_bytes());
    datagram.extend(24_u16.to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend([b'x'; 16]);
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let packet = |payload: &[u8], fragment: u16, options: &[u8]| {
                let words = 5 + options.len() / 4;
                let mut packet = vec![0x40 | words as u8, 0];
                packet.extend(((words * 4 + payload.len()) as u16).to_be_bytes());
                packet.extend([0x12, 0x34]);
                packet.extend(fragment.to_be_bytes());
                packet.extend([64, 17, 0, 0]);
                packet.extend(from.octets());
                packet.extend(to.octets());
                packet.extend(options);
                packet.extend(payload);
                packet
            };
            match shape {
                Shape::Fragments => vec![packet(&datagram[..16], 0x2000, &[]), packet(&datagram[16..], 2, &[])],
                // RFC 791: no operation, twice, and the end.
                Shape::Options => vec![packet(&datagram, 0, &[1, 1, 1, 0])],
                _ => vec![packet(&datagram, 0, &[])],
            }
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            // A UDP checksum is not optional in IPv6 (RFC 8200, 8.1).
            let sum = checksum(&from.octets(), &to.octets(), &datagram);
            datagram[6..8].copy_from_slice(&sum.to_be_bytes());
            let options = |next: u8| [next, 0, 1, 4, 0, 0, 0, 0];
            let (first, headers): (u8, Vec<u8>) = match shape {
                Shape::DestinationOptions => (60, options(17).to_vec()),
                // RFC 4302-like padding by destination options, one after the other.
                Shape::ManyHeaders => (60, (0..9).flat_map(|i| options(if i == 8 { 17 } else { 60 })).collect()),
                // Type 2 with no segment left would be ignored; the header alone is what matters.
                Shape::Routing => (43, vec![17, 0, 253, 0, 0, 0, 0, 0]),
                Shape::Fragments => {
                    let head = |offset: u16, more: u16| {
                        let mut head = vec![17, 0];
                        head.extend((offset << 3 | more).to_be_bytes());
                        head.extend([0, 0, 0, 9]);
                        head
                    };
                    return [(0, 1, &datagram[..16]), (2, 0, &datagram[16..])]
                        .into_iter()
                        .map(|(offset, more, part)| v6(from, to, 44, &[head(offset, more), part.to_vec()].concat()))
                        .collect();
                }
                _ => (17, Vec::new()),
            };
            vec![v6(from, to, first, &[headers, datagram].concat())]
        }
        _ => Vec::new(),
    }
}

fn v6(from: std::net::Ipv6Addr, to: std::net::Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, 64]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    packet
}

/// RFC 8200, 8.1.
fn checksum(from: &[u8], to: &[u8], datagram: &[u8]) -> u16 {
    let mut bytes = [from, to, &(datagram.len() as u32).to_be_bytes(), &[0, 0, 0, 17], datagram].concat();
    if bytes.len() % 2 == 1 {
        bytes.push(0);
    }
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}

// Sockets on the move.

fn lend_socket(path: &std::path::Path) -> Result<()> {
    let listener = UnixListener::bind(path)?;
    ready();
    let (stream, _) = listener.accept()?;
    let socket = socket_of(Kind::Tcp).map_err(|failure| failure.error)?;
    let fds = [socket.as_raw_fd()];
    sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(b"x")],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::empty(),
        None,
    )?;
    // The socket must be received before it is closed here.
    let _ = io::stdin().read(&mut [0]);
    Ok(())
}

fn use_socket(path: &std::path::Path, to: SocketAddr) -> Attempt {
    let stream = UnixStream::connect(path).step("connect to the lender")?;
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(RawFd);
    let message =
        recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty()).step("receive a socket")?;
    let fd = message.cmsgs().step("read the message")?.find_map(|message| match message {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    let fd = fd.ok_or_else(|| io::Error::other("no socket came")).step("receive a socket")?;
    // SAFETY: the kernel just made this descriptor for us, and nobody else here knows of it.
    connected(unsafe { OwnedFd::from_raw_fd(fd) }, to)
}

fn connected(socket: OwnedFd, to: SocketAddr) -> Attempt {
    connect_fd(socket.as_raw_fd(), to).step("connect")?;
    exchange(&mut TcpStream::from(socket), WAIT)
}

fn move_to(cgroup: &std::path::Path) -> Attempt {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).step("move to the other cgroup")
}

fn move_then_connect(cgroup: &std::path::Path, to: SocketAddr) -> Attempt {
    let socket = socket_of(Kind::Tcp)?;
    move_to(cgroup)?;
    connected(socket, to)
}

fn connect_then_move(to: SocketAddr, cgroup: &std::path::Path) -> Attempt {
    let mut stream = TcpStream::connect_timeout(&to, WAIT).step("connect")?;
    move_to(cgroup)?;
    exchange(&mut stream, WAIT)
}

fn child_cgroup(name: &str, to: SocketAddr) -> Attempt {
    let own = fs::read_to_string("/proc/self/cgroup").step("find the own cgroup")?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default().trim_start_matches('/');
    let mount = authd::daemon::cgroupfs::mount_point().unwrap_or_default();
    let child = mount.join(own).join(name);
    fs::create_dir_all(&child).step("make a cgroup")?;
    move_to(&child)?;
    tcp(to, None, WAIT)
}

fn exec_then_connect(to: SocketAddr) -> Attempt {
    let socket = socket_of(Kind::Tcp)?;
    // SAFETY: no pointers.
    checked(unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_SETFD, 0) }).step("keep the socket open")?;
    let own = std::env::current_exe().step("find the own program")?;
    let fd = socket.as_raw_fd().to_string();
    let output = Command::new(own).args(["connect-inherited", &fd, &to.to_string()]).output().step("exec")?;
    let outcome: Outcome = serde_json::from_slice(&output.stdout).map_err(io::Error::other).step("hear the child")?;
    if outcome.ok {
        return Ok(());
    }
    let error = match outcome.errno.as_str() {
        "EPERM" => io::Error::from_raw_os_error(libc::EPERM),
        other => io::Error::other(other.to_owned()),
    };
    Err(error).step("connect in the child")
}

fn connect_inherited(fd: RawFd, to: SocketAddr) -> Attempt {
    // SAFETY: the parent left this descriptor open for us, and nothing else here uses it.
    connected(unsafe { OwnedFd::from_raw_fd(fd) }, to)
}

fn enter_then_connect(other: &PathBuf, to: SocketAddr) -> Attempt {
    let file = File::open(other).step("open the other namespace")?;
    nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).step("setns")?;
    tcp(to, None, WAIT)
}

/// How many of many new cgroups let a connection through. Each child moves into a cgroup that did not exist a moment ago and
/// connects at once: there must be no moment in which it is nobody's.
fn race_cgroups(parent: &std::path::Path, to: SocketAddr, times: u32) -> Result<Outcome> {
    let mut through = 0;
    let mut errors = std::collections::BTreeMap::<String, u32>::new();
    let started = Instant::now();
    for turn in 0..times {
        let cgroup = parent.join(format!("race-{turn}"));
        fs::create_dir(&cgroup)?;
        enter_cgroup(&cgroup)?;
        match connect_and_reset(to) {
            Ok(()) => through += 1,
            Err(error) => {
                let name = format!("{:?}", nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or_default()));
                *errors.entry(name).or_default() += 1;
            }
        }
        enter_cgroup(parent.parent().context("a parent")?)?;
        // A cgroup whose process has just left is busy for a moment.
        while fs::remove_dir(&cgroup).is_err() && started.elapsed() < Duration::from_secs(120) {
            thread::sleep(Duration::from_millis(1));
        }
    }
    let detail = serde_json::to_string(&errors)?;
    Ok(Outcome { ok: through == 0, count: through, detail, errno: String::new() })
}
