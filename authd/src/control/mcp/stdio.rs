//! A server behind two byte streams: one message a line, each way.
//!
//! Enters: messages that were allowed, and the lines of the server. Leaves: lines to the server, and its messages, sorted by
//! the request that they answer. Never: a line without end, or two conversations with one process.

use std::{
    any::Any,
    collections::{HashMap, VecDeque},
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::Value;
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::timeout,
};

use super::{
    BoxFuture, Limits,
    conversation::Ended,
    events::Heard,
    gate::Agent,
    message::{FromServer, Id, Kind},
    methods, rewrite,
    upstream::{Answering, UpstreamError},
};
use crate::control::verifier::lock;

/// Messages that wait for a slow reader, of each stream.
const QUEUE: usize = 4;
/// Messages that nobody listens for yet; together they are no longer than one message may be.
const BACKLOG: usize = 64;
/// Lines that are no messages. Servers should write none; some write a few when they start.
const NOISE: u32 = 100;
/// A message is kept so long for an agent that does not read.
const SLOW: Duration = Duration::from_secs(10);
/// A server that does not read its input has so long.
const WRITE: Duration = Duration::from_secs(30);

/// The two streams of a server that was started for one conversation.
pub struct Streams {
    /// The server's standard input.
    pub input: Box<dyn AsyncWrite + Send + Unpin>,
    /// Its standard output.
    pub output: Box<dyn AsyncRead + Send + Unpin>,
    /// The process: it ends when this is dropped.
    pub process: Box<dyn Any + Send>,
}

/// Starts servers.
pub trait Launch: Send + Sync + 'static {
    /// One for an agent, which nobody else is given.
    fn launch<'a>(&'a self, agent: &'a Agent) -> BoxFuture<'a, io::Result<Streams>>;
}

/// A conversation with a process.
pub struct Stdio {
    lines: mpsc::Sender<Line>,
    sorted: Arc<Mutex<Sorted>>,
    tasks: [JoinHandle<()>; 2],
    most: usize,
}

/// What the server gets.
struct Line {
    bytes: Vec<u8>,
    /// Which request it is.
    request: Option<Id>,
}

/// A request that is not answered yet.
struct Waiting {
    id: Id,
    /// Nothing answers it before.
    sent: bool,
    sender: mpsc::Sender<Heard>,
}

/// Who hears what.
#[derive(Default)]
struct Sorted {
    ended: bool,
    /// In the order in which they were made.
    waiting: Vec<Waiting>,
    /// Progress is about a request, by the token that it named.
    progress: HashMap<String, Id>,
    listener: Option<mpsc::Sender<Heard>>,
    backlog: VecDeque<Heard>,
}

impl Stdio {
    pub fn new(streams: Streams, limits: &Limits, ended: watch::Sender<Ended>) -> Self {
        let (lines, to_write) = mpsc::channel(QUEUE);
        let sorted = Arc::new(Mutex::new(Sorted::default()));
        let Streams { input, output, process } = streams;
        let reader = read(BufReader::new(output), limits.server_message, sorted.clone(), process, ended);
        let tasks = [tokio::spawn(write(input, to_write, sorted.clone())), tokio::spawn(reader)];
        Self { lines, sorted, tasks, most: limits.server_message }
    }

