//! Sessions with other nodes: this one says there who its callers are, and others say it here.
//!
//! Enters: nodes of the policy, and for whom this one speaks. Leaves: for each node that has an address a key, and the
//! numbers by which this node's callers are known there, renewed before they end. Never: a session with a node whose
//! certificate is not the one that the policy names, or a key that anybody but the two ends has.

pub mod admit;
pub mod dial;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use jiff::Timestamp;
use rustls::{ConnectionCommon, ProtocolVersion, pki_types::CertificateDer};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};
use utoipa::ToSchema;

use self::dial::{Dial, DialError, Opened, PATIENCE};
use super::{
    Shared,
    fetch::jitter,
    verifier::{Verifier, lock},
};
use crate::{
    grants::Id,
    ipc::{FromControl, Identities, Identity, NodeKey},
    policy::model::Node,
    proofs::x509::{
        bundle::Authority,
        chain::{ChainError, Usage, verify_by_any},
        crl::NothingRevoked,
        identity::VerifiedCertificate,
        spiffe::SpiffeId,
    },
};

/// The label of the TLS exporter (RFC 8446, 7.5), with an empty context.
const EXPORTER: &[u8] = b"EXPORTER-authd-node-syn";
pub const PATH: &str = "/v1/node-sessions";
/// After the first failure, or the first new caller; twice as long after each further one.
const PAUSE: Duration = Duration::from_millis(200);
const PAUSE_AT_MOST: Duration = Duration::from_secs(10);
/// New callers that come so long after the last ones do not wait for having been many.
const CALM: Duration = Duration::from_secs(30);
/// A session is renewed after half of its time, which is another node's to say, within these limits.
const RENEW_AFTER_AT_LEAST: Duration = Duration::from_secs(1);
const RENEW_AFTER_AT_MOST: Duration = Duration::from_secs(3600);
/// Kinds of failures of which each is in the log once, until a session succeeds.
const MAX_KINDS: usize = 16;

/// What a node asks of another one.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NodeSessionRequest {
    /// SPIFFE IDs of callers for whom it wants to speak, 1 to 128, each once.
    #[schema(value_type = Vec<String>)]
    pub speaks_for: Vec<SpiffeId>,
    /// 32 hexadecimal digits, others with each start of the asking process: what was agreed upon with it the other way may be
    /// lost with the one before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub instance: Option<Instance>,
}

/// A start of a control process: 128 random bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Instance([u8; 16]);

impl Default for Instance {
    fn default() -> Self {
        let mut bytes = [0; 16];
        // Without randomness it is like any other such process, and renewed with the next session.
        let _ = aws_lc_rs::rand::fill(&mut bytes);
        Self(bytes)
    }
}

impl Serialize for Instance {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&Id(self.0))
    }
}

impl<'de> Deserialize<'de> for Instance {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Id::deserialize(deserializer).map(|Id(bytes)| Self(bytes))
    }
}

/// What is known of other nodes' processes, and who waits for news of them.
#[derive(Default)]
pub struct Acquaintances {
    own: Instance,
    known: Mutex<HashMap<String, Acquaintance>>,
}

#[derive(Default)]
struct Acquaintance {
    instance: Option<Instance>,
    renew: Arc<Notify>,
}

impl Acquaintances {
    pub fn own(&self) -> Instance {
        self.own
    }

    /// Told when a node began anew.
    fn renewal(&self, node: &str) -> Arc<Notify> {
        lock(&self.known).entry(node.to_owned()).or_default().renew.clone()
    }

    /// A node of the policy asked for a session. One that began anew may have lost what it accepted before.
    pub fn met(&self, node: &str, instance: Instance) {
        let mut known = lock(&self.known);
        let node = known.entry(node.to_owned()).or_default();
        if node.instance.replace(instance) != Some(instance) {
            node.renew.notify_one();
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NodeSessionAnswer {
    /// Which of the node's keys this connection's is.
    pub key_id: u8,
    /// How long the key and the numbers hold from now.
    pub seconds: u32,
    /// The number that means a caller; `null`, if the node may not speak for it.
    #[schema(value_type = BTreeMap<String, Option<u32>>)]
    pub labels: BTreeMap<SpiffeId, Option<u32>>,
}

/// What both ends of a connection can compute, and nobody else: the same at both. TLS 1.3 only, where it depends on the
/// whole handshake without any extension.
pub fn key_of<D>(tls: &ConnectionCommon<D>) -> Option<NodeKey> {
    if tls.protocol_version() != Some(ProtocolVersion::TLSv1_3) {
        return None;
    }
    tls.export_keying_material([0; 16], EXPORTER, Some(&[])).ok().map(NodeKey)
}

/// Why a certificate is not a node's.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotTheNode {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("the certificate is of {}", .0.as_ref().map_or("nobody with a SPIFFE ID", SpiffeId::as_str))]
    Another(Option<SpiffeId>),
}

impl NotTheNode {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Chain(error) => error.reason(),
            Self::Another(_) => "certificate_not_allowed",
        }
    }
}

