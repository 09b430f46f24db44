//! The command line: types without logic.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use jiff::{SignedDuration, Span, Timestamp, tz::TimeZone};

use crate::{
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
        #[arg(long)]
        json: bool,
    },
    /// Read a policy directory and say what is wrong with it, without a daemon
    Check {
        /// Directory of policy files [default: the daemon's]
        directory: Option<PathBuf>,
        #[arg(long)]
        json: bool,
        /// Take warnings for errors
        #[arg(long)]
        strict: bool,
    },
    /// Say whether a flow is allowed, by which rule, and why the other rules did not decide
    Explain {
        /// A workload, a peer, `unmanaged`, or an address
        #[arg(long)]
        from: String,
        #[arg(long, help = "ADDRESS:PORT/tcp, [ADDRESS]:PORT/udp, ADDRESS/icmp", value_parser = destination)]
        to: String,
        /// RFC 3339 time, such as 2026-11-23T09:00:00Z [default: now]
        #[arg(long, value_parser = time)]
        at: Option<String>,
        /// Ask this policy directory instead of the daemon
        #[arg(long)]
        policy: Option<PathBuf>,
        #[arg(long)]
        json: bool,
    },
    /// Say which callers and services change their verdict between two policy directories
    Diff {
        old: PathBuf,
        new: PathBuf,
        #[arg(long)]
        json: bool,
    },
    /// Print the JSON Schema of policy files, or of the settings
    Schema {
        #[arg(value_enum, default_value_t = SchemaOf::Policy)]
        of: SchemaOf,
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
    /// Detach everything: all traffic passes until the daemon is started again. Works without the daemon
    PanicOpen {
        /// Do it without asking
        #[arg(long)]
        yes: bool,
    },
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
pub enum CertCommand {
    /// Say in one line of JSON whether a chain is accepted, whom it names, or why not. Exit code 0 only if it is
    Verify(Verify),
    /// Show what a certificate says of itself, verified by nobody
    Inspect {
        /// Certificates in PEM, or one in DER; `-` is stdin
        file: PathBuf,
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

#[derive(Clone, Copy, clap::ValueEnum)]
pub enum SchemaOf {
    Policy,
    Config,
}

/// Both go to the daemon as they are written; what they cannot be is said before.
fn destination(text: &str) -> Result<String, ToError> {
    text.parse::<To>().map(|_| text.to_owned())
}

fn time(text: &str) -> Result<String, jiff::Error> {
    text.parse::<Timestamp>().map(|_| text.to_owned())
}

/// `90d`, `12h`, `6 months`: from now.
fn lifetime(text: &str) -> Result<SignedDuration, String> {
    let now = Timestamp::now().to_zoned(TimeZone::UTC);
    let span: Span = text.parse().map_err(|_| "write 90d, 12h or 1y".to_owned())?;
    let lifetime = span.to_duration(&now).map_err(|error| error.to_string())?;
    let allowed = SignedDuration::from_secs(1)..=MAX_LIFETIME;
    if allowed.contains(&lifetime) { Ok(lifetime) } else { Err("a key lives for a second to a year".to_owned()) }
}
