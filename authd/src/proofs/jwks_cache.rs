//! One issuer's keys as they are published: when they are fetched, and how long they are believed.
//!
//! Enters: the time, what fetches brought, tokens with unknown keys. Leaves: whether to fetch now, and when to look again.
//! Never: a connection, and never a fetch because somebody sends many tokens.
//!
//! What happens when the endpoint misbehaves:
//! * down, or slow beyond `fetch_timeout`: the set that is there is used until `stale_for` after it should have been
//!   refreshed, then no token of the issuer is taken; fetches are retried with growing pauses, up to `retry_last`;
//! * wrong (no key set, too large, private keys in it): the same; nothing of it is taken;
//! * flapping: each answer counts by itself; a good one ends the pauses;
//! * rotating: the new set replaces the old one whole, so that a key that is no longer published verifies nothing;
//! * a token with an unknown `kid`: one fetch, and not another for `unknown_kid_pause`, whatever comes.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;

use super::{
    claims::after,
    jwk::{JwksError, KeySet},
};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Keys are fetched again after this time, or earlier if the answer's `max-age` says so.
    pub refresh: Duration,
    /// But not earlier than this, whatever the answer says.
    pub refresh_least: Duration,
    /// How long keys are used after they should have been refreshed and could not be.
    pub stale_for: Duration,
    /// A fetch without an answer after this time has failed.
    pub fetch_timeout: Duration,
    /// Pauses after failures: the first one, doubled by each further failure, up to the last.
    pub retry_first: Duration,
    pub retry_last: Duration,
    pub unknown_kid_pause: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        let (second, minute) = (Duration::from_secs(1), Duration::from_secs(60));
        Self {
            refresh: 10 * minute,
            refresh_least: minute,
            // An issuer's outage of an hour is survived; a key that it withdrew lives no longer than that either.
            stale_for: 60 * minute,
            fetch_timeout: 10 * second,
            retry_first: 2 * second,
            retry_last: 5 * minute,
            unknown_kid_pause: 30 * second,
        }
    }
}

/// Tells the answers of fetches apart: one that was given up may still end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Attempt(u64);

#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Time has passed. Also the first input.
    Tick,
    /// A body came, with status 200.
    Fetched { attempt: Attempt, body: &'a [u8], max_age: Option<Duration> },
    /// Nothing came, or something else.
    Failed { attempt: Attempt },
    /// A token names a key that the set does not have.
    UnknownKid,
}

/// What the caller has to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Commands {
    /// Fetch now, and give back what came with this number. Drop an earlier fetch.
    pub fetch: Option<Attempt>,
    /// Come back with [`Input::Tick`] no later than this.
    pub wake_at: Timestamp,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum KeysError {
    #[error("the issuer's keys could not be fetched yet")]
    Unavailable,
    #[error("the issuer's keys could not be refreshed for too long")]
    Stale,
}

impl KeysError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unavailable => "keys_unavailable",
            Self::Stale => "keys_stale",
        }
    }
}

/// The keys of one issuer, and what is under way for them.
#[derive(Debug)]
pub struct JwksCache {
    settings: Settings,
    keys: Option<Held>,
    /// The fetch that is under way, and when it is given up.
    fetching: Option<(Attempt, Timestamp)>,
    next_fetch: Timestamp,
    last_attempt: u64,
    failures: u32,
    last_fault: Option<JwksError>,
    /// Until when no unknown key starts a fetch.
    kid_pause_until: Timestamp,
}

#[derive(Debug)]
struct Held {
    set: Arc<KeySet>,
    usable_until: Timestamp,
}

