//! The kernel's tables of what passes between nodes: for whom others speak, and how this one speaks.
//!
//! Enters: keys and labels that were agreed upon. Leaves: the entries by which SYNs are believed and written. Never: a
//! decision who may speak for whom.

use std::collections::{BTreeMap, BTreeSet};

use authd_common::{
    address::Address,
    parse::Packet,
    syn::{Heard, LabelKey, NodeKey, NodeKeyId, Speaker, Spoken, Voice, syn_key},
};
use aya::maps::{MapError, lpm_trie};

use super::writer::{WriteError, Writer, gone};

fn of(error: MapError) -> WriteError {
    WriteError::Map { table: "nodes", error }
}

impl Writer {
    pub fn set_node_key(&mut self, id: NodeKeyId, key: NodeKey) -> Result<(), WriteError> {
        self.maps.nodes.keys.insert(id, key, 0).map_err(of)
    }

    /// Ends a key now. It stays known for a while, so that refusals say what it was.
    pub fn end_node_key(&mut self, id: NodeKeyId, over: u64) -> Result<(), WriteError> {
        let key = self.maps.nodes.keys.get(&id, 0).map_err(of)?;
        self.set_node_key(id, NodeKey { until: over.min(key.until), ..key })
    }

    pub fn remove_node_key(&mut self, id: NodeKeyId) -> Result<(), WriteError> {
        gone(self.maps.nodes.keys.remove(&id)).map_err(of)
    }

    /// Keys that others have, an earlier daemon's included, and when each ends.
    pub fn node_keys(&self) -> Result<Vec<(NodeKeyId, u64)>, WriteError> {
        self.maps.nodes.keys.iter().map(|entry| entry.map(|(id, key)| (id, key.until)).map_err(of)).collect()
    }

    pub fn set_speaker(&mut self, label: u32, speaker: Speaker) -> Result<(), WriteError> {
        self.maps.nodes.speakers.insert(label, speaker, 0).map_err(of)
    }

    pub fn remove_speaker(&mut self, label: u32) -> Result<(), WriteError> {
        gone(self.maps.nodes.speakers.remove(&label)).map_err(of)
    }

    pub fn speaker(&self, label: u32) -> Option<Speaker> {
        self.maps.nodes.speakers.get(&label, 0).ok()
    }

    /// Whether a label means somebody, or did a while ago.
    pub fn is_speaker(&self, label: u32) -> Result<bool, WriteError> {
        match self.maps.nodes.speakers.get(&label, 0) {
            Ok(_) => Ok(true),
            Err(MapError::KeyNotFound) => Ok(false),
            Err(error) => Err(of(error)),
        }
    }

    /// Remembers that the connection of a SYN was accepted: from now on nobody else is believed by it. Returns whether it is
    /// remembered.
    pub fn use_up(&mut self, packet: &Packet, heard: &Heard) -> bool {
        let Heard { key_id, label, sequence, .. } = *heard;
        let (source, destination) =
            ((packet.source, packet.source_port), (packet.destination, packet.destination_port));
        let spoken = Spoken { label, key_id, used: 1, reserved: 0 };
        let key = syn_key(source, destination, sequence);
        self.maps.nodes.spoken.insert(key, spoken, 0).is_ok()
    }

    /// Labels that mean somebody, an earlier daemon's included.
    pub fn speakers(&self) -> Result<Vec<(u32, Speaker)>, WriteError> {
        self.maps.nodes.speakers.iter().map(|entry| entry.map_err(of)).collect()
    }

    /// How a node is spoken to from now on. The labels that go with it are there already.
    pub fn set_voice(&mut self, node: u32, voice: Voice) -> Result<(), WriteError> {
        self.maps.nodes.voices.insert(node, voice, 0).map_err(of)
    }

    pub fn remove_voice(&mut self, node: u32) -> Result<(), WriteError> {
        gone(self.maps.nodes.voices.remove(&node)).map_err(of)
    }

    pub fn voice(&self, node: u32) -> Option<Voice> {
        self.maps.nodes.voices.get(&node, 0).ok()
    }

    pub fn set_label(&mut self, key: LabelKey, label: u32) -> Result<(), WriteError> {
        self.maps.nodes.labels.insert(key, label, 0).map_err(of)
    }

    pub fn remove_label(&mut self, key: LabelKey) -> Result<(), WriteError> {
        gone(self.maps.nodes.labels.remove(&key)).map_err(of)
    }

    pub fn label_keys(&self) -> Result<Vec<LabelKey>, WriteError> {
        self.maps.nodes.labels.keys().map(|key| key.map_err(of)).collect()
    }

    /// Which node each prefix is on: what is not among them is removed.
    pub fn set_node_addresses(&mut self, nodes: &BTreeMap<(Address, u8), u32>) -> Result<(), WriteError> {
        let map = &mut self.maps.nodes.addresses;
        let key = |(address, bits): &(Address, u8)| lpm_trie::Key::new(u32::from(*bits), address.octets());
        let known: BTreeSet<(Address, u8)> = map
            .keys()
            .map(|key| key.map(|key| (Address::v6(key.data()), key.prefix_len() as u8)))
            .collect::<Result<_, _>>()
            .map_err(of)?;
        for prefix in known.iter().filter(|prefix| !nodes.contains_key(*prefix)) {
            gone(map.remove(&key(prefix))).map_err(of)?;
        }
        for (prefix, node) in nodes {
            map.insert(&key(prefix), *node, 0).map_err(of)?;
        }
        Ok(())
    }
}
