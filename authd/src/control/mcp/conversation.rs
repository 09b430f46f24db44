//! One agent's conversation with one server, whatever either side is reached by.
//!
//! Enters: an agent's messages, and what the server says. Leaves: what passes, in both directions, and a report of each call.
//! Never: a call that its gate did not allow, an answer to what was not asked, or a message that nobody understands.

use std::{
    collections::{HashMap, VecDeque},
    future::pending,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::{HeaderMap, StatusCode};
use serde_json::Value;
use tokio::{
    sync::{Notify, OnceCell, mpsc, watch},
    time::Instant,
};

use super::{
    Gateway, HANDSHAKE_VERSIONS, Reach, STATELESS_VERSION,
    calls::{self, Admission},
    events::{Heard, Refusal, Told},
    gate::{Agent, Bearer, Denial, Outcome, Report, ToolCall},
    headers,
    message::{
        FromServer, INVALID_REQUEST, Id, Kind, METHOD_NOT_FOUND, NOT_ALLOWED, Notification, Request, Response,
        RpcError, SERVER_UNAVAILABLE, TOO_MUCH,
    },
    methods::{self, Era},
    stdio::Stdio,
    tools,
    upstream::{Answering, Carried, UpstreamError},
};
use crate::control::verifier::lock;

/// Requests whose answers may be fetched later, with `Last-Event-ID`.
const LATER: usize = 64;
/// Messages that wait for a slow agent.
pub const QUEUE: usize = 2;
/// A stream of what a server says by itself may be silent, but not for ever.
const LISTENING: Duration = Duration::from_secs(3600);

pub struct Conversation {
    gateway: Arc<Gateway>,
    /// Who began it. Nobody else goes on with it.
    owner: Agent,
    link: Link,
    state: Mutex<State>,
    ended: watch::Sender<Ended>,
}

/// How far a conversation has come to its end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Ended {
    No,
    /// The server's side of it: what it owes is answered with an error.
    ByServer,
    /// All of it: nobody is answered any more.
    Wholly,
}

enum Link {
    /// With the server's own session id.
    Http(Mutex<Option<String>>),
    /// Started by the first message.
    Process(OnceCell<Stdio>),
}

#[derive(Default)]
struct State {
    /// What both sides agreed on.
    version: Option<String>,
    asked: HashMap<Id, Asked>,
    later: VecDeque<(Id, Asked)>,
    server_asked: VecDeque<Id>,
    listeners: usize,
}

/// A request that is not answered yet.
struct Asked {
    method: String,
    era: Era,
    sent: bool,
    cancelled: Arc<Notify>,
    call: Option<Arc<Underway>>,
}

/// A call, until it is reported.
struct Underway {
    agent: Agent,
    call: ToolCall,
    begun: Instant,
    decided_after: Mutex<Option<Duration>>,
    reported: AtomicBool,
}

impl Underway {
    fn report(&self, outcome: Outcome) {
        if self.reported.swap(true, Ordering::Relaxed) {
            return;
        }
        let took = self.begun.elapsed();
        let decided_after = lock(&self.decided_after).unwrap_or(took);
        self.agent.gate.report(&self.call, Report { outcome, decided_after, took });
    }
}

impl Drop for Underway {
    /// Whoever followed the call was ended before it was.
    fn drop(&mut self) {
        self.report(Outcome::Left);
    }
}

impl Conversation {
    pub fn new(gateway: Arc<Gateway>, owner: Agent) -> Arc<Self> {
        let link = match gateway.reach {
            Reach::Http(_) => Link::Http(Mutex::default()),
            Reach::Command(_) => Link::Process(OnceCell::new()),
        };
        Arc::new(Self { gateway, owner, link, state: Mutex::default(), ended: watch::Sender::new(Ended::No) })
    }

    pub fn version(&self) -> Option<String> {
        lock(&self.state).version.clone()
    }

    pub fn has_ended(&self) -> bool {
        *self.ended.borrow() != Ended::No
    }

    /// Waits until one side has ended it.
    pub async fn finished(&self) {
        let _ = self.ended.subscribe().wait_for(|ended| *ended != Ended::No).await;
    }

