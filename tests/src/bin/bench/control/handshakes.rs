//! Mutual TLS: authd's listener against a server that is nothing but rustls with the same certificates, and answers one
//! request. authd verifies in the handshake that the client has the key, and its chain when a request needs it: so both are
//! compared, the one without the other and the two together.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use authd::proofs::x509::verifier::Possession;
use authd_tests::{
    daemon::{Daemon, PATIENCE},
    sandbox::Sandbox,
    trust::Authority,
};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    client::Resumption,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    version::TLS13,
};

use super::{as_fast_as, compared, http::Client};
use crate::{
    compare::Comparison,
    worker::{Worker, obey},
};

const OURS: &str = "127.0.0.1:7443";
/// Verifies the chain, too.
const THEIRS: &str = "127.0.0.1:7444";
/// Verifies that the client has the key.
const THEIRS_POSSESSION: &str = "127.0.0.1:7445";
const NAME: &str = "node.example.org";
/// That connect at the same time.
const CLIENTS: u32 = 4;

struct Effort {
    slices: usize,
    handshakes: u32,
}

const FULL: Effort = Effort { slices: 200, handshakes: 40 };
const QUICK: Effort = Effort { slices: 40, handshakes: 20 };

pub fn run(quick: bool) -> Result<Vec<Comparison>> {
    let effort = if quick { QUICK } else { FULL };
    let scene = Scene::new()?;
    let ours = [scene.daemon.pid(), u32::try_from(scene.daemon.control_pid()?)?];
    let theirs = [scene.bare.pid()];
    let each = |address: &'static str, path: &'static str, pids: &[u32]| -> Result<(f64, f64)> {
        let (before, started) = (processor_time(pids)?, Instant::now());
        scene.handshakes(address, path, effort.handshakes)?;
        let elapsed = started.elapsed().as_nanos() as f64;
        let handshakes = f64::from(CLIENTS * effort.handshakes);
        Ok((elapsed / handshakes, (processor_time(pids)? - before) as f64 / handshakes))
    };
    let mut results = Vec::new();
    for (what, path, bare, budget) in [
        ("mTLS handshake", "/v1/health", THEIRS_POSSESSION, as_fast_as(0.85)),
        ("mTLS handshake, chain and whoami", "/v1/whoami", THEIRS, None),
    ] {
        let (mut wall, mut processor) = (Vec::new(), Vec::new());
        for turn in 0..effort.slices {
            let (ours, theirs) = match turn % 2 {
                0 => (each(OURS, path, &ours)?, each(bare, path, &theirs)?),
                _ => {
                    let theirs = each(bare, path, &theirs)?;
                    (each(OURS, path, &ours)?, theirs)
                }
            };
            wall.push((ours.0, theirs.0));
            processor.push((ours.1, theirs.1));
        }
        results.push(compared(format!("{what}, against bare rustls"), &wall, budget));
        results.push(compared(format!("{what}, the server's processor time"), &processor, None));
    }
    Ok(results)
}

/// ns that processes have run, all threads together.
fn processor_time(pids: &[u32]) -> Result<u64> {
    let mut sum = 0;
    for pid in pids {
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            // One that ended meanwhile is not missed: servers here keep theirs.
            let Ok(text) = fs::read_to_string(thread?.path().join("schedstat")) else { continue };
            sum += text.split(' ').next().unwrap_or_default().parse::<u64>().context("schedstat")?;
        }
    }
    Ok(sum)
}

struct Scene {
    bare: Worker,
    daemon: Daemon,
    client: Arc<ClientConfig>,
    /// Numbers of connections so far.
    connections: AtomicU32,
    // Dropped last: the others live in it.
    sandbox: Sandbox,
}

