//! The side that dials: whom it speaks to, and what it takes for an answer.

use super::*;

#[tokio::test]
async fn both_ends_have_the_same_key_and_no_two_sessions_do() {
    let scene = Scene::new(nowhere());
    let control = Control::new(verifier(&scene.ca, Some(&scene.ca.leaf(THERE)), vec![node("here", HERE, None)]));
    let address = control.listen().await;
    let many: Vec<String> = (0..150).map(|n| format!("spiffe://example.org/agents/{n:03}")).collect();
    let mut callers = ids(&many.iter().map(String::as_str).collect::<Vec<_>>());
    callers.extend(ids(&["spiffe://example.org/stranger"]));
    let first = scene.dial(address, &callers).await.unwrap();
    let sessions = control.sessions();
    assert_eq!(sessions.iter().map(|session| session.3.len()).collect::<Vec<_>>(), [64, 64, 23]);
    for (connection, key, certificate, _) in &sessions {
        assert_eq!(*connection, 1, "one connection for all of them");
        assert!(*key == first.key);
        assert_eq!(certificate.as_ref().unwrap().as_str(), HERE);
    }
    // Less what it took to ask.
    assert!(first.key_id == 3 && (590..=600).contains(&first.seconds()), "{}", first.seconds());
    assert_eq!(first.batches[1].labels[&many[64].parse().unwrap()], Some(1));
    assert_eq!(first.refused().map(SpiffeId::as_str).collect::<Vec<_>>(), ["spiffe://example.org/stranger"]);
    let second = scene.dial(address, &callers).await.unwrap();
    assert!(second.key != first.key);
    assert!(first.key.0 != [0; 16]);
}

#[tokio::test]
async fn a_server_that_is_not_the_node_gets_no_word() {
    let scene = Scene::new(nowhere());
    let expired = |params: &mut CertificateParams| params.not_after = rcgen::date_time_ymd(2024, 1, 1);
    let early = |params: &mut CertificateParams| params.not_before = rcgen::date_time_ymd(2100, 1, 1);
    let client =
        |params: &mut CertificateParams| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let nameless = |params: &mut CertificateParams| {
        params.subject_alt_names = vec![SanType::DnsName("there.example.org".try_into().unwrap())];
    };
    let ca = &scene.ca;
    for (own, reason) in [
        (ca.leaf(THERE), "ok"),
        (ca.leaf("spiffe://example.org/nodes/elsewhere"), "certificate_not_allowed"),
        (ca.leaf(HERE), "certificate_not_allowed"),
        (ca.leaf_with(THERE, nameless), "certificate_not_allowed"),
        (ca.leaf("spiffe://example.com/nodes/there"), "wrong_trust_domain"),
        (Ca::new().leaf(THERE), "unknown_issuer"),
        (ca.leaf_with(THERE, expired), "certificate_expired"),
        (ca.leaf_with(THERE, early), "certificate_not_yet_valid"),
        (ca.leaf_with(THERE, client), "wrong_key_usage"),
    ] {
        let control = Control::new(verifier(ca, Some(&own), vec![node("here", HERE, None)]));
        assert_eq!(scene.reason(control.listen().await).await, reason);
        assert_eq!(control.sessions().len(), usize::from(reason == "ok"), "{reason}");
    }
    // The policy names an authority, and it is another one that vouches for the certificate.
    let control = Control::new(verifier(ca, Some(&ca.leaf(THERE)), vec![node("here", HERE, None)]));
    let address = control.listen().await;
    let mut scene = scene;
    for (authority, reason) in [(Some(0), "ok"), (Some(1), "unknown_issuer"), (Some(7), "unknown_issuer")] {
        scene.there.authority = authority;
        assert_eq!(scene.reason(address).await, reason);
    }
    assert_eq!(scene.reason(nowhere()).await, "node_unreachable");
}

#[tokio::test]
async fn a_node_that_speaks_tls_12_only_is_not_spoken_to() {
    let scene = Scene::new(nowhere());
    let address = answers(&scene.ca.leaf(THERE), &TLS12, Vec::new()).await;
    assert_eq!(scene.reason(address).await, "node_handshake_failed");
}

