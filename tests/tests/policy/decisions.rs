//! What a policy decides: in an explanation, as time passes, and against another policy.

use authd::policy::{
    compile::{Moment, Options, Registry, compile},
    diff::diff,
    explain::{From, Policy, To},
    image::Image,
    model::Model,
};
use authd_common::{
    reason::Reason,
    tables::{ALTERNATIVES, ANY_CLASS, CellKey, IPPROTO_TCP, NO_RULE, Phase, path, port_slot},
};
use jiff::Timestamp;

use crate::{BASE, model, moment};

fn compiled(text: &str, at: Moment) -> (Model, Registry, Image) {
    let model = model(text);
    let mut registry = Registry::default();
    registry.assign(&model, &Options::default());
    let image = compile(&model, &mut registry, &Options::default(), at).unwrap();
    (model, registry, image)
}

fn verdict(text: &str, at: Moment, from: &str, to: &str) -> String {
    let (model, registry, image) = compiled(text, at);
    let policy = Policy { model: &model, registry: &registry, options: &Options::default(), image: &image, moment: at };
    let explained = policy.explain(From::parse(from, &model).unwrap(), to.parse::<To>().unwrap());
    format!("{} {} {}", explained.verdict, explained.reason, explained.rule.unwrap_or_default()).trim_end().to_owned()
}

/// The whole explanation, as people see it.
fn explained(text: &str, from: &str, to: &str) -> String {
    let at = moment("2026-11-23T12:00:00Z");
    let (model, registry, image) = compiled(text, at);
    let policy = Policy { model: &model, registry: &registry, options: &Options::default(), image: &image, moment: at };
    let from = From::parse(from, &model).unwrap_or_else(|| panic!("`{from}` is nobody"));
    policy.explain(from, to.parse().unwrap()).to_string()
}

const PARTNERS: &str = r#"[[peer]]
name = "partner"
spiffe_id = "spiffe://example.org/partner"
[[peer]]
name = "branch"
networks = ["198.51.100.0/24"]
dns = "branch.example.org"
[[rule]]
name = "branch-api"
from = ["branch"]
to = ["api"]
require = ["mtls"]
[[rule]]
name = "partner-api"
from = ["partner"]
to = ["api"]
require = ["mtls"]
[[rule]]
name = "partner-db"
from = ["agent"]
to = ["db"]
"#;

#[test]
fn a_peer_that_its_certificate_alone_names_can_be_explained() {
    let text = format!("{BASE}{PARTNERS}");
    // It may call from anywhere, and does so at whatever address this node has.
    for to in ["127.0.0.1:8443/tcp", "192.0.2.9:8443/tcp", "[2001:db8::9]:8443/tcp"] {
        let told = explained(&text, "partner", to);
        assert!(told.starts_with(&format!("partner -> {to} at ")), "{told}");
        assert!(told.contains("\ndenied (proof_required) by rule partner-api"), "{told}");
        assert!(told.contains("rule branch-api is about callers branch"), "{told}");
    }
    // Whoever calls from an address that no peer has can be it; from one that a peer has, both.
    let told = explained(&text, "203.0.113.7", "192.0.2.9:8443/tcp");
    assert!(told.contains("\ndenied (proof_required) by rule partner-api"), "{told}");
    let told = explained(&text, "198.51.100.7", "192.0.2.9:8443/tcp");
    assert!(told.contains("\ndenied (proof_required) by rule branch-api"), "{told}");
    assert!(told.contains("rule partner-api requires mtls, which nobody showed"), "{told}");
    assert!(explained(&text, "branch", "192.0.2.9:8443/tcp").contains("by rule branch-api"));
    // Another port is not guarded; a workload's is not the peer's.
    assert!(explained(&text, "partner", "192.0.2.9:8444/tcp").contains("\nallowed (unguarded)"));
    let told = explained(&text, "web", "192.0.2.9:8443/tcp");
    assert!(told.contains("\ndenied (no_rule)") && !told.contains("inbound of"), "{told}");
}

