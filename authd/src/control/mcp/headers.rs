//! Headers of streamable HTTP, and whether they agree with the body.
//!
//! Enters: a request's headers and its message. Leaves: under which version's rules it is, and the headers that the server
//! is to get. Never: a header that says something else than the body (2026-07-28, Server Validation), and no header of an
//! agent on its way to a server.

use base64::{Engine, engine::general_purpose::STANDARD};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde_json::{Map, Value, json};

use super::{
    HANDSHAKE_VERSIONS, STATELESS_VERSION,
    message::{FromAgent, HEADER_MISMATCH, INVALID_REQUEST, Request, RpcError, UNSUPPORTED_VERSION},
    methods::{self, Era},
};

pub const SESSION_ID: HeaderName = HeaderName::from_static("mcp-session-id");
pub const PROTOCOL_VERSION: HeaderName = HeaderName::from_static("mcp-protocol-version");
pub const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
pub const METHOD: HeaderName = HeaderName::from_static("mcp-method");
const NAME: HeaderName = HeaderName::from_static("mcp-name");
const PARAM: &str = "mcp-param-";
/// In `_meta`.
const VERSION_KEY: &str = "io.modelcontextprotocol/protocolVersion";
const ENCODED: (&str, &str) = ("=?base64?", "?=");

/// Whether an `Accept` header admits JSON, and event streams.
pub fn accepts(headers: &HeaderMap) -> (bool, bool) {
    let values = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let (mut json, mut events) = (false, false);
    for range in values.flat_map(|value| value.split(',')) {
        let range = range.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        json |= matches!(range.as_str(), "*/*" | "application/*" | "application/json");
        events |= matches!(range.as_str(), "*/*" | "text/*" | "text/event-stream");
    }
    (json, events)
}

/// Whether a body is JSON, as far as it says.
pub fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json")
}

/// Pages of other origins ask with the rights of whoever looks at them (DNS rebinding). Agents send no origin.
pub fn is_origin_allowed(headers: &HeaderMap, origins: &[String]) -> bool {
    headers.get_all(header::ORIGIN).iter().all(|origin| origins.iter().any(|allowed| origin == allowed.as_str()))
}

/// Under which rules a message is, by its header; the body must not say otherwise.
pub fn era(headers: &HeaderMap, message: &FromAgent) -> Result<Era, RpcError> {
    let in_body = match message {
        FromAgent::Request(request) => request.meta(VERSION_KEY),
        FromAgent::Notification(_) | FromAgent::Response(_) => None,
    };
    let in_header = one(headers, &PROTOCOL_VERSION)?;
    let era = match in_header {
        Some(STATELESS_VERSION) => Era::Stateless,
        Some(version) if HANDSHAKE_VERSIONS.contains(&version) => Era::Handshake,
        Some(other) => return Err(unsupported(other)),
        None if in_body.is_some() => return Err(mismatch("the header MCP-Protocol-Version is missing")),
        None => Era::Handshake,
    };
    let agrees = match (in_header, in_body, era) {
        (Some(header), Some(body), _) => body == header,
        // Each request of this version says it in both places.
        (_, None, Era::Stateless) => !matches!(message, FromAgent::Request(_)),
        (_, body, _) => body.is_none(),
    };
    if !agrees {
        return Err(mismatch("MCP-Protocol-Version does not say what `_meta` says"));
    }
    if era == Era::Stateless
        && let FromAgent::Request(request) = message
    {
        mirrors(headers, request)?;
    }
    Ok(era)
}

/// Under which rules a message without headers is: one of a stream.
pub fn era_of(message: &FromAgent) -> Result<Era, RpcError> {
    let FromAgent::Request(request) = message else { return Ok(Era::Handshake) };
    match request.meta(VERSION_KEY) {
        None => Ok(Era::Handshake),
        Some(version) if version == STATELESS_VERSION => Ok(Era::Stateless),
        Some(version) => Err(unsupported(version.as_str().unwrap_or_default())),
    }
}

/// `Mcp-Method` and `Mcp-Name` against the body.
fn mirrors(headers: &HeaderMap, request: &Request) -> Result<(), RpcError> {
    match one(headers, &METHOD)? {
        Some(method) if method == request.method => {}
        Some(_) => return Err(mismatch("Mcp-Method is not the method of the body")),
        None => return Err(mismatch("the header Mcp-Method is missing")),
    }
    if methods::name_member(&request.method).is_none() {
        return Ok(());
    }
    let Some(header) = one(headers, &NAME)? else { return Err(mismatch("the header Mcp-Name is missing")) };
    let decoded = decode(header).ok_or_else(|| mismatch("Mcp-Name is encoded in a wrong way"))?;
    if name(request) != Some(decoded.as_str()) {
        return Err(mismatch("Mcp-Name is not the name of the body"));
    }
    Ok(())
}

fn name(request: &Request) -> Option<&str> {
    request.params.as_ref()?.get(methods::name_member(&request.method)?)?.as_str()
}

