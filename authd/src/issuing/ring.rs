//! The keys by which this node signs: one that does, those that did, and the next one, which is published before it is used.
//!
//! Enters: keys that were kept, the time, an operator's wish. Leaves: what has to be kept from now on, and public keys. Never: a
//! key in use that is not kept, or one that vanishes while a token that it signed may live.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::proofs::issuer::{KeyError, SigningKey};

/// No token lives longer.
pub const LONGEST_TTL: Duration = Duration::from_secs(3_600);
/// How long before its time a key is published, so that whoever keeps the set for a day has it then.
const AHEAD: SignedDuration = SignedDuration::from_hours(24);
/// How long after its last token: clocks of those who verify differ.
const AFTER: SignedDuration = SignedDuration::from_mins(5);

/// A key, as it is kept.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    pub kid: String,
    /// RFC 5208.
    pub pkcs8: Vec<u8>,
    pub signs_from: Timestamp,
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kept").field("kid", &self.kid).field("signs_from", &self.signs_from).finish_non_exhaustive()
    }
}

/// What has to be on disk before the ring is the next one.
#[derive(Default, Debug, PartialEq, Eq)]
pub struct Changes {
    pub kept: Vec<Kept>,
    pub removed: Vec<String>,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty() && self.removed.is_empty()
    }
}

pub struct Ring {
    /// The oldest first.
    keys: Vec<(Kept, SigningKey)>,
    every: SignedDuration,
}

impl Ring {
    /// `every`: for how long a key signs.
    pub fn new(mut kept: Vec<Kept>, every: Duration) -> Result<Self, KeyError> {
        kept.sort_by_key(|key| key.signs_from);
        let keys = kept.into_iter().map(|kept| SigningKey::from_pkcs8(&kept.pkcs8).map(|key| (kept, key)));
        let every = SignedDuration::try_from(every).unwrap_or(SignedDuration::MAX);
        Ok(Self { keys: keys.collect::<Result<_, _>>()?, every })
    }

    /// What is due now.
    pub fn due(&self, now: Timestamp) -> Result<Changes, KeyError> {
        let mut changes = Changes::default();
        match self.keys.last() {
            None => changes.kept.push(made(now)?),
            // All sign from a time that is yet to come: the clock was ahead when they were made. Those of a time that is far away
            // would keep others from being made until then.
            Some(_) if self.signing(now).is_none() => {
                changes.kept.push(made(now)?);
                let soon = now.checked_add(AHEAD).unwrap_or(Timestamp::MAX);
                let far = self.keys.iter().filter(|(key, _)| key.signs_from > soon);
                changes.removed.extend(far.map(|(key, _)| key.kid.clone()));
            }
            Some((last, _)) => {
                let next = last.signs_from.checked_add(self.every).unwrap_or(Timestamp::MAX);
                let ahead = AHEAD.min(self.every / 2);
                // After a long sleep it is late for publishing ahead.
                if next.checked_sub(ahead).is_ok_and(|from| from <= now) {
                    changes.kept.push(made(next.max(now))?);
                }
            }
        }
        let ends = self.keys.iter().zip(self.keys.iter().skip(1));
        let over = ends.filter(|(_, (next, _))| {
            let used = SignedDuration::try_from(LONGEST_TTL).unwrap_or(SignedDuration::MAX);
            next.signs_from.checked_add(used + AFTER).is_ok_and(|end| end <= now)
        });
        changes.removed.extend(over.map(|((key, _), _)| key.kid.clone()));
        Ok(changes)
    }

    /// Another key signs from now on; a next one that waits does not come.
    pub fn rotated(&self, now: Timestamp) -> Result<Changes, KeyError> {
        let waiting = self.keys.iter().filter(|(key, _)| key.signs_from > now).map(|(key, _)| key.kid.clone());
        Ok(Changes { kept: vec![made(now)?], removed: waiting.collect() })
    }

    /// One key is gone at once. There is another one that signs, if this one did.
    pub fn without(&self, kid: &str, now: Timestamp) -> Result<Changes, KeyError> {
        if !self.keys.iter().any(|(key, _)| key.kid == kid) {
            return Ok(Changes::default());
        }
        let signs = self.signing(now).is_none_or(|key| key.kid() == kid);
        let mut changes = if signs { self.rotated(now)? } else { Changes::default() };
        if !changes.removed.iter().any(|removed| removed == kid) {
            changes.removed.push(kid.to_owned());
        }
        Ok(changes)
    }

    /// Takes changes up that are on disk.
    pub fn follow(&mut self, changes: Changes) -> Result<(), KeyError> {
        self.keys.retain(|(key, _)| !changes.removed.contains(&key.kid));
        for kept in changes.kept {
            let key = SigningKey::from_pkcs8(&kept.pkcs8)?;
            self.keys.push((kept, key));
        }
        self.keys.sort_by_key(|(key, _)| key.signs_from);
        Ok(())
    }

    /// The key that signs now.
    pub fn signing(&self, now: Timestamp) -> Option<&SigningKey> {
        self.keys.iter().rev().find(|(kept, _)| kept.signs_from <= now).map(|(_, key)| key)
    }

    /// All keys by which a token may be signed that lives, and the next one (RFC 7517).
    pub fn public(&self) -> Vec<Map<String, Value>> {
        self.keys.iter().map(|(_, key)| key.public().clone()).collect()
    }

    /// Names and times, the oldest first.
    pub fn list(&self) -> impl Iterator<Item = (&str, Timestamp)> {
        self.keys.iter().map(|(kept, _)| (kept.kid.as_str(), kept.signs_from))
    }
}

