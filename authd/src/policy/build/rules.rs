//! Rules: whom and what they name, what they may ask for, when they hold.

use std::time::Duration;

use jiff::tz::TimeZone;
use toml::Spanned;

use super::{Builder, place};
use crate::policy::{
    diagnostic::{Place, Source},
    file::{self, Mode, Pending, Proof, Texts},
    model::{Model, Object, Peer, Rule, Service, Subject, TokenRequirement, Workload},
    schedule::{self, Schedule},
};

const MAX_GRANT_TTL: Duration = Duration::from_secs(24 * 3600);
const MAX_PERMIT_TTL: Duration = Duration::from_secs(3600);

#[derive(Clone, Copy)]
enum Label {
    Tenant,
    Environment,
}

impl Builder {
    pub(super) fn rule(&mut self, source: &Source, raw: file::Rule, model: &Model) -> Rule {
        let file::Rule {
            name,
            from,
            to,
            action,
            mode,
            require,
            token,
            mtls,
            permit,
            grant_ttl,
            pending,
            across_tenants,
            across_environments,
            when,
        } = raw;
        let at = place(source, name.span());
        self.name(&at, name.as_ref());
        let deny = action == file::Action::Deny;
        if from.is_empty() || to.is_empty() {
            let (side, help) =
                if from.is_empty() { ("nobody", "name who may call") } else { ("nothing", "name what may be called") };
            self.error("empty_rule", &at, format!("rule `{}` is about {side}", name.as_ref()), help);
        }
        let subjects: Vec<(Subject, Place)> = from.into_iter().filter_map(|text| self.subject(source, text)).collect();
        let objects: Vec<(Object, Place)> = to.into_iter().filter_map(|text| self.object(source, text)).collect();
        for (subject, at) in &subjects {
            for (object, _) in &objects {
                self.enforceable(at, *subject, *object, model);
                if !deny {
                    self.boundary(at, *subject, *object, model, Label::Tenant, across_tenants);
                    self.boundary(at, *subject, *object, model, Label::Environment, across_environments);
                }
            }
        }
        let mtls_at = self.mtls_place(source, &require);
        let node_at = self.node_place(source, &require);
        let action_at = require.iter().find(|proof| *proof.as_ref() == Proof::Action).map(|p| place(source, p.span()));
        let proofs = self.require(source, require, deny, token.as_ref(), &at);
        let permit = self.permit(source, permit, action_at.filter(|_| !deny), &proofs, &at);
        if permit.is_some() {
            self.permittable(&at, &proofs, &subjects, model);
        }
        match node_at.filter(|_| !deny) {
            Some(node_at) => self.vouchable(&at, &node_at, &proofs, &subjects, &objects, model),
            None => {
                for (subject, at) in &subjects {
                    self.provable(at, *subject, deny, mtls_at.is_some(), model);
                }
            }
        }
        let mtls = self.mtls(source, mtls, mtls_at.as_ref(), model);
        let token = token.and_then(|token| self.token(source, token.into_inner()));
        let grant_ttl = grant_ttl.and_then(|ttl| {
            let at = place(source, ttl.span());
            let duration = self.duration(source, &ttl)?;
            if permit.is_some() && duration > MAX_PERMIT_TTL {
                let help = "choose a shorter `grant_ttl`: the connection ends with the permit";
                self.error("long_permit", &at, "a permit lives for an hour at most", help);
            }
            if duration > MAX_GRANT_TTL {
                self.error("long_grant", &at, "a grant lives for a day at most", "choose a shorter `grant_ttl`");
            }
            Some(duration)
        });
        Rule {
            name: name.into_inner(),
            from: sorted(subjects.into_iter().map(|(s, _)| s)),
            to: sorted(objects.into_iter().map(|(o, _)| o)),
            deny,
            observe: mode == Mode::Observe,
            hold: self.hold(source, pending, &proofs),
            require: proofs,
            mtls,
            token,
            permit,
            grant_ttl,
            when: when.and_then(|when| self.when(source, when.into_inner())),
            place: at,
        }
    }

    fn subject(&mut self, source: &Source, text: Spanned<String>) -> Option<(Subject, Place)> {
        let at = place(source, text.span());
        let subject = match text.as_ref().as_str() {
            "any" => Subject::Any,
            "unmanaged" => Subject::Unmanaged,
            name => match self.callers.get(name) {
                Some((subject, _)) => *subject,
                None => {
                    let names = self.callers.keys().cloned().collect();
                    let help = self.similar(name, names, "define it as a `[[workload]]` or a `[[peer]]`");
                    self.error("unknown_caller", &at, format!("no workload or peer is called `{name}`"), help);
                    return None;
                }
            },
        };
        Some((subject, at))
    }

