//! A server of streamable HTTP, as a client speaks to it.
//!
//! Enters: messages that were allowed. Leaves: the server's messages, of a bounded size. Never: a header that the gateway did
//! not set itself, a cookie, a redirect, or a header of the server's answer but its session id, which goes no further than here.

use std::{collections::VecDeque, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use reqwest::{Client, Response, Url};
use tokio::{sync::mpsc, time::timeout};

use super::{
    Limits,
    events::Heard,
    gate::Bearer,
    headers::{LAST_EVENT_ID, PROTOCOL_VERSION, SESSION_ID},
    message::{FromServer, Kind, MessageError},
    sse::{self, SseError},
};
use crate::control::fetch::{self, FetchError, For};

/// From a request to the head of its answer, for what is not waited on by anybody: notifications, and ends.
const TELL: Duration = Duration::from_secs(30);
const END: Duration = Duration::from_secs(3);
/// Of a body that says what is wrong.
const ERROR_BYTES: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    #[error("the server cannot be reached, or the connection broke: {0}")]
    Unreachable(String),
    #[error("the server did not say anything for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("the server does not accept what authd shows it (status {0})")]
    Unauthorized(u16),
    #[error("the server has ended the session")]
    Gone,
    #[error("the server answers with status {0}")]
    Status(u16),
    #[error("the server refuses: {}", .message.text())]
    Refused { status: u16, message: FromServer },
    #[error("the server answers with something else than JSON or an event stream")]
    ContentType,
    #[error("the server's answer is longer than {0} bytes")]
    TooLong(usize),
    #[error("the server's event stream: {0}")]
    Events(#[from] SseError),
    #[error("the server's message: {0}")]
    Message(#[from] MessageError),
    #[error("the server's process cannot be started: {0}")]
    Launch(String),
}

impl UpstreamError {
    /// Stable name for answers and records.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "mcp_server_unreachable",
            Self::Silent(_) => "mcp_server_silent",
            Self::Unauthorized(_) => "mcp_server_unauthorized",
            Self::Gone => "mcp_server_session_ended",
            Self::Status(_) | Self::Refused { .. } => "mcp_server_bad_status",
            Self::ContentType => "mcp_server_content_type",
            Self::TooLong(_) | Self::Events(SseError::Oversize(_)) => "mcp_server_message_oversize",
            Self::Events(SseError::NotUtf8) | Self::Message(_) => "mcp_server_message_malformed",
            Self::Launch(_) => "mcp_server_not_started",
        }
    }

    /// What an agent is told in HTTP's terms.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Gone => StatusCode::NOT_FOUND,
            Self::Silent(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::Status(status) | Self::Refused { status, .. } if (400..500).contains(status) => {
                StatusCode::from_u16(*status).unwrap_or(StatusCode::BAD_GATEWAY)
            }
            _ => StatusCode::BAD_GATEWAY,
        }
    }
}

/// What goes into the headers of a request, besides the token.
#[derive(Clone, Default, Debug)]
pub struct Carried {
    /// The server's own session id.
    pub session: Option<String>,
    pub version: Option<String>,
    /// `Mcp-Method`, `Mcp-Name`, `Mcp-Param-*`: written by the gateway from the body.
    pub mirrored: HeaderMap,
}

/// A server of streamable HTTP.
pub struct HttpUpstream {
    client: Client,
    url: Url,
    allow_private: bool,
}

impl HttpUpstream {
    /// `roots`: PEM of the authorities that its certificate may be of; without, those that the system trusts.
    pub fn new(url: &str, allow_private: bool, roots: Option<&[u8]>) -> Result<Self, FetchError> {
        let parsed = Url::parse(url).map_err(|_| FetchError::Url(url.to_owned()))?;
        fetch::check(&parsed, allow_private)?;
        Ok(Self { client: fetch::client(For::Calls, allow_private, roots)?, url: parsed, allow_private })
    }

    /// Sends a request, and returns what comes of it; and the session's id, if the answer gives one.
    pub async fn ask(
        &self,
        body: Vec<u8>,
        carried: &Carried,
        token: Option<&Bearer>,
        limits: &Limits,
    ) -> Result<(Answering, Option<String>), UpstreamError> {
        let response = self.post(body, carried, token, limits.silence).await?;
        if response.status() != StatusCode::OK {
            return Err(refused(response, carried.session.is_some()).await);
        }
        let session = response.headers().get(SESSION_ID).and_then(|value| value.to_str().ok());
        let session = session.filter(|id| sse::is_id(id)).map(str::to_owned);
        Ok((answering(response, limits).await?, session))
    }

