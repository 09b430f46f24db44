//! Reads a directory of policy files.
//!
//! Enters: a directory. Leaves: a model and its diagnostics. Never: a half-read policy; one bad file spoils all.

use std::{fs, io, os::unix::fs::PermissionsExt, path::Path, sync::Arc};

use super::{
    build,
    diagnostic::{Diagnostic, Place, Source},
    file,
    model::Model,
};
use crate::decisions;

/// No policy file is as long as this; what is, is something else.
pub const MAX_FILE_BYTES: u64 = 64 << 20;

/// What a directory says.
pub struct Policy {
    /// `None` if some diagnostic is an error.
    pub model: Option<Model>,
    pub diagnostics: Vec<Diagnostic>,
}

impl Policy {
    pub fn errors(&self) -> usize {
        self.diagnostics.iter().filter(|d| d.is_error()).count()
    }
}

/// Reads all `*.toml` and `*.cedar` files of a directory, in the order of their names. Hidden files are left out, as editors make
/// them.
pub fn directory(path: &Path) -> Policy {
    directory_with_sources(path).1
}

/// The same, with what was read.
pub fn directory_with_sources(path: &Path) -> (Vec<Source>, Policy) {
    let (sources, diagnostics) = read_sources(path);
    let policy = if diagnostics.is_empty() { texts(sources.clone()) } else { Policy { model: None, diagnostics } };
    (sources, policy)
}

/// The files of a directory, and what could not be read.
pub fn read_sources(path: &Path) -> (Vec<Source>, Vec<Diagnostic>) {
    let mut diagnostics = Vec::new();
    let mut sources = Vec::new();
    let mut unreadable = |path: &Path, error: io::Error| {
        diagnostics.push(Diagnostic::general(
            "unreadable",
            format!("{}: {error}", path.display()),
            "authd needs to read every policy file: with one missing, the policy would say something else",
        ));
    };
    match file_names(path) {
        Err(error) => unreadable(path, error),
        Ok(names) => {
            for name in names {
                match read(&path.join(&name)) {
                    Ok(text) => sources.push(Source { name: name.into(), text: text.into() }),
                    Err(error) => unreadable(&path.join(&name), error),
                }
            }
            // Action policies alone say nothing: what they name is defined nowhere.
            if sources.iter().all(is_cedar) && diagnostics.is_empty() {
                diagnostics.push(Diagnostic::general(
                    "no_files",
                    format!("{} holds no policy file", path.display()),
                    "a policy is one or more files whose names end with `.toml`",
                ));
            }
        }
    }
    (sources, diagnostics)
}

/// The same from texts that were read already.
pub fn texts(sources: Vec<Source>) -> Policy {
    let mut diagnostics = Vec::new();
    let mut files = Vec::new();
    let (cedar, toml): (Vec<Source>, Vec<Source>) = sources.into_iter().partition(is_cedar);
    let (written, of_cedar) = decisions::read(&cedar);
    for source in toml {
        match toml::from_str::<file::File>(&source.text) {
            Ok(file) => files.push((source, file)),
            Err(error) => {
                let span = error.span().unwrap_or(0..0);
                let message = error.message().trim_end().to_owned();
                let help = remedy(&message);
                diagnostics.push(Diagnostic::error("syntax", Place { source, span }, message, help));
            }
        }
    }
    if !diagnostics.is_empty() {
        // Names in the files that could be read may be defined in the ones that could not.
        diagnostics.extend(of_cedar);
        return Policy { model: None, diagnostics };
    }
    let (model, mut diagnostics) = build::build(files);
    let unread = of_cedar.iter().any(Diagnostic::is_error);
    diagnostics.extend(of_cedar);
    let Some(mut model) = model.filter(|_| !unread) else { return Policy { model: None, diagnostics } };
    let (actions, of_actions) = decisions::load(&model, written);
    diagnostics.extend(of_actions);
    let model = actions.map(|actions| {
        model.actions = Arc::new(actions);
        model
    });
    Policy { model, diagnostics }
}

fn is_cedar(source: &Source) -> bool {
    source.name.ends_with(decisions::SUFFIX)
}

fn file_names(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        let Some(name) = name.to_str() else { continue };
        let is_policy = name.ends_with(".toml") || name.ends_with(decisions::SUFFIX);
        if is_policy && !name.starts_with('.') {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn read(path: &Path) -> io::Result<String> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("is no regular file"));
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Err(io::Error::other(format!("is longer than {MAX_FILE_BYTES} bytes")));
    }
    if metadata.permissions().mode() & 0o002 != 0 {
        return Err(io::Error::other("may be written by everybody: `chmod o-w` it"));
    }
    fs::read_to_string(path)
}

fn remedy(message: &str) -> &'static str {
    if message.starts_with("unknown field") {
        "correct or remove the key: an unknown key could be a misspelt limit"
    } else if message.starts_with("missing field") {
        "add the key"
    } else if message.starts_with("unknown variant") {
        "use one of the values that are listed"
    } else if message.starts_with("invalid type: map, expected a sequence") {
        "write the header in double brackets, such as `[[rule]]`: there can be many"
    } else if message.starts_with("invalid type") {
        "write a value of the type that the key takes"
    } else if message.contains("duplicate key") {
        "remove one of the two"
    } else {
        "correct the TOML"
    }
}
