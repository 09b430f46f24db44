//! What control asks for, looked at again: grants are given here, or not; and here they end.
//!
//! Enters: who asks, as this process found out; the proofs that control verified. Leaves: grants in the kernel, on disk and
//! on record. Never: a grant that the policy in force does not allow to this caller for these proofs, or one whose proof
//! was revoked.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use authd_common::{
    address::Address,
    tables::{Grant, GrantKey},
};
use jiff::{SignedDuration, Timestamp};

use super::{
    Daemon, DaemonError,
    admin::Answer,
    callers::{Owned, holder_names, is_same_holder, peer_names},
    clock,
    control::Who,
    frames::Connected,
};
use crate::{
    audit::record::Record,
    dataplane::{attestation::AttestError, sockets},
    digest::Digest,
    grants::{
        Given, Grants, Holder, Id, Live,
        flows::Flows,
        permits,
        proof::{Shown, certificate_names},
        terms::{self, Claimant},
    },
    ipc::{Granted, Refusal, Wanted},
    policy::{
        file::Proof,
        model::{Model, Object, Rule},
        network::from_ip,
    },
    proofs::x509::identity::VerifiedCertificate,
    store::{StoreError, grants::Grant as Row, revocations::Revocation, revoked::Revoked},
};

/// How long a grant lives whose rule does not say.
const DEFAULT_TTL: Duration = Duration::from_secs(300);

/// Everything about grants that lives as long as the daemon.
pub struct Ledger {
    pub grants: Grants,
    pub flows: Flows,
    pub(super) sockets: sockets::Sockets,
    /// When to list sockets again, some of which could not be seen.
    pub(super) look_again: Option<Instant>,
    /// Grants by everything that they can be revoked by.
    by_name: HashMap<Revoked, Vec<Id>>,
    /// `/proc/sys/kernel/random/boot_id`
    boot: String,
    /// Rows that are not on disk yet.
    unsaved: Vec<Row>,
    unremoved: Vec<Id>,
}

/// What a revocation did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Effect {
    /// The order was understood, and nothing had ended yet. The times below count from here.
    #[schema(value_type = String, format = DateTime)]
    pub decided: Timestamp,
    pub grants: usize,
    pub flows: usize,
    pub destroyed: usize,
    /// Sockets that could not be closed; their packets are dropped all the same.
    pub left: usize,
    /// Until the last packet could pass.
    pub cut_microseconds: u64,
    /// Until the last socket was closed.
    pub microseconds: u64,
}

impl Ledger {
    /// Where the addresses of peers are meant.
    pub fn own_namespace(&self) -> u64 {
        self.sockets.own_namespace()
    }

    /// Ends of this namespace's TCP connections; none if the kernel does not tell.
    pub fn connected(&mut self, now: Instant) -> Connected {
        let sockets = self.sockets.connected(now).unwrap_or_else(|error| {
            tracing::warn!(%error, "connections cannot be listed");
            Vec::new()
        });
        sockets.iter().map(|s| (s.local, s.local_port, s.remote, s.remote_port)).collect()
    }

    pub fn new(serials: Vec<u32>) -> Result<Self, sockets::SocketError> {
        let mut flows = Flows::default();
        // What an earlier daemon let through is not known yet.
        flows.miss();
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Ok(Self {
            grants: Grants::new(serials),
            flows,
            sockets: sockets::Sockets::new()?,
            look_again: None,
            by_name: HashMap::new(),
            boot: boot.trim().to_owned(),
            unsaved: Vec::new(),
            unremoved: Vec::new(),
        })
    }
}

pub(super) fn refusal(reason: &str, message: impl ToString) -> Refusal {
    Refusal { reason: reason.to_owned(), message: message.to_string() }
}

impl Daemon {
    /// Gives a grant, or says why not. Either is on record.
    pub fn grant(&mut self, who: &Who, wanted: Wanted) -> Result<Granted, Refusal> {
        let rule = wanted.rule.clone();
        let mut proofs = believed(&wanted);
        let result = self.give(who, wanted, &mut proofs);
        self.metrics.decided(&proofs, result.as_ref().err());
        let (event, reason) = match &result {
            Ok(_) => ("grant_issued", None),
            Err(refusal) => ("grant_refused", Some(refusal.reason.clone())),
        };
        let mut record = Record::event(event);
        record.verdict = Some(if result.is_ok() { "allowed" } else { "denied" }.to_owned());
        record.reason = Some(reason.unwrap_or_else(|| "rule".to_owned()));
        record.rule = Some(rule).filter(|rule| rule_named(&self.active.prepared.model, rule).is_ok());
        record.proofs = proofs.iter().map(Shown::told).collect();
        if let Ok(granted) = &result {
            record.grant = Some(granted.id.to_string());
            record.until = Some(granted.until.to_string());
        }
        self.describe(who, &mut record);
        self.report(record);
        result
    }

