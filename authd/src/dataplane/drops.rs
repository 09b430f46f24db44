//! What interfaces dropped, taken out of the kernel's counters without missing a packet.
//!
//! Leaves: sums by source, port and reason. A flood from sources without number is counted by reason where the table is full,
//! and told of by port where there are too many to name.

use std::collections::{BTreeMap, BTreeSet};

use authd_common::{
    address::Address,
    reason::REASON_SLOTS,
    tables::{DropKey, Dropped, nic},
};
use aya::maps::PerCpuValues;

use super::{
    object::Maps,
    writer::{WriteError, Writer},
};

/// Sources that are named each time, those of the most packets.
const NAMED: usize = 64;

/// What packets that an interface dropped have in common; what is not known, or not the same, is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DropKind {
    /// Source and destination.
    pub ends: Option<(Address, Address)>,
    /// Of those that are counted together.
    pub sources: Option<u64>,
    /// With its protocol.
    pub port: Option<(u8, u16)>,
    pub reason: u16,
}

/// Packets that interfaces dropped.
#[derive(Clone, Debug, Default)]
pub struct Drops {
    pub known: Vec<(DropKey, Dropped)>,
    /// By reason code: of sources for which there was no place.
    pub others: Vec<(u16, Dropped)>,
}

impl Drops {
    /// All packets.
    pub fn packets(&self) -> u64 {
        self.known.iter().map(|(_, d)| d.packets).chain(self.others.iter().map(|(_, d)| d.packets)).sum()
    }

    /// As they are to be told.
    pub fn told(mut self) -> Vec<(DropKind, Dropped)> {
        self.known.sort_by_key(|(_, dropped)| std::cmp::Reverse(dropped.packets));
        let mut told = Vec::new();
        let mut crowds: BTreeMap<(u16, (u8, u16)), (u64, Dropped)> = BTreeMap::new();
        for (at, (key, dropped)) in self.known.into_iter().enumerate() {
            let (port, reason) = (key.port(), dropped.reason);
            if at < NAMED {
                let ends = Some((key.source, key.destination));
                told.push((DropKind { ends, sources: None, port: Some(port), reason }, dropped));
            } else {
                let (sources, crowd) = crowds.entry((reason, port)).or_insert((0, Dropped::NONE));
                *sources += 1;
                *crowd = sum([*crowd, dropped].iter());
            }
        }
        told.extend(crowds.into_iter().map(|((reason, port), (sources, dropped))| {
            (DropKind { ends: None, sources: Some(sources), port: Some(port), reason }, dropped)
        }));
        let others = self.others.into_iter();
        told.extend(others.map(|(reason, d)| (DropKind { ends: None, sources: None, port: None, reason }, d)));
        told
    }
}

impl Writer {
    /// Takes what was counted of packets that interfaces dropped, by kind; those without a place of their own by reason.
    pub fn take_drops(&mut self) -> Result<Drops, WriteError> {
        let of = |error| WriteError::Map { table: "drops", error };
        let bank = self.maps.nic.get(nic::BANK as usize) as u32 % nic::BANKS;
        let others = bank * REASON_SLOTS..(bank + 1) * REASON_SLOTS;
        let other = |maps: &Maps, at| maps.other_drops.get(&at, 0).map(|values| sum(values.iter())).map_err(of);
        let mut any = self.maps.drops.keys().next().is_some();
        for at in others.clone() {
            any |= other(&self.maps, at)?.packets != 0;
        }
        if !any {
            return Ok(Drops::default());
        }
        // From here on the kernel counts elsewhere, and after the barrier nobody counts here.
        self.maps.nic.set(nic::BANK as usize, u64::from((bank + 1) % nic::BANKS));
        self.barrier()?;
        let mut drops = Drops::default();
        let mut taken = Vec::new();
        for entry in self.maps.drops.iter() {
            let (key, values) = entry.map_err(of)?;
            if key.bank == bank {
                drops.known.extend(by_reason(&values).into_iter().map(|dropped| (key, dropped)));
                taken.push(key);
            }
        }
        for key in &taken {
            self.maps.drops.remove(key).map_err(of)?;
        }
        for at in others {
            let found = other(&self.maps, at)?;
            if found.packets != 0 {
                drops.others.push(((at % REASON_SLOTS) as u16, found));
                let cpus = self.maps.other_drops.get(&at, 0).map_err(of)?.len();
                let none = PerCpuValues::try_from(vec![Dropped::NONE; cpus])
                    .map_err(|error| WriteError::Write { table: "drops", error })?;
                self.maps.other_drops.set(at, none, 0).map_err(of)?;
            }
        }
        Ok(drops)
    }
}

