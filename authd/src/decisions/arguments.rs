//! Arguments of a call, as Cedar sees them.
//!
//! Enters: JSON, and the types that the tool declares. Leaves: values of exactly these types, or what does not fit and where.
//! Never: a guess. What has no lossless form is refused.

use std::net::IpAddr;

use cedar_policy::{Context, RestrictedExpression};
use jiff::Timestamp;
use serde_json::{Map, Number, Value};

use super::{ARGUMENTS, scan};
use crate::policy::model::{Argument, ArgumentType, Record};

/// Digits that a floating-point number carries through (C's `DBL_DIG`): with more, another number was written.
const EXACT_DIGITS: usize = 15;
/// Cedar's `decimal` has that many places.
const PLACES: usize = 4;
/// An undeclared name is told so far.
const MAX_TOLD: usize = 64;

/// Which argument does not fit, and why.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}: {problem}", if .path.is_empty() { "the arguments" } else { .path })]
pub struct ArgumentError {
    /// JSON pointer (RFC 6901).
    pub path: String,
    pub problem: Problem,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Problem {
    #[error("is missing")]
    Missing,
    #[error("is no argument of this tool")]
    Undeclared,
    #[error("is {found}, not {expected}")]
    Type { expected: &'static str, found: &'static str },
    #[error("is no whole number from -2^63 to 2^63-1")]
    Long,
    #[error("is no number with up to four decimal places that can be told exactly; write it as a string")]
    Decimal,
    #[error("is no IP address or network; IPv4 is not written as IPv6")]
    Ip,
    #[error("is no RFC 3339 time or date, or finer than a millisecond")]
    Datetime,
    #[error("is no duration such as `1d2h30m`")]
    Duration,
    #[error("are too many values")]
    TooMany,
    #[error("are too long")]
    TooLong,
}

/// The `arguments` of the context. All are looked at; those that are wanted are made.
pub fn read(
    declared: &Record,
    others: bool,
    given: &Map<String, Value>,
    wanted: &scan::Context,
) -> Result<RestrictedExpression, ArgumentError> {
    let mut reader = Reader { path: Vec::new(), values: 0, bytes: 0, wanted, making: true };
    reader.record(declared, others, given).map_err(|problem| ArgumentError { path: reader.pointer(), problem })
}

/// A time as Cedar has it: to the millisecond.
pub fn datetime(time: Timestamp) -> RestrictedExpression {
    RestrictedExpression::new_datetime(format!("{time:.3}"))
}

struct Reader<'a> {
    /// Where the value is that is read now, or that did not fit.
    path: Vec<Step<'a>>,
    values: u32,
    bytes: usize,
    wanted: &'a scan::Context,
    /// Whether the argument that is read now is wanted.
    making: bool,
}

enum Step<'a> {
    Name(&'a str),
    Index(usize),
}

impl<'a> Reader<'a> {
    fn record(
        &mut self,
        declared: &'a Record,
        others: bool,
        given: &'a Map<String, Value>,
    ) -> Result<RestrictedExpression, Problem> {
        let outermost = self.path.is_empty();
        let (mut fields, mut found) = (Vec::with_capacity(declared.0.len()), 0);
        for (name, Argument { kind, optional }) in &declared.0 {
            if outermost {
                self.making = self.wanted.has_argument(name);
            }
            self.path.push(Step::Name(name));
            match given.get(name) {
                Some(value) => {
                    let value = self.value(kind, value)?;
                    found += 1;
                    if self.making {
                        fields.push((name.clone(), value));
                    }
                }
                None if *optional => {}
                None => return Err(Problem::Missing),
            }
            self.path.pop();
        }
        // As many as were found: there are no others.
        if !others
            && found < given.len()
            && let Some(name) = given.keys().find(|name| !declared.0.contains_key(*name))
        {
            self.path.push(Step::Name(name));
            return Err(Problem::Undeclared);
        }
        // Names of a map differ.
        RestrictedExpression::new_record(fields).map_err(|_| Problem::TooMany)
    }

