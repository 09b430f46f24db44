//! Policy files: what is refused, where and with which words; what is warned of; and that nothing that anybody can write
//! into a file makes the reader fall over.

mod bad;
mod bad_agents;
mod bad_nodes;
mod bad_tools;
mod decisions;
mod lints;
mod templates;

use std::time::Duration;

use authd::policy::{
    compile::{CompileError, Moment, Options, Registry, compile},
    diagnostic::{Diagnostic, Source},
    explain::{From, Policy},
    lint::lint,
    load::{self, texts},
    model::{Keys, Model, TokenCheck},
};
use authd::proofs::jws::Algorithm;
use proptest::prelude::*;

use self::{
    bad::ADDED,
    bad_nodes::OF_NODES,
    bad_tools::{OF_TOOLS, TOOLS},
    decisions::OFFICE_HOURS,
};

/// A policy without a fault, to which cases add theirs.
const BASE: &str = r#"trust_domain = "example.org"
[[workload]]
name = "web"
kind = "service"
cgroup = "/web"
tenant = "acme"
[[workload]]
name = "agent"
kind = "agent"
cgroup = "/agents/*"
[[peer]]
name = "office"
networks = ["192.0.2.0/24"]
[[service]]
name = "db"
addresses = ["10.0.0.0/8"]
ports = ["tcp/5432"]
[[service]]
name = "api"
workload = "web"
ports = ["tcp/8443"]
[[issuer]]
name = "corp"
kind = "jwt"
issuer = "https://idp.example.org"
jwks_file = "/etc/authd/jwks.json"
algorithms = ["ES256"]
[[authority]]
name = "pki"
bundle = "pki/ca.pem"
trust_domain = "example.org"
"#;

fn source(name: &str, text: &str) -> Source {
    Source { name: name.into(), text: text.into() }
}

fn read(text: &str) -> load::Policy {
    texts(vec![source("p.toml", text)])
}

fn model(text: &str) -> Model {
    let policy = read(text);
    let shown: Vec<String> = policy.diagnostics.iter().map(|d| d.render(false)).collect();
    policy.model.unwrap_or_else(|| panic!("refused:\n{}", shown.join("\n")))
}

#[test]
fn findings_in_two_files_name_both() {
    let policy = texts(vec![
        source(
            "a.toml",
            "trust_domain = \"example.org\"\n[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = \"/w\"\n",
        ),
        source("b.toml", "trust_domain = \"example.com\"\n\n[[peer]]\nname = \"w\"\nnetworks = [\"10.0.0.1\"]\n"),
    ]);
    let rendered: Vec<String> = policy.diagnostics.iter().map(|d| d.render(false)).collect();
    assert_eq!(policy.diagnostics.len(), 2, "{}", rendered.join("\n"));
    assert!(rendered[0].contains("b.toml:1:16") && rendered[0].contains("a.toml:1:16"), "{}", rendered[0]);
    assert!(rendered[1].contains("b.toml:4:8") && rendered[1].contains("a.toml:3:8"), "{}", rendered[1]);
}

#[test]
fn a_misspelt_name_gets_the_right_one_as_remedy() {
    let policy = read(&format!("{BASE}[[rule]]\nname = \"r\"\nfrom = [\"wep\"]\nto = [\"db\"]\n"));
    assert_eq!(policy.diagnostics[0].help, "did you mean `web`?");
}

