//! The MCP gateway with a scripted gate, and the agents and servers of others that are put on both sides of it.

use std::{
    collections::{BTreeSet, HashMap},
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener as StdListener},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use authd::control::{
    mcp::{
        BoxFuture, Gateway, Limits, Reach,
        authorization::{Challenge, Metadata},
        conversation::Conversation,
        gate::{Agent, Bearer, Denial, Gate, Report, Ruling, Standing, ToolCall},
        http::{Access, router},
        session::{Bounds, Sessions},
        stdio::{Launch, Streams},
        upstream::HttpUpstream,
    },
    problem::Problem,
};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::{net::TcpListener, runtime::Runtime};

use crate::others::program;

/// For one answer of a peer.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// How the server knows authd.
pub const TOKEN: &str = "of-authd";

/// What the gate says, and what it heard.
#[derive(Default)]
pub struct Script {
    pub approved: Mutex<BTreeSet<String>>,
    pub asked: Mutex<Vec<ToolCall>>,
    pub reports: Mutex<Vec<(ToolCall, Report)>>,
    /// Nobody is let in any more.
    pub lost: AtomicBool,
}

pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Script {
    pub fn approve(&self, approval: &str) {
        lock(&self.approved).insert(approval.to_owned());
    }

    /// What became of the calls of a tool.
    pub fn outcomes(&self, tool: &str) -> Vec<String> {
        let reports = lock(&self.reports);
        let of_tool = reports.iter().filter(|(call, _)| call.tool == tool);
        of_tool.map(|(_, report)| format!("{:?}", report.outcome)).collect()
    }

    /// Waits until so many calls of a tool were asked about.
    pub fn wait_for_calls(&self, tool: &str, times: usize) -> Result<()> {
        wait(&format!("{times} calls of {tool}"), || {
            lock(&self.asked).iter().filter(|call| call.tool == tool).count() >= times
        })
    }
}

