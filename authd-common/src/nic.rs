//! What happens to a frame that arrives at an interface, before the stack sees it: the same code in the kernel, in
//! `authd explain --pcap` and in the tests.
//!
//! Enters: a frame, and tables. Leaves: a [`Ruling`]. Never: counting, writing, a frame dropped whose destination is not
//! known to be guarded. Whatever passes here still meets the hook of the socket that it reaches; what is refused here would
//! have been refused there.

use crate::{
    bytes::Bytes,
    parse::{Packet, packet_flags, parse},
    reason::Reason,
    syn::{Heard, Speakers, Spoken, hear, syn_key},
    tables::{
        Flow, FlowKey, IPPROTO_TCP, IPPROTO_UDP, Listener, Root, Tables, listener_flags, port_flags, role, root_flags,
    },
    verdict::{FarEnd, Verdict, decide_in},
};

/// Bytes of an Ethernet header without tags.
const ETHERNET: usize = 14;
const VLAN_TAG: usize = 4;
/// Customer and service tags (IEEE 802.1Q). Two of them are followed.
const ETHERTYPE_CTAG: [u8; 2] = [0x81, 0x00];
const ETHERTYPE_STAG: [u8; 2] = [0x88, 0xa8];
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];

/// What is known at the interfaces of the sockets behind them.
pub trait Sockets {
    /// Cookie of the network namespace of the interfaces.
    fn netns(&self) -> u64;
    fn flow(&self, key: &FlowKey) -> Option<Flow>;
    /// Keyed by [`FlowKey::callee`]; `None` also if what was learned is void.
    fn listener(&self, key: &FlowKey) -> Option<Listener>;
    /// Whether some socket other than a listener is connected to the packet's sender.
    fn is_connected(&self, packet: &Packet) -> bool;
}

/// What follows for a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ruling {
    /// It passes: nothing that is guarded is known to be its destination.
    Untouched,
    /// It passes: its flow passed before, and the verdict holds.
    Known,
    /// It passes, by a verdict taken now. Later packets of the flow may rest on what is to be remembered, of the flow or of
    /// what its SYN said.
    Passes { verdict: Verdict, remember: Option<Flow>, spoken: Option<(FlowKey, Spoken)> },
    /// Rules would refuse it, but it belongs to a connection, older than authd or forgotten here: its socket knows.
    Connected,
    /// It is dropped.
    Refused { verdict: Verdict, workload: u32 },
}

impl Ruling {
    #[inline(always)]
    pub const fn passes(&self) -> bool {
        !matches!(self, Ruling::Refused { .. })
    }
}

/// Where the IP header begins; `None` if the frame carries something else.
#[inline(always)]
pub fn network_offset(frame: &(impl Bytes + ?Sized)) -> Option<usize> {
    let mut kind = frame.array::<2>(ETHERNET - 2)?;
    let mut at = ETHERNET;
    if is_tag(kind) {
        kind = frame.array::<2>(at + VLAN_TAG - 2)?;
        at += VLAN_TAG;
        if is_tag(kind) {
            kind = frame.array::<2>(at + VLAN_TAG - 2)?;
            at += VLAN_TAG;
        }
    }
    if kind == ETHERTYPE_IPV4 || kind == ETHERTYPE_IPV6 { Some(at) } else { None }
}

#[inline(always)]
const fn is_tag(kind: [u8; 2]) -> bool {
    let kind = u16::from_be_bytes(kind);
    kind == u16::from_be_bytes(ETHERTYPE_CTAG) || kind == u16::from_be_bytes(ETHERTYPE_STAG)
}

/// The packet in a frame.
pub struct Behind<'a, B: ?Sized> {
    pub frame: &'a B,
    /// Where it begins.
    pub at: usize,
}

impl<B: Bytes + ?Sized> Bytes for Behind<'_, B> {
    #[inline(always)]
    fn array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.frame.array(self.at + offset)
    }

    #[inline(always)]
    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        self.frame.words(self.at + offset)
    }
}

/// A packet's flow.
#[inline(always)]
pub fn flow_of(packet: &Packet, netns: u64) -> FlowKey {
    let Packet { source, destination, source_port, destination_port, protocol, .. } = *packet;
    FlowKey::new(netns, protocol, (source, source_port), (destination, destination_port))
}

/// Whether anybody may have something against the packet: its port is one that some workload guards.
#[inline(always)]
pub fn concerns(tables: &impl Tables, root: &Root, packet: &Packet) -> bool {
    let has_ports = packet.protocol == IPPROTO_TCP || packet.protocol == IPPROTO_UDP;
    // Later fragments have no ports; what they become is judged when it is whole.
    has_ports && tables.port(root, packet.protocol, packet.destination_port).flags & port_flags::GUARDED != 0
}

/// Whether the packet belongs to a flow that passed before, by a verdict that still holds.
#[inline(always)]
pub fn is_known(tables: &impl Tables, sockets: &impl Sockets, root: &Root, packet: &Packet, key: &FlowKey) -> bool {
    if packet.opens_tcp() {
        return false;
    }
    let Some(flow) = sockets.flow(key) else { return false };
    // An answer to what this node began: its socket decides.
    if flow.role == role::CLIENT as u32 {
        return true;
    }
    flow.generation == root.generation
        && (flow.until == 0 || tables.now() < flow.until)
        && (!flow.grant.is_some()
            || matches!(tables.slot(flow.grant.slot), Some(slot) if slot.is_alive(flow.grant.serial, tables.now())))
}