#[test]
fn directories_that_say_nothing_or_cannot_be_trusted_are_refused() {
    use std::os::unix::fs::PermissionsExt;
    let directory = std::env::temp_dir().join(format!("authd-policy-{}", std::process::id()));
    let codes = |d: &[Diagnostic]| d.iter().map(|d| (d.code, d.message.clone())).collect::<Vec<_>>();
    let refused = load::directory(&directory);
    assert_eq!(codes(&refused.diagnostics)[0].0, "unreadable");
    std::fs::create_dir_all(&directory).unwrap();
    assert_eq!(codes(&load::directory(&directory).diagnostics)[0].0, "no_files");
    let file = directory.join("a.toml");
    std::fs::write(&file, BASE).unwrap();
    std::fs::write(directory.join(".a.toml.swp"), "nonsense = ").unwrap();
    std::fs::write(directory.join("readme.txt"), "nonsense = ").unwrap();
    assert!(load::directory(&directory).model.is_some());
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666)).unwrap();
    let refused = codes(&load::directory(&directory).diagnostics);
    assert!(refused[0].1.contains("chmod o-w"), "{refused:?}");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::create_dir(directory.join("b.toml")).unwrap();
    assert!(codes(&load::directory(&directory).diagnostics)[0].1.contains("no regular file"));
    std::fs::remove_dir(directory.join("b.toml")).unwrap();
    std::fs::write(directory.join("c.toml"), [0xff, 0xfe]).unwrap();
    assert_eq!(codes(&load::directory(&directory).diagnostics)[0].0, "unreadable");
    std::fs::remove_file(directory.join("c.toml")).unwrap();
    // Action policies are no less.
    let actions = directory.join("a.cedar");
    std::fs::write(&actions, "permit (principal, action, resource);").unwrap();
    std::fs::write(directory.join(".a.cedar.swp"), "nonsense").unwrap();
    let policies = |policy: load::Policy| policy.model.map(|model| model.actions.policies().len());
    assert_eq!(policies(load::directory(&directory)), Some(1));
    let names: Vec<String> = load::read_sources(&directory).0.iter().map(|s| s.name.to_string()).collect();
    assert_eq!(names, ["a.cedar", "a.toml"]);
    std::fs::set_permissions(&actions, std::fs::Permissions::from_mode(0o666)).unwrap();
    assert!(codes(&load::directory(&directory).diagnostics)[0].1.contains("chmod o-w"));
    std::fs::set_permissions(&actions, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::write(&actions, "permit").unwrap();
    assert_eq!(codes(&load::directory(&directory).diagnostics)[0].0, "syntax");
    std::fs::remove_file(&file).unwrap();
    assert_eq!(codes(&load::directory(&directory).diagnostics)[0].0, "no_files");
    std::fs::remove_dir_all(&directory).unwrap();
}

