//! The MCP gateway under the policy in force: which servers there are, who may come to them, and who decides about calls.
//!
//! Enters: requests of workloads of this node, whose connection dataplane knows. Leaves: the gateway to a server, and a gate that asks
//! the action policy about each call, as for `POST /v1/actions`. Never: an agent's own token towards a server; the node shows one that
//! it makes.

mod gate;

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, Weak},
};

use axum::http::{StatusCode, request::Parts};
use jiff::Timestamp;
use tokio::net::unix::pipe;

use self::gate::PolicyGate;
use super::{
    Answer, Shared, actions,
    api::Session,
    mcp::{
        BoxFuture, Gateway, Limits, Reach as Way,
        authorization::Metadata,
        conversation::Conversation,
        gate::{Agent, Bearer, Gate, Standing},
        http::{Access, end_all},
        session::{Bounds, Sessions},
        stdio::{Launch, Streams},
        upstream::HttpUpstream,
    },
    problem::Problem,
    prove,
    verifier::{Share, Verifier, lock},
};
use crate::{
    ipc::{Caller, FromControl},
    policy::model::{McpServer, Model, Reach},
};

/// What outlives a policy.
pub struct Gateways {
    sessions: Arc<Sessions<Arc<Conversation>>>,
    /// By server.
    made: Mutex<HashMap<String, Made>>,
    shown: Mutex<Shown>,
}

/// A gateway, and what it was made of.
struct Made {
    reach: Reach,
    /// PEM of the authorities that a server of HTTP has to be known by.
    roots: Option<Vec<u8>>,
    gateway: Arc<Gateway>,
}

/// What is shown to servers, and since when.
#[derive(Default)]
struct Shown {
    /// Another one since each revocation, and each policy: what was found out under an earlier one does not count.
    generation: u64,
    /// By server, audience, caller, and the token by which that one acts.
    tokens: HashMap<[String; 6], (Bearer, Timestamp)>,
}

impl Default for Gateways {
    fn default() -> Self {
        let sessions = Arc::new(Sessions::new(Bounds::default()));
        Self { sessions, made: Mutex::default(), shown: Mutex::default() }
    }
}

impl Gateways {
    pub fn sessions(&self) -> Arc<Sessions<Arc<Conversation>>> {
        self.sessions.clone()
    }

    /// Another policy is in force: gateways to servers that it does not have, or has elsewhere, end with their sessions. Those whose
    /// authorities are others by now end when somebody comes to them, and no later than sessions are looked at again.
    pub fn follow(&self, model: &Model) {
        lock(&self.made).retain(|name, made| {
            let stays = model.mcp_servers.iter().any(|server| server.name == *name && server.reach == made.reach);
            if !stays {
                made.gateway.retire();
            }
            stays
        });
        self.end_retired();
        self.forget();
    }

    fn end_retired(&self) {
        end_all(self.sessions.close_where(|_, _, conversation| conversation.gateway().is_retired()));
    }

    /// Something was revoked: tokens are made anew, and everybody is asked about anew.
    pub fn forget(&self) {
        let mut shown = lock(&self.shown);
        shown.generation += 1;
        shown.tokens.clear();
    }

    fn generation(&self) -> u64 {
        lock(&self.shown).generation
    }

    /// Whether a gateway leads where these settings say, by the authorities that they name.
    fn is_present(&self, gateway: &Arc<Gateway>, verifier: &Verifier) -> bool {
        let made = lock(&self.made);
        let Some(made) = made.get(&gateway.name).filter(|made| Arc::ptr_eq(&made.gateway, gateway)) else {
            return false;
        };
        let server = verifier.model.mcp_servers.iter().find(|server| server.name == gateway.name);
        server.is_some_and(|server| made.fits(server, verifier)) && !gateway.is_retired()
    }