    fn give(&mut self, who: &Who, wanted: Wanted, proofs: &mut Vec<Shown>) -> Result<Granted, Refusal> {
        let now = Timestamp::now();
        let mut known = self.known(who)?;
        let prepared = &self.active.prepared;
        let (model, registry) = (&prepared.model, &prepared.registry);
        let rule = rule_named(model, &wanted.rule)?;
        // Where a node's word is asked for, the grant is of the caller for whom it vouches, and not of an address. It ends with
        // that word.
        let (mut said_until, mut ends) = (Timestamp::MAX, u64::MAX);
        if rule.is_vouched()
            && let Some(caller) = self.vouched_for(who)
        {
            proofs.push(caller.proof());
            known.holder = caller.holder();
            (known.scope, known.address) = (caller.label.into(), Address::UNSPECIFIED);
            (ends, said_until) = (caller.ends, caller.until);
        }
        let own = match known.claimant.borrow() {
            Claimant::Workload { spiffe_id, .. } => Some(spiffe_id),
            Claimant::Address(_) | Claimant::Forwarded => None,
        };
        self.complete_all(proofs, own)?;
        let number = registry.rules.number(&rule.name).ok_or_else(|| unknown_rule(&wanted.rule))?;
        if !rule.is_grantable() {
            return Err(refusal("rule_not_grantable", "the rule asks for no proof that could be shown here"));
        }
        if !terms::may_ask(rule, model, known.claimant.borrow()) {
            return Err(refusal("rule_not_for_caller", "the rule is not about this caller"));
        }
        if let Some(key) = &wanted.api_key {
            let trust = self.trust.as_mut().map_err(|error| refusal("store_unusable", error))?;
            let (from, workload) = match (&known.holder, who) {
                (Holder::Workload { name, .. }, _) => (None, Some(name.as_str())),
                (_, Who::Remote { address, .. }) => (Some(address.ip()), None),
                _ => (None, None),
            };
            proofs.push(Shown::ApiKey(trust.check_key(now, key, from, &rule.name, workload)?));
        }
        let limit = terms::check(rule, model, known.claimant.borrow(), proofs, now)
            .map_err(|unmet| refusal(unmet.reason(), unmet))?;
        let trust = self.trust.as_ref().map_err(|error| refusal("store_unusable", error))?;
        let mut names: Vec<(Revoked, Option<Timestamp>)> = proofs.iter().flat_map(Shown::revocable).collect();
        // The holder is revoked for good, or as of a time before now.
        names.extend(holder_names(&known.holder, proofs, model).into_iter().map(|name| (name, Some(now))));
        if let Some((found, _)) = names.iter().find(|(name, since)| trust.is_revoked(name, *since)) {
            return Err(refusal(revoked_reason(found), format!("{} was revoked", found.kind())));
        }
        let ttl = wanted.seconds.map_or(Duration::MAX, |seconds| Duration::from_secs(seconds.into()));
        let ttl = ttl.min(rule.grant_ttl.unwrap_or(DEFAULT_TTL));
        let until = SignedDuration::try_from(ttl).ok().and_then(|ttl| now.checked_add(ttl).ok()).unwrap_or(limit);
        let until = until.min(limit).min(said_until);
        let given = Given {
            id: Id::random().map_err(|error| refusal("unavailable", error))?,
            rule: rule.name.clone(),
            holder: known.holder.clone(),
            proofs: proofs.clone(),
            terms: terms::digest(rule, model),
            issued: now,
            until,
            permit: None,
        };
        let key = GrantKey { rule: number, workload: known.workload, scope: known.scope, address: known.address };
        let until = clock::on_monotonic(given.until).min(ends);
        self.enter(given, key, until)
    }

