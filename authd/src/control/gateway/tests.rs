//! The gateway when the policy changes, and when something is revoked, with a dataplane that answers as it is told.

use std::collections::{BTreeMap, VecDeque};

use axum::{Router, body::Body};
use base64::{Engine, engine::general_purpose::STANDARD};
use http_body_util::BodyExt;
use hyper::Request;
use jiff::SignedDuration;
use serde_json::{Map, Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::{mpsc, watch},
    time::{Duration, timeout},
};
use tower::ServiceExt;

use super::*;
use crate::{
    control::{
        api::Open,
        mcp::gate::{Ruling, ToolCall},
        mcp::http::router,
    },
    daemon::settings::SERVER_AUTHORITIES,
    digest::Digest,
    grants::proof::Token,
    ipc::{Channel, ExchangedToken, Question, Refusal, Settings, ToControl, Workload, pair},
};

const SOON: Duration = Duration::from_secs(10);

/// What dataplane is asked, as a test answers it.
#[derive(Debug)]
enum Asked {
    Admit,
    Downstream(Question),
    Act,
}

struct Scene {
    shared: Arc<Shared>,
    dataplane: Arc<Channel>,
    asked: mpsc::UnboundedReceiver<Asked>,
    /// What is answered to the next ones that ask to be let in; with none left, they are.
    refusals: Arc<Mutex<VecDeque<Refusal>>>,
}

impl Scene {
    async fn new() -> Self {
        let (ours, theirs) = pair().unwrap();
        let shared = Shared::new(Channel::new(ours).unwrap());
        let dataplane = Arc::new(Channel::new(theirs).unwrap());
        let (sender, asked) = mpsc::unbounded_channel();
        let refusals = Arc::new(Mutex::new(VecDeque::<Refusal>::new()));
        let (hears, answers, refused) = (shared.clone(), dataplane.clone(), refusals.clone());
        tokio::spawn(async move {
            while let Ok(Some((message, _))) = hears.channel.receive::<ToControl>().await {
                match message {
                    ToControl::Returned { question } => hears.answer(question, Answer::Returned),
                    ToControl::NotGranted { question, refusal } => hears.answer(question, Answer::Refused(refusal)),
                    ToControl::Exchanged { question, token } => hears.answer(question, Answer::Exchanged(token)),
                    other => panic!("{other:?}"),
                }
            }
        });
        tokio::spawn(async move {
            while let Ok(Some((message, _))) = answers.receive::<FromControl>().await {
                match message {
                    FromControl::Admit { question, .. } => {
                        let answer = match lock(&refused).pop_front() {
                            Some(refusal) => ToControl::NotGranted { question, refusal },
                            None => ToControl::Returned { question },
                        };
                        answers.send(&answer).await.unwrap();
                        let _ = sender.send(Asked::Admit);
                    }
                    FromControl::Downstream { question, .. } => drop(sender.send(Asked::Downstream(question))),
                    FromControl::Act { .. } => drop(sender.send(Asked::Act)),
                    _ => {}
                }
            }
        });
        Self { shared, dataplane, asked, refusals }
    }

    /// As the control process does with new settings.
    fn apply(&self, url: &str, more: &str, cedar: &str, roots: Option<&str>) {
        let policy = format!(
            r#"
trust_domain = "example.org"
[[workload]]
name = "agent"
kind = "agent"
cgroup = "/agents/*"
[[mcp_server]]
name = "tools"
url = "{url}"
{more}
[[tool]]
name = "refund"
server = "tools"
arguments = {{ "amount?" = "string" }}
other_arguments = true
"#
        );
        let files = roots.map(|pem| (SERVER_AUTHORITIES.to_owned(), STANDARD.encode(pem)));
        let settings = Settings {
            sources: vec![("p.toml".to_owned(), policy), ("a.cedar".to_owned(), cedar.to_owned())],
            files: BTreeMap::from_iter(files),
            ..Settings::default()
        };
        let verifier = Arc::new(Verifier::new(settings, self.shared.verifier().as_deref(), Arc::default()));
        assert_eq!(verifier.model.tools.len(), 1, "it is a policy");
        *self.shared.verifier.write().unwrap() = Some(verifier.clone());
        self.shared.gateways.follow(&verifier.model);
    }

    fn session(&self, connection: u64) -> Arc<Session> {
        let workload = Workload {
            name: "agent".to_owned(),
            spiffe_id: "spiffe://example.org/agent/a".to_owned(),
            cgroup: "/agents/a".to_owned(),
        };
        let caller = Caller::Local { workload: Some(workload), uid: 1000, tcp: false };
        Arc::new(Session::new(Open::new(self.shared.clone(), connection), caller, Vec::new(), None))
    }

