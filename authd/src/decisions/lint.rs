//! What is allowed in action policies and hardly meant.
//!
//! Enters: a model with its policies. Leaves: warnings. Never: errors.

use std::collections::{HashMap, HashSet};

use crate::policy::{
    diagnostic::{Diagnostic, Place},
    file::{Proof, Sensitivity},
    model::{Model, OWN_ISSUER, Rule, StepUp, Subject, Tool},
};

/// Pairs of workload and tool beyond which they are not tried one by one.
const MOST_TRIED: usize = 10_000;

pub fn lint(model: &Model) -> Vec<Diagnostic> {
    let mut warnings = Vec::new();
    let callers = callers(model);
    uncallable(model, callers.as_ref(), &mut warnings);
    unapproved(model, &mut warnings);
    idle(model, &mut warnings);
    never_opened(model, callers.as_ref(), &mut warnings);
    shared_audiences(model, &mut warnings);
    only_subjects(model, &mut warnings);
    unknown_issuers(model, &mut warnings);
    warnings
}

/// Which workloads may call which tool; `None` if that are too many to try.
fn callers(model: &Model) -> Option<HashMap<&str, Vec<usize>>> {
    if model.workloads.len().saturating_mul(model.tools.len()) > MOST_TRIED {
        return None;
    }
    let mut callers: HashMap<&str, Vec<usize>> = HashMap::new();
    for workload in 0..model.workloads.len() {
        for tool in model.actions.may_call(workload) {
            callers.entry(tool).or_default().push(workload);
        }
    }
    Some(callers)
}

/// Tools that nobody can call.
fn uncallable(model: &Model, callers: Option<&HashMap<&str, Vec<usize>>>, warnings: &mut Vec<Diagnostic>) {
    let actions = &model.actions;
    let callable = |tool: &str| match callers {
        Some(callers) => callers.contains_key(tool),
        None => actions.policies_of(tool).any(|policy| policy.permits),
    };
    for tool in model.tools.iter().filter(|tool| !callable(&tool.name)) {
        let forbids = actions.policies_of(&tool.name).find(|policy| !policy.permits && !policy.conditional);
        let warning = Diagnostic::warning(
            "uncallable_tool",
            tool.place.clone(),
            format!("tool `{}` is denied to every workload, whatever the arguments", tool.name),
            format!(
                "write a policy in a `.cedar` file: permit (principal, action == Action::\"{}\", resource);",
                tool.name
            ),
        );
        warnings.push(match forbids {
            Some(forbid) => warning.with_related(&forbid.place, "forbidden here"),
            None => warning,
        });
    }
}

/// Tools of sensitive services that can be called without anybody's approval, under no condition.
fn unapproved(model: &Model, warnings: &mut Vec<Diagnostic>) {
    for tool in &model.tools {
        let service = tool.service.map(|index| &model.services[index]);
        let Some(service) = service.filter(|service| service.sensitivity == Sensitivity::High) else { continue };
        let loose = |policy: &&super::Policy| policy.permits && policy.approval.is_none() && !policy.conditional;
        for policy in model.actions.policies_of(&tool.name).filter(loose) {
            let warning = Diagnostic::warning(
                "unapproved_tool",
                policy.place.clone(),
                format!(
                    "policy `{}` permits every call of tool `{}`, and service `{}` is of high sensitivity",
                    policy.id, tool.name, service.name
                ),
                "add conditions on `context.arguments`, or `@approval(\"...\")`",
            );
            warnings.push(warning.with_related(&service.place, "the service"));
        }
    }
}

/// Approvers that nobody asks, and policies that are about nothing.
fn idle(model: &Model, warnings: &mut Vec<Diagnostic>) {
    let asked: HashSet<usize> =
        model.actions.policies().iter().filter_map(|policy| Some(policy.approval.as_ref()?.0)).collect();
    for (index, approvers) in model.approvers.iter().enumerate() {
        if !asked.contains(&index) {
            warnings.push(Diagnostic::warning(
                "unused",
                approvers.place.clone(),
                format!("no policy asks approvers `{}`", approvers.name),
                format!("remove them, or put `@approval(\"{}\")` before a permit", approvers.name),
            ));
        }
    }
    for rule in model.rules.iter().filter(|rule| rule.permit.is_some()) {
        if !model.tools.iter().any(|tool| tool.permit.as_ref() == Some(&rule.name)) {
            warnings.push(Diagnostic::warning(
                "unused",
                rule.place.clone(),
                format!("nothing opens rule `{}`: it asks for an action, and no tool's `permit` names it", rule.name),
                "name it in a tool's `permit`, or remove it",
            ));
        }
    }
    for policy in model.actions.idle() {
        warnings.push(Diagnostic::warning(
            "idle_policy",
            policy.place.clone(),
            format!("policy `{}` is about no tool: none has this action and this resource", policy.id),
            "a tool's action and resource have its name: name one of them, or both alike",
        ));
    }
}

