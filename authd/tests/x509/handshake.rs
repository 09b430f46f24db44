//! Client certificates in real handshakes: who holds the key gets through, whoever it is; who does not, does not.

use std::sync::{Arc, LazyLock, Mutex};

use super::pki::{LEAF, Make, NOW, Pki};
use authd::proofs::x509::{
    bundle::{self, Authority},
    chain::{self, Usage},
    crl::{CrlPolicy, NothingRevoked},
    verifier::Possession,
};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, Error, RootCertStore, ServerConfig, ServerConnection,
    SignatureScheme, SupportedProtocolVersion,
    client::ResolvesClientCert,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    sign::CertifiedKey,
    version::{TLS12, TLS13},
};

static PKI: LazyLock<Pki> = LazyLock::new(|| {
    let pki = Pki::new();
    // The client asks the clock of the machine.
    let (from, to) = ("20200101000000Z", "20490101000000Z");
    pki.make(Make { from, to, ..Make::default() });
    let extensions = format!("{}\nsubjectAltName=DNS:server.example.org", LEAF);
    pki.make(Make { name: "server", issuer: Some("root"), extensions: &extensions, from, to, ..Make::default() });
    for (name, key) in [("p256", "ec:P-256"), ("p384", "ec:P-384"), ("rsa", "rsa:2048"), ("ed25519", "ed25519")] {
        let extensions = format!("{}\nsubjectAltName=URI:spiffe://example.org/{name}", LEAF);
        pki.make(Make {
            name,
            subject: "/CN=x",
            issuer: Some("root"),
            key,
            extensions: &extensions,
            ..Make::default()
        });
    }
    pki.make(Make { name: "stranger-root", subject: "/CN=Stranger", ..Make::default() });
    pki.leaf("stranger", "stranger-root", "URI:spiffe://example.org/p256");
    pki
});

fn certificates(file: &str) -> Vec<CertificateDer<'static>> {
    chain::read(&PKI.read(file)).unwrap()
}

/// The chain with the key of that name, whether they belong together or not.
fn certified(chain: Vec<CertificateDer<'static>>, key: &str) -> Arc<CertifiedKey> {
    let key = PrivateKeyDer::from_pem_slice(&PKI.read(&format!("{key}.key"))).unwrap();
    Arc::new(CertifiedKey::new(chain, aws_lc_rs::sign::any_supported_type(&key).unwrap()))
}

/// Shows what it is told to show, and remembers which roots it was asked for.
#[derive(Debug)]
struct Shows(Option<Arc<CertifiedKey>>, Mutex<Option<usize>>);

impl ResolvesClientCert for Shows {
    fn resolve(&self, roots: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        *self.1.lock().unwrap() = Some(roots.len());
        self.0.clone()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

struct Shaken {
    shown: Vec<CertificateDer<'static>>,
    asked_for_roots: Option<usize>,
}

/// A handshake in memory. The error is the server's.
fn shake(version: &'static SupportedProtocolVersion, shows: Option<Arc<CertifiedKey>>) -> Result<Shaken, Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let server_key = PrivateKeyDer::from_pem_slice(&PKI.read("server.key")).unwrap();
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[version])
        .unwrap()
        .with_client_cert_verifier(Arc::new(Possession))
        .with_single_cert(certificates("server.pem"), server_key)
        .unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificates("root.pem").remove(0)).unwrap();
    let resolver = Arc::new(Shows(shows, Mutex::new(None)));
    let client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_cert_resolver(resolver.clone());
    let name = ServerName::try_from("server.example.org").unwrap();
    let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
    let mut server = ServerConnection::new(Arc::new(server)).unwrap();
    for _ in 0..10 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut rest = &wire[..];
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            server.process_new_packets()?;
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut rest = &wire[..];
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            client.process_new_packets().unwrap();
        }
    }
    assert!(!server.is_handshaking() && !client.is_handshaking());
    let asked_for_roots = *resolver.1.lock().unwrap();
    Ok(Shaken { shown: server.peer_certificates().unwrap_or_default().to_vec(), asked_for_roots })
}

#[test]
fn whoever_holds_the_key_gets_through_and_is_judged_afterwards() {
    let anchors = bundle::read(&PKI.read("root.pem")).unwrap();
    let domain = Some("example.org".parse().unwrap());
    let authority = Authority::new("corp", anchors, domain, Vec::new(), CrlPolicy::IfPresent);
    let judge = |shown: &[CertificateDer<'_>]| {
        authority.verify(shown, Usage::Client, NOW.parse().unwrap(), &NothingRevoked).map_err(|error| error.reason())
    };
    for version in [&TLS13, &TLS12] {
        for name in ["p256", "p384", "rsa", "ed25519"] {
            let shown = shake(version, Some(certified(certificates(&format!("{name}.pem")), name))).unwrap().shown;
            assert_eq!(judge(&shown).unwrap().spiffe_id.unwrap().path(), format!("/{name}"));
        }
        let shown = shake(version, Some(certified(certificates("stranger.pem"), "stranger"))).unwrap().shown;
        assert_eq!(judge(&shown), Err("unknown_issuer"));
    }
}

#[test]
fn who_does_not_hold_the_key_does_not_get_through() {
    for version in [&TLS13, &TLS12] {
        let refused = shake(version, Some(certified(certificates("p256.pem"), "stranger"))).err();
        assert_eq!(refused, Some(Error::InvalidCertificate(CertificateError::BadSignature)), "{version:?}");
        let refused = shake(version, Some(certified(certificates("p256.pem"), "ed25519")));
        assert!(refused.is_err(), "a key of another kind, {version:?}");
    }
}

#[test]
fn nobody_has_to_show_a_certificate_and_no_roots_are_told() {
    for version in [&TLS13, &TLS12] {
        let shaken = shake(version, None).unwrap();
        assert!(shaken.shown.is_empty());
        assert_eq!(shaken.asked_for_roots, Some(0), "asked for a certificate, of nobody in particular");
    }
}

#[test]
fn chains_beyond_the_limits_and_unreadable_ones_end_the_handshake() {
    let one = certificates("p256.pem").remove(0);
    let long = [vec![one.clone()], vec![certificates("root.pem").remove(0); 8]].concat();
    let garbage = vec![one.clone(), CertificateDer::from(vec![0x30, 0x03, 0x02, 0x01, 0x01])];
    let headless = vec![CertificateDer::from(vec![0x30, 0x03, 0x02, 0x01, 0x01])];
    for version in [&TLS13, &TLS12] {
        for (chain, error) in [
            (long.clone(), CertificateError::ApplicationVerificationFailure),
            (garbage.clone(), CertificateError::BadEncoding),
            (headless.clone(), CertificateError::BadEncoding),
        ] {
            let refused = shake(version, Some(certified(chain, "p256"))).err();
            assert_eq!(refused, Some(Error::InvalidCertificate(error)));
        }
    }
}
