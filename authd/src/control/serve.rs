//! One connection, from its first byte to its last: TLS where it is spoken, HTTP/1.1 or HTTP/2, limits on all of it.
//!
//! Enters: a descriptor that dataplane accepted, and who it belongs to. Leaves: requests for [`super::api`]. Never: patience
//! with a caller who is slow, or a buffer that a caller can fill without end.

use std::{
    io, net::TcpStream as StdTcp, os::fd::OwnedFd, os::unix::net::UnixStream as StdUnix, sync::Arc, time::Duration,
};

use axum::{Router, body::Body};
use hyper::{Request, body::Incoming, http::Extensions, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use rustls::{pki_types::CertificateDer, server::Acceptor};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    time::timeout,
};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};
use tower::ServiceExt;

use super::{
    Shared,
    api::{Open, Session},
    life::Life,
    nodes,
};
use crate::{
    daemon::{admin::first_byte, metrics::results::OK},
    ipc::{Caller, Connection, FromControl},
};

/// From the connection to the end of its TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// From the first byte of a request to the last of its headers.
const HEADERS: Duration = Duration::from_secs(5);
/// A connection that has lived so long is ended after the requests that it serves: [`HEADERS`] later, but for answers that
/// [`Life`] knows of.
const LIFE: Duration = Duration::from_secs(300);
/// All headers of a request. HTTP/1.1 needs room for a request line and a token.
const HEADER_BYTES: usize = 16 << 10;
const MAX_HEADERS: usize = 64;
/// Requests of one HTTP/2 connection at one time.
const STREAMS: u32 = 32;
/// The first byte of a TLS record with a handshake message (RFC 8446, 5.1).
const TLS_HANDSHAKE: u8 = 22;

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("the handshake took too long")]
    SlowHandshake,
    #[error("TLS: {0}")]
    Tls(io::Error),
    #[error("the caller asks for another server")]
    WrongName,
    #[error("HTTP: {0}")]
    Http(Box<dyn std::error::Error + Send + Sync>),
    #[error("there are no settings yet")]
    NoSettings,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl ServeError {
    /// Stable name for records.
    pub fn reason(&self) -> Option<&'static str> {
        match self {
            Self::SlowHandshake => Some("handshake_timeout"),
            Self::Tls(_) => Some("handshake_failed"),
            Self::WrongName => Some("wrong_server_name"),
            Self::NoSettings | Self::Http(_) | Self::Io(_) => None,
        }
    }
}

/// Serves a connection until it ends, and tells dataplane so.
pub async fn serve(shared: Arc<Shared>, router: Router, fd: OwnedFd, connection: Connection, caller: Caller) {
    let open = Open::new(shared.clone(), connection);
    let result = serve_any(&shared, router, fd, open, caller).await;
    if let Err(error) = result {
        tracing::debug!(connection, %error, "a connection ended");
        if let Some(reason) = error.reason() {
            let reason = reason.to_owned();
            shared.tell(FromControl::Refused { connection, rule: None, reason, proofs: Vec::new() }).await;
        }
    }
}

async fn serve_any(
    shared: &Arc<Shared>,
    router: Router,
    fd: OwnedFd,
    open: Arc<Open>,
    caller: Caller,
) -> Result<(), ServeError> {
    if let Caller::Remote { .. } = caller {
        let stream = StdTcp::from(fd);
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        return serve_tls(shared, router, TcpStream::from_std(stream)?, open, caller).await;
    }
    if let Caller::Local { tcp: true, .. } = caller {
        let stream = StdTcp::from(fd);
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let session = Session::new(open, caller, Vec::new(), None);
        return serve_http(router, TcpStream::from_std(stream)?, session).await;
    }
    let stream = StdUnix::from(fd);
    stream.set_nonblocking(true)?;
    let stream = UnixStream::from_std(stream)?;
    match timeout(HANDSHAKE, first_byte(&stream)).await.map_err(|_| ServeError::SlowHandshake)?? {
        None => Ok(()),
        Some(TLS_HANDSHAKE) => serve_tls(shared, router, stream, open, caller).await,
        Some(_) => {
            let session = Session::new(open, caller, Vec::new(), None);
            serve_http(router, stream, session).await
        }
    }
}

/// TLS, with a client's certificate if it shows one. The handshake proves that it has the key; whether the certificate is
/// worth anything is decided with each request, so that the answer can say why not.
async fn serve_tls(
    shared: &Arc<Shared>,
    router: Router,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    open: Arc<Open>,
    caller: Caller,
) -> Result<(), ServeError> {
    let shaken = shake_hands(shared, stream, &caller).await;
    shared.counts.handshake(match &shaken {
        Ok(_) => OK,
        Err(error) => error.reason().unwrap_or("unavailable"),
    });
    let stream = shaken?;
    let (_, tls) = stream.get_ref();
    let chain: Vec<CertificateDer<'static>> =
        tls.peer_certificates().unwrap_or_default().iter().map(|c| c.clone().into_owned()).collect();
    // Another node may be at the other end; nobody of this one authenticates packets to it.
    let exported = if let Caller::Remote { .. } = caller { nodes::key_of(tls) } else { None };
    let session = Session::new(open, caller, chain, exported);
    serve_http(router, stream, session).await
}