/// What is allowed and hardly meant: the addition, the warning's code, and some of its words. `None`: no warning.
#[test]
fn lints_find_what_is_hardly_meant() {
    let rule = |name: &str, from: &str, to: &str, more: &str| {
        format!("[[rule]]\nname = \"{name}\"\nfrom = [\"{from}\"]\nto = [\"{to}\"]\n{more}\n")
    };
    let all = rule("a", "any", "db", "");
    let by_node = "require = [\"node\"]";
    let node = |more: &str| format!("[[node]]\nname = \"n\"\nspiffe_id = \"spiffe://example.org/node/n\"\n{more}\n");
    let peer = "[[peer]]\nname = \"p\"\nspiffe_id = \"spiffe://example.org/p\"\n";
    let token = |audience| format!("require = [\"token\"]\ntoken = {{ issuer = \"corp\", audience = \"{audience}\" }}");
    let cases = [
        (rule("a", "web", "db", "") + &rule("b", "any", "db", "action = \"deny\""), Some(("unreachable", "rule `a` never allows"))),
        (rule("a", "web", "db", "") + &rule("b", "agent", "db", "action = \"deny\""), None),
        (
            rule("a", "web", "db", "") + &rule("b", "any", "db", "action = \"deny\"\nwhen = { hours = \"01:00-02:00\" }"),
            None,
        ),
        (all.clone() + &rule("b", "web", "db", ""), Some(("pointless", "rule `b` makes no difference: rule `a`"))),
        (all.clone() + &rule("b", "web", "db", "require = [\"mtls\"]"), Some(("pointless", "rule `b` makes no difference"))),
        (rule("a", "any", "db", "require = [\"mtls\"]") + &rule("b", "web", "db", ""), None),
        (
            "[[service]]\nname = \"vault\"\naddresses = [\"10.1.0.1\"]\nports = [\"tcp/8200\"]\nsensitivity = \"high\"\n".to_owned()
                + &rule("a", "web", "vault", ""),
            Some(("weak_proof", "rule `a` asks for no proof, and service `vault` is of high sensitivity")),
        ),
        (
            "[[service]]\nname = \"idle\"\naddresses = [\"10.1.0.1\"]\nports = [\"tcp/1\"]\n".to_owned() + &all,
            Some(("unused", "no rule names service `idle`")),
        ),
        (
            rule("a", "web", "db", "require = [\"token\"]\ntoken = { issuer = \"corp\" }"),
            Some(("any_audience", "rule `a` takes tokens for any audience")),
        ),
        (rule("a", "web", "db", &token("a")) + &rule("b", "web", "db", &token("b")), None),
        (
            rule("a", "web", "db", &token("a")) + &rule("b", "web", "db", &token("a")),
            Some(("pointless", "rule `b` makes no difference: rule `a`")),
        ),
        (rule("a", "any", "api", by_node), Some(("unvouched", "rule `a` lets nobody in"))),
        (node("") + &rule("a", "any", "api", by_node), Some(("unvouched", "rule `a` lets nobody in"))),
        (node("") + &all, Some(("unused", "node `n` may vouch for nobody"))),
        (node("speaks_for = [\"spiffe://example.org/x/*\"]") + &rule("a", "any", "api", by_node), None),
        (
            node("speaks_for = [\"spiffe://example.org/x/*\"]") + peer + &rule("a", "p", "api", by_node),
            Some(("unvouched", "rule `a` never lets peer `p` in: no node may vouch for `spiffe://example.org/p`")),
        ),
        (node("speaks_for = [\"spiffe://example.org/p\"]") + peer + &rule("a", "p", "api", by_node), None),
        (
            node("speaks_for = [\"spiffe://example.org/p\"]")
                + "[[service]]\nname = \"till\"\nworkload = \"web\"\nports = [\"tcp/9\"]\nsensitivity = \"high\"\n"
                + &rule("a", "any", "till", by_node),
            Some(("weak_proof", "rule `a` asks only where its callers run, and service `till`")),
        ),
    ];
    for (text, expected) in cases {
        let text = format!("{BASE}{}{text}", rule("office", "office", "api", ""));
        // The base's own service must not be warned of.
        let text = if text.contains("\"db\"]\n") { text } else { text + &rule("z", "agent", "db", "") };
        let found: Vec<(&str, String)> = lint(&model(&text)).into_iter().map(|d| (d.code, d.message)).collect();
        match expected {
            None => assert!(found.is_empty(), "{found:?} for\n{text}"),
            Some((code, words)) => {
                assert!(found.iter().any(|(c, m)| *c == code && m.contains(words)), "{found:?} for\n{text}");
            }
        }
    }
}

#[test]
fn issuers_and_what_rules_ask_of_their_tokens_are_in_the_model() {
    let settings = "leeway = \"10s\"\naccess_token_type = true\nmax_ttl = \"15m\"\n[[authority]]";
    let base = BASE.replacen("[[authority]]", settings, 1);
    let model = model(&format!(
        "{base}[[issuer]]\nname = \"local\"\nkind = \"introspection\"\nissuer = \"http://127.0.0.1:4000\"\n\
         introspection_url = \"http://127.0.0.1:4000/introspect\"\nclient_id = \"authd\"\nclient_secret_file = \"s\"\n\
         allow_private = true\n\
         [[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nrequire = [\"token\"]\n\
         token = {{ issuer = \"local\", audience = \"db\", scopes = [\"w\", \"r\"], bound = true, subjects = [\"x\"] }}\n"
    ));
    let [corp, local, own] = &model.issuers[..] else { panic!("{:?}", model.issuers) };
    assert_eq!((own.name.as_str(), &own.check), ("own", &TokenCheck::Own));
    let keys = Keys::File("/etc/authd/jwks.json".into());
    assert_eq!(corp.check, TokenCheck::Jwt { keys, algorithms: vec![Algorithm::Es256] });
    let policy = corp.policy();
    assert_eq!((policy.max_ttl, policy.leeway.get()), (Some(Duration::from_secs(900)), Duration::from_secs(10)));
    assert!(policy.require_at_jwt && !corp.allow_private && local.allow_private);
    let expected = TokenCheck::Introspection {
        url: "http://127.0.0.1:4000/introspect".into(),
        client_id: "authd".into(),
        client_secret_file: Some("s".into()),
    };
    assert_eq!((&local.check, local.policy().leeway.get()), (&expected, Duration::from_secs(30)));
    let token = model.rules[0].token.as_ref().unwrap();
    assert_eq!((token.issuer, token.audience.as_deref(), token.bound), (1, Some("db"), true));
    assert_eq!((&token.scopes[..], &token.subjects[..]), (&["r".into(), "w".into()][..], &["x".into()][..]));
}

