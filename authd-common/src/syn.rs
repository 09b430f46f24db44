//! Identity in the SYN: how a node says which of its workloads opens a TCP connection, and how another one believes it.
//!
//! Enters: a packet, the keys of sessions between nodes. Leaves: [`Heard`], the caller for whom a node vouches, or why none is
//! known. Never: what that caller may; that is for the rules.
//!
//! The option is the last of the SYN's header. docs/WIRE.md has its octets, and what an attacker can do with one.

pub use crate::nodes::{LabelKey, NodeKey, NodeKeyId, Speaker, Spoken, Voice};
use crate::{
    address::Address,
    bytes::{Bytes, MAX_OFFSET},
    parse::Packet,
    reason::Reason,
    siphash::siphash,
    tables::{FlowKey, IPPROTO_TCP},
};

/// Octets of the option.
pub const OPTION: usize = 16;
/// RFC 6994: an experiment that shares option kind 253.
pub const KIND: u8 = 253;
/// The experiment's identifier.
pub const EXPERIMENT: u16 = 0xa07d;
/// Kind, length and identifier, as they lie in a packet.
const HEAD: u32 = u32::from_ne_bytes([KIND, OPTION as u8, (EXPERIMENT >> 8) as u8, EXPERIMENT as u8]);
/// Labels are below this.
pub const LABELS: u32 = 1 << 24;
/// Octets of a TCP header without options.
const TCP_HEADER: usize = 20;

/// The keys of sessions between nodes, as tables have them.
pub trait Speakers {
    fn speaker(&self, label: u32) -> Option<Speaker>;
    fn node_key(&self, id: &NodeKeyId) -> Option<NodeKey>;
    fn spoken(&self, key: &FlowKey) -> Option<Spoken>;
    /// The coarse monotonic clock, in ns.
    fn time(&self) -> u64;
}

/// What a packet says of who opens its connection. In the kernel what is branched on lies in the second half of a word
/// ([`crate::tables::Root::veiled`]).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Heard {
    pub key_id: u32,
    /// 0: nobody vouches for it.
    pub label: u32,
    /// The SYN's sequence number.
    pub sequence: u32,
    /// Code of the reason for which nobody vouches.
    pub lacking: u32,
}
const _: () = assert!(core::mem::offset_of!(Heard, label) % 8 == 4);
const _: () = assert!(core::mem::offset_of!(Heard, lacking) % 8 == 4);

impl Heard {
    pub const NOTHING: Self = Self::lacking(Reason::NodeIdentityMissing);

    #[inline(always)]
    const fn lacking(reason: Reason) -> Self {
        Self { key_id: 0, label: 0, sequence: 0, lacking: reason.code() as u32 }
    }

    #[inline(always)]
    pub const fn is_vouched(&self) -> bool {
        self.label != 0
    }
}

/// Where a SYN is remembered: its connection and sequence number. A connection's SYN has only one, whichever network
/// namespace it is for.
#[inline(always)]
pub const fn syn_key(source: (Address, u16), destination: (Address, u16), sequence: u32) -> FlowKey {
    FlowKey { protocol: sequence, ..FlowKey::new(0, 0, source, destination) }
}

/// Words in memory order as one little-endian word of the message.
#[inline(always)]
const fn joined(low: u32, high: u32) -> u64 {
    low.to_le() as u64 | (high.to_le() as u64) << 32
}

/// What authenticates a label: SipHash-2-4 of source and destination address, source and destination port, sequence number,
/// key id and label, and eight octets of zero; each in network order, IPv4 addresses mapped.
#[inline(always)]
pub const fn mac(secret: [u64; 2], key: &FlowKey, key_id: u32, label: u32) -> u64 {
    let (s, d) = (key.source.be_words(), key.destination.be_words());
    let said = word_of(key_id, label);
    let message = [
        joined(s[0], s[1]),
        joined(s[2], s[3]),
        joined(d[0], d[1]),
        joined(d[2], d[3]),
        joined(key.ports.to_be(), key.protocol.to_be()),
        joined(said, 0),
    ];
    siphash(secret, &message)
}

/// Key id and label as the option has them, in memory order.
#[inline(always)]
const fn word_of(key_id: u32, label: u32) -> u32 {
    (key_id << 24 | label & (LABELS - 1)).to_be()
}

/// The option, by words in memory order.
#[inline(always)]
pub const fn option(mac: u64, key_id: u32, label: u32) -> [u32; 4] {
    [HEAD, ((mac >> 32) as u32).to_be(), (mac as u32).to_be(), word_of(key_id, label)]
}