/// The workload that would get the packet; `None` if that is not known for sure.
#[inline(always)]
pub fn addressee(tables: &impl Tables, sockets: &impl Sockets, root: &Root, key: &FlowKey) -> Option<u32> {
    let listener = sockets.listener(&key.callee())?;
    if listener.flags & listener_flags::SHARED != 0 {
        return None;
    }
    // What was noted of a cgroup may be older than this generation.
    Some(tables.identity(root, listener.cgroup).map_or(listener.workload, |entry| entry.workload))
}

/// Who opens the packet's flow, if another node vouches for that: by its SYN, or by what is remembered of it.
#[inline(always)]
pub fn caller(
    speakers: &impl Speakers,
    sockets: &impl Sockets,
    root: &Root,
    packet: &Packet,
    key: &FlowKey,
    bytes: &(impl Bytes + ?Sized),
) -> Heard {
    if root.flags & root_flags::HEARS == 0 || packet.protocol != IPPROTO_TCP {
        return Heard::NOTHING;
    }
    if !packet.opens_tcp()
        && let Some(Flow { label, .. }) = sockets.flow(key)
        && label != 0
    {
        return Heard { key_id: 0, label, sequence: 0, lacking: 0 };
    }
    hear(speakers, bytes, packet)
}

/// May the packet's sender open a flow to the workload?
#[inline(always)]
pub fn decide(tables: &impl Tables, root: &Root, workload: u32, packet: &Packet, netns: u64, heard: &Heard) -> Verdict {
    let mut far = FarEnd::remote(packet.source, netns);
    far.introduce(heard);
    decide_in(tables, root, workload, &far, packet.protocol, packet.destination_port)
}

/// What to remember of the flow of a packet that passes; nothing of who only asks for a connection.
#[inline(always)]
pub fn lasting(root: &Root, packet: &Packet, verdict: &Verdict, heard: &Heard) -> Option<Flow> {
    if packet.opens_tcp() || packet.flags & packet_flags::FRAGMENT != 0 {
        return None;
    }
    let Verdict { until, grant, .. } = *verdict;
    let (generation, label) = (root.generation, heard.label);
    Some(Flow { until, grant, generation, role: role::SERVER as u32, label, reserved: 0 })
}

/// What to remember of what a SYN said that passes.
#[inline(always)]
pub fn said(packet: &Packet, heard: &Heard) -> Option<(FlowKey, Spoken)> {
    if !packet.opens_tcp() || !heard.is_vouched() {
        return None;
    }
    let (source, destination) = ((packet.source, packet.source_port), (packet.destination, packet.destination_port));
    let Heard { key_id, label, sequence, .. } = *heard;
    Some((syn_key(source, destination, sequence), Spoken { label, key_id, used: 0, reserved: 0 }))
}

/// Whether a packet for which no node vouches, for a reason, would be refused as another one was that differs in nothing else.
#[inline(always)]
pub const fn lacks_alike(refused: u16, lacking: u32) -> bool {
    const MISSING: u16 = Reason::NodeIdentityMissing.code();
    const LAST: u16 = Reason::CallerNotNamed.code();
    match refused {
        MISSING..=LAST => refused as u32 == lacking,
        _ => lacking == MISSING as u32,
    }
}

/// Whether a packet that rules refuse may belong to a connection.
#[inline(always)]
pub fn may_be_connected(packet: &Packet) -> bool {
    packet.protocol == IPPROTO_TCP && !packet.opens_tcp()
}

/// The ruling for a frame. The kernel's program asks the same questions in the same order.
pub fn rule(tables: &impl Tables, sockets: &(impl Sockets + Speakers), frame: &[u8]) -> Ruling {
    let Some(at) = network_offset(frame) else { return Ruling::Untouched };
    let bytes = Behind { frame, at };
    let Ok(packet) = parse(&bytes) else { return Ruling::Untouched };
    let Some(root) = tables.root() else { return Ruling::Untouched };
    if !concerns(tables, &root, &packet) {
        return Ruling::Untouched;
    }
    let key = flow_of(&packet, sockets.netns());
    if is_known(tables, sockets, &root, &packet, &key) {
        return Ruling::Known;
    }
    let heard = caller(sockets, sockets, &root, &packet, &key, &bytes);
    let Some(workload) = addressee(tables, sockets, &root, &key) else { return Ruling::Untouched };
    let verdict = decide(tables, &root, workload, &packet, key.netns, &heard);
    if verdict.action.passes() {
        let remember = lasting(&root, &packet, &verdict, &heard);
        return Ruling::Passes { verdict, remember, spoken: said(&packet, &heard) };
    }
    if may_be_connected(&packet) && sockets.is_connected(&packet) {
        return Ruling::Connected;
    }
    Ruling::Refused { verdict, workload }
}
