//! Policy files: what is refused, where and with which words; what is warned of; and that nothing that anybody can write
//! into a file makes the reader fall over.

use std::time::Duration;

use authd::policy::{
    compile::{CompileError, Moment, Options, Registry, compile},
    diagnostic::{Diagnostic, Source},
    diff::diff,
    explain::{From, Policy, To},
    lint::lint,
    load::{self, texts},
    model::{Keys, Model, TokenCheck},
};
use authd::proofs::jws::Algorithm;
use jiff::Timestamp;
use proptest::prelude::*;

/// A policy without a fault, to which cases add theirs.
const BASE: &str = r#"trust_domain = "example.org"
[[workload]]
name = "web"
kind = "service"
cgroup = "/web"
tenant = "acme"
[[workload]]
name = "agent"
kind = "agent"
cgroup = "/agents/*"
[[peer]]
name = "office"
networks = ["192.0.2.0/24"]
[[service]]
name = "db"
addresses = ["10.0.0.0/8"]
ports = ["tcp/5432"]
[[service]]
name = "api"
workload = "web"
ports = ["tcp/8443"]
[[issuer]]
name = "corp"
kind = "jwt"
issuer = "https://idp.example.org"
jwks_file = "/etc/authd/jwks.json"
algorithms = ["ES256"]
[[authority]]
name = "pki"
bundle = "pki/ca.pem"
trust_domain = "example.org"
"#;

fn source(name: &str, text: &str) -> Source {
    Source { name: name.into(), text: text.into() }
}

fn read(text: &str) -> load::Policy {
    texts(vec![source("p.toml", text)])
}

fn model(text: &str) -> Model {
    let policy = read(text);
    let shown: Vec<String> = policy.diagnostics.iter().map(|d| d.render(false)).collect();
    policy.model.unwrap_or_else(|| panic!("refused:\n{}", shown.join("\n")))
}

/// What is added to the base, the finding's code, where it is (line and column of the addition), and some of its words.
type Bad = (&'static str, &'static str, &'static str, &'static str);

