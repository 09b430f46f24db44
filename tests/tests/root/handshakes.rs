//! Handshakes that the listener for peers has to survive, and what it refuses before anybody has said who he is.

use std::{
    io::{Read, Write},
    sync::Arc,
};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use rustls::{
    ClientConnection,
    pki_types::ServerName,
    version::{TLS12, TLS13},
};

use crate::{Verdict, peers::Scene, trial};

pub fn trials() -> Vec<Trial> {
    vec![trial("the_listener_refuses_odd_handshakes", the_listener_refuses_odd_handshakes)]
}

fn the_listener_refuses_odd_handshakes() -> Result<Verdict> {
    let scene = Scene::new("")?;
    let pid = scene.daemon.control_pid()?;
    scene.handshake(scene.client(&TLS13)?, "192.0.2.1")?;
    scene.handshake(scene.client(&TLS13)?, "node.example.org")?;
    // TLS 1.2 is not configured; another name than its own; a protocol that it does not speak.
    ensure!(scene.handshake(scene.client(&TLS12)?, "192.0.2.1").is_err(), "TLS 1.2");
    let mut blind = scene.client(&TLS13)?;
    blind.dangerous().set_certificate_verifier(Arc::new(authd::client::Local));
    ensure!(scene.handshake(blind, "other.example.org").is_err(), "a name that it does not have");
    scene.daemon.wait_for("the name", |r| r.reason.as_deref() == Some("wrong_server_name"))?;
    let mut ftp = scene.client(&TLS13)?;
    ftp.alpn_protocols = vec![b"ftp".to_vec()];
    ensure!(scene.handshake(ftp, "192.0.2.1").is_err(), "a protocol that it does not speak");
    let mut old = scene.client(&TLS13)?;
    old.alpn_protocols = vec![b"ftp".to_vec(), b"http/1.1".to_vec()];
    scene.handshake(old, "192.0.2.1")?;

    let mut hello = Vec::new();
    let config = Arc::new(scene.client(&TLS13)?);
    ClientConnection::new(config, ServerName::try_from("192.0.2.1")?)?.write_tls(&mut hello)?;
    let endless = [&[22, 3, 1, 0xff, 0xff][..], &[1; 70_000]].concat();
    let fragments: Vec<u8> = hello[5..].iter().flat_map(|byte| [22, 3, 1, 0, 1, *byte]).collect();
    for (what, bytes) in [
        ("plain HTTP", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("the first half of a hello", hello[..hello.len() / 2].to_vec()),
        ("a record that is too long", endless),
        ("records of one byte, and then nothing", fragments[..fragments.len() / 2].to_vec()),
        ("an alert", vec![21, 3, 3, 0, 2, 2, 40]),
        ("nothing", Vec::new()),
    ] {
        let mut stream = scene.connect()?;
        let _ = stream.write_all(&bytes);
        let mut answer = Vec::new();
        // It waits for a while, then closes; whoever keeps the connection open gains nothing.
        match stream.read_to_end(&mut answer) {
            Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => return Err(error).context(what),
            _ => ensure!(answer.len() < 100, "{what}: {answer:?}"),
        }
    }
    scene.daemon.wait_for("a slow handshake", |r| r.reason.as_deref() == Some("handshake_timeout"))?;
    scene.daemon.wait_for("a failed handshake", |r| r.reason.as_deref() == Some("handshake_failed"))?;
    scene.is_well(pid)?;

    drop(scene);
    let scene = Scene::new("control.tls12 = true\n")?;
    scene.handshake(scene.client(&TLS12)?, "192.0.2.1").context("TLS 1.2 is configured")?;
    Ok(Verdict::Ran)
}
