//! Calls of tools: what the action policy decided about them, looked at again; approvals that they need; permits that they open.
//!
//! Enters: who calls, as this process found out; the call, and what control says of it. Leaves: a permit in the kernel, or none; an
//! approval that is used up, or asked for; a record. Never: a permit that the policy in force does not let this caller have, or one
//! for a call that a person has to approve and did not.

use authd_common::{
    event::{Event, kind},
    tables::GrantKey,
};
use jiff::{SignedDuration, Timestamp};

use super::{
    Daemon,
    callers::{Known, Owned, holder_names},
    clock,
    control::Who,
    granting::{refusal, revoked_reason, rule_named, verified_by_control},
};
use crate::{
    audit::record::Record,
    decisions::{
        self, Outcome, Subject,
        call::{Actor, Agent, Call, Delegation},
        kept::{KeptError, Wanted},
    },
    grants::{
        Given, Holder, Id, permits,
        proof::{Acted as Called, Approved, Shown},
        terms,
    },
    ipc::{Act, ActOutcome, Acted, Denied, Granted, Refusal},
    policy::{file::Proof, model::Tool},
};

/// How calls through the MCP gateway end.
const OUTCOMES: [&str; 7] = ["answered", "answered_error", "denied", "unapproved", "cancelled", "failed", "left"];

/// What the action policy says of a call.
enum Ruling {
    Allowed,
    /// If one of these approves it.
    Pending {
        approvers: Vec<String>,
    },
    Denied {
        reason: String,
        message: String,
    },
}

impl Daemon {
    /// Says what becomes of a call. Whatever it is, it is on record.
    pub fn act(&mut self, who: &Who, act: Act) -> Result<Acted, Refusal> {
        self.follow_policy();
        let known = self.known(who)?;
        let (Owned::Workload { index, spiffe_id }, Holder::Workload { name, cgroup, instance }) =
            (&known.claimant, &known.holder)
        else {
            return Err(refusal("caller_not_local", "workloads ask on their own node's socket"));
        };
        let index = *index;
        let Act { tool, arguments, denied, proofs } = act;
        let agent =
            Agent { workload: name.clone(), cgroup: cgroup.clone(), instance: *instance, spiffe_id: spiffe_id.clone() };
        let mut proofs = verified_by_control(&proofs);
        let completed = self.complete_all(&mut proofs, Some(spiffe_id)).and_then(|()| self.only_own(&proofs));
        let call = Call { tool, arguments, agent, delegation: delegation(&proofs), policy: self.policy_digest() };
        let hash = call.hash();
        let ruled = match denied {
            Some(Denied { reason, message, policies }) => Ok((Ruling::Denied { reason, message }, policies)),
            // What control decided is not asked: nobody is let do anything by its word.
            None => completed.and_then(|()| self.ruling(index, &call, &proofs)),
        };
        let policies = ruled.as_ref().map_or_else(|_| Vec::new(), |(_, policies)| policies.clone());
        let called = Called { tool: call.tool.clone(), call: hash, policies: policies.clone() };
        proofs.push(Shown::Action(Box::new(called)));
        let outcome = ruled.and_then(|(ruling, _)| self.carry_out(who, &known, call, ruling, &mut proofs));
        let outcome = outcome.unwrap_or_else(|refusal| ActOutcome::Denied { refusal });
        self.report_act(who, &outcome, &proofs);
        Ok(Acted { call: hash, policies, outcome })
    }

    /// What the action policy in force says.
    fn ruling(&self, workload: usize, call: &Call, proofs: &[Shown]) -> Result<(Ruling, Vec<String>), Refusal> {
        let model = &self.active.prepared.model;
        let token = proofs.iter().find_map(|shown| match shown {
            Shown::Token(token) => Some(token),
            _ => None,
        });
        let subject = token.map(|token| Subject::of(token, model)).transpose();
        let subject = subject.map_err(|error| refusal(error.reason(), error))?;
        let decision = model.actions.decide(&decisions::Call {
            workload,
            spiffe_id: &call.agent.spiffe_id,
            instance: &call.agent.cgroup,
            tool: &call.tool,
            arguments: call.arguments.map(),
            subject: subject.as_ref(),
            actors: token.map_or(&[], |token| &token.actors),
            now: Timestamp::now(),
        });
        let ruling = match decision.outcome {
            Outcome::Allowed => Ruling::Allowed,
            Outcome::Pending(alternatives) => {
                let mut approvers: Vec<String> = alternatives.into_iter().map(|way| way.name).collect();
                approvers.dedup();
                Ruling::Pending { approvers }
            }
            Outcome::Denied(denial) => {
                Ruling::Denied { reason: denial.reason().to_owned(), message: denial.to_string() }
            }
        };
        Ok((ruling, decision.policies))
    }

