//! The policy with every name resolved and every value in range: what the builder makes, and the compiler reads.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use super::{
    diagnostic::Place,
    file::{Kind, Proof, Sensitivity},
    network::{Network, Ports},
    pattern::{Pattern, Patterns},
    schedule::Schedule,
};
use crate::{
    decisions::Actions,
    grants::permits::Limits,
    proofs::{
        claims::{IssuerPolicy, Leeway},
        jws::Algorithm,
        x509::{
            crl::CrlPolicy,
            identity::{DnsPattern, VerifiedCertificate},
            spiffe::{SpiffeId, SpiffeIdError, TrustDomain},
        },
    },
};

/// Names become path segments of SPIFFE IDs and words of command lines.
pub fn is_name(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (1..=64).contains(&text.len()) && text.chars().all(allowed) && text.starts_with(char::is_alphanumeric)
}

/// In the path of a workload's SPIFFE ID: the name of the instance.
pub const INSTANCE: &str = "{instance}";
/// What policies call the issuer of this node's own tokens.
pub const OWN_ISSUER: &str = "own";

#[derive(Clone, Debug, Default)]
pub struct Model {
    pub trust_domain: String,
    pub observe: bool,
    pub workloads: Vec<Workload>,
    pub peers: Vec<Peer>,
    pub nodes: Vec<Node>,
    pub services: Vec<Service>,
    pub authorities: Vec<Authority>,
    pub issuers: Vec<Issuer>,
    /// By name: the first that fits is the one that is used.
    pub delegations: Vec<Delegation>,
    pub mcp_servers: Vec<McpServer>,
    pub approvers: Vec<Approvers>,
    /// By name.
    pub tools: Vec<Tool>,
    /// What action policies say of the tools.
    pub actions: Arc<Actions>,
    /// By name: where several decide alike, the first is the one that is named.
    pub rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
pub struct Workload {
    pub name: String,
    pub kind: Kind,
    pub patterns: Vec<(Pattern, Place)>,
    pub tenant: Option<String>,
    pub environment: Option<String>,
    pub observe: bool,
    pub raw_sockets: bool,
    /// Ports that no service guards accept nobody.
    pub closed: bool,
    /// Path of the SPIFFE ID, with `{instance}` where the instance's name goes.
    pub spiffe_path: String,
    pub place: Place,
}

impl Workload {
    /// Whether each cgroup that matches holds its own grants. Agents and jobs are many, and none answers for another.
    pub fn by_instance(&self) -> bool {
        matches!(self.kind, Kind::Agent | Kind::Job)
    }

    /// Operators must be able to reach what they log in through; agents and jobs are nothing that they log in through.
    pub fn has_failsafe(&self) -> bool {
        !matches!(self.kind, Kind::Agent | Kind::Job)
    }
}

#[derive(Clone, Debug)]
pub struct Peer {
    pub name: String,
    pub kind: Kind,
    pub networks: Vec<Network>,
    pub spiffe_id: Option<SpiffeId>,
    pub dns: Option<DnsPattern>,
    /// RFC 4514.
    pub subject: Option<String>,
    pub tenant: Option<String>,
    pub environment: Option<String>,
    pub place: Place,
}

impl Peer {
    /// Whether a certificate is part of how it is known.
    pub fn has_certificate(&self) -> bool {
        self.spiffe_id.is_some() || self.dns.is_some() || self.subject.is_some()
    }

    /// Whether a certificate names it: all of what is said of its certificate has to fit. One of whose certificate nothing
    /// is said is named by none.
    pub fn is_named_by(&self, certificate: &VerifiedCertificate) -> bool {
        self.has_certificate()
            && self.spiffe_id.as_ref().is_none_or(|id| certificate.has_spiffe_id(id))
            && self.dns.as_ref().is_none_or(|pattern| certificate.has_dns_name(pattern))
            && self.subject.as_ref().is_none_or(|subject| certificate.has_subject(subject))
    }
}

/// Another node that runs authd.
#[derive(Clone, Debug)]
pub struct Node {
    pub name: String,
    /// Of the certificate that its authd shows.
    pub spiffe_id: SpiffeId,
    /// Whose word counts about that certificate, by index; everybody's of the policy, if `None`.
    pub authority: Option<usize>,
    /// Where its authd listens. Without one, connections to its networks carry no identity.
    pub address: Option<SocketAddr>,
    /// Where what runs on it is called: connections to there carry the caller's identity.
    pub networks: Vec<Network>,
    /// Callers that it may vouch for.
    pub speaks_for: Vec<SpiffePattern>,
    pub place: Place,
}

impl Node {
    pub fn may_speak_for(&self, id: &SpiffeId) -> bool {
        self.speaks_for.iter().any(|pattern| pattern.matches(id))
    }
}

/// One SPIFFE ID, or all below a path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SpiffePattern {
    One(SpiffeId),
    /// `spiffe://example.org/ns/` stands for every SPIFFE ID that begins so.
    Below(String),
}

