//! Another policy comes into force.
//!
//! Enters: a candidate. Leaves: its tables in the kernel, and what follows for grants and nodes; or the policy in force,
//! untouched. Never: tables of two policies at once.

use std::time::Instant;

use jiff::Timestamp;

use super::{
    Active, Daemon, DaemonError,
    admin::Applied,
    candidate::{Candidate, Prepared},
    classify,
    state::Persistent,
};
use crate::{audit::record::format_time, grants::Grants};

impl Daemon {
    /// Puts a candidate into force, if it is one, and says what came of it.
    pub fn apply(&mut self, candidate: Candidate) -> Applied {
        let warnings = candidate.warnings;
        let result = match candidate.result {
            Ok(prepared) => self.put_into_force(prepared).map_err(|error| vec![error.to_string()]),
            Err(diagnostics) => Err(diagnostics.iter().map(|d| d.render(false)).collect()),
        };
        self.last_reload.time = format_time(Timestamp::now());
        match result {
            Ok(applied) => {
                self.last_reload.ok = true;
                self.last_reload.successes += 1;
                self.last_reload.errors.clear();
                Applied { warnings, ..applied }
            }
            Err(errors) => {
                self.last_reload.ok = false;
                self.last_reload.failures += 1;
                self.last_reload.errors.clone_from(&errors);
                self.report_rejected();
                Applied { ok: false, generation: self.generation(), errors, warnings, ..Applied::default() }
            }
        }
    }

    fn put_into_force(&mut self, prepared: Prepared) -> Result<Applied, DaemonError> {
        let patterns = prepared.patterns();
        // Names are on disk before numbers are in the kernel.
        let persistent = Persistent { registry: prepared.registry.clone(), ..self.persistent.clone() };
        self.state.keep(&persistent)?;
        let old = &self.active.patterns;
        self.tree.rescan(&|path| classify(&patterns, path)).map_err(DaemonError::Tree)?;
        // Callers that other nodes vouch for are not refused for a moment: what new cells ask for is there before them.
        let foreseen = self.ledger.grants.foresee(&prepared.image.sets);
        let (identities, level) = (self.tree.identities(), self.base.level);
        let result = self.writer.follow(&foreseen);
        let result = result.and_then(|()| self.writer.load(&prepared.image, &identities, level, self.config.hold_ms()));
        let loaded = match result {
            Ok(loaded) => loaded,
            Err(error) => {
                if let Err(error) = self.writer.follow(&Grants::undone(&foreseen)) {
                    tracing::error!(%error, "the index of grants");
                }
                self.tree.rescan(&|path| classify(old, path)).map_err(DaemonError::Tree)?;
                return Err(error.into());
            }
        };
        let unneeded = self.ledger.grants.adopt(prepared.image.sets.clone());
        if let Err(error) = self.writer.follow(&unneeded) {
            tracing::error!(%error, "the index of grants");
        }
        // Whatever had no room before is part of what was just loaded.
        self.unwritten.clear();
        self.state.keep_policy(&prepared.sources)?;
        self.persistent = persistent;
        self.directory.learn(&prepared.model, &prepared.registry);
        self.metrics.retain(&prepared.model);
        let before = std::mem::replace(&mut self.active, Active { prepared, patterns, since: Timestamp::now() });
        if before.prepared.sources != self.active.prepared.sources {
            self.before = Some((before.prepared.sources, Instant::now()));
            self.tries_others()?;
        }
        self.end_unmanaged_servers();
        self.report_loaded(&loaded);
        self.follow_policy();
        self.review_grants();
        self.place_nodes();
        tracing::info!(
            generation = loaded.generation,
            written = loaded.written,
            microseconds = loaded.microseconds,
            "policy in force"
        );
        Ok(Applied {
            ok: true,
            generation: loaded.generation,
            written: loaded.written,
            microseconds: loaded.microseconds,
            ..Applied::default()
        })
    }
}
