//! `authd explain action`

use std::{
    io::{self, Read},
    path::Path,
    process::ExitCode,
};

use anyhow::{Context, anyhow};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{BAD_CONFIG, print_diagnostics, settings};
use crate::{
    cli::ActionQuestion,
    decisions::{ARGUMENTS, Call, Decision, Denial, Outcome, Policy, Subject},
    digest::Digest,
    grants::{
        permits::DEFAULT_TTL as PERMIT_TTL,
        proof::{Binding, Token},
        terms::{self, Claimant, Unmet},
    },
    policy::{
        build::similar,
        compile::is_in_force,
        file::Proof,
        load,
        model::{Actor, Delegation, Model, OWN_ISSUER, Object, Rule, TokenRequirement, Workload},
        pattern::instance_name,
    },
    proofs::json,
};

pub fn run(config: Option<&Path>, question: ActionQuestion) -> anyhow::Result<ExitCode> {
    let directory = match &question.policy {
        Some(directory) => directory.clone(),
        None => match settings(config) {
            Ok(config) => config.policy,
            Err(code) => return Ok(code),
        },
    };
    let policy = load::directory(&directory);
    let Some(model) = policy.model else {
        print_diagnostics(&policy.diagnostics);
        return Ok(ExitCode::from(BAD_CONFIG));
    };
    let explained = explain(&model, &question)?;
    match question.json {
        true => println!("{}", explained.json()),
        false => print!("{}", explained.text()),
    }
    Ok(ExitCode::SUCCESS)
}

/// A decision, with all that it was taken about.
struct Explained<'a> {
    model: &'a Model,
    workload: &'a Workload,
    tool: &'a str,
    spiffe_id: String,
    instance: String,
    now: Timestamp,
    decision: Decision,
    /// Rule on which the call opens a permit.
    opens: Option<&'a Rule>,
    /// Why it is refused all the same: a stable name, and a sentence.
    refused: Option<(&'static str, String)>,
}

fn explain<'a>(model: &'a Model, question: &'a ActionQuestion) -> anyhow::Result<Explained<'a>> {
    let ActionQuestion { from, tool, arguments, subject, scopes, audience, client, actors, instance, at, .. } =
        question;
    let workload = model.workloads.iter().position(|workload| workload.name == *from);
    let workload = workload.ok_or_else(|| {
        let known = model.workloads.iter().map(|workload| workload.name.as_str());
        anyhow!("`{from}` is no workload: {}", similar(from, known, "name a `[[workload]]` of the policy"))
    })?;
    let caller = &model.workloads[workload];
    let instance = instance.clone().unwrap_or_else(|| pattern(caller));
    let path = caller.spiffe_path.replace("{instance}", &instance_name(&instance));
    let spiffe_id = format!("spiffe://{}{path}", model.trust_domain);
    let subject = match subject.as_slice() {
        [issuer, id] => {
            let known = || model.issuers.iter().map(|issuer| issuer.name.as_str());
            if !known().any(|name| name == issuer) {
                let help = similar(issuer, known(), "name an `[[issuer]]` of the policy");
                return Err(anyhow!("`{issuer}` is no issuer: {help}"));
            }
            let (scopes, audience, client) = (scopes.clone(), audience.clone(), client.clone());
            Some(Subject { issuer: issuer.clone(), id: id.clone(), scopes, audience, client })
        }
        _ => None,
    };
    let actors = match actors.as_slice() {
        [] if subject.is_some() => vec![spiffe_id.clone()],
        actors => actors.to_vec(),
    };
    let mut text = arguments.clone();
    if text == "-" {
        text.clear();
        io::stdin().read_to_string(&mut text).context("reading the arguments")?;
    }
    let arguments = json::object(text.as_bytes(), ARGUMENTS).context("reading the arguments")?;
    let now = at.unwrap_or_else(Timestamp::now);
    let decision = model.actions.decide(&Call {
        workload,
        spiffe_id: &spiffe_id,
        instance: &instance,
        tool,
        arguments: &arguments,
        subject: subject.as_ref(),
        actors: &actors,
        now,
    });
    let passes = !matches!(decision.outcome, Outcome::Denied(_));
    let opens = model.tools.iter().find(|known| known.name == *tool && passes).and_then(|tool| tool.permit.as_ref());
    let opens = opens.and_then(|name| model.rules.iter().find(|rule| rule.name == *name));
    let mut explained =
        Explained { model, workload: caller, tool, spiffe_id, instance, now, decision, opens, refused: None };
    if passes {
        explained.refused = explained.refusal(workload, subject.as_ref(), &actors);
    }
    Ok(explained)
}

