//! Other nodes: whose word counts here about which callers, and what this node says of its own.
//!
//! Enters: what control says of sessions with other nodes. Leaves: keys and labels in the kernel, grants of callers for whom
//! a node may speak. Never: a caller that the policy does not let that node speak for.
//!
//! A session gives one key, and renews the labels that are named in it; both end together. The next session comes before
//! that, with a key of its own: so a key is used for minutes, and nothing is refused while one follows the other.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use authd_common::syn::{self, LABELS, LabelKey, NodeKeyId, Speaker, Voice};
use jiff::{SignedDuration, Timestamp};

use super::{
    Daemon, DaemonError,
    callers::spiffe_id,
    clock,
    control::Who,
    granting::refusal,
    status::{self, Inbound, NodeSession, Outbound},
};
use crate::{
    audit::record::Record,
    grants::{
        Given, Holder, Id, Live, caller_key,
        proof::{Shown, Vouched},
        terms,
    },
    ipc::{Connection, Identities, NodeKey, Refusal},
    policy::model::{Model, Node},
    proofs::x509::{chain, identity::VerifiedCertificate, leaf::Leaf, spiffe::SpiffeId},
};

/// Callers for whom one node may speak at one time.
const PER_NODE: usize = 8_192;
/// What came to its end is known by its name for so long, so that refusals say what it was.
const KNOWN_AFTER: u64 = 60_000_000_000;
const SWEEP_EVERY: Duration = Duration::from_secs(30);

/// What a node is told that may speak.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admitted {
    pub key_id: u8,
    pub seconds: u32,
    pub labels: Vec<Option<u32>>,
}

/// A caller for whom another node speaks.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    pub label: u32,
    pub node: String,
    pub spiffe_id: SpiffeId,
    certificate: VerifiedCertificate,
    /// End, on both clocks.
    pub until: Timestamp,
    pub ends: u64,
}

impl Caller {
    pub fn holder(&self) -> Holder {
        Holder::Vouched { node: self.node.clone(), spiffe_id: self.spiffe_id.clone(), label: self.label }
    }

    /// Its node's word.
    pub fn proof(&self) -> Shown {
        Shown::Node(Box::new(Vouched {
            node: self.node.clone(),
            spiffe_id: self.spiffe_id.clone(),
            certificate: self.certificate.clone(),
        }))
    }
}

/// What a node may speak in.
struct Session<'a> {
    node: &'a Node,
    number: u32,
    certificate: &'a VerifiedCertificate,
    /// End, on both clocks.
    until: Timestamp,
    ends: u64,
}

/// Everything about other nodes that lives as long as the daemon.
#[derive(Default)]
pub struct Nodes {
    /// By label.
    callers: HashMap<u32, Caller>,
    by_name: HashMap<(String, SpiffeId), u32>,
    /// Which key a connection brought.
    sessions: HashMap<Connection, (NodeKeyId, u64)>,
    /// What each key rests on. Of those that an earlier daemon took, nobody knows.
    keys: HashMap<NodeKeyId, VerifiedCertificate>,
    /// Labels that are to be told of, by which session: see [`Daemon::node_accepted`].
    accepted: HashMap<String, NodeKey>,
    /// Who control says this node speaks for.
    told: Option<BTreeMap<String, Vec<(u32, u64)>>>,
    /// When what ended was last removed.
    swept: Option<Instant>,
}

impl Nodes {
    /// Control begins anew.
    pub fn control_ended(&mut self) {
        self.sessions.clear();
        self.accepted.clear();
        self.told = None;
    }
}

impl Daemon {
    /// Another node wants to speak for callers. What it may not say is answered with nothing; what it may is in the kernel
    /// before the answer.
    pub fn admit_node(
        &mut self,
        who: &Who,
        connection: Connection,
        certificate: VerifiedCertificate,
        key: &NodeKey,
        speaks_for: &[String],
    ) -> Result<Admitted, Refusal> {
        let shown = [Shown::Mtls(Box::new(certificate.clone()))];
        let result = self.admit(who, connection, certificate, key, speaks_for);
        self.metrics.decided(&shown, result.as_ref().err());
        self.metrics.node_asked(result.as_ref().err());
        let mut record = Record::event(if result.is_ok() { "node_admitted" } else { "node_refused" });
        record.verdict = Some(if result.is_ok() { "allowed" } else { "denied" }.to_owned());
        record.proofs = shown.iter().map(Shown::told).collect();
        match &result {
            Ok((name, admitted)) => {
                record.reason = Some("rule".to_owned());
                record.peer_node = Some(name.clone());
                record.peer_key_id = Some(admitted.key_id.into());
                record.count = Some(admitted.labels.iter().flatten().count() as u64);
            }
            Err(refusal) => record.reason = Some(refusal.reason.clone()),
        }
        self.describe(who, &mut record);
        self.report(record);
        result.map(|(_, admitted)| admitted)
    }