const VOUCHED: &str = r#"[[service]]
name = "admin"
workload = "web"
ports = ["tcp/9443", "udp/9443"]
[[peer]]
name = "payments"
spiffe_id = "spiffe://example.org/payments"
[[rule]]
name = "a-certificate"
from = ["office"]
to = ["api"]
require = ["mtls"]
[[rule]]
name = "b-node"
from = ["any"]
to = ["api"]
require = ["node"]
[[rule]]
name = "c-key"
from = ["any"]
to = ["api"]
require = ["api-key"]
[[rule]]
name = "d-payments"
from = ["payments"]
to = ["admin", "api"]
require = ["node"]
[[rule]]
name = "e-night"
from = ["any"]
to = ["admin"]
require = ["node"]
when = { hours = "20:00-04:00" }
"#;

/// Names of the rules whose grants open a cell, those last that are of callers that another node vouches for.
fn alternatives(registry: &Registry, image: &Image, phase: &Phase) -> String {
    let name = |rule: &u32| registry.rules.name(*rule).unwrap();
    let shown = phase.granted_by.iter().filter(|rule| **rule != NO_RULE).map(|rule| name(rule).to_owned());
    let vouched = (phase.vouched != 0).then(|| &image.sets[&phase.vouched]).into_iter().flatten();
    let vouched = vouched.map(|rule| format!("{} vouched", name(rule)));
    shown.chain(vouched).collect::<Vec<_>>().join(", ")
}

#[test]
fn cells_say_which_alternatives_are_for_vouched_callers() {
    let (model, registry, image) = compiled(&format!("{BASE}{VOUCHED}"), moment("2026-11-23T12:00:00Z"));
    let class = image.workloads[registry.workloads.number("web").unwrap() as usize].class;
    let office = image.addresses[&(model.peers[0].networks[0].address, model.peers[0].networks[0].bits)];
    let port = |port: u16| image.ports[&port_slot(IPPROTO_TCP, port)].class;
    let cell = |subject: u32, at: u16, path: u8| {
        let key = CellKey { epoch: 0, subject, object: class, port: port(at), path, reserved: 0 };
        image.cells.get(&key).copied().unwrap_or_else(|| panic!("no cell {key:?}"))
    };
    let told = |phase: &Phase| alternatives(&registry, &image, phase);
    let elsewhere = cell(ANY_CLASS, 8443, path::IN_REMOTE);
    assert_eq!(told(&elsewhere.first), "c-key, b-node vouched, d-payments vouched");
    let office = cell(office, 8443, path::IN_REMOTE);
    assert_eq!(told(&office.first), "a-certificate, c-key, b-node vouched, d-payments vouched");
    // The same rules are one set, however many cells ask for them.
    assert_eq!(office.first.vouched, elsewhere.first.vouched);
    // No other node vouches for callers of this one, and no peer is one of them.
    assert_eq!(told(&cell(ANY_CLASS, 8443, path::IN_LOCAL).first), "c-key");
    // By day one rule, by night two.
    let admin = cell(ANY_CLASS, 9443, path::IN_REMOTE);
    assert_eq!(told(&admin.first), "d-payments vouched");
    assert_eq!(told(&admin.second), "d-payments vouched, e-night vouched");
    assert_eq!(told(&cell(ANY_CLASS, 9443, path::IN_LOCAL).second), "");
    // What is called from here is not let out by another node's word.
    for (key, cell) in image.cells.iter().filter(|(key, _)| key.path != path::IN_REMOTE) {
        assert_eq!((cell.first.vouched, cell.second.vouched), (0, 0), "{key:?}");
    }
}

#[test]
fn a_denial_leaves_no_vouched_alternative() {
    let deny = "[[rule]]\nname = \"z\"\nfrom = [\"any\"]\nto = [\"api\"]\naction = \"deny\"\n";
    let (_, _, image) = compiled(&format!("{BASE}{VOUCHED}{deny}"), moment("2026-11-23T12:00:00Z"));
    let denied = image.cells.values().filter(|cell| cell.first.reason == Reason::DeniedByRule.code());
    assert!(denied.clone().count() > 0);
    for cell in denied {
        assert_eq!((cell.first.vouched, cell.first.granted_by), (0, [NO_RULE; ALTERNATIVES]));
    }
}

