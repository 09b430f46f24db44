//! Keys and values of the kernel's tables, and the read-only view of them that the verdict function gets.
//!
//! A *generation* is one compiled version of the whole policy. [`Root`] says under which epochs and in which banks its
//! tables lie. A decision reads the root once and uses only tables that the root names: it cannot mix generations.
//! Entries in use are never overwritten: a changed table is written under a new epoch (or into the idle bank) beside the
//! old one, and the old one is deleted after every program that might still read it has ended.

mod grants;

pub use self::grants::{Grant, GrantKey, NO_SLOT, PERMIT, PERMIT_CHAIN, Permit, Slot, VouchedKey};
use crate::address::Address;
pub use crate::names;

pub const IPPROTO_ICMP: u8 = 1;
pub const IPPROTO_TCP: u8 = 6;
pub const IPPROTO_UDP: u8 = 17;
pub const IPPROTO_ICMPV6: u8 = 58;

/// No workload: a process that authd does not manage.
pub const UNMANAGED: u32 = 0;
/// Whether a workload's pattern matches is not known yet: treated as managed, and denied.
pub const PENDING: u32 = u32::MAX;
/// No rule decided.
pub const NO_RULE: u32 = 0;

/// Workload numbers are below this.
pub const MAX_WORKLOADS: u32 = 32_768;
/// Banks of the array tables: one in use, one idle.
pub const BANKS: u32 = 2;
/// A TCP port, a UDP port, or another IP protocol.
pub const PORT_SLOTS: u32 = 2 * 65_536 + 256;

/// Where the tables of one generation lie.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Root {
    /// Number of the generation, from 1. A root read with 0 here is no root.
    pub generation: u32,
    /// [`root_flags`].
    pub flags: u32,
    pub identities: u32,
    pub addresses: u32,
    pub cells: u32,
    pub workload_bank: u32,
    pub port_bank: u32,
    /// Depth below the root of cgroup v2 of the cgroup to which the programs are attached.
    pub base_level: u32,
    /// How long a connection may wait for its proofs, in ms.
    pub hold_ms: u32,
    /// Always 0, which nobody but the reader of this knows: see [`Root::veiled`].
    pub zero: u32,
}
const _: () = assert!(size_of::<Root>() == 40);

impl Root {
    /// The same number, which the kernel's verifier cannot know any more.
    ///
    /// Before Linux 6.8 the verifier loses track of what it knows about a number that one subprogram stores in a frame and
    /// another one reads through a pointer: it takes a branch for impossible that was only impossible on another way there,
    /// and replaces it. So what is stored in a frame for subprograms to branch on is either no word's first bytes, of which
    /// it knows nothing, or it is veiled.
    #[inline(always)]
    pub const fn veiled(&self, number: u32) -> u32 {
        number ^ self.zero
    }
}

pub mod root_flags {
    /// Decide and record, block nothing.
    pub const OBSERVE: u32 = 1;
    /// Interfaces are guarded: sockets write down what the program there has to know.
    pub const NIC: u32 = 2;
    /// Other nodes vouch for callers: SYNs are listened to.
    pub const HEARS: u32 = 4;
    /// There are nodes to which this one speaks.
    pub const SPEAKS: u32 = 8;
}

/// The array slot of a generation's root: the two last generations have one each.
#[inline(always)]
pub const fn root_slot(generation: u32) -> u32 {
    generation & 1
}

#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct IdentityKey {
    /// Inode number of the cgroup's directory.
    pub cgroup: u64,
    pub epoch: u32,
    pub reserved: u32,
}
const _: () = assert!(size_of::<IdentityKey>() == 16);

/// What is known about one cgroup.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct IdentityEntry {
    pub workload: u32,
    /// [`identity_flags`].
    pub flags: u32,
    /// Number of the cgroup that matched, where grants go by instance (agents and jobs). 0: they are the workload's.
    pub instance: u64,
}
const _: () = assert!(size_of::<IdentityEntry>() == 16);

pub mod identity_flags {
    /// Some pattern may match below this cgroup: a child without an entry of its own is not known yet.
    pub const OPEN: u32 = 1;
}

