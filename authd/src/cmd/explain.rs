//! `authd explain`

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, anyhow};
use base64::{Engine, prelude::BASE64_STANDARD};

use super::{BAD_CONFIG, ask, capture, print_diagnostics, settings, unexpected};
use crate::{
    config::Config,
    daemon::{
        admin::{Answer, Explained, Request},
        clock,
        frames::FrameVerdict,
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

/// No header that matters lies behind this.
const LEADING: usize = 600;
/// Frames per question.
const BATCH: usize = 64;

/// What would become of each frame of a capture.
pub fn frames(config: Option<&Path>, path: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let config = match settings(config) {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let (mut number, mut waiting) = (0, Vec::new());
    let mut ask_about = |waiting: &mut Vec<String>| -> anyhow::Result<()> {
        let frames = std::mem::take(waiting);
        let verdicts = match ask(&config, &Request::Frames { frames })? {
            Answer::Frames { verdicts } => verdicts,
            other => return Err(unexpected(other)),
        };
        for verdict in verdicts {
            number += 1;
            print_frame(number, &verdict, json)?;
        }
        Ok(())
    };
    capture::frames(path, |frame| {
        waiting.push(BASE64_STANDARD.encode(&frame[..frame.len().min(LEADING)]));
        if waiting.len() == BATCH { ask_about(&mut waiting) } else { Ok(()) }
    })?;
    if !waiting.is_empty() {
        ask_about(&mut waiting)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print_frame(number: u64, verdict: &FrameVerdict, json: bool) -> anyhow::Result<()> {
    if json {
        let mut value = serde_json::to_value(verdict)?;
        value["frame"] = number.into();
        println!("{value}");
        return Ok(());
    }
    let FrameVerdict { verdict, reason, rule, workload, packet } = verdict;
    let packet = packet.as_deref().unwrap_or("no IP packet");
    let rule = rule.as_ref().map_or(String::new(), |rule| format!(", rule {rule}"));
    let workload = workload.as_ref().map_or(String::new(), |workload| format!(", to {workload}"));
    println!("{number:>6}  {verdict:<8} {packet}: {reason}{rule}{workload}");
    Ok(())
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
    let image = compile(&model, &mut registry, &config.options, moment)?;
    let policy = Policy { model: &model, registry: &registry, options: &config.options, image: &image, moment };
    Ok(Ok(Explained::new(&policy.explain(from, to))))
}
