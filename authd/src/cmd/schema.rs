//! `authd schema`

use std::{path::Path, process::ExitCode};

use super::{BAD_CONFIG, print_diagnostics};
use crate::{
    cli::SchemaOf,
    config, control,
    decisions::{
        SUFFIX,
        schema::{FIXED, generate},
    },
    policy::{diagnostic::Diagnostic, file, load},
};

pub fn run(of: SchemaOf, policy: Option<&Path>) -> anyhow::Result<ExitCode> {
    if policy.is_some() && of != SchemaOf::Cedar {
        anyhow::bail!(
            "only the schema of action policies differs from policy to policy: `authd schema cedar --policy DIR`"
        );
    }
    let schema = match of {
        SchemaOf::Api => {
            println!("{}", control::api::description());
            return Ok(ExitCode::SUCCESS);
        }
        SchemaOf::Cedar => return Ok(cedar(policy)),
        SchemaOf::Policy => schemars::schema_for!(file::File),
        SchemaOf::Config => schemars::schema_for!(config::File),
    };
    println!("{}", serde_json::to_string_pretty(&schema)?);
    Ok(ExitCode::SUCCESS)
}

/// Action policies are left out: whoever corrects one needs to know what it can name.
fn cedar(policy: Option<&Path>) -> ExitCode {
    let Some(directory) = policy else {
        print!("{FIXED}");
        return ExitCode::SUCCESS;
    };
    let (mut sources, mut diagnostics) = load::read_sources(directory);
    sources.retain(|source| !source.name.ends_with(SUFFIX));
    let policy = load::texts(sources);
    diagnostics.extend(policy.diagnostics);
    match policy.model.filter(|_| !diagnostics.iter().any(Diagnostic::is_error)) {
        Some(model) => {
            print!("{}", generate(&model));
            ExitCode::SUCCESS
        }
        None => {
            print_diagnostics(&diagnostics);
            ExitCode::from(BAD_CONFIG)
        }
    }
}
