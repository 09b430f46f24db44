//! Grants: who holds which, in which slot of the kernel's table, until when.
//!
//! Enters: grants that were decided, ends that were asked for, the time. Leaves: [`Command`]s for the writer. Never: a
//! decision whether somebody deserves one, clocks, kernel objects.
//!
//! A *slot* is what flows remember. Ending a grant is one store into its slot, which the next packet on every CPU sees. A
//! slot is used again only after a rest, under another serial number, so that no flow of its last holder can take the next
//! one's grant for its own. Several grants may have one key (two callers of one workload, two tokens); the kernel's index
//! then names the one that lives longest, and the next one when that ends. Callers for whom other nodes vouch are found by
//! sets of rules instead: a label's entry in a set names the longest-lived of its grants of any rule there.

pub mod flows;
pub mod permits;
pub mod proof;
pub mod terms;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    fmt,
};

use authd_common::{
    address::Address,
    tables::{Grant, GrantKey, PERMIT, Permit, UNMANAGED, VouchedKey},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use self::{permits::Limits, proof::Shown};
use crate::{policy::image::Sets, proofs::x509::spiffe::SpiffeId};

/// ns that a slot rests. Programs end within microseconds; this is far longer.
const REST: u64 = 1_000_000_000;
/// Grants that one holder may have of one rule at a time.
const PER_KEY: usize = 1024;

/// A grant's name: 128 random bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Id(pub [u8; 16]);

impl Id {
    pub fn random() -> Result<Self, aws_lc_rs::error::Unspecified> {
        let mut bytes = [0; 16];
        aws_lc_rs::rand::fill(&mut bytes)?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a grant's id has 32 hexadecimal digits")]
pub struct IdError;

impl std::str::FromStr for Id {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let plain = text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let number = plain.then(|| u128::from_str_radix(text, 16).ok()).flatten().ok_or(IdError)?;
        Ok(Self(number.to_be_bytes()))
    }
}

impl Serialize for Id {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Who holds a grant.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "holder", rename_all = "snake_case", deny_unknown_fields)]
pub enum Holder {
    /// A workload of this node; `instance` is 0 where all its cgroups hold its grants together.
    Workload { name: String, cgroup: String, instance: u64 },
    /// A caller from elsewhere, by its address: no more than that is known of its packets.
    Address { address: std::net::IpAddr, netns: u64 },
    /// A workload of another node, which vouches for it.
    Vouched { node: String, spiffe_id: SpiffeId, label: u32 },
}

/// A grant, as it was decided.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Given {
    pub id: Id,
    pub rule: String,
    pub holder: Holder,
    pub proofs: Vec<Shown>,
    /// What the rule asked for, when it was given: another rule of the same name is another rule.
    pub terms: u64,
    pub issued: Timestamp,
    /// When it ends, on the clock of people; the kernel's end is computed from it.
    pub until: Timestamp,
    /// What it lets pass, of a permit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub permit: Option<Limits>,
}

/// One that lives.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Live {
    pub given: Given,
    pub key: GrantKey,
    pub grant: Grant,
    /// End, in ns of the coarse monotonic clock.
    pub until: u64,
}

/// What the writer has to do, in this order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Gives a slot to a grant.
    Fill {
        grant: Grant,
        rule: u32,
        until: u64,
    },
    /// Of a slot that comes to a grant next: what that one lets pass.
    Permit {
        slot: u32,
        permit: Permit,
    },
    /// Which permit is taken after the one that has a slot.
    Next {
        slot: u32,
        next: Grant,
    },
    /// A grant ends at another time.
    Extend {
        slot: u32,
        until: u64,
    },
    /// Ends the grant that has a slot.
    Empty {
        slot: u32,
    },
    /// Names the grant that new flows rest on.
    Point {
        key: GrantKey,
        grant: Grant,
    },
    /// There is none any more.
    Unpoint {
        key: GrantKey,
    },
    /// The same of a caller for whom another node vouches.
    Vouch {
        key: VouchedKey,
        grant: Grant,
    },
    Unvouch {
        key: VouchedKey,
    },
}

/// How a grant of a caller for whom another node vouches is known here. The kernel has no entry under this key.
pub fn caller_key(rule: u32, label: u32) -> GrantKey {
    GrantKey { rule, workload: UNMANAGED, scope: label.into(), address: Address::UNSPECIFIED }
}

