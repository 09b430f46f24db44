//! `authd act`: asks whether a tool may be called, and waits for the approval if it has to.

use std::{
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context;
use hyper::{
    HeaderMap, Method, StatusCode,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue},
};
use serde_json::Value;

use super::{
    FAILED,
    dpop_key::DpopKey,
    grant::{identity, secret, target, text_of},
};
use crate::{
    cli::ActQuestion,
    client::{self, Answer, Identity, Target},
};

const PATH: &str = "/v1/actions";
/// The call waits for an approval: neither yes nor no.
const PENDING: u8 = 75;
/// How often the same call is asked about again.
const AGAIN: Duration = Duration::from_secs(1);

pub fn run(config: Option<&Path>, question: &ActQuestion) -> anyhow::Result<ExitCode> {
    let target = match target(config, &question.caller) {
        Ok(target) => target?,
        Err(code) => return Ok(code),
    };
    let identity = identity(&question.caller)?;
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
    let token = question.token_file.as_deref().map(text_of).transpose()?;
    let dpop = question.dpop_key.as_deref().map(DpopKey::read).transpose()?;
    let mut nonce: Option<String> = None;
    loop {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(token) = &token {
            let scheme = if dpop.is_some() { "DPoP" } else { "Bearer" };
            headers.insert(AUTHORIZATION, secret(&format!("{scheme} {token}"))?);
            if let Some(key) = &dpop {
                let proof = key.proof(target, PATH, Some(token), nonce.as_deref())?;
                headers.insert(HeaderName::from_static("dpop"), secret(&proof)?);
            }
        }
        let body = body.as_bytes().to_vec();
        let Answer { status, headers, body } = client::ask(target, identity, Method::POST, PATH, headers, body).await?;
        // RFC 9449, 8: the server says which nonce it wants, once.
        let wanted = headers.get("dpop-nonce").and_then(|value| value.to_str().ok()).map(str::to_owned);
        if status == StatusCode::UNAUTHORIZED && dpop.is_some() && nonce.is_none() && wanted.is_some() {
            nonce = wanted;
            continue;
        }
        return serde_json::from_slice(&body).context("the answer is no JSON");
    }
}

fn list(names: &Value) -> String {
    let names = names.as_array().into_iter().flatten().filter_map(Value::as_str);
    names.collect::<Vec<_>>().join(", ")
}
