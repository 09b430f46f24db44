//! Who may say yes: the `[[approvers]]` of the policy, with users in the place of their names, and what their tokens have to say.
//!
//! Enters: an approver as the kernel knows him, and what was verified of a token. Leaves: whether he may, or why not.
//!
//! What is compared with what: the user of his process with the users of the policy, and with those whose processes asked; issuer
//! and subject of his token with those for whom and through whom the agent acts. A user's name is never compared with a token's
//! subject: nothing says that `alice` here and `alice@example.org` there are one.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::{
    ApprovalError, MAX_TEXT,
    entry::{By, Entry},
};

/// Clocks of issuers may be ahead by so much.
const AHEAD: SignedDuration = SignedDuration::from_secs(30);

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Group {
    pub name: String,
    /// As the policy calls each.
    pub users: BTreeMap<u32, String>,
    pub step_up: Option<StepUp>,
    /// How long a call waits for them.
    pub ttl: SignedDuration,
    /// How long their yes can be used.
    pub valid: SignedDuration,
    pub may_be_subject: bool,
}

/// The token that approvers show besides.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StepUp {
    /// Name of the `[[issuer]]`.
    pub issuer: String,
    pub audience: String,
    pub subjects: Vec<String>,
    /// One of these; anything, if there are none.
    pub acr: Vec<String>,
    /// How old `auth_time` may be.
    pub max_age: Option<SignedDuration>,
}

/// What was verified of an approver's token.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenFacts {
    /// Name of the `[[issuer]]` by which it was verified.
    pub issuer_name: String,
    /// Its `iss`.
    pub issuer: String,
    pub subject: String,
    #[serde(default)]
    pub audience: Vec<String>,
    pub acr: Option<String>,
    pub auth_time: Option<Timestamp>,
}

/// Somebody who decides.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Approver {
    /// In whose name. `None`: the first that lets him.
    pub approvers: Option<String>,
    /// User of his process, as the kernel says.
    pub uid: u32,
    pub token: Option<TokenFacts>,
    /// Why, in his words.
    pub text: String,
}

impl Group {
    /// Whether somebody may say yes to a call under these terms.
    pub(super) fn admits(&self, now: Timestamp, entry: &Entry, approver: &Approver) -> Result<(), ApprovalError> {
        if !self.users.contains_key(&approver.uid) {
            return Err(ApprovalError::NotApprover);
        }
        if entry.uids.contains(&approver.uid) {
            return Err(ApprovalError::ByAgent);
        }
        if entry.requested.checked_add(self.ttl).is_ok_and(|end| end <= now) {
            return Err(ApprovalError::Expired);
        }
        match (&self.step_up, &approver.token) {
            (Some(_), None) => return Err(ApprovalError::StepUpRequired),
            (Some(step_up), Some(token)) => step_up.is_met_by(now, token)?,
            (None, _) => {}
        }
        match &approver.token {
            Some(token) => self.is_somebody_else(entry, token),
            None => Ok(()),
        }
    }

    /// Whether a token is about somebody who neither asks nor is asked for.
    fn is_somebody_else(&self, entry: &Entry, token: &TokenFacts) -> Result<(), ApprovalError> {
        if token.subject == entry.call.agent.spiffe_id {
            return Err(ApprovalError::ByAgent);
        }
        let Some(delegation) = &entry.call.delegation else { return Ok(()) };
        let is_he = |issuer: &str, subject: &str| issuer == token.issuer && subject == token.subject;
        let mut actors = delegation.actors.iter();
        if actors.any(|actor| is_he(actor.issuer.as_deref().unwrap_or(&token.issuer), &actor.subject)) {
            return Err(ApprovalError::ByAgent);
        }
        if !self.may_be_subject && is_he(&delegation.issuer, &delegation.subject) {
            return Err(ApprovalError::BySubject);
        }
        Ok(())
    }
}

impl StepUp {
    pub(super) fn is_met_by(&self, now: Timestamp, token: &TokenFacts) -> Result<(), ApprovalError> {
        if token.issuer_name != self.issuer {
            return Err(ApprovalError::WrongIssuer);
        }
        // One that was meant for something else, perhaps given to an agent, approves nothing.
        if !token.audience.contains(&self.audience) {
            return Err(ApprovalError::WrongAudience);
        }
        if !self.subjects.contains(&token.subject) {
            return Err(ApprovalError::WrongSubject);
        }
        if !self.acr.is_empty() && !token.acr.as_ref().is_some_and(|acr| self.acr.contains(acr)) {
            return Err(ApprovalError::Acr);
        }
        match (self.max_age, token.auth_time) {
            (None, _) => Ok(()),
            (Some(_), None) => Err(ApprovalError::AuthTime),
            (Some(max_age), Some(time)) => {
                let age = now.duration_since(time);
                if -AHEAD <= age && age <= max_age { Ok(()) } else { Err(ApprovalError::AuthTime) }
            }
        }
    }
}

impl Approver {
    pub(super) fn said(self, now: Timestamp, group: &Group) -> Result<By, ApprovalError> {
        let user = group.users.get(&self.uid).cloned().unwrap_or_default();
        self.by(now, group.name.clone(), user)
    }

    pub(super) fn said_by_root(self, now: Timestamp) -> Result<By, ApprovalError> {
        self.by(now, String::new(), "root".to_owned())
    }

    fn by(self, now: Timestamp, approvers: String, user: String) -> Result<By, ApprovalError> {
        if self.text.len() > MAX_TEXT {
            return Err(ApprovalError::TextTooLong);
        }
        Ok(By { at: now, approvers, uid: self.uid, user, token: self.token, text: self.text })
    }
}
