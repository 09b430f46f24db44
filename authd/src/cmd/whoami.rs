//! `authd whoami`

use std::{path::Path, process::ExitCode};

use anyhow::{Context, bail};
use hyper::{HeaderMap, Method, StatusCode};
use serde_json::Value;

use crate::{cli::CallerArgs, client, cmd::grant};

pub fn run(config: Option<&Path>, caller: &CallerArgs, json: bool) -> anyhow::Result<ExitCode> {
    let target = match grant::target(config, caller) {
        Ok(target) => target?,
        Err(code) => return Ok(code),
    };
    let identity = grant::identity(&caller.identity)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let asked = client::ask(&target, identity.as_ref(), Method::GET, "/v1/whoami", HeaderMap::new(), Vec::new());
    let answer = runtime.block_on(asked)?;
    let body: Value = serde_json::from_slice(&answer.body).context("the answer is no JSON")?;
    if answer.status != StatusCode::OK {
        bail!("refused ({}): {}", body["reason"].as_str().unwrap_or_default(), body["detail"]);
    }
    if json {
        println!("{body}");
        return Ok(ExitCode::SUCCESS);
    }
    let line = |name: &str, value: &Value| {
        if let Some(text) = value.as_str() {
            println!("{name:<12} {text}");
        }
    };
    for name in ["caller", "workload", "spiffe_id", "cgroup", "address", "node"] {
        line(name, &body[name]);
    }
    if let Some(certificate) = body["certificate"].as_object() {
        let accepted = certificate.get("accepted") == Some(&Value::Bool(true));
        let why = certificate.get("reason").and_then(Value::as_str).unwrap_or("accepted");
        let name = ["spiffe_id", "subject"].iter().find_map(|key| certificate.get(*key)?.as_str());
        println!("{:<12} {}", "certificate", if accepted { name.unwrap_or("accepted") } else { why });
    }
    for grant in body["grants"].as_array().into_iter().flatten() {
        println!("{:<12} {} rule {} until {}", "grant", grant["id"], grant["rule"], grant["until"]);
    }
    Ok(ExitCode::SUCCESS)
}