    fn admit(
        &mut self,
        who: &Who,
        connection: Connection,
        certificate: VerifiedCertificate,
        key: &NodeKey,
        speaks_for: &[String],
    ) -> Result<(String, Admitted), Refusal> {
        if !matches!(who, Who::Remote { .. }) {
            return Err(refusal("node_not_remote", "nodes speak to each other's listener"));
        }
        let (now, clock) = (Timestamp::now(), clock::monotonic());
        let node = node_of(&self.active.prepared.model, &certificate)
            .ok_or_else(|| refusal("node_unknown", "the policy knows no node by this certificate"))?
            .clone();
        let number = self.node_number(&node.name)?;
        let trust = self.trust.as_ref().map_err(|error| refusal("store_unusable", error))?;
        let proof = Shown::Mtls(Box::new(certificate.clone()));
        if proof.revocable().iter().any(|(name, since)| trust.is_revoked(name, *since)) {
            return Err(refusal("certificate_revoked", "the node's certificate was revoked"));
        }
        let life = SignedDuration::try_from(self.config.control.node_session).unwrap_or(SignedDuration::from_secs(600));
        let until = now.checked_add(life).unwrap_or(now).min(certificate.valid_until);
        let seconds = u32::try_from(until.duration_since(now).as_secs()).unwrap_or(0);
        if seconds == 0 {
            return Err(refusal("certificate_expired", "the node's certificate is about to end"));
        }
        let ends = clock + u64::from(seconds) * 1_000_000_000;
        let (id, ends) = self.session_key(connection, number, key, clock, ends)?;
        self.nodes.keys.entry(id).or_insert_with(|| certificate.clone());
        // Whoever asks again does not get a longer session.
        let seconds = u32::try_from(ends.saturating_sub(clock) / 1_000_000_000).unwrap_or(0);
        if seconds == 0 {
            return Err(refusal("session_over", "the session came to its end: open another one"));
        }
        let until = now.checked_add(SignedDuration::from_secs(seconds.into())).unwrap_or(until);
        let callers = self.nodes.by_name.keys().filter(|(owner, _)| *owner == node.name).count();
        let mut room = PER_NODE.saturating_sub(callers);
        let session = Session { node: &node, number, certificate: &certificate, until, ends };
        let labels = speaks_for.iter().map(|text| self.caller_of(&session, text, &mut room)).collect();
        Ok((node.name, Admitted { key_id: id.key_id as u8, seconds, labels }))
    }

    fn node_number(&self, name: &str) -> Result<u32, Refusal> {
        let number = self.active.prepared.registry.nodes.number(name);
        number.ok_or_else(|| refusal("node_unknown", "the policy knows no node by this certificate"))
    }

    /// The session's key, in the kernel. The same session has one, however often it asks.
    fn session_key(
        &mut self,
        connection: Connection,
        node: u32,
        key: &NodeKey,
        now: u64,
        ends: u64,
    ) -> Result<(NodeKeyId, u64), Refusal> {
        if let Some((id, ends)) = self.nodes.sessions.get(&connection)
            && id.node == node
        {
            return Ok((*id, *ends));
        }
        let failed = |error| refusal("unavailable", error);
        let known = self.writer.node_keys().map_err(failed)?;
        let own = |id: u32| known.iter().find(|(known, _)| *known == NodeKeyId { node, key_id: id });
        // One that was never used, or else one that ended; the longest ago, so that old SYNs are told from wrong ones.
        let free = (0..=255).map(|id| (own(id).map_or(0, |(_, until)| *until), id)).min();
        let key_id = free.filter(|(until, _)| *until <= now).map(|(_, id)| id);
        let key_id = key_id.ok_or_else(|| refusal("too_many_sessions", "the node has 256 sessions: let some end"))?;
        let id = NodeKeyId { node, key_id };
        self.writer.set_node_key(id, syn::NodeKey { secret: secret_of(key), until: ends }).map_err(failed)?;
        self.nodes.keys.remove(&id);
        self.nodes.sessions.insert(connection, (id, ends));
        Ok((id, ends))
    }