/// A workload in one generation. All zero: no such workload.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct WorkloadEntry {
    /// Workloads with the same class get the same verdicts.
    pub class: u32,
    /// [`workload_flags`].
    pub flags: u32,
}
const _: () = assert!(size_of::<WorkloadEntry>() == 8);

pub mod workload_flags {
    pub const PRESENT: u32 = 1;
    /// What this workload would be denied is recorded and let through.
    pub const OBSERVE: u32 = 2;
    /// May open raw IP sockets; each packet is judged by its headers.
    pub const RAW_SOCKETS: u32 = 4;
    /// Accepts inbound flows only through its guarded services.
    pub const CLOSED: u32 = 8;
    /// Ports of the failsafe list always accept: operators log in through it.
    pub const FAILSAFE: u32 = 16;
}

/// Data of the longest-prefix-match key, behind the prefix length: epoch (big endian) and address. A prefix of the policy
/// of `n` bits is `32 + n` bits long here.
pub const ADDRESS_KEY_BYTES: usize = 20;
pub const ADDRESS_EPOCH_BITS: u32 = 32;

#[inline(always)]
pub fn address_key(epoch: u32, address: &Address) -> [u8; ADDRESS_KEY_BYTES] {
    let (e, a) = (epoch.to_be_bytes(), address.octets());
    [
        e[0], e[1], e[2], e[3], a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13],
        a[14], a[15],
    ]
}

/// Addresses that no policy entry names.
pub const ADDRESS_CLASS_OTHER: u32 = 0;

#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct PortEntry {
    /// Ports with the same class belong to the same services. 0: to none that names a port.
    pub class: u16,
    /// [`port_flags`].
    pub flags: u16,
    pub reserved: u32,
}
const _: () = assert!(size_of::<PortEntry>() == 8);

pub mod port_flags {
    /// Some workload guards this port.
    pub const GUARDED: u16 = 1;
    /// On the failsafe list.
    pub const FAILSAFE: u16 = 2;
}

/// Index of a port in its table, without the bank.
#[inline(always)]
pub const fn port_slot(protocol: u8, port: u16) -> u32 {
    match protocol {
        IPPROTO_TCP => port as u32,
        IPPROTO_UDP => 65_536 + port as u32,
        other => 131_072 + other as u32,
    }
}

#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct CellKey {
    pub epoch: u32,
    pub subject: u32,
    pub object: u32,
    pub port: u16,
    /// [`path`].
    pub path: u8,
    pub reserved: u8,
}
const _: () = assert!(size_of::<CellKey>() == 16);

/// As the object of an outbound cell: every address. As the subject: every caller. A cell with an exact class, if there is
/// one, holds instead, and accounts for the rules behind this one too.
pub const ANY_CLASS: u32 = u32::MAX;
/// Every port that no more exact cell names.
pub const ANY_PORT_CLASS: u16 = u16::MAX;

/// What subject and object of a cell are.
pub mod path {
    /// A workload's class opens a flow to an address class.
    pub const OUT: u8 = 1;
    /// A workload's class (0 stands for unmanaged processes) calls a service guarded by a workload's class, on this node.
    pub const IN_LOCAL: u8 = 2;
    /// An address class calls a service guarded by a workload's class.
    pub const IN_REMOTE: u8 = 3;
    /// Subject 0, object a workload's class: that it guards the port at all.
    pub const GUARD: u8 = 4;
}

/// Rules of one cell that ask for proofs of the caller's own: any of them lets the flow pass to whoever holds its grant.
pub const ALTERNATIVES: usize = 4;

/// A verdict that holds for a time.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Phase {
    pub rule: u32,
    /// A [`crate::reason::Reason`] code.
    pub reason: u16,
    /// An [`crate::verdict::Action`] code.
    pub action: u8,
    /// [`phase_flags`].
    pub flags: u8,
    /// Of a phase without its proofs: rules whose grants let the flow pass. [`NO_RULE`] where there are fewer.
    pub granted_by: [u32; ALTERNATIVES],
    /// A denial that is only observed, and turns what a grant lets pass into something observed.
    pub watched_by: u32,
    /// Likewise, for callers for whom another node vouches: the number of a set of such rules ([`VouchedKey::set`]). 0: none.
    pub vouched: u32,
}
const _: () = assert!(size_of::<Phase>() == 32);