    async fn enter(&self) -> Result<(Arc<Gateway>, Agent), Problem> {
        self.enter_by(1).await
    }

    async fn enter_by(&self, connection: u64) -> Result<(Arc<Gateway>, Agent), Problem> {
        let (mut head, ()) = Request::post("/v1/mcp/tools").body(()).unwrap().into_parts();
        head.extensions.insert(self.session(connection));
        timeout(SOON, Door.enter("tools", &head)).await.unwrap()
    }

    /// How often somebody asked to be let in since the last time.
    fn admitted(&mut self) -> usize {
        std::iter::from_fn(|| self.asked.try_recv().ok()).filter(|asked| matches!(asked, Asked::Admit)).count()
    }

    async fn asked_for_a_token(&mut self) -> Question {
        loop {
            if let Asked::Downstream(question) = timeout(SOON, self.asked.recv()).await.unwrap().unwrap() {
                return question;
            }
        }
    }

    async fn gives_token(&self, question: Question, text: &str) {
        let expires = Timestamp::now() + SignedDuration::from_secs(300);
        let token = ExchangedToken { text: text.to_owned(), scopes: Vec::new(), expires, dpop: false };
        self.dataplane.send(&ToControl::Exchanged { question, token: Box::new(token) }).await.unwrap();
    }
}

const PERMITS: &str = "permit (principal, action, resource);\n";
const NOWHERE: &str = "http://127.0.0.1:1/mcp";

async fn reason(agent: &Agent) -> Option<String> {
    match timeout(SOON, agent.gate.standing()).await.unwrap() {
        Standing::In => None,
        Standing::Unsure(denial) => Some(format!("unsure: {}", denial.reason)),
        Standing::Out(denial) => Some(denial.reason),
    }
}

/// A server that begins a session with everybody, once it is let, and counts what it is asked.
struct Upstream {
    url: String,
    asked: watch::Receiver<usize>,
    answers: watch::Sender<bool>,
}

impl Upstream {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/mcp", listener.local_addr().unwrap());
        let (answers, may) = watch::channel(true);
        let (count, asked) = watch::channel(0);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (mut may, count) = (may.clone(), count.clone());
                tokio::spawn(async move {
                    let (mut bytes, mut piece) = (Vec::new(), [0; 4096]);
                    let body = loop {
                        let length = stream.read(&mut piece).await.ok().filter(|length| *length > 0)?;
                        bytes.extend(&piece[..length]);
                        let text = String::from_utf8(bytes.clone()).ok()?;
                        let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
                        if let Some(body) = body.and_then(|body| serde_json::from_str::<Value>(&body).ok()) {
                            break body;
                        }
                    };
                    count.send_modify(|count| *count += 1);
                    may.wait_for(|may| *may).await.ok()?;
                    let answer = json!({
                        "jsonrpc": "2.0", "id": body["id"],
                        "result": { "protocolVersion": "2025-11-25", "capabilities": {}, "tools": [] },
                    });
                    let answer = answer.to_string();
                    let head =
                        "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length:";
                    stream.write_all(format!("{head} {}\r\n\r\n{answer}", answer.len()).as_bytes()).await.ok()
                });
            }
        });
        Self { url, asked, answers }
    }

    fn asked(&self) -> usize {
        *self.asked.borrow()
    }
}

struct Client {
    router: Router,
    session: Arc<Session>,
}

impl Client {
    fn new(scene: &Scene) -> Self {
        Self { router: router(Arc::new(Door)), session: scene.session(7) }
    }

    /// Status, the session's id, and the reason of a refusal.
    async fn says(&self, method: &str, id: Option<&str>) -> (u16, Option<String>, Option<String>) {
        let message = json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": {} }).to_string();
        let mut request = Request::post("/v1/mcp/tools")
            .header("accept", "application/json, text/event-stream")
            .header("content-type", "application/json")
            .extension(self.session.clone());
        if let Some(id) = id {
            request = request.header("mcp-session-id", id);
        }
        let answered = self.router.clone().oneshot(request.body(Body::from(message)).unwrap());
        let response = timeout(SOON, answered).await.unwrap().unwrap();
        let id = response.headers().get("mcp-session-id").map(|id| id.to_str().unwrap().to_owned());
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let reason = body.pointer("/error/data/reason").or_else(|| body.get("reason"));
        (status, id, reason.and_then(Value::as_str).map(str::to_owned))
    }
}

