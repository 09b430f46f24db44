//! The end of a connection that has lived its time.
//!
//! Enters: the answers that are under way on it. Leaves: for streams without an end of their own, that it is there; and when
//! nothing is waited for any more. Never: patience with who does not read, or an answer that is waited for without end.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use axum::{body::Body, response::Response};
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use super::verifier::lock;

/// Of one connection.
#[derive(Clone, Default)]
pub struct Life(Arc<Inner>);

#[derive(Default)]
struct Inner {
    is_over: watch::Sender<bool>,
    answers: Mutex<Answers>,
}

#[derive(Default)]
struct Answers {
    next: u64,
    under_way: HashMap<u64, Answer>,
    /// When there was one fewer.
    last: Option<Instant>,
}

struct Answer {
    until: Instant,
    /// Since when the caller has more of it to read. `None`: there is nothing to read yet.
    given: Option<Instant>,
}

impl Life {
    pub fn end(&self) {
        self.0.is_over.send_replace(true);
    }

    /// Waits `patience`, and on for as long as something is under way, in steps of as much.
    pub async fn spent(&self, patience: Duration) {
        loop {
            sleep(patience).await;
            let answers = lock(&self.0.answers);
            let now = Instant::now();
            let is_fresh = |since: Instant| now < since + patience;
            let is_awaited = |answer: &Answer| now < answer.until && answer.given.is_none_or(is_fresh);
            if !answers.under_way.values().any(is_awaited) && !answers.last.is_some_and(is_fresh) {
                return;
            }
        }
    }

    /// An answer that the end of the connection waits for, but not longer than so long from now.
    pub fn owe(&self, most: Duration) -> Owed {
        let mut answers = lock(&self.0.answers);
        let number = answers.next;
        answers.next += 1;
        answers.under_way.insert(number, Answer { until: Instant::now() + most, given: None });
        Owed { life: self.clone(), number }
    }
}

/// An answer, until it is given or given up.
pub struct Owed {
    life: Life,
    number: u64,
}

impl Owed {
    /// This is it. `is_endless`: it ends when the connection's time is over.
    pub fn given(self, response: Response, is_endless: bool) -> Response {
        self.note(Some(Instant::now()));
        let over: Option<Pin<Box<dyn Future<Output = ()> + Send>>> = is_endless.then(|| {
            let mut is_over = self.life.0.is_over.subscribe();
            let over = async move { drop(is_over.wait_for(|is_over| *is_over).await) };
            Box::pin(over) as _
        });
        response.map(|body| Body::new(Given { body, owed: self, over }))
    }

    fn note(&self, given: Option<Instant>) {
        if let Some(answer) = lock(&self.life.0.answers).under_way.get_mut(&self.number) {
            answer.given = given;
        }
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        let mut answers = lock(&self.life.0.answers);
        answers.under_way.remove(&self.number);
        answers.last = Some(Instant::now());
    }
}

struct Given {
    body: Body,
    owed: Owed,
    over: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl hyper::body::Body for Given {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        let next = Pin::new(&mut this.body).poll_frame(cx);
        this.owed.note(next.is_ready().then(Instant::now));
        if next.is_pending()
            && let Some(over) = &mut this.over
            && over.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(None);
        }
        next
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