    fn value(&mut self, kind: &'a ArgumentType, value: &'a Value) -> Result<RestrictedExpression, Problem> {
        self.values += 1;
        if self.values > ARGUMENTS.members {
            self.path.clear();
            return Err(Problem::TooMany);
        }
        if let Value::String(text) = value {
            self.bytes += text.len();
            if self.bytes > ARGUMENTS.bytes {
                self.path.clear();
                return Err(Problem::TooLong);
            }
        }
        let wrong = |expected| Err(Problem::Type { expected, found: name_of(value) });
        let made: RestrictedExpression = match (kind, value) {
            (ArgumentType::String, Value::String(text)) => self.made(|| RestrictedExpression::new_string(text.clone())),
            (ArgumentType::String, _) => return wrong("a string"),
            (ArgumentType::Bool, Value::Bool(bool)) => RestrictedExpression::new_bool(*bool),
            (ArgumentType::Bool, _) => return wrong("true or false"),
            (ArgumentType::Long, Value::Number(number)) => {
                RestrictedExpression::new_long(number.as_i64().ok_or(Problem::Long)?)
            }
            (ArgumentType::Long, _) => return wrong("a whole number"),
            (ArgumentType::Decimal, Value::Number(_) | Value::String(_)) => {
                let text = match value {
                    Value::Number(number) => decimal_of(number),
                    text => text.as_str().and_then(decimal),
                };
                let text = text.ok_or(Problem::Decimal)?;
                self.made(|| RestrictedExpression::new_decimal(text))
            }
            (ArgumentType::Decimal, _) => return wrong("a decimal number or a string with one"),
            (ArgumentType::Ip, Value::String(text)) => {
                is_ip(text).then_some(()).ok_or(Problem::Ip)?;
                self.made(|| RestrictedExpression::new_ip(text))
            }
            (ArgumentType::Ip, _) => return wrong("a string with an IP address"),
            (ArgumentType::Datetime, Value::String(text)) => {
                let time = time(text).ok_or(Problem::Datetime)?;
                self.made(|| datetime(time))
            }
            (ArgumentType::Datetime, _) => return wrong("a string with a time"),
            (ArgumentType::Duration, Value::String(text)) => {
                is_duration(text).then_some(()).ok_or(Problem::Duration)?;
                self.made(|| RestrictedExpression::new_duration(text))
            }
            (ArgumentType::Duration, _) => return wrong("a string with a duration"),
            (ArgumentType::Set(element), Value::Array(values)) => {
                let mut elements = Vec::with_capacity(values.len());
                for (index, value) in values.iter().enumerate() {
                    self.path.push(Step::Index(index));
                    elements.push(self.value(element, value)?);
                    self.path.pop();
                }
                self.made(|| RestrictedExpression::new_set(elements))
            }
            (ArgumentType::Set(_), _) => return wrong("a list"),
            (ArgumentType::Record(declared), Value::Object(given)) => self.record(declared, false, given)?,
            (ArgumentType::Record(_), _) => return wrong("an object"),
        };
        Ok(made)
    }

    /// Something in its place that costs nothing, where nobody looks.
    fn made(&self, make: impl FnOnce() -> RestrictedExpression) -> RestrictedExpression {
        if self.making { make() } else { RestrictedExpression::new_bool(false) }
    }

    fn pointer(&self) -> String {
        let step = |step: &Step<'_>| match step {
            Step::Index(index) => format!("/{index}"),
            Step::Name(name) => {
                let told: String = name.chars().take(MAX_TOLD).filter(|c| !c.is_control()).collect();
                format!("/{}", told.replace('~', "~0").replace('/', "~1"))
            }
        };
        self.path.iter().map(step).collect()
    }
}

fn name_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// In the form that Cedar reads, if no digit is lost.
fn decimal(text: &str) -> Option<String> {
    let (whole, places) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole.strip_prefix('-').unwrap_or(whole)) || !digits(places) || places.len() > PLACES {
        return None;
    }
    // Four places and a sign fit into 64 bits.
    format!("{whole}{places:0<4}").parse::<i64>().ok()?;
    Some(format!("{whole}.{places}"))
}

/// The same of a JSON number.
fn decimal_of(number: &Number) -> Option<String> {
    if let Some(whole) = number.as_i64() {
        return decimal(&whole.to_string());
    }
    let text = number.as_f64()?.to_string();
    let digits = text.trim_start_matches(['-', '0', '.']).bytes().filter(u8::is_ascii_digit).count();
    if digits > EXACT_DIGITS { None } else { decimal(&text) }
}

/// What Cedar reads, too; without addresses of which there are two texts that policies would not take for the same.
fn is_ip(text: &str) -> bool {
    let (address, length) = match text.split_once('/') {
        None => (text, None),
        Some((address, length)) => (address, Some(length)),
    };
    let Ok(address) = address.parse::<IpAddr>() else { return false };
    let most = if address.is_ipv4() { 32 } else { 128 };
    let plain = |text: &str| text == "0" || !text.starts_with('0') && text.bytes().all(|b| b.is_ascii_digit());
    let length = length.is_none_or(|length| plain(length) && length.parse::<u8>().is_ok_and(|n| n <= most));
    let hidden = matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() || text.contains('.'));
    length && !hidden
}

/// A date, or a time with its offset (RFC 3339).
fn time(text: &str) -> Option<Timestamp> {
    let shape = |text: &str, shape: &str| {
        text.len() == shape.len()
            && text.bytes().zip(shape.bytes()).all(|(b, s)| if s == b'0' { b.is_ascii_digit() } else { b == s })
    };
    if shape(text, "0000-00-00") {
        return format!("{text}T00:00:00Z").parse().ok();
    }
    let (clock, rest) = text.split_at_checked(19)?;
    let (fraction, offset) = rest.split_at(rest.find(['Z', '+', '-'])?);
    let sound = shape(clock, "0000-00-00T00:00:00")
        // A leap second is the second before for whoever computes with it.
        && !clock.ends_with("60")
        && (offset == "Z" || shape(offset, "+00:00") || shape(offset, "-00:00"))
        && (fraction.is_empty() || fraction.starts_with('.') && shape(&fraction[1..], &"0".repeat(fraction.len() - 1)))
        && fraction != "."
        && fraction.len() <= 10;
    let time: Timestamp = if sound { text.parse().ok()? } else { return None };
    // The year 0: none before it has four digits.
    let is_written = time.as_second() >= -62_167_219_200;
    (is_written && time.subsec_nanosecond() % 1_000_000 == 0).then_some(time)
}

/// Cedar's own form: days, hours, minutes, seconds and milliseconds, each at most once and in this order.
fn is_duration(text: &str) -> bool {
    // The largest unit's count times its milliseconds has to fit as well: Cedar says.
    !text.is_empty() && Context::from_pairs([(String::new(), RestrictedExpression::new_duration(text))]).is_ok()
}
