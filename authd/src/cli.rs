//! The command line: types without logic.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::policy::explain::{To, ToError};

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
    /// Check tokens as the daemon does, without it
    #[command(subcommand)]
    Token(TokenCommand),
    /// Detach everything: all traffic passes until the daemon is started again. Works without the daemon
    PanicOpen {
        /// Do it without asking
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Subcommand)]
pub enum TokenCommand {
    /// Say of each token whether it would be accepted; exit with 0 only if all are
    Verify(TokenQuestion),
    /// Print header and claims of each token as they are, without checking anything
    Inspect {
        /// One token a line; `-` is standard input
        file: PathBuf,
    },
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
    text.parse::<jiff::Timestamp>().map(|_| text.to_owned())
}
