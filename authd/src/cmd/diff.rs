//! `authd diff`

use std::{fmt::Write, path::Path, process::ExitCode};

use serde_json::Value;

use super::{BAD_CONFIG, print_diagnostics, settings};
use crate::{
    daemon::clock,
    policy::{
        diff::{
            Difference,
            definitions::{Definition, Edit, Field, differences},
            diff,
        },
        load,
    },
};

pub fn run(config: Option<&Path>, old: &Path, new: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let config = match settings(config) {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let ((before_sources, before), (after_sources, after)) =
        (load::directory_with_sources(old), load::directory_with_sources(new));
    let (Some(old), Some(new)) = (&before.model, &after.model) else {
        print_diagnostics(&before.diagnostics);
        print_diagnostics(&after.diagnostics);
        return Ok(ExitCode::from(BAD_CONFIG));
    };
    let difference = Difference {
        verdicts: diff(old, new, &config.options, clock::moment())?,
        definitions: differences(&before_sources, &after_sources)?,
    };
    if json {
        println!("{}", serde_json::to_string(&difference)?);
        return Ok(ExitCode::SUCCESS);
    }
    for change in &difference.verdicts {
        println!("{} -> {} ({}): {} becomes {}", change.from, change.service, change.to, change.before, change.after);
    }
    for definition in &difference.definitions {
        print!("{}", described(definition));
    }
    println!("{} verdicts change, {} definitions differ", difference.verdicts.len(), difference.definitions.len());
    Ok(ExitCode::SUCCESS)
}

/// A line for the definition, and one for each of its values that differ.
fn described(definition: &Definition) -> String {
    let title = format!("{} {}", definition.kind, definition.name);
    let what = match definition.change {
        Edit::Added => "is new",
        Edit::Removed => "is gone",
        Edit::Changed => "differs",
    };
    let mut lines = format!("{} {what}\n", title.trim_end());
    for Field { path, before, after } in &definition.fields {
        let separator = if path.is_empty() { "" } else { ": " };
        let _ = writeln!(lines, "    {path}{separator}{} becomes {}", shown(before), shown(after));
    }
    lines
}

/// Policies of many lines in one. Who reads another one's change does not have his terminal written to by it.
fn shown(value: &Value) -> String {
    let text = match value {
        Value::Null => "nothing".to_owned(),
        Value::String(text) => text.split_whitespace().collect::<Vec<_>>().join(" "),
        value => value.to_string(),
    };
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}
