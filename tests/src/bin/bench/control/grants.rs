//! A grant given and returned, against two requests on the same connection that ask for nothing.

use std::{fs, os::unix::net::UnixStream, path::PathBuf, time::Instant};

use anyhow::{Context, Result, bail, ensure};
use authd_tests::{
    sandbox::Sandbox,
    trust::{ISSUER, Issuer},
};
use serde_json::json;

use super::{compared, http::Client};
use crate::{
    compare::Comparison,
    worker::{Worker, obey},
};

struct Effort {
    /// Each in a cgroup of its own: what one may ask for within a minute is limited.
    askers: usize,
    slices: usize,
    requests: u64,
}

const FULL: Effort = Effort { askers: 8, slices: 25, requests: 40 };
const QUICK: Effort = Effort { askers: 2, slices: 25, requests: 40 };

pub fn run(quick: bool) -> Result<Vec<Comparison>> {
    let effort = if quick { QUICK } else { FULL };
    let sandbox = Sandbox::new()?;
    let issuer = Issuer::new("k1")?;
    fs::write(sandbox.policy_directory().join("jwks.json"), issuer.jwks()?)?;
    sandbox.write_policy(&policy())?;
    let daemon = sandbox.start()?;
    let (token, socket) = (sandbox.directory().join("token"), sandbox.directory().join("workload.sock"));
    fs::write(&token, issuer.token(&json!({}))?)?;
    let mut pairs = Vec::new();
    for asker in 0..effort.askers {
        let name = format!("/callers/{asker}");
        let cgroup = sandbox.cgroup.child(&name)?;
        daemon.wait_for_instance(&name)?;
        let path = |path: &std::path::Path| path.to_str().map(str::to_owned).context("a path");
        let asker = Worker::start(&["asker", &path(&cgroup)?, &path(&socket)?, &path(&token)?])?;
        asker.ask("grants 1")?;
        for turn in 0..effort.slices {
            let one = |what: &str| {
                Ok::<f64, anyhow::Error>(asker.ask(&format!("{what} {}", effort.requests))? / effort.requests as f64)
            };
            pairs.push(match turn % 2 {
                0 => (one("grants")?, one("nothing")?),
                _ => {
                    let nothing = one("nothing")?;
                    (one("grants")?, nothing)
                }
            });
        }
    }
    Ok(vec![compared("grant given and returned, against 2 requests".to_owned(), &pairs, None)])
}

fn policy() -> String {
    format!(
        r#"
trust_domain = "example.org"
[[workload]]
name = "caller"
kind = "job"
cgroup = "/callers/*"
[[issuer]]
name = "corp"
kind = "jwt"
issuer = "{ISSUER}"
jwks_file = "jwks.json"
algorithms = ["ES256"]
max_ttl = "1h"
[[service]]
name = "ledger"
addresses = ["192.0.2.1"]
ports = ["tcp/7101"]
[[rule]]
name = "token"
from = ["caller"]
to = ["ledger"]
require = ["token"]
token = {{ issuer = "corp", audience = "ledger" }}
"#
    )
}

#[derive(clap::Args)]
pub struct Asker {
    cgroup: PathBuf,
    socket: PathBuf,
    token: PathBuf,
}

impl Asker {
    pub fn run(&self) -> Result<()> {
        fs::write(self.cgroup.join("cgroup.procs"), std::process::id().to_string())?;
        let authorization = format!("Authorization: Bearer {}\r\n", fs::read_to_string(&self.token)?.trim());
        let mut client = Client::new(UnixStream::connect(&self.socket)?);
        obey(|what, number| {
            let started = Instant::now();
            for _ in 0..number {
                match what {
                    "grants" => {
                        let (status, body) = client.ask("POST", "/v1/grants", &authorization, r#"{"rule":"token"}"#)?;
                        ensure!(status == 201, "{status} {}", String::from_utf8_lossy(&body));
                        let given: serde_json::Value = serde_json::from_slice(&body)?;
                        let path = format!("/v1/grants/{}", given["id"].as_str().context("an id")?);
                        let (status, _) = client.ask("DELETE", &path, "", "")?;
                        ensure!(status == 204, "{status}");
                    }
                    "nothing" => {
                        for _ in 0..2 {
                            let (status, _) = client.ask("GET", "/v1/health", "", "")?;
                            ensure!((200..300).contains(&status), "{status}");
                        }
                    }
                    other => bail!("what is {other:?}?"),
                }
            }
            Ok(started)
        })
    }
}
