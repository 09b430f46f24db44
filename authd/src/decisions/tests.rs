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

    fn of(&self, actions: &Actions) -> Decision {
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
fn all_tools_together_are_an_action_too() {
    let permits = "permit (principal, action in Action::\"tools\", resource);";
    for (more, reason) in [
        ("", "action_permitted"),
        ("forbid (principal, action in Action::\"tools\", resource);", "action_forbidden"),
        ("forbid (principal, action in [Action::\"tools\"], resource);", "action_forbidden"),
        ("forbid (principal, action, resource) when { action in Action::\"tools\" };", "action_forbidden"),
    ] {
        let actions = actions(&format!("{permits}\n{more}"));
        for asked in [refund("1"), Asked::new("read", json!({ "path": "/" })), Asked::new("idle", json!({}))] {
            assert_eq!(asked.of(&actions).reason(), reason, "{more} {}", asked.tool);
        }
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
fn an_action_that_several_files_speak_of_is_decided_by_all_of_them() {
    let source = |name: &str, text: &str| Source { name: name.into(), text: text.into() };
    let policy = texts(vec![
        source("b.cedar", "@id(\"no\") forbid (principal, action, resource) when { context.depth > 1 };"),
        source("p.toml", MODEL),
        source("a.cedar", "\npermit (principal, action == Action::\"refund\", resource);"),
    ]);
    let actions = policy.model.unwrap().actions;
    assert_eq!(told(&refund("1").of(&actions)), ("action_permitted", vec!["a.cedar:2"]));
    let chain = vec!["spiffe://example.org/a".to_owned(), "spiffe://example.org/b".to_owned()];
    assert_eq!(told(&Asked { actors: chain, ..refund("1") }.of(&actions)), ("action_forbidden", vec!["no"]));
    let place = &actions.policy("a.cedar:2").unwrap().place;
    assert_eq!(place.describe(), "a.cedar:2:1");
}

#[test]
fn policies_see_for_whom_the_caller_acts() {
    let actions = actions(
        "@id(\"own\") permit (principal, action == Action::\"refund\", resource) when {
           context has subject && context.subject.issuer == \"corp\" && context.subject.id == \"alice\"
           && context.subject.scopes.containsAll([\"a\", \"b\"]) && context.subject.audience.contains(\"x\")
           && context.subject has client && context.subject.client == \"app\"
           && context.actors == [principal.spiffe_id] && context.depth == 1
           && context.now == datetime(\"2026-11-23T09:00:00Z\")
         };",
    );
    let alice = Subject {
        issuer: "corp".to_owned(),
        id: "alice".to_owned(),
        scopes: vec!["b".to_owned(), "a".to_owned(), "c".to_owned()],
        audience: vec!["x".to_owned()],
        client: Some("app".to_owned()),
    };
    let actors = vec!["spiffe://example.org/support/support-1".to_owned()];
    let asked = |subject: Option<Subject>| Asked { subject, actors: actors.clone(), ..refund("1") };
    assert_eq!(told(&asked(Some(alice.clone())).of(&actions)).0, "action_permitted");
    assert_eq!(told(&asked(None).of(&actions)).0, "action_not_permitted");
    for other in [
        Subject { issuer: "other".to_owned(), ..alice.clone() },
        Subject { id: "bob".to_owned(), ..alice.clone() },
        Subject { scopes: vec!["a".to_owned()], ..alice.clone() },
        Subject { audience: Vec::new(), ..alice.clone() },
        Subject { client: None, ..alice.clone() },
    ] {
        assert_eq!(told(&asked(Some(other)).of(&actions)).0, "action_not_permitted");
    }
    assert_eq!(told(&Asked { actors: Vec::new(), ..asked(Some(alice)) }.of(&actions)).0, "action_not_permitted");
}

#[test]
fn policies_see_what_a_tool_acts_on() {
    for (condition, tools) in [
        ("resource.sensitivity == Sensitivity::\"high\"", &["refund"][..]),
        ("resource.sensitivity == Sensitivity::\"low\"", &["read", "idle"]),
        ("resource in Tenant::\"acme\"", &["refund"]),
        ("resource has tenant && principal has tenant && resource.tenant == principal.tenant", &["refund"]),
        ("resource has server && resource.server.name == \"files\"", &["read"]),
        ("resource in McpServer::\"files\"", &["read"]),
        ("resource has service && resource.service.sensitivity == Sensitivity::\"high\"", &["refund"]),
        ("resource has service && resource.service.tenant == Tenant::\"acme\"", &[]),
        ("resource.name like \"re*\"", &["refund", "read"]),
        ("principal.kind == Kind::\"agent\" && principal in Tenant::\"acme\"", &["refund", "read", "idle"]),
        ("Tool::\"refund\".service.sensitivity == resource.sensitivity", &[]),
        (
            "Service::\"payments\".name == \"payments\" && McpServer::\"files\".name == \"files\"",
            &["refund", "read", "idle"],
        ),
    ] {
        let text = format!("permit (principal, action, resource) when {{ {condition} }};");
        let source = |name: &str, text: &str| Source { name: name.into(), text: text.into() };
        let Some(model) = texts(vec![source("p.toml", MODEL), source("p.cedar", &text)]).model else {
            // What may be missing has to be asked for.
            assert!(tools.is_empty(), "{condition}");
            continue;
        };
        let given = [refund("1"), Asked::new("read", json!({ "path": "/" })), Asked::new("idle", json!({}))];
        let allowed: Vec<&str> =
            given.iter().filter(|a| model.actions.decide(&a.call()).is_allowed()).map(|a| a.tool).collect();
        assert_eq!(allowed, tools, "{condition}");
        let mut listed = model.actions.may_call(0);
        listed.sort_by_key(|name| ["refund", "read", "idle"].iter().position(|other| other == name));
        assert_eq!(listed, tools, "nothing of it depends on the call: {condition}");
    }
}

/// What does not fit, where and why. `""`: it fits.
const REFUND: &[(&str, &str, &str)] = &[
    (r#"{"amount": "1.5", "order": "x"}"#, "", ""),
    (r#"{"amount": 1.5, "order": ""}"#, "", ""),
    (r#"{"amount": 1, "order": "x"}"#, "", ""),
    (r#"{"amount": "1", "order": "x"}"#, "", ""),
    (r#"{"amount": "-0.0001", "order": "x"}"#, "", ""),
    (r#"{"amount": "922337203685477.5807", "order": "x"}"#, "", ""),
    (r#"{"amount": -922337203685477, "order": "x"}"#, "", ""),
    (
        r#"{"amount": 123456789.1234, "order": "x", "note": "n", "lines": ["a", "a", ""], "address": {"city": "x", "zip": 1}}"#,
        "",
        "",
    ),
    (r#"{"order": "x"}"#, "/amount", "is missing"),
    (r#"{"amount": null, "order": "x"}"#, "/amount", "is null"),
    (r#"{"amount": true, "order": "x"}"#, "/amount", "is true or false"),
    (r#"{"amount": "1.00000", "order": "x"}"#, "/amount", "four decimal places"),
    (r#"{"amount": 0.00001, "order": "x"}"#, "/amount", "four decimal places"),
    (r#"{"amount": "922337203685477.5808", "order": "x"}"#, "/amount", "four decimal places"),
    (r#"{"amount": 922337203685478, "order": "x"}"#, "/amount", "four decimal places"),
    (r#"{"amount": 1e300, "order": "x"}"#, "/amount", "four decimal places"),
    (r#"{"amount": 1234567890123.4567, "order": "x"}"#, "/amount", "write it as a string"),
    (r#"{"amount": 18446744073709551615, "order": "x"}"#, "/amount", "write it as a string"),
    (r#"{"amount": "1e2", "order": "x"}"#, "/amount", "four decimal places"),
    (r#"{"amount": "1.", "order": "x"}"#, "/amount", "four decimal places"),
    (r#"{"amount": ".5", "order": "x"}"#, "/amount", "four decimal places"),
    (r#"{"amount": "+1", "order": "x"}"#, "/amount", "four decimal places"),
    (r#"{"amount": " 1", "order": "x"}"#, "/amount", "four decimal places"),
    (r#"{"amount": "١", "order": "x"}"#, "/amount", "four decimal places"),
    (r#"{"amount": "", "order": "x"}"#, "/amount", "four decimal places"),
    (r#"{"amount": "1", "order": 7}"#, "/order", "is a number, not a string"),
    (r#"{"amount": "1", "order": "x", "note": null}"#, "/note", "is null, not a string"),
    (r#"{"amount": "1", "order": "x", "lines": "a"}"#, "/lines", "is a string, not a list"),
    (r#"{"amount": "1", "order": "x", "lines": ["a", 1]}"#, "/lines/1", "is a number, not a string"),
    (r#"{"amount": "1", "order": "x", "address": []}"#, "/address", "is a list, not an object"),
    (r#"{"amount": "1", "order": "x", "address": {}}"#, "/address/city", "is missing"),
    (r#"{"amount": "1", "order": "x", "address": {"city": "x", "zip": 1.0}}"#, "/address/zip", "no whole number"),
    (
        r#"{"amount": "1", "order": "x", "address": {"city": "x", "zip": 9223372036854775808}}"#,
        "/address/zip",
        "no whole number",
    ),
    (r#"{"amount": "1", "order": "x", "address": {"city": "x", "street": "y"}}"#, "/address/street", "is no argument"),
    (r#"{"amount": "1", "order": "x", "a/~b": 1}"#, "/a~1~0b", "is no argument"),
];

const READ: &[(&str, &str, &str)] = &[
    (r#"{"path": "", "whatever": {"is": [null, 1.5]}}"#, "", ""),
    (r#"{"path": "", "size": -9223372036854775808, "all": false}"#, "", ""),
    (r#"{"path": "", "size": "1"}"#, "/size", "is a string, not a whole number"),
    (r#"{"path": "", "all": 1}"#, "/all", "is a number, not true or false"),
    (r#"{"path": "", "from": "10.0.0.1"}"#, "", ""),
    (r#"{"path": "", "from": "10.0.0.0/8"}"#, "", ""),
    (r#"{"path": "", "from": "2001:db8::/32"}"#, "", ""),
    (r#"{"path": "", "from": "::ffff:a00:1"}"#, "/from", "IPv4 is not written as IPv6"),
    (r#"{"path": "", "from": "::ffff:10.0.0.1"}"#, "/from", "IPv4 is not written as IPv6"),
    (r#"{"path": "", "from": "10.0.0.1/33"}"#, "/from", "no IP address"),
    (r#"{"path": "", "from": "10.0.0.1/08"}"#, "/from", "no IP address"),
    (r#"{"path": "", "from": "10.0.0.1/+8"}"#, "/from", "no IP address"),
    (r#"{"path": "", "from": "010.0.0.1"}"#, "/from", "no IP address"),
    (r#"{"path": "", "from": "10.1"}"#, "/from", "no IP address"),
    (r#"{"path": "", "from": 1}"#, "/from", "is a number"),
    (r#"{"path": "", "since": "2026-11-23T09:00:00Z"}"#, "", ""),
    (r#"{"path": "", "since": "2026-11-23T09:00:00.120+05:30"}"#, "", ""),
    (r#"{"path": "", "since": "2026-11-23T09:00:00.123000000-00:00"}"#, "", ""),
    (r#"{"path": "", "since": "2026-11-23"}"#, "", ""),
    (r#"{"path": "", "since": "2026-11-23T09:00:00.1234Z"}"#, "/since", "finer than a millisecond"),
    (r#"{"path": "", "since": "2026-11-23T09:00:60Z"}"#, "/since", "RFC 3339"),
    (r#"{"path": "", "since": "2026-02-29T09:00:00Z"}"#, "/since", "RFC 3339"),
    (r#"{"path": "", "since": "2026-11-23 09:00:00Z"}"#, "/since", "RFC 3339"),
    (r#"{"path": "", "since": "2026-11-23T09:00:00"}"#, "/since", "RFC 3339"),
    (r#"{"path": "", "since": "2026-11-23T09:00:00.Z"}"#, "/since", "RFC 3339"),
    (r#"{"path": "", "since": "2026-11-23T09:00:00Z[UTC]"}"#, "/since", "RFC 3339"),
    (r#"{"path": "", "since": "ä026-11-23T09:00:00Z"}"#, "/since", "RFC 3339"),
    (r#"{"path": "", "within": "1d2h3m4s5ms"}"#, "", ""),
    (r#"{"path": "", "within": "-5m"}"#, "", ""),
    (r#"{"path": "", "within": ""}"#, "/within", "no duration"),
    (r#"{"path": "", "within": "5m1h"}"#, "/within", "no duration"),
    (r#"{"path": "", "within": "PT5M"}"#, "/within", "no duration"),
    (r#"{"path": "", "within": "99999999999999d"}"#, "/within", "no duration"),
];

#[test]
fn arguments_that_do_not_fit_are_refused_with_their_path() {
    let model = model("permit (principal, action, resource);");
    let (schema, _) = cedar_policy::Schema::from_cedarschema_str(&schema::generate(&model)).unwrap();
    let cases = REFUND.iter().map(|case| ("refund", case)).chain(READ.iter().map(|case| ("read", case)));
    for (tool, (text, path, why)) in cases {
        let asked = Asked::new(tool, serde_json::from_str(text).unwrap());
        let decision = asked.of(&model.actions);
        match decision.outcome {
            Outcome::Allowed => {
                assert_eq!(*path, "", "{text} was taken");
                // Cedar agrees that it is what the schema says.
                let prepared = model.actions.prepare_everything(&asked.call());
                let (request, entities) = (prepared.request, prepared.entities);
                let context = request.context().unwrap().clone();
                context.validate(&schema, request.action().unwrap()).unwrap_or_else(|error| panic!("{text}: {error}"));
                assert!(cedar_policy::Entities::from_entities(entities, Some(&schema)).is_ok());
            }
            Outcome::Denied(Denial::BadArguments(error)) => {
                assert!(error.path == *path && error.to_string().contains(why) && !path.is_empty(), "{text}: {error}");
            }
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[test]
fn decimals_are_compared_as_they_were_written() {
    let actions = actions(
        "permit (principal, action == Action::\"refund\", resource) when { context.arguments.amount == decimal(\"50.1\") };",
    );
    for (amount, same) in [
        (json!("50.1"), true),
        (json!(50.1), true),
        (json!("50.1000"), true),
        (json!("50.1001"), false),
        (json!(50), false),
    ] {
        let asked = Asked::new("refund", json!({ "amount": amount, "order": "x" }));
        assert_eq!(asked.of(&actions).is_allowed(), same, "{amount}");
    }
}

#[test]
fn arguments_without_a_bound_are_refused() {
    let actions = actions("permit (principal, action, resource);");
    let lines = |count: usize, length: usize| {
        let lines: Vec<String> = (0..count).map(|_| "x".repeat(length)).collect();
        let decision = Asked::new("refund", json!({ "amount": 1, "order": "x", "lines": lines })).of(&actions);
        match decision.outcome {
            Outcome::Denied(Denial::BadArguments(error)) => Some((error.path.clone(), error.to_string())),
            _ => None,
        }
    };
    assert_eq!(lines(4_000, 60), None);
    assert_eq!(lines(4_100, 1), Some((String::new(), "the arguments: are too many values".to_owned())));
    assert_eq!(lines(10, 30_000), Some((String::new(), "the arguments: are too long".to_owned())));
    // A name that nobody declared is not repeated at any length.
    let name = format!("a\u{1b}{}", "x".repeat(10_000));
    let decision = Asked::new("idle", json!({ name: 1 })).of(&actions);
    let Outcome::Denied(Denial::BadArguments(error)) = decision.outcome else { panic!() };
    assert!(error.path.len() <= 65 && !error.path.contains('\u{1b}'), "{error}");
}

#[test]
fn policies_that_cannot_match_a_tool_are_not_asked() {
    let mut text = POLICIES.to_owned();
    for number in 0..100 {
        text += &format!("@id(\"other-{number}\") permit (principal, action == Action::\"read\", resource);");
    }
    let actions = actions(&text);
    let of = |tool: &str| actions.policies_of(tool).count();
    assert_eq!((of("refund"), of("read"), of("idle"), of("no-such")), (5, 101, 1, 0));
    assert_eq!(actions.policy_set().num_of_policies(), 105);
}

#[test]
fn an_entity_that_policies_look_into_is_there_for_every_tool_they_are_about() {
    let actions =
        actions("permit (principal, action, resource) when { Tool::\"refund\".sensitivity == Sensitivity::\"high\" };");
    assert!(Asked::new("idle", json!({})).of(&actions).is_allowed());
}

mod random {
    //! Random policies and calls: what Cedar says of all policies at once is what is decided, and whatever is decided is listed.

    use cedar_policy::{Authorizer, Entities};
    use proptest::prelude::*;

    use super::{super::entities::Types, *};

    const PRINCIPALS: &[&str] = &[
        "principal",
        "principal == Workload::\"support\"",
        "principal in Kind::\"agent\"",
        "principal in Tenant::\"acme\"",
        "principal is Workload",
        "principal is Workload in Kind::\"service\"",
    ];
    const ACTIONS: &[&str] = &[
        "action",
        "action == Action::\"refund\"",
        "action == Action::\"read\"",
        "action in [Action::\"read\", Action::\"idle\"]",
        "action in Action::\"tools\"",
    ];
    const RESOURCES: &[&str] = &[
        "resource",
        "resource == Tool::\"refund\"",
        "resource in Service::\"payments\"",
        "resource in McpServer::\"files\"",
        "resource in Tenant::\"acme\"",
        "resource is Tool",
        "resource is Tool in Service::\"payments\"",
    ];
    const CONDITIONS: &[&str] = &[
        "",
        "when { true }",
        "unless { false }",
        "when { context.depth == 1 }",
        "unless { context has subject }",
        "when { context has subject && context.subject.id == \"alice\" }",
        "when { context.now < datetime(\"2026-01-01\") }",
        "when { principal has tenant && principal.tenant == Tenant::\"acme\" }",
        "when { principal has environment }",
        "when { resource.sensitivity == Sensitivity::\"high\" }",
        "when { principal.name like \"s*\" }",
        "when { principal.instance like \"*-1\" }",
        "unless { principal.spiffe_id like \"*/support-1\" }",
        "when { Service::\"payments\".sensitivity == Sensitivity::\"high\" }",
        "when { Tool::\"read\" in McpServer::\"files\" && principal.kind == Kind::\"agent\" }",
        "when { principal == Workload::\"web\" || context.depth > 0 }",
        // These fail: always, and with some calls.
        "when { 9223372036854775807 + 1 > 0 }",
        "when { principal.name == \"web\" && 9223372036854775807 + 1 > 0 }",
        "when { 9223372036854775807 + context.depth > 0 }",
    ];

    fn policy() -> impl Strategy<Value = String> {
        let one = |of: &'static [&'static str]| proptest::sample::select(of);
        let effect = prop_oneof![
            4 => Just("permit"),
            2 => Just("@approval(\"finance\") permit"),
            1 => Just("@approval(\"heads\") permit"),
            2 => Just("forbid"),
        ];
        (effect, one(PRINCIPALS), one(ACTIONS), one(RESOURCES), one(CONDITIONS))
            .prop_map(|(effect, p, a, r, when)| format!("{effect} ({p}, {a}, {r}) {when};\n"))
    }

    /// As the words have it, of all policies and entities at once.
    fn naive(model: &Model, all: &Entities, call: &Call<'_>) -> &'static str {
        let prepared = model.actions.prepare_everything(call);
        let caller = prepared.entities.iter().find(|e| e.uid() == *prepared.request.principal().unwrap()).unwrap();
        let entities = all.clone().add_entities([caller.clone()], None).unwrap();
        let response = Authorizer::new().is_authorized(&prepared.request, &model.actions.policy_set(), &entities);
        let said: Vec<_> =
            response.diagnostics().reason().map(|id| model.actions.policy(id.as_ref()).unwrap()).collect();
        match response.decision() {
            _ if response.diagnostics().errors().next().is_some() => "action_policy_error",
            cedar_policy::Decision::Allow if said.iter().any(|policy| policy.approval.is_none()) => "action_permitted",
            cedar_policy::Decision::Allow => "action_needs_approval",
            cedar_policy::Decision::Deny if said.is_empty() => "action_not_permitted",
            cedar_policy::Decision::Deny => "action_forbidden",
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn decisions_are_cedars_and_whatever_is_allowed_is_listed(policies in prop::collection::vec(policy(), 0..6)) {
            let model = model(&policies.concat());
            let types = Types::new().unwrap();
            let tools = model.tools.iter().flat_map(|tool| types.tool_with_all(tool, &model).unwrap());
            let mut seen = std::collections::HashSet::new();
            // Which actions are in which is Cedar's own reading of the schema.
            let (schema, _) = cedar_policy::Schema::from_cedarschema_str(&schema::generate(&model)).unwrap();
            let others = tools.filter(|entity| entity.uid().type_name().basename() != "Action");
            let all = Entities::from_entities(others.filter(|entity| seen.insert(entity.uid())), Some(&schema)).unwrap();
            for workload in 0..model.workloads.len() {
                let listed = model.actions.may_call(workload);
                for asked in [refund("1"), Asked::new("read", json!({ "path": "/" })), Asked::new("idle", json!({}))] {
                    for (depth, subject, instance) in [(0, None, "x"), (1, Some("alice"), "support-1"), (2, Some("bob"), "support-1")] {
                        let subject = subject.map(|id| Subject { id: id.to_owned(), ..Subject::default() });
                        let actors = vec!["spiffe://example.org/a".to_owned(); depth];
                        let asked = Asked { workload, subject, actors, arguments: asked.arguments.clone(), ..asked };
                        let spiffe_id = format!("spiffe://example.org/support/{instance}");
                        let call = Call { instance, spiffe_id: &spiffe_id, ..asked.call() };
                        let decision = model.actions.decide(&call);
                        prop_assert_eq!(decision.reason(), naive(&model, &all, &call));
                        let refused = matches!(decision.outcome, Outcome::Denied(_));
                        prop_assert!(refused || listed.contains(&asked.tool), "{} is not listed", asked.tool);
                    }
                }
            }
        }
    }
}

#[test]
fn a_tool_that_cannot_be_allowed_is_not_listed() {
    let listed = |cedar: &str| {
        let model = model(cedar);
        (0..3).map(|workload| model.actions.may_call(workload).len()).collect::<Vec<_>>()
    };
    let varies = "permit (principal, action, resource) when { context.depth == 1 };";
    assert_eq!(listed(""), [0, 0, 0]);
    assert_eq!(listed(varies), [3, 3, 3]);
    assert_eq!(listed("permit (principal in Tenant::\"acme\", action == Action::\"read\", resource);"), [1, 0, 1]);
    assert_eq!(
        listed("@approval(\"finance\") permit (principal == Workload::\"coder\", action, resource);"),
        [0, 3, 0]
    );
    assert_eq!(listed(&format!("{varies} forbid (principal in Kind::\"agent\", action, resource);")), [0, 0, 3]);
    assert_eq!(
        listed(&format!("{varies} forbid (principal, action, resource) when {{ principal.name == \"web\" }};")),
        [3, 3, 0]
    );
    assert_eq!(
        listed(&format!("{varies} forbid (principal, action, resource) when {{ context.depth == 1 }};")),
        [3, 3, 3]
    );
    assert_eq!(listed("permit (principal, action, resource) when { principal.name == \"web\" };"), [0, 0, 3]);
    assert_eq!(listed("permit (principal, action, resource) when { principal.spiffe_id == \"x\" };"), [3, 3, 3]);
    assert_eq!(model("").actions.may_call(17), Vec::<&str>::new());
}

/// In a thread of the size that the daemon's have: what is taken here is taken by each process, and decided about.
#[test]
fn the_deepest_policies_that_are_read_are_taken() {
    let when = |condition: String| format!("permit (principal, action, resource) when {{ {condition} }};");
    for text in [
        when(format!("context.depth == 0{}", "&&true".repeat(399))),
        when(format!("context.depth == 0{}", "||context.depth == 0".repeat(399))),
        when(format!("0{} == 399", "+1".repeat(399))),
        when("if context.depth == 1 then false else ".repeat(399) + "true"),
        "permit (principal, action, resource) ".to_owned() + &"when { context.depth == 0 } ".repeat(400) + ";",
        when("(".repeat(62) + "context.depth == 0" + &")".repeat(62)),
    ] {
        assert!(Asked::new("idle", json!({})).of(&actions(&text)).is_allowed(), "{text}");
    }
}

#[test]
fn what_no_policy_looks_at_is_not_made_and_checked_all_the_same() {
    let actions = actions(
        "permit (principal, action == Action::\"refund\", resource) when { context.arguments.order == \"o-1\" };",
    );
    let asked = refund("1");
    let shown = actions.prepare(&asked.call()).unwrap().request.context().unwrap().to_json_value().unwrap();
    assert_eq!(shown, json!({ "arguments": { "order": "o-1" } }));
    let everything = actions.prepare_everything(&asked.call()).request.context().unwrap().to_json_value().unwrap();
    assert_eq!(everything["arguments"].as_object().unwrap().len(), 2);
    assert!(everything.get("now").is_some() && everything["depth"] == 0);
    assert_eq!(told(&refund("much").of(&actions)).0, "action_bad_arguments");
    // Where they are looked at together, all are there.
    let actions = super::tests::actions(
        "permit (principal, action == Action::\"refund\", resource) when { [context.arguments].contains(context.arguments) };",
    );
    let shown = actions.prepare(&asked.call()).unwrap().request.context().unwrap().to_json_value().unwrap();
    assert_eq!((shown["arguments"].as_object().unwrap().len(), shown.as_object().unwrap().len()), (2, 1));
}