/// What the server gets of a request of the stateless era, written from the body.
pub fn mirrored(request: &Request, params: &[(String, String)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let mut put = |name: HeaderName, value: &str| {
        if let Ok(value) = HeaderValue::from_str(&encode(value)) {
            headers.insert(name, value);
        }
    };
    put(METHOD, &request.method);
    if let Some(name) = name(request) {
        put(NAME, name);
    }
    for (name, value) in params {
        if let Ok(name) = HeaderName::from_bytes(format!("{PARAM}{}", name.to_ascii_lowercase()).as_bytes()) {
            put(name, value);
        }
    }
    headers
}

/// `Mcp-Param-*` of an agent against what the body makes of them. A header that nobody knows could be one of a tool that was
/// not listed here yet: listing it again helps, as the specification says.
pub fn params_agree(headers: &HeaderMap, expected: &[(String, String)]) -> Result<(), RpcError> {
    for name in headers.keys().filter(|name| name.as_str().starts_with(PARAM)) {
        let value = one(headers, name)?.and_then(decode);
        let suffix = &name.as_str()[PARAM.len()..];
        let known = expected.iter().find(|(name, _)| name.eq_ignore_ascii_case(suffix));
        match (known, value) {
            (Some((_, expected)), Some(value)) if *expected == value => {}
            (None, _) => return Err(mismatch(&format!("{name} is no header of this tool: list the tools again"))),
            _ => return Err(mismatch(&format!("{name} does not say what the body says"))),
        }
    }
    for (suffix, _) in expected {
        if !headers.contains_key(format!("{PARAM}{}", suffix.to_ascii_lowercase())) {
            return Err(mismatch(&format!("the header Mcp-Param-{suffix} is missing")));
        }
    }
    Ok(())
}

/// The only value of a header.
fn one<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, RpcError> {
    let mut values = headers.get_all(name).iter();
    let value = values.next();
    if values.next().is_some() {
        return Err(mismatch(&format!("the header {name} stands there twice")));
    }
    value.map(|value| value.to_str().map_err(|_| mismatch(&format!("the header {name} is no text")))).transpose()
}

/// "Value Encoding" of the specification.
fn encode(value: &str) -> String {
    let is_plain = value.bytes().all(|b| b == b'\t' || (0x20..=0x7e).contains(&b))
        && value.trim() == value
        && !value.is_empty()
        && !(value.starts_with(ENCODED.0) && value.ends_with(ENCODED.1));
    if is_plain { value.to_owned() } else { format!("{}{}{}", ENCODED.0, STANDARD.encode(value), ENCODED.1) }
}

fn decode(value: &str) -> Option<String> {
    match value.strip_prefix(ENCODED.0).and_then(|rest| rest.strip_suffix(ENCODED.1)) {
        Some(encoded) => String::from_utf8(STANDARD.decode(encoded).ok()?).ok(),
        None => Some(value.to_owned()),
    }
}

/// A value of arguments as a header has it. Others than these are not mirrored.
pub fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(value) => Some(value.to_string()),
        Value::Number(number) if number.is_i64() || number.is_u64() => Some(number.to_string()),
        _ => None,
    }
}

pub fn mismatch(message: &str) -> RpcError {
    RpcError::new(HEADER_MISMATCH, "mcp_header_mismatch", message)
}

pub fn unsupported(requested: &str) -> RpcError {
    let requested: String = requested.chars().take(64).collect();
    let mut supported: Vec<&str> = HANDSHAKE_VERSIONS.to_vec();
    supported.push(STATELESS_VERSION);
    versions(&requested, &supported)
}

/// For what has to be a session: clients that know both then begin one.
pub fn needs_session() -> RpcError {
    versions(STATELESS_VERSION, &HANDSHAKE_VERSIONS)
}

fn versions(requested: &str, supported: &[&str]) -> RpcError {
    let data = json!({ "supported": supported, "requested": requested, "reason": "mcp_version_unsupported" });
    RpcError { code: UNSUPPORTED_VERSION, message: "Unsupported protocol version".to_owned(), data: Some(data) }
}

/// A later request's version in the session that agreed on one.
pub fn version_of_session(headers: &HeaderMap, agreed: Option<&str>) -> Result<(), RpcError> {
    match (one(headers, &PROTOCOL_VERSION)?, agreed) {
        (Some(version), Some(agreed)) if version != agreed => {
            Err(RpcError::new(INVALID_REQUEST, "mcp_version_changed", "the session agreed on another version"))
        }
        _ => Ok(()),
    }
}

