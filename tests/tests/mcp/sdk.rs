//! What the types of MCP's own SDK for Rust make of messages.

use authd::control::mcp::message::{
    HEADER_MISMATCH, INVALID_PARAMS, INVALID_REQUEST, METHOD_NOT_FOUND, PARSE_ERROR, UNSUPPORTED_VERSION,
};
use rmcp::model::{CallToolRequestParams, ErrorCode, Tool};
use serde_json::json;

/// Why the gateway has types of its own.
#[test]
fn the_sdk_would_lose_what_it_does_not_know() {
    let call = json!({ "name": "a", "arguments": {}, "task": { "ttl": 1 } });
    let read: CallToolRequestParams = serde_json::from_value(call.clone()).unwrap();
    assert_ne!(serde_json::to_value(read).unwrap(), call);
    let tool = json!({ "name": "a", "inputSchema": {}, "execution": { "taskSupport": "required" } });
    let read: Tool = serde_json::from_value(tool.clone()).unwrap();
    assert_ne!(serde_json::to_value(read).unwrap(), tool);
}

#[test]
fn codes_are_those_of_the_specification() {
    for (ours, theirs) in [
        (PARSE_ERROR, ErrorCode::PARSE_ERROR),
        (INVALID_REQUEST, ErrorCode::INVALID_REQUEST),
        (METHOD_NOT_FOUND, ErrorCode::METHOD_NOT_FOUND),
        (INVALID_PARAMS, ErrorCode::INVALID_PARAMS),
        (HEADER_MISMATCH, ErrorCode::HEADER_MISMATCH),
        (UNSUPPORTED_VERSION, ErrorCode::UNSUPPORTED_PROTOCOL_VERSION),
    ] {
        assert_eq!(ours, theirs.0);
    }
}
