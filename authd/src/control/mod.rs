//! The unprivileged process: everything that callers say is read here, and nowhere else.
//!
//! Enters: connections and settings from dataplane, bytes from callers, key sets and introspection answers from issuers.
//! Leaves: proofs that were verified, as requests to dataplane, and answers to callers. Never: a grant by its own power.

pub mod actions;
pub mod api;
pub mod approvals;
pub mod client_certificate;
pub mod counts;
pub mod fetch;
pub mod forward;
pub mod gateway;
pub mod issuers;
pub mod life;
pub mod listed;
pub mod mcp;
pub mod nodes;
pub mod notify;
pub mod problem;
pub mod prove;
pub mod sandbox;
pub mod serve;
pub mod token;
pub mod verifier;

use std::{
    collections::{BTreeSet, HashMap},
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{oneshot, watch},
    time::timeout,
};

use self::{counts::Counts, verifier::Verifier};
use crate::{
    daemon::granting::Effect,
    decisions::asked,
    ipc::{
        Acted, Caller, Channel, ExchangedToken, FromControl, Granted, Identities, IpcError, MAX_ENTRIES, Message,
        Question, Refusal, Sealed, Settings, ToControl,
    },
    proofs::x509::spiffe::SpiffeId,
};

/// What the Unix socket is called in requests.
pub const LOCAL_HOST: &str = "authd.local";
/// Dataplane answers at once, or is busy with a large policy.
const ANSWER: Duration = Duration::from_secs(10);

/// What dataplane answers to a question.
pub enum Answer {
    Granted(Granted),
    Refused(Refusal),
    Returned,
    Holds(Vec<Granted>),
    Revoked(Effect),
    Admitted {
        key_id: u8,
        seconds: u32,
        labels: Vec<Option<u32>>,
    },
    Exchanged(Box<ExchangedToken>),
    Acted(Box<Acted>),
    Approvals(Box<asked::Answer>),
    /// Standard input, standard output, and what is closed to end it.
    Launched([OwnedFd; 3]),
}

/// What all connections share.
pub struct Shared {
    channel: Channel,
    questions: Mutex<HashMap<Question, oneshot::Sender<Answer>>>,
    next: AtomicU64,
    verifier: RwLock<Option<Arc<Verifier>>>,
    counts: Arc<Counts>,
    /// For whom this node speaks to others; `None` until dataplane said so.
    identities: watch::Sender<Option<Arc<BTreeSet<SpiffeId>>>>,
    nodes: nodes::Acquaintances,
    pub gateways: gateway::Gateways,
}

impl Shared {
    fn new(channel: Channel) -> Arc<Self> {
        Arc::new(Self {
            channel,
            questions: Mutex::default(),
            next: AtomicU64::new(1),
            verifier: RwLock::default(),
            counts: Arc::default(),
            identities: watch::Sender::default(),
            nodes: nodes::Acquaintances::default(),
            gateways: gateway::Gateways::default(),
        })
    }

