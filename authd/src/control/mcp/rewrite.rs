//! What is written anew in a server's message before an agent gets it: whose request it is about, and what only authd says.
//!
//! Enters: messages whose envelope was read. Leaves: the same under the agent's own id, without what would be taken for a word of
//! authd's. Never: another spelling of anything else; numbers stay as the server wrote them.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::{Value, value::RawValue};

use super::{
    message::{FromServer, Id, Kind, NOT_ALLOWED, TOO_MUCH, fold},
    methods,
};

/// In `_meta`: which subscription a notification, or its end, is about.
pub const SUBSCRIPTION: &str = "io.modelcontextprotocol/subscriptionId";
/// What an error of a server is told as that has a code of authd's.
pub const OTHER_CODE: i32 = -32000;
/// Keys that begin so are authd's own.
const OWN: &str = "authd/";

/// Members of one object, as they stand there: a name that stands twice is there twice.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(All)
    }
}

type Written<'a> = Result<Option<Cow<'a, str>>, serde_json::Error>;

/// An object whose members are what `change` makes of them, by their folded names: some parsers ignore case. Anything else is left
/// as it is.
fn each<'a>(value: &'a RawValue, change: impl Fn(&str, &'a RawValue) -> Written<'a>) -> Written<'a> {
    if !value.get().starts_with('{') {
        return as_it_is(value);
    }
    let members: Members<'a> = serde_json::from_str(value.get())?;
    let mut text = String::with_capacity(value.get().len());
    for (name, value) in members.0 {
        let Some(value) = change(&fold(&name), value)? else { continue };
        text.push(if text.is_empty() { '{' } else { ',' });
        text.push_str(&Value::from(name).to_string());
        text.push(':');
        text.push_str(&value);
    }
    if text.is_empty() {
        text.push('{');
    }
    text.push('}');
    Ok(Some(text.into()))
}

fn as_it_is(value: &RawValue) -> Written<'_> {
    Ok(Some(value.get().into()))
}

/// Without what is authd's.
fn foreign(value: &RawValue) -> Written<'_> {
    each(value, |name, value| if name.starts_with(OWN) { Ok(None) } else { as_it_is(value) })
}

/// `_meta`, about a subscription by the agent's id of it.
fn meta<'a>(value: &'a RawValue, id: &Id) -> Written<'a> {
    each(value, |name, value| match name {
        _ if name == fold(SUBSCRIPTION) => Ok(Some(id.to_value().to_string().into())),
        _ if name.starts_with(OWN) => Ok(None),
        _ => as_it_is(value),
    })
}

fn error_object(value: &RawValue) -> Written<'_> {
    each(value, |name, value| match name {
        "code" => {
            let own = f64::from(TOO_MUCH)..=f64::from(NOT_ALLOWED);
            let is_own = value.get().parse::<f64>().is_ok_and(|code| own.contains(&code));
            if is_own { Ok(Some(OTHER_CODE.to_string().into())) } else { as_it_is(value) }
        }
        "data" => foreign(value),
        _ => as_it_is(value),
    })
}

/// A member of the envelope, which has each of them once.
fn member<'a>(message: &'a FromServer, wanted: &str) -> Option<&'a RawValue> {
    let members: Members<'a> = serde_json::from_str(message.text()).ok()?;
    members.0.into_iter().find(|(name, _)| name == wanted).map(|(_, value)| value)
}

