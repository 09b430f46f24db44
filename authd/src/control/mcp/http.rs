//! The gateway over streamable HTTP: one path for each server.
//!
//! Enters: requests of agents whose connection is known. Leaves: answers, as JSON or as events. Never: a session of somebody
//! else, or a message whose headers say something else than its body.

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, Request, State},
    http::{Method, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
    routing::{any, get, post},
};
use http_body_util::{BodyExt, Limited};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use serde::Deserialize;
use tokio::{sync::mpsc, time::timeout};

use super::{
    BoxFuture, Gateway, Reach, STATELESS_VERSION, agent as stream_agent,
    authorization::{Metadata, WELL_KNOWN},
    conversation::{Conversation, QUEUE},
    events::{self, Refusal, Told},
    gate::Agent,
    headers,
    message::{FromAgent, INVALID_REQUEST, Id, RpcError, TOO_MUCH},
    methods::{self, Era},
    session::{SessionError, SessionId, Sessions, Visit},
    sse,
};
use crate::control::{life::Life, problem::Problem};

/// Where servers are.
pub const PATH: &str = "/v1/mcp";
/// The protocol of streams of lines (RFC 9110, 7.8).
pub const UPGRADE: &str = "authd-mcp-stdio";
/// From a request's headers to the end of its body.
const BODY: Duration = Duration::from_secs(15);
/// Until a server has answered `initialize`.
const BEGIN: Duration = Duration::from_secs(30);
/// A command line that is looked for.
const COMMAND_BYTES: usize = 16 << 10;
const SWEEP: Duration = Duration::from_secs(30);

/// Who may come to which server: what knows the policy and the caller's proofs.
pub trait Access: Send + Sync + 'static {
    /// The gateway to a server, and the agent as which the caller of a request comes to it; or why it does not.
    fn enter<'a>(&'a self, server: &'a str, head: &'a Parts) -> BoxFuture<'a, Result<(Arc<Gateway>, Agent), Problem>>;
    /// The name of the server that is started by exactly this command.
    fn of_command<'a>(&'a self, command: &'a [String], head: &'a Parts) -> BoxFuture<'a, Result<String, Problem>>;
    /// What a server is as a resource, for callers who have to show tokens.
    fn metadata<'a>(&'a self, server: &'a str, head: &'a Parts) -> BoxFuture<'a, Result<Metadata, Problem>>;
}

type Door = Arc<dyn Access>;

/// To be merged into the router that serves the caller's connection.
pub fn router(access: Door) -> Router {
    Router::new()
        .route(PATH, post(of_command))
        .route("/v1/mcp/{server}", any(endpoint))
        .route("/v1/mcp/{server}/stdio", post(upgrade))
        .route(&format!("{WELL_KNOWN}/v1/mcp/{{server}}"), get(metadata))
        .with_state(access)
}

/// Ends sessions that nobody uses, or whose agents are not let in any more, as long as it is polled.
pub async fn keep_swept(sessions: Arc<Sessions<Arc<Conversation>>>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        for conversation in sessions.all() {
            // If nobody can say it of one, it is the same with the others.
            if !conversation.look_again().await {
                break;
            }
        }
        end_all(sessions.sweep(Timestamp::now(), |conversation| conversation.has_ended()));
    }
}

/// Ends what was taken out.
pub fn end_all(gone: Vec<Arc<Conversation>>) {
    for conversation in gone {
        tokio::spawn(async move { conversation.end().await });
    }
}

