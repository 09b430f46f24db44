//! Decisions about actions: authd's own beside Cedar's evaluation of the same request, and the whole way there and back beside
//! requests that ask for nothing.

use std::{
    fmt::Write,
    fs,
    hint::black_box,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use authd::{
    decisions::{Actions, Call, Subject, call::Arguments},
    policy::{diagnostic::Source, load},
};
use authd_tests::sandbox::Sandbox;
use cedar_policy::{Authorizer, Decision, PolicySet};
use jiff::Timestamp;

use crate::{
    compare::{Comparison, Pairs, each},
    control::http::Client,
    worker::{Worker, obey},
};

struct Effort {
    slices: usize,
    decisions: u32,
    /// Each in a cgroup of its own: what one may ask for at once is limited.
    askers: usize,
    requests: u64,
}

const FULL: Effort = Effort { slices: 60, decisions: 500, askers: 40, requests: 32 };
const QUICK: Effort = Effort { slices: 20, decisions: 200, askers: 10, requests: 32 };
const TURNS: usize = 5;
/// Tools, each with five policies of its own.
const TOOLS: [usize; 3] = [1, 20, 200];

pub fn run(quick: bool) -> Result<Vec<Comparison>> {
    let effort = if quick { QUICK } else { FULL };
    let mut results = Vec::new();
    for tools in TOOLS {
        results.extend(decisions(tools, &effort)?);
    }
    results.push(requests(&effort)?);
    Ok(results)
}

fn compared(name: String, pairs: &Pairs) -> Comparison {
    Comparison::of_pairs("actions", name, pairs, None)
}

/// In one process: what stands between a call that was read and the decision.
fn decisions(tools: usize, effort: &Effort) -> Result<Vec<Comparison>> {
    let actions = loaded(tools)?;
    let arguments = Arguments::read(br#"{"amount":120,"order":"o-17","note":"as agreed on the phone"}"#)?;
    let subject = Subject {
        issuer: "corp".to_owned(),
        id: "alice@example.org".to_owned(),
        scopes: vec!["payments:refund".to_owned()],
        audience: vec!["payments".to_owned()],
        client: None,
    };
    let actors = ["spiffe://example.org/agent/a".to_owned()];
    let call = Call {
        workload: 0,
        spiffe_id: "spiffe://example.org/agent/a",
        instance: "/agents/a",
        tool: "refund-0",
        arguments: arguments.map(),
        subject: Some(&subject),
        actors: &actors,
        now: Timestamp::now(),
    };
    let prepared = actions.prepare(&call)?;
    let (authorizer, all) = (Authorizer::new(), actions.policy_set());
    let few =
        PolicySet::from_policies(all.policies().filter(|policy| policy.id().to_string().ends_with("-0")).cloned())?;
    let bare = |set: &PolicySet| {
        let response = authorizer.is_authorized(black_box(&prepared.request), set, &prepared.entities);
        ensure!(response.decision() == Decision::Allow, "{response:?}");
        Ok(())
    };
    let decide = || {
        let decision = actions.decide(black_box(&call));
        ensure!(decision.is_allowed() && decision.policies == ["small-0"], "{decision:?}");
        Ok(())
    };
    let (mut against_all, mut against_few) = (Pairs::new(), Pairs::new());
    for _ in 0..effort.slices {
        let theirs = each(effort.decisions, || bare(&all))?;
        let ours = each(effort.decisions, decide)?;
        against_all.push((ours, theirs));
        against_few.push((ours, each(effort.decisions, || bare(&few))?));
    }
    let policies = tools * 5;
    Ok(vec![
        compared(format!("decision, {policies} policies, against Cedar's of all of them"), &against_all),
        compared(format!("decision, {policies} policies, against Cedar's of the tool's 5"), &against_few),
    ])
}

/// From a workload to control, to dataplane and back, with a record.
fn requests(effort: &Effort) -> Result<Comparison> {
    let sandbox = Sandbox::new()?;
    let (toml, cedar) = policy(20)?;
    fs::write(sandbox.policy_directory().join("actions.cedar"), cedar)?;
    sandbox.write_policy(&toml)?;
    let daemon = sandbox.start()?;
    let socket = sandbox.directory().join("workload.sock");
    let mut pairs = Pairs::new();
    for asker in 0..effort.askers {
        let name = format!("/agents/{asker}");
        let cgroup = sandbox.cgroup.child(&name)?;
        daemon.wait_for_instance(&name)?;
        let path = |path: &Path| path.to_str().map(str::to_owned).context("a path");
        let asker = Worker::start(&["agent", &path(&cgroup)?, &path(&socket)?])?;
        asker.ask("actions 1")?;
        for turn in 0..TURNS {
            let one = |what: &str| {
                Ok::<f64, anyhow::Error>(asker.ask(&format!("{what} {}", effort.requests))? / effort.requests as f64)
            };
            pairs.push(match turn % 2 {
                0 => (one("actions")?, one("nothing")?),
                _ => {
                    let nothing = one("nothing")?;
                    (one("actions")?, nothing)
                }
            });
        }
    }
    Ok(compared("action asked about, against a request that asks nothing".to_owned(), &pairs))
}

fn loaded(tools: usize) -> Result<std::sync::Arc<Actions>> {
    let (toml, cedar) = policy(tools)?;
    let source = |name: &str, text: String| Source { name: name.into(), text: text.into() };
    let policy = load::texts(vec![source("p.toml", toml), source("p.cedar", cedar)]);
    let faults: Vec<String> = policy.diagnostics.iter().map(|found| found.render(false)).collect();
    Ok(policy.model.with_context(|| faults.concat())?.actions)
}

/// Tools with five policies each: what is small passes, what is large waits, three things are forbidden.
fn policy(tools: usize) -> Result<(String, String)> {
    let mut toml =
        "trust_domain = \"example.org\"\n[[workload]]\nname = \"agent\"\nkind = \"agent\"\ncgroup = \"/agents/*\"\n\
                    [[approvers]]\nname = \"leads\"\nusers = [\"root\"]\n"
            .to_owned();
    let mut cedar = String::new();
    for tool in 0..tools {
        write!(
            toml,
            "[[tool]]\nname = \"refund-{tool}\"\narguments = {{ amount = \"long\", order = \"string\", note = \"string?\" }}\n"
        )?;
        let head = format!("principal in Kind::\"agent\", action == Action::\"refund-{tool}\", resource");
        write!(
            cedar,
            "@id(\"small-{tool}\")\npermit ({head}) when {{ context.arguments.amount <= 500 }};\n\
             @id(\"large-{tool}\") @approval(\"leads\")\npermit ({head}) when {{ context.arguments.amount <= 5000 }};\n\
             @id(\"notes-{tool}\")\nforbid ({head}) when {{ context.arguments has note && context.arguments.note like \"*password*\" }};\n\
             @id(\"orders-{tool}\")\nforbid ({head}) unless {{ context.arguments.order like \"o-*\" }};\n\
             @id(\"chains-{tool}\")\nforbid ({head}) when {{ context.depth > 2 }};\n"
        )?;
    }
    Ok((toml, cedar))
}

#[derive(clap::Args)]
pub struct Agent {
    cgroup: PathBuf,
    socket: PathBuf,
}

impl Agent {
    pub fn run(&self) -> Result<()> {
        fs::write(self.cgroup.join("cgroup.procs"), std::process::id().to_string())?;
        let mut client = Client::new(UnixStream::connect(&self.socket)?);
        let body = r#"{"tool":"refund-0","arguments":{"amount":120,"order":"o-17"}}"#;
        obey(|what, number| {
            let started = Instant::now();
            for _ in 0..number {
                let (status, answer) = match what {
                    "actions" => client.ask("POST", "/v1/actions", "", body)?,
                    "nothing" => client.ask("GET", "/v1/health", "", "")?,
                    other => bail!("what is {other:?}?"),
                };
                ensure!((200..300).contains(&status), "{status} {}", String::from_utf8_lossy(&answer));
            }
            Ok(started)
        })
    }
}
