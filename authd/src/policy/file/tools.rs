//! Tools, their servers and their approvers as they are written.
//!
//! Enters: TOML. Leaves: values of the right shape. Never: meaning; names of types are not read here.

use std::{collections::BTreeMap, fmt};

use schemars::JsonSchema;
use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, SeqAccess, Visitor},
};
use toml::Spanned;

/// Something that agents do, and that action policies decide about: `Action::"NAME"`.
#[derive(Deserialize, JsonSchema, Debug)]
#[serde(deny_unknown_fields)]
pub struct Tool {
    #[schemars(with = "String")]
    pub name: Spanned<String>,
    /// The `[[mcp_server]]` that offers it.
    #[schemars(with = "Option<String>")]
    pub server: Option<Spanned<String>>,
    /// What that server calls it. Default: `name`.
    #[schemars(with = "Option<String>")]
    pub mcp_name: Option<Spanned<String>>,
    /// The service that it acts on; it has that one's sensitivity, tenant and environment.
    #[schemars(with = "Option<String>")]
    pub service: Option<Spanned<String>>,
    /// The rule for which an allowed call opens a permit.
    #[schemars(with = "Option<String>")]
    pub permit: Option<Spanned<String>>,
    /// Types of the arguments that policies see.
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, Shape>")]
    pub arguments: Arguments,
    /// Whether calls may have arguments that are not listed.
    #[serde(default)]
    pub other_arguments: bool,
}

/// Who may approve a call that a policy with `@approval` permits.
#[derive(Deserialize, JsonSchema, Debug)]
#[serde(deny_unknown_fields)]
pub struct Approvers {
    #[schemars(with = "String")]
    pub name: Spanned<String>,
    /// Unix users (names or numbers) who approve on the operators' socket.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub users: Vec<Spanned<String>>,
    /// Approvers show a fresh token of this issuer.
    #[schemars(with = "Option<String>")]
    pub issuer: Option<Spanned<String>>,
    /// `aud` that these tokens carry: of tokens for approvals, and for nothing else.
    #[schemars(with = "Option<String>")]
    pub audience: Option<Spanned<String>>,
    /// Subjects (`sub`) of whose tokens one is taken.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub subjects: Vec<Spanned<String>>,
    /// Authentication contexts (`acr`) of which the token has to name one. Default: any.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub acr: Vec<Spanned<String>>,
    /// How long ago the approver may have shown who he is (`auth_time`), such as `5m`. Default: any time.
    #[schemars(with = "Option<String>")]
    pub max_age: Option<Spanned<String>>,
    /// How long a call waits for its approval, up to `24h`. Default: `15m`.
    #[schemars(with = "Option<String>")]
    pub ttl: Option<Spanned<String>>,
    /// How long an approval that was given can be used, up to `1h`. Default: `5m`.
    #[schemars(with = "Option<String>")]
    pub valid: Option<Spanned<String>>,
    /// Whether the one for whom the agent acts may approve.
    #[serde(default)]
    pub may_be_subject: bool,
}

/// A server that offers tools over MCP.
#[derive(Deserialize, JsonSchema, Debug)]
#[serde(deny_unknown_fields)]
pub struct McpServer {
    #[schemars(with = "String")]
    pub name: Spanned<String>,
    /// Where it is called (streamable HTTP).
    #[schemars(with = "Option<String>")]
    pub url: Option<Spanned<String>>,
    /// Program and arguments that authd starts (stdio). The program's path is absolute.
    #[schemars(with = "Option<Vec<String>>")]
    pub command: Option<Spanned<Vec<Spanned<String>>>>,
    /// The Unix user that the command runs as.
    #[schemars(with = "Option<String>")]
    pub user: Option<Spanned<String>>,
    /// The command's whole environment.
    #[schemars(with = "Option<BTreeMap<String, String>>")]
    pub environment: Option<Spanned<BTreeMap<Spanned<String>, Spanned<String>>>>,
    /// `aud` of the token that authd shows to it.
    #[schemars(with = "Option<String>")]
    pub audience: Option<Spanned<String>>,
    /// What that token allows.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub scopes: Vec<Spanned<String>>,
}

/// Names and shapes, in the order in which they are written.
#[derive(Default, Debug)]
pub struct Arguments(pub Vec<(Spanned<String>, Spanned<ArgumentShape>)>);

/// `"string?"`, `["string"]`, `{ city = "string" }`.
#[derive(Debug)]
pub enum ArgumentShape {
    Name(String),
    /// One element, which the shape does not say.
    Set(Vec<Spanned<ArgumentShape>>),
    Record(Arguments),
}

impl<'de> Deserialize<'de> for Arguments {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Arguments;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table of arguments and their types")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Arguments, A::Error> {
                read_names(map)
            }
        }
        deserializer.deserialize_map(Names)
    }
}

impl<'de> Deserialize<'de> for ArgumentShape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = ArgumentShape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a type, a list of one type, or a table of types")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<ArgumentShape, E> {
                Ok(ArgumentShape::Name(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<ArgumentShape, A::Error> {
                let mut elements = Vec::new();
                while let Some(element) = sequence.next_element()? {
                    elements.push(element);
                }
                Ok(ArgumentShape::Set(elements))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ArgumentShape, A::Error> {
                read_names(map).map(ArgumentShape::Record)
            }
        }
        deserializer.deserialize_any(Any)
    }
}

fn read_names<'de, A: MapAccess<'de>>(mut map: A) -> Result<Arguments, A::Error> {
    let mut names = Vec::new();
    while let Some(entry) = map.next_entry()? {
        names.push(entry);
    }
    Ok(Arguments(names))
}

/// What the schema says in place of [`ArgumentShape`].
#[derive(JsonSchema)]
#[schemars(untagged)]
#[expect(dead_code, reason = "describes a shape; never built")]
enum Shape {
    Name(#[schemars(regex(pattern = r"^(string|long|bool|decimal|ip|datetime|duration)\??$"))] String),
    Set(Box<[Shape; 1]>),
    Record(BTreeMap<String, Shape>),
}
