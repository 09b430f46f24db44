//! Delegations: which workloads may act for whom, with what.

use std::{collections::HashMap, time::Duration};

use toml::Spanned;

use super::{Builder, place, rules::sorted};
use crate::{
    policy::{
        diagnostic::{Place, Source},
        file,
        model::{Delegation, Subject},
    },
    proofs::exchange::DEEPEST,
};

/// How long a token lives whose delegation does not say.
const DEFAULT_TTL: Duration = Duration::from_secs(300);
/// Longer ones are no short-lived tokens.
const LONGEST_TTL: Duration = Duration::from_secs(3_600);

impl Builder {
    pub(super) fn delegations(&mut self, raw: Vec<(Source, Spanned<file::Delegation>)>) -> Vec<Delegation> {
        let mut names: HashMap<String, Place> = HashMap::new();
        let mut all = Vec::new();
        for (source, raw) in raw {
            let name = place(&source, raw.as_ref().name.span());
            self.name(&name, raw.as_ref().name.as_ref());
            if let Some(first) = names.get(raw.as_ref().name.as_ref()) {
                self.duplicate(&name, first, "delegation", raw.as_ref().name.as_ref());
            }
            names.insert(raw.as_ref().name.as_ref().clone(), name.clone());
            all.extend(self.delegation(&source, raw.into_inner(), name));
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// `None` only after an error.
    fn delegation(&mut self, source: &Source, raw: file::Delegation, at: Place) -> Option<Delegation> {
        let file::Delegation { name, actors, issuer, subjects, audiences, scopes, ttl, depth, hands_on } = raw;
        if actors.is_empty() {
            let message = format!("nobody acts by delegation `{}`", name.as_ref());
            self.error("no_actor", &at, message, "name workloads in `actors`");
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
        Some(Delegation {
            name: name.into_inner(),
            actors: self.workloads_named(source, actors),
            issuer: issuer?,
            subjects: sorted(subjects.into_iter().flat_map(Spanned::into_inner).map(Spanned::into_inner)),
            audiences: sorted(audiences.into_iter().map(Spanned::into_inner)),
            scopes: sorted(scopes.into_iter().map(Spanned::into_inner)),
            ttl,
            depth,
            hands_on: self.workloads_named(source, hands_on),
            place: at,
        })
    }

    fn workloads_named(&mut self, source: &Source, names: Vec<Spanned<String>>) -> Vec<usize> {
        let mut found = Vec::new();
        for name in names {
            match self.callers.get(name.as_ref()) {
                Some((Subject::Workload(index), _)) => found.push(*index),
                Some(_) => {
                    let message = format!("`{}` is no workload of this node", name.as_ref());
                    let help = "who acts is known by its cgroup: name workloads";
                    self.error("not_a_workload", &place(source, name.span()), message, help);
                }
                None => {
                    let names = self.callers.keys().cloned().collect();
                    let help = self.similar(name.as_ref(), names, "define it as a `[[workload]]`");
                    let message = format!("no workload is called `{}`", name.as_ref());
                    self.error("unknown_caller", &place(source, name.span()), message, help);
                }
            }
        }
        sorted(found.into_iter())
    }
}
