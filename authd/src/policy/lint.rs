//! What is allowed and hardly meant.
//!
//! Enters: a model. Leaves: warnings. Never: errors; a policy with warnings is loaded.

use super::{
    diagnostic::Diagnostic,
    file::{Proof, Sensitivity},
    model::{Model, Object, Rule, Service, Subject},
};

/// Rules beyond which pairs of rules are not compared any more.
const MAX_COMPARED: usize = 2_000;

pub fn lint(model: &Model) -> Vec<Diagnostic> {
    let mut warnings = Vec::new();
    if model.rules.len() <= MAX_COMPARED {
        unreachable_rules(model, &mut warnings);
        pointless_rules(model, &mut warnings);
    }
    weak_proofs(model, &mut warnings);
    any_audience(model, &mut warnings);
    unvouched(model, &mut warnings);
    unused(model, &mut warnings);
    warnings.extend(crate::decisions::lint::lint(model));
    warnings
}

/// Workloads of which no cgroup exists now. `matched` says of a workload, by index, whether one does.
pub fn unmatched(model: &Model, matched: impl Fn(usize) -> bool) -> Vec<Diagnostic> {
    let of = |(index, workload): (usize, &super::model::Workload)| {
        (!matched(index)).then(|| {
            Diagnostic::warning(
                "no_cgroup_now",
                workload.place.clone(),
                format!("no cgroup of this node matches workload `{}` now", workload.name),
                "if it should run now, compare its pattern with `systemd-cgls` or `find /sys/fs/cgroup -type d`",
            )
        })
    };
    model.workloads.iter().enumerate().filter_map(of).collect()
}

/// Rules that a denial covers entirely.
fn unreachable_rules(model: &Model, warnings: &mut Vec<Diagnostic>) {
    for rule in model.rules.iter().filter(|rule| !rule.deny) {
        let by = model
            .rules
            .iter()
            .find(|other| other.deny && !other.observe && other.when.is_none() && covers(model, other, rule));
        if let Some(by) = by {
            let warning = Diagnostic::warning(
                "unreachable",
                rule.place.clone(),
                format!("rule `{}` never allows anything: rule `{}` denies all of it", rule.name, by.name),
                "remove one of them, or narrow the denial",
            );
            warnings.push(warning.with_related(&by.place, "denied here"));
        }
    }
}

/// Rules that allow nothing that another does not allow for less.
fn pointless_rules(model: &Model, warnings: &mut Vec<Diagnostic>) {
    for rule in model.rules.iter().filter(|rule| !rule.deny) {
        let by = model.rules.iter().find(|other| {
            let wider = other.name != rule.name && !other.deny && other.when.is_none() && covers(model, other, rule);
            let token = other.token.is_none() || other.token == rule.token;
            let cheaper = token && other.require.iter().all(|proof| rule.require.contains(proof));
            // Of two rules that say the same, the second is the pointless one.
            let same = covers(model, rule, other) && rule.require.len() == other.require.len() && rule.when.is_none();
            wider && cheaper && (!same || other.name < rule.name)
        });
        if let Some(by) = by {
            let warning = Diagnostic::warning(
                "pointless",
                rule.place.clone(),
                format!("rule `{}` makes no difference: rule `{}` allows all of it for no more", rule.name, by.name),
                "remove it, or narrow the other one",
            );
            warnings.push(warning.with_related(&by.place, "allowed here"));
        }
    }
}

/// Sensitive services that can be called without showing anything but where one runs.
fn weak_proofs(model: &Model, warnings: &mut Vec<Diagnostic>) {
    let weak = |proof: &Proof| matches!(proof, Proof::Cgroup | Proof::Node);
    for rule in model.rules.iter().filter(|rule| !rule.deny && rule.require.iter().all(weak)) {
        for object in &rule.to {
            let Object::Service(index) = object else { continue };
            let service = &model.services[*index];
            if service.sensitivity == Sensitivity::High {
                let asks = if rule.is_vouched() { "only where its callers run" } else { "for no proof" };
                let warning = Diagnostic::warning(
                    "weak_proof",
                    rule.place.clone(),
                    format!("rule `{}` asks {asks}, and service `{}` is of high sensitivity", rule.name, service.name),
                    "set `require = [\"mtls\"]` or a token, or lower the sensitivity",
                );
                warnings.push(warning.with_related(&service.place, "the service"));
            }
        }
    }
}

/// Rules that take tokens which their issuer made for somebody else.
fn any_audience(model: &Model, warnings: &mut Vec<Diagnostic>) {
    for rule in model.rules.iter().filter(|rule| rule.token.as_ref().is_some_and(|token| token.audience.is_none())) {
        warnings.push(Diagnostic::warning(
            "any_audience",
            rule.place.clone(),
            format!(
                "rule `{}` takes tokens for any audience: each service that is shown one can use it here",
                rule.name
            ),
            "add `audience = \"...\"` to `token`",
        ));
    }
}

