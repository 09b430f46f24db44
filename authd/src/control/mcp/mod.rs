//! The MCP gateway: stands between an agent and a server of the Model Context Protocol.
//!
//! Enters: what an agent says, over streamable HTTP or as lines of a stream, and what the server answers. Leaves: messages
//! whose tool calls a [`gate::Gate`] has allowed, written anew from the value that it saw. Never: an agent's credentials
//! towards the server, the server's towards the agent, or a call that was checked as one thing and read as another.

pub mod agent;
pub mod authorization;
pub mod calls;
pub mod conversation;
pub mod events;
pub mod gate;
pub mod headers;
pub mod http;
pub mod message;
pub mod methods;
pub mod pending;
pub mod rewrite;
pub mod session;
pub mod sse;
pub mod stdio;
#[cfg(test)]
mod testing;
pub mod tools;
pub mod upstream;

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use self::{conversation::Conversation, session::Sessions, stdio::Launch, tools::Mirrored, upstream::HttpUpstream};

/// What a trait that is used as an object returns where an `async fn` would be meant.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Versions that begin with `initialize`. The oldest one's batches are refused; it is not spoken otherwise than the next.
pub const HANDSHAKE_VERSIONS: [&str; 3] = ["2025-03-26", "2025-06-18", "2025-11-25"];
/// The version in which each request stands for itself.
pub const STATELESS_VERSION: &str = "2026-07-28";

/// How much of everything there may be. docs/MCP.md lists them.
#[derive(Clone, Debug)]
pub struct Limits {
    /// One message of an agent, in bytes.
    pub agent_message: usize,
    /// One message of a server, in bytes: a line, an event's data, or a JSON body.
    pub server_message: usize,
    /// Requests of one conversation that are not answered yet.
    pub in_flight: usize,
    /// Requests of a server that its agent has not answered yet.
    pub server_requests: usize,
    /// Streams that one session has open, besides those of requests.
    pub listeners: usize,
    /// How long a server may be silent while it owes an answer.
    pub silence: Duration,
    /// How long it may owe one, whatever it says meanwhile.
    pub owed: Duration,
    /// How long a call waits for its approval, if the agent did not ask for progress. Clients give up after 60 s.
    pub approval: Duration,
    /// And if it did: progress keeps it waiting.
    pub approval_with_progress: Duration,
    /// Progress is told so often while a person is waited for.
    pub progress: Duration,
    /// A gate is asked again after so long, and then less and less often.
    pub ask_again: Duration,
    pub ask_again_at_last: Duration,
    /// A stream that says nothing says so.
    pub keep_alive: Duration,
    /// An answer that takes longer than this becomes a stream.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            agent_message: 1 << 20,
            server_message: 4 << 20,
            in_flight: 32,
            server_requests: 64,
            listeners: 4,
            silence: Duration::from_secs(300),
            owed: Duration::from_secs(3600),
            approval: Duration::from_secs(45),
            approval_with_progress: Duration::from_secs(300),
            progress: Duration::from_secs(5),
            ask_again: Duration::from_secs(2),
            ask_again_at_last: Duration::from_secs(5),
            keep_alive: Duration::from_secs(15),
            patience: Duration::from_secs(3),
        }
    }
}

/// How the server is reached.
pub enum Reach {
    Http(HttpUpstream),
    /// One process for each session.
    Command(Arc<dyn Launch>),
}

/// The gateway to one server.
pub struct Gateway {
    pub name: String,
    pub reach: Reach,
    pub limits: Limits,
    /// Web origins whose pages may ask. Agents are no web pages: normally none.
    pub origins: Vec<String>,
    /// Shared by all servers, as their bounds are.
    pub sessions: Arc<Sessions<Arc<Conversation>>>,
    /// Which arguments of which tools the server wants in headers too.
    pub mirrored: Mirrored,
    /// Of the next request: no number is used for two of them.
    next: AtomicI64,
    /// The policy has another way to the server, or none.
    retired: AtomicBool,
}

impl Gateway {
    pub fn new(name: &str, reach: Reach, limits: Limits, sessions: Arc<Sessions<Arc<Conversation>>>) -> Self {
        let (name, origins, mirrored) = (name.to_owned(), Vec::new(), Mirrored::default());
        let (next, retired) = (AtomicI64::new(1), AtomicBool::new(false));
        Self { name, reach, limits, origins, sessions, mirrored, next, retired }
    }

    /// As what the server is asked the next time.
    fn next_id(&self) -> i64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Nobody is let in by this one any more. Sessions that were opened before have to be closed after this.
    pub fn retire(&self) {
        self.retired.store(true, Ordering::SeqCst);
    }

    pub fn is_retired(&self) -> bool {
        self.retired.load(Ordering::SeqCst)
    }
}