/// Tools whose rule refuses every call that policies permit.
fn never_opened(model: &Model, callers: Option<&HashMap<&str, Vec<usize>>>, warnings: &mut Vec<Diagnostic>) {
    for tool in &model.tools {
        let Some(rule) = model.rules.iter().find(|rule| tool.permit.as_ref() == Some(&rule.name)) else { continue };
        let callers = callers.and_then(|callers| callers.get(tool.name.as_str()));
        let is_caller = |workload: &usize| rule.from.contains(&Subject::Workload(*workload));
        let (why, help) = if callers.is_some_and(|callers| !callers.iter().any(is_caller)) {
            let why = format!("none of the workloads that may call it is in `from` of rule `{}`", rule.name);
            (why, "add the workload to the rule's `from`, or to what policies permit")
        } else if is_never_approved(model, tool, rule) {
            let why = format!("rule `{}` asks for an approval, and no policy that permits the tool does", rule.name);
            (why, "put `@approval(\"...\")` before the permit, or remove `\"approval\"` from the rule's `require`")
        } else {
            continue;
        };
        let message = format!("no call of tool `{}` opens anything: {why}", tool.name);
        let warning = Diagnostic::warning("never_opens", tool.place.clone(), message, help);
        warnings.push(warning.with_related(&rule.place, "the rule"));
    }
}

/// Whether the rule wants a person's yes, and nobody is ever asked for one.
fn is_never_approved(model: &Model, tool: &Tool, rule: &Rule) -> bool {
    let mut permits = model.actions.policies_of(&tool.name).filter(|policy| policy.permits).peekable();
    rule.require.contains(&Proof::Approval)
        && permits.peek().is_some()
        && permits.all(|policy| policy.approval.is_none())
}

/// Approvers whose tokens are for what other tokens are for as well: one that an agent was given would do for a yes.
fn shared_audiences(model: &Model, warnings: &mut Vec<Diagnostic>) {
    for approvers in &model.approvers {
        let Some(step_up) = &approvers.step_up else { continue };
        if let Some((whose, place)) = also_for(model, step_up) {
            let warning = Diagnostic::warning(
                "shared_audience",
                approvers.place.clone(),
                format!(
                    "tokens for approvers `{}` are for `{}`, as are those {whose}",
                    approvers.name, step_up.audience
                ),
                "choose an `audience` for approvals and for nothing else: agents are given the other tokens",
            );
            warnings.push(warning.with_related(place, "for the same audience"));
        }
    }
}

/// What else has the audience that approvers' tokens are for.
fn also_for<'a>(model: &'a Model, step_up: &StepUp) -> Option<(String, &'a Place)> {
    let is_own = model.issuers.get(step_up.issuer).is_some_and(|issuer| issuer.name == OWN_ISSUER);
    let rule = model.rules.iter().find(|rule| {
        let token = rule.token.as_ref().filter(|token| token.issuer == step_up.issuer);
        token.is_some_and(|token| token.audience.as_ref() == Some(&step_up.audience))
    });
    // What is exchanged has the audience, and what it is exchanged for.
    let delegation = model.delegations.iter().find(|delegation| {
        (is_own || delegation.issuer == step_up.issuer) && delegation.audiences.contains(&step_up.audience)
    });
    let server = model.mcp_servers.iter().find(|server| server.audience.as_ref() == Some(&step_up.audience));
    rule.map(|rule| (format!("that rule `{}` takes", rule.name), &rule.place))
        .or_else(|| delegation.map(|found| (format!("of delegation `{}`", found.name), &found.place)))
        .or_else(|| server.map(|found| (format!("for MCP server `{}`", found.name), &found.place)))
}

/// Approvers among whom is nobody but the one who is acted for: nobody says yes to one's own call.
fn only_subjects(model: &Model, warnings: &mut Vec<Diagnostic>) {
    let asked = |index| {
        let asks = |policy: &super::Policy| policy.approval.as_ref().is_some_and(|(asked, _)| *asked == index);
        model.actions.policies().iter().any(asks)
    };
    for (index, approvers) in model.approvers.iter().enumerate() {
        let Some(step_up) = approvers.step_up.as_ref().filter(|_| !approvers.may_be_subject) else { continue };
        let [only] = &step_up.subjects[..] else { continue };
        let of_only =
            |issuer: usize, subjects: &[String]| issuer == step_up.issuer && subjects.iter().all(|one| one == only);
        let delegation =
            model.delegations.iter().find(|found| !found.subjects.is_empty() && of_only(found.issuer, &found.subjects));
        let Some(delegation) = delegation.filter(|_| asked(index)) else { continue };
        let warning = Diagnostic::warning(
            "approvers_only_subject",
            approvers.place.clone(),
            format!(
                "approvers `{}` cannot say yes to calls by delegation `{}`: `{only}` is all of them, and whom it is for",
                approvers.name, delegation.name
            ),
            "name somebody else in `subjects`, or set `may_be_subject = true` if that is meant",
        );
        warnings.push(warning.with_related(&delegation.place, "the delegation"));
    }
}

/// Policies about subjects of issuers that the policy does not name.
fn unknown_issuers(model: &Model, warnings: &mut Vec<Diagnostic>) {
    for policy in model.actions.policies() {
        let unknown = |named: &&String| !model.issuers.iter().any(|issuer| issuer.name == **named);
        let mut seen = HashSet::new();
        for named in policy.issuers.iter().filter(unknown).filter(|named| seen.insert(*named)) {
            let names = model.issuers.iter().map(|issuer| issuer.name.as_str());
            let help = match model.issuers.iter().find(|issuer| issuer.issuer == *named && !named.is_empty()) {
                Some(issuer) => format!("policies call it by its name: `{}`", issuer.name),
                None => crate::policy::build::similar(named, names, "write the `name` of an `[[issuer]]`"),
            };
            warnings.push(Diagnostic::warning(
                "unknown_issuer_name",
                policy.place.clone(),
                format!(
                    "policy `{}` compares an issuer with `{}`, and none is called that",
                    policy.id,
                    named.escape_default()
                ),
                help,
            ));
        }
    }
}
