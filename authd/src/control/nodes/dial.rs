//! One session with another node, from the first packet to the last answer.
//!
//! Enters: where a node listens, and for whom this one speaks. Leaves: the key of the connection and the numbers of callers,
//! or why there are none. Never: a word to a server that is not that node, more of an answer than there is room for, or
//! patience.

use std::{collections::BTreeSet, fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{Full, LengthLimitError};
use hyper::{Method, Request, StatusCode, header};
use jiff::Timestamp;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::ClientCertVerifier,
    version::TLS13,
};
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::{Instant, timeout},
};

use super::{Instance, NodeSessionAnswer, NodeSessionRequest, NotTheNode, PATH, certificate_of, key_of};
use crate::{
    client::{self, ClientError, Exchange},
    control::verifier::Verifier,
    ipc::{Identity, MAX_ENTRIES, NodeKey},
    policy::model::Node,
    proofs::x509::{chain::Usage, spiffe::SpiffeId, verifier::Possession},
};

const CONNECT: Duration = Duration::from_secs(5);
/// The handshake, and each request with its answer.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Of the SPIFFE IDs of one request. A node takes requests of 16 KiB; what one has room for, a message to dataplane has.
const BATCH_BYTES: usize = 8 << 10;
/// An answer repeats the IDs of its request, with a number for each.
const ANSWER_BYTES: usize = 32 << 10;

#[derive(Debug, thiserror::Error)]
pub enum DialError {
    // The way to the node, or its daemon.
    #[error("connecting: {0}")]
    Connect(io::Error),
    #[error("it did not answer in time")]
    Slow,
    #[error("TLS: {0}")]
    Handshake(io::Error),
    #[error(transparent)]
    Client(ClientError),

    // Whoever answers there.
    #[error("its certificate: {0}")]
    Certificate(#[from] NotTheNode),
    #[error("it answers with status {status} and reason {reason:?}")]
    Refused { status: StatusCode, reason: String },
    #[error("its answer is longer than {ANSWER_BYTES} bytes")]
    TooLong,
    #[error("its answer: {0}")]
    Malformed(#[from] serde_json::Error),
    #[error("its answer is about other callers than those that it was asked about")]
    OtherCallers,
    #[error("its answers are about two keys of one connection")]
    OtherKey,
    #[error("its key holds for no time")]
    Over,

    // Nobody: TLS 1.3 always has one.
    #[error("the connection has no key")]
    NoKey,
}

impl DialError {
    /// Stable name for the log.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Connect(_) | Self::Slow => "node_unreachable",
            Self::Handshake(_) | Self::NoKey => "node_handshake_failed",
            Self::Client(_) => "node_connection_failed",
            Self::Certificate(error) => error.reason(),
            Self::Refused { .. } => "node_refused",
            Self::TooLong => "node_answer_oversize",
            Self::Malformed(_) | Self::OtherCallers | Self::OtherKey | Self::Over => "node_answer_malformed",
        }
    }

    /// What is worth a line of its own in the log.
    pub fn kind(&self) -> String {
        match self {
            Self::Refused { reason, .. } => format!("{} {reason}", self.reason()),
            _ => self.reason().to_owned(),
        }
    }

    /// rustls hands on what a verifier of certificates says.
    fn of_handshake(error: io::Error) -> Self {
        let refused = error.get_ref().and_then(|error| match error.downcast_ref() {
            Some(Error::InvalidCertificate(CertificateError::Other(OtherError(error)))) => error.downcast_ref(),
            _ => None,
        });
        match refused.cloned() {
            Some(refused) => Self::Certificate(refused),
            None => Self::Handshake(error),
        }
    }
}

impl From<ClientError> for DialError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Body(error) if error.is::<LengthLimitError>() => Self::TooLong,
            error => Self::Client(error),
        }
    }
}

/// What a node accepted.
pub struct Opened {
    pub key: NodeKey,
    pub key_id: u8,
    /// One for each request, with the time that it holds for; at least one.
    pub batches: Vec<NodeSessionAnswer>,
}

impl Opened {
    /// How long all of it holds.
    pub fn seconds(&self) -> u32 {
        self.batches.iter().map(|batch| batch.seconds).min().unwrap_or(0)
    }

    /// Whether the node was asked about a caller.
    pub fn has(&self, id: &SpiffeId) -> bool {
        self.batches.iter().any(|batch| batch.labels.contains_key(id))
    }

    /// Callers for whom this node may not speak there.
    pub fn refused(&self) -> impl Iterator<Item = &SpiffeId> {
        let labels = self.batches.iter().flat_map(|batch| &batch.labels);
        labels.filter(|(_, label)| label.is_none()).map(|(id, _)| id)
    }
}

/// A node, and what this one has to dial it with.
pub struct Dial<'a> {
    pub verifier: &'a Arc<Verifier>,
    pub node: &'a Node,
    pub address: SocketAddr,
    pub identity: &'a Identity,
    /// For the handshake, and for each request with its answer.
    pub patience: Duration,
    pub instance: Instance,
}

