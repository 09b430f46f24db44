//! The MCP gateway under the policy in force: which servers there are, who may come to them, and who decides about calls.
//!
//! Enters: requests of workloads of this node, whose connection dataplane knows. Leaves: the gateway to a server, and a gate that asks
//! the action policy about each call, as for `POST /v1/actions`. Never: an agent's own token towards a server; the node shows one that
//! it makes.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, Weak},
};

use axum::http::{StatusCode, request::Parts};
use jiff::{SignedDuration, Timestamp};
use tokio::net::unix::pipe;

use super::{
    Answer, Shared,
    actions::{self, ActionAnswer},
    api::Session,
    mcp::{
        BoxFuture, Gateway, Limits, Reach as Way,
        authorization::Metadata,
        conversation::Conversation,
        gate::{Agent, Bearer, Denial, Gate, Report, Ruling, ToolCall},
        http::Access,
        session::{Bounds, Sessions},
        stdio::{Launch, Streams},
        upstream::HttpUpstream,
    },
    problem::Problem,
    prove,
    verifier::{Share, Verifier, lock},
};
use crate::{
    decisions::call::Arguments,
    grants::proof::Token,
    ipc::{Caller, FromControl},
    policy::model::{McpServer, Model, Reach},
};

/// A token for a server is used again until so shortly before its end.
const SPARE: SignedDuration = SignedDuration::from_secs(20);
/// Tokens that are kept for that.
const TOKENS: usize = 4096;

/// What outlives a policy.
pub struct Gateways {
    sessions: Arc<Sessions<Arc<Conversation>>>,
    /// By server, as it was when the gateway was made.
    made: Mutex<HashMap<String, (Reach, Arc<Gateway>)>>,
    /// By server, caller, and the token by which that one acts.
    tokens: Mutex<HashMap<String, (Bearer, Timestamp)>>,
}

impl Default for Gateways {
    fn default() -> Self {
        Self { sessions: Arc::new(Sessions::new(Bounds::default())), made: Mutex::default(), tokens: Mutex::default() }
    }
}

impl Gateways {
    pub fn sessions(&self) -> Arc<Sessions<Arc<Conversation>>> {
        self.sessions.clone()
    }

    /// Another policy is in force: gateways to servers that it does not have, or has elsewhere, end with their sessions.
    pub fn follow(&self, model: &Model) {
        lock(&self.made).retain(|name, (reach, _)| {
            model.mcp_servers.iter().any(|server| server.name == *name && server.reach == *reach)
        });
        let known = |name: &str| model.mcp_servers.iter().any(|server| server.name == name);
        for conversation in self.sessions.close_where(|server, _| !known(server)) {
            tokio::spawn(async move { conversation.end().await });
        }
        self.forget();
    }

    /// Something was revoked: tokens are made anew.
    pub fn forget(&self) {
        lock(&self.tokens).clear();
    }

    fn to(&self, server: &McpServer, shared: &Arc<Shared>, verifier: &Verifier) -> Result<Arc<Gateway>, Problem> {
        let mut made = lock(&self.made);
        if let Some((_, gateway)) = made.get(&server.name).filter(|(reach, _)| *reach == server.reach) {
            return Ok(gateway.clone());
        }
        let unusable = |why: String| {
            tracing::error!(server = server.name, why, "this MCP server cannot be used");
            Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "mcp_server_unusable",
                "the server cannot be used; the log says why",
            )
        };
        let way = match &server.reach {
            // A policy names it, and whoever writes policies may mean a server of this network.
            Reach::Url(url) => HttpUpstream::new(url, true, verifier.server_roots.as_deref()).map(Way::Http),
            Reach::Command { .. } => {
                Ok(Way::Command(Arc::new(Starter { shared: Arc::downgrade(shared), server: server.name.clone() })))
            }
        };
        let way = way.map_err(|error| unusable(error.to_string()))?;
        let gateway = Arc::new(Gateway::new(&server.name, way, Limits::default(), self.sessions.clone()));
        made.insert(server.name.clone(), (server.reach.clone(), gateway.clone()));
        Ok(gateway)
    }
}

/// Has dataplane start a server.
struct Starter {
    /// Which has the gateways.
    shared: Weak<Shared>,
    server: String,
}

