//! `authd token exchange` and `authd token keys`

use std::{path::Path, process::ExitCode};

use anyhow::Context;
use hyper::{
    Method, StatusCode,
    header::{CONTENT_TYPE, HeaderValue},
};
use serde_json::Value;

use super::{
    FAILED, ask,
    grant::{identity, target, text_of},
    settings,
    shown::Shown,
    unexpected,
};
use crate::{
    cli::ExchangeQuestion,
    client,
    daemon::admin::{self, Request, SigningKey},
};

const PATH: &str = "/v1/token";

pub fn run(config: Option<&Path>, question: &ExchangeQuestion) -> anyhow::Result<ExitCode> {
    let target = match target(config, &question.caller) {
        Ok(target) => target?,
        Err(code) => return Ok(code),
    };
    let identity = identity(&question.caller.identity)?;
    let token = text_of(&question.subject_token_file)?;
    let mut shown = Shown::read(None, question.dpop_key.as_deref())?;
    let body = form(question, &token);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime.block_on(async {
        loop {
            let mut headers = shown.headers(&target, PATH)?;
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
            let body = body.clone().into_bytes();
            let answer = client::ask(&target, identity.as_ref(), Method::POST, PATH, headers, body).await?;
            if !shown.again(answer.status, &answer.headers) {
                return anyhow::Ok(answer);
            }
        }
    })?;
    let body: Value = serde_json::from_slice(&answer.body).context("the answer is no JSON")?;
    let text = |key: &str| body[key].as_str().unwrap_or_default();
    let given = answer.status == StatusCode::OK;
    match (question.json, given) {
        (true, _) => println!("{body}"),
        (false, true) => println!("{}", text("access_token")),
        (false, false) => eprintln!("authd: refused ({}): {}", text("reason"), text("error_description")),
    }
    Ok(if given { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

/// RFC 8693, 2.1.
fn form(question: &ExchangeQuestion, token: &str) -> String {
    let mut form = form_urlencoded::Serializer::new(String::new());
    form.append_pair("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange");
    form.append_pair("subject_token", token);
    form.append_pair("subject_token_type", "urn:ietf:params:oauth:token-type:access_token");
    for audience in &question.audience {
        form.append_pair("audience", audience);
    }
    if !question.scope.is_empty() {
        form.append_pair("scope", &question.scope.join(" "));
    }
    if let Some(seconds) = question.seconds {
        form.append_pair("expires_in", &seconds.to_string());
    }
    form.finish()
}

pub fn keys(config: Option<&Path>, rotate: bool, json: bool) -> anyhow::Result<ExitCode> {
    let config = match settings(config) {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let request = if rotate { Request::SigningKeyRotate } else { Request::SigningKeys };
    match ask(&config, &request)? {
        admin::Answer::SigningKeys { issuer, keys, tokens } if json => {
            println!("{}", serde_json::json!({ "issuer": issuer, "keys": keys, "tokens": tokens }));
        }
        admin::Answer::SigningKeys { issuer, keys, tokens } => {
            println!("{issuer}: {tokens} tokens live");
            for SigningKey { kid, signs_from, state } in keys {
                println!("{kid}  {state:<6}  signs from {signs_from}");
            }
        }
        other => return Err(unexpected(other)),
    }
    Ok(ExitCode::SUCCESS)
}
