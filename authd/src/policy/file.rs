//! Policy files as they are written: the raw form, with byte positions.
//!
//! Enters: TOML. Leaves: values of the right shape. Never: meaning; names are not resolved here, numbers not checked.

mod tools;

use std::{fmt, ops::Range};

use schemars::JsonSchema;
use serde::{
    Deserialize, Deserializer,
    de::{SeqAccess, Visitor},
};
use toml::Spanned;

pub use self::tools::{Approvers, ArgumentShape, Arguments, McpServer, Tool};
use crate::proofs::x509::crl::CrlPolicy;

/// A policy file. All files of a directory are merged; their order does not matter.
#[derive(Deserialize, JsonSchema, Debug, Default)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Trust domain of the SPIFFE IDs that workloads have. Once over all files.
    #[schemars(with = "Option<String>")]
    pub trust_domain: Option<Spanned<String>>,
    /// Whether denials are enforced or only observed. Once over all files.
    #[schemars(with = "Option<Mode>")]
    pub mode: Option<Spanned<Mode>>,
    /// Something that runs on this node, recognised by its cgroup.
    #[serde(default)]
    #[schemars(with = "Vec<Workload>")]
    pub workload: Vec<Spanned<Workload>>,
    /// A caller that is not on this node.
    #[serde(default)]
    #[schemars(with = "Vec<Peer>")]
    pub peer: Vec<Spanned<Peer>>,
    /// Another node that runs authd.
    #[serde(default)]
    #[schemars(with = "Vec<Node>")]
    pub node: Vec<Spanned<Node>>,
    /// Something that is called.
    #[serde(default)]
    #[schemars(with = "Vec<Service>")]
    pub service: Vec<Spanned<Service>>,
    /// Who issues tokens.
    #[serde(default)]
    #[schemars(with = "Vec<Issuer>")]
    pub issuer: Vec<Spanned<Issuer>>,
    /// Whose word counts about certificates.
    #[serde(default)]
    #[schemars(with = "Vec<Authority>")]
    pub authority: Vec<Spanned<Authority>>,
    /// Who may act for whom.
    #[serde(default)]
    #[schemars(with = "Vec<Delegation>")]
    pub delegation: Vec<Spanned<Delegation>>,
    /// What agents may do, as far as action policies (`*.cedar`) allow it.
    #[serde(default)]
    #[schemars(with = "Vec<Tool>")]
    pub tool: Vec<Spanned<Tool>>,
    /// Who may approve actions.
    #[serde(default)]
    #[schemars(with = "Vec<Approvers>")]
    pub approvers: Vec<Spanned<Approvers>>,
    /// Who offers tools over MCP.
    #[serde(default)]
    #[schemars(with = "Vec<McpServer>")]
    pub mcp_server: Vec<Spanned<McpServer>>,
    /// Who may call what.
    #[serde(default)]
    #[schemars(with = "Vec<Rule>")]
    pub rule: Vec<Spanned<Rule>>,
}

#[derive(Deserialize, JsonSchema, Clone, Copy, PartialEq, Eq, Debug, Default)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Denials block.
    #[default]
    Enforce,
    /// Denials are recorded and let through.
    Observe,
}

#[derive(Deserialize, serde::Serialize, JsonSchema, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Service,
    Job,
    Agent,
    Gateway,
    Person,
    Partner,
}

impl Kind {
    /// As policies write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Job => "job",
            Self::Agent => "agent",
            Self::Gateway => "gateway",
            Self::Person => "person",
            Self::Partner => "partner",
        }
    }
}

#[derive(Deserialize, serde::Serialize, JsonSchema, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
#[serde(rename_all = "snake_case")]
pub enum Sensitivity {
    Low,
    #[default]
    Medium,
    High,
}

impl Sensitivity {
    /// As policies write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }
}

#[derive(Deserialize, JsonSchema, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "snake_case")]
pub enum Inbound {
    /// Ports without a service of their own accept anybody.
    Open,
    /// Only what a service guards can be called.
    Closed,
}

