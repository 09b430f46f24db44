//! `authd schema`

use std::process::ExitCode;

use crate::{cli::SchemaOf, config, control, policy::file};

pub fn run(of: SchemaOf) -> anyhow::Result<ExitCode> {
    let schema = match of {
        SchemaOf::Api => {
            println!("{}", control::api::description());
            return Ok(ExitCode::SUCCESS);
        }
        SchemaOf::Policy => schemars::schema_for!(file::File),
        SchemaOf::Config => schemars::schema_for!(config::File),
    };
    println!("{}", serde_json::to_string_pretty(&schema)?);
    Ok(ExitCode::SUCCESS)
}
