//! Settings of the daemon: `authd.toml`.
//!
//! Enters: a file, or nothing. Leaves: settings in range. Never: policy.

pub mod approvals;
pub mod mcp;

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use schemars::JsonSchema;
use serde::Deserialize;
use toml::Spanned;

use self::{
    approvals::{Approvals, ApprovalsFile},
    mcp::{Mcp, McpFile},
};
use crate::{
    dataplane::object::Sizes,
    policy::{
        compile::Options,
        diagnostic::{Diagnostic, Place, Source},
        network::Ports,
    },
};

pub const DEFAULT_PATH: &str = "/etc/authd/authd.toml";

/// Where records go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuditTarget {
    Stdout,
    File(PathBuf),
}

#[derive(Clone, Debug)]
pub struct Config {
    /// The cgroup that is enforced, with all below it. `None`: the root of cgroup v2.
    pub cgroup: Option<PathBuf>,
    /// Names of the interfaces on which packets to guarded services are judged before the stack sees them.
    pub interfaces: Vec<String>,
    /// Directory of policy files.
    pub policy: PathBuf,
    /// Directory of pins, directly below a BPF file system.
    pub pins: PathBuf,
    /// What has to survive a restart.
    pub state: PathBuf,
    /// Socket of operators.
    pub socket: PathBuf,
    /// Where metrics are written every few seconds, in Prometheus' text format.
    pub metrics: Option<PathBuf>,
    pub audit: AuditTarget,
    /// An exchange without a connection is over when nothing was sent for this long.
    pub conversation_idle: Duration,
    /// A connection waits for its proofs for this long.
    pub hold: Duration,
    pub control: Control,
    /// This node as an issuer of tokens; `None`: it is none.
    pub issuer: Option<Issuer>,
    pub approvals: Approvals,
    pub mcp: Mcp,
    pub options: Options,
    pub sizes: Sizes,
}

/// How callers reach authd to show their proofs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Control {
    /// Socket of this node's workloads.
    pub socket: PathBuf,
    /// Where peers connect, with mutual TLS.
    pub listen: Option<SocketAddr>,
    /// PEM files of the listener's certificate chain and key.
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
    /// Whether TLS 1.2 is accepted too.
    pub tls12: bool,
    /// How long what another node says holds.
    pub node_session: Duration,
    /// Who the process that talks to callers runs as.
    pub user: String,
    /// Its root directory.
    pub root: PathBuf,
    /// PEM file of the authorities that issuers' servers are known by.
    pub server_authorities: PathBuf,
}

/// What tokens of this node say, and how often it takes another key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issuer {
    /// The `iss` claim: where others reach this node's listener.
    pub url: String,
    /// For how long a key signs.
    pub key_life: Duration,
}

/// The file as it is written.
#[derive(Deserialize, JsonSchema, Default)]
#[serde(deny_unknown_fields, default)]
pub struct File {
    /// The cgroup that is enforced, with all below it. Default: the root of cgroup v2.
    cgroup: Option<PathBuf>,
    /// Names of the interfaces on which packets to guarded services are judged before the stack sees them. Default: none.
    #[schemars(with = "Vec<String>")]
    interfaces: Vec<Spanned<String>>,
    policy: Option<PathBuf>,
    pins: Option<PathBuf>,
    state: Option<PathBuf>,
    socket: Option<PathBuf>,
    metrics: Option<PathBuf>,
    /// `stdout`, or the path of a file.
    audit: Option<PathBuf>,
    /// An exchange without a connection (UDP, ICMP) is over when nothing was sent for so many seconds. Default: 120.
    #[schemars(with = "Option<u32>")]
    conversation_idle_seconds: Option<Spanned<u32>>,
    /// How many seconds a connection waits for its proofs, under rules with `pending = "hold"`. Default: 5.
    #[schemars(with = "Option<u32>")]
    hold_seconds: Option<Spanned<u32>>,
    /// Ports that stay reachable from outside whatever rules say.
    #[schemars(with = "Option<Vec<String>>")]
    failsafe: Option<Vec<Spanned<String>>>,
    /// Whether loopback DNS and DHCP are allowed unless a rule denies them.
    builtin_rules: Option<bool>,
    control: ControlFile,
    issuer: Option<IssuerFile>,
    /// How people are told that a call waits for their approval.
    approvals: ApprovalsFile,
    /// Servers of the Model Context Protocol that authd starts.
    mcp: McpFile,
    limits: Limits,
}

