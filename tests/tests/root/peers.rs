//! Callers from other nodes on the listener: admission by certificate for an address, and requests that it has to survive.
//! Handshakes that it has to survive are in `handshakes`.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use authd::{digest::Digest, proofs::base64url};
use authd_tests::{
    daemon::{Daemon, PATIENCE},
    netns::Netns,
    probe::Running,
    sandbox::Sandbox,
    trust::{Authority, Issuer},
};
use libtest_mimic::Trial;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};
use rustls::{
    ClientConfig, ClientConnection, ConfigBuilder, HandshakeKind, RootCertStore,
    client::WantsClientCert,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    version::TLS13,
};
use serde_json::{Value, json};

use crate::{Verdict, reload::wait_until, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("a_peer_is_admitted_from_its_address_alone", a_peer_is_admitted_from_its_address_alone),
        trial("a_peer_is_admitted_over_ipv6", a_peer_is_admitted_over_ipv6),
        trial("an_ipv4_peer_of_a_listener_for_both_is_an_ipv4_peer", an_ipv4_peer_of_a_listener_for_both),
        trial(
            "a_peer_with_a_certificate_alone_calls_from_anywhere",
            a_peer_with_a_certificate_alone_calls_from_anywhere,
        ),
        trial("a_bound_token_is_shown_over_ipv6", a_bound_token_is_shown_over_ipv6),
        trial("a_peers_certificate_elsewhere_is_nobodys", a_peer_elsewhere_is_nobody),
        trial("the_listener_refuses_odd_requests", the_listener_refuses_odd_requests),
        trial("a_crowd_of_connections_keeps_nobody_else_out", a_crowd_keeps_nobody_else_out),
        trial("operators_revoke_over_http_and_others_do_not", operators_revoke_over_http),
    ]
}

/// Whom the policy lets in.
pub const PARTNER: &str = "spiffe://partner.example/billing";

/// A request of the peer's, whole.
pub const ASK: &str = "POST /v1/grants HTTP/1.1\r\nHost: node.example.org\r\nConnection: close\r\n\
                       Content-Length: 25\r\n\r\n{\"rule\":\"partner-orders\"}";

pub const POLICY: &str = r#"
trust_domain = "example.org"
[[workload]]
name = "db"
kind = "service"
cgroup = "/db"
[[authority]]
name = "partners"
bundle = "partners.crt"
trust_domain = "partner.example"
[[peer]]
name = "partner"
networks = ["192.0.2.0/25", "2001:db8::/80"]
spiffe_id = "spiffe://partner.example/billing"
[[service]]
name = "orders"
workload = "db"
ports = ["tcp/7001", "tcp/7002"]
[[rule]]
name = "partner-orders"
from = ["partner"]
to = ["orders"]
require = ["mtls"]
grant_ttl = "10m"
"#;

/// More of it, for those who show tokens.
const BY_TOKEN: &str = r#"
[[issuer]]
name = "corp"
kind = "jwt"
issuer = "https://idp.example.org"
jwks_file = "jwks.json"
algorithms = ["ES256"]
[[peer]]
name = "caller"
networks = ["2001:db8::/80"]
[[rule]]
name = "partner-by-token"
from = ["caller"]
to = ["orders"]
require = ["token"]
token = { issuer = "corp", audience = "ledger", bound = true }
"#;

pub const LISTENER: &str = "192.0.2.1:7443";

pub struct Scene {
    pub sandbox: Sandbox,
    pub daemon: Daemon,
    pub far: Netns,
    pub authority: Authority,
    pub ca: PathBuf,
    listener: SocketAddr,
    _servers: Vec<Running>,
}

impl Scene {
    pub fn new(settings: &str) -> Result<Self> {
        Self::listening(LISTENER, settings)
    }

