//! Decisions about actions: may this workload call this tool, with these arguments, for this subject?
//!
//! Enters: the model, policies in Cedar, and calls whose caller is known. Leaves: allowed, waiting for somebody's approval, or
//! denied, each with the policies that say so. Never: the approval itself, a permit, or an effect.

mod actions;
pub mod approvals;
mod arguments;
pub mod asked;
pub mod call;
mod check;
mod entities;
pub mod kept;
pub mod lint;
pub mod notify;
mod policies;
mod scan;
pub mod schema;

use jiff::Timestamp;
use serde::Serialize;

use crate::{grants::proof::Token, policy::model::Model, proofs::json::Limits};

pub use self::{
    actions::{Actions, Policy, Prepared},
    arguments::{ArgumentError, Problem},
    check::load,
    policies::{Written, read},
};

/// The end of names of files with action policies.
pub const SUFFIX: &str = ".cedar";
/// Of the arguments of a call, for whoever parses them.
pub const ARGUMENTS: Limits = Limits { bytes: 256 << 10, depth: 32, members: 4_096 };

/// One call of a tool, as it is decided about.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Index of the caller in the model that the [`Actions`] were made for.
    pub workload: usize,
    /// The caller's, in full.
    pub spiffe_id: &'a str,
    /// The caller's cgroup.
    pub instance: &'a str,
    /// The tool's name in the policy.
    pub tool: &'a str,
    /// Whoever parsed it refused duplicate keys: they cannot be seen here.
    pub arguments: &'a serde_json::Map<String, serde_json::Value>,
    /// For whom the caller acts.
    pub subject: Option<&'a Subject>,
    /// SPIFFE IDs of the whole delegation chain.
    pub actors: &'a [String],
    pub now: Timestamp,
}

/// For whom somebody acts: what a verified token says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Subject {
    /// Name of the `[[issuer]]`.
    pub issuer: String,
    /// `sub`
    pub id: String,
    pub scopes: Vec<String>,
    pub audience: Vec<String>,
    /// `client_id`
    pub client: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the policy does not name the issuer whose subject the token is about")]
pub struct SubjectError;

impl SubjectError {
    pub fn reason(self) -> &'static str {
        "token_wrong_issuer"
    }
}

impl Subject {
    /// The subject of a token: of one of this node's own, that of the issuer whose token was exchanged at first.
    pub fn of(token: &Token, model: &Model) -> Result<Self, SubjectError> {
        let first = token.subject_issuer.as_ref().filter(|first| **first != token.iss);
        let issuer = match first {
            None => token.issuer.clone(),
            Some(first) => {
                let known = model.issuers.iter().find(|issuer| issuer.issuer == *first);
                known.ok_or(SubjectError)?.name.clone()
            }
        };
        Ok(Self {
            issuer,
            id: token.subject.clone().unwrap_or_default(),
            scopes: token.scopes.clone(),
            audience: token.audience.clone(),
            client: token.client_id.clone(),
        })
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decision {
    pub outcome: Outcome,
    /// Names of the policies that decided, sorted: those that allow, those that would with an approval, those that forbid, or
    /// those that failed.
    pub policies: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    Allowed,
    /// One of these approvals is needed.
    Pending(Vec<Alternative>),
    Denied(Denial),
}

/// An approval that would do.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub struct Alternative {
    /// Index of the model's approvers.
    #[serde(skip)]
    pub approvers: usize,
    /// Their name.
    pub name: String,
    /// The policy that permits the call with that approval.
    pub policy: String,
}

/// Why a call is denied.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Denial {
    // The caller's part.
    #[error("no tool is called that")]
    UnknownTool,
    #[error(transparent)]
    BadArguments(#[from] ArgumentError),
    // The policy's.
    #[error("no policy permits it")]
    NotPermitted,
    #[error("a policy forbids it")]
    Forbidden,
    #[error("a policy fails on it: {0}")]
    PolicyError(String),
    // Ours.
    #[error("the policy knows no such workload")]
    UnknownWorkload,
}

impl Denial {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::UnknownTool => "action_unknown_tool",
            Self::BadArguments(_) => "action_bad_arguments",
            Self::NotPermitted => "action_not_permitted",
            Self::Forbidden => "action_forbidden",
            Self::PolicyError(_) => "action_policy_error",
            Self::UnknownWorkload => "action_unknown_workload",
        }
    }
}

impl Outcome {
    /// `allowed`, `pending`, `denied`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Pending(_) => "pending",
            Self::Denied(_) => "denied",
        }
    }

    pub fn reason(&self) -> &'static str {
        match self {
            Self::Allowed => "action_permitted",
            Self::Pending(_) => "action_needs_approval",
            Self::Denied(denial) => denial.reason(),
        }
    }
}

impl Decision {
    fn denied(denial: impl Into<Denial>) -> Self {
        Self { outcome: Outcome::Denied(denial.into()), policies: Vec::new() }
    }

    pub fn is_allowed(&self) -> bool {
        self.outcome == Outcome::Allowed
    }

    pub fn reason(&self) -> &'static str {
        self.outcome.reason()
    }
}

#[cfg(test)]
mod tests;
