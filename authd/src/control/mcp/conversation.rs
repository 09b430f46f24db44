//! One agent's conversation with one server, whatever either side is reached by.
//!
//! Enters: an agent's messages, and what the server says. Leaves: what passes, in both directions, and a report of each call.
//! Never: a call that its gate did not allow, an answer to what was not asked, or a message that nobody understands.

mod heard;

use std::{
    collections::VecDeque,
    future::pending,
    sync::{Arc, Mutex},
    time::Duration,
};

use http::{HeaderMap, StatusCode};
use tokio::{
    sync::{Notify, OnceCell, OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::sleep,
};

use super::{
    Gateway, Reach, STATELESS_VERSION,
    calls::{self, Admission},
    events::{Heard, Refusal, Told},
    gate::{Agent, Bearer, Denial, Outcome, Standing},
    headers,
    message::{
        FromServer, INVALID_REQUEST, Id, METHOD_NOT_FOUND, NOT_ALLOWED, Notification, Request, Response, RpcError,
        TOO_MUCH,
    },
    methods::{self, Era},
    pending::{Asked, Pending, Source, Underway},
    stdio::Stdio,
    tools,
    upstream::{Answering, Carried, UpstreamError},
};
use crate::{control::verifier::lock, decisions::call::Arguments};

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
    /// One for each request.
    places: Arc<Semaphore>,
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
    pending: Pending,
    server_asked: VecDeque<Id>,
    listeners: usize,
}

/// A request that has its place among those of its conversation.
pub struct Begun {
    /// As the server gets it.
    request: Request,
    place: OwnedSemaphorePermit,
    agent: Agent,
    era: Era,
    id: Id,
    number: i64,
    underway: Option<Arc<Underway>>,
    cancelled: Arc<Notify>,
}

/// A request that is carried out.
struct Way<'a> {
    agent: &'a Agent,
    era: Era,
    /// By which the agent asks. The server gets the gateway's own number, which stands in the request.
    id: Id,
    number: i64,
    underway: Option<Arc<Underway>>,
    told: &'a mpsc::Sender<Told>,
    cancelled: Arc<Notify>,
}

impl Conversation {
    pub fn new(gateway: Arc<Gateway>, owner: Agent) -> Arc<Self> {
        let link = match gateway.reach {
            Reach::Http(_) => Link::Http(Mutex::default()),
            Reach::Command(_) => Link::Process(OnceCell::new()),
        };
        let places = Arc::new(Semaphore::new(gateway.limits.in_flight));
        let (state, ended) = (Mutex::default(), watch::Sender::new(Ended::No));
        Arc::new(Self { gateway, owner, link, state, places, ended })
    }