    fn object(&mut self, source: &Source, text: Spanned<String>) -> Option<(Object, Place)> {
        let at = place(source, text.span());
        let object = match text.as_ref().as_str() {
            "any" => Object::Any,
            name => match self.services.get(name) {
                Some((index, _)) => Object::Service(*index),
                None => {
                    let names = self.services.keys().cloned().collect();
                    let help = self.similar(name, names, "define it as a `[[service]]`");
                    self.error("unknown_service", &at, format!("no service is called `{name}`"), help);
                    return None;
                }
            },
        };
        Some((object, at))
    }

    /// Callers that authd does not hold by their cgroup can only be kept out of services that it guards.
    fn enforceable(&mut self, at: &Place, subject: Subject, object: Object, model: &Model) {
        let Object::Service(index) = object else { return };
        let service = &model.services[index];
        if service.workload.is_some() {
            return;
        }
        let who = match subject {
            Subject::Peer(peer) => format!("peer `{}`", model.peers[peer].name),
            Subject::Unmanaged => "unmanaged processes".to_owned(),
            Subject::Any | Subject::Workload(_) => return,
        };
        self.error(
            "unenforceable",
            at,
            format!("nothing on this node decides whether {who} may call `{}`, which is elsewhere", service.name),
            "name a workload as the caller, or a service with `workload = ...`",
        );
    }

    fn boundary(&mut self, at: &Place, subject: Subject, object: Object, model: &Model, label: Label, across: bool) {
        if across {
            return;
        }
        let (what, flag) = match label {
            Label::Tenant => ("tenant", "across_tenants"),
            Label::Environment => ("environment", "across_environments"),
        };
        let of_service = |s: &Service| match label {
            Label::Tenant => s.tenant.clone(),
            Label::Environment => s.environment.clone(),
        };
        let of_workload = |w: &Workload| match label {
            Label::Tenant => w.tenant.clone(),
            Label::Environment => w.environment.clone(),
        };
        let of_peer = |p: &Peer| match label {
            Label::Tenant => p.tenant.clone(),
            Label::Environment => p.environment.clone(),
        };
        let callers: Vec<Option<String>> = match subject {
            Subject::Workload(index) => vec![of_workload(&model.workloads[index])],
            Subject::Peer(index) => vec![of_peer(&model.peers[index])],
            Subject::Unmanaged => return,
            Subject::Any => model.workloads.iter().map(of_workload).chain(model.peers.iter().map(of_peer)).collect(),
        };
        let services: Vec<&Service> = match object {
            Object::Service(index) => vec![&model.services[index]],
            Object::Any => model.services.iter().collect(),
        };
        for service in services {
            let Some(theirs) = of_service(service) else { continue };
            if let Some(Some(caller)) = callers.iter().find(|c| c.as_ref().is_some_and(|c| *c != theirs)) {
                self.error(
                    "boundary",
                    at,
                    format!("the rule lets {what} `{caller}` call `{}` of {what} `{theirs}`", service.name),
                    format!("add `{flag} = true` if that is meant"),
                );
                return;
            }
        }
    }

    fn require(
        &mut self,
        source: &Source,
        require: Vec<Spanned<Proof>>,
        deny: bool,
        token: Option<&Spanned<file::Token>>,
        rule: &Place,
    ) -> Vec<Proof> {
        let mut proofs: Vec<Proof> = Vec::new();
        for proof in require {
            let at = place(source, proof.span());
            if deny {
                self.error(
                    "deny_requires",
                    &at,
                    "a deny rule requires nothing: it denies whoever it names",
                    "remove `require`, or make it an allow rule",
                );
                break;
            }
            let proof = proof.into_inner();
            if proofs.contains(&proof) {
                self.error("duplicate_proof", &at, "the same proof is required twice", "remove one");
            } else {
                proofs.push(proof);
            }
        }
        match (token, proofs.contains(&Proof::Token)) {
            (Some(token), false) => self.error(
                "unused_token",
                &place(source, token.span()),
                "the rule says what a token has to be, and requires none",
                "add `\"token\"` to `require`",
            ),
            (None, true) => self.error(
                "any_token",
                rule,
                "the rule requires a token and does not say which",
                "add `token = { issuer = \"...\", audience = \"...\" }`",
            ),
            _ => {}
        }
        proofs
    }