    /// What is verified against, once there are settings.
    pub fn verifier(&self) -> Option<Arc<Verifier>> {
        self.verifier.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells dataplane something. If it is gone, this process is about to end.
    pub async fn tell(&self, message: FromControl) {
        if let Err(error) = self.channel.send(&message).await {
            tracing::warn!(%error, "dataplane was not told");
        }
    }

    /// Asks dataplane. A refusal is an answer; none at all is a refusal too.
    pub async fn ask(&self, question: impl FnOnce(Question) -> FromControl) -> Answer {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        self.questions.lock().unwrap_or_else(PoisonError::into_inner).insert(number, answer);
        let answer = match self.channel.send(&question(number)).await {
            Ok(()) => timeout(ANSWER, answered).await.ok().and_then(Result::ok),
            Err(error @ IpcError::TooLong(_)) => Some(Answer::Refused(Refusal {
                reason: "request_too_large".to_owned(),
                message: format!("what was asked cannot be decided: {error}"),
            })),
            Err(error) => {
                tracing::warn!(%error, "dataplane was not asked");
                None
            }
        };
        self.questions.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
        answer.unwrap_or_else(|| {
            let message = "the enforcing process does not answer".to_owned();
            Answer::Refused(Refusal { reason: "unavailable".to_owned(), message })
        })
    }

    fn answer(&self, question: Question, answer: Answer) {
        let waiting = self.questions.lock().unwrap_or_else(PoisonError::into_inner).remove(&question);
        // Who asked may have gone.
        if let Some(waiting) = waiting {
            let _ = waiting.send(answer);
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error(transparent)]
    Sandbox(#[from] sandbox::SandboxError),
    #[error(transparent)]
    Ipc(#[from] IpcError),
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("a message came without its descriptors")]
    NoFile,
}

/// Serves until dataplane is gone.
pub async fn run(fd: OwnedFd) -> Result<(), ControlError> {
    let shared = Shared::new(Channel::new(fd)?);
    tokio::spawn(counts::tell(shared.clone()));
    let router = api::with_mcp(api::router(), Arc::new(gateway::Door));
    let loopback = api::on_loopback(Arc::new(gateway::Door));
    tokio::spawn(mcp::http::keep_swept(shared.gateways.sessions()));
    let mut sessions = nodes::Sessions::default();
    while let Some((message, mut attached)) = shared.channel.receive::<ToControl>().await? {
        match message {
            ToControl::Settings => {
                let settings = Settings::open(attached.pop().ok_or(ControlError::NoFile)?)?;
                let generation = settings.generation;
                let before = shared.verifier();
                let verifier = Arc::new(Verifier::new(settings, before.as_deref(), shared.counts.clone()));
                verifier.clone().begin();
                for part in verifier.ends().chunks(MAX_ENTRIES) {
                    shared.tell(FromControl::Ends { ends: part.to_vec() }).await;
                }
                *shared.verifier.write().unwrap_or_else(PoisonError::into_inner) = Some(verifier.clone());
                shared.gateways.follow(&verifier.model);
                sessions.follow(&shared, &verifier);
                shared.tell(FromControl::Ready { generation }).await;
                tokio::spawn(listed::changed(shared.clone(), verifier));
            }
            ToControl::Connected { connection, caller } => match attached.pop() {
                Some(fd) => {
                    let is_tcp = matches!(caller, Caller::Local { tcp: true, .. });
                    let router = if is_tcp { &loopback } else { &router };
                    tokio::spawn(serve::serve(shared.clone(), router.clone(), fd, connection, caller));
                }
                None => shared.tell(FromControl::Closed { connection }).await,
            },
            ToControl::Granted { question, grant } => shared.answer(question, Answer::Granted(grant)),
            ToControl::NotGranted { question, refusal } => shared.answer(question, Answer::Refused(refusal)),
            ToControl::Returned { question } => shared.answer(question, Answer::Returned),
            ToControl::Holds { question, grants } => shared.answer(question, Answer::Holds(grants)),
            ToControl::Revoked { question, effect } => shared.answer(question, Answer::Revoked(effect)),
            ToControl::Admitted { question, key_id, seconds, labels } => {
                shared.answer(question, Answer::Admitted { key_id, seconds, labels });
            }
            ToControl::Exchanged { question, token } => shared.answer(question, Answer::Exchanged(token)),
            ToControl::Launched { question } => {
                let descriptors = attached.try_into().map_err(|_| ControlError::NoFile)?;
                shared.answer(question, Answer::Launched(descriptors));
            }
            ToControl::Acted { question, acted } => shared.answer(question, Answer::Acted(acted)),
            ToControl::Notify => {
                let message = Message::open(attached.pop().ok_or(ControlError::NoFile)?)?;
                notify::send(&shared, message);
            }
            ToControl::Approvals { question } => {
                let answer = asked::Answer::open(attached.pop().ok_or(ControlError::NoFile)?)?;
                shared.answer(question, Answer::Approvals(Box::new(answer)));
            }
            ToControl::Identities => {
                let identities = Identities::open(attached.pop().ok_or(ControlError::NoFile)?)?;
                shared.identities.send_replace(Some(Arc::new(nodes::speaks_for(identities))));
            }
            ToControl::Forget { question } => {
                if let Some(verifier) = shared.verifier() {
                    verifier.forget();
                    shared.gateways.forget();
                }
                shared.tell(FromControl::Forgotten { question }).await;
            }
        }
    }
    Ok(())
}