/// Where annotated properties of a schema lead, from the arguments.
pub fn at<'a>(arguments: &'a Map<String, Value>, path: &[String]) -> Option<&'a Value> {
    let (first, rest) = path.split_first()?;
    rest.iter().try_fold(arguments.get(first)?, |value, name| value.get(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(of: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in of {
            headers.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn call(name: &str) -> FromAgent {
        let message = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {
            "name": name, "_meta": { VERSION_KEY: STATELESS_VERSION } } });
        FromAgent::parse(message.to_string().as_bytes(), 4096).unwrap()
    }

    fn old(method: &str) -> FromAgent {
        FromAgent::parse(json!({ "jsonrpc": "2.0", "id": 1, "method": method }).to_string().as_bytes(), 4096).unwrap()
    }

    #[test]
    fn headers_that_disagree_with_the_body_are_refused() {
        let version = ("mcp-protocol-version", STATELESS_VERSION);
        let (method, name) = (("mcp-method", "tools/call"), ("mcp-name", "add"));
        assert_eq!(era(&headers(&[version, method, name]), &call("add")).unwrap(), Era::Stateless);
        for wrong in [
            &[version, method][..],
            &[version, name],
            &[method, name],
            &[version, ("mcp-method", "tools/list"), name],
            &[version, ("mcp-method", "Tools/call"), name],
            &[version, method, ("mcp-name", "other")],
            &[version, method, ("mcp-name", "ADD")],
            &[version, method, name, ("mcp-name", "other")],
            &[version, method, method, name],
            &[version, version, method, name],
            &[version, method, ("mcp-name", "=?base64?%%%?=")],
            &[("mcp-protocol-version", "2025-11-25"), method, name],
        ] {
            let error = era(&headers(wrong), &call("add")).unwrap_err();
            assert_eq!(error.code, HEADER_MISMATCH, "{wrong:?}");
        }
        let error = era(&headers(&[version, ("mcp-method", "ping")]), &old("ping")).unwrap_err();
        assert_eq!(error.code, HEADER_MISMATCH);
        let error = era(&headers(&[("mcp-protocol-version", "2031-01-01")]), &old("ping")).unwrap_err();
        assert_eq!(error.code, UNSUPPORTED_VERSION);
        assert_eq!(era(&headers(&[]), &old("ping")).unwrap(), Era::Handshake);
    }

    #[test]
    fn names_that_no_header_can_hold_are_encoded() {
        for (value, encoded) in [
            ("us-west1", "us-west1"),
            ("Hello, \u{4e16}\u{754c}", "=?base64?SGVsbG8sIOS4lueVjA==?="),
            (" padded ", "=?base64?IHBhZGRlZCA=?="),
            ("line1\nline2", "=?base64?bGluZTEKbGluZTI=?="),
            ("=?base64?literal?=", "=?base64?PT9iYXNlNjQ/bGl0ZXJhbD89?="),
        ] {
            assert_eq!(encode(value), encoded);
            assert_eq!(decode(encoded).as_deref(), Some(value));
        }
        let sent = headers(&[
            ("mcp-protocol-version", STATELESS_VERSION),
            ("mcp-method", "tools/call"),
            ("mcp-name", "=?base64?w6Q=?="),
        ]);
        assert!(era(&sent, &call("\u{e4}")).is_ok());
        let FromAgent::Request(request) = call("\u{e4}") else { panic!() };
        assert_eq!(mirrored(&request, &[])["mcp-name"], "=?base64?w6Q=?=");
    }

    #[test]
    fn mirrored_arguments_must_be_those_of_the_body() {
        let expected = [("Region".to_owned(), "eu".to_owned())];
        assert!(params_agree(&headers(&[("mcp-param-region", "eu")]), &expected).is_ok());
        for wrong in [
            &[("mcp-param-region", "us")][..],
            &[],
            &[("mcp-param-region", "eu"), ("mcp-param-region", "us")],
            &[("mcp-param-region", "eu"), ("mcp-param-other", "eu")],
        ] {
            assert_eq!(params_agree(&headers(wrong), &expected).unwrap_err().code, HEADER_MISMATCH, "{wrong:?}");
        }
    }

    #[test]
    fn an_origin_passes_if_it_was_named() {
        let origins = ["https://app.example.org".to_owned()];
        assert!(is_origin_allowed(&headers(&[]), &origins));
        assert!(is_origin_allowed(&headers(&[("origin", "https://app.example.org")]), &origins));
        for origin in ["null", "http://app.example.org", "https://app.example.org.evil.test", "https://APP.example.org"]
        {
            assert!(!is_origin_allowed(&headers(&[("origin", origin)]), &origins), "{origin}");
        }
        let two = headers(&[("origin", "https://app.example.org"), ("origin", "http://evil.test")]);
        assert!(!is_origin_allowed(&two, &origins));
    }

    #[test]
    fn accept_is_read_as_a_list() {
        assert_eq!(accepts(&headers(&[("accept", "application/json, text/event-stream")])), (true, true));
        assert_eq!(accepts(&headers(&[("accept", "application/json")])), (true, false));
        assert_eq!(accepts(&headers(&[("accept", "text/event-stream;q=0.5"), ("accept", "*/*")])), (true, true));
        assert_eq!(accepts(&headers(&[])), (false, false));
    }
}
