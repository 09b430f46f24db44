//! The side that is asked: who speaks here, and for whom.

use super::*;
use crate::control::api::Open;

#[tokio::test]
async fn over_tls_12_nobody_speaks_for_anybody() {
    let ca = Ca::new();
    let control = Control::new(verifier(&ca, Some(&ca.leaf(THERE)), vec![node("here", HERE, None)]));
    let address = control.listen().await;
    let here = ca.leaf(HERE);
    assert_eq!(posted(address, &TLS13, &here).await, (201, String::new()));
    assert_eq!(posted(address, &TLS12, &here).await, (403, "tls13_required".to_owned()));
    until(|| control.refused() == [("tls13_required".to_owned(), 0)]).await;
    assert_eq!(control.sessions().len(), 1);
}

#[tokio::test]
async fn who_is_no_node_of_the_policy_speaks_for_nobody() {
    let ca = Ca::new();
    let mut pinned = node("pinned", "spiffe://example.org/nodes/pinned", None);
    pinned.authority = Some(1);
    let control = Control::new(verifier(&ca, Some(&ca.leaf(THERE)), vec![node("here", HERE, None), pinned]));
    let router = api::router();
    let remote = Caller::Remote { address: nowhere(), vouched: None };
    let workload = Workload { name: "a".into(), spiffe_id: HERE.into(), cgroup: "/a".into() };
    let local = Caller::Local { workload: Some(workload), uid: 7, tcp: false };
    let body = r#"{"speaks_for":["spiffe://example.org/a"]}"#;
    let key = || Some(NodeKey([7; 16]));
    let expired = ca.leaf_with(HERE, |params| params.not_after = rcgen::date_time_ymd(2024, 1, 1));
    let server = ca.leaf_with(HERE, |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
    let good = chain_of(&ca.leaf(HERE));
    let mut expected = Vec::new();
    for (caller, chain, key, status, reason, proven) in [
        (&remote, vec![], key(), 401, "certificate_missing", 0),
        (&remote, good.clone(), None, 403, "tls13_required", 0),
        (&remote, chain_of(&Ca::new().leaf(HERE)), key(), 401, "unknown_issuer", 0),
        (&remote, chain_of(&expired), key(), 401, "certificate_expired", 0),
        (&remote, chain_of(&server), key(), 401, "wrong_key_usage", 0),
        (&remote, chain_of(&ca.leaf("spiffe://example.org/nodes/x")), key(), 403, "node_unknown", 1),
        (&remote, chain_of(&ca.leaf("spiffe://example.org/nodes/pinned")), key(), 401, "unknown_issuer", 0),
        (&local, good.clone(), key(), 403, "node_unknown", 0),
        (&Caller::Admin { uid: 0 }, good.clone(), key(), 403, "node_unknown", 0),
    ] {
        let answer = asked(&router, &control, caller.clone(), chain, key, body).await;
        assert_eq!(answer, (status, reason.to_owned()));
        expected.push((reason.to_owned(), proven));
    }
    until(|| control.refused() == expected).await;
    assert!(control.sessions().is_empty(), "dataplane is not asked");
    // What dataplane refuses it knows.
    let nobody = r#"{"speaks_for":["spiffe://example.org/nobody"]}"#;
    let answer = asked(&router, &control, remote.clone(), good.clone(), key(), nobody).await;
    assert_eq!(answer, (403, "node_revoked".to_owned()));
    assert_eq!(asked(&router, &control, remote, good, key(), body).await, (201, String::new()));
    assert_eq!((control.sessions().len(), control.refused().len()), (2, expected.len()));
}

#[tokio::test]
async fn a_request_names_some_callers_each_once() {
    let ca = Ca::new();
    let control = Control::new(verifier(&ca, Some(&ca.leaf(THERE)), vec![node("here", HERE, None)]));
    let (router, remote) = (api::router(), Caller::Remote { address: nowhere(), vouched: None });
    let list = |n: usize| {
        let ids: Vec<String> = (0..n).map(|n| format!("\"spiffe://example.org/{n}\"")).collect();
        format!("{{\"speaks_for\":[{}]}}", ids.join(","))
    };
    let long = format!("{{\"speaks_for\":[\"spiffe://example.org/{}\"]}}", "x".repeat(16 << 10));
    for (body, status, reason) in [
        (list(1).as_str(), 201, ""),
        (&list(128), 201, ""),
        (&list(129), 400, "bad_request"),
        (&list(0), 400, "bad_request"),
        (&long, 413, "request_oversize"),
        ("", 400, "bad_request"),
        ("[]", 400, "bad_request"),
        ("{}", 400, "bad_request"),
        (r#"{"speaks_for":["https://example.org/a"]}"#, 400, "bad_request"),
        (r#"{"speaks_for":["spiffe://example.org"]}"#, 400, "bad_request"),
        (r#"{"speaks_for":["spiffe://Example.org/a"]}"#, 400, "bad_request"),
        (r#"{"speaks_for":["spiffe://example.org/a"],"more":1}"#, 400, "bad_request"),
        (r#"{"speaks_for":["spiffe://example.org/a","spiffe://example.org/a"]}"#, 400, "bad_request"),
    ] {
        let chain = chain_of(&ca.leaf(HERE));
        let answer = asked(&router, &control, remote.clone(), chain, Some(NodeKey([7; 16])), body).await;
        assert_eq!(answer, (status, reason.to_owned()), "{}", body.chars().take(80).collect::<String>());
    }
    assert_eq!(control.sessions().len(), 2);
}

/// A request over TLS, as anybody could send it: what is answered.
async fn posted(address: SocketAddr, version: &'static SupportedProtocolVersion, own: &Identity) -> (u16, String) {
    let config = ClientConfig::builder_with_protocol_versions(&[version])
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(client::Local));
    let identity = client::Identity { certificates: own.certificates.clone().into(), key: own.key.clone().into() };
    let stream = TcpStream::connect(address).await.unwrap();
    let stream = client::tls(config, &identity, "127.0.0.1", stream).await.unwrap();
    let body = Full::new(Bytes::from_static(br#"{"speaks_for":["spiffe://example.org/a"]}"#));
    let request = Request::post(PATH).body(body).unwrap();
    let answer = Exchange::begin(stream).await.unwrap().ask(request, 1 << 16).await.unwrap();
    (answer.status.as_u16(), reason_in(&answer.body))
}

fn reason_in(body: &[u8]) -> String {
    let body: serde_json::Value = serde_json::from_slice(body).unwrap();
    body["reason"].as_str().unwrap_or_default().to_owned()
}

/// What the router answers to a session, and what dataplane heard.
async fn asked(
    router: &Router,
    control: &Control,
    caller: Caller,
    chain: Vec<CertificateDer<'static>>,
    exported: Option<NodeKey>,
    body: &str,
) -> (u16, String) {
    let session = Arc::new(Session::new(Open::new(control.shared.clone(), 9), caller, chain, exported));
    let request = Request::post(PATH).extension(session).body(Body::from(body.to_owned())).unwrap();
    let response = router.clone().oneshot(request).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, reason_in(&body))
}
