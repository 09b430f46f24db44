//! A gate and a server for tests of what stands between them.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncWriteExt, BufReader, DuplexStream, duplex},
    sync::mpsc,
    time::timeout,
};

use super::{
    BoxFuture, Gateway, Limits, Reach,
    conversation::Conversation,
    events::Told,
    gate::{Agent, Bearer, Denial, Gate, Report, Ruling, Standing, ToolCall},
    message::{FromAgent, Notification, Request},
    methods::Era,
    session::{Bounds, Sessions},
    stdio::{Launch, Streams, line},
};
use crate::control::verifier::lock;

pub const SOON: Duration = Duration::from_secs(10);

/// Lets everything pass but the tool `secret`, until it is told otherwise.
#[derive(Default)]
pub struct Open {
    pub lost: AtomicBool,
    pub is_busy: AtomicBool,
    /// Tools, and what became of their calls.
    pub reports: Mutex<Vec<(String, String)>>,
}

impl Gate for Open {
    fn listed(&self, tool: &str) -> bool {
        tool != "secret"
    }

    fn call<'a>(&'a self, _: &'a ToolCall) -> BoxFuture<'a, Ruling> {
        Box::pin(async { Ruling::Allow { token: None } })
    }

    fn standing(&self) -> BoxFuture<'_, Standing> {
        let (reason, message) = ("workload_revoked".to_owned(), String::new());
        let out = Denial { reason, message, policies: Vec::new(), scopes: Vec::new() };
        let is_lost = self.lost.load(Ordering::SeqCst);
        Box::pin(async move { if is_lost { Standing::Out(out) } else { Standing::In } })
    }

    fn access(&self) -> BoxFuture<'_, Result<Option<Bearer>, Denial>> {
        Box::pin(async { Ok(None) })
    }

    fn admits(&self) -> bool {
        !self.is_busy.load(Ordering::SeqCst)
    }

    fn report(&self, call: &ToolCall, report: Report) {
        lock(&self.reports).push((call.tool.clone(), report.outcome.name().to_owned()));
    }
}

/// The server's side of a process.
pub struct Server {
    pub input: BufReader<DuplexStream>,
    pub output: DuplexStream,
}

impl Server {
    /// The next message. `None`: there will be none.
    pub async fn reads(&mut self) -> Option<Value> {
        let bytes = timeout(SOON, line(&mut self.input, 1 << 20)).await.unwrap().unwrap()?;
        Some(serde_json::from_slice(&bytes).unwrap())
    }

    pub async fn says(&mut self, message: Value) {
        self.output.write_all(format!("{message}\n").as_bytes()).await.unwrap();
    }

    pub async fn answers(&mut self, id: &Value, result: Value) {
        self.says(json!({ "jsonrpc": "2.0", "id": id, "result": result })).await;
    }
}

struct Processes(mpsc::UnboundedSender<Server>);

impl Launch for Processes {
    fn launch<'a>(&'a self, _: &'a Agent) -> BoxFuture<'a, io::Result<Streams>> {
        let ((input, read), (written, output)) = (duplex(1 << 16), duplex(1 << 16));
        let _ = self.0.send(Server { input: BufReader::new(read), output: written });
        Box::pin(async { Ok(Streams { input: Box::new(input), output: Box::new(output), process: Box::new(()) }) })
    }
}

/// A conversation of an agent with a process.
pub struct Talk {
    pub gate: Arc<Open>,
    pub agent: Agent,
    pub conversation: Arc<Conversation>,
    servers: mpsc::UnboundedReceiver<Server>,
}

impl Talk {
    pub fn new(limits: Limits) -> Self {
        let (sender, servers) = mpsc::unbounded_channel();
        let sessions = Arc::new(Sessions::new(Bounds::default()));
        let gateway = Gateway::new("tools", Reach::Command(Arc::new(Processes(sender))), limits, sessions);
        let gate = Arc::new(Open::default());
        let (key, caller) = ("a".to_owned(), "a".to_owned());
        let agent = Agent { key, caller, gate: gate.clone(), connection: 0, challenge: None };
        let conversation = Conversation::new(Arc::new(gateway), agent.clone());
        Self { gate, agent, conversation, servers }
    }

    pub async fn server(&mut self) -> Server {
        timeout(SOON, self.servers.recv()).await.unwrap().unwrap()
    }

    pub fn ask(&self, message: Value) -> (tokio::task::JoinHandle<()>, mpsc::Receiver<Told>) {
        self.ask_in(Era::Handshake, message)
    }

    pub fn ask_in(&self, era: Era, message: Value) -> (tokio::task::JoinHandle<()>, mpsc::Receiver<Told>) {
        let (told, heard) = mpsc::channel(super::conversation::QUEUE);
        let request = request(message);
        let task = tokio::spawn(self.conversation.clone().request(self.agent.clone(), era, request, None, told));
        (task, heard)
    }

    pub async fn cancel(&self, id: Value) {
        let params = json!({ "requestId": id }).as_object().cloned();
        let notification = Notification { method: "notifications/cancelled".to_owned(), params };
        self.conversation.notify(&self.agent, notification).await.unwrap();
    }
}

fn request(mut message: Value) -> Request {
    message["jsonrpc"] = "2.0".into();
    match FromAgent::parse(message.to_string().as_bytes(), 1 << 20) {
        Ok(FromAgent::Request(request)) => request,
        other => panic!("{other:?}"),
    }
}

/// What an agent is told next: a message, or why it is refused. `None`: there is no more.
pub async fn next(heard: &mut mpsc::Receiver<Told>) -> Option<Value> {
    match timeout(SOON, heard.recv()).await.unwrap()? {
        Told::Heard(heard) => Some(heard.message.unwrap().to_value()),
        Told::Refused(refusal) => Some(json!({ "refused": refusal.error.reason() })),
    }
}