    /// On both sides there are addresses of both families; on the far one two that are the peer's, and one that is not.
    fn listening(at: &str, settings: &str) -> Result<Self> {
        let sandbox = Sandbox::new()?;
        let far = sandbox.another_netns("far")?;
        let near_addresses = ["192.0.2.1/24", "2001:db8::1/64"];
        let v4 = ["192.0.2.2/24", "192.0.2.3/24", "192.0.2.200/24"];
        let v6 = ["2001:db8::2/64", "2001:db8::3/64", "2001:db8::1:0:0:2/64"];
        sandbox.netns.join(&far, ("near0", "far0"), (&near_addresses, &[v4, v6].concat()))?;
        // Not one that the kernel chooses (RFC 6724, 5).
        far.ip(&["address", "change", v6[2], "dev", "far0", "preferred_lft", "0"])?;
        let authority = Authority::new("tests")?;
        std::fs::write(sandbox.policy_directory().join("partners.crt"), authority.pem())?;
        let ca = sandbox.directory().join("ca.pem");
        std::fs::write(&ca, authority.pem())?;
        let names = vec![
            rcgen::SanType::DnsName("node.example.org".try_into()?),
            rcgen::SanType::IpAddress("192.0.2.1".parse()?),
            rcgen::SanType::IpAddress("2001:db8::1".parse()?),
        ];
        authority.issue(sandbox.directory(), "listener", names)?;
        let file = |name: &str| sandbox.directory().join(name);
        sandbox.add_settings(&format!(
            "control.listen = {at:?}\ncontrol.certificate = {:?}\ncontrol.key = {:?}\n{settings}",
            file("listener.pem"),
            file("listener.key"),
        ))?;
        sandbox.write_policy(POLICY)?;
        let daemon = Daemon::start_inside(&sandbox)?;
        wait_until("the control process", || Ok(daemon.status()?.control_ready)).with_context(|| daemon.log())?;
        let servers = ["192.0.2.1:7001", "[2001:db8::1]:7001"].map(|at| sandbox.spawn("/db", &["serve-tcp", at]));
        let servers = servers.into_iter().collect::<Result<_>>()?;
        Ok(Self { sandbox, daemon, far, authority, ca, listener: at.parse()?, _servers: servers })
    }

    /// `authd grant` from elsewhere, with a certificate for a SPIFFE ID.
    pub fn ask(&self, id: &str) -> Result<Value> {
        self.ask_at(self.listener, id)
    }

    fn ask_at(&self, listener: SocketAddr, id: &str) -> Result<Value> {
        let (cert, key, _) = self.certificate(id)?;
        self.grant_at(listener, &["--rule", "partner-orders", "--cert", &cert, "--key", &key])
    }

    fn grant_at(&self, listener: SocketAddr, more: &[&str]) -> Result<Value> {
        let (ca, url) = (self.ca.display().to_string(), format!("https://{listener}"));
        let arguments = [&["grant", "--json", "--url", &url, "--ca", &ca], more].concat();
        let outcome = self.sandbox.authd_in_netns("/elsewhere", &self.far, &arguments)?;
        serde_json::from_str(outcome.detail.trim()).with_context(|| format!("{outcome:?}\n{}", self.daemon.log()))
    }

    fn reaches(&self, from: IpAddr, to: SocketAddr) -> Result<bool> {
        let (from, to) = (SocketAddr::new(from, 0).to_string(), to.to_string());
        let arguments = ["tcp", &to, "--from", &from, "--timeout-ms", "2000"];
        // A blocking connect waits for minutes: the attempt is given up from outside.
        let mut attempt = self.sandbox.spawn_quietly_in("/elsewhere", &self.far, &arguments)?;
        let outcome = attempt.next_within(Duration::from_secs(5))?;
        Ok(outcome.is_some_and(|outcome| outcome.ok))
    }

