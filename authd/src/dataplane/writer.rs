//! The only owner of mutable tables: puts one generation into force after another.
//!
//! Enters: an image and what is known of the cgroups. Leaves: the generation in force. A generation's tables are written
//! beside those in use, compared with the tables' capacity before the first write, put into force with one store, and the
//! old ones are deleted after the kernel has finished every program that may still read them. A table that did not change
//! is kept.

use std::{
    collections::{BTreeMap, HashMap as StdHashMap},
    io,
    net::{Ipv4Addr, UdpSocket},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    time::Instant,
};

use authd_common::{
    address::Address,
    tables::{
        ADDRESS_EPOCH_BITS, ADDRESS_KEY_BYTES, BANKS, CellKey, Denial, DenialKey, Grant, GrantKey, IPPROTO_UDP,
        IdentityEntry, IdentityKey, MAX_WORKLOADS, PORT_SLOTS, Permit, PortEntry, Root, Slot, Tag, VouchedKey,
        WorkloadEntry, address_key, nic, root_slot,
    },
};
use aya::{
    Pod,
    maps::{Array, MapData, MapError, lpm_trie},
};

use super::{
    bpf,
    object::{Maps, Sizes},
};
use crate::{grants::Command, policy::image::Image};

/// What is not there need not be removed.
pub(super) fn gone(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        other => other,
    }
}

/// Entries per system call.
const BATCH: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error(
        "the policy needs {needed} {table} beside the {kept} in force, and the table holds {capacity}: \
         raise limits.{table} in authd.toml, or shorten the policy"
    )]
    Capacity { table: &'static str, needed: usize, kept: usize, capacity: usize },
    #[error("the policy has {needed} workloads and the table holds {MAX_WORKLOADS}")]
    Workloads { needed: usize },
    #[error("writing {table}: {error}")]
    Write { table: &'static str, error: io::Error },
    #[error(
        "grants of callers for whom other nodes vouch have no room in the sets of rules that are about them: \
         raise limits.grants in authd.toml, or let rules have fewer services apart ({0})"
    )]
    Vouched(MapError),
    #[error("table {table}: {error}")]
    Map { table: &'static str, error: MapError },
}

/// What a load did.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Loaded {
    pub generation: u32,
    /// Entries written, of all tables.
    pub written: usize,
    pub microseconds: u64,
}

/// Tables of the generation in force, as they were written; what did not change is not written again.
struct Current {
    addresses: BTreeMap<(Address, u8), u32>,
    ports: BTreeMap<u32, PortEntry>,
    workloads: Vec<WorkloadEntry>,
    cells: BTreeMap<CellKey, authd_common::tables::Cell>,
}

pub struct Writer {
    pub(super) maps: Maps,
    sizes: Sizes,
    root: Root,
    current: Option<Current>,
    identities: StdHashMap<u64, IdentityEntry>,
    /// Cgroups that are gone. Their entries are deleted together, because a barrier has to follow.
    gone: Vec<u64>,
    /// Something was deleted since the last barrier: its memory must not be reused yet.
    barrier_due: bool,
}

impl Writer {
    /// Takes the maps over, with whatever generation is in force in them. Its tables are read back: the same policy again
    /// needs no second room, and another one is compared with the room that is left.
    pub fn new(maps: Maps, sizes: Sizes) -> Result<Self, WriteError> {
        let generation = maps.head.get(0) as u32;
        let root = match generation {
            0 => Root::default(),
            generation => {
                maps.roots.get(&root_slot(generation), 0).map_err(|error| WriteError::Map { table: "roots", error })?
            }
        };
        let mut writer = Self {
            maps,
            sizes,
            root,
            current: None,
            identities: StdHashMap::new(),
            gone: Vec::new(),
            barrier_due: true,
        };
        writer.sweep(&root)?;
        if generation != 0 {
            writer.read_back()?;
        }
        Ok(writer)
    }