impl SpiffePattern {
    pub fn matches(&self, id: &SpiffeId) -> bool {
        match self {
            Self::One(one) => one == id,
            Self::Below(prefix) => id.as_str().len() > prefix.len() && id.as_str().starts_with(prefix),
        }
    }
}

impl FromStr for SpiffePattern {
    type Err = SpiffeIdError;

    /// `*` is the whole last part, or there is none.
    fn from_str(text: &str) -> Result<Self, SpiffeIdError> {
        match text.strip_suffix('*').filter(|prefix| prefix.ends_with('/')) {
            None => text.parse().map(Self::One),
            // Sound if there can be an ID below it.
            Some(prefix) => format!("{prefix}x").parse::<SpiffeId>().map(|_| Self::Below(prefix.to_owned())),
        }
    }
}

/// Whose word counts about certificates. Nothing has read the files yet.
#[derive(Clone, Debug)]
pub struct Authority {
    pub name: String,
    /// As the policy writes it: relative to its directory.
    pub bundle: PathBuf,
    pub trust_domain: Option<TrustDomain>,
    pub crl_files: Vec<PathBuf>,
    pub crl: CrlPolicy,
    pub place: Place,
}

/// What a rule asks of a certificate, beyond that somebody vouches for it. An empty list asks nothing.
#[derive(Clone, Debug, Default)]
pub struct MtlsRequirement {
    /// Whose word counts, by index; everybody's of the policy, if `None`.
    pub authority: Option<usize>,
    pub spiffe_ids: Vec<SpiffeId>,
    pub dns: Vec<DnsPattern>,
    /// RFC 4514.
    pub subjects: Vec<String>,
}

impl MtlsRequirement {
    /// Whether the certificate has one of each list that asks something. Who vouched for it is compared by name.
    pub fn is_met_by(&self, certificate: &VerifiedCertificate, authorities: &[Authority]) -> bool {
        let one = |empty: bool, found: bool| empty || found;
        let vouched = self.authority.is_none_or(|index| {
            authorities.get(index).is_some_and(|authority| authority.name == certificate.authority)
        });
        vouched
            && one(self.spiffe_ids.is_empty(), self.spiffe_ids.iter().any(|id| certificate.has_spiffe_id(id)))
            && one(self.dns.is_empty(), self.dns.iter().any(|pattern| certificate.has_dns_name(pattern)))
            && one(self.subjects.is_empty(), self.subjects.iter().any(|subject| certificate.has_subject(subject)))
    }
}

#[derive(Clone, Debug)]
pub struct Service {
    pub name: String,
    /// The local workload that offers it, by index: calls to it are guarded.
    pub workload: Option<usize>,
    /// Where it is called.
    pub networks: Vec<Network>,
    pub ports: Vec<Ports>,
    pub sensitivity: Sensitivity,
    pub tenant: Option<String>,
    pub environment: Option<String>,
    pub place: Place,
}

impl Service {
    /// One that every policy has.
    pub fn builtin(name: &str, networks: Vec<Network>, ports: Vec<Ports>) -> Self {
        Self {
            name: name.to_owned(),
            workload: None,
            networks,
            ports,
            sensitivity: Sensitivity::Low,
            tenant: None,
            environment: None,
            place: Place::nowhere(),
        }
    }

    pub fn has_port(&self, protocol: u8, port: u16) -> bool {
        self.ports.iter().any(|ports| ports.contains(protocol, port))
    }
}

/// Who issues tokens.
#[derive(Clone, Debug)]
pub struct Issuer {
    pub name: String,
    /// The `iss` claim, to the letter.
    pub issuer: String,
    pub check: TokenCheck,
    pub max_ttl: Option<Duration>,
    pub leeway: Leeway,
    /// RFC 9068 tokens only.
    pub access_token_type: bool,
    /// Whether its URLs may lead to private addresses.
    pub allow_private: bool,
    pub place: Place,
}

