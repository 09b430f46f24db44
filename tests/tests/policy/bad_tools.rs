//! Tools, approvers, MCP servers and action policies with one fault each.

use authd::policy::{
    diagnostic::{Diagnostic, Severity},
    lint::lint,
    load::{self, texts},
};

use proptest::prelude::*;

use crate::{BASE, apply, bad::Bad, edit, source};

/// Everything here stands behind the base.
pub const OF_TOOLS: &[Bad] = &[
    // Shapes.
    ("[[tool]]\nname = \"t\"\ntype = \"x\"", "syntax", "3:1", "unknown field `type`"),
    ("[[tool]]\nserver = \"t\"", "syntax", "1:1", "missing field `name`"),
    ("[[tool]]\nname = \"t\"\narguments = [\"string\"]", "syntax", "3:13", "a table of arguments"),
    ("[[tool]]\nname = \"t\"\narguments = { a = 7 }", "syntax", "3:19", "the name of a type"),
    ("[[tool]]\nname = \"t\"\narguments = { a = \"long\", a = \"long\" }", "syntax", "3:27", "duplicate key"),
    ("[[tool]]\nname = \"t\"\nother_arguments = \"yes\"", "syntax", "3:19", "expected a boolean"),
    ("[[approvers]]\nname = \"a\"\nusers = \"alice\"", "syntax", "3:9", "invalid type: string"),
    ("[[mcp_server]]\nname = \"m\"\ncommand = \"/bin/x\"", "syntax", "3:11", "invalid type: string"),
    ("[[mcp_server]]\nname = \"m\"\nenvironment = [\"A=1\"]", "syntax", "3:15", "invalid type"),
    // Names and references.
    ("[[tool]]\nname = \"a b\"", "bad_name", "2:8", "`a b` cannot be a name"),
    ("[[tool]]\nname = \"any\"", "reserved_name", "2:8", "a word of the policy language"),
    ("[[tool]]\nname = \"tools\"", "reserved_name", "2:8", "all tools together"),
    ("[[tool]]\nname = \"t\"\n[[tool]]\nname = \"t\"", "duplicate_name", "4:8", "tool `t` is defined twice"),
    ("[[tool]]\nname = \"t\"\nserver = \"m\"", "unknown_mcp_server", "3:10", "no MCP server is called `m`"),
    ("[[tool]]\nname = \"t\"\nservice = \"dp\"", "unknown_service", "3:11", "no service is called `dp`"),
    ("[[tool]]\nname = \"t\"\npermit = \"r\"", "unknown_rule", "3:10", "no rule is called `r`"),
    ("[[tool]]\nname = \"t\"\nmcp_name = \"x\"", "unused_setting", "3:12", "no MCP server offers this tool"),
    (
        "[[mcp_server]]\nname = \"m\"\nurl = \"https://m.example\"\n[[tool]]\nname = \"t\"\nserver = \"m\"\nmcp_name = \"\"",
        "bad_mcp_name",
        "7:12",
        "cannot be a tool's name",
    ),
    (
        "[[mcp_server]]\nname = \"m\"\nurl = \"https://m.example\"\n[[tool]]\nname = \"t\"\nserver = \"m\"\n[[tool]]\nname = \"u\"\nserver = \"m\"\nmcp_name = \"t\"",
        "duplicate_name",
        "8:8",
        "tool of MCP server `m` `t` is defined twice",
    ),
    // Arguments.
    ("[[tool]]\nname = \"t\"\narguments = { a = \"strin\" }", "bad_argument", "3:19", "`strin` is no type"),
    ("[[tool]]\nname = \"t\"\narguments = { a = \"string??\" }", "bad_argument", "3:19", "`string?` is no type"),
    ("[[tool]]\nname = \"t\"\narguments = { a = [] }", "bad_argument", "3:19", "a list of 0 types"),
    ("[[tool]]\nname = \"t\"\narguments = { a = [\"long\", \"bool\"] }", "bad_argument", "3:19", "a list of 2 types"),
    ("[[tool]]\nname = \"t\"\narguments = { a = [\"long?\"] }", "bad_argument", "3:20", "cannot be missing"),
    (
        "[[tool]]\nname = \"t\"\narguments = { \"a b\" = \"long\" }",
        "bad_argument",
        "3:15",
        "`a b` cannot be an argument",
    ),
    ("[[tool]]\nname = \"t\"\narguments = { \"\" = \"long\" }", "bad_argument", "3:15", "cannot be an argument"),
    ("[[tool]]\nname = \"t\"\narguments = { \"a\\\"\" = \"long\" }", "bad_argument", "3:15", "cannot be an argument"),
    ("[[tool]]\nname = \"t\"\narguments = { __entity = \"long\" }", "bad_argument", "3:15", "`__entity` cannot"),
    (
        "[[tool]]\nname = \"t\"\narguments = { a = \"long\", \"a?\" = \"long\" }",
        "duplicate_name",
        "3:27",
        "`a` is there twice",
    ),
    (
        "[[tool]]\nname = \"t\"\narguments = { a = [[[[[[[[\"long\"]]]]]]]] }",
        "bad_argument",
        "3:27",
        "more than 8 types are within each other",
    ),
    // Approvers.
    ("[[approvers]]\nname = \"\"\nusers = [\"alice\"]", "bad_name", "2:8", "cannot be a name"),
    ("[[approvers]]\nname = \"a\"", "no_approver", "2:8", "nobody is among approvers `a`"),
    (
        "[[approvers]]\nname = \"a\"\nusers = [\"x\"]\n[[approvers]]\nname = \"a\"\nusers = [\"y\"]",
        "duplicate_name",
        "5:8",
        "approvers `a` is defined twice",
    ),
    ("[[approvers]]\nname = \"a\"\nusers = [\"-x\"]", "bad_user", "3:10", "`-x` cannot be a Unix user"),
    ("[[approvers]]\nname = \"a\"\nusers = [\"\"]", "bad_user", "3:10", "`` cannot be a Unix user"),
    ("[[approvers]]\nname = \"a\"\nusers = [\"4294967295\"]", "bad_user", "3:10", "cannot be a Unix user"),
    (
        "[[approvers]]\nname = \"a\"\nissuer = \"corb\"\nsubjects = [\"x\"]",
        "unknown_issuer",
        "3:10",
        "no issuer is called `corb`",
    ),
    ("[[approvers]]\nname = \"a\"\nissuer = \"corp\"", "no_approver", "3:10", "everybody with a token"),
    (
        "[[approvers]]\nname = \"a\"\nissuer = \"corp\"\nsubjects = [\"\"]",
        "bad_subject",
        "4:13",
        "no token has such a subject",
    ),
    (
        "[[approvers]]\nname = \"a\"\nissuer = \"corp\"\nsubjects = [\"x\"]\nacr = [\"\"]",
        "bad_acr",
        "5:8",
        "no token has an empty `acr`",
    ),
    (
        "[[approvers]]\nname = \"a\"\nusers = [\"x\"]\nsubjects = [\"y\"]",
        "unused_setting",
        "4:13",
        "`subjects` has no use",
    ),
    ("[[approvers]]\nname = \"a\"\nusers = [\"x\"]\nacr = [\"phr\"]", "unused_setting", "4:8", "`acr` has no use"),
    (
        "[[approvers]]\nname = \"a\"\nusers = [\"x\"]\nmax_age = \"5m\"",
        "unused_setting",
        "4:11",
        "`max_age` has no use",
    ),
    ("[[approvers]]\nname = \"a\"\nusers = [\"x\"]\nttl = \"soon\"", "bad_duration", "4:7", "`soon` is no duration"),
    ("[[approvers]]\nname = \"a\"\nusers = [\"x\"]\nttl = \"25h\"", "long_approval", "4:7", "`ttl` is 24h at most"),
    ("[[approvers]]\nname = \"a\"\nusers = [\"x\"]\nvalid = \"61m\"", "long_approval", "4:9", "`valid` is 1h at most"),
    // MCP servers.
    ("[[mcp_server]]\nname = \"m\"", "mcp_reach", "2:8", "needs either `url` or `command`"),
    (
        "[[mcp_server]]\nname = \"m\"\nurl = \"https://m.example\"\ncommand = [\"/bin/m\"]\nuser = \"m\"",
        "mcp_reach",
        "2:8",
        "needs either `url` or `command`",
    ),
    (
        "[[mcp_server]]\nname = \"m\"\nurl = \"https://m.example\"\n[[mcp_server]]\nname = \"m\"\nurl = \"https://n.example\"",
        "duplicate_name",
        "5:8",
        "MCP server `m` is defined twice",
    ),
    ("[[mcp_server]]\nname = \"m\"\nurl = \"http://m.example/mcp\"", "bad_url", "3:7", "is no https URL"),
    (
        "[[mcp_server]]\nname = \"m\"\nurl = \"https://m.example\"\nuser = \"m\"",
        "unused_setting",
        "4:8",
        "`user` has no use",
    ),
    (
        "[[mcp_server]]\nname = \"m\"\nurl = \"https://m.example\"\nenvironment = { A = \"1\" }",
        "unused_setting",
        "4:15",
        "`environment` has no use",
    ),
    (
        "[[mcp_server]]\nname = \"m\"\nurl = \"https://m.example\"\naudience = \"\"",
        "bad_audience",
        "4:12",
        "cannot be empty",
    ),
    (
        "[[mcp_server]]\nname = \"m\"\nurl = \"https://m.example\"\nscopes = [\"a b\"]",
        "bad_scope",
        "4:11",
        "`a b` is no scope",
    ),
    ("[[mcp_server]]\nname = \"m\"\ncommand = [\"/bin/m\"]", "no_user", "2:8", "as which Unix user"),
    ("[[mcp_server]]\nname = \"m\"\ncommand = [\"/m\"]\nuser = \"root\"", "root_command", "4:8", "as root"),
    ("[[mcp_server]]\nname = \"m\"\ncommand = [\"/m\"]\nuser = \"00\"", "root_command", "4:8", "as root"),
    ("[[mcp_server]]\nname = \"m\"\ncommand = []\nuser = \"m\"", "bad_command", "3:11", "names no program"),
    ("[[mcp_server]]\nname = \"m\"\ncommand = [\"m\"]\nuser = \"m\"", "bad_command", "3:12", "names no program"),
    ("[[mcp_server]]\nname = \"m\"\ncommand = [\"/a/../m\"]\nuser = \"m\"", "bad_command", "3:12", "names no program"),
    (
        "[[mcp_server]]\nname = \"m\"\ncommand = [\"/m\", \"a\\u0000b\"]\nuser = \"m\"",
        "bad_command",
        "3:18",
        "ends at a NUL",
    ),
    (
        "[[mcp_server]]\nname = \"m\"\ncommand = [\"/m\"]\nuser = \"a b\"",
        "bad_user",
        "4:8",
        "`a b` cannot be a Unix user",
    ),
    (
        "[[mcp_server]]\nname = \"m\"\ncommand = [\"/m\"]\nuser = \"m\"\nenvironment = { \"A=B\" = \"1\" }",
        "bad_environment",
        "5:17",
        "`A=B` cannot be set",
    ),
    (
        "[[mcp_server]]\nname = \"m\"\ncommand = [\"/m\"]\nuser = \"m\"\naudience = \"x\"",
        "unused_setting",
        "5:12",
        "`audience` has no use",
    ),
    (
        "[[mcp_server]]\nname = \"m\"\ncommand = [\"/m\"]\nuser = \"m\"\nscopes = [\"x\"]",
        "unused_setting",
        "5:11",
        "`scopes` has no use",
    ),
];

