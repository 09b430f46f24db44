//! How often something may happen: a token bucket in one number.
//!
//! Enters: a limit, and the time of each attempt. Leaves: whether it is within the limit. Never: a clock of its own.

use std::{fmt, num::NonZeroU32, str::FromStr};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

const MINUTE: SignedDuration = SignedDuration::from_mins(1);
const MAX_PER_MINUTE: u32 = 1_000_000;

/// So many in a minute, all of them at once if they were not used before.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rate {
    per_minute: NonZeroU32,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` is no rate: write 60/min, from 1/min to 1000000/min")]
pub struct RateError(String);

/// The bucket of one key. It holds the moment at which it will be full again (the "theoretical arrival time" of GCRA), so that
/// nothing has to fill it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Bucket {
    full_at: Option<Timestamp>,
}

impl Bucket {
    /// Takes one token, if there is one. An attempt that is refused costs nothing.
    pub fn take(&mut self, now: Timestamp, rate: Rate) -> bool {
        self.take_of(now, rate, rate.burst())
    }

    /// The same of a bucket that never holds more than so many.
    pub fn take_of(&mut self, now: Timestamp, rate: Rate, most: i32) -> bool {
        let cost = rate.interval();
        // A minute fills every bucket. What is further ahead is what a clock that was set back left.
        let full_in = self.full_at.map_or(SignedDuration::ZERO, |at| at.duration_since(now));
        let full_in = full_in.clamp(SignedDuration::ZERO, MINUTE);
        let taken = full_in + cost;
        // The burst is counted in intervals: a minute that does not divide evenly is rounded down.
        let has_token = taken <= cost * most.min(rate.burst());
        self.full_at = now.checked_add(if has_token { taken } else { full_in }).ok();
        has_token
    }
}

impl Rate {
    pub fn per_minute(count: u32) -> Option<Self> {
        NonZeroU32::new(count).filter(|count| count.get() <= MAX_PER_MINUTE).map(|per_minute| Self { per_minute })
    }

    fn interval(self) -> SignedDuration {
        MINUTE / self.burst()
    }

    fn burst(self) -> i32 {
        i32::try_from(self.per_minute.get()).unwrap_or(i32::MAX)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/min", self.per_minute)
    }
}

impl FromStr for Rate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Self, RateError> {
        let count = text.strip_suffix("/min").filter(|count| count.bytes().all(|b| b.is_ascii_digit()));
        count.and_then(|count| count.parse().ok()).and_then(Self::per_minute).ok_or_else(|| RateError(text.to_owned()))
    }
}

impl TryFrom<String> for Rate {
    type Error = RateError;

    fn try_from(text: String) -> Result<Self, RateError> {
        text.parse()
    }
}

impl From<Rate> for String {
    fn from(rate: Rate) -> Self {
        rate.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(milliseconds: i64) -> Timestamp {
        Timestamp::from_millisecond(1_800_000_000_000 + milliseconds).unwrap()
    }

    fn rate(text: &str) -> Rate {
        text.parse().unwrap()
    }

    #[test]
    fn a_full_bucket_gives_its_minute_at_once_and_then_fills_evenly() {
        let (mut bucket, rate) = (Bucket::default(), rate("60/min"));
        assert_eq!((0..100).filter(|_| bucket.take(at(0), rate)).count(), 60);
        assert!(!bucket.take(at(999), rate));
        assert!(bucket.take(at(1000), rate));
        assert!(!bucket.take(at(1001), rate));
        assert_eq!((0..100).filter(|_| bucket.take(at(600_000), rate)).count(), 60);
    }

    #[test]
    fn a_small_bucket_gives_what_it_holds_and_fills_as_fast() {
        let (mut bucket, rate) = (Bucket::default(), rate("6000/min"));
        assert_eq!((0..6000).filter(|_| bucket.take_of(at(0), rate, 200)).count(), 200);
        assert_eq!((0..6000).filter(|_| bucket.take_of(at(1000), rate, 200)).count(), 100);
        assert_eq!((0..6000).filter(|_| bucket.take_of(at(600_000), rate, 200)).count(), 200);
        let even = (0..6000).filter(|n| bucket.take_of(at(700_000 + n * 10), rate, 200)).count();
        assert_eq!(even, 6000);
        let mut bucket = Bucket::default();
        let small = self::rate("2/min");
        assert_eq!((0..100).filter(|_| bucket.take_of(at(0), small, 200)).count(), 2, "never more than a minute's");
    }

    #[test]
    fn refused_attempts_do_not_push_the_next_one_away() {
        let (mut bucket, rate) = (Bucket::default(), rate("1/min"));
        assert!(bucket.take(at(0), rate));
        assert!((1..60_000).step_by(100).all(|t| !bucket.take(at(t), rate)));
        assert!(bucket.take(at(60_000), rate));
    }

    #[test]
    fn a_clock_that_is_set_back_locks_nobody_out_for_longer_than_a_minute() {
        let (mut bucket, rate) = (Bucket::default(), rate("2/min"));
        assert!(bucket.take(at(3_600_000_000), rate) && bucket.take(at(3_600_000_000), rate));
        assert!(!bucket.take(at(0), rate));
        assert!(bucket.take(at(60_000), rate));
    }

    #[test]
    fn what_is_no_rate_is_refused() {
        for text in ["0/min", "60", "60/h", "-1/min", "+1/min", "1000001/min", "/min", "99999999999/min", " 1/min"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
        assert_eq!(rate("60/min").to_string(), "60/min");
    }

    proptest! {
        /// Against the definition: in no window of time are there more than one minute's worth and what came in meanwhile.
        #[test]
        fn no_window_has_more_than_the_limit(per_minute in 1u32..200, gaps in proptest::collection::vec(0i64..3000, 1..300)) {
            let (mut bucket, rate) = (Bucket::default(), Rate::per_minute(per_minute).unwrap());
            let mut now = 0;
            let mut taken = Vec::new();
            for gap in gaps {
                now += gap;
                if bucket.take(at(now), rate) {
                    taken.push(now);
                }
            }
            for (first, from) in taken.iter().enumerate() {
                for (last, to) in taken.iter().enumerate().skip(first) {
                    let allowed = i64::from(per_minute) + (to - from) * i64::from(per_minute) / 60_000 + 1;
                    prop_assert!((last - first + 1) as i64 <= allowed);
                }
            }
        }
    }
}