    /// Something was revoked: keys end whose sessions rest on it, and nothing is given to callers of these any more. Whoever
    /// shows another certificate opens another session.
    pub(super) fn end_node_keys(&mut self, rests: impl Fn(&VerifiedCertificate) -> bool) {
        let now = clock::monotonic();
        let known = self.writer.node_keys().unwrap_or_else(|error| {
            tracing::error!(%error, "the keys of nodes");
            Vec::new()
        });
        for (id, until) in known {
            if until <= now || self.nodes.keys.get(&id).is_some_and(|certificate| !rests(certificate)) {
                continue;
            }
            self.nodes.sessions.retain(|_, (session, _)| *session != id);
            if let Err(error) = self.writer.end_node_key(id, clock::over()) {
                tracing::error!(%error, "a node's key does not end");
            }
        }
        for caller in self.nodes.callers.values_mut().filter(|caller| rests(&caller.certificate)) {
            caller.ends = caller.ends.min(now);
        }
    }

    /// The label of a caller, with its grants, if the node may speak for it.
    fn caller_of(&mut self, session: &Session<'_>, text: &str, room: &mut usize) -> Option<u32> {
        let Session { node, number, certificate, until, ends } = *session;
        let spiffe_id: SpiffeId = text.parse().ok()?;
        if !node.may_speak_for(&spiffe_id) {
            return None;
        }
        let name = (node.name.clone(), spiffe_id.clone());
        let known = self.nodes.by_name.get(&name).copied();
        let label = match known {
            Some(label) => label,
            None => {
                *room = room.checked_sub(1).or_else(|| {
                    tracing::warn!(node = node.name, "the node speaks for {PER_NODE} callers already");
                    None
                })?;
                self.free_label()?
            }
        };
        let caller =
            Caller { label, node: node.name.clone(), spiffe_id, certificate: certificate.clone(), until, ends };
        if self.is_revoked(&caller) {
            return None;
        }
        // A later session has named the caller already: what that one gave holds for longer.
        if self.nodes.callers.get(&label).is_some_and(|known| known.ends > ends) {
            return Some(label);
        }
        let speaker = Speaker { until: ends, node: number, reserved: 0 };
        if let Err(error) = self.writer.set_speaker(label, speaker) {
            tracing::error!(%error, node = node.name, "there is no room for a caller");
            return None;
        }
        self.directory.introduced(label, &node.name, caller.spiffe_id.as_str());
        self.nodes.by_name.insert(name, label);
        self.nodes.callers.insert(label, caller);
        self.grant_to_caller(label);
        Some(label)
    }

    /// A label that means nobody, and has not lately. Random ones: an earlier daemon's are not taken for this one's.
    fn free_label(&self) -> Option<u32> {
        for _ in 0..64 {
            let mut bytes = [0; 4];
            aws_lc_rs::rand::fill(&mut bytes).ok()?;
            let label = u32::from_ne_bytes(bytes) & (LABELS - 1);
            if label != 0 && !self.writer.is_speaker(label).ok()? {
                return Some(label);
            }
        }
        None
    }

    /// Gives a caller what the rules say: one grant for each that takes its node's word, until the session's end.
    fn grant_to_caller(&mut self, label: u32) {
        let Some(caller) = self.nodes.callers.get(&label).cloned() else { return };
        let (now, wall) = (clock::monotonic(), Timestamp::now());
        if caller.ends <= now || self.is_revoked(&caller) {
            return;
        }
        let prepared = &self.active.prepared;
        let model = &prepared.model;
        let wanted: Vec<(String, u32, u64)> = model
            .rules
            .iter()
            .filter(|rule| rule.is_given_by_word() && terms::vouched(rule, model, &caller.spiffe_id))
            .filter_map(|rule| {
                Some((rule.name.clone(), prepared.registry.rules.number(&rule.name)?, terms::digest(rule, model)))
            })
            .collect();
        // A grant ends with what it rests on: the word of a node that shows another certificate is another grant.
        let proofs = [caller.proof()];
        for (rule, number, terms) in wanted {
            let key = caller_key(number, label);
            let rests_on_same = |live: &&Live| live.given.terms == terms && live.given.proofs == proofs;
            let known = self.ledger.grants.held(&key).find(rests_on_same).map(|live| live.given.id);
            if let Some(id) = known {
                self.extend_grant(&id, caller.ends, caller.until);
                continue;
            }
            let id = match Id::random() {
                Ok(id) => id,
                Err(error) => return tracing::error!(%error, caller = %caller.spiffe_id, "no grant without randomness"),
            };
            let given = Given {
                id,
                rule,
                holder: caller.holder(),
                proofs: proofs.to_vec(),
                terms,
                issued: wall,
                until: caller.until,
                permit: None,
            };
            match self.enter(given, key, caller.ends) {
                Ok(_) => {
                    let mut record = Record::event("grant_issued");
                    record.verdict = Some("allowed".to_owned());
                    record.reason = Some("rule".to_owned());
                    if let Some(live) = self.ledger.grants.get(&id).cloned() {
                        record.until = Some(live.given.until.to_string());
                        self.report_grant(&live, record);
                    }
                }
                Err(refusal) => tracing::error!(reason = refusal.reason, caller = %caller.spiffe_id, "{refusal}"),
            }
        }
    }

