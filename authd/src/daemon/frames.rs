//! What the interfaces' program would do with frames now: its own function, over the tables of this moment.

use std::{cell::OnceCell, collections::HashSet, time::Instant};

use authd_common::{
    address::Address,
    nic::{Behind, Ruling, Sockets, network_offset, rule},
    parse::{Packet, parse},
    reason::Reason,
    syn::{NodeKey, NodeKeyId, Speaker, Speakers, Spoken},
    tables::{Flow, FlowKey, Listener, nic},
    verdict::Verdict,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use serde::{Deserialize, Serialize};

use super::{Daemon, clock};
use crate::{
    dataplane::object::NodeMaps,
    policy::network::{display, protocol_name},
};

/// A frame's fate.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameVerdict {
    /// `passes` or `dropped`.
    pub verdict: String,
    /// `untouched`, `known_flow`, `connected`, or a reason of a verdict.
    pub reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// Who would get it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workload: Option<String>,
    /// The packet's ends, where they can be read: `192.0.2.2:40000 -> 192.0.2.1:7001/tcp`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packet: Option<String>,
}

impl Daemon {
    /// Each frame is base64, from its Ethernet header on; its first 600 bytes are enough.
    pub fn frames(&mut self, frames: &[String]) -> Result<Vec<FrameVerdict>, String> {
        let frames = frames.iter().map(|frame| BASE64_STANDARD.decode(frame));
        let frames: Vec<Vec<u8>> = frames.collect::<Result<_, _>>().map_err(|error| format!("a frame: {error}"))?;
        let identities = self.tree.identities();
        let generation = self.generation();
        let connected = OnceCell::new();
        let maps = self.writer.maps();
        let view = self
            .active
            .prepared
            .image
            .at(clock::monotonic())
            .numbered(generation)
            .with_identities(|cgroup| identities.get(&cgroup).copied())
            .with_grants(|key| maps.grants.get(&key, 0).ok(), |slot| self.writer.slot(slot))
            .with_vouched(|key| maps.vouched.get(&key, 0).ok());
        let ledger = std::cell::RefCell::new(&mut self.ledger);
        let node = Node {
            netns: maps.nic.get(nic::NETNS as usize),
            epoch: maps.nic.get(nic::EPOCH as usize),
            flow: &|key| maps.flows.get(key, 0).ok(),
            nodes: &maps.nodes,
            now: clock::monotonic(),
            listener: &|key| maps.listeners.get(key, 0).ok(),
            connected: &|ends| {
                let all = || ledger.borrow_mut().connected(Instant::now());
                connected.get_or_init(all).contains(ends)
            },
        };
        let registry = &self.active.prepared.registry;
        let verdicts = frames.iter().map(|frame| {
            let ruling = rule(&view, &node, frame);
            let decided = |verdict: &Verdict| verdict.reason.name().to_owned();
            let (reason, verdict, workload) = match &ruling {
                Ruling::Untouched => ("untouched".to_owned(), None, None),
                Ruling::Known => ("known_flow".to_owned(), None, None),
                Ruling::Connected => ("connected".to_owned(), None, None),
                Ruling::Passes { verdict, .. } => (decided(verdict), Some(verdict), None),
                Ruling::Refused { verdict, workload } => (decided(verdict), Some(verdict), Some(*workload)),
            };
            FrameVerdict {
                verdict: if ruling.passes() { "passes" } else { "dropped" }.to_owned(),
                reason,
                rule: verdict.and_then(|v| registry.rules.name(v.rule)).map(str::to_owned),
                workload: workload.and_then(|w| registry.workloads.name(w)).map(str::to_owned),
                packet: describe(frame),
            }
        });
        Ok(verdicts.collect())
    }
}

/// What is known of sockets at this moment.
struct Node<'a> {
    netns: u64,
    epoch: u64,
    flow: &'a dyn Fn(&FlowKey) -> Option<Flow>,
    nodes: &'a NodeMaps,
    now: u64,
    listener: &'a dyn Fn(&FlowKey) -> Option<Listener>,
    connected: &'a dyn Fn(&Ends) -> bool,
}

/// Local and remote end of a socket.
pub(super) type Ends = (Address, u16, Address, u16);
pub(super) type Connected = HashSet<Ends>;

impl Sockets for Node<'_> {
    fn netns(&self) -> u64 {
        self.netns
    }

    fn flow(&self, key: &FlowKey) -> Option<Flow> {
        (self.flow)(key)
    }

    fn listener(&self, key: &FlowKey) -> Option<Listener> {
        (self.listener)(key).filter(|listener| listener.epoch == self.epoch)
    }

    fn is_connected(&self, packet: &Packet) -> bool {
        (self.connected)(&(packet.destination, packet.destination_port, packet.source, packet.source_port))
    }
}

impl Speakers for Node<'_> {
    fn speaker(&self, label: u32) -> Option<Speaker> {
        self.nodes.speaker(label)
    }

    fn node_key(&self, id: &NodeKeyId) -> Option<NodeKey> {
        self.nodes.node_key(id)
    }

    fn spoken(&self, key: &FlowKey) -> Option<Spoken> {
        self.nodes.spoken(key)
    }

    fn time(&self) -> u64 {
        self.now
    }
}

fn describe(frame: &[u8]) -> Option<String> {
    let at = network_offset(frame)?;
    match parse(&Behind { frame, at }) {
        Ok(packet) => {
            let end = |address: &Address, port: u16| match (port, display(address)) {
                (0, address) => address.to_string(),
                (port, address) => std::net::SocketAddr::new(address, port).to_string(),
            };
            let (from, to) =
                (end(&packet.source, packet.source_port), end(&packet.destination, packet.destination_port));
            Some(format!("{from} -> {to}/{}", protocol_name(packet.protocol)))
        }
        Err(reason) => Some(format!("({})", Reason::name(reason))),
    }
}
