//! The kernel side's tables: the only place that names a map, and the view of them that the verdict function gets.

use authd_common::{
    address::Address,
    identity::Lineage,
    reason::REASON_SLOTS,
    syn::{LabelKey, NodeKey, NodeKeyId, Speaker, Speakers, Spoken, Voice},
    tables::{
        ADDRESS_CLASS_OTHER, ADDRESS_EPOCH_BITS, ADDRESS_KEY_BYTES, BANKS, Cell, CellKey, Conversation,
        ConversationKey, Counter, Denial, DenialKey, DropKey, Dropped, Flow, FlowKey, Grant, GrantKey, IdentityEntry,
        IdentityKey, Listener, LocalEntry, MAX_WORKLOADS, PORT_SLOTS, Permit, PortEntry, Root, Sequence, Slot, Tables,
        Tag, VouchedKey, WorkloadEntry, address_key, nic, port_slot, root_slot, workload_flags,
    },
};
use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_NOEXIST},
    btf_maps::{self, ArrayOfMaps, SkStorage},
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf, lpm_trie::Key},
};

use crate::raw;

// The daemon sets the sizes that its configuration names when it loads the object; these are the defaults.

/// Number of the generation in force. Mapped by the daemon and written with one atomic store.
#[map]
static HEAD: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static ROOTS: Array<Root> = Array::with_max_entries(2, 0);
#[map]
static IDENTITIES: HashMap<IdentityKey, IdentityEntry> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
#[map]
static WORKLOADS: Array<WorkloadEntry> = Array::with_max_entries(BANKS * MAX_WORKLOADS, BPF_F_MMAPABLE);
#[map]
static ADDRESSES: LpmTrie<[u8; ADDRESS_KEY_BYTES], u32> = LpmTrie::with_max_entries(131_072, 0);
#[map]
static PORTS: Array<PortEntry> = Array::with_max_entries(BANKS * PORT_SLOTS, BPF_F_MMAPABLE);
#[map]
static CELLS: HashMap<CellKey, Cell> = HashMap::with_max_entries(524_288, BPF_F_NO_PREALLOC);
#[map]
static GRANTS: HashMap<GrantKey, Grant> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
#[map]
static VOUCHED: HashMap<VouchedKey, Grant> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
/// Mapped by the daemon: ending a grant is one store.
#[map]
static SLOTS: Array<Slot> = Array::with_max_entries(65_536, BPF_F_MMAPABLE);
/// By slot; read only of grants whose serial number says so. Mapped by the daemon, whose words are not the kernel's.
#[map]
static PERMITS: Array<Permit> = Array::with_max_entries(65_536, BPF_F_MMAPABLE);
#[btf_map]
static TAGS: SkStorage<Tag> = SkStorage::new();
#[map]
static LOCALS: LruHashMap<FlowKey, LocalEntry> = LruHashMap::with_max_entries(65_536, 0);
#[map]
static CONVERSATIONS: LruHashMap<ConversationKey, Conversation> = LruHashMap::with_max_entries(65_536, 0);
#[map]
static DENIALS: LruHashMap<DenialKey, Denial> = LruHashMap::with_max_entries(16_384, 0);
#[map]
static COUNTERS: PerCpuArray<Counter> = PerCpuArray::with_max_entries(REASON_SLOTS, 0);
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 22, 0);
#[map]
static SEQUENCE: PerCpuArray<Sequence> = PerCpuArray::with_max_entries(1, 0);
/// What the interfaces' program reads beside a generation's tables, and one word that it does not write.
#[map]
static NIC: Array<u64> = Array::with_max_entries(nic::WORDS, BPF_F_MMAPABLE);
#[map]
static LISTENERS: LruHashMap<FlowKey, Listener> = LruHashMap::with_max_entries(16_384, 0);
#[map]
static FLOWS: LruHashMap<FlowKey, Flow> = LruHashMap::with_max_entries(65_536, 0);
/// Not one that makes room by itself: what was counted stays until the daemon has taken it. Each CPU has a value for each key
/// from the beginning, 256 KiB in all.
#[map]
static DROPS: PerCpuHashMap<DropKey, Dropped> = PerCpuHashMap::with_max_entries(4_096, 0);
/// What found no place there, by bank and reason.
#[map]
static OTHER_DROPS: PerCpuArray<Dropped> = PerCpuArray::with_max_entries(nic::BANKS * REASON_SLOTS, 0);