impl JwksCache {
    /// Fetches with the first input.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            keys: None,
            fetching: None,
            next_fetch: Timestamp::MIN,
            last_attempt: 0,
            failures: 0,
            last_fault: None,
            kid_pause_until: Timestamp::MIN,
        }
    }

    /// `jitter` is random, all 32 bits of it: nodes that lost an issuer together do not come back together.
    pub fn handle(&mut self, now: Timestamp, input: Input<'_>, jitter: u32) -> Commands {
        match input {
            Input::Tick => {}
            Input::Fetched { attempt, body, max_age } if self.is_current(attempt) => match KeySet::parse(body) {
                Ok(set) => self.succeed(now, set, max_age, jitter),
                Err(fault) => self.fail(now, Some(fault), jitter),
            },
            Input::Failed { attempt } if self.is_current(attempt) => self.fail(now, None, jitter),
            Input::Fetched { .. } | Input::Failed { .. } => {}
            // While the endpoint fails, its pauses decide.
            Input::UnknownKid if self.fetching.is_none() && self.failures == 0 && now >= self.kid_pause_until => {
                self.kid_pause_until = after(now, self.settings.unknown_kid_pause);
                self.next_fetch = now;
            }
            Input::UnknownKid => {}
        }
        if self.fetching.is_some_and(|(_, deadline)| now >= deadline) {
            self.fail(now, None, jitter);
        }
        let fetch = (self.fetching.is_none() && now >= self.next_fetch).then(|| {
            self.last_attempt += 1;
            let attempt = Attempt(self.last_attempt);
            self.fetching = Some((attempt, after(now, self.settings.fetch_timeout)));
            attempt
        });
        Commands { fetch, wake_at: self.fetching.map_or(self.next_fetch, |(_, deadline)| deadline) }
    }

    /// The keys to verify with now.
    pub fn keys(&self, now: Timestamp) -> Result<&Arc<KeySet>, KeysError> {
        match &self.keys {
            None => Err(KeysError::Unavailable),
            Some(held) if now >= held.usable_until => Err(KeysError::Stale),
            Some(held) => Ok(&held.set),
        }
    }

    /// Whether a fetch is under way: a token with an unknown key may wait for its end, and is refused otherwise.
    pub fn is_fetching(&self) -> bool {
        self.fetching.is_some()
    }

    /// Failures since the last good answer, and what was wrong with the last bad one, if one came at all.
    pub fn trouble(&self) -> (u32, Option<JwksError>) {
        (self.failures, self.last_fault)
    }

    fn is_current(&self, attempt: Attempt) -> bool {
        self.fetching.is_some_and(|(current, _)| current == attempt)
    }

    fn succeed(&mut self, now: Timestamp, set: KeySet, max_age: Option<Duration>, jitter: u32) {
        let Settings { refresh, refresh_least, stale_for, .. } = self.settings;
        let fresh = max_age.unwrap_or(refresh).min(refresh).max(refresh_least);
        self.keys = Some(Held { set: Arc::new(set), usable_until: after(after(now, fresh), stale_for) });
        self.fetching = None;
        self.failures = 0;
        self.last_fault = None;
        self.next_fetch = after(now, jittered(fresh, jitter));
    }

    fn fail(&mut self, now: Timestamp, fault: Option<JwksError>, jitter: u32) {
        let Settings { retry_first, retry_last, .. } = self.settings;
        let pause = retry_first.saturating_mul(1 << self.failures.min(20)).min(retry_last);
        self.fetching = None;
        self.failures = self.failures.saturating_add(1);
        self.last_fault = fault;
        self.next_fetch = after(now, jittered(pause, jitter));
    }
}