/// Whether a delegation gives the workload a token of this node's for somebody.
fn is_given(model: &Model, workload: usize, subject: &Subject) -> bool {
    let acts = |delegation: &Delegation| delegation.actors.contains(&Actor::Workload(workload));
    let of = |delegation: &Delegation, name: &str| {
        model.issuers.get(delegation.issuer).is_some_and(|issuer| issuer.name == name)
    };
    let covers = |asked: &[String], given: &[String]| asked.iter().all(|one| given.contains(one));
    let about = |delegation: &&Delegation| {
        of(delegation, &subject.issuer)
            && (delegation.subjects.is_empty() || delegation.subjects.contains(&subject.id))
            && covers(&subject.scopes, &delegation.scopes)
    };
    // From the issuer's token, or from that of another agent that has one.
    let handed_on = model.delegations.iter().any(|delegation| acts(delegation) && of(delegation, OWN_ISSUER));
    model
        .delegations
        .iter()
        .filter(about)
        .any(|delegation| handed_on || (acts(delegation) && covers(&subject.audience, &delegation.audiences)))
}

/// The first pattern, as it is written.
fn pattern(workload: &Workload) -> String {
    let written = workload.patterns.first().and_then(|(_, place)| place.source.text.get(place.span.clone()));
    written.unwrap_or_default().trim_matches(['"', '\'']).to_owned()
}

