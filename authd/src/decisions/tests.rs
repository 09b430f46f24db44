use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::*;
use crate::policy::{diagnostic::Source, load::texts, model::Model};

const MODEL: &str = r#"
trust_domain = "example.org"
[[workload]]
name = "support"
kind = "agent"
cgroup = "/agents/support-*"
tenant = "acme"
[[workload]]
name = "coder"
kind = "agent"
cgroup = "/agents/coder-*"
environment = "dev"
[[workload]]
name = "web"
kind = "service"
cgroup = "/web"
tenant = "acme"
[[service]]
name = "payments"
addresses = ["10.0.0.0/8"]
ports = ["tcp/443"]
sensitivity = "high"
tenant = "acme"
[[mcp_server]]
name = "files"
command = ["/usr/bin/files"]
user = "files"
[[approvers]]
name = "finance"
users = ["alice"]
[[approvers]]
name = "heads"
users = ["bob"]
[[tool]]
name = "refund"
service = "payments"
[tool.arguments]
amount = "decimal"
order = "string"
note = "string?"
"lines?" = ["string"]
"address?" = { city = "string", zip = "long?" }
[[tool]]
name = "read"
server = "files"
other_arguments = true
arguments = { path = "string", "size?" = "long", "from?" = "ip", "since?" = "datetime", "within?" = "duration", "all?" = "bool" }
[[tool]]
name = "idle"
"#;

fn model(cedar: &str) -> Model {
    let source = |name: &str, text: &str| Source { name: name.into(), text: text.into() };
    let policy = texts(vec![source("p.toml", MODEL), source("p.cedar", cedar)]);
    let shown: Vec<String> = policy.diagnostics.iter().map(|d| d.render(false)).collect();
    policy.model.unwrap_or_else(|| panic!("refused:\n{}", shown.join("\n")))
}

fn actions(cedar: &str) -> Arc<Actions> {
    model(cedar).actions
}

fn map(value: Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap()
}

struct Asked {
    workload: usize,
    tool: &'static str,
    arguments: Map<String, Value>,
    subject: Option<Subject>,
    actors: Vec<String>,
}

impl Asked {
    /// By the support agent, for nobody.
    fn new(tool: &'static str, arguments: Value) -> Self {
        Self { workload: 0, tool, arguments: map(arguments), subject: None, actors: Vec::new() }
    }

    fn of(self, actions: &Actions) -> Decision {
        actions.decide(&self.call())
    }

    fn call(&self) -> Call<'_> {
        Call {
            workload: self.workload,
            spiffe_id: "spiffe://example.org/support/support-1",
            instance: "/agents/support-1",
            tool: self.tool,
            arguments: &self.arguments,
            subject: self.subject.as_ref(),
            actors: &self.actors,
            now: "2026-11-23T09:00:00Z".parse().unwrap(),
        }
    }
}

fn refund(amount: &str) -> Asked {
    Asked::new("refund", json!({ "amount": amount, "order": "o-1" }))
}

fn told(decision: &Decision) -> (&'static str, Vec<&str>) {
    (decision.reason(), decision.policies.iter().map(String::as_str).collect())
}

const POLICIES: &str = r#"
@id("small")
permit (principal in Kind::"agent", action == Action::"refund", resource)
when { context.arguments.amount.lessThanOrEqual(decimal("50.00")) };

@id("large") @approval("finance")
permit (principal == Workload::"support", action == Action::"refund", resource in Service::"payments")
when { context.arguments.amount.lessThan(decimal("1000.00")) };

@id("larger") @approval("heads")
permit (principal, action, resource == Tool::"refund");

@id("stop")
forbid (principal, action in Action::"tools", resource)
when { resource.sensitivity == Sensitivity::"high" && principal.spiffe_id like "*-2" };

@id("night")
forbid (principal, action == Action::"refund", resource) when { context.now < datetime("2026-11-01") };
"#;