/// Between three quarters of the time and all of it.
fn jittered(time: Duration, jitter: u32) -> Duration {
    time.mul_f64(1.0 - 0.25 * f64::from(jitter) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::proofs::testing::{Signer, at};

    const GOOD: &[u8] =
        br#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo","kid":"a"}]}"#;

    /// A cache, with the fetches that it asked for.
    struct Watched {
        cache: JwksCache,
        fetches: Vec<(i64, Attempt)>,
        wake_at: Timestamp,
    }

    impl Watched {
        fn new() -> Self {
            let (cache, fetches) = (JwksCache::new(Settings::default()), Vec::new());
            Self { cache, fetches, wake_at: at(0) }
        }

        fn input(&mut self, offset: i64, input: Input<'_>) {
            let commands = self.cache.handle(at(offset), input, 0);
            self.fetches.extend(commands.fetch.map(|attempt| (offset, attempt)));
            self.wake_at = commands.wake_at;
        }

        fn attempt(&self) -> Attempt {
            self.fetches.last().unwrap().1
        }

        fn good(&mut self, offset: i64) {
            self.input(offset, Input::Fetched { attempt: self.attempt(), body: GOOD, max_age: None });
        }

        fn fail(&mut self, offset: i64) {
            self.input(offset, Input::Failed { attempt: self.attempt() });
        }

        /// Ticks every second, with every fetch answered at once as the function says.
        fn run(&mut self, seconds: std::ops::Range<i64>, mut answer: impl FnMut(i64) -> Option<&'static [u8]>) {
            for offset in seconds {
                let before = self.fetches.len();
                self.input(offset, Input::Tick);
                if self.fetches.len() > before {
                    let attempt = self.attempt();
                    match answer(offset) {
                        Some(body) => self.input(offset, Input::Fetched { attempt, body, max_age: None }),
                        None => self.input(offset, Input::Failed { attempt }),
                    }
                }
            }
        }

        fn times(&self) -> Vec<i64> {
            self.fetches.iter().map(|(offset, _)| *offset).collect()
        }
    }

    #[test]
    fn keys_are_fetched_at_once_and_again_every_ten_minutes() {
        let mut watched = Watched::new();
        assert_eq!(watched.cache.keys(at(0)).unwrap_err().reason(), "keys_unavailable");
        watched.run(0..1900, |_| Some(GOOD));
        assert_eq!(watched.times(), [0, 600, 1200, 1800]);
        assert_eq!(watched.cache.keys(at(1900)).unwrap().len(), 1);
    }

    #[test]
    fn an_answer_may_ask_for_an_earlier_refresh_but_not_for_a_flood_or_for_eternity() {
        for (max_age, next) in [(Some(120), 120), (Some(0), 60), (Some(u64::MAX), 600), (None, 600)] {
            let mut watched = Watched::new();
            watched.input(0, Input::Tick);
            let attempt = watched.attempt();
            let max_age = max_age.map(Duration::from_secs);
            watched.input(0, Input::Fetched { attempt, body: GOOD, max_age });
            assert_eq!(watched.wake_at, at(next), "{max_age:?}");
        }
    }

    #[test]
    fn when_the_endpoint_is_down_old_keys_serve_for_an_hour_and_retries_slow_down() {
        let mut watched = Watched::new();
        watched.run(0..6000, |offset| (offset == 0).then_some(GOOD));
        assert_eq!(watched.times()[..8], [0, 600, 602, 606, 614, 630, 662, 726]);
        let pauses: Vec<i64> = watched.times().windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert_eq!(pauses.last(), Some(&300));
        assert!(watched.cache.keys(at(4199)).is_ok());
        assert_eq!(watched.cache.keys(at(4200)).unwrap_err().reason(), "keys_stale");
        assert_eq!(watched.cache.trouble(), (watched.fetches.len() as u32 - 1, None));
        watched.run(6000..6301, |_| Some(GOOD));
        assert!(watched.cache.keys(at(6301)).is_ok());
        assert_eq!(watched.cache.trouble(), (0, None));
    }

    #[test]
    fn a_slow_endpoint_has_one_fetch_at_a_time_and_a_late_answer_is_not_taken() {
        let mut watched = Watched::new();
        watched.input(0, Input::Tick);
        let slow = watched.attempt();
        for offset in 0..10 {
            watched.input(offset, Input::Tick);
            watched.input(offset, Input::UnknownKid);
        }
        assert_eq!(watched.times(), [0]);
        assert!(watched.cache.is_fetching());
        watched.input(10, Input::Tick);
        assert!(!watched.cache.is_fetching());
        watched.input(11, Input::Fetched { attempt: slow, body: GOOD, max_age: None });
        assert!(watched.cache.keys(at(11)).is_err());
        watched.input(12, Input::Tick);
        assert_eq!(watched.times(), [0, 12]);
        watched.input(13, Input::Failed { attempt: slow });
        assert!(watched.cache.is_fetching(), "the second fetch goes on");
        watched.good(13);
        assert!(watched.cache.keys(at(13)).is_ok());
    }

    #[test]
    fn a_flapping_endpoint_is_asked_no_more_often_than_a_dead_one() {
        let mut watched = Watched::new();
        let mut answers = 0;
        watched.run(0..3600, |_| {
            answers += 1;
            (answers % 2 == 1).then_some(GOOD)
        });
        assert!(watched.cache.keys(at(3599)).is_ok());
        assert_eq!(watched.times(), [0, 600, 602, 1202, 1204, 1804, 1806, 2406, 2408, 3008, 3010]);
    }

    #[test]
    fn a_wrong_answer_changes_nothing_and_says_what_is_wrong() {
        for (body, reason) in [
            (&b"<html>sorry</html>"[..], "json_syntax"),
            (b"{\"keys\":[]}", "jwks_no_usable_key"),
            (b"{\"keys\":[{\"kty\":\"oct\",\"k\":\"AA\"}]}", "jwks_private_material"),
        ] {
            let mut watched = Watched::new();
            watched.run(0..601, |offset| if offset == 0 { Some(GOOD) } else { Some(body) });
            let (failures, fault) = watched.cache.trouble();
            assert_eq!((failures, fault.map(|fault| fault.reason())), (1, Some(reason)));
            assert!(watched.cache.keys(at(4199)).is_ok());
            assert!(watched.cache.keys(at(4200)).is_err(), "a wrong answer does not make old keys fresh");
        }
        let huge = vec![b' '; 1 << 20];
        let mut watched = Watched::new();
        watched.input(0, Input::Tick);
        let attempt = watched.attempt();
        watched.input(0, Input::Fetched { attempt, body: &huge, max_age: None });
        assert_eq!(watched.cache.trouble().1.unwrap().reason(), "json_oversize");
    }

    #[test]
    fn a_rotation_replaces_the_set_whole() {
        let mut watched = Watched::new();
        watched.input(0, Input::Tick);
        watched.good(0);
        let before = watched.cache.keys(at(0)).unwrap().clone();
        watched.input(600, Input::Tick);
        let attempt = watched.attempt();
        let rotated = Signer::es256("b").jwks();
        watched.input(600, Input::Fetched { attempt, body: &rotated, max_age: None });
        let after = watched.cache.keys(at(600)).unwrap();
        assert_eq!((before.len(), after.len()), (1, 1));
        assert!(!Arc::ptr_eq(&before, after));
    }

    #[test]
    fn unknown_keys_cause_one_fetch_in_thirty_seconds() {
        let mut watched = Watched::new();
        watched.input(0, Input::Tick);
        watched.good(0);
        for offset in 1..=60 {
            for _ in 0..1000 {
                watched.input(offset, Input::UnknownKid);
            }
            if watched.cache.is_fetching() {
                watched.good(offset);
            }
        }
        assert_eq!(watched.times(), [0, 1, 31]);
    }

    #[test]
    fn unknown_keys_do_not_shorten_the_pauses_of_an_endpoint_that_fails() {
        let mut watched = Watched::new();
        watched.input(0, Input::Tick);
        watched.good(0);
        watched.input(100, Input::UnknownKid);
        watched.fail(100);
        for offset in 101..102 {
            watched.input(offset, Input::UnknownKid);
        }
        assert_eq!(watched.times(), [0, 100]);
        watched.input(102, Input::Tick);
        assert_eq!(watched.times(), [0, 100, 102]);
    }

    #[test]
    fn jitter_shortens_a_pause_by_a_quarter_at_most() {
        let pause = Duration::from_secs(400);
        assert_eq!(jittered(pause, 0), pause);
        assert_eq!(jittered(pause, u32::MAX), Duration::from_secs(300));
    }

    proptest! {
        /// Whatever comes in whatever order: one fetch at a time, never two within a second, and a time to come back
        /// that is not in the past.
        #[test]
        fn it_never_floods(steps in proptest::collection::vec((0i64..4, 0u8..5, any::<u32>()), 1..200)) {
            let mut cache = JwksCache::new(Settings::default());
            let (mut now, mut last_fetch, mut current) = (0, None::<i64>, None);
            for (pause, kind, jitter) in steps {
                now += pause;
                let attempt = current.unwrap_or(Attempt(0));
                let input = match kind {
                    0 | 1 => Input::Tick,
                    2 => Input::UnknownKid,
                    3 => Input::Failed { attempt },
                    _ => Input::Fetched { attempt, body: GOOD, max_age: Some(Duration::ZERO) },
                };
                let before = cache.is_fetching();
                let commands = cache.handle(at(now), input, jitter);
                if let Some(attempt) = commands.fetch {
                    prop_assert!(!before || kind >= 3 || last_fetch.is_some_and(|last| now - last >= 10));
                    prop_assert!(last_fetch.is_none_or(|last| now - last >= 1) || kind == 2);
                    last_fetch = Some(now);
                    current = Some(attempt);
                }
                prop_assert!(commands.wake_at > at(now));
            }
        }
    }
}