pub fn wait(what: &str, mut until: impl FnMut() -> bool) -> Result<()> {
    let begun = Instant::now();
    while !until() {
        if begun.elapsed() > PATIENCE {
            bail!("{what}: not within {} s", PATIENCE.as_secs());
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

impl Gate for Script {
    fn listed(&self, tool: &str) -> bool {
        tool != "secret"
    }

    fn call<'a>(&'a self, call: &'a ToolCall) -> BoxFuture<'a, Ruling> {
        lock(&self.asked).push(call.clone());
        let token = Bearer::new(TOKEN.to_owned());
        let amount = call.arguments.get("amount").and_then(Value::as_str).and_then(|text| text.parse::<u32>().ok());
        let approval = format!("approval-{}", amount.unwrap_or_default());
        let ruling = match call.tool.as_str() {
            "secret" => Ruling::Deny(Denial {
                reason: "action_denied".to_owned(),
                message: "nobody may know the secret".to_owned(),
                policies: vec!["no-secrets".to_owned()],
                scopes: vec!["secrets:read".to_owned()],
            }),
            "refund" if amount.is_none_or(|amount| amount > 50) && !lock(&self.approved).contains(&approval) => {
                Ruling::Pending { approval, until: Timestamp::now() + Duration::from_secs(600) }
            }
            _ => Ruling::Allow { token },
        };
        Box::pin(async move { ruling })
    }

    fn standing(&self) -> BoxFuture<'_, Standing> {
        let standing = match self.lost.load(Ordering::SeqCst) {
            false => Standing::In,
            true => Standing::Out(Denial {
                reason: "workload_revoked".to_owned(),
                message: "workload was revoked".to_owned(),
                policies: Vec::new(),
                scopes: Vec::new(),
            }),
        };
        Box::pin(async { standing })
    }

    fn access(&self) -> BoxFuture<'_, Result<Option<Bearer>, Denial>> {
        Box::pin(async { Ok(Bearer::new(TOKEN.to_owned())) })
    }

    fn admits(&self) -> bool {
        true
    }

    fn report(&self, call: &ToolCall, report: Report) {
        lock(&self.reports).push((call.clone(), report));
    }
}

/// Starts a command for each session, as the one who runs the tests.
struct Spawn(Vec<String>);

impl Launch for Spawn {
    fn launch<'a>(&'a self, _: &'a Agent) -> BoxFuture<'a, std::io::Result<Streams>> {
        Box::pin(async move {
            let (program, arguments) = self.0.split_first().ok_or(std::io::ErrorKind::InvalidInput)?;
            let mut child = tokio::process::Command::new(program)
                .args(arguments)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .kill_on_drop(true)
                .spawn()?;
            let (input, output) = (child.stdin.take(), child.stdout.take());
            let (Some(input), Some(output)) = (input, output) else {
                return Err(std::io::ErrorKind::BrokenPipe.into());
            };
            Ok(Streams { input: Box::new(input), output: Box::new(output), process: Box::new(child) })
        })
    }
}

/// Callers say who they are in a header: what authd knows by other means.
struct Door {
    gateways: HashMap<String, (Arc<Gateway>, Vec<String>)>,
    script: Arc<Script>,
    challenges: bool,
}

impl Access for Door {
    fn enter<'a>(
        &'a self,
        server: &'a str,
        head: &'a http::request::Parts,
    ) -> BoxFuture<'a, Result<(Arc<Gateway>, Agent), Problem>> {
        Box::pin(async move {
            let unknown = || Problem::new(http::StatusCode::NOT_FOUND, "mcp_server_unknown", "no such server");
            let (gateway, _) = self.gateways.get(server).ok_or_else(unknown)?;
            let key = head.headers.get("x-test-caller").and_then(|value| value.to_str().ok()).unwrap_or("nobody");
            let challenge = Challenge::of(&format!("https://node.example.org:7443/v1/mcp/{server}"), &[]);
            if key == "stranger" {
                let problem = challenge.map(|c| c.unauthorized(None, "token_missing", "show a token"));
                return Err(problem.unwrap_or_else(unknown));
            }
            let challenge = challenge.filter(|_| self.challenges);
            // `a/x` is the caller `a` with a token `x`.
            let caller = key.split('/').next().unwrap_or_default().to_owned();
            let (key, gate) = (key.to_owned(), self.script.clone());
            Ok((gateway.clone(), Agent { key, caller, gate, connection: 0, challenge }))
        })
    }

    fn of_command<'a>(
        &'a self,
        command: &'a [String],
        _: &'a http::request::Parts,
    ) -> BoxFuture<'a, Result<String, Problem>> {
        Box::pin(async move {
            let found = self.gateways.iter().find(|(_, (_, argv))| !argv.is_empty() && argv == command);
            let unknown = || Problem::new(http::StatusCode::NOT_FOUND, "mcp_server_unknown", "no such command");
            found.map(|(name, _)| name.clone()).ok_or_else(unknown)
        })
    }

    fn metadata<'a>(
        &'a self,
        server: &'a str,
        _: &'a http::request::Parts,
    ) -> BoxFuture<'a, Result<Metadata, Problem>> {
        let resource = format!("https://node.example.org:7443/v1/mcp/{server}");
        Box::pin(async move { Ok(Metadata::new(&resource, vec!["https://idp.example.org".to_owned()], Vec::new())) })
    }
}

pub enum Upstream {
    Url(String),
    Command(Vec<String>),
}

/// A gateway on loopback, as long as this lives.
pub struct Serving {
    pub script: Arc<Script>,
    pub address: SocketAddr,
    pub sessions: Arc<Sessions<Arc<Conversation>>>,
    _runtime: Runtime,
}

/// What a test wants otherwise.
#[derive(Default)]
pub struct Options {
    pub limits: Limits,
    pub bounds: Bounds,
    pub challenges: bool,
    /// A Unix socket besides, for `authd mcp`.
    pub socket: Option<std::path::PathBuf>,
}