/// The certificate of a node, if somebody vouches for it whose word counts about that node. Which certificates were revoked
/// on this node, dataplane knows.
pub fn certificate_of(
    node: &Node,
    verifier: &Verifier,
    chain: &[CertificateDer<'_>],
    usage: Usage,
    now: Timestamp,
) -> Result<VerifiedCertificate, NotTheNode> {
    let authorities = verifier.authorities.iter().enumerate();
    let counts = authorities.filter(|(index, _)| node.authority.is_none_or(|only| only == *index));
    let counts: Vec<&Authority> = counts.filter_map(|(_, authority)| authority.as_ref()).collect();
    let verified = verify_by_any(counts, chain, usage, now, &NothingRevoked)?;
    if verified.has_spiffe_id(&node.spiffe_id) { Ok(verified) } else { Err(NotTheNode::Another(verified.spiffe_id)) }
}

/// For whom this node speaks. What is no SPIFFE ID would have other nodes refuse all the others with it.
pub fn speaks_for(identities: Identities) -> BTreeSet<SpiffeId> {
    let parse = |id: String| match id.parse() {
        Ok(id) => Some(id),
        Err(error) => {
            tracing::warn!(id, %error, "other nodes are not told of a workload");
            None
        }
    };
    identities.spiffe_ids.into_iter().filter_map(parse).collect()
}

/// What a task's sessions rest on: with anything else it is another task's.
#[derive(Clone, PartialEq, Eq)]
struct Peer {
    name: String,
    spiffe_id: SpiffeId,
    address: SocketAddr,
    authority: Option<String>,
    identity: Identity,
}

impl Peer {
    /// Nodes with an address, other than this one.
    fn all(verifier: &Verifier) -> Vec<Self> {
        let with_address = verifier.model.nodes.iter().filter_map(|node| Some((node, node.address?)));
        let own = verifier.own_spiffe_id();
        let others = with_address.filter(|(node, _)| own.as_ref() != Some(&node.spiffe_id));
        let Some(identity) = verifier.identity() else {
            for (node, _) in others {
                tracing::warn!(node = node.name, "there is no certificate to show to it: set `control.certificate`");
            }
            return Vec::new();
        };
        let peer = |(node, address): (&Node, SocketAddr)| Self {
            name: node.name.clone(),
            spiffe_id: node.spiffe_id.clone(),
            address,
            authority: node.authority.and_then(|index| Some(verifier.model.authorities.get(index)?.name.clone())),
            identity: identity.clone(),
        };
        others.map(peer).collect()
    }
}

/// A task for each node that is dialled. They end when this is dropped.
#[derive(Default)]
pub struct Sessions {
    running: BTreeMap<String, Running>,
}

struct Running {
    peer: Peer,
    task: JoinHandle<()>,
}

impl Running {
    fn serves(&self, peer: &Peer) -> bool {
        self.peer == *peer && !self.task.is_finished()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Sessions {
    /// There are other settings. Whoever is the same as before keeps its session, and the next one is under the new ones.
    pub fn follow(&mut self, shared: &Arc<Shared>, verifier: &Verifier) {
        let mut before = std::mem::take(&mut self.running);
        for peer in Peer::all(verifier) {
            let running = before.remove(&peer.name).filter(|running| running.serves(&peer)).unwrap_or_else(|| {
                let task = tokio::spawn(keep(shared.clone(), peer.clone()));
                Running { peer, task }
            });
            self.running.insert(running.peer.name.clone(), running);
        }
    }
}

/// Keeps a session with a node, as long as there is anybody to speak for.
async fn keep(shared: Arc<Shared>, peer: Peer) {
    let mut identities = shared.identities.subscribe();
    let renew = shared.nodes.renewal(&peer.name);
    let mut log = Log::default();
    let (mut failures, mut hurried) = (0, 0);
    loop {
        let wanted = identities.borrow_and_update().clone().filter(|wanted| !wanted.is_empty());
        let Some(wanted) = wanted else {
            match identities.changed().await {
                Ok(()) => continue,
                Err(_) => return,
            }
        };
        let Some(verifier) = shared.verifier() else { return };
        // Settings may have changed without this node, and the task is about to be ended.
        let Some(node) = verifier.model.nodes.iter().find(|node| node.name == peer.name).cloned() else { return };
        let begun = Instant::now();
        let (address, identity, patience) = (peer.address, &peer.identity, PATIENCE);
        let instance = shared.nodes.own();
        let dial = Dial { verifier: &verifier, node: &node, address, identity, patience, instance };
        let opened = dial.open(&wanted).await;
        drop(verifier);
        match opened {
            Ok(opened) => {
                failures = 0;
                log.opened(&peer, &opened);
                let renewal = begun + renewal(opened.seconds());
                tell(&shared, &peer, opened).await;
                tokio::select! {
                    () = sleep_until(renewal) => hurried = 0,
                    () = has_more(&mut identities, &wanted) => {
                        hurried = if begun.elapsed() > CALM { 0 } else { hurried + 1 };
                        // Who came first waits for those that come with it.
                        sleep_until(renewal.min(Instant::now() + pause(hurried))).await;
                    }
                    () = renew.notified() => {
                        hurried = if begun.elapsed() > CALM { 0 } else { hurried + 1 };
                        sleep_until(renewal.min(Instant::now() + pause(hurried))).await;
                    }
                }
            }
            Err(error) => {
                log.failed(&peer, &error);
                // A node that asks for a session itself is there again.
                tokio::select! {
                    () = sleep(pause(failures)) => {}
                    () = renew.notified() => {}
                }
                failures += 1;
            }
        }
    }
}

/// Waits until there is somebody for whom was not asked. Those who went are told to nobody: their numbers end by themselves.
async fn has_more(identities: &mut watch::Receiver<Option<Arc<BTreeSet<SpiffeId>>>>, asked: &BTreeSet<SpiffeId>) {
    loop {
        if identities.changed().await.is_err() {
            return std::future::pending().await;
        }
        if identities.borrow_and_update().as_ref().is_some_and(|now| !now.is_subset(asked)) {
            return;
        }
    }
}

/// Each batch is short enough for a message, because it was short enough for a request.
async fn tell(shared: &Shared, peer: &Peer, opened: Opened) {
    let Opened { key, key_id, batches } = opened;
    let known = |batch: NodeSessionAnswer| {
        let labels = batch.labels.into_iter().filter_map(|(id, label)| Some((id.into(), label?)));
        let labels: Vec<(String, u32)> = labels.collect();
        (!labels.is_empty()).then_some((batch.seconds, labels))
    };
    let mut batches = batches.into_iter().filter_map(known).peekable();
    while let Some((seconds, labels)) = batches.next() {
        let (node, key, last) = (peer.name.clone(), key.clone(), batches.peek().is_none());
        shared.tell(FromControl::NodeAccepted { node, key, key_id, seconds, labels, last }).await;
    }
}

fn pause(times: u32) -> Duration {
    about(PAUSE.saturating_mul(1 << times.min(16)).min(PAUSE_AT_MOST))
}

fn renewal(seconds: u32) -> Duration {
    about((Duration::from_secs(seconds.into()) / 2).clamp(RENEW_AFTER_AT_LEAST, RENEW_AFTER_AT_MOST))
}

/// A tenth more or less, so that many nodes do not do the same at one time.
fn about(duration: Duration) -> Duration {
    duration * (90 + jitter() % 21) / 100
}

/// What is in the log already.
#[derive(Default)]
struct Log {
    is_open: bool,
    kinds: BTreeSet<String>,
    /// Callers for whom the other node does not let this one speak.
    refused: BTreeSet<SpiffeId>,
}

impl Log {
    fn opened(&mut self, peer: &Peer, opened: &Opened) {
        let (node, key_id, seconds) = (&peer.name, opened.key_id, opened.seconds());
        match self.is_open {
            true => tracing::debug!(node, key_id, seconds, "the session with a node is renewed"),
            false => tracing::info!(node, key_id, seconds, "a session with a node"),
        }
        (self.is_open, self.kinds) = (true, BTreeSet::new());
        let refused: BTreeSet<SpiffeId> = opened.refused().cloned().collect();
        for id in refused.difference(&self.refused) {
            tracing::warn!(node, %id, "the node does not let this one speak for a caller: see its `speaks_for`");
        }
        self.refused.extend(refused);
        // Those who are gone take no room.
        self.refused.retain(|id| opened.has(id));
    }

    /// Returns whether it was told.
    fn failed(&mut self, peer: &Peer, error: &DialError) -> bool {
        self.is_open = false;
        let new = self.kinds.len() < MAX_KINDS && self.kinds.insert(error.kind());
        if new {
            let (node, address, reason) = (&peer.name, peer.address, error.reason());
            tracing::warn!(node, %address, reason, %error, "no session with a node");
        }
        new
    }
}

#[cfg(test)]
mod tests;
