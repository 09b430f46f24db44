//! From the bytes of an IP packet to what a verdict needs of it.
//!
//! Enters: a packet from its network header on. Leaves: a [`Packet`], or the reason why it cannot be read. Never: a guess.

use crate::{
    address::Address,
    bytes::{Bytes, MAX_OFFSET},
    reason::Reason,
    tables::{IPPROTO_TCP, IPPROTO_UDP},
};

/// IPv6 extension headers that are followed (RFC 8200 names six kinds, each at most once or twice).
pub const MAX_EXTENSION_HEADERS: u32 = 8;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

pub mod tcp_flags {
    pub const SYN: u8 = 0x02;
    pub const ACK: u8 = 0x10;
}

pub mod packet_flags {
    /// A fragment, the first included.
    pub const FRAGMENT: u8 = 1;
    /// IPv4 options.
    pub const OPTIONS: u8 = 2;
    /// An IPv6 routing header.
    pub const ROUTING: u8 = 4;
    /// What a managed workload must not send: each of these can make the addresses and ports say something else than where
    /// the packet goes. Kernel-made fragments and options do not pass authd's hook on their way out.
    pub const UNFIT_OUT: u8 = FRAGMENT | OPTIONS | ROUTING;
    /// Inbound packets are reassembled before they reach authd's hook, and their route lies behind them.
    pub const UNFIT_IN: u8 = FRAGMENT;
}

/// The fields of a packet that verdicts, flows and records need. Ports are only copied; what is branched on comes behind
/// them, in the second half of a word ([`crate::tables::Root::veiled`]).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    pub source: Address,
    pub destination: Address,
    /// 0 for protocols without ports.
    pub source_port: u16,
    /// 0 for protocols without ports.
    pub destination_port: u16,
    /// The last protocol of the header chain.
    pub protocol: u8,
    /// 0 for all but TCP.
    pub tcp_flags: u8,
    /// [`packet_flags`].
    pub flags: u8,
    /// Where the TCP or UDP header begins, in units of four bytes; 0 if there is none, or too far behind.
    pub transport: u8,
}

impl Packet {
    /// Stands where a packet was not, or could not be, read.
    pub const UNREAD: Self = Self {
        source: Address::UNSPECIFIED,
        destination: Address::UNSPECIFIED,
        source_port: 0,
        destination_port: 0,
        protocol: 0,
        tcp_flags: 0,
        flags: 0,
        transport: 0,
    };

    /// Whether this TCP segment asks for a connection.
    #[inline(always)]
    pub const fn opens_tcp(&self) -> bool {
        self.protocol == IPPROTO_TCP && self.tcp_flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN
    }

    /// Why a packet with any of the flags of `mask` is refused.
    #[inline(always)]
    pub const fn unfit(&self, mask: u8) -> Option<Reason> {
        match self.flags & mask {
            0 => None,
            f if f & packet_flags::FRAGMENT != 0 => Some(Reason::Fragment),
            f if f & packet_flags::OPTIONS != 0 => Some(Reason::IpOptions),
            _ => Some(Reason::RoutingHeader),
        }
    }
}

/// Reads an IPv4 or IPv6 packet.
#[inline(always)]
pub fn parse(bytes: &(impl Bytes + ?Sized)) -> Result<Packet, Reason> {
    let [first] = bytes.array::<1>(0).ok_or(Reason::MalformedPacket)?;
    match first >> 4 {
        4 => parse_v4(bytes, first),
        6 => parse_v6(bytes),
        _ => Err(Reason::MalformedPacket),
    }
}

/// Reads a packet whose headers all lie at fixed offsets: no IPv4 options, no IPv6 extension headers. `None` if it is any
/// other, or cannot be read. What this returns, [`parse`] returns too.
#[inline(always)]
pub fn plain(bytes: &(impl Bytes + ?Sized)) -> Option<Packet> {
    const V4: u8 = 0x45;
    let [first] = bytes.array::<1>(0)?;
    if first == V4 {
        return parse_v4(bytes, V4).ok();
    }
    if first >> 4 != 6 {
        return None;
    }
    let mut packet = Packet::UNREAD;
    head_v6(bytes, &mut packet)?;
    if is_extension(packet.protocol) { None } else { transport(bytes, V6_HEADER, packet).ok() }
}