/// Beside the base: what action policies can name.
pub const TOOLS: &str = r#"
[[mcp_server]]
name = "files"
command = ["/usr/bin/files", "--root", "/srv"]
user = "1001"
environment = { HOME = "/srv" }
[[mcp_server]]
name = "remote"
url = "https://tools.example.org/mcp"
audience = "https://tools.example.org"
scopes = ["tools:call"]
[[approvers]]
name = "finance"
users = ["alice", "1001", "alice"]
issuer = "corp"
audience = "approvals"
subjects = ["alice@example.org"]
acr = ["phr"]
max_age = "5m"
ttl = "24h"
valid = "1h"
may_be_subject = true
[[approvers]]
name = "plain"
users = ["bob"]
[[rule]]
name = "agents-db"
from = ["agent"]
to = ["db"]
require = ["action"]
[[tool]]
name = "refund"
service = "db"
permit = "agents-db"
arguments = { amount = "decimal", order = "string", note = "string?", lines = ["string"], "tags?" = ["long"], address = { city = "string", "zip?" = "long" } }
[[tool]]
name = "read"
server = "files"
mcp_name = "read_file"
other_arguments = true
arguments = { path = "string", from = "ip?", since = "datetime?", within = "duration?", all = "bool?" }
"#;

/// Action policies: what is wrong, how it is found, and where.
const OF_CEDAR: &[Bad] = &[
    // The text.
    ("permit (principal, action, resource)", "syntax", "1:37", "unexpected end of input"),
    ("permit (principal, action, resource) when { 1 + }; ", "syntax", "1:49", "unexpected token `}`"),
    ("allow (principal, action, resource);", "syntax", "1:1", "invalid policy effect"),
    ("permit (principal, resource);", "syntax", "1:20", "resource"),
    ("\n\n  permit (user, action, resource);", "syntax", "3:11", "user"),
    ("permit (principal, action, resource) when { \"x };", "syntax", "1:45", "invalid token"),
    (
        "permit (principal, action, resource) when { context.x == 9223372036854775808 };",
        "syntax",
        "1:58",
        "9223372036854775808",
    ),
    ("@id(\"a\") @id(\"b\") permit (principal, action, resource);", "syntax", "1:10", "duplicate annotation"),
    ("permit (principal == ?principal, action, resource);", "policy_template", "1:1", "this is a template"),
    (
        "// permit (principal == ?principal, action, resource);\npermit (principal, action, resource == ?resource);",
        "policy_template",
        "2:1",
        "this is a template",
    ),
    // Names of policies, and what stands before them.
    ("@id(\"a b\")\npermit (principal, action, resource);", "bad_name", "1:1", "`a b` cannot be a policy's name"),
    (
        "@id(\"a\") permit (principal, action, resource);\n@doc(\"x\") @id(\"a\") permit (principal, action, resource);",
        "duplicate_name",
        "2:11",
        "policy `a` is defined twice",
    ),
    (
        "@doc(\"@aproval(1)\")\n@aproval(\"finance\")\npermit (principal, action, resource);",
        "unknown_annotation",
        "2:1",
        "`@aproval` means nothing",
    ),
    (
        "@approval(\"finanze\")\npermit (principal, action, resource);",
        "unknown_approvers",
        "1:1",
        "no approvers are called `finanze`",
    ),
    ("@approval\npermit (principal, action, resource);", "unknown_approvers", "1:1", "no approvers are called ``"),
    (
        "@approval(\"finance\")\nforbid (principal, action, resource);",
        "approval_of_forbid",
        "1:1",
        "a `forbid` cannot be approved",
    ),
    // What is named.
    (
        "permit (principal == User::\"a\", action, resource);",
        "unknown_entity_type",
        "1:22",
        "unrecognized entity type `User`",
    ),
    ("permit (principal, action == Action::\"refunds\", resource);", "unknown_action", "1:30", "unrecognized action"),
    (
        "permit (principal == Workload::\"agnet\", action, resource);",
        "unknown_workload",
        "1:22",
        "no workload is called `agnet`",
    ),
    (
        "permit (principal, action, resource)\nwhen { principal == Workload :: \"agnet\" };",
        "unknown_workload",
        "2:21",
        "no workload is called `agnet`",
    ),
    (
        "permit (principal, action, resource in Service::\"dp\");",
        "unknown_service",
        "1:40",
        "no service is called `dp`",
    ),
    (
        "permit (principal, action, resource in McpServer::\"file\");",
        "unknown_mcp_server",
        "1:40",
        "no MCP server is called `file`",
    ),
    (
        "permit (principal, action, resource == Tool::\"refunds\");",
        "unknown_tool",
        "1:40",
        "no tool is called `refunds`",
    ),
    (
        "permit (principal in Tenant::\"acne\", action, resource);",
        "unknown_tenant",
        "1:22",
        "nothing has the tenant `acne`",
    ),
    ("permit (principal in Kind::\"agents\", action, resource);", "unknown_value", "1:22", "agents"),
    (
        "permit (principal, action, resource) when { resource.sensitivity == Sensitivity::\"hihg\" };",
        "unknown_value",
        "1:69",
        "hihg",
    ),
    (
        "permit (principal, action, resource) when { Workload::\"web\".name == \"web\" };",
        "foreign_attributes",
        "1:45",
        "nothing is known but its name",
    ),
    // Types.
    (
        "permit (principal, action, resource) when { principal.color == \"red\" };",
        "unknown_attribute",
        "1:45",
        "`color`",
    ),
    (
        "permit (principal, action == Action::\"refund\", resource) when { context.arguments.amout == decimal(\"1.0\") };",
        "unknown_attribute",
        "1:65",
        "`arguments.amout`",
    ),
    (
        "permit (principal, action, resource) when { context.arguments.amount == decimal(\"1.0\") };",
        "unknown_attribute",
        "1:45",
        "`arguments.amount`",
    ),
    (
        "permit (principal, action == Action::\"refund\", resource) when { context.arguments.note == \"x\" };",
        "unguarded_attribute",
        "1:65",
        "`arguments.note`",
    ),
    (
        "permit (principal, action, resource) when { context.subject.id == \"x\" };",
        "unguarded_attribute",
        "1:45",
        "`subject`",
    ),
    (
        "permit (principal, action == Action::\"refund\", resource) when { context.arguments.amount > 5 };",
        "wrong_type",
        "1:65",
        "expected Long",
    ),
    (
        "permit (principal, action == Action::\"refund\", resource) when { context.arguments.amount.lessThan(5) };",
        "wrong_type",
        "1:99",
        "unexpected type",
    ),
    (
        "permit (principal, action, resource) when { resource.sensitivity == \"high\" };",
        "wrong_type",
        "1:45",
        "not compatible",
    ),
    ("permit (principal, action, resource) when { context.depth };", "wrong_type", "1:45", "expected Bool"),
    (
        "permit (principal, action == Action::\"refund\", resource) when { context.arguments.amount.lessThan(decimal(\"1.00000\")) };",
        "bad_literal",
        "1:99",
        "1.00000",
    ),
    (
        "permit (principal, action, resource) when { context.now < datetime(\"yesterday\") };",
        "bad_literal",
        "1:59",
        "yesterday",
    ),
    (
        "permit (principal, action, resource) when { decimal(principal.name).lessThan(decimal(\"1.0\")) };",
        "bad_literal",
        "1:45",
        "non-literal",
    ),
    ("permit (principal, action, resource) when { [].contains(1) };", "empty_set", "1:45", "empty set"),
    ("permit (principal, action, resource) when { principal.getTag(\"x\") == 1 };", "no_tags", "1:45", "access to tag"),
];