/// How callers reach authd to show their proofs.
#[derive(Deserialize, JsonSchema, Default)]
#[serde(deny_unknown_fields, default)]
struct ControlFile {
    /// Socket of this node's workloads. Default: /run/authd/workload.sock.
    socket: Option<PathBuf>,
    /// Address and port where peers connect, with mutual TLS, such as `0.0.0.0:7443`. Default: nowhere.
    #[schemars(with = "Option<String>")]
    listen: Option<Spanned<String>>,
    /// PEM file of the listener's certificate chain.
    certificate: Option<PathBuf>,
    /// PEM file of its key.
    key: Option<PathBuf>,
    /// Whether TLS 1.2 is accepted too. Default: only TLS 1.3.
    tls12: bool,
    /// User that the process that talks to callers runs as. Default: authd.
    user: Option<String>,
    /// Its root directory. Default: /run/authd/control.
    root: Option<PathBuf>,
    /// How many seconds what another node says of its callers holds; sessions with nodes are renewed in half that time.
    /// Default: 600.
    #[schemars(with = "Option<u32>")]
    node_session_seconds: Option<Spanned<u32>>,
    /// PEM file of the authorities that issuers' servers are known by. Default: /etc/ssl/certs/ca-certificates.crt.
    server_authorities: Option<PathBuf>,
}

/// This node as an issuer of tokens (RFC 8693). Without this section it issues none.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct IssuerFile {
    /// The `iss` claim of its tokens, and where others find its keys: an https URL of this node's listener, without a path, such as
    /// `https://node-1.example.org:7443`.
    #[schemars(with = "String")]
    url: Spanned<String>,
    /// For how many days a key signs. Default: 30.
    #[schemars(with = "Option<u32>")]
    key_days: Option<Spanned<u32>>,
}

impl IssuerFile {
    fn issuer(self, at: &dyn Fn(std::ops::Range<usize>) -> Place) -> Result<Issuer, Diagnostic> {
        let Self { url, key_days } = self;
        let days = match key_days {
            None => 30,
            Some(days) if (1..=365).contains(days.as_ref()) => days.into_inner(),
            Some(days) => {
                let message = format!("a key cannot sign for {} days", days.as_ref());
                return Err(Diagnostic::error("bad_limit", at(days.span()), message, "choose a number from 1 to 365"));
            }
        };
        if !is_origin(url.as_ref()) {
            let message = format!("`{}` is no https URL of a listener", url.as_ref());
            let help = "write https://HOST:PORT, as others reach `control.listen`";
            return Err(Diagnostic::error("bad_issuer", at(url.span()), message, help));
        }
        Ok(Issuer { url: url.into_inner(), key_life: Duration::from_secs(u64::from(days) * 86_400) })
    }
}

/// `https://host`, `https://host:port`: whoever joins a path to it finds this node's metadata (RFC 8414, 3).
fn is_origin(url: &str) -> bool {
    let Ok(uri) = fluent_uri::Uri::parse(url) else { return false };
    let Some(authority) = uri.authority() else { return false };
    let plain = authority.userinfo().is_none() && !uri.has_fragment() && !uri.has_query() && uri.path().is_empty();
    uri.scheme().as_str() == "https" && plain && !authority.host().is_empty() && authority.port_to_u16().is_ok()
}

