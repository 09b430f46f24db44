//! One call that people were asked about, from the question to its end; and what a record says of each step.

use std::{fmt, str::FromStr};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{ApprovalError, MOST_UIDS, group::TokenFacts};
use crate::{
    decisions::call::{Agent, Call, CallHash, Delegation},
    digest::{read_hex, write_hex},
};

/// What people call an entry by: short enough to be read out.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Id(pub [u8; 6]);

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("an approval's id has 12 hexadecimal digits: see `authd approve list`")]
pub struct IdError;

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl FromStr for Id {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let plain = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let bytes = plain.then(|| read_hex(text)).flatten().and_then(|bytes| bytes.try_into().ok());
        bytes.map(Self).ok_or(IdError)
    }
}

impl TryFrom<String> for Id {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<Id> for String {
    fn from(id: Id) -> Self {
        id.to_string()
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    pub id: Id,
    pub call: Call,
    /// Users whose processes asked for it.
    pub uids: Vec<u32>,
    /// Names of `[[approvers]]`: one of them is enough.
    pub approvers: Vec<String>,
    pub policies: Vec<String>,
    pub requested: Timestamp,
    /// When nobody waits any more. Approvers with a shorter `ttl` than others have until then only.
    pub expires: Timestamp,
    pub state: State,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case", deny_unknown_fields)]
pub enum State {
    Pending,
    Granted {
        by: By,
        until: Timestamp,
    },
    Denied {
        by: By,
    },
    Used {
        by: By,
        at: Timestamp,
    },
    /// It ended before it was used. `by`: who had approved it.
    Over {
        by: Option<By>,
        at: Timestamp,
        why: Why,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    Expired,
    Revoked,
    PolicyChanged,
}

/// Who said yes or no, and what.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct By {
    pub at: Timestamp,
    /// In whose name; empty if root denied a call about which others are asked.
    pub approvers: String,
    pub uid: u32,
    /// As the policy calls the user.
    pub user: String,
    /// Of the token that was shown.
    pub token: Option<TokenFacts>,
    /// Why, in the words of who said it.
    pub text: String,
}

/// What a record says of one step.
#[derive(Clone, PartialEq, Debug)]
pub struct Told {
    /// `approval_requested`, `approval_granted`, `approval_denied`, `approval_used`, `approval_expired`, `approval_cancelled`,
    /// `approval_refused`.
    pub event: &'static str,
    pub id: Id,
    pub hash: CallHash,
    pub tool: String,
    pub agent: Agent,
    pub delegation: Option<Delegation>,
    pub policies: Vec<String>,
    /// Who could approve it.
    pub approvers: Vec<String>,
    /// Who decided it.
    pub by: Option<By>,
    /// User who did this: of the agent's process, or the approver.
    pub uid: Option<u32>,
    /// Why it ended, or why an approver was refused.
    pub reason: Option<&'static str>,
    /// When it ends if nothing happens.
    pub until: Option<Timestamp>,
}

impl Entry {
    pub fn is_live(&self) -> bool {
        matches!(self.state, State::Pending | State::Granted { .. })
    }

    /// Whether it still says something: somebody may use it, or what was refused stays refused.
    pub fn holds(&self, now: Timestamp) -> bool {
        self.is_live() || matches!(self.state, State::Denied { .. }) && now < self.expires
    }

    pub fn ended(&self) -> Option<Timestamp> {
        match &self.state {
            State::Pending | State::Granted { .. } => None,
            State::Denied { by } => Some(by.at),
            State::Used { at, .. } | State::Over { at, .. } => Some(*at),
        }
    }

    /// Who decided it, if somebody did.
    pub fn by(&self) -> Option<&By> {
        match &self.state {
            State::Pending => None,
            State::Granted { by, .. } | State::Denied { by } | State::Used { by, .. } => Some(by),
            State::Over { by, .. } => by.as_ref(),
        }
    }

    /// What its present state is told as.
    pub fn told(&self) -> Told {
        let (event, uid, until, reason) = match &self.state {
            State::Pending => ("approval_requested", self.uids.first().copied(), Some(self.expires), None),
            State::Granted { by, until } => ("approval_granted", Some(by.uid), Some(*until), None),
            State::Denied { by } => ("approval_denied", Some(by.uid), None, Some(self.state.refusal().reason())),
            State::Used { .. } => ("approval_used", None, None, None),
            State::Over { why: Why::Expired, .. } => {
                ("approval_expired", None, None, Some(self.state.refusal().reason()))
            }
            State::Over { .. } => ("approval_cancelled", None, None, Some(self.state.refusal().reason())),
        };
        Told { event, uid, until, reason, ..self.about() }
    }

    /// Somebody tried to decide it who may not, or too late.
    pub fn told_refused(&self, uid: u32, error: &ApprovalError) -> Told {
        Told { event: "approval_refused", uid: Some(uid), reason: Some(error.reason()), by: None, ..self.about() }
    }

    fn about(&self) -> Told {
        let Call { tool, agent, delegation, .. } = self.call.clone();
        Told {
            event: "",
            id: self.id,
            hash: self.call.hash(),
            tool,
            agent,
            delegation,
            policies: self.policies.clone(),
            approvers: self.approvers.clone(),
            by: self.by().cloned(),
            uid: None,
            reason: None,
            until: None,
        }
    }

    /// The same call once more, perhaps by a process of another user, and perhaps at a time for which the policy asks others.
    /// Returns whether that changes anything.
    pub(super) fn is_asked_again(&mut self, uid: u32, approvers: Vec<String>) -> Result<bool, ApprovalError> {
        let known = self.uids.contains(&uid);
        if !known && self.uids.len() >= MOST_UIDS {
            return Err(ApprovalError::TooMany);
        }
        let same = self.approvers == approvers;
        if !known {
            self.uids.push(uid);
        }
        self.approvers = approvers;
        Ok(!known || !same)
    }
}

impl State {
    /// `pending`, `granted`, `denied`, `used`, `expired`, `revoked` or `policy_changed`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Granted { .. } => "granted",
            Self::Denied { .. } => "denied",
            Self::Used { .. } => "used",
            Self::Over { why: Why::Expired, .. } => "expired",
            Self::Over { why: Why::Revoked, .. } => "revoked",
            Self::Over { why: Why::PolicyChanged, .. } => "policy_changed",
        }
    }

    /// Why a call cannot be made in this state.
    pub(super) fn refusal(&self) -> ApprovalError {
        match self {
            Self::Pending => ApprovalError::Pending,
            Self::Granted { .. } => ApprovalError::Granted,
            Self::Denied { .. } => ApprovalError::Denied,
            Self::Used { .. } => ApprovalError::Used,
            Self::Over { why: Why::Expired, .. } => ApprovalError::Expired,
            Self::Over { why: Why::Revoked, .. } => ApprovalError::Revoked,
            Self::Over { why: Why::PolicyChanged, .. } => ApprovalError::PolicyChanged,
        }
    }
}
