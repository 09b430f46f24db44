//! The templates of packaging/templates: each is a whole policy, asks its callers for what it says, and refuses the rest.

use std::{collections::BTreeSet, fs, path::PathBuf};

use authd::{
    decisions::{Call, Outcome, Subject},
    digest::Digest,
    grants::{
        proof::{Binding, Shown, Token},
        terms::{self, Claimant},
    },
    policy::{
        compile::{Moment, Options, Registry, compile},
        diagnostic::Diagnostic,
        explain::{From, Policy, To},
        file::Sensitivity,
        image::Image,
        lint::lint,
        load,
        model::{self, Model, Object, Rule},
    },
};
use serde_json::Value;

use crate::moment;

const NAMES: [&str; 5] = ["agent-runtime", "api-client", "job", "service-account", "tool-gateway"];
/// A Tuesday, 1:30 in Berlin.
const NIGHT: &str = "2026-11-24T00:30:00Z";
const DAY: &str = "2026-11-24T12:00:00Z";

fn directory() -> PathBuf {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/templates").into()
}

fn names() -> BTreeSet<String> {
    let entries = fs::read_dir(directory()).unwrap().map(Result::unwrap);
    let folders = entries.filter(|entry| entry.file_type().unwrap().is_dir());
    folders.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

struct Template {
    name: String,
    model: Model,
    registry: Registry,
    image: Image,
    at: Moment,
}

impl Template {
    /// As the daemon loads it.
    fn new(name: &str, at: &str) -> Self {
        let read = load::directory(&directory().join(name));
        let shown: Vec<String> = read.diagnostics.iter().map(|found| found.render(false)).collect();
        assert_eq!(shown.concat(), "", "{name}");
        let model = read.model.unwrap();
        let at = moment(at);
        let mut registry = Registry::default();
        registry.assign(&model, &Options::default());
        let image = compile(&model, &mut registry, &Options::default(), at).unwrap();
        Self { name: name.to_owned(), model, registry, image, at }
    }

    /// Verdict, reason and rule of a flow, and the proofs that the rule asks for.
    fn flow(&self, from: &str, to: &str) -> String {
        let options = Options::default();
        let Self { model, registry, image, at, .. } = self;
        let policy = Policy { model, registry, options: &options, image, moment: *at };
        let from = From::parse(from, model).unwrap_or_else(|| panic!("{}: `{from}` is nobody", self.name));
        let explained = policy.explain(from, to.parse::<To>().unwrap());
        let requires = explained.steps.iter().find(|step| step.rule == explained.rule).map(|step| &step.requires);
        let mut told = vec![explained.verdict.to_owned(), explained.reason.to_owned()];
        told.extend(explained.rule.clone());
        told.extend(requires.filter(|proofs| !proofs.is_empty()).map(|proofs| format!("({})", proofs.join(", "))));
        told.join(" ")
    }

    fn workload(&self, name: &str) -> usize {
        self.model.workloads.iter().position(|workload| workload.name == name).unwrap()
    }

    /// Outcome of a call, with the policies that decided it, by an agent that acts for carol with these scopes.
    fn call(&self, from: &str, tool: &str, arguments: &str, scopes: Option<&[&str]>, actors: usize) -> String {
        let Value::Object(arguments) = serde_json::from_str(arguments).unwrap() else { panic!("{arguments}") };
        let subject = scopes.map(|scopes| Subject {
            issuer: "corp".to_owned(),
            id: "carol@example.org".to_owned(),
            scopes: scopes.iter().map(ToString::to_string).collect(),
            ..Subject::default()
        });
        let spiffe_id = format!("spiffe://example.org/{from}/1");
        let decision = self.model.actions.decide(&Call {
            workload: self.workload(from),
            spiffe_id: &spiffe_id,
            instance: "/agents.slice/1.scope",
            tool,
            arguments: &arguments,
            subject: subject.as_ref(),
            actors: &vec![spiffe_id.clone(); actors],
            now: self.at.wall,
        });
        let mut told = vec![decision.reason().to_owned()];
        told.extend(decision.policies);
        if let Outcome::Pending(ways) = &decision.outcome {
            told.extend(ways.iter().map(|way| format!("({})", way.name)));
        }
        told.join(" ")
    }

    fn rule(&self, name: &str) -> &Rule {
        self.model.rules.iter().find(|rule| rule.name == name).unwrap_or_else(|| panic!("{}: {name}", self.name))
    }

    /// What comes of a token that is shown for a rule, by a workload or from an address: `granted`, or why not.
    fn shown(&self, rule: &str, from: &str, token: &Token) -> &'static str {
        let claimant = match from.parse() {
            Ok(address) => Claimant::Address(address),
            Err(_) => Claimant::Workload { index: self.workload(from), spiffe_id: "spiffe://example.org/x" },
        };
        let proofs = [Shown::Token(Box::new(token.clone()))];
        terms::check(self.rule(rule), &self.model, claimant, &proofs, self.at.wall)
            .map_or_else(|unmet| unmet.reason(), |_| "granted")
    }
}