    /// `until` is on the monotonic clock, which nobody sets.
    pub(super) fn enter(&mut self, given: Given, key: GrantKey, until: u64) -> Result<Granted, Refusal> {
        let granted = Granted { id: given.id, rule: given.rule.clone(), until: given.until };
        let now = clock::monotonic();
        let id = given.id;
        let commands =
            self.ledger.grants.give(now, given, key, until).map_err(|error| refusal(error.reason(), error))?;
        if let Err(error) = self.writer.follow(&commands) {
            // Half a grant is none.
            let (_, commands) = self.ledger.grants.end(now, &[id]);
            let _ = self.writer.follow(&commands);
            return Err(refusal("grants_full", error));
        }
        if let Some(live) = self.ledger.grants.get(&id) {
            for name in names_of(&live.given, &self.active.prepared.model) {
                self.ledger.by_name.entry(name).or_default().push(id);
            }
            self.directory.granted(live.grant, id);
            self.ledger.unsaved.push(row(live, &self.ledger.boot));
        }
        self.totals.grants_issued += 1;
        Ok(granted)
    }

    /// Lets a grant end later.
    pub(super) fn extend_grant(&mut self, id: &Id, until: u64, wall: Timestamp) {
        let commands = self.ledger.grants.extend(clock::monotonic(), id, until, wall);
        if let Err(error) = self.writer.follow(&commands) {
            tracing::error!(%error, "the index of grants");
        }
        if !commands.is_empty()
            && let Some(live) = self.ledger.grants.get(id)
        {
            self.ledger.unsaved.push(row(live, &self.ledger.boot));
        }
    }

    /// Whether a request that a proxy received may pass: the same question as for a grant, about whoever the proofs name.
    pub fn forward(&mut self, proxy: &Who, wanted: Wanted, request: String) -> Result<(), Refusal> {
        let rule = wanted.rule.clone();
        let mut proofs = believed(&wanted);
        let result = self.may_pass(proxy, &wanted, &mut proofs);
        self.metrics.decided(&proofs, result.as_ref().err());
        let reason = result.as_ref().err().map(|refusal| refusal.reason.clone());
        self.forwarded(proxy, rule, reason, &proofs, request);
        result
    }

    fn may_pass(&mut self, proxy: &Who, wanted: &Wanted, proofs: &mut Vec<Shown>) -> Result<(), Refusal> {
        let now = Timestamp::now();
        let known = self.known(proxy)?;
        let model = &self.active.prepared.model;
        let rule = rule_named(model, &wanted.rule)?;
        let Owned::Workload { index, .. } = known.claimant else {
            return Err(refusal("proxy_not_allowed", "only a workload of this node may ask"));
        };
        let offers =
            |object: &Object| matches!(object, Object::Service(s) if model.services[*s].workload == Some(index));
        if !rule.to.iter().any(offers) {
            return Err(refusal("proxy_not_allowed", "the workload offers no service of the rule"));
        }
        if let Some(key) = &wanted.api_key {
            let trust = self.trust.as_mut().map_err(|error| refusal("store_unusable", error))?;
            proofs.push(Shown::ApiKey(trust.check_key(now, key, None, &rule.name, None)?));
        }
        self.complete_all(proofs, None)?;
        terms::check(rule, model, Claimant::Forwarded, proofs, now).map_err(|unmet| refusal(unmet.reason(), unmet))?;
        let trust = self.trust.as_ref().map_err(|error| refusal("store_unusable", error))?;
        let peers = peer_names(None, proofs, model).into_iter().map(|name| (name, Some(now)));
        let mut names = proofs.iter().flat_map(Shown::revocable).chain(peers);
        match names.find(|(name, since)| trust.is_revoked(name, *since)) {
            Some((found, _)) => Err(refusal(revoked_reason(&found), format!("{} was revoked", found.kind()))),
            None => Ok(()),
        }
    }

    /// The caller gives a grant back.
    pub fn give_back(&mut self, who: &Who, id: &Id) -> Result<(), Refusal> {
        let holders = self.holders(who)?;
        let is_own = |live: &Live| holders.iter().any(|holder| is_same_holder(&live.given.holder, holder));
        let owned = self.ledger.grants.get(id).is_some_and(is_own);
        if !owned {
            return Err(refusal("grant_unknown", "the caller holds no such grant"));
        }
        self.end_grants(&[*id], "grant_returned", None);
        Ok(())
    }

