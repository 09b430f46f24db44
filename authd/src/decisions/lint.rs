//! What is allowed in action policies and hardly meant.
//!
//! Enters: a model with its policies. Leaves: warnings. Never: errors.

use std::collections::HashSet;

use crate::policy::{diagnostic::Diagnostic, file::Sensitivity, model::Model};

/// Pairs of workload and tool beyond which they are not tried one by one.
const MOST_TRIED: usize = 10_000;

pub fn lint(model: &Model) -> Vec<Diagnostic> {
    let mut warnings = Vec::new();
    uncallable(model, &mut warnings);
    unapproved(model, &mut warnings);
    idle(model, &mut warnings);
    warnings
}

/// Tools that nobody can call.
fn uncallable(model: &Model, warnings: &mut Vec<Diagnostic>) {
    let actions = &model.actions;
    let few = model.workloads.len().saturating_mul(model.tools.len()) <= MOST_TRIED;
    let callable: HashSet<&str> = if few {
        (0..model.workloads.len()).flat_map(|workload| actions.may_call(workload)).collect()
    } else {
        let permitted = |tool: &&str| actions.policies_of(tool).any(|policy| policy.permits);
        model.tools.iter().map(|tool| tool.name.as_str()).filter(permitted).collect()
    };
    for tool in model.tools.iter().filter(|tool| !callable.contains(tool.name.as_str())) {
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