    /// Sends a request, under an id that no other one had. What belongs to it comes through the returned stream.
    pub async fn ask(
        &self,
        id: &Id,
        body: Vec<u8>,
        progress_token: Option<&Value>,
    ) -> Result<Answering, UpstreamError> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        {
            let mut sorted = lock(&self.sorted);
            if sorted.ended {
                return Err(UpstreamError::Gone);
            }
            sorted.waiting.push(Waiting { id: id.clone(), sent: false, sender });
            if let Some(token) = progress_token {
                sorted.progress.insert(token.to_string(), id.clone());
            }
        }
        self.put(Line { bytes: body, request: Some(id.clone()) }).await?;
        Ok(Answering::Channel(VecDeque::new(), receiver))
    }

    /// Sends what has no answer.
    pub async fn send(&self, bytes: Vec<u8>) -> Result<(), UpstreamError> {
        self.put(Line { bytes, request: None }).await
    }

    async fn put(&self, mut line: Line) -> Result<(), UpstreamError> {
        if line.bytes.len() > self.most {
            return Err(UpstreamError::TooLong(self.most));
        }
        line.bytes.push(b'\n');
        match timeout(WRITE, self.lines.send(line)).await {
            Ok(Ok(())) if !self.has_ended() => Ok(()),
            Ok(_) => Err(UpstreamError::Gone),
            Err(_) => Err(UpstreamError::Silent(WRITE)),
        }
    }

    /// Nobody waits for this answer any more.
    pub fn forget(&self, id: &Id) {
        lock(&self.sorted).forget(id);
    }

    /// The stream of what belongs to no request. `None`: somebody has it.
    pub fn listen(&self) -> Option<Answering> {
        let mut sorted = lock(&self.sorted);
        if sorted.listener.as_ref().is_some_and(|listener| !listener.is_closed()) {
            return None;
        }
        let (sender, receiver) = mpsc::channel(QUEUE);
        sorted.listener = (!sorted.ended).then_some(sender);
        Some(Answering::Channel(std::mem::take(&mut sorted.backlog), receiver))
    }

    pub fn has_ended(&self) -> bool {
        lock(&self.sorted).ended
    }

    /// The process ends, whoever still waits for something.
    pub fn end(&self) {
        for task in &self.tasks {
            task.abort();
        }
        lock(&self.sorted).end();
    }
}

impl Drop for Stdio {
    fn drop(&mut self) {
        self.end();
    }
}

impl Sorted {
    fn end(&mut self) {
        *self = Self { ended: true, ..Self::default() };
    }

    fn forget(&mut self, id: &Id) {
        self.waiting.retain(|waiting| waiting.id != *id);
        self.progress.retain(|_, request| request != id);
    }

    fn sent(&mut self, id: &Id) {
        if let Some(waiting) = self.waiting.iter_mut().find(|waiting| waiting.id == *id) {
            waiting.sent = true;
        }
    }

    /// For whoever listens later. The oldest ones make room.
    fn keep(&mut self, heard: Heard, most: usize) {
        let length = |heard: &Heard| heard.message.as_ref().map_or(0, |message| message.text().len());
        let mut left = most.saturating_sub(length(&heard));
        self.backlog.push_back(heard);
        let newest = self.backlog.iter().rev().skip(1).take_while(|heard| {
            let fits = length(heard) <= left;
            left = left.saturating_sub(length(heard));
            fits
        });
        let kept = (1 + newest.count()).min(BACKLOG);
        self.backlog.drain(..self.backlog.len() - kept);
    }

    /// Where a message goes.
    fn receiver(&mut self, heard: &Heard) -> Option<mpsc::Sender<Heard>> {
        let message = heard.message.as_ref()?;
        let is_there = |sender: &mpsc::Sender<Heard>| !sender.is_closed();
        let of = |sorted: &Self, id: &Id| {
            let waiting = sorted.waiting.iter().find(|waiting| waiting.id == *id && waiting.sent);
            waiting.map(|waiting| waiting.sender.clone()).filter(is_there)
        };
        let receiver = match &message.kind {
            Kind::Response { id, .. } => {
                if !self.waiting.iter().any(|waiting| waiting.id == *id && waiting.sent) {
                    return None;
                }
                let receiver = of(self, id);
                self.forget(id);
                return receiver;
            }
            Kind::Error => return None,
            Kind::Notification { method } if method == methods::PROGRESS => {
                let value = message.to_value();
                let token = value.pointer("/params/progressToken").map(Value::to_string);
                token.and_then(|token| of(self, self.progress.get(&token)?))
            }
            Kind::Notification { .. } => {
                // A subscription of 2026-07-28 tags what belongs to it with the id of its request.
                let subscription = rewrite::subscription(message);
                subscription.as_ref().and_then(Id::of).and_then(|id| of(self, &id))
            }
            Kind::Request { .. } => None,
        };
        receiver.or_else(|| self.listener.clone().filter(is_there)).or_else(|| {
            // Nobody listens: most likely it belongs to what was asked last.
            self.waiting.iter().rev().map(|waiting| &waiting.sender).find(|sender| is_there(sender)).cloned()
        })
    }
}

