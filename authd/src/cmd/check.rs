//! `authd check`

mod here;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use authd_common::tables::UNMANAGED;

use super::{BAD_CONFIG, FAILED, print_diagnostics, settings};
use crate::{
    config::Config,
    daemon::{cgroupfs::Base, clock},
    policy::{
        compile::{Registry, compile},
        diagnostic::{Diagnostic, Place, Severity},
        lint, load,
        model::{McpServer, Model, OWN_ISSUER, Reach, Rule},
    },
};

/// Warnings that are about this node and no fault of the policy: a job that does not run now has no cgroup, and where policies
/// are built nothing has.
const NO_FAULT: [&str; 3] = ["no_cgroup_now", "no_program", "unknown_user"];

pub fn run(config: Option<&Path>, directory: Option<PathBuf>, json: bool, strict: bool) -> anyhow::Result<ExitCode> {
    let config = match settings(config) {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let directory = directory.unwrap_or_else(|| config.policy.clone());
    let policy = load::directory(&directory);
    let mut diagnostics = policy.diagnostics;
    if let Some(model) = &policy.model {
        diagnostics.extend(lint::lint(model));
        diagnostics.extend(unmatched(&config, model));
        diagnostics.extend(unfit(&config, model));
        diagnostics.extend(here::lint(model, &directory));
        if config.issuer.is_none() {
            diagnostics.extend(unissued(model));
        }
        diagnostics.extend(unreachable(&config));
        diagnostics.extend(unmanaged(&config, model));
    }
    let errors = diagnostics.iter().filter(|d| d.is_error()).count();
    let warnings = diagnostics.len() - errors;
    if json {
        let findings: Vec<_> = diagnostics.iter().map(Diagnostic::json).collect();
        println!("{}", serde_json::json!({ "errors": errors, "warnings": warnings, "diagnostics": findings }));
    } else {
        print_diagnostics(&diagnostics);
        if let Some(model) = &policy.model {
            println!(
                "{}: {} workloads, {} peers, {} services, {} rules, {} tools, {} action policies; {errors} errors, {warnings} warnings",
                directory.display(),
                model.workloads.len(),
                model.peers.len(),
                model.services.len(),
                model.rules.len(),
                model.tools.len(),
                model.actions.policies().len()
            );
        } else {
            println!("{}: {errors} errors, {warnings} warnings", directory.display());
        }
    }
    let faults = diagnostics.iter().any(|found| !NO_FAULT.contains(&found.code));
    Ok(match errors {
        0 if strict && faults => ExitCode::from(FAILED),
        0 => ExitCode::SUCCESS,
        _ => ExitCode::from(BAD_CONFIG),
    })
}

/// Whether the tables would hold it.
fn unfit(config: &Config, model: &Model) -> Vec<Diagnostic> {
    let mut registry = Registry::default();
    registry.assign(model, &config.options);
    let too_much = |message: String, help: &str| vec![Diagnostic::general("capacity", message, help)];
    let image = match compile(model, &mut registry, &config.options, clock::moment()) {
        Ok(image) => image,
        Err(error) => return too_much(error.to_string(), "shorten the policy"),
    };
    for (table, needed, capacity) in
        [("cells", image.cells.len(), config.sizes.cells), ("addresses", image.addresses.len(), config.sizes.addresses)]
    {
        // The generation in force keeps its place until the next one is.
        if needed * 2 > capacity as usize {
            return too_much(
                format!("the policy needs {needed} {table}, twice while it is loaded; the table holds {capacity}"),
                "raise the limit in authd.toml, or shorten the policy",
            );
        }
    }
    Vec::new()
}

/// What needs tokens of this node's own, which is not told to issue any.
fn unissued(model: &Model) -> Vec<Diagnostic> {
    let warning = |place: &Place, message: String| {
        let help = "add `issuer.url = \"https://...\"` to authd.toml";
        Diagnostic::warning("no_issuer", place.clone(), message, help)
    };
    let delegations = model.delegations.iter().map(|delegation| {
        warning(
            &delegation.place,
            format!("delegation `{}` gives nobody a token: this node issues none", delegation.name),
        )
    });
    let servers = model.mcp_servers.iter().filter(|server| server.audience.is_some()).map(|server| {
        warning(
            &server.place,
            format!("no call reaches MCP server `{}`, which is shown tokens of this node: it issues none", server.name),
        )
    });
    let is_own = |issuer: usize| model.issuers.get(issuer).is_some_and(|issuer| issuer.name == OWN_ISSUER);
    let asks = |rule: &&Rule| !rule.deny && rule.token.as_ref().is_some_and(|token| is_own(token.issuer));
    let rules = model.rules.iter().filter(asks).map(|rule| {
        warning(
            &rule.place,
            format!("rule `{}` never opens: it asks for a token of this node, which issues none", rule.name),
        )
    });
    delegations.chain(servers).chain(rules).collect()
}

/// An issuer whose keys nobody can fetch.
fn unreachable(config: &Config) -> Option<Diagnostic> {
    let issuer = config.issuer.as_ref().filter(|_| config.control.listen.is_none())?;
    let message = format!("tokens of this node say that its keys are at {}, and it listens nowhere", issuer.url);
    let help = "set `control.listen`, with `certificate` and `key`, in authd.toml";
    Some(Diagnostic { severity: Severity::Warning, ..Diagnostic::general("issuer_unreachable", message, help) })
}

/// MCP servers that are not started, as they would be nobody's.
fn unmanaged(config: &Config, model: &Model) -> Vec<Diagnostic> {
    let patterns = model.patterns(|index| index as u32 + 1);
    let started = model.mcp_servers.iter().filter(|server| matches!(server.reach, Reach::Command { .. }));
    let places = started.map(|server| (server, format!("{}/{}/0", config.mcp.cgroup, server.name)));
    let nobodys = places.filter(|(_, place)| patterns.classify(place).workload == UNMANAGED);
    let warning = |(server, _): (&McpServer, String)| {
        let cgroup = format!("{}/{}/*", config.mcp.cgroup, server.name);
        Diagnostic::warning(
            "mcp_server_unmanaged",
            server.place.clone(),
            format!(
                "MCP server `{}` is not started: no workload matches {cgroup}, and it would reach everything",
                server.name
            ),
            format!("add a `[[workload]]` with `cgroup = \"{cgroup}\"`, and rules for what the server needs"),
        )
    };
    nobodys.map(warning).collect()
}

/// Workloads without a cgroup on this node. Nothing is said where there is no cgroup v2 to look at.
fn unmatched(config: &Config, model: &Model) -> Vec<Diagnostic> {
    let Ok(base) = Base::find(config.cgroup.as_deref()) else { return Vec::new() };
    let patterns = model.patterns(|index| index as u32 + 1);
    let mut seen = vec![false; model.workloads.len()];
    let mut todo = vec!["/".to_owned()];
    while let Some(path) = todo.pop() {
        let classified = patterns.classify(&path);
        if let Some(seen) = (classified.workload as usize).checked_sub(1).and_then(|index| seen.get_mut(index)) {
            *seen = true;
        }
        if !classified.open {
            continue;
        }
        for entry in fs::read_dir(base.path.join(path.trim_start_matches('/'))).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                todo.push(format!("{}/{}", path.trim_end_matches('/'), entry.file_name().to_string_lossy()));
            }
        }
    }
    lint::unmatched(model, |index| seen[index])
}