const IMPOSSIBLE: &str = "permit (principal, action, resource) when { resource is Service };";

fn with(cedar: &str) -> load::Policy {
    texts(vec![source("p.toml", &format!("{BASE}{TOOLS}")), source("actions.cedar", cedar)])
}

fn rendered(diagnostics: &[Diagnostic]) -> String {
    diagnostics.iter().map(|d| d.render(false)).collect::<Vec<_>>().join("\n")
}

fn wrong(case: &Bad) -> Option<String> {
    let (cedar, code, at, words) = *case;
    let policy = with(cedar);
    let shown = rendered(&policy.diagnostics);
    if policy.model.is_some() {
        return Some(format!("was taken:\n{cedar}\n{shown}"));
    }
    let Some(found) = policy.diagnostics.iter().find(|d| d.code == code && d.message.contains(words)) else {
        return Some(format!("no {code} with {words:?} for\n{cedar}\n{shown}"));
    };
    let place = found.place.as_ref().map_or(String::new(), |place| {
        let (line, column) = place.line_column();
        format!("{line}:{column}")
    });
    if place != at || !found.render(false).contains(&format!("actions.cedar:{at}")) {
        return Some(format!("{code} at {place} instead of {at} for\n{cedar}\n{shown}"));
    }
    found.help.is_empty().then(|| format!("{code} has no remedy for\n{cedar}\n{shown}"))
}

