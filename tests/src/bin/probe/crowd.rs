//! Thousands of connections of hundreds of instances, each instance with a grant of its own, all of them in use.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicU64, Ordering},
    },
    thread::{self, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use authd_tests::probe::Outcome;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::say;

/// Both programs hold as many descriptors as there are connections.
fn raise_descriptor_limit() -> Result<()> {
    const ENOUGH: u64 = 16_384;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most.max(ENOUGH), most.max(ENOUGH))?)
}

/// Nothing takes as long but a connection that is dead without saying so.
const PATIENCE: Duration = Duration::from_secs(60);

/// One connection, and what became of it: 0, or an error's number.
struct Flow {
    instance: u32,
    stream: TcpStream,
    errno: AtomicI32,
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
    /// Connections of each.
    #[arg(long)]
    flows: u32,
    to: SocketAddr,
}

/// Says when all connections are there. Then each line of input is answered after every connection was used once more: the
/// count is of those that live, the detail says of each instance with dead ones which errors they have.
pub fn run(crowd: &Crowd) -> Result<()> {
    raise_descriptor_limit()?;
    let token = fs::read_to_string(&crowd.token_file)?;
    let mut flows = Vec::new();
    for instance in 0..crowd.instances {
        let cgroup = crowd.parent.join(format!("a{instance}"));
        fs::create_dir_all(&cgroup)?;
        fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())?;
        ask(&crowd.socket, &crowd.rule, token.trim())?;
        for _ in 0..crowd.flows {
            flows.push(Flow { instance, stream: connect(crowd.to)?, errno: AtomicI32::new(0) });
        }
    }
    let flows = Arc::new(flows);
    let rounds = Arc::new(AtomicU64::new(0));
    thread::spawn({
        let (flows, rounds) = (flows.clone(), rounds.clone());
        move || {
            loop {
                use_all(&flows);
                rounds.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    say(&outcome(&flows));
    for line in io::stdin().lock().lines() {
        line?;
        // The round that runs may have passed the connections that matter.
        let enough = rounds.load(Ordering::SeqCst) + 2;
        while rounds.load(Ordering::SeqCst) < enough {
            sleep(Duration::from_millis(5));
        }
        say(&outcome(&flows));
    }
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

fn connect(to: SocketAddr) -> Result<TcpStream> {
    let begun = Instant::now();
    loop {
        match TcpStream::connect(to) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(error) if begun.elapsed() > PATIENCE => return Err(error).context("connecting"),
            Err(_) => sleep(Duration::from_millis(5)),
        }
    }
}

/// One byte on every connection, there and back.
fn use_all(flows: &[Flow]) {
    let failed = |flow: &Flow, error: &io::Error| {
        let code = error.raw_os_error().filter(|code| *code != libc::EAGAIN).unwrap_or(libc::ETIMEDOUT);
        flow.errno.store(code, Ordering::SeqCst);
    };
    let alive = |flow: &&Flow| flow.errno.load(Ordering::SeqCst) == 0;
    for flow in flows.iter().filter(alive) {
        if let Err(error) = (&flow.stream).write_all(b"x") {
            failed(flow, &error);
        }
    }
    for flow in flows.iter().filter(alive) {
        match (&flow.stream).read(&mut [0; 1]) {
            Ok(1) => {}
            Ok(_) => failed(flow, &io::ErrorKind::UnexpectedEof.into()),
            Err(error) => failed(flow, &error),
        }
    }
}

/// An echo server for all of them, on one thread.
pub fn serve(at: SocketAddr) -> Result<()> {
    raise_descriptor_limit()?;
    let listener = TcpListener::bind(at)?;
    // SAFETY: no pointers. A second call only changes the length of the queue (listen(2)).
    unsafe { libc::listen(listener.as_raw_fd(), 4096) };
    listener.set_nonblocking(true)?;
    say(&Outcome { ok: true, ..Outcome::default() });
    thread::spawn(super::end_with_input);
    // SAFETY: takes a number.
    let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    let watch = |fd: i32| {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: fd as u64 };
        // SAFETY: the event is read during the call.
        unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &raw mut event) };
    };
    watch(listener.as_raw_fd());
    let mut streams: BTreeMap<i32, TcpStream> = BTreeMap::new();
    let mut events = vec![libc::epoll_event { events: 0, u64: 0 }; 1024];
    loop {
        // SAFETY: the kernel writes as many events as there is room for.
        let ready = unsafe { libc::epoll_wait(epoll, events.as_mut_ptr(), 1024, -1) };
        for event in events.iter().take(usize::try_from(ready).unwrap_or(0)) {
            let fd = event.u64 as i32;
            if fd == listener.as_raw_fd() {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true)?;
                    watch(stream.as_raw_fd());
                    streams.insert(stream.as_raw_fd(), stream);
                }
                continue;
            }
            let mut buffer = [0; 64];
            let gone = match streams.get_mut(&fd).map(|stream| (stream.read(&mut buffer), stream)) {
                Some((Ok(length @ 1..), stream)) => stream.write_all(&buffer[..length]).is_err(),
                Some((Err(error), _)) if error.kind() == io::ErrorKind::WouldBlock => false,
                _ => true,
            };
            if gone {
                streams.remove(&fd);
            }
        }
    }
}