#[tokio::test]
async fn a_session_ends_with_the_way_by_which_it_came() {
    let scene = Scene::new().await;
    let (one, other) = (Upstream::start().await, Upstream::start().await);
    let client = Client::new(&scene);
    let sessions = scene.shared.gateways.sessions();
    let root = || {
        let made = rcgen::generate_simple_self_signed(["ca".to_owned()]).unwrap();
        format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", STANDARD.encode(made.cert.der()))
    };
    let roots = [root(), root()];
    scene.apply(&one.url, "", PERMITS, Some(&roots[0]));
    let (status, id, _) = client.says("initialize", None).await;
    assert_eq!((status, sessions.len()), (200, 1));
    assert_eq!(client.says("tools/list", id.as_deref()).await.0, 200);
    // The same once more is no change.
    scene.apply(&one.url, "", PERMITS, Some(&roots[0]));
    assert_eq!(client.says("tools/list", id.as_deref()).await.0, 200);
    // Another URL.
    let asked = one.asked();
    scene.apply(&other.url, "", PERMITS, Some(&roots[0]));
    assert!(sessions.is_empty());
    let (status, _, why) = client.says("tools/list", id.as_deref()).await;
    assert_eq!((status, why.as_deref()), (404, Some("mcp_session_unknown")));
    assert_eq!((one.asked(), other.asked()), (asked, 0), "neither server hears of it");
    // Other authorities. Who has a stream of lines, and whoever comes.
    let (_, id, _) = client.says("initialize", None).await;
    let (_, long) = scene.enter().await.unwrap();
    scene.apply(&other.url, "", PERMITS, Some(&roots[1]));
    assert_eq!(reason(&long).await.as_deref(), Some("mcp_server_changed"));
    let call =
        ToolCall { server: "tools".to_owned(), tool: "refund".to_owned(), arguments: Map::new(), rest: Map::new() };
    assert!(matches!(long.gate.call(&call).await, Ruling::Deny(denial) if denial.reason == "mcp_server_changed"));
    assert_eq!(client.says("tools/list", id.as_deref()).await.0, 404);
    assert!(sessions.is_empty());
}

#[tokio::test]
async fn a_session_that_is_begun_while_the_policy_changes_is_none() {
    let scene = Scene::new().await;
    let mut one = Upstream::start().await;
    let client = Client::new(&scene);
    scene.apply(&one.url, "", PERMITS, None);
    one.answers.send_replace(false);
    let (answer, ()) = tokio::join!(client.says("initialize", None), async {
        timeout(SOON, one.asked.wait_for(|asked| *asked == 1)).await.unwrap().unwrap();
        scene.apply(NOWHERE, "", PERMITS, None);
        one.answers.send_replace(true);
    });
    assert!(answer.0 >= 400 && answer.1.is_none(), "{answer:?}");
    assert!(scene.shared.gateways.sessions().is_empty());
}

#[tokio::test]
async fn what_a_caller_has_lost_is_noticed() {
    let mut scene = Scene::new().await;
    scene.apply(NOWHERE, "", PERMITS, None);
    let (_, agent) = scene.enter().await.unwrap();
    assert!(agent.gate.listed("refund"));
    assert_eq!((reason(&agent).await, scene.admitted()), (None, 1), "asked once, on entering");
    scene.shared.gateways.forget();
    assert_eq!((reason(&agent).await, reason(&agent).await, scene.admitted()), (None, None, 1));
    // Nobody answers: nothing is lost, and nothing passes.
    let refuse = |reason: &str| {
        lock(&scene.refusals).push_back(Refusal { reason: reason.to_owned(), message: String::new() });
        scene.shared.gateways.forget();
    };
    refuse("unavailable");
    assert_eq!(reason(&agent).await.as_deref(), Some("unsure: unavailable"));
    assert_eq!(reason(&agent).await, None);
    refuse("workload_revoked");
    assert_eq!(reason(&agent).await.as_deref(), Some("workload_revoked"));
    // Whoever comes again is told so, and its sessions end.
    let gateway = scene.enter().await.unwrap().0;
    let conversation = Conversation::new(gateway.clone(), agent.clone());
    for key in ["/agents/a ", "/agents/a token"] {
        let opened = gateway.sessions.open(Timestamp::now(), "tools", key, "/agents/a", conversation.clone()).0;
        assert!(opened.is_ok());
    }
    refuse("workload_revoked");
    assert_eq!(scene.enter().await.err().map(|problem| problem.reason).as_deref(), Some("workload_revoked"));
    assert_eq!(gateway.sessions.len(), 1);
    // A policy takes the last tool away.
    let (_, agent) = scene.enter().await.unwrap();
    scene.apply(NOWHERE, "", "", None);
    assert_eq!(reason(&agent).await.as_deref(), Some("mcp_server_not_allowed"));
    assert_eq!(scene.enter().await.err().map(|problem| problem.status), Some(403));
}

