//! Answers to revocations, held back until control has dropped whatever it accepted before.
//!
//! Enters: an answer, and that control has forgotten, or ended. Leaves: the answer. Never: a revocation that is said to be in force
//! while control still believes what was revoked.

use std::collections::HashMap;

use tokio::sync::oneshot;

use super::{admin::Reply, control::Control};
use crate::ipc::{self, ToControl};

/// Those who wait.
#[derive(Default)]
pub(super) struct Forgetting {
    next: ipc::Question,
    waiting: HashMap<ipc::Question, Waiting>,
}

/// Who waits, and for what.
pub(super) enum Waiting {
    Operator(oneshot::Sender<Reply>, Reply),
    /// An operator who asks through control.
    Caller(ToControl),
}

impl Waiting {
    fn answer(self, control: &mut Control) {
        match self {
            Self::Operator(answer, reply) => {
                // Who asked has gone: nobody misses the answer.
                let _ = answer.send(reply);
            }
            Self::Caller(message) => control.tell(&message, &[]),
        }
    }
}

impl Forgetting {
    /// Answers when control has forgotten, or at once if nobody is there to forget.
    pub fn then(&mut self, control: &mut Control, waiting: Waiting) {
        if !control.is_ready() {
            return waiting.answer(control);
        }
        self.next += 1;
        self.waiting.insert(self.next, waiting);
        control.tell(&ToControl::Forget { question: self.next }, &[]);
    }

    pub fn forgotten(&mut self, control: &mut Control, question: ipc::Question) {
        if let Some(waiting) = self.waiting.remove(&question) {
            waiting.answer(control);
        }
    }

    /// A process that ended remembers nothing.
    pub fn all(&mut self, control: &mut Control) {
        for (_, waiting) in self.waiting.drain() {
            waiting.answer(control);
        }
    }
}