#[test]
fn explanations_say_that_another_node_has_to_vouch() {
    let text = format!("{BASE}{VOUCHED}");
    for from in ["payments", "203.0.113.7"] {
        let told = explained(&text, from, "192.0.2.9:9443/tcp");
        assert!(told.contains("\ndenied (node_identity_missing) by rule d-payments"), "{told}");
        assert!(
            told.contains("by rule d-payments, which requires node: that the caller's node vouches for it"),
            "{told}"
        );
    }
    let told = explained(&text, "office", "192.0.2.9:8443/tcp");
    assert!(told.contains("by rule a-certificate, which requires mtls\n"), "{told}");
    assert!(told.contains("  rule b-node requires node, and no node vouched for the caller"), "{told}");
    assert!(told.contains("  rule c-key requires api-key, which nobody showed"), "{told}");
    let told = explained(&text, "unmanaged", "127.0.0.1:8443/tcp");
    assert!(told.contains("by rule b-node") && !told.contains("allowed"), "{told}");
    let told = explained(&text, "agent", "127.0.0.1:8443/tcp");
    assert!(told.contains("\ndenied (proof_required) by rule b-node"), "{told}");
    assert!(told.contains("  rule d-payments is about callers payments"), "{told}");
}

pub const OFFICE_HOURS: &str = "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\n\
    when = { days = \"mon-fri\", hours = \"08:00-18:00\", zone = \"Europe/Berlin\" }\n";

#[test]
fn schedules_hold_in_their_zone_and_switch_without_a_new_image() {
    let text = format!("{BASE}{OFFICE_HOURS}");
    // 2026-11-23 is a Monday; Berlin is an hour ahead of UTC then.
    assert_eq!(verdict(&text, moment("2026-11-23T06:59:00Z"), "web", "10.1.2.3:5432/tcp"), "denied no_rule");
    assert_eq!(verdict(&text, moment("2026-11-23T07:00:00Z"), "web", "10.1.2.3:5432/tcp"), "allowed rule r");
    assert_eq!(verdict(&text, moment("2026-11-23T17:00:00Z"), "web", "10.1.2.3:5432/tcp"), "denied no_rule");

    // One image, as time passes: open, closed for the night, and then nobody has said what comes next.
    let at = moment("2026-11-23T16:00:00Z");
    let (_, registry, image) = compiled(&text, at);
    assert_eq!(image.next_boundary, Some("2026-11-23T17:00:00Z".parse::<Timestamp>().unwrap()));
    let hour = 3_600_000_000_000;
    let workload = registry.workloads.number("web").unwrap();
    let decide = |hours: u64| {
        let view = image.at(at.monotonic + hours * hour);
        let to = authd_common::address::Address::v4([10, 1, 2, 3]);
        authd_common::verdict::decide_out(
            &view,
            &image.root(),
            &authd_common::verdict::Opener { workload, instance: 0 },
            &to,
            6,
            5432,
        )
    };
    assert_eq!(decide(0).reason.name(), "rule");
    assert_eq!(decide(0).until, at.monotonic + hour);
    assert_eq!(decide(1).reason.name(), "no_rule");
    assert_eq!(decide(14).reason.name(), "no_rule");
    assert_eq!(decide(15).reason.name(), "schedule_stale");
}

#[test]
fn a_diff_names_the_pairs_that_change() {
    let rule = "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\n";
    let (old, new) = (model(&format!("{BASE}{rule}")), model(&format!("{BASE}{}", rule.replace("web", "agent"))));
    let changes = diff(&old, &new, &Options::default(), moment("2026-11-23T12:00:00Z")).unwrap();
    let mut found: Vec<_> =
        changes.iter().map(|c| (c.from.as_str(), c.service.as_str(), c.before.as_str(), c.after.as_str())).collect();
    found.sort_unstable();
    found.dedup();
    assert_eq!(found.len(), 2, "{changes:?}");
    assert_eq!((found[0].0, found[1].0), ("agent", "web"));
    assert!(found[0].2.contains("denied") && found[0].3.contains("allowed"), "{found:?}");
    assert!(found[1].2.contains("allowed") && found[1].3.contains("denied"), "{found:?}");
    assert!(diff(&old, &old, &Options::default(), moment("2026-11-23T12:00:00Z")).unwrap().is_empty());
}