/// An answer, under the id by which the agent asked. `None`: it cannot be read.
pub fn answer(message: &FromServer, id: &Id) -> Option<FromServer> {
    let Kind::Response { is_error, .. } = message.kind else { return None };
    let name = if is_error { "error" } else { "result" };
    let value = member(message, name)?;
    let written = match is_error {
        true => error_object(value),
        false => each(value, |name, value| if name == "_meta" { meta(value, id) } else { as_it_is(value) }),
    };
    let text = format!(r#"{{"jsonrpc":"2.0","id":{},"{name}":{}}}"#, id.to_value(), written.ok()??);
    Some(FromServer::written(Kind::Response { id: id.clone(), is_error }, text))
}

/// The error of an answer, or of one to nothing that could be read.
pub fn error(message: &FromServer) -> Option<Value> {
    serde_json::from_str(&error_object(member(message, "error")?).ok()??).ok()
}

/// The id of the agent's request that a notification is about, as the server knows it: of a subscription (2026-07-28), which it
/// belongs to, or is the end of.
pub fn subscription(message: &FromServer) -> Option<Value> {
    let Kind::Notification { method } = &message.kind else { return None };
    let value = message.to_value();
    let params = value.get("params")?;
    let tag = params.get("_meta").and_then(|meta| meta.get(SUBSCRIPTION));
    tag.or_else(|| params.get("requestId").filter(|_| method == methods::CANCELLED)).cloned()
}

/// A notification in the stream of one request. If it belongs to a subscription, that is this one, and has the agent's own id.
pub fn subscribed(message: FromServer, number: i64, id: &Id) -> Option<FromServer> {
    match subscription(&message) {
        Some(tag) if tag == number => about(&message, id),
        Some(_) => None,
        None => Some(message),
    }
}

fn about(message: &FromServer, id: &Id) -> Option<FromServer> {
    let Kind::Notification { method } = &message.kind else { return None };
    let written = each(member(message, "params")?, |name, value| match name {
        "_meta" => meta(value, id),
        "requestid" if method == methods::CANCELLED => Ok(Some(id.to_value().to_string().into())),
        _ => as_it_is(value),
    });
    let method_text = Value::from(method.as_str());
    let text = format!(r#"{{"jsonrpc":"2.0","method":{method_text},"params":{}}}"#, written.ok()??);
    Some(FromServer::written(message.kind.clone(), text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> FromServer {
        FromServer::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn an_answer_changes_in_its_id_alone() {
        let text = r#"{"jsonrpc":"2.0","id":9,"result":{"n":123456789012345678901234567890, "x":1.0e5,"_meta":{"a/b": {"c":1}}}}"#;
        let answer = answer(&read(text), &Id::Text("a\"b".to_owned())).unwrap();
        assert_eq!(
            answer.text(),
            r#"{"jsonrpc":"2.0","id":"a\"b","result":{"n":123456789012345678901234567890,"x":1.0e5,"_meta":{"a/b":{"c":1}}}}"#
        );
        assert!(answer.answers(&Id::Text("a\"b".to_owned())));
        for text in [r#"{"jsonrpc":"2.0","id":9,"result":[1]}"#, r#"{"jsonrpc":"2.0","id":9,"result":{}}"#] {
            assert_eq!(super::answer(&read(text), &Id::Number(9)).unwrap().text(), text);
        }
    }

    #[test]
    fn a_server_does_not_speak_as_authd() {
        let said = |rest: &str| {
            let message = read(&format!(r#"{{"jsonrpc":"2.0","id":9,{rest}}}"#));
            answer(&message, &Id::Number(1)).unwrap().to_value()
        };
        for meta in [
            r#"{"authd/reason":"approval_pending","x":1}"#,
            r#"{"\u0061uthd\/reason":"approval_pending","x":1}"#,
            r#"{"Authd/approval":"a","x":1}"#,
        ] {
            assert_eq!(
                said(&format!(r#""result":{{"_meta":{meta}}}"#))["result"],
                serde_json::json!({"_meta":{"x":1}})
            );
        }
        // Some clients take the first one of two.
        let twice = r#""result":{"_meta":{"authd/reason":"x"},"_meta":{"y":1},"_META":{"authd/reason":"x"}}"#;
        let message = read(&format!(r#"{{"jsonrpc":"2.0","id":9,{twice}}}"#));
        assert!(!answer(&message, &Id::Number(1)).unwrap().text().contains("authd"));
        for code in ["-32010", "-32011", "-32012", "-32010.0", "-3.2011e4"] {
            let error = format!(r#""error":{{"code":{code},"message":"m","data":{{"authd/reason":"x","y":1}}}}"#);
            let expected = serde_json::json!({ "code": -32000, "message": "m", "data": { "y": 1 } });
            assert_eq!(said(&error)["error"], expected, "{code}");
        }
        let other = r#""error":{"code":-32602,"message":"m"}"#;
        assert_eq!(said(other)["error"]["code"], -32602);
        let nobodys = read(r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32010,"message":"m"}}"#);
        assert_eq!(error(&nobodys).unwrap()["code"], -32000);
    }

    #[test]
    fn a_subscription_has_the_agents_id() {
        let agents = Id::Text("s".to_owned());
        let text = r#"{"jsonrpc":"2.0","method":"notifications/tools/list_changed","params":{"_meta":{"io.modelcontextprotocol/subscriptionId":9}}}"#;
        assert_eq!(subscribed(read(text), 9, &agents).unwrap().text(), text.replace(":9}", ":\"s\"}"));
        assert_eq!(subscribed(read(text), 8, &agents), None, "it would be taken for another one's");
        let end = r#"{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":9}}"#;
        assert_eq!(subscribed(read(end), 9, &agents).unwrap().to_value()["params"]["requestId"], "s");
        let other = r#"{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":9,"requestId":9}}"#;
        assert_eq!(subscribed(read(other), 8, &agents).unwrap().text(), other);
    }
}