fn moment(text: &str) -> Moment {
    Moment { wall: text.parse().unwrap(), monotonic: 1_000_000_000 }
}

#[test]
fn more_workloads_than_tables_hold_are_refused() {
    let mut text = "trust_domain = \"example.org\"\n".to_owned();
    for n in 0..authd_common::tables::MAX_WORKLOADS {
        text += &format!("[[workload]]\nname = \"w{n}\"\nkind = \"job\"\ncgroup = \"/w/{n}\"\n");
    }
    let model = model(&text);
    let mut registry = Registry::default();
    registry.assign(&model, &Options::default());
    let refused = compile(&model, &mut registry, &Options::default(), moment("2026-11-23T12:00:00Z"));
    assert_eq!(refused.err(), Some(CompileError::Workloads(authd_common::tables::MAX_WORKLOADS as usize)));
}

#[test]
fn schema_accepts_the_base_and_the_samples() {
    let schema = serde_json::to_value(schemars::schema_for!(authd::policy::file::File)).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/policy.d/example.toml");
    for text in
        [BASE.to_owned(), format!("{BASE}{NODES}"), format!("{BASE}{TOOLS}"), std::fs::read_to_string(sample).unwrap()]
    {
        let value: serde_json::Value = toml::from_str(&text).unwrap();
        let errors: Vec<String> = validator.iter_errors(&value).map(|e| e.to_string()).collect();
        assert!(errors.is_empty(), "{errors:?}");
        model(&text);
    }
    // The schema refuses what the reader refuses for its shape.
    for (added, ..) in ADDED.iter().chain(OF_NODES).chain(OF_TOOLS).filter(|case| case.1 == "syntax") {
        if let Ok(value) = toml::from_str::<serde_json::Value>(&format!("{BASE}{added}")) {
            assert!(!validator.is_valid(&value), "the schema takes\n{added}");
        }
    }
}

#[test]
fn the_readmes_policy_is_good() {
    let readme = include_str!("../../../README.md");
    let (_, rest) = readme.split_once("```toml\n").expect("the README shows a policy");
    let (text, _) = rest.split_once("```").expect("a fence ends");
    assert_eq!(read(text).diagnostics.len(), 0);
}

#[test]
fn the_sample_of_action_policies_and_the_manuals_are_good() {
    let tables = [
        source("example.toml", include_str!("../../../packaging/policy.d/example.toml")),
        source("agents.toml", include_str!("../../../packaging/policy.d/agents.toml.example")),
    ];
    let with = |cedar: &str| {
        let read = texts(tables.iter().cloned().chain([source("agents.cedar", cedar)]).collect());
        let shown: Vec<String> = read.diagnostics.iter().map(|d| d.render(false)).collect();
        assert_eq!(shown.concat(), "");
        read.model.unwrap()
    };
    let sample = with(include_str!("../../../packaging/policy.d/agents.cedar.example"));
    let warnings: Vec<String> = lint(&sample).iter().map(|d| d.render(false)).collect();
    assert_eq!(warnings.concat(), "");
    let manual = include_str!("../../../docs/ACTIONS.md");
    let (_, rest) = manual.split_once("```cedar\n").expect("the manual shows policies");
    let (text, _) = rest.split_once("```").expect("a fence ends");
    assert_eq!(with(text).actions.policies().len(), 3);
}