    /// Carries out a request. All that comes of it is told, and ends with its answer, if there is one. `sent` are the agent's
    /// headers, where it has any.
    pub async fn request(
        self: Arc<Self>,
        agent: Agent,
        era: Era,
        request: Request,
        sent: Option<HeaderMap>,
        told: mpsc::Sender<Told>,
    ) {
        let underway = match self.understand(&agent, era, &request, sent.as_ref()) {
            Ok(underway) => underway,
            Err(error) => {
                let refusal = Refusal::new(status_of(&error, era), error);
                let _ = told.send(Told::Refused(refusal)).await;
                return;
            }
        };
        let id = request.id.clone();
        let result = match self.begin(era, &request, underway.clone()) {
            Ok(cancelled) => self.carry_out(&agent, era, request, underway.as_deref(), &told, &cancelled).await,
            // The id is another request's: what belongs to that stays.
            Err(error) => {
                if let Some(underway) = underway {
                    underway.report(Outcome::Failed { reason: error.reason().to_owned() });
                }
                let _ = told.send(Told::Refused(Refusal::new(status_of(&error, era), error))).await;
                return;
            }
        };
        if let Err(stopped) = result {
            // Reported once: whoever takes the entry away does it.
            if let Some(Asked { call: Some(underway), .. }) = lock(&self.state).asked.remove(&id) {
                underway.report(stopped.outcome);
            }
            if let Link::Process(process) = &self.link
                && let Some(process) = process.get()
            {
                process.forget(&id);
            }
            if let Some(last) = stopped.told {
                let _ = told.send(last).await;
            }
        }
    }

    /// What the request asks for, if the gateway knows what that is.
    fn understand(
        &self,
        agent: &Agent,
        era: Era,
        request: &Request,
        sent: Option<&HeaderMap>,
    ) -> Result<Option<Arc<Underway>>, RpcError> {
        if !methods::is_request(&request.method, era) {
            return Err(RpcError::new(METHOD_NOT_FOUND, "mcp_method_unknown", "Method not found"));
        }
        if request.method != methods::CALL {
            return Ok(None);
        }
        let call = tools::call(&self.gateway.name, request)?;
        if let Some(sent) = sent.filter(|_| era == Era::Stateless) {
            headers::params_agree(sent, &self.gateway.mirrored.of(&call))?;
        }
        let (begun, decided_after, reported) = (Instant::now(), Mutex::default(), AtomicBool::new(false));
        Ok(Some(Arc::new(Underway { agent: agent.clone(), call, begun, decided_after, reported })))
    }

    async fn carry_out(
        &self,
        agent: &Agent,
        era: Era,
        request: Request,
        underway: Option<&Underway>,
        told: &mpsc::Sender<Told>,
        cancelled: &Notify,
    ) -> Result<(), Stopped> {
        let id = &request.id;
        let token = self.token(agent, era, &request, underway, told, cancelled).await?;
        if let Some(asked) = lock(&self.state).asked.get_mut(id) {
            asked.sent = true;
        }
        let mut carried = self.carried(era);
        if era == Era::Stateless {
            let params = underway.map(|underway| self.gateway.mirrored.of(&underway.call)).unwrap_or_default();
            carried.mirrored = headers::mirrored(&request, &params);
        }
        let stop = self.stop(era, cancelled, told);
        tokio::pin!(stop);
        let failed = |error: UpstreamError| {
            // The agent is told so as well (404), and begins anew.
            if let UpstreamError::Gone = error {
                self.ended
                    .send_if_modified(|ended| std::mem::replace(ended, (*ended).max(Ended::ByServer)) == Ended::No);
            }
            let outcome = Outcome::Failed { reason: error.reason().to_owned() };
            Stopped { told: Some(Told::Refused(refusal(&error))), outcome }
        };
        let answering = tokio::select! {
            biased;
            () = &mut stop => return Err(self.stopped(era, id).await),
            answering = self.ask(&request, &carried, token.as_ref()) => answering,
        };
        let mut answering = answering.map_err(failed)?;
        let mut resumable = false;
        loop {
            let next = tokio::select! {
                biased;
                () = &mut stop => return Err(self.stopped(era, id).await),
                // Who may fetch the rest later does so on another stream: two at once the server would not have.
                () = told.closed(), if resumable => None,
                next = answering.next(self.gateway.limits.silence) => next,
            };
            match next {
                Some(Ok(heard)) => {
                    resumable |= heard.id.is_some() && era == Era::Handshake;
                    let is_answer = heard.message.as_ref().is_some_and(|message| message.answers(id));
                    if let Some(heard) = self.pass(agent, era, heard).await {
                        // One who left is not told; what the server does is followed to its end all the same.
                        let _ = told.send(Told::Heard(heard)).await;
                    }
                    if is_answer {
                        return Ok(());
                    }
                }
                Some(Err(error)) => return Err(failed(error)),
                None if resumable => {
                    self.keep(id);
                    return Ok(());
                }
                None => {
                    let is_process = matches!(self.link, Link::Process(_));
                    let broke = || UpstreamError::Unreachable("the stream ended without an answer".to_owned());
                    return Err(failed(if is_process { UpstreamError::Gone } else { broke() }));
                }
            }
        }
    }

