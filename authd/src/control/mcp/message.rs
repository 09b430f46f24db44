//! Messages of JSON-RPC 2.0, one at a time.
//!
//! Enters: bytes of an agent or of a server. Leaves: of an agent's message a value in which nothing can be read in two ways,
//! and bytes that are written from it; of a server's one the envelope, and its text. Never: a batch, an agent's original
//! bytes, or a number that is not what it was.
//!
//! The SDK's own types (`rmcp::model`) are not used here, as they leave out what they do not know: of a call its `task`, of a
//! tool its `execution`. A proxy would take newer versions' fields away. A test keeps this reason true.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::{Map, Value, json, value::RawValue};

use crate::proofs::json::{self, JsonError};

/// Of an agent's message. Arguments of tools are not deep; what is deeper is made to break a parser.
const DEPTH: u32 = 64;
const MEMBERS: u32 = 100_000;
/// Of an id that is text.
const ID_BYTES: usize = 256;
/// JSON-RPC 2.0, 5.1, and what MCP adds.
pub const PARSE_ERROR: i32 = -32700;
pub const INVALID_REQUEST: i32 = -32600;
pub const METHOD_NOT_FOUND: i32 = -32601;
pub const INVALID_PARAMS: i32 = -32602;
pub const HEADER_MISMATCH: i32 = -32020;
pub const UNSUPPORTED_VERSION: i32 = -32022;
/// Ours, from the range that is left to implementations (-32000 to -32019).
pub const NOT_ALLOWED: i32 = -32010;
pub const SERVER_UNAVAILABLE: i32 = -32011;
pub const TOO_MUCH: i32 = -32012;

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MessageError {
    #[error(transparent)]
    Json(#[from] JsonError),
    #[error("several messages at once are not taken: send one at a time")]
    Batch,
    #[error("`jsonrpc` is not \"2.0\"")]
    Version,
    #[error("`{0}` is no member of a message")]
    UnknownMember(String),
    #[error("two names of one object differ in the case of letters only: `{0}`")]
    AlikeMembers(String),
    #[error("a number is too large to be read alike by everybody")]
    ImpreciseNumber,
    #[error("an id is a whole number, or a text of at most {ID_BYTES} bytes")]
    Id,
    #[error("`params` is no object")]
    Params,
    #[error("this is no request, no notification and no response")]
    Shape,
}

impl MessageError {
    /// Stable name for answers and records.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Json(error) => error.reason(),
            Self::Batch => "mcp_batch",
            Self::Version => "mcp_not_jsonrpc",
            Self::UnknownMember(_) => "mcp_unknown_member",
            Self::AlikeMembers(_) => "mcp_alike_members",
            Self::ImpreciseNumber => "mcp_imprecise_number",
            Self::Id => "mcp_bad_id",
            Self::Params => "mcp_bad_params",
            Self::Shape => "mcp_not_a_message",
        }
    }

    pub fn code(&self) -> i32 {
        match self {
            Self::Json(JsonError::Syntax) => PARSE_ERROR,
            _ => INVALID_REQUEST,
        }
    }
}

/// Of a request. Numbers and texts are different ids, whatever they look like.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Id {
    Number(i64),
    Text(String),
}

impl Id {
    pub fn of(value: &Value) -> Option<Self> {
        match value {
            Value::Number(number) => number.as_i64().map(Self::Number),
            Value::String(text) if text.len() <= ID_BYTES => Some(Self::Text(text.clone())),
            _ => None,
        }
    }

    pub fn to_value(&self) -> Value {
        match self {
            Self::Number(number) => (*number).into(),
            Self::Text(text) => text.as_str().into(),
        }
    }
}

