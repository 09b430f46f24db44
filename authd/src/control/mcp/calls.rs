//! One call before it is sent: asking the gate, and waiting for an approval.
//!
//! Enters: a call, and what may end the wait. Leaves: whether it is sent, and with which token. Never: a call that is sent
//! because somebody waited long enough.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep_until},
};

use super::{
    Limits,
    events::{Heard, Told},
    gate::{Bearer, Denial, Gate, Ruling, ToolCall},
    message::FromServer,
    methods,
};

/// A step of such progress: small, as the server's own goes on from there and must not go back.
const STEP: f64 = 1e-6;

pub enum Admission {
    Allowed(Option<Bearer>),
    Denied(Denial),
    Unapproved { approval: String },
    Cancelled,
}

/// Asks the gate until it decides, or nobody waits any more.
pub async fn admitted(
    gate: &dyn Gate,
    call: &ToolCall,
    progress_token: Option<&Value>,
    limits: &Limits,
    told: &mpsc::Sender<Told>,
    cancelled: &Notify,
) -> Admission {
    let begun = Instant::now();
    let patience = if progress_token.is_some() { limits.approval_with_progress } else { limits.approval };
    let mut progress = Progress { token: progress_token, steps: 0, next: begun, pause: limits.progress };
    let mut pause = limits.ask_again;
    loop {
        let ruling = tokio::select! {
            biased;
            () = cancelled.notified() => return Admission::Cancelled,
            () = told.closed() => return Admission::Cancelled,
            ruling = gate.call(call) => ruling,
        };
        let (approval, until) = match ruling {
            Ruling::Allow { token } => return Admission::Allowed(token),
            Ruling::Deny(denial) => return Admission::Denied(denial),
            Ruling::Pending { approval, until } => (approval, until),
        };
        let left = Duration::try_from(until.duration_since(Timestamp::now())).unwrap_or(Duration::ZERO);
        let now = Instant::now();
        let end = (begun + patience).min(now + left);
        if now >= end {
            return Admission::Unapproved { approval };
        }
        progress.tell(&approval, told);
        tokio::select! {
            biased;
            () = cancelled.notified() => return Admission::Cancelled,
            () = told.closed() => return Admission::Cancelled,
            // Asked once more at the very end.
            () = sleep_until(end.min(now + pause)) => {}
        }
        // Each time costs a decision and a record, and people are not faster than this.
        pause = limits.ask_again_at_last.min(pause + pause / 2);
    }
}

struct Progress<'a> {
    token: Option<&'a Value>,
    steps: u32,
    next: Instant,
    pause: Duration,
}