/// Everything that a policy can say of certificates.
const CERTIFICATES: &str = r#"[[authority]]
name = "partners"
bundle = "/etc/partners.pem"
trust_domain = "partner.example"
crl_files = ["partners.crl", "/var/lib/partners.crl"]
crl = "required"
[[authority]]
name = "plain"
bundle = "plain.pem"
crl_files = ["plain.crl"]
[[peer]]
name = "billing"
spiffe_id = "spiffe://partner.example/billing"
dns = "*.Partner.example"
[[peer]]
name = "printer"
subject = "CN=printer\\, 2nd floor,O=Acme+OU=IT,1.2.3=#0500"
[[rule]]
name = "billing-api"
from = ["billing", "printer"]
to = ["api"]
require = ["mtls"]
mtls = { authority = "partners", spiffe_id = ["spiffe://partner.example/billing", "spiffe://partner.example/b"], dns = "a.partner.example", subject = "CN=x" }
[[rule]]
name = "anybodys"
from = ["web"]
to = ["db"]
require = ["mtls"]
"#;

#[test]
fn what_is_said_of_certificates_is_in_the_model() {
    use authd::proofs::x509::crl::CrlPolicy;
    let model = model(&format!("{BASE}{CERTIFICATES}"));
    let authorities: Vec<_> = model
        .authorities
        .iter()
        .map(|a| (a.name.as_str(), a.bundle.to_str().unwrap(), a.trust_domain.as_ref().map(|d| d.as_str()), a.crl))
        .collect();
    assert_eq!(
        authorities,
        [
            ("pki", "pki/ca.pem", Some("example.org"), CrlPolicy::IfPresent),
            ("partners", "/etc/partners.pem", Some("partner.example"), CrlPolicy::Required),
            ("plain", "plain.pem", None, CrlPolicy::IfPresent),
        ]
    );
    assert_eq!(model.authorities[1].crl_files.len(), 2);
    let (billing, printer) = (&model.peers[1], &model.peers[2]);
    assert_eq!(billing.spiffe_id.as_ref().unwrap().as_str(), "spiffe://partner.example/billing");
    assert_eq!(billing.dns.as_ref().unwrap().to_string(), "*.partner.example");
    assert_eq!(printer.subject.as_deref(), Some("CN=printer\\, 2nd floor,O=Acme+OU=IT,1.2.3=#0500"));
    assert!(billing.has_certificate() && !model.peers[0].has_certificate());
    let rule = |name: &str| model.rules.iter().find(|rule| rule.name == name).unwrap();
    let mtls = rule("billing-api").mtls.as_ref().unwrap();
    assert_eq!((mtls.authority, mtls.spiffe_ids.len(), mtls.dns.len(), mtls.subjects.len()), (Some(1), 2, 1, 1));
    assert!(rule("anybodys").mtls.is_none());
}

/// Everything that a policy can say of other nodes.
const NODES: &str = r#"[[node]]
name = "node-b"
spiffe_id = "spiffe://example.org/node/b"
authority = "pki"
address = "192.0.2.2:7443"
networks = ["192.0.2.2", "10.1.0.0/16"]
speaks_for = ["spiffe://example.org/ns/payments/*", "spiffe://example.org/web"]
[[node]]
name = "node-c"
spiffe_id = "spiffe://example.org/node/c"
address = "[2001:db8::3]:7443"
networks = ["10.1.3.0/24", "2001:db8::3", "10.1.3.0/24"]
[[node]]
name = "node-d"
spiffe_id = "spiffe://example.org/node/d"
speaks_for = ["spiffe://example.org/*"]
[[peer]]
name = "payments"
spiffe_id = "spiffe://example.org/ns/payments/api"
[[peer]]
name = "payments-here"
spiffe_id = "spiffe://example.org/ns/payments/api"
networks = ["198.51.100.0/24"]
[[rule]]
name = "node-all"
from = ["any"]
to = ["api"]
require = ["node"]
across_tenants = true
[[rule]]
name = "node-office"
from = ["office"]
to = ["api"]
require = ["node"]
grant_ttl = "1m"
[[rule]]
name = "node-payments"
from = ["payments", "payments-here"]
to = ["api"]
require = ["node"]
pending = "refuse"
"#;