/// Everything here stands behind the base.
const ADDED: &[Bad] = &[
    // TOML itself.
    ("x = ", "syntax", "1:5", "string values must be quoted"),
    ("[[rule]", "syntax", "1:8", "unclosed"),
    ("[[rule]]\nname = \"a\"\nname = \"b\"", "syntax", "3:1", "duplicate key"),
    ("[[rule]]\nname = \"\\q\"", "syntax", "2:10", "escape"),
    ("colour = 1", "syntax", "1:1", "unknown field `colour`"),
    ("[rule]\nname = \"a\"", "syntax", "1:1", "invalid type: map, expected a sequence"),
    // Shapes.
    ("[[rule]]\nnames = \"a\"", "syntax", "2:1", "unknown field `names`"),
    ("[[rule]]\nname = \"r\"\nfrom = [\"web\"]", "syntax", "1:1", "missing field `to`"),
    ("[[rule]]\nname = 7\nfrom = []\nto = []", "syntax", "2:8", "invalid type: integer"),
    ("[[rule]]\nname = \"r\"\nfrom = \"web\"\nto = [\"db\"]", "syntax", "3:8", "invalid type: string"),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\naction = \"drop\"",
        "syntax",
        "5:10",
        "unknown variant `drop`",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nrequire = [\"password\"]",
        "syntax",
        "5:12",
        "unknown variant `password`",
    ),
    ("[[workload]]\nname = \"w\"\nkind = \"robot\"\ncgroup = \"/w\"", "syntax", "3:8", "unknown variant `robot`"),
    ("[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = 7", "syntax", "4:10", "a string or a list of strings"),
    (
        "[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = \"/w\"\nraw_sockets = \"yes\"",
        "syntax",
        "5:15",
        "expected a boolean",
    ),
    (
        "[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = \"/w\"\ninbound = \"ajar\"",
        "syntax",
        "5:11",
        "unknown variant `ajar`",
    ),
    (
        "[[service]]\nname = \"s\"\naddresses = [\"10.0.0.1\"]\nports = [5432]",
        "syntax",
        "4:10",
        "invalid type: integer",
    ),
    (
        "[[service]]\nname = \"s\"\naddresses = [\"10.0.0.1\"]\nports = [\"tcp/1\"]\nsensitivity = \"extreme\"",
        "syntax",
        "5:15",
        "unknown variant `extreme`",
    ),
    // Names.
    ("[[workload]]\nname = \"\"\nkind = \"job\"\ncgroup = \"/w\"", "bad_name", "2:8", "`` cannot be a name"),
    ("[[workload]]\nname = \"a b\"\nkind = \"job\"\ncgroup = \"/w\"", "bad_name", "2:8", "`a b` cannot be a name"),
    ("[[workload]]\nname = \"../x\"\nkind = \"job\"\ncgroup = \"/w\"", "bad_name", "2:8", "cannot be a name"),
    ("[[workload]]\nname = \"-w\"\nkind = \"job\"\ncgroup = \"/w\"", "bad_name", "2:8", "cannot be a name"),
    (
        "[[workload]]\nname = \"any\"\nkind = \"job\"\ncgroup = \"/w\"",
        "reserved_name",
        "2:8",
        "a word of the policy language",
    ),
    ("[[peer]]\nname = \"unmanaged\"\nnetworks = [\"10.0.0.1\"]", "reserved_name", "2:8", "`unmanaged`"),
    (
        "[[workload]]\nname = \"web\"\nkind = \"job\"\ncgroup = \"/w\"",
        "duplicate_name",
        "2:8",
        "workload or peer `web` is defined twice",
    ),
    (
        "[[peer]]\nname = \"agent\"\nnetworks = [\"10.0.0.1\"]",
        "duplicate_name",
        "2:8",
        "workload or peer `agent` is defined twice",
    ),
    (
        "[[service]]\nname = \"db\"\naddresses = [\"10.0.0.1\"]\nports = [\"tcp\"]",
        "duplicate_name",
        "2:8",
        "service `db` is defined twice",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\n[[rule]]\nname = \"r\"\nfrom = [\"agent\"]\nto = [\"db\"]",
        "duplicate_name",
        "6:8",
        "rule `r` is defined twice",
    ),
    (
        "[[issuer]]\nname = \"corp\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_file = \"k\"\nalgorithms = [\"ES256\"]",
        "duplicate_name",
        "2:8",
        "issuer `corp` is defined twice",
    ),
    (
        "[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = \"/w\"\ntenant = \"a/b\"",
        "bad_label",
        "5:10",
        "`a/b` cannot be a tenant",
    ),
    (
        "[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = \"/w\"\nenvironment = \"\"",
        "bad_label",
        "5:15",
        "cannot be a environment",
    ),
    // Workloads.
    ("[[workload]]\nname = \"w\"\nkind = \"partner\"\ncgroup = \"/w\"", "bad_kind", "3:8", "cannot be a partner"),
    ("[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = \"w\"", "bad_cgroup", "4:10", "begins with `/`"),
    ("[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = \"/\"", "bad_cgroup", "4:10", "the root itself"),
    ("[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = \"/a/../b\"", "bad_cgroup", "4:10", "`..` component"),
    ("[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = [\"/a\", \"/b//c\"]", "bad_cgroup", "4:17", "an empty"),
    ("[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = \"/a/**\"", "bad_cgroup", "4:10", "one `*` per level"),
    (
        "[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = \"/1/2/3/4/5/6/7/8/9/10/11/12\"",
        "bad_cgroup",
        "4:10",
        "more than 11 components",
    ),
    ("[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = []", "no_cgroup", "4:10", "workload `w` has no cgroup"),
    (
        "[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = \"/web\"",
        "ambiguous_cgroup",
        "4:10",
        "another pattern matches the same cgroups",
    ),
    (
        "[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = \"/*jobs/*\"\n[[workload]]\nname = \"v\"\nkind = \"job\"\ncgroup = \"/jobs*/*\"",
        "ambiguous_cgroup",
        "8:10",
        "just as exact",
    ),
    (
        "[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = \"/w\"\nspiffe_id = \"w\"",
        "bad_spiffe_id",
        "5:13",
        "no path of a SPIFFE ID",
    ),
    (
        "[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = \"/w\"\nspiffe_id = \"/a/../b\"",
        "bad_spiffe_id",
        "5:13",
        "no path of a SPIFFE ID",
    ),
    // Peers.
    ("[[peer]]\nname = \"p\"", "unidentified_peer", "2:8", "nothing says how peer `p` is known"),
    ("[[peer]]\nname = \"p\"\nspiffe_id = \"billing\"", "bad_spiffe_id", "3:13", "does not begin with `spiffe://`"),
    ("[[peer]]\nname = \"p\"\nspiffe_id = \"spiffe://x\"", "bad_spiffe_id", "3:13", "has no path"),
    ("[[peer]]\nname = \"p\"\nspiffe_id = \"spiffe://X/y\"", "bad_spiffe_id", "3:13", "has a trust domain of other"),
    ("[[peer]]\nname = \"p\"\ndns = \"*.org\"", "bad_dns", "3:7", "is no DNS name"),
    ("[[peer]]\nname = \"p\"\ndns = \"a.*.example.org\"", "bad_dns", "3:7", "is no DNS name"),
    ("[[peer]]\nname = \"p\"\nsubject = \"billing\"", "bad_subject", "3:11", "no distinguished name"),
    ("[[peer]]\nname = \"p\"\nsubject = \"/O=x/CN=y\"", "bad_subject", "3:11", "no distinguished name"),
    ("[[peer]]\nname = \"p\"\nsubject = \"CN=y, O=x\"", "bad_subject", "3:11", "no distinguished name"),
    ("[[peer]]\nname = \"p\"\nsubject = \"CN=a\\\\,O=b,c\"", "bad_subject", "3:11", "no distinguished name"),
    (
        "[[peer]]\nname = \"p\"\nspiffe_id = \"spiffe://example.org/p\"\n[[rule]]\nname = \"r\"\nfrom = [\"p\"]\nto = [\"api\"]",
        "unenforceable_peer",
        "6:9",
        "known by its certificate, and the rule asks for none",
    ),
    (
        "[[peer]]\nname = \"p\"\ndns = \"p.example.org\"\nnetworks = [\"10.0.0.1\"]\n[[rule]]\nname = \"r\"\nfrom = [\"p\"]\nto = [\"api\"]\naction = \"deny\"",
        "unenforceable_peer",
        "7:9",
        "known by its certificate, and the rule asks for none",
    ),
    (
        "[[peer]]\nname = \"p\"\nspiffe_id = \"spiffe://other.org/p\"\n[[rule]]\nname = \"r\"\nfrom = [\"p\"]\nto = [\"api\"]\nrequire = [\"mtls\"]",
        "foreign_spiffe_id",
        "6:9",
        "speaks for the trust domain of `spiffe://other.org/p`",
    ),
    ("[[peer]]\nname = \"p\"\nnetworks = [\"gateway.example\"]", "bad_network", "3:13", "names are not resolved"),
    ("[[peer]]\nname = \"p\"\nnetworks = [\"10.0.0.1/8\"]", "bad_network", "3:13", "write `10.0.0.0/8`"),
    ("[[peer]]\nname = \"p\"\nnetworks = [\"10.0.0.0/33\"]", "bad_network", "3:13", "no address or network"),
    ("[[peer]]\nname = \"p\"\nnetworks = [\"::ffff:10.0.0.1\"]", "bad_network", "3:13", "write it as IPv4"),
    ("[[peer]]\nname = \"p\"\nnetworks = [\"fd00::/129\"]", "bad_network", "3:13", "no address or network"),
    ("[[peer]]\nname = \"p\"\nnetworks = [\"010.0.0.1\"]", "bad_network", "3:13", "no address or network"),
    // Services.
    ("[[service]]\nname = \"s\"\nports = [\"tcp/1\"]", "no_addresses", "2:8", "nothing says where service `s` is"),
    (
        "[[service]]\nname = \"s\"\naddresses = []\nports = [\"tcp/1\"]",
        "no_addresses",
        "2:8",
        "service `s` has no address",
    ),
    ("[[service]]\nname = \"s\"\naddresses = [\"10.0.0.1\"]\nports = []", "no_ports", "2:8", "service `s` has no port"),
    (
        "[[service]]\nname = \"s\"\naddresses = [\"10.0.0.1\"]\nports = [\"tcp/0\"]",
        "bad_ports",
        "4:10",
        "`tcp/0` names no ports",
    ),
    (
        "[[service]]\nname = \"s\"\naddresses = [\"10.0.0.1\"]\nports = [\"tcp/65536\"]",
        "bad_ports",
        "4:10",
        "names no ports",
    ),
    (
        "[[service]]\nname = \"s\"\naddresses = [\"10.0.0.1\"]\nports = [\"tcp/90-80\"]",
        "bad_ports",
        "4:10",
        "names no ports",
    ),
    (
        "[[service]]\nname = \"s\"\naddresses = [\"10.0.0.1\"]\nports = [\"sctp/80\"]",
        "bad_ports",
        "4:10",
        "names no ports",
    ),
    (
        "[[service]]\nname = \"s\"\naddresses = [\"10.0.0.1\"]\nports = [\"icmp/8\"]",
        "bad_ports",
        "4:10",
        "names no ports",
    ),
    (
        "[[service]]\nname = \"s\"\naddresses = [\"10.0.0.1\"]\nports = [\"proto/256\"]",
        "bad_ports",
        "4:10",
        "names no ports",
    ),
    (
        "[[service]]\nname = \"s\"\nworkload = \"wep\"\nports = [\"tcp/1\"]",
        "unknown_workload",
        "3:12",
        "offered by `wep`, which is no workload",
    ),
    (
        "[[service]]\nname = \"s\"\nworkload = \"office\"\nports = [\"tcp/1\"]",
        "unknown_workload",
        "3:12",
        "which is no workload",
    ),
    (
        "[[service]]\nname = \"s\"\nworkload = \"web\"\nports = [\"tcp/1\"]\ntenant = \"other\"",
        "contradiction",
        "5:10",
        "the service's tenant is `other`, its workload's is `acme`",
    ),
    // Rules.
    ("[[rule]]\nname = \"r\"\nfrom = []\nto = [\"db\"]", "empty_rule", "2:8", "is about nobody"),
    ("[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = []", "empty_rule", "2:8", "is about nothing"),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"wed\"]\nto = [\"db\"]",
        "unknown_caller",
        "3:9",
        "no workload or peer is called `wed`",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"dbx\"]",
        "unknown_service",
        "4:7",
        "no service is called `dbx`",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"agent\"]",
        "unknown_service",
        "4:7",
        "no service is called `agent`",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"office\"]\nto = [\"db\"]",
        "unenforceable",
        "3:9",
        "whether peer `office` may call `db`",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"unmanaged\"]\nto = [\"db\"]",
        "unenforceable",
        "3:9",
        "whether unmanaged processes may call `db`",
    ),
    (
        "[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = \"/w\"\ntenant = \"other\"\n[[rule]]\nname = \"r\"\nfrom = [\"w\"]\nto = [\"api\"]",
        "boundary",
        "8:9",
        "lets tenant `other` call `api` of tenant `acme`",
    ),
    (
        "[[service]]\nname = \"s\"\naddresses = [\"10.0.0.1\"]\nports = [\"tcp\"]\ntenant = \"other\"\n[[rule]]\nname = \"r\"\nfrom = [\"any\"]\nto = [\"s\"]",
        "boundary",
        "8:9",
        "lets tenant `acme` call `s`",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\naction = \"deny\"\nrequire = [\"mtls\"]",
        "deny_requires",
        "6:12",
        "a deny rule requires nothing",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nrequire = [\"mtls\", \"mtls\"]",
        "duplicate_proof",
        "5:20",
        "required twice",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nrequire = [\"token\"]",
        "any_token",
        "2:8",
        "does not say which",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\ntoken = { issuer = \"corp\" }",
        "unused_token",
        "5:9",
        "requires none",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nrequire = [\"token\"]\ntoken = { issuer = \"corq\" }",
        "unknown_issuer",
        "6:20",
        "no issuer is called `corq`",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\ngrant_ttl = \"5\"",
        "bad_duration",
        "5:13",
        "`5` is no duration",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\ngrant_ttl = \"5 Minuten\"",
        "bad_duration",
        "5:13",
        "is no duration",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\ngrant_ttl = \"99999999999999999999h\"",
        "bad_duration",
        "5:13",
        "is no duration",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\ngrant_ttl = \"25h\"",
        "long_grant",
        "5:13",
        "a day at most",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nwhen = { days = \"monday\" }",
        "bad_days",
        "5:17",
        "`monday` is no day",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nwhen = { hours = \"8-18\" }",
        "bad_hours",
        "5:18",
        "no range of hours",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nwhen = { hours = \"+8:00-18:00\" }",
        "bad_hours",
        "5:18",
        "no range of hours",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nwhen = { hours = \"24:00-06:00\" }",
        "bad_hours",
        "5:18",
        "no range of hours",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nwhen = { zone = \"Europe/Atlantis\" }",
        "bad_zone",
        "5:17",
        "no time zone",
    ),
    // Issuers.
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"http://i\"\njwks_file = \"k\"\nalgorithms = [\"ES256\"]",
        "bad_issuer",
        "4:10",
        "is no https URL",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\nalgorithms = [\"ES256\"]",
        "issuer_keys",
        "2:8",
        "either `jwks_url` or `jwks_file`",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_file = \"k\"",
        "issuer_algorithms",
        "2:8",
        "accepts no algorithm",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_file = \"k\"\nalgorithms = [\"none\"]",
        "bad_algorithm",
        "6:15",
        "`none` is no signature algorithm",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_file = \"k\"\nalgorithms = [\"HS256\"]",
        "bad_algorithm",
        "6:15",
        "`HS256`",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_url = \"http://k\"\nalgorithms = [\"ES256\"]",
        "bad_url",
        "5:12",
        "is no https URL",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_file = \"k\"\nalgorithms = [\"HS256\"]",
        "bad_algorithm",
        "6:15",
        "everybody who can check a token can make one",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_file = \"k\"\nalgorithms = [\"ES256\", \"es384\"]",
        "bad_algorithm",
        "6:24",
        "`es384` is no signature algorithm",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_file = \"k\"\nalgorithms = [\"ES256\", \"ES256\"]",
        "duplicate_algorithm",
        "6:24",
        "`ES256` stands here twice",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_file = \"k\"\njwks_url = \"https://k\"\nalgorithms = [\"ES256\"]",
        "issuer_keys",
        "2:8",
        "either `jwks_url` or `jwks_file`",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_file = \"\"\nalgorithms = [\"ES256\"]",
        "issuer_keys",
        "2:8",
        "either `jwks_url` or `jwks_file`",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_url = \"http://10.0.0.1/k\"\nalgorithms = [\"ES256\"]",
        "bad_url",
        "5:12",
        "is no https URL",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_url = \"https://u:p@k\"\nalgorithms = [\"ES256\"]",
        "bad_url",
        "5:12",
        "is no https URL",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_file = \"k\"\nalgorithms = [\"ES256\"]\nleeway = \"61s\"",
        "long_leeway",
        "7:10",
        "would live that much longer",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_file = \"k\"\nalgorithms = [\"ES256\"]\nleeway = \"-5s\"",
        "bad_duration",
        "7:10",
        "is no duration",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_file = \"k\"\nalgorithms = [\"ES256\"]\nallow_private = true",
        "unused_setting",
        "7:17",
        "`allow_private` has no use here",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_file = \"k\"\nalgorithms = [\"ES256\"]\nintrospection_url = \"https://k\"",
        "unused_setting",
        "7:21",
        "`introspection_url` has no use here",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_file = \"k\"\nalgorithms = [\"ES256\"]\nclient_id = \"a\"",
        "unused_setting",
        "7:13",
        "`client_id` has no use here",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_file = \"k\"\nalgorithms = [\"ES256\"]\nclient_secret_file = \"a\"",
        "unused_setting",
        "7:22",
        "`client_secret_file` has no use here",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"introspection\"\nissuer = \"https://i\"",
        "issuer_introspection",
        "2:8",
        "has no `introspection_url`",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"introspection\"\nissuer = \"https://i\"\nintrospection_url = \"https://i\"",
        "issuer_client",
        "2:8",
        "has no `client_id`",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"introspection\"\nissuer = \"https://i\"\nintrospection_url = \"http://i\"\nclient_id = \"a\"",
        "bad_url",
        "5:21",
        "is no https URL",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"introspection\"\nissuer = \"https://i\"\nintrospection_url = \"https://i\"\nclient_id = \"a\"\njwks_url = \"https://k\"",
        "unused_setting",
        "7:12",
        "`jwks_url` has no use here",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"introspection\"\nissuer = \"https://i\"\nintrospection_url = \"https://i\"\nclient_id = \"a\"\njwks_file = \"k\"",
        "unused_setting",
        "7:13",
        "`jwks_file` has no use here",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"introspection\"\nissuer = \"https://i\"\nintrospection_url = \"https://i\"\nclient_id = \"a\"\nalgorithms = [\"ES256\"]",
        "unused_setting",
        "7:15",
        "`algorithms` has no use here",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"introspection\"\nissuer = \"https://i\"\nintrospection_url = \"https://i\"\nclient_id = \"a\"\naccess_token_type = true",
        "unused_setting",
        "7:21",
        "`access_token_type` has no use here",
    ),
    // What rules ask of tokens.
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nrequire = [\"token\"]\ntoken = { issuer = \"corp\", audience = \"\" }",
        "bad_audience",
        "6:39",
        "cannot be empty",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nrequire = [\"token\"]\ntoken = { issuer = \"corp\", scopes = [\"a\", \"b c\"] }",
        "bad_scope",
        "6:43",
        "`b c` is no scope",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nrequire = [\"token\"]\ntoken = { issuer = \"corp\", subjects = [] }",
        "bad_subject",
        "6:39",
        "no token has such a subject",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nrequire = [\"token\"]\ntoken = { issuer = \"corp\", subjects = [\"a\", \"\"] }",
        "bad_subject",
        "6:45",
        "no token has such a subject",
    ),
    (
        "[[issuer]]\nname = \"i\"\nkind = \"jwt\"\nissuer = \"https://i\"\njwks_file = \"k\"\nalgorithms = [\"ES256\"]\nmax_ttl = \"soon\"",
        "bad_duration",
        "7:11",
        "is no duration",
    ),
    // Authorities, and what rules ask of certificates.
    ("[[authority]]\nname = \"a\"", "syntax", "1:1", "missing field `bundle`"),
    ("[[authority]]\nname = \"a\"\nbundle = \"a\"\ncrl = \"maybe\"", "syntax", "4:7", "unknown variant `maybe`"),
    ("[[authority]]\nname = \"pki\"\nbundle = \"a\"", "duplicate_name", "2:8", "authority `pki` is defined twice"),
    ("[[authority]]\nname = \"a b\"\nbundle = \"a\"", "bad_name", "2:8", "`a b` cannot be a name"),
    ("[[authority]]\nname = \"a\"\nbundle = \"\"", "bad_path", "3:10", "names no file"),
    ("[[authority]]\nname = \"a\"\nbundle = \"a\"\ncrl_files = [\"b\", \"c/\"]", "bad_path", "4:19", "names no file"),
    (
        "[[authority]]\nname = \"a\"\nbundle = \"a\"\ntrust_domain = \"spiffe://a\"",
        "bad_trust_domain",
        "4:16",
        "cannot be a trust domain",
    ),
    ("[[authority]]\nname = \"a\"\nbundle = \"a\"\ncrl = \"required\"", "no_crl_files", "4:7", "has none"),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nmtls = { authority = \"pki\" }",
        "unused_mtls",
        "5:8",
        "requires none",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nrequire = [\"mtls\"]\nmtls = { authority = \"pky\" }",
        "unknown_authority",
        "6:22",
        "no authority is called `pky`",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nrequire = [\"mtls\"]\nmtls = { spiffe_id = [\"spiffe://example.org/a\", \"b\"] }",
        "bad_spiffe_id",
        "6:49",
        "`b` is no SPIFFE ID",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nrequire = [\"mtls\"]\nmtls = { spiffe_id = \"spiffe://other.org/a\" }",
        "foreign_spiffe_id",
        "6:22",
        "speaks for the trust domain",
    ),
    (
        "[[authority]]\nname = \"a\"\nbundle = \"a\"\n[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nrequire = [\"mtls\"]\nmtls = { authority = \"a\", spiffe_id = \"spiffe://example.org/a\" }",
        "foreign_spiffe_id",
        "9:39",
        "speaks for the trust domain",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nrequire = [\"mtls\"]\nmtls = { dns = \"*\" }",
        "bad_dns",
        "6:16",
        "is no DNS name",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nrequire = [\"mtls\"]\nmtls = { subject = \"\" }",
        "bad_subject",
        "6:20",
        "no distinguished name",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nrequire = [\"mtls\"]\nmtls = { dns = [] }",
        "empty_mtls",
        "6:16",
        "names nobody",
    ),
];

/// Whole files.
const WHOLE: &[Bad] = &[
    ("", "no_trust_domain", "", "no file sets `trust_domain`"),
    ("trust_domain = \"Example.org\"", "bad_trust_domain", "1:16", "`Example.org` cannot be a trust domain"),
    ("trust_domain = \"spiffe://example.org\"", "bad_trust_domain", "1:16", "cannot be a trust domain"),
    ("trust_domain = \"\"", "bad_trust_domain", "1:16", "cannot be a trust domain"),
    ("trust_domain = \"a\"\nmode = \"monitor\"", "syntax", "2:8", "unknown variant `monitor`"),
    ("trust_domain = [\"a\"]", "syntax", "1:16", "invalid type"),
    (
        "trust_domain = \"a\"\n[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = \"/w\"\n[[rule]]\nname = \"r\"\nfrom = [\"w\"]\nto = [\"any\"]\nrequire = [\"mtls\"]",
        "no_authority",
        "10:12",
        "no authority vouches for any",
    ),
];

/// What is wrong with what is said of a bad policy, if anything is.
fn wrong(text: &str, (added, code, place, words): &Bad, lines_before: usize) -> Option<String> {
    let policy = read(text);
    if policy.model.is_some() {
        return Some(format!("was taken:\n{added}"));
    }
    let shown: Vec<String> = policy.diagnostics.iter().map(|d| d.render(false)).collect();
    let shown = format!("for\n{added}\n{}\n", shown.join("\n"));
    let Some(found) = policy.diagnostics.iter().find(|d| d.code == *code && d.message.contains(words)) else {
        return Some(format!("no {code} with {words:?} {shown}"));
    };
    let at = found.place.as_ref().map_or(String::new(), |place| {
        let (line, column) = place.line_column();
        format!("{}:{column}", line.saturating_sub(lines_before))
    });
    let rendered = found.render(false);
    let told = found.place.as_ref().is_none_or(|place| {
        let (line, column) = place.line_column();
        rendered.contains(&format!("p.toml:{line}:{column}"))
    });
    if at != *place || !told {
        return Some(format!("{code} at {at} instead of {place} {shown}"));
    }
    found.help.is_empty().then(|| format!("{code} has no remedy {shown}"))
}

#[test]
fn the_base_of_the_cases_is_good() {
    assert_eq!(read(BASE).diagnostics.len(), 0);
}

#[test]
fn bad_policies_are_refused_with_place_words_and_remedy() {
    assert!(ADDED.len() + WHOLE.len() >= 60);
    let mut faults = Vec::new();
    for case in ADDED {
        faults.extend(wrong(&format!("{BASE}{}", case.0), case, BASE.lines().count()));
    }
    for case in WHOLE {
        faults.extend(wrong(case.0, case, 0));
    }
    assert!(faults.is_empty(), "{} of {}:\n{}", faults.len(), ADDED.len() + WHOLE.len(), faults.join("\n"));
}

#[test]
fn findings_in_two_files_name_both() {
    let policy = texts(vec![
        source(
            "a.toml",
            "trust_domain = \"example.org\"\n[[workload]]\nname = \"w\"\nkind = \"job\"\ncgroup = \"/w\"\n",
        ),
        source("b.toml", "trust_domain = \"example.com\"\n\n[[peer]]\nname = \"w\"\nnetworks = [\"10.0.0.1\"]\n"),
    ]);
    let rendered: Vec<String> = policy.diagnostics.iter().map(|d| d.render(false)).collect();
    assert_eq!(policy.diagnostics.len(), 2, "{}", rendered.join("\n"));
    assert!(rendered[0].contains("b.toml:1:16") && rendered[0].contains("a.toml:1:16"), "{}", rendered[0]);
    assert!(rendered[1].contains("b.toml:4:8") && rendered[1].contains("a.toml:3:8"), "{}", rendered[1]);
}

#[test]
fn a_misspelt_name_gets_the_right_one_as_remedy() {
    let policy = read(&format!("{BASE}[[rule]]\nname = \"r\"\nfrom = [\"wep\"]\nto = [\"db\"]\n"));
    assert_eq!(policy.diagnostics[0].help, "did you mean `web`?");
}

#[test]
fn directories_that_say_nothing_or_cannot_be_trusted_are_refused() {
    use std::os::unix::fs::PermissionsExt;
    let directory = std::env::temp_dir().join(format!("authd-policy-{}", std::process::id()));
    let codes = |d: &[Diagnostic]| d.iter().map(|d| (d.code, d.message.clone())).collect::<Vec<_>>();
    let refused = load::directory(&directory);
    assert_eq!(codes(&refused.diagnostics)[0].0, "unreadable");
    std::fs::create_dir_all(&directory).unwrap();
    assert_eq!(codes(&load::directory(&directory).diagnostics)[0].0, "no_files");
    let file = directory.join("a.toml");
    std::fs::write(&file, BASE).unwrap();
    std::fs::write(directory.join(".a.toml.swp"), "nonsense = ").unwrap();
    std::fs::write(directory.join("readme.txt"), "nonsense = ").unwrap();
    assert!(load::directory(&directory).model.is_some());
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666)).unwrap();
    let refused = codes(&load::directory(&directory).diagnostics);
    assert!(refused[0].1.contains("chmod o-w"), "{refused:?}");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::create_dir(directory.join("b.toml")).unwrap();
    assert!(codes(&load::directory(&directory).diagnostics)[0].1.contains("no regular file"));
    std::fs::remove_dir(directory.join("b.toml")).unwrap();
    std::fs::write(directory.join("c.toml"), [0xff, 0xfe]).unwrap();
    assert_eq!(codes(&load::directory(&directory).diagnostics)[0].0, "unreadable");
    std::fs::remove_dir_all(&directory).unwrap();
}

/// What is allowed and hardly meant: the addition, the warning's code, and some of its words. `None`: no warning.
#[test]
fn lints_find_what_is_hardly_meant() {
    let rule = |name: &str, from: &str, to: &str, more: &str| {
        format!("[[rule]]\nname = \"{name}\"\nfrom = [\"{from}\"]\nto = [\"{to}\"]\n{more}\n")
    };
    let all = rule("a", "any", "db", "");
    let token = |audience| format!("require = [\"token\"]\ntoken = {{ issuer = \"corp\", audience = \"{audience}\" }}");
    let cases = [
        (rule("a", "web", "db", "") + &rule("b", "any", "db", "action = \"deny\""), Some(("unreachable", "rule `a` never allows"))),
        (rule("a", "web", "db", "") + &rule("b", "agent", "db", "action = \"deny\""), None),
        (
            rule("a", "web", "db", "") + &rule("b", "any", "db", "action = \"deny\"\nwhen = { hours = \"01:00-02:00\" }"),
            None,
        ),
        (all.clone() + &rule("b", "web", "db", ""), Some(("pointless", "rule `b` makes no difference: rule `a`"))),
        (all.clone() + &rule("b", "web", "db", "require = [\"mtls\"]"), Some(("pointless", "rule `b` makes no difference"))),
        (rule("a", "any", "db", "require = [\"mtls\"]") + &rule("b", "web", "db", ""), None),
        (
            "[[service]]\nname = \"vault\"\naddresses = [\"10.1.0.1\"]\nports = [\"tcp/8200\"]\nsensitivity = \"high\"\n".to_owned()
                + &rule("a", "web", "vault", ""),
            Some(("weak_proof", "rule `a` asks for no proof, and service `vault` is of high sensitivity")),
        ),
        (
            "[[service]]\nname = \"idle\"\naddresses = [\"10.1.0.1\"]\nports = [\"tcp/1\"]\n".to_owned() + &all,
            Some(("unused", "no rule names service `idle`")),
        ),
        (
            rule("a", "web", "db", "require = [\"token\"]\ntoken = { issuer = \"corp\" }"),
            Some(("any_audience", "rule `a` takes tokens for any audience")),
        ),
        (rule("a", "web", "db", &token("a")) + &rule("b", "web", "db", &token("b")), None),
        (
            rule("a", "web", "db", &token("a")) + &rule("b", "web", "db", &token("a")),
            Some(("pointless", "rule `b` makes no difference: rule `a`")),
        ),
    ];
    for (text, expected) in cases {
        let text = format!("{BASE}{}{text}", rule("office", "office", "api", ""));
        // The base's own service must not be warned of.
        let text = if text.contains("\"db\"]\n") { text } else { text + &rule("z", "agent", "db", "") };
        let found: Vec<(&str, String)> = lint(&model(&text)).into_iter().map(|d| (d.code, d.message)).collect();
        match expected {
            None => assert!(found.is_empty(), "{found:?} for\n{text}"),
            Some((code, words)) => {
                assert!(found.iter().any(|(c, m)| *c == code && m.contains(words)), "{found:?} for\n{text}");
            }
        }
    }
}

#[test]
fn issuers_and_what_rules_ask_of_their_tokens_are_in_the_model() {
    let settings = "leeway = \"10s\"\naccess_token_type = true\nmax_ttl = \"15m\"\n[[authority]]";
    let base = BASE.replacen("[[authority]]", settings, 1);
    let model = model(&format!(
        "{base}[[issuer]]\nname = \"local\"\nkind = \"introspection\"\nissuer = \"http://127.0.0.1:4000\"\n\
         introspection_url = \"http://127.0.0.1:4000/introspect\"\nclient_id = \"authd\"\nclient_secret_file = \"s\"\n\
         allow_private = true\n\
         [[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\nrequire = [\"token\"]\n\
         token = {{ issuer = \"local\", audience = \"db\", scopes = [\"w\", \"r\"], bound = true, subjects = [\"x\"] }}\n"
    ));
    let [corp, local] = &model.issuers[..] else { panic!("{:?}", model.issuers) };
    let keys = Keys::File("/etc/authd/jwks.json".into());
    assert_eq!(corp.check, TokenCheck::Jwt { keys, algorithms: vec![Algorithm::Es256] });
    let policy = corp.policy();
    assert_eq!((policy.max_ttl, policy.leeway.get()), (Some(Duration::from_secs(900)), Duration::from_secs(10)));
    assert!(policy.require_at_jwt && !corp.allow_private && local.allow_private);
    let expected = TokenCheck::Introspection {
        url: "http://127.0.0.1:4000/introspect".into(),
        client_id: "authd".into(),
        client_secret_file: Some("s".into()),
    };
    assert_eq!((&local.check, local.policy().leeway.get()), (&expected, Duration::from_secs(30)));
    let token = model.rules[0].token.as_ref().unwrap();
    assert_eq!((token.issuer, token.audience.as_deref(), token.bound), (1, Some("db"), true));
    assert_eq!((&token.scopes[..], &token.subjects[..]), (&["r".into(), "w".into()][..], &["x".into()][..]));
}

fn moment(text: &str) -> Moment {
    Moment { wall: text.parse().unwrap(), monotonic: 1_000_000_000 }
}

fn compiled(text: &str, at: Moment) -> (Model, Registry, authd::policy::image::Image) {
    let model = model(text);
    let mut registry = Registry::default();
    registry.assign(&model, &Options::default());
    let image = compile(&model, &registry, &Options::default(), at).unwrap();
    (model, registry, image)
}

fn verdict(text: &str, at: Moment, from: &str, to: &str) -> String {
    let (model, registry, image) = compiled(text, at);
    let policy = Policy { model: &model, registry: &registry, options: &Options::default(), image: &image, moment: at };
    let explained = policy.explain(From::parse(from, &model).unwrap(), to.parse::<To>().unwrap());
    format!("{} {} {}", explained.verdict, explained.reason, explained.rule.unwrap_or_default()).trim_end().to_owned()
}

/// The whole explanation, as people see it.
fn explained(text: &str, from: &str, to: &str) -> String {
    let at = moment("2026-11-23T12:00:00Z");
    let (model, registry, image) = compiled(text, at);
    let policy = Policy { model: &model, registry: &registry, options: &Options::default(), image: &image, moment: at };
    let from = From::parse(from, &model).unwrap_or_else(|| panic!("`{from}` is nobody"));
    policy.explain(from, to.parse().unwrap()).to_string()
}

const PARTNERS: &str = r#"[[peer]]
name = "partner"
spiffe_id = "spiffe://example.org/partner"
[[peer]]
name = "branch"
networks = ["198.51.100.0/24"]
dns = "branch.example.org"
[[rule]]
name = "branch-api"
from = ["branch"]
to = ["api"]
require = ["mtls"]
[[rule]]
name = "partner-api"
from = ["partner"]
to = ["api"]
require = ["mtls"]
[[rule]]
name = "partner-db"
from = ["agent"]
to = ["db"]
"#;

#[test]
fn a_peer_that_its_certificate_alone_names_can_be_explained() {
    let text = format!("{BASE}{PARTNERS}");
    // It may call from anywhere, and does so at whatever address this node has.
    for to in ["127.0.0.1:8443/tcp", "192.0.2.9:8443/tcp", "[2001:db8::9]:8443/tcp"] {
        let told = explained(&text, "partner", to);
        assert!(told.starts_with(&format!("partner -> {to} at ")), "{told}");
        assert!(told.contains("\ndenied (proof_required) by rule partner-api"), "{told}");
        assert!(told.contains("rule branch-api is about callers branch"), "{told}");
    }
    // Whoever calls from an address that no peer has can be it; from one that a peer has, both.
    let told = explained(&text, "203.0.113.7", "192.0.2.9:8443/tcp");
    assert!(told.contains("\ndenied (proof_required) by rule partner-api"), "{told}");
    let told = explained(&text, "198.51.100.7", "192.0.2.9:8443/tcp");
    assert!(told.contains("\ndenied (proof_required) by rule branch-api"), "{told}");
    assert!(told.contains("rule partner-api requires mtls, which nobody showed"), "{told}");
    assert!(explained(&text, "branch", "192.0.2.9:8443/tcp").contains("by rule branch-api"));
    // Another port is not guarded; a workload's is not the peer's.
    assert!(explained(&text, "partner", "192.0.2.9:8444/tcp").contains("\nallowed (unguarded)"));
    let told = explained(&text, "web", "192.0.2.9:8443/tcp");
    assert!(told.contains("\ndenied (no_rule)") && !told.contains("inbound of"), "{told}");
}

const OFFICE_HOURS: &str = "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\n\
    when = { days = \"mon-fri\", hours = \"08:00-18:00\", zone = \"Europe/Berlin\" }\n";

#[test]
fn schedules_hold_in_their_zone_and_switch_without_a_new_image() {
    let text = format!("{BASE}{OFFICE_HOURS}");
    // 2026-11-23 is a Monday; Berlin is an hour ahead of UTC then.
    assert_eq!(verdict(&text, moment("2026-11-23T06:59:00Z"), "web", "10.1.2.3:5432/tcp"), "denied no_rule");
    assert_eq!(verdict(&text, moment("2026-11-23T07:00:00Z"), "web", "10.1.2.3:5432/tcp"), "allowed rule r");
    assert_eq!(verdict(&text, moment("2026-11-23T17:00:00Z"), "web", "10.1.2.3:5432/tcp"), "denied no_rule");

    // One image, as time passes: open, closed for the night, and then nobody has said what comes next.
    let at = moment("2026-11-23T16:00:00Z");
    let (_, registry, image) = compiled(&text, at);
    assert_eq!(image.next_boundary, Some("2026-11-23T17:00:00Z".parse::<Timestamp>().unwrap()));
    let hour = 3_600_000_000_000;
    let workload = registry.workloads.number("web").unwrap();
    let decide = |hours: u64| {
        let view = image.at(at.monotonic + hours * hour);
        let to = authd_common::address::Address::v4([10, 1, 2, 3]);
        authd_common::verdict::decide_out(
            &view,
            &image.root(),
            &authd_common::verdict::Opener { workload, instance: 0 },
            &to,
            6,
            5432,
        )
    };
    assert_eq!(decide(0).reason.name(), "rule");
    assert_eq!(decide(0).until, at.monotonic + hour);
    assert_eq!(decide(1).reason.name(), "no_rule");
    assert_eq!(decide(14).reason.name(), "no_rule");
    assert_eq!(decide(15).reason.name(), "schedule_stale");
}

#[test]
fn a_diff_names_the_pairs_that_change() {
    let rule = "[[rule]]\nname = \"r\"\nfrom = [\"web\"]\nto = [\"db\"]\n";
    let (old, new) = (model(&format!("{BASE}{rule}")), model(&format!("{BASE}{}", rule.replace("web", "agent"))));
    let changes = diff(&old, &new, &Options::default(), moment("2026-11-23T12:00:00Z")).unwrap();
    let mut found: Vec<_> =
        changes.iter().map(|c| (c.from.as_str(), c.service.as_str(), c.before.as_str(), c.after.as_str())).collect();
    found.sort_unstable();
    found.dedup();
    assert_eq!(found.len(), 2, "{changes:?}");
    assert_eq!((found[0].0, found[1].0), ("agent", "web"));
    assert!(found[0].2.contains("denied") && found[0].3.contains("allowed"), "{found:?}");
    assert!(found[1].2.contains("allowed") && found[1].3.contains("denied"), "{found:?}");
    assert!(diff(&old, &old, &Options::default(), moment("2026-11-23T12:00:00Z")).unwrap().is_empty());
}

#[test]
fn more_workloads_than_tables_hold_are_refused() {
    let mut text = "trust_domain = \"example.org\"\n".to_owned();
    for n in 0..authd_common::tables::MAX_WORKLOADS {
        text += &format!("[[workload]]\nname = \"w{n}\"\nkind = \"job\"\ncgroup = \"/w/{n}\"\n");
    }
    let model = model(&text);
    let mut registry = Registry::default();
    registry.assign(&model, &Options::default());
    let refused = compile(&model, &registry, &Options::default(), moment("2026-11-23T12:00:00Z"));
    assert_eq!(refused.err(), Some(CompileError::Workloads(authd_common::tables::MAX_WORKLOADS as usize)));
}

#[test]
fn schema_accepts_the_base_and_the_samples() {
    let schema = serde_json::to_value(schemars::schema_for!(authd::policy::file::File)).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/policy.d/example.toml");
    for text in [BASE.to_owned(), std::fs::read_to_string(sample).unwrap()] {
        let value: serde_json::Value = toml::from_str(&text).unwrap();
        let errors: Vec<String> = validator.iter_errors(&value).map(|e| e.to_string()).collect();
        assert!(errors.is_empty(), "{errors:?}");
        model(&text);
    }
    // The schema refuses what the reader refuses for its shape.
    for (added, ..) in ADDED.iter().filter(|case| case.1 == "syntax") {
        if let Ok(value) = toml::from_str::<serde_json::Value>(&format!("{BASE}{added}")) {
            assert!(!validator.is_valid(&value), "the schema takes\n{added}");
        }
    }
}

#[test]
fn the_readmes_policy_is_good() {
    let readme = include_str!("../../README.md");
    let (_, rest) = readme.split_once("```toml\n").expect("the README shows a policy");
    let (text, _) = rest.split_once("```").expect("a fence ends");
    assert_eq!(read(text).diagnostics.len(), 0);
}

/// Everything that a policy can say of certificates.
const CERTIFICATES: &str = r#"[[authority]]
name = "partners"
bundle = "/etc/partners.pem"
trust_domain = "partner.example"
crl_files = ["partners.crl", "/var/lib/partners.crl"]
crl = "required"
[[authority]]
name = "plain"
bundle = "plain.pem"
crl_files = ["plain.crl"]
[[peer]]
name = "billing"
spiffe_id = "spiffe://partner.example/billing"
dns = "*.Partner.example"
[[peer]]
name = "printer"
subject = "CN=printer\\, 2nd floor,O=Acme+OU=IT,1.2.3=#0500"
[[rule]]
name = "billing-api"
from = ["billing", "printer"]
to = ["api"]
require = ["mtls"]
mtls = { authority = "partners", spiffe_id = ["spiffe://partner.example/billing", "spiffe://partner.example/b"], dns = "a.partner.example", subject = "CN=x" }
[[rule]]
name = "anybodys"
from = ["web"]
to = ["db"]
require = ["mtls"]
"#;

#[test]
fn what_is_said_of_certificates_is_in_the_model() {
    use authd::proofs::x509::crl::CrlPolicy;
    let model = model(&format!("{BASE}{CERTIFICATES}"));
    let authorities: Vec<_> = model
        .authorities
        .iter()
        .map(|a| (a.name.as_str(), a.bundle.to_str().unwrap(), a.trust_domain.as_ref().map(|d| d.as_str()), a.crl))
        .collect();
    assert_eq!(
        authorities,
        [
            ("pki", "pki/ca.pem", Some("example.org"), CrlPolicy::IfPresent),
            ("partners", "/etc/partners.pem", Some("partner.example"), CrlPolicy::Required),
            ("plain", "plain.pem", None, CrlPolicy::IfPresent),
        ]
    );
    assert_eq!(model.authorities[1].crl_files.len(), 2);
    let (billing, printer) = (&model.peers[1], &model.peers[2]);
    assert_eq!(billing.spiffe_id.as_ref().unwrap().as_str(), "spiffe://partner.example/billing");
    assert_eq!(billing.dns.as_ref().unwrap().to_string(), "*.partner.example");
    assert_eq!(printer.subject.as_deref(), Some("CN=printer\\, 2nd floor,O=Acme+OU=IT,1.2.3=#0500"));
    assert!(billing.has_certificate() && !model.peers[0].has_certificate());
    let rule = |name: &str| model.rules.iter().find(|rule| rule.name == name).unwrap();
    let mtls = rule("billing-api").mtls.as_ref().unwrap();
    assert_eq!((mtls.authority, mtls.spiffe_ids.len(), mtls.dns.len(), mtls.subjects.len()), (Some(1), 2, 1, 1));
    assert!(rule("anybodys").mtls.is_none());
}

#[test]
fn peers_that_certificates_name_do_not_make_each_others_rules_pointless() {
    let peer =
        |name: &str, id: &str| format!("[[peer]]\nname = \"{name}\"\nspiffe_id = \"spiffe://example.org/{id}\"\n");
    let rule = |peer: &str| {
        format!("[[rule]]\nname = \"of-{peer}\"\nfrom = [\"{peer}\"]\nto = [\"api\"]\nrequire = [\"mtls\"]\n")
    };
    let text = format!("{BASE}{}{}{}{}", peer("p", "p"), peer("q", "q"), rule("p"), rule("q"));
    let found = lint(&model(&text));
    assert!(!found.iter().any(|warning| warning.code == "pointless"), "{found:?}");
}

/// Everything that is done with a policy before it comes into force.
fn exercise(text: &str) {
    let policy = read(text);
    for diagnostic in &policy.diagnostics {
        diagnostic.render(false);
        diagnostic.json();
    }
    let Some(model) = policy.model else { return };
    lint(&model);
    let at = moment("2026-11-23T12:00:00Z");
    let mut registry = Registry::default();
    registry.assign(&model, &Options::default());
    if let Ok(image) = compile(&model, &registry, &Options::default(), at) {
        let policy =
            Policy { model: &model, registry: &registry, options: &Options::default(), image: &image, moment: at };
        for from in ["web", "agent", "office", "unmanaged", "10.0.0.1"] {
            if let Some(from) = From::parse(from, &model) {
                let _ = policy.explain(from, "10.0.0.1:5432/tcp".parse().unwrap()).to_string();
            }
        }
    }
}

/// A good policy with everything in it, to be broken.
fn rich() -> String {
    let mut text = format!("{BASE}{CERTIFICATES}{OFFICE_HOURS}");
    for (added, ..) in ADDED.iter().filter(|case| case.1 == "boundary") {
        let (name, number) = (format!("name = \"q{}\"\nacross_tenants = true", added.len()), added.len());
        text += &added.replace("name = \"r\"", &name).replace("\"s\"", &format!("\"s{number}\""));
        text.push('\n');
    }
    text
}

/// One change to a text.
#[derive(Clone, Debug)]
enum Edit {
    Remove(usize, usize),
    Insert(usize, String),
    Copy(usize, usize, usize),
    Swap(usize, usize),
}

fn edit() -> impl Strategy<Value = Edit> {
    const LENGTH: usize = 4096;
    let token = prop_oneof![
        Just("[[rule]]\n".to_owned()),
        Just("\"".to_owned()),
        Just("[".to_owned()),
        Just("= ".to_owned()),
        Just("\u{1f980}".to_owned()),
        Just("\0".to_owned()),
        Just("99999999999999999999".to_owned()),
        Just("/".to_owned()),
        Just("\"any\"".to_owned()),
        "\\PC{0,8}",
    ];
    prop_oneof![
        (0..LENGTH, 0..40usize).prop_map(|(at, length)| Edit::Remove(at, length)),
        (0..LENGTH, token).prop_map(|(at, text)| Edit::Insert(at, text)),
        (0..LENGTH, 0..200usize, 0..LENGTH).prop_map(|(from, length, to)| Edit::Copy(from, length, to)),
        (0..LENGTH, 0..LENGTH).prop_map(|(a, b)| Edit::Swap(a, b)),
    ]
}

fn apply(text: &str, edits: &[Edit]) -> String {
    let mut characters: Vec<char> = text.chars().collect();
    for edit in edits {
        let length = characters.len().max(1);
        let end = |at: usize, size: usize| (at + size).min(characters.len());
        match edit {
            Edit::Remove(at, size) => {
                let at = at % length;
                let end = end(at, *size);
                characters.drain(at.min(end)..end);
            }
            Edit::Insert(at, text) => {
                let at = (at % length).min(characters.len());
                characters.splice(at..at, text.chars());
            }
            Edit::Copy(from, size, to) => {
                let from = from % length;
                let end = end(from, *size);
                let piece: Vec<char> = characters[from.min(end)..end].to_vec();
                let to = (to % length).min(characters.len());
                characters.splice(to..to, piece);
            }
            Edit::Swap(a, b) if !characters.is_empty() => characters.swap(a % length, b % length),
            Edit::Swap(..) => {}
        }
    }
    characters.into_iter().collect()
}

#[test]
fn the_rich_policy_is_good() {
    let policy = read(&rich());
    let shown: Vec<String> = policy.diagnostics.iter().map(|d| d.render(false)).collect();
    assert!(policy.model.is_some(), "{}", shown.join("\n"));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        exercise(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn mutated_policies_never_panic(edits in proptest::collection::vec(edit(), 1..8)) {
        exercise(&apply(&rich(), &edits));
    }

    /// Values that have the right shape, in every field.
    #[test]
    fn random_values_never_panic(name in "\\PC{0,20}", text in "\\PC{0,30}", days in "[a-z-]{0,9}", hours in "[0-9:+-]{0,12}") {
        let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
        let (name, text) = (quoted(&name), quoted(&text));
        exercise(&format!(
            "trust_domain = {text}\n[[workload]]\nname = {name}\nkind = \"job\"\ncgroup = [{text}, {name}]\ntenant = {text}\n\
             spiffe_id = {text}\n[[peer]]\nname = {text}\nnetworks = [{text}]\n[[service]]\nname = {name}\nworkload = {name}\n\
             addresses = [{text}]\nports = [{text}]\n[[rule]]\nname = {name}\nfrom = [{name}, {text}]\nto = [{name}]\n\
             grant_ttl = {text}\nwhen = {{ days = {}, hours = {}, zone = {text} }}\n",
            quoted(&days), quoted(&hours),
        ));
    }
}
