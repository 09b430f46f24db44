//! Delegations: which workloads may act for whom, with what.

use std::{collections::HashMap, time::Duration};

use toml::Spanned;

use super::{Builder, place, rules::sorted};
use crate::{
    policy::{
        diagnostic::{Place, Source},
        file,
        model::{Actor, Delegation, Model, OWN_ISSUER, Subject},
    },
    proofs::exchange::DEEPEST,
};

/// How long a token lives whose delegation does not say.
const DEFAULT_TTL: Duration = Duration::from_secs(300);
/// Longer ones are no short-lived tokens.
const LONGEST_TTL: Duration = Duration::from_secs(3_600);

impl Builder {
    pub(super) fn delegations(
        &mut self,
        raw: Vec<(Source, Spanned<file::Delegation>)>,
        model: &Model,
    ) -> Vec<Delegation> {
        let mut names: HashMap<String, Place> = HashMap::new();
        let mut all = Vec::new();
        for (source, raw) in raw {
            let name = place(&source, raw.as_ref().name.span());
            self.name(&name, raw.as_ref().name.as_ref());
            if let Some(first) = names.get(raw.as_ref().name.as_ref()) {
                self.duplicate(&name, first, "delegation", raw.as_ref().name.as_ref());
            }
            names.insert(raw.as_ref().name.as_ref().clone(), name.clone());
            all.extend(self.delegation(&source, raw.into_inner(), name, model));
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        self.tell_apart(&all, model);
        all
    }

    /// Tokens of this node say `sub`, and that has to be one person, whoever reads it (RFC 7519, 4.1.2).
    fn tell_apart(&mut self, all: &[Delegation], model: &Model) {
        let of_others = |delegation: &&Delegation| {
            model.issuers.get(delegation.issuer).is_some_and(|issuer| issuer.name != OWN_ISSUER)
        };
        let all: Vec<&Delegation> = all.iter().filter(of_others).collect();
        for (index, second) in all.iter().enumerate() {
            let both = |first: &&&Delegation| {
                let shared = || first.subjects.iter().any(|subject| second.subjects.contains(subject));
                first.issuer != second.issuer && (first.subjects.is_empty() || second.subjects.is_empty() || shared())
            };
            let Some(first) = all[..index].iter().find(both) else { continue };
            let name = |index: usize| model.issuers.get(index).map(|issuer| issuer.name.as_str()).unwrap_or_default();
            let (one, other) = (name(first.issuer), name(second.issuer));
            let message = format!(
                "tokens by delegations `{}` and `{}` could be about a subject of `{one}` or one of `{other}` with the same name",
                first.name, second.name
            );
            let help = "name `subjects` in both, and each of them in one only";
            self.error("ambiguous_subject", &second.place, message, help);
        }
    }

    /// `None` only after an error.
    fn delegation(&mut self, source: &Source, raw: file::Delegation, at: Place, model: &Model) -> Option<Delegation> {
        let file::Delegation {
            name,
            actors,
            issuer,
            subjects,
            audiences,
            scopes,
            ttl,
            depth,
            hands_on,
            across_tenants,
        } = raw;
        if actors.is_empty() {
            let message = format!("nobody acts by delegation `{}`", name.as_ref());
            self.error("no_actor", &at, message, "name workloads or peers in `actors`");
        }
        if audiences.is_empty() {
            let message = format!("a token by delegation `{}` would be for nobody", name.as_ref());
            self.error("bad_audience", &at, message, "name in `audiences` whom tokens may be for");
        }
        for audience in audiences.iter().filter(|audience| audience.as_ref().is_empty()) {
            let help = "write the `aud` that tokens carry";
            self.error("bad_audience", &place(source, audience.span()), "an audience cannot be empty", help);
        }
        self.scopes(source, &scopes);
        self.subjects(source, subjects.as_ref());
        let issuer = self.named_issuer(source, &issuer);
        let ttl = match ttl {
            None => DEFAULT_TTL,
            Some(text) => {
                let ttl = self.duration(source, &text)?;
                if ttl > LONGEST_TTL {
                    let message = "a token that lets somebody act for another one lives for an hour at most";
                    self.error("long_token", &place(source, text.span()), message, "choose a shorter `ttl`");
                }
                ttl
            }
        };
        let depth = match depth {
            None => 1,
            Some(depth) if (1..=DEEPEST).contains(depth.as_ref()) => depth.into_inner(),
            Some(depth) => {
                let message = format!("{} is no number of actors from 1 to {DEEPEST}", depth.as_ref());
                self.error("bad_depth", &place(source, depth.span()), message, "1 lets nobody hand anything on");
                return None;
            }
        };
        if let (Some(first), 1) = (hands_on.first(), depth) {
            let message = "whoever hands on makes two actors, and `depth` is 1";
            self.error("bad_depth", &place(source, first.span()), message, "add `depth = 2`");
        }
        if !across_tenants {
            self.one_tenant(source, actors.iter().chain(&hands_on), model);
        }
        Some(Delegation {
            name: name.into_inner(),
            actors: self.actors(source, actors, model),
            issuer: issuer?,
            subjects: sorted(subjects.into_iter().flat_map(Spanned::into_inner).map(Spanned::into_inner)),
            audiences: sorted(audiences.into_iter().map(Spanned::into_inner)),
            scopes: sorted(scopes.into_iter().map(Spanned::into_inner)),
            ttl,
            depth,
            hands_on: self.actors(source, hands_on, model),
            across_tenants,
            place: at,
        })
    }

    /// Who acts has a SPIFFE ID, which tokens name.
    fn actors(&mut self, source: &Source, names: Vec<Spanned<String>>, model: &Model) -> Vec<Actor> {
        let mut found = Vec::new();
        for name in names {
            let at = place(source, name.span());
            match self.callers.get(name.as_ref()).map(|(subject, _)| *subject) {
                Some(Subject::Workload(index)) => found.push(Actor::Workload(index)),
                Some(Subject::Peer(index)) if model.peers[index].spiffe_id.is_some() => found.push(Actor::Peer(index)),
                Some(Subject::Peer(_)) => {
                    let message = format!("tokens have no name for peer `{}`", name.as_ref());
                    self.error("nameless_actor", &at, message, "say by which `spiffe_id` its certificate knows it");
                }
                Some(Subject::Any | Subject::Unmanaged) | None => {
                    let names = self.callers.keys().cloned().collect();
                    let help = self.similar(name.as_ref(), names, "define it as a `[[workload]]`");
                    let message = format!("no workload or peer is called `{}`", name.as_ref());
                    self.error("unknown_caller", &at, message, help);
                }
            }
        }
        sorted(found.into_iter())
    }

    /// Whoever takes over another one's part gets what that one was given.
    fn one_tenant<'a>(&mut self, source: &Source, names: impl Iterator<Item = &'a Spanned<String>>, model: &Model) {
        let mut first: Option<(&'a Spanned<String>, Option<String>)> = None;
        for name in names {
            let tenant = match self.callers.get(name.as_ref()) {
                Some((Subject::Workload(index), _)) => model.workloads[*index].tenant.clone(),
                Some((Subject::Peer(index), _)) => model.peers[*index].tenant.clone(),
                _ => continue,
            };
            match &first {
                None => first = Some((name, tenant)),
                Some((_, other)) if *other == tenant => {}
                Some((other, _)) => {
                    let message = format!("`{}` is of another tenant than `{}`", name.as_ref(), other.as_ref());
                    let help = "write a delegation for each tenant, or `across_tenants = true` if that is meant";
                    self.error("across_tenants", &place(source, name.span()), message, help);
                }
            }
        }
    }
}