#[tokio::test]
async fn an_answer_that_is_too_long_or_makes_no_sense_is_no_session() {
    let scene = Scene::new(nowhere());
    let own = scene.ca.leaf(THERE);
    let created = |body: &str| vec![answer("201 Created", body)];
    let long = format!("{{\"key_id\":1,\"seconds\":60,\"labels\":{{}},\"x\":\"{}\"}}", "x".repeat(64 << 10));
    let endless = format!(
        "HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        "1000\r\n".to_owned() + &"x".repeat(4096) + "\r\n"
    );
    let endless = endless.clone() + &endless.split_once("\r\n\r\n").unwrap().1.repeat(20);
    let problem = r#"{"reason":"node_unknown","status":403}"#;
    for (texts, reason) in [
        (created(r#"{"key_id":1,"seconds":60,"labels":{"spiffe://example.org/a":5}}"#), "ok"),
        (created(r#"{"key_id":1,"seconds":60,"labels":{"spiffe://example.org/a":null}}"#), "ok"),
        (created(&long), "node_answer_oversize"),
        (vec![endless], "node_answer_oversize"),
        (created(""), "node_answer_malformed"),
        (created("[]"), "node_answer_malformed"),
        (created(r#"{"key_id":1,"seconds":60}"#), "node_answer_malformed"),
        (created(r#"{"key_id":256,"seconds":60,"labels":{"spiffe://example.org/a":5}}"#), "node_answer_malformed"),
        (created(r#"{"key_id":1,"seconds":-1,"labels":{"spiffe://example.org/a":5}}"#), "node_answer_malformed"),
        (created(r#"{"key_id":1,"seconds":0,"labels":{"spiffe://example.org/a":5}}"#), "node_answer_malformed"),
        (
            created(r#"{"key_id":1,"seconds":60,"labels":{"spiffe://example.org/a":4294967296}}"#),
            "node_answer_malformed",
        ),
        (created(r#"{"key_id":1,"seconds":60,"labels":{"spiffe://example.org/a":5},"x":1}"#), "node_answer_malformed"),
        (created(r#"{"key_id":1,"seconds":60,"labels":{}}"#), "node_answer_malformed"),
        (created(r#"{"key_id":1,"seconds":60,"labels":{"spiffe://example.org/b":5}}"#), "node_answer_malformed"),
        (
            created(r#"{"key_id":1,"seconds":60,"labels":{"spiffe://example.org/a":5,"spiffe://example.org/b":6}}"#),
            "node_answer_malformed",
        ),
        (vec![answer("200 OK", r#"{"key_id":1,"seconds":60,"labels":{"spiffe://example.org/a":5}}"#)], "node_refused"),
        (vec![answer("403 Forbidden", problem)], "node_refused"),
        (vec!["SSH-2.0-OpenSSH_9.2\r\n".to_owned()], "node_connection_failed"),
        (vec![], "node_connection_failed"),
    ] {
        let shown: String = texts.concat().chars().take(120).collect();
        let address = answers(&own, &TLS13, texts).await;
        assert_eq!(scene.reason(address).await, reason, "{shown}");
    }
    // A key of its own for each answer: one of them is not this connection's.
    let many: Vec<String> = (0..65).map(|n| format!("spiffe://example.org/{n:02}")).collect();
    let part = |key_id: u8, callers: &[String]| {
        let labels: Vec<String> = callers.iter().map(|id| format!("\"{id}\":1")).collect();
        answer("201 Created", &format!(r#"{{"key_id":{key_id},"seconds":60,"labels":{{{}}}}}"#, labels.join(",")))
    };
    let callers = ids(&many.iter().map(String::as_str).collect::<Vec<_>>());
    for (second, reason) in [(1, None), (2, Some("node_answer_malformed"))] {
        let address = answers(&own, &TLS13, vec![part(1, &many[..64]), part(second, &many[64..])]).await;
        assert_eq!(scene.dial(address, &callers).await.err().map(|error| error.reason()), reason);
    }
}

#[tokio::test]
async fn a_node_that_says_nothing_is_not_waited_for() {
    let scene = Scene::new(nowhere());
    let own = scene.ca.leaf(THERE);
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let half = "HTTP/1.1 201 Created\r\nContent-Length: 100\r\n\r\n{".to_owned();
    // The last text is never said, because it answers a request that does not come.
    for (what, address) in [
        ("no handshake", silent.local_addr().unwrap()),
        ("no answer", answers(&own, &TLS13, vec![String::new(), String::new()]).await),
        ("half an answer", answers(&own, &TLS13, vec![half, String::new()]).await),
    ] {
        let (verifier, node, identity) = (&scene.ours, &scene.there, &scene.here);
        let dial = Dial {
            verifier,
            node,
            address,
            identity,
            patience: Duration::from_millis(500),
            instance: Instance::default(),
        };
        let refused = dial.open(&ids(&["spiffe://example.org/a"])).await.err();
        assert!(matches!(refused, Some(DialError::Slow)), "{what}");
    }
}

#[tokio::test]
async fn the_reason_of_a_refusal_comes_into_the_log_and_no_other_text() {
    let scene = Scene::new(nowhere());
    let own = scene.ca.leaf(THERE);
    for (body, kind) in [
        (r#"{"reason":"node_unknown"}"#, "node_refused node_unknown"),
        (r#"{"reason":"a\nb"}"#, "node_refused "),
        (r#"{"reason":7}"#, "node_refused "),
        ("<html>", "node_refused "),
    ] {
        let address = answers(&own, &TLS13, vec![answer("403 Forbidden", body)]).await;
        let refused = scene.dial(address, &ids(&["spiffe://example.org/a"])).await.err().unwrap();
        assert_eq!(refused.kind(), kind);
    }
    let long = format!("{{\"reason\":\"{}\"}}", "x".repeat(65));
    let address = answers(&own, &TLS13, vec![answer("403 Forbidden", &long)]).await;
    let refused = scene.dial(address, &ids(&["spiffe://example.org/a"])).await.err().unwrap();
    assert_eq!(refused.kind(), "node_refused ");
}

#[test]
fn a_batch_fits_a_request_and_a_message() {
    let long = |n: u32| format!("spiffe://example.org/{n:02}{}", "x".repeat(2_000)).parse().unwrap();
    let callers: BTreeSet<SpiffeId> = (0..20).map(long).collect();
    let batches = dial::in_batches(&callers);
    assert!(batches.iter().all(|batch| batch.iter().map(|id| id.as_str().len()).sum::<usize>() <= 8 << 10));
    assert_eq!(batches.iter().map(BTreeSet::len).collect::<Vec<_>>(), [4; 5]);
    assert_eq!(batches.into_iter().flatten().collect::<BTreeSet<_>>(), callers);
    assert!(dial::in_batches(&BTreeSet::new()).is_empty());
}

/// A server with a certificate that answers each request with the next text, whatever it is asked.
async fn answers(own: &Identity, version: &'static SupportedProtocolVersion, texts: Vec<String>) -> SocketAddr {
    let config = ServerConfig::builder_with_protocol_versions(&[version])
        .with_no_client_auth()
        .with_single_cert(chain_of(own), PrivateKeyDer::from_pem_slice(own.key.as_bytes()).unwrap())
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let Ok(mut stream) = TlsAcceptor::from(Arc::new(config)).accept(stream).await else { return };
        for text in texts {
            let mut request = vec![0; 32 << 10];
            let mut length = 0;
            // All of it has come when its JSON ends.
            while !request[..length].ends_with(b"}") {
                match stream.read(&mut request[length..]).await {
                    Ok(0) | Err(_) => return,
                    Ok(more) => length += more,
                }
            }
            let _ = stream.write_all(text.as_bytes()).await;
        }
        let _ = stream.shutdown().await;
    });
    address
}

fn answer(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}
