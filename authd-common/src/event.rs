//! One record of the ring buffer. Fixed size; its layout belongs to the ABI number.

use crate::{address::Address, tables::Grant};

/// What happened.
pub mod kind {
    /// A flow was let through (or observed) for the first time.
    pub const OPENED: u8 = 1;
    /// A call or a packet was refused. `count` says how many like it since the last such record.
    pub const DENIED: u8 = 2;
    /// An open flow is refused from now on.
    pub const CUT: u8 = 3;
    /// A flow that was cut passes again.
    pub const RESUMED: u8 = 4;
    /// A flow ended; its counters are final.
    pub const CLOSED: u8 = 5;
    /// A connection waits for its proofs.
    pub const HELD: u8 = 6;
    /// An open flow rests on another grant from now on.
    pub const REGRANTED: u8 = 7;
}

pub mod direction {
    pub const OUT: u8 = 1;
    pub const IN: u8 = 2;
}

#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event {
    /// Number on its CPU, from 0, without gaps unless events were lost.
    pub sequence: u64,
    /// ns of the monotonic clock.
    pub time: u64,
    /// cgroup of the workload's end of the flow.
    pub cgroup: u64,
    /// cgroup of the other end, if it is on this node and known.
    pub peer_cgroup: u64,
    /// Socket cookie, 0 if not known.
    pub cookie: u64,
    /// Network namespace cookie, 0 if not known.
    pub netns: u64,
    pub bytes_out: u64,
    pub bytes_in: u64,
    pub packets_out: u64,
    pub packets_in: u64,
    /// ns, of a closed flow.
    pub duration: u64,
    /// How many verdicts this record stands for.
    pub count: u64,
    pub local: Address,
    pub remote: Address,
    /// The task's command, as bytes in memory order.
    pub comm: [u64; 2],
    /// What the verdict rests on.
    pub grant: Grant,
    pub generation: u32,
    pub workload: u32,
    pub peer_workload: u32,
    pub rule: u32,
    pub pid: u32,
    pub uid: u32,
    pub cpu: u32,
    pub local_port: u16,
    pub remote_port: u16,
    pub reason: u16,
    /// [`kind`].
    pub kind: u8,
    /// An [`crate::verdict::Action`] code.
    pub action: u8,
    /// [`direction`].
    pub direction: u8,
    pub protocol: u8,
    /// [`crate::tables::tag_flags`].
    pub flags: u8,
    pub reserved: u8,
}
const _: () = assert!(size_of::<Event>() == 192);