    /// The caller's grants.
    pub fn held(&self, who: &Who) -> Result<Vec<Granted>, Refusal> {
        let Ok(holders) = self.holders(who) else { return Ok(Vec::new()) };
        let mut held: Vec<Granted> = self
            .ledger
            .grants
            .iter()
            .filter(|live| holders.iter().any(|holder| is_same_holder(&live.given.holder, holder)))
            .map(|live| Granted { id: live.given.id, rule: live.given.rule.clone(), until: live.given.until })
            .collect();
        // One answer is one message.
        held.sort_by_key(|grant| grant.until);
        held.truncate(128);
        Ok(held)
    }

    /// Revokes something. What it gave ends in the kernel first, and nothing is said before it is on disk.
    pub fn revoke(&mut self, what: Revoked, by: u32, text: &str) -> Result<Effect, String> {
        let ids = self.ledger.by_name.get(&what).cloned().unwrap_or_default();
        let effect = self.end_grants(&ids, "grant_revoked", Some(&what));
        self.drop_signing_key(&what);
        if what.is_of_certificates() {
            self.end_node_keys(|found| certificate_names(found).iter().any(|(name, _)| *name == what));
        }
        self.cancel_approvals(&what);
        self.metrics.revoked(&effect);
        let mut record = Record::about("revoked", format!("{what}: {text}"));
        record.uid = Some(by);
        record.count = Some(effect.grants as u64);
        self.report(record);
        if matches!(what, Revoked::Grant(_)) {
            // It is gone; there is nothing to refuse later.
            return Ok(effect);
        }
        let trust = self.trust.as_mut().map_err(|error| error.to_string())?;
        if let Revoked::Key(id) = what {
            trust.revoke_key(Timestamp::now(), by, id).map_err(|error| error.to_string())?;
            return Ok(effect);
        }
        let revocation = Revocation::new(what, Timestamp::now(), by, text);
        trust.revoke(revocation).map_err(|error| format!("in force, and lost with a restart: {error}"))?;
        Ok(effect)
    }

    /// An issuer revoked a certificate: grants end that were given because this authority vouched for it.
    pub fn listed(&mut self, authority: &str, certificate: Digest) {
        let name = Revoked::Certificate(certificate);
        let is_meant =
            |found: &VerifiedCertificate| found.authority == authority && found.fingerprint == *certificate.as_bytes();
        let is_vouched_for = |shown: &Shown| match shown {
            Shown::Mtls(found) => is_meant(found),
            Shown::Node(vouched) => is_meant(&vouched.certificate),
            // Exchanged by whoever showed the certificate.
            Shown::Token(token) => token.ends_with.iter().any(|(found, _)| *found == name),
            Shown::ApiKey(_) | Shown::Action(_) | Shown::Approval(_) => false,
        };
        let rests =
            |id: &&Id| self.ledger.grants.get(id).is_some_and(|live| live.given.proofs.iter().any(is_vouched_for));
        let ids: Vec<Id> = self.ledger.by_name.get(&name).into_iter().flatten().filter(rests).copied().collect();
        if !ids.is_empty() {
            let effect = self.end_grants(&ids, "grant_revoked", Some(&name));
            self.metrics.revoked(&effect);
        }
        self.forget_tokens(&name);
        self.end_node_keys(is_meant);
    }