    /// Sends a notification or a response.
    pub async fn tell(&self, body: Vec<u8>, carried: &Carried, token: Option<&Bearer>) -> Result<(), UpstreamError> {
        let response = self.post(body, carried, token, TELL).await?;
        if response.status().is_success() {
            return Ok(());
        }
        Err(refused(response, carried.session.is_some()).await)
    }

    /// Opens the stream of what the server says by itself, or goes on with a stream that broke.
    pub async fn listen(
        &self,
        after: Option<&str>,
        carried: &Carried,
        token: Option<&Bearer>,
        most: usize,
    ) -> Result<Answering, UpstreamError> {
        let mut headers = self.headers(carried, token);
        headers.insert(header::ACCEPT, HeaderValue::from_static("text/event-stream"));
        put(&mut headers, LAST_EVENT_ID, after);
        let sent = timeout(TELL, self.client.get(self.url.clone()).headers(headers).send()).await;
        let response = sent.map_err(|_| UpstreamError::Silent(TELL))?.map_err(unreachable)?;
        if response.status() != StatusCode::OK {
            return Err(refused(response, carried.session.is_some()).await);
        }
        match essence(response.headers()).as_str() {
            "text/event-stream" => Ok(Answering::stream(response, most)),
            _ => Err(UpstreamError::ContentType),
        }
    }

    /// Ends the server's session. Whether it listens is its own affair.
    pub async fn end(&self, carried: &Carried, token: Option<&Bearer>) {
        if carried.session.is_none() {
            return;
        }
        let headers = self.headers(carried, token);
        let _ = timeout(END, self.client.delete(self.url.clone()).headers(headers).send()).await;
    }

    async fn post(
        &self,
        body: Vec<u8>,
        carried: &Carried,
        token: Option<&Bearer>,
        patience: Duration,
    ) -> Result<Response, UpstreamError> {
        // An address that was written as one is not resolved, and so is looked at here.
        fetch::check(&self.url, self.allow_private).map_err(|error| UpstreamError::Unreachable(error.to_string()))?;
        let mut headers = self.headers(carried, token);
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(header::ACCEPT, HeaderValue::from_static("application/json, text/event-stream"));
        let sent = self.client.post(self.url.clone()).headers(headers).body(body).send();
        timeout(patience, sent).await.map_err(|_| UpstreamError::Silent(patience))?.map_err(unreachable)
    }

    fn headers(&self, carried: &Carried, token: Option<&Bearer>) -> HeaderMap {
        let mut headers = carried.mirrored.clone();
        put(&mut headers, SESSION_ID, carried.session.as_deref());
        put(&mut headers, PROTOCOL_VERSION, carried.version.as_deref());
        if let Some(value) = token.and_then(Bearer::header) {
            headers.insert(header::AUTHORIZATION, value);
        }
        headers
    }
}

fn put(headers: &mut HeaderMap, name: HeaderName, value: Option<&str>) {
    if let Some(value) = value.and_then(|value| HeaderValue::from_str(value).ok()) {
        headers.insert(name, value);
    }
}

fn unreachable(error: reqwest::Error) -> UpstreamError {
    UpstreamError::Unreachable(error.without_url().to_string())
}

/// Why it did not work. What the server says of its own authorization is for authd, and not for the agent.
async fn refused(response: Response, in_session: bool) -> UpstreamError {
    let status = response.status().as_u16();
    if matches!(status, 401 | 403) {
        return UpstreamError::Unauthorized(status);
    }
    if essence(response.headers()) == "application/json"
        && let Ok(Ok(body)) = timeout(END, whole(response, ERROR_BYTES, END)).await
        && let Ok(message) = FromServer::parse(&body)
        && matches!(message.kind, Kind::Error | Kind::Response { is_error: true, .. })
        && !(status == 404 && in_session)
    {
        return UpstreamError::Refused { status, message };
    }
    match status {
        404 if in_session => UpstreamError::Gone,
        _ => UpstreamError::Status(status),
    }
}

