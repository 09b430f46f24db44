//! An agent's call of a tool, in one form: the one that is decided about, shown to people, hashed, and passed on.
//!
//! Enters: the arguments as JSON text; who calls what, for whom, under which policy. Leaves: the canonical text of the arguments
//! (RFC 8785), and the hash of the whole call. Never: one hash for two calls that a tool could tell apart.
//!
//! What two texts of the same arguments differ in (white space, the order of members, escapes, `1.0` for `1`) is gone in the
//! canonical text, and whoever passes a call on passes on that text, so that no tool sees it. What would be gone and does make a
//! difference is refused: a name that stands twice, a number that is not kept to its last digit (RFC 8785 keeps what an IEEE 754
//! double does: the integer 2^53 + 1 becomes 2^53), and the zero below zero.

use serde::{Deserialize, Serialize};

use crate::{
    digest::Digest,
    proofs::json::{self, JsonError, Limits, Map, Value},
};

/// Of one call's arguments, as they come and in their canonical text.
pub const LIMITS: Limits = Limits { bytes: 64 << 10, depth: 16, members: 4096 };
/// Nothing else that authd hashes begins so.
const DOMAIN: &[u8] = b"authd call 1\0";

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ArgumentsError {
    #[error(transparent)]
    Json(#[from] JsonError),
    #[error("the number {0} would not be kept to its last digit: send it as a string")]
    Number(String),
}

impl ArgumentsError {
    /// Stable name for answers and records.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Json(error) => error.reason(),
            Self::Number(_) => "json_number_inexact",
        }
    }
}

/// Reads one JSON object in which no name stands twice and every number is exact. Its `arguments` may be a member of it.
pub fn object(bytes: &[u8], limits: Limits) -> Result<Map<String, Value>, ArgumentsError> {
    let map = json::object(bytes, limits)?;
    match numbers(bytes).find(|number| !is_exact(number)) {
        // Somebody has to find it in what he sent; no number that is meant is longer.
        Some(number) => Err(ArgumentsError::Number(number.chars().take(40).collect())),
        None => Ok(map),
    }
}

/// Arguments in canonical form.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Arguments {
    text: String,
    map: Map<String, Value>,
}

impl Arguments {
    /// Reads the text of one object.
    pub fn read(bytes: &[u8]) -> Result<Self, ArgumentsError> {
        Self::new(&object(bytes, LIMITS)?)
    }

    /// Takes an object that [`object`] read as a part of a larger one.
    pub fn new(map: &Map<String, Value>) -> Result<Self, ArgumentsError> {
        for value in map.values() {
            check(value, LIMITS.depth - 1)?;
        }
        let text = serde_json_canonicalizer::to_string(map).map_err(|_| JsonError::Syntax)?;
        // `1.0` and `1` are one number from here on.
        let map = object(text.as_bytes(), LIMITS)?;
        Ok(Self { text, map })
    }

    /// RFC 8785. What is approved, and what the tool gets.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What [`Arguments::text`] says, and so the same for all texts that have it for their canonical one.
    pub fn map(&self) -> &Map<String, Value> {
        &self.map
    }
}

impl TryFrom<String> for Arguments {
    type Error = ArgumentsError;

    /// What was kept is canonical, or it is not what was kept.
    fn try_from(text: String) -> Result<Self, ArgumentsError> {
        let arguments = Self::read(text.as_bytes())?;
        if arguments.text == text { Ok(arguments) } else { Err(JsonError::Syntax.into()) }
    }
}

impl From<Arguments> for String {
    fn from(arguments: Arguments) -> Self {
        arguments.text
    }
}

/// Whoever calls, as the kernel knows it.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Agent {
    pub workload: String,
    /// Path of the instance's cgroup, below the enforced root.
    pub cgroup: String,
    /// Number of that cgroup: another one may come to have its path. 0 where all instances of a workload are one holder.
    pub instance: u64,
    pub spiffe_id: String,
}

/// For whom it acts: the subject of a verified token, and everybody who hands its authority on (RFC 8693, 4.1).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Delegation {
    /// The `iss` claim, to the letter.
    pub issuer: String,
    pub subject: String,
    /// The present one first.
    pub actors: Vec<Actor>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Actor {
    pub issuer: Option<String>,
    pub subject: String,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// As the policy calls it.
    pub tool: String,
    pub arguments: Arguments,
    pub agent: Agent,
    /// `None`: the agent acts for itself.
    pub delegation: Option<Delegation>,
    /// Of the policy that the call was decided under: what a tool's name stands for is part of it.
    pub policy: Digest,
}

