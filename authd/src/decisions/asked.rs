//! What operators ask about approvals, and what they are answered: on the operators' socket, and by `--json`.
//!
//! Enters: entries. Leaves: what is shown of them. Never: less than what is decided about; the arguments of a call are shown whole.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    approvals::{Approvals, By, Entry, Id, State},
    call::{Agent, Call, CallHash, Delegation},
};

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "approve", rename_all = "snake_case", deny_unknown_fields)]
pub enum Question {
    List,
    Show {
        id: Id,
    },
    Grant {
        id: Id,
        /// In whose name: an `[[approvers]]`. Default: the first in whose name the asking user may.
        #[serde(default)]
        approvers: Option<String>,
        /// Why, for the record.
        #[serde(default)]
        text: String,
    },
    Deny {
        id: Id,
        #[serde(default)]
        text: String,
    },
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "approve", rename_all = "snake_case")]
pub enum Answer {
    /// Newest first.
    Listed {
        approvals: Vec<Listed>,
    },
    Shown(Box<Shown>),
    Granted(Box<Shown>),
    Denied(Box<Shown>),
    Refused {
        reason: String,
        message: String,
    },
}

/// One line of the list.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Listed {
    pub id: Id,
    /// `pending`, `granted`, `denied`, `used`, `expired`, `revoked` or `policy_changed`.
    pub state: String,
    pub tool: String,
    pub agent: Agent,
    /// For whom the agent acts; without one, for itself.
    pub delegation: Option<Delegation>,
    pub approvers: Vec<String>,
    pub requested: Timestamp,
    /// When nobody can approve it any more; if it is approved, when it cannot be used any more; else when it ended.
    pub until: Timestamp,
}

/// All of it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Shown {
    #[serde(flatten)]
    pub listed: Listed,
    /// Canonical text (RFC 8785), as the tool gets it.
    pub arguments: String,
    pub call_sha256: CallHash,
    /// Users whose processes asked: none of them can approve it.
    pub uids: Vec<u32>,
    pub policies: Vec<String>,
    /// Who can approve it, as the policy in force says.
    pub who: Vec<ShownGroup>,
    /// Who decided it.
    pub by: Option<By>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ShownGroup {
    pub name: String,
    pub users: Vec<String>,
    /// The issuer of whom they show a fresh token besides.
    pub step_up: Option<String>,
    /// Until when these can approve it.
    pub until: Timestamp,
    /// How long their approval can be used.
    pub valid_seconds: u64,
    pub may_be_subject: bool,
}

impl Listed {
    pub fn new(entry: &Entry) -> Self {
        let Entry { id, call, uids: _, approvers, policies: _, requested, expires, state } = entry;
        let Call { tool, arguments: _, agent, delegation, policy: _ } = call.clone();
        let until = match state {
            State::Pending => *expires,
            State::Granted { until, .. } => *until,
            State::Denied { .. } | State::Used { .. } | State::Over { .. } => entry.ended().unwrap_or(*expires),
        };
        let (approvers, state) = (approvers.clone(), state.name().to_owned());
        Self { id: *id, state, tool, agent, delegation, approvers, requested: *requested, until }
    }
}

impl Shown {
    pub fn new(entry: &Entry, approvals: &Approvals) -> Self {
        let groups = entry.approvers.iter().filter_map(|name| approvals.group(name));
        let who = groups.map(|group| ShownGroup {
            name: group.name.clone(),
            users: group.users.values().cloned().collect(),
            step_up: group.step_up.as_ref().map(|step_up| step_up.issuer.clone()),
            until: entry.requested.checked_add(group.ttl).unwrap_or(entry.expires).min(entry.expires),
            valid_seconds: group.valid.as_secs().unsigned_abs(),
            may_be_subject: group.may_be_subject,
        });
        Self {
            listed: Listed::new(entry),
            arguments: entry.call.arguments.text().to_owned(),
            call_sha256: entry.call.hash(),
            uids: entry.uids.clone(),
            policies: entry.policies.clone(),
            who: who.collect(),
            by: entry.by().cloned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decisions::approvals::tests::{ALICE, approver, entry, groups, id, later, noon, policy};

    #[test]
    fn questions_are_read_as_they_are_written_and_others_are_not() {
        for question in [
            Question::List,
            Question::Show { id: id(1) },
            Question::Grant { id: id(1), approvers: Some("leads".to_owned()), text: "x".to_owned() },
            Question::Deny { id: id(1), text: String::new() },
        ] {
            let text = serde_json::to_string(&question).unwrap();
            assert_eq!(serde_json::from_str::<Question>(&text).unwrap(), question);
        }
        for text in [
            r#"{"approve":"grant"}"#,
            r#"{"approve":"grant","id":"1"}"#,
            r#"{"approve":"show","id":"000000000001","token":"x"}"#,
            r#"{"approve":"all"}"#,
        ] {
            assert!(serde_json::from_str::<Question>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_time_that_is_shown_is_the_one_that_matters() {
        let mut approvals = Approvals::load([entry(1)]);
        approvals.policy_changed(noon(), policy(), groups());
        let until = |approvals: &Approvals| Listed::new(approvals.get(&id(1)).unwrap()).until;
        assert_eq!(until(&approvals), later(900));
        approvals.grant(later(1), &id(1), approver(ALICE)).unwrap();
        assert_eq!(until(&approvals), later(301));
        approvals.deny(later(2), &id(1), approver(ALICE)).unwrap();
        assert_eq!(until(&approvals), later(2));
        let shown = Shown::new(approvals.get(&id(1)).unwrap(), &approvals);
        assert_eq!((shown.arguments.as_str(), shown.who[0].users.len()), ("{\"amount\":1}", 2));
        let again: Shown = serde_json::from_str(&serde_json::to_string(&shown).unwrap()).unwrap();
        assert_eq!(again, shown);
    }
}