    pub fn gateway(&self) -> &Arc<Gateway> {
        &self.gateway
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

    /// Waits until nobody is answered any more.
    async fn over(&self) {
        let _ = self.ended.subscribe().wait_for(|ended| *ended == Ended::Wholly).await;
    }

    /// Tells an agent, unless the end comes before it reads.
    async fn tell(&self, told: &mpsc::Sender<Told>, what: Told) -> bool {
        tokio::select! {
            biased;
            sent = told.send(what) => sent.is_ok(),
            () = self.over() => false,
        }
    }

    /// Begins a request and carries it out. All that comes of it is told, and ends with its answer, if there is one. `sent` are
    /// the agent's headers, where it has any.
    pub async fn request(
        self: Arc<Self>,
        agent: Agent,
        era: Era,
        request: Request,
        sent: Option<HeaderMap>,
        told: mpsc::Sender<Told>,
    ) {
        match self.begin(agent, era, request, sent.as_ref()) {
            Ok(begun) => self.follow(begun, told).await,
            Err(error) => drop(self.tell(&told, Told::Refused(Refusal::in_era(error, era))).await),
        }
    }

    /// From here on the request may be cancelled. Nothing of it is sent yet.
    pub fn begin(
        &self,
        agent: Agent,
        era: Era,
        mut request: Request,
        sent: Option<&HeaderMap>,
    ) -> Result<Begun, RpcError> {
        let underway = self.understand(&agent, era, &mut request, sent)?;
        match self.register(era, &request, underway.clone()) {
            Ok((place, cancelled, number)) => {
                let id = std::mem::replace(&mut request.id, Id::Number(number));
                Ok(Begun { request, place, agent, era, id, number, underway, cancelled })
            }
            Err(error) => {
                if let Some(underway) = underway {
                    underway.report(Outcome::Failed { reason: error.reason().to_owned() });
                }
                Err(error)
            }
        }
    }

    /// Carries a request out.
    pub async fn follow(self: Arc<Self>, begun: Begun, told: mpsc::Sender<Told>) {
        // The place is free again when this is over, and not when the server has answered: what is not read takes room.
        let Begun { request, place: _place, agent, era, id, number, underway, cancelled } = begun;
        let way = Way { agent: &agent, era, id, number, underway, told: &told, cancelled };
        if let Err(stopped) = self.carry_out(&way, request).await {
            // Reported once: whoever takes the entry away does it.
            let asked = lock(&self.state).pending.remove(number);
            if let Some(Asked { call: Some(underway), .. }) = asked {
                underway.report(stopped.outcome);
            }
            if let Link::Process(process) = &self.link
                && let Some(process) = process.get()
            {
                process.forget(&Id::Number(number));
            }
            if let Some(last) = stopped.told {
                self.tell(&told, last).await;
            }
        }
    }

    /// What the request asks for, if the gateway knows what that is.
    fn understand(
        &self,
        agent: &Agent,
        era: Era,
        request: &mut Request,
        sent: Option<&HeaderMap>,
    ) -> Result<Option<Arc<Underway>>, RpcError> {
        if !methods::is_request(&request.method, era) {
            return Err(RpcError::new(METHOD_NOT_FOUND, "mcp_method_unknown", "Method not found"));
        }
        if request.method != methods::CALL {
            return Ok(None);
        }
        let mut call = tools::call(&self.gateway.name, request)?;
        if let Some(sent) = sent.filter(|_| era == Era::Stateless) {
            headers::params_agree(sent, &self.gateway.mirrored.of(&call))?;
        }
        // Gates judge what the server gets.
        let refused = match Arguments::new(&call.arguments) {
            Ok(arguments) => {
                call.arguments = arguments.map().clone();
                None
            }
            Err(error) => {
                let (reason, message) = (error.reason().to_owned(), error.to_string());
                Some(Denial { reason, message, policies: Vec::new(), scopes: Vec::new() })
            }
        };
        tools::as_decided(request, &call);
        Ok(Some(Underway::new(agent, call, refused)))
    }

    async fn carry_out(&self, way: &Way<'_>, request: Request) -> Result<(), Stopped> {
        let Way { agent, era, number, told, .. } = *way;
        let limits = &self.gateway.limits;
        let token = self.token(way, &request).await?;
        let mut carried = self.carried(era);
        if era == Era::Stateless {
            let params = way.underway.as_ref().map(|underway| self.gateway.mirrored.of(&underway.call));
            carried.mirrored = headers::mirrored(&request, &params.unwrap_or_default());
        }
        let stop = self.stop(era, &way.cancelled, told);
        tokio::pin!(stop);
        let failed = |error: UpstreamError| {
            // The agent is told so as well (404), and begins anew.
            if let UpstreamError::Gone = error {
                self.ended
                    .send_if_modified(|ended| std::mem::replace(ended, (*ended).max(Ended::ByServer)) == Ended::No);
            }
            let outcome = Outcome::Failed { reason: error.reason().to_owned() };
            Stopped { told: Some(Told::Refused(Refusal::of_server(&error))), outcome }
        };
        let asked = async {
            // From its first step on the server may know of it.
            lock(&self.state).pending.sent(number);
            self.ask(&request, &carried, token.as_ref()).await
        };
        let answering = tokio::select! {
            biased;
            () = &mut stop => return Err(self.stopped(way).await),
            answering = asked => answering,
        };
        let mut answering = answering.map_err(failed)?;
        let overdue = async {
            match request.method.as_str() {
                // It is open for as long as the agent listens.
                methods::SUBSCRIBE => pending().await,
                _ => sleep(limits.owed).await,
            }
        };
        tokio::pin!(overdue);
        let mut resumable = false;
        loop {
            let next = tokio::select! {
                biased;
                () = &mut stop => return Err(self.stopped(way).await),
                () = &mut overdue => Some(Err(UpstreamError::Silent(limits.owed))),
                // Who may fetch the rest later does so on another stream: two at once the server would not have.
                () = told.closed(), if resumable => None,
                next = answering.next(limits.silence) => next,
            };
            match next {
                Some(Ok(heard)) => {
                    resumable |= heard.id.is_some() && era == Era::Handshake;
                    let is_answer = heard.message.as_ref().is_some_and(|message| message.answers(&request.id));
                    if let Some(heard) = self.pass(agent, era, Source::Answer(number, &way.id), heard).await {
                        // One who left is not told; what the server does is followed to its end all the same.
                        tokio::select! {
                            biased;
                            _ = told.send(Told::Heard(heard)) => {}
                            () = &mut stop, if !is_answer => return Err(self.stopped(way).await),
                            () = self.over() => {}
                        }
                    }
                    if is_answer {
                        return Ok(());
                    }
                }
                Some(Err(error)) => return Err(failed(error)),
                None if resumable => {
                    lock(&self.state).pending.keep(number);
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
    pub async fn notify(&self, agent: &Agent, mut notification: Notification) -> Result<(), Refusal> {
        if !methods::is_notification(&notification.method) {
            let error = RpcError::new(METHOD_NOT_FOUND, "mcp_method_unknown", "Method not found");
            return Err(Refusal::new(StatusCode::BAD_REQUEST, error));
        }
        if notification.method == methods::CANCELLED {
            // The agent waits no more, whether the server hears of it or not.
            let cancelled = notification.cancels().and_then(|id| lock(&self.state).pending.cancel(&id));
            let Some((number, true)) = cancelled else { return Ok(()) };
            notification.params.get_or_insert_default().insert("requestId".to_owned(), number.into());
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
        let token = self.access(&agent).await?;
        let mut answering = match &self.link {
            Link::Http(_) => {
                let Reach::Http(upstream) = &self.gateway.reach else {
                    return Err(Refusal::of_server(&UpstreamError::Gone));
                };
                let most = self.gateway.limits.server_message;
                let listening = upstream.listen(after, &self.carried(Era::Handshake), token.as_ref(), most).await;
                listening.map_err(|error| Refusal::of_server(&error))?
            }
            Link::Process(process) => {
                let process = process.get().filter(|_| !self.has_ended());
                let process = process.ok_or_else(|| Refusal::of_server(&UpstreamError::Gone))?;
                let occupied = RpcError::new(TOO_MUCH, "mcp_too_many_streams", "the session has such a stream already");
                process.listen().ok_or_else(|| Refusal::new(StatusCode::CONFLICT, occupied))?
            }
        };
        let (told, heard) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            let conversation = &place.0;
            loop {
                let next = tokio::select! {
                    biased;
                    () = conversation.over() => return,
                    () = told.closed() => return,
                    next = answering.next(LISTENING) => next,
                };
                let heard = match next {
                    Some(Ok(heard)) => heard,
                    Some(Err(error)) => {
                        tracing::debug!(%error, "a stream of an MCP server");
                        return;
                    }
                    None => return,
                };
                // Whoever was let in when the stream began may not be any more.
                if conversation.still(&agent).await.is_err() {
                    return;
                }
                if let Some(heard) = conversation.pass(&agent, Era::Handshake, Source::Listening, heard).await
                    && !conversation.tell(&told, Told::Heard(heard)).await
                {
                    return;
                }
            }
        });
        Ok(heard)
    }

    /// Ends it, and tells the server, if its agent is still let in there.
    pub async fn end(&self) {
        self.cut();
        if let (Link::Http(_), Reach::Http(upstream)) = (&self.link, &self.gateway.reach)
            && let Ok(token) = self.access(&self.owner).await
        {
            upstream.end(&self.carried(Era::Handshake), token.as_ref()).await;
        }
    }

    /// Nobody is answered any more.
    fn cut(&self) {
        self.ended.send_replace(Ended::Wholly);
        if let Link::Process(process) = &self.link
            && let Some(process) = process.get()
        {
            process.end();
        }
    }

    /// Ends it if whoever began it is not let in any more. Returns whether that could be found out.
    pub async fn look_again(&self) -> bool {
        match self.owner.gate.standing().await {
            Standing::In => true,
            Standing::Unsure(_) => false,
            Standing::Out(denial) => {
                tracing::info!(server = self.gateway.name, reason = denial.reason, "a session of an MCP server ends");
                self.cut();
                true
            }
        }
    }

    /// Returns a request's place, what cancels it is told by, and its number.
    fn register(
        &self,
        era: Era,
        request: &Request,
        call: Option<Arc<Underway>>,
    ) -> Result<(OwnedSemaphorePermit, Arc<Notify>, i64), RpcError> {
        let mut state = lock(&self.state);
        let is_first = state.version.is_none() && !state.pending.begins();
        if request.method == methods::INITIALIZE && !is_first {
            return Err(RpcError::new(INVALID_REQUEST, "mcp_already_initialized", "the session was begun before"));
        }
        if state.pending.has(&request.id) {
            return Err(RpcError::new(INVALID_REQUEST, "mcp_id_in_use", "a request with this id is not answered yet"));
        }
        let full = |_| RpcError::new(TOO_MUCH, "mcp_too_many_requests", "too many requests are not answered yet");
        let place = self.places.clone().try_acquire_owned().map_err(full)?;
        let (number, cancelled) = (self.gateway.next_id(), Arc::new(Notify::new()));
        let (id, method) = (request.id.clone(), request.method.clone());
        state.pending.put(number, Asked { id, method, era, sent: false, cancelled: cancelled.clone(), call });
        Ok((place, cancelled, number))
    }

    /// The token for a request, if the gate admits it.
    async fn token(&self, way: &Way<'_>, request: &Request) -> Result<Option<Bearer>, Stopped> {
        let Way { agent, era, id, underway, told, cancelled, .. } = way;
        let Some(underway) = underway else {
            let access = self.access(agent).await;
            return access.map_err(|refusal| {
                let reason = refusal.error.reason().to_owned();
                Stopped { told: Some(Told::Refused(refusal)), outcome: Outcome::Failed { reason } }
            });
        };
        let (limits, call) = (&self.gateway.limits, &underway.call);
        let admission = match &underway.refused {
            Some(denial) => Admission::Denied(denial.clone()),
            None => calls::admitted(&*agent.gate, call, request.meta("progressToken"), limits, told, cancelled).await,
        };
        underway.decided();
        let answer = |answer: Result<FromServer, RpcError>| match answer {
            Ok(message) => Told::Heard(Heard::message(message)),
            Err(error) => Told::Refused(Refusal::in_era(error, *era)),
        };
        let (told, outcome) = match admission {
            Admission::Allowed(token) => return Ok(token),
            Admission::Denied(denial) => {
                let told = match &agent.challenge {
                    Some(challenge) if !denial.scopes.is_empty() => {
                        Told::Refused(challenge.step_up(&denial.scopes, &denial.message))
                    }
                    _ => answer(tools::denied(id, call, &denial, *era)),
                };
                (Some(told), Outcome::Denied(denial))
            }
            Admission::Unapproved { approval } => {
                let told = answer(tools::unapproved(id, call, &approval, *era));
                (Some(told), Outcome::Unapproved { approval })
            }
            Admission::Cancelled => (None, Outcome::Cancelled { sent: false }),
        };
        Err(Stopped { told, outcome })
    }

    /// Whether the agent is let in at this moment. If it is not any more, this ends.
    async fn still(&self, agent: &Agent) -> Result<(), Refusal> {
        let refused = |denial: &Denial, status| {
            Refusal::new(status, RpcError::new(NOT_ALLOWED, &denial.reason, denial.message.clone()))
        };
        match agent.gate.standing().await {
            Standing::In => Ok(()),
            Standing::Unsure(denial) => Err(refused(&denial, StatusCode::SERVICE_UNAVAILABLE)),
            Standing::Out(denial) => {
                self.cut();
                Err(refused(&denial, StatusCode::FORBIDDEN))
            }
        }
    }

    async fn access(&self, agent: &Agent) -> Result<Option<Bearer>, Refusal> {
        self.still(agent).await?;
        agent.gate.access().await.map_err(|denial: Denial| match &agent.challenge {
            Some(challenge) if !denial.scopes.is_empty() => challenge.step_up(&denial.scopes, &denial.message),
            _ => Refusal::new(StatusCode::FORBIDDEN, RpcError::new(NOT_ALLOWED, &denial.reason, denial.message)),
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
                let (answering, given) = upstream.ask(body, carried, token, limits).await?;
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
                Some(process) => {
                    self.still(agent).await?;
                    process.send(body).await
                }
                None => Err(UpstreamError::Gone),
            },
            _ => Err(UpstreamError::Gone),
        };
        sent.map_err(|error| Refusal::of_server(&error))
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
        tokio::select! {
            () = cancelled.notified() => {}
            () = left => {}
            () = self.over() => {}
        }
    }

    /// A process has to be told of what a server of HTTP sees by the end of its stream.
    async fn stopped(&self, way: &Way<'_>) -> Stopped {
        let sent = lock(&self.state).pending.was_sent(way.number);
        if let (Link::Process(process), Era::Stateless) = (&self.link, way.era)
            && let Some(process) = process.get().filter(|_| sent)
        {
            let params = serde_json::json!({ "requestId": way.number });
            let notification =
                Notification { method: methods::CANCELLED.to_owned(), params: params.as_object().cloned() };
            let _ = process.send(notification.to_bytes()).await;
        }
        Stopped { told: None, outcome: Outcome::Cancelled { sent } }
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

#[cfg(test)]
mod tests;
