//! What decides about one caller at one server: the policy of the moment, and what dataplane says of the caller.
//!
//! Enters: calls, and everything else that a caller wants of a server. Leaves: rulings, and the token that the server is shown. Never:
//! what a caller had under an earlier policy, or before something was revoked.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, Weak},
};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value};

use super::names;
use crate::{
    control::{
        Answer, Shared,
        actions::{self, ActionAnswer},
        api::Session,
        mcp::{
            BoxFuture, Gateway,
            gate::{Bearer, Denial, Gate, Report, Ruling, Standing, ToolCall},
            message::fold,
        },
        verifier::{Share, Verifier, lock},
    },
    decisions::call::Arguments,
    grants::proof::Token,
    ipc::{Caller, FromControl},
    policy::model::Tool,
};

/// A token for a server is used again until so shortly before its end.
const SPARE: SignedDuration = SignedDuration::from_secs(20);
/// Tokens that are kept for that.
const TOKENS: usize = 4096;

/// Decides for one caller at one server, by the policy of the moment.
pub struct PolicyGate {
    shared: Arc<Shared>,
    session: Arc<Session>,
    /// By which the caller came, as long as the policy has that way.
    gateway: Arc<Gateway>,
    /// By which it acts for somebody.
    token: Option<Box<Token>>,
    seen: Mutex<Seen>,
}

/// What is known of the caller.
#[derive(Default)]
struct Seen {
    /// Under which settings.
    verifier: Weak<Verifier>,
    /// The tools that it is told of: what the server calls each, and its name in the policy.
    listed: HashMap<String, String>,
    /// Since when dataplane has nothing against it: a generation of [`super::Shown`].
    admitted: Option<u64>,
}

fn denial(reason: &str, message: impl Into<String>) -> Denial {
    Denial { reason: reason.to_owned(), message: message.into(), policies: Vec::new(), scopes: Vec::new() }
}

impl PolicyGate {
    pub fn new(session: Arc<Session>, gateway: Arc<Gateway>, token: Option<Box<Token>>) -> Self {
        Self { shared: session.shared.clone(), session, gateway, token, seen: Mutex::default() }
    }

    fn settings(&self) -> Result<Arc<Verifier>, Denial> {
        self.shared.verifier().ok_or_else(|| denial("unavailable", "there are no settings yet"))
    }

    /// Whether what the caller came by is still there: its token, and the way to the server.
    fn holds(&self, verifier: &Verifier) -> Result<(), Denial> {
        if self.token.as_ref().is_some_and(|token| token.not_after <= Timestamp::now()) {
            return Err(denial("token_expired", "the token by which the caller acts has expired"));
        }
        if !self.shared.gateways.is_present(&self.gateway, verifier) {
            let message = "the policy reaches the server in another way by now, or not at all: begin again";
            return Err(denial("mcp_server_changed", message));
        }
        Ok(())
    }

    /// Looks which tools the caller has under these settings.
    fn look(&self, verifier: &Arc<Verifier>) -> Result<(), Denial> {
        let settings = Arc::downgrade(verifier);
        if lock(&self.seen).verifier.ptr_eq(&settings) {
            return Ok(());
        }
        let Caller::Local { workload: Some(workload), .. } = &self.session.caller else { return Err(unmanaged()) };
        let model = &verifier.model;
        let index = model.workloads.iter().position(|known| known.name == workload.name).ok_or_else(unmanaged)?;
        let server = model.mcp_servers.iter().position(|known| known.name == self.gateway.name);
        let listed = server.map(|server| names(model, server, model.actions.may_call(index))).unwrap_or_default();
        if listed.is_empty() {
            return Err(denial("mcp_server_not_allowed", "no policy lets the caller call a tool of this server"));
        }
        let mut seen = lock(&self.seen);
        (seen.verifier, seen.listed) = (settings, listed);
        Ok(())
    }

    async fn stands(&self) -> Standing {
        let verifier = match self.settings() {
            Ok(verifier) => verifier,
            Err(denial) => return Standing::Unsure(denial),
        };
        if let Err(denial) = self.holds(&verifier).and_then(|()| self.look(&verifier)) {
            return Standing::Out(denial);
        }
        let generation = self.shared.gateways.generation();
        if lock(&self.seen).admitted == Some(generation) {
            return Standing::In;
        }
        let (connection, server, token) = (self.session.connection, self.gateway.name.clone(), self.token.clone());
        match self.shared.ask(|question| FromControl::Admit { question, connection, server, token }).await {
            Answer::Returned => {
                lock(&self.seen).admitted = Some(generation);
                Standing::In
            }
            // Nobody has said that the caller has lost anything.
            Answer::Refused(refusal) if refusal.reason == "unavailable" => {
                Standing::Unsure(denial(&refusal.reason, refusal.message))
            }
            Answer::Refused(refusal) => Standing::Out(denial(&refusal.reason, refusal.message)),
            _ => Standing::Unsure(confused()),
        }
    }

