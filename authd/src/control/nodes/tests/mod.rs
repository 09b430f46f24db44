//! Sessions between nodes, on real sockets: who gets one, who does not, and what dataplane hears of it.

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use axum::{Router, body::Body};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::{
    ClientConfig, ServerConfig, SupportedProtocolVersion,
    pki_types::{PrivateKeyDer, pem::PemObject},
    version::{TLS12, TLS13},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

use super::*;
use crate::{
    client::{self, Exchange},
    control::{Answer, api, api::Session, serve},
    grants::proof::Shown,
    ipc::{Caller, Channel, Refusal, Settings, Workload, pair},
    policy::diagnostic::Place,
};

mod dialling;
mod keeping;
mod listening;

const HERE: &str = "spiffe://example.org/nodes/here";
const THERE: &str = "spiffe://example.org/nodes/there";
const SOON: Duration = Duration::from_secs(20);

fn pem(label: &str, der: &[u8]) -> String {
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", STANDARD.encode(der))
}

struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("CA {}", NEXT.fetch_add(1, Ordering::Relaxed)));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn leaf(&self, spiffe_id: &str) -> Identity {
        self.leaf_with(spiffe_id, |_| {})
    }

    fn leaf_with(&self, spiffe_id: &str, change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(spiffe_id.try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Identity { certificates: pem("CERTIFICATE", certificate.der()), key: pem("PRIVATE KEY", &key.serialize_der()) }
    }
}

fn chain_of(identity: &Identity) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(identity.certificates.as_bytes()).map(Result::unwrap).collect()
}

fn node(name: &str, spiffe_id: &str, address: Option<SocketAddr>) -> Node {
    let spiffe_id = spiffe_id.parse().unwrap();
    Node {
        name: name.into(),
        spiffe_id,
        authority: None,
        address,
        networks: Vec::new(),
        speaks_for: Vec::new(),
        place: Place::nowhere(),
    }
}

/// Settings of a node with two authorities: `corp`, and one that nobody uses.
fn verifier(corp: &Ca, own: Option<&Identity>, nodes: Vec<Node>) -> Arc<Verifier> {
    let authority =
        |name| format!("[[authority]]\nname = \"{name}\"\nbundle = \"{name}.crt\"\ntrust_domain = \"example.org\"\n");
    let policy = format!("trust_domain = \"example.org\"\n{}{}", authority("corp"), authority("other"));
    let other = Ca::new();
    let files = [("corp.crt", corp), ("other.crt", &other)];
    let files = files.map(|(name, ca)| (name.to_owned(), STANDARD.encode(pem("CERTIFICATE", ca.0.der()))));
    let settings = Settings {
        sources: vec![("p.toml".to_owned(), policy)],
        files: BTreeMap::from(files),
        identity: own.cloned(),
        tls12: true,
        ..Settings::default()
    };
    let mut verifier = Verifier::new(settings, None, Arc::default());
    assert_eq!(verifier.authorities.iter().flatten().count(), 2);
    verifier.model.nodes = nodes;
    Arc::new(verifier)
}

/// A node's name, the key, numbers of callers.
type Accepted = (String, NodeKey, Vec<(String, u32)>);

/// A control process under these settings, and what dataplane is told, which lets a node speak for all callers but those
/// that are called `stranger`, refuses whoever speaks for `nobody`, and gives little time to `brief`.
struct Control {
    shared: Arc<Shared>,
    told: Arc<Mutex<Vec<FromControl>>>,
}