#[derive(Deserialize, JsonSchema, Clone, Copy, PartialEq, Eq, Debug, Default)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    #[default]
    Allow,
    Deny,
}

#[derive(Deserialize, serde::Serialize, JsonSchema, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "kebab-case")]
pub enum Proof {
    /// This kernel attests the caller. Always there for callers on this node.
    Cgroup,
    /// Another node's authd vouches for the caller.
    Node,
    Mtls,
    Token,
    ApiKey,
    /// A call of a tool that the action policy allows. It opens a permit, and nothing else does.
    Action,
    /// A person's yes to that call.
    Approval,
}

impl Proof {
    /// As policies write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroup",
            Self::Node => "node",
            Self::Mtls => "mtls",
            Self::Token => "token",
            Self::ApiKey => "api-key",
            Self::Action => "action",
            Self::Approval => "approval",
        }
    }
}

/// One text or several, each with its place if it has one of its own.
#[derive(Debug)]
pub struct Texts(Vec<(String, Option<Range<usize>>)>);

impl Texts {
    /// Each text with its place; a single one has that of the whole value.
    pub fn spanned(texts: Spanned<Self>) -> Vec<Spanned<String>> {
        let whole = texts.span();
        let spanned = |(text, span): (String, Option<Range<usize>>)| Spanned::new(span.unwrap_or(whole.clone()), text);
        texts.into_inner().0.into_iter().map(spanned).collect()
    }
}

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrMany;
        impl<'de> Visitor<'de> for OneOrMany {
            type Value = Texts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E>(self, text: &str) -> Result<Texts, E> {
                Ok(Texts(vec![(text.to_owned(), None)]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Texts, A::Error> {
                let mut texts = Vec::new();
                while let Some(text) = sequence.next_element::<Spanned<String>>()? {
                    let span = text.span();
                    texts.push((text.into_inner(), Some(span)));
                }
                Ok(Texts(texts))
            }
        }
        deserializer.deserialize_any(OneOrMany)
    }
}

/// What the schema says in place of [`Texts`].
#[derive(JsonSchema)]
#[schemars(untagged)]
#[expect(dead_code, reason = "describes a shape; never built")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize, JsonSchema, Debug)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    #[schemars(with = "String")]
    pub name: Spanned<String>,
    #[schemars(with = "Kind")]
    pub kind: Spanned<Kind>,
    /// Glob (or several) of cgroup paths below the enforced root, such as `/system.slice/payments-*.service`.
    #[schemars(with = "OneOrMany")]
    pub cgroup: Spanned<Texts>,
    #[schemars(with = "Option<String>")]
    pub tenant: Option<Spanned<String>>,
    #[schemars(with = "Option<String>")]
    pub environment: Option<Spanned<String>>,
    #[serde(default)]
    pub mode: Mode,
    /// May open raw IP sockets (`ping` of old, packet crafters); every packet is then judged by its own headers.
    #[serde(default)]
    pub raw_sockets: bool,
    /// Whether ports that no service guards may be called. Default: `closed` for agents and jobs, else `open`.
    pub inbound: Option<Inbound>,
    /// Path of the SPIFFE ID; `{instance}` stands for the cgroup that matched.
    #[schemars(with = "Option<String>")]
    pub spiffe_id: Option<Spanned<String>>,
}

#[derive(Deserialize, JsonSchema, Debug)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    #[schemars(with = "String")]
    pub name: Spanned<String>,
    pub kind: Option<Kind>,
    /// Addresses and networks that it calls from.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub networks: Vec<Spanned<String>>,
    /// SPIFFE ID of its certificate, in full.
    #[schemars(with = "Option<String>")]
    pub spiffe_id: Option<Spanned<String>>,
    /// DNS name in its certificate; `*.example.org` stands for any name one label longer.
    #[schemars(with = "Option<String>")]
    pub dns: Option<Spanned<String>>,
    /// Subject of its certificate (RFC 4514), as `openssl x509 -noout -subject -nameopt RFC2253,-esc_msb,utf8` prints it.
    #[schemars(with = "Option<String>")]
    pub subject: Option<Spanned<String>>,
    #[schemars(with = "Option<String>")]
    pub tenant: Option<Spanned<String>>,
    #[schemars(with = "Option<String>")]
    pub environment: Option<Spanned<String>>,
}