#[test]
fn permits_add_up_and_approvals_are_alternatives() {
    let actions = actions(POLICIES);
    assert_eq!(told(&refund("50").of(&actions)), ("action_permitted", vec!["small"]));
    let pending = refund("50.0001").of(&actions);
    assert_eq!(told(&pending), ("action_needs_approval", vec!["large", "larger"]));
    let Outcome::Pending(alternatives) = pending.outcome else { panic!("{pending:?}") };
    let shown: Vec<_> = alternatives.iter().map(|a| (a.approvers, a.name.as_str(), a.policy.as_str())).collect();
    assert_eq!(shown, [(0, "finance", "large"), (1, "heads", "larger")]);
    assert_eq!(told(&refund("1000").of(&actions)), ("action_needs_approval", vec!["larger"]));
    // Nothing but the approval is left to a service.
    assert_eq!(told(&Asked { workload: 2, ..refund("1") }.of(&actions)), ("action_needs_approval", vec!["larger"]));
}

#[test]
fn a_forbid_wins_over_permits_and_approvals() {
    let actions = actions(
        &format!(
            "{POLICIES}@id(\"never\") forbid (principal, action, resource) when {{ context.arguments has note }};"
        )
        .replace("context.arguments has note", "principal.instance == \"/agents/support-1\""),
    );
    for amount in ["1", "100", "5000"] {
        assert_eq!(told(&refund(amount).of(&actions)), ("action_forbidden", vec!["never"]));
    }
}

#[test]
fn without_policies_everything_is_denied() {
    let actions = actions("");
    assert_eq!(told(&refund("1").of(&actions)), ("action_not_permitted", vec![]));
    assert_eq!(told(&Asked::new("refunds", json!({})).of(&actions)), ("action_unknown_tool", vec![]));
    assert_eq!(told(&refund("1").of(&Actions::default())), ("action_unknown_tool", vec![]));
    assert_eq!(told(&Asked { workload: 3, ..refund("1") }.of(&actions)), ("action_unknown_workload", vec![]));
}

#[test]
fn a_policy_that_fails_denies_whatever_others_say() {
    let overflow = "@id(\"sum\") permit (principal, action == Action::\"read\", resource) when { context.arguments has size && context.arguments.size + 1 > 0 };
                    @id(\"all\") permit (principal, action, resource);";
    let actions = actions(overflow);
    assert_eq!(
        told(&Asked::new("read", json!({ "path": "/", "size": 1 })).of(&actions)),
        ("action_permitted", vec!["all", "sum"])
    );
    let failed = Asked::new("read", json!({ "path": "/", "size": i64::MAX })).of(&actions);
    assert_eq!(told(&failed), ("action_policy_error", vec!["sum"]));
    assert!(matches!(failed.outcome, Outcome::Denied(Denial::PolicyError(why)) if why.contains("overflow")));
}

#[test]
fn timing() {
    let mut cedar = POLICIES.to_owned();
    let n: usize = std::env::var("N").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    for i in 0..n {
        cedar += &format!(
            "permit (principal == Workload::\"coder\", action == Action::\"read\", resource) when {{ context.arguments.path == \"/{i}\" }};\n"
        );
    }
    let actions = actions(&cedar);
    let mut asked = refund("50");
    asked.subject = Some(Subject {
        issuer: "corp".into(),
        id: "alice".into(),
        scopes: vec!["a".into(), "b".into()],
        audience: vec!["x".into()],
        client: None,
    });
    let call = asked.call();
    let time = |what: &str, f: &mut dyn FnMut()| {
        for _ in 0..2000 {
            f()
        }
        let start = std::time::Instant::now();
        for _ in 0..5000 {
            f()
        }
        println!("{what}: {:?}", start.elapsed() / 5000);
    };
    time("decide", &mut || {
        std::hint::black_box(actions.decide(&call));
    });
    time("prepare", &mut || {
        std::hint::black_box(actions.prepare(&call).is_ok());
    });
    let prepared = actions.prepare(&call).unwrap();
    let set = actions.policy_set();
    let a = cedar_policy::Authorizer::new();
    time("bare", &mut || {
        std::hint::black_box(a.is_authorized(&prepared.request, &set, &prepared.entities));
    });
    time("may_call", &mut || {
        std::hint::black_box(actions.may_call(0));
    });
}