    /// What the generation in force consists of.
    fn read_back(&mut self) -> Result<(), WriteError> {
        let Root { workload_bank, port_bank, .. } = self.root;
        let mut identities = StdHashMap::new();
        for entry in self.maps.identities.map.iter() {
            let (key, entry) = entry.map_err(|error| WriteError::Map { table: "identities", error })?;
            identities.insert(key.cgroup, entry);
        }
        let mut cells = BTreeMap::new();
        for entry in self.maps.cells.map.iter() {
            let (key, cell) = entry.map_err(|error| WriteError::Map { table: "cells", error })?;
            cells.insert(CellKey { epoch: 0, ..key }, cell);
        }
        let mut addresses = BTreeMap::new();
        for entry in self.maps.addresses.map.iter() {
            let (key, class) = entry.map_err(|error| WriteError::Map { table: "addresses", error })?;
            addresses.insert(prefix_of(&key), class);
        }
        let base = (port_bank * PORT_SLOTS) as usize;
        let ports = (0..PORT_SLOTS).map(|slot| (slot, self.maps.ports.get(base + slot as usize)));
        let ports = ports.filter(|(_, entry)| *entry != PortEntry::default()).collect();
        let base = (workload_bank * MAX_WORKLOADS) as usize;
        let mut workloads: Vec<WorkloadEntry> =
            (0..MAX_WORKLOADS as usize).map(|number| self.maps.workloads.get(base + number)).collect();
        let used = workloads.iter().rposition(|entry| *entry != WorkloadEntry::default()).map_or(0, |last| last + 1);
        workloads.truncate(used);
        self.identities = identities;
        self.current = Some(Current { addresses, ports, workloads, cells });
        Ok(())
    }

    pub fn generation(&self) -> u32 {
        self.root.generation
    }

    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    pub fn maps_mut(&mut self) -> &mut Maps {
        &mut self.maps
    }

    /// Puts an image into force. If it fails, the generation in force stays, untouched.
    pub fn load(
        &mut self,
        image: &Image,
        identities: &StdHashMap<u64, IdentityEntry>,
        base_level: u32,
        hold_ms: u32,
    ) -> Result<Loaded, WriteError> {
        let started = Instant::now();
        let same = |a: bool| if a { 0 } else { 1 };
        let (new_addresses, new_ports, new_workloads, new_cells) = match &self.current {
            Some(current) => (
                same(current.addresses == image.addresses),
                same(current.ports == image.ports),
                same(current.workloads == image.workloads),
                same(current.cells == image.cells),
            ),
            None => (1, 1, 1, 1),
        };
        let new_identities = same(self.current.is_some() && &self.identities == identities);
        let root = Root {
            generation: self.root.generation.wrapping_add(1).max(1),
            flags: image.flags,
            identities: self.root.identities + new_identities,
            addresses: self.root.addresses + new_addresses,
            cells: self.root.cells + new_cells,
            workload_bank: (self.root.workload_bank + new_workloads) % BANKS,
            port_bank: (self.root.port_bank + new_ports) % BANKS,
            base_level,
            hold_ms,
            zero: 0,
        };
        self.clean()?;
        self.check_capacity(image, identities, &root)?;

        let mut written = 0;
        let result = self.write_tables(image, identities, &root, &mut written);
        if let Err(error) = result {
            // Nothing refers to what was written; take it away again.
            let keep = self.root;
            self.sweep(&keep)?;
            return Err(error);
        }
        self.maps
            .roots
            .set(root_slot(root.generation), root, 0)
            .map_err(|error| WriteError::Map { table: "roots", error })?;
        // The flip: from here on every new decision is of this generation.
        self.maps.head.set(0, root.generation as u64);
        let before = std::mem::replace(&mut self.root, root);
        let old_identities = std::mem::replace(&mut self.identities, identities.clone());
        let old = self.current.replace(Current {
            addresses: image.addresses.clone(),
            ports: image.ports.clone(),
            workloads: image.workloads.clone(),
            cells: image.cells.clone(),
        });
        self.barrier()?;
        if let Some(old) = old {
            self.remove(&before, &old_identities, &old)?;
        }
        let microseconds = started.elapsed().as_micros() as u64;
        Ok(Loaded { generation: root.generation, written, microseconds })
    }

