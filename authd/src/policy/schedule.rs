//! When a rule holds: weekdays and hours in a time zone.

use jiff::{Span, Timestamp, ToSpan, civil, tz::TimeZone};

/// A weekly schedule.
#[derive(Clone, PartialEq, Debug)]
pub struct Schedule {
    /// Monday first.
    days: [bool; 7],
    /// Minutes of the day. An end that is not after the start lies on the next day.
    start: u16,
    end: u16,
    zone: TimeZone,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ScheduleError {
    #[error("`{0}` is no day: use mon, tue, wed, thu, fri, sat, sun, or a range such as mon-fri")]
    Day(String),
    #[error("`{0}` is no range of hours: use HH:MM-HH:MM, such as 08:00-18:00 or 22:00-06:00")]
    Hours(String),
    #[error("`{0}` is no time zone: use an IANA name, such as Europe/Berlin")]
    Zone(String),
}

const NAMES: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
const DAY: u16 = 24 * 60;

/// `mon`, or `mon-fri`; a range may pass Sunday.
pub fn parse_days(text: &str) -> Result<[bool; 7], ScheduleError> {
    let index = |name: &str| NAMES.iter().position(|n| *n == name).ok_or_else(|| ScheduleError::Day(text.to_owned()));
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (index(first)?, index(last)?),
        None => (index(text)?, index(text)?),
    };
    let mut days = [false; 7];
    let mut at = first;
    loop {
        days[at] = true;
        if at == last {
            return Ok(days);
        }
        at = (at + 1) % 7;
    }
}

/// `08:00-18:00`, in minutes of the day. `24:00` is the end of the day.
pub fn parse_hours(text: &str) -> Result<(u16, u16), ScheduleError> {
    let wrong = || ScheduleError::Hours(text.to_owned());
    let minute = |part: &str| -> Option<u16> {
        let (hours, minutes) = part.split_once(':')?;
        if [hours, minutes].iter().any(|p| p.len() != 2 || !p.bytes().all(|b| b.is_ascii_digit())) {
            return None;
        }
        let (hours, minutes): (u16, u16) = (hours.parse().ok()?, minutes.parse().ok()?);
        let total = hours * 60 + minutes;
        (minutes < 60 && total <= DAY).then_some(total)
    };
    let (start, end) = text.split_once('-').ok_or_else(wrong)?;
    let (start, end) = (minute(start).ok_or_else(wrong)?, minute(end).ok_or_else(wrong)?);
    if start == end || start == DAY { Err(wrong()) } else { Ok((start, end)) }
}

pub fn parse_zone(text: &str) -> Result<TimeZone, ScheduleError> {
    TimeZone::get(text).map_err(|_| ScheduleError::Zone(text.to_owned()))
}

impl Schedule {
    pub fn new(days: [bool; 7], (start, end): (u16, u16), zone: TimeZone) -> Self {
        Self { days, start, end, zone }
    }

    pub fn contains(&self, at: Timestamp) -> bool {
        let local = at.to_zoned(self.zone.clone()).datetime();
        let minute = local.hour() as u16 * 60 + local.minute() as u16;
        let today = local.weekday().to_monday_zero_offset() as usize;
        if self.start < self.end {
            return self.days[today] && (self.start..self.end).contains(&minute);
        }
        let yesterday = (today + 6) % 7;
        (self.days[today] && minute >= self.start) || (self.days[yesterday] && minute < self.end)
    }

    /// The next instant at which `contains` changes, if it ever does.
    pub fn next_change(&self, after: Timestamp) -> Option<Timestamp> {
        let now = self.contains(after);
        let today = after.to_zoned(self.zone.clone()).date();
        let mut candidates: Vec<Timestamp> = (-1..=8)
            .filter_map(|offset: i64| today.checked_add(Span::new().days(offset)).ok())
            .flat_map(|date| [0, self.start, self.end].map(|minute| self.instant(date, minute)))
            .flatten()
            .filter(|candidate| *candidate > after)
            .collect();
        candidates.sort();
        candidates.into_iter().find(|candidate| self.contains(*candidate) != now)
    }

    fn instant(&self, date: civil::Date, minute: u16) -> Option<Timestamp> {
        let (date, minute) = if minute == DAY { (date.checked_add(1.day()).ok()?, 0) } else { (date, minute) };
        let time = civil::time((minute / 60) as i8, (minute % 60) as i8, 0, 0);
        self.zone.to_timestamp(date.to_datetime(time)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn office() -> Schedule {
        Schedule::new(
            parse_days("mon-fri").unwrap(),
            parse_hours("08:00-18:00").unwrap(),
            parse_zone("Europe/Berlin").unwrap(),
        )
    }

    #[test]
    fn office_hours_are_in_their_own_zone() {
        // 2026-11-23 is a Monday; Berlin is one hour ahead of UTC then.
        assert!(!office().contains(at("2026-11-23T06:59:59Z")));
        assert!(office().contains(at("2026-11-23T07:00:00Z")));
        assert!(!office().contains(at("2026-11-23T17:00:00Z")));
        assert!(!office().contains(at("2026-11-22T10:00:00Z")));
    }

    #[test]
    fn the_next_change_skips_the_weekend() {
        assert_eq!(office().next_change(at("2026-11-27T17:00:00Z")), Some(at("2026-11-30T07:00:00Z")));
        assert_eq!(office().next_change(at("2026-11-23T12:00:00Z")), Some(at("2026-11-23T17:00:00Z")));
    }

    #[test]
    fn a_night_shift_belongs_to_the_day_on_which_it_starts() {
        let night = Schedule::new(parse_days("fri").unwrap(), parse_hours("22:00-06:00").unwrap(), TimeZone::UTC);
        assert!(night.contains(at("2026-11-28T05:59:00Z")));
        assert!(!night.contains(at("2026-11-27T05:59:00Z")));
        assert_eq!(night.next_change(at("2026-11-27T23:00:00Z")), Some(at("2026-11-28T06:00:00Z")));
    }

    #[test]
    fn a_change_of_summer_time_moves_the_boundary() {
        // Berlin goes back to winter time on 2026-10-25.
        assert_eq!(office().next_change(at("2026-10-23T16:00:00Z")), Some(at("2026-10-26T07:00:00Z")));
    }

    #[test]
    fn every_day_all_day_never_changes() {
        let always = Schedule::new([true; 7], (0, DAY), TimeZone::UTC);
        assert_eq!(always.next_change(at("2026-11-23T00:00:00Z")), None);
    }
}