/// The label, if it is such a key.
fn label_of(key: &GrantKey) -> Option<u32> {
    let is_of_caller = key.workload == UNMANAGED && key.address == Address::UNSPECIFIED;
    is_of_caller.then(|| u32::try_from(key.scope).ok()).flatten()
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GrantError {
    #[error("the table of grants is full ({0}): raise limits.grants in authd.toml")]
    Full(u32),
    #[error("the caller holds {PER_KEY} grants of this rule: let some end")]
    TooMany,
    #[error("the grant would end before it begins")]
    Over,
}

impl GrantError {
    /// Stable name for answers and records.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Full(_) => "grants_full",
            Self::TooMany => "too_many_grants",
            Self::Over => "grant_over",
        }
    }
}

pub struct Grants {
    /// Slots, the one that nobody has included.
    slots: u32,
    serials: Vec<u32>,
    free: VecDeque<u32>,
    /// Slots that rest, and until when.
    resting: VecDeque<(u64, u32)>,
    live: HashMap<Id, Live>,
    by_key: HashMap<GrantKey, BTreeSet<(u64, Id)>>,
    by_end: BTreeSet<(u64, Id)>,
    by_slot: HashMap<u32, Id>,
    /// Permits that have let everything begin that they may.
    used: HashSet<Id>,
    /// Of the flows that began on a live permit, how many have ended, as far as it was told.
    ended: HashMap<Id, u64>,
    /// Rules of which each label has grants, and how many.
    by_label: HashMap<u32, BTreeMap<u32, usize>>,
    /// Sets of rules that the kernel asks for, and the sets of each rule.
    sets: Sets,
    sets_of: HashMap<u32, Vec<u32>>,
}

impl Grants {
    /// `serials` holds the last serial number of each slot, as the kernel's table has them.
    pub fn new(serials: Vec<u32>) -> Self {
        let slots = u32::try_from(serials.len()).unwrap_or(u32::MAX);
        Self {
            slots,
            serials,
            free: (1..slots).collect(),
            resting: VecDeque::new(),
            live: HashMap::new(),
            by_key: HashMap::new(),
            by_end: BTreeSet::new(),
            by_slot: HashMap::new(),
            used: HashSet::new(),
            ended: HashMap::new(),
            by_label: HashMap::new(),
            sets: Sets::new(),
            sets_of: HashMap::new(),
        }
    }

    pub fn len(&self) -> usize {
        self.live.len()
    }

    pub fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// Grants that there may be at one time.
    pub fn capacity(&self) -> u32 {
        self.slots.saturating_sub(1)
    }

