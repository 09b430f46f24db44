//! A policy on its way into force: read, checked and compiled, off the daemon's own thread.

use std::path::Path;

use crate::policy::{
    compile::{CompileError, Moment, Options, Registry, compile},
    diagnostic::{Diagnostic, Source},
    image::Image,
    lint, load,
    model::Model,
    pattern::Patterns,
};

/// A policy that can be put into force.
#[derive(Clone)]
pub struct Prepared {
    pub sources: Vec<Source>,
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
        let Prepared { sources, model, mut registry, .. } = prepared.clone();
        let result = compile(&model, &mut registry, options, moment)
            .map(|image| Prepared { sources, model, registry, image })
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
            .map(|image| Prepared { sources, model, registry, image })
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

fn too_much(error: CompileError) -> Vec<Diagnostic> {
    vec![Diagnostic::general("capacity", error.to_string(), "shorten the policy")]
}
