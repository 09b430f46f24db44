//! Tries things from inside a cgroup and a network namespace, each the way that an attacker or an application would, and says
//! in one line of JSON how it went.

mod crowd;
mod crowd_server;
mod moves;
mod packets;
mod sockets;
mod takeover;

use std::{
    fs::{self, File},
    io::{self, BufRead, IoSlice, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use authd_tests::{daemon::emulated, probe::Outcome};
use clap::{Parser, Subcommand};
use nix::sys::socket::{MsgFlags, sendmsg};

use self::{
    moves::{
        child_cgroup, connect_inherited, connect_then_move, enter_then_connect, exec_then_connect, lend_socket,
        move_then_connect, race_cgroups, use_socket,
    },
    packets::crafted,
    sockets::{
        bind_fd, checked, connect_fd, connect_mptcp, counter, fast_open, mptcp, new_socket, ping, sendmmsg,
        serve_mptcp, set_option, socket_of, uring_connect, uring_send,
    },
};

#[derive(Parser)]
struct Cli {
    /// Cgroup to enter first.
    #[arg(long)]
    cgroup: Option<PathBuf>,
    /// Network namespace to enter first.
    #[arg(long)]
    netns: Option<PathBuf>,
    /// User, and group of the same number, to become then.
    #[arg(long)]
    uid: Option<u32>,
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
        #[arg(long)]
        timeout_ms: Option<u64>,
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
        /// From here, and only after the same socket was called once, and has answered.
        #[arg(long)]
        called_at: Option<SocketAddr>,
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

/// For an answer. A SYN that was lost is sent again after a second: where much is lost, that is no refusal.
fn wait() -> Duration {
    Duration::from_millis(if emulated() { 2500 } else { 1000 })
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    if let Some(netns) = &cli.netns {
        enter_netns(netns)?;
    }
    if let Some(cgroup) = &cli.cgroup {
        enter_cgroup(cgroup)?;
    }
    if let Some(uid) = cli.uid {
        nix::unistd::setgroups(&[])?;
        nix::unistd::setgid(uid.into())?;
        nix::unistd::setuid(uid.into())?;
    }
    let outcome = match cli.action {
        Action::Exec { command } => return become_program(&command),
        Action::Crowd(crowd) => return crowd::run(&crowd),
        Action::ServeCrowd { at } => return crowd_server::run(at),
        Action::ServeHttp { at } => return serve_http(&TcpListener::bind(at)?),
        Action::ServeTcp { at } => return echo(TcpListener::bind(at)?),
        Action::ServeUdp { at } => return serve_udp(at),
        Action::ServeSink { at } => return serve_sink(at),
        Action::HoldTcp { to, from } => return hold_tcp(connect(to, from, wait())),
        Action::RetryTcp { to } => return retry_tcp(to),
        Action::HoldMptcp { to } => return hold_tcp(connect_mptcp(to)),
        Action::HoldUdp { to } => return hold_udp(to),
        Action::LendSocket { path } => return lend_socket(&path),
        Action::Hammer { to, threads } => return hammer(&to, threads),
        Action::Tcp { to, from, timeout_ms } => tcp(to, from, timeout_ms.map_or_else(wait, Duration::from_millis)),
        Action::Udp { to, how, decoy, called_at } => udp(to, how, decoy, called_at),
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
    say(&outcome_of(exchange(&mut stream, wait())));
    for line in io::stdin().lock().lines() {
        line?;
        say(&outcome_of(exchange(&mut stream, wait())));
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
    let patience = libc::timeval { tv_sec: if emulated() { 5 } else { 2 }, tv_usec: 0 };
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

fn udp(to: SocketAddr, how: How, decoy: Option<SocketAddr>, called_at: Option<SocketAddr>) -> Attempt {
    let socket = UdpSocket::bind(called_at.unwrap_or_else(|| wildcard(to))).step("bind")?;
    let mut buffer = [0; 64];
    if called_at.is_some() {
        let (length, caller) = socket.recv_from(&mut buffer).step("wait for a call")?;
        socket.send_to(&buffer[..length], caller).step("answer")?;
    }
    socket.set_read_timeout(Some(wait())).step("set a limit")?;
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
    socket.set_read_timeout(Some(wait()))?;
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