async fn write(
    mut input: Box<dyn AsyncWrite + Send + Unpin>,
    mut lines: mpsc::Receiver<Line>,
    sorted: Arc<Mutex<Sorted>>,
) {
    while let Some(Line { bytes, request }) = lines.recv().await {
        if let Some(id) = request {
            lock(&sorted).sent(&id);
        }
        if input.write_all(&bytes).await.is_err() || input.flush().await.is_err() {
            return;
        }
    }
}

async fn read(
    mut output: impl AsyncBufRead + Unpin,
    most: usize,
    sorted: Arc<Mutex<Sorted>>,
    process: Box<dyn Any + Send>,
    ended: watch::Sender<Ended>,
) {
    let mut noise = 0;
    loop {
        let line = match line(&mut output, most).await {
            Ok(Some(line)) => line,
            Ok(None) => break,
            Err(error) => {
                tracing::warn!(%error, "an MCP server's output");
                break;
            }
        };
        let message = match FromServer::parse(&line) {
            Ok(message) => message,
            Err(error) => {
                noise += 1;
                tracing::debug!(%error, "an MCP server's line is no message");
                if noise > NOISE {
                    break;
                }
                continue;
            }
        };
        let heard = Heard::message(message);
        let receiver = lock(&sorted).receiver(&heard);
        match receiver {
            // Whoever does not read holds up its own process only, and for a bounded time.
            Some(receiver) => drop(timeout(SLOW, receiver.send(heard)).await),
            None => {
                let mut sorted = lock(&sorted);
                let is_late =
                    matches!(heard.message.as_ref().map(|m| &m.kind), Some(Kind::Response { .. } | Kind::Error));
                if !is_late {
                    sorted.keep(heard, most);
                }
            }
        }
    }
    lock(&sorted).end();
    drop(process);
    ended.send_if_modified(|ended| std::mem::replace(ended, (*ended).max(Ended::ByServer)) == Ended::No);
}

/// One line without its end. `None` at the end of the stream; what is begun there is no line.
pub async fn line(input: &mut (impl AsyncBufRead + Unpin), most: usize) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    loop {
        let piece = input.fill_buf().await?;
        if piece.is_empty() {
            return Ok(None);
        }
        let end = piece.iter().position(|byte| *byte == b'\n');
        let taken = end.unwrap_or(piece.len());
        if line.len() + taken > most {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a line is longer than {most} bytes")));
        }
        line.extend_from_slice(&piece[..taken]);
        input.consume(taken + usize::from(end.is_some()));
        if end.is_some() {
            return Ok(Some(line));
        }
    }
}

