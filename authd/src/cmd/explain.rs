//! `authd explain`

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, anyhow};

use super::{BAD_CONFIG, ask, print_diagnostics, settings, unexpected};
use crate::{
    config::Config,
    daemon::{
        admin::{Answer, Explained, Request},
        clock,
    },
    policy::{
        compile::{Registry, compile},
        explain::{From, Policy},
        load,
    },
};

/// The question, as the command line has it.
pub struct Question {
    pub from: String,
    pub to: String,
    pub at: Option<String>,
    pub policy: Option<PathBuf>,
}

pub fn run(config: Option<&Path>, question: Question, json: bool) -> anyhow::Result<ExitCode> {
    let config = match settings(config) {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let explained = match &question.policy {
        None => {
            let Question { from, to, at, .. } = question;
            match ask(&config, &Request::Explain { from, to, at })? {
                Answer::Explanation(explained) => *explained,
                other => return Err(unexpected(other)),
            }
        }
        Some(directory) => match offline(&config, directory, &question)? {
            Ok(explained) => explained,
            Err(code) => return Ok(code),
        },
    };
    match json {
        true => println!("{}", explained.json),
        false => print!("{}", explained.text),
    }
    Ok(ExitCode::SUCCESS)
}

fn offline(config: &Config, directory: &Path, question: &Question) -> anyhow::Result<Result<Explained, ExitCode>> {
    let policy = load::directory(directory);
    let Some(model) = policy.model else {
        print_diagnostics(&policy.diagnostics);
        return Ok(Err(ExitCode::from(BAD_CONFIG)));
    };
    let from = From::parse(&question.from, &model)
        .ok_or_else(|| anyhow!("`{}` is no workload, peer or address, and not `unmanaged`", question.from))?;
    let to = question.to.parse()?;
    let mut moment = clock::moment();
    if let Some(at) = &question.at {
        moment.wall = at.parse().with_context(|| format!("`{at}` is no RFC 3339 time"))?;
    }
    let mut registry = Registry::default();
    registry.assign(&model, &config.options);
    let image = compile(&model, &registry, &config.options, moment)?;
    let policy = Policy { model: &model, registry: &registry, options: &config.options, image: &image, moment };
    Ok(Ok(Explained::new(&policy.explain(from, to))))
}