    /// A cgroup appeared, or is known better now.
    pub fn insert_identity(&mut self, cgroup: u64, entry: IdentityEntry) -> Result<(), WriteError> {
        if self.root.generation == 0 || self.identities.get(&cgroup) == Some(&entry) {
            return Ok(());
        }
        if self.barrier_due {
            self.barrier()?;
        }
        let key = IdentityKey { cgroup, epoch: self.root.identities, reserved: 0 };
        self.maps
            .identities
            .map
            .insert(key, entry, 0)
            .map_err(|error| WriteError::Map { table: "identities", error })?;
        self.identities.insert(cgroup, entry);
        Ok(())
    }

    /// A cgroup is gone. Its entry goes with the next cleaning.
    pub fn remove_identity(&mut self, cgroup: u64) {
        if self.identities.remove(&cgroup).is_some() {
            self.gone.push(cgroup);
        }
    }

    /// Whose interfaces are guarded.
    pub fn set_netns(&mut self, cookie: u64) {
        self.maps.nic.set(nic::NETNS as usize, cookie);
    }

    /// A socket from which others that are older than authd learn that they are in its namespace, for as long as it is open.
    pub fn beacon(&mut self) -> io::Result<UdpSocket> {
        let beacon = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let own = beacon.local_addr()?;
        // Nobody else's datagrams come in.
        beacon.connect(own)?;
        let netns = self.maps.nic.get(nic::NETNS as usize);
        let tag = Tag { netns, protocol: IPPROTO_UDP, ..Tag::NEW };
        bpf::update(self.maps.tags.as_fd(), &beacon.as_raw_fd(), &tag)?;
        self.maps.nic.set(nic::BEACON as usize, own.port().into());
        Ok(beacon)
    }

    /// Takes a denial out of its table: the kernel begins anew with the next one.
    pub fn take_denial(&mut self, key: &DenialKey) -> Result<Option<Denial>, WriteError> {
        let of = |error| WriteError::Write { table: "denials", error };
        bpf::take::<DenialKey, Denial>(self.maps.denials.fd.as_fd(), key).map_err(of)
    }

    /// Follows what became of grants, in order. Stops at the first that cannot be followed.
    pub fn follow(&mut self, commands: &[Command]) -> Result<(), WriteError> {
        let of = |error| WriteError::Map { table: "grants", error };
        for command in commands {
            match *command {
                Command::Fill { grant, rule, until } => {
                    // A slot at rest: nobody remembers its new serial number yet.
                    self.set_slot(grant.slot, Slot { until: 0, serial: grant.serial, rule });
                    self.set_end(grant.slot, until);
                }
                Command::Permit { slot, permit } => self.set_permit(slot, permit),
                Command::Next { slot, next } => self.maps.permits.set(slot as usize * PERMIT_WORDS + 4, word(next)),
                Command::Extend { slot, until } => self.set_end(slot, until),
                Command::Empty { slot } => self.set_end(slot, 0),
                Command::Point { key, grant } => self.maps.grants.insert(key, grant, 0).map_err(of)?,
                Command::Unpoint { key } => gone(self.maps.grants.remove(&key)).map_err(of)?,
                Command::Vouch { key, grant } => {
                    self.maps.vouched.insert(key, grant, 0).map_err(WriteError::Vouched)?
                }
                Command::Unvouch { key } => gone(self.maps.vouched.remove(&key)).map_err(of)?,
            }
        }
        Ok(())
    }

    /// Every slot, as the kernel has it.
    pub fn slots(&self) -> Vec<Slot> {
        (0..self.maps.slots.len() as u32 / 2).filter_map(|slot| self.slot(slot)).collect()
    }

