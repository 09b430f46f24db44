//! A policy on its way into force: read, checked and compiled, off the daemon's own thread.

use std::path::Path;

use crate::{
    digest::Digest,
    policy::{
        compile::{CompileError, Moment, Options, Registry, compile},
        diagnostic::{Diagnostic, Source},
        image::Image,
        lint, load,
        model::Model,
        pattern::Patterns,
    },
};

/// A policy that can be put into force.
#[derive(Clone)]
pub struct Prepared {
    pub sources: Vec<Source>,
    /// Of all that they say.
    pub digest: Digest,
    pub model: Model,
    pub registry: Registry,
    pub image: Image,
}

pub struct Candidate {
    pub result: Result<Prepared, Vec<Diagnostic>>,
    pub warnings: usize,
}

impl Candidate {
    pub fn from_directory(path: &Path, options: &Options, registry: Registry, moment: Moment) -> Self {
        let (sources, policy) = load::directory_with_sources(path);
        Self::new(sources, policy, options, registry, moment)
    }

    pub fn from_sources(sources: Vec<Source>, options: &Options, registry: Registry, moment: Moment) -> Self {
        let policy = load::texts(sources.clone());
        Self::new(sources, policy, options, registry, moment)
    }

    /// The same policy at another moment.
    pub fn again(prepared: &Prepared, options: &Options, moment: Moment) -> Self {
        let Prepared { sources, digest, model, mut registry, .. } = prepared.clone();
        let result = compile(&model, &mut registry, options, moment)
            .map(|image| Prepared { sources, digest, model, registry, image })
            .map_err(too_much);
        Self { result, warnings: 0 }
    }

    /// No policy, for a reason that is not in the policy.
    pub fn failed(message: &str) -> Self {
        let diagnostic = Diagnostic::general("internal", message, "report it, with the policy");
        Self { result: Err(vec![diagnostic]), warnings: 0 }
    }

    fn new(
        sources: Vec<Source>,
        policy: load::Policy,
        options: &Options,
        mut registry: Registry,
        moment: Moment,
    ) -> Self {
        let Some(model) = policy.model else {
            let errors: Vec<Diagnostic> = policy.diagnostics.into_iter().filter(Diagnostic::is_error).collect();
            return Self { result: Err(errors), warnings: 0 };
        };
        let warnings = policy.diagnostics.len() + lint::lint(&model).len();
        registry.assign(&model, options);
        let result = compile(&model, &mut registry, options, moment)
            .map(|image| Prepared { digest: digest(&sources), sources, model, registry, image })
            .map_err(too_much);
        Self { result, warnings }
    }
}

impl Prepared {
    pub fn patterns(&self) -> Patterns {
        self.model
            .patterns(|index| self.registry.workloads.number(&self.model.workloads[index].name).unwrap_or_default())
    }

    pub fn compile_at(&self, options: &Options, moment: Moment) -> Result<Image, CompileError> {
        compile(&self.model, &mut self.registry.clone(), options, moment)
    }
}

/// A change of one character is another policy.
fn digest(sources: &[Source]) -> Digest {
    let mut text = Vec::from(*b"authd policy 1\0");
    for Source { name, text: content } in sources {
        for part in [&**name, &**content] {
            text.extend((part.len() as u64).to_be_bytes());
            text.extend(part.as_bytes());
        }
    }
    Digest::of(&text)
}

fn too_much(error: CompileError) -> Vec<Diagnostic> {
    vec![Diagnostic::general("capacity", error.to_string(), "shorten the policy")]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_character_of_a_policy_is_in_its_digest() {
        let source = |name: &str, text: &str| Source { name: name.into(), text: text.into() };
        let one = digest(&[source("a", "b"), source("c", "d")]);
        assert_eq!(one, digest(&[source("a", "b"), source("c", "d")]));
        for other in [
            vec![source("a", "b")],
            vec![source("a", "b"), source("c", "D")],
            vec![source("ab", ""), source("c", "d")],
            vec![source("c", "d"), source("a", "b")],
            vec![],
        ] {
            assert_ne!(one, digest(&other), "{other:?}");
        }
    }
}