/// For whom other nodes speak, by label.
#[map]
static SPEAKERS: HashMap<u32, Speaker> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
/// With which keys.
#[map]
static NODE_KEYS: HashMap<NodeKeyId, NodeKey> = HashMap::with_max_entries(4_096, BPF_F_NO_PREALLOC);
/// What was said in SYNs that were believed. Only a node that has a key can fill it.
#[map]
static SPOKEN: LruHashMap<FlowKey, Spoken> = LruHashMap::with_max_entries(65_536, 0);
/// Which node an address is on.
#[map]
static NODES: LpmTrie<[u8; 16], u32> = LpmTrie::with_max_entries(16_384, 0);
/// How this node speaks to each.
#[map]
static VOICES: HashMap<u32, Voice> = HashMap::with_max_entries(1_024, BPF_F_NO_PREALLOC);
/// By which label each knows its workloads.
#[map]
static LABELS: HashMap<LabelKey, u32> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

/// Changing the inner map of this one makes the kernel wait for all programs that run: the daemon's barrier between taking
/// a table out of use and reusing its memory. No program reads it.
#[btf_map]
static BARRIER: ArrayOfMaps<btf_maps::Array<u64, 1>, 1> = ArrayOfMaps::new();

/// The generation in force; 0 before the first.
#[inline(always)]
pub fn generation() -> u32 {
    HEAD.get(0).map_or(0, |head| raw::volatile(head) as u32)
}

#[inline(always)]
pub fn tags() -> *mut core::ffi::c_void {
    (&raw const TAGS).cast_mut().cast()
}

#[inline(always)]
pub fn permit(slot: u32) -> Option<*mut Permit> {
    PERMITS.get_ptr_mut(slot)
}

#[inline(always)]
pub fn local(key: &FlowKey) -> Option<LocalEntry> {
    raw::copy(LOCALS.get_ptr(key))
}

#[inline(always)]
pub fn set_local(key: &FlowKey, entry: &LocalEntry) {
    // An LRU table makes room by itself; if it cannot, the caller counts as unmanaged, which is never more than its own.
    let _ = LOCALS.insert(key, entry, 0);
}

#[inline(always)]
pub fn remove_local(key: &FlowKey) {
    let _ = LOCALS.remove(key);
}

#[inline(always)]
pub fn conversation(key: &ConversationKey) -> Option<*mut Conversation> {
    CONVERSATIONS.get_ptr_mut(key)
}

#[inline(always)]
pub fn set_conversation(key: &ConversationKey, conversation: &Conversation) {
    // Without a place the next packet is decided anew: slower, and not less strict.
    let _ = CONVERSATIONS.insert(key, conversation, 0);
}

#[inline(always)]
pub fn denial(key: &DenialKey) -> Option<*mut Denial> {
    DENIALS.get_ptr_mut(key)
}

/// Leaves alone what another CPU has put there meanwhile: it may have counted.
#[inline(always)]
pub fn add_denial(key: &DenialKey, denial: &Denial) {
    let _ = DENIALS.insert(key, denial, BPF_NOEXIST as u64);
}

#[inline(always)]
pub fn counter(reason: u16) -> Option<*mut Counter> {
    COUNTERS.get_ptr_mut(reason as u32)
}

#[inline(always)]
pub fn nic(word: u32) -> u64 {
    NIC.get(word).map_or(0, raw::volatile)
}

/// Makes void what was learned of listeners.
#[inline(always)]
pub fn forget_listeners() {
    if let Some(epoch) = NIC.get_ptr_mut(nic::EPOCH) {
        raw::add(raw::value(epoch), 1);
    }
}

#[inline(always)]
pub fn listener(key: &FlowKey) -> Option<Listener> {
    raw::copy(LISTENERS.get_ptr(key))
}

#[inline(always)]
pub fn set_listener(key: &FlowKey, listener: &Listener) {
    // Without a place packets pass the interface, and are judged at the socket.
    let _ = LISTENERS.insert(key, listener, 0);
}

#[inline(always)]
pub fn flow(key: &FlowKey) -> Option<Flow> {
    raw::copy(FLOWS.get_ptr(key))
}

#[inline(always)]
pub fn set_flow(key: &FlowKey, flow: &Flow) {
    // Without a place the next packet is judged anew.
    let _ = FLOWS.insert(key, flow, 0);
}

#[inline(always)]
pub fn set_spoken(key: &FlowKey, spoken: &Spoken) {
    // Not one that is there: its handshake may come to its end at this moment. Without a place the end of the handshake is
    // refused, and the caller tries again.
    let _ = SPOKEN.insert(key, spoken, BPF_NOEXIST as u64);
}

#[inline(always)]
pub fn spoken_in_place(key: &FlowKey) -> Option<*mut Spoken> {
    SPOKEN.get_ptr_mut(key)
}

/// The node that an address is on.
#[inline(always)]
pub fn node(address: &Address) -> Option<u32> {
    NODES.get(Key::new(128, address.octets())).copied()
}

