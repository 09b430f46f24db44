//! Permits: grants for one action, which let so many flows begin and so many bytes pass.
//!
//! Enters: permits among the other grants, what the kernel has let begin. Leaves: in which order new flows take them. Never: a
//! count; the kernel's is the one that holds.

use std::time::Duration;

use authd_common::tables::{Grant, GrantKey, Permit};
use serde::{Deserialize, Serialize};

use super::{Command, Grants, Id, Live};

/// How long a permit lives whose rule does not say.
pub const DEFAULT_TTL: Duration = Duration::from_secs(30);

/// What one permit lets pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Connections, and exchanges without one.
    pub connections: u32,
    /// Of IP packets, both ways. `None`: any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
}

impl Limits {
    /// As the kernel begins with it.
    pub(super) fn permit(self, grant: Grant) -> Permit {
        Permit {
            begun: 0,
            bytes: 0,
            most_bytes: self.bytes.unwrap_or(u64::MAX),
            most_begun: self.connections,
            serial: grant.serial,
            next: Grant::NONE,
        }
    }
}

/// Whether nothing more begins on it.
pub fn is_used_up(permit: Permit) -> bool {
    permit.begun >= permit.most_begun.into() || permit.bytes >= permit.most_bytes
}

/// Whether nothing begins on it any more, and all that did has ended. A connection that takes from it while others end is told
/// of only when it is established, which may be much later.
pub fn is_over(permit: Permit, ended: u64) -> bool {
    is_used_up(permit) && ended >= permit.begun
}

impl Grants {
    /// A permit has let everything begin that it may: new flows take another one of the same holder.
    pub fn use_up(&mut self, id: &Id) -> Vec<Command> {
        match self.live.get(id) {
            Some(live) if live.given.permit.is_some() && self.used.insert(*id) => self.point(&live.key),
            _ => Vec::new(),
        }
    }

    /// It may let something begin again: a connection that never came to be gave back what it took.
    pub fn give_back(&mut self, id: &Id) -> Vec<Command> {
        match self.live.get(id) {
            Some(live) if self.used.remove(id) => self.point(&live.key),
            _ => Vec::new(),
        }
    }

    /// A flow ended that began on a grant: of permits that live they are counted.
    pub fn flow_ended(&mut self, grant: Grant) {
        if grant.is_permit()
            && let Some(id) = self.at(grant).map(|live| live.given.id)
        {
            *self.ended.entry(id).or_default() += 1;
        }
    }

    /// How many such flows there were.
    pub fn ended_on(&self, id: &Id) -> u64 {
        self.ended.get(id).copied().unwrap_or(0)
    }

    /// Whether it has let everything begin that it may.
    pub fn is_used(&self, id: &Id) -> bool {
        self.used.contains(id)
    }

    /// Behind each permit of a key that is not used up, the next one.
    pub(super) fn chain(&self, key: &GrantKey) -> Vec<Command> {
        let fresh = || self.held(key).filter(|live| live.given.permit.is_some() && !self.used.contains(&live.given.id));
        let next = fresh().skip(1).map(|live| live.grant).chain([Grant::NONE]);
        fresh().zip(next).map(|(live, next): (&Live, _)| Command::Next { slot: live.grant.slot, next }).collect()
    }
}
