//! What is allowed and hardly meant.
//!
//! Enters: a model. Leaves: warnings. Never: errors; a policy with warnings is loaded.

use super::{
    diagnostic::Diagnostic,
    file::{Proof, Sensitivity},
    model::{Delegation, McpServer, Model, OWN_ISSUER, Object, Rule, Service, Subject, TokenRequirement},
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
    never_given(model, &mut warnings);
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

/// Sensitive services that can be called without showing anything but where one runs, or with what a thief could show
/// as well.
fn weak_proofs(model: &Model, warnings: &mut Vec<Diagnostic>) {
    for rule in model.rules.iter().filter(|rule| !rule.deny) {
        let Some((asks, help)) = weakness(rule) else { continue };
        for object in &rule.to {
            let Object::Service(index) = object else { continue };
            let service = &model.services[*index];
            if service.sensitivity == Sensitivity::High {
                let warning = Diagnostic::warning(
                    "weak_proof",
                    rule.place.clone(),
                    format!("rule `{}` asks {asks}, and service `{}` is of high sensitivity", rule.name, service.name),
                    help,
                );
                warnings.push(warning.with_related(&service.place, "the service"));
            }
        }
    }
}

/// What little a rule asks for, and what to do about it.
fn weakness(rule: &Rule) -> Option<(&'static str, &'static str)> {
    let bound = rule.token.as_ref().is_some_and(|token| token.bound);
    let strong = |proof: &Proof| match proof {
        Proof::Cgroup | Proof::Node | Proof::ApiKey => false,
        Proof::Token => bound,
        Proof::Mtls | Proof::Action | Proof::Approval => true,
    };
    match () {
        () if rule.require.iter().any(strong) => None,
        () if rule.require.contains(&Proof::Token) => Some((
            "only for a token that is anybody's who copies it",
            "set `bound = true` in `token`, add `\"mtls\"` to `require`, or lower the sensitivity",
        )),
        () if rule.require.contains(&Proof::ApiKey) => Some((
            "only for an API key, which is anybody's who copies it",
            "add `\"mtls\"` or a bound token to `require`, or lower the sensitivity",
        )),
        () => {
            let asks = if rule.is_vouched() { "only where its callers run" } else { "for no proof" };
            Some((asks, "set `require = [\"mtls\"]` or a token, or lower the sensitivity"))
        }
    }
}

/// Rules that ask for tokens of this node which no delegation gives.
fn never_given(model: &Model, warnings: &mut Vec<Diagnostic>) {
    for rule in model.rules.iter().filter(|rule| !rule.deny) {
        let Some(token) = rule.token.as_ref().filter(|token| is_own(model, token.issuer)) else { continue };
        let Some((why, nearest, help)) = lacking(model, token) else { continue };
        let message = format!("rule `{}` never opens: {why}", rule.name);
        let warning = Diagnostic::warning("never_opens", rule.place.clone(), message, help);
        warnings.push(match nearest {
            Some(delegation) => warning.with_related(&delegation.place, "the delegation"),
            None => warning,
        });
    }
}

/// What lacks for anybody to get such a token of this node's, the delegation that comes nearest, and what to do.
fn lacking<'a>(model: &'a Model, token: &TokenRequirement) -> Option<(String, Option<&'a Delegation>, &'static str)> {
    let fits = |audience: &String| token.audience.as_ref().is_none_or(|asked| asked == audience);
    // Servers are shown tokens that are bound to nothing, and one on this node could show its token here.
    let is_shown = |server: &McpServer| {
        server.audience.as_ref().is_some_and(fits) && token.scopes.iter().all(|scope| server.scopes.contains(scope))
    };
    if !token.bound && model.mcp_servers.iter().any(is_shown) {
        return None;
    }
    // Each exchange narrows, and the first one takes another issuer's token.
    let (first, later): (Vec<&Delegation>, Vec<&Delegation>) =
        model.delegations.iter().partition(|delegation| !is_own(model, delegation.issuer));
    if first.is_empty() {
        let why = "it asks for a token of this node, and no delegation gives one for the token of another issuer";
        return Some((why.to_owned(), later.first().copied(), "add a `[[delegation]]` with an `[[issuer]]`'s name"));
    }
    let audience = token.audience.as_deref().unwrap_or_default();
    let has_audience = |delegation: &&&Delegation| delegation.audiences.iter().any(fits);
    let near: Vec<&Delegation> = first.iter().filter(has_audience).copied().collect();
    if near.is_empty() {
        let why = match later.iter().find(has_audience) {
            Some(later) => format!(
                "no delegation gives a token for `{audience}`; `{}` only narrows those that others give",
                later.name
            ),
            None => format!("no delegation gives a token for `{audience}`"),
        };
        return Some((why, None, "name the audience in `audiences` of a `[[delegation]]`"));
    }
    let is_for = if audience.is_empty() { String::new() } else { format!(" for `{audience}`") };
    let has = |scope: &String| near.iter().any(|delegation| delegation.scopes.contains(scope));
    if let Some(scope) = token.scopes.iter().find(|scope| !has(scope)) {
        let why = format!("no delegation gives a token{is_for} with scope `{scope}`");
        return Some((why, near.first().copied(), "name the scope in `scopes` of the delegation"));
    }
    let has_all = |delegation: &&&Delegation| token.scopes.iter().all(|scope| delegation.scopes.contains(scope));
    let near: Vec<&Delegation> = near.iter().filter(has_all).copied().collect();
    if near.is_empty() {
        let why = format!("no delegation gives a token{is_for} with all of its scopes together");
        return Some((why, None, "name the scopes in `scopes` of one delegation"));
    }
    let meets = |delegation: &&Delegation| {
        let named = |subject: &String| delegation.subjects.contains(subject);
        token.subjects.is_empty() || delegation.subjects.is_empty() || token.subjects.iter().any(named)
    };
    if near.iter().any(meets) {
        return None;
    }
    let why = format!("no delegation gives such a token{is_for} about one of its subjects");
    Some((why, near.first().copied(), "name one of the rule's subjects in `subjects` of the delegation"))
}

fn is_own(model: &Model, issuer: usize) -> bool {
    model.issuers.get(issuer).is_some_and(|issuer| issuer.name == OWN_ISSUER)
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