pub mod phase_flags {
    /// Who lacks the proofs waits for them, instead of being refused at once.
    pub const HOLD: u8 = 1;
    /// A rule of [`Phase::vouched`](super::Phase::vouched) asks for more than a node's word.
    pub const ASKS_MORE: u8 = 2;
}

/// The verdict for one combination of classes. Two phases let the kernel keep a schedule while the daemon is away; after
/// the second, an unscheduled end is a denial.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Cell {
    pub first: Phase,
    pub second: Phase,
    /// End of the first phase, in ns of the coarse monotonic clock. 0: it does not end.
    pub first_until: u64,
    /// End of the second phase, likewise.
    pub second_until: u64,
}
const _: () = assert!(size_of::<Cell>() == 80);

/// What a socket is to its flow.
pub mod role {
    pub const UNKNOWN: u8 = 0;
    /// It opened the flow.
    pub const CLIENT: u8 = 1;
    /// It was called.
    pub const SERVER: u8 = 2;
}

/// Storage of one socket. Written under the socket's lock or before the socket is shared, but for the counters. What every
/// packet reads comes first: the kernel lets it begin with a cache line.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tag {
    /// Generation of the verdict; 0: none was taken.
    pub generation: u32,
    pub workload: u32,
    /// When the verdict ends by itself, in ns of the coarse monotonic clock. 0: never.
    pub until: u64,
    /// What the verdict rests on.
    pub grant: Grant,
    pub action: u8,
    pub role: u8,
    pub protocol: u8,
    /// [`tag_flags`].
    pub flags: u8,
    pub reason: u16,
    pub remote_port: u16,
    /// Cookie of the network namespace, 0 if not known (sockets older than authd).
    pub netns: u64,
    /// cgroup of the task that made the socket.
    pub cgroup: u64,
    /// The maker's [`IdentityEntry::instance`].
    pub instance: u64,
    /// Caller's cgroup, for an accepted socket whose caller is on this node; the id of the key by which another node vouches.
    pub peer_cgroup: u64,
    pub peer_instance: u64,
    /// When the flow was opened, ns of the monotonic clock.
    pub opened: u64,
    pub remote: Address,
    /// The task's command, as bytes in memory order.
    pub comm: [u64; 2],
    /// Caller's workload, if it is on this node; the label of one for whom another node vouches.
    pub peer_workload: u32,
    pub rule: u32,
    pub pid: u32,
    pub uid: u32,
}
const _: () = assert!(size_of::<Tag>() == 128);

impl Tag {
    /// As the kernel makes it.
    pub const NEW: Self = Self {
        generation: 0,
        workload: 0,
        until: 0,
        grant: Grant::NONE,
        action: 0,
        role: role::UNKNOWN,
        protocol: 0,
        flags: 0,
        reason: 0,
        remote_port: 0,
        netns: 0,
        cgroup: 0,
        instance: 0,
        peer_cgroup: 0,
        peer_instance: 0,
        opened: 0,
        remote: Address::UNSPECIFIED,
        comm: [0; 2],
        peer_workload: 0,
        rule: 0,
        pid: 0,
        uid: 0,
    };
}

pub mod tag_flags {
    /// The caller is a process on this node, and `peer_workload` says which.
    pub const PEER_LOCAL: u8 = 1;
    /// An `opened` event was emitted: a `closed` one is due.
    pub const OPENED: u8 = 2;
    /// The handshake completed.
    pub const ESTABLISHED: u8 = 4;
    /// The connection waits for proofs; `opened` says since when.
    pub const HELD: u8 = 8;
    /// [`super::Listener`] entries say who has this socket's port.
    pub const LISTED: u8 = 16;
    /// Another node vouches for the caller, whose label is in `peer_workload`.
    pub const VOUCHED: u8 = 32;
    /// Its SYN tells another node who sends it.
    pub const SPEAKS: u8 = 64;
}

/// One direction of a flow, keyed by the namespace too: the same addresses may mean other hosts in each. All of it is words:
/// the kernel hashes it by words, and a processor is slow to read a word that was just written in pieces.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FlowKey {
    pub netns: u64,
    pub source: Address,
    pub destination: Address,
    /// The source's in the upper half.
    pub ports: u32,
    pub protocol: u32,
}
const _: () = assert!(size_of::<FlowKey>() == 48);

