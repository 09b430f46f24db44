//! The command line: types without logic.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use jiff::{SignedDuration, Span, Timestamp, tz::TimeZone};

use crate::{
    decisions::approvals::Id as ApprovalId,
    policy::{
        explain::{To, ToError},
        network::Network,
    },
    proofs::{
        api_key::{DEFAULT_LIFETIME, MAX_LIFETIME, rate::Rate, text::KeyId},
        x509::spiffe::TrustDomain,
    },
};

/// Node-level enforcement: who may open which connection, decided in the kernel.
#[derive(Parser)]
#[command(name = "authd", version, max_term_width = 100)]
pub struct Cli {
    /// Settings of the daemon [default: /etc/authd/authd.toml]
    #[arg(long, global = true, env = "AUTHD_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Run the daemon: load programs, put the policy into force, enforce
    Run {
        /// Detach all programs when the daemon ends, instead of leaving enforcement to the kernel
        #[arg(long)]
        detach_on_exit: bool,
    },
    /// Make the daemon load what lies in the policy directory now
    Apply {
        /// Go back to the policy before after this time, such as 60s, unless `authd confirm` is called until then
        #[arg(long, value_name = "TIME", value_parser = trial)]
        confirm: Option<u32>,
        #[arg(long)]
        json: bool,
    },
    /// Keep the policy that `authd apply --confirm` put on trial
    Confirm,
    /// Read a policy directory and say what is wrong with it, without a daemon
    Check {
        /// Directory of policy files [default: the daemon's]
        directory: Option<PathBuf>,
        #[arg(long)]
        json: bool,
        /// Exit with 1 if there are warnings; those of cgroups, users and programs that this machine has not do not count
        #[arg(long)]
        strict: bool,
    },
    /// Say whether a flow is allowed, by which rule, and why the other rules did not decide
    #[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
    Explain {
        #[command(subcommand)]
        command: Option<ExplainCommand>,
        /// A workload, a peer, `unmanaged`, or an address
        #[arg(long, required_unless_present = "pcap")]
        from: Option<String>,
        #[arg(
            long,
            help = "ADDRESS:PORT/tcp, [ADDRESS]:PORT/udp, ADDRESS/icmp",
            value_parser = destination,
            required_unless_present = "pcap"
        )]
        to: Option<String>,
        /// RFC 3339 time, such as 2026-11-23T09:00:00Z [default: now]
        #[arg(long, value_parser = time)]
        at: Option<String>,
        /// Ask this policy directory instead of the daemon
        #[arg(long)]
        policy: Option<PathBuf>,
        /// Instead of one flow: what would become now, at a guarded interface, of each frame in a capture (pcap or pcapng)
        #[arg(long, conflicts_with_all = ["from", "to", "at", "policy"])]
        pcap: Option<PathBuf>,
        #[arg(long)]
        json: bool,
    },
    /// Say what changes between two policy directories: verdicts, and definitions
    Diff {
        old: PathBuf,
        new: PathBuf,
        #[arg(long)]
        json: bool,
    },
    /// Print the JSON Schema of policy files or of the settings, or what action policies see
    Schema {
        #[arg(value_enum, default_value_t = SchemaOf::Policy)]
        of: SchemaOf,
        /// With `cedar`: together with the actions of this policy directory's tools
        #[arg(long, value_name = "DIR")]
        policy: Option<PathBuf>,
    },
    /// Show generation, programs, workloads and counters
    Status {
        #[arg(long, conflicts_with = "prometheus")]
        json: bool,
        /// In Prometheus' text format
        #[arg(long)]
        prometheus: bool,
    },
    /// Show flows: opened, denied, closed
    Flows {
        /// Go on with what comes
        #[arg(long, short)]
        follow: bool,
        /// How many of the last ones
        #[arg(long, short = 'n', default_value_t = 20)]
        last: usize,
        #[arg(long)]
        json: bool,
    },
    /// Make, list and revoke API keys
    Key {
        #[command(subcommand)]
        command: KeyCommand,
    },
    /// Look at X.509 certificates as the daemon does
    Cert {
        #[command(subcommand)]
        command: CertCommand,
    },
    /// Check tokens as the daemon does, exchange them, and see by which keys this node signs
    #[command(subcommand)]
    Token(TokenCommand),
    /// Show proofs for a rule, and get a grant: connections that it allows pass until the grant ends
    Grant(GrantQuestion),
    /// Ask whether a tool may be called; what the call needs passes from then on, as far as the tool's rule says. Exit code 75: it
    /// waits for an approval
    Act(Box<ActQuestion>),
    /// Say who the daemon takes the caller for, and which grants it holds
    Whoami {
        #[command(flatten)]
        caller: CallerArgs,
        #[arg(long)]
        json: bool,
    },
    /// Connect an agent to an MCP server of the policy, through the daemon: speaks MCP on standard input and output
    Mcp(McpQuestion),
    /// Revoke a credential, a caller or a grant: at once, to the packet
    Revoke(RevokeQuestion),
    /// Decide calls of agents that the policy lets pass only with a person's approval
    #[command(subcommand)]
    Approve(ApproveCommand),
    /// The process that talks to callers; the daemon starts it by itself
    #[command(hide = true)]
    Control {
        #[arg(long)]
        uid: u32,
        #[arg(long)]
        gid: u32,
        #[arg(long)]
        root: PathBuf,
    },
    /// Detach everything: all traffic passes until the daemon is started again. Works without the daemon
    PanicOpen {
        /// Do it without asking
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Subcommand)]
pub enum ExplainCommand {
    /// Say what action policies decide about a call of a tool, and who would have to approve it; without the daemon
    Action(ActionQuestion),
}