/// RFC 791, 3.1.
#[inline(always)]
fn parse_v4(bytes: &(impl Bytes + ?Sized), first: u8) -> Result<Packet, Reason> {
    let length = (first & 0xf) as usize * 4;
    if length < 20 {
        return Err(Reason::MalformedPacket);
    }
    // The whole header is there, options aside.
    let [source, destination] = bytes.words::<2>(12).ok_or(Reason::MalformedPacket)?;
    let [_, protocol] = bytes.array::<2>(8).ok_or(Reason::MalformedPacket)?;
    let fragment = u16::from_be_bytes(bytes.array::<2>(6).ok_or(Reason::MalformedPacket)?);
    let (offset, more) = (fragment & 0x1fff, fragment & 0x2000 != 0);
    let mut flags = 0;
    if length > 20 {
        flags |= packet_flags::OPTIONS;
    }
    if offset != 0 || more {
        flags |= packet_flags::FRAGMENT;
    }
    let packet = Packet {
        source: Address::from_be_word(source),
        destination: Address::from_be_word(destination),
        source_port: 0,
        destination_port: 0,
        protocol,
        tcp_flags: 0,
        flags,
        transport: 0,
    };
    if offset != 0 { Ok(packet) } else { transport(bytes, length, packet) }
}

const V6_HEADER: usize = 40;

/// RFC 8200, section 3. The protocol is the next header. Written in place: a copy would take too much of the kernel's stack.
#[inline(always)]
fn head_v6(bytes: &(impl Bytes + ?Sized), packet: &mut Packet) -> Option<()> {
    [packet.protocol] = bytes.array::<1>(6)?;
    packet.source = Address::from_be_words(bytes.words::<4>(8)?);
    packet.destination = Address::from_be_words(bytes.words::<4>(24)?);
    Some(())
}

#[inline(always)]
const fn is_extension(protocol: u8) -> bool {
    matches!(protocol, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS)
}

/// RFC 8200, section 4.
#[inline(always)]
fn parse_v6(bytes: &(impl Bytes + ?Sized)) -> Result<Packet, Reason> {
    let mut packet = Packet::UNREAD;
    head_v6(bytes, &mut packet).ok_or(Reason::MalformedPacket)?;
    let mut at = V6_HEADER;
    let mut seen = 0;
    while seen < MAX_EXTENSION_HEADERS {
        let kind = packet.protocol;
        if !is_extension(kind) {
            return transport(bytes, at, packet);
        }
        let [next, length, offset_high, offset_low] = bytes.array::<4>(at).ok_or(Reason::MalformedPacket)?;
        packet.protocol = next;
        at += match kind {
            FRAGMENT => {
                packet.flags |= packet_flags::FRAGMENT;
                if u16::from_be_bytes([offset_high, offset_low]) & 0xfff8 != 0 {
                    return Ok(packet);
                }
                8
            }
            // RFC 4302, 2.2: in units of four bytes, less two.
            AUTHENTICATION => (length as usize + 2) * 4,
            _ => {
                if kind == ROUTING {
                    packet.flags |= packet_flags::ROUTING;
                }
                (length as usize + 1) * 8
            }
        };
        seen += 1;
    }
    Err(Reason::ExtensionHeaders)
}

/// Ports and TCP flags. A packet that ends before them is malformed: nothing can be said about its flow.
#[inline(always)]
fn transport(bytes: &(impl Bytes + ?Sized), at: usize, mut packet: Packet) -> Result<Packet, Reason> {
    if packet.protocol != IPPROTO_TCP && packet.protocol != IPPROTO_UDP {
        return Ok(packet);
    }
    let [ports] = bytes.words::<1>(at).ok_or(Reason::MalformedPacket)?;
    let ports = u32::from_be(ports);
    packet.source_port = (ports >> 16) as u16;
    packet.destination_port = ports as u16;
    if packet.protocol == IPPROTO_TCP {
        let [flags] = bytes.array::<1>(at + 13).ok_or(Reason::MalformedPacket)?;
        packet.tcp_flags = flags;
    }
    packet.transport = if at <= MAX_OFFSET { (at / 4) as u8 } else { 0 };
    Ok(packet)
}