impl Serving {
    pub fn start(servers: &[(&str, Upstream)], options: Options) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let _inside = runtime.enter();
        let script = Arc::new(Script::default());
        let sessions = Arc::new(Sessions::new(options.bounds));
        let mut gateways = HashMap::new();
        for (name, upstream) in servers {
            let (reach, command) = match upstream {
                Upstream::Url(url) => (Reach::Http(HttpUpstream::new(url, true, None)?), Vec::new()),
                Upstream::Command(command) => (Reach::Command(Arc::new(Spawn(command.clone()))), command.clone()),
            };
            let gateway = Gateway::new(name, reach, options.limits.clone(), sessions.clone());
            gateways.insert((*name).to_owned(), (Arc::new(gateway), command));
        }
        let router = router(Arc::new(Door { gateways, script: script.clone(), challenges: options.challenges }));
        let listener = StdListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let listener = TcpListener::from_std(listener)?;
        let service = TowerToHyperService::new(router);
        if let Some(path) = &options.socket {
            let listener = tokio::net::UnixListener::bind(path)?;
            let service = service.clone();
            runtime.spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    serve(stream, service.clone());
                }
            });
        }
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                serve(stream, service.clone());
            }
        });
        Ok(Self { script, address, sessions, _runtime: runtime })
    }

    pub fn url(&self, server: &str) -> String {
        format!("http://{}/v1/mcp/{server}", self.address)
    }

    /// One request with exactly these headers.
    pub fn raw(&self, method: &str, server: &str, headers: &[(&str, &str)], body: &str) -> Result<Answer> {
        raw(self.address, method, &format!("/v1/mcp/{server}"), headers, body)
    }
}

fn serve(
    stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    service: TowerToHyperService<axum::Router>,
) {
    tokio::spawn(async move {
        let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        let _ = connection.with_upgrades().await;
    });
}

/// Head and body of an answer, as text.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head
            .lines()
            .filter_map(|line| line.split_once(": "))
            .find(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, v)| v)
    }

    pub fn json(&self) -> Result<Value> {
        let text = self.body.lines().find_map(|line| line.strip_prefix("data: ")).unwrap_or(&self.body);
        serde_json::from_str(text).with_context(|| format!("{self:?}"))
    }

    /// `error.code`.
    pub fn code(&self) -> Option<i64> {
        self.json().ok()?.pointer("/error/code")?.as_i64()
    }
}

pub fn raw(to: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Result<Answer> {
    let mut stream = std::net::TcpStream::connect(to)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: authd.local\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
    stream.write_all(head.as_bytes())?;
    // It may have been refused before it was read.
    let _ = stream.write_all(body.as_bytes());
    let mut bytes = Vec::new();
    let _ = std::io::Read::read_to_end(&mut stream, &mut bytes);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").with_context(|| format!("no answer: {text:?}"))?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("a status")?;
    let body = match head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        true => unchunked(body),
        false => body.to_owned(),
    };
    Ok(Answer { status, head: head.to_owned(), body })
}

/// One request on a connection that stays open, read until its answer has some text. The connection ends with what is returned.
pub fn raw_until(
    to: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
    until: &str,
) -> Result<(String, std::net::TcpStream)> {
    let mut stream = std::net::TcpStream::connect(to)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: authd.local\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
    stream.write_all(head.as_bytes())?;
    let (mut text, mut piece) = (String::new(), [0; 4096]);
    while !text.contains(until) {
        let length = std::io::Read::read(&mut stream, &mut piece).with_context(|| text.clone())?;
        if length == 0 {
            bail!("it ended before `{until}`: {text}");
        }
        text.push_str(&String::from_utf8_lossy(&piece[..length]));
    }
    Ok((text, stream))
}

fn unchunked(mut text: &str) -> String {
    let mut body = String::new();
    while let Some((size, rest)) = text.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or_default();
        if size == 0 || rest.len() < size {
            break;
        }
        body.push_str(&rest[..size]);
        text = rest[size..].trim_start_matches("\r\n");
    }
    body
}