#[derive(Args)]
pub struct ActionQuestion {
    /// The workload that calls
    #[arg(long, value_name = "WORKLOAD")]
    pub from: String,
    /// What it calls: a `[[tool]]`
    #[arg(long, value_name = "NAME")]
    pub tool: String,
    /// A JSON object; `-` is standard input
    #[arg(long, value_name = "JSON", default_value = "{}")]
    pub arguments: String,
    /// For whom it acts: name of an `[[issuer]]`, and `sub` of its token
    #[arg(long, num_args = 2, value_names = ["ISSUER", "SUB"])]
    pub subject: Vec<String>,
    /// A scope of that token; may be repeated
    #[arg(long = "scope", value_name = "SCOPE", requires = "subject")]
    pub scopes: Vec<String>,
    /// An audience of that token; may be repeated
    #[arg(long = "audience", value_name = "AUDIENCE", requires = "subject")]
    pub audience: Vec<String>,
    /// `client_id` of that token
    #[arg(long, value_name = "CLIENT", requires = "subject")]
    pub client: Option<String>,
    /// SPIFFE ID of one who acts for the subject; may be repeated [default: the caller, with `--subject`]
    #[arg(long = "actor", value_name = "SPIFFE_ID", requires = "subject")]
    pub actors: Vec<String>,
    /// The caller's cgroup [default: the workload's pattern]
    #[arg(long, value_name = "CGROUP")]
    pub instance: Option<String>,
    /// RFC 3339 time, such as 2026-11-23T09:00:00Z [default: now]
    #[arg(long, value_name = "TIME")]
    pub at: Option<Timestamp>,
    /// Policy directory [default: the daemon's]
    #[arg(long, value_name = "DIR")]
    pub policy: Option<PathBuf>,
    #[arg(long)]
    pub json: bool,
}

#[derive(Subcommand)]
pub enum KeyCommand {
    /// Make a key and print it: once, to stdout. authd keeps its hash only
    Create {
        /// What it is for: 1 to 64 letters, digits, `-`, `_` and `.`
        #[arg(long)]
        name: String,
        /// A rule for which it counts; can be repeated [default: every rule that asks for an API key]
        #[arg(long, value_name = "RULE")]
        rule: Vec<String>,
        /// A network from which it can be used; can be repeated [default: everywhere]
        #[arg(long, value_name = "CIDR", value_parser = Network::parse)]
        network: Vec<Network>,
        /// A local workload that can use it; can be repeated [default: every caller]
        #[arg(long, value_name = "WORKLOAD")]
        workload: Vec<String>,
        /// When it ends. Every key does: after a year at the latest
        #[arg(long, value_name = "90d", default_value = DEFAULT_LIFETIME, value_parser = lifetime)]
        expires: SignedDuration,
        /// How often it can be used [default: without a limit]
        #[arg(long, value_name = "60/min")]
        rate: Option<Rate>,
        #[arg(long)]
        json: bool,
    },
    /// Show all keys, living and dead, and when they were used last
    List {
        #[arg(long)]
        json: bool,
    },
    /// End a key, at once and for ever
    Revoke {
        /// As `authd key list` shows it: the first 10 characters behind `authd_`
        id: KeyId,
    },
}

