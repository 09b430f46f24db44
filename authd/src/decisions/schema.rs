//! The Cedar schema of a policy: a fixed part, and one action for each tool.
//!
//! Enters: the model. Leaves: the schema's text, for people and for Cedar. Never: anything that a call says.

use std::fmt::{self, Write};

use crate::policy::model::{ArgumentType, Model, Record};

/// What is the same on every node.
pub const FIXED: &str = include_str!("authd.cedarschema");
/// The action that all tools' actions are in.
pub const ALL_TOOLS: &str = "tools";

/// The whole schema of a policy.
pub fn generate(model: &Model) -> String {
    let mut text = FIXED.to_owned();
    for tool in &model.tools {
        // Names and arguments were checked: nothing in them ends a string.
        let _ = write!(
            text,
            "\naction \"{}\" in [Action::\"tools\"] appliesTo {{\n  principal: [Workload],\n  resource: [Tool],\n  context: \
             {{\n    arguments: {},\n    now: datetime,\n    subject?: Subject,\n    // SPIFFE IDs of all who act for the \
             subject.\n    actors: Set<String>,\n    depth: Long,\n  }},\n}};\n",
            tool.name,
            Shown(&tool.arguments)
        );
    }
    text
}

/// A record in Cedar's syntax.
struct Shown<'a>(&'a Record);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{ ")?;
        for (name, argument) in &self.0.0 {
            write!(f, "\"{name}\"{}: ", if argument.optional { "?" } else { "" })?;
            show(&argument.kind, f)?;
            f.write_str(", ")?;
        }
        f.write_str("}")
    }
}

fn show(kind: &ArgumentType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    match kind {
        ArgumentType::String => f.write_str("String"),
        ArgumentType::Long => f.write_str("Long"),
        ArgumentType::Bool => f.write_str("Bool"),
        ArgumentType::Decimal => f.write_str("decimal"),
        ArgumentType::Ip => f.write_str("ipaddr"),
        ArgumentType::Datetime => f.write_str("datetime"),
        ArgumentType::Duration => f.write_str("duration"),
        ArgumentType::Set(element) => {
            f.write_str("Set<")?;
            show(element, f)?;
            f.write_str(">")
        }
        ArgumentType::Record(record) => write!(f, "{}", Shown(record)),
    }
}