    /// Whom another node vouches that a caller of the listener is.
    pub(super) fn vouched_for(&self, who: &Who) -> Option<&Caller> {
        let Who::Remote { label, .. } = who else { return None };
        let caller = self.nodes.callers.get(label)?;
        (clock::monotonic() < caller.ends && !self.is_revoked(caller)).then_some(caller)
    }

    /// Rules are other ones now: callers have grants of those that name them.
    pub(super) fn review_callers(&mut self) {
        let model = &self.active.prepared.model;
        // A node that may not speak for a caller any more has nothing to say of it.
        let unspoken: Vec<u32> = self
            .nodes
            .callers
            .iter()
            .filter(|(_, caller)| {
                !node_of(model, &caller.certificate)
                    .is_some_and(|node| node.name == caller.node && node.may_speak_for(&caller.spiffe_id))
            })
            .map(|(label, _)| *label)
            .collect();
        for label in unspoken {
            self.forget_caller(label);
        }
        let labels: Vec<u32> = self.nodes.callers.keys().copied().collect();
        for label in labels {
            self.grant_to_caller(label);
        }
    }

    fn forget_caller(&mut self, label: u32) {
        let Some(caller) = self.nodes.callers.remove(&label) else { return };
        // The label means nobody from now on, and nobody else either as long as a key lives with which it may be said.
        let number = self.active.prepared.registry.nodes.number(&caller.node).unwrap_or_default();
        let over = Speaker { until: clock::over(), node: number, reserved: 0 };
        if let Err(error) = self.writer.set_speaker(label, over) {
            tracing::error!(%error, label, "a caller's label");
        }
        self.nodes.by_name.remove(&(caller.node, caller.spiffe_id));
        let held = |holder: &Holder| matches!(holder, Holder::Vouched { label: own, .. } if *own == label);
        let ids: Vec<Id> =
            self.ledger.grants.iter().filter(|live| held(&live.given.holder)).map(|live| live.given.id).collect();
        if !ids.is_empty() {
            self.end_grants(&ids, "grant_outdated", None);
        }
    }

    /// Whom an earlier daemon's labels mean, as far as grants tell.
    pub(super) fn restore_callers(&mut self) {
        let (now, wall) = (clock::monotonic(), Timestamp::now());
        for live in self.ledger.grants.iter() {
            let Holder::Vouched { node, spiffe_id, label } = &live.given.holder else { continue };
            let word = live.given.proofs.iter().find_map(|shown| match shown {
                Shown::Node(vouched) => Some(vouched),
                _ => None,
            });
            // What rests on more than a node's word may end before or after that.
            let ends = self.writer.speaker(*label).map(|speaker| speaker.until);
            let (Some(word), Some(ends)) = (word, ends) else { continue };
            if self.nodes.callers.contains_key(label) {
                continue;
            }
            let left = SignedDuration::try_from(Duration::from_nanos(ends.saturating_sub(now))).unwrap_or_default();
            let caller = Caller {
                label: *label,
                node: node.clone(),
                spiffe_id: spiffe_id.clone(),
                certificate: word.certificate.clone(),
                until: wall.checked_add(left).unwrap_or(wall),
                ends,
            };
            self.directory.introduced(*label, node, spiffe_id.as_str());
            self.nodes.by_name.insert((node.clone(), spiffe_id.clone()), *label);
            self.nodes.callers.insert(*label, caller);
        }
        // To whom this node speaks is in the kernel, and stays until control says otherwise.
    }

    /// A connection of control's ended, and with it what it may ask for.
    pub fn forget_session(&mut self, connection: Connection) {
        self.nodes.sessions.remove(&connection);
    }