#[test]
fn there_is_a_template_for_each_kind_of_caller() {
    let expected: BTreeSet<String> = NAMES.map(str::to_owned).into();
    assert_eq!(names(), expected);
    let readme = fs::read_to_string(directory().join("README.md")).unwrap();
    for name in NAMES {
        assert!(readme.contains(&format!("[{name}]({name}/)")), "the README does not name {name}");
    }
}

#[test]
fn templates_load_without_a_warning_and_ask_for_enough() {
    for name in names() {
        let Template { model, .. } = Template::new(&name, DAY);
        let warnings: Vec<String> = lint(&model).iter().map(|found: &Diagnostic| found.render(false)).collect();
        assert_eq!(warnings.concat(), "", "{name}");
        for rule in model.rules.iter().filter(|rule| !rule.deny) {
            let about = format!("rule {} of {name}", rule.name);
            assert!(!rule.from.contains(&model::Subject::Any) && !rule.to.contains(&Object::Any), "{about} is for any");
            let high = rule.to.iter().any(|object| match object {
                Object::Service(index) => model.services[*index].sensitivity == Sensitivity::High,
                Object::Any => true,
            });
            assert!(!high || rule.token.as_ref().is_some_and(|token| token.bound), "{about} asks for no bound token");
            if let Some(token) = &rule.token {
                assert!(token.audience.is_some() && !token.scopes.is_empty(), "{about} takes too many tokens");
            }
        }
    }
}