/// What CPUs counted of one kind. Each remembers the reason of its own first packet, and they may differ.
fn by_reason(cpus: &[Dropped]) -> Vec<Dropped> {
    let reasons: BTreeSet<u16> = cpus.iter().filter(|cpu| cpu.packets != 0).map(|cpu| cpu.reason).collect();
    reasons.into_iter().map(|reason| sum(cpus.iter().filter(|cpu| cpu.reason == reason))).collect()
}

/// All CPUs' packets of one kind; the rest is of the last one.
fn sum<'a>(cpus: impl Iterator<Item = &'a Dropped>) -> Dropped {
    cpus.filter(|cpu| cpu.packets != 0).fold(Dropped::NONE, |sum, cpu| {
        let newer = if cpu.last >= sum.last { *cpu } else { sum };
        let first = if sum.packets == 0 { cpu.first } else { sum.first.min(cpu.first) };
        Dropped { packets: sum.packets + cpu.packets, bytes: sum.bytes + cpu.bytes, first, ..newer }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: Address = Address::v4([192, 0, 2, 1]);

    fn dropped(packets: u64, at: u64) -> Dropped {
        Dropped { reason: 33, packets, bytes: packets * 60, first: at, last: at + 1, ..Dropped::NONE }
    }

    fn key(n: u32, port: u16) -> DropKey {
        DropKey::new(0, 6, Address::v4(n.to_be_bytes()), NODE, port)
    }

    #[test]
    fn a_crowd_of_sources_is_told_together_and_nothing_is_missing() {
        let known = (1..=1000).map(|n| (key(n, 7001 + (n % 2) as u16), dropped(n.into(), 5 + u64::from(n)))).collect();
        let drops = Drops { known, others: vec![(33, dropped(7, 1))] };
        let all = drops.packets();
        let told = drops.told();
        assert_eq!(told.iter().map(|(_, d)| d.packets).sum::<u64>(), all);
        assert_eq!(told.len(), NAMED + 2 + 1);
        assert_eq!(told[0].0.ends, Some((Address::v4(1000_u32.to_be_bytes()), NODE)));
        let crowd = &told[NAMED];
        assert_eq!(crowd.0, DropKind { ends: None, sources: Some(468), port: Some((6, 7001)), reason: 33 });
        assert_eq!((crowd.1.first, crowd.1.last), (5 + 2, 5 + 936 + 1));
        assert_eq!(told[NAMED + 2].0, DropKind { ends: None, sources: None, port: None, reason: 33 });
    }

    #[test]
    fn cpus_that_counted_for_different_reasons_are_not_added_up() {
        let other = |packets| Dropped { reason: 52, ..dropped(packets, 3) };
        let found = by_reason(&[dropped(2, 9), other(5), Dropped::NONE, dropped(3, 4), other(1)]);
        let told: Vec<(u16, u64)> = found.iter().map(|d| (d.reason, d.packets)).collect();
        assert_eq!(told, [(33, 5), (52, 6)]);
        assert_eq!(by_reason(&[Dropped::NONE; 2]), []);
    }

    #[test]
    fn the_cpus_that_counted_nothing_say_nothing_of_times() {
        let sum = sum([Dropped::NONE, dropped(2, 9), Dropped::NONE, dropped(3, 4)].iter());
        assert_eq!((sum.packets, sum.bytes, sum.first, sum.last), (5, 300, 4, 10));
    }
}