#[tokio::test]
async fn a_token_lets_in_as_long_as_it_is_good() {
    let scene = Scene::new().await;
    scene.apply(NOWHERE, "", PERMITS, None);
    let (gateway, _) = scene.enter().await.unwrap();
    for (seconds, expected) in [(60, None), (-1, Some("token_expired"))] {
        let token = Token {
            issuer: "own".to_owned(),
            iss: "https://node.example.org".to_owned(),
            subject: Some("alice".to_owned()),
            client_id: None,
            audience: Vec::new(),
            scopes: Vec::new(),
            jti: None,
            hash: Digest::of(b"token"),
            key_id: None,
            bound_to: Vec::new(),
            issued_at: None,
            not_after: Timestamp::now() + SignedDuration::from_secs(seconds),
            ends_with: Vec::new(),
            actors: Vec::new(),
            subject_issuer: None,
        };
        let gate = PolicyGate::new(scene.session(1), gateway.clone(), Some(Box::new(token)));
        let (key, caller) = (String::new(), String::new());
        let agent = Agent { key, caller, gate: Arc::new(gate), connection: 1, challenge: None };
        assert_eq!(reason(&agent).await.as_deref(), expected);
    }
}

#[tokio::test]
async fn a_token_that_is_made_while_something_is_revoked_is_not_kept() {
    let mut scene = Scene::new().await;
    scene.apply(NOWHERE, "audience = \"https://tools.example.org\"", PERMITS, None);
    let (_, agent) = scene.enter().await.unwrap();
    for (revoked, next) in [(true, "b"), (false, "c")] {
        let asks = agent.clone();
        let asked = tokio::spawn(async move { asks.gate.access().await.unwrap().unwrap().header().unwrap() });
        let question = scene.asked_for_a_token().await;
        if revoked {
            scene.shared.gateways.forget();
        }
        scene.gives_token(question, next).await;
        assert_eq!(timeout(SOON, asked).await.unwrap().unwrap(), format!("Bearer {next}"));
    }
    // The last one was kept, for whatever connection the caller comes by.
    for connection in [1, 2] {
        let (_, agent) = scene.enter_by(connection).await.unwrap();
        let again = timeout(SOON, agent.gate.access()).await.unwrap().unwrap().unwrap();
        assert_eq!(again.header().unwrap(), "Bearer c");
    }
    // One for whom the policy has there by now is not shown to whoever was there before.
    scene.shared.gateways.forget();
    let asks = agent.clone();
    let asked = tokio::spawn(async move { asks.gate.access().await.map(|_| ()).map_err(|denial| denial.reason) });
    let question = scene.asked_for_a_token().await;
    scene.apply("http://127.0.0.1:2/mcp", "audience = \"https://others.example.org\"", PERMITS, None);
    scene.gives_token(question, "d").await;
    assert_eq!(timeout(SOON, asked).await.unwrap().unwrap(), Err("mcp_server_changed".to_owned()));
}

#[tokio::test]
async fn no_approval_is_used_up_where_there_is_no_token() {
    let mut scene = Scene::new().await;
    scene.apply(NOWHERE, "audience = \"https://tools.example.org\"", PERMITS, None);
    let (_, agent) = scene.enter().await.unwrap();
    let call =
        ToolCall { server: "tools".to_owned(), tool: "refund".to_owned(), arguments: Map::new(), rest: Map::new() };
    let asked = tokio::spawn(async move { agent.gate.call(&call).await });
    let question = scene.asked_for_a_token().await;
    let refusal = Refusal { reason: "tokens_full".to_owned(), message: String::new() };
    scene.dataplane.send(&ToControl::NotGranted { question, refusal }).await.unwrap();
    let ruling = timeout(SOON, asked).await.unwrap().unwrap();
    assert!(matches!(ruling, Ruling::Deny(denial) if denial.reason == "tokens_full"));
    assert!(std::iter::from_fn(|| scene.asked.try_recv().ok()).all(|asked| !matches!(asked, Asked::Act)));
}

#[tokio::test]
async fn an_argument_that_a_server_could_take_for_another_one_is_refused() {
    let scene = Scene::new().await;
    scene.apply(NOWHERE, "", PERMITS, None);
    let (_, agent) = scene.enter().await.unwrap();
    for name in ["Amount", "AMOUNT", "amo\u{55}nt"] {
        let arguments = json!({ name: "100", "other": 1 }).as_object().unwrap().clone();
        let call = ToolCall { server: "tools".to_owned(), tool: "refund".to_owned(), arguments, rest: Map::new() };
        let Ruling::Deny(denial) = timeout(SOON, agent.gate.call(&call)).await.unwrap() else { panic!("{name}") };
        assert_eq!(denial.reason, "mcp_ambiguous_argument", "{name}");
    }
}