/// A program of others that answers lines with lines, by number.
pub struct Peer {
    child: Child,
    input: Option<ChildStdin>,
    lines: mpsc::Receiver<String>,
    answers: HashMap<u64, Value>,
    next: u64,
}

impl Peer {
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {command:?}"))?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().context("the pipe was asked for")?);
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, input, lines, answers: HashMap::new(), next: 1 })
    }

    pub fn line(&self) -> Result<String> {
        self.lines.recv_timeout(crate::daemon::PATIENCE).context("the program says nothing")
    }

    /// Begins something, and returns its number.
    pub fn begin(&mut self, mut what: Value) -> Result<u64> {
        let number = self.next;
        self.next += 1;
        what["number"] = number.into();
        let input = self.input.as_mut().context("it is still there")?;
        writeln!(input, "{what}")?;
        Ok(number)
    }

    /// Waits for what was begun. An error is `{"error": …}`.
    pub fn wait(&mut self, number: u64) -> Result<Value> {
        loop {
            if let Some(answer) = self.answers.remove(&number) {
                return Ok(answer);
            }
            let line = self.line()?;
            let Ok(answer) = serde_json::from_str::<Value>(&line) else { continue };
            if let Some(number) = answer["number"].as_u64() {
                self.answers.insert(number, answer);
            }
        }
    }

    /// What must work.
    pub fn ask(&mut self, what: Value) -> Result<Value> {
        let shown = what.to_string();
        let number = self.begin(what)?;
        let mut answer = self.wait(number)?;
        if let Some(error) = answer.get("error") {
            bail!("{shown}: {error}");
        }
        Ok(answer["result"].take())
    }

    /// What must not.
    pub fn fails(&mut self, what: Value) -> Result<Value> {
        let shown = what.to_string();
        let number = self.begin(what)?;
        let mut answer = self.wait(number)?;
        if answer.get("error").is_none() {
            bail!("{shown} worked: {answer}");
        }
        Ok(answer["error"].take())
    }

    pub fn call(&mut self, tool: &str, arguments: Value) -> Result<Value> {
        self.ask(json!({ "do": "call", "name": tool, "arguments": arguments }))
    }

    /// What a tool says.
    pub fn text(&mut self, tool: &str, arguments: Value) -> Result<String> {
        let result = self.call(tool, arguments)?;
        Ok(result["text"].as_str().with_context(|| result.to_string())?.to_owned())
    }

    pub fn names(&mut self) -> Result<Vec<String>> {
        Ok(serde_json::from_value(self.ask(json!({ "do": "list" }))?)?)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The command of a program of `tests/mcp`.
pub fn command(name: &str) -> Result<Vec<String>> {
    let path = program(&format!("mcp/{name}"))?;
    let interpreter = match Path::new(name).extension().and_then(|extension| extension.to_str()) {
        Some("py") => program("mcp/python/bin/python3")?,
        _ => "node".to_owned(),
    };
    Ok(vec![interpreter, path])
}

pub fn peer(name: &str, arguments: &[&str]) -> Result<Peer> {
    let command = command(name)?;
    Peer::start(Command::new(&command[0]).args(&command[1..]).args(arguments))
}

/// A server over HTTP: the program, and where it is.
pub struct HttpServer {
    _peer: Peer,
    pub url: String,
}

impl HttpServer {
    pub fn start(name: &str, mode: &str) -> Result<Self> {
        let peer = peer(name, &[mode])?;
        let url = peer.line()?;
        Ok(Self { _peer: peer, url })
    }

    /// Which requests it got: method, and all headers as text.
    pub fn seen(&self) -> Result<String> {
        let authority = self.url.strip_prefix("http://").and_then(|rest| rest.split('/').next()).context("a URL")?;
        Ok(raw(authority.parse()?, "GET", "/seen", &[], "")?.body)
    }
}