/// Reads on to the end of a line that is not kept. `false`: there is none within `most` bytes, or none at all.
pub async fn skip(input: &mut (impl AsyncBufRead + Unpin), most: usize) -> io::Result<bool> {
    let mut left = most;
    loop {
        let piece = input.fill_buf().await?;
        let end = piece.iter().position(|byte| *byte == b'\n');
        let taken = end.map_or(piece.len(), |end| end + 1);
        if taken == 0 || taken > left {
            return Ok(false);
        }
        left -= taken;
        input.consume(taken);
        if end.is_some() {
            return Ok(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Peer {
        stdio: Stdio,
        input: BufReader<tokio::io::DuplexStream>,
        output: tokio::io::DuplexStream,
    }

    fn peer() -> Peer {
        let (input, server_input) = tokio::io::duplex(1 << 16);
        let (server_output, output) = tokio::io::duplex(1 << 16);
        let limits = Limits { server_message: 4096, ..Limits::default() };
        let streams = Streams { input: Box::new(input), output: Box::new(output), process: Box::new(()) };
        let ended = watch::Sender::new(Ended::No);
        Peer { stdio: Stdio::new(streams, &limits, ended), input: BufReader::new(server_input), output: server_output }
    }

    impl Peer {
        async fn says(&mut self, line: &str) {
            self.output.write_all(format!("{line}\n").as_bytes()).await.unwrap();
        }

        async fn reads(&mut self) -> String {
            String::from_utf8(line(&mut self.input, 4096).await.unwrap().unwrap()).unwrap()
        }
    }

    async fn text(answering: &mut Answering) -> Option<String> {
        let heard = answering.next(Duration::from_secs(5)).await?.unwrap();
        heard.message.map(|message| message.text().to_owned())
    }

    #[tokio::test]
    async fn each_request_hears_what_is_about_it() {
        let mut peer = peer();
        let one = Id::Number(1);
        let mut first = peer.stdio.ask(&one, b"{\"id\":1}".to_vec(), Some(&Value::from("p"))).await.unwrap();
        let mut second = peer.stdio.ask(&Id::Text("1".to_owned()), b"{\"id\":\"1\"}".to_vec(), None).await.unwrap();
        assert_eq!(peer.reads().await, "{\"id\":1}");
        assert_eq!(peer.reads().await, "{\"id\":\"1\"}");
        peer.says("hello, I am no JSON").await;
        let progress = r#"{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":"p"}}"#;
        peer.says(progress).await;
        let (b, a) = (r#"{"jsonrpc":"2.0","id":"1","result":{}}"#, r#"{"jsonrpc":"2.0","id":1,"result":{}}"#);
        peer.says(b).await;
        peer.says(a).await;
        assert_eq!(text(&mut second).await.as_deref(), Some(b));
        assert_eq!(text(&mut second).await, None);
        assert_eq!(text(&mut first).await.as_deref(), Some(progress));
        assert_eq!(text(&mut first).await.as_deref(), Some(a));
    }

    #[tokio::test]
    async fn nothing_answers_a_request_that_was_not_sent() {
        let mut peer = peer();
        // Longer than the pipe: it stays in the middle of it, and what comes next waits.
        peer.stdio.send(vec![b' '; 4000]).await.unwrap();
        for _ in 0..17 {
            peer.stdio.send(vec![b' '; 4000]).await.unwrap();
        }
        let one = Id::Number(1);
        let mut asked = peer.stdio.ask(&one, b"{\"id\":1}".to_vec(), None).await.unwrap();
        peer.says(r#"{"jsonrpc":"2.0","id":1,"result":{"early":true}}"#).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        while !peer.reads().await.contains("\"id\"") {}
        peer.says(r#"{"jsonrpc":"2.0","id":1,"result":{}}"#).await;
        assert_eq!(text(&mut asked).await.as_deref(), Some(r#"{"jsonrpc":"2.0","id":1,"result":{}}"#));
    }

    #[tokio::test]
    async fn what_belongs_to_no_request_waits_for_a_listener() {
        let mut peer = peer();
        for n in 0..BACKLOG + 2 {
            peer.says(&format!(r#"{{"jsonrpc":"2.0","method":"notifications/message","params":{{"n":{n}}}}}"#)).await;
        }
        let asked = peer.stdio.ask(&Id::Number(1), b"{}".to_vec(), None).await.unwrap();
        drop(asked);
        peer.says(r#"{"jsonrpc":"2.0","id":1,"result":{}}"#).await;
        peer.says(r#"{"jsonrpc":"2.0","id":99,"result":{}}"#).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let mut listener = peer.stdio.listen().unwrap();
        assert!(peer.stdio.listen().is_none());
        // The oldest ones made room: 60 messages of 67 or 68 octets are as long as one may be.
        let first = text(&mut listener).await.unwrap();
        assert!(first.contains("\"n\":6}"), "{first}");
        drop(listener);
        assert!(peer.stdio.listen().is_some());
    }

    #[tokio::test]
    async fn a_process_that_ended_answers_nothing() {
        let Peer { stdio, output, input: _input } = peer();
        let mut asked = stdio.ask(&Id::Number(1), b"{}".to_vec(), None).await.unwrap();
        drop(output);
        assert_eq!(text(&mut asked).await, None);
        assert!(matches!(stdio.ask(&Id::Number(2), b"{}".to_vec(), None).await, Err(UpstreamError::Gone)));
    }

    #[tokio::test]
    async fn a_line_without_end_ends_the_conversation() {
        let mut peer = peer();
        let mut asked = peer.stdio.ask(&Id::Number(1), b"{}".to_vec(), None).await.unwrap();
        peer.output.write_all(&[b'x'; 5000]).await.unwrap();
        assert_eq!(text(&mut asked).await, None);
        assert!(peer.stdio.has_ended());
    }
}
