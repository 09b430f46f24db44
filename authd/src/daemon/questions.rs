//! Questions to the daemon that change nothing: its state, its metrics, what it would decide, what it has seen.

use std::{collections::HashMap, sync::atomic::Ordering};

use authd_common::{reason::Reason, tables::Counter};
use tokio::sync::broadcast;

use super::{
    Active, Daemon, DaemonError,
    admin::Explained,
    clock,
    status::{self, Count, Events, Fill, GrantTotals, Interface, Program, Refused, Status},
    trial::Trial,
};
use crate::{
    audit::record::format_time,
    dataplane::{interfaces::Guard, ring},
    policy::explain::{From, Policy, ToError},
    store::StoreError,
};

impl Daemon {
    /// Records of flows for one who asks: the last ones, and those to come.
    pub fn recent(&self, last: usize) -> (Vec<String>, broadcast::Receiver<String>) {
        let skip = self.recent.len().saturating_sub(last);
        (self.recent.iter().skip(skip).cloned().collect(), self.follow.subscribe())
    }

    pub fn explain(&self, from: &str, to: &str, at: Option<&str>) -> Result<Explained, String> {
        let Active { prepared, .. } = &self.active;
        let from = From::parse(from, &prepared.model)
            .ok_or_else(|| format!("`{from}` is no workload, peer or address, and not `unmanaged`"))?;
        let to = to.parse().map_err(|error: ToError| error.to_string())?;
        let mut moment = clock::moment();
        let again;
        let image = match at {
            None => &prepared.image,
            Some(at) => {
                moment.wall = at.parse().map_err(|_| format!("`{at}` is no RFC 3339 time"))?;
                again = prepared.compile_at(&self.config.options, moment).map_err(|error| error.to_string())?;
                &again
            }
        };
        let policy = Policy {
            model: &prepared.model,
            registry: &prepared.registry,
            options: &self.config.options,
            image,
            moment,
        };
        let mut explanation = policy.explain(from, to);
        explanation.generation = Some(self.generation());
        Ok(Explained::new(&explanation))
    }

    pub fn status(&self) -> Result<Status, DaemonError> {
        let counters = ring::counters(&self.writer.maps().counters)
            .map_err(|error| DaemonError::Map { table: "counters", error })?;
        let named = |(code, counter): (usize, Counter)| {
            let reason = Reason::from_code(code as u16)?;
            let used = counter.verdicts != 0 || counter.bytes != 0;
            used.then(|| (reason.name().to_owned(), Count { verdicts: counter.verdicts, bytes: counter.bytes }))
        };
        let totals = self.kernel_totals()?;
        let written = self.sink.totals();
        let mut instances: HashMap<u32, Vec<String>> = HashMap::new();
        for (path, _, entry) in self.tree.instances() {
            // A directory between two levels of patterns has its workload's number too; only the topmost is an instance.
            if self.active.patterns.instance_path(path) == Some(path) {
                instances.entry(entry.workload).or_default().push(path.to_owned());
            }
        }
        let Active { prepared, since, .. } = &self.active;
        let fill = self.writer.fill();
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started: format_time(self.started),
            cgroup: self.base.path.display().to_string(),
            generation: self.generation(),
            mode: if prepared.model.observe { "observe" } else { "enforce" }.to_owned(),
            since: format_time(*since),
            last_reload: self.last_reload.clone(),
            trial: self.trial.as_ref().map(Trial::describe),
            programs: self
                .attached
                .iter()
                .map(|a| Program {
                    name: a.program.clone(),
                    id: a.program_id,
                    link: a.link_id,
                    verified_instructions: a.verified_instructions,
                })
                .collect(),
            interfaces: self.interfaces.program().map_or_else(Vec::new, |program| {
                let guards = self.interfaces.guards().iter();
                guards
                    .map(|(name, guard)| Interface {
                        name: name.clone(),
                        mode: guard.name().to_owned(),
                        why: match guard {
                            Guard::Attached(_) => None,
                            Guard::Open(why) => Some(why.clone()),
                        },
                        program: program.id,
                        verified_instructions: program.verified,
                    })
                    .collect()
            }),
            refused: self.refused.iter().map(|(name, why)| Refused { name: name.clone(), why: why.clone() }).collect(),
            enforcing: self.enforcing,
            store_error: self.trust.as_ref().err().map(StoreError::to_string),
            workloads: prepared
                .model
                .workloads
                .iter()
                .map(|w| status::Workload {
                    name: w.name.clone(),
                    kind: w.kind.name().to_owned(),
                    observe: w.observe,
                    instances: prepared
                        .registry
                        .workloads
                        .number(&w.name)
                        .and_then(|number| instances.remove(&number))
                        .unwrap_or_default(),
                })
                .collect(),
            nodes: self.node_statuses()?,
            reasons: counters.into_iter().enumerate().filter_map(named).collect(),
            flows: self.flows,
            grants: GrantTotals { live: self.ledger.grants.len() as u64, ..self.totals },
            control_ready: self.control_ready,
            control: self.seen_now(),
            events: Events {
                made: totals.next,
                lost: totals.lost,
                records_written: written.written.load(Ordering::Relaxed),
                records_lost: written.lost.load(Ordering::Relaxed),
            },
            tables: fill
                .into_iter()
                .map(|(table, entries, capacity)| (table.to_owned(), Fill { entries, capacity }))
                .collect(),
        })
    }

    /// Writes metrics where a collector of text files finds them.
    pub fn write_metrics(&self) -> Result<(), DaemonError> {
        let Some(path) = &self.config.metrics else { return Ok(()) };
        let beside = path.with_extension("prom.new");
        let written = std::fs::write(&beside, self.status()?.metrics()).and_then(|()| std::fs::rename(&beside, path));
        if let Err(error) = written {
            tracing::warn!(%error, path = %path.display(), "metrics cannot be written");
        }
        Ok(())
    }
}
