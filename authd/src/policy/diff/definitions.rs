//! Which definitions differ between two sets of policy files, as they are written.
//!
//! Enters: sources that were read without an error. Leaves: what is new, gone or changed, by name. Never: what that means for a
//! flow or a call; the order of definitions, the files that they are in, comments and layout say nothing.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::Value;

use crate::{decisions, policy::diagnostic::Source};

/// What Cedar's policies are called here.
const ACTION_POLICY: &str = "action policy";

/// A definition that is not the same in both.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct Definition {
    /// As the policy calls it: `rule`, `tool`, or `action policy`; the setting's name where there is one of it.
    pub kind: String,
    /// Empty where there is one of it.
    pub name: String,
    pub change: Edit,
    /// Where both have it: what differs.
    pub fields: Vec<Field>,
}

#[derive(Clone, Copy, Debug, Serialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Edit {
    Added,
    Removed,
    Changed,
}

/// One value of a definition, `null` where there is none.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct Field {
    /// With dots between the names of tables within tables. Empty for the whole.
    pub path: String,
    pub before: Value,
    pub after: Value,
}

/// Kind and name.
type Key = (String, String);
type Definitions = BTreeMap<Key, Content>;

#[derive(Clone)]
struct Content {
    value: Value,
    /// As it is shown, where that is not the value.
    text: Option<String>,
}

impl Content {
    fn differences(&self, after: &Self) -> Vec<Field> {
        let mut fields = Vec::new();
        if let (Some(before), Some(text)) = (&self.text, &after.text) {
            if self.value != after.value {
                fields.push(Field { path: String::new(), before: before.as_str().into(), after: text.as_str().into() });
            }
        } else {
            compare(String::new(), &self.value, &after.value, &mut fields);
        }
        fields
    }
}

pub fn differences(old: &[Source], new: &[Source]) -> Result<Vec<Definition>, toml::de::Error> {
    let (mut old, mut new) = (definitions(old)?, definitions(new)?);
    moved(&mut old, &mut new);
    let names: BTreeSet<_> = old.keys().chain(new.keys()).cloned().collect();
    let compared = names.into_iter().filter_map(|key| {
        let (change, fields) = match (old.get(&key), new.get(&key)) {
            (None, _) => (Edit::Added, Vec::new()),
            (_, None) => (Edit::Removed, Vec::new()),
            (Some(before), Some(after)) => (Edit::Changed, before.differences(after)),
        };
        let (kind, name) = key;
        (change != Edit::Changed || !fields.is_empty()).then_some(Definition { kind, name, change, fields })
    });
    Ok(compared.collect())
}

fn definitions(sources: &[Source]) -> Result<Definitions, toml::de::Error> {
    let (cedar, files): (Vec<Source>, Vec<Source>) =
        sources.iter().cloned().partition(|source| source.name.ends_with(decisions::SUFFIX));
    let mut found = Definitions::new();
    let mut put = |kind: &str, name: &str, value, text| {
        found.insert((kind.to_owned(), name.to_owned()), Content { value, text });
    };
    for file in files {
        for (kind, value) in toml::from_str::<serde_json::Map<String, Value>>(&file.text)? {
            let Value::Array(several) = value else {
                put(&kind, "", value, None);
                continue;
            };
            for one in several {
                let name = one["name"].as_str().unwrap_or_default().to_owned();
                put(&kind, &name, one, None);
            }
        }
    }
    for written in decisions::read(&cedar).0 {
        // What it says, however it is written: the JSON form of Cedar has no comments and no layout.
        let text = written.place.source.text.get(written.place.span.clone()).unwrap_or_default();
        let value = written.policy.to_json().unwrap_or_else(|_| text.into());
        put(ACTION_POLICY, &written.id, value, Some(text.to_owned()));
    }
    Ok(found)
}

/// Action policies without a name are called by their line: one that only moved is no other one.
fn moved(old: &mut Definitions, new: &mut Definitions) {
    let only = |set: &Definitions, other: &Definitions| -> Vec<Key> {
        let value = |set: &Definitions, key: &Key| set.get(key).map(|content| content.value.clone());
        let differs = |key: &&Key| key.0 == ACTION_POLICY && value(set, key) != value(other, key);
        set.keys().filter(differs).cloned().collect()
    };
    let (mut from, to) = (only(old, new), only(new, old));
    for key in to {
        let same = |candidate: &Key| old[candidate].value == new[&key].value;
        if let Some(found) = from.iter().position(same) {
            old.remove(&from.swap_remove(found));
            new.remove(&key);
        }
    }
}

