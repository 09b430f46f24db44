//! Callers from other nodes on the listener: admission by certificate for an address, and requests that it has to survive.
//! Handshakes that it has to survive are in `handshakes`.

use std::{
    fs::File,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use authd_tests::{
    daemon::{Daemon, PATIENCE},
    netns::Netns,
    sandbox::Sandbox,
    trust::Authority,
};
use libtest_mimic::Trial;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use serde_json::Value;

use crate::{Verdict, reload::wait_until, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("a_peer_is_admitted_from_its_address_alone", a_peer_is_admitted_from_its_address_alone),
        trial("the_listener_refuses_odd_requests", the_listener_refuses_odd_requests),
        trial("a_crowd_of_connections_keeps_nobody_else_out", a_crowd_keeps_nobody_else_out),
        trial("operators_revoke_over_http_and_others_do_not", operators_revoke_over_http),
    ]
}

const POLICY: &str = r#"
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
networks = ["192.0.2.0/25"]
spiffe_id = "spiffe://partner.example/billing"
[[service]]
name = "orders"
workload = "db"
ports = ["tcp/7001"]
[[rule]]
name = "partner-orders"
from = ["partner"]
to = ["orders"]
require = ["mtls"]
grant_ttl = "10m"
"#;

pub const LISTENER: &str = "192.0.2.1:7443";

pub struct Scene {
    pub sandbox: Sandbox,
    pub daemon: Daemon,
    pub far: Netns,
    pub authority: Authority,
    pub ca: PathBuf,
    _server: authd_tests::probe::Running,
}

impl Scene {
    pub fn new(settings: &str) -> Result<Self> {
        let sandbox = Sandbox::new()?;
        let far = sandbox.another_netns("far")?;
        let far_addresses = ["192.0.2.2/24", "192.0.2.3/24", "192.0.2.200/24"];
        sandbox.netns.join(&far, ("near0", "far0"), (&["192.0.2.1/24"], &far_addresses))?;
        let authority = Authority::new("tests")?;
        std::fs::write(sandbox.policy_directory().join("partners.crt"), authority.pem())?;
        let ca = sandbox.directory().join("ca.pem");
        std::fs::write(&ca, authority.pem())?;
        let names = vec![
            rcgen::SanType::DnsName("node.example.org".try_into()?),
            rcgen::SanType::IpAddress("192.0.2.1".parse()?),
        ];
        authority.issue(sandbox.directory(), "listener", names)?;
        let file = |name: &str| sandbox.directory().join(name);
        sandbox.add_settings(&format!(
            "control.listen = {LISTENER:?}\ncontrol.certificate = {:?}\ncontrol.key = {:?}\n{settings}",
            file("listener.pem"),
            file("listener.key"),
        ))?;
        sandbox.write_policy(POLICY)?;
        let daemon = Daemon::start_inside(&sandbox)?;
        wait_until("the control process", || Ok(daemon.status()?.control_ready)).with_context(|| daemon.log())?;
        let server = sandbox.spawn("/db", &["serve-tcp", "192.0.2.1:7001"])?;
        Ok(Self { sandbox, daemon, far, authority, ca, _server: server })
    }

    /// `authd grant` from elsewhere, with a certificate for a SPIFFE ID.
    pub fn ask(&self, id: &str) -> Result<Value> {
        let name = format!("peer-{:x}", rand::random::<u32>());
        self.authority.issue_spiffe(self.sandbox.directory(), &name, id)?;
        let path = |end: &str| self.sandbox.directory().join(format!("{name}.{end}")).display().to_string();
        let (cert, key, ca) = (path("pem"), path("key"), self.ca.display().to_string());
        let url = format!("https://{LISTENER}");
        let arguments =
            ["grant", "--json", "--rule", "partner-orders", "--url", &url, "--ca", &ca, "--cert", &cert, "--key", &key];
        let outcome = self.sandbox.authd_in_netns("/elsewhere", &self.far, &arguments)?;
        serde_json::from_str(outcome.detail.trim()).with_context(|| format!("{outcome:?}\n{}", self.daemon.log()))
    }

    fn reaches(&self, from: &str) -> Result<bool> {
        let from = format!("{from}:0");
        let arguments = ["tcp", "192.0.2.1:7001", "--from", &from, "--timeout-ms", "500"];
        // A blocking connect waits for minutes: the attempt is given up from outside.
        let mut attempt = self.sandbox.spawn_quietly_in("/elsewhere", &self.far, &arguments)?;
        let outcome = attempt.next_within(Duration::from_millis(2_500))?;
        Ok(outcome.is_some_and(|outcome| outcome.ok))
    }