    pub fn connect(&self) -> Result<TcpStream> {
        let stream = self.far.within(|| Ok(TcpStream::connect(self.listener)?))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// A connection from an address that the kernel would not choose.
    pub fn connect_from(&self, from: IpAddr) -> Result<TcpStream> {
        let family = if from.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let socket = self.far.within(|| Ok(socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?))?;
        bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(from, 0)))?;
        connect(socket.as_raw_fd(), &SockaddrStorage::from(self.listener))?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    fn local(&self) -> Result<UnixStream> {
        let stream = UnixStream::connect(self.sandbox.directory().join("workload.sock"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// The answer to some bytes on the Unix socket, until the daemon closes the connection.
    fn answer(&self, bytes: &[u8]) -> Result<String> {
        let mut stream = self.local()?;
        // Part of it may be refused before all of it is written.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Err(error) if answer.is_empty() && error.kind() != std::io::ErrorKind::ConnectionReset => Err(error.into()),
            _ => Ok(String::from_utf8_lossy(&answer).into_owned()),
        }
    }

    /// A handshake with the listener, to its end.
    pub fn handshake(&self, config: ClientConfig, name: &str) -> Result<()> {
        let get = "GET /v1/health HTTP/1.1\r\nHost: 192.0.2.1:7443\r\nConnection: close\r\n\r\n";
        let (answer, _) = self.request(&Arc::new(config), name, get)?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
        Ok(())
    }

    /// The answer to a request that closes its connection, and what kind of handshake came before it.
    pub fn request(
        &self,
        config: &Arc<ClientConfig>,
        name: &str,
        request: &str,
    ) -> Result<(String, Option<HandshakeKind>)> {
        Self::request_on(self.connect()?, config, name, request)
    }

    pub fn request_on(
        mut stream: TcpStream,
        config: &Arc<ClientConfig>,
        name: &str,
        request: &str,
    ) -> Result<(String, Option<HandshakeKind>)> {
        let mut client = ClientConnection::new(config.clone(), ServerName::try_from(name.to_owned())?)?;
        // In TLS 1.3 the client is done before the server has answered: reading shows what that one says.
        let mut tls = rustls::Stream::new(&mut client, &mut stream);
        let sent = tls.write_all(request.as_bytes());
        let mut answer = String::new();
        let read = tls.read_to_string(&mut answer);
        if answer.is_empty() {
            sent.and(read)?;
        }
        Ok((answer, client.handshake_kind()))
    }

    pub fn client(&self, version: &'static rustls::SupportedProtocolVersion) -> Result<ClientConfig> {
        Ok(self.builder(rustls::crypto::aws_lc_rs::default_provider(), version)?.with_no_client_auth())
    }

    /// One that shows a certificate for a SPIFFE ID; and that one.
    pub fn client_as(
        &self,
        provider: CryptoProvider,
        version: &'static rustls::SupportedProtocolVersion,
        id: &str,
    ) -> Result<(ClientConfig, CertificateDer<'static>)> {
        self.client_of(&self.authority, provider, version, id)
    }

    /// The same by another authority.
    pub fn client_of(
        &self,
        authority: &Authority,
        provider: CryptoProvider,
        version: &'static rustls::SupportedProtocolVersion,
        id: &str,
    ) -> Result<(ClientConfig, CertificateDer<'static>)> {
        let (cert, key, _) = self.certificate_of(authority, id)?;
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(cert)?.collect::<Result<_, _>>()?;
        let leaf = chain[0].clone();
        let key = PrivateKeyDer::from_pem_file(key)?;
        Ok((self.builder(provider, version)?.with_client_auth_cert(chain, key)?, leaf))
    }

    fn builder(
        &self,
        provider: CryptoProvider,
        version: &'static rustls::SupportedProtocolVersion,
    ) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.authority.pem().as_bytes())?)?;
        let config = ClientConfig::builder_with_provider(provider.into()).with_protocol_versions(&[version])?;
        Ok(config.with_root_certificates(roots))
    }

    /// Files of a new certificate and its key, and its SHA-256.
    pub fn certificate(&self, id: &str) -> Result<(String, String, [u8; 32])> {
        self.certificate_of(&self.authority, id)
    }

    fn certificate_of(&self, authority: &Authority, id: &str) -> Result<(String, String, [u8; 32])> {
        let name = format!("peer-{:x}", rand::random::<u32>());
        let fingerprint = authority.issue_spiffe(self.sandbox.directory(), &name, id)?;
        let path = |end: &str| self.sandbox.directory().join(format!("{name}.{end}")).display().to_string();
        Ok((path("pem"), path("key"), fingerprint))
    }

    /// It lives, and is the one that it was.
    pub fn is_well(&self, pid: i32) -> Result<()> {
        let answer = self.answer(b"GET /v1/whoami HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        ensure!(self.daemon.control_pid()? == pid && !self.daemon.log().contains("panicked"), "{}", self.daemon.log());
        Ok(())
    }
}