/// SHA-256 of a whole call.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct CallHash(Digest);

impl std::fmt::Display for CallHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl Call {
    pub fn hash(&self) -> CallHash {
        CallHash(Digest::of(&self.encoded()))
    }

    /// Every text behind its length, every list behind its own: no two calls have one encoding.
    fn encoded(&self) -> Vec<u8> {
        let Self { tool, arguments, agent, delegation, policy } = self;
        let Agent { workload, cgroup, instance, spiffe_id } = agent;
        let mut out = Vec::from(DOMAIN);
        for text in [tool.as_str(), arguments.text(), workload, cgroup, spiffe_id] {
            put(&mut out, text);
        }
        out.extend(instance.to_be_bytes());
        out.extend(policy.as_bytes());
        out.push(delegation.is_some().into());
        if let Some(Delegation { issuer, subject, actors }) = delegation {
            put(&mut out, issuer);
            put(&mut out, subject);
            out.extend((actors.len() as u64).to_be_bytes());
            for Actor { issuer, subject } in actors {
                out.push(issuer.is_some().into());
                put(&mut out, issuer.as_deref().unwrap_or_default());
                put(&mut out, subject);
            }
        }
        out
    }
}

fn put(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_be_bytes());
    out.extend(text.as_bytes());
}

/// Whether a value made by others is one that [`object`] could have read.
fn check(value: &Value, depth_left: u32) -> Result<(), ArgumentsError> {
    let deeper = || depth_left.checked_sub(1).ok_or(JsonError::Depth);
    match value {
        Value::Null | Value::Bool(_) | Value::String(_) => Ok(()),
        Value::Number(number) => {
            let written = number.to_string();
            if is_exact(&written) { Ok(()) } else { Err(ArgumentsError::Number(written)) }
        }
        Value::Array(elements) => {
            let deeper = deeper()?;
            elements.iter().try_for_each(|element| check(element, deeper))
        }
        Value::Object(members) => {
            let deeper = deeper()?;
            members.values().try_for_each(|member| check(member, deeper))
        }
    }
}

/// The numbers of a text that is JSON, as they are written.
fn numbers(json: &[u8]) -> impl Iterator<Item = &str> {
    let is_number = |byte: &u8| byte.is_ascii_digit() || b"+-.eE".contains(byte);
    let mut rest = json;
    std::iter::from_fn(move || {
        let mut inside = false;
        while let Some((byte, behind)) = rest.split_first() {
            match byte {
                b'\\' if inside => rest = behind.get(1..).unwrap_or_default(),
                b'"' => {
                    inside = !inside;
                    rest = behind;
                }
                b'-' | b'0'..=b'9' if !inside => {
                    let length = rest.iter().take_while(|byte| is_number(byte)).count();
                    let (number, behind) = rest.split_at(length);
                    rest = behind;
                    return std::str::from_utf8(number).ok();
                }
                _ => rest = behind,
            }
        }
        None
    })
}

/// Whether the canonical spelling of a number is of the number that is written.
fn is_exact(written: &str) -> bool {
    let canonical = written.parse::<f64>().ok().and_then(|double| serde_json_canonicalizer::to_string(&double).ok());
    canonical.is_some_and(|canonical| decimal(&canonical) == decimal(written))
}

/// A JSON number as sign, digits without zeros at either end, and the power of ten of the last one; zero has a sign too. `None` if
/// it is out of all range.
fn decimal(number: &str) -> Option<(bool, String, i64)> {
    let (negative, number) = number.strip_prefix('-').map_or((false, number), |number| (true, number));
    let (mantissa, power) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");
    let digits = digits.trim_start_matches('0');
    let short = digits.trim_end_matches('0');
    if short.is_empty() {
        return Some((negative, String::new(), 0));
    }
    let moved = i64::try_from(digits.len() - short.len()).ok()? - i64::try_from(fraction.len()).ok()?;
    Some((negative, short.to_owned(), power.parse::<i64>().ok()?.checked_add(moved)?))
}

#[cfg(test)]
mod tests;
