//! What a policy decides: in an explanation, as time passes, and against another policy.

use authd::policy::{
    compile::{Moment, Options, Registry, compile},
    diff::diff,
    explain::{From, Policy, To},
    image::Image,
    model::Model,
};
use jiff::Timestamp;

use crate::{BASE, model, moment};

fn compiled(text: &str, at: Moment) -> (Model, Registry, Image) {
    let model = model(text);
    let mut registry = Registry::default();
    registry.assign(&model, &Options::default());
    let image = compile(&model, &registry, &Options::default(), at).unwrap();
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