impl FlowKey {
    #[inline(always)]
    pub const fn new(netns: u64, protocol: u8, source: (Address, u16), destination: (Address, u16)) -> Self {
        Self {
            netns,
            source: source.0,
            destination: destination.0,
            ports: (source.1 as u32) << 16 | destination.1 as u32,
            protocol: protocol as u32,
        }
    }

    /// Who it is for, whoever sends.
    #[inline(always)]
    pub const fn callee(&self) -> Self {
        Self { source: Address::UNSPECIFIED, ports: self.ports & 0xffff, ..*self }
    }
}

/// Who sends on it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LocalEntry {
    pub cgroup: u64,
    pub instance: u64,
    pub workload: u32,
    pub pid: u32,
}
const _: () = assert!(size_of::<LocalEntry>() == 24);

/// One socket's exchange with one remote end, for everything but TCP.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ConversationKey {
    /// Socket cookie.
    pub cookie: u64,
    pub remote: Address,
    pub remote_port: u16,
    pub protocol: u8,
    pub reserved: [u8; 5],
}
const _: () = assert!(size_of::<ConversationKey>() == 32);

#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Conversation {
    pub until: u64,
    /// ns of the monotonic clock.
    pub opened: u64,
    pub last_seen: u64,
    pub bytes_out: u64,
    pub bytes_in: u64,
    pub packets_out: u64,
    pub packets_in: u64,
    pub cgroup: u64,
    pub peer_cgroup: u64,
    pub peer_instance: u64,
    pub netns: u64,
    /// What the verdict rests on.
    pub grant: Grant,
    pub local: Address,
    /// The task's command, as bytes in memory order.
    pub comm: [u64; 2],
    pub generation: u32,
    pub workload: u32,
    pub peer_workload: u32,
    pub rule: u32,
    pub pid: u32,
    pub uid: u32,
    pub local_port: u16,
    pub reason: u16,
    pub action: u8,
    pub role: u8,
    /// [`tag_flags`].
    pub flags: u8,
    pub reserved: u8,
}
const _: () = assert!(size_of::<Conversation>() == 160);

/// Elements of the array that the program of the interfaces reads beside the generation's tables. Words of their own, each
/// with one writer.
pub mod nic {
    /// Cookie of the network namespace whose interfaces are guarded. The daemon's.
    pub const NETNS: u32 = 0;
    /// Under which number refused packets are counted now. The daemon's.
    pub const BANK: u32 = 1;
    /// Raised whenever a socket closes to which [`super::Listener`] entries refer: older ones are void. The kernel's.
    pub const EPOCH: u32 = 2;
    /// UDP port of a socket of that namespace, connected to itself on 127.0.0.1, that remembers the cookie: sockets older than
    /// authd learn theirs from it. The daemon's.
    pub const BEACON: u32 = 3;
    pub const WORDS: u32 = 4;
    /// Values of [`BANK`]: the kernel counts under one while the daemon takes the other.
    pub const BANKS: u32 = 2;
}

/// Who is called at one local address and port: keyed as a [`FlowKey`] without source. Learned from packets that arrived.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Listener {
    /// [`nic::EPOCH`] when it was learned.
    pub epoch: u64,
    pub cgroup: u64,
    pub workload: u32,
    /// [`listener_flags`].
    pub flags: u32,
}
const _: () = assert!(size_of::<Listener>() == 24);

pub mod listener_flags {
    /// Several workloads have the port: each packet is left to the socket that it comes to.
    pub const SHARED: u32 = 1;
}

/// An inbound flow that passes an interface, as the program there remembers it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Flow {
    /// When the verdict ends by itself, in ns of the coarse monotonic clock. 0: never.
    pub until: u64,
    /// What the verdict rests on.
    pub grant: Grant,
    /// Generation of the verdict; 0: none was taken.
    pub generation: u32,
    /// [`role`] of the local end.
    pub role: u32,
    /// Of the caller, if another node vouches for it.
    pub label: u32,
    pub reserved: u32,
}
const _: () = assert!(size_of::<Flow>() == 32);