async fn endpoint(State(access): State<Door>, Path(server): Path<String>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let (gateway, agent) = match access.enter(&server, &head).await {
        Ok(entered) => entered,
        Err(problem) => return problem.into_response(),
    };
    if !headers::is_origin_allowed(&head.headers, &gateway.origins) {
        return Problem::forbidden("mcp_origin", "pages of this origin may not ask").into_response();
    }
    // Streams of their own, and sessions, were given up with that version (Earlier Streamable HTTP Revisions).
    let is_stateless = head.headers.get(headers::PROTOCOL_VERSION).is_some_and(|value| value == STATELESS_VERSION);
    let subscribes =
        is_stateless && head.headers.get(headers::METHOD).is_some_and(|method| method == methods::SUBSCRIBE);
    let is_endless = head.method == Method::GET || subscribes;
    let life = head.extensions.get::<Life>().cloned().unwrap_or_default();
    let owed = life.owe(gateway.limits.approval_with_progress + gateway.limits.owed);
    let answer = match head.method.as_str() {
        "POST" => said(gateway, agent, &head, body).await,
        "GET" | "DELETE" if is_stateless => Err(other_method("POST")),
        "GET" => listen(gateway, agent, &head).await,
        "DELETE" => end(gateway, agent, &head).await,
        _ => Err(other_method("POST, GET, DELETE")),
    };
    let mut response = answer.unwrap_or_else(|response| response);
    // A stream says more of itself.
    let headers = response.headers_mut();
    headers.entry(header::CACHE_CONTROL).or_insert(header::HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
    owed.given(response, is_endless)
}

fn other_method(allowed: &str) -> Response {
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path has other methods")
        .with(header::ALLOW, allowed)
        .into_response()
}

async fn said(gateway: Arc<Gateway>, agent: Agent, head: &Parts, body: Body) -> Result<Response, Response> {
    if headers::accepts(&head.headers) != (true, true) {
        let detail = "accept application/json and text/event-stream";
        return Err(Problem::new(StatusCode::NOT_ACCEPTABLE, "mcp_not_acceptable", detail).into_response());
    }
    if !headers::is_json(&head.headers) {
        let detail = "a message is application/json";
        return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "mcp_content_type", detail).into_response());
    }
    let bytes = whole(body, gateway.limits.agent_message).await.map_err(IntoResponse::into_response)?;
    let message =
        FromAgent::parse(&bytes, gateway.limits.agent_message).map_err(|error| bad(RpcError::from(&error)))?;
    let id = match &message {
        FromAgent::Request(request) => Some(request.id.clone()),
        FromAgent::Notification(_) | FromAgent::Response(_) => None,
    };
    let era = headers::era(&head.headers, &message).map_err(|error| bad_request(error, id.as_ref()))?;
    match (era, message) {
        (Era::Stateless, FromAgent::Request(request)) => {
            // Whom would a process belong to that answers one request?
            if let Reach::Command(_) = gateway.reach {
                return Err(bad_request(headers::needs_session(), id.as_ref()));
            }
            let visit = gateway.sessions.visit(&agent.caller).map_err(|error| {
                let refused = RpcError::new(TOO_MUCH, error.reason(), error.to_string());
                Refusal::new(StatusCode::TOO_MANY_REQUESTS, refused).into_response(id.as_ref())
            })?;
            let conversation = Conversation::new(gateway.clone(), agent.clone());
            Ok(ask(&gateway, conversation, agent, era, request, Some((visit, head.headers.clone()))).await)
        }
        // Nothing that they could be about outlives its request; clients send some all the same.
        (Era::Stateless, FromAgent::Notification(_)) => Ok(StatusCode::ACCEPTED.into_response()),
        (Era::Stateless, FromAgent::Response(_)) => {
            Err(bad(RpcError::new(INVALID_REQUEST, "mcp_not_asked", "servers of this version do not ask")))
        }
        (Era::Handshake, FromAgent::Request(request)) if request.method == methods::INITIALIZE => {
            begin(gateway, agent, head, request).await
        }
        (Era::Handshake, message) => {
            let (_, conversation) = session(&gateway, &agent, head, id.as_ref())?;
            let told = match message {
                FromAgent::Request(request) => {
                    return Ok(ask(&gateway, conversation, agent, era, request, None).await);
                }
                FromAgent::Notification(notification) => conversation.notify(&agent, notification).await,
                FromAgent::Response(response) => conversation.respond(&agent, response).await,
            };
            told.map_err(|refusal| refusal.into_response(None))?;
            Ok(StatusCode::ACCEPTED.into_response())
        }
    }
}

async fn ask(
    gateway: &Gateway,
    conversation: Arc<Conversation>,
    agent: Agent,
    era: Era,
    request: super::message::Request,
    alone: Option<(Visit, http::HeaderMap)>,
) -> Response {
    let (told, heard) = mpsc::channel(QUEUE);
    let id = request.id.clone();
    tokio::spawn(async move {
        let (_visit, sent) = alone.unzip();
        conversation.request(agent, era, request, sent, told).await;
    });
    events::answer(heard, id, gateway.limits.patience, gateway.limits.keep_alive).await
}

