//! A caller of the control path: what `authd grant` and `authd whoami` speak.
//!
//! Enters: where to connect, and what to show. Leaves: answers. Never: a file that was not named.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{HeaderMap, Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    time::timeout,
};
use tokio_rustls::TlsConnector;

use crate::control::LOCAL_HOST;

/// A request, from the connection to the last byte of the answer.
const PATIENCE: Duration = Duration::from_secs(30);
const ANSWER_BYTES: usize = 1 << 20;
/// All headers of an answer.
const HEADER_BYTES: usize = 64 << 10;
const MAX_HEADERS: usize = 64;

/// Where authd listens.
#[derive(Clone, Debug)]
pub enum Target {
    /// On this node.
    Socket(PathBuf),
    /// On another: `https://host:7443`, and PEM bytes of the authorities that its certificate may be of.
    Peer { host: String, port: u16, authorities: Vec<u8> },
}

impl Target {
    /// What requests and proofs call it (RFC 3986, 3.2): an IPv6 address is in brackets.
    pub fn authority(&self) -> String {
        match self {
            Self::Socket(_) => LOCAL_HOST.to_owned(),
            Self::Peer { host, port, .. } if host.contains(':') => format!("[{host}]:{port}"),
            Self::Peer { host, port, .. } => format!("{host}:{port}"),
        }
    }
}

/// The client's certificate chain and key, in PEM.
pub struct Identity {
    pub certificates: Vec<u8>,
    pub key: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("connecting: {0}")]
    Connect(io::Error),
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error("{what}: {error}")]
    Pem { what: &'static str, error: rustls::pki_types::pem::Error },
    #[error("`{0}` is no host name")]
    Host(String),
    #[error("HTTP: {0}")]
    Http(#[from] hyper::Error),
    #[error("the answer: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error("the request: {0}")]
    Request(#[from] http::Error),
    #[error("no answer within {} s", PATIENCE.as_secs())]
    Timeout,
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// What lies at a path, for anybody.
pub async fn get(target: &Target, path: &str) -> Result<Answer, ClientError> {
    ask(target, None, Method::GET, path, HeaderMap::new(), Vec::new()).await
}

/// One request on a connection of its own.
pub async fn ask(
    target: &Target,
    identity: Option<&Identity>,
    method: Method,
    path: &str,
    headers: HeaderMap,
    body: Vec<u8>,
) -> Result<Answer, ClientError> {
    timeout(PATIENCE, ask_in_time(target, identity, method, path, headers, body))
        .await
        .map_err(|_| ClientError::Timeout)?
}

async fn ask_in_time(
    target: &Target,
    identity: Option<&Identity>,
    method: Method,
    path: &str,
    headers: HeaderMap,
    body: Vec<u8>,
) -> Result<Answer, ClientError> {
    let mut request = Request::builder().method(method).uri(path).body(Full::new(Bytes::from(body)))?;
    *request.headers_mut() = headers;
    if let Ok(host) = header::HeaderValue::from_str(&target.authority()) {
        request.headers_mut().insert(header::HOST, host);
    }
    match target {
        Target::Socket(path) => {
            let stream = UnixStream::connect(path).await.map_err(ClientError::Connect)?;
            match identity {
                None => exchange(stream, request).await,
                // Whoever holds the socket's directory is authd: the certificate is the client's to show, not to check.
                Some(identity) => {
                    let config = ClientConfig::builder().dangerous().with_custom_certificate_verifier(Arc::new(Local));
                    let stream = tls(config, identity, LOCAL_HOST, stream).await?;
                    exchange(stream, request).await
                }
            }
        }
        Target::Peer { host, port, authorities } => {
            let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(ClientError::Connect)?;
            let mut roots = RootCertStore::empty();
            for certificate in CertificateDer::pem_slice_iter(authorities) {
                roots.add(certificate.map_err(|error| ClientError::Pem { what: "authorities", error })?)?;
            }
            let config = ClientConfig::builder().with_root_certificates(roots);
            let stream = match identity {
                Some(identity) => tls(config, identity, host, stream).await?,
                None => connect(config.with_no_client_auth(), host, stream).await?,
            };
            exchange(stream, request).await
        }
    }
}

pub async fn tls<S: AsyncRead + AsyncWrite + Unpin>(
    config: rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>,
    identity: &Identity,
    host: &str,
    stream: S,
) -> Result<tokio_rustls::client::TlsStream<S>, ClientError> {
    let chain = CertificateDer::pem_slice_iter(&identity.certificates)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| ClientError::Pem { what: "certificate", error })?;
    let key = PrivateKeyDer::from_pem_slice(&identity.key).map_err(|error| ClientError::Pem { what: "key", error })?;
    connect(config.with_client_auth_cert(chain, key)?, host, stream).await
}

async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
    config: ClientConfig,
    host: &str,
    stream: S,
) -> Result<tokio_rustls::client::TlsStream<S>, ClientError> {
    let name = ServerName::try_from(host.to_owned()).map_err(|_| ClientError::Host(host.to_owned()))?;
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(ClientError::Connect)
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Result<Answer, ClientError> {
    Exchange::begin(stream).await?.ask(request, ANSWER_BYTES).await
}

/// A connection on which one request follows another. It ends when it is dropped.
pub struct Exchange {
    sender: hyper::client::conn::http1::SendRequest<Full<Bytes>>,
    connection: tokio::task::JoinHandle<hyper::Result<()>>,
}

impl Exchange {
    pub async fn begin(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Result<Self, ClientError> {
        let mut builder = hyper::client::conn::http1::Builder::new();
        builder.max_buf_size(HEADER_BYTES).max_headers(MAX_HEADERS);
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await?;
        Ok(Self { sender, connection: tokio::spawn(connection) })
    }

    /// The answer to one request, if its body is no longer than `most` bytes.
    pub async fn ask(&mut self, request: Request<Full<Bytes>>, most: usize) -> Result<Answer, ClientError> {
        self.sender.ready().await?;
        let response = self.sender.send_request(request).await?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, most).collect().await.map_err(ClientError::Body)?.to_bytes();
        Ok(Answer { status: head.status, headers: head.headers, body })
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// The server on this node's socket, which its path vouches for. Any certificate will do, if the server has its key.
#[derive(Debug)]
pub struct Local;

impl rustls::client::danger::ServerCertVerifier for Local {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let supported = &rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, supported)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let supported = &rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, supported)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