impl Progress<'_> {
    /// Tells the agent, if it asked for that and it is time. One who does not read misses it.
    fn tell(&mut self, approval: &str, told: &mpsc::Sender<Told>) {
        let Some(token) = self.token.filter(|_| Instant::now() >= self.next) else { return };
        self.next = Instant::now() + self.pause;
        self.steps += 1;
        let params = json!({
            "progressToken": token,
            "progress": f64::from(self.steps) * STEP,
            "message": format!("waiting for approval {approval}"),
        });
        let _ = told.try_send(Told::Heard(Heard::message(FromServer::notification(methods::PROGRESS, &params))));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use serde_json::Map;

    use super::*;
    use crate::control::{
        mcp::{
            BoxFuture,
            gate::{Report, Standing},
        },
        verifier::lock,
    };

    /// Says one ruling after the other, the last one again and again; and notes when it was asked.
    struct Script(Mutex<Vec<fn() -> Ruling>>, Mutex<Vec<Instant>>);

    impl Gate for Script {
        fn listed(&self, _: &str) -> bool {
            true
        }
        fn call<'a>(&'a self, _: &'a ToolCall) -> BoxFuture<'a, Ruling> {
            lock(&self.1).push(Instant::now());
            let mut script = lock(&self.0);
            let next = if script.len() > 1 { script.remove(0) } else { script[0] };
            Box::pin(async move { next() })
        }
        fn standing(&self) -> BoxFuture<'_, Standing> {
            Box::pin(async { Standing::In })
        }
        fn access(&self) -> BoxFuture<'_, Result<Option<Bearer>, Denial>> {
            Box::pin(async { Ok(None) })
        }
        fn admits(&self) -> bool {
            true
        }
        fn report(&self, _: &ToolCall, _: Report) {}
    }

    fn pending() -> Ruling {
        Ruling::Pending { approval: "a1".to_owned(), until: Timestamp::now() + Duration::from_secs(3600) }
    }

    fn overdue() -> Ruling {
        Ruling::Pending { approval: "a1".to_owned(), until: Timestamp::now() - Duration::from_secs(1) }
    }

    fn allow() -> Ruling {
        Ruling::Allow { token: Bearer::new("t".to_owned()) }
    }

    fn deny() -> Ruling {
        Ruling::Deny(Denial { reason: "no".to_owned(), message: String::new(), policies: vec![], scopes: vec![] })
    }

    async fn run(script: &[fn() -> Ruling], token: Option<Value>, cancel: bool) -> (Admission, Vec<String>, Duration) {
        let gate = Script(Mutex::new(script.to_vec()), Mutex::default());
        let call = ToolCall { server: "s".to_owned(), tool: "t".to_owned(), arguments: Map::new(), rest: Map::new() };
        let (told, mut heard) = mpsc::channel(128);
        let cancelled = Notify::new();
        if cancel {
            cancelled.notify_one();
        }
        let begun = Instant::now();
        let limits = Limits {
            approval: Duration::from_millis(200),
            approval_with_progress: Duration::from_millis(1_500),
            progress: Duration::from_millis(200),
            ask_again: Duration::from_millis(10),
            ask_again_at_last: Duration::from_millis(50),
            ..Limits::default()
        };
        let admission = admitted(&gate, &call, token.as_ref(), &limits, &told, &cancelled).await;
        let mut messages = Vec::new();
        while let Ok(Told::Heard(heard)) = heard.try_recv() {
            messages.extend(heard.message.map(|message| message.text().to_owned()));
        }
        (admission, messages, begun.elapsed())
    }

    #[tokio::test]
    async fn a_pending_call_waits_for_what_the_gate_says_next() {
        let (admission, messages, _) = run(&[pending, pending, allow], None, false).await;
        assert!(matches!(admission, Admission::Allowed(Some(_))));
        assert!(messages.is_empty());
        let (admission, ..) = run(&[pending, deny], None, false).await;
        assert!(matches!(admission, Admission::Denied(_)));
    }

    #[tokio::test]
    async fn nobody_waits_for_an_approval_without_end() {
        let (admission, _, took) = run(&[pending], None, false).await;
        assert!(matches!(admission, Admission::Unapproved { approval } if approval == "a1"));
        assert!((200..1_500).contains(&took.as_millis()), "{took:?}");
        let (admission, messages, took) = run(&[pending], Some(json!("p")), false).await;
        assert!(matches!(admission, Admission::Unapproved { .. }));
        assert!(took.as_millis() >= 1_500, "{took:?}");
        assert!((2..=8).contains(&messages.len()), "{messages:?}");
        assert!(messages[0].contains("\"progressToken\":\"p\"") && messages[0].contains("a1"), "{}", messages[0]);
        let (admission, ..) = run(&[overdue], None, false).await;
        assert!(matches!(admission, Admission::Unapproved { .. }));
    }

    #[tokio::test]
    async fn a_gate_is_asked_again_less_and_less_often() {
        let gate = Script(Mutex::new(vec![pending]), Mutex::default());
        let call = ToolCall { server: "s".to_owned(), tool: "t".to_owned(), arguments: Map::new(), rest: Map::new() };
        let (told, _heard) = mpsc::channel(1);
        let normal = Limits::default();
        // All of it twenty times as fast.
        let limits = Limits {
            approval: normal.approval / 20,
            ask_again: normal.ask_again / 20,
            ask_again_at_last: normal.ask_again_at_last / 20,
            ..normal
        };
        admitted(&gate, &call, None, &limits, &told, &Notify::new()).await;
        let asked = lock(&gate.1).clone();
        let pauses: Vec<u128> = asked.windows(2).map(|pair| (pair[1] - pair[0]).as_millis()).collect();
        assert!(pauses.iter().zip([100, 150, 225, 250]).all(|(pause, least)| *pause >= least), "{pauses:?}");
        assert!((5..=12).contains(&asked.len()), "{pauses:?}");
    }

    #[tokio::test]
    async fn a_call_that_was_cancelled_is_not_asked_about() {
        let (admission, ..) = run(&[allow], None, true).await;
        assert!(matches!(admission, Admission::Cancelled));
    }
}