/// `initialize`: a session, if the server wants one to begin.
async fn begin(
    gateway: Arc<Gateway>,
    agent: Agent,
    head: &Parts,
    request: super::message::Request,
) -> Result<Response, Response> {
    let id = request.id.clone();
    if head.headers.contains_key(headers::SESSION_ID) {
        session(&gateway, &agent, head, Some(&id))?;
        let error = RpcError::new(INVALID_REQUEST, "mcp_already_initialized", "the session was begun before");
        return Err(bad_request(error, Some(&id)));
    }
    let refused = |error: SessionError| {
        let refused = RpcError::new(TOO_MUCH, error.reason(), error.to_string());
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, refused).into_response(Some(&id))
    };
    // The place is taken before the server, or a process, has to do with it.
    let mut opened = Opened::new(&gateway, &agent).map_err(refused)?;
    let conversation = opened.conversation.clone();
    let (told, mut heard) = mpsc::channel(QUEUE);
    tokio::spawn(conversation.clone().request(agent.clone(), Era::Handshake, request, None, told));
    // What the server says before its answer is about nothing that an agent knows of.
    let answer = timeout(BEGIN, async {
        loop {
            match heard.recv().await {
                Some(Told::Heard(heard)) => match heard.message.filter(|message| message.answers(&id)) {
                    Some(message) => return events::json(&message),
                    None => continue,
                },
                Some(Told::Refused(refusal)) => return refusal.into_response(Some(&id)),
                None => return StatusCode::BAD_GATEWAY.into_response(),
            }
        }
    });
    let mut response = answer.await.unwrap_or_else(|_| StatusCode::GATEWAY_TIMEOUT.into_response());
    if conversation.version().is_none() {
        opened.end().await;
    } else if gateway.is_retired() {
        // The server took its time, and meanwhile the policy changed.
        return Err(refused(SessionError::Replaced));
    } else if let Ok(value) = header::HeaderValue::from_str(opened.id.as_str()) {
        response.headers_mut().insert(headers::SESSION_ID, value);
        opened.kept = true;
    }
    Ok(response)
}

/// A session that was opened. Until its id is handed out, it ends with this: whoever goes away before leaves nothing behind.
struct Opened {
    gateway: Arc<Gateway>,
    key: String,
    id: SessionId,
    conversation: Arc<Conversation>,
    kept: bool,
}

impl Opened {
    fn new(gateway: &Arc<Gateway>, agent: &Agent) -> Result<Self, SessionError> {
        let conversation = Conversation::new(gateway.clone(), agent.clone());
        let Agent { key, caller, .. } = agent;
        let (id, idle) = gateway.sessions.open(Timestamp::now(), &gateway.name, key, caller, conversation.clone());
        end_all(idle);
        let opened = Self { gateway: gateway.clone(), key: key.clone(), id: id?, conversation, kept: false };
        // Whoever retired it before has not seen this session; whoever does after this will.
        if gateway.is_retired() { Err(SessionError::Replaced) } else { Ok(opened) }
    }

    async fn end(mut self) {
        self.kept = true;
        self.close();
        self.conversation.end().await;
    }

    fn close(&self) {
        self.gateway.sessions.close(&self.gateway.name, &self.key, self.id.as_str());
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if !self.kept {
            self.close();
            end_all(vec![self.conversation.clone()]);
        }
    }
}

async fn listen(gateway: Arc<Gateway>, agent: Agent, head: &Parts) -> Result<Response, Response> {
    if !headers::accepts(&head.headers).1 {
        let detail = "accept text/event-stream";
        return Err(Problem::new(StatusCode::NOT_ACCEPTABLE, "mcp_not_acceptable", detail).into_response());
    }
    let (_, conversation) = session(&gateway, &agent, head, None)?;
    let after = head.headers.get(headers::LAST_EVENT_ID).map(|value| value.to_str().unwrap_or_default());
    if after.is_some_and(|id| !sse::is_id(id)) {
        return Err(bad(RpcError::new(INVALID_REQUEST, "mcp_bad_event_id", "Last-Event-ID is no event's id")));
    }
    let heard = conversation.listen(agent, after).await.map_err(|refusal| refusal.into_response(None))?;
    Ok(events::stream(heard, None, None, gateway.limits.keep_alive))
}