#[derive(Clone, PartialEq, Debug)]
pub struct Request {
    pub id: Id,
    pub method: String,
    pub params: Option<Map<String, Value>>,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Notification {
    pub method: String,
    pub params: Option<Map<String, Value>>,
}

/// To a request of the server.
#[derive(Clone, PartialEq, Debug)]
pub struct Response {
    pub id: Id,
    pub outcome: Result<Value, Value>,
}

/// What an agent says.
#[derive(Clone, PartialEq, Debug)]
pub enum FromAgent {
    Request(Request),
    Notification(Notification),
    Response(Response),
}

impl FromAgent {
    /// Reads one message.
    pub fn parse(bytes: &[u8], most: usize) -> Result<Self, MessageError> {
        let limits = json::Limits { bytes: most, depth: DEPTH, members: MEMBERS };
        let mut message = match json::object(bytes, limits) {
            Err(JsonError::NotObject) if bytes.trim_ascii_start().starts_with(b"[") => return Err(MessageError::Batch),
            message => message?,
        };
        unambiguous(&message)?;
        if message.remove("jsonrpc").as_ref().and_then(Value::as_str) != Some("2.0") {
            return Err(MessageError::Version);
        }
        let id = match message.remove("id") {
            Some(id) => Some(Id::of(&id).ok_or(MessageError::Id)?),
            None => None,
        };
        let method = match message.remove("method") {
            Some(Value::String(method)) => Some(method),
            Some(_) => return Err(MessageError::Shape),
            None => None,
        };
        let params = match message.remove("params") {
            Some(Value::Object(params)) => Some(params),
            Some(_) => return Err(MessageError::Params),
            None => None,
        };
        let (result, error) = (message.remove("result"), message.remove("error"));
        // Some parsers take `Method` for `method`: what is no member in this spelling is none at all.
        if let Some(name) = message.keys().next() {
            return Err(MessageError::UnknownMember(name.clone()));
        }
        match (id, method, result, error) {
            (Some(id), Some(method), None, None) => Ok(Self::Request(Request { id, method, params })),
            (None, Some(method), None, None) => Ok(Self::Notification(Notification { method, params })),
            (Some(id), None, Some(result), None) if params.is_none() => {
                Ok(Self::Response(Response { id, outcome: Ok(result) }))
            }
            (Some(id), None, None, Some(error)) if params.is_none() => {
                Ok(Self::Response(Response { id, outcome: Err(error) }))
            }
            _ => Err(MessageError::Shape),
        }
    }
}

impl Request {
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut message = json!({ "jsonrpc": "2.0", "id": self.id.to_value(), "method": self.method });
        if let Some(params) = &self.params {
            message["params"] = Value::Object(params.clone());
        }
        written(&message)
    }

    /// A member of `params._meta`.
    pub fn meta(&self, name: &str) -> Option<&Value> {
        self.params.as_ref()?.get("_meta")?.get(name)
    }
}

impl Notification {
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut message = json!({ "jsonrpc": "2.0", "method": self.method });
        if let Some(params) = &self.params {
            message["params"] = Value::Object(params.clone());
        }
        written(&message)
    }

    /// Whose request `notifications/cancelled` is about.
    pub fn cancels(&self) -> Option<Id> {
        if self.method != "notifications/cancelled" {
            return None;
        }
        Id::of(self.params.as_ref()?.get("requestId")?)
    }
}

impl Response {
    pub fn to_bytes(&self) -> Vec<u8> {
        let id = self.id.to_value();
        written(&match &self.outcome {
            Ok(result) => json!({ "jsonrpc": "2.0", "id": id, "result": result }),
            Err(error) => json!({ "jsonrpc": "2.0", "id": id, "error": error }),
        })
    }
}

fn written(message: &Value) -> Vec<u8> {
    message.to_string().into_bytes()
}

/// An error of JSON-RPC, which authd itself answers with.
#[derive(Clone, PartialEq, Debug)]
pub struct RpcError {
    pub code: i32,
    pub message: String,
    pub data: Option<Value>,
}

impl RpcError {
    pub fn new(code: i32, reason: &str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), data: Some(json!({ "reason": reason })) }
    }

    pub fn to_value(&self, id: Option<&Id>) -> Value {
        let mut error = json!({ "code": self.code, "message": self.message });
        if let Some(data) = &self.data {
            error["data"] = data.clone();
        }
        json!({ "jsonrpc": "2.0", "id": id.map_or(Value::Null, Id::to_value), "error": error })
    }

    pub fn reason(&self) -> &str {
        self.data.as_ref().and_then(|data| data.get("reason")?.as_str()).unwrap_or("mcp_error")
    }
}

impl From<&MessageError> for RpcError {
    fn from(error: &MessageError) -> Self {
        Self::new(error.code(), error.reason(), error.to_string())
    }
}

/// What a server's message is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Kind {
    Request {
        id: Id,
        method: String,
    },
    Notification {
        method: String,
    },
    Response {
        id: Id,
        is_error: bool,
    },
    /// An error that answers no request that could be read.
    Error,
}

/// What a server says: its envelope is understood, and the rest is passed on as it was written, on one line.
#[derive(Clone, PartialEq, Debug)]
pub struct FromServer {
    pub kind: Kind,
    text: String,
}

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    jsonrpc: Cow<'a, str>,
    id: Option<Value>,
    #[serde(borrow)]
    method: Option<Cow<'a, str>>,
    #[serde(borrow)]
    params: Option<&'a RawValue>,
    #[serde(borrow)]
    result: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

