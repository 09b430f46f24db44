//! What the daemon says of itself, to people, to programs and to Prometheus.

use std::{
    collections::BTreeMap,
    fmt::{self, Write},
};

use serde::{Deserialize, Serialize};

use super::metrics::Metrics;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    pub started: String,
    /// The cgroup that is enforced.
    pub cgroup: String,
    pub generation: u32,
    /// `enforce` or `observe`.
    pub mode: String,
    /// When the generation came into force.
    pub since: String,
    pub last_reload: Reload,
    /// What becomes of the policy if nobody confirms it.
    pub trial: Option<String>,
    pub programs: Vec<Program>,
    pub interfaces: Vec<Interface>,
    /// Optional programs that this kernel refuses.
    pub refused: Vec<Refused>,
    /// Whether every program is where it was put.
    pub enforcing: bool,
    /// Why no proof is believed: what has to survive a restart cannot be read.
    pub store_error: Option<String>,
    pub workloads: Vec<Workload>,
    /// Nodes of the policy.
    pub nodes: Vec<Node>,
    /// Verdicts by reason, since the tables exist.
    pub reasons: BTreeMap<String, Count>,
    pub flows: Flows,
    pub grants: GrantTotals,
    /// Whether callers can show their proofs now.
    pub control_ready: bool,
    /// What became of callers and their proofs.
    pub control: Metrics,
    pub events: Events,
    pub tables: BTreeMap<String, Fill>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Reload {
    pub ok: bool,
    pub time: String,
    pub successes: u64,
    pub failures: u64,
    pub errors: Vec<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Program {
    pub name: String,
    pub id: u32,
    pub link: u32,
    pub verified_instructions: Option<u32>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Interface {
    pub name: String,
    /// Where its program runs: `native` (in the driver), `generic` (in the stack), or `unguarded`.
    pub mode: String,
    /// Why it is not guarded.
    pub why: Option<String>,
    pub program: u32,
    pub verified_instructions: Option<u32>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Refused {
    pub name: String,
    pub why: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Workload {
    pub name: String,
    pub kind: String,
    pub observe: bool,
    /// Cgroups that match now.
    pub instances: Vec<String>,
}

/// What this node and another one say to each other.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Node {
    pub name: String,
    pub outbound: Outbound,
    pub inbound: Inbound,
}

/// Whether this node may say to it who its callers are.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outbound {
    /// The policy has this very node among others.
    Own,
    /// The policy has no address of it.
    NoAddress,
    NoSession,
    Session(NodeSession),
}

/// For whom it speaks here.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Inbound {
    /// Whether the policy lets it speak for anybody.
    pub may_speak: bool,
    pub callers: u64,
    /// The one that holds for longest, as long as it is known: a minute longer than it holds.
    pub session: Option<NodeSession>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSession {
    pub key_id: u32,
    /// 0: it ended.
    pub seconds_left: u64,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Count {
    pub verdicts: u64,
    pub bytes: u64,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Flows {
    pub opened: u64,
    pub denied: u64,
    pub closed: u64,
    pub cut: u64,
}

/// Since the daemon started.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct GrantTotals {
    pub live: u64,
    pub grants_issued: u64,
    /// Before their time: revoked, returned, or given under terms that changed.
    pub grants_revoked: u64,
    pub grants_expired: u64,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Events {
    /// Made by the kernel since the tables exist.
    pub made: u64,
    /// No room in the ring.
    pub lost: u64,
    pub records_written: u64,
    pub records_lost: u64,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Fill {
    pub entries: u64,
    pub capacity: u64,
}

impl Status {
    /// Prometheus' text format. Names and labels are part of the contract; addresses never are labels.
    pub fn metrics(&self) -> String {
        let mut out = String::new();
        let mut family = |name: &str, kind: &str, help: &str, samples: Vec<(String, u64)>| {
            family(&mut out, name, kind, help, samples)
        };
        let one = |value: u64| vec![(String::new(), value)];
        family("authd_policy_generation", "gauge", "Generation in force.", one(self.generation.into()));
        family(
            "authd_policy_last_reload_success",
            "gauge",
            "1 if the last reload was good.",
            one(self.last_reload.ok.into()),
        );
        let result =
            |ok: u64, bad: u64| vec![("{result=\"ok\"}".to_owned(), ok), ("{result=\"error\"}".to_owned(), bad)];
        let reloads = result(self.last_reload.successes, self.last_reload.failures);
        family("authd_policy_reloads_total", "counter", "Attempts to load a policy.", reloads);
        family("authd_kernel_enforcing", "gauge", "1 if every program is attached.", one(self.enforcing.into()));
        let guarded = |i: &Interface| {
            let labels = format!("{{interface=\"{}\",mode=\"{}\"}}", i.name, i.mode);
            (labels, u64::from(i.why.is_none()))
        };
        let interfaces = self.interfaces.iter().map(guarded).collect();
        family("authd_interface_guarded", "gauge", "1 if the interface's program is attached.", interfaces);
        let usable = self.store_error.is_none();
        family("authd_store_usable", "gauge", "1 if the store of revocations and keys is whole.", one(usable.into()));
        let by_reason = |value: fn(&Count) -> u64| {
            self.reasons.iter().map(|(reason, count)| (format!("{{reason=\"{reason}\"}}"), value(count))).collect()
        };
        family("authd_kernel_verdicts_total", "counter", "Verdicts taken.", by_reason(|c| c.verdicts));
        family("authd_kernel_refused_bytes_total", "counter", "Bytes of refused packets.", by_reason(|c| c.bytes));
        family("authd_flows_opened_total", "counter", "Flows told of as opened.", one(self.flows.opened));
        family("authd_flows_denied_total", "counter", "Denials told of, repetitions included.", one(self.flows.denied));
        family("authd_flows_closed_total", "counter", "Flows told of as closed.", one(self.flows.closed));
        family("authd_flows_cut_total", "counter", "Open flows that a new generation refused.", one(self.flows.cut));
        family("authd_kernel_events_total", "counter", "Events made by the kernel.", one(self.events.made));
        family("authd_kernel_events_lost_total", "counter", "Events without room in the ring.", one(self.events.lost));
        family("authd_audit_records_written_total", "counter", "Records written.", one(self.events.records_written));
        family("authd_audit_records_lost_total", "counter", "Records not written.", one(self.events.records_lost));
        family("authd_grants_live", "gauge", "Grants that live.", one(self.grants.live));
        family("authd_grants_issued_total", "counter", "Grants given.", one(self.grants.grants_issued));
        family("authd_grants_revoked_total", "counter", "Grants ended early.", one(self.grants.grants_revoked));
        family("authd_grants_expired_total", "counter", "Grants that ended.", one(self.grants.grants_expired));
        family("authd_control_ready", "gauge", "1 if proofs can be shown.", one(self.control_ready.into()));
        let instances =
            |w: &Workload| (format!("{{workload=\"{}\",kind=\"{}\"}}", w.name, w.kind), w.instances.len() as u64);
        let seen = self.workloads.iter().map(instances).collect();
        family("authd_workload_instances", "gauge", "Cgroups that match a workload.", seen);
        let mut sessions = Vec::new();
        for node in &self.nodes {
            let sample = |direction: &str, session: Option<NodeSession>| {
                let labels = format!("{{node=\"{}\",direction=\"{direction}\"}}", node.name);
                (labels, session.map_or(0, |session| session.seconds_left))
            };
            sessions.extend(node.outbound.expected().map(|session| sample("outbound", session)));
            sessions.extend(node.inbound.may_speak.then(|| sample("inbound", node.inbound.session)));
        }
        let name = "authd_node_session_remaining_seconds";
        family(name, "gauge", "For how long the session with a node holds, 0 if there is none.", sessions);
        let speaking = self.nodes.iter().filter(|node| node.inbound.may_speak);
        let callers = speaking.map(|node| (format!("{{node=\"{}\"}}", node.name), node.inbound.callers)).collect();
        family("authd_node_callers", "gauge", "Callers for whom a node speaks here.", callers);
        let table = |value: fn(&Fill) -> u64| {
            self.tables.iter().map(|(table, fill)| (format!("{{table=\"{table}\"}}"), value(fill))).collect()
        };
        family("authd_kernel_table_entries", "gauge", "Entries in a kernel table.", table(|f| f.entries));
        family("authd_kernel_table_capacity_entries", "gauge", "Room in a kernel table.", table(|f| f.capacity));
        self.control.write(&mut out);
        out
    }
}

impl Outbound {
    /// The session, if there should be one and if there is one.
    fn expected(&self) -> Option<Option<NodeSession>> {
        match self {
            Self::Own | Self::NoAddress => None,
            Self::NoSession => Some(None),
            Self::Session(session) => Some(Some(*session)),
        }
    }
}

impl fmt::Display for NodeSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.seconds_left {
            0 => write!(f, "key {} ended", self.key_id),
            seconds => write!(f, "key {} holds for {seconds} s", self.key_id),
        }
    }
}

impl fmt::Display for Outbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own => write!(f, "this node"),
            Self::NoAddress => write!(f, "not told who calls (no address)"),
            Self::NoSession => write!(f, "not told who calls (no session)"),
            Self::Session(session) => write!(f, "told who calls ({session})"),
        }
    }
}