impl Launch for Starter {
    fn launch<'a>(&'a self, agent: &'a Agent) -> BoxFuture<'a, io::Result<Streams>> {
        Box::pin(async move {
            let shared = self.shared.upgrade().ok_or(io::ErrorKind::BrokenPipe)?;
            let (connection, server) = (agent.connection, self.server.clone());
            match shared.ask(|question| FromControl::Launch { question, connection, server }).await {
                Answer::Launched([input, output, life]) => Ok(Streams {
                    input: Box::new(pipe::Sender::from_owned_fd(input)?),
                    output: Box::new(pipe::Receiver::from_owned_fd(output)?),
                    process: Box::new(life),
                }),
                Answer::Refused(refusal) => Err(io::Error::other(format!("{} ({})", refusal.message, refusal.reason))),
                _ => Err(io::Error::other("an answer to another question")),
            }
        })
    }
}

/// The door to all servers.
pub struct Door;

impl Access for Door {
    fn enter<'a>(&'a self, server: &'a str, head: &'a Parts) -> BoxFuture<'a, Result<(Arc<Gateway>, Agent), Problem>> {
        Box::pin(async move {
            let (session, verifier, index) = caller(head)?;
            let model = &verifier.model;
            let at = model.mcp_servers.iter().position(|known| known.name == server).ok_or_else(unknown)?;
            let gateway = session.shared.gateways.to(&model.mcp_servers[at], &session.shared, &verifier)?;
            let listed = names(model, at, model.actions.may_call(index));
            if listed.is_empty() {
                let message = "no policy lets the caller call a tool of this server";
                return Err(Problem::forbidden("mcp_server_not_allowed", message));
            }
            let bearer = actions::Bearer { method: head.method.as_str(), uri: &head.uri, headers: &head.headers };
            let token = actions::on_behalf(&session, &verifier, &bearer).await?;
            let Caller::Local { workload: Some(workload), .. } = &session.caller else { return Err(unknown()) };
            // Of whoever acts for another one, or for nobody, the sessions are others.
            let acts = token.as_ref().map_or_else(String::new, |token| token.hash.to_string());
            let key = format!("{} {acts}", workload.cgroup);
            let connection = session.connection;
            let gate = PolicyGate { shared: session.shared.clone(), session, server: server.to_owned(), listed, token };
            Ok((gateway, Agent { key, gate: Arc::new(gate), connection, challenge: None }))
        })
    }

    fn of_command<'a>(&'a self, command: &'a [String], head: &'a Parts) -> BoxFuture<'a, Result<String, Problem>> {
        Box::pin(async move {
            let (_, verifier, _) = caller(head)?;
            let is_it = |server: &&McpServer| matches!(&server.reach, Reach::Command { argv, .. } if argv == command);
            let found = verifier.model.mcp_servers.iter().find(is_it);
            found.map(|server| server.name.clone()).ok_or_else(unknown)
        })
    }

    fn metadata<'a>(&'a self, _: &'a str, _: &'a Parts) -> BoxFuture<'a, Result<Metadata, Problem>> {
        // Workloads of this node are known by their cgroup, and are asked for no token.
        Box::pin(async { Err(unknown()) })
    }
}

fn unknown() -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "mcp_server_unknown", "the policy has no such MCP server")
}