impl FromServer {
    pub fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let text = std::str::from_utf8(bytes).map_err(|_| JsonError::Syntax)?;
        if text.trim_start().starts_with('[') {
            return Err(MessageError::Batch);
        }
        let envelope: Envelope<'_> = serde_json::from_str(text).map_err(|_| JsonError::Syntax)?;
        if envelope.jsonrpc != "2.0" {
            return Err(MessageError::Version);
        }
        let id = match &envelope.id {
            Some(id) => Some(Id::of(id).ok_or(MessageError::Id)?),
            None => None,
        };
        let method = envelope.method.map(Cow::into_owned);
        let kind = match (id, method, envelope.result.is_some(), envelope.error.is_some()) {
            (Some(id), Some(method), false, false) => Kind::Request { id, method },
            (None, Some(method), false, false) => Kind::Notification { method },
            (Some(id), None, true, false) => Kind::Response { id, is_error: false },
            (Some(id), None, false, true) => Kind::Response { id, is_error: true },
            (None, None, false, true) => Kind::Error,
            _ => return Err(MessageError::Shape),
        };
        if envelope.params.is_some() && !matches!(kind, Kind::Request { .. } | Kind::Notification { .. }) {
            return Err(MessageError::Shape);
        }
        // Line ends are white space here: within a text, JSON has none.
        Ok(Self { kind, text: text.trim().replace(['\n', '\r'], " ") })
    }

    /// One line, without its end.
    pub fn text(&self) -> &str {
        &self.text
    }

    pub fn to_value(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_default()
    }

    /// Whether it is the answer to a request.
    pub fn answers(&self, request: &Id) -> bool {
        matches!(&self.kind, Kind::Response { id, .. } if id == request)
    }

    /// One that was read, and written anew.
    pub(super) fn written(kind: Kind, text: String) -> Self {
        Self { kind, text }
    }

    pub fn answer(id: Id, message: &Value) -> Self {
        let is_error = message.get("error").is_some();
        Self { kind: Kind::Response { id, is_error }, text: message.to_string() }
    }

    pub fn notification(method: &str, params: &Value) -> Self {
        let message = json!({ "jsonrpc": "2.0", "method": method, "params": params });
        Self { kind: Kind::Notification { method: method.to_owned() }, text: message.to_string() }
    }
}

/// Names that some parser takes for the same one, and numbers that some parser reads as another one: what was checked
/// would not be what is executed. Parsers that ignore case fold by Unicode's simple rules.
fn unambiguous(members: &Map<String, Value>) -> Result<(), MessageError> {
    let mut folded = std::collections::HashSet::with_capacity(members.len());
    for (name, value) in members {
        if !folded.insert(fold(name)) {
            return Err(MessageError::AlikeMembers(name.clone()));
        }
        unambiguous_value(value)?;
    }
    Ok(())
}

fn unambiguous_value(value: &Value) -> Result<(), MessageError> {
    // From 2^53 on, a float stands for several integers.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    match value {
        Value::Object(members) => unambiguous(members),
        Value::Array(elements) => elements.iter().try_for_each(unambiguous_value),
        Value::Number(number) if number.is_f64() && number.as_f64().is_none_or(|n| n.abs() >= EXACT) => {
            Err(MessageError::ImpreciseNumber)
        }
        _ => Ok(()),
    }
}