    fn to(&self, server: &McpServer, shared: &Arc<Shared>, verifier: &Arc<Verifier>) -> Result<Arc<Gateway>, Problem> {
        let mut made = lock(&self.made);
        if let Some(found) = made.get(&server.name).filter(|made| made.fits(server, verifier)) {
            return Ok(found.gateway.clone());
        }
        // Whoever brings other settings looks at what is made here after they are in force, and not again.
        if shared.verifier().is_none_or(|now| !Arc::ptr_eq(&now, verifier)) {
            return Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", "ask again"));
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
        let (reach, roots) = (server.reach.clone(), verifier.server_roots.clone());
        let before = made.insert(server.name.clone(), Made { reach, roots, gateway: gateway.clone() });
        drop(made);
        if let Some(before) = before {
            before.gateway.retire();
            self.end_retired();
        }
        Ok(gateway)
    }
}

impl Made {
    fn fits(&self, server: &McpServer, verifier: &Verifier) -> bool {
        let is_known_alike = match server.reach {
            Reach::Url(_) => self.roots == verifier.server_roots,
            Reach::Command { .. } => true,
        };
        self.reach == server.reach && is_known_alike
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
            let (session, verifier) = caller(head)?;
            let model = &verifier.model;
            let at = model.mcp_servers.iter().position(|known| known.name == server).ok_or_else(unknown)?;
            let gateway = session.shared.gateways.to(&model.mcp_servers[at], &session.shared, &verifier)?;
            let bearer = actions::Bearer { method: head.method.as_str(), uri: &head.uri, headers: &head.headers };
            let token = actions::on_behalf(&session, &verifier, &bearer).await?;
            let Caller::Local { workload: Some(workload), .. } = &session.caller else { return Err(unknown()) };
            // Of whoever acts for another one, or for nobody, the sessions are others.
            let acts = token.as_ref().map_or_else(String::new, |token| token.hash.to_string());
            let (caller, connection) = (workload.cgroup.clone(), session.connection);
            let key = format!("{caller} {acts}");
            let gate = PolicyGate::new(session.clone(), gateway.clone(), token);
            match gate.standing().await {
                Standing::In => {}
                Standing::Unsure(denial) => {
                    return Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, &denial.reason, denial.message));
                }
                Standing::Out(denial) => {
                    let is_theirs = |at: &str, whose: &str, _: &_| at == server && whose == key;
                    end_all(session.shared.gateways.sessions.close_where(is_theirs));
                    return Err(Problem::forbidden(&denial.reason, denial.message));
                }
            }
            Ok((gateway, Agent { key, caller, gate: Arc::new(gate), connection, challenge: None }))
        })
    }

    fn of_command<'a>(&'a self, command: &'a [String], head: &'a Parts) -> BoxFuture<'a, Result<String, Problem>> {
        Box::pin(async move {
            let (_, verifier) = caller(head)?;
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

/// The connection of a request, which a workload of the settings has at its other end.
fn caller(head: &Parts) -> Result<(Arc<Session>, Arc<Verifier>), Problem> {
    let session = head.extensions.get::<Arc<Session>>().ok_or_else(unknown)?.clone();
    let verifier = prove::verifier_of(&session)?;
    if !verifier.admit(&session.caller, Share::Caller, Timestamp::now()) {
        return Err(Problem::new(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", "ask less often"));
    }
    let Caller::Local { workload: Some(workload), .. } = &session.caller else {
        let message = "no workload of the policy matches the caller's cgroup, or it is not on this node";
        return Err(Problem::forbidden("caller_unmanaged", message));
    };
    if !verifier.model.workloads.iter().any(|known| known.name == workload.name) {
        return Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", "ask again"));
    }
    Ok((session, verifier))
}

/// Of some tools, those of a server: what it calls each, and its name in the policy.
fn names(model: &Model, server: usize, tools: Vec<&str>) -> HashMap<String, String> {
    let of_server =
        model.tools.iter().filter(|tool| tool.server == Some(server) && tools.contains(&tool.name.as_str()));
    of_server.map(|tool| (tool.mcp_name.clone(), tool.name.clone())).collect()
}

#[cfg(test)]
mod tests;