impl Explained<'_> {
    /// What the daemon refuses for, when action policies do not.
    fn refusal(&self, workload: usize, subject: Option<&Subject>, actors: &[String]) -> Option<(&'static str, String)> {
        if let Some(subject) = subject
            && !is_given(self.model, workload, subject)
        {
            let name = &self.workload.name;
            let message =
                format!("no `[[delegation]]` gives `{name}` such a token for `{}` of `{}`", subject.id, subject.issuer);
            return Some(("exchange_not_allowed", message));
        }
        let rule = self.opens?;
        let refused =
            |unmet: Unmet| (unmet.reason(), format!("rule `{}` at {}: {unmet}", rule.name, rule.place.describe()));
        if !is_in_force(rule, self.now) {
            return Some(refused(Unmet::NotNow));
        }
        if !terms::may_ask(rule, self.model, Claimant::Workload { index: workload, spiffe_id: &self.spiffe_id }) {
            return Some(refused(Unmet::NotTheCaller));
        }
        for proof in &rule.require {
            let missing = match proof {
                Proof::Approval => !matches!(self.decision.outcome, Outcome::Pending(_)),
                Proof::Token => subject.is_none(),
                // What the caller has besides is not known here.
                _ => false,
            };
            if missing {
                return Some(refused(Unmet::Missing(*proof)));
            }
        }
        let (asked, subject) = (rule.token.as_ref()?, subject?);
        terms::check_token(&self.token(asked, subject, actors), asked, self.model).err().map(refused)
    }

    /// The token that would be shown: as this node makes them, for what was asked, or for whom the rule asks.
    fn token(&self, asked: &TokenRequirement, subject: &Subject, actors: &[String]) -> Token {
        let audience = match subject.audience.as_slice() {
            [] => asked.audience.iter().cloned().collect(),
            audience => audience.to_vec(),
        };
        Token {
            issuer: OWN_ISSUER.to_owned(),
            iss: String::new(),
            subject: Some(subject.id.clone()),
            client_id: None,
            audience,
            scopes: subject.scopes.clone(),
            jti: None,
            hash: Digest::of(b""),
            key_id: None,
            bound_to: vec![Binding::Dpop],
            issued_at: None,
            not_after: Timestamp::MAX,
            ends_with: Vec::new(),
            actors: actors.to_vec(),
            subject_issuer: None,
        }
    }

    fn outcome(&self) -> (&'static str, &'static str) {
        match &self.refused {
            Some((reason, _)) => ("denied", reason),
            None => (self.decision.outcome.name(), self.decision.reason()),
        }
    }

    /// What passes on the permit, and for how long.
    fn permit(&self) -> Option<Value> {
        let rule = self.opens.filter(|_| self.refused.is_none())?;
        let limits = rule.permit?;
        let to = rule.to.iter().map(|object| match object {
            Object::Service(index) => self.model.services[*index].name.as_str(),
            Object::Any => "any",
        });
        let shown = |proof: &&Proof| !matches!(proof, Proof::Action | Proof::Approval | Proof::Cgroup);
        Some(json!({
            "rule": rule.name,
            "to": to.collect::<Vec<_>>(),
            "connections": limits.connections,
            "bytes": limits.bytes,
            "seconds": rule.grant_ttl.unwrap_or(PERMIT_TTL).as_secs(),
            "requires": rule.require.iter().filter(shown).map(|proof| proof.name()).collect::<Vec<_>>(),
        }))
    }

    fn deciding(&self) -> impl Iterator<Item = &Policy> {
        self.decision.policies.iter().filter_map(|id| self.model.actions.policy(id))
    }

    /// Policies that could be about the call, and did not decide.
    fn others(&self) -> impl Iterator<Item = &Policy> {
        let decided = |policy: &&Policy| !self.decision.policies.contains(&policy.id);
        self.model.actions.policies_of(self.tool).filter(decided)
    }

    fn approvers(&self) -> impl Iterator<Item = Value> {
        let alternatives = match &self.decision.outcome {
            Outcome::Pending(alternatives) => alternatives.as_slice(),
            _ => &[],
        };
        alternatives.iter().filter_map(|alternative| {
            let approvers = self.model.approvers.get(alternative.approvers)?;
            let step_up = approvers.step_up.as_ref();
            Some(json!({
                "approvers": alternative.name,
                "policy": alternative.policy,
                "users": approvers.users,
                "issuer": step_up.map(|step_up| &self.model.issuers[step_up.issuer].name),
                "audience": step_up.map(|step_up| &step_up.audience),
                "subjects": step_up.map_or(&[][..], |step_up| &step_up.subjects),
            }))
        })
    }

    fn message(&self) -> Option<String> {
        if let Some((_, message)) = &self.refused {
            return Some(message.clone());
        }
        match &self.decision.outcome {
            Outcome::Denied(denial @ (Denial::BadArguments(_) | Denial::PolicyError(_))) => Some(denial.to_string()),
            _ => None,
        }
    }

    fn json(&self) -> Value {
        let told = |policy: &Policy| {
            let (line, column) = policy.place.line_column();
            json!({
                "id": policy.id,
                "effect": effect(policy),
                "approval": policy.approval.as_ref().map(|(_, name)| name),
                "file": &*policy.place.source.name,
                "line": line,
                "column": column,
            })
        };
        let argument = match &self.decision.outcome {
            Outcome::Denied(Denial::BadArguments(error)) => Some(&error.path),
            _ => None,
        };
        json!({
            "from": self.workload.name,
            "spiffe_id": self.spiffe_id,
            "instance": self.instance,
            "tool": self.tool,
            "at": self.now.to_string(),
            "outcome": self.outcome().0,
            "reason": self.outcome().1,
            "message": self.message(),
            "argument": argument,
            "policies": self.deciding().map(told).collect::<Vec<_>>(),
            "approvers": self.approvers().collect::<Vec<_>>(),
            "permit": self.permit(),
            "others": self.others().map(told).collect::<Vec<_>>(),
        })
    }

    fn text(&self) -> String {
        let mut lines = vec![
            format!("{} ({}) calls {} at {}", self.workload.name, self.spiffe_id, self.tool, self.now),
            format!("{} ({})", self.outcome().0, self.outcome().1),
        ];
        lines.extend(self.message());
        let told = |policy: &Policy| {
            let approval = policy.approval.as_ref().map_or(String::new(), |(_, name)| format!(", approved by {name}"));
            format!("  {} {} at {}{approval}", effect(policy), policy.id, policy.place.describe())
        };
        let mut section = |title: &str, told: Vec<String>| {
            if !told.is_empty() {
                lines.push(format!("\n{title}"));
                lines.extend(told);
            }
        };
        section("decided by", self.deciding().map(told).collect());
        let approvers = self.approvers().map(|approvers| {
            let list = |value: &Value| {
                let texts = value.as_array().into_iter().flatten().filter_map(Value::as_str);
                texts.collect::<Vec<_>>().join(", ")
            };
            let name = approvers["approvers"].as_str().unwrap_or_default();
            let users = Some(list(&approvers["users"])).filter(|users| !users.is_empty());
            let token = approvers["issuer"]
                .as_str()
                .map(|issuer| format!("with a token of {issuer}: {}", list(&approvers["subjects"])));
            let who: Vec<String> = users.map(|users| format!("users {users}")).into_iter().chain(token).collect();
            format!("  {name} ({})", who.join("; "))
        });
        section("needs the approval of one of", approvers.collect());
        let permit = self.permit().map(|permit| {
            let names = |name: &str| -> Vec<&str> {
                permit[name].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
            };
            let bytes = permit["bytes"].as_u64().map_or_else(String::new, |bytes| format!(", {bytes} bytes"));
            let plural = if permit["connections"] == 1 { "" } else { "s" };
            let shown = Some(names("requires").join(", ")).filter(|shown| !shown.is_empty());
            let shown = shown.map_or_else(String::new, |shown| format!(", for whoever shows {shown}"));
            format!(
                "  rule {} for {} s: {} connection{plural} to {}{bytes}{shown}",
                permit["rule"].as_str().unwrap_or_default(),
                permit["seconds"],
                permit["connections"],
                names("to").join(", "),
            )
        });
        section("opens", permit.into_iter().collect());
        section("could be about it, and did not decide", self.others().map(told).collect());
        lines.push(String::new());
        lines.join("\n")
    }
}

fn effect(policy: &Policy) -> &'static str {
    if policy.permits { "permit" } else { "forbid" }
}