#[test]
fn what_is_said_of_other_nodes_is_in_the_model() {
    let model = model(&format!("{BASE}{NODES}"));
    let [b, c, d] = &model.nodes[..] else { panic!("{:?}", model.nodes) };
    assert_eq!((b.name.as_str(), b.spiffe_id.as_str()), ("node-b", "spiffe://example.org/node/b"));
    assert_eq!((b.authority, c.authority), (Some(0), None));
    assert_eq!(b.address, Some("192.0.2.2:7443".parse().unwrap()));
    assert_eq!((c.address, d.address), (Some("[2001:db8::3]:7443".parse().unwrap()), None));
    // Nested networks are the more exact one's; one that a node writes twice is its own.
    let networks = |networks: &[authd::policy::network::Network]| {
        networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(networks(&b.networks), "10.1.0.0/16 192.0.2.2/32");
    assert_eq!(networks(&c.networks), "10.1.3.0/24 2001:db8::3/128");
    assert!(d.networks.is_empty() && c.speaks_for.is_empty());
    let may =
        |node: &authd::policy::model::Node, id: &str| node.may_speak_for(&format!("spiffe://{id}").parse().unwrap());
    assert!(may(b, "example.org/web") && may(b, "example.org/ns/payments/a") && may(b, "example.org/ns/payments/a/b"));
    for id in ["example.org/ns/payments", "example.org/ns/paymentsx/a", "example.org/web/a", "example.com/web"] {
        assert!(!may(b, id), "{id}");
    }
    assert!(may(d, "example.org/a") && !may(d, "example.org.evil/a") && !may(c, "example.org/web"));
    assert!(model.rules.iter().all(|rule| rule.is_vouched() && !rule.is_grantable()));
}

#[test]
fn peers_that_certificates_name_do_not_make_each_others_rules_pointless() {
    let peer =
        |name: &str, id: &str| format!("[[peer]]\nname = \"{name}\"\nspiffe_id = \"spiffe://example.org/{id}\"\n");
    let rule = |peer: &str| {
        format!("[[rule]]\nname = \"of-{peer}\"\nfrom = [\"{peer}\"]\nto = [\"api\"]\nrequire = [\"mtls\"]\n")
    };
    let text = format!("{BASE}{}{}{}{}", peer("p", "p"), peer("q", "q"), rule("p"), rule("q"));
    let found = lint(&model(&text));
    assert!(!found.iter().any(|warning| warning.code == "pointless"), "{found:?}");
}

/// Everything that is done with a policy before it comes into force.
fn exercise(text: &str) {
    let policy = read(text);
    for diagnostic in &policy.diagnostics {
        diagnostic.render(false);
        diagnostic.json();
    }
    let Some(model) = policy.model else { return };
    lint(&model);
    let at = moment("2026-11-23T12:00:00Z");
    let mut registry = Registry::default();
    registry.assign(&model, &Options::default());
    if let Ok(image) = compile(&model, &mut registry, &Options::default(), at) {
        let policy =
            Policy { model: &model, registry: &registry, options: &Options::default(), image: &image, moment: at };
        for from in ["web", "agent", "office", "unmanaged", "10.0.0.1"] {
            if let Some(from) = From::parse(from, &model) {
                let _ = policy.explain(from, "10.0.0.1:5432/tcp".parse().unwrap()).to_string();
            }
        }
    }
}

/// A good policy with everything in it, to be broken.
fn rich() -> String {
    let mut text = format!("{BASE}{CERTIFICATES}{NODES}{OFFICE_HOURS}");
    for (added, ..) in ADDED.iter().filter(|case| case.1 == "boundary") {
        let (name, number) = (format!("name = \"q{}\"\nacross_tenants = true", added.len()), added.len());
        text += &added.replace("name = \"r\"", &name).replace("\"s\"", &format!("\"s{number}\""));
        text.push('\n');
    }
    text
}

/// One change to a text.
#[derive(Clone, Debug)]
enum Edit {
    Remove(usize, usize),
    Insert(usize, String),
    Copy(usize, usize, usize),
    Swap(usize, usize),
}

fn edit() -> impl Strategy<Value = Edit> {
    const LENGTH: usize = 4096;
    let token = prop_oneof![
        Just("[[rule]]\n".to_owned()),
        Just("\"".to_owned()),
        Just("[".to_owned()),
        Just("= ".to_owned()),
        Just("\u{1f980}".to_owned()),
        Just("\0".to_owned()),
        Just("99999999999999999999".to_owned()),
        Just("/".to_owned()),
        Just("\"any\"".to_owned()),
        "\\PC{0,8}",
    ];
    prop_oneof![
        (0..LENGTH, 0..40usize).prop_map(|(at, length)| Edit::Remove(at, length)),
        (0..LENGTH, token).prop_map(|(at, text)| Edit::Insert(at, text)),
        (0..LENGTH, 0..200usize, 0..LENGTH).prop_map(|(from, length, to)| Edit::Copy(from, length, to)),
        (0..LENGTH, 0..LENGTH).prop_map(|(a, b)| Edit::Swap(a, b)),
    ]
}

fn apply(text: &str, edits: &[Edit]) -> String {
    let mut characters: Vec<char> = text.chars().collect();
    for edit in edits {
        let length = characters.len().max(1);
        let end = |at: usize, size: usize| (at + size).min(characters.len());
        match edit {
            Edit::Remove(at, size) => {
                let at = at % length;
                let end = end(at, *size);
                characters.drain(at.min(end)..end);
            }
            Edit::Insert(at, text) => {
                let at = (at % length).min(characters.len());
                characters.splice(at..at, text.chars());
            }
            Edit::Copy(from, size, to) => {
                let from = from % length;
                let end = end(from, *size);
                let piece: Vec<char> = characters[from.min(end)..end].to_vec();
                let to = (to % length).min(characters.len());
                characters.splice(to..to, piece);
            }
            Edit::Swap(a, b) if !characters.is_empty() => characters.swap(a % length, b % length),
            Edit::Swap(..) => {}
        }
    }
    characters.into_iter().collect()
}

#[test]
fn the_rich_policy_is_good() {
    let policy = read(&rich());
    let shown: Vec<String> = policy.diagnostics.iter().map(|d| d.render(false)).collect();
    assert!(policy.model.is_some(), "{}", shown.join("\n"));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        exercise(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn mutated_policies_never_panic(edits in proptest::collection::vec(edit(), 1..8)) {
        exercise(&apply(&rich(), &edits));
    }

    /// Values that have the right shape, in every field.
    #[test]
    fn random_values_never_panic(name in "\\PC{0,20}", text in "\\PC{0,30}", days in "[a-z-]{0,9}", hours in "[0-9:+-]{0,12}") {
        let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
        let (name, text) = (quoted(&name), quoted(&text));
        exercise(&format!(
            "trust_domain = {text}\n[[workload]]\nname = {name}\nkind = \"job\"\ncgroup = [{text}, {name}]\ntenant = {text}\n\
             spiffe_id = {text}\n[[peer]]\nname = {text}\nnetworks = [{text}]\n[[service]]\nname = {name}\nworkload = {name}\n\
             addresses = [{text}]\nports = [{text}]\n[[rule]]\nname = {name}\nfrom = [{name}, {text}]\nto = [{name}]\n\
             grant_ttl = {text}\nwhen = {{ days = {}, hours = {}, zone = {text} }}\n",
            quoted(&days), quoted(&hours),
        ));
    }
}
