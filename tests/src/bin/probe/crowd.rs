//! Thousands of connections of hundreds of instances, each instance with a grant of its own, all of them in use.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering},
    },
    thread::{self, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use authd_tests::probe::{Outcome, Watched};
use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        resource::{Resource, getrlimit, setrlimit},
        socket::{getsockopt, sockopt::SocketError},
    },
};

use super::{now, say};

/// Both programs hold as many descriptors as there are connections.
pub fn raise_descriptor_limit() -> Result<()> {
    const ENOUGH: u64 = 16_384;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most.max(ENOUGH), most.max(ENOUGH))?)
}

/// Nothing takes as long but a connection that is dead without saying so.
const PATIENCE: Duration = Duration::from_secs(60);

/// A datagram that was not echoed in this time is sent again.
const LOST: Duration = Duration::from_millis(50);

/// No instance is watched.
const NOBODY: u32 = u32::MAX;

/// One connection, and what became of it: 0, or an error's number.
struct Flow {
    instance: u32,
    socket: Socket,
    errno: AtomicI32,
}

enum Socket {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

impl Socket {
    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => (&*stream).write_all(bytes),
            Self::Udp(socket) => socket.send(bytes).map(drop),
        }
    }

    /// The echo of what was sent.
    fn receive(&self) -> io::Result<()> {
        let mut byte = [0; 1];
        let begun = Instant::now();
        match self {
            Self::Tcp(stream) => (&*stream).read_exact(&mut byte),
            // A datagram may get lost where many are on their way.
            Self::Udp(socket) => loop {
                match socket.recv(&mut byte) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock && begun.elapsed() < PATIENCE => {
                        self.send(b"x")?;
                    }
                    result => break result.map(drop),
                }
            },
        }
    }

    fn local(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Tcp(stream) => stream.local_addr(),
            Self::Udp(socket) => socket.local_addr(),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Udp(socket) => socket.as_fd(),
        }
    }
}

#[derive(clap::Args)]
pub struct Crowd {
    /// Directory below which the instances' cgroups are made.
    #[arg(long)]
    parent: std::path::PathBuf,
    /// authd's socket for workloads.
    #[arg(long)]
    socket: std::path::PathBuf,
    #[arg(long)]
    token_file: std::path::PathBuf,
    #[arg(long)]
    rule: String,
    #[arg(long)]
    instances: u32,
    /// Connections of each: one is UDP, the others are TCP.
    #[arg(long)]
    flows: u32,
    to: SocketAddr,
}

/// Says when all connections are there. Then each line of input is answered. An empty one after every connection was used
/// once more: the count is of those that live, the detail says of each instance with dead ones which errors they have.
/// `watch N` when instance N is watched, and once more when all its connections are dead.
pub fn run(crowd: &Crowd) -> Result<()> {
    raise_descriptor_limit()?;
    let token = fs::read_to_string(&crowd.token_file)?;
    let mut flows = Vec::new();
    for instance in 0..crowd.instances {
        let cgroup = crowd.parent.join(format!("a{instance}"));
        fs::create_dir_all(&cgroup)?;
        fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())?;
        ask(&crowd.socket, &crowd.rule, token.trim())?;
        for flow in 0..crowd.flows {
            let socket = if flow == 0 { connect_udp(crowd.to)? } else { connect_tcp(crowd.to)? };
            flows.push(Flow { instance, socket, errno: AtomicI32::new(0) });
        }
    }
    let flows = Arc::new(flows);
    let rounds = Arc::new(AtomicU64::new(0));
    let watched = Arc::new(AtomicU32::new(NOBODY));
    thread::spawn({
        let (flows, rounds, watched) = (flows.clone(), rounds.clone(), watched.clone());
        move || {
            loop {
                use_all(&flows, watched.load(Ordering::SeqCst));
                rounds.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    // The round that runs may have passed the connections that matter.
    let another_round = || {
        let enough = rounds.load(Ordering::SeqCst) + 2;
        while rounds.load(Ordering::SeqCst) < enough {
            sleep(Duration::from_millis(5));
        }
    };
    say(&outcome(&flows));
    for line in io::stdin().lock().lines() {
        match line?.strip_prefix("watch ") {
            Some(instance) => {
                let instance = instance.parse()?;
                watched.store(instance, Ordering::SeqCst);
                another_round();
                let its: Vec<&Flow> = flows.iter().filter(|flow| flow.instance == instance).collect();
                watch(&its)?;
            }
            None => {
                another_round();
                say(&outcome(&flows));
            }
        }
    }
    Ok(())
}

/// Before the scheduler, this thread comes first.
fn go_first() {
    // SAFETY: takes numbers; 0 is the calling thread.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
}

/// This thread runs as soon as it has something to do, which is little. Others finish their time slice first, even if what
/// they do then has nothing to do with it.
fn notice_at_once() {
    let first = libc::sched_param { sched_priority: 1 };
    // SAFETY: reads the structure; 0 is the calling thread. Where it is not permitted, this thread waits as others do.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &raw const first) };
}

/// Sends on an instance's UDP connection without a pause, and waits for all its connections to die.
fn watch(flows: &[&Flow]) -> Result<()> {
    let udp = flows.first().context("such an instance")?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for (index, flow) in flows.iter().enumerate() {
        // Errors are always told.
        epoll.add(&flow.socket, EpollEvent::new(EpollFlags::empty(), index as u64))?;
    }
    let ends: Vec<SocketAddr> = flows.iter().map(|flow| flow.socket.local()).collect::<io::Result<_>>()?;
    let begun = Instant::now();
    let ended = OnceLock::new();
    let aborted = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            go_first();
            let result = loop {
                match udp.socket.send(b"xx") {
                    Ok(()) if begun.elapsed() < PATIENCE => {}
                    result => break result,
                }
            };
            let _ = ended.set((now(), result.err().and_then(|error| error.raw_os_error())));
        });
        notice_at_once();
        say(&Outcome { ok: true, detail: serde_json::to_string(&ends)?, ..Outcome::default() });
        let mut aborted = Vec::new();
        let mut udp_died = false;
        while aborted.len() < flows.len() && begun.elapsed() < PATIENCE {
            if let Some((at, Some(libc::ECONNABORTED))) = ended.get()
                && !udp_died
            {
                // An error is told once, and the sender met it: nobody will tell this thread.
                udp_died = true;
                udp.errno.store(libc::ECONNABORTED, Ordering::SeqCst);
                aborted.push(*at);
                let _ = epoll.delete(&udp.socket);
            }
            let mut events = [EpollEvent::empty(); 64];
            let ready = epoll.wait(&mut events, EpollTimeout::from(100_u8))?;
            let at = now();
            for event in events.iter().take(ready) {
                let flow = flows[event.data() as usize];
                epoll.delete(&flow.socket)?;
                let error = getsockopt(&flow.socket, SocketError)?;
                if event.data() == 0 {
                    if error == 0 {
                        // The sender met it between this thread's waking up and its asking.
                        continue;
                    }
                    udp_died = true;
                }
                ensure!(error == libc::ECONNABORTED, "{:?}", Errno::from_raw(error));
                flow.errno.store(libc::ECONNABORTED, Ordering::SeqCst);
                aborted.push(at);
            }
        }
        sender.join().ok().context("the sender panicked")?;
        let (_, error) = ended.get().context("the sender ended")?;
        // Refused by the hook, unless this thread had no processor until the socket was dead.
        let refusals = [libc::EPERM, libc::ECONNABORTED, libc::EDESTADDRREQ];
        ensure!(error.is_some_and(|error| refusals.contains(&error)), "sending failed with {error:?}");
        anyhow::Ok(aborted)
    })?;
    let refused = ended.get().map_or(0, |(at, _)| *at);
    ensure!(aborted.len() == flows.len(), "{} of {} are dead", aborted.len(), flows.len());
    let detail = serde_json::to_string(&Watched { refused, aborted })?;
    say(&Outcome { ok: true, detail, ..Outcome::default() });
    Ok(())
}