/// Template, time, who, to where, and what becomes of it.
const FLOWS: &[(&str, &str, &str, &str, &str)] = &[
    ("api-client", DAY, "supplier", "192.0.2.10:8445/tcp", "denied proof_required supplier-reads-catalog (api-key)"),
    ("api-client", DAY, "partner", "192.0.2.10:8443/tcp", "denied proof_required partner-reads-orders (token)"),
    (
        "api-client",
        DAY,
        "2001:db8:2::7",
        "[2001:db8:1::10]:8443/tcp",
        "denied proof_required partner-reads-orders (token)",
    ),
    (
        "api-client",
        DAY,
        "partner-writer",
        "192.0.2.10:8444/tcp",
        "denied proof_required partner-writes-orders (mtls, token)",
    ),
    ("api-client", DAY, "shop-sync", "192.0.2.80:443/tcp", "denied proof_required sync-calls-shop (token)"),
    ("api-client", DAY, "supplier", "192.0.2.10:8443/tcp", "denied no_rule"),
    ("api-client", DAY, "supplier", "192.0.2.10:8444/tcp", "denied no_rule"),
    ("api-client", DAY, "partner", "192.0.2.10:8444/tcp", "denied no_rule"),
    ("api-client", DAY, "192.0.2.99", "192.0.2.10:8443/tcp", "denied no_rule"),
    ("api-client", DAY, "unmanaged", "127.0.0.1:8445/tcp", "denied no_rule"),
    ("api-client", DAY, "shop-sync", "192.0.2.81:443/tcp", "denied no_rule"),
    ("api-client", DAY, "shop-sync", "127.0.0.1:8443/tcp", "denied no_rule"),
    ("api-client", DAY, "orders", "192.0.2.80:443/tcp", "denied no_rule"),
    (
        "service-account",
        DAY,
        "billing",
        "192.0.2.30:8443/tcp",
        "denied proof_required billing-posts-to-ledger (mtls, token)",
    ),
    ("service-account", DAY, "billing", "192.0.2.31:4317/tcp", "allowed rule billing-sends-traces"),
    (
        "service-account",
        DAY,
        "ledger-caller",
        "192.0.2.20:9443/tcp",
        "denied node_identity_missing ledger-asks-billing (node)",
    ),
    ("service-account", DAY, "billing", "192.0.2.30:22/tcp", "denied no_rule"),
    ("service-account", DAY, "billing", "192.0.2.32:8443/tcp", "denied no_rule"),
    ("service-account", DAY, "billing", "203.0.113.7:443/tcp", "denied no_rule"),
    ("service-account", DAY, "unmanaged", "127.0.0.1:9443/tcp", "denied no_rule"),
    ("job", NIGHT, "nightly-export", "192.0.2.50:8443/tcp", "denied proof_required export-loads-warehouse (token)"),
    ("job", DAY, "nightly-export", "192.0.2.50:8443/tcp", "denied no_rule"),
    ("job", NIGHT, "nightly-export", "192.0.2.50:22/tcp", "denied no_rule"),
    ("job", NIGHT, "nightly-export", "192.0.2.51:8443/tcp", "denied no_rule"),
    ("job", NIGHT, "nightly-export", "127.0.0.53:53/udp", "denied denied_by_rule export-resolves-nothing"),
    ("agent-runtime", DAY, "assistant", "127.0.0.1:8081/tcp", "allowed rule assistant-asks-model"),
    ("agent-runtime", DAY, "model-proxy", "192.0.2.90:443/tcp", "allowed rule proxy-calls-vendor"),
    (
        "agent-runtime",
        DAY,
        "assistant",
        "192.0.2.60:443/tcp",
        "denied proof_required assistant-reads-tickets (action, token)",
    ),
    (
        "agent-runtime",
        DAY,
        "assistant",
        "192.0.2.61:8443/tcp",
        "denied proof_required assistant-refunds (action, token)",
    ),
    (
        "agent-runtime",
        DAY,
        "assistant",
        "192.0.2.62:8443/tcp",
        "denied proof_required assistant-closes-accounts (action, approval, token)",
    ),
    ("agent-runtime", DAY, "assistant", "192.0.2.90:443/tcp", "denied no_rule"),
    ("agent-runtime", DAY, "assistant", "203.0.113.7:443/tcp", "denied no_rule"),
    ("agent-runtime", DAY, "assistant", "127.0.0.53:53/udp", "denied denied_by_rule assistant-resolves-nothing"),
    ("agent-runtime", DAY, "model-proxy", "192.0.2.61:8443/tcp", "denied no_rule"),
    ("agent-runtime", DAY, "unmanaged", "127.0.0.1:8081/tcp", "denied no_rule"),
    ("tool-gateway", DAY, "unmanaged", "127.0.0.1:8931/tcp", "allowed rule gateway-calls-files"),
    ("tool-gateway", DAY, "assistant", "127.0.0.1:8931/tcp", "denied denied_by_rule agents-not-around-gateway"),
    ("tool-gateway", DAY, "reviewer", "192.0.2.60:443/tcp", "denied denied_by_rule agents-not-around-gateway"),
    ("tool-gateway", DAY, "assistant", "203.0.113.7:443/tcp", "denied no_rule"),
    ("tool-gateway", DAY, "assistant", "127.0.0.53:53/udp", "denied denied_by_rule agents-resolve-nothing"),
    ("tool-gateway", DAY, "files-server", "192.0.2.60:443/tcp", "denied no_rule"),
    ("tool-gateway", DAY, "198.51.100.7", "192.0.2.20:8931/tcp", "denied no_rule"),
];