/// Another node that runs authd, and for whom it may vouch.
#[derive(Deserialize, JsonSchema, Debug)]
#[serde(deny_unknown_fields)]
pub struct Node {
    #[schemars(with = "String")]
    pub name: Spanned<String>,
    /// SPIFFE ID of the certificate that its authd shows, in full.
    #[schemars(with = "String")]
    pub spiffe_id: Spanned<String>,
    /// Who has to vouch for that certificate. Default: any authority.
    #[schemars(with = "Option<String>")]
    pub authority: Option<Spanned<String>>,
    /// Address and port where its authd listens, such as `192.0.2.2:7443`.
    #[schemars(with = "Option<String>")]
    pub address: Option<Spanned<String>>,
    /// Addresses and networks where what runs on it is called: connections to there carry the caller's identity.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub networks: Vec<Spanned<String>>,
    /// SPIFFE IDs of callers that it may vouch for; `spiffe://example.org/ns/*` stands for all below that path.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub speaks_for: Vec<Spanned<String>>,
}

#[derive(Deserialize, JsonSchema, Debug)]
#[serde(deny_unknown_fields)]
pub struct Service {
    #[schemars(with = "String")]
    pub name: Spanned<String>,
    /// Where it is called: addresses and networks.
    #[schemars(with = "Option<Vec<String>>")]
    pub addresses: Option<Vec<Spanned<String>>>,
    /// The local workload that offers it: what calls it is guarded.
    #[schemars(with = "Option<String>")]
    pub workload: Option<Spanned<String>>,
    /// `tcp/5432`, `tcp/8000-8100`, `udp/53`, `tcp`, `udp`, `icmp`, `proto/47`, `any`.
    #[schemars(with = "Vec<String>")]
    pub ports: Vec<Spanned<String>>,
    #[serde(default)]
    pub sensitivity: Sensitivity,
    #[schemars(with = "Option<String>")]
    pub tenant: Option<Spanned<String>>,
    #[schemars(with = "Option<String>")]
    pub environment: Option<Spanned<String>>,
}

#[derive(Deserialize, JsonSchema, Debug)]
#[serde(deny_unknown_fields)]
pub struct Issuer {
    #[schemars(with = "String")]
    pub name: Spanned<String>,
    /// `jwt` or `introspection`.
    pub kind: IssuerKind,
    /// The `iss` claim (RFC 7519, 4.1.1): an https URL, to the letter.
    #[schemars(with = "String")]
    pub issuer: Spanned<String>,
    /// Where its public keys are published (RFC 7517, 5).
    #[schemars(with = "Option<String>")]
    pub jwks_url: Option<Spanned<String>>,
    /// The same as a file, in the policy directory unless the path is absolute.
    #[schemars(with = "Option<String>")]
    pub jwks_file: Option<Spanned<String>>,
    /// Where it says whether a token is active (RFC 7662).
    #[schemars(with = "Option<String>")]
    pub introspection_url: Option<Spanned<String>>,
    /// As whom authd introspects.
    #[schemars(with = "Option<String>")]
    pub client_id: Option<Spanned<String>>,
    /// File with that client's secret. Without it, authd shows its TLS certificate (RFC 8705, 2).
    #[schemars(with = "Option<String>")]
    pub client_secret_file: Option<Spanned<String>>,
    /// Algorithms that are accepted (RFC 7518, 3.1).
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub algorithms: Vec<Spanned<String>>,
    /// Longest lifetime that a token may have, such as `15m`.
    #[schemars(with = "Option<String>")]
    pub max_ttl: Option<Spanned<String>>,
    /// How much its clock may be off, up to `60s`. Default: `30s`.
    #[schemars(with = "Option<String>")]
    pub leeway: Option<Spanned<String>>,
    /// Take only tokens of type `at+jwt`, with all claims that RFC 9068 requires. Keeps its ID tokens out.
    #[schemars(with = "Option<bool>")]
    pub access_token_type: Option<Spanned<bool>>,
    /// Whether its URLs may lead to private addresses.
    #[schemars(with = "Option<bool>")]
    pub allow_private: Option<Spanned<bool>>,
}