    async fn ruling(&self, call: &ToolCall) -> Ruling {
        let verifier = match self.settings().and_then(|verifier| self.holds(&verifier).map(|()| verifier)) {
            Ok(verifier) => verifier,
            Err(denial) => return Ruling::Deny(denial),
        };
        let denied = |reason: &str, message: &str| Ruling::Deny(denial(reason, message));
        if !call.rest.is_empty() {
            // It would not be part of what is decided about.
            return denied("mcp_extra_members", "a call says which tool, and its arguments, and nothing else");
        }
        let model = &verifier.model;
        let server = model.mcp_servers.iter().position(|known| known.name == self.gateway.name);
        let tool = model.tools.iter().find(|tool| tool.server == server && tool.mcp_name == call.tool);
        let Some(tool) = tool.filter(|_| server.is_some()) else {
            return denied("action_unknown_tool", "the policy has no such tool");
        };
        if let Some(name) = ambiguous(tool, &call.arguments) {
            let message = format!("some servers would take the argument `{name}` for another one of the tool's");
            return denied("mcp_ambiguous_argument", &message);
        }
        let arguments = match Arguments::new(&call.arguments) {
            Ok(arguments) => arguments,
            Err(error) => return denied(error.reason(), &error.to_string()),
        };
        // It names nothing of the call. Where there is none, no approval is used up.
        let bearer = match self.bearer(&verifier).await {
            Ok(bearer) => bearer,
            Err(denial) => return Ruling::Deny(denial),
        };
        match actions::act(&self.session, &verifier, &tool.name, arguments, self.token.clone()).await {
            Ok(ActionAnswer { decision: "allow", .. }) => Ruling::Allow { token: bearer },
            Ok(ActionAnswer { decision: "pending", approval: Some(approval), until: Some(until), .. }) => {
                Ruling::Pending { approval, until: until.parse().unwrap_or_else(|_| Timestamp::now()) }
            }
            Ok(ActionAnswer { reason, message, policies, .. }) => {
                Ruling::Deny(Denial { policies, ..denial(&reason, message) })
            }
            Err(problem) => denied(&problem.reason, &problem.detail),
        }
    }

    /// What this node shows the server.
    async fn bearer(&self, verifier: &Verifier) -> Result<Option<Bearer>, Denial> {
        let server = verifier.model.mcp_servers.iter().find(|known| known.name == self.gateway.name);
        let Some(audience) = server.and_then(|server| server.audience.clone()) else { return Ok(None) };
        let Caller::Local { workload: Some(workload), .. } = &self.session.caller else { return Err(unmanaged()) };
        let acts = self.token.as_ref().map_or_else(String::new, |token| token.hash.to_string());
        let workload = workload.clone();
        // All that the token says, and ends with. By which connection it was asked for is none of that.
        let key =
            [self.gateway.name.clone(), audience.clone(), workload.name, workload.spiffe_id, workload.cgroup, acts];
        let shown = &self.shared.gateways.shown;
        let now = Timestamp::now();
        let generation = {
            let shown = lock(shown);
            if let Some((bearer, _)) = shown.tokens.get(&key).filter(|(_, until)| now < *until) {
                return Ok(Some(bearer.clone()));
            }
            shown.generation
        };
        let (connection, server, token) = (self.session.connection, self.gateway.name.clone(), self.token.clone());
        let asked = |question| FromControl::Downstream { question, connection, server, audience, token };
        match self.shared.ask(asked).await {
            Answer::Exchanged(made) => {
                // It is for whom the policy has there now.
                self.holds(&*self.settings()?)?;
                let until = made.expires.checked_sub(SPARE).unwrap_or(now);
                let bearer = Bearer::new(made.text);
                let mut shown = lock(shown);
                if shown.tokens.len() >= TOKENS {
                    shown.tokens.retain(|_, (_, until)| now < *until);
                }
                // What was revoked while it was made may be what it rests on.
                let may_keep = shown.generation == generation && shown.tokens.len() < TOKENS;
                if let Some(bearer) = bearer.clone().filter(|_| may_keep) {
                    shown.tokens.insert(key, (bearer, until));
                }
                Ok(bearer)
            }
            Answer::Refused(refusal) => Err(denial(&refusal.reason, refusal.message)),
            _ => Err(confused()),
        }
    }
}

fn unmanaged() -> Denial {
    denial("caller_unmanaged", "no workload of the policy matches the caller's cgroup any more")
}

fn confused() -> Denial {
    denial("internal", "an answer to another question")
}

/// An argument that policies do not see, and that a server which ignores case would read as one that they do.
fn ambiguous<'a>(tool: &Tool, arguments: &'a Map<String, Value>) -> Option<&'a String> {
    let declared = &tool.arguments.0;
    let undeclared = arguments.keys().filter(|name| !declared.contains_key(*name));
    undeclared.into_iter().find(|name| declared.keys().any(|known| fold(known) == fold(name)))
}

impl Gate for PolicyGate {
    fn listed(&self, tool: &str) -> bool {
        lock(&self.seen).listed.contains_key(tool)
    }

    fn call<'a>(&'a self, call: &'a ToolCall) -> BoxFuture<'a, Ruling> {
        Box::pin(self.ruling(call))
    }

    fn standing(&self) -> BoxFuture<'_, Standing> {
        Box::pin(self.stands())
    }

    fn access(&self) -> BoxFuture<'_, Result<Option<Bearer>, Denial>> {
        Box::pin(async move { self.bearer(&*self.settings()?).await })
    }

    fn admits(&self) -> bool {
        let now = Timestamp::now();
        // Without settings nothing is let in anyway.
        self.shared.verifier().is_none_or(|verifier| verifier.admit(&self.session.caller, Share::Caller, now))
    }

    fn report(&self, call: &ToolCall, report: Report) {
        let (shared, connection) = (self.shared.clone(), self.session.connection);
        let told = FromControl::Called {
            connection,
            server: self.gateway.name.clone(),
            tool: lock(&self.seen).listed.get(&call.tool).cloned(),
            outcome: report.outcome.name().to_owned(),
            microseconds: u64::try_from(report.took.as_micros()).unwrap_or(u64::MAX),
        };
        tokio::spawn(async move { shared.tell(told).await });
    }
}
