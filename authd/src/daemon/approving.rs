//! What operators ask about approvals, and the records that it leaves.
//!
//! Enters: questions of users whom the kernel names; the policy in force. Leaves: answers, when what they say is on disk. Never: a
//! user's word about who he is, and no tokens: who has to show one is refused here.

use std::time::Instant;

use authd_common::tables::UNMANAGED;
use jiff::{SignedDuration, Timestamp};
use nix::unistd::gethostname;

use super::{
    Daemon,
    control::Who,
    granting::{refusal, revoked_reason},
    metrics::Metrics,
    trust::Trust,
    users::{self, Users},
};
use crate::{
    audit::record::{Record, format_time},
    decisions::{
        approvals::{Approvals, Approver, By, Entry, Group, Id, StepUp, TokenFacts, Told},
        asked::{self, Listed, Question, Shown},
        kept::KeptError,
        notify::{Notice, command::Hook},
    },
    digest::Digest,
    grants::proof,
    ipc::{Fresh, Message, Refusal},
    policy::{
        file::Kind,
        model::{Approvers, Model},
    },
    store::{StoreError, revoked::Revoked},
};

impl Daemon {
    /// Answers a user whose number the kernel says.
    pub fn approvals(
        &mut self,
        uid: u32,
        question: Question,
        token: Option<TokenFacts>,
    ) -> Result<asked::Answer, Refusal> {
        self.follow_policy();
        self.expire_approvals();
        let trust = match &mut self.trust {
            Ok(trust) => trust,
            Err(error) => {
                let message = format!("the daemon started without its store, and nothing can be approved: {error}");
                return Err(refusal("store_unusable", message));
            }
        };
        let now = Timestamp::now();
        let answered = match question {
            Question::List => Ok(asked::Answer::Listed { approvals: listed(trust, uid) }),
            Question::Show { id } if !concerns(trust, &id, uid) => Err(unknown(&id)),
            Question::Show { id } => shown(trust, &id).map(asked::Answer::Shown).ok_or_else(|| unknown(&id)),
            Question::Grant { id, approvers, text } => {
                let approver = Approver { approvers, uid, token, text };
                let (kept, store) = trust.approvals();
                let told = kept.grant(store, now, &id, approver);
                self.decided(uid, &id, told, asked::Answer::Granted)
            }
            Question::Deny { id, text } => {
                let approver = Approver { approvers: None, uid, token, text };
                let (kept, store) = trust.approvals();
                let told = kept.deny(store, now, &id, approver);
                self.decided(uid, &id, told, asked::Answer::Denied)
            }
        };
        Ok(answered.unwrap_or_else(|refused| refused))
    }

    /// The same of somebody who is connected to the workloads' socket: a person, and never one who acts for people.
    pub fn approve(&mut self, who: &Who, question: Question, token: Option<Fresh>) -> Result<asked::Answer, Refusal> {
        let token = token.map(|token| self.fresh(token)).transpose()?;
        let uid = match who {
            Who::Admin { uid, cgroup } => {
                self.is_person(cgroup.as_deref())?;
                *uid
            }
            Who::Local(attested) => {
                self.is_person(Some(&attested.cgroup))?;
                attested.uid
            }
            Who::Remote { .. } => return Err(refusal("caller_not_local", "calls are approved on their own node")),
        };
        self.approvals(uid, question, token)
    }

    /// Refuses a process that acts for people. A cgroup that is gone, or not known yet, is nobody's.
    fn is_person(&mut self, cgroup: Option<&str>) -> Result<(), Refusal> {
        self.follow_cgroups().map_err(|error| refusal("unavailable", error))?;
        let (model, registry) = (&self.active.prepared.model, &self.active.prepared.registry);
        let is_person = cgroup.is_some_and(|cgroup| {
            let Some(path) = self.base.below(cgroup) else { return true };
            self.tree.nearest(&path).is_some_and(|entry| {
                let name = registry.workloads.name(entry.workload);
                let workload = model.workloads.iter().find(|workload| Some(workload.name.as_str()) == name);
                entry.workload == UNMANAGED || workload.is_some_and(|workload| workload.kind == Kind::Person)
            })
        });
        if is_person {
            Ok(())
        } else {
            Err(refusal("approval_by_workload", "people approve calls, and workloads do not"))
        }
    }

