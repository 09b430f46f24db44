//! What a server owes one conversation, by numbers of the gateway's own.
//!
//! Enters: requests of an agent, and answers of the server. Leaves: which request an answer settles. Never: a number that was used
//! before; an agent may use its ids again, and what comes late is then no answer to another question.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use super::{
    gate::{Agent, Denial, Outcome, Report, ToolCall},
    message::Id,
    methods::{self, Era},
};
use crate::control::verifier::lock;

/// Requests whose answers may be fetched later, with `Last-Event-ID`.
const LATER: usize = 64;

/// A request that is not answered yet.
pub struct Asked {
    /// By which the agent asked.
    pub id: Id,
    pub method: String,
    pub era: Era,
    /// Whether the server may know of it.
    pub sent: bool,
    pub cancelled: Arc<Notify>,
    pub call: Option<Arc<Underway>>,
}

/// A call, until it is reported.
pub struct Underway {
    pub agent: Agent,
    pub call: ToolCall,
    /// Why nobody is asked about it.
    pub refused: Option<Denial>,
    pub begun: Instant,
    decided_after: Mutex<Option<Duration>>,
    reported: AtomicBool,
}

impl Underway {
    pub fn new(agent: &Agent, call: ToolCall, refused: Option<Denial>) -> Arc<Self> {
        let (decided_after, reported) = (Mutex::default(), AtomicBool::new(false));
        Arc::new(Self { agent: agent.clone(), call, refused, begun: Instant::now(), decided_after, reported })
    }

    pub fn decided(&self) {
        *lock(&self.decided_after) = Some(self.begun.elapsed());
    }

    pub fn report(&self, outcome: Outcome) {
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

/// Where the server said something.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// In what it answers a request with: the gateway's number of it, and the agent's id.
    Answer(i64, &'a Id),
    /// In a stream of what it says by itself, which may be the rest of a request's.
    Listening,
}

#[derive(Default)]
pub struct Pending {
    asked: HashMap<i64, Asked>,
    later: VecDeque<(i64, Asked)>,
}

impl Pending {
    /// Whether the agent waits for an answer under that id.
    pub fn has(&self, id: &Id) -> bool {
        self.asked.values().any(|asked| asked.id == *id)
    }

    pub fn begins(&self) -> bool {
        self.asked.values().any(|asked| asked.method == methods::INITIALIZE)
    }

    /// What was left for later under the same id is not waited for any more.
    pub fn put(&mut self, number: i64, asked: Asked) {
        self.later.retain(|(_, later)| later.id != asked.id);
        self.asked.insert(number, asked);
    }

    pub fn sent(&mut self, number: i64) {
        if let Some(asked) = self.asked.get_mut(&number) {
            asked.sent = true;
        }
    }

    pub fn was_sent(&self, number: i64) -> bool {
        self.asked.get(&number).is_some_and(|asked| asked.sent)
    }

    /// Takes out what an answer is to. In answer to one request nothing is said about another one.
    pub fn settle(&mut self, source: Source<'_>, id: &Id) -> Option<Asked> {
        let Id::Number(number) = *id else { return None };
        match source {
            Source::Answer(own, _) if own == number && self.was_sent(number) => self.asked.remove(&number),
            Source::Answer(..) => None,
            Source::Listening => {
                let position = self.later.iter().position(|(later, _)| *later == number)?;
                self.later.remove(position).map(|(_, asked)| asked)
            }
        }
    }

    /// Tells whoever follows a request that the agent does not wait any more. Returns its number, and whether the server is to
    /// be told by a notification.
    pub fn cancel(&self, id: &Id) -> Option<(i64, bool)> {
        let (number, asked) = self.asked.iter().find(|(_, asked)| asked.id == *id)?;
        asked.cancelled.notify_one();
        Some((*number, asked.sent && asked.era == Era::Handshake))
    }

    pub fn remove(&mut self, number: i64) -> Option<Asked> {
        self.asked.remove(&number)
    }

    /// The answer may be fetched on another stream.
    pub fn keep(&mut self, number: i64) {
        let Some(asked) = self.asked.remove(&number) else { return };
        if self.later.len() == LATER {
            self.later.pop_front();
        }
        self.later.push_back((number, asked));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(id: i64, method: &str) -> Asked {
        let (id, method) = (Id::Number(id), method.to_owned());
        Asked { id, method, era: Era::Handshake, sent: false, cancelled: Arc::default(), call: None }
    }

    #[test]
    fn an_answer_settles_its_own_request_and_no_other() {
        let mut pending = Pending::default();
        let agents = Id::Number(1);
        pending.put(10, asked(1, methods::LIST));
        assert!(pending.settle(Source::Answer(10, &agents), &Id::Number(10)).is_none(), "it was not sent yet");
        pending.sent(10);
        // The agent waits no more, and uses the id again.
        assert_eq!(pending.cancel(&agents), Some((10, true)));
        pending.remove(10);
        pending.put(11, asked(1, "ping"));
        pending.sent(11);
        for (source, id) in [
            (Source::Answer(11, &agents), Id::Number(10)),
            (Source::Answer(10, &agents), Id::Number(11)),
            (Source::Answer(11, &agents), agents.clone()),
            (Source::Answer(11, &agents), Id::Text("11".to_owned())),
            (Source::Listening, Id::Number(11)),
        ] {
            assert!(pending.settle(source, &id).is_none(), "{id:?}");
        }
        pending.remove(10);
        assert!(pending.has(&agents), "what ends late takes nothing newer with it");
        assert_eq!(pending.settle(Source::Answer(11, &agents), &Id::Number(11)).unwrap().method, "ping");
    }

    #[test]
    fn what_was_left_for_later_is_settled_where_the_rest_is_fetched() {
        let mut pending = Pending::default();
        for number in 0..LATER as i64 + 1 {
            pending.put(number, asked(number, "ping"));
            pending.sent(number);
            pending.keep(number);
        }
        assert!(pending.settle(Source::Listening, &Id::Number(0)).is_none(), "it made room");
        assert!(pending.settle(Source::Answer(1, &Id::Number(1)), &Id::Number(1)).is_none());
        assert!(pending.settle(Source::Listening, &Id::Number(1)).is_some());
        pending.put(100, asked(2, methods::LIST));
        assert!(pending.settle(Source::Listening, &Id::Number(2)).is_none(), "the id is another request's now");
    }
}
