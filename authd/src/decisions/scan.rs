//! What a policy's conditions look at.
//!
//! Enters: a policy. Leaves: whether it can differ from call to call, and whose attributes it reads. Never: a value.

use cedar_policy::{EntityUid, Policy};
use serde_json::Value;

/// Attributes of the caller that differ between its instances.
pub const OF_INSTANCE: [&str; 2] = ["spiffe_id", "instance"];

#[derive(Default, Debug)]
pub struct Looks {
    /// At the context, or at what differs between instances of a workload.
    pub at_call: bool,
    /// Entities that are named, and not only compared.
    pub into: Vec<EntityUid>,
}

/// Without a form in JSON (there always is one), everything has to be expected of a policy.
pub fn scan(policy: &Policy) -> Looks {
    let mut looks = Looks::default();
    match policy.to_json() {
        Ok(Value::Object(json)) => json.get("conditions").into_iter().for_each(|conditions| looks.visit(conditions)),
        _ => looks.at_call = true,
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
                    self.at_call |= key == "Var" && text == Some("context");
                    self.at_call |= key == "attr" && text.is_some_and(|attr| OF_INSTANCE.contains(&attr));
                    match (key.as_str(), value) {
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
    fn what_differs_from_call_to_call_is_seen() {
        for condition in [
            "context.depth < 2",
            "context has subject",
            "principal.spiffe_id like \"spiffe://*\"",
            "principal.instance == \"/a\"",
            "principal has instance",
            "principal[\"instance\"] == \"x\"",
            "resource.name == \"x\" || (true && [context.depth].contains(1))",
        ] {
            assert!(scanned(condition).0, "{condition}");
        }
    }
}