#[derive(Subcommand)]
pub enum ApproveCommand {
    /// Show what waits, and what became of the calls of the last day
    List {
        #[arg(long)]
        json: bool,
    },
    /// Show one call: what would happen, for whom, until when, and who can approve it
    Show {
        /// As `authd approve list` shows it
        id: ApprovalId,
        #[arg(long)]
        json: bool,
    },
    /// Let the agent make this one call, once
    Grant {
        /// As `authd approve list` shows it
        id: ApprovalId,
        /// The `[[approvers]]` in whose name [default: the first whose terms are met]
        #[arg(long, value_name = "NAME")]
        approvers: Option<String>,
        /// File with a fresh token, for approvers who show one
        #[arg(long, value_name = "FILE")]
        token_file: Option<PathBuf>,
        /// Why, for the record
        #[arg(long, value_name = "TEXT", default_value = "")]
        reason: String,
        #[arg(long)]
        json: bool,
    },
    /// Refuse a call, or take an approval back that was not used
    Deny {
        /// As `authd approve list` shows it
        id: ApprovalId,
        /// Why, for the record
        #[arg(long, value_name = "TEXT", default_value = "")]
        reason: String,
        #[arg(long)]
        json: bool,
    },
}

#[derive(Subcommand)]
pub enum CertCommand {
    /// Say in one line of JSON whether a chain is accepted, whom it names, or why not. Exit code 0 only if it is
    Verify(Verify),
    /// Show what a certificate says of itself, verified by nobody
    Inspect {
        /// Certificates in PEM, or one in DER; `-` is stdin
        file: PathBuf,
    },
}

#[derive(Subcommand)]
pub enum TokenCommand {
    /// Say of each token whether it would be accepted; exit with 0 only if all are
    Verify(Box<TokenQuestion>),
    /// Print header and claims of each token as they are, without checking anything
    Inspect {
        /// One token a line; `-` is standard input
        file: PathBuf,
    },
    /// Exchange somebody's token for a narrower one of the caller's own (RFC 8693), and print it
    Exchange(Box<ExchangeQuestion>),
    /// Show the keys by which this node signs tokens
    Keys {
        /// Take another key now; tokens of the one before stay good until they expire
        #[arg(long)]
        rotate: bool,
        #[arg(long)]
        json: bool,
    },
}

#[derive(clap::Args)]
pub struct Verify {
    /// Anchors in PEM, in place of those of the policy
    #[arg(long, value_name = "PEM")]
    pub bundle: Option<PathBuf>,
    /// The `[[authority]]` of the policy to ask [default: each in turn]
    #[arg(long, value_name = "NAME")]
    pub authority: Option<String>,
    /// The trust domain that `--bundle` speaks for [default: whichever FILE names]
    #[arg(long, value_name = "DOMAIN", requires = "bundle")]
    pub trust_domain: Option<TrustDomain>,
    /// A revocation list in DER or PEM, besides those of the policy
    #[arg(long, value_name = "FILE")]
    pub crl: Vec<PathBuf>,
    /// Refuse certificates whose issuer has no revocation list
    #[arg(long)]
    pub require_crl: bool,
    /// What the certificate is shown for
    #[arg(long, value_enum, default_value_t = CertUsage::Client)]
    pub usage: CertUsage,
    /// RFC 3339 time, such as 2026-11-23T09:00:00Z [default: now]
    #[arg(long)]
    pub at: Option<jiff::Timestamp>,
    /// Directory of policy files [default: the daemon's, unless there is a `--bundle`]
    #[arg(long, value_name = "DIR")]
    pub policy: Option<PathBuf>,
    /// Chain in PEM, leaf first, or one certificate in DER; `-` is stdin
    pub file: PathBuf,
}