    /// An approver's token, unless it has ended.
    fn fresh(&self, fresh: Fresh) -> Result<TokenFacts, Refusal> {
        let Fresh { mut token, acr, auth_time } = fresh;
        if token.not_after <= Timestamp::now() {
            return Err(refusal("token_expired", "the token has expired"));
        }
        self.complete(&mut token)?;
        let facts = TokenFacts {
            issuer_name: token.issuer.clone(),
            issuer: token.iss.clone(),
            subject: token.subject.clone().unwrap_or_default(),
            audience: token.audience.clone(),
            acr,
            auth_time,
        };
        let trust = self.trust.as_ref().map_err(|error| refusal("store_unusable", error))?;
        match proof::Shown::Token(Box::new(token))
            .revocable()
            .into_iter()
            .find(|(name, since)| trust.is_revoked(name, *since))
        {
            Some((found, _)) => Err(refusal(revoked_reason(&found), format!("{} was revoked", found.kind()))),
            None => Ok(facts),
        }
    }

    /// Ends what was asked under another policy. Whoever asks or uses an approval comes here first; after the policy in force was
    /// replaced, it ends what nobody asks about.
    pub(super) fn follow_policy(&mut self) {
        let prepared = &self.active.prepared;
        let Ok(trust) = &mut self.trust else { return };
        let policy = prepared.digest;
        let (kept, store) = trust.approvals();
        if kept.approvals().policy() == Some(policy) {
            return;
        }
        self.users = Users::default();
        let now = Instant::now();
        let groups = groups(&prepared.model, |user| self.users.number(user, now, users::look_up));
        let (told, kept) = kept.policy_changed(store, Timestamp::now(), policy, groups);
        self.ended(told, kept);
    }

    /// Of the policy in force, as calls are bound to it.
    pub(super) fn policy_digest(&self) -> Digest {
        self.active.prepared.digest
    }

    pub(super) fn report_approval(&mut self, told: Told) {
        self.metrics.agents.approval(told.event);
        self.report(record(told));
    }

    /// What was counted, with what there is now.
    pub(super) fn seen_now(&self) -> Metrics {
        let mut metrics = self.metrics.clone();
        metrics.agents.hook(self.hook.as_ref().map(Hook::counts).unwrap_or_default());
        metrics.agents.waiting = self.trust.as_ref().map_or(0, |trust| trust.waiting());
        metrics.agents.servers = self.servers.len() as u64;
        metrics
    }

    /// Tells people that a call waits for them.
    pub(super) fn notify_approvers(&mut self, id: &Id) {
        let Ok(trust) = &mut self.trust else { return };
        let Some(entry) = trust.approvals().0.approvals().get(id) else { return };
        let node = gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let body = Notice::new(entry, &node).body();
        if let Some(hook) = &self.hook {
            hook.tell(body.clone());
        }
        if self.config.approvals.webhook.is_some() {
            self.messages.push(Message { id: *id, body: String::from_utf8_lossy(&body).into_owned() });
        }
    }

    /// What the webhook has to be told.
    pub fn take_messages(&mut self) -> Vec<Message> {
        std::mem::take(&mut self.messages)
    }

    /// What is due every second.
    pub(super) fn expire_approvals(&mut self) {
        self.find_users();
        let Ok(trust) = &mut self.trust else { return };
        let (kept, store) = trust.approvals();
        let (told, kept) = kept.expire(store, Timestamp::now());
        self.ended(told, kept);
    }

    /// Looks up users again about whom the system could say nothing: who is found approves from now on.
    fn find_users(&mut self) {
        let now = Instant::now();
        let (Ok(trust), true) = (&mut self.trust, self.users.is_due(now)) else { return };
        let prepared = &self.active.prepared;
        let (kept, store) = trust.approvals();
        if kept.approvals().policy() != Some(prepared.digest) {
            return;
        }
        let failed = self.users.failed();
        let groups = groups(&prepared.model, |user| self.users.number(user, now, users::look_up));
        if self.users.failed() < failed {
            let (told, kept) = kept.policy_changed(store, Timestamp::now(), prepared.digest, groups);
            self.ended(told, kept);
        }
    }