impl Dial<'_> {
    /// Asks the node about callers, of whom there is at least one.
    pub async fn open(&self, callers: &BTreeSet<SpiffeId>) -> Result<Opened, DialError> {
        let connected = timeout(CONNECT.min(self.patience), TcpStream::connect(self.address)).await;
        let stream = connected.map_err(|_| DialError::Slow)?.map_err(DialError::Connect)?;
        stream.set_nodelay(true).map_err(DialError::Connect)?;
        let shaken = timeout(self.patience, self.shake_hands(stream)).await;
        let (key, mut exchange) = shaken.map_err(|_| DialError::Slow)??;
        let begun = Instant::now();
        let mut batches: Vec<NodeSessionAnswer> = Vec::new();
        for batch in in_batches(callers) {
            let answer = timeout(self.patience, self.ask(&mut exchange, &batch)).await;
            let answer = answer.map_err(|_| DialError::Slow)??;
            if batches.first().is_some_and(|first| first.key_id != answer.key_id) {
                return Err(DialError::OtherKey);
            }
            batches.push(answer);
        }
        // What holds from the answer on holds from the last one on for less.
        for batch in &mut batches {
            batch.seconds = batch.seconds.saturating_sub(begun.elapsed().as_secs().try_into().unwrap_or(u32::MAX));
        }
        let key_id = batches.first().map(|batch| batch.key_id).ok_or(DialError::OtherCallers)?;
        Ok(Opened { key, key_id, batches })
    }

    async fn shake_hands(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> Result<(NodeKey, Exchange), DialError> {
        let meant = Meant { verifier: self.verifier.clone(), node: self.node.clone() };
        let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&TLS13])
            .map_err(ClientError::from)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(meant));
        let Identity { certificates, key } = self.identity;
        let identity =
            client::Identity { certificates: certificates.as_bytes().to_vec(), key: key.as_bytes().to_vec() };
        // An address is no name of a server, so that none is sent (RFC 6066, 3). The configuration is this connection's
        // alone: there is nothing to resume.
        let stream = client::tls(config, &identity, &self.address.ip().to_string(), stream).await;
        let stream = stream.map_err(|error| match error {
            ClientError::Connect(error) => DialError::of_handshake(error),
            error => error.into(),
        })?;
        let key = key_of(stream.get_ref().1).ok_or(DialError::NoKey)?;
        Ok((key, Exchange::begin(stream).await?))
    }

    async fn ask(&self, exchange: &mut Exchange, callers: &BTreeSet<SpiffeId>) -> Result<NodeSessionAnswer, DialError> {
        let body = serde_json::to_vec(&NodeSessionRequest {
            speaks_for: callers.iter().cloned().collect(),
            instance: Some(self.instance),
        })?;
        let request = Request::builder()
            .method(Method::POST)
            .uri(PATH)
            .header(header::HOST, self.address.to_string())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(ClientError::from)?;
        let answer = exchange.ask(request, ANSWER_BYTES).await?;
        if answer.status != StatusCode::CREATED {
            return Err(DialError::Refused { status: answer.status, reason: reason_of(&answer.body) });
        }
        let answer: NodeSessionAnswer = serde_json::from_slice(&answer.body)?;
        match () {
            () if !answer.labels.keys().eq(callers) => Err(DialError::OtherCallers),
            () if answer.seconds == 0 => Err(DialError::Over),
            () => Ok(answer),
        }
    }
}

/// The stable name in a problem. Another node's text does not come into the log.
fn reason_of(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Problem {
        reason: String,
    }
    let is_name = |text: &str| text.len() <= 64 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    let problem = serde_json::from_slice::<Problem>(body).ok();
    problem.map(|problem| problem.reason).filter(|reason| is_name(reason)).unwrap_or_default()
}

/// As many in one request as it has room for.
pub fn in_batches(callers: &BTreeSet<SpiffeId>) -> Vec<BTreeSet<SpiffeId>> {
    let mut batches: Vec<BTreeSet<SpiffeId>> = Vec::new();
    let mut bytes = 0;
    for id in callers {
        bytes += id.as_str().len();
        match batches.last_mut() {
            Some(batch) if batch.len() < MAX_ENTRIES && bytes <= BATCH_BYTES => drop(batch.insert(id.clone())),
            _ => {
                bytes = id.as_str().len();
                batches.push(BTreeSet::from([id.clone()]));
            }
        }
    }
    batches
}

/// The server is one node of the policy, by its SPIFFE ID. What its host is called does not matter.
struct Meant {
    verifier: Arc<Verifier>,
    node: Node,
}

impl fmt::Debug for Meant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Meant").field("node", &self.node.name).finish_non_exhaustive()
    }
}

impl ServerCertVerifier for Meant {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let chain: Vec<CertificateDer<'_>> = std::iter::once(end_entity).chain(intermediates).cloned().collect();
        let now = i64::try_from(now.as_secs()).ok().and_then(|now| Timestamp::from_second(now).ok());
        let now = now.ok_or(Error::FailedToGetCurrentTime)?;
        match certificate_of(&self.node, &self.verifier, &chain, Usage::Server, now) {
            Ok(_) => Ok(ServerCertVerified::assertion()),
            Err(refused) => Err(CertificateError::Other(OtherError(Arc::new(refused))).into()),
        }
    }

    /// Never asked: TLS 1.2 is not spoken.
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Possession.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Possession.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Possession.supported_verify_schemes()
    }
}