async fn end(gateway: Arc<Gateway>, agent: Agent, head: &Parts) -> Result<Response, Response> {
    let (id, conversation) = session(&gateway, &agent, head, None)?;
    gateway.sessions.close(&gateway.name, &agent.key, &id);
    conversation.end().await;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// The session that a request is about. One that is somebody else's does not exist, nor one with another server of that name.
fn session(
    gateway: &Arc<Gateway>,
    agent: &Agent,
    head: &Parts,
    request: Option<&Id>,
) -> Result<(String, Arc<Conversation>), Response> {
    let mut values = head.headers.get_all(headers::SESSION_ID).iter();
    let id = match (values.next(), values.next()) {
        (Some(value), None) => value.to_str().unwrap_or_default().to_owned(),
        _ => {
            let error = RpcError::new(INVALID_REQUEST, "mcp_session_missing", "one Mcp-Session-Id header is needed");
            return Err(bad_request(error, request));
        }
    };
    let found = gateway.sessions.get(Timestamp::now(), &gateway.name, &agent.key, &id);
    let is_there = |found: &Arc<Conversation>| !found.has_ended() && Arc::ptr_eq(found.gateway(), gateway);
    let Some(conversation) = found.filter(is_there) else {
        let error = RpcError::new(INVALID_REQUEST, "mcp_session_unknown", "there is no such session: begin a new one");
        return Err(Refusal::new(StatusCode::NOT_FOUND, error).into_response(request));
    };
    headers::version_of_session(&head.headers, conversation.version().as_deref())
        .map_err(|error| bad_request(error, request))?;
    Ok((id, conversation))
}

/// Lines over a connection that is no HTTP any more.
async fn upgrade(State(access): State<Door>, Path(server): Path<String>, request: Request) -> Response {
    let (mut head, _) = request.into_parts();
    let asks = head.headers.get(header::UPGRADE).is_some_and(|value| value == UPGRADE);
    let Some(upgrade) = head.extensions.remove::<hyper::upgrade::OnUpgrade>().filter(|_| asks) else {
        let detail = format!("this path wants `Upgrade: {UPGRADE}`, over HTTP/1.1");
        return Problem::new(StatusCode::UPGRADE_REQUIRED, "mcp_upgrade_required", detail)
            .with(header::UPGRADE, UPGRADE)
            .into_response();
    };
    let (gateway, agent) = match access.enter(&server, &head).await {
        Ok(entered) => entered,
        Err(problem) => return problem.into_response(),
    };
    if !headers::is_origin_allowed(&head.headers, &gateway.origins) {
        return Problem::forbidden("mcp_origin", "pages of this origin may not ask").into_response();
    }
    let opened = match Opened::new(&gateway, &agent) {
        Ok(opened) => opened,
        Err(error) => {
            return Problem::new(StatusCode::SERVICE_UNAVAILABLE, error.reason(), error.to_string()).into_response();
        }
    };
    tokio::spawn(async move {
        match upgrade.await {
            Ok(stream) => {
                let (input, output) = tokio::io::split(TokioIo::new(stream));
                let id = opened.id.as_str();
                let used = || drop(gateway.sessions.get(Timestamp::now(), &gateway.name, &agent.key, id));
                stream_agent::serve(&gateway, &opened.conversation, &agent, input, output, used).await;
            }
            Err(error) => tracing::debug!(%error, "a connection that was to become a stream"),
        }
        opened.end().await;
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, UPGRADE)];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Command {
    command: Vec<String>,
}

/// Which server a command starts.
async fn of_command(State(access): State<Door>, request: Request) -> Result<Response, Problem> {
    let (head, body) = request.into_parts();
    let bytes = whole(body, COMMAND_BYTES).await?;
    let asked: Command = serde_json::from_slice(&bytes)
        .map_err(|error| Problem::bad_request("bad_request", format!("this is no command: {error}")))?;
    let server = access.of_command(&asked.command, &head).await?;
    Ok(Json(serde_json::json!({ "server": server })).into_response())
}

async fn metadata(
    State(access): State<Door>,
    Path(server): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    let (head, _) = request.into_parts();
    Ok(Json(access.metadata(&server, &head).await?).into_response())
}

async fn whole(body: Body, most: usize) -> Result<Vec<u8>, Problem> {
    let read = timeout(BODY, Limited::new(body, most).collect()).await;
    let slow = || Problem::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", "the body took too long");
    let read = read.map_err(|_| slow())?.map_err(|error| match error.is::<http_body_util::LengthLimitError>() {
        true => {
            let detail = format!("the body is longer than {most} bytes");
            Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "request_oversize", detail)
        }
        false => Problem::bad_request("bad_request", "the body ends too early"),
    })?;
    Ok(read.to_bytes().to_vec())
}

fn bad(error: RpcError) -> Response {
    bad_request(error, None)
}

fn bad_request(error: RpcError, id: Option<&Id>) -> Response {
    Refusal::new(StatusCode::BAD_REQUEST, error).into_response(id)
}
