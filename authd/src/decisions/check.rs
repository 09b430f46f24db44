//! What is wrong with action policies, as far as the model and Cedar's validator know.
//!
//! Enters: the model and single policies. Leaves: what decides, or diagnostics. Never: policies of which one is wrong.

use std::collections::HashMap;

use cedar_policy::{PolicyId, PolicySet, Schema, ValidationError, ValidationMode, ValidationWarning, Validator};

use super::{
    Actions,
    policies::{Written, help, label, without_comments},
    scan::scan,
    schema,
};
use crate::policy::{
    build::similar,
    diagnostic::{Diagnostic, Place, Source},
    model::Model,
};

/// `None` only with an error.
pub fn load(model: &Model, written: Vec<Written>) -> (Option<Actions>, Vec<Diagnostic>) {
    if model.tools.is_empty() && written.is_empty() {
        return (Some(Actions::default()), Vec::new());
    }
    let mut checker = Checker { model, diagnostics: Vec::new() };
    checker.validate(&written);
    for policy in &written {
        checker.names(policy);
        checker.approval(policy);
    }
    let mut diagnostics = checker.diagnostics;
    if diagnostics.iter().any(Diagnostic::is_error) {
        return (None, diagnostics);
    }
    match Actions::new(model, written) {
        Ok(actions) => (Some(actions), diagnostics),
        Err(error) => {
            diagnostics.push(Diagnostic::general("action_entities", error.to_string(), "report it, with the policy"));
            (None, diagnostics)
        }
    }
}

struct Checker<'a> {
    model: &'a Model,
    diagnostics: Vec<Diagnostic>,
}

impl Checker<'_> {
    /// Strictly: what passes fails on no call, but by overflow and depth.
    fn validate(&mut self, written: &[Written]) {
        let text = schema::generate(self.model);
        let schema = match Schema::from_cedarschema_str(&text) {
            Ok((schema, _)) => schema,
            Err(error) => {
                let message = format!("the schema of the tools: {error}");
                self.diagnostics.push(Diagnostic::general("action_schema", message, "report it, with the policy"));
                return;
            }
        };
        let set = match PolicySet::from_policies(written.iter().map(|written| written.policy.clone())) {
            Ok(set) => set,
            Err(error) => {
                let message = error.to_string();
                self.diagnostics.push(Diagnostic::general("action_policies", message, "report it, with the policy"));
                return;
            }
        };
        let result = Validator::new(schema).validate(&set, ValidationMode::Strict);
        let places: HashMap<&str, &Place> = written.iter().map(|policy| (policy.id.as_str(), &policy.place)).collect();
        let mut findings = Vec::new();
        for error in result.validation_errors() {
            let (code, remedy) = of_error(error);
            findings.push(finding(error.policy_id(), error, code, remedy, &places, Diagnostic::error));
        }
        for warning in result.validation_warnings() {
            let (code, remedy) = of_warning(warning);
            findings.push(finding(warning.policy_id(), warning, code, remedy, &places, Diagnostic::warning));
        }
        let at =
            |finding: &Diagnostic| finding.place.as_ref().map(|place| (place.source.name.clone(), place.span.start));
        findings.sort_by_key(|finding| (at(finding), finding.message.clone()));
        // A policy is checked once for each action; the same fault is found each time. One warning of a kind is enough.
        findings.dedup_by(|a, b| at(a) == at(b) && a.code == b.code && (a.message == b.message || !a.is_error()));
        self.diagnostics.extend(findings);
    }

    /// Everything that is named exists. Actions are in the schema, and so are kinds and sensitivities.
    fn names(&mut self, written: &Written) {
        let mut seen = Vec::new();
        for uid in written.policy.entity_literals() {
            let kind = uid.type_name().to_string();
            let name = uid.id().unescaped();
            let known: Vec<&str> = match kind.as_str() {
                "Workload" => self.model.workloads.iter().map(|workload| workload.name.as_str()).collect(),
                "Service" => self.model.services.iter().map(|service| service.name.as_str()).collect(),
                "McpServer" => self.model.mcp_servers.iter().map(|server| server.name.as_str()).collect(),
                "Tool" => self.model.tools.iter().map(|tool| tool.name.as_str()).collect(),
                "Tenant" => {
                    let of_workloads = self.model.workloads.iter().filter_map(|workload| workload.tenant.as_deref());
                    of_workloads.chain(self.model.services.iter().filter_map(|s| s.tenant.as_deref())).collect()
                }
                _ => continue,
            };
            if known.contains(&name) || seen.contains(&uid) {
                continue;
            }
            let (code, what, table) = match kind.as_str() {
                "Workload" => ("unknown_workload", "workload", "[[workload]]"),
                "Service" => ("unknown_service", "service", "[[service]]"),
                "McpServer" => ("unknown_mcp_server", "MCP server", "[[mcp_server]]"),
                "Tool" => ("unknown_tool", "tool", "[[tool]]"),
                _ => ("unknown_tenant", "tenant", "[[workload]]` or `[[service]]"),
            };
            let message = match kind.as_str() {
                "Tenant" => format!("nothing has the tenant `{}`", name.escape_default()),
                _ => format!("no {what} is called `{}`", name.escape_default()),
            };
            let otherwise = match kind.as_str() {
                "Tenant" => format!("set `tenant` of a `{table}`"),
                _ => format!("define it as a `{table}`"),
            };
            let help = similar(name, known.into_iter(), &otherwise);
            self.diagnostics.push(Diagnostic::error(
                code,
                name_in(&written.place, &kind, &uid.to_string()),
                message,
                help,
            ));
            seen.push(uid);
        }
        for uid in scan(&written.policy).into.iter().filter(|uid| uid.type_name().to_string() == "Workload") {
            self.diagnostics.push(Diagnostic::error(
                "foreign_attributes",
                name_in(&written.place, "Workload", &uid.to_string()),
                "of a workload that does not call, nothing is known but its name",
                "compare it with `principal`, and write `principal` where you ask for attributes",
            ));
        }
    }

    fn approval(&mut self, written: &Written) {
        let Some(approval) = &written.approval else { return };
        let at = written.annotation("approval");
        if !written.permits() {
            let message = "a `forbid` cannot be approved";
            let help = "remove `@approval`: what somebody may approve is permitted with it";
            self.diagnostics.push(Diagnostic::error("approval_of_forbid", at.clone(), message, help));
        }
        if !self.model.approvers.iter().any(|approvers| approvers.name == *approval) {
            let known = self.model.approvers.iter().map(|approvers| approvers.name.as_str());
            let help = similar(approval, known, "define them as `[[approvers]]`");
            let message = format!("no approvers are called `{}`", approval.escape_default());
            self.diagnostics.push(Diagnostic::error("unknown_approvers", at, message, help));
        }
    }
}