#[test]
fn bad_action_policies_are_refused_with_place_words_and_remedy() {
    assert_eq!(rendered(&with("").diagnostics), "");
    let faults: Vec<String> = OF_CEDAR.iter().filter_map(wrong).collect();
    assert!(faults.is_empty(), "{} of {}:\n{}", faults.len(), OF_CEDAR.len(), faults.join("\n"));
}

#[test]
fn faults_of_several_files_are_told_together() {
    let policy = texts(vec![
        source("p.toml", &format!("{BASE}{TOOLS}")),
        source(
            "a.cedar",
            "@id(\"x\") permit (principal, action, resource);\npermit (principal, action, resource) when { context.x };",
        ),
        source("b.cedar", "@id(\"x\")\npermit (principal, action, resource);\npermit"),
        source("c.cedar", "\n@id(\"x\") permit (principal, action, resource);"),
    ]);
    let found: Vec<(&str, String)> = policy
        .diagnostics
        .iter()
        .map(|d| (d.code, d.place.as_ref().map_or(String::new(), |place| place.describe())))
        .collect();
    // What a file that cannot be read defines is not known: nothing is said of what others mean.
    assert_eq!(found, [("syntax", "b.cedar:3:7".to_owned()), ("duplicate_name", "c.cedar:2:1".to_owned())]);
    assert!(policy.diagnostics[1].render(false).contains("a.cedar:1:1"));
    // Nor where the TOML is wrong; what is no Cedar is said all the same.
    let policy = texts(vec![source("p.toml", "x = "), source("a.cedar", "permit")]);
    let codes: Vec<&str> = policy.diagnostics.iter().map(|d| d.code).collect();
    assert_eq!(codes, ["syntax", "syntax"]);
}

