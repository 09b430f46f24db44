//! Tools: which of a server's list an agent is told of, and what a call is.
//!
//! Enters: `tools/list` results and `tools/call` parameters. Leaves: lists without what the gate does not list, and calls as
//! gates judge them. Never: another reading of a call than the server's.

use std::{collections::HashMap, sync::Mutex};

use serde_json::{Map, Value, json};

use super::{
    gate::{Denial, Gate, ToolCall},
    headers,
    message::{FromServer, INVALID_PARAMS, Id, Request, RpcError, fold},
    methods::Era,
};
use crate::control::verifier::lock;

/// Of a tool; the specification's own bound is 128.
const NAME_CHARACTERS: usize = 256;
/// Tools whose headers are remembered, and headers of one tool.
const TOOLS: usize = 1024;
const HEADERS: usize = 16;
const DEPTH: usize = 8;
/// All that a call may say in this spelling.
const PARAMS: [&str; 6] = ["name", "arguments", "_meta", "task", "inputResponses", "requestState"];

/// What a call's parameters ask for.
pub fn call(server: &str, request: &Request) -> Result<ToolCall, RpcError> {
    let wrong = |message: &str| RpcError::new(INVALID_PARAMS, "mcp_bad_call", message);
    let mut rest = request.params.clone().ok_or_else(|| wrong("a call has `params`"))?;
    rest.remove("_meta");
    let tool = match rest.remove("name") {
        Some(Value::String(name)) if is_name(&name) => name,
        _ => return Err(wrong("`name` is a text without control characters")),
    };
    let arguments = match rest.remove("arguments") {
        Some(Value::Object(arguments)) => arguments,
        None => Map::new(),
        // Some clients write it when there are none. It is the absence of arguments to everybody.
        Some(Value::Null) => Map::new(),
        Some(_) => return Err(wrong("`arguments` is an object")),
    };
    // A parser that ignores case would read `Arguments` where the gate saw none.
    if let Some(name) = rest.keys().find(|name| PARAMS.iter().any(|known| fold(known) == fold(name) && known != name)) {
        return Err(wrong(&format!("`{name}` is not how it is spelled")));
    }
    Ok(ToolCall { server: server.to_owned(), tool, arguments, rest })
}

/// What of a call's `_meta` the server gets. Nobody decides about it: what the protocol itself says there, and traces.
const META: [&str; 4] = ["progressToken", "traceparent", "tracestate", "baggage"];
const PROTOCOL: &str = "io.modelcontextprotocol/";

/// Makes of a request what the server gets: the arguments that were decided on, in their canonical form.
pub fn as_decided(request: &mut Request, call: &ToolCall) {
    let params = request.params.get_or_insert_default();
    params.insert("arguments".to_owned(), Value::Object(call.arguments.clone()));
    if let Some(Value::Object(mut meta)) = params.remove("_meta") {
        meta.retain(|name, value| {
            name.starts_with(PROTOCOL) || META.contains(&name.as_str()) && (value.is_string() || value.is_i64())
        });
        params.insert("_meta".to_owned(), Value::Object(meta));
    }
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.chars().count() <= NAME_CHARACTERS && !name.chars().any(char::is_control)
}

/// The list without the tools that the agent is not told of, and without a word of tasks: no calls become any. What cannot be
/// read as a list is no list.
pub fn listed(message: &FromServer, id: &Id, gate: &dyn Gate, mirrored: &Mirrored) -> Option<FromServer> {
    let mut value = message.to_value();
    let tools = value.get_mut("result")?.get_mut("tools")?.as_array_mut()?;
    tools.retain(|tool| match tool.get("name").and_then(Value::as_str) {
        Some(name) => {
            mirrored.learn(name, tool.get("inputSchema"));
            gate.listed(name) && tool.pointer("/execution/taskSupport") != Some(&Value::from("required"))
        }
        None => false,
    });
    for tool in tools {
        without(tool, "execution", "taskSupport");
    }
    Some(FromServer::answer(id.clone(), &value))
}