fn a_peer_is_admitted_from_its_address_alone() -> Result<Verdict> {
    let scene = Scene::new("")?;
    let calls = Calls::new("192.0.2.1:7443", "192.0.2.1:7001", ["192.0.2.2", "192.0.2.3"])?;
    admitted_from_its_address_alone(&scene, &calls)?;
    Ok(Verdict::Ran)
}

fn a_peer_is_admitted_over_ipv6() -> Result<Verdict> {
    let scene = Scene::listening("[2001:db8::1]:7443", "")?;
    let calls = Calls::new("[2001:db8::1]:7443", "[2001:db8::1]:7001", ["2001:db8::2", "2001:db8::3"])?;
    admitted_from_its_address_alone(&scene, &calls)?;
    Ok(Verdict::Ran)
}

/// The sockets of both, listener and service, see an IPv4 caller as `::ffff:192.0.2.2`.
fn an_ipv4_peer_of_a_listener_for_both() -> Result<Verdict> {
    let scene = Scene::listening("[::]:7443", "")?;
    let _both = scene.sandbox.spawn("/db", &["serve-tcp", "[::]:7002"])?;
    let calls = Calls::new("192.0.2.1:7443", "192.0.2.1:7002", ["192.0.2.2", "192.0.2.3"])?;
    admitted_from_its_address_alone(&scene, &calls)?;
    drop(scene);
    let scene = Scene::listening("[::]:7443", "")?;
    let _both = scene.sandbox.spawn("/db", &["serve-tcp", "[::]:7002"])?;
    let calls = Calls::new("[2001:db8::1]:7443", "[2001:db8::1]:7002", ["2001:db8::2", "2001:db8::3"])?;
    admitted_from_its_address_alone(&scene, &calls)?;
    Ok(Verdict::Ran)
}

/// A proof of possession names the listener by its address, in brackets (RFC 3986, 3.2.2).
fn a_bound_token_is_shown_over_ipv6() -> Result<Verdict> {
    let scene = Scene::listening("[2001:db8::1]:7443", "")?;
    let issuer = Issuer::new("k1")?;
    std::fs::write(scene.sandbox.policy_directory().join("jwks.json"), issuer.jwks()?)?;
    scene.sandbox.write_policy(&format!("{POLICY}{BY_TOKEN}"))?;
    scene.daemon.must_apply()?;
    let key = rcgen::KeyPair::generate()?;
    let token = issuer.token(&json!({ "cnf": { "jkt": thumbprint(key.public_key_raw())? } }))?;
    let file = |name: &str| scene.sandbox.directory().join(name).display().to_string();
    std::fs::write(file("dpop.key"), key.serialize_pem())?;
    std::fs::write(file("token"), token)?;
    let shown = ["--rule", "partner-by-token", "--token-file", &file("token"), "--dpop-key", &file("dpop.key")];
    let granted = scene.grant_at(scene.listener, &shown)?;
    ensure!(granted["id"].is_string(), "{granted}");
    Ok(Verdict::Ran)
}