/// Who may act for whom, with what.
#[derive(Clone, Debug)]
pub struct Delegation {
    pub name: String,
    pub actors: Vec<Actor>,
    /// Index of whose tokens they exchange.
    pub issuer: usize,
    /// One of them; anybody, if there are none.
    pub subjects: Vec<String>,
    pub audiences: Vec<String>,
    pub scopes: Vec<String>,
    pub ttl: Duration,
    /// Actors that a token may name.
    pub depth: usize,
    /// In whose place the actors may come.
    pub hands_on: Vec<Actor>,
    /// Whether these may be of another tenant than the actors.
    pub across_tenants: bool,
    pub place: Place,
}

/// Who acts for somebody.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Actor {
    /// A workload of this node, by its index.
    Workload(usize),
    /// A peer, by its index; one that has a SPIFFE ID.
    Peer(usize),
}

/// How tokens of an issuer are checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TokenCheck {
    Jwt {
        keys: Keys,
        algorithms: Vec<Algorithm>,
    },
    Introspection {
        url: String,
        client_id: String,
        /// Relative to the policy directory. Without one, the client's TLS certificate says who asks.
        client_secret_file: Option<PathBuf>,
    },
    /// With the keys by which this node signs.
    Own,
}

/// Where an issuer's public keys are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Keys {
    /// Relative to the policy directory.
    File(PathBuf),
    Url(String),
}

impl Issuer {
    /// This node. By what `iss` it is known, its settings say.
    pub fn own() -> Self {
        Self {
            name: OWN_ISSUER.to_owned(),
            issuer: String::new(),
            check: TokenCheck::Own,
            max_ttl: None,
            // It is the same clock.
            leeway: Leeway::new(Duration::ZERO),
            access_token_type: true,
            allow_private: false,
            place: Place::nowhere(),
        }
    }

    /// What is asked of each of its tokens.
    pub fn policy(&self) -> IssuerPolicy {
        let algorithms = match &self.check {
            TokenCheck::Jwt { algorithms, .. } => algorithms.clone(),
            TokenCheck::Introspection { .. } => Vec::new(),
            TokenCheck::Own => vec![Algorithm::Es256],
        };
        IssuerPolicy {
            name: self.name.clone(),
            issuer: self.issuer.clone(),
            algorithms,
            max_ttl: self.max_ttl,
            leeway: self.leeway,
            require_at_jwt: self.access_token_type,
        }
    }
}

/// What a rule asks of tokens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TokenRequirement {
    /// By index.
    pub issuer: usize,
    pub audience: Option<String>,
    pub scopes: Vec<String>,
    pub bound: bool,
    /// Any, if there are none.
    pub subjects: Vec<String>,
}

/// Who a rule is about.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Subject {
    /// Everybody: workloads, unmanaged processes, remote callers.
    Any,
    /// Processes of this node that no workload matches.
    Unmanaged,
    Workload(usize),
    Peer(usize),
}

/// What a rule is about.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Object {
    /// Every address and port, and every guarded service.
    Any,
    Service(usize),
}

#[derive(Clone, Debug)]
pub struct Rule {
    pub name: String,
    pub from: Vec<Subject>,
    pub to: Vec<Object>,
    pub deny: bool,
    pub observe: bool,
    pub require: Vec<Proof>,
    /// What the certificate has to say where `require` has `mtls`.
    pub mtls: Option<MtlsRequirement>,
    /// There exactly if a token is required.
    pub token: Option<TokenRequirement>,
    /// What an allowed action lets pass; there exactly if one is required.
    pub permit: Option<Limits>,
    pub grant_ttl: Option<Duration>,
    /// Connections wait for their proofs, instead of being refused at once.
    pub hold: bool,
    pub when: Option<Schedule>,
    pub place: Place,
}

impl Rule {
    /// One that every policy has: everybody may, if no rule denies it.
    pub fn builtin(name: &str, to: Object) -> Self {
        Self {
            name: name.to_owned(),
            from: vec![Subject::Any],
            to: vec![to],
            deny: false,
            observe: false,
            require: Vec::new(),
            mtls: None,
            token: None,
            permit: None,
            grant_ttl: None,
            hold: false,
            when: None,
            place: Place::nowhere(),
        }
    }

    /// Whether what the rule requires is there without anybody showing anything.
    pub fn is_met_by(&self, attested: bool) -> bool {
        self.require.iter().all(|proof| attested && *proof == Proof::Cgroup)
    }

    /// Whether another node has to vouch for whom it lets in.
    pub fn is_vouched(&self) -> bool {
        !self.deny && self.require.contains(&Proof::Node)
    }

