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
    policy::{
        build::similar,
        load,
        model::{Model, Workload},
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
    Ok(Explained { model, workload: caller, tool, spiffe_id, instance, now, decision })
}

/// The first pattern, as it is written.
fn pattern(workload: &Workload) -> String {
    let written = workload.patterns.first().and_then(|(_, place)| place.source.text.get(place.span.clone()));
    written.unwrap_or_default().trim_matches(['"', '\'']).to_owned()
}

impl Explained<'_> {
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
            "outcome": self.decision.outcome.name(),
            "reason": self.decision.reason(),
            "message": self.message(),
            "argument": argument,
            "policies": self.deciding().map(told).collect::<Vec<_>>(),
            "approvers": self.approvers().collect::<Vec<_>>(),
            "others": self.others().map(told).collect::<Vec<_>>(),
        })
    }

    fn text(&self) -> String {
        let mut lines = vec![
            format!("{} ({}) calls {} at {}", self.workload.name, self.spiffe_id, self.tool, self.now),
            format!("{} ({})", self.decision.outcome.name(), self.decision.reason()),
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
        section("could be about it, and did not decide", self.others().map(told).collect());
        lines.push(String::new());
        lines.join("\n")
    }
}

fn effect(policy: &Policy) -> &'static str {
    if policy.permits { "permit" } else { "forbid" }
}