/// RFC 7638 of an uncompressed point on P-256.
fn thumbprint(point: &[u8]) -> Result<String> {
    let (x, y) = point.get(1..65).context("an uncompressed point")?.split_at(32);
    let (x, y) = (base64url::encode(x), base64url::encode(y));
    let text = format!(r#"{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}"#);
    Ok(base64url::encode(Digest::of(text.as_bytes()).as_bytes()))
}

/// With the certificate of the peer, from an address that is not the peer's.
fn a_peer_elsewhere_is_nobody() -> Result<Verdict> {
    for (listener, outside) in [(LISTENER, "192.0.2.200"), ("[2001:db8::1]:7443", "2001:db8::1:0:0:2")] {
        let scene = Scene::listening(listener, "")?;
        let (config, _) = scene.client_as(rustls::crypto::aws_lc_rs::default_provider(), &TLS13, PARTNER)?;
        let outside = outside.parse()?;
        let stream = scene.connect_from(outside)?;
        let (answer, _) = Scene::request_on(stream, &config.into(), "node.example.org", ASK)?;
        ensure!(answer.starts_with("HTTP/1.1 403") && answer.contains("rule_not_for_caller"), "{answer}");
        let refused = scene.daemon.wait_for("the refusal", |r| r.event == "grant_refused")?;
        ensure!(refused.remote_address == Some(outside), "{refused:?}");
        ensure!(!scene.reaches(outside, SocketAddr::new(scene.listener.ip(), 7001))?);
    }
    Ok(Verdict::Ran)
}

/// Of whom the policy says no more than what its certificate has to be.
fn a_peer_with_a_certificate_alone_calls_from_anywhere() -> Result<Verdict> {
    let scene = Scene::new("")?;
    let networks = "networks = [\"192.0.2.0/25\", \"2001:db8::/80\"]\n";
    ensure!(POLICY.contains(networks));
    scene.sandbox.write_policy(&POLICY.replace(networks, ""))?;
    scene.daemon.must_apply()?;
    let (outside, service) = ("192.0.2.200".parse()?, "192.0.2.1:7001".parse()?);
    let ask = |id: &str| -> Result<String> {
        let (config, _) = scene.client_as(rustls::crypto::aws_lc_rs::default_provider(), &TLS13, id)?;
        Ok(Scene::request_on(scene.connect_from(outside)?, &config.into(), "node.example.org", ASK)?.0)
    };
    ensure!(!scene.reaches(outside, service)?, "nothing was shown yet");
    explains(&scene, &["partner", "192.0.2.200"], service)?;
    let refused = ask("spiffe://partner.example/other")?;
    ensure!(refused.contains("certificate_not_allowed"), "{refused}");
    let granted = ask(PARTNER)?;
    ensure!(granted.starts_with("HTTP/1.1 201"), "{granted}");
    ensure!(scene.reaches(outside, service)?, "{}", scene.daemon.log());
    ensure!(!scene.reaches("192.0.2.2".parse()?, service)?, "another address, without a grant");
    let revoked = scene.daemon.command(&["revoke", "--json", "peer", "partner"])?;
    ensure!(String::from_utf8_lossy(&revoked.stdout).contains("\"grants\":1"), "{revoked:?}");
    ensure!(!scene.reaches(outside, service)?);
    ensure!(ask(PARTNER)?.contains("peer_revoked"));
    Ok(Verdict::Ran)
}

/// What `authd explain` says of these callers: that they have to show something first, as the rule requires.
fn explains(scene: &Scene, callers: &[&str], service: SocketAddr) -> Result<()> {
    for from in callers {
        let to = format!("{service}/tcp");
        let told = scene.daemon.command(&["explain", "--json", "--from", from, "--to", &to])?;
        let told: Value = serde_json::from_slice(&told.stdout).with_context(|| format!("{told:?}"))?;
        let is_right = told["reason"] == "proof_required" && told["rule"] == "partner-orders";
        ensure!(is_right && told["verdict"] == "denied", "{from}: {told}");
    }
    Ok(())
}

/// Where a peer asks, what it calls then, and from where it may.
struct Calls {
    listener: SocketAddr,
    service: SocketAddr,
    own: [IpAddr; 2],
}

impl Calls {
    fn new(listener: &str, service: &str, own: [&str; 2]) -> Result<Self> {
        Ok(Self { listener: listener.parse()?, service: service.parse()?, own: [own[0].parse()?, own[1].parse()?] })
    }
}

fn admitted_from_its_address_alone(scene: &Scene, calls: &Calls) -> Result<()> {
    let ask = |id: &str| scene.ask_at(calls.listener, id);
    let reaches = |from: IpAddr| scene.reaches(from, calls.service);
    ensure!(!reaches(calls.own[0])?, "nothing was shown yet");
    explains(scene, &[&calls.own[0].to_string(), "partner"], calls.service)?;
    let refused = ask("spiffe://partner.example/other")?;
    ensure!(refused["reason"] == "certificate_not_allowed", "{refused}");
    let refused = ask("spiffe://example.org/billing")?;
    ensure!(refused["reason"] == "wrong_trust_domain", "{refused}");
    ensure!(!reaches(calls.own[0])?, "nothing good was shown yet");

    let granted = ask(PARTNER)?;
    let id = granted["id"].as_str().with_context(|| granted.to_string())?.to_owned();
    let issued = scene.daemon.wait_for("the grant", |r| r.event == "grant_issued")?;
    let address = issued.remote_address.context("an address")?;
    ensure!(issued.workload.is_none() && issued.proofs[0].spiffe_id.as_deref() == Some(PARTNER), "{issued:?}");
    ensure!(calls.own.contains(&address) && issued.remote_port.is_some(), "{issued:?}");
    // Which of its addresses a client calls from is the kernel's choice.
    let other = if address == calls.own[0] { calls.own[1] } else { calls.own[0] };
    ensure!(reaches(address)?, "{granted}\n{}", scene.daemon.log());
    ensure!(!reaches(other)?, "another address of the same network, without a grant");
    let opened = scene.daemon.wait_for("the flow", |r| r.event == "flow_opened" && r.grant.is_some())?;
    ensure!(opened.grant.as_deref() == Some(&id) && opened.peer_workload.is_none(), "{opened:?}");
    ensure!(opened.remote_address == Some(address) && opened.local_port == Some(calls.service.port()), "{opened:?}");

    let (from, to) = (SocketAddr::new(address, 0).to_string(), calls.service.to_string());
    let mut held = scene.sandbox.spawn_in("/elsewhere", &scene.far, &["hold-tcp", &to, "--from", &from])?;
    ensure!(held.again()?.ok);
    let revoked = scene.daemon.command(&["revoke", "--json", "peer", "partner"])?;
    let effect: Value = serde_json::from_slice(&revoked.stdout)?;
    ensure!(effect["grants"] == 1 && effect["destroyed"].as_u64() >= Some(1), "{effect}\n{}", scene.daemon.log());
    ensure!(!held.again()?.ok);
    let ended = scene.daemon.wait_for("the end", |r| r.event == "grant_revoked")?;
    ensure!(ended.remote_address == Some(address) && ended.grant.as_deref() == Some(&id), "{ended:?}");
    ensure!(!reaches(address)?);
    ensure!(ask(PARTNER)?["reason"] == "peer_revoked");
    scene.daemon.command(&["revoke", "--undo", "peer", "partner"])?;
    ensure!(ask(PARTNER)?["id"].is_string());
    ensure!(reaches(address)?);
    Ok(())
}

fn the_listener_refuses_odd_requests() -> Result<Verdict> {
    let scene = Scene::new("")?;
    let pid = scene.daemon.control_pid()?;
    let get = "GET /v1/whoami HTTP/1.1\r\nHost: a\r\n";
    let post = "POST /v1/grants HTTP/1.1\r\nHost: a\r\n";
    let body = r#"{"rule":"x"}"#;
    let smuggled = "GET /v1/whoami HTTP/1.1\r\nHost: smuggled\r\n\r\n";
    for (what, request, statuses) in [
        ("headers that never end", format!("{get}X-A: b\r\n"), &["", "408"][..]),
        ("a long header", format!("{get}X-A: {}\r\n\r\n", "b".repeat(64 << 10)), &["", "431", "400"]),
        ("many headers", format!("{get}{}\r\n", "A: b\r\n".repeat(1000)), &["", "431", "400"]),
        (
            "a long path",
            format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "a".repeat(64 << 10)),
            &["", "414", "431", "400"],
        ),
        ("a body that is announced as huge", format!("{post}Content-Length: 1000000000\r\n\r\n{body}"), &["413"]),
        (
            "a chunk that is announced as huge",
            format!("{post}Transfer-Encoding: chunked\r\n\r\nfffffff\r\n{body}"),
            &["413", "400", "503", ""],
        ),
        ("two lengths", format!("{post}Content-Length: 12\r\nContent-Length: 13\r\n\r\n{body}{smuggled}"), &["400"]),
        (
            "a length and chunks",
            format!("{post}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}"),
            &["400"],
        ),
        ("an unknown encoding", format!("{post}Transfer-Encoding: identity\r\n\r\n{body}{smuggled}"), &["400"]),
        ("a space before the colon", format!("{post}Content-Length : 12\r\n\r\n{body}"), &["400"]),
        ("a folded header", format!("{post}Content-Length:\r\n 12\r\n\r\n{body}"), &["400"]),
        ("a control character", format!("{get}X-A: a\0b\r\n\r\n"), &["400"]),
        ("an old version", "GET /v1/whoami HTTP/0.9\r\n\r\n".to_owned(), &["400", "505"]),
        ("no request at all", "\x00\x01\x02\x03\r\n\r\n".to_owned(), &["400", ""]),
        (
            "the preface of HTTP/2, and nonsense",
            format!("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n{}", "\u{1}".repeat(100)),
            &["", "\0"],
        ),
    ] {
        let answer = scene.answer(request.as_bytes()).with_context(|| what.to_owned())?;
        let status = answer.strip_prefix("HTTP/1.1 ").map_or(answer.get(..1).unwrap_or(""), |rest| &rest[..3]);
        ensure!(statuses.contains(&status), "{what}: {answer:?}");
        ensure!(!answer.contains("unmanaged"), "{what}: what was hidden in it was answered: {answer}");
    }
    for (what, request, reason) in [
        ("no body", format!("{post}Content-Length: 0\r\nConnection: close\r\n\r\n"), "bad_request"),
        ("not an object", format!("{post}Content-Length: 2\r\nConnection: close\r\n\r\n[]"), "bad_request"),
        ("no such path", "GET /v1/x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".to_owned(), "not_found"),
        (
            "another method",
            "PUT /v1/whoami HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".to_owned(),
            "method_not_allowed",
        ),
    ] {
        let answer = scene.answer(request.as_bytes())?;
        ensure!(answer.contains(&format!("\"reason\":\"{reason}\"")), "{what}: {answer}");
        ensure!(answer.contains("application/problem+json"), "{what}: {answer}");
    }
    scene.is_well(pid)?;
    Ok(Verdict::Ran)
}

