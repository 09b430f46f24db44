//! From a cgroup to a workload.

use crate::tables::{IdentityEntry, PENDING, Root, Tables, UNMANAGED, identity_flags};

/// Levels of cgroups, counted from the one to which the programs are attached, that are told apart. What lies deeper
/// counts as a child of the last one; a pattern cannot reach deeper either.
pub const MAX_DEPTH: u32 = 12;

/// A cgroup and its ancestors, by depth below the root of cgroup v2.
pub trait Lineage {
    /// The cgroup itself.
    fn own(&self) -> u64;
    /// Its ancestor (or itself) at a depth; 0 below its own depth.
    fn ancestor(&self, level: u32) -> u64;
}

/// Who a process or a socket belongs to.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    pub cgroup: u64,
    /// [`IdentityEntry::instance`].
    pub instance: u64,
    /// A workload's number, [`UNMANAGED`] or [`PENDING`].
    pub workload: u32,
}

impl Identity {
    pub const NOBODY: Self = Self { workload: UNMANAGED, cgroup: 0, instance: 0 };

    #[inline(always)]
    pub const fn is_managed(&self) -> bool {
        self.workload != UNMANAGED
    }
}

/// The deepest entry on the way from the attached cgroup decides; below an open one, a cgroup without an entry of its own
/// is not known yet, and [`PENDING`].
#[inline(always)]
pub fn resolve(tables: &impl Tables, root: &Root, lineage: &impl Lineage) -> Identity {
    let own = lineage.own();
    if let Some(entry) = tables.identity(root, own) {
        return Identity { workload: entry.workload, cgroup: own, instance: entry.instance };
    }
    let mut nearest = IdentityEntry { workload: UNMANAGED, flags: 0, instance: 0 };
    let mut depth = 0;
    while depth < MAX_DEPTH {
        let id = lineage.ancestor(root.base_level + depth);
        // Its own entry was looked for above; nothing lies deeper.
        if id == 0 || id == own {
            break;
        }
        if let Some(entry) = tables.identity(root, id) {
            nearest = entry;
        }
        depth += 1;
    }
    let workload = if nearest.flags & identity_flags::OPEN != 0 { PENDING } else { nearest.workload };
    Identity { workload, cgroup: own, instance: nearest.instance }
}