#[derive(Clone, Copy, clap::ValueEnum)]
pub enum CertUsage {
    Client,
    Server,
}

#[derive(Args)]
pub struct TokenQuestion {
    /// One token a line; `-` is standard input
    pub file: PathBuf,
    /// Policy directory that defines the issuers [default: the daemon's]
    #[arg(long, value_name = "DIR")]
    pub policy: Option<PathBuf>,
    /// The issuer, as the policy calls it [default: the one that the token names]
    #[arg(long, value_name = "NAME")]
    pub issuer: Option<String>,
    /// Take the issuer's keys from this file
    #[arg(long, value_name = "FILE", requires = "issuer")]
    pub jwks: Option<PathBuf>,
    /// Who the token has to be for
    #[arg(long)]
    pub audience: Option<String>,
    /// A scope that the token must have; may be repeated
    #[arg(long = "scope", value_name = "SCOPE")]
    pub scopes: Vec<String>,
    /// A subject that is accepted; may be repeated [default: any]
    #[arg(long = "subject", value_name = "SUBJECT")]
    pub subjects: Vec<String>,
    /// Refuse tokens that are not bound to a certificate or a DPoP key
    #[arg(long)]
    pub bound: bool,
    /// RFC 3339 time, such as 2026-11-23T09:00:00Z [default: now]
    #[arg(long, value_name = "TIME")]
    pub at: Option<jiff::Timestamp>,
    /// The certificate that the client showed, in PEM
    #[arg(long, value_name = "PEM")]
    pub cert: Option<PathBuf>,
    /// The DPoP proof that came with the token
    #[arg(long, value_name = "PROOF", requires_all = ["method", "url"])]
    pub dpop: Option<String>,
    /// Method of the request that the proof is for
    #[arg(long, requires = "dpop")]
    pub method: Option<String>,
    /// URL of the request that the proof is for
    #[arg(long, requires = "dpop")]
    pub url: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum SchemaOf {
    Policy,
    Config,
    /// The HTTP interface, as OpenAPI
    Api,
    /// What action policies see, as a Cedar schema
    Cedar,
}

/// What is shown, and where.
#[derive(Args)]
pub struct CallerArgs {
    /// Where authd listens: https://HOST:PORT [default: this node's socket]
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
    /// Authorities that the certificate of `--url` may be of, in PEM
    #[arg(long, value_name = "PEM", requires = "url")]
    pub ca: Option<PathBuf>,
    #[command(flatten)]
    pub identity: IdentityArgs,
}

#[derive(Args)]
pub struct IdentityArgs {
    /// The client's certificate chain, in PEM
    #[arg(long, value_name = "PEM", requires = "key")]
    pub cert: Option<PathBuf>,
    /// Its key, in PEM
    #[arg(long, value_name = "PEM", requires = "cert")]
    pub key: Option<PathBuf>,
}

#[derive(Args)]
pub struct GrantQuestion {
    /// The rule whose proofs are shown
    #[arg(long)]
    pub rule: String,
    #[command(flatten)]
    pub caller: CallerArgs,
    /// File with an access token, such as a systemd credential
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Key (PKCS#8 PEM, P-256) that the token is bound to by DPoP
    #[arg(long, value_name = "PEM", requires = "token_file")]
    pub dpop_key: Option<PathBuf>,
    /// File with an API key
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// How long the grant should live, in seconds [default: as long as the rule allows]
    #[arg(long, value_name = "SECONDS")]
    pub seconds: Option<u32>,
    /// Go on, and show the proofs again before the grant ends; files are read anew each time
    #[arg(long)]
    pub keep: bool,
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct ActQuestion {
    /// As the policy calls it
    #[arg(long)]
    pub tool: String,
    /// What the tool gets: a JSON object
    #[arg(long, value_name = "JSON", default_value = "{}")]
    pub arguments: String,
    /// File with the token by which the caller acts for somebody: see `authd token exchange`
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Key (PKCS#8 PEM, P-256) that the token is bound to by DPoP
    #[arg(long, value_name = "PEM", requires = "token_file")]
    pub dpop_key: Option<PathBuf>,
    /// How many seconds to wait for an approval, if the call needs one [default: not at all]
    #[arg(long, value_name = "SECONDS")]
    pub wait: Option<u32>,
    #[command(flatten)]
    pub identity: IdentityArgs,
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct ExchangeQuestion {
    /// File with the token of whom the caller acts for
    #[arg(long, value_name = "FILE")]
    pub subject_token_file: PathBuf,
    /// Whom the new token is for; may be repeated [default: everybody that the delegation and the token allow]
    #[arg(long)]
    pub audience: Vec<String>,
    /// A scope of the new token; may be repeated [default: all that the delegation and the token allow]
    #[arg(long)]
    pub scope: Vec<String>,
    /// How long it lives, in seconds [default: as long as the delegation and the token allow]
    #[arg(long, value_name = "SECONDS")]
    pub seconds: Option<u32>,
    /// Key (PKCS#8 PEM, P-256) that the new token is bound to by DPoP
    #[arg(long, value_name = "PEM")]
    pub dpop_key: Option<PathBuf>,
    #[command(flatten)]
    pub caller: CallerArgs,
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct McpQuestion {
    /// Name of the `[[mcp_server]]`
    #[arg(required_unless_present = "command", conflicts_with = "command")]
    pub server: Option<String>,
    /// File with the token by which the agent acts for somebody: see `authd token exchange`
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Key (PKCS#8 PEM, P-256) that the token is bound to by DPoP
    #[arg(long, value_name = "PEM", requires = "token_file")]
    pub dpop_key: Option<PathBuf>,
    /// Or the command of one, exactly as the policy has it; the daemon starts it, as the user that the policy names
    #[arg(last = true)]
    pub command: Vec<String>,
}

#[derive(Args)]
pub struct RevokeQuestion {
    /// token, token-hash, key, cert, serial, spki, spiffe-id, workload, instance, peer, agent, issuer, issuer-key or grant
    #[arg(required_unless_present = "list")]
    pub kind: Option<String>,
    /// What is revoked; two values with a space between them for `token` (ISSUER JTI), `serial` (HASH SERIAL) and
    /// `issuer-key` (ISSUER KID)
    #[arg(required_unless_present = "list")]
    pub value: Vec<String>,
    /// Why, for the record
    #[arg(long, default_value = "")]
    pub reason: String,
    /// Take the revocation back: what is issued from now on counts again
    #[arg(long)]
    pub undo: bool,
    /// Show what is revoked
    #[arg(long)]
    pub list: bool,
    #[arg(long)]
    pub json: bool,
}

/// Both go to the daemon as they are written; what they cannot be is said before.
fn destination(text: &str) -> Result<String, ToError> {
    text.parse::<To>().map(|_| text.to_owned())
}

fn time(text: &str) -> Result<String, jiff::Error> {
    text.parse::<Timestamp>().map(|_| text.to_owned())
}

/// `60s`, `5m`, in seconds: long enough to try to log in, and no longer than anybody waits for it.
fn trial(text: &str) -> Result<u32, String> {
    const ALLOWED: std::ops::RangeInclusive<i64> = 1..=3600;
    let span: Span = text.parse().map_err(|_| "write 60s or 5m".to_owned())?;
    let time = span.to_duration(&Timestamp::now().to_zoned(TimeZone::UTC)).map_err(|error| error.to_string())?;
    let seconds = u32::try_from(time.as_secs()).ok().filter(|seconds| ALLOWED.contains(&i64::from(*seconds)));
    seconds.ok_or_else(|| "a policy is on trial for a second to an hour".to_owned())
}

/// `90d`, `12h`, `6 months`: from now.
fn lifetime(text: &str) -> Result<SignedDuration, String> {
    let now = Timestamp::now().to_zoned(TimeZone::UTC);
    let span: Span = text.parse().map_err(|_| "write 90d, 12h or 1y".to_owned())?;
    let lifetime = span.to_duration(&now).map_err(|error| error.to_string())?;
    let allowed = SignedDuration::from_secs(1)..=MAX_LIFETIME;
    if allowed.contains(&lifetime) { Ok(lifetime) } else { Err("a key lives for a second to a year".to_owned()) }
}
