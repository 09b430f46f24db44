//! Empties the kernel's ring buffer, and knows exactly what was lost.

use authd_common::{
    event::Event,
    reason::REASON_SLOTS,
    tables::{Counter, Sequence},
};
use aya::maps::{MapData, MapError, PerCpuArray, RingBuf};

use super::object;

/// Takes what the ring holds, at most `limit` events, in the order in which they were reserved.
pub fn drain(ring: &mut RingBuf<MapData>, limit: usize) -> Vec<Event> {
    let mut events = Vec::new();
    while events.len() < limit {
        let Some(item) = ring.next() else { break };
        events.extend(object::event(&item));
    }
    events
}

/// Events made, and events for which there was no room, over all CPUs since the maps exist.
pub fn totals(sequence: &PerCpuArray<MapData, Sequence>) -> Result<Sequence, MapError> {
    let mut sum = Sequence::default();
    for cpu in sequence.get(&0, 0)?.iter() {
        sum.next += cpu.next;
        sum.lost += cpu.lost;
    }
    Ok(sum)
}

/// The sums for each reason code, over all CPUs.
pub fn counters(counters: &PerCpuArray<MapData, Counter>) -> Result<Vec<Counter>, MapError> {
    (0..REASON_SLOTS)
        .map(|code| {
            let mut sum = Counter::default();
            for cpu in counters.get(&code, 0)?.iter() {
                sum.verdicts += cpu.verdicts;
                sum.bytes += cpu.bytes;
            }
            Ok(sum)
        })
        .collect()
}