    /// Calls end that wait, or were approved, of whoever was revoked.
    pub(super) fn cancel_approvals(&mut self, what: &Revoked) {
        let Ok(trust) = &mut self.trust else { return };
        let (kept, store) = trust.approvals();
        let (told, kept) = kept.revoked(store, Timestamp::now(), what);
        self.ended(told, kept);
    }

    /// Records of what ended, which has ended even if the store does not know it.
    fn ended(&mut self, told: Vec<Told>, kept: Result<(), StoreError>) {
        if let Err(error) = kept {
            tracing::error!(%error, "approvals that ended would come back with a restart");
        }
        for told in told {
            self.report_approval(told);
        }
    }

    fn decided(
        &mut self,
        uid: u32,
        id: &Id,
        told: Result<Told, KeptError>,
        answer: fn(Box<Shown>) -> asked::Answer,
    ) -> Result<asked::Answer, asked::Answer> {
        let Ok(trust) = &mut self.trust else { return Err(unknown(id)) };
        match told {
            Ok(told) => {
                let shown = shown(trust, id).ok_or_else(|| unknown(id));
                self.report_approval(told);
                shown.map(answer)
            }
            Err(error) => {
                let entry = trust.approvals().0.approvals().get(id);
                let told = match (&error, entry) {
                    (KeptError::Approval(error), Some(entry)) => Some(entry.told_refused(uid, error)),
                    _ => None,
                };
                if let Some(told) = told {
                    self.report_approval(told);
                }
                Err(refused(&error))
            }
        }
    }
}

/// Root sees all of them, everybody else what they may decide.
fn listed(trust: &mut Trust, uid: u32) -> Vec<Listed> {
    let approvals = trust.approvals().0.approvals();
    approvals.list().into_iter().filter(|entry| is_concerned(approvals, entry, uid)).map(Listed::new).collect()
}

fn concerns(trust: &mut Trust, id: &Id, uid: u32) -> bool {
    let approvals = trust.approvals().0.approvals();
    approvals.get(id).is_some_and(|entry| is_concerned(approvals, entry, uid))
}

fn is_concerned(approvals: &Approvals, entry: &Entry, uid: u32) -> bool {
    let mut groups = entry.approvers.iter().filter_map(|name| approvals.group(name));
    uid == 0 || groups.any(|group| group.users.contains_key(&uid))
}

fn shown(trust: &mut Trust, id: &Id) -> Option<Box<Shown>> {
    let approvals = trust.approvals().0.approvals();
    approvals.get(id).map(|entry| Box::new(Shown::new(entry, approvals)))
}

fn refused(error: &KeptError) -> asked::Answer {
    asked::Answer::Refused { reason: error.reason().to_owned(), message: error.to_string() }
}

fn unknown(id: &Id) -> asked::Answer {
    let message = format!("there is no approval {id}: see `authd approve list`");
    asked::Answer::Refused { reason: "approval_unknown".to_owned(), message }
}

/// The policy's approvers, with this node's users in the place of their names.
fn groups(model: &Model, mut uid_of: impl FnMut(&str) -> Option<u32>) -> Vec<Group> {
    let issuer = |index: usize| model.issuers.get(index).map(|issuer| issuer.name.clone()).unwrap_or_default();
    let mut group = |approvers: &Approvers| {
        let Approvers { name, users, step_up, ttl, valid, may_be_subject, place: _ } = approvers;
        let known = users.iter().filter_map(|user| Some((uid_of(user)?, user.clone())));
        Group {
            name: name.clone(),
            users: known.collect(),
            step_up: step_up.as_ref().map(|step_up| StepUp {
                issuer: issuer(step_up.issuer),
                audience: step_up.audience.clone(),
                subjects: step_up.subjects.clone(),
                acr: step_up.acr.clone(),
                max_age: step_up.max_age.map(signed),
            }),
            ttl: signed(*ttl),
            valid: signed(*valid),
            may_be_subject: *may_be_subject,
        }
    };
    model.approvers.iter().map(&mut group).collect()
}

