//! Calls that wait for a person's yes, and what became of them.
//!
//! Enters: calls that a policy lets pass only with an approval, what approvers say, the time. Leaves: entries, and what records
//! tell of each change. Never: a decision about a policy, clocks, a disk; whoever holds this keeps each change
//! (`decisions::kept`) before it counts.
//!
//! An approval is of one call, by its hash, and for one use. Whatever is not a yes that is fresh, unused, and given under the
//! policy in force by one who may, is a no under a name of its own.

pub mod entry;
pub mod group;
#[cfg(test)]
pub mod tests;

use std::collections::{BTreeMap, HashMap};

use jiff::{SignedDuration, Timestamp};

pub use self::{
    entry::{By, Entry, Id, State, Told, Why},
    group::{Approver, Group, StepUp, TokenFacts},
};
use super::call::{Agent, Call, CallHash};
use crate::digest::Digest;

/// Calls of one instance of an agent that may wait, or be approved and not used, at one time.
pub const PER_AGENT: usize = 16;
/// And of all instances of one workload, denials that hold included: others wait too.
pub const PER_WORKLOAD: usize = MOST / 4;
pub const PER_WORKLOAD_BYTES: usize = MOST_BYTES / 4;
/// Entries of all agents, ended ones included.
pub const MOST: usize = 1024;
/// Bytes of their arguments.
pub const MOST_BYTES: usize = 16 << 20;
/// Users who may ask for one call; more than one is rare.
const MOST_UIDS: usize = 8;
/// Bytes of what an approver says to it.
pub const MAX_TEXT: usize = 1024;
/// How long an ended entry can be looked up.
const KEPT: SignedDuration = SignedDuration::from_hours(24);

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ApprovalError {
    // The agent asks for too much.
    #[error("{MOST} calls wait for approvals, or they are too large: let some be decided")]
    Full,
    #[error(
        "{PER_AGENT} calls of this agent, or {PER_WORKLOAD} of its workload, wait for approvals, or were denied a short while ago: let some be decided, use what was approved, or wait"
    )]
    TooMany,
    // The policy asks nobody.
    #[error("the policy names nobody who could approve this call")]
    Nobody,
    // The call has no approval that could be used.
    #[error("nobody has approved this call yet")]
    Pending,
    #[error("the call was denied")]
    Denied,
    #[error("the approval was used: each is for one call")]
    Used,
    #[error("nobody approved the call in time, or the approval was not used in time")]
    Expired,
    #[error("the agent, or the one for whom it acts, was revoked after it asked")]
    Revoked,
    #[error("another policy is in force than the one under which the call was decided: ask again")]
    PolicyChanged,
    #[error("there is no such approval")]
    Unknown,
    #[error("the call is approved already")]
    Granted,
    // The approver may not.
    #[error("the user is none of those who approve this call")]
    NotApprover,
    #[error("the policy asks others to approve this call")]
    WrongApprovers,
    #[error("whoever asks for an approval does not give it")]
    ByAgent,
    #[error("the one for whom the agent acts does not approve it")]
    BySubject,
    #[error("these approvers show a fresh token besides")]
    StepUpRequired,
    #[error("the token is of another issuer than these approvers show")]
    WrongIssuer,
    #[error("the token is about somebody else than these approvers")]
    WrongSubject,
    #[error("the token is not meant for approvals: its `aud` is not the approvers' `audience`")]
    WrongAudience,
    #[error("the token does not say that its subject authenticated as strongly as these approvers have to (`acr`)")]
    Acr,
    #[error(
        "the token does not say that its subject authenticated as recently as these approvers have to (`auth_time`)"
    )]
    AuthTime,
    #[error("what is said to it has at most {MAX_TEXT} bytes")]
    TextTooLong,
}