fn made(signs_from: Timestamp) -> Result<Kept, KeyError> {
    let pkcs8 = SigningKey::generate()?;
    let kid = SigningKey::from_pkcs8(&pkcs8)?.kid().to_owned();
    Ok(Kept { kid, pkcs8, signs_from })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    fn at(hours: i64) -> Timestamp {
        "2026-11-01T00:00:00Z".parse::<Timestamp>().unwrap() + SignedDuration::from_hours(hours)
    }

    fn turn(ring: &mut Ring, now: Timestamp) -> (usize, usize) {
        let changes = ring.due(now).unwrap();
        let sizes = (changes.kept.len(), changes.removed.len());
        ring.follow(changes).unwrap();
        sizes
    }

    fn kids(ring: &Ring) -> Vec<String> {
        ring.list().map(|(kid, _)| kid.to_owned()).collect()
    }

    #[test]
    fn a_key_is_published_before_it_signs_and_for_as_long_as_its_tokens_live() {
        let mut ring = Ring::new(Vec::new(), DAY * 10).unwrap();
        assert!(ring.signing(at(0)).is_none());
        assert_eq!(turn(&mut ring, at(0)), (1, 0));
        let first = kids(&ring)[0].clone();
        for hour in 0..9 * 24 {
            assert_eq!(turn(&mut ring, at(hour)), (0, 0), "{hour}");
        }
        assert_eq!(turn(&mut ring, at(9 * 24)), (1, 0));
        let second = kids(&ring)[1].clone();
        assert_eq!(ring.public().len(), 2);
        for hour in 9 * 24..10 * 24 {
            assert_eq!(turn(&mut ring, at(hour)), (0, 0));
            assert_eq!(ring.signing(at(hour)).unwrap().kid(), first);
        }
        assert_eq!(ring.signing(at(10 * 24)).unwrap().kid(), second);
        // A token that was signed in the last second lives for an hour.
        let last = at(10 * 24 + 1) + SignedDuration::from_mins(5);
        assert_eq!(turn(&mut ring, last - SignedDuration::from_secs(1)), (0, 0));
        assert_eq!(turn(&mut ring, last), (0, 1));
        assert_eq!(kids(&ring), [second]);
    }

    #[test]
    fn a_clock_that_was_ahead_leaves_a_node_that_signs_and_changes_its_keys() {
        let mut ring = Ring::new(Vec::new(), DAY * 10).unwrap();
        turn(&mut ring, at(30_000));
        // Set right: the key of that time is nobody's.
        assert_eq!(turn(&mut ring, at(0)), (1, 1));
        assert!(ring.signing(at(0)).is_some());
        assert_eq!((turn(&mut ring, at(1)), turn(&mut ring, at(9 * 24))), ((0, 0), (1, 0)));
        // A step back of a moment: the key of that moment goes on when it comes.
        let mut ring = Ring::new(Vec::new(), DAY * 10).unwrap();
        turn(&mut ring, at(1));
        let first = kids(&ring)[0].clone();
        assert_eq!(turn(&mut ring, at(0)), (1, 0));
        assert_ne!(ring.signing(at(0)).unwrap().kid(), first);
        assert_eq!(ring.signing(at(1)).unwrap().kid(), first);
    }

    #[test]
    fn a_node_that_slept_has_a_new_key_at_once() {
        let mut ring = Ring::new(Vec::new(), DAY).unwrap();
        turn(&mut ring, at(0));
        let first = kids(&ring)[0].clone();
        assert_eq!(turn(&mut ring, at(1000)), (1, 0));
        assert_ne!(ring.signing(at(1000)).unwrap().kid(), first);
        assert_eq!(turn(&mut ring, at(1002)), (0, 1));
    }

    #[test]
    fn a_key_that_is_revoked_is_gone_and_another_one_signs() {
        let mut ring = Ring::new(Vec::new(), DAY * 10).unwrap();
        turn(&mut ring, at(0));
        turn(&mut ring, at(9 * 24));
        let [first, second] = kids(&ring).try_into().unwrap();
        // The one that signs: not even the one that waits comes.
        let changes = ring.without(&first, at(9 * 24)).unwrap();
        assert_eq!(changes.removed, [second.clone(), first.clone()]);
        ring.follow(changes).unwrap();
        let third = kids(&ring).pop().unwrap();
        assert_eq!((kids(&ring).len(), ring.signing(at(9 * 24)).unwrap().kid()), (1, third.as_str()));
        assert!(ring.without(&first, at(9 * 24)).unwrap().is_empty());
        // One that signed before.
        ring.follow(ring.rotated(at(9 * 24 + 1)).unwrap()).unwrap();
        let changes = ring.without(&third, at(9 * 24 + 2)).unwrap();
        assert_eq!((changes.kept.len(), changes.removed), (0, vec![third]));
    }

    #[test]
    fn what_is_kept_is_taken_up() {
        let mut ring = Ring::new(Vec::new(), DAY).unwrap();
        let changes = ring.due(at(0)).unwrap();
        let kept = changes.kept.clone();
        ring.follow(changes).unwrap();
        let again = Ring::new(kept.clone(), DAY).unwrap();
        assert_eq!((kids(&again), again.public()), (kids(&ring), ring.public()));
        let broken = Kept { pkcs8: b"x".to_vec(), ..kept[0].clone() };
        assert_eq!(Ring::new(vec![broken], DAY).err(), Some(KeyError::Rejected));
    }
}
