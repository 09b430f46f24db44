//! What an agent is told, and how it is written to it.
//!
//! Enters: messages that passed. Leaves: the body of an answer, event by event, with comments while there is nothing to say.
//! Never: more than a few messages that wait for a slow agent.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use hyper::body::Frame;
use tokio::{
    sync::mpsc,
    time::{Instant, Interval, MissedTickBehavior, interval_at},
};

use super::{
    message::{FromServer, Id, METHOD_NOT_FOUND, MessageError, RpcError, SERVER_UNAVAILABLE},
    methods::Era,
    rewrite,
    sse::{self, Event},
    upstream::UpstreamError,
};

/// One event: usually a message, sometimes only where to go on.
#[derive(Clone, PartialEq, Debug)]
pub struct Heard {
    pub message: Option<FromServer>,
    pub id: Option<String>,
    pub retry: Option<Duration>,
}

impl Heard {
    pub fn message(message: FromServer) -> Self {
        Self { message: Some(message), id: None, retry: None }
    }

    pub fn of(event: Event) -> Result<Self, MessageError> {
        let message = event.data.map(|data| FromServer::parse(data.as_bytes())).transpose()?;
        Ok(Self { message, id: event.id, retry: event.retry })
    }

    fn to_event(&self) -> Event {
        let data = self.message.as_ref().map(|message| message.text().to_owned());
        Event { id: self.id.clone(), retry: self.retry, data }
    }
}

/// What comes of a request.
#[derive(Debug)]
pub enum Told {
    Heard(Heard),
    /// It is not answered by the server. The last thing that is told.
    Refused(Refusal),
}

#[derive(Debug)]
pub struct Refusal {
    pub status: StatusCode,
    pub error: RpcError,
    pub headers: HeaderMap,
}

impl Refusal {
    pub fn new(status: StatusCode, error: RpcError) -> Self {
        Self { status, error, headers: HeaderMap::new() }
    }

    /// Before 2026-07-28 an error of a request is an answer like any other; since then it has a status.
    pub fn in_era(error: RpcError, era: Era) -> Self {
        let status = match (era, error.code) {
            (Era::Handshake, _) => StatusCode::OK,
            (Era::Stateless, METHOD_NOT_FOUND) => StatusCode::NOT_FOUND,
            (Era::Stateless, _) => StatusCode::BAD_REQUEST,
        };
        Self::new(status, error)
    }

    /// What an agent is told of a server that does not answer as it should. What a server says of its own accord about a request
    /// that it refuses goes on to the agent, which may be able to ask otherwise.
    pub fn of_server(error: &UpstreamError) -> Self {
        let mut told = RpcError::new(SERVER_UNAVAILABLE, error.reason(), error.to_string());
        if let UpstreamError::Refused { message, .. } = error {
            let said = rewrite::error(message).unwrap_or_default();
            let code = said["code"].as_i64().and_then(|code| i32::try_from(code).ok());
            told.code = code.unwrap_or(rewrite::OTHER_CODE);
            told.message = said["message"].as_str().unwrap_or_default().to_owned();
            told.data = said.get("data").cloned();
        }
        Self::new(error.status(), told)
    }

    pub fn into_response(self, id: Option<&Id>) -> Response {
        let kind = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
        (self.status, self.headers, kind, self.error.to_value(id).to_string()).into_response()
    }
}

/// The answer to a request: as JSON if all of it comes soon, or else as a stream.
pub async fn answer(mut told: mpsc::Receiver<Told>, id: Id, patience: Duration, keep_alive: Duration) -> Response {
    let first = match tokio::time::timeout(patience, told.recv()).await {
        Ok(Some(Told::Refused(refusal))) => return refusal.into_response(Some(&id)),
        Ok(Some(Told::Heard(heard))) => {
            if let Some(message) = heard.message.as_ref().filter(|message| message.answers(&id)) {
                return json(message);
            }
            Some(Told::Heard(heard))
        }
        Ok(None) | Err(_) => None,
    };
    stream(told, first, Some(id), keep_alive)
}

pub fn json(message: &FromServer) -> Response {
    let kind = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    (StatusCode::OK, kind, message.text().to_owned()).into_response()
}

/// A stream of events, which ends when nobody tells any more.
pub fn stream(told: mpsc::Receiver<Told>, first: Option<Told>, id: Option<Id>, keep_alive: Duration) -> Response {
    let mut pause = interval_at(Instant::now() + keep_alive, keep_alive);
    pause.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store, no-transform")),
        (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (StatusCode::OK, headers, Body::new(Events { told, first, id, pause })).into_response()
}

struct Events {
    told: mpsc::Receiver<Told>,
    first: Option<Told>,
    /// What a late refusal answers.
    id: Option<Id>,
    pause: Interval,
}

impl hyper::body::Body for Events {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        let next = match this.first.take() {
            Some(first) => Poll::Ready(Some(first)),
            None => this.told.poll_recv(cx),
        };
        let text = match next {
            Poll::Pending => {
                ready!(this.pause.poll_tick(cx));
                sse::KEEP_ALIVE.to_owned()
            }
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Ready(Some(told)) => {
                this.pause.reset();
                let event = match told {
                    Told::Heard(heard) => heard.to_event(),
                    Told::Refused(refusal) => {
                        let data = refusal.error.to_value(this.id.as_ref()).to_string();
                        Event { data: Some(data), ..Event::default() }
                    }
                };
                sse::write(&event)
            }
        };
        Poll::Ready(Some(Ok(Frame::data(text.into()))))
    }
}