fn compare(path: String, before: &Value, after: &Value, fields: &mut Vec<Field>) {
    match (before, after) {
        (Value::Object(old), Value::Object(new)) => {
            let names: BTreeSet<_> = old.keys().chain(new.keys()).collect();
            for name in names {
                let inner = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                let value = |table: &serde_json::Map<String, Value>| table.get(name).cloned().unwrap_or_default();
                compare(inner, &value(old), &value(new), fields);
            }
        }
        _ if before == after => {}
        _ => fields.push(Field { path, before: before.clone(), after: after.clone() }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn source(name: &str, text: &str) -> Source {
        Source { name: name.into(), text: text.into() }
    }

    const TOOLS: &str = "[[tool]]\nname = \"pay\"\narguments = { amount = { type = \"long\", max = 10 }, to = { type = \"string\" } }\n";
    const POLICIES: &str = "permit (principal, action, resource == Tool::\"pay\");\n@id(\"never\")\nforbid (principal, action, resource);\n";

    fn of(old: &[Source], new: &[Source]) -> Vec<(String, String, Edit)> {
        differences(old, new).unwrap().into_iter().map(|one| (one.kind, one.name, one.change)).collect()
    }

    #[test]
    fn what_differs_is_named_with_both_values() {
        let before = source("a.toml", &format!("mode = \"observe\"\n{TOOLS}[[rule]]\nname = \"gone\"\n"));
        let after = TOOLS.replace("max = 10", "min = 1") + "[[delegation]]\nname = \"new\"\n";
        let found = differences(&[before], &[source("a.toml", &after)]).unwrap();
        let names: Vec<_> = found.iter().map(|one| (&*one.kind, &*one.name, one.change)).collect();
        assert_eq!(
            names,
            [
                ("delegation", "new", Edit::Added),
                ("mode", "", Edit::Removed),
                ("rule", "gone", Edit::Removed),
                ("tool", "pay", Edit::Changed)
            ]
        );
        let field = |path: &str, before, after| Field { path: path.to_owned(), before, after };
        assert_eq!(
            found[3].fields,
            [
                field("arguments.amount.max", json!(10), Value::Null),
                field("arguments.amount.min", Value::Null, json!(1))
            ]
        );
        let mode = |mode: &str| source("a.toml", &format!("mode = \"{mode}\"\n"));
        let found = differences(&[mode("observe")], &[mode("enforce")]).unwrap();
        assert_eq!(found[0].fields, [field("", json!("observe"), json!("enforce"))]);
    }

    #[test]
    fn files_order_and_layout_are_no_difference() {
        let old = [source("a.toml", &format!("{TOOLS}[[rule]]\nname = \"r\"\n")), source("p.cedar", POLICIES)];
        let new = [
            source("r.toml", "# Moved.\n[[rule]]\nname = \"r\"\n"),
            source("t.toml", TOOLS),
            source("q.cedar", &format!("// Moved.\n\n{}", POLICIES.replace("(principal,", "(\n  principal,"))),
        ];
        assert_eq!(of(&old, &new), []);
    }

    #[test]
    fn action_policies_are_compared_by_name() {
        let old = [source("p.cedar", POLICIES)];
        let changed =
            [source("p.cedar", &POLICIES.replace("forbid (principal, action", "forbid (principal, action in []"))];
        assert_eq!(of(&old, &changed), [(ACTION_POLICY.to_owned(), "never".to_owned(), Edit::Changed)]);
        let cut = [source("p.cedar", &POLICIES[..POLICIES.find("@id").unwrap()])];
        assert_eq!(of(&old, &cut), [(ACTION_POLICY.to_owned(), "never".to_owned(), Edit::Removed)]);
        // Another name is another policy, though it says the same.
        let renamed = [source("p.cedar", &POLICIES.replace("never", "always"))];
        assert_eq!(of(&old, &renamed).len(), 2);
    }
}
