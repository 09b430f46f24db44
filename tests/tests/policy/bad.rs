//! Policies with one fault each: what is said of it, and where.

use crate::{BASE, bad_agents::OF_AGENTS, bad_nodes::OF_NODES, bad_tools::OF_TOOLS, read};

/// What is added to the base, the finding's code, where it is (line and column of the addition), and some of its words.
pub type Bad = (&'static str, &'static str, &'static str, &'static str);

/// Everything here stands behind the base.
pub const ADDED: &[Bad] = &[
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
    (
        "trust_domain = \"a\"\n[[node]]\nname = \"n\"\nspiffe_id = \"spiffe://a/n\"",
        "no_authority",
        "4:13",
        "the node shows a certificate, and no authority vouches for any",
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
    for case in ADDED.iter().chain(OF_NODES).chain(OF_TOOLS).chain(OF_AGENTS) {
        faults.extend(wrong(&format!("{BASE}{}", case.0), case, BASE.lines().count()));
    }
    for case in WHOLE {
        faults.extend(wrong(case.0, case, 0));
    }
    let all = ADDED.len() + OF_NODES.len() + OF_TOOLS.len() + OF_AGENTS.len() + WHOLE.len();
    assert!(faults.is_empty(), "{} of {all}:\n{}", faults.len(), faults.join("\n"));
}
