//! What a policy's conditions look at.
//!
//! Enters: a policy. Leaves: whether it can differ from call to call, whose attributes it reads, and which part of the context.
//! Never: a value.

use std::collections::HashSet;

use cedar_policy::{EntityUid, Policy};
use serde_json::{Map, Value};

/// Attributes of the caller that differ between its instances.
pub const OF_INSTANCE: [&str; 2] = ["spiffe_id", "instance"];

#[derive(Default, Debug)]
pub struct Looks {
    /// At the context, or at what differs between instances of a workload.
    pub at_call: bool,
    pub at: Context,
    /// Entities that are named, and not only compared.
    pub into: Vec<EntityUid>,
    /// What `context.subject.issuer` is compared with.
    pub issuers: Vec<String>,
}

/// Parts of the context. What no policy of a tool looks at is not made for its calls: a `decimal` or `datetime` takes Cedar
/// longer to make than most policies to evaluate.
#[derive(Default, Debug)]
pub struct Context {
    everything: bool,
    every_argument: bool,
    attributes: HashSet<String>,
    arguments: HashSet<String>,
}

impl Context {
    #[cfg(test)]
    pub fn everything() -> Self {
        Self { everything: true, ..Self::default() }
    }

    pub fn has(&self, attribute: &str) -> bool {
        self.everything || self.attributes.contains(attribute)
    }

    pub fn has_argument(&self, name: &str) -> bool {
        self.everything || self.every_argument || self.arguments.contains(name)
    }

    pub fn extend(&mut self, other: &Self) {
        self.everything |= other.everything;
        self.every_argument |= other.every_argument;
        self.attributes.extend(other.attributes.iter().cloned());
        self.arguments.extend(other.arguments.iter().cloned());
    }
}

/// Without a form in JSON (there always is one), everything has to be expected of a policy.
pub fn scan(policy: &Policy) -> Looks {
    let mut looks = Looks::default();
    match policy.to_json() {
        Ok(Value::Object(json)) => json.get("conditions").into_iter().for_each(|conditions| looks.visit(conditions)),
        _ => (looks.at_call, looks.at.everything) = (true, true),
    }
    looks
}

impl Looks {
    /// The policy's JSON form: <https://docs.cedarpolicy.com/policies/json-format.html>.
    fn visit(&mut self, json: &Value) {
        match json {
            Value::Array(elements) => elements.iter().for_each(|element| self.visit(element)),
            Value::Object(fields) => {
                if let Some(uid) = fields.get("__entity") {
                    self.into.extend(EntityUid::from_json(uid.clone()));
                    return;
                }
                for (key, value) in fields {
                    let text = value.as_str();
                    // As a whole: what is read of it is seen below.
                    if key == "Var" && text == Some("context") {
                        (self.at_call, self.at.everything) = (true, true);
                    }
                    let of_instance = |attr: &Value| attr.as_str().is_some_and(|attr| OF_INSTANCE.contains(&attr));
                    self.at_call |= key == "attr"
                        && (of_instance(value) || value.as_array().is_some_and(|path| path.iter().any(of_instance)));
                    if let ("==" | "!=", Value::Object(operands)) = (key.as_str(), value) {
                        self.issuers.extend(issuer_compared(operands));
                    }
                    match (key.as_str(), value) {
                        ("." | "has", Value::Object(operands)) if self.of_context(operands) => {}
                        ("==" | "!=" | "contains" | "containsAll" | "containsAny", Value::Object(operands)) => {
                            operands
                                .values()
                                .filter(|operand| !is_name(operand))
                                .for_each(|operand| self.visit(operand));
                        }
                        // What is in something has to be known; what it is in, only by name.
                        ("in", Value::Object(operands)) if operands.contains_key("right") => {
                            let looked = |(side, operand): &(&String, &Value)| *side != "right" || !is_name(operand);
                            operands.iter().filter(looked).for_each(|(_, operand)| self.visit(operand));
                        }
                        _ => self.visit(value),
                    }
                }
            }
            _ => {}
        }
    }
}

impl Looks {
    /// `context.attr`, `context has attr`, and the same of `context.arguments`.
    fn of_context(&mut self, operands: &Map<String, Value>) -> bool {
        let Some((left, path)) = access(operands) else { return false };
        let of_arguments = |left: &Value| {
            let inner = left.get(".").and_then(Value::as_object).and_then(access);
            inner.is_some_and(|(left, path)| is_context(left) && path == ["arguments"])
        };
        match path[..] {
            ["arguments", argument, ..] if is_context(left) => self.at.arguments.insert(argument.to_owned()),
            ["arguments"] if is_context(left) => std::mem::replace(&mut self.at.every_argument, true),
            [attribute, ..] if is_context(left) => self.at.attributes.insert(attribute.to_owned()),
            [argument, ..] if of_arguments(left) => self.at.arguments.insert(argument.to_owned()),
            _ => return false,
        };
        if path.first() == Some(&"arguments") || !is_context(left) {
            self.at.attributes.insert("arguments".to_owned());
        }
        self.at_call = true;
        true
    }
}

/// The text in `context.subject.issuer == "text"`, whichever comes first.
fn issuer_compared(operands: &Map<String, Value>) -> Option<String> {
    let (left, right) = (operands.get("left")?, operands.get("right")?);
    let (issuer, text) = if right.get("Value").is_some() { (left, right) } else { (right, left) };
    let of = |json: &Value, attribute: &str| -> Option<Value> {
        let (inner, path) = access(json.get(".")?.as_object()?)?;
        (path == [attribute]).then(|| inner.clone())
    };
    let context = of(&of(issuer, "issuer")?, "subject")?;
    is_context(&context).then(|| text.get("Value")?.as_str().map(str::to_owned))?
}