    pub fn slot(&self, slot: u32) -> Option<Slot> {
        let at = slot as usize * 2;
        (at < self.maps.slots.len()).then(|| {
            let [a, b, c, d, e, f, g, h] = self.maps.slots.get(at + 1).to_ne_bytes();
            let (serial, rule) = (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]));
            Slot { until: self.maps.slots.get(at), serial, rule }
        })
    }

    /// What a permit has let pass; `None` if the slot has another grant's.
    pub fn permit(&self, grant: Grant) -> Option<Permit> {
        let at = grant.slot as usize * PERMIT_WORDS;
        if at >= self.maps.permits.len() {
            return None;
        }
        let get = |word| self.maps.permits.get(at + word);
        let [a, b, c, d, e, f, g, h] = get(3).to_ne_bytes();
        let (most_begun, serial) = (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]));
        // Which one comes next is this side's own affair.
        let permit = Permit { begun: get(0), bytes: get(1), most_bytes: get(2), most_begun, serial, next: Grant::NONE };
        (serial == grant.serial).then_some(permit)
    }

    /// Of a slot that nobody has yet.
    fn set_permit(&mut self, slot: u32, permit: Permit) {
        let Permit { begun, bytes, most_bytes, most_begun, serial, next } = permit;
        let [a, b, c, d] = most_begun.to_ne_bytes();
        let [e, f, g, h] = serial.to_ne_bytes();
        let whose = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
        for (at, value) in [begun, bytes, most_bytes, whose, word(next)].into_iter().enumerate() {
            self.maps.permits.set(slot as usize * PERMIT_WORDS + at, value);
        }
    }

    /// Every entry of the grants' index.
    pub fn pointed(&self) -> Result<Vec<(GrantKey, Grant)>, WriteError> {
        let entries = self.maps.grants.iter().collect::<Result<_, _>>();
        entries.map_err(|error| WriteError::Map { table: "grants", error })
    }

    /// The same of callers for whom other nodes vouch.
    pub fn vouched(&self) -> Result<Vec<(VouchedKey, Grant)>, WriteError> {
        let entries = self.maps.vouched.iter().collect::<Result<_, _>>();
        entries.map_err(|error| WriteError::Map { table: "grants", error })
    }

    fn set_slot(&mut self, slot: u32, Slot { until, serial, rule }: Slot) {
        self.set_end(slot, until);
        // As the two numbers lie in memory, in one store.
        let [a, b, c, d] = serial.to_ne_bytes();
        let [e, f, g, h] = rule.to_ne_bytes();
        self.maps.slots.set(slot as usize * 2 + 1, u64::from_ne_bytes([a, b, c, d, e, f, g, h]));
    }

    fn set_end(&mut self, slot: u32, until: u64) {
        self.maps.slots.set(slot as usize * 2, until);
    }

    /// Table, entries, capacity. An upper bound where the kernel does not count.
    pub fn fill(&self) -> Vec<(&'static str, u64, u64)> {
        let current = self.current.as_ref();
        vec![
            ("identities", self.identities.len() as u64, self.sizes.identities.into()),
            ("addresses", current.map_or(0, |c| c.addresses.len() as u64), self.sizes.addresses.into()),
            ("cells", current.map_or(0, |c| c.cells.len() as u64), self.sizes.cells.into()),
            ("workloads", current.map_or(0, |c| c.workloads.len() as u64), MAX_WORKLOADS.into()),
        ]
    }

    /// Deletes what became useless since the last time.
    pub fn clean(&mut self) -> Result<(), WriteError> {
        if !self.gone.is_empty() {
            let epoch = self.root.identities;
            let keys: Vec<IdentityKey> =
                self.gone.drain(..).map(|cgroup| IdentityKey { cgroup, epoch, reserved: 0 }).collect();
            delete("identities", self.maps.identities.fd.as_fd(), &keys)?;
            self.barrier_due = true;
        }
        if self.barrier_due { self.barrier() } else { Ok(()) }
    }

    /// Waits until every program that runs now has ended. Memory that was freed before may be reused after.
    pub(super) fn barrier(&mut self) -> Result<(), WriteError> {
        let of = |error| WriteError::Map { table: "barrier", error };
        // Replacing an inner map waits for a grace period before it returns (kernel/bpf/syscall.c,
        // maybe_wait_bpf_programs).
        let inner: Array<MapData, u64> = Array::create(1, 0).map_err(of)?;
        self.maps.barrier.set(0, &inner, 0).map_err(of)?;
        self.barrier_due = false;
        Ok(())
    }

    fn check_capacity(
        &self,
        image: &Image,
        identities: &StdHashMap<u64, IdentityEntry>,
        root: &Root,
    ) -> Result<(), WriteError> {
        if image.workloads.len() > MAX_WORKLOADS as usize {
            return Err(WriteError::Workloads { needed: image.workloads.len() });
        }
        let room = |table, changed: bool, needed: usize, kept: usize, capacity: u32| {
            if changed && needed + kept > capacity as usize {
                return Err(WriteError::Capacity { table, needed, kept, capacity: capacity as usize });
            }
            Ok(())
        };
        let kept = self.current.as_ref();
        room(
            "identities",
            root.identities != self.root.identities,
            identities.len(),
            self.identities.len(),
            self.sizes.identities,
        )?;
        room(
            "addresses",
            root.addresses != self.root.addresses,
            image.addresses.len(),
            kept.map_or(0, |c| c.addresses.len()),
            self.sizes.addresses,
        )?;
        room(
            "cells",
            root.cells != self.root.cells,
            image.cells.len(),
            kept.map_or(0, |c| c.cells.len()),
            self.sizes.cells,
        )
    }

    fn write_tables(
        &mut self,
        image: &Image,
        identities: &StdHashMap<u64, IdentityEntry>,
        root: &Root,
        written: &mut usize,
    ) -> Result<(), WriteError> {
        if root.identities != self.root.identities {
            let entries = identities
                .iter()
                .map(|(&cgroup, &entry)| (IdentityKey { cgroup, epoch: root.identities, reserved: 0 }, entry));
            *written += insert("identities", self.maps.identities.fd.as_fd(), entries)?;
        }
        if root.addresses != self.root.addresses {
            let entries =
                image.addresses.iter().map(|(prefix, &class)| (address_prefix(root.addresses, prefix), class));
            *written += insert("addresses", self.maps.addresses.fd.as_fd(), entries)?;
        }
        if root.cells != self.root.cells {
            let entries = image.cells.iter().map(|(key, &cell)| (CellKey { epoch: root.cells, ..*key }, cell));
            *written += insert("cells", self.maps.cells.fd.as_fd(), entries)?;
        }
        if root.workload_bank != self.root.workload_bank || self.root.generation == 0 {
            let base = (root.workload_bank * MAX_WORKLOADS) as usize;
            for index in 0..MAX_WORKLOADS as usize {
                let entry = image.workloads.get(index).copied().unwrap_or_default();
                self.maps.workloads.set(base + index, entry);
            }
            *written += image.workloads.len();
        }
        if root.port_bank != self.root.port_bank || self.root.generation == 0 {
            let base = (root.port_bank * PORT_SLOTS) as usize;
            let mut ports = image.ports.iter().peekable();
            for index in 0..PORT_SLOTS {
                let entry = ports.next_if(|(slot, _)| **slot == index).map(|(_, entry)| *entry);
                self.maps.ports.set(base + index as usize, entry.unwrap_or_default());
            }
            *written += image.ports.len();
        }
        Ok(())
    }

    /// Deletes the entries of the generation before that the one in force does not share.
    fn remove(
        &mut self,
        before: &Root,
        identities: &StdHashMap<u64, IdentityEntry>,
        old: &Current,
    ) -> Result<(), WriteError> {
        if before.identities != self.root.identities {
            let key = |&cgroup: &u64| IdentityKey { cgroup, epoch: before.identities, reserved: 0 };
            let keys: Vec<IdentityKey> = identities.keys().map(key).collect();
            delete("identities", self.maps.identities.fd.as_fd(), &keys)?;
            self.barrier_due = true;
        }
        if before.cells != self.root.cells {
            let keys: Vec<CellKey> = old.cells.keys().map(|key| CellKey { epoch: before.cells, ..*key }).collect();
            delete("cells", self.maps.cells.fd.as_fd(), &keys)?;
            self.barrier_due = true;
        }
        if before.addresses != self.root.addresses {
            let keys: Vec<_> = old.addresses.keys().map(|prefix| address_prefix(before.addresses, prefix)).collect();
            delete("addresses", self.maps.addresses.fd.as_fd(), &keys)?;
            self.barrier_due = true;
        }
        Ok(())
    }

    /// Deletes all entries that the given root does not reach, whoever left them: a killed daemon, or a load that failed.
    fn sweep(&mut self, root: &Root) -> Result<(), WriteError> {
        let old: Vec<IdentityKey> = keys("identities", self.maps.identities.map.keys())?
            .into_iter()
            .filter(|key| key.epoch != root.identities)
            .collect();
        delete("identities", self.maps.identities.fd.as_fd(), &old)?;
        let old_cells: Vec<CellKey> =
            keys("cells", self.maps.cells.map.keys())?.into_iter().filter(|key| key.epoch != root.cells).collect();
        delete("cells", self.maps.cells.fd.as_fd(), &old_cells)?;
        let epoch = root.addresses.to_be_bytes();
        let old_addresses: Vec<_> = keys("addresses", self.maps.addresses.map.keys())?
            .into_iter()
            .filter(|key| key.data()[..4] != epoch)
            .collect();
        delete("addresses", self.maps.addresses.fd.as_fd(), &old_addresses)?;
        if !(old.is_empty() && old_cells.is_empty() && old_addresses.is_empty()) {
            self.barrier_due = true;
        }
        Ok(())
    }
}