impl Control {
    fn new(verifier: Arc<Verifier>) -> Self {
        let (ours, theirs) = pair().unwrap();
        let shared = Shared::new(Channel::new(ours).unwrap());
        *shared.verifier.write().unwrap() = Some(verifier);
        let told = Arc::new(Mutex::new(Vec::new()));
        let (dataplane, control, heard) = (Channel::new(theirs).unwrap(), shared.clone(), told.clone());
        tokio::spawn(async move {
            while let Some((message, _)) = dataplane.receive::<FromControl>().await.unwrap() {
                if let FromControl::NodeSession { question, speaks_for, .. } = &message {
                    let label = |(n, id): (usize, &String)| (!id.ends_with("/stranger")).then_some(n as u32 + 1);
                    let labels = speaks_for.iter().enumerate().map(label).collect();
                    let seconds = if speaks_for.iter().any(|id| id.ends_with("/brief")) { 2 } else { 600 };
                    let answer = match speaks_for.iter().any(|id| id.ends_with("/nobody")) {
                        true => Answer::Refused(Refusal { reason: "node_revoked".into(), message: String::new() }),
                        false => Answer::Admitted { key_id: 3, seconds, labels },
                    };
                    control.answer(*question, answer);
                }
                heard.lock().unwrap().push(message);
            }
        });
        Self { shared, told }
    }

    /// Where it listens.
    async fn listen(&self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = self.shared.clone();
        tokio::spawn(async move {
            let next = AtomicU64::new(1);
            while let Ok((stream, address)) = listener.accept().await {
                let fd = OwnedFd::from(stream.into_std().unwrap());
                let connection = next.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(serve::serve(
                    shared.clone(),
                    api::router(),
                    fd,
                    connection,
                    Caller::Remote { address, vouched: None },
                ));
            }
        });
        address
    }

    fn speak_for(&self, callers: &[&str]) {
        let identities = Identities { spiffe_ids: callers.iter().map(|id| (*id).to_owned()).collect() };
        self.shared.identities.send_replace(Some(Arc::new(speaks_for(identities))));
    }

    fn sessions(&self) -> Vec<(u64, NodeKey, Option<SpiffeId>, Vec<String>)> {
        let session = |message: &FromControl| match message {
            FromControl::NodeSession { connection, key, certificate, speaks_for, .. } => {
                Some((*connection, key.clone(), certificate.spiffe_id.clone(), speaks_for.clone()))
            }
            _ => None,
        };
        self.told.lock().unwrap().iter().filter_map(session).collect()
    }

    fn accepted(&self) -> Vec<Accepted> {
        let accepted = |message: &FromControl| match message {
            FromControl::NodeAccepted { node, key, key_id: 3, labels, .. } => {
                Some((node.clone(), key.clone(), labels.clone()))
            }
            _ => None,
        };
        self.told.lock().unwrap().iter().filter_map(accepted).collect()
    }

    /// Reasons of refusals, with the certificates that were good.
    fn refused(&self) -> Vec<(String, usize)> {
        let refused = |message: &FromControl| match message {
            FromControl::Refused { reason, proofs, .. } => {
                Some((reason.clone(), proofs.iter().filter(|proof| matches!(proof, Shown::Mtls(_))).count()))
            }
            _ => None,
        };
        self.told.lock().unwrap().iter().filter_map(refused).collect()
    }
}

async fn until(what: impl Fn() -> bool) {
    let wait = async {
        while !what() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, wait).await.expect("it does not come");
}

fn ids(texts: &[&str]) -> BTreeSet<SpiffeId> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// A dialling node, and one that is dialled.
struct Scene {
    ca: Ca,
    here: Identity,
    there: Node,
    ours: Arc<Verifier>,
}

impl Scene {
    fn new(address: SocketAddr) -> Self {
        let ca = Ca::new();
        let here = ca.leaf(HERE);
        let there = node("there", THERE, Some(address));
        let ours = verifier(&ca, Some(&here), vec![there.clone()]);
        Self { ca, here, there, ours }
    }

    async fn dial(&self, address: SocketAddr, callers: &BTreeSet<SpiffeId>) -> Result<Opened, DialError> {
        let (verifier, node, identity) = (&self.ours, &self.there, &self.here);
        Dial { verifier, node, address, identity, patience: SOON, instance: Instance::default() }.open(callers).await
    }

    async fn reason(&self, address: SocketAddr) -> &'static str {
        match self.dial(address, &ids(&["spiffe://example.org/a"])).await {
            Ok(_) => "ok",
            Err(error) => error.reason(),
        }
    }
}

fn nowhere() -> SocketAddr {
    "127.0.0.1:1".parse().unwrap()
}