fn signed(duration: std::time::Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

fn record(told: Told) -> Record {
    let Told { event, id, hash, tool, agent, delegation, policies, approvers, by, uid, reason, until } = told;
    let of = match delegation {
        Some(delegation) => format!(" for {} of {}", delegation.subject, delegation.issuer),
        None => String::new(),
    };
    let decided = match by {
        Some(By { approvers, user, token, text, .. }) => {
            let shown = token.map(|token| format!(", as {} of {}", token.subject, token.issuer)).unwrap_or_default();
            format!("; decided by {user} ({approvers}){shown}: {text}")
        }
        None => String::new(),
    };
    let (policies, approvers) = (policies.join(", "), approvers.join(", "));
    let message = format!("{id}: `{tool}`{of}, call {hash}, policies {policies}, approvers {approvers}{decided}");
    let mut record = Record::about(event, message);
    record.workload = Some(agent.workload);
    record.spiffe_id = Some(agent.spiffe_id);
    record.cgroup = Some(agent.cgroup);
    record.uid = uid;
    record.reason = reason.map(str::to_owned);
    record.until = until.map(format_time);
    record
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        daemon::admin::{Answer, Request},
        decisions::approvals::{
            ApprovalError,
            tests::{entry, id, later},
        },
        policy::{diagnostic::Place, model},
    };

    #[test]
    fn names_become_users_and_unknown_ones_nobody() {
        let step_up = model::StepUp {
            issuer: 7,
            audience: "approvals".to_owned(),
            subjects: vec!["alice".to_owned()],
            acr: vec!["phr".to_owned()],
            max_age: Some(Duration::from_secs(300)),
        };
        let approvers = Approvers {
            name: "leads".to_owned(),
            users: ["root", "1001", "no-such-user", "-1", "+5", "", "99999999999"].map(str::to_owned).to_vec(),
            step_up: Some(step_up),
            ttl: Duration::from_secs(900),
            valid: Duration::from_secs(300),
            may_be_subject: true,
            place: Place::nowhere(),
        };
        let model = Model { approvers: vec![approvers], ..Model::default() };
        let (mut known, now) = (Users::default(), Instant::now());
        let [group] = &groups(&model, |user| known.number(user, now, users::look_up))[..] else { panic!() };
        let users: Vec<(u32, &str)> = group.users.iter().map(|(uid, name)| (*uid, name.as_str())).collect();
        assert_eq!(users, [(0, "root"), (1001, "1001")]);
        // An issuer that is not there is one that no token is of.
        let step_up = group.step_up.as_ref().unwrap();
        assert_eq!((step_up.issuer.as_str(), step_up.max_age), ("", Some(SignedDuration::from_mins(5))));
        assert_eq!(
            (group.ttl, group.valid, group.may_be_subject),
            (signed(Duration::from_secs(900)), signed(Duration::from_secs(300)), true)
        );
    }

    #[test]
    fn records_say_who_asked_for_whom_and_who_decided() {
        let asked = record(entry(1).told());
        assert_eq!(
            (asked.event.as_str(), asked.uid, asked.workload.as_deref()),
            ("approval_requested", Some(2001), Some("support"))
        );
        assert_eq!(asked.until, Some(format_time(later(900))));
        let message = asked.message.unwrap();
        for part in [
            "000000000001",
            "`refund`",
            "carol of https://idp.example.org",
            "large-refunds",
            "leads",
            &entry(1).call.hash().to_string(),
        ] {
            assert!(message.contains(part), "{part} in {message}");
        }
        let refused = record(entry(1).told_refused(1002, &ApprovalError::NotApprover));
        assert_eq!(
            (refused.event.as_str(), refused.uid, refused.reason.as_deref()),
            ("approval_refused", Some(1002), Some("approval_not_approver"))
        );
    }

    #[test]
    fn questions_travel_on_the_operators_socket() {
        let request = Request::Approvals(Question::Deny { id: id(1), text: "no".to_owned() });
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(text, r#"{"command":"approvals","approve":"deny","id":"000000000001","text":"no"}"#);
        assert!(matches!(serde_json::from_str(&text), Ok(Request::Approvals(Question::Deny { .. }))));
        let answer = Answer::Approvals(asked::Answer::Listed { approvals: vec![Listed::new(&entry(1))] });
        let text = serde_json::to_string(&answer).unwrap();
        assert!(
            matches!(serde_json::from_str(&text), Ok(Answer::Approvals(asked::Answer::Listed { approvals })) if approvals.len() == 1)
        );
    }
}
