//! Who decides: one gate for one agent at one server.
//!
//! Enters: a tool call with its arguments, as they will be executed. Leaves: a ruling, and afterwards what became of the call.
//! Never: a token in a log. The gate's author decides by the policy of the moment; the gateway asks for each call anew.

use std::{sync::Arc, time::Duration};

use http::HeaderValue;
use jiff::Timestamp;
use serde_json::{Map, Value};
use zeroize::Zeroizing;

use super::{BoxFuture, authorization::Challenge};
use crate::ipc::Connection;

/// What authd shows to the server. The agent never sees it.
#[derive(Clone)]
pub struct Bearer(Zeroizing<String>);

impl Bearer {
    /// `None` for what cannot stand in a header (RFC 6750, 2.1).
    pub fn new(token: String) -> Option<Self> {
        let token = Zeroizing::new(token);
        let allowed = |c: u8| c.is_ascii_alphanumeric() || b"-._~+/=".contains(&c);
        (!token.is_empty() && token.bytes().all(allowed)).then_some(Self(token))
    }

    pub fn header(&self) -> Option<HeaderValue> {
        let text = Zeroizing::new(format!("Bearer {}", self.0.as_str()));
        let mut value = HeaderValue::from_str(&text).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

/// A call as it will be executed: the bytes that the server gets are written from these values.
#[derive(Clone, PartialEq, Debug)]
pub struct ToolCall {
    /// Name of the `[[mcp_server]]`.
    pub server: String,
    /// What the server calls the tool.
    pub tool: String,
    /// Empty if the agent sent none.
    pub arguments: Map<String, Value>,
    /// What else the call says, without `_meta`: `task`, or `inputResponses` and `requestState` of a call that goes on. It
    /// can change what the call does, and so belongs to what is approved.
    pub rest: Map<String, Value>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Denial {
    /// Stable name; docs/REASONS.md lists them.
    pub reason: String,
    /// For the agent: a sentence that a model understands.
    pub message: String,
    /// Which policies said no; for the agent too, so that it can be asked about.
    pub policies: Vec<String>,
    /// Scopes of the agent's own token with which the call would have been allowed. Whoever shows a token is then told to
    /// come again with a better one (RFC 6750, 3.1).
    pub scopes: Vec<String>,
}

pub enum Ruling {
    /// With the token for the server, if it wants one.
    Allow {
        token: Option<Bearer>,
    },
    Deny(Denial),
    /// A person has to say yes.
    Pending {
        approval: String,
        until: Timestamp,
    },
}

/// What became of a call.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The server answered; `is_error` if with an error of either kind.
    Answered {
        is_error: bool,
        bytes: usize,
    },
    Denied(Denial),
    /// Nobody approved it as long as the agent waited.
    Unapproved {
        approval: String,
    },
    /// Before it was sent to the server, or while that worked on it.
    Cancelled {
        sent: bool,
    },
    /// The server did not answer, or not in a way that could be passed on.
    Failed {
        reason: String,
    },
    /// The agent went away, and may fetch the answer later.
    Left,
}

impl Outcome {
    /// As records have it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Answered { is_error: false, .. } => "answered",
            Self::Answered { is_error: true, .. } => "answered_error",
            Self::Denied(_) => "denied",
            Self::Unapproved { .. } => "unapproved",
            Self::Cancelled { .. } => "cancelled",
            Self::Failed { .. } => "failed",
            Self::Left => "left",
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    pub outcome: Outcome,
    /// Until the gate had decided.
    pub decided_after: Duration,
    /// Until the outcome, all in all.
    pub took: Duration,
}

/// Whether an agent is still let in.
pub enum Standing {
    In,
    /// Nobody can say at the moment.
    Unsure(Denial),
    /// It has lost what it came by: its conversation ends.
    Out(Denial),
}

/// Decides for one agent at one server.
pub trait Gate: Send + Sync + 'static {
    /// Whether the agent is told of a tool, by the server's name for it. Being told allows nothing.
    fn listed(&self, tool: &str) -> bool;
    /// Whether a call may be made. Asked again while it is pending.
    fn call<'a>(&'a self, call: &'a ToolCall) -> BoxFuture<'a, Ruling>;
    /// By the policy of the moment, and what was revoked: asked before everything but a call, which the gate decides anyway.
    fn standing(&self) -> BoxFuture<'_, Standing>;
    /// The token for everything besides calls: beginning, listing, listening, ending.
    fn access(&self) -> BoxFuture<'_, Result<Option<Bearer>, Denial>>;
    /// Whether the agent may say one more thing now. Asked where not each of them is a request that is counted anyway.
    fn admits(&self) -> bool;
    /// Told once for each call. Must not block.
    fn report(&self, call: &ToolCall, report: Report);
}

/// Who asks.
#[derive(Clone)]
pub struct Agent {
    /// Who it is, for as long as it may: the same text for the same caller, another for anybody else. Sessions are bound to it.
    pub key: String,
    /// Whose share of what there is it takes, for whomever it acts.
    pub caller: String,
    pub gate: Arc<dyn Gate>,
    /// By which it came; whoever starts a server for it is told.
    pub connection: Connection,
    /// For callers who show tokens: where they learn how to get a better one.
    pub challenge: Option<Challenge>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_one_word_and_is_not_shown() {
        for bad in ["", "a b", "a\r\nX: y", "tök"] {
            assert!(Bearer::new(bad.to_owned()).is_none(), "{bad:?}");
        }
        let header = Bearer::new("abc.def-1".to_owned()).unwrap().header().unwrap();
        assert_eq!(header.to_str().unwrap(), "Bearer abc.def-1");
        assert!(!format!("{header:?}").contains("abc"));
    }
}
