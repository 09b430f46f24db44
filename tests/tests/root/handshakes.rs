//! Handshakes that the listener for peers has to survive, and what it refuses before anybody has said who he is.

use std::{
    io::{Read, Write},
    sync::Arc,
};

use anyhow::{Context, Result, bail, ensure};
use authd::digest::Digest;
use authd_tests::tls::{self, ALERT, Established, HANDSHAKE, hello, names};
use libtest_mimic::Trial;
use rustls::{
    ClientConnection, HandshakeKind,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
    version::{TLS12, TLS13},
};

use crate::{
    Verdict,
    peers::{ASK, PARTNER, Scene},
    trial,
};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("the_listener_refuses_odd_handshakes", the_listener_refuses_odd_handshakes),
        trial("the_listener_answers_to_its_own_names_only", the_listener_answers_to_its_own_names_only),
        trial("the_listener_speaks_its_own_protocols_only", the_listener_speaks_its_own_protocols_only),
        trial("a_renegotiation_is_refused_and_swaps_no_certificate", a_renegotiation_is_refused),
        trial("no_session_is_resumed_after_a_revocation_or_before", no_session_is_resumed),
    ]
}

const OWN: &[u8] = b"node.example.org";
const WHOAMI: &str = "GET /v1/whoami HTTP/1.1\r\nHost: node.example.org\r\n\r\n";

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

/// What comes back for a hello: the kind of the first record, if there is one before the end.
fn answer(scene: &Scene, hello: &[u8]) -> Result<Option<(u8, Vec<u8>)>> {
    let mut stream = scene.connect()?;
    // It may be refused before all of it is written.
    let _ = stream.write_all(&tls::records(hello));
    tls::record(&mut stream)
}

fn the_listener_answers_to_its_own_names_only() -> Result<Verdict> {
    let scene = Scene::new("")?;
    let pid = scene.daemon.control_pid()?;
    let long = [&[b'a'; 60][..]; 4].join(&b'.');
    let endless = vec![b'a'; 60_000];
    let of_host = |name: &[u8]| names(&[(0, name)]);
    for (what, list, passes) in [
        ("no name", None, true),
        ("its name", Some(of_host(OWN)), true),
        ("its name in capitals", Some(of_host(b"NODE.Example.ORG")), true),
        ("an address, which is no name (RFC 6066, 3)", Some(of_host(b"192.0.2.1")), true),
        ("a name above its own", Some(of_host(b"example.org")), false),
        ("a name below its own", Some(of_host(b"a.node.example.org")), false),
        ("its name in front of another", Some(of_host(b"node.example.org.other.example")), false),
        ("a wildcard", Some(of_host(b"*.example.org")), false),
        ("its name, a NUL and another", Some(of_host(b"node.example.org\0.other.example")), false),
        ("a space behind it", Some(of_host(b"node.example.org ")), false),
        ("an empty name", Some(of_host(b"")), false),
        ("no name in the list", Some(names(&[])), false),
        ("two names, the first its own", Some(names(&[(0, OWN), (0, b"other.example.org")])), false),
        ("two names, the second its own", Some(names(&[(0, b"other.example.org"), (0, OWN)])), false),
        ("a name of another kind", Some(names(&[(1, OWN)])), false),
        ("a list that is shorter than it says", Some(names(&[(0, OWN)])[..6].to_vec()), false),
        ("bytes behind the list", Some([&names(&[(0, OWN)])[..], b"x"].concat()), false),
        ("a name as long as names are", Some(of_host(&long)), false),
        ("a name that is longer than any", Some(of_host(&[b'a'; 300])), false),
        ("a name of several records", Some(of_host(&endless)), false),
    ] {
        let hello = hello(list.as_deref(), None, true);
        match answer(&scene, &hello).with_context(|| what.to_owned())? {
            Some((HANDSHAKE, _)) if passes => {}
            Some((ALERT, _)) | None if !passes => {}
            other => bail!("{what}: {other:?}"),
        }
    }
    let refused = |reason: &'static str| {
        scene.daemon.wait_for(reason, |r| {
            r.event == "caller_refused" && r.reason.as_deref() == Some(reason) && r.remote_address.is_some()
        })
    };
    refused("wrong_server_name")?;
    refused("handshake_failed")?;

    // Asked to say it again, a client names another server.
    for (second, passes) in [(OWN, true), (b"other.example.org", false)] {
        let mut stream = scene.connect()?;
        stream.write_all(&tls::records(&hello(Some(&of_host(OWN)), None, false)))?;
        ensure!(matches!(tls::record(&mut stream)?, Some((HANDSHAKE, _))), "it asks again");
        stream.write_all(&tls::records(&hello(Some(&of_host(second)), None, true)))?;
        // For the sake of old middle boxes (RFC 8446, D.4).
        let mut next = tls::record(&mut stream)?;
        while matches!(next, Some((20, _))) {
            next = tls::record(&mut stream)?;
        }
        let went_on = matches!(next, Some((HANDSHAKE, _)));
        ensure!(went_on == passes, "{}: {next:?}", String::from_utf8_lossy(second));
    }
    scene.is_well(pid)?;
    Ok(Verdict::Ran)
}