    /// Takes a revocation back. What was issued before it stays refused.
    pub fn reinstate(&mut self, what: &Revoked, by: u32) -> Answer {
        let result = match self.trust.as_mut() {
            Ok(trust) => trust.reinstate(what, Timestamp::now()).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match result {
            Ok(found) => {
                if found {
                    let mut record = Record::about("reinstated", what.to_string());
                    record.uid = Some(by);
                    self.report(record);
                }
                Answer::Reinstated { found }
            }
            Err(message) => Answer::Error { message },
        }
    }

    pub fn revocations(&self) -> Answer {
        match &self.trust {
            Ok(trust) => Answer::Revocations { revocations: trust.revocations() },
            Err(error) => Answer::Error { message: error.to_string() },
        }
    }

    /// A caller was refused by control, before it came to a grant.
    pub fn refused(&mut self, who: &Who, rule: Option<String>, reason: &str, proofs: &[Shown]) {
        let mut record = Record::event(if rule.is_some() { "grant_refused" } else { "caller_refused" });
        record.verdict = Some("denied".to_owned());
        record.reason = Some(reason.to_owned());
        // A name that no rule has is the caller's text.
        record.rule = rule.filter(|rule| rule_named(&self.active.prepared.model, rule).is_ok());
        record.proofs = proofs.iter().map(Shown::told).collect();
        self.describe(who, &mut record);
        self.report(record);
    }

    /// A proxy asked about a request of somebody else.
    pub fn forwarded(&mut self, who: &Who, rule: String, reason: Option<String>, proofs: &[Shown], request: String) {
        let mut record = Record::event("request_decided");
        record.verdict = Some(if reason.is_none() { "allowed" } else { "denied" }.to_owned());
        record.reason = Some(reason.unwrap_or_else(|| "rule".to_owned()));
        record.rule = Some(rule).filter(|rule| rule_named(&self.active.prepared.model, rule).is_ok());
        record.proofs = proofs.iter().map(Shown::told).collect();
        record.message = Some(request);
        self.describe(who, &mut record);
        self.report(record);
    }

    pub fn not_attested(&mut self, error: &AttestError) {
        let mut record = Record::event("caller_refused");
        record.verdict = Some("denied".to_owned());
        record.reason = Some(error.reason().to_owned());
        record.message = Some(error.to_string());
        self.report(record);
    }

    pub fn control_is_ready(&mut self, generation: u32) {
        if !self.control_ready {
            tracing::info!(generation, "callers can show their proofs");
        }
        self.control_ready = true;
    }

    /// Ends grants now: slots, sockets, records, in this order.
    pub(super) fn end_grants(&mut self, ids: &[Id], event: &str, by: Option<&Revoked>) -> Effect {
        let (decided, started) = (Timestamp::now(), Instant::now());
        let (ended, commands) = self.ledger.grants.end(clock::monotonic(), ids);
        if let Err(error) = self.writer.follow(&commands) {
            // The slots come first among the commands, and emptying one cannot fail.
            tracing::error!(%error, "the index of grants");
        }
        let cut_microseconds = started.elapsed().as_micros() as u64;
        let grants: Vec<Grant> = ended.iter().map(|live| live.grant).collect();
        let (flows, result) = self.close_sockets(&grants);
        let microseconds = started.elapsed().as_micros() as u64;
        for live in &ended {
            self.forget_names(live);
            let mut record = Record::event(event);
            record.reason = Some(by.map_or_else(|| event.to_owned(), |by| revoked_reason(by).to_owned()));
            self.report_grant(live, record);
        }
        self.totals.grants_revoked += ended.len() as u64;
        Effect {
            decided,
            grants: ended.len(),
            flows,
            destroyed: result.destroyed,
            left: result.failed.len(),
            cut_microseconds,
            microseconds,
        }
    }

    /// Grants that came to their end by themselves. Flows that another grant of the same caller carries go on.
    pub fn expire_grants(&mut self) {
        let (ended, commands) = self.ledger.grants.expire(clock::monotonic());
        if ended.is_empty() {
            return;
        }
        if let Err(error) = self.writer.follow(&commands) {
            tracing::error!(%error, "the index of grants");
        }
        let mut alone = Vec::new();
        for live in &ended {
            self.forget_names(live);
            self.report_grant(live, Record::event("grant_expired"));
            if !self.ledger.grants.is_carried(live) {
                alone.push(live.grant);
            }
        }
        self.totals.grants_expired += ended.len() as u64;
        self.close_sockets(&alone);
    }

    /// After another policy came into force: who holds grants may have other names in it, and grants end whose rules are no
    /// more, or ask for other proofs now.
    pub fn review_grants(&mut self) {
        let model = &self.active.prepared.model;
        self.ledger.by_name.clear();
        for live in self.ledger.grants.iter() {
            for name in names_of(&live.given, model) {
                self.ledger.by_name.entry(name).or_default().push(live.given.id);
            }
        }
        let rules: HashMap<&str, (&Rule, u64)> =
            model.rules.iter().map(|rule| (rule.name.as_str(), (rule, terms::digest(rule, model)))).collect();
        let is_stale = |live: &&Live| {
            let Some((rule, terms)) = rules.get(live.given.rule.as_str()) else { return true };
            let is_named = match &live.given.holder {
                Holder::Vouched { spiffe_id, .. } => terms::vouched(rule, model, spiffe_id),
                Holder::Workload { .. } | Holder::Address { .. } => true,
            };
            *terms != live.given.terms || !is_named
        };
        let stale: Vec<Id> = self.ledger.grants.iter().filter(is_stale).map(|live| live.given.id).collect();
        if !stale.is_empty() {
            self.end_grants(&stale, "grant_outdated", None);
        }
        self.review_callers();
    }

    /// Takes up what an earlier daemon gave, as far as kernel and disk agree; ends the rest.
    pub fn restore_grants(&mut self) -> Result<(), DaemonError> {
        self.ledger.grants.adopt(self.active.prepared.image.sets.clone());
        let slots = self.writer.slots();
        let pointed = self.writer.pointed()?;
        let boot = self.ledger.boot.clone();
        let rows = match &self.trust {
            Ok(trust) => trust.store().grants().unwrap_or_else(|error| {
                tracing::error!(%error, "grants of the daemon before end");
                Vec::new()
            }),
            Err(_) => Vec::new(),
        };
        let now = clock::monotonic();
        let mut kept: HashMap<u32, u32> = HashMap::new();
        for row in rows {
            let slot = slots.get(row.slot as usize).copied().unwrap_or_default();
            if row.boot != boot || !slot.is_alive(row.serial, now) {
                self.ledger.unremoved.push(row.given.id);
                continue;
            }
            let key = key_of(&row);
            let grant = Grant { slot: row.slot, serial: row.serial };
            let id = row.given.id;
            let commands = self.ledger.grants.restore(row.given, key, grant, slot.until);
            self.writer.follow(&commands)?;
            self.directory.granted(grant, id);
            kept.insert(row.slot, row.serial);
            if self.writer.permit(grant).is_some_and(permits::is_used_up) {
                let commands = self.ledger.grants.use_up(&id);
                self.writer.follow(&commands)?;
            }
        }
        // A live slot that nothing explains is nobody's.
        for (at, slot) in slots.iter().enumerate() {
            let at = at as u32;
            if slot.until > now && kept.get(&at) != Some(&slot.serial) {
                self.writer.follow(&[crate::grants::Command::Empty { slot: at }])?;
            }
        }
        for (key, grant) in pointed {
            if kept.get(&grant.slot) != Some(&grant.serial) && !self.ledger.grants.iter().any(|live| live.key == key) {
                self.writer.follow(&[crate::grants::Command::Unpoint { key }])?;
            }
        }
        for (key, grant) in self.writer.vouched()? {
            if self.ledger.grants.vouched(&key) != Some(grant) {
                self.writer.follow(&[crate::grants::Command::Unvouch { key }])?;
            }
        }
        self.restore_callers();
        self.review_grants();
        Ok(())
    }

    /// Puts on disk what became of grants. Losing it is safe: see `store/grants.rs`.
    pub fn save_grants(&mut self) {
        let (rows, gone) = (std::mem::take(&mut self.ledger.unsaved), std::mem::take(&mut self.ledger.unremoved));
        let Ok(trust) = &self.trust else { return };
        let live = rows.iter().filter(|row| !gone.contains(&row.given.id));
        let lost = |error: StoreError| tracing::error!(%error, "grants are not on disk: a restart would end them");
        if trust.store().put_grants(live.clone()).is_err() {
            // One that cannot be kept takes none of the others along.
            live.for_each(|row| trust.store().put_grants([row]).unwrap_or_else(lost));
        }
        trust.store().remove_grants(gone.iter().copied()).unwrap_or_else(lost);
    }

    fn forget_names(&mut self, live: &Live) {
        let id = live.given.id;
        for name in names_of(&live.given, &self.active.prepared.model) {
            if let Some(ids) = self.ledger.by_name.get_mut(&name) {
                ids.retain(|other| *other != id);
                if ids.is_empty() {
                    self.ledger.by_name.remove(&name);
                }
            }
        }
        self.directory.grant_ended(live.grant);
        self.ledger.unremoved.push(id);
    }

    pub(super) fn report_grant(&mut self, live: &Live, mut record: Record) {
        record.grant = Some(live.given.id.to_string());
        record.rule = Some(live.given.rule.clone());
        record.proofs = live.given.proofs.iter().map(Shown::told).collect();
        match &live.given.holder {
            Holder::Workload { name, cgroup, .. } => {
                record.workload = Some(name.clone());
                record.cgroup = Some(cgroup.clone());
            }
            Holder::Address { address, .. } => record.remote_address = Some(*address),
            Holder::Vouched { node, spiffe_id, .. } => {
                record.peer_node = Some(node.clone());
                record.peer_spiffe_id = Some(spiffe_id.as_str().to_owned());
            }
        }
        self.report(record);
    }
}

/// Control cannot vouch for an API key, nor for what another node said: that is found out here.
fn believed(wanted: &Wanted) -> Vec<Shown> {
    verified_by_control(&wanted.proofs)
}

/// Of all proofs, those that control verifies.
pub(super) fn verified_by_control(proofs: &[Shown]) -> Vec<Shown> {
    proofs.iter().filter(|shown| matches!(shown.kind(), Proof::Mtls | Proof::Token)).cloned().collect()
}

pub(super) fn rule_named<'a>(model: &'a Model, name: &str) -> Result<&'a Rule, Refusal> {
    model.rules.iter().find(|rule| rule.name == name).ok_or_else(|| unknown_rule(name))
}

