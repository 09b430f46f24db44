//! JSON from outside, strictly.
//!
//! Enters: bytes. Leaves: one object in which every name stands once, or a reason. Never: recursion or memory without a
//! bound, and no second reading of what another parser could read differently (RFC 8725, 2.6 and 3.2).

use std::{cell::Cell, fmt};

use jiff::Timestamp;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
pub use serde_json::{Map, Value};

/// What one document may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub bytes: usize,
    /// Nested arrays and objects, the outermost included.
    pub depth: u32,
    /// Members and elements of the whole document.
    pub members: u32,
}

/// Of a header, of claims, and of an introspection answer. An `act` chain (RFC 8693, 4.1) is the deepest thing in them.
pub const CLAIMS: Limits = Limits { bytes: 64 << 10, depth: 12, members: 512 };

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum JsonError {
    #[error("the JSON document is too long")]
    Oversize,
    #[error("the JSON document is nested too deeply")]
    Depth,
    #[error("the JSON document has too many members")]
    Members,
    #[error("a name stands twice in one JSON object")]
    DuplicateMember,
    #[error("this is no JSON")]
    Syntax,
    #[error("this is no JSON object")]
    NotObject,
}

impl JsonError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Oversize => "json_oversize",
            Self::Depth => "json_depth",
            Self::Members => "json_members",
            Self::DuplicateMember => "json_duplicate_member",
            Self::Syntax => "json_syntax",
            Self::NotObject => "json_not_object",
        }
    }
}

/// Reads one object. Nothing but white space may follow it.
pub fn object(bytes: &[u8], limits: Limits) -> Result<Map<String, Value>, JsonError> {
    if bytes.len() > limits.bytes {
        return Err(JsonError::Oversize);
    }
    let text = std::str::from_utf8(bytes).map_err(|_| JsonError::Syntax)?;
    let state = State { members_left: Cell::new(limits.members), fault: Cell::new(None) };
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = Strict { state: &state, depth_left: limits.depth }
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value))
        .map_err(|_| state.fault.get().unwrap_or(JsonError::Syntax))?;
    match value {
        Value::Object(map) => Ok(map),
        _ => Err(JsonError::NotObject),
    }
}

/// A NumericDate (RFC 7519, 2): seconds since 1970, perhaps with a fraction. `None` for what is no number, lies before
/// 1970, or is too large to be exact or to be a time.
pub fn numeric_date(value: &Value) -> Option<Timestamp> {
    if let Some(seconds) = value.as_u64() {
        return Timestamp::from_second(i64::try_from(seconds).ok()?).ok();
    }
    // From 2^53 on, a float stands for several integers.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    let seconds = value.as_f64().filter(|seconds| (0.0..EXACT).contains(seconds))?;
    let nanoseconds = (seconds.fract() * 1e9) as i32;
    Timestamp::new(seconds.trunc() as i64, nanoseconds).ok()
}

struct State {
    members_left: Cell<u32>,
    /// Why reading ended, where serde has only a text for it.
    fault: Cell<Option<JsonError>>,
}

impl State {
    fn fail<E: Error>(&self, fault: JsonError) -> E {
        self.fault.set(Some(fault));
        E::custom(fault)
    }

