//! OpenSSL's own client against the listener for peers: what others' software does with what it is allowed to ask for.

use std::{
    io::{Read, Write},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::{JoinHandle, spawn},
};

use anyhow::{Context, Result, ensure};
use authd::digest::Digest;
use authd_tests::others;
use libtest_mimic::Trial;

use crate::{
    Verdict,
    peers::{ASK, LISTENER, PARTNER, Scene},
    reload::wait_until,
    trial,
};

/// Only where there are programs of others: emulated machines have none.
pub fn trials() -> Vec<Trial> {
    if others::directory().is_none() {
        return Vec::new();
    }
    vec![
        trial("openssl_cannot_renegotiate", openssl_cannot_renegotiate),
        trial("openssl_gets_no_session_to_resume", openssl_gets_no_session_to_resume),
        trial("openssl_is_refused_what_the_listener_does_not_speak", openssl_is_refused),
    ]
}

const WHOAMI: &str = "GET /v1/whoami HTTP/1.1\r\nHost: node.example.org\r\n\r\n";

/// `openssl s_client`, from the other network namespace. Ended when dropped.
struct Client {
    child: Child,
    input: ChildStdin,
    said: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

impl Client {
    fn new(scene: &Scene, arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new("openssl");
        command.args(["s_client", "-connect", LISTENER, "-verify_return_error", "-CAfile"]).arg(&scene.ca);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = scene.far.within(|| command.spawn().context("starting openssl"))?;
        let said = Arc::new(Mutex::new(String::new()));
        let input = child.stdin.take().context("the pipe was asked for")?;
        let output = child.stdout.take().context("the pipe was asked for")?;
        let errors = child.stderr.take().context("the pipe was asked for")?;
        let readers = vec![listen(output, said.clone()), listen(errors, said.clone())];
        Ok(Self { child, input, said, readers })
    }

    /// On both of its outputs, so far.
    fn said(&self) -> String {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn tell(&mut self, text: &str) -> Result<()> {
        Ok(self.input.write_all(text.as_bytes())?)
    }

    fn hears(&self, text: &str) -> Result<()> {
        wait_until(text, || Ok(self.said().contains(text))).with_context(|| self.said())
    }

    /// All that it said, when it has ended by itself because the other side did.
    fn end(mut self) -> Result<String> {
        wait_until("its end", || Ok(self.child.try_wait()?.is_some())).with_context(|| self.said())?;
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        Ok(self.said())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn listen(mut pipe: impl Read + Send + 'static, said: Arc<Mutex<String>>) -> JoinHandle<()> {
    spawn(move || {
        let mut part = [0; 4096];
        while let Ok(length @ 1..) = pipe.read(&mut part) {
            *said.lock().unwrap_or_else(PoisonError::into_inner) += &String::from_utf8_lossy(&part[..length]);
        }
    })
}

fn openssl_cannot_renegotiate() -> Result<Verdict> {
    let scene = Scene::new("control.tls12 = true\n")?;
    let pid = scene.daemon.control_pid()?;
    let (cert, key, _) = scene.certificate(PARTNER)?;
    for more in [&[][..], &["-legacy_renegotiation"]] {
        let arguments = [&["-tls1_2", "-cert", &cert, "-key", &key], more].concat();
        let mut client = Client::new(&scene, &arguments)?;
        client.tell(WHOAMI)?;
        client.hears(PARTNER)?;
        // Its sign for a handshake inside the connection.
        client.tell("R\n")?;
        client.hears("RENEGOTIATING")?;
        let said = client.end()?;
        ensure!(said.contains("no renegotiation"), "{said}");
    }
    scene.is_well(pid)?;
    Ok(Verdict::Ran)
}

fn openssl_gets_no_session_to_resume() -> Result<Verdict> {
    let scene = Scene::new("control.tls12 = true\n")?;
    for version in ["-tls1_3", "-tls1_2"] {
        let (cert, key, fingerprint) = scene.certificate(PARTNER)?;
        let session = scene.sandbox.directory().join(format!("session{version}"));
        let path = session.display().to_string();
        let shown = [version, "-servername", "node.example.org", "-cert", &cert, "-key", &key];
        let exchange = |arguments: &[&str]| -> Result<String> {
            let mut client = Client::new(&scene, arguments)?;
            client.tell(ASK)?;
            client.end()
        };
        let said = exchange(&[&shown[..], &["-sess_out", &path]].concat())?;
        ensure!(said.contains("HTTP/1.1 201"), "{said}");
        // What it would be worth to somebody without the key.
        let stolen = match session.exists() {
            true => exchange(&[version, "-servername", "node.example.org", "-sess_in", &path])?,
            false => String::new(),
        };
        ensure!(!session.exists(), "a session was given out, and taken back:\n{stolen}");
        let fingerprint = Digest::from_bytes(fingerprint).to_string();
        let revoked = scene.daemon.command(&["revoke", "--json", "cert", &fingerprint])?;
        ensure!(String::from_utf8_lossy(&revoked.stdout).contains("\"grants\":1"), "{revoked:?}");
        let said = exchange(&shown)?;
        ensure!(said.contains("New, TLSv1.") && !said.contains("Reused"), "{said}");
        ensure!(said.contains("HTTP/1.1 403") && said.contains("certificate_revoked"), "{said}");
    }
    Ok(Verdict::Ran)
}

fn openssl_is_refused() -> Result<Verdict> {
    let scene = Scene::new("")?;
    let pid = scene.daemon.control_pid()?;
    let endless = format!("{}.example.org", ["a".repeat(60), "b".repeat(60), "c".repeat(60)].join("."));
    for (what, arguments, alert) in [
        ("TLS 1.2", &["-tls1_2"][..], "alert protocol version"),
        ("another protocol", &["-alpn", "foo"], "alert no application protocol"),
        // No alert: whoever asks for another server is told nothing of this one.
        ("another name", &["-servername", "other.example.org"], "unexpected eof"),
        ("a long name", &["-servername", &endless], "unexpected eof"),
    ] {
        let said = Client::new(&scene, arguments)?.end()?;
        ensure!(said.contains(alert) && said.contains("no peer certificate available"), "{what}: {said}");
    }
    for arguments in [&["-noservername"][..], &["-servername", "node.example.org", "-alpn", "foo,h2"]] {
        let mut client = Client::new(&scene, arguments)?;
        client.hears("Verify return code: 0 (ok)")?;
        client.tell("Q\n")?;
        client.end()?;
    }
    scene.is_well(pid)?;
    Ok(Verdict::Ran)
}