#[inline(always)]
pub fn voice(node: u32) -> Option<Voice> {
    raw::copy(VOICES.get_ptr(node))
}

#[inline(always)]
pub fn label(key: &LabelKey) -> Option<u32> {
    raw::copy(LABELS.get_ptr(key))
}

/// This CPU's sum of one kind of dropped packets.
#[inline(always)]
pub fn dropped(key: &DropKey) -> Option<*mut Dropped> {
    DROPS.get_ptr_mut(key)
}

/// The same where there is none yet; `None` if there is no room.
#[inline(always)]
pub fn new_dropped(key: &DropKey) -> Option<*mut Dropped> {
    let _ = DROPS.insert(key, NONE_DROPPED, 0);
    DROPS.get_ptr_mut(key)
}

#[inline(always)]
pub fn other_dropped(bank: u32, reason: u16) -> Option<*mut Dropped> {
    OTHER_DROPS.get_ptr_mut(bank % nic::BANKS * REASON_SLOTS + reason as u32)
}

static NONE_DROPPED: Dropped = Dropped::NONE;

#[inline(always)]
pub fn sequence() -> Option<*mut Sequence> {
    SEQUENCE.get_ptr_mut(0)
}

#[inline(always)]
pub fn events() -> &'static RingBuf {
    &EVENTS
}

/// The root in force, where it lies.
#[inline(always)]
pub fn root<'a>() -> Option<&'a Root> {
    let generation = generation();
    let root = raw::in_place(ROOTS.get_ptr(root_slot(generation)))?;
    if generation != 0 && root.generation == generation { Some(root) } else { None }
}

/// The tables as they are in this kernel.
pub struct Kernel;

impl Tables for Kernel {
    #[inline(always)]
    fn root(&self) -> Option<Root> {
        root().copied()
    }

    #[inline(always)]
    fn identity(&self, root: &Root, cgroup: u64) -> Option<IdentityEntry> {
        raw::copy(IDENTITIES.get_ptr(IdentityKey { cgroup, epoch: root.identities, reserved: 0 }))
    }

    #[inline(always)]
    fn workload(&self, root: &Root, workload: u32) -> Option<WorkloadEntry> {
        if workload >= MAX_WORKLOADS {
            return None;
        }
        let entry = raw::copy(WORKLOADS.get_ptr(root.workload_bank * MAX_WORKLOADS + workload))?;
        if entry.flags & workload_flags::PRESENT != 0 { Some(entry) } else { None }
    }

    #[inline(always)]
    fn address_class(&self, root: &Root, address: &Address) -> u32 {
        let key = Key::new(ADDRESS_EPOCH_BITS + 128, address_key(root.addresses, address));
        ADDRESSES.get(&key).copied().unwrap_or(ADDRESS_CLASS_OTHER)
    }

    #[inline(always)]
    fn port(&self, root: &Root, protocol: u8, port: u16) -> PortEntry {
        raw::copy(PORTS.get_ptr(root.port_bank * PORT_SLOTS + port_slot(protocol, port))).unwrap_or_default()
    }

    #[inline(always)]
    fn cell(&self, key: &CellKey) -> Option<&Cell> {
        raw::in_place(CELLS.get_ptr(key))
    }

    #[inline(always)]
    fn grant(&self, key: &GrantKey) -> Option<Grant> {
        raw::copy(GRANTS.get_ptr(key))
    }

    #[inline(always)]
    fn vouched(&self, key: &VouchedKey) -> Option<Grant> {
        raw::copy(VOUCHED.get_ptr(key))
    }

    #[inline(always)]
    fn slot(&self, slot: u32) -> Option<Slot> {
        raw::copy(SLOTS.get_ptr(slot))
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        raw::coarse_now()
    }
}

impl Speakers for Kernel {
    #[inline(always)]
    fn speaker(&self, label: u32) -> Option<Speaker> {
        raw::copy(SPEAKERS.get_ptr(label))
    }

    #[inline(always)]
    fn node_key(&self, id: &NodeKeyId) -> Option<NodeKey> {
        raw::copy(NODE_KEYS.get_ptr(id))
    }

    #[inline(always)]
    fn spoken(&self, key: &FlowKey) -> Option<Spoken> {
        raw::copy(SPOKEN.get_ptr(key))
    }

    #[inline(always)]
    fn time(&self) -> u64 {
        raw::coarse_now()
    }
}

/// The task that makes the system call.
pub struct CurrentTask;

impl Lineage for CurrentTask {
    #[inline(always)]
    fn own(&self) -> u64 {
        raw::current_cgroup()
    }

    #[inline(always)]
    fn ancestor(&self, level: u32) -> u64 {
        raw::current_ancestor_cgroup(level)
    }
}