    /// Removes what ended a while ago. Nothing waits for it: reading whole tables is not for every second.
    pub(super) fn sweep_nodes(&mut self) -> Result<(), DaemonError> {
        if self.nodes.swept.is_some_and(|at| at.elapsed() < SWEEP_EVERY) {
            return Ok(());
        }
        self.nodes.swept = Some(Instant::now());
        let now = clock::monotonic();
        let over = |until: u64| until.saturating_add(KNOWN_AFTER) < now;
        let life = u64::try_from(self.config.control.node_session.as_nanos()).unwrap_or(u64::MAX);
        for (id, until) in self.writer.node_keys()? {
            if over(until) {
                self.writer.remove_node_key(id)?;
                self.nodes.keys.remove(&id);
            }
        }
        for (label, speaker) in self.writer.speakers()? {
            if over(speaker.until.saturating_add(life)) {
                self.writer.remove_speaker(label)?;
                if let Some(caller) = self.nodes.callers.remove(&label) {
                    self.nodes.by_name.remove(&(caller.node, caller.spiffe_id));
                }
            }
        }
        Ok(())
    }

    /// Which node is where, by the policy in force. To those for whom there is no room nothing is said, so that they refuse.
    pub(super) fn place_nodes(&mut self) {
        let prepared = &self.active.prepared;
        let mut placed = BTreeMap::new();
        for node in prepared.model.nodes.iter().filter(|node| node.address.is_some()) {
            let Some(number) = prepared.registry.nodes.number(&node.name) else { continue };
            placed.extend(node.networks.iter().map(|network| ((network.address, network.bits), number)));
        }
        if let Err(error) = self.writer.set_node_addresses(&placed) {
            tracing::error!(%error, "some nodes are not told who calls: name fewer `networks` of nodes");
        }
    }

    /// For whom this node speaks, if that changed since control was told.
    pub fn identities(&mut self) -> Option<Identities> {
        let now = self.own_callers();
        if self.nodes.told.as_ref() == Some(&now) {
            return None;
        }
        let spiffe_ids = now.keys().cloned().collect();
        self.nodes.told = Some(now);
        Some(Identities { spiffe_ids })
    }

    /// SPIFFE IDs of this node's workloads, each with the workload's number and instance.
    fn own_callers(&self) -> BTreeMap<String, Vec<(u32, u64)>> {
        let prepared = &self.active.prepared;
        let mut callers: BTreeMap<String, Vec<(u32, u64)>> = BTreeMap::new();
        if prepared.model.nodes.iter().all(|node| node.address.is_none()) {
            return callers;
        }
        let mut apart = HashMap::new();
        for (index, workload) in prepared.model.workloads.iter().enumerate() {
            let Some(number) = prepared.registry.workloads.number(&workload.name) else { continue };
            if workload.by_instance() {
                apart.insert(number, index);
            } else if !workload.spiffe_path.contains("{instance}") {
                callers.entry(spiffe_id(&prepared.model, index, "")).or_default().push((number, 0));
            }
        }
        for (path, _, entry) in self.tree.instances() {
            if let Some(index) = apart.get(&entry.workload)
                && entry.instance != 0
                && self.active.patterns.instance_path(path) == Some(path)
            {
                let caller = callers.entry(spiffe_id(&prepared.model, *index, path)).or_default();
                caller.push((entry.workload, entry.instance));
            }
        }
        callers
    }

    /// Another node takes this one's word. Labels come in several messages, the last of which says so; until then the session
    /// before is in use.
    pub fn node_accepted(
        &mut self,
        node: &str,
        key: &NodeKey,
        key_id: u8,
        seconds: u32,
        labels: &[(String, u32)],
        last: bool,
    ) {
        if let Err(error) = self.accept(node, key, key_id, seconds, labels, last) {
            tracing::error!(%error, node, "what was agreed upon with a node is not in the kernel");
        }
    }