/// Words of one permit.
const PERMIT_WORDS: usize = size_of::<Permit>() / size_of::<u64>();

/// A grant as it lies in memory.
fn word(Grant { slot, serial }: Grant) -> u64 {
    let [a, b, c, d] = slot.to_ne_bytes();
    let [e, f, g, h] = serial.to_ne_bytes();
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

fn address_prefix(epoch: u32, (address, bits): &(Address, u8)) -> lpm_trie::Key<[u8; ADDRESS_KEY_BYTES]> {
    lpm_trie::Key::new(ADDRESS_EPOCH_BITS + u32::from(*bits), address_key(epoch, address))
}

/// The same prefix, without its epoch.
fn prefix_of(key: &lpm_trie::Key<[u8; ADDRESS_KEY_BYTES]>) -> (Address, u8) {
    let mut octets = [0; 16];
    octets.copy_from_slice(&key.data()[ADDRESS_KEY_BYTES - 16..]);
    (Address::v6(octets), (key.prefix_len() - ADDRESS_EPOCH_BITS) as u8)
}

fn keys<K>(table: &'static str, keys: impl Iterator<Item = Result<K, MapError>>) -> Result<Vec<K>, WriteError> {
    keys.collect::<Result<_, _>>().map_err(|error| WriteError::Map { table, error })
}

fn insert<K: Pod, V: Pod>(
    table: &'static str,
    map: BorrowedFd<'_>,
    entries: impl Iterator<Item = (K, V)>,
) -> Result<usize, WriteError> {
    let (mut keys, mut values) = (Vec::with_capacity(BATCH), Vec::with_capacity(BATCH));
    let mut total = 0;
    let mut flush = |keys: &mut Vec<K>, values: &mut Vec<V>| {
        bpf::update_batch(map, keys, values).map_err(|(_, error)| WriteError::Write { table, error })?;
        total += keys.len();
        keys.clear();
        values.clear();
        Ok(())
    };
    for (key, value) in entries {
        keys.push(key);
        values.push(value);
        if keys.len() == BATCH {
            flush(&mut keys, &mut values)?;
        }
    }
    flush(&mut keys, &mut values)?;
    Ok(total)
}

fn delete<K: Pod>(table: &'static str, map: BorrowedFd<'_>, keys: &[K]) -> Result<(), WriteError> {
    for chunk in keys.chunks(BATCH) {
        bpf::delete_batch(map, chunk).map_err(|error| WriteError::Write { table, error })?;
    }
    Ok(())
}