/// `K` (Kelvin), `k` and `K` are one, as are `ſ`, `s` and `S`: upper case brings the odd ones together. Lower case comes before
/// it, as `ẞ` is its own upper case, while that of `ß` is `SS`.
pub fn fold(name: &str) -> String {
    let lower = name.chars().flat_map(char::to_lowercase);
    lower.flat_map(char::to_uppercase).flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: usize = 1 << 16;

    fn parse(text: &str) -> Result<FromAgent, MessageError> {
        FromAgent::parse(text.as_bytes(), MOST)
    }

    fn reason(text: &str) -> &'static str {
        match parse(text) {
            Ok(message) => panic!("{text} is taken for {message:?}"),
            Err(error) => error.reason(),
        }
    }

    #[test]
    fn what_can_be_read_in_two_ways_is_refused() {
        for (params, expected) in [
            (r#"{"name":"a","name":"b"}"#, "json_duplicate_member"),
            (r#"{"name":"a","n\u0061me":"b"}"#, "json_duplicate_member"),
            (r#"{"name":"a","arguments":{"x":{"y":1,"y":2}}}"#, "json_duplicate_member"),
            (r#"{"name":"a","Name":"b"}"#, "mcp_alike_members"),
            ("{\"name\":\"a\",\"arguments\":{\"token\":1,\"to\u{212a}en\":2}}", "mcp_alike_members"),
            ("{\"name\":\"a\",\"arguments\":{\"s\":1,\"\u{17f}\":2}}", "mcp_alike_members"),
            ("{\"name\":\"a\",\"arguments\":{\"ma\u{df}\":1,\"MA\u{1e9e}\":2}}", "mcp_alike_members"),
            (r#"{"name":"a","arguments":{"n":123456789012345678901234567890}}"#, "mcp_imprecise_number"),
            (r#"{"name":"a","arguments":{"n":[1e300]}}"#, "mcp_imprecise_number"),
            (r#"{"name":"a","arguments":{"n":1e999}}"#, "json_syntax"),
            (r#"{"name":"\ud800"}"#, "json_syntax"),
            (r#"[]"#, "mcp_bad_params"),
        ] {
            let text = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{params}}}"#);
            assert_eq!(reason(&text), expected, "{text}");
        }
    }

    #[test]
    fn an_envelope_has_its_members_and_no_others() {
        for (text, expected) in [
            (r#"[{"jsonrpc":"2.0","id":1,"method":"ping"}]"#, "mcp_batch"),
            (r#"{"jsonrpc":"2.0","id":1,"method":"ping","Method":"tools/call"}"#, "mcp_alike_members"),
            (r#"{"jsonrpc":"2.0","id":1,"Method":"tools/call"}"#, "mcp_unknown_member"),
            (r#"{"jsonrpc":"2.0","id":1,"method":"ping","name":"x"}"#, "mcp_unknown_member"),
            (r#"{"jsonrpc":"2.0","id":1,"method":"ping","result":{}}"#, "mcp_not_a_message"),
            (r#"{"jsonrpc":"2.0","id":1,"result":{},"error":{}}"#, "mcp_not_a_message"),
            (r#"{"jsonrpc":"2.0","id":1,"result":{},"params":{}}"#, "mcp_not_a_message"),
            (r#"{"jsonrpc":"2.0","id":null,"method":"ping"}"#, "mcp_bad_id"),
            (r#"{"jsonrpc":"2.0","id":1.5,"method":"ping"}"#, "mcp_bad_id"),
            (r#"{"jsonrpc":"1.0","id":1,"method":"ping"}"#, "mcp_not_jsonrpc"),
            (r#"{"id":1,"method":"ping"}"#, "mcp_not_jsonrpc"),
            (r#"{"jsonrpc":"2.0","id":1,"method":["ping"]}"#, "mcp_not_a_message"),
            (r#""ping""#, "json_not_object"),
            (r#"{"jsonrpc":"2.0","id":1,"method":"ping"} {}"#, "json_syntax"),
        ] {
            assert_eq!(reason(text), expected, "{text}");
        }
    }

    #[test]
    fn depth_and_length_have_bounds() {
        let deep = format!("{}1{}", "[".repeat(80), "]".repeat(80));
        assert_eq!(
            reason(&format!(r#"{{"jsonrpc":"2.0","id":1,"method":"m","params":{{"a":{deep}}}}}"#)),
            "json_depth"
        );
        let long = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"m","params":{{"a":"{}"}}}}"#, "x".repeat(MOST));
        assert_eq!(reason(&long), "json_oversize");
    }

    #[test]
    fn an_escaped_method_is_the_method_that_it_spells() {
        let text = r#"{"jsonrpc":"2.0","id":"a","method":"\u0074ools\/call","params":{"name":"x"}}"#;
        let FromAgent::Request(request) = parse(text).unwrap() else { panic!() };
        assert_eq!(request.method, "tools/call");
        let written = String::from_utf8(request.to_bytes()).unwrap();
        assert!(written.contains(r#""method":"tools/call""#), "{written}");
        let (sent, meant): (Value, Value) =
            (serde_json::from_str(&written).unwrap(), serde_json::from_str(text).unwrap());
        assert_eq!(sent, meant);
    }

    #[test]
    fn ids_that_look_alike_are_different() {
        let id = |text: &str| match parse(&format!(r#"{{"jsonrpc":"2.0","id":{text},"method":"ping"}}"#)) {
            Ok(FromAgent::Request(request)) => request.id,
            other => panic!("{other:?}"),
        };
        assert_ne!(id("1"), id("\"1\""));
        assert_eq!(id("-7"), Id::Number(-7));
    }

    #[test]
    fn a_servers_message_is_passed_on_with_all_that_it_says() {
        let text = "{\"jsonrpc\":\"2.0\",\n\"id\":7,\"result\":{\"n\":123456789012345678901234567890,\r\n\"new\":{\"x\":1}}}\n";
        let message = FromServer::parse(text.as_bytes()).unwrap();
        assert_eq!(message.kind, Kind::Response { id: Id::Number(7), is_error: false });
        assert!(message.text().contains("123456789012345678901234567890") && message.text().contains("\"new\""));
        assert!(!message.text().contains(['\n', '\r']));
        for text in [
            "[]",
            r#"{"jsonrpc":"2.0"}"#,
            r#"{"jsonrpc":"2.0","id":1,"id":2,"result":{}}"#,
            r#"{"jsonrpc":"2.0","id":{},"result":{}}"#,
            "no JSON",
        ] {
            assert!(FromServer::parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