/// Who opens the connection that a packet of a caller belongs to.
#[inline(always)]
pub fn hear(speakers: &impl Speakers, bytes: &(impl Bytes + ?Sized), packet: &Packet) -> Heard {
    let (source, destination) = ((packet.source, packet.source_port), (packet.destination, packet.destination_port));
    let Some(at) = header(packet) else { return Heard::NOTHING };
    // The sequence number, the acknowledged one, and a word that begins with the header's length.
    let Some([sequence, _, word]) = bytes.words::<3>(at + 4) else { return Heard::NOTHING };
    let sequence = u32::from_be(sequence);
    if packet.opens_tcp() {
        let length = (u32::from_be(word) >> 28) as usize * 4;
        if length < TCP_HEADER + OPTION {
            return Heard::NOTHING;
        }
        let Some(said) = bytes.words::<4>(at + length - OPTION) else { return Heard::NOTHING };
        return believe(speakers, &syn_key(source, destination, sequence), &said);
    }
    // The end of the handshake is numbered one higher than its beginning.
    recall(speakers, &syn_key(source, destination, sequence.wrapping_sub(1)))
}

/// Who called a listener that answers with this packet.
#[inline(always)]
pub fn hear_answer(speakers: &impl Speakers, bytes: &(impl Bytes + ?Sized), packet: &Packet) -> Heard {
    let (source, destination) = ((packet.source, packet.source_port), (packet.destination, packet.destination_port));
    let Some(at) = header(packet) else { return Heard::NOTHING };
    let Some([acknowledged]) = bytes.words::<1>(at + 8) else { return Heard::NOTHING };
    recall(speakers, &syn_key(destination, source, u32::from_be(acknowledged).wrapping_sub(1)))
}

/// Where the TCP header begins, if it can be read.
#[inline(always)]
fn header(packet: &Packet) -> Option<usize> {
    let at = packet.transport as usize * 4;
    if packet.protocol != IPPROTO_TCP || at == 0 || at > MAX_OFFSET { None } else { Some(at) }
}

/// What was remembered of a connection's SYN.
#[inline(always)]
pub fn recall(speakers: &impl Speakers, key: &FlowKey) -> Heard {
    match speakers.spoken(key) {
        Some(Spoken { label, key_id, .. }) => Heard { key_id, label, sequence: key.protocol, lacking: 0 },
        None => Heard::NOTHING,
    }
}

/// Whether what a SYN says is true. It is said for one connection, once.
#[inline(always)]
fn believe(speakers: &impl Speakers, key: &FlowKey, said: &[u32; 4]) -> Heard {
    if said[0] != HEAD {
        return Heard::NOTHING;
    }
    let word = u32::from_be(said[3]);
    let (key_id, label) = (word >> 24, word & (LABELS - 1));
    let Some(speaker) = speakers.speaker(label) else { return Heard::lacking(Reason::NodeKeyUnknown) };
    let Some(known) = speakers.node_key(&NodeKeyId { node: speaker.node, key_id }) else {
        return Heard::lacking(Reason::NodeKeyUnknown);
    };
    let mac = mac(known.secret, key, key_id, label);
    if said[1] != ((mac >> 32) as u32).to_be() || said[2] != (mac as u32).to_be() {
        return Heard::lacking(Reason::NodeMacWrong);
    }
    // Only now: nobody learns the state of a key who does not have it.
    let now = speakers.time();
    if now >= known.until || now >= speaker.until {
        return Heard::lacking(Reason::NodeKeyExpired);
    }
    if matches!(speakers.spoken(key), Some(spoken) if spoken.used != 0) {
        return Heard::lacking(Reason::NodeReplay);
    }
    Heard { key_id, label, sequence: key.protocol, lacking: 0 }
}

#[cfg(test)]
mod tests {
    use super::{LABELS, mac, option, syn_key};
    use crate::address::Address;

    /// Octets 0 to 15.
    const SECRET: [u64; 2] = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];

    /// What docs/WIRE.md gives as examples, computed by a program in another language.
    #[test]
    fn options_are_as_documented() {
        let near = Address::v4([192, 0, 2, 1]);
        let far = Address::v4([192, 0, 2, 2]);
        let key = syn_key((near, 40_000), (far, 7001), 0x1234_5678);
        let said = option(mac(SECRET, &key, 5, 0x000a_0b0c), 5, 0x000a_0b0c);
        assert_eq!(said.map(u32::from_be), [0xfd10_a07d, 0xfc27_7c40, 0x2bd8_2205, 0x050a_0b0c]);
        let v6 = |last| Address::v6([0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
        let key = syn_key((v6(1), 40_000), (v6(2), 7001), 0xffff_fffe);
        let said = option(mac(SECRET, &key, 255, LABELS - 1), 255, LABELS - 1);
        assert_eq!(said.map(u32::from_be), [0xfd10_a07d, 0x4c39_fe75, 0x2847_9d7b, 0xffff_ffff]);
    }
}