impl ControlFile {
    fn control(self, at: &dyn Fn(std::ops::Range<usize>) -> Place) -> Result<Control, Diagnostic> {
        let Self { socket, listen, certificate, key, tls12, user, root, node_session_seconds, server_authorities } =
            self;
        let node_session = match node_session_seconds {
            None => 600,
            Some(seconds) if (4..=3600).contains(seconds.as_ref()) => seconds.into_inner(),
            Some(seconds) => {
                let message = format!("what nodes say cannot hold for {} seconds", seconds.as_ref());
                let help = "choose a number from 4 to 3600";
                return Err(Diagnostic::error("bad_limit", at(seconds.span()), message, help));
            }
        };
        let listen = match listen {
            None => None,
            Some(text) => match text.as_ref().parse() {
                Ok(address) if certificate.is_some() && key.is_some() => Some(address),
                Ok(_) => {
                    let message = "peers cannot tell who listens there: there is no certificate";
                    let help = "set `certificate` and `key`, PEM files, beside `listen`";
                    return Err(Diagnostic::error("no_certificate", at(text.span()), message, help));
                }
                Err(_) => {
                    let message = format!("`{}` is no address with a port", text.as_ref());
                    return Err(Diagnostic::error("bad_listen", at(text.span()), message, "write 0.0.0.0:7443"));
                }
            },
        };
        Ok(Control {
            socket: socket.unwrap_or_else(|| "/run/authd/workload.sock".into()),
            listen,
            certificate,
            key,
            tls12,
            node_session: Duration::from_secs(node_session.into()),
            user: user.unwrap_or_else(|| "authd".to_owned()),
            root: root.unwrap_or_else(|| "/run/authd/control".into()),
            server_authorities: server_authorities.unwrap_or_else(|| "/etc/ssl/certs/ca-certificates.crt".into()),
        })
    }
}

/// Sizes of the kernel's tables, in entries. A change takes effect with the next start, in new tables.
#[derive(Deserialize, JsonSchema, Default)]
#[serde(deny_unknown_fields, default)]
struct Limits {
    #[schemars(with = "Option<u32>")]
    identities: Option<Spanned<u32>>,
    #[schemars(with = "Option<u32>")]
    addresses: Option<Spanned<u32>>,
    #[schemars(with = "Option<u32>")]
    cells: Option<Spanned<u32>>,
    #[schemars(with = "Option<u32>")]
    conversations: Option<Spanned<u32>>,
    #[schemars(with = "Option<u32>")]
    locals: Option<Spanned<u32>>,
    /// Grants that live at one time.
    #[schemars(with = "Option<u32>")]
    grants: Option<Spanned<u32>>,
    /// Flows that interfaces remember; the longest unused makes room for a new one.
    #[schemars(with = "Option<u32>")]
    flows: Option<Spanned<u32>>,
    /// Bytes of the ring of events; a power of two.
    #[schemars(with = "Option<u32>")]
    event_bytes: Option<Spanned<u32>>,
}

impl Config {
    /// Reads a file. One that was not asked for need not be there.
    pub fn read(path: Option<&Path>) -> Result<Self, Diagnostic> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        let text = match fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_none() => String::new(),
            Err(error) => {
                return Err(Diagnostic::general(
                    "unreadable",
                    format!("{}: {error}", file.display()),
                    "name the settings' file with `--config`",
                ));
            }
        };
        Self::parse(&Source { name: file.display().to_string().into(), text: text.into() })
    }

    pub fn parse(source: &Source) -> Result<Self, Diagnostic> {
        let at = |span| Place { source: source.clone(), span };
        let file: File = toml::from_str(&source.text).map_err(|error| {
            let span = error.span().unwrap_or(0..0);
            Diagnostic::error("syntax", at(span), error.message().trim_end(), "correct the setting")
        })?;
        let File {
            cgroup,
            interfaces,
            policy,
            pins,
            state,
            socket,
            metrics,
            audit,
            conversation_idle_seconds,
            hold_seconds,
            failsafe,
            builtin_rules,
            control,
            issuer,
            approvals,
            mcp,
            limits,
        } = file;
        let idle = match conversation_idle_seconds {
            // conntrack's own limit for exchanges that were answered.
            None => 120,
            Some(seconds) if (1..=86_400).contains(seconds.as_ref()) => seconds.into_inner(),
            Some(seconds) => {
                let message = format!("an exchange cannot be idle for {} seconds", seconds.as_ref());
                let help = "choose a number from 1 to 86400";
                return Err(Diagnostic::error("bad_limit", at(seconds.span()), message, help));
            }
        };
        let hold = match hold_seconds {
            None => 5,
            Some(seconds) if (1..=60).contains(seconds.as_ref()) => seconds.into_inner(),
            Some(seconds) => {
                let message = format!("a connection cannot wait for {} seconds", seconds.as_ref());
                let help = "choose a number from 1 to 60";
                return Err(Diagnostic::error("bad_limit", at(seconds.span()), message, help));
            }
        };
        let interfaces = interfaces_of(interfaces, &at)?;
        let mut options = Options {
            builtin_rules: builtin_rules.unwrap_or(true),
            interfaces: !interfaces.is_empty(),
            ..Options::default()
        };
        if let Some(failsafe) = failsafe {
            options.failsafe.clear();
            for text in failsafe {
                let wrong = |message: String| {
                    Diagnostic::error("bad_failsafe", at(text.span()), message, "name single ports, such as tcp/22")
                };
                for ports in Ports::parse(text.as_ref()).map_err(|error| wrong(error.to_string()))? {
                    match ports {
                        Ports::Tcp { first, last } if first == last => options.failsafe.push((6, first)),
                        Ports::Udp { first, last } if first == last => options.failsafe.push((17, first)),
                        _ => return Err(wrong(format!("`{}` is no single port", text.as_ref()))),
                    }
                }
            }
        }
        Ok(Self {
            cgroup,
            interfaces,
            policy: policy.unwrap_or_else(|| "/etc/authd/policy.d".into()),
            pins: pins.unwrap_or_else(|| "/sys/fs/bpf/authd".into()),
            state: state.unwrap_or_else(|| "/var/lib/authd".into()),
            socket: socket.unwrap_or_else(|| "/run/authd/admin.sock".into()),
            metrics,
            audit: match audit {
                None => AuditTarget::Stdout,
                Some(path) if path == Path::new("stdout") => AuditTarget::Stdout,
                Some(path) => AuditTarget::File(path),
            },
            conversation_idle: Duration::from_secs(idle.into()),
            hold: Duration::from_secs(hold.into()),
            control: control.control(&at)?,
            issuer: issuer.map(|issuer| issuer.issuer(&at)).transpose()?,
            approvals: approvals.approvals(&at)?,
            mcp: mcp.mcp(&at)?,
            options,
            sizes: limits.sizes(&at)?,
        })
    }
}