fn the_listener_speaks_its_own_protocols_only() -> Result<Verdict> {
    let scene = Scene::new("")?;
    let pid = scene.daemon.control_pid()?;
    let many: Vec<Vec<u8>> = (0..200).map(|n| [&[b'a'; 200][..], &[n]].concat()).collect();
    for (what, offered, passes) in [
        ("none", vec![], true),
        ("HTTP/1.1", vec![b"http/1.1".to_vec()], true),
        ("something else, and HTTP/1.1", vec![b"foo".to_vec(), b"http/1.1".to_vec()], true),
        ("something else", vec![b"foo".to_vec()], false),
        ("an old version", vec![b"http/1.0".to_vec()], false),
        ("another spelling", vec![b"HTTP/1.1".to_vec()], false),
        ("HTTP/2 without TLS", vec![b"h2c".to_vec()], false),
        ("many others", many, false),
    ] {
        let mut config = scene.client(&TLS13)?;
        config.alpn_protocols = offered;
        match scene.handshake(config, "node.example.org") {
            Ok(()) => ensure!(passes, "{what}"),
            Err(error) => {
                ensure!(!passes && format!("{error:#}").contains("NoApplicationProtocol"), "{what}: {error:#}")
            }
        }
    }
    for (what, list) in [
        ("no protocol in the list", tls::protocols(&[])),
        ("an empty one", tls::protocols(&[b"http/1.1", b""])),
        ("a list that is shorter than it says", tls::protocols(&[b"http/1.1"])[..6].to_vec()),
    ] {
        let answered = answer(&scene, &hello(None, Some(&list), true))?;
        ensure!(matches!(answered, Some((ALERT, _)) | None), "{what}: {answered:?}");
    }
    scene.is_well(pid)?;
    Ok(Verdict::Ran)
}

/// As TLS 1.2 had it: a second handshake inside the first one's connection, by a client that may be somebody else then.
fn a_renegotiation_is_refused() -> Result<Verdict> {
    // Level and description of alerts (RFC 5246, 7.2).
    const NO_RENEGOTIATION: [u8; 2] = [1, 100];
    const AT_MOST: usize = 16;
    let scene = Scene::new("control.tls12 = true\n")?;
    let pid = scene.daemon.control_pid()?;
    let establish = || {
        let (config, _) = scene.client_as(Established::provider(), &TLS12, PARTNER)?;
        let mut client = Established::new(config, "node.example.org", scene.connect()?)?;
        ensure!(client.request(WHOAMI)?.contains(PARTNER), "it is who it is");
        anyhow::Ok(client)
    };
    let (other, _, _) = scene.certificate("spiffe://partner.example/other")?;
    let other = CertificateDer::from_pem_file(other)?;
    let hello = hello(Some(&names(&[(0, OWN)])), None, true);

    let mut client = establish()?;
    client.send(HANDSHAKE, &hello)?;
    let refused = client.receive()?;
    ensure!(refused == Some((ALERT, NO_RENEGOTIATION.to_vec())), "{refused:?}");
    // The connection is still that of whoever made it; not so after another attempt.
    ensure!(client.request(WHOAMI)?.contains(PARTNER));
    let mut attempts = 1;
    loop {
        // Where the other end has gone, this fails.
        let sent = client.send(HANDSHAKE, &hello);
        if sent.is_err() || client.receive()?.is_none_or(|(kind, alert)| kind == ALERT && alert[0] == 2) {
            break;
        }
        attempts += 1;
        ensure!(attempts < AT_MOST, "it may try without end");
    }
    ensure!(attempts == 1, "after {attempts} attempts");

    // The certificate of somebody else, out of turn: with a hello before it, and without.
    let list = [&[0][..], &(other.len() as u16).to_be_bytes(), &other].concat();
    let both = [&[0][..], &(list.len() as u16).to_be_bytes(), &list].concat();
    let certificate = [&[11, 0][..], &(both.len() as u16).to_be_bytes(), &both].concat();
    for with_hello in [true, false] {
        let mut client = establish()?;
        if with_hello {
            client.send(HANDSHAKE, &hello)?;
            client.receive()?;
        }
        client.send(HANDSHAKE, &certificate)?;
        let end = client.receive()?;
        ensure!(end.as_ref().is_none_or(|(kind, alert)| *kind == ALERT && alert[0] == 2), "{end:?}");
        ensure!(client.request(WHOAMI).is_err(), "the connection goes on");
    }
    scene.is_well(pid)?;
    establish()?;
    Ok(Verdict::Ran)
}

/// A session that is taken up again would carry the certificate of the first one.
fn no_session_is_resumed() -> Result<Verdict> {
    let scene = Scene::new("control.tls12 = true\n")?;
    for version in [&TLS13, &TLS12] {
        let (config, leaf) = scene.client_as(default_provider(), version, PARTNER)?;
        // It keeps whatever tickets and sessions it is given.
        let config = Arc::new(config);
        for turn in 0..3 {
            let (answer, kind) = scene.request(&config, "node.example.org", ASK)?;
            ensure!(kind == Some(HandshakeKind::Full), "{version:?}, {turn}: {kind:?}");
            ensure!(answer.starts_with("HTTP/1.1 201"), "{answer}");
        }
        let fingerprint = Digest::of(&leaf).to_string();
        let revoked = scene.daemon.command(&["revoke", "--json", "cert", &fingerprint])?;
        ensure!(String::from_utf8_lossy(&revoked.stdout).contains("\"grants\":3"), "{revoked:?}");
        let (answer, kind) = scene.request(&config, "node.example.org", ASK)?;
        ensure!(kind == Some(HandshakeKind::Full), "{version:?}: {kind:?}");
        ensure!(answer.starts_with("HTTP/1.1 403") && answer.contains("certificate_revoked"), "{answer}");
    }
    Ok(Verdict::Ran)
}