    /// What the agent is not answered by: a notification, or a response to what the server asked.
    pub async fn notify(&self, agent: &Agent, notification: Notification) -> Result<(), Refusal> {
        if !methods::is_notification(&notification.method) {
            let error = RpcError::new(METHOD_NOT_FOUND, "mcp_method_unknown", "Method not found");
            return Err(Refusal::new(StatusCode::BAD_REQUEST, error));
        }
        if notification.method == methods::CANCELLED {
            let asked = notification.cancels().and_then(|id| {
                let state = lock(&self.state);
                let asked = state.asked.get(&id)?;
                Some((asked.sent && asked.era == Era::Handshake, asked.cancelled.clone()))
            });
            let Some((is_known_there, cancelled)) = asked else { return Ok(()) };
            // The agent waits no more, even if the server does not hear of it.
            let told = match is_known_there {
                true => self.send(agent, notification.to_bytes()).await,
                false => Ok(()),
            };
            cancelled.notify_one();
            return told;
        }
        self.send(agent, notification.to_bytes()).await
    }

    pub async fn respond(&self, agent: &Agent, response: Response) -> Result<(), Refusal> {
        let was_asked = {
            let mut state = lock(&self.state);
            let position = state.server_asked.iter().position(|id| *id == response.id);
            position.and_then(|position| state.server_asked.remove(position)).is_some()
        };
        if !was_asked {
            let error = RpcError::new(INVALID_REQUEST, "mcp_not_asked", "the server did not ask for this");
            return Err(Refusal::new(StatusCode::BAD_REQUEST, error));
        }
        self.send(agent, response.to_bytes()).await
    }