/// What is asked for which attribute, or for which attribute of an attribute (`has a.b`).
fn access(operands: &Map<String, Value>) -> Option<(&Value, Vec<&str>)> {
    let path = match operands.get("attr")? {
        Value::Array(path) => path.iter().map(Value::as_str).collect::<Option<_>>()?,
        one => vec![one.as_str()?],
    };
    Some((operands.get("left")?, path))
}

fn is_context(json: &Value) -> bool {
    json.get("Var").and_then(Value::as_str) == Some("context")
}

/// Whether an expression is an entity's name, or a set of some.
fn is_name(json: &Value) -> bool {
    let Value::Object(fields) = json else { return false };
    match (fields.get("Value"), fields.get("Set")) {
        (Some(value), None) => value.get("__entity").is_some(),
        (None, Some(Value::Array(elements))) => elements.iter().all(is_name),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scanned(condition: &str) -> (bool, Vec<String>) {
        let text = format!("permit(principal == Workload::\"scope\", action, resource) when {{ {condition} }};");
        let looks = scan(&Policy::parse(None, &text).unwrap());
        (looks.at_call, looks.into.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn names_that_are_compared_are_not_looked_into() {
        for condition in [
            "principal == Workload::\"a\"",
            "Workload::\"a\" != principal",
            "principal in [Kind::\"agent\", Tenant::\"t\"]",
            "resource in Service::\"s\"",
            "[Workload::\"a\", Workload::\"b\"].contains(principal)",
            "resource is Tool",
            "principal.name like \"spiffe_id*\"",
            "principal.name == \"context\"",
        ] {
            assert_eq!(scanned(condition), (false, vec![]), "{condition}");
        }
        for (condition, into) in [
            ("Service::\"s\".sensitivity == Sensitivity::\"high\"", "Service::\"s\""),
            ("Workload::\"a\" has tenant", "Workload::\"a\""),
            ("Workload::\"a\" in Kind::\"agent\"", "Workload::\"a\""),
            ("{ a: Tool::\"t\" }.a.name == \"x\"", "Tool::\"t\""),
            ("resource in Tool::\"t\".service", "Tool::\"t\""),
        ] {
            assert_eq!(scanned(condition), (false, vec![into.to_owned()]), "{condition}");
        }
    }

    #[test]
    fn issuers_that_are_compared_are_seen() {
        for (condition, expected) in [
            (
                "context has subject && context.subject.issuer == \"a\" || context[\"subject\"][\"issuer\"] == \"b\"",
                &["a", "b"][..],
            ),
            ("context has subject && \"a\" != context.subject.issuer", &["a"]),
            ("context.subject.id == \"a\" || context.arguments.issuer == \"b\"", &[]),
            ("context.arguments.subject.issuer == \"a\" || principal.subject.issuer == \"b\"", &[]),
            ("context.subject.issuer == context.subject.id || \"context.subject.issuer\" == \"a\"", &[]),
        ] {
            let text = format!("permit(principal, action, resource) when {{ {condition} }};");
            assert_eq!(scan(&Policy::parse(None, &text).unwrap()).issuers, expected, "{condition}");
        }
    }

    #[test]
    fn what_differs_from_call_to_call_is_seen() {
        for condition in [
            "context.depth < 2",
            "context has subject",
            "principal.spiffe_id like \"spiffe://*\"",
            "principal.instance == \"/a\"",
            "principal has instance",
            "principal has kind.instance",
            "principal[\"instance\"] == \"x\"",
            "resource.name == \"x\" || (true && [context.depth].contains(1))",
        ] {
            assert!(scanned(condition).0, "{condition}");
        }
    }

    #[test]
    fn what_is_read_of_the_context_is_seen() {
        let at = |condition: &str| {
            let text = format!("permit(principal, action, resource) when {{ {condition} }};");
            scan(&Policy::parse(None, &text).unwrap()).at
        };
        let names = ["now", "subject", "actors", "depth", "arguments"];
        let arguments = ["a", "b"];
        for (condition, expected, expected_arguments) in [
            ("true", &[][..], &[][..]),
            ("principal has now && \"context\" == principal.name", &[], &[]),
            ("context.now < datetime(\"2026-01-01\")", &["now"], &[]),
            ("context has subject && context.subject.scopes.contains(\"a\")", &["subject"], &[]),
            ("context.arguments.a == 1 || context[\"depth\"] == 1", &["depth", "arguments"], &["a"]),
            ("context.arguments has b", &["arguments"], &["b"]),
            ("context.arguments.a.b == 1", &["arguments"], &["a"]),
            ("context has arguments.a && context.actors.isEmpty()", &["actors", "arguments"], &["a"]),
            ("context.arguments has a.b && context has subject.client", &["subject", "arguments"], &["a"]),
            ("context.arguments == { a: 1 }", &["arguments"], &["a", "b"]),
            ("[context].contains(context)", &names, &["a", "b"]),
            ("(if true then context else context).depth == 1", &names, &["a", "b"]),
            ("{ a: context.arguments }.a.a == 1", &["arguments"], &["a", "b"]),
        ] {
            let at = at(condition);
            let found: Vec<&str> = names.into_iter().filter(|name| at.has(name)).collect();
            let found_arguments: Vec<&str> = arguments.into_iter().filter(|name| at.has_argument(name)).collect();
            assert_eq!((found, found_arguments), (expected.to_vec(), expected_arguments.to_vec()), "{condition}");
        }
    }
}