    pub fn get(&self, id: &Id) -> Option<&Live> {
        self.live.get(id)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Live> {
        self.live.values()
    }

    /// The grants of a key, the one that lives longest first.
    pub fn held(&self, key: &GrantKey) -> impl Iterator<Item = &Live> {
        let ids = self.by_key.get(key).into_iter().flat_map(|held| held.iter().rev());
        ids.filter_map(|(_, id)| self.live.get(id))
    }

    /// Whose grant a flow remembers, as long as it lives.
    pub fn at(&self, grant: Grant) -> Option<&Live> {
        self.live.get(self.by_slot.get(&grant.slot)?).filter(|live| live.grant == grant)
    }

    /// The next end.
    pub fn next_end(&self) -> Option<u64> {
        self.by_end.first().map(|(until, _)| *until)
    }

    /// Whether one more could be given.
    pub fn has_room(&self, now: u64, key: &GrantKey) -> Result<(), GrantError> {
        if self.by_key.get(key).is_some_and(|held| held.len() >= PER_KEY) {
            return Err(GrantError::TooMany);
        }
        let has_slot = !self.free.is_empty() || self.resting.front().is_some_and(|(rested, _)| *rested <= now);
        if has_slot { Ok(()) } else { Err(GrantError::Full(self.capacity())) }
    }

    /// A new grant that ends at `until`. A full table is the asker's error: nobody loses what he holds.
    pub fn give(&mut self, now: u64, given: Given, key: GrantKey, until: u64) -> Result<Vec<Command>, GrantError> {
        if until <= now {
            return Err(GrantError::Over);
        }
        self.has_room(now, &key)?;
        while self.resting.front().is_some_and(|(rested, _)| *rested <= now) {
            self.free.extend(self.resting.pop_front().map(|(_, slot)| slot));
        }
        let slot = self.free.pop_front().ok_or(GrantError::Full(self.capacity()))?;
        let serial = self.serials.get_mut(slot as usize).ok_or(GrantError::Full(self.slots))?;
        let marked = if given.permit.is_some() { PERMIT } else { 0 };
        *serial = serial.wrapping_add(1) & !PERMIT | marked;
        let grant = Grant { slot, serial: *serial };
        let permit = given.permit.map(|limits| Command::Permit { slot, permit: limits.permit(grant) });
        let mut commands: Vec<Command> = permit.into_iter().collect();
        commands.push(Command::Fill { grant, rule: key.rule, until });
        self.enter(Live { given, key, grant, until });
        commands.extend(self.point(&key));
        Ok(commands)
    }

    /// Lets a live grant end later. Its flows go on with it.
    pub fn extend(&mut self, now: u64, id: &Id, until: u64, wall: Timestamp) -> Vec<Command> {
        let Some(live) = self.live.get_mut(id).filter(|live| now < live.until && live.until < until) else {
            return Vec::new();
        };
        let (before, key, slot) = (live.until, live.key, live.grant.slot);
        live.until = until;
        live.given.until = wall;
        self.by_end.remove(&(before, *id));
        self.by_end.insert((until, *id));
        if let Some(held) = self.by_key.get_mut(&key) {
            held.remove(&(before, *id));
            held.insert((until, *id));
        }
        let mut commands = vec![Command::Extend { slot, until }];
        commands.extend(self.point(&key));
        commands
    }

    /// Takes up a grant that an earlier daemon gave, as the kernel still has it.
    pub fn restore(&mut self, given: Given, key: GrantKey, grant: Grant, until: u64) -> Vec<Command> {
        self.free.retain(|slot| *slot != grant.slot);
        if let Some(serial) = self.serials.get_mut(grant.slot as usize) {
            *serial = grant.serial;
        }
        self.enter(Live { given, key, grant, until });
        self.point(&key)
    }

    /// Ends grants before their time. The slots are emptied first: nothing passes from the first command on.
    pub fn end(&mut self, now: u64, ids: &[Id]) -> (Vec<Live>, Vec<Command>) {
        let ended: Vec<Live> = ids.iter().filter_map(|id| self.leave(now, id)).collect();
        let mut commands: Vec<Command> = ended.iter().map(|live| Command::Empty { slot: live.grant.slot }).collect();
        commands.extend(self.point_again(&ended));
        (ended, commands)
    }

    /// Grants that came to their end. The kernel has let nothing pass on them since.
    pub fn expire(&mut self, now: u64) -> (Vec<Live>, Vec<Command>) {
        let over: Vec<Id> = self.by_end.iter().take_while(|(until, _)| *until <= now).map(|(_, id)| *id).collect();
        let ended: Vec<Live> = over.iter().filter_map(|id| self.leave(now, id)).collect();
        // The end stays in the slot: flows tell by it that the grant expired, and was not revoked.
        let commands = self.point_again(&ended);
        (ended, commands)
    }

    /// What sets need that no cell names yet, before one does.
    pub fn foresee(&self, sets: &Sets) -> Vec<Command> {
        self.entries(sets.iter().filter(|(set, _)| !self.sets.contains_key(set)))
    }

    /// Everybody's entries in some sets.
    fn entries<'a>(&self, sets: impl Iterator<Item = (&'a u32, &'a Vec<u32>)>) -> Vec<Command> {
        let entries = sets.flat_map(|(set, rules)| {
            let lives = self.by_label.keys().filter_map(|label| Some((*label, self.longest(rules, *label)?.grant)));
            lives.map(|(label, grant)| Command::Vouch { key: VouchedKey { set: *set, label }, grant })
        });
        entries.collect()
    }

    /// Takes entries back.
    pub fn undone(commands: &[Command]) -> Vec<Command> {
        let entry = |command: &Command| match command {
            Command::Vouch { key, .. } => Some(Command::Unvouch { key: *key }),
            _ => None,
        };
        commands.iter().filter_map(entry).collect()
    }