#[derive(Deserialize, JsonSchema, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "snake_case")]
pub enum IssuerKind {
    Jwt,
    Introspection,
}

/// Who vouches for certificates, and with which limits.
#[derive(Deserialize, JsonSchema, Debug)]
#[serde(deny_unknown_fields)]
pub struct Authority {
    #[schemars(with = "String")]
    pub name: Spanned<String>,
    /// File of CA certificates in PEM; relative to the directory of the policy.
    #[schemars(with = "String")]
    pub bundle: Spanned<String>,
    /// The SPIFFE trust domain that it speaks for. Without one, its certificates may carry no SPIFFE ID.
    #[schemars(with = "Option<String>")]
    pub trust_domain: Option<Spanned<String>>,
    /// Files of revocation lists, in DER or PEM; relative to the directory of the policy.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub crl_files: Vec<Spanned<String>>,
    /// Whether an issuer may be without a revocation list. Default: `if-present`.
    #[schemars(with = "Option<CrlPolicy>")]
    pub crl: Option<Spanned<CrlPolicy>>,
}

#[derive(Deserialize, JsonSchema, Debug)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    #[schemars(with = "String")]
    pub name: Spanned<String>,
    /// Workloads, peers, `any`, `unmanaged`.
    #[schemars(with = "Vec<String>")]
    pub from: Vec<Spanned<String>>,
    /// Services, `any`.
    #[schemars(with = "Vec<String>")]
    pub to: Vec<Spanned<String>>,
    #[serde(default)]
    pub action: Action,
    #[serde(default)]
    pub mode: Mode,
    /// What must be proven; all of them.
    #[serde(default)]
    #[schemars(with = "Vec<Proof>")]
    pub require: Vec<Spanned<Proof>>,
    #[schemars(with = "Option<Token>")]
    pub token: Option<Spanned<Token>>,
    #[schemars(with = "Option<Mtls>")]
    pub mtls: Option<Spanned<Mtls>>,
    /// What an allowed action lets pass, where `require` has `action`.
    #[schemars(with = "Option<PermitTerms>")]
    pub permit: Option<Spanned<PermitTerms>>,
    /// How long a grant lives, such as `5m`. Default: 5m; of a permit: 30s.
    #[schemars(with = "Option<String>")]
    pub grant_ttl: Option<Spanned<String>>,
    /// What becomes of a TCP connection whose proofs have not been shown. Default: `refuse`.
    #[schemars(with = "Option<Pending>")]
    pub pending: Option<Spanned<Pending>>,
    #[serde(default)]
    pub across_tenants: bool,
    #[serde(default)]
    pub across_environments: bool,
    #[schemars(with = "Option<When>")]
    pub when: Option<Spanned<When>>,
}

/// What one permit lets pass.
#[derive(Deserialize, JsonSchema, Debug)]
#[serde(deny_unknown_fields)]
pub struct PermitTerms {
    /// Connections, and exchanges of datagrams, that may begin. Default: 1.
    #[schemars(with = "Option<u32>")]
    pub connections: Option<Spanned<u32>>,
    /// Bytes of IP packets, both ways together, such as `64KiB` or `10MiB`. Default: any number.
    #[schemars(with = "Option<String>")]
    pub bytes: Option<Spanned<String>>,
}