async fn shake_hands<S: AsyncRead + AsyncWrite + Unpin>(
    shared: &Shared,
    stream: S,
    caller: &Caller,
) -> Result<TlsStream<S>, ServeError> {
    let verifier = shared.verifier().ok_or(ServeError::NoSettings)?;
    let config = verifier.tls().ok_or(ServeError::NoSettings)?;
    let is_remote = matches!(caller, Caller::Remote { .. });
    let handshake = async {
        let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await.map_err(ServeError::Tls)?;
        // Who asks for another server was led here, or tries what there is.
        let is_meant = start.client_hello().server_name().is_none_or(|name| verifier.is_called(name));
        if is_remote && !is_meant {
            return Err(ServeError::WrongName);
        }
        start.into_stream(config).await.map_err(ServeError::Tls)
    };
    timeout(HANDSHAKE, handshake).await.map_err(|_| ServeError::SlowHandshake)?
}

async fn serve_http(
    router: Router,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    session: Session,
) -> Result<(), ServeError> {
    let session = Arc::new(session);
    let known = move |extensions: &mut Extensions| drop(extensions.insert(session.clone()));
    serve_for(LIFE, HEADERS, router, stream, known).await
}

async fn serve_for(
    life: Duration,
    patience: Duration,
    router: Router,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    known: impl Fn(&mut Extensions) + Send + 'static,
) -> Result<(), ServeError> {
    let alive = Life::default();
    let marked = alive.clone();
    let service = service_fn(move |mut request: Request<Incoming>| {
        known(request.extensions_mut());
        request.extensions_mut().insert(marked.clone());
        router.clone().oneshot(request.map(Body::new))
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .max_buf_size(HEADER_BYTES)
        .max_headers(MAX_HEADERS)
        .half_close(false);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(HEADER_BYTES as u32)
        .max_concurrent_streams(STREAMS)
        .max_pending_accept_reset_streams(STREAMS as usize)
        .keep_alive_interval(HEADERS)
        .keep_alive_timeout(HEADERS);
    // MCP over lines is no HTTP any more, from its first answer on.
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::pin!(connection);
    if let Ok(result) = timeout(life, connection.as_mut()).await {
        return result.map_err(ServeError::Http);
    }
    connection.as_mut().graceful_shutdown();
    alive.end();
    // What is being answered is answered; who is too slow for that loses it.
    tokio::select! {
        result = connection => result.map_err(ServeError::Http),
        () = alive.spent(patience) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use axum::{extract::Request, response::Response, routing::get};
    use hyper::body::{Bytes, Frame};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        sync::mpsc,
        time::{Instant, sleep},
    };

    use super::*;

    const LIVES: Duration = Duration::from_millis(200);
    const PATIENCE: Duration = Duration::from_millis(200);
    const SLOW: Duration = Duration::from_millis(3000);

    /// One octet, and after [`SLOW`] many more.
    fn slowly(many: usize) -> Body {
        struct Pieces(mpsc::Receiver<Vec<u8>>);
        impl hyper::body::Body for Pieces {
            type Data = Bytes;
            type Error = Infallible;
            fn poll_frame(
                mut self: std::pin::Pin<&mut Self>,
                cx: &mut std::task::Context<'_>,
            ) -> std::task::Poll<Option<Result<Frame<Bytes>, Infallible>>> {
                self.0.poll_recv(cx).map(|piece| piece.map(|piece| Ok(Frame::data(piece.into()))))
            }
        }
        let (sender, pieces) = mpsc::channel(1);
        tokio::spawn(async move {
            let _ = sender.send(vec![b'a']).await;
            sleep(SLOW).await;
            for _ in 0..many {
                let _ = sender.send(vec![b'b'; 1 << 10]).await;
            }
        });
        Body::new(Pieces(pieces))
    }

    fn owed(request: &Request, many: usize, is_endless: bool) -> Response {
        let owed = request.extensions().get::<Life>().unwrap().owe(Duration::from_secs(60));
        owed.given(Response::new(slowly(many)), is_endless)
    }

    /// Asks, and returns the connection, and how long it lives.
    async fn ask(path: &str) -> (DuplexStream, tokio::task::JoinHandle<Duration>) {
        let router = Router::new()
            .route("/plain", get(async || Response::new(slowly(1))))
            .route("/owed", get(async |request: Request| owed(&request, 1, false)))
            .route("/much", get(async |request: Request| owed(&request, 1 << 10, false)))
            .route("/endless", get(async |request: Request| owed(&request, 1, true)));
        let (mut to, stream) = duplex(1 << 12);
        let begun = Instant::now();
        let served = tokio::spawn(async move {
            let _ = serve_for(LIVES, PATIENCE, router, stream, |_| {}).await;
            begun.elapsed()
        });
        to.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).await.unwrap();
        (to, served)
    }

    async fn answer(path: &str) -> (String, Duration) {
        let (mut to, served) = ask(path).await;
        let mut answer = Vec::new();
        to.read_to_end(&mut answer).await.unwrap();
        (String::from_utf8(answer).unwrap(), served.await.unwrap())
    }

    #[tokio::test]
    async fn an_answer_that_is_owed_outlives_its_connections_time() {
        let (text, lived) = answer("/owed").await;
        assert!(text.ends_with("b\r\n0\r\n\r\n") && lived > SLOW, "{text} {lived:?}");
        let (text, lived) = answer("/plain").await;
        assert!(text.ends_with("a\r\n") && lived < SLOW, "{text} {lived:?}");
    }

    #[tokio::test]
    async fn a_stream_without_an_end_ends_with_its_connection() {
        let (text, lived) = answer("/endless").await;
        assert!(text.ends_with("a\r\n0\r\n\r\n") && lived < SLOW, "{text} {lived:?}");
    }

    #[tokio::test]
    async fn who_does_not_read_is_not_waited_for() {
        let (_unread, served) = ask("/much").await;
        let lived = timeout(Duration::from_secs(10), served).await.unwrap().unwrap();
        assert!(lived > SLOW, "{lived:?}");
    }
}
