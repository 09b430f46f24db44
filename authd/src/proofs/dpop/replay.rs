//! Which DPoP proofs were used (RFC 9449, 11.1).
//!
//! Enters: proofs that passed, the time. Leaves: yes, once. Never: a second yes while the proof would still be taken, and
//! never an eviction before that time: who could push an entry out with proofs of their own could replay it. A full
//! memory refuses instead, and no single key can fill it.

use std::collections::{BTreeSet, HashMap, HashSet};

use jiff::Timestamp;

use super::Proof;

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReplayError {
    #[error("the DPoP proof was used before")]
    Replayed,
    #[error("too many DPoP proofs were used with this key within a minute")]
    KeyQuota,
    #[error("too many DPoP proofs were used within a minute to remember more")]
    Full,
}

impl ReplayError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Replayed => "dpop_replayed",
            Self::KeyQuota => "dpop_key_quota",
            Self::Full => "dpop_memory_full",
        }
    }
}

/// A proof: its key, and its `jti`, hashed.
type Id = ([u8; 32], [u8; 32]);

/// The memory of one process.
#[derive(Debug)]
pub struct Replays {
    used: HashSet<Id>,
    /// The same, soonest to be forgotten first.
    by_end: BTreeSet<(Timestamp, Id)>,
    by_key: HashMap<[u8; 32], usize>,
    capacity: usize,
    per_key: usize,
}

impl Replays {
    /// Remembers so many proofs, an eighth of them for any one key.
    pub fn new(capacity: usize) -> Self {
        let (used, by_end, by_key) = Default::default();
        Self { used, by_end, by_key, capacity, per_key: (capacity / 8).max(1) }
    }

    /// Takes a proof that passed everything else, and was not taken before.
    pub fn admit(&mut self, proof: &Proof, now: Timestamp) -> Result<(), ReplayError> {
        self.forget(now);
        let id = (proof.jkt, proof.jti_hash);
        if self.used.contains(&id) {
            return Err(ReplayError::Replayed);
        }
        if self.by_key.get(&proof.jkt).is_some_and(|count| *count >= self.per_key) {
            return Err(ReplayError::KeyQuota);
        }
        if self.used.len() >= self.capacity {
            return Err(ReplayError::Full);
        }
        self.used.insert(id);
        self.by_end.insert((proof.not_after, id));
        *self.by_key.entry(proof.jkt).or_default() += 1;
        Ok(())
    }

    pub fn len(&self) -> usize {
        self.used.len()
    }

    pub fn is_empty(&self) -> bool {
        self.used.is_empty()
    }

    /// Drops what would be refused as too old anyway.
    fn forget(&mut self, now: Timestamp) {
        while let Some((end, id)) = self.by_end.first().copied().filter(|(end, _)| *end <= now) {
            self.by_end.remove(&(end, id));
            self.used.remove(&id);
            if let Some(count) = self.by_key.get_mut(&id.0) {
                *count -= 1;
                if *count == 0 {
                    self.by_key.remove(&id.0);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proofs::testing::at;

    fn proof(key: u8, jti: u8, end: i64) -> Proof {
        Proof { jkt: [key; 32], jti_hash: [jti; 32], not_after: at(end) }
    }

    #[test]
    fn a_proof_is_taken_once_per_key() {
        let mut replays = Replays::new(80);
        assert_eq!(replays.admit(&proof(1, 1, 60), at(0)), Ok(()));
        assert_eq!(replays.admit(&proof(1, 1, 60), at(0)), Err(ReplayError::Replayed));
        assert_eq!(replays.admit(&proof(1, 1, 90), at(59)), Err(ReplayError::Replayed));
        assert_eq!(replays.admit(&proof(2, 1, 60), at(0)), Ok(()));
        assert_eq!(replays.admit(&proof(1, 2, 60), at(0)), Ok(()));
    }

    #[test]
    fn it_is_forgotten_when_it_would_be_too_old_and_not_before() {
        let mut replays = Replays::new(80);
        replays.admit(&proof(1, 1, 60), at(0)).unwrap();
        replays.admit(&proof(1, 2, 90), at(0)).unwrap();
        assert_eq!(replays.admit(&proof(1, 3, 90), at(59)), Ok(()));
        assert_eq!(replays.len(), 3);
        assert_eq!(replays.admit(&proof(1, 4, 90), at(60)), Ok(()));
        assert_eq!(replays.len(), 3);
        replays.admit(&proof(2, 1, 200), at(100)).unwrap();
        assert_eq!((replays.len(), replays.by_end.len(), replays.by_key.len()), (1, 1, 1));
    }

    #[test]
    fn a_full_memory_refuses_and_still_knows_all_it_took() {
        let mut replays = Replays::new(16);
        for key in 0..8 {
            for jti in 0..2 {
                replays.admit(&proof(key, jti, 60), at(0)).unwrap();
            }
            assert_eq!(replays.admit(&proof(key, 2, 60), at(0)), Err(ReplayError::KeyQuota));
        }
        assert_eq!(replays.admit(&proof(9, 0, 60), at(0)), Err(ReplayError::Full));
        for key in 0..8 {
            assert_eq!(replays.admit(&proof(key, 0, 60), at(59)), Err(ReplayError::Replayed));
        }
        assert_eq!(replays.admit(&proof(9, 0, 120), at(60)), Ok(()));
    }
}
