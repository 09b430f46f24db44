//! A cgroup_skb context as bytes and as a lineage, and what is known once it was read.

use authd_common::{
    address::Address,
    bytes::{Bytes, MAX_OFFSET},
    event::direction,
    identity::{Identity, Lineage},
    parse::{Packet, parse},
    reason::Reason,
    tables::{IPPROTO_TCP, LocalEntry, Root},
};

use crate::raw::{Skb, Sock};

/// Every network namespace's loopback has this index.
pub const LOOPBACK: u32 = 1;

impl Bytes for Skb {
    #[inline(always)]
    fn array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        if offset > MAX_OFFSET { None } else { self.load(offset) }
    }

    /// By one call for all of them.
    #[inline(always)]
    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        if offset + N * 4 - 4 > MAX_OFFSET { None } else { self.load_words(offset) }
    }
}

impl Lineage for Skb {
    #[inline(always)]
    fn own(&self) -> u64 {
        self.cgroup()
    }

    #[inline(always)]
    fn ancestor(&self, level: u32) -> u64 {
        self.ancestor_cgroup(level)
    }
}

impl Lineage for Sock {
    #[inline(always)]
    fn own(&self) -> u64 {
        self.cgroup()
    }

    #[inline(always)]
    fn ancestor(&self, level: u32) -> u64 {
        self.ancestor_cgroup(level)
    }
}

/// Whether nothing stands between the IP header and the TCP header: no IPv4 options, no IPv6 extension headers. Only such
/// packets of a TCP socket are sure to go where the socket is connected to.
#[inline(always)]
pub fn is_plain_tcp(skb: Skb) -> bool {
    let Some(head) = skb.head::<10>() else { return false };
    match head[0] {
        0x45 => head[9] == IPPROTO_TCP,
        first if first >> 4 == 6 => head[6] == IPPROTO_TCP,
        _ => false,
    }
}

/// Whether it is a reset that carries nothing: how the kernel tells the far side that a connection is gone.
#[inline(always)]
pub fn is_bare_reset(skb: Skb) -> bool {
    const RST: u8 = 0x04;
    if let Some(head) = skb.head::<40>()
        && head[0] == 0x45
        && head[9] == IPPROTO_TCP
    {
        let length = u16::from_be_bytes([head[2], head[3]]) as u32;
        return head[33] & RST != 0 && length == 20 + (head[32] >> 4) as u32 * 4;
    }
    if let Some(head) = skb.head::<60>()
        && head[0] >> 4 == 6
        && head[6] == IPPROTO_TCP
    {
        let length = u16::from_be_bytes([head[4], head[5]]) as u32;
        return head[53] & RST != 0 && length == (head[52] >> 4) as u32 * 4;
    }
    false
}

/// One packet of a managed socket, read. Lives once on the stack; subprograms take it by reference, because the stack of a
/// whole call chain is 512 bytes.
///
/// `who.workload` is veiled, and what else subprograms branch on is in the second half of a word ([`Root::veiled`]);
/// `arrives` is the same on all ways through one program.
#[repr(C)]
pub struct Scene {
    pub skb: Skb,
    pub root: Root,
    pub who: Identity,
    pub packet: Packet,
    /// The packet reaches the socket; else it leaves it.
    pub arrives: bool,
}
const _: () = assert!(core::mem::offset_of!(Scene, packet.protocol) % 8 >= 4);
const _: () = assert!(core::mem::offset_of!(Scene, packet.tcp_flags) % 8 >= 4);
const _: () = assert!(core::mem::offset_of!(Scene, packet.flags) % 8 >= 4);

impl Scene {
    /// Nothing is known yet but where it happens.
    #[inline(always)]
    pub fn new(skb: Skb, root: &Root, arrives: bool) -> Self {
        Self { skb, root: *root, who: Identity::NOBODY, packet: Packet::UNREAD, arrives }
    }

    /// Reads the packet; the reason if it cannot be read, or if it has a flag of `unfit`.
    #[inline(never)]
    pub fn read(&mut self, unfit: u8) -> Option<Reason> {
        match parse(&self.skb) {
            Ok(packet) => {
                let (source, destination) = (packet.source, packet.destination);
                let zero = self.root.zero;
                self.packet = Packet { source: source.veiled(zero), destination: destination.veiled(zero), ..packet };
                packet.unfit(unfit)
            }
            Err(reason) => Some(reason),
        }
    }

    /// The socket's owner, as the far end of a loopback flow is to know it.
    #[inline(always)]
    pub fn sender(&self, pid: u32) -> LocalEntry {
        let Identity { workload, cgroup, instance } = self.who;
        LocalEntry { cgroup, instance, workload, pid }
    }

    #[inline(always)]
    pub fn remote(&self) -> &Address {
        if self.arrives { &self.packet.source } else { &self.packet.destination }
    }

    #[inline(always)]
    pub fn local(&self) -> &Address {
        if self.arrives { &self.packet.destination } else { &self.packet.source }
    }

    #[inline(always)]
    pub fn remote_port(&self) -> u16 {
        if self.arrives { self.packet.source_port } else { self.packet.destination_port }
    }

    #[inline(always)]
    pub fn local_port(&self) -> u16 {
        if self.arrives { self.packet.destination_port } else { self.packet.source_port }
    }

    #[inline(always)]
    pub fn direction(&self) -> u8 {
        if self.arrives { direction::IN } else { direction::OUT }
    }

    #[inline(always)]
    pub fn bytes(&self) -> u64 {
        self.skb.length() as u64
    }
}
