//! What is wrong with a policy, where, and what to do about it.
//!
//! Enters: findings with byte ranges. Leaves: text for people, or JSON. Never: the decision what counts as wrong.

use std::{ops::Range, sync::Arc};

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};

/// One policy file, as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub name: Arc<str>,
    pub text: Arc<str>,
}

/// A place in a file.
#[derive(Clone, Debug)]
pub struct Place {
    pub source: Source,
    pub span: Range<usize>,
}

impl Place {
    /// Of what no file says.
    pub fn nowhere() -> Self {
        Self { source: Source { name: "builtin".into(), text: "".into() }, span: 0..0 }
    }

    /// Line and column, from 1, in characters.
    pub fn line_column(&self) -> (usize, usize) {
        let before = self.source.text.get(..self.span.start).unwrap_or(&self.source.text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        (line, column)
    }

    pub fn describe(&self) -> String {
        let (line, column) = self.line_column();
        format!("{}:{line}:{column}", self.source.name)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Error,
    Warning,
}

#[derive(Clone, Debug)]
pub struct Diagnostic {
    pub severity: Severity,
    /// Stable name of the kind of finding.
    pub code: &'static str,
    pub message: String,
    /// Where; a finding about the whole policy has no place.
    pub place: Option<Place>,
    /// What to do.
    pub help: String,
    /// Another place that the finding is about, and what is there.
    pub related: Option<(Place, String)>,
}

impl Diagnostic {
    pub fn error(code: &'static str, place: Place, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            code,
            message: message.into(),
            place: Some(place),
            help: help.into(),
            related: None,
        }
    }

    pub fn warning(code: &'static str, place: Place, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(code, place, message, help) }
    }

    /// About no place in particular.
    pub fn general(code: &'static str, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { severity: Severity::Error, code, message: message.into(), place: None, help: help.into(), related: None }
    }

    pub fn with_related(mut self, place: &Place, label: impl Into<String>) -> Self {
        self.related = Some((place.clone(), label.into()));
        self
    }

    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }

    /// With the lines of the policy that it is about.
    pub fn render(&self, colours: bool) -> String {
        let level = match self.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let mut group = Group::with_title(level.primary_title(self.message.as_str()).id(self.code));
        if let Some(place) = &self.place {
            group = group.element(snippet(place, None));
        }
        if let Some((place, label)) = &self.related {
            group = group.element(snippet(place, Some(label)));
        }
        if !self.help.is_empty() {
            group = group.element(Level::HELP.message(self.help.as_str()));
        }
        let renderer = if colours { Renderer::styled() } else { Renderer::plain() };
        renderer.render(&[group]).to_string()
    }

    pub fn json(&self) -> serde_json::Value {
        let place = |place: &Place| {
            let (line, column) = place.line_column();
            serde_json::json!({ "file": &*place.source.name, "line": line, "column": column })
        };
        serde_json::json!({
            "severity": self.severity,
            "code": self.code,
            "message": self.message,
            "help": self.help,
            "place": self.place.as_ref().map(place),
            "related": self.related.as_ref().map(|(at, label)| serde_json::json!({ "place": place(at), "label": label })),
        })
    }
}

fn snippet<'a>(place: &'a Place, label: Option<&'a String>) -> Snippet<'a, annotate_snippets::Annotation<'a>> {
    let text = &*place.source.text;
    let end = place.span.end.min(text.len());
    let start = place.span.start.min(end);
    let kind = if label.is_none() { AnnotationKind::Primary } else { AnnotationKind::Context };
    let mut annotation = kind.span(start..end);
    if let Some(label) = label {
        annotation = annotation.label(label.as_str());
    }
    Snippet::source(text).path(&*place.source.name).annotation(annotation)
}