    fn count<E: Error>(&self) -> Result<(), E> {
        let left = self.members_left.get().checked_sub(1).ok_or_else(|| self.fail(JsonError::Members))?;
        self.members_left.set(left);
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct Strict<'a> {
    state: &'a State,
    depth_left: u32,
}

impl Strict<'_> {
    fn deeper<E: Error>(self) -> Result<Self, E> {
        let depth_left = self.depth_left.checked_sub(1).ok_or_else(|| self.state.fail(JsonError::Depth))?;
        Ok(Self { depth_left, ..self })
    }
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut elements = Vec::new();
        while let Some(element) = sequence.next_element_seed(inner)? {
            self.state.count()?;
            elements.push(element);
        }
        Ok(Value::Array(elements))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut members = Map::new();
        while let Some(name) = map.next_key::<String>()? {
            self.state.count()?;
            if members.contains_key(&name) {
                return Err(self.state.fail(JsonError::DuplicateMember));
            }
            members.insert(name, map.next_value_seed(inner)?);
        }
        Ok(Value::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SMALL: Limits = Limits { bytes: 4096, depth: 3, members: 4 };

    fn read(text: &str) -> Result<Map<String, Value>, JsonError> {
        object(text.as_bytes(), SMALL)
    }

    #[test]
    fn values_are_what_they_are_elsewhere() {
        let text = r#"{"a":[1,-2,0.5],"b":{"c":null}}"#;
        let roomy = Limits { members: 9, ..SMALL };
        assert_eq!(
            Value::Object(object(text.as_bytes(), roomy).unwrap()),
            serde_json::from_str::<Value>(text).unwrap()
        );
    }

    #[test]
    fn a_name_that_stands_twice_is_refused_at_every_level() {
        for text in
            [r#"{"a":1,"a":1}"#, r#"{"b":{"a":1,"a":2}}"#, r#"{"b":[{"a":1,"a":2}]}"#, "{\"a\":1,\"\\u0061\":2}"]
        {
            assert_eq!(read(text), Err(JsonError::DuplicateMember), "{text}");
        }
    }

    #[test]
    fn the_limits_are_exact() {
        assert!(read(r#"{"a":[[1]]}"#).is_ok());
        assert_eq!(read(r#"{"a":[[[]]]}"#), Err(JsonError::Depth));
        assert!(read(r#"{"a":1,"b":2,"c":3,"d":4}"#).is_ok());
        assert_eq!(read(r#"{"a":1,"b":2,"c":3,"d":[5]}"#), Err(JsonError::Members));
        let bytes = |n: usize| format!("{{}}{}", " ".repeat(n - 2));
        assert!(read(&bytes(4096)).is_ok());
        assert_eq!(read(&bytes(4097)), Err(JsonError::Oversize));
    }

    #[test]
    fn nesting_without_end_does_not_use_the_stack() {
        let deep = "[".repeat(60_000);
        assert_eq!(object(deep.as_bytes(), CLAIMS), Err(JsonError::Depth));
        let deep = "{\"a\":".repeat(10_000);
        assert_eq!(object(deep.as_bytes(), CLAIMS), Err(JsonError::Depth));
    }

    #[test]
    fn what_is_no_json_is_refused() {
        for text in [
            "",
            "{",
            "{}x",
            "{}{}",
            "{'a':1}",
            "{\"a\":1,}",
            "{\"a\":NaN}",
            "{\"a\":Infinity}",
            "{\"a\":01}",
            "{\"a\":1e999}",
            "{\"a\":\"\\ud800\"}",
            "{\"a\":\"\u{1}\"}",
            "\u{feff}{}",
            "{/**/}",
            "{\"a\" 1}",
        ] {
            assert_eq!(read(text), Err(JsonError::Syntax), "{text}");
        }
        assert_eq!(object(b"{\"a\":\"\xff\"}", SMALL), Err(JsonError::Syntax));
        for text in ["[]", "1", "\"a\"", "null"] {
            assert_eq!(read(text), Err(JsonError::NotObject), "{text}");
        }
    }

    #[test]
    fn only_exact_times_are_times() {
        let date = |text: &str| numeric_date(&serde_json::from_str(text).unwrap());
        let second = |seconds| Some(Timestamp::from_second(seconds).unwrap());
        assert_eq!(date("0"), second(0));
        assert_eq!(date("1764000000"), second(1_764_000_000));
        assert_eq!(date("1.764e9"), second(1_764_000_000));
        assert_eq!(date("1.5"), Some(Timestamp::new(1, 500_000_000).unwrap()));
        for text in [
            "-1",
            "-0.5",
            "253402300800",
            "9223372036854775807",
            "9223372036854775808",
            "18446744073709551616",
            "1e16",
            "1e300",
            "\"1764000000\"",
            "null",
            "true",
            "[1]",
        ] {
            assert_eq!(date(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = object(&bytes, SMALL);
        }

        #[test]
        fn what_it_takes_means_the_same_to_serde_json(text in r#"[\[\]{}:,"ab1.e\-\\u ]{0,40}"#) {
            if let Ok(map) = object(text.as_bytes(), CLAIMS) {
                prop_assert_eq!(Value::Object(map), serde_json::from_str::<Value>(&text).unwrap());
            }
        }
    }
}