/// Rules for callers for whom no node may vouch.
fn unvouched(model: &Model, warnings: &mut Vec<Diagnostic>) {
    for rule in model.rules.iter().filter(|rule| rule.is_vouched()) {
        if model.nodes.iter().all(|node| node.speaks_for.is_empty()) {
            warnings.push(Diagnostic::warning(
                "unvouched",
                rule.place.clone(),
                format!("rule `{}` lets nobody in: no node may vouch for any caller", rule.name),
                "add `speaks_for = [\"spiffe://...\"]` to a `[[node]]`",
            ));
            continue;
        }
        for subject in &rule.from {
            let Subject::Peer(index) = *subject else { continue };
            let peer = &model.peers[index];
            let Some(id) = peer.spiffe_id.as_ref() else { continue };
            if !model.nodes.iter().any(|node| node.may_speak_for(id)) {
                let warning = Diagnostic::warning(
                    "unvouched",
                    rule.place.clone(),
                    format!("rule `{}` never lets peer `{}` in: no node may vouch for `{id}`", rule.name, peer.name),
                    "add it to `speaks_for` of a `[[node]]`",
                );
                warnings.push(warning.with_related(&peer.place, "the peer"));
            }
        }
    }
}

/// Names that no rule mentions: a workload without rules can do nothing, which may be meant; a service or peer that
/// nothing names does nothing. Nor does a node that is told nothing and not listened to.
fn unused(model: &Model, warnings: &mut Vec<Diagnostic>) {
    let names_service =
        |index| model.rules.iter().any(|r| r.to.contains(&Object::Service(index)) || r.to.contains(&Object::Any));
    let names_peer =
        |index| model.rules.iter().any(|r| r.from.contains(&Subject::Peer(index)) || r.from.contains(&Subject::Any));
    for (index, service) in model.services.iter().enumerate() {
        // A guarded service without rules is closed, and that is a statement.
        if service.workload.is_none() && !names_service(index) {
            warnings.push(Diagnostic::warning(
                "unused",
                service.place.clone(),
                format!("no rule names service `{}`", service.name),
                "remove it, or write the rule that it was meant for",
            ));
        }
    }
    for (index, peer) in model.peers.iter().enumerate() {
        if !names_peer(index) {
            warnings.push(Diagnostic::warning(
                "unused",
                peer.place.clone(),
                format!("no rule names peer `{}`", peer.name),
                "remove it, or write the rule that it was meant for",
            ));
        }
    }
    for node in model.nodes.iter().filter(|node| node.networks.is_empty() && node.speaks_for.is_empty()) {
        warnings.push(Diagnostic::warning(
            "unused",
            node.place.clone(),
            format!("node `{}` may vouch for nobody, and nobody's identity is sent to it", node.name),
            "add `speaks_for`, or `networks` and `address`",
        ));
    }
}

/// Whether every flow that `inner` is about is one that `outer` is about.
fn covers(model: &Model, outer: &Rule, inner: &Rule) -> bool {
    let subject = |inner: &Subject| outer.from.iter().any(|outer| covers_subject(model, outer, inner));
    let object = |inner: &Object| outer.to.iter().any(|outer| covers_object(model, outer, inner));
    inner.from.iter().all(subject) && inner.to.iter().all(object)
}

fn covers_subject(model: &Model, outer: &Subject, inner: &Subject) -> bool {
    match (outer, inner) {
        (Subject::Any, _) => true,
        (Subject::Peer(a), Subject::Peer(b)) => {
            // Peers that are known by certificates are the same only if they are one.
            let (outer, inner) = (&model.peers[*a], &model.peers[*b]);
            if outer.has_certificate() || inner.has_certificate() {
                return a == b;
            }
            let networks = &outer.networks;
            inner.networks.iter().all(|inner| networks.iter().any(|outer| outer.covers(inner)))
        }
        (a, b) => a == b,
    }
}

fn covers_object(model: &Model, outer: &Object, inner: &Object) -> bool {
    match (outer, inner) {
        (Object::Any, _) => true,
        (Object::Service(a), Object::Service(b)) => a == b || covers_service(&model.services[*a], &model.services[*b]),
        _ => false,
    }
}

fn covers_service(outer: &Service, inner: &Service) -> bool {
    // Another workload's guard is another thing, whatever the addresses.
    outer.workload == inner.workload
        && inner.networks.iter().all(|i| outer.networks.iter().any(|o| o.covers(i)))
        && inner.ports.iter().all(|i| outer.ports.iter().any(|o| o.covers(i)))
}