    /// What the server says by itself, or the rest of a stream that broke after an event, until either side ends it.
    pub async fn listen(self: &Arc<Self>, agent: Agent, after: Option<&str>) -> Result<mpsc::Receiver<Told>, Refusal> {
        let place = Place::of(self)?;
        let mut answering = match &self.link {
            Link::Http(_) => {
                let token = self.access(&agent).await?;
                let Reach::Http(upstream) = &self.gateway.reach else { return Err(refusal(&UpstreamError::Gone)) };
                let most = self.gateway.limits.server_message;
                let listening = upstream.listen(after, &self.carried(Era::Handshake), token.as_ref(), most).await;
                listening.map_err(|error| refusal(&error))?
            }
            Link::Process(process) => {
                let process = process.get().filter(|_| !self.has_ended());
                let process = process.ok_or_else(|| refusal(&UpstreamError::Gone))?;
                let occupied = RpcError::new(TOO_MUCH, "mcp_too_many_streams", "the session has such a stream already");
                process.listen().ok_or_else(|| Refusal::new(StatusCode::CONFLICT, occupied))?
            }
        };
        let (told, heard) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            let conversation = &place.0;
            let mut ended = conversation.ended.subscribe();
            loop {
                let next = tokio::select! {
                    biased;
                    _ = ended.wait_for(|ended| *ended == Ended::Wholly) => return,
                    () = told.closed() => return,
                    next = answering.next(LISTENING) => next,
                };
                match next {
                    Some(Ok(heard)) => {
                        if let Some(heard) = conversation.pass(&agent, Era::Handshake, heard).await
                            && told.send(Told::Heard(heard)).await.is_err()
                        {
                            return;
                        }
                    }
                    Some(Err(error)) => {
                        tracing::debug!(%error, "a stream of an MCP server");
                        return;
                    }
                    None => return,
                }
            }
        });
        Ok(heard)
    }

    /// Ends it, and tells the server.
    pub async fn end(&self) {
        self.ended.send_replace(Ended::Wholly);
        if let (Link::Http(_), Reach::Http(upstream)) = (&self.link, &self.gateway.reach)
            && let Ok(token) = self.owner.gate.access().await
        {
            upstream.end(&self.carried(Era::Handshake), token.as_ref()).await;
        }
    }

    /// Registers a request; what cancels it is told there.
    fn begin(&self, era: Era, request: &Request, call: Option<Arc<Underway>>) -> Result<Arc<Notify>, RpcError> {
        let mut state = lock(&self.state);
        if request.method == methods::INITIALIZE && state.version.is_some() {
            return Err(RpcError::new(INVALID_REQUEST, "mcp_already_initialized", "the session was begun before"));
        }
        if state.asked.contains_key(&request.id) {
            return Err(RpcError::new(INVALID_REQUEST, "mcp_id_in_use", "a request with this id is not answered yet"));
        }
        if state.asked.len() >= self.gateway.limits.in_flight {
            return Err(RpcError::new(TOO_MUCH, "mcp_too_many_requests", "too many requests are not answered yet"));
        }
        state.later.retain(|(id, _)| *id != request.id);
        let cancelled = Arc::new(Notify::new());
        let (method, cancelled_too) = (request.method.clone(), cancelled.clone());
        state.asked.insert(request.id.clone(), Asked { method, era, sent: false, cancelled: cancelled_too, call });
        Ok(cancelled)
    }

    /// The token for a request, if the gate admits it. `None`: the agent was answered already.
    async fn token(
        &self,
        agent: &Agent,
        era: Era,
        request: &Request,
        underway: Option<&Underway>,
        told: &mpsc::Sender<Told>,
        cancelled: &Notify,
    ) -> Result<Option<Bearer>, Stopped> {
        let Some(underway) = underway else {
            let access = self.access(agent).await;
            return access.map_err(|refusal| {
                let reason = refusal.error.reason().to_owned();
                Stopped { told: Some(Told::Refused(refusal)), outcome: Outcome::Failed { reason } }
            });
        };
        let (limits, call) = (&self.gateway.limits, &underway.call);
        let progress_token = request.meta("progressToken");
        let admission = calls::admitted(&*agent.gate, call, progress_token, limits, told, cancelled).await;
        *lock(&underway.decided_after) = Some(underway.begun.elapsed());
        let answer = |answer: Result<FromServer, RpcError>| match answer {
            Ok(message) => Told::Heard(Heard::message(message)),
            Err(error) => Told::Refused(Refusal::new(status_of(&error, era), error)),
        };
        let (told, outcome) = match admission {
            Admission::Allowed(token) => return Ok(token),
            Admission::Denied(denial) => {
                let told = match &agent.challenge {
                    Some(challenge) if !denial.scopes.is_empty() => {
                        Told::Refused(challenge.step_up(&denial.scopes, &denial.message))
                    }
                    _ => answer(tools::denied(&request.id, call, &denial, era)),
                };
                (Some(told), Outcome::Denied(denial))
            }
            Admission::Unapproved { approval } => {
                let told = answer(tools::unapproved(&request.id, call, &approval, era));
                (Some(told), Outcome::Unapproved { approval })
            }
            Admission::Cancelled => (None, Outcome::Cancelled { sent: false }),
        };
        Err(Stopped { told, outcome })
    }

    async fn access(&self, agent: &Agent) -> Result<Option<Bearer>, Refusal> {
        agent.gate.access().await.map_err(|denial: Denial| {
            let mut error = RpcError::new(NOT_ALLOWED, &denial.reason, denial.message.clone());
            match &agent.challenge {
                Some(challenge) if !denial.scopes.is_empty() => challenge.step_up(&denial.scopes, &denial.message),
                _ => {
                    error.message = denial.message;
                    Refusal::new(StatusCode::FORBIDDEN, error)
                }
            }
        })
    }

    fn carried(&self, era: Era) -> Carried {
        let session = match (&self.link, era) {
            (Link::Http(session), Era::Handshake) => lock(session).clone(),
            _ => None,
        };
        let version = match era {
            Era::Handshake => self.version(),
            Era::Stateless => Some(STATELESS_VERSION.to_owned()),
        };
        Carried { session, version, mirrored: HeaderMap::new() }
    }

    async fn ask(
        &self,
        request: &Request,
        carried: &Carried,
        token: Option<&Bearer>,
    ) -> Result<Answering, UpstreamError> {
        let limits = &self.gateway.limits;
        match (&self.link, &self.gateway.reach) {
            (Link::Http(session), Reach::Http(upstream)) => {
                let body = request.to_bytes();
                let (answering, given) =
                    upstream.ask(body, carried, token, limits.server_message, limits.silence).await?;
                if request.method == methods::INITIALIZE {
                    *lock(session) = given;
                }
                Ok(answering)
            }
            (Link::Process(process), Reach::Command(launch)) => {
                let start = async {
                    let streams = launch.launch(&self.owner).await;
                    let streams = streams.map_err(|error| UpstreamError::Launch(error.to_string()))?;
                    Ok::<_, UpstreamError>(Stdio::new(streams, limits, self.ended.clone()))
                };
                let process = process.get_or_try_init(|| start).await?;
                process.ask(&request.id, request.to_bytes(), request.meta("progressToken")).await
            }
            _ => Err(UpstreamError::Gone),
        }
    }

    /// Sends what has no answer.
    async fn send(&self, agent: &Agent, body: Vec<u8>) -> Result<(), Refusal> {
        let sent = match (&self.link, &self.gateway.reach) {
            // Without a session, nothing that is sent could be about anything.
            (Link::Http(_), Reach::Http(_)) if self.version().is_none() => Ok(()),
            (Link::Http(_), Reach::Http(upstream)) => {
                let token = self.access(agent).await?;
                upstream.tell(body, &self.carried(Era::Handshake), token.as_ref()).await
            }
            (Link::Process(process), _) => match process.get() {
                Some(process) => process.send(body).await,
                None => Err(UpstreamError::Gone),
            },
            _ => Err(UpstreamError::Gone),
        };
        sent.map_err(|error| refusal(&error))
    }

    /// Ends when nobody waits for a request any more.
    async fn stop(&self, era: Era, cancelled: &Notify, told: &mpsc::Sender<Told>) {
        let left = async {
            match era {
                // The end of the stream is how a request is cancelled (2026-07-28, Cancellation).
                Era::Stateless => told.closed().await,
                // It is none (2025-11-25, Sending Messages).
                Era::Handshake => pending().await,
            }
        };
        let mut ended = self.ended.subscribe();
        tokio::select! {
            () = cancelled.notified() => {}
            () = left => {}
            _ = ended.wait_for(|ended| *ended == Ended::Wholly) => {}
        }
    }

    /// A process has to be told of what a server of HTTP sees by the end of its stream.
    async fn stopped(&self, era: Era, id: &Id) -> Stopped {
        if let (Link::Process(process), Era::Stateless) = (&self.link, era)
            && let Some(process) = process.get()
        {
            let params = serde_json::json!({ "requestId": id.to_value() });
            let notification =
                Notification { method: methods::CANCELLED.to_owned(), params: params.as_object().cloned() };
            let _ = process.send(notification.to_bytes()).await;
        }
        Stopped { told: None, outcome: Outcome::Cancelled { sent: true } }
    }

    /// The answer may be fetched on another stream.
    fn keep(&self, id: &Id) {
        let mut state = lock(&self.state);
        let Some(asked) = state.asked.remove(id) else { return };
        if state.later.len() == LATER {
            state.later.pop_front();
        }
        state.later.push_back((id.clone(), asked));
    }

    /// What an agent is told of what the server says.
    async fn pass(&self, agent: &Agent, era: Era, heard: Heard) -> Option<Heard> {
        let Some(message) = heard.message else { return Some(heard) };
        let (id, retry) = (heard.id, heard.retry);
        let message = match message.kind.clone() {
            Kind::Notification { method } => methods::is_notification_of_server(&method).then_some(message),
            Kind::Request { id, method } => self.asks(agent, era, id, &method, message).await,
            Kind::Response { id, is_error } => self.settle(agent, &id, is_error, message),
            Kind::Error => {
                tracing::debug!(text = message.text(), "an MCP server answers nothing that was asked");
                None
            }
        };
        // Where to go on is known even if the message is not.
        (message.is_some() || id.is_some()).then_some(Heard { message, id, retry })
    }

    /// A request of the server.
    async fn asks(&self, agent: &Agent, era: Era, id: Id, method: &str, message: FromServer) -> Option<FromServer> {
        if methods::is_request_of_server(method, era) {
            let mut state = lock(&self.state);
            // Who asks more than that has stopped to wait for the first ones.
            if state.server_asked.len() == self.gateway.limits.server_requests {
                state.server_asked.pop_front();
            }
            state.server_asked.push_back(id);
            return Some(message);
        }
        let refused = RpcError::new(METHOD_NOT_FOUND, "mcp_method_unknown", "Method not found");
        let outcome = Err(refused.to_value(None).get("error").cloned().unwrap_or_default());
        let _ = self.send(agent, Response { id, outcome }.to_bytes()).await;
        None
    }

    /// An answer of the server: to what was asked, and once.
    fn settle(&self, agent: &Agent, id: &Id, is_error: bool, message: FromServer) -> Option<FromServer> {
        let asked = {
            let mut state = lock(&self.state);
            let kept = state.later.iter().position(|(kept, _)| kept == id);
            let kept = kept.and_then(|position| state.later.remove(position)).map(|(_, asked)| asked);
            state.asked.remove(id).or(kept)
        }?;
        if let Some(underway) = &asked.call {
            let is_error = is_error || tools::is_error(&message);
            underway.report(Outcome::Answered { is_error, bytes: message.text().len() });
        }
        if is_error {
            return Some(message);
        }
        let passed = match asked.method.as_str() {
            methods::LIST => {
                let listed = tools::listed(&message, id, &*agent.gate, &self.gateway.mirrored);
                listed.ok_or("the server's list of tools is none")
            }
            methods::INITIALIZE => self.agree(&message).map(|()| message),
            _ => Ok(message),
        };
        Some(passed.unwrap_or_else(|why| {
            let error = RpcError::new(SERVER_UNAVAILABLE, "mcp_server_message_malformed", why);
            FromServer::answer(id.clone(), &error.to_value(Some(id)))
        }))
    }

    /// The version that the server chose.
    fn agree(&self, message: &FromServer) -> Result<(), &'static str> {
        let value = message.to_value();
        let version = value.pointer("/result/protocolVersion").and_then(Value::as_str);
        let known = version.filter(|version| HANDSHAKE_VERSIONS.contains(version));
        let known = known.ok_or("the server chose a version of the protocol that the gateway does not know")?;
        lock(&self.state).version = Some(known.to_owned());
        Ok(())
    }
}