fn unknown_rule(_: &str) -> Refusal {
    // Not repeated: it is the caller's text.
    refusal("rule_unknown", "the policy has no such rule")
}

/// Everything by which a grant is revoked.
fn names_of(given: &Given, model: &Model) -> Vec<Revoked> {
    let of_proofs = given.proofs.iter().flat_map(Shown::revocable).map(|(name, _)| name);
    of_proofs.chain(holder_names(&given.holder, &given.proofs, model)).chain([Revoked::Grant(given.id)]).collect()
}

pub(super) fn revoked_reason(what: &Revoked) -> &'static str {
    match what {
        Revoked::Token { .. } | Revoked::TokenHash(_) => "token_revoked",
        Revoked::Issuer(_) => "issuer_revoked",
        Revoked::IssuerKey { .. } => "issuer_key_revoked",
        Revoked::Key(_) => "api_key_revoked",
        Revoked::Certificate(_) | Revoked::Serial { .. } | Revoked::Spki(_) => "certificate_revoked",
        Revoked::SpiffeId(_) => "spiffe_id_revoked",
        Revoked::Workload(_) | Revoked::Instance(_) | Revoked::Agent(_) => "workload_revoked",
        Revoked::Peer(_) => "peer_revoked",
        Revoked::Grant(_) => "grant_revoked",
    }
}

