//! Grants as the kernel has them: who holds which, until when, and how much one of them still lets pass.

use crate::address::Address;

/// Whose grant, under which rule.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct GrantKey {
    pub rule: u32,
    /// A local holder's workload; [`super::UNMANAGED`] for a caller that is known by its address.
    pub workload: u32,
    /// A local holder's [`super::IdentityEntry::instance`]; the cookie of the network namespace in which an address means that caller.
    pub scope: u64,
    /// [`Address::UNSPECIFIED`] for a local holder.
    pub address: Address,
}
const _: () = assert!(size_of::<GrantKey>() == 32);

/// The grant of a caller for whom another node vouches, under any rule of a set. However many rules a cell has for such
/// callers, one look-up tells whether one of them lets the caller pass.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct VouchedKey {
    /// From 1. As long as a cell names it, it stands for the same rules.
    pub set: u32,
    /// The caller's.
    pub label: u32,
}
const _: () = assert!(size_of::<VouchedKey>() == 8);

/// A grant, as flows remember it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Grant {
    /// [`NO_SLOT`]: none.
    pub slot: u32,
    pub serial: u32,
}
const _: () = assert!(size_of::<Grant>() == 8);

impl Grant {
    pub const NONE: Self = Self { slot: NO_SLOT, serial: 0 };

    #[inline(always)]
    pub const fn is_some(&self) -> bool {
        self.slot != NO_SLOT
    }

    /// Whether what it lets pass is counted.
    #[inline(always)]
    pub const fn is_permit(&self) -> bool {
        self.serial & PERMIT != 0
    }
}

/// In the serial number of a grant that is a permit: flows tell by it, without a look-up.
pub const PERMIT: u32 = 1 << 31;
/// Permits of one key that a new flow tries in turn.
pub const PERMIT_CHAIN: usize = 4;

/// What a permit may let pass, and what it has. By its slot.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Permit {
    /// Connections, and exchanges without one. The kernel's.
    pub begun: u64,
    /// Of IP packets that its holder's sockets sent and received. The kernel's.
    pub bytes: u64,
    /// `u64::MAX`: any number.
    pub most_bytes: u64,
    pub most_begun: u32,
    /// Of the grant that it is about.
    pub serial: u32,
    /// Another permit of the same key, for when this one is used up.
    pub next: Grant,
}
const _: () = assert!(size_of::<Permit>() == 40);

/// The slot that no grant has.
pub const NO_SLOT: u32 = 0;

/// What a grant is worth now. Ending it is one store of 0 to `until`; renewing it, one of a later time.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Slot {
    /// End, in ns of the coarse monotonic clock. 0: it ended.
    pub until: u64,
    /// Number of the grant that has the slot now: who remembers another one has none.
    pub serial: u32,
    /// Under which it was given.
    pub rule: u32,
}
const _: () = assert!(size_of::<Slot>() == 16);

impl Slot {
    /// Whether a grant that was given this slot lives.
    #[inline(always)]
    pub const fn is_alive(&self, serial: u32, now: u64) -> bool {
        self.serial == serial && now < self.until
    }
}