    /// Cells name these sets now. What only others needed goes.
    pub fn adopt(&mut self, sets: Sets) -> Vec<Command> {
        let commands = Self::undone(&self.entries(self.sets.iter().filter(|(set, _)| !sets.contains_key(set))));
        self.sets_of.clear();
        for (set, rules) in &sets {
            for rule in rules {
                self.sets_of.entry(*rule).or_default().push(*set);
            }
        }
        self.sets = sets;
        commands
    }

    /// The grant that an entry of the kernel's has to name.
    pub fn vouched(&self, key: &VouchedKey) -> Option<Grant> {
        self.longest(self.sets.get(&key.set)?, key.label).map(|live| live.grant)
    }

    /// Whether flows of a grant may go on under another one of the same holder.
    pub fn is_carried(&self, live: &Live) -> bool {
        let Some(label) = label_of(&live.key) else { return self.by_key.contains_key(&live.key) };
        let mut sets = self.sets_of.get(&live.key.rule).into_iter().flatten();
        sets.any(|set| self.vouched(&VouchedKey { set: *set, label }).is_some())
    }

    fn enter(&mut self, live: Live) {
        let id = live.given.id;
        self.by_key.entry(live.key).or_default().insert((live.until, id));
        self.by_end.insert((live.until, id));
        self.by_slot.insert(live.grant.slot, id);
        if let Some(label) = label_of(&live.key) {
            *self.by_label.entry(label).or_default().entry(live.key.rule).or_default() += 1;
        }
        self.live.insert(id, live);
    }

    fn leave(&mut self, now: u64, id: &Id) -> Option<Live> {
        let live = self.live.remove(id)?;
        self.by_end.remove(&(live.until, *id));
        self.by_slot.remove(&live.grant.slot);
        self.used.remove(id);
        self.ended.remove(id);
        if let Some(held) = self.by_key.get_mut(&live.key) {
            held.remove(&(live.until, *id));
            if held.is_empty() {
                self.by_key.remove(&live.key);
            }
        }
        if let Some(label) = label_of(&live.key) {
            self.leave_label(label, live.key.rule);
        }
        self.resting.push_back((now.saturating_add(REST), live.grant.slot));
        Some(live)
    }

    fn leave_label(&mut self, label: u32, rule: u32) {
        let Some(rules) = self.by_label.get_mut(&label) else { return };
        match rules.get_mut(&rule) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(rules.remove(&rule)),
        }
        if rules.is_empty() {
            self.by_label.remove(&label);
        }
    }

    fn point_again(&self, ended: &[Live]) -> Vec<Command> {
        let mut keys: Vec<GrantKey> = ended.iter().map(|live| live.key).collect();
        keys.dedup();
        keys.iter().flat_map(|key| self.point(key)).collect()
    }

    /// The index entries of a key.
    fn point(&self, key: &GrantKey) -> Vec<Command> {
        if let Some(label) = label_of(key) {
            let sets = self.sets_of.get(&key.rule).into_iter().flatten();
            return sets.map(|set| self.vouch(VouchedKey { set: *set, label })).collect();
        }
        let mut commands = self.chain(key);
        let longest = self.held(key).find(|live| !self.used.contains(&live.given.id)).or(self.held(key).next());
        commands.push(match longest {
            Some(live) => Command::Point { key: *key, grant: live.grant },
            None => Command::Unpoint { key: *key },
        });
        commands
    }

    fn vouch(&self, key: VouchedKey) -> Command {
        let rules = self.sets.get(&key.set).map_or(&[][..], Vec::as_slice);
        match self.longest(rules, key.label) {
            Some(live) => Command::Vouch { key, grant: live.grant },
            None => Command::Unvouch { key },
        }
    }

    /// Of a label's grants under any of some rules the one that lives longest; of several, the first rule's.
    fn longest(&self, rules: &[u32], label: u32) -> Option<&Live> {
        let own = self.by_label.get(&label)?;
        let place = |rule: u32| rules.iter().position(|known| *known == rule).map(|place| (place, rule));
        let mut places: Vec<(usize, u32)> = own.keys().filter_map(|rule| place(*rule)).collect();
        places.sort_unstable();
        let lives = places.into_iter().filter_map(|(_, rule)| self.held(&caller_key(rule, label)).next());
        lives.reduce(|best, live| if live.until > best.until { live } else { best })
    }
}