/// Why a request is not followed any further.
struct Stopped {
    told: Option<Told>,
    outcome: Outcome,
}

/// One of the streams that a conversation may have open.
struct Place(Arc<Conversation>);

impl Place {
    fn of(conversation: &Arc<Conversation>) -> Result<Self, Refusal> {
        let mut state = lock(&conversation.state);
        if state.listeners >= conversation.gateway.limits.listeners {
            let error = RpcError::new(TOO_MUCH, "mcp_too_many_streams", "the session has enough streams open");
            return Err(Refusal::new(StatusCode::CONFLICT, error));
        }
        state.listeners += 1;
        Ok(Self(conversation.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.0.state).listeners -= 1;
    }
}

/// In HTTP's terms. Before 2026-07-28 an error of a request is an answer like any other; since then it has a status.
fn status_of(error: &RpcError, era: Era) -> StatusCode {
    match (era, error.code) {
        (Era::Handshake, _) => StatusCode::OK,
        (Era::Stateless, METHOD_NOT_FOUND) => StatusCode::NOT_FOUND,
        (Era::Stateless, _) => StatusCode::BAD_REQUEST,
    }
}

/// What an agent is told of a server that does not answer as it should. What a server says of its own accord about a
/// request that it refuses goes on to the agent, which may be able to ask otherwise.
fn refusal(error: &UpstreamError) -> Refusal {
    let mut told = RpcError::new(SERVER_UNAVAILABLE, error.reason(), error.to_string());
    if let UpstreamError::Refused { message, .. } = error {
        let said = message.to_value();
        let code = said.pointer("/error/code").and_then(Value::as_i64).and_then(|code| i32::try_from(code).ok());
        told.code = code.unwrap_or(SERVER_UNAVAILABLE);
        told.message = said.pointer("/error/message").and_then(Value::as_str).unwrap_or_default().to_owned();
        told.data = said.pointer("/error/data").cloned();
    }
    Refusal::new(error.status(), told)
}