    /// Whether that is all: nobody gets a grant for it by asking.
    pub fn is_given_by_word(&self) -> bool {
        !self.deny && self.require == [Proof::Node]
    }

    /// Whether an allowed action opens it, by a permit.
    pub fn is_permitted(&self) -> bool {
        !self.deny && self.require.contains(&Proof::Action)
    }

    /// Whether somebody of this node can come to pass by it, who shows what it asks for.
    pub fn is_opened(&self) -> bool {
        self.is_grantable() || self.is_permitted()
    }

    /// Whether a caller can get a grant for it by asking: it asks for proofs, and for none that nobody can show.
    pub fn is_grantable(&self) -> bool {
        let shown = |proof: &Proof| matches!(proof, Proof::Mtls | Proof::Token | Proof::ApiKey);
        !self.deny
            && self.require.iter().any(shown)
            && self.require.iter().all(|proof| shown(proof) || matches!(proof, Proof::Cgroup | Proof::Node))
    }
}

impl Model {
    /// All patterns, with the numbers that the given function has for workloads.
    pub fn patterns(&self, number: impl Fn(usize) -> u32) -> Patterns {
        Patterns::new(
            self.workloads
                .iter()
                .enumerate()
                .flat_map(|(index, workload)| workload.patterns.iter().map(move |(pattern, _)| (index, pattern)))
                .map(|(index, pattern)| (number(index), pattern)),
        )
        .with_instances(
            self.workloads.iter().enumerate().filter(|(_, w)| w.by_instance()).map(|(index, _)| number(index)),
        )
    }

    pub fn subject_name(&self, subject: Subject) -> &str {
        match subject {
            Subject::Any => "any",
            Subject::Unmanaged => "unmanaged",
            Subject::Workload(index) => &self.workloads[index].name,
            Subject::Peer(index) => &self.peers[index].name,
        }
    }
}

/// Something that agents do, and that action policies decide about.
#[derive(Clone, Debug)]
pub struct Tool {
    /// Of the Cedar action and of the Cedar resource.
    pub name: String,
    /// Who offers it, by index.
    pub server: Option<usize>,
    /// What its server calls it.
    pub mcp_name: String,
    /// What it acts on, by index.
    pub service: Option<usize>,
    /// Name of the rule for which an allowed call opens a permit.
    pub permit: Option<String>,
    pub arguments: Record,
    /// Calls may have arguments that policies do not see.
    pub other_arguments: bool,
    pub place: Place,
}

/// Arguments and their types, by name.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Record(pub BTreeMap<String, Argument>);

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Argument {
    pub kind: ArgumentType,
    pub optional: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ArgumentType {
    String,
    Long,
    Bool,
    Decimal,
    Ip,
    Datetime,
    Duration,
    Set(Box<ArgumentType>),
    Record(Record),
}

impl ArgumentType {
    /// Those that have a name.
    pub const NAMED: [(&str, Self); 7] = [
        ("string", Self::String),
        ("long", Self::Long),
        ("bool", Self::Bool),
        ("decimal", Self::Decimal),
        ("ip", Self::Ip),
        ("datetime", Self::Datetime),
        ("duration", Self::Duration),
    ];

    /// As policies write it.
    pub fn named(name: &str) -> Option<Self> {
        Self::NAMED.into_iter().find(|(known, _)| *known == name).map(|(_, kind)| kind)
    }
}

/// Who may say yes to a call.
#[derive(Clone, Debug)]
pub struct Approvers {
    pub name: String,
    /// Unix users, by name or number.
    pub users: Vec<String>,
    pub step_up: Option<StepUp>,
    /// How long a call waits.
    pub ttl: Duration,
    /// How long an approval that was given can be used.
    pub valid: Duration,
    /// Whether the one for whom the agent acts may approve.
    pub may_be_subject: bool,
    pub place: Place,
}

/// What an approver's token has to say.
#[derive(Clone, Debug)]
pub struct StepUp {
    /// By index.
    pub issuer: usize,
    /// What their tokens are for.
    pub audience: String,
    /// One of them.
    pub subjects: Vec<String>,
    /// One of them; any, if there are none.
    pub acr: Vec<String>,
    pub max_age: Option<Duration>,
}

/// Who offers tools over MCP.
#[derive(Clone, Debug)]
pub struct McpServer {
    pub name: String,
    pub reach: Reach,
    pub audience: Option<String>,
    pub scopes: Vec<String>,
    pub place: Place,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reach {
    Url(String),
    Command { argv: Vec<String>, user: String, environment: BTreeMap<String, String> },
}