fn row(live: &Live, boot: &str) -> Row {
    Row {
        given: live.given.clone(),
        rule_number: live.key.rule,
        workload_number: live.key.workload,
        slot: live.grant.slot,
        serial: live.grant.serial,
        boot: boot.to_owned(),
    }
}

fn key_of(row: &Row) -> GrantKey {
    let (scope, address) = match &row.given.holder {
        Holder::Workload { instance, .. } => (*instance, Address::UNSPECIFIED),
        Holder::Address { address, netns } => (*netns, from_ip(*address)),
        Holder::Vouched { label, .. } => ((*label).into(), Address::UNSPECIFIED),
    };
    GrantKey { rule: row.rule_number, workload: row.workload_number, scope, address }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        grants::proof::{ApiKey, Vouched},
        proofs::testing,
    };

    /// Control says what it verified. What it does not verify it cannot say.
    #[test]
    fn neither_keys_nor_a_nodes_word_are_believed_of_control() {
        let certificate = |id| testing::certificate("ca", id, Timestamp::MAX);
        let own = Shown::Mtls(Box::new(certificate("spiffe://example.org/web")));
        let key = ApiKey { id: "2e3n8nazzq".parse().unwrap(), name: "k".into(), not_after: Timestamp::MAX };
        let word = Vouched {
            node: "a".into(),
            spiffe_id: "spiffe://example.org/web".parse().unwrap(),
            certificate: certificate("spiffe://example.org/node/a"),
        };
        let proofs = vec![Shown::ApiKey(key), own.clone(), Shown::Node(Box::new(word))];
        let wanted = Wanted { rule: "r".into(), proofs, api_key: None, seconds: None };
        assert_eq!(believed(&wanted), [own]);
    }
}
