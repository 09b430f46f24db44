//! The control process, from the privileged side: started, watched, started again; connections handed to it; its messages.
//!
//! Enters: connections from listeners, messages of control. Leaves: messages to control. Never: belief in what control says
//! of a caller. Who a connection belongs to is what this side found out when it accepted it.

use std::{
    collections::HashMap,
    fs, io,
    net::{IpAddr, SocketAddr, TcpStream},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::unistd::User;
use tokio::{
    net::{TcpListener, UnixListener},
    process::{Child, Command},
    time::Instant,
};

use crate::{
    config::Config,
    dataplane::{
        attestation::{AttestError, Attested, attest},
        introductions,
    },
    decisions::asked,
    ipc::{self, Caller, Channel, Connection, FromControl, Identities, IpcError, Sealed, Settings, ToControl},
};

/// Connections that control has at one time.
const MAX_CONNECTIONS: usize = 4096;
/// Of these, of one [`Share`].
const MAX_PER_CALLER: usize = 256;
/// The next start waits for this long after the first end, and twice as long after each further one.
const RESTART_AFTER: Duration = Duration::from_millis(100);
const RESTART_AFTER_AT_MOST: Duration = Duration::from_secs(10);
/// What control runs is this binary. Tests of the boundary between the two put another program there; no release does.
const PROGRAM_OF_TESTS: &str = "AUTHD_TEST_CONTROL";
/// Files that resolving names takes.
const RESOLVER: [&str; 3] = ["etc/resolv.conf", "etc/hosts", "etc/nsswitch.conf"];

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("{0}: {1}")]
    Listen(String, io::Error),
    #[error("starting the control process: {0}")]
    Start(io::Error),
    #[error("user {0} does not exist: create it, or name another with control.user in authd.toml")]
    NoUser(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Who a connection belongs to.
#[derive(Clone, Debug)]
pub enum Who {
    Local(Attested),
    Remote {
        address: SocketAddr,
        /// Of a caller for whom another node vouched when it connected; 0: none did.
        label: u32,
    },
    /// Whoever may connect to the operators' socket.
    Admin {
        uid: u32,
        /// From where; `None`: nobody knows any more.
        cgroup: Option<String>,
    },
}

/// Everything about control that lives as long as the daemon.
pub struct Control {
    socket: UnixListener,
    peers: Option<TcpListener>,
    /// Of agents that speak HTTP over TCP alone.
    agents: Option<TcpListener>,
    running: Option<Running>,
    restart: Option<Instant>,
    delay: Duration,
    next: Connection,
    cell: Cell,
}

struct Running {
    child: Child,
    channel: Channel,
    connections: HashMap<Connection, (Who, Share)>,
    ready: bool,
}

struct Cell {
    uid: u32,
    gid: u32,
    root: PathBuf,
}

/// What happened.
pub enum Happened {
    /// A message of control.
    Message(FromControl),
    /// A local connection or one of a peer: to be identified, and handed over with [`Control::hand_over`].
    Accepted(OwnedFd, Result<Who, AttestError>),
    /// A connection on loopback: to be identified by its other end, and handed over.
    AcceptedTcp(TcpStream),
    /// Control ended, by itself or because it said something that it cannot mean.
    Ended(String),
    /// It is time to start it again.
    Restart,
    /// An error of a listener that passes.
    Nothing,
}

impl Control {
    /// Opens the listeners. Control itself is started with [`Control::start`].
    pub fn new(config: &Config) -> Result<Self, ControlError> {
        let cell = Cell::prepare(config)?;
        let of = |path: &Path| {
            let path = path.display().to_string();
            move |error| ControlError::Listen(path, error)
        };
        let path = &config.control.socket;
        let socket = super::supervisor::bind(path, 0o666).map_err(of(path))?;
        let peers = match config.control.listen {
            None => None,
            Some(address) => {
                let of = |error| ControlError::Listen(address.to_string(), error);
                let listener = std::net::TcpListener::bind(address).map_err(of)?;
                introductions::keep(&listener)?;
                listener.set_nonblocking(true)?;
                Some(TcpListener::from_std(listener)?)
            }
        };
        let agents = match config.mcp.listen {
            None => None,
            Some(address) => {
                let listener = std::net::TcpListener::bind(address);
                let listener = listener.map_err(|error| ControlError::Listen(address.to_string(), error))?;
                listener.set_nonblocking(true)?;
                Some(TcpListener::from_std(listener)?)
            }
        };
        let delay = RESTART_AFTER;
        Ok(Self { socket, peers, agents, running: None, restart: Some(Instant::now()), delay, next: 1, cell })
    }

    /// Starts the process, with its settings.
    pub fn start(&mut self, settings: &Settings) -> Result<(), ControlError> {
        self.restart = None;
        self.cell.refresh();
        let (ours, theirs) = ipc::pair()?;
        let own = std::env::current_exe()?;
        let program = program_of_tests().unwrap_or(own);
        let mut command = Command::new(program);
        command
            .arg("control")
            .args(["--uid", &self.cell.uid.to_string(), "--gid", &self.cell.gid.to_string()])
            .arg("--root")
            .arg(&self.cell.root)
            .env_clear()
            .envs(std::env::var_os("AUTHD_LOG").map(|filter| ("AUTHD_LOG", filter)))
            .stdin(std::process::Stdio::from(theirs))
            .stdout(std::process::Stdio::null())
            .kill_on_drop(true);
        // SAFETY: close_range(2) is a system call that allocates nothing, which is what a forked child may do.
        unsafe {
            // What this process inherited, and nobody marked, is not for control.
            command.pre_exec(|| {
                let result = libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
                if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
            });
        }
        let child = command.spawn().map_err(ControlError::Start)?;
        let running = Running { child, channel: Channel::new(ours)?, connections: HashMap::new(), ready: false };
        self.running = Some(running);
        self.tell_settings(settings);
        Ok(())
    }

    /// After a start that failed.
    pub fn try_later(&mut self) {
        self.restart = Some(Instant::now() + self.delay);
        self.delay = (self.delay * 2).min(RESTART_AFTER_AT_MOST);
    }

    pub fn is_ready(&self) -> bool {
        self.running.as_ref().is_some_and(|running| running.ready)
    }

    pub fn became_ready(&mut self) {
        if let Some(running) = &mut self.running {
            running.ready = true;
            self.delay = RESTART_AFTER;
        }
    }

    /// Other settings, for a process that runs.
    pub fn tell_settings(&mut self, settings: &Settings) {
        match settings.seal() {
            Ok(fd) => self.tell(&ToControl::Settings, &[fd.as_fd()]),
            Err(error) => tracing::error!(%error, "the control process does not get its settings"),
        }
    }

    /// What became of approvals.
    pub fn tell_approvals(&mut self, question: ipc::Question, answer: &asked::Answer) {
        match answer.seal() {
            Ok(fd) => self.tell(&ToControl::Approvals { question }, &[fd.as_fd()]),
            Err(error) => tracing::error!(%error, "an answer about approvals is lost"),
        }
    }

    /// What the webhook is to be told.
    pub fn tell_message(&mut self, message: &ipc::Message) {
        match message.seal() {
            Ok(fd) => self.tell(&ToControl::Notify, &[fd.as_fd()]),
            Err(error) => tracing::error!(%error, "the webhook is not told of a call that waits"),
        }
    }

    /// For whom this node speaks now.
    pub fn tell_identities(&mut self, identities: &Identities) {
        match identities.seal() {
            Ok(fd) => self.tell(&ToControl::Identities, &[fd.as_fd()]),
            Err(error) => tracing::error!(%error, "the control process does not know for whom it speaks"),
        }
    }

    /// Control that does not read is stuck: it is ended, and started again.
    pub fn tell(&mut self, message: &ToControl, attached: &[BorrowedFd<'_>]) {
        let Some(running) = &mut self.running else { return };
        match running.channel.try_send(message, attached) {
            Ok(()) => {}
            Err(error @ IpcError::TooLong(_)) => tracing::error!(%error, "a message to the control process"),
            Err(error) => {
                tracing::error!(%error, "ending the control process");
                let _ = running.child.start_kill();
            }
        }
    }

    pub fn who(&self, connection: Connection) -> Option<&Who> {
        self.running.as_ref()?.connections.get(&connection).map(|(who, _)| who)
    }

    pub fn forget(&mut self, connection: Connection) {
        if let Some(running) = &mut self.running {
            running.connections.remove(&connection);
        }
    }

    /// Gives a connection to control, unless there are too many: then it is closed, which the caller sees.
    pub fn hand_over(&mut self, fd: OwnedFd, who: Who, caller: Caller) {
        let Some(running) = &mut self.running else { return };
        let share = Share::of(&caller);
        let same = running.connections.values().filter(|(_, other)| *other == share).count();
        if running.connections.len() >= MAX_CONNECTIONS || same >= MAX_PER_CALLER {
            tracing::warn!(connections = running.connections.len(), same, ?who, "too many connections: one is closed");
            return;
        }
        let connection = self.next;
        self.next += 1;
        running.connections.insert(connection, (who, share));
        self.tell(&ToControl::Connected { connection, caller }, &[fd.as_fd()]);
    }

    /// The next thing that happens.
    pub async fn happened(&mut self) -> Happened {
        let restart = self.restart;
        let Some(running) = &mut self.running else {
            match restart {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
            return Happened::Restart;
        };
        tokio::select! {
            message = running.channel.receive::<FromControl>() => match message {
                Ok(Some((message, _))) => Happened::Message(message),
                Ok(None) => self.end("it closed its connection"),
                Err(error) => self.end(&format!("it sent something wrong: {error}")),
            },
            status = running.child.wait() => {
                let how = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                self.end(&how)
            }
            accepted = self.socket.accept(), if running.ready => match accepted.and_then(|(stream, _)| stream.into_std()) {
                Ok(stream) => {
                    let fd = OwnedFd::from(stream);
                    let who = attest(fd.as_fd()).map(Who::Local);
                    Happened::Accepted(fd, who)
                }
                Err(_) => pause().await,
            },
            accepted = accept_tcp(self.agents.as_ref()), if running.ready => match accepted {
                Ok(stream) => Happened::AcceptedTcp(stream),
                Err(_) => pause().await,
            },
            accepted = accept(self.peers.as_ref()), if running.ready => match accepted {
                Ok((fd, address)) => Happened::Accepted(fd, Ok(Who::Remote { address, label: 0 })),
                Err(_) => pause().await,
            },
        }
    }

    /// What runs is killed when it is dropped. Connections end with it; grants do not.
    fn end(&mut self, how: &str) -> Happened {
        self.running = None;
        self.try_later();
        Happened::Ended(how.to_owned())
    }
}

async fn accept_tcp(listener: Option<&TcpListener>) -> io::Result<TcpStream> {
    let Some(listener) = listener else { return std::future::pending().await };
    listener.accept().await?.0.into_std()
}

async fn accept(listener: Option<&TcpListener>) -> io::Result<(OwnedFd, SocketAddr)> {
    let Some(listener) = listener else { return std::future::pending().await };
    let (stream, address) = listener.accept().await?;
    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
    Ok((stream.into_std()?.into(), address))
}

/// Errors of accept(2) pass, such as a table of descriptors that is full; asking again at once would only burn time.
async fn pause() -> Happened {
    tokio::time::sleep(Duration::from_millis(50)).await;
    Happened::Nothing
}

/// Those who have one share of the connections. Whoever makes cgroups below its own does not so get another one.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Share {
    Instance(String),
    User(u32),
    Network(IpAddr),
    Operators,
}

impl Share {
    fn of(caller: &Caller) -> Self {
        match caller {
            Caller::Local { workload: Some(workload), .. } => Self::Instance(workload.cgroup.clone()),
            Caller::Local { workload: None, uid, .. } => Self::User(*uid),
            Caller::Remote { address, .. } => Self::Network(network_of(address.ip())),
            Caller::Admin { .. } => Self::Operators,
        }
    }
}

/// Whoever has one IPv6 address usually has the 2^64 of its network.
pub fn network_of(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) >> 64 << 64).into()),
    }
}