/// The answer to `initialize`, without the offer of what the gateway refuses.
pub fn offered(message: &FromServer, id: &Id) -> FromServer {
    let mut value = message.to_value();
    if let Some(result) = value.get_mut("result") {
        without(result, "capabilities", "tasks");
    }
    FromServer::answer(id.clone(), &value)
}

fn without(value: &mut Value, object: &str, member: &str) {
    if let Some(object) = value.get_mut(object).and_then(Value::as_object_mut) {
        object.remove(member);
    }
}

/// A refusal in the form of a result, as the specification has it for what a model should know of: clients hand results to
/// their model, with `isError`, while most of them turn errors of the protocol into exceptions which end its turn, or which it
/// never sees. A call that was to become a task has no such result: there it is an error.
pub fn denied(id: &Id, call: &ToolCall, denial: &Denial, era: Era) -> Result<FromServer, RpcError> {
    let mut text = format!("The call of the tool `{}` was not allowed and was not made: {}", call.tool, denial.message);
    if !denial.policies.is_empty() {
        text.push_str(&format!(" (policy: {})", denial.policies.join(", ")));
    }
    let meta = json!({ "authd/reason": denial.reason, "authd/policies": denial.policies });
    not_made(id, call, &denial.reason, text, meta, era)
}

/// The same for a call that nobody has approved yet.
pub fn unapproved(id: &Id, call: &ToolCall, approval: &str, era: Era) -> Result<FromServer, RpcError> {
    let text = format!(
        "The call of the tool `{}` was not made yet: a person has to approve it first. The request for approval has the id \
         {approval}. Call the tool again with exactly the same arguments once it is approved.",
        call.tool
    );
    let meta = json!({ "authd/reason": "approval_pending", "authd/approval": approval });
    not_made(id, call, "approval_pending", text, meta, era)
}

fn not_made(
    id: &Id,
    call: &ToolCall,
    reason: &str,
    text: String,
    meta: Value,
    era: Era,
) -> Result<FromServer, RpcError> {
    if call.rest.contains_key("task") {
        return Err(RpcError { data: Some(meta), ..RpcError::new(super::message::NOT_ALLOWED, reason, text) });
    }
    let mut result = json!({ "content": [{ "type": "text", "text": text }], "isError": true, "_meta": meta });
    if era == Era::Stateless {
        result["resultType"] = "complete".into();
    }
    Ok(FromServer::answer(id.clone(), &json!({ "jsonrpc": "2.0", "id": id.to_value(), "result": result })))
}

/// Whether the answer to a call says that it failed.
pub fn is_error(message: &FromServer) -> bool {
    let value = message.to_value();
    value.get("error").is_some() || value.pointer("/result/isError") == Some(&Value::Bool(true))
}

type Paths = Vec<(String, Vec<String>)>;

/// Which arguments a server wants in headers as well (`x-mcp-header`), as its lists said.
#[derive(Default)]
pub struct Mirrored {
    tools: Mutex<HashMap<String, Paths>>,
}

impl Mirrored {
    fn learn(&self, tool: &str, schema: Option<&Value>) {
        let mut paths = Vec::new();
        if let Some(schema) = schema {
            annotated(schema, &mut Vec::new(), &mut paths);
        }
        let mut tools = lock(&self.tools);
        if paths.is_empty() {
            tools.remove(tool);
        } else if tools.len() < TOOLS || tools.contains_key(tool) {
            tools.insert(tool.to_owned(), paths);
        }
    }

    /// Names and values of headers, for a call.
    pub fn of(&self, call: &ToolCall) -> Vec<(String, String)> {
        let tools = lock(&self.tools);
        let Some(paths) = tools.get(&call.tool) else { return Vec::new() };
        let value = |path: &[String]| headers::at(&call.arguments, path).and_then(headers::scalar);
        paths.iter().filter_map(|(name, path)| Some((name.clone(), value(path)?))).collect()
    }
}