#[test]
fn policies_that_can_never_apply_are_warned_of_and_taken() {
    for cedar in [IMPOSSIBLE, "permit (principal is Tool, action, resource);"] {
        let policy = with(cedar);
        let found: Vec<_> = policy
            .diagnostics
            .iter()
            .map(|d| (d.severity, d.code, d.place.as_ref().map(|p| p.line_column())))
            .collect();
        assert_eq!(
            found,
            [(Severity::Warning, "impossible_policy", Some((1, 1)))],
            "{}",
            rendered(&policy.diagnostics)
        );
        assert!(policy.model.is_some_and(|model| model.actions.policies().len() == 1));
    }
}

#[test]
fn what_is_said_of_tools_is_in_the_model() {
    use authd::policy::model::{Argument, ArgumentType, Reach, Record};
    use std::time::Duration;
    let model = with("@id(\"all\") @approval(\"plain\") permit (principal, action, resource);").model.unwrap();
    let names: Vec<&str> = model.tools.iter().map(|tool| tool.name.as_str()).collect();
    assert_eq!(names, ["read", "refund"]);
    let [read, refund] = &model.tools[..] else { panic!() };
    assert_eq!(
        (read.server, read.mcp_name.as_str(), read.service, read.other_arguments),
        (Some(0), "read_file", None, true)
    );
    assert_eq!((refund.server, refund.mcp_name.as_str(), refund.service), (None, "refund", Some(0)));
    assert_eq!(refund.permit.as_deref(), Some("agents-db"));
    let is = |kind, optional| Argument { kind, optional };
    let record =
        |fields: &[(&str, Argument)]| Record(fields.iter().map(|(n, a)| ((*n).to_owned(), a.clone())).collect());
    let address = record(&[("city", is(ArgumentType::String, false)), ("zip", is(ArgumentType::Long, true))]);
    assert_eq!(
        refund.arguments,
        record(&[
            ("amount", is(ArgumentType::Decimal, false)),
            ("order", is(ArgumentType::String, false)),
            ("note", is(ArgumentType::String, true)),
            ("lines", is(ArgumentType::Set(Box::new(ArgumentType::String)), false)),
            ("tags", is(ArgumentType::Set(Box::new(ArgumentType::Long)), true)),
            ("address", is(ArgumentType::Record(address), false)),
        ])
    );
    let finance = &model.approvers[0];
    assert_eq!(
        (finance.users.as_slice(), finance.may_be_subject),
        (&["1001".to_owned(), "alice".to_owned()][..], true)
    );
    assert_eq!((finance.ttl, finance.valid), (Duration::from_secs(86_400), Duration::from_secs(3_600)));
    let step_up = finance.step_up.as_ref().unwrap();
    assert_eq!((step_up.issuer, step_up.max_age), (0, Some(Duration::from_secs(300))));
    let plain = &model.approvers[1];
    assert_eq!(
        (plain.ttl, plain.valid, plain.may_be_subject),
        (Duration::from_secs(900), Duration::from_secs(300), false)
    );
    let Reach::Command { argv, user, environment } = &model.mcp_servers[0].reach else { panic!() };
    assert_eq!((argv.len(), user.as_str(), environment["HOME"].as_str()), (3, "1001", "/srv"));
    assert_eq!(model.mcp_servers[1].reach, Reach::Url("https://tools.example.org/mcp".to_owned()));
    assert_eq!(model.actions.policy("all").unwrap().approval, Some((1, "plain".to_owned())));
}