impl Config {
    /// How long a connection waits for its proofs, as the kernel counts it.
    pub fn hold_ms(&self) -> u32 {
        u32::try_from(self.hold.as_millis()).unwrap_or(u32::MAX)
    }
}

/// Names that the kernel can have (`dev_valid_name`, net/core/dev.c), each once.
fn interfaces_of(
    names: Vec<Spanned<String>>,
    at: &dyn Fn(std::ops::Range<usize>) -> Place,
) -> Result<Vec<String>, Diagnostic> {
    let mut interfaces: Vec<String> = Vec::new();
    for name in names {
        let wrong =
            |message: String, help: &str| Err(Diagnostic::error("bad_interface", at(name.span()), message, help));
        let text = name.as_ref();
        let sound = !text.is_empty() && text.len() < 16 && text != "." && text != "..";
        if !sound || text.chars().any(|c| c.is_whitespace() || matches!(c, '/' | ':')) {
            return wrong(format!("`{text}` is no name of an interface"), "take one that `ip link` shows");
        }
        if text == "lo" {
            return wrong("on loopback, callers are known by their sockets".to_owned(), "leave it out");
        }
        if interfaces.iter().any(|known| known == text) {
            return wrong(format!("`{text}` is listed twice"), "list it once");
        }
        interfaces.push(text.to_owned());
    }
    Ok(interfaces)
}