/// Packets that were refused at an interface are counted here, and told of once a second.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DropKey {
    pub source: Address,
    pub destination: Address,
    /// The one of [`nic::BANK`].
    pub bank: u32,
    /// The destination's, with the protocol in the upper half.
    pub port: u32,
}
const _: () = assert!(size_of::<DropKey>() == 40);

impl DropKey {
    #[inline(always)]
    pub const fn new(bank: u32, protocol: u8, source: Address, destination: Address, port: u16) -> Self {
        Self { source, destination, bank, port: (protocol as u32) << 16 | port as u32 }
    }

    /// Protocol and port.
    #[inline(always)]
    pub const fn port(&self) -> (u8, u16) {
        ((self.port >> 16) as u8, self.port as u16)
    }
}

/// Each CPU's own sum, what the last of these packets was, and the verdict, so that the next one need not ask for it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Dropped {
    pub packets: u64,
    pub bytes: u64,
    /// ns of the coarse monotonic clock.
    pub first: u64,
    pub last: u64,
    /// When the verdict ends by itself, in ns of the coarse monotonic clock. 0: never.
    pub until: u64,
    /// [`nic::EPOCH`] when it was taken.
    pub epoch: u64,
    pub generation: u32,
    pub workload: u32,
    pub rule: u32,
    pub source_port: u16,
    /// A [`crate::reason::Reason`] code.
    pub reason: u16,
}
const _: () = assert!(size_of::<Dropped>() == 64);

impl Dropped {
    pub const NONE: Self = Self {
        packets: 0,
        bytes: 0,
        first: 0,
        last: 0,
        until: 0,
        epoch: 0,
        generation: 0,
        workload: 0,
        rule: 0,
        source_port: 0,
        reason: 0,
    };
}

/// Repeated denials are counted here instead of being told one by one.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DenialKey {
    pub cgroup: u64,
    pub remote: Address,
    /// The far port of an outbound flow, the guarded port of an inbound one.
    pub port: u16,
    pub reason: u16,
    pub protocol: u8,
    pub direction: u8,
    pub action: u8,
    /// [`tag_flags::VOUCHED`], or none.
    pub flags: u8,
}
const _: () = assert!(size_of::<DenialKey>() == 32);

#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Denial {
    /// When the last event told of it, ns of the monotonic clock.
    pub told: u64,
    /// Denials since then.
    pub untold: u64,
    pub workload: u32,
    pub peer_workload: u32,
    pub rule: u32,
    pub generation: u32,
}
const _: () = assert!(size_of::<Denial>() == 32);

/// Per-CPU sum for one reason.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counter {
    /// Verdicts taken for this reason: flows opened, calls and packets refused.
    pub verdicts: u64,
    /// Bytes of packets refused for it.
    pub bytes: u64,
}
const _: () = assert!(size_of::<Counter>() == 16);

/// Per-CPU numbering of events.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sequence {
    /// Events that there should be.
    pub next: u64,
    /// Events for which the ring buffer had no room.
    pub lost: u64,
}
const _: () = assert!(size_of::<Sequence>() == 16);

/// What the verdict function may read.
pub trait Tables {
    fn root(&self) -> Option<Root>;
    fn identity(&self, root: &Root, cgroup: u64) -> Option<IdentityEntry>;
    /// The entry, with [`workload_flags::PRESENT`] set, or `None`.
    fn workload(&self, root: &Root, workload: u32) -> Option<WorkloadEntry>;
    fn address_class(&self, root: &Root, address: &Address) -> u32;
    fn port(&self, root: &Root, protocol: u8, port: u16) -> PortEntry;
    /// In place: a copy would take too much of the kernel's stack.
    fn cell(&self, key: &CellKey) -> Option<&Cell>;
    /// The grant that was last given for a key, alive or not.
    fn grant(&self, key: &GrantKey) -> Option<Grant>;
    /// The same of a caller for whom another node vouches.
    fn vouched(&self, key: &VouchedKey) -> Option<Grant>;
    fn slot(&self, slot: u32) -> Option<Slot>;
    /// The coarse monotonic clock, in ns. Asked only where a verdict has an end.
    fn now(&self) -> u64;
}
