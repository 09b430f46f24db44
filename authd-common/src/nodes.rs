//! Keys and values of the kernel's tables of what passes between nodes. As in [`crate::tables`], entries are replaced and never
//! overwritten.

/// For whom a node speaks.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Speaker {
    /// End, in ns of the coarse monotonic clock: the node has not named the caller again since.
    pub until: u64,
    /// Number of the node to which the label was given.
    pub node: u32,
    pub reserved: u32,
}
const _: () = assert!(size_of::<Speaker>() == 16);

#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct NodeKeyId {
    pub node: u32,
    /// As the option has it, in the lowest octet.
    pub key_id: u32,
}
const _: () = assert!(size_of::<NodeKeyId>() == 8);

/// What a node authenticates with, in one direction.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct NodeKey {
    pub secret: [u64; 2],
    /// End, in ns of the coarse monotonic clock.
    pub until: u64,
}
const _: () = assert!(size_of::<NodeKey>() == 24);

/// What this node says to another one.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Voice {
    pub secret: [u64; 2],
    /// End, in ns of the coarse monotonic clock: somewhat before the far node's.
    pub until: u64,
    pub key_id: u32,
    /// Under which number the labels of this session are.
    pub bank: u32,
}
const _: () = assert!(size_of::<Voice>() == 32);

/// Which caller has which label at a node.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct LabelKey {
    /// [`crate::tables::IdentityEntry::instance`].
    pub instance: u64,
    pub workload: u32,
    pub node: u32,
    /// The one of [`Voice`]: labels of one session are not said with the key of another.
    pub bank: u32,
    pub reserved: u32,
}
const _: () = assert!(size_of::<LabelKey>() == 24);

/// What is remembered of a SYN that was believed, by its [`crate::syn::syn_key`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Spoken {
    pub label: u32,
    pub key_id: u32,
    /// Not 0: its handshake came to its end. The SYN does not come again by itself.
    pub used: u32,
    pub reserved: u32,
}
const _: () = assert!(size_of::<Spoken>() == 16);
