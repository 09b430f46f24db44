//! What operators see of agents: calls that were decided and made, approvals, the telling of people, servers that run.
//!
//! Enters: what this process decided, and what control says of the webhook. Leaves: Prometheus' text. Never: a label that is neither in
//! a fixed list nor a name of the policy in force.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Results, count, of};
use crate::{daemon::status::family, decisions::notify::command::Counts, policy::model::Model};

/// A tool that the policy does not name.
const NO_TOOL: &str = "";

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Agents {
    /// By tool: `allowed`, `pending`, `denied`.
    pub actions: BTreeMap<String, Results>,
    /// How calls through the MCP gateway ended.
    pub calls: Results,
    /// What became of approvals, by the events of records.
    pub approvals: Results,
    /// That people were told, by the webhook.
    pub webhook: Results,
    /// And by the operator's program.
    pub told: u64,
    pub untold: u64,
    /// Calls that wait for people now.
    pub waiting: u64,
    /// MCP servers that authd started and that run now.
    pub servers: u64,
}

impl Agents {
    pub fn decided(&mut self, tool: &str, model: &Model, verdict: &'static str) {
        let tool = if model.tools.iter().any(|known| known.name == tool) { tool } else { NO_TOOL };
        count(of(self.actions.entry(tool.to_owned()).or_default(), verdict));
    }

    pub fn called(&mut self, outcome: &'static str) {
        count(of(&mut self.calls, outcome));
    }

    pub fn approval(&mut self, event: &'static str) {
        count(of(&mut self.approvals, event.trim_start_matches("approval_")));
    }

    pub fn hook(&mut self, counts: Counts) {
        (self.told, self.untold) = (counts.told, counts.failed);
    }

    /// Forgets what another policy named.
    pub fn retain(&mut self, model: &Model) {
        self.actions.retain(|name, _| name == NO_TOOL || model.tools.iter().any(|tool| tool.name == *name));
    }

    pub fn write(&self, out: &mut String) {
        let results = |results: &Results| -> Vec<(String, u64)> {
            results.iter().map(|(result, count)| (format!("{{result=\"{result}\"}}"), *count)).collect()
        };
        let actions = self.actions.iter().flat_map(|(tool, verdicts)| {
            let label = move |verdict| format!("{{tool=\"{tool}\",verdict=\"{verdict}\"}}");
            verdicts.iter().map(move |(verdict, count)| (label(verdict), *count))
        });
        family(out, "authd_actions_total", "counter", "Calls of tools that were decided.", actions);
        family(out, "authd_mcp_calls_total", "counter", "Calls through the MCP gateway.", results(&self.calls));
        family(out, "authd_approvals_total", "counter", "What became of approvals.", results(&self.approvals));
        let waiting = [(String::new(), self.waiting)];
        family(out, "authd_approvals_waiting", "gauge", "Calls that wait for people.", waiting);
        let by = |by: &str, result: &str| format!("{{by=\"{by}\",result=\"{result}\"}}");
        let webhook = self.webhook.iter().map(|(result, count)| (by("webhook", result), *count));
        let command =
            [("ok", self.told), ("failed", self.untold)].map(|(result, count)| (by("command", result), count));
        let notices = webhook.chain(command.into_iter().filter(|(_, count)| *count > 0));
        family(out, "authd_approval_notices_total", "counter", "Times that people were told of a call.", notices);
        let servers = [(String::new(), self.servers)];
        family(out, "authd_mcp_servers_running", "gauge", "MCP servers that authd started.", servers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{diagnostic::Source, load::texts};

    fn model(tool: &str) -> Model {
        let text = format!("trust_domain = \"example.org\"\n[[tool]]\nname = \"{tool}\"\n");
        let policy = texts(vec![Source { name: "p.toml".into(), text: text.into() }]);
        policy.model.unwrap_or_else(|| panic!("{:?}", policy.diagnostics))
    }

    #[test]
    fn agents_are_counted_by_names_of_the_policy_alone() {
        let (mut agents, model) = (Agents::default(), model("refund"));
        for (tool, verdict) in [("refund", "allowed"), ("refund", "denied"), ("x\"} 1", "denied"), ("y", "denied")] {
            agents.decided(tool, &model, verdict);
        }
        agents.called("answered");
        agents.approval("approval_granted");
        agents.hook(Counts { told: 3, failed: 1 });
        count(of(&mut agents.webhook, "failed"));
        agents.waiting = 2;
        let samples = |agents: &Agents| {
            let mut text = String::new();
            agents.write(&mut text);
            text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect::<Vec<_>>()
        };
        let written = [
            "authd_actions_total{tool=\"\",verdict=\"denied\"} 2",
            "authd_actions_total{tool=\"refund\",verdict=\"allowed\"} 1",
            "authd_actions_total{tool=\"refund\",verdict=\"denied\"} 1",
            "authd_mcp_calls_total{result=\"answered\"} 1",
            "authd_approvals_total{result=\"granted\"} 1",
            "authd_approvals_waiting 2",
            "authd_approval_notices_total{by=\"webhook\",result=\"failed\"} 1",
            "authd_approval_notices_total{by=\"command\",result=\"ok\"} 3",
            "authd_approval_notices_total{by=\"command\",result=\"failed\"} 1",
            "authd_mcp_servers_running 0",
        ];
        assert_eq!(samples(&agents), written);
        agents.retain(&self::model("other"));
        assert!(samples(&agents)[..2] == [written[0], written[3]], "{agents:?}");
    }
}