/// Only properties of properties count ("statically reachable").
fn annotated(schema: &Value, path: &mut Vec<String>, found: &mut Paths) {
    let Some(properties) = schema.get("properties").and_then(Value::as_object).filter(|_| path.len() < DEPTH) else {
        return;
    };
    for (name, property) in properties {
        path.push(name.clone());
        let header = property.get("x-mcp-header").and_then(Value::as_str);
        if let Some(header) = header.filter(|header| is_token(header) && found.len() < HEADERS) {
            found.push((header.to_owned(), path.clone()));
        }
        annotated(property, path, found);
        path.pop();
    }
}

/// RFC 9110, 5.6.2.
fn is_token(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        control::mcp::{BoxFuture, gate::*, message::FromAgent},
        decisions::call::Arguments,
    };

    struct Only(&'static str);

    impl Gate for Only {
        fn listed(&self, tool: &str) -> bool {
            tool == self.0
        }
        fn call<'a>(&'a self, _: &'a ToolCall) -> BoxFuture<'a, Ruling> {
            Box::pin(async { Ruling::Allow { token: None } })
        }
        fn standing(&self) -> BoxFuture<'_, Standing> {
            Box::pin(async { Standing::In })
        }
        fn access(&self) -> BoxFuture<'_, Result<Option<Bearer>, Denial>> {
            Box::pin(async { Ok(None) })
        }
        fn admits(&self) -> bool {
            true
        }
        fn report(&self, _: &ToolCall, _: Report) {}
    }

    fn request(params: Value) -> Request {
        let message = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params });
        let Ok(FromAgent::Request(request)) = FromAgent::parse(message.to_string().as_bytes(), 4096) else { panic!() };
        request
    }

    fn parsed(params: Value) -> Result<ToolCall, RpcError> {
        call("server", &request(params))
    }

    #[test]
    fn a_server_gets_what_was_decided_and_nothing_beside_it() {
        let meta = json!({
            "progressToken": 7, "traceparent": "00-a", "tracestate": { "x": 1 }, "baggage": ["x"],
            "io.modelcontextprotocol/clientInfo": { "name": "x" }, "io.modelcontextprotocolx/y": 1,
            "vendor/instructions": "send it to me", "ProgressToken": 8,
        });
        for arguments in [json!({ "b": 1.0, "a": "x" }), Value::Null] {
            let mut request = request(json!({ "name": "t", "arguments": arguments, "task": {} }));
            request.params.as_mut().unwrap().insert("_meta".to_owned(), meta.clone());
            let mut call = call("server", &request).unwrap();
            call.arguments = Arguments::new(&call.arguments).unwrap().map().clone();
            as_decided(&mut request, &call);
            let params = Value::Object(request.params.unwrap());
            assert_eq!(params["arguments"].to_string(), Value::Object(call.arguments).to_string());
            assert!(params["arguments"].get("b").is_none_or(Value::is_i64), "{params}");
            let kept = json!({
                "progressToken": 7, "traceparent": "00-a", "io.modelcontextprotocol/clientInfo": { "name": "x" },
            });
            assert_eq!((&params["_meta"], &params["task"]), (&kept, &json!({})));
        }
    }

    #[test]
    fn a_call_is_what_any_server_reads() {
        let call =
            parsed(json!({ "name": "a", "arguments": { "x": 1 }, "_meta": {}, "task": {}, "later": 2 })).unwrap();
        assert_eq!((call.tool.as_str(), &call.arguments["x"]), ("a", &json!(1)));
        assert_eq!(call.rest, json!({ "task": {}, "later": 2 }).as_object().unwrap().clone());
        for params in [
            json!({}),
            json!({ "name": 1 }),
            json!({ "name": "" }),
            json!({ "name": "a\nb" }),
            json!({ "Name": "a" }),
            json!({ "name": "a", "arguments": [] }),
            json!({ "name": "a", "arguments": "{}" }),
            json!({ "name": "a", "Arguments": { "x": 1 } }),
            json!({ "name": "a", "taS\u{212a}": {} }),
        ] {
            assert!(parsed(params.clone()).is_err(), "{params}");
        }
    }

    #[test]
    fn a_list_loses_tools_and_nothing_else() {
        let text = r#"{"jsonrpc":"2.0","id":1,"result":{"tools":[{"name":"a","execution":{"later":1}},
            {"name":"b"},{"title":"nameless"}],"nextCursor":"x","ttlMs":5,"later":{"y":[1]}}}"#;
        let message = FromServer::parse(text.as_bytes()).unwrap();
        let passed = listed(&message, &Id::Number(1), &Only("a"), &Mirrored::default()).unwrap().to_value();
        assert_eq!(passed["result"]["tools"], json!([{ "name": "a", "execution": { "later": 1 } }]));
        assert_eq!(passed["result"]["nextCursor"], "x");
        assert_eq!(passed["result"]["later"], json!({ "y": [1] }));
        let odd = FromServer::parse(br#"{"jsonrpc":"2.0","id":1,"result":{"tools":{"a":1}}}"#).unwrap();
        assert!(listed(&odd, &Id::Number(1), &Only("a"), &Mirrored::default()).is_none());
    }

    #[test]
    fn nobody_is_told_of_tasks_which_no_call_becomes() {
        let tools = |support: &str| json!({ "tools": [{ "name": "a", "execution": { "taskSupport": support } }] });
        let answer = |result: Value| json!({ "jsonrpc": "2.0", "id": 1, "result": result });
        for (support, expected) in [("optional", json!([{ "name": "a", "execution": {} }])), ("required", json!([]))] {
            let message = FromServer::answer(Id::Number(1), &answer(tools(support)));
            let passed = listed(&message, &Id::Number(1), &Only("a"), &Mirrored::default()).unwrap().to_value();
            assert_eq!(passed["result"]["tools"], expected);
        }
        let capabilities = json!({ "tools": {}, "tasks": { "requests": { "tools": { "call": {} } } } });
        let message = FromServer::answer(Id::Number(1), &answer(json!({ "capabilities": capabilities })));
        let passed = offered(&message, &Id::Number(1)).to_value();
        assert_eq!(passed["result"], json!({ "capabilities": { "tools": {} } }));
    }

    #[test]
    fn arguments_are_mirrored_where_the_schema_says() {
        let schema = json!({ "type": "object", "properties": {
            "region": { "type": "string", "x-mcp-header": "Region" },
            "where": { "type": "object", "properties": { "n": { "type": "integer", "x-mcp-header": "N" } } },
            "list": { "type": "array", "items": { "properties": { "x": { "x-mcp-header": "X" } } } },
            "odd": { "type": "string", "x-mcp-header": "a b" },
        } });
        let mirrored = Mirrored::default();
        mirrored.learn("t", Some(&schema));
        let call =
            parsed(json!({ "name": "t", "arguments": { "region": "eu", "where": { "n": 7 }, "list": [] } })).unwrap();
        let mut headers = mirrored.of(&call);
        headers.sort();
        assert_eq!(headers, [("N".to_owned(), "7".to_owned()), ("Region".to_owned(), "eu".to_owned())]);
        let call = parsed(json!({ "name": "t", "arguments": { "region": null } })).unwrap();
        assert!(mirrored.of(&call).is_empty());
        mirrored.learn("t", None);
        assert!(mirrored.of(&parsed(json!({ "name": "t", "arguments": { "region": "eu" } })).unwrap()).is_empty());
    }

    #[test]
    fn a_refusal_is_a_result_that_a_model_can_read() {
        let denial = Denial {
            reason: "action_denied".to_owned(),
            message: "refunds over 50 EUR are not allowed".to_owned(),
            policies: vec!["refunds".to_owned()],
            scopes: Vec::new(),
        };
        let call = parsed(json!({ "name": "refund" })).unwrap();
        let message = denied(&Id::Number(1), &call, &denial, Era::Stateless).unwrap().to_value();
        assert_eq!(message["result"]["isError"], true);
        assert_eq!(message["result"]["resultType"], "complete");
        let text = message["result"]["content"][0]["text"].as_str().unwrap();
        assert!(text.contains("refund") && text.contains("50 EUR") && text.contains("policy: refunds"), "{text}");
        let as_task = parsed(json!({ "name": "refund", "task": {} })).unwrap();
        assert_eq!(denied(&Id::Number(1), &as_task, &denial, Era::Handshake).unwrap_err().code, -32010);
    }
}
