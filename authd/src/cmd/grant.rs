//! `authd grant`: shows proofs, and gets a grant. With `--keep`, again and again.

use std::{fs, path::Path, process::ExitCode, time::Duration};

use anyhow::{Context, bail};
use hyper::{
    Method, StatusCode,
    header::{CONTENT_TYPE, HeaderName, HeaderValue},
};
use serde_json::{Value, json};

use super::shown::Shown;
use crate::{
    cli::{CallerArgs, GrantQuestion, IdentityArgs},
    client::{self, Answer, Identity, Target},
};

const PATH: &str = "/v1/grants";
/// A grant is asked for again when this much of its time is left, of eight parts.
const RENEW_AT: u32 = 3;
/// After a failure that may pass.
const RETRY: Duration = Duration::from_secs(5);

pub fn run(config: Option<&Path>, question: GrantQuestion) -> anyhow::Result<ExitCode> {
    let target = match target(config, &question.caller) {
        Ok(target) => target?,
        Err(code) => return Ok(code),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        loop {
            let asked = ask(&target, &question).await;
            if !question.keep {
                return report(&asked?, question.json);
            }
            let pause = match asked {
                Ok(answer) if answer.status == StatusCode::CREATED => {
                    report(&answer, question.json)?;
                    let grant: Value = serde_json::from_slice(&answer.body)?;
                    let left = Duration::from_secs(grant["expires_in"].as_u64().unwrap_or(0));
                    (left * (8 - RENEW_AT) / 8).max(Duration::from_secs(1))
                }
                // What the caller shows is not enough: the same again will not help, other files may.
                Ok(answer) => {
                    report(&answer, question.json)?;
                    RETRY
                }
                Err(error) => {
                    eprintln!("authd: {error:#}");
                    RETRY
                }
            };
            tokio::time::sleep(pause).await;
        }
    })
}

/// Where to ask, or the exit code after saying what is wrong with the settings.
pub fn target(config: Option<&Path>, caller: &CallerArgs) -> Result<anyhow::Result<Target>, ExitCode> {
    let Some(url) = &caller.url else {
        return Ok(Ok(Target::Socket(super::settings(config)?.control.socket)));
    };
    Ok(peer(url, caller.ca.as_deref()))
}

fn peer(url: &str, authorities: Option<&Path>) -> anyhow::Result<Target> {
    let uri: http::Uri = url.parse().with_context(|| format!("`{url}` is no URL"))?;
    if uri.scheme_str() != Some("https") {
        bail!("`{url}` is no https URL");
    }
    let host = uri.host().context("the URL has a host")?.trim_matches(['[', ']']).to_owned();
    let authorities = authorities.context("name the authorities of its certificate with --ca")?;
    let authorities = fs::read(authorities).with_context(|| authorities.display().to_string())?;
    Ok(Target::Peer { host, port: uri.port_u16().unwrap_or(7443), authorities })
}

pub fn identity(files: &IdentityArgs) -> anyhow::Result<Option<Identity>> {
    let (Some(cert), Some(key)) = (&files.cert, &files.key) else { return Ok(None) };
    let read = |path: &Path| fs::read(path).with_context(|| path.display().to_string());
    Ok(Some(Identity { certificates: read(cert)?, key: read(key)? }))
}

async fn ask(target: &Target, question: &GrantQuestion) -> anyhow::Result<Answer> {
    let identity = identity(&question.caller.identity)?;
    let mut shown = Shown::read(question.token_file.as_deref(), question.dpop_key.as_deref())?;
    let api_key = question.api_key_file.as_deref().map(text_of).transpose()?;
    let body = serde_json::to_vec(&json!({ "rule": question.rule, "seconds": question.seconds }))?;
    loop {
        let mut headers = shown.headers(target, PATH)?;
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(key) = &api_key {
            headers.insert(HeaderName::from_static("x-api-key"), secret(key)?);
        }
        let answer = client::ask(target, identity.as_ref(), Method::POST, PATH, headers, body.clone()).await?;
        if !shown.again(answer.status, &answer.headers) {
            return Ok(answer);
        }
    }
}

/// A file with one secret, such as a systemd credential.
pub fn text_of(path: &Path) -> anyhow::Result<String> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(text.trim().to_owned())
}

pub fn secret(text: &str) -> anyhow::Result<HeaderValue> {
    let mut value = HeaderValue::from_str(text).context("a credential has characters that no header has")?;
    value.set_sensitive(true);
    Ok(value)
}

/// The grant or the refusal, and the exit code that says which.
fn report(answer: &Answer, json: bool) -> anyhow::Result<ExitCode> {
    let body: Value = serde_json::from_slice(&answer.body).context("the answer is no JSON")?;
    let text = |key: &str| body[key].as_str().unwrap_or_default();
    if json {
        println!("{body}");
    } else if answer.status == StatusCode::CREATED {
        println!("{} until {} ({} s), rule {}", text("id"), text("until"), body["expires_in"], text("rule"));
    } else {
        eprintln!("authd: refused ({}): {}", text("reason"), text("detail"));
    }
    Ok(if answer.status == StatusCode::CREATED { ExitCode::SUCCESS } else { ExitCode::from(super::FAILED) })
}