fn finding(
    id: &PolicyId,
    error: &(impl miette::Diagnostic + std::fmt::Display),
    code: &'static str,
    remedy: &str,
    places: &HashMap<&str, &Place>,
    made: impl Fn(&'static str, Place, String, String) -> Diagnostic,
) -> Diagnostic {
    let id: &str = id.as_ref();
    let Some(policy) = places.get(id) else {
        return Diagnostic::general(code, error.to_string(), remedy);
    };
    let text = error.to_string();
    let prefix = format!("for policy `{id}`");
    let message = text.strip_prefix(&prefix).map_or(text.as_str(), |rest| rest.trim_start_matches([',', ':', ' ']));
    let (span, label) = label(error);
    let label = label.map_or(String::new(), |label| format!(": {label}"));
    // What has no place of its own is about the whole.
    let span = if span.is_empty() { policy.span.clone() } else { span };
    let source: Source = policy.source.clone();
    // Cedar would have one test for tags that nothing has.
    let help = help(error).filter(|_| code != "no_tags").unwrap_or_else(|| remedy.to_owned());
    made(code, Place { source, span }, format!("{message}{label}"), help)
}

fn of_error(error: &ValidationError) -> (&'static str, &'static str) {
    match error {
        ValidationError::UnrecognizedEntityType(_) => {
            ("unknown_entity_type", "use Workload, Kind, Tenant, Service, McpServer, Tool or Sensitivity")
        }
        ValidationError::UnrecognizedActionId(_) => ("unknown_action", "define it as a `[[tool]]`"),
        ValidationError::UnexpectedType(_) | ValidationError::IncompatibleTypes(_) => {
            ("wrong_type", "compare values of one type: `authd schema cedar` shows them")
        }
        ValidationError::UnsafeAttributeAccess(_) => {
            ("unknown_attribute", "`authd schema cedar --policy DIRECTORY` shows what there is for each action")
        }
        ValidationError::UnsafeOptionalAttributeAccess(_) => {
            ("unguarded_attribute", "it may not be there: ask with `has` first, or fall back on a deny")
        }
        ValidationError::UnsafeTagAccess(_) | ValidationError::NoTagsAllowed(_) => {
            ("no_tags", "nothing has tags here: use attributes")
        }
        ValidationError::UndefinedFunction(_) => ("unknown_function", "use a function that Cedar has"),
        ValidationError::WrongNumberArguments(_)
        | ValidationError::FunctionArgumentValidation(_)
        | ValidationError::NonLitExtConstructor(_) => {
            ("bad_literal", "write what the function reads, as a literal text")
        }
        ValidationError::EmptySetForbidden(_) => ("empty_set", "name what is in the set"),
        ValidationError::InvalidEnumEntity(_) => ("unknown_value", "use one of the values that the schema lists"),
        _ => ("bad_policy", "correct the policy"),
    }
}

fn of_warning(warning: &ValidationWarning) -> (&'static str, &'static str) {
    match warning {
        ValidationWarning::ImpossiblePolicy(_) => ("impossible_policy", "correct its conditions, or remove it"),
        ValidationWarning::InvalidActionApplication(_) => {
            ("impossible_policy", "the principal is a Workload, the resource a Tool")
        }
        _ => ("confusable_text", "write what readers see as it is"),
    }
}

/// Where a policy names an entity; the policy, if that cannot be found.
fn name_in(policy: &Place, kind: &str, uid: &str) -> Place {
    let text = policy.source.text.get(policy.span.clone()).unwrap_or_default();
    let blank = without_comments(text);
    let quoted = uid.strip_prefix(kind).and_then(|rest| rest.strip_prefix("::")).unwrap_or(uid);
    let found = blank.match_indices(quoted).find_map(|(at, _)| {
        let before = blank.get(..at)?.trim_end().strip_suffix("::")?.trim_end().strip_suffix(kind)?;
        Some(before.len()..at + quoted.len())
    });
    match found {
        Some(found) => Place {
            source: policy.source.clone(),
            span: policy.span.start + found.start..policy.span.start + found.end,
        },
        None => policy.clone(),
    }
}
