//! What the numbers in kernel events stand for, now and in the generations before.

use std::collections::{HashMap, VecDeque};

use authd_common::tables::Grant;

use crate::{
    audit::record::{Names, PENDING_NAME, Who, is_pending},
    dataplane::cgroups::Tree,
    grants::Id,
    policy::{
        compile::Registry,
        file::Kind,
        model::Model,
        pattern::{Patterns, instance_name},
    },
};

/// What records say of each workload that was in force since the daemon started.
#[derive(Default)]
pub struct Directory {
    workloads: HashMap<u32, Described>,
    grants: HashMap<Grant, Id>,
    /// Node and SPIFFE ID of callers, by label.
    callers: HashMap<u32, (String, String)>,
    /// Grants that ended, oldest first: their flows' records still come.
    ended: VecDeque<Grant>,
}

/// Callers that are known by name at one time.
const CALLERS: usize = 131_072;
/// Grants that ended and are still known by their ids.
const ENDED: usize = 65_536;

struct Described {
    name: String,
    kind: Kind,
    tenant: Option<String>,
    /// With `{instance}`.
    spiffe: String,
}

impl Directory {
    pub fn granted(&mut self, grant: Grant, id: Id) {
        self.grants.insert(grant, id);
    }

    /// Labels are random: one that is used again after a long time means the new caller.
    pub fn introduced(&mut self, label: u32, node: &str, spiffe_id: &str) {
        if self.callers.len() >= CALLERS {
            self.callers.clear();
        }
        self.callers.insert(label, (node.to_owned(), spiffe_id.to_owned()));
    }

    pub fn grant_ended(&mut self, grant: Grant) {
        self.ended.push_back(grant);
        if self.ended.len() > ENDED
            && let Some(oldest) = self.ended.pop_front()
        {
            self.grants.remove(&oldest);
        }
    }

    /// Notes the workloads of a generation. Those of earlier ones stay: their flows still end.
    pub fn learn(&mut self, model: &Model, registry: &Registry) {
        for workload in &model.workloads {
            let Some(number) = registry.workloads.number(&workload.name) else { continue };
            let described = Described {
                name: workload.name.clone(),
                kind: workload.kind,
                tenant: workload.tenant.clone(),
                spiffe: format!("spiffe://{}{}", model.trust_domain, workload.spiffe_path),
            };
            self.workloads.insert(number, described);
        }
    }
}

/// The names as one drain of the ring needs them.
pub struct Resolver<'a> {
    pub directory: &'a Directory,
    pub registry: &'a Registry,
    pub patterns: &'a Patterns,
    pub tree: &'a mut Tree,
}

impl Names for Resolver<'_> {
    fn workload(&mut self, number: u32, cgroup: u64) -> Option<Who> {
        if is_pending(number) {
            return Some(Who { name: PENDING_NAME.to_owned(), kind: None, tenant: None, spiffe_id: None });
        }
        let Some(described) = self.directory.workloads.get(&number) else {
            let name = self.registry.workloads.name(number)?.to_owned();
            return Some(Who { name, kind: None, tenant: None, spiffe_id: None });
        };
        let spiffe = if described.spiffe.contains("{instance}") {
            let path = self.tree.path_of(cgroup);
            let own = path.as_deref().map(|path| self.patterns.instance_path(path).unwrap_or(path));
            own.map(|own| described.spiffe.replace("{instance}", &instance_name(own)))
        } else {
            Some(described.spiffe.clone())
        };
        Some(Who {
            name: described.name.clone(),
            kind: Some(described.kind),
            tenant: described.tenant.clone(),
            spiffe_id: spiffe,
        })
    }

    fn rule(&self, number: u32) -> Option<String> {
        self.registry.rules.name(number).map(str::to_owned)
    }

    fn grant(&self, grant: Grant) -> Option<String> {
        self.directory.grants.get(&grant).map(Id::to_string)
    }

    fn caller(&self, label: u32) -> Option<(String, String)> {
        self.directory.callers.get(&label).cloned()
    }

    fn cgroup(&mut self, id: u64) -> Option<String> {
        if id == 0 { None } else { self.tree.path_of(id) }
    }
}
