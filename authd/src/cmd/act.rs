//! `authd act`: asks whether a tool may be called, and waits for the approval if it has to.

use std::{
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context;
use hyper::{
    Method,
    header::{CONTENT_TYPE, HeaderValue},
};
use serde_json::Value;

use super::{FAILED, grant::identity, settings, shown::Shown};
use crate::{
    cli::ActQuestion,
    client::{self, Identity, Target},
};

const PATH: &str = "/v1/actions";
/// The call waits for an approval: neither yes nor no.
const PENDING: u8 = 75;
/// How often the same call is asked about again.
const AGAIN: Duration = Duration::from_secs(1);

pub fn run(config: Option<&Path>, question: &ActQuestion) -> anyhow::Result<ExitCode> {
    // Workloads ask on their own node: it is the kernel that says who they are.
    let target = match settings(config) {
        Ok(settings) => Target::Socket(settings.control.socket),
        Err(code) => return Ok(code),
    };
    let identity = identity(&question.identity)?;
    // As it was written: what is decided about is what it says, to the last digit.
    let body = format!("{{\"tool\":{},\"arguments\":{}}}", Value::from(question.tool.as_str()), question.arguments);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let started = Instant::now();
    let answer = loop {
        let answer = runtime.block_on(ask(&target, identity.as_ref(), question, &body))?;
        let pending = answer["decision"] == "pending";
        let patience = question.wait.map(|seconds| Duration::from_secs(seconds.into()));
        if !pending || patience.is_none_or(|patience| started.elapsed() >= patience) {
            break answer;
        }
        std::thread::sleep(AGAIN);
    };
    let text = |key: &str| answer[key].as_str().unwrap_or_default();
    let decision = text("decision");
    if question.json {
        println!("{answer}");
    } else if decision == "allow" {
        println!("allowed by {}", list(&answer["policies"]));
    } else {
        let (reason, detail) = (text("reason"), if decision.is_empty() { text("detail") } else { text("message") });
        eprintln!("authd: {} ({reason}): {detail}", if decision == "pending" { "not yet" } else { "refused" });
    }
    Ok(match decision {
        "allow" => ExitCode::SUCCESS,
        "pending" => ExitCode::from(PENDING),
        _ => ExitCode::from(FAILED),
    })
}

async fn ask(
    target: &Target,
    identity: Option<&Identity>,
    question: &ActQuestion,
    body: &str,
) -> anyhow::Result<Value> {
    let mut shown = Shown::read(question.token_file.as_deref(), question.dpop_key.as_deref())?;
    loop {
        let mut headers = shown.headers(target, PATH)?;
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let answer = client::ask(target, identity, Method::POST, PATH, headers, body.as_bytes().to_vec()).await?;
        if !shown.again(answer.status, &answer.headers) {
            return serde_json::from_slice(&answer.body).context("the answer is no JSON");
        }
    }
}

fn list(names: &Value) -> String {
    let names = names.as_array().into_iter().flatten().filter_map(Value::as_str);
    names.collect::<Vec<_>>().join(", ")
}
