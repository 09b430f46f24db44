//! The clocks of one moment, read together.

use jiff::Timestamp;
use nix::time::{ClockId, clock_gettime};

use crate::{audit::record::Clock, policy::compile::Moment};

/// ns of the clock whose coarse form the kernel's programs read.
pub fn monotonic() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}

/// The latest moment that is over for the kernel's programs, too: their coarse clock moves on with the timer's ticks, which are
/// 10 ms apart at most.
pub fn over() -> u64 {
    monotonic().saturating_sub(10_000_000)
}

pub fn moment() -> Moment {
    Moment { wall: Timestamp::now(), monotonic: monotonic() }
}

/// The same moment on the monotonic clock, as the two stand to each other now; at least 1.
pub fn on_monotonic(wall: Timestamp) -> u64 {
    let at = wall.as_nanosecond() - clock().offset;
    u64::try_from(at.max(1)).unwrap_or(u64::MAX)
}

pub fn clock() -> Clock {
    let Moment { wall, monotonic } = moment();
    Clock { offset: wall.as_nanosecond() - i128::from(monotonic) }
}