impl ApprovalError {
    /// Stable name for answers and records.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Full => "approvals_full",
            Self::TooMany => "too_many_approvals",
            Self::Nobody => "approval_nobody",
            Self::Pending => "approval_pending",
            Self::Denied => "approval_denied",
            Self::Used => "approval_used",
            Self::Expired => "approval_expired",
            Self::Revoked => "approval_revoked",
            Self::PolicyChanged => "approval_policy_changed",
            Self::Unknown => "approval_unknown",
            Self::Granted => "approval_granted",
            Self::NotApprover => "approval_not_approver",
            Self::WrongApprovers => "approval_wrong_approvers",
            Self::ByAgent => "approval_by_agent",
            Self::BySubject => "approval_by_subject",
            Self::StepUpRequired => "approval_step_up_required",
            Self::WrongIssuer => "approval_wrong_issuer",
            Self::WrongSubject => "approval_wrong_subject",
            Self::WrongAudience => "approval_wrong_audience",
            Self::Acr => "approval_acr",
            Self::AuthTime => "approval_auth_time",
            Self::TextTooLong => "approval_text_too_long",
        }
    }
}

/// A call for which a policy wants a yes.
#[derive(Clone, Debug)]
pub struct Asked {
    /// A new one, at random.
    pub id: Id,
    pub call: Call,
    /// User of the process that asks.
    pub uid: u32,
    /// Names of `[[approvers]]`: one of them is enough.
    pub approvers: Vec<String>,
    /// Ids of the policies that want it.
    pub policies: Vec<String>,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Requested {
    pub id: Id,
    /// Approved already: it can be used.
    pub granted: bool,
    /// When nobody can approve it any more; if it is approved, when it cannot be used any more.
    pub until: Timestamp,
    /// Of a new entry. `None`: the same call waits, or is approved, already.
    pub told: Option<Told>,
    /// Whether the entry has to be kept again.
    pub changed: bool,
    /// Ended entries that made room.
    pub forgotten: Vec<Id>,
}

/// A yes, used up.
#[derive(Clone, PartialEq, Debug)]
pub struct Approval {
    pub id: Id,
    pub by: By,
    pub told: Told,
}

/// Whose calls end before they are used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whose<'a> {
    Workload(&'a str),
    /// Path of the instance's cgroup.
    Instance(&'a str),
    /// Of the agent, or of one in whose name it acts.
    SpiffeId(&'a str),
    /// The `iss` of tokens by which agents act for others.
    Issuer(&'a str),
    Subject {
        issuer: &'a str,
        subject: &'a str,
    },
}

/// All entries. No policy is in force before [`Approvals::policy_changed`].
#[derive(Default)]
pub struct Approvals {
    policy: Option<Digest>,
    groups: HashMap<String, Group>,
    entries: BTreeMap<Id, Entry>,
    /// The newest entry of each call.
    by_hash: HashMap<CallHash, Id>,
}

impl Approvals {
    /// Takes up what an earlier daemon kept.
    pub fn load(entries: impl IntoIterator<Item = Entry>) -> Self {
        let mut approvals = Self::default();
        entries.into_iter().for_each(|entry| approvals.put(entry));
        approvals
    }

    /// Newest first.
    pub fn list(&self) -> Vec<&Entry> {
        let mut all: Vec<&Entry> = self.entries.values().collect();
        all.sort_by_key(|entry| std::cmp::Reverse((entry.requested, entry.id)));
        all
    }

    pub fn get(&self, id: &Id) -> Option<&Entry> {
        self.entries.get(id)
    }

    /// Of the policy that it knows to be in force.
    pub fn policy(&self) -> Option<Digest> {
        self.policy
    }

    pub fn group(&self, name: &str) -> Option<&Group> {
        self.groups.get(name)
    }

    /// Asks people about a call. As long as the same call waits or is approved, that is the one.
    ///
    /// A call that was denied is not asked about again before nobody would have waited for it any more: else asking often
    /// enough would be a way to a yes.
    pub fn request(&mut self, now: Timestamp, asked: Asked) -> Result<Requested, ApprovalError> {
        let Asked { id, call, uid, mut approvers, policies } = asked;
        if self.policy != Some(call.policy) {
            return Err(ApprovalError::PolicyChanged);
        }
        approvers.retain(|name| self.groups.contains_key(name));
        let wait = approvers.iter().filter_map(|name| self.groups.get(name)).map(|group| group.ttl).max();
        let expires = now.checked_add(wait.ok_or(ApprovalError::Nobody)?).unwrap_or(Timestamp::MAX);
        let hash = call.hash();
        if let Some(known) = self.by_hash.get(&hash).and_then(|id| self.entries.get_mut(id)) {
            let until = match &known.state {
                State::Pending if now < known.expires => Some((known.expires, false)),
                State::Granted { by, until } if now < *until && approvers.contains(&by.approvers) => {
                    Some((*until, true))
                }
                State::Denied { .. } if now < known.expires => return Err(ApprovalError::Denied),
                _ => None,
            };
            if let Some((until, granted)) = until {
                let changed = known.is_asked_again(uid, approvers)?;
                return Ok(Requested { id: known.id, granted, until, told: None, changed, forgotten: Vec::new() });
            }
        }
        let of_agent = self.entries.values().filter(|entry| entry.is_live() && entry.call.agent == call.agent).count();
        // Denials that hold are of its share: a no is not pushed out by more questions.
        let of_workload = |entry: &&Entry| entry.holds(now) && entry.call.agent.workload == call.agent.workload;
        let (of_workload, bytes) = self
            .entries
            .values()
            .filter(of_workload)
            .fold((0, 0), |(count, bytes), entry| (count + 1, bytes + entry.call.arguments.text().len()));
        let bytes = bytes + call.arguments.text().len();
        if of_agent >= PER_AGENT || of_workload >= PER_WORKLOAD || bytes > PER_WORKLOAD_BYTES {
            return Err(ApprovalError::TooMany);
        }
        let forgotten = self.make_room(now, call.arguments.text().len())?;
        let entry =
            Entry { id, call, uids: vec![uid], approvers, policies, requested: now, expires, state: State::Pending };
        let told = entry.told();
        self.put(entry);
        Ok(Requested { id, granted: false, until: expires, told: Some(told), changed: true, forgotten })
    }

    /// Whether there can be a new entry under an id.
    pub fn is_free(&self, id: &Id) -> bool {
        !self.entries.contains_key(id)
    }

    /// An approver says yes.
    pub fn grant(&mut self, now: Timestamp, id: &Id, approver: Approver) -> Result<Told, ApprovalError> {
        let entry = self.entries.get(id).ok_or(ApprovalError::Unknown)?;
        match &entry.state {
            State::Pending if entry.expires <= now => return Err(ApprovalError::Expired),
            State::Pending => {}
            State::Granted { .. } => return Err(ApprovalError::Granted),
            over => return Err(over.refusal()),
        }
        if self.policy != Some(entry.call.policy) {
            return Err(ApprovalError::PolicyChanged);
        }
        let group = self.group_of(now, entry, &approver)?;
        let until = now.checked_add(group.valid).unwrap_or(Timestamp::MAX);
        let by = approver.said(now, group)?;
        self.becomes(id, State::Granted { by, until })
    }

    /// An approver says no, or takes back a yes that was not used. He shows no token for that, and root needs not be one.
    pub fn deny(&mut self, now: Timestamp, id: &Id, approver: Approver) -> Result<Told, ApprovalError> {
        let entry = self.entries.get(id).ok_or(ApprovalError::Unknown)?;
        match &entry.state {
            State::Pending if entry.expires <= now => return Err(ApprovalError::Expired),
            State::Granted { until, .. } if *until <= now => return Err(ApprovalError::Expired),
            State::Pending | State::Granted { .. } => {}
            over => return Err(over.refusal()),
        }
        let named = |name: &String| approver.approvers.as_ref().is_none_or(|asked| asked == name);
        let mut groups = entry.approvers.iter().filter(|name| named(name)).filter_map(|name| self.groups.get(name));
        let by = match groups.find(|group| group.users.contains_key(&approver.uid)) {
            Some(group) => approver.said(now, group)?,
            None if approver.uid == 0 => approver.said_by_root(now)?,
            None => return Err(ApprovalError::NotApprover),
        };
        self.becomes(id, State::Denied { by })
    }

    /// Uses a yes up, for a call that the policy lets pass with an approval of one of these approvers. Whatever it returns but an
    /// [`Approval`], the call is refused.
    pub fn use_up(&mut self, now: Timestamp, hash: &CallHash, approvers: &[String]) -> Result<Approval, ApprovalError> {
        let entry = self.by_hash.get(hash).and_then(|id| self.entries.get(id)).ok_or(ApprovalError::Unknown)?;
        let by = match &entry.state {
            State::Granted { until, .. } if *until <= now => return Err(ApprovalError::Expired),
            State::Granted { by, .. } => by.clone(),
            State::Pending if entry.expires <= now => return Err(ApprovalError::Expired),
            other => return Err(other.refusal()),
        };
        if self.policy != Some(entry.call.policy) {
            return Err(ApprovalError::PolicyChanged);
        }
        if !approvers.contains(&by.approvers) {
            return Err(ApprovalError::WrongApprovers);
        }
        let id = entry.id;
        let told = self.becomes(&id, State::Used { by: by.clone(), at: now })?;
        Ok(Approval { id, by, told })
    }

    /// Entries whose time has come.
    pub fn expire(&mut self, now: Timestamp) -> Vec<Told> {
        self.end(now, Why::Expired, |entry| match &entry.state {
            State::Pending => entry.expires <= now,
            State::Granted { until, .. } => *until <= now,
            _ => false,
        })
    }

    /// Ends what somebody asked for who was revoked.
    pub fn cancel_of(&mut self, now: Timestamp, whose: Whose<'_>) -> Vec<Told> {
        self.end(now, Why::Revoked, |entry| whose.asked_for(&entry.call))
    }

    /// Another policy is in force, or the same one with other users behind its names. What was asked under another one ends.
    pub fn policy_changed(
        &mut self,
        now: Timestamp,
        policy: Digest,
        groups: impl IntoIterator<Item = Group>,
    ) -> Vec<Told> {
        self.policy = Some(policy);
        self.groups = groups.into_iter().map(|group| (group.name.clone(), group)).collect();
        self.end(now, Why::PolicyChanged, |entry| entry.call.policy != policy)
    }

    /// Forgets what ended a day ago. Returns what was forgotten.
    pub fn prune(&mut self, now: Timestamp) -> Vec<Id> {
        let over = |entry: &&Entry| entry.ended().is_some_and(|ended| now.duration_since(ended) > KEPT);
        let over: Vec<Id> = self.entries.values().filter(over).map(|entry| entry.id).collect();
        over.iter().for_each(|id| self.forget(id));
        over
    }

    /// Puts an entry back as it was: a change could not be kept.
    pub fn put(&mut self, entry: Entry) {
        let hash = entry.call.hash();
        let newest = self.by_hash.get(&hash).and_then(|id| self.entries.get(id));
        // Of two of one moment, the one that lives came when the other one had ended.
        let rank = |entry: &Entry| (entry.requested, entry.is_live());
        if newest.is_none_or(|newest| rank(newest) <= rank(&entry)) {
            self.by_hash.insert(hash, entry.id);
        }
        self.entries.insert(entry.id, entry);
    }

    /// The same of one that was new.
    pub fn forget(&mut self, id: &Id) {
        if let Some(entry) = self.entries.remove(id)
            && self.by_hash.get(&entry.call.hash()) == Some(id)
        {
            self.by_hash.remove(&entry.call.hash());
        }
    }

    /// In whose name an approver says yes: the first of those that are asked under whose terms he may. If there is none, why not
    /// under the first that names him.
    fn group_of(&self, now: Timestamp, entry: &Entry, approver: &Approver) -> Result<&Group, ApprovalError> {
        let named = |name: &&String| approver.approvers.as_ref().is_none_or(|asked| asked == *name);
        let mut asked = entry.approvers.iter().filter(named).filter_map(|name| self.groups.get(name)).peekable();
        if asked.peek().is_none() {
            return Err(ApprovalError::WrongApprovers);
        }
        let mut why = ApprovalError::NotApprover;
        for group in asked {
            match group.admits(now, entry, approver) {
                Ok(()) => return Ok(group),
                Err(error) if why == ApprovalError::NotApprover => why = error,
                Err(_) => {}
            }
        }
        Err(why)
    }

    fn becomes(&mut self, id: &Id, state: State) -> Result<Told, ApprovalError> {
        let entry = self.entries.get_mut(id).ok_or(ApprovalError::Unknown)?;
        entry.state = state;
        Ok(entry.told())
    }

    fn end(&mut self, now: Timestamp, why: Why, is_over: impl Fn(&Entry) -> bool) -> Vec<Told> {
        let over = self.entries.values_mut().filter(|entry| entry.is_live() && is_over(entry));
        over.map(|entry| {
            let by = match &entry.state {
                State::Granted { by, .. } => Some(by.clone()),
                _ => None,
            };
            entry.state = State::Over { by, at: now, why };
            entry.told()
        })
        .collect()
    }

    /// Room for an entry with so many bytes of arguments: what ended first is forgotten first; what waits never, nor a
    /// no that holds.
    fn make_room(&mut self, now: Timestamp, bytes: usize) -> Result<Vec<Id>, ApprovalError> {
        let size = |entry: &Entry| entry.call.arguments.text().len();
        let fits = |count: usize, total: usize| count < MOST && total + bytes <= MOST_BYTES;
        let holding = || self.entries.values().filter(|entry| entry.holds(now));
        if !fits(holding().count(), holding().map(size).sum()) {
            return Err(ApprovalError::Full);
        }
        let (mut count, mut total) = (self.entries.len(), self.entries.values().map(size).sum::<usize>());
        let over = self.entries.values().filter(|entry| !entry.holds(now));
        let mut ended: Vec<(Timestamp, Id, usize)> =
            over.filter_map(|entry| Some((entry.ended()?, entry.id, size(entry)))).collect();
        ended.sort_unstable();
        let mut forgotten = Vec::new();
        for (_, id, size) in ended {
            if fits(count, total) {
                break;
            }
            count -= 1;
            total -= size;
            forgotten.push(id);
        }
        forgotten.iter().for_each(|id| self.forget(id));
        Ok(forgotten)
    }
}

impl Whose<'_> {
    fn asked_for(self, call: &Call) -> bool {
        let Call { agent: Agent { workload, cgroup, spiffe_id, .. }, delegation, .. } = call;
        let of_delegation = |is_meant: &dyn Fn(Option<&str>, &str) -> bool| {
            delegation.as_ref().is_some_and(|delegation| {
                is_meant(Some(&delegation.issuer), &delegation.subject)
                    || delegation.actors.iter().any(|actor| is_meant(actor.issuer.as_deref(), &actor.subject))
            })
        };
        match self {
            Self::Workload(name) => workload == name,
            Self::Instance(path) => cgroup == path,
            Self::SpiffeId(id) => spiffe_id == id || of_delegation(&|_, subject| subject == id),
            Self::Issuer(named) => of_delegation(&|issuer, _| issuer == Some(named)),
            Self::Subject { issuer: by, subject: named } => {
                of_delegation(&|issuer, subject| issuer == Some(by) && subject == named)
            }
        }
    }
}