fn outcome(flows: &[Flow]) -> Outcome {
    let mut dead: BTreeMap<u32, BTreeMap<String, u32>> = BTreeMap::new();
    let mut alive = 0;
    for flow in flows {
        match flow.errno.load(Ordering::SeqCst) {
            0 => alive += 1,
            code => {
                let name = format!("{:?}", nix::errno::Errno::from_raw(code));
                *dead.entry(flow.instance).or_default().entry(name).or_default() += 1;
            }
        }
    }
    let detail = serde_json::to_string(&dead).unwrap_or_default();
    Outcome { ok: true, count: alive, detail, ..Outcome::default() }
}

/// A grant for the cgroup that this process is in now. The daemon may not have seen that one yet.
fn ask(socket: &Path, rule: &str, token: &str) -> Result<()> {
    let body = format!("{{\"rule\":{rule:?}}}");
    let request = format!(
        "POST /v1/grants HTTP/1.1\r\nHost: authd.local\r\nConnection: close\r\nAuthorization: Bearer {token}\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let begun = Instant::now();
    loop {
        let mut stream = UnixStream::connect(socket)?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        BufReader::new(&stream).read_to_string(&mut answer)?;
        if answer.starts_with("HTTP/1.1 201") {
            return Ok(());
        }
        if begun.elapsed() > PATIENCE {
            bail!("no grant: {answer}");
        }
        sleep(Duration::from_millis(5));
    }
}

fn connect_tcp(to: SocketAddr) -> Result<Socket> {
    let stream = eventually(|| TcpStream::connect(to))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(Socket::Tcp(stream))
}

fn connect_udp(to: SocketAddr) -> Result<Socket> {
    let socket = UdpSocket::bind(SocketAddr::new(to.ip(), 0))?;
    eventually(|| socket.connect(to))?;
    socket.set_read_timeout(Some(LOST))?;
    Ok(Socket::Udp(socket))
}

/// A new cgroup is nobody's until the daemon has seen it.
fn eventually<T>(attempt: impl Fn() -> io::Result<T>) -> Result<T> {
    let begun = Instant::now();
    loop {
        match attempt() {
            Ok(done) => return Ok(done),
            Err(error) if begun.elapsed() > PATIENCE => return Err(error).context("connecting"),
            Err(_) => sleep(Duration::from_millis(5)),
        }
    }
}

/// One byte on every connection, there and back, but for those that are watched.
fn use_all(flows: &[Flow], watched: u32) {
    let failed = |flow: &Flow, error: &io::Error| {
        let code = error.raw_os_error().filter(|code| *code != libc::EAGAIN).unwrap_or(libc::ETIMEDOUT);
        flow.errno.store(code, Ordering::SeqCst);
    };
    let alive = |flow: &&Flow| flow.instance != watched && flow.errno.load(Ordering::SeqCst) == 0;
    for flow in flows.iter().filter(alive) {
        if let Err(error) = flow.socket.send(b"x") {
            failed(flow, &error);
        }
    }
    for flow in flows.iter().filter(alive) {
        if let Err(error) = flow.socket.receive() {
            failed(flow, &error);
        }
    }
}