/// The connection of a request, and the index of the workload at its other end.
fn caller(head: &Parts) -> Result<(Arc<Session>, Arc<Verifier>, usize), Problem> {
    let session = head.extensions.get::<Arc<Session>>().ok_or_else(unknown)?.clone();
    let verifier = prove::verifier_of(&session)?;
    if !verifier.admit(&session.caller, Share::Caller, Timestamp::now()) {
        return Err(Problem::new(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", "ask less often"));
    }
    let Caller::Local { workload: Some(workload), .. } = &session.caller else {
        let message = "no workload of the policy matches the caller's cgroup, or it is not on this node";
        return Err(Problem::forbidden("caller_unmanaged", message));
    };
    let index = verifier.model.workloads.iter().position(|known| known.name == workload.name);
    let index = index.ok_or_else(|| Problem::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", "ask again"))?;
    Ok((session, verifier, index))
}

/// Of some tools, those of a server: what it calls each, and its name in the policy.
fn names(model: &Model, server: usize, tools: Vec<&str>) -> HashMap<String, String> {
    let of_server =
        model.tools.iter().filter(|tool| tool.server == Some(server) && tools.contains(&tool.name.as_str()));
    of_server.map(|tool| (tool.mcp_name.clone(), tool.name.clone())).collect()
}

/// Decides for one caller at one server, by the policy of the moment.
struct PolicyGate {
    shared: Arc<Shared>,
    session: Arc<Session>,
    server: String,
    /// Of the policy under which the caller came: what it is told of, and no more than that.
    listed: HashMap<String, String>,
    /// By which it acts for somebody.
    token: Option<Box<Token>>,
}

impl PolicyGate {
    async fn ruling(&self, call: &ToolCall) -> Ruling {
        let denied = |reason: &str, message: &str, policies: Vec<String>| {
            let (reason, message) = (reason.to_owned(), message.to_owned());
            Ruling::Deny(Denial { reason, message, policies, scopes: Vec::new() })
        };
        let Some(verifier) = self.shared.verifier() else {
            return denied("unavailable", "there are no settings yet", Vec::new());
        };
        if !call.rest.is_empty() {
            // It would not be part of what is decided about.
            return denied(
                "mcp_extra_members",
                "a call says which tool, and its arguments, and nothing else",
                Vec::new(),
            );
        }
        let model = &verifier.model;
        let server = model.mcp_servers.iter().position(|known| known.name == self.server);
        let tool = model.tools.iter().find(|tool| tool.server == server && tool.mcp_name == call.tool);
        let Some(tool) = tool.filter(|_| server.is_some()) else {
            return denied("action_unknown_tool", "the policy has no such tool", Vec::new());
        };
        let arguments = match Arguments::new(&call.arguments) {
            Ok(arguments) => arguments,
            Err(error) => return denied(error.reason(), &error.to_string(), Vec::new()),
        };
        match actions::act(&self.session, &verifier, &tool.name, arguments, self.token.clone()).await {
            Ok(ActionAnswer { decision: "allow", .. }) => match self.bearer(&verifier).await {
                Ok(token) => Ruling::Allow { token },
                Err(denial) => Ruling::Deny(denial),
            },
            Ok(ActionAnswer { decision: "pending", approval: Some(approval), until: Some(until), .. }) => {
                Ruling::Pending { approval, until: until.parse().unwrap_or_else(|_| Timestamp::now()) }
            }
            Ok(ActionAnswer { reason, message, policies, .. }) => denied(&reason, &message, policies),
            Err(problem) => denied(&problem.reason, &problem.detail, Vec::new()),
        }
    }

    /// What this node shows the server.
    async fn bearer(&self, verifier: &Verifier) -> Result<Option<Bearer>, Denial> {
        let server = verifier.model.mcp_servers.iter().find(|known| known.name == self.server);
        if server.is_none_or(|server| server.audience.is_none()) {
            return Ok(None);
        }
        let acts = self.token.as_ref().map_or_else(String::new, |token| token.hash.to_string());
        let key = format!("{} {} {acts}", self.server, self.session.connection);
        let tokens = &self.shared.gateways.tokens;
        let now = Timestamp::now();
        if let Some((bearer, until)) = lock(tokens).get(&key)
            && now < *until
        {
            return Ok(Some(bearer.clone()));
        }
        let denied = |reason: &str, message: String| Denial {
            reason: reason.to_owned(),
            message,
            policies: vec![],
            scopes: vec![],
        };
        let (connection, server, token) = (self.session.connection, self.server.clone(), self.token.clone());
        match self.shared.ask(|question| FromControl::Downstream { question, connection, server, token }).await {
            Answer::Exchanged(made) => {
                let until = made.expires.checked_sub(SPARE).unwrap_or(now);
                let bearer = Bearer::new(made.text);
                let mut tokens = lock(tokens);
                if tokens.len() >= TOKENS {
                    tokens.retain(|_, (_, until)| now < *until);
                }
                if let Some(bearer) = bearer.clone().filter(|_| tokens.len() < TOKENS) {
                    tokens.insert(key, (bearer, until));
                }
                Ok(bearer)
            }
            Answer::Refused(refusal) => Err(denied(&refusal.reason, refusal.message)),
            _ => Err(denied("internal", "an answer to another question".to_owned())),
        }
    }
}

impl Gate for PolicyGate {
    fn listed(&self, tool: &str) -> bool {
        self.listed.contains_key(tool)
    }

    fn call<'a>(&'a self, call: &'a ToolCall) -> BoxFuture<'a, Ruling> {
        Box::pin(self.ruling(call))
    }

    fn access(&self) -> BoxFuture<'_, Result<Option<Bearer>, Denial>> {
        Box::pin(async move {
            match self.shared.verifier() {
                Some(verifier) => self.bearer(&verifier).await,
                None => Ok(None),
            }
        })
    }

    fn report(&self, call: &ToolCall, report: Report) {
        let (shared, connection) = (self.shared.clone(), self.session.connection);
        let told = FromControl::Called {
            connection,
            server: self.server.clone(),
            tool: self.listed.get(&call.tool).cloned(),
            outcome: report.outcome.name().to_owned(),
            microseconds: u64::try_from(report.took.as_micros()).unwrap_or(u64::MAX),
        };
        tokio::spawn(async move { shared.tell(told).await });
    }
}