impl Limits {
    fn sizes(self, at: &dyn Fn(std::ops::Range<usize>) -> Place) -> Result<Sizes, Diagnostic> {
        const MAX: u32 = 1 << 24;
        let default = Sizes::default();
        let of = |value: Option<Spanned<u32>>, default: u32| match value {
            None => Ok(default),
            Some(value) if (16..=MAX).contains(value.as_ref()) => Ok(value.into_inner()),
            Some(value) => Err(Diagnostic::error(
                "bad_limit",
                at(value.span()),
                format!("{} entries are not possible", value.as_ref()),
                format!("choose a number from 16 to {MAX}"),
            )),
        };
        let events = match self.event_bytes {
            None => default.events,
            Some(bytes) if bytes.as_ref().is_power_of_two() && (1 << 16..=1 << 30).contains(bytes.as_ref()) => {
                bytes.into_inner()
            }
            Some(bytes) => {
                return Err(Diagnostic::error(
                    "bad_limit",
                    at(bytes.span()),
                    format!("a ring of {} bytes is not possible", bytes.as_ref()),
                    "choose a power of two from 65536 to 1073741824",
                ));
            }
        };
        Ok(Sizes {
            identities: of(self.identities, default.identities)?,
            addresses: of(self.addresses, default.addresses)?,
            cells: of(self.cells, default.cells)?,
            conversations: of(self.conversations, default.conversations)?,
            locals: of(self.locals, default.locals)?,
            grants: of(self.grants, default.grants)?,
            flows: of(self.flows, default.flows)?,
            events,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, Diagnostic> {
        Config::parse(&Source { name: "authd.toml".into(), text: text.into() })
    }

    #[test]
    fn nothing_means_defaults() {
        let config = parse("").unwrap();
        assert_eq!(config.options, Options::default());
        assert_eq!(config.audit, AuditTarget::Stdout);
        assert_eq!(config.control.node_session, Duration::from_secs(600));
    }

    #[test]
    fn a_node_that_issues_tokens_has_a_url_and_changes_its_key() {
        assert_eq!(parse("").unwrap().issuer, None);
        for url in ["https://node-1.example.org:7443", "https://node-1.example.org", "https://[2001:db8::1]:7443"] {
            let issuer = parse(&format!("[issuer]\nurl = '{url}'")).unwrap().issuer.unwrap();
            assert_eq!((issuer.url.as_str(), issuer.key_life), (url, Duration::from_secs(30 * 86_400)));
        }
    }

    #[test]
    fn what_nodes_say_holds_for_seconds_up_to_an_hour() {
        for seconds in [4, 5, 600, 3600] {
            let config = parse(&format!("control.node_session_seconds = {seconds}")).unwrap();
            assert_eq!(config.control.node_session, Duration::from_secs(seconds));
        }
    }

    #[test]
    fn settings_out_of_range_are_refused_where_they_stand() {
        for (text, code) in [
            ("colour = 1", "syntax"),
            ("failsafe = ['tcp']", "bad_failsafe"),
            ("failsafe = ['ssh']", "bad_failsafe"),
            ("interfaces = ['a name']", "bad_interface"),
            ("interfaces = ['lo']", "bad_interface"),
            ("interfaces = ['eth0', 'eth0']", "bad_interface"),
            ("interfaces = ['an-interface-name']", "bad_interface"),
            ("[limits]\ncells = 1", "bad_limit"),
            ("[limits]\nflows = 1", "bad_limit"),
            ("[limits]\nevent_bytes = 100000", "bad_limit"),
            ("[issuer]\nurl = 'http://a'", "bad_issuer"),
            ("[issuer]\nurl = 'https://a/'", "bad_issuer"),
            ("[issuer]\nurl = 'https://a/b'", "bad_issuer"),
            ("[issuer]\nurl = 'https://a?b'", "bad_issuer"),
            ("[issuer]\nurl = 'https://a#b'", "bad_issuer"),
            ("[issuer]\nurl = 'https://u@a'", "bad_issuer"),
            ("[issuer]\nurl = 'https://a:99999'", "bad_issuer"),
            ("[issuer]\nurl = 'https://'", "bad_issuer"),
            ("[issuer]\nurl = 'a'", "bad_issuer"),
            ("[issuer]\nurl = 'https://a'\nkey_days = 0", "bad_limit"),
            ("[issuer]\nurl = 'https://a'\nkey_days = 366", "bad_limit"),
            ("[issuer]", "syntax"),
            ("mcp.listen = '0.0.0.0:7444'", "bad_listen"),
            ("mcp.listen = '127.0.0.1'", "bad_listen"),
            ("mcp.listen = '127.0.0.1:0'", "bad_listen"),
            ("mcp.cgroup = ''", "bad_cgroup"),
            ("mcp.cgroup = '/'", "bad_cgroup"),
            ("mcp.cgroup = 'a'", "bad_cgroup"),
            ("mcp.cgroup = '/a/../b'", "bad_cgroup"),
            ("mcp.cgroup = '/a//b'", "bad_cgroup"),
            ("control.node_session_seconds = 0", "bad_limit"),
            ("control.node_session_seconds = 3", "bad_limit"),
            ("control.node_session_seconds = 3601", "bad_limit"),
            ("control.node_session_seconds = 4294967296", "syntax"),
        ] {
            let diagnostic = parse(text).err().unwrap_or_else(|| panic!("{text} was taken"));
            assert_eq!(diagnostic.code, code, "{text}");
            assert!(diagnostic.place.is_some(), "{text}");
        }
    }
}