#[derive(Deserialize, JsonSchema, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "snake_case")]
pub enum Pending {
    /// It fails at once.
    Refuse,
    /// It waits for them, for as long as `hold_seconds` in authd.toml says.
    Hold,
}

/// Workloads and peers that may exchange somebody's token for a narrower one of their own (RFC 8693).
#[derive(Deserialize, JsonSchema, Debug)]
#[serde(deny_unknown_fields)]
pub struct Delegation {
    #[schemars(with = "String")]
    pub name: Spanned<String>,
    /// Who may act: workloads, and peers that have a `spiffe_id`.
    #[schemars(with = "Vec<String>")]
    pub actors: Vec<Spanned<String>>,
    /// Whose tokens they may exchange: an `[[issuer]]`, or `own` for tokens of this node.
    #[schemars(with = "String")]
    pub issuer: Spanned<String>,
    /// For whom they may act (`sub`). Default: anybody.
    #[schemars(with = "Option<Vec<String>>")]
    pub subjects: Option<Spanned<Vec<Spanned<String>>>>,
    /// Whom the new tokens may be for (`aud`), as far as the exchanged ones are.
    #[schemars(with = "Vec<String>")]
    pub audiences: Vec<Spanned<String>>,
    /// What the new tokens may allow, as far as the exchanged ones do.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub scopes: Vec<Spanned<String>>,
    /// How long a new token lives at most, up to `1h`. Default: `5m`.
    #[schemars(with = "Option<String>")]
    pub ttl: Option<Spanned<String>>,
    /// How many may act for each other, up to 8. Default: 1.
    #[schemars(with = "Option<usize>")]
    pub depth: Option<Spanned<usize>>,
    /// Whose own part `actors` may take over: by a token in which one of these acts.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub hands_on: Vec<Spanned<String>>,
    /// Whether these may be of different tenants.
    #[serde(default)]
    pub across_tenants: bool,
}

/// What a token has to say.
#[derive(Deserialize, JsonSchema, Debug)]
#[serde(deny_unknown_fields)]
pub struct Token {
    #[schemars(with = "String")]
    pub issuer: Spanned<String>,
    /// One of its audiences (`aud`).
    #[schemars(with = "Option<String>")]
    pub audience: Option<Spanned<String>>,
    /// Scopes that it must have; all of them.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub scopes: Vec<Spanned<String>>,
    /// Whether it has to be bound to a certificate (RFC 8705) or a DPoP key (RFC 9449).
    #[serde(default)]
    pub bound: bool,
    /// Subjects (`sub`) that are accepted. Default: any.
    #[schemars(with = "Option<Vec<String>>")]
    pub subjects: Option<Spanned<Vec<Spanned<String>>>>,
}

/// What a certificate has to say. Each key that is there must fit; of several texts in one, one has to.
#[derive(Deserialize, JsonSchema, Debug)]
#[serde(deny_unknown_fields)]
pub struct Mtls {
    /// Who has to vouch for it. Default: any authority.
    #[schemars(with = "Option<String>")]
    pub authority: Option<Spanned<String>>,
    #[schemars(with = "Option<OneOrMany>")]
    pub spiffe_id: Option<Spanned<Texts>>,
    #[schemars(with = "Option<OneOrMany>")]
    pub dns: Option<Spanned<Texts>>,
    #[schemars(with = "Option<OneOrMany>")]
    pub subject: Option<Spanned<Texts>>,
}

/// When a rule holds.
#[derive(Deserialize, JsonSchema, Debug)]
#[serde(deny_unknown_fields)]
pub struct When {
    /// `mon-fri`, or a list of days and ranges. Default: every day.
    #[schemars(with = "Option<OneOrMany>")]
    pub days: Option<Spanned<Texts>>,
    /// `08:00-18:00`; may pass midnight. Default: all day.
    #[schemars(with = "Option<String>")]
    pub hours: Option<Spanned<String>>,
    /// IANA time zone. Default: UTC.
    #[schemars(with = "Option<String>")]
    pub zone: Option<Spanned<String>>,
}