impl fmt::Display for Inbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.may_speak, self.callers) {
            (false, _) => return write!(f, "may speak for nobody"),
            (true, 0) => write!(f, "speaks for nobody")?,
            (true, 1) => write!(f, "speaks for 1 caller")?,
            (true, callers) => write!(f, "speaks for {callers} callers")?,
        }
        self.session.map_or(Ok(()), |session| write!(f, " ({session})"))
    }
}

/// A metric with its samples: labels, and a value.
pub(super) fn family(
    out: &mut String,
    name: &str,
    kind: &str,
    help: &str,
    samples: impl IntoIterator<Item = (String, u64)>,
) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    for (labels, value) in samples {
        let _ = writeln!(out, "{name}{labels} {value}");
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let enforcing = match (self.enforcing, self.mode.as_str()) {
            (true, "observe") => "observing (no connection is blocked)",
            (true, _) => "enforcing",
            (false, _) => "NOT ENFORCING: programs are not attached",
        };
        writeln!(f, "authd {} (pid {}), started {}", self.version, self.pid, self.started)?;
        writeln!(f, "{enforcing} below {}", self.cgroup)?;
        if let Some(error) = &self.store_error {
            writeln!(f, "NO PROOF IS BELIEVED: {error}")?;
        }
        writeln!(f, "generation {} since {}", self.generation, self.since)?;
        match self.last_reload.ok {
            true => writeln!(f, "last reload: good, {}", self.last_reload.time)?,
            false => {
                writeln!(f, "last reload: REFUSED, {}; the generation above stays in force", self.last_reload.time)?;
                for error in &self.last_reload.errors {
                    writeln!(f, "{error}")?;
                }
            }
        }
        if let Some(trial) = &self.trial {
            writeln!(f, "policy: {trial}")?;
        }
        writeln!(f, "\nprograms")?;
        for program in &self.programs {
            let walked =
                program.verified_instructions.map_or(String::new(), |n| format!(", {n} instructions verified"));
            writeln!(f, "  {:<22} program {}, link {}{walked}", program.name, program.id, program.link)?;
        }
        for refused in &self.refused {
            writeln!(f, "  {:<22} not available here: {}", refused.name, refused.why)?;
        }
        if !self.interfaces.is_empty() {
            writeln!(f, "\ninterfaces")?;
        }
        for Interface { name, mode, why, program, verified_instructions } in &self.interfaces {
            let walked = verified_instructions.map_or(String::new(), |n| format!(", {n} instructions verified"));
            match why {
                None => writeln!(f, "  {name:<22} {mode}, program {program}{walked}")?,
                Some(why) => writeln!(f, "  {name:<22} NOT GUARDED: {why}")?,
            }
        }
        let GrantTotals { live, grants_issued, grants_revoked, grants_expired } = self.grants;
        writeln!(
            f,
            "\ngrants: {live} live; {grants_issued} issued, {grants_revoked} revoked, {grants_expired} expired{}",
            if self.control_ready { "" } else { "; PROOFS CANNOT BE SHOWN: the control process does not run" }
        )?;
        writeln!(f, "\nworkloads")?;
        for workload in &self.workloads {
            let mode = if workload.observe { ", observed" } else { "" };
            let cgroups = match workload.instances.len() {
                0 => "no cgroup now".to_owned(),
                1..=3 => workload.instances.join(", "),
                n => format!("{} and {} more", workload.instances[..2].join(", "), n - 2),
            };
            writeln!(f, "  {:<22} {}{mode}: {cgroups}", workload.name, workload.kind)?;
        }
        if !self.nodes.is_empty() {
            writeln!(f, "\nnodes")?;
        }
        for Node { name, outbound, inbound } in &self.nodes {
            match outbound {
                Outbound::Own => writeln!(f, "  {name:<22} {outbound}")?,
                _ => writeln!(f, "  {name:<22} {outbound}; {inbound}")?,
            }
        }
        writeln!(f, "\nverdicts")?;
        for (reason, count) in &self.reasons {
            let bytes = if count.bytes == 0 { String::new() } else { format!(", {} bytes refused", count.bytes) };
            writeln!(f, "  {reason:<22} {}{bytes}", count.verdicts)?;
        }
        let Events { made, lost, records_written, records_lost } = self.events;
        writeln!(f, "\nevents: {made} made, {lost} lost; records: {records_written} written, {records_lost} lost")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both ways: what is written is explained, and what is explained is written.
    #[test]
    fn every_metric_is_documented() {
        const TEXT: &str = include_str!("../../../docs/RECORDS.md");
        let written = Status::default().metrics();
        let written: Vec<&str> = written.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        let (_, section) = TEXT.split_once("\n## Metrics\n").unwrap();
        let cells = section.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
        let told: Vec<&str> =
            cells.flat_map(|cell| cell.split('`').step_by(2)).filter(|name| !name.is_empty()).collect();
        assert!(told.len() > 20, "{told:?}");
        for name in &written {
            assert!(told.contains(name), "docs/RECORDS.md does not explain {name}");
        }
        for name in told {
            assert!(written.contains(&name), "there is no {name}");
        }
    }
}