#[test]
fn templates_let_pass_what_is_meant_and_nothing_else() {
    for (name, at, from, to, expected) in FLOWS {
        assert_eq!(Template::new(name, at).flow(from, to), *expected, "{name}: {from} to {to} at {at}");
    }
    for name in names() {
        let refused = |case: &&(&str, &str, &str, &str, &str)| {
            case.0 == name && case.4.starts_with("denied") && !case.4.contains('(')
        };
        assert!(FLOWS.iter().filter(refused).count() >= 2, "nothing says what {name} refuses");
    }
}

const READ: Option<&[&str]> = Some(&["tickets:read"]);
const REFUND: Option<&[&str]> = Some(&["payments:refund"]);
const CLOSE: Option<&[&str]> = Some(&["accounts:close"]);

/// Template, who, tool, arguments, scopes of the one for whom it acts, how many act, and what becomes of it.
type Asked =
    (&'static str, &'static str, &'static str, &'static str, Option<&'static [&'static str]>, usize, &'static str);

const CALLS: &[Asked] = &[
    ("agent-runtime", "assistant", "read-ticket", r#"{"ticket":7}"#, READ, 1, "action_permitted read-tickets"),
    (
        "agent-runtime",
        "assistant",
        "refund",
        r#"{"amount":"50","order":"o"}"#,
        REFUND,
        1,
        "action_permitted small-refunds",
    ),
    (
        "agent-runtime",
        "assistant",
        "refund",
        r#"{"amount":"50.01","order":"o"}"#,
        REFUND,
        1,
        "action_needs_approval large-refunds (duty-leads)",
    ),
    (
        "agent-runtime",
        "assistant",
        "close-account",
        r#"{"account":"a","reason":"r"}"#,
        CLOSE,
        1,
        "action_needs_approval close-accounts (duty-leads)",
    ),
    ("agent-runtime", "assistant", "refund", r#"{"amount":"1000.01","order":"o"}"#, REFUND, 1, "action_not_permitted"),
    ("agent-runtime", "assistant", "refund", r#"{"amount":"-1","order":"o"}"#, REFUND, 1, "action_not_permitted"),
    (
        "agent-runtime",
        "assistant",
        "refund",
        r#"{"amount":"1","order":"o","to":"x"}"#,
        REFUND,
        1,
        "action_bad_arguments",
    ),
    ("agent-runtime", "assistant", "refund", r#"{"amount":"1","order":"o"}"#, READ, 1, "action_not_permitted"),
    (
        "agent-runtime",
        "assistant",
        "refund",
        r#"{"amount":"1","order":"o"}"#,
        None,
        0,
        "action_forbidden for-somebody-only",
    ),
    ("agent-runtime", "assistant", "refund", r#"{"amount":"1","order":"o"}"#, REFUND, 2, "action_forbidden no-chains"),
    ("agent-runtime", "model-proxy", "refund", r#"{"amount":"1","order":"o"}"#, REFUND, 1, "action_not_permitted"),
    ("agent-runtime", "assistant", "shell", "{}", REFUND, 1, "action_unknown_tool"),
    ("tool-gateway", "reviewer", "search-tickets", r#"{"query":"q"}"#, None, 0, "action_permitted read"),
    ("tool-gateway", "reviewer", "read-file", r#"{"path":"/srv/support/faq"}"#, None, 0, "action_permitted read"),
    ("tool-gateway", "assistant", "reply", r#"{"ticket":7,"text":"yes"}"#, None, 0, "action_permitted replies"),
    (
        "tool-gateway",
        "assistant",
        "reply",
        r#"{"ticket":7,"text":"see https://example.org"}"#,
        None,
        0,
        "action_needs_approval replies-with-links (support-leads)",
    ),
    (
        "tool-gateway",
        "assistant",
        "delete-ticket",
        r#"{"ticket":7}"#,
        None,
        0,
        "action_needs_approval deletions (support-leads)",
    ),
    ("tool-gateway", "reviewer", "reply", r#"{"ticket":7,"text":"yes"}"#, None, 0, "action_not_permitted"),
    ("tool-gateway", "reviewer", "delete-ticket", r#"{"ticket":7}"#, None, 0, "action_not_permitted"),
    ("tool-gateway", "files-server", "read-file", r#"{"path":"/srv/support/faq"}"#, None, 0, "action_not_permitted"),
    (
        "tool-gateway",
        "assistant",
        "read-file",
        r#"{"path":"/srv/support/../../etc/shadow"}"#,
        None,
        0,
        "action_forbidden support-files-only",
    ),
    (
        "tool-gateway",
        "assistant",
        "read-file",
        r#"{"path":"/etc/passwd"}"#,
        None,
        0,
        "action_forbidden support-files-only",
    ),
    ("tool-gateway", "assistant", "search-tickets", r#"{"query":"q"}"#, READ, 2, "action_forbidden no-chains"),
];

#[test]
fn agents_of_templates_call_what_is_meant_and_nothing_else() {
    for (name, from, tool, arguments, scopes, actors, expected) in CALLS {
        let told = Template::new(name, DAY).call(from, tool, arguments, *scopes, *actors);
        assert_eq!(told, *expected, "{name}: {from} calls {tool} with {arguments} for {scopes:?}");
    }
}

#[test]
fn agents_see_the_tools_that_they_may_call() {
    for (name, from, expected) in [
        ("agent-runtime", "assistant", &["close-account", "read-ticket", "refund"][..]),
        ("agent-runtime", "model-proxy", &[]),
        ("tool-gateway", "assistant", &["delete-ticket", "read-file", "reply", "search-tickets"]),
        ("tool-gateway", "reviewer", &["read-file", "search-tickets"]),
        ("tool-gateway", "files-server", &[]),
    ] {
        let template = Template::new(name, DAY);
        assert_eq!(template.model.actions.may_call(template.workload(from)), expected, "{name}: {from}");
    }
}

#[test]
fn tokens_that_templates_do_not_mean_get_no_grant() {
    for (name, at, rule, from, audience, scope) in [
        ("api-client", DAY, "partner-reads-orders", "198.51.100.7", "https://orders.example.org", "orders:read"),
        ("api-client", DAY, "sync-calls-shop", "shop-sync", "https://shop.example.org", "stock:write"),
        ("job", NIGHT, "export-loads-warehouse", "nightly-export", "https://warehouse.example.org", "exports:load"),
    ] {
        let template = Template::new(name, at);
        let asked = template.rule(rule).token.as_ref().unwrap();
        let good = Token {
            issuer: "corp".to_owned(),
            iss: "https://idp.example.org".to_owned(),
            subject: asked.subjects.first().cloned(),
            client_id: None,
            audience: vec![audience.to_owned()],
            scopes: vec![scope.to_owned()],
            jti: None,
            hash: Digest::of(b"a token"),
            key_id: None,
            bound_to: vec![Binding::Dpop],
            issued_at: None,
            not_after: "2026-11-24T13:00:00Z".parse().unwrap(),
            ends_with: Vec::new(),
            subject_issuer: None,
            actors: Vec::new(),
        };
        let shown = |change: fn(&mut Token)| {
            let mut token = good.clone();
            change(&mut token);
            template.shown(rule, from, &token)
        };
        assert_eq!(shown(|_| ()), "granted", "{name}");
        assert_eq!(shown(|token| token.issuer = "own".to_owned()), "token_wrong_issuer", "{name}");
        assert_eq!(shown(|token| token.audience = vec!["https://wiki.example.org".to_owned()]), "token_wrong_audience");
        assert_eq!(shown(|token| token.scopes = vec!["openid".to_owned()]), "token_wrong_scope", "{name}");
        // The one of a caller who may have no key yet: its networks, its ten minutes and its scope have to do.
        let unbound = if rule == "partner-reads-orders" { "granted" } else { "token_not_bound" };
        assert_eq!(shown(|token| token.bound_to.clear()), unbound, "{name}");
        assert_eq!(template.shown(rule, "203.0.113.99", &good), "rule_not_for_caller", "{name}");
    }
    let day = Template::new("job", DAY);
    let rule = day.rule("export-loads-warehouse");
    let run = Claimant::Workload { index: 0, spiffe_id: "spiffe://example.org/nightly-export/1" };
    let unmet = terms::check(rule, &day.model, run, &[], day.at.wall).unwrap_err();
    assert_eq!(unmet.reason(), "rule_not_in_force");
}