    fn carry_out(
        &mut self,
        who: &Who,
        known: &Known,
        call: Call,
        ruling: Ruling,
        proofs: &mut Vec<Shown>,
    ) -> Result<ActOutcome, Refusal> {
        let now = Timestamp::now();
        let model = &self.active.prepared.model;
        let tool = model.tools.iter().find(|tool| tool.name == call.tool);
        let tool = tool.ok_or_else(|| refusal("action_unknown_tool", "the policy has no such tool"))?.clone();
        let trust = self.trust.as_ref().map_err(|error| refusal("store_unusable", error))?;
        let held = holder_names(&known.holder, &[], model).into_iter().map(|name| (name, Some(now)));
        let mut names = proofs.iter().flat_map(Shown::revocable).chain(held);
        if let Some((found, _)) = names.find(|(name, since)| trust.is_revoked(name, *since)) {
            return Err(refusal(revoked_reason(&found), format!("{} was revoked", found.kind())));
        }
        let approvers = match ruling {
            Ruling::Denied { reason, message } => return Err(Refusal { reason, message }),
            Ruling::Allowed => None,
            Ruling::Pending { approvers } => Some(approvers),
        };
        let mut approval = None;
        if let Some(approvers) = approvers {
            // Nobody is asked, and no yes is used up, for a call that would then fail for another reason.
            self.may_open(known, &tool, proofs, now)?;
            match self.approved(who, call, &approvers, proofs)? {
                Ok(approved) => {
                    approval = Some(approved.id);
                    proofs.push(Shown::Approval(Box::new(approved)));
                }
                Err(pending) => return Ok(pending),
            }
        }
        let permit = self.permit(known, &tool, proofs, now)?;
        Ok(ActOutcome::Allowed { approval, permit })
    }

    /// A call went through the MCP gateway: how it ended. Names are those of the policy, or are not told.
    pub fn called(&mut self, who: &Who, server: &str, tool: Option<String>, outcome: String, microseconds: u64) {
        let model = &self.active.prepared.model;
        let is_server = model.mcp_servers.iter().any(|known| known.name == server);
        let tool = tool.filter(|tool| model.tools.iter().any(|known| known.name == *tool));
        let known = OUTCOMES.into_iter().find(|known| **known == outcome).unwrap_or("failed");
        self.metrics.agents.called(known);
        let mut record = Record::event("mcp_call_ended");
        record.reason = Some(known.to_owned());
        record.duration_ns = Some(microseconds.saturating_mul(1_000));
        let tool = tool.as_deref().unwrap_or("a tool that the policy does not name");
        record.message = Some(format!("{tool} of {}", if is_server { server } else { "a server before" }));
        self.describe(who, &mut record);
        self.report(record);
    }

    /// Uses up the yes that somebody gave, or asks for one.
    fn approved(
        &mut self,
        who: &Who,
        call: Call,
        approvers: &[String],
        proofs: &[Shown],
    ) -> Result<Result<Approved, ActOutcome>, Refusal> {
        let now = Timestamp::now();
        let uid = match who {
            Who::Local(attested) => attested.uid,
            Who::Remote { .. } | Who::Admin { .. } => return Err(refusal("caller_not_local", "nobody else asks")),
        };
        let policies = proofs.iter().find_map(|shown| match shown {
            Shown::Action(called) => Some(called.policies.clone()),
            _ => None,
        });
        let trust = self.trust.as_mut().map_err(|error| refusal("store_unusable", error))?;
        let (kept, store) = trust.approvals();
        let hash = call.hash();
        let refused = |error: KeptError| refusal(error.reason(), error);
        match kept.use_up(store, now, &hash, approvers) {
            Ok(approval) => {
                let approved = Approved { id: approval.id, call: hash, by: approval.by };
                self.report_approval(approval.told);
                return Ok(Ok(approved));
            }
            // Nobody was asked about this call, or what came of it is over: somebody is asked now.
            Err(KeptError::Approval(_)) => {}
            Err(error) => return Err(refused(error)),
        }
        let wanted = Wanted { call, uid, approvers: approvers.to_vec(), policies: policies.unwrap_or_default() };
        let requested = kept.request(store, now, wanted).map_err(refused)?;
        let pending = ActOutcome::Pending { approval: requested.id, until: requested.until };
        if let Some(told) = requested.told {
            self.report_approval(told);
            self.notify_approvers(&requested.id);
        }
        Ok(Err(pending))
    }