impl Scene {
    fn new() -> Result<Self> {
        let sandbox = Sandbox::new()?;
        let directory = sandbox.directory();
        let authority = Authority::new("bench")?;
        fs::write(sandbox.policy_directory().join("ca.crt"), authority.pem())?;
        authority.issue(directory, "server", vec![rcgen::SanType::DnsName(NAME.try_into()?)])?;
        authority.issue_spiffe(directory, "client", "spiffe://example.org/one")?;
        let (certificate, key) = (directory.join("server.pem"), directory.join("server.key"));
        sandbox.add_settings(&format!(
            "control.listen = {OURS:?}\ncontrol.certificate = {certificate:?}\ncontrol.key = {key:?}\n"
        ))?;
        sandbox.write_policy(
            "trust_domain = \"example.org\"\n[[authority]]\nname = \"ca\"\nbundle = \"ca.crt\"\n\
             trust_domain = \"example.org\"\n",
        )?;
        let daemon = Daemon::start_inside(&sandbox)?;
        let ca = sandbox.policy_directory().join("ca.crt");
        let path = |path: &Path| path.to_str().map(str::to_owned).context("a path");
        let bare = Worker::start(&[
            "bare-tls",
            &path(sandbox.netns.path())?,
            &path(&ca)?,
            &path(&certificate)?,
            &path(&key)?,
        ])?;
        let mut client = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(roots(&ca)?)
            .with_client_auth_cert(
                chain(&directory.join("client.pem"))?,
                PrivateKeyDer::from_pem_file(directory.join("client.key"))?,
            )?;
        client.resumption = Resumption::disabled();
        let client = Arc::new(client);
        let scene = Self { bare, daemon, client, connections: AtomicU32::new(0), sandbox };
        // The daemon's other process may not be there yet.
        let started = Instant::now();
        while let Err(error) = scene.handshakes(OURS, "/v1/health", 1) {
            ensure!(started.elapsed() < PATIENCE, "{error:#}\n{}", scene.daemon.log());
            thread::sleep(Duration::from_millis(50));
        }
        let answer = scene.sandbox.netns.within(|| scene.handshake(OURS, "/v1/whoami"))?;
        ensure!(
            answer.windows(15).any(|part| part == br#""accepted":true"#),
            "the listener does not accept the client"
        );
        Ok(scene)
    }

    /// Several clients at once, each so many times.
    fn handshakes(&self, address: &str, path: &str, each: u32) -> Result<()> {
        thread::scope(|scope| {
            let client = || {
                scope.spawn(|| {
                    self.sandbox.netns.within(|| (0..each).try_for_each(|_| self.handshake(address, path).map(drop)))
                })
            };
            let clients: Vec<_> = (0..CLIENTS).map(|_| client()).collect();
            clients.into_iter().try_for_each(|client| client.join().ok().context("a client panicked")?)
        })
    }

    /// Connects, proves itself, asks, and hears the answer.
    fn handshake(&self, address: &str, path: &str) -> Result<Vec<u8>> {
        // What one address may ask for within a minute is limited.
        let number = self.connections.fetch_add(1, Ordering::Relaxed);
        let [_, _, a, b] = (number % 0xff00).to_be_bytes();
        let stream = connect(SocketAddr::from(([127, 1, a, b.max(1)], 0)), address.parse()?)?;
        let session = ClientConnection::new(self.client.clone(), ServerName::try_from(NAME)?)?;
        let mut client = Client::new(StreamOwned::new(session, stream));
        let (status, body) = client.ask("GET", path, "Connection: close\r\n", "")?;
        ensure!((200..300).contains(&status), "{status}");
        Ok(body)
    }
}

fn connect(from: SocketAddr, to: SocketAddr) -> Result<TcpStream> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};
    use std::os::fd::AsRawFd;
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(from))?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
    let stream = TcpStream::from(fd);
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    Ok(CertificateDer::pem_file_iter(path)?.collect::<Result<_, _>>()?)
}

fn roots(path: &Path) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(chain(path)?);
    Ok(roots)
}

#[derive(clap::Args)]
pub struct Bare {
    netns: PathBuf,
    ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

impl Bare {
    pub fn run(&self) -> Result<()> {
        nix::sched::setns(fs::File::open(&self.netns)?, nix::sched::CloneFlags::CLONE_NEWNET)?;
        let provider = Arc::new(default_provider());
        let roots = Arc::new(roots(&self.ca)?);
        let chain_too = WebPkiClientVerifier::builder_with_provider(roots, provider).build()?;
        self.serve(THEIRS, chain_too)?;
        self.serve(THEIRS_POSSESSION, Arc::new(Possession))?;
        obey(|_, _| Ok(Instant::now()))
    }

    fn serve(&self, address: &str, verifier: Arc<dyn ClientCertVerifier>) -> Result<()> {
        let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain(&self.certificate)?, PrivateKeyDer::from_pem_file(&self.key)?)?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        let (config, listener) = (Arc::new(config), TcpListener::bind(address)?);
        for _ in 0..CLIENTS {
            let (config, listener) = (config.clone(), listener.try_clone()?);
            thread::spawn(move || {
                loop {
                    // A client that goes away is the client's failure, and reported there.
                    let _ = listener.accept().map_err(Into::into).and_then(|(stream, _)| answer(stream, &config));
                }
            });
        }
        Ok(())
    }
}

fn answer(stream: TcpStream, config: &Arc<ServerConfig>) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(StreamOwned::new(ServerConnection::new(config.clone())?, stream));
    let mut line = String::new();
    while stream.read_line(&mut line)? > 2 {
        line.clear();
    }
    let stream = stream.get_mut();
    stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")?;
    stream.conn.send_close_notify();
    Ok(stream.flush()?)
}