fn a_crowd_keeps_nobody_else_out() -> Result<Verdict> {
    const MORE_THAN_ONE_MAY: usize = 300;
    let scene = Scene::new("")?;
    let crowd: Vec<UnixStream> = (0..MORE_THAN_ONE_MAY).map(|_| scene.local()).collect::<Result<_>>()?;
    wait_until("the last one is closed", || {
        let last = &crowd[MORE_THAN_ONE_MAY - 1];
        last.set_read_timeout(Some(Duration::from_millis(100)))?;
        Ok((&*last).read(&mut [0; 1]).is_ok_and(|length| length == 0))
    })?;
    // Another caller.
    let outcome = scene.sandbox.authd_in("/db", &["whoami", "--json"])?;
    ensure!(outcome.detail.contains("\"workload\""), "{outcome:?}");
    // And the same one, when the others are gone.
    drop(crowd);
    wait_until("there is room again", || {
        let answer = scene.answer(b"GET /v1/health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
        Ok(answer.starts_with("HTTP/1.1 200"))
    })?;
    Ok(Verdict::Ran)
}

fn operators_revoke_over_http() -> Result<Verdict> {
    let scene = Scene::new("")?;
    let body = r#"{"kind":"peer","value":"partner","reason":"a test"}"#;
    let request = format!(
        "POST /v1/revocations HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer = scene.answer(request.as_bytes())?;
    ensure!(answer.contains("403") && answer.contains("not_an_operator"), "{answer}");
    ensure!(scene.ask(PARTNER)?["id"].is_string());
    let mut stream = UnixStream::connect(scene.sandbox.directory().join("admin.sock"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 201") && answer.contains("\"grants\":1"), "{answer}");
    ensure!(scene.ask(PARTNER)?["reason"] == "peer_revoked");
    scene.daemon.wait_for("the record", |r| r.event == "revoked" && r.uid == Some(0))?;
    Ok(Verdict::Ran)
}