async fn answering(response: Response, limits: &Limits) -> Result<Answering, UpstreamError> {
    match essence(response.headers()).as_str() {
        "application/json" => {
            let body = timeout(limits.owed, whole(response, limits.server_message, limits.silence));
            let body = body.await.map_err(|_| UpstreamError::Silent(limits.owed))??;
            Ok(Answering::Ready(Some(Heard::message(FromServer::parse(&body)?))))
        }
        "text/event-stream" => Ok(Answering::stream(response, limits.server_message)),
        _ => Err(UpstreamError::ContentType),
    }
}

/// The media type without its parameters.
fn essence(headers: &HeaderMap) -> String {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// A body, no piece of which takes longer than `silence`.
async fn whole(mut response: Response, most: usize, silence: Duration) -> Result<Vec<u8>, UpstreamError> {
    let mut bytes = Vec::new();
    loop {
        let chunk = timeout(silence, response.chunk()).await.map_err(|_| UpstreamError::Silent(silence))?;
        let Some(chunk) = chunk.map_err(unreachable)? else { return Ok(bytes) };
        if bytes.len() + chunk.len() > most {
            return Err(UpstreamError::TooLong(most));
        }
        bytes.extend_from_slice(&chunk);
    }
}

/// What a server says to one request, or by itself, message by message.
pub enum Answering {
    Ready(Option<Heard>),
    Stream {
        response: Box<Response>,
        reader: Box<sse::Reader>,
    },
    /// A process whose lines were sorted by what they answer; first what came before anybody listened.
    Channel(VecDeque<Heard>, mpsc::Receiver<Heard>),
}

impl Answering {
    fn stream(response: Response, most: usize) -> Self {
        Self::Stream { response: Box::new(response), reader: Box::new(sse::Reader::new(most)) }
    }

    /// The next message. `None`: the stream has ended. May be dropped while it waits, and asked again.
    pub async fn next(&mut self, silence: Duration) -> Option<Result<Heard, UpstreamError>> {
        match self {
            Self::Ready(message) => message.take().map(Ok),
            Self::Channel(before, channel) => match before.pop_front() {
                Some(heard) => Some(Ok(heard)),
                None => match timeout(silence, channel.recv()).await {
                    Ok(heard) => heard.map(Ok),
                    Err(_) => Some(Err(UpstreamError::Silent(silence))),
                },
            },
            Self::Stream { response, reader } => loop {
                if let Some(event) = reader.take() {
                    return Some(Heard::of(event).map_err(UpstreamError::from));
                }
                match timeout(silence, response.chunk()).await {
                    Err(_) => return Some(Err(UpstreamError::Silent(silence))),
                    Ok(Err(error)) => return Some(Err(unreachable(error))),
                    Ok(Ok(None)) => return None,
                    Ok(Ok(Some(piece))) => {
                        if let Err(error) = reader.feed(&piece) {
                            return Some(Err(error.into()));
                        }
                    }
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
        time::{Instant, sleep},
    };

    use super::*;

    /// Before each piece.
    const PAUSE: Duration = Duration::from_millis(200);

    /// What comes of a JSON answer of nine pieces.
    async fn slowly(limits: Limits) -> (Result<(), &'static str>, Duration) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/mcp", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await;
            let answer = br#"{"jsonrpc":"2.0","id":1,"result":{}}"#;
            let head = format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}", answer.len());
            let _ = stream.write_all(format!("{head}\r\n\r\n").as_bytes()).await;
            for piece in answer.chunks(4) {
                sleep(PAUSE).await;
                let _ = stream.write_all(piece).await;
            }
        });
        let server = HttpUpstream::new(&url, true, None).unwrap();
        let begun = Instant::now();
        let answer = server.ask(Vec::new(), &Carried::default(), None, &limits).await;
        (answer.map(|_| ()).map_err(|error| error.reason()), begun.elapsed())
    }

    #[tokio::test]
    async fn an_answer_may_be_slow_but_not_silent_and_not_for_ever() {
        let normal = Limits::default();
        assert_eq!(slowly(Limits { silence: PAUSE * 8, ..normal.clone() }).await.0, Ok(()));
        for limits in [Limits { silence: PAUSE / 10, ..normal.clone() }, Limits { owed: PAUSE, ..normal }] {
            let (answer, took) = slowly(limits).await;
            assert!(answer == Err("mcp_server_silent") && took < PAUSE * 9, "{answer:?} {took:?}");
        }
    }
}
