//! Counters and events: what the daemon learns of what the programs did.

use authd_common::{
    address::Address,
    event::{Event, direction, kind},
    tables::{Denial, DenialKey, Tag, tag_flags},
    verdict::Verdict,
};
use aya_ebpf::maps::ring_buf::RingBufEntry;

use crate::{maps, raw};

/// A repeated denial is told again after this long, with the number of those that were not told.
const TELL_AGAIN: u64 = 1_000_000_000;
/// The daemon empties the ring on a timer; beyond this fill it is woken (a wake-up costs the packet about 5 us).
const WAKE_AT: u64 = 1 << 20;
const BPF_RB_AVAIL_DATA: u64 = 0;
const BPF_RB_NO_WAKEUP: u64 = 1;
const BPF_RB_FORCE_WAKEUP: u64 = 2;

/// Counts a verdict, and the bytes of the packet that it refused.
#[inline(always)]
pub fn count(reason: u16, bytes: u64) {
    if let Some(counter) = maps::counter(reason) {
        let counter = raw::value(counter);
        raw::add(&mut counter.verdicts, 1);
        raw::add(&mut counter.bytes, bytes);
    }
}

/// An event in its place in the ring, numbered, all other fields still to be written: the ring is not zeroed.
pub struct Draft(RingBufEntry<Event>);

impl Draft {
    /// `None` if the ring is full: the event is counted as lost.
    #[inline(always)]
    pub fn new() -> Option<Self> {
        let sequence = raw::value(maps::sequence()?);
        let number = raw::take_and_add(&mut sequence.next, 1);
        let Some(mut entry) = maps::events().reserve::<Event>(0) else {
            raw::add(&mut sequence.lost, 1);
            return None;
        };
        let event = raw::value(entry.as_mut_ptr());
        event.sequence = number;
        event.cpu = raw::cpu();
        event.time = raw::now();
        event.reserved = 0;
        Some(Self(entry))
    }

    #[inline(always)]
    pub fn event(&mut self) -> &mut Event {
        raw::value(self.0.as_mut_ptr())
    }

    #[inline(always)]
    pub fn submit(self) {
        let waiting = maps::events().query(BPF_RB_AVAIL_DATA);
        self.0.submit(if waiting > WAKE_AT { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP });
    }
}

/// Whose denial it is, and what was asked for. What else the record says comes from `task`.
pub struct Refused {
    pub cgroup: u64,
    pub peer_cgroup: u64,
    pub workload: u32,
    pub peer_workload: u32,
    pub generation: u32,
    pub remote: Address,
    pub local_port: u16,
    pub remote_port: u16,
    pub protocol: u8,
    pub direction: u8,
    /// Of the packet that was refused; 0 for a call.
    pub bytes: u64,
    /// [`authd_common::tables::tag_flags`].
    pub flags: u8,
}

/// Who acts, for the record.
pub enum Task<'a> {
    /// The current task, in a system call.
    Current { cookie: u64, netns: u64 },
    /// As the socket remembers it.
    Tagged { tag: &'a Tag, cookie: u64, local: Address },
}

/// Counts a refusal (or what would have been one) and tells of it, unless the same was told within the last second.
#[inline(always)]
pub fn refused(what: &Refused, verdict: &Verdict, task: &Task) {
    count(verdict.reason.code(), what.bytes);
    let Some(represented) = represented(what, verdict) else { return };
    let Some(mut draft) = Draft::new() else { return };
    let e = draft.event();
    e.cgroup = what.cgroup;
    e.peer_cgroup = what.peer_cgroup;
    e.bytes_out = 0;
    e.bytes_in = 0;
    e.packets_out = 0;
    e.packets_in = 0;
    e.duration = 0;
    e.count = represented;
    e.grant = verdict.grant;
    e.remote = what.remote;
    e.generation = what.generation;
    e.workload = what.workload;
    e.peer_workload = what.peer_workload;
    e.rule = verdict.rule;
    e.local_port = what.local_port;
    e.remote_port = what.remote_port;
    e.reason = verdict.reason.code();
    e.kind = kind::DENIED;
    e.action = verdict.action.code();
    e.direction = what.direction;
    e.protocol = what.protocol;
    e.flags = what.flags;
    match task {
        Task::Current { cookie, netns } => {
            e.cookie = *cookie;
            e.netns = *netns;
            e.local = Address::UNSPECIFIED;
            e.pid = (raw::pid_tgid() >> 32) as u32;
            e.uid = raw::uid_gid() as u32;
            e.comm = [0; 2];
            raw::comm(&mut e.comm);
        }
        Task::Tagged { tag, cookie, local } => {
            e.cookie = *cookie;
            e.netns = tag.netns;
            e.local = *local;
            e.pid = tag.pid;
            e.uid = tag.uid;
            e.comm = tag.comm;
        }
    }
    draft.submit();
}

/// How many denials the next record stands for, or `None` if there is to be none now.
#[inline(always)]
fn represented(what: &Refused, verdict: &Verdict) -> Option<u64> {
    let key = DenialKey {
        cgroup: what.cgroup,
        remote: what.remote,
        port: if what.direction == direction::OUT { what.remote_port } else { what.local_port },
        reason: verdict.reason.code(),
        protocol: what.protocol,
        direction: what.direction,
        action: verdict.action.code(),
        flags: what.flags & tag_flags::VOUCHED,
    };
    let now = raw::now();
    let known = maps::denial(&key).or_else(|| {
        maps::add_denial(&key, &UNTOLD);
        maps::denial(&key)
    });
    // Without a place the next one is told too.
    let Some(denial) = known else { return Some(1) };
    let denial = raw::value(denial);
    // One that was only just made is of no generation yet.
    if now < denial.told + TELL_AGAIN && denial.generation == what.generation {
        raw::add(&mut denial.untold, 1);
        return None;
    }
    let represented = 1 + raw::take(&mut denial.untold);
    denial.told = now;
    denial.generation = what.generation;
    denial.rule = verdict.rule;
    denial.workload = what.workload;
    denial.peer_workload = what.peer_workload;
    Some(represented)
}

/// What a denial is made of before its fields are known: the frames of a program have no room for one.
static UNTOLD: Denial = Denial { told: 0, untold: 0, workload: 0, peer_workload: 0, rule: 0, generation: 0 };
