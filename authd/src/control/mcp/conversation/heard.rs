//! What a server says, on its way to the agent.
//!
//! Enters: messages of the server, and where it said them. Leaves: what the agent is told of them. Never: an answer to what was
//! not asked, or a list with a tool that the agent is not told of.

use serde_json::Value;

use super::{
    super::{
        HANDSHAKE_VERSIONS,
        events::Heard,
        gate::{Agent, Outcome},
        message::{FromServer, Id, Kind, METHOD_NOT_FOUND, Response, RpcError, SERVER_UNAVAILABLE},
        methods::{self, Era},
        pending::Source,
        rewrite, tools,
    },
    Conversation,
};
use crate::control::verifier::lock;

impl Conversation {
    /// What an agent is told of what the server says.
    pub(super) async fn pass(&self, agent: &Agent, era: Era, source: Source<'_>, heard: Heard) -> Option<Heard> {
        let Some(message) = heard.message else { return Some(heard) };
        let (id, retry) = (heard.id, heard.retry);
        let message = match message.kind.clone() {
            Kind::Notification { method } if methods::is_notification_of_server(&method) => match (era, source) {
                (Era::Stateless, Source::Answer(number, id)) => rewrite::subscribed(message, number, id),
                _ => Some(message),
            },
            Kind::Notification { .. } => None,
            Kind::Request { id, method } => self.asks(agent, era, id, &method, message).await,
            Kind::Response { id, is_error } => self.settle(agent, source, &id, is_error, &message),
            Kind::Error => {
                tracing::debug!(text = message.text(), "an MCP server answers nothing that was asked");
                None
            }
        };
        // Where to go on is known even if the message is not.
        (message.is_some() || id.is_some()).then_some(Heard { message, id, retry })
    }

    /// A request of the server.
    async fn asks(&self, agent: &Agent, era: Era, id: Id, method: &str, message: FromServer) -> Option<FromServer> {
        if methods::is_request_of_server(method, era) {
            let mut state = lock(&self.state);
            // Who asks more than that has stopped to wait for the first ones.
            if state.server_asked.len() == self.gateway.limits.server_requests {
                state.server_asked.pop_front();
            }
            state.server_asked.push_back(id);
            return Some(message);
        }
        let refused = RpcError::new(METHOD_NOT_FOUND, "mcp_method_unknown", "Method not found");
        let outcome = Err(refused.to_value(None).get("error").cloned().unwrap_or_default());
        let _ = self.send(agent, Response { id, outcome }.to_bytes()).await;
        None
    }

    /// An answer of the server: to what was asked there, and once.
    fn settle(
        &self,
        agent: &Agent,
        source: Source<'_>,
        id: &Id,
        is_error: bool,
        message: &FromServer,
    ) -> Option<FromServer> {
        let asked = lock(&self.state).pending.settle(source, id)?;
        if let Some(underway) = &asked.call {
            let is_error = is_error || tools::is_error(message);
            underway.report(Outcome::Answered { is_error, bytes: message.text().len() });
        }
        let id = &asked.id;
        let passed = rewrite::answer(message, id).ok_or("the server's answer cannot be read");
        let passed = passed.and_then(|passed| match asked.method.as_str() {
            _ if is_error => Ok(passed),
            methods::LIST => {
                let listed = tools::listed(&passed, id, &*agent.gate, &self.gateway.mirrored);
                listed.ok_or("the server's list of tools is none")
            }
            methods::INITIALIZE => self.agree(&passed).map(|()| tools::offered(&passed, id)),
            _ => Ok(passed),
        });
        Some(passed.unwrap_or_else(|why| {
            let error = RpcError::new(SERVER_UNAVAILABLE, "mcp_server_message_malformed", why);
            FromServer::answer(id.clone(), &error.to_value(Some(id)))
        }))
    }

    /// The version that the server chose.
    fn agree(&self, message: &FromServer) -> Result<(), &'static str> {
        let value = message.to_value();
        let version = value.pointer("/result/protocolVersion").and_then(Value::as_str);
        let known = version.filter(|version| HANDSHAKE_VERSIONS.contains(version));
        let known = known.ok_or("the server chose a version of the protocol that the gateway does not know")?;
        lock(&self.state).version = Some(known.to_owned());
        Ok(())
    }
}