#[cfg(debug_assertions)]
fn program_of_tests() -> Option<PathBuf> {
    std::env::var_os(PROGRAM_OF_TESTS).map(PathBuf::from)
}

#[cfg(not(debug_assertions))]
fn program_of_tests() -> Option<PathBuf> {
    let _ = PROGRAM_OF_TESTS;
    None
}

impl Cell {
    fn prepare(config: &Config) -> Result<Self, ControlError> {
        let name = &config.control.user;
        let user = User::from_name(name).map_err(io::Error::from)?;
        let user = user.ok_or_else(|| ControlError::NoUser(name.clone()))?;
        let root = config.control.root.clone();
        let of = |error| ControlError::Listen(root.display().to_string(), error);
        fs::create_dir_all(root.join("etc")).map_err(of)?;
        for directory in [&root, &root.join("etc")] {
            // Nothing in it is the user's: it can read the few files, and change nothing.
            fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).map_err(of)?;
        }
        let cell = Self { uid: user.uid.as_raw(), gid: user.gid.as_raw(), root };
        cell.refresh();
        Ok(cell)
    }

    /// Copies what resolving names takes, as it is now. What is not there is not needed.
    fn refresh(&self) {
        for name in RESOLVER {
            let (from, to) = (Path::new("/").join(name), self.root.join(name));
            let copied = fs::read(from).and_then(|text| fs::write(&to, text));
            if copied.is_ok() {
                let _ = fs::set_permissions(&to, fs::Permissions::from_mode(0o644));
            }
        }
    }
}
