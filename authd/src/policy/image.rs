//! A generation's tables, before they are written to maps: the same answers, without a kernel.

use std::collections::BTreeMap;

use authd_common::{
    address::Address,
    tables::{
        ADDRESS_CLASS_OTHER, Cell, CellKey, Grant, GrantKey, IdentityEntry, PortEntry, Root, Slot, Tables, VouchedKey,
        WorkloadEntry, port_slot, workload_flags,
    },
};
use jiff::Timestamp;

use super::network::masked;

/// Rules by the number of their set, the first of each first.
pub type Sets = BTreeMap<u32, Vec<u32>>;

#[derive(Clone, Debug, Default)]
pub struct Image {
    /// `root_flags`.
    pub flags: u32,
    /// By workload number.
    pub workloads: Vec<WorkloadEntry>,
    /// Class of each prefix, by its address and length.
    pub addresses: BTreeMap<(Address, u8), u32>,
    /// By port slot; slots that are not there are empty.
    pub ports: BTreeMap<u32, PortEntry>,
    /// Keys with epoch 0.
    pub cells: BTreeMap<CellKey, Cell>,
    /// Sets of rules that take the word of other nodes, as cells name them: numbers of rules, by the number of the set.
    pub sets: Sets,
    /// When the tables should be compiled again, because a schedule's boundary passes.
    pub next_boundary: Option<Timestamp>,
}

impl Image {
    /// The root that its tables have as long as they are only here.
    pub fn root(&self) -> Root {
        Root { generation: 1, flags: self.flags, ..Root::default() }
    }

    /// The image as the verdict function reads it, at a time of the monotonic clock.
    pub fn at(&self, now: u64) -> View<'_> {
        let mut lengths: Vec<u8> = self.addresses.keys().map(|(_, bits)| *bits).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.dedup();
        View {
            image: self,
            generation: self.root().generation,
            lengths,
            now,
            grants: Box::new(|_| None),
            vouched: Box::new(|_| None),
            slots: Box::new(|_| None),
            identities: Box::new(|_| None),
        }
    }
}

type LookUp<'a, K, V> = Box<dyn Fn(K) -> Option<V> + 'a>;

/// An image at one moment.
pub struct View<'a> {
    image: &'a Image,
    generation: u32,
    /// Prefix lengths that occur, longest first.
    lengths: Vec<u8>,
    now: u64,
    grants: LookUp<'a, GrantKey, Grant>,
    vouched: LookUp<'a, VouchedKey, Grant>,
    slots: LookUp<'a, u32, Slot>,
    identities: LookUp<'a, u64, IdentityEntry>,
}

impl<'a> View<'a> {
    /// The same under another number, as a kernel has it.
    pub fn numbered(self, generation: u32) -> Self {
        Self { generation, ..self }
    }

    /// The same on a node: whose each cgroup is.
    pub fn with_identities(self, identities: impl Fn(u64) -> Option<IdentityEntry> + 'a) -> Self {
        Self { identities: Box::new(identities), ..self }
    }

    /// The same with grants: who holds which, and what the slots say.
    pub fn with_grants(
        self,
        grants: impl Fn(GrantKey) -> Option<Grant> + 'a,
        slots: impl Fn(u32) -> Option<Slot> + 'a,
    ) -> Self {
        Self { grants: Box::new(grants), slots: Box::new(slots), ..self }
    }

    /// The same with grants of callers for whom other nodes vouch. What the slots say is given with the others.
    pub fn with_vouched(self, vouched: impl Fn(VouchedKey) -> Option<Grant> + 'a) -> Self {
        Self { vouched: Box::new(vouched), ..self }
    }
}

impl Tables for View<'_> {
    fn root(&self) -> Option<Root> {
        Some(Root { generation: self.generation, ..self.image.root() })
    }

    fn identity(&self, _: &Root, cgroup: u64) -> Option<IdentityEntry> {
        (self.identities)(cgroup)
    }

    fn workload(&self, _: &Root, workload: u32) -> Option<WorkloadEntry> {
        let entry = self.image.workloads.get(workload as usize)?;
        (entry.flags & workload_flags::PRESENT != 0).then_some(*entry)
    }

    fn address_class(&self, _: &Root, address: &Address) -> u32 {
        let longest = self.lengths.iter().find_map(|bits| self.image.addresses.get(&(masked(address, *bits), *bits)));
        longest.copied().unwrap_or(ADDRESS_CLASS_OTHER)
    }

    fn port(&self, _: &Root, protocol: u8, port: u16) -> PortEntry {
        self.image.ports.get(&port_slot(protocol, port)).copied().unwrap_or_default()
    }

    fn cell(&self, key: &CellKey) -> Option<&Cell> {
        self.image.cells.get(&CellKey { epoch: 0, ..*key })
    }

    fn grant(&self, key: &GrantKey) -> Option<Grant> {
        (self.grants)(*key)
    }

    fn vouched(&self, key: &VouchedKey) -> Option<Grant> {
        (self.vouched)(*key)
    }

    fn slot(&self, slot: u32) -> Option<Slot> {
        (self.slots)(slot)
    }

    fn now(&self) -> u64 {
        self.now
    }
}