    fn hold(&mut self, source: &Source, pending: Option<Spanned<Pending>>, proofs: &[Proof]) -> bool {
        let Some(pending) = pending else { return false };
        if !proofs.iter().any(|proof| *proof != Proof::Cgroup) {
            self.error(
                "nothing_pending",
                &place(source, pending.span()),
                "the rule requires nothing that a connection could wait for",
                "remove `pending`, or add to `require`",
            );
        }
        if proofs.contains(&Proof::Node) && *pending.as_ref() == Pending::Hold {
            self.error(
                "held_node",
                &place(source, pending.span()),
                "a connection brings its node's word with it, or never: there is nothing to wait for",
                "remove `pending`",
            );
        }
        pending.into_inner() == Pending::Hold
    }

    fn token(&mut self, source: &Source, token: file::Token) -> Option<TokenRequirement> {
        let file::Token { issuer, audience, scopes, bound, subjects } = token;
        if let Some(audience) = audience.as_ref().filter(|audience| audience.as_ref().is_empty()) {
            let help = "write the `aud` that tokens for this service carry";
            self.error("bad_audience", &place(source, audience.span()), "an audience cannot be empty", help);
        }
        self.scopes(source, &scopes);
        self.subjects(source, subjects.as_ref());
        Some(TokenRequirement {
            issuer: self.named_issuer(source, &issuer)?,
            audience: audience.map(Spanned::into_inner),
            scopes: sorted(scopes.into_iter().map(Spanned::into_inner)),
            bound,
            subjects: sorted(subjects.into_iter().flat_map(Spanned::into_inner).map(Spanned::into_inner)),
        })
    }

    pub(super) fn scopes(&mut self, source: &Source, scopes: &[Spanned<String>]) {
        // RFC 6749, 3.3.
        let allowed = |byte: u8| matches!(byte, 0x21 | 0x23..=0x5b | 0x5d..=0x7e);
        for scope in scopes {
            if scope.as_ref().is_empty() || !scope.as_ref().bytes().all(allowed) {
                self.error(
                    "bad_scope",
                    &place(source, scope.span()),
                    format!("`{}` is no scope, and no token can have it", scope.as_ref()),
                    "write one scope per text, without spaces",
                );
            }
        }
    }

    pub(super) fn subjects(&mut self, source: &Source, subjects: Option<&Spanned<Vec<Spanned<String>>>>) {
        let Some(subjects) = subjects else { return };
        // An empty list would take anybody, and look as if it took nobody.
        let empty = subjects.as_ref().iter().find(|subject| subject.as_ref().is_empty()).map(Spanned::span);
        if let Some(span) = empty.or_else(|| subjects.as_ref().is_empty().then(|| subjects.span())) {
            let help = "name subjects, or leave `subjects` away to accept any";
            self.error("bad_subject", &place(source, span), "no token has such a subject", help);
        }
    }

    pub(super) fn named_issuer(&mut self, source: &Source, name: &Spanned<String>) -> Option<usize> {
        if let Some((index, _)) = self.issuers.get(name.as_ref()) {
            return Some(*index);
        }
        let help = self.similar(name.as_ref(), self.issuers.keys().cloned().collect(), "define an `[[issuer]]`");
        let message = format!("no issuer is called `{}`", name.as_ref());
        self.error("unknown_issuer", &place(source, name.span()), message, help);
        None
    }

    fn when(&mut self, source: &Source, when: file::When) -> Option<Schedule> {
        let file::When { days, hours, zone } = when;
        let mut week = [days.is_none(); 7];
        let mut sound = true;
        for text in days.map(Texts::spanned).unwrap_or_default() {
            match schedule::parse_days(text.as_ref()) {
                Ok(days) => days.into_iter().enumerate().for_each(|(day, on)| week[day] |= on),
                Err(error) => {
                    self.error("bad_days", &place(source, text.span()), error.to_string(), "correct the day");
                    sound = false;
                }
            }
        }
        let hours = match hours {
            None => (0, 24 * 60),
            Some(text) => match schedule::parse_hours(text.as_ref()) {
                Ok(hours) => hours,
                Err(error) => {
                    self.error("bad_hours", &place(source, text.span()), error.to_string(), "correct the hours");
                    return None;
                }
            },
        };
        let zone = match zone {
            None => TimeZone::UTC,
            Some(text) => match schedule::parse_zone(text.as_ref()) {
                Ok(zone) => zone,
                Err(error) => {
                    self.error("bad_zone", &place(source, text.span()), error.to_string(), "correct the zone");
                    return None;
                }
            },
        };
        sound.then(|| Schedule::new(week, hours, zone))
    }
}

pub(super) fn sorted<T: Ord>(items: impl Iterator<Item = T>) -> Vec<T> {
    let mut items: Vec<T> = items.collect();
    items.sort();
    items.dedup();
    items
}