    fn accept(
        &mut self,
        node: &str,
        key: &NodeKey,
        key_id: u8,
        seconds: u32,
        labels: &[(String, u32)],
        last: bool,
    ) -> Result<(), DaemonError> {
        let Some(number) = self.active.prepared.registry.nodes.number(node) else { return Ok(()) };
        if !self.active.prepared.model.nodes.iter().any(|known| known.name == node) {
            return Ok(());
        }
        let bank = self.writer.voice(number).map_or(0, |voice| voice.bank ^ 1);
        if self.nodes.accepted.get(node) != Some(key) {
            // The bank holds labels of the session before the one in use.
            for old in self.writer.label_keys()? {
                if old.node == number && old.bank == bank {
                    self.writer.remove_label(old)?;
                }
            }
            self.nodes.accepted.insert(node.to_owned(), key.clone());
        }
        let callers = self.own_callers();
        for (spiffe_id, label) in labels {
            for (workload, instance) in callers.get(spiffe_id).into_iter().flatten() {
                let key = LabelKey { instance: *instance, workload: *workload, node: number, bank, reserved: 0 };
                self.writer.set_label(key, *label & (LABELS - 1))?;
            }
        }
        if last {
            self.nodes.accepted.remove(node);
            // Never to the last moment: the far node began to count earlier.
            let life = Duration::from_secs(seconds.into()).mul_f32(0.9);
            let until = clock::monotonic() + u64::try_from(life.as_nanos()).unwrap_or(0);
            let voice = Voice { secret: secret_of(key), until, key_id: key_id.into(), bank };
            self.writer.set_voice(number, voice)?;
            let mut record = Record::event("node_accepts");
            record.peer_node = Some(node.to_owned());
            record.peer_key_id = Some(key_id.into());
            self.report(record);
        }
        Ok(())
    }
}

impl Daemon {
    /// What there is between this node and each other one of the policy now.
    pub(super) fn node_statuses(&self) -> Result<Vec<status::Node>, DaemonError> {
        let prepared = &self.active.prepared;
        if prepared.model.nodes.is_empty() {
            return Ok(Vec::new());
        }
        let (now, own, keys) = (clock::monotonic(), self.own_spiffe_id(), self.writer.node_keys()?);
        let session = |key_id: u32, until: u64| NodeSession {
            key_id,
            seconds_left: Duration::from_nanos(until.saturating_sub(now)).as_secs(),
        };
        let status = |node: &Node| {
            let number = prepared.registry.nodes.number(&node.name);
            let voice = number.and_then(|number| self.writer.voice(number)).filter(|voice| voice.until > now);
            let outbound = match (node.address, voice) {
                _ if own.as_ref() == Some(&node.spiffe_id) => Outbound::Own,
                (None, _) => Outbound::NoAddress,
                (Some(_), None) => Outbound::NoSession,
                (Some(_), Some(voice)) => Outbound::Session(session(voice.key_id, voice.until)),
            };
            let brought = keys.iter().filter(|(id, _)| Some(id.node) == number).max_by_key(|(_, until)| *until);
            let callers = self.nodes.callers.values().filter(|caller| caller.node == node.name && caller.ends > now);
            let inbound = Inbound {
                may_speak: !node.speaks_for.is_empty() && !matches!(outbound, Outbound::Own),
                callers: callers.count() as u64,
                session: brought.map(|(id, until)| session(id.key_id, *until)),
            };
            status::Node { name: node.name.clone(), outbound, inbound }
        };
        Ok(prepared.model.nodes.iter().map(status).collect())
    }

    /// Of the certificate that the listener shows.
    fn own_spiffe_id(&self) -> Option<SpiffeId> {
        let file = std::fs::read(self.config.control.certificate.as_ref()?).ok()?;
        Leaf::read(chain::read(&file).ok()?.first()?).ok()?.spiffe_id().ok()?
    }
}

impl Daemon {
    /// Whether a caller, its node's certificate or who vouches for that was revoked. Without the store nobody knows.
    fn is_revoked(&self, caller: &Caller) -> bool {
        let Ok(trust) = &self.trust else { return true };
        let holder = caller.holder();
        let proofs = [caller.proof()];
        let now = Timestamp::now();
        let of_proofs = proofs.iter().flat_map(Shown::revocable);
        let of_holder = super::callers::holder_names(&holder, &proofs, &self.active.prepared.model);
        let mut names = of_proofs.chain(of_holder.into_iter().map(|name| (name, Some(now))));
        names.any(|(name, since)| trust.is_revoked(&name, since))
    }
}

/// Which node a certificate is of.
fn node_of<'a>(model: &'a Model, certificate: &VerifiedCertificate) -> Option<&'a Node> {
    let authority = |node: &Node| match node.authority {
        None => true,
        Some(index) => model.authorities.get(index).is_some_and(|known| known.name == certificate.authority),
    };
    model.nodes.iter().find(|node| certificate.has_spiffe_id(&node.spiffe_id) && authority(node))
}

fn secret_of(NodeKey(key): &NodeKey) -> [u64; 2] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *key;
    [u64::from_le_bytes([a, b, c, d, e, f, g, h]), u64::from_le_bytes([i, j, k, l, m, n, o, p])]
}