    /// Refuses a call whose rule asks for more than was shown, a person's yes aside, or for which there is no room.
    fn may_open(&self, known: &Known, tool: &Tool, proofs: &[Shown], now: Timestamp) -> Result<(), Refusal> {
        let Some(name) = &tool.permit else { return Ok(()) };
        let model = &self.active.prepared.model;
        let mut rule = rule_named(model, name)?.clone();
        rule.require.retain(|proof| *proof != Proof::Approval);
        terms::check(&rule, model, known.claimant.borrow(), proofs, now)
            .map_err(|unmet| refusal(unmet.reason(), unmet))?;
        let key = self.permit_key(known, name)?;
        self.ledger.grants.has_room(clock::monotonic(), &key).map_err(|error| refusal(error.reason(), error))
    }

    /// Whose the permit of a rule is.
    fn permit_key(&self, known: &Known, rule: &str) -> Result<GrantKey, Refusal> {
        let number = self.active.prepared.registry.rules.number(rule);
        let rule = number.ok_or_else(|| refusal("rule_unknown", "the rule has no number"))?;
        Ok(GrantKey { rule, workload: known.workload, scope: known.scope, address: known.address })
    }

    /// What the tool's rule lets pass for this call, if it has one.
    fn permit(
        &mut self,
        known: &Known,
        tool: &Tool,
        proofs: &[Shown],
        now: Timestamp,
    ) -> Result<Option<Granted>, Refusal> {
        let Some(name) = &tool.permit else { return Ok(None) };
        let model = &self.active.prepared.model;
        let rule = rule_named(model, name)?;
        let limits = rule.permit.ok_or_else(|| refusal("rule_not_grantable", "the tool's rule opens to no action"))?;
        let limit = terms::check(rule, model, known.claimant.borrow(), proofs, now)
            .map_err(|unmet| refusal(unmet.reason(), unmet))?;
        let ttl = rule.grant_ttl.unwrap_or(permits::DEFAULT_TTL);
        let until = SignedDuration::try_from(ttl).ok().and_then(|ttl| now.checked_add(ttl).ok()).unwrap_or(limit);
        let given = Given {
            id: Id::random().map_err(|error| refusal("unavailable", error))?,
            rule: rule.name.clone(),
            holder: known.holder.clone(),
            proofs: proofs.to_vec(),
            terms: terms::digest(rule, model),
            issued: now,
            until: until.min(limit),
            permit: Some(limits),
        };
        let key = self.permit_key(known, name)?;
        let until = clock::on_monotonic(given.until);
        self.enter(given, key, until).map(Some)
    }

    /// A flow began, or ended, on a permit: new ones take the next one, or this one again, and one that is used up ends
    /// with its last flow.
    pub(super) fn permit_told(&mut self, event: &Event) {
        if !event.grant.is_permit() {
            return;
        }
        let Some(live) = self.ledger.grants.at(event.grant) else { return };
        let id = live.given.id;
        let Some(permit) = self.writer.permit(event.grant) else { return };
        let is_used_up = permits::is_used_up(permit);
        let grants = &mut self.ledger.grants;
        let commands = if is_used_up { grants.use_up(&id) } else { grants.give_back(&id) };
        if let Err(error) = self.writer.follow(&commands) {
            tracing::error!(%error, "the index of grants");
        }
        if event.kind == kind::CLOSED && permits::is_over(permit, self.ledger.grants.ended_on(&id)) {
            self.end_grants(&[id], "permit_used", None);
        }
    }

    fn report_act(&mut self, who: &Who, outcome: &ActOutcome, proofs: &[Shown]) {
        let mut record = Record::event("action_decided");
        record.proofs = proofs.iter().map(Shown::told).collect();
        let (verdict, reason) = match outcome {
            ActOutcome::Allowed { permit, .. } => {
                record.grant = permit.as_ref().map(|permit| permit.id.to_string());
                record.rule = permit.as_ref().map(|permit| permit.rule.clone());
                record.until = permit.as_ref().map(|permit| permit.until.to_string());
                ("allowed", "action_permitted")
            }
            ActOutcome::Pending { until, .. } => {
                record.until = Some(until.to_string());
                ("pending", "action_needs_approval")
            }
            ActOutcome::Denied { refusal } => ("denied", refusal.reason.as_str()),
        };
        record.verdict = Some(verdict.to_owned());
        record.reason = Some(reason.to_owned());
        for shown in proofs {
            if let Shown::Action(called) = shown {
                self.metrics.agents.decided(&called.tool, &self.active.prepared.model, verdict);
            }
        }
        self.describe(who, &mut record);
        self.report(record);
    }
}

/// For whom the caller acts: whom its token is about, and whoever acts by it.
fn delegation(proofs: &[Shown]) -> Option<Delegation> {
    proofs.iter().find_map(|shown| match shown {
        Shown::Token(token) => Some(Delegation {
            issuer: token.subject_issuer.clone().unwrap_or_else(|| token.iss.clone()),
            subject: token.subject.clone().unwrap_or_default(),
            actors: token.actors.iter().map(|subject| Actor { issuer: None, subject: subject.clone() }).collect(),
        }),
        _ => None,
    })
}