    /// Does something in the far network namespace.
    pub fn in_far<T: Send>(&self, action: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let netns = File::open(self.far.path())?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET)?;
                action()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    pub fn connect(&self) -> Result<TcpStream> {
        let address: SocketAddr = LISTENER.parse()?;
        let stream = self.in_far(|| Ok(TcpStream::connect(address)?))?;
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
        let mut stream = self.connect()?;
        let mut client = ClientConnection::new(Arc::new(config), ServerName::try_from(name.to_owned())?)?;
        // In TLS 1.3 the client is done before the server has answered: reading shows what that one says.
        let mut tls = rustls::Stream::new(&mut client, &mut stream);
        tls.write_all(b"GET /v1/health HTTP/1.1\r\nHost: 192.0.2.1:7443\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        let _ = tls.read_to_string(&mut answer);
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
        Ok(())
    }

    pub fn client(&self, version: &'static rustls::SupportedProtocolVersion) -> Result<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.authority.pem().as_bytes())?)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[version])?;
        Ok(config.with_root_certificates(roots).with_no_client_auth())
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
    const ID: &str = "spiffe://partner.example/billing";
    let scene = Scene::new("")?;
    ensure!(!scene.reaches("192.0.2.2")?, "nothing was shown yet");
    let refused = scene.ask("spiffe://partner.example/other")?;
    ensure!(refused["reason"] == "certificate_not_allowed", "{refused}");
    let refused = scene.ask("spiffe://example.org/billing")?;
    ensure!(refused["reason"] == "wrong_trust_domain", "{refused}");
    ensure!(!scene.reaches("192.0.2.2")?, "nothing good was shown yet");

    let granted = scene.ask(ID)?;
    let id = granted["id"].as_str().with_context(|| granted.to_string())?.to_owned();
    let issued = scene.daemon.wait_for("the grant", |r| r.event == "grant_issued")?;
    let address = issued.remote_address.context("an address")?.to_string();
    ensure!(issued.workload.is_none() && issued.proofs[0].spiffe_id.as_deref() == Some(ID), "{issued:?}");
    // Which of its addresses a client calls from is the kernel's choice.
    let other = if address == "192.0.2.2" { "192.0.2.3" } else { "192.0.2.2" };
    ensure!(scene.reaches(&address)?, "{granted}\n{}", scene.daemon.log());
    ensure!(!scene.reaches(other)?, "another address of the same network, without a grant");
    let opened = scene.daemon.wait_for("the flow", |r| r.event == "flow_opened" && r.grant.is_some())?;
    ensure!(opened.grant.as_deref() == Some(&id) && opened.peer_workload.is_none(), "{opened:?}");

    let from = format!("{address}:0");
    let mut held =
        scene.sandbox.spawn_in("/elsewhere", &scene.far, &["hold-tcp", "192.0.2.1:7001", "--from", &from])?;
    ensure!(held.again()?.ok);
    let revoked = scene.daemon.command(&["revoke", "--json", "peer", "partner"])?;
    let effect: Value = serde_json::from_slice(&revoked.stdout)?;
    ensure!(effect["grants"] == 1 && effect["destroyed"].as_u64() >= Some(1), "{effect}\n{}", scene.daemon.log());
    ensure!(!held.again()?.ok);
    ensure!(!scene.reaches(&address)?);
    ensure!(scene.ask(ID)?["reason"] == "peer_revoked");
    scene.daemon.command(&["revoke", "--undo", "peer", "partner"])?;
    ensure!(scene.ask(ID)?["id"].is_string());
    ensure!(scene.reaches(&address)?);
    Ok(Verdict::Ran)
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
    ensure!(scene.ask("spiffe://partner.example/billing")?["id"].is_string());
    let mut stream = UnixStream::connect(scene.sandbox.directory().join("admin.sock"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 201") && answer.contains("\"grants\":1"), "{answer}");
    ensure!(scene.ask("spiffe://partner.example/billing")?["reason"] == "peer_revoked");
    scene.daemon.wait_for("the record", |r| r.event == "revoked" && r.uid == Some(0))?;
    Ok(Verdict::Ran)
}