/// What is allowed and hardly meant: policies, and warnings with their places, but for those of approvers.
#[test]
fn lints_find_what_is_hardly_meant_of_actions() {
    let high = format!("{BASE}{TOOLS}").replace("name = \"db\"\n", "name = \"db\"\nsensitivity = \"high\"\n");
    let all = "permit (principal, action, resource);";
    for (cedar, expected) in [
        ("", vec![("uncallable_tool", "p.toml"), ("uncallable_tool", "p.toml")]),
        ("permit (principal, action == Action::\"read\", resource);", vec![("uncallable_tool", "p.toml")]),
        (all, vec![("unapproved_tool", "a.cedar")]),
        ("permit (principal, action, resource) when { context.depth == 1 };", vec![]),
        ("@approval(\"plain\") permit (principal, action, resource);", vec![]),
        (
            "permit (principal in Kind::\"person\", action, resource) when { context.depth == 1 };",
            vec![("uncallable_tool", "p.toml"), ("uncallable_tool", "p.toml")],
        ),
        (
            "permit (principal, action, resource) when { context.depth == 1 }; forbid (principal, action == Action::\"read\", resource);",
            vec![("uncallable_tool", "p.toml")],
        ),
        (
            "permit (principal, action, resource) when { context.depth == 1 }; forbid (principal in Kind::\"service\", action, resource);",
            vec![],
        ),
        (
            "permit (principal, action, resource) when { context.depth == 1 }; forbid (principal, action == Action::\"read\", resource == Tool::\"refund\");",
            vec![("idle_policy", "a.cedar")],
        ),
    ] {
        let policy = texts(vec![source("p.toml", &high), source("a.cedar", cedar)]);
        let model = policy.model.unwrap_or_else(|| panic!("{}", rendered(&policy.diagnostics)));
        let warnings = lint(&model);
        let is_of_actions = |d: &&Diagnostic| ["uncallable_tool", "unapproved_tool", "idle_policy"].contains(&d.code);
        let found: Vec<(&str, &str)> =
            warnings.iter().filter(is_of_actions).map(|d| (d.code, &*d.place.as_ref().unwrap().source.name)).collect();
        assert_eq!(found, expected, "{cedar}");
        let unused = warnings.iter().filter(|d| d.message.contains("asks approvers")).count();
        assert_eq!(unused, if cedar.contains("@approval") { 1 } else { 2 });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn mutated_action_policies_never_panic(edits in proptest::collection::vec(edit(), 1..8)) {
        let sample = include_str!("../../../packaging/policy.d/agents.cedar.example");
        let policy = with(&apply(sample, &edits));
        for found in &policy.diagnostics {
            found.render(false);
            found.json();
        }
        if let Some(model) = &policy.model {
            lint(model);
        }
    }
}
