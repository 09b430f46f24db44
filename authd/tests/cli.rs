//! The command line without a daemon: what it prints, where, and with which exit code.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
    sync::atomic::{AtomicU32, Ordering},
};

use aws_lc_rs::{
    digest::{SHA256, digest},
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair},
};
use serde_json::{Value, json};

const GOOD: &str = r#"trust_domain = "example.org"
[[workload]]
name = "no-such-cgroup"
kind = "agent"
cgroup = "/there/is/no/such/cgroup-*"
[[service]]
name = "tickets"
addresses = ["10.20.0.0/16"]
ports = ["tcp/443"]
[[rule]]
name = "read"
from = ["no-such-cgroup"]
to = ["tickets"]
[[rule]]
name = "later"
from = ["no-such-cgroup"]
to = ["tickets"]
require = ["mtls"]
when = { days = ["sat", "sun"] }
[[authority]]
name = "pki"
bundle = "ca.pem"
"#;

/// A directory of its own, with settings that name it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(policy: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("authd-cli-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(name);
        fs::create_dir_all(directory.join("policy.d")).unwrap();
        fs::write(directory.join("policy.d/p.toml"), policy).unwrap();
        let settings = format!(
            "policy = {:?}\nsocket = {:?}\nstate = {:?}\npins = {:?}\n",
            directory.join("policy.d"),
            directory.join("no.sock"),
            directory.join("state"),
            directory.join("pins")
        );
        fs::write(directory.join("authd.toml"), settings).unwrap();
        Self(directory)
    }

    fn policy(&self) -> String {
        self.0.join("policy.d").display().to_string()
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        let mut command = Command::new(env!("CARGO_BIN_EXE_authd"));
        let output = command.arg("--config").arg(self.0.join("authd.toml")).args(arguments).output().unwrap();
        Ran::new(output)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Ran {
    fn new(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }

    fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

#[test]
fn check_takes_a_good_policy_and_warns_of_what_is_hardly_meant() {
    let scratch = Scratch::new(GOOD);
    let ran = scratch.run(&["check"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(
        ran.out.contains("1 workloads, 0 peers, 1 services, 2 rules, 0 tools, 0 action policies; 0 errors, "),
        "{ran:?}"
    );
    assert!(ran.err.contains("warning[no_cgroup_now]") && ran.err.contains("p.toml:3:8"), "{ran:?}");
    assert!(ran.err.contains("warning[pointless]"), "{ran:?}");
    assert_eq!(scratch.run(&["check", "--strict"]).code, Some(1));
}

/// One rule that lets something pass, of a workload that does not run; the file that it names is there.
fn sound() -> Scratch {
    let (before, rest) = GOOD.split_once("[[rule]]\nname = \"later\"").unwrap();
    let (_, after) = rest.split_once("[[authority]]").unwrap();
    let scratch = Scratch::new(&format!("{before}[[authority]]{after}"));
    fs::write(scratch.0.join("policy.d/ca.pem"), "").unwrap();
    scratch
}

impl Scratch {
    fn with(self, policy: &str, settings: &str) -> Self {
        fs::write(self.0.join("policy.d/q.toml"), policy).unwrap();
        let file = self.0.join("authd.toml");
        fs::write(&file, fs::read_to_string(&file).unwrap() + settings).unwrap();
        self
    }

    /// Codes of what a check finds, and its messages.
    fn found(&self) -> Vec<(String, String)> {
        let found = self.run(&["check", "--json"]).json();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let found = found["diagnostics"].as_array().unwrap().iter();
        found.map(|found| (text(&found["code"]), text(&found["message"]))).collect()
    }

    fn messages(&self, code: &str) -> Vec<String> {
        self.found().into_iter().filter(|(found, _)| found == code).map(|(_, message)| message).collect()
    }
}

#[test]
fn strict_checks_do_not_fail_for_workloads_that_do_not_run_now() {
    let scratch = sound();
    let ran = scratch.run(&["check", "--strict"]);
    assert!(ran.err.contains("warning[no_cgroup_now]") && ran.out.contains("0 errors, 1 warnings"), "{ran:?}");
    assert_eq!(ran.code, Some(0), "{ran:?}");
    fs::remove_file(scratch.0.join("policy.d/ca.pem")).unwrap();
    assert_eq!(scratch.run(&["check", "--strict"]).code, Some(1));
    assert_eq!(scratch.run(&["check"]).code, Some(0));
}

#[test]
fn check_warns_of_files_programs_and_users_that_this_node_has_not() {
    let policy = |file: &str, program: &str, user: &str, owner: &str| {
        format!(
            "[[issuer]]\nname = \"corp\"\nkind = \"jwt\"\nissuer = \"https://idp.example.org\"\njwks_file = \"{file}\"\n\
             algorithms = [\"ES256\"]\n[[approvers]]\nname = \"leads\"\nusers = [\"{user}\", \"4242\"]\n\
             [[mcp_server]]\nname = \"files\"\ncommand = [\"{program}\"]\nuser = \"{owner}\"\n"
        )
    };
    let of = |scratch: &Scratch| ["unreadable_file", "no_program", "unknown_user"].map(|code| scratch.messages(code));
    let there = sound().with(&policy("ca.pem", env!("CARGO_BIN_EXE_authd"), "root", "4242"), "");
    assert_eq!(of(&there), [vec![], vec![], vec![]] as [Vec<String>; 3]);
    let missing = sound().with(&policy("keys.json", "/no/such/program", "no-such-user", "no-such-owner"), "");
    // Where they are missing is no fault of the policy; a server that is nobody's is.
    let told = missing.messages("mcp_server_unmanaged");
    assert!(told.len() == 1 && told[0].contains("no workload matches /authd.mcp/files/*"), "{told:?}");
    let workload = "[[workload]]\nname = \"files\"\nkind = \"service\"\ncgroup = \"/authd.mcp/files/*\"\n";
    let named = sound().with(&(policy("ca.pem", "/bin/sh", "root", "4242") + workload), "");
    assert!(named.messages("mcp_server_unmanaged").is_empty());
    let [files, programs, users] = of(&missing);
    assert!(files.len() == 1 && files[0].contains("policy.d/keys.json: No such file"), "{files:?}");
    assert!(
        programs.len() == 1 && programs[0].contains("`files` cannot be started: /no/such/program: No"),
        "{programs:?}"
    );
    assert!(users[0].contains("no user `no-such-user`, who is to approve as one of approvers `leads`"), "{users:?}");
    assert!(users[1].contains("no user `no-such-owner`, as whom MCP server `files`") && users.len() == 2, "{users:?}");
    let plain = sound();
    let program = plain.0.join("policy.d/ca.pem").display().to_string();
    let directory = plain.policy();
    let wrong = plain.with(&policy(&directory, &program, "root", "4242"), "");
    let [files, programs, _] = of(&wrong);
    assert!(files.len() == 1 && files[0].ends_with("it is no regular file"), "{files:?}");
    assert!(programs.len() == 1 && programs[0].ends_with("nobody may execute it"), "{programs:?}");
}

#[test]
fn check_warns_of_tokens_of_this_node_that_nobody_is_given_or_can_verify() {
    let policy = "[[issuer]]\nname = \"corp\"\nkind = \"jwt\"\nissuer = \"https://idp.example.org\"\njwks_file = \"ca.pem\"\n\
                  algorithms = [\"ES256\"]\n[[delegation]]\nname = \"d\"\nactors = [\"no-such-cgroup\"]\nissuer = \"corp\"\n\
                  audiences = [\"a\"]\n[[rule]]\nname = \"own\"\nfrom = [\"no-such-cgroup\"]\nto = [\"tickets\"]\n\
                  require = [\"token\"]\ntoken = { issuer = \"own\", audience = \"a\" }\n";
    let issuer = "[issuer]\nurl = \"https://node.example.org:7443\"\n";
    let listener = "[control]\nlisten = \"127.0.0.1:7443\"\ncertificate = \"c.pem\"\nkey = \"k.pem\"\n";
    let none = sound().with(policy, "");
    let told = none.messages("no_issuer");
    assert!(told.len() == 2 && told[0].contains("delegation `d`"), "{told:?}");
    assert!(
        told[1].contains("rule `own` never opens: it asks for a token of this node, which issues none"),
        "{told:?}"
    );
    assert!(none.messages("issuer_unreachable").is_empty());
    let alone = sound().with(policy, issuer);
    assert!(alone.messages("no_issuer").is_empty());
    let told = alone.messages("issuer_unreachable");
    assert!(told.len() == 1 && told[0].contains("its keys are at https://node.example.org:7443"), "{told:?}");
    let heard = sound().with(policy, &format!("{issuer}{listener}"));
    assert!(heard.messages("no_issuer").is_empty() && heard.messages("issuer_unreachable").is_empty());
    // Of another issuer's tokens this says nothing.
    let other = sound().with(&policy.replace("\"own\", audience", "\"corp\", audience"), "");
    assert_eq!(other.messages("no_issuer").len(), 1);
}

#[test]
fn check_shows_the_line_and_the_remedy_of_an_error() {
    let scratch = Scratch::new(&GOOD.replace("to = [\"tickets\"]", "to = [\"tikets\"]"));
    let ran = scratch.run(&["check", &scratch.policy()]);
    assert_eq!(ran.code, Some(64), "{ran:?}");
    for expected in ["error[unknown_service]", "--> p.toml:13:7", "to = [\"tikets\"]", "did you mean `tickets`?"] {
        assert!(ran.err.contains(expected), "{expected:?} in {ran:?}");
    }
    assert!(!ran.err.contains('\x1b'), "no colours where there is no terminal");
    let ran = scratch.run(&["check", "--json"]);
    let found = ran.json();
    assert_eq!((ran.code, found["errors"].as_u64()), (Some(64), Some(2)));
    let first = &found["diagnostics"][0];
    assert_eq!(first["place"], serde_json::json!({ "file": "p.toml", "line": 13, "column": 7 }));
}

#[test]
fn explain_answers_from_a_directory_for_any_time() {
    let scratch = Scratch::new(GOOD);
    let ask = |arguments: &[&str]| {
        let fixed = ["explain", "--policy", &scratch.policy(), "--from", "no-such-cgroup"];
        scratch.run(&[&fixed, arguments].concat())
    };
    let ran = ask(&["--to", "10.20.1.2:443/tcp", "--at", "2026-11-23T12:00:00Z"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    for expected in
        ["allowed (rule) by rule read", "rule later is not in force now; it will be from 2026-11-28T00:00:00Z"]
    {
        assert!(ran.out.contains(expected), "{expected:?} in\n{}", ran.out);
    }
    let ran = ask(&["--to", "10.21.0.1:443/tcp", "--json"]);
    let explained = ran.json();
    assert_eq!((explained["verdict"].as_str(), explained["reason"].as_str()), (Some("denied"), Some("no_rule")));
    let why = explained["steps"][0]["others"].to_string();
    assert!(why.contains("covers `tickets` (tcp/443 on 10.20.0.0/16)"), "{why}");
    for wrong in [&["--to", "10.20.1.2:443"][..], &["--to", "10.20.1.2:443/tcp", "--at", "noon"]] {
        let ran = ask(wrong);
        assert_eq!(ran.code, Some(2), "{ran:?}");
    }
    let ran = scratch.run(&["explain", "--policy", &scratch.policy(), "--from", "nobody", "--to", "10.0.0.1:1/tcp"]);
    assert!(ran.code == Some(1) && ran.err.contains("`nobody` is no workload"), "{ran:?}");
}

#[test]
fn diff_says_which_verdicts_and_definitions_change() {
    let (old, new) = (Scratch::new(GOOD), Scratch::new(&GOOD.replace("tcp/443", "tcp/8443")));
    let ran = old.run(&["diff", &old.policy(), &new.policy(), "--json"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let changes = ran.json();
    let definition = json!({
        "kind": "service", "name": "tickets", "change": "changed",
        "fields": [{ "path": "ports", "before": ["tcp/443"], "after": ["tcp/8443"] }]
    });
    assert_eq!(changes["definitions"], json!([definition]));
    let changes = changes["verdicts"].as_array().unwrap();
    assert!(
        changes.iter().any(|c| c["to"] == "10.20.0.0:443/tcp" && c["before"].as_str().unwrap().contains("allowed")),
        "{changes:?}"
    );
    assert!(
        changes.iter().any(|c| c["to"] == "10.20.0.0:8443/tcp" && c["after"].as_str().unwrap().contains("allowed")),
        "{changes:?}"
    );
    let ran = old.run(&["diff", &old.policy(), &old.policy()]);
    assert_eq!(ran.out, "0 verdicts change, 0 definitions differ\n");
    let ran = old.run(&["diff", &old.policy(), &new.policy()]);
    let expected = "service tickets differs\n    ports: [\"tcp/443\"] becomes [\"tcp/8443\"]\n";
    assert!(ran.out.contains(expected), "{ran:?}");
}

#[test]
fn schemas_are_json_schemas() {
    let scratch = Scratch::new(GOOD);
    for of in ["policy", "config"] {
        let schema = scratch.run(&["schema", of]).json();
        assert!(schema["$schema"].as_str().is_some_and(|s| s.contains("json-schema.org")), "{schema}");
        assert_eq!(schema["additionalProperties"], false, "unknown keys are errors");
    }
}

#[test]
fn without_a_daemon_questions_to_it_fail_and_say_so() {
    let scratch = Scratch::new(GOOD);
    for arguments in [&["status"][..], &["flows"], &["apply"]] {
        let ran = scratch.run(arguments);
        assert_eq!(ran.code, Some(1), "{ran:?}");
        assert!(ran.err.contains("does it run?") && ran.err.contains("no.sock"), "{ran:?}");
    }
    assert_eq!(scratch.run(&["frobnicate"]).code, Some(2));
}

#[test]
fn bad_settings_are_named_with_their_place() {
    let scratch = Scratch::new(GOOD);
    fs::write(scratch.0.join("authd.toml"), "policies = \"/etc\"\n").unwrap();
    let ran = scratch.run(&["check"]);
    assert_eq!(ran.code, Some(64), "{ran:?}");
    assert!(ran.err.contains("authd.toml:1:1") && ran.err.contains("unknown field `policies`"), "{ran:?}");
}

const ISSUERS: &str = r#"trust_domain = "example.org"
[[issuer]]
name = "corp"
kind = "jwt"
issuer = "https://idp.example.org"
jwks_file = "keys/corp.json"
algorithms = ["ES256"]
max_ttl = "15m"
[[issuer]]
name = "elsewhere"
kind = "jwt"
issuer = "https://elsewhere.example.org"
jwks_url = "https://elsewhere.example.org/jwks.json"
algorithms = ["ES256"]
[[issuer]]
name = "opaque"
kind = "introspection"
issuer = "https://opaque.example.org"
introspection_url = "https://opaque.example.org/introspect"
client_id = "authd"
"#;

/// 2026-11-23T09:00:00Z
const AT: i64 = 1_795_424_400;

/// An issuer's, or a DPoP client's.
struct Key(EcdsaKeyPair);

impl Key {
    fn new() -> Self {
        Self(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap())
    }

    fn jwk(&self) -> Value {
        let (x, y) = self.0.public_key().as_ref()[1..].split_at(32);
        json!({ "kty": "EC", "crv": "P-256", "x": encode(x), "y": encode(y) })
    }

    fn jwks(&self) -> String {
        json!({ "keys": [self.jwk()] }).to_string()
    }

    fn sign(&self, header: Value, claims: &Value) -> String {
        let signed = format!("{}.{}", encode(header.to_string()), encode(claims.to_string()));
        let signature = self.0.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        format!("{signed}.{}", encode(signature))
    }

    fn token(&self, changes: Value) -> String {
        let mut claims = json!({
            "iss": "https://idp.example.org", "sub": "payments-api", "aud": "ledger", "scope": "w", "iat": AT - 60,
            "exp": AT + 240,
        });
        claims.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        self.sign(json!({ "alg": "ES256" }), &claims)
    }
}

fn encode(bytes: impl AsRef<[u8]>) -> String {
    authd::proofs::base64url::encode(bytes)
}

fn issuers(key: &Key) -> Scratch {
    let scratch = Scratch::new(ISSUERS);
    fs::create_dir(scratch.0.join("policy.d/keys")).unwrap();
    fs::write(scratch.0.join("policy.d/keys/corp.json"), key.jwks()).unwrap();
    scratch
}

/// Exit code, and acceptance and reason of each line.
fn verify(scratch: &Scratch, tokens: &str, arguments: &[&str]) -> (Option<i32>, Vec<(bool, String)>) {
    let file = scratch.0.join("tokens");
    fs::write(&file, tokens).unwrap();
    let fixed = ["token", "verify", "--at", "2026-11-23T09:00:00Z", file.to_str().unwrap()];
    let ran = scratch.run(&[&fixed, arguments].concat());
    assert!(ran.err.is_empty(), "{ran:?}");
    let answers = ran.out.lines().map(|line| {
        let answer: Value = serde_json::from_str(line).unwrap();
        let accepted = answer["accepted"].as_bool().unwrap();
        assert_eq!(answer["principal"].is_string(), accepted, "{answer}");
        (accepted, answer["reason"].as_str().unwrap_or("none").to_owned())
    });
    (ran.code, answers.collect())
}

#[test]
fn tokens_are_verified_against_the_policy_line_by_line() {
    let key = Key::new();
    let scratch = issuers(&key);
    let good = key.token(json!({}));
    let one = |accepted, reason: &str| (accepted, reason.to_owned());
    assert_eq!(verify(&scratch, &good, &["--audience", "ledger", "--scope", "w"]), (Some(0), vec![one(true, "none")]));
    let tokens = [
        good.clone(),
        key.token(json!({ "exp": AT - 30 })),
        key.token(json!({ "iss": "https://elsewhere.example.org" })),
        key.token(json!({ "iss": "https://opaque.example.org" })),
        key.token(json!({ "iss": "https://nobody.example.org" })),
        Key::new().token(json!({})),
        String::new(),
        good.replace('.', " "),
    ];
    let expected = [
        one(true, "none"),
        one(false, "token_expired"),
        one(false, "keys_unavailable"),
        one(false, "introspection_only"),
        one(false, "issuer_unknown"),
        one(false, "signature_invalid"),
        one(false, "token_malformed"),
        one(false, "token_malformed"),
    ];
    assert_eq!(verify(&scratch, &(tokens.join("\n") + "\n"), &[]), (Some(1), expected.to_vec()));
    for (arguments, reason) in [
        (&["--audience", "other"][..], "audience_mismatch"),
        (&["--scope", "w", "--scope", "x"], "scope_insufficient"),
        (&["--subject", "root"], "subject_not_allowed"),
        (&["--bound"], "token_not_bound"),
        (&["--issuer", "elsewhere"], "keys_unavailable"),
        (&["--issuer", "opaque"], "introspection_only"),
        (&["--policy", "/nowhere/at/all", "--issuer", "corp"], "no policy"),
    ] {
        if reason == "no policy" {
            let ran = scratch.run(&[&["token", "verify", "/dev/null"], arguments].concat());
            assert_eq!(ran.code, Some(64), "{ran:?}");
            continue;
        }
        assert_eq!(verify(&scratch, &good, arguments), (Some(1), vec![one(false, reason)]), "{arguments:?}");
    }
    let keys = scratch.0.join("other.json");
    fs::write(&keys, key.jwks()).unwrap();
    let moved = key.token(json!({ "iss": "https://elsewhere.example.org" }));
    let arguments = ["--issuer", "elsewhere", "--jwks", keys.to_str().unwrap()];
    assert_eq!(verify(&scratch, &moved, &arguments), (Some(0), vec![one(true, "none")]));
}

#[test]
fn a_bound_token_is_verified_with_what_it_is_bound_to() {
    let (key, client) = (Key::new(), Key::new());
    let scratch = issuers(&key);
    let file = scratch.0.join("client.pem");
    let der = b"any bytes: only their hash counts here";
    let pem = format!(
        "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
        "YW55IGJ5dGVzOiBvbmx5IHRoZWlyIGhhc2ggY291bnRzIGhlcmU="
    );
    fs::write(&file, pem).unwrap();
    let hash = |bytes: &[u8]| encode(digest(&SHA256, bytes));
    let x5t = hash(der);
    let cert = ["--cert", file.to_str().unwrap(), "--bound"];
    let bound = key.token(json!({ "cnf": { "x5t#S256": x5t } }));
    assert_eq!(verify(&scratch, &bound, &cert).0, Some(0));
    assert_eq!(verify(&scratch, &bound, &[]).1[0].1, "bound_certificate_missing");
    let other = key.token(json!({ "cnf": { "x5t#S256": encode([0; 32]) } }));
    assert_eq!(verify(&scratch, &other, &cert).1[0].1, "bound_certificate_mismatch");

    let jwk = client.jwk();
    let canonical = format!(r#"{{"crv":"P-256","kty":"EC","x":{},"y":{}}}"#, jwk["x"], jwk["y"]);
    let token = key.token(json!({ "cnf": { "jkt": hash(canonical.as_bytes()) } }));
    let proof = client.sign(
        json!({ "typ": "dpop+jwt", "alg": "ES256", "jwk": jwk }),
        &json!({ "jti": "1", "htm": "GET", "htu": "https://a/b", "iat": AT, "ath": hash(token.as_bytes()) }),
    );
    let with = |method, url| ["--dpop", &proof, "--method", method, "--url", url].map(str::to_owned);
    for (arguments, expected) in [
        (with("GET", "https://a/b?c"), "none"),
        (with("POST", "https://a/b"), "dpop_method_mismatch"),
        (with("GET", "https://a/c"), "dpop_uri_mismatch"),
    ] {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        assert_eq!(verify(&scratch, &token, &arguments).1[0].1, expected);
    }
    assert_eq!(verify(&scratch, &token, &[]).1[0].1, "dpop_bound_as_bearer");
    assert_eq!(scratch.run(&["token", "verify", "--dpop", &proof, "/dev/null"]).code, Some(2));
}

#[test]
fn inspecting_a_token_says_that_nothing_was_checked() {
    let scratch = Scratch::new(GOOD);
    let file = scratch.0.join("tokens");
    fs::write(&file, Key::new().token(json!({ "sub": "root" }))).unwrap();
    let ran = scratch.run(&["token", "inspect", file.to_str().unwrap()]);
    let shown = ran.json();
    assert_eq!((ran.code, &shown["claims"]["sub"], &shown["verified"]), (Some(0), &json!("root"), &json!(false)));
    assert_eq!(shown["header"]["alg"], "ES256");
    fs::write(&file, "a.b").unwrap();
    let ran = scratch.run(&["token", "inspect", file.to_str().unwrap()]);
    assert_eq!((ran.code, &ran.json()["reason"]), (Some(1), &json!("token_malformed")));
    let ran = scratch.run(&["token", "inspect", "/dev/null"]);
    assert!(ran.code == Some(1) && ran.err.contains("holds no token"), "{ran:?}");
}

/// Beside [`GOOD`].
const TOOLS: &str = r#"
[[issuer]]
name = "corp"
kind = "jwt"
issuer = "https://idp.example.org"
jwks_file = "jwks.json"
algorithms = ["ES256"]
[[approvers]]
name = "leads"
users = ["alice"]
issuer = "corp"
audience = "approvals"
subjects = ["bob"]
[[tool]]
name = "refund"
service = "tickets"
arguments = { amount = "decimal" }
"#;

const ACTIONS: &str = r#"// What agents may do.
@id("small")
permit (principal, action == Action::"refund", resource)
when { context.arguments.amount.lessThan(decimal("50.0")) };
@approval("leads") permit (principal, action, resource) when { context has subject && context.subject.id == "eve" };
@id("late") forbid (principal, action, resource) when { context.now > datetime("2030-01-01") };
"#;

fn with_actions(actions: &str) -> Scratch {
    let scratch = Scratch::new(&format!("{GOOD}{TOOLS}"));
    fs::write(scratch.0.join("policy.d/a.cedar"), actions).unwrap();
    scratch
}

#[test]
fn check_counts_tools_and_action_policies_and_shows_the_lines_of_their_faults() {
    let ran = with_actions(ACTIONS).run(&["check"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.out.contains(" 2 rules, 1 tools, 3 action policies; 0 errors, "), "{ran:?}");
    let scratch = with_actions(&ACTIONS.replace("arguments.amount", "arguments.amuont"));
    let ran = scratch.run(&["check"]);
    assert_eq!(ran.code, Some(64), "{ran:?}");
    for expected in ["error[unknown_attribute]", "--> a.cedar:4:8", "arguments.amuont", "did you mean `amount`?"] {
        assert!(ran.err.contains(expected), "{expected:?} in {ran:?}");
    }
    let found = scratch.run(&["check", "--json"]).json();
    let place = serde_json::json!({ "file": "a.cedar", "line": 4, "column": 8 });
    let found = found["diagnostics"].as_array().unwrap().iter().find(|d| d["code"] == "unknown_attribute").unwrap();
    assert_eq!(found["place"], place);
    // Who corrects a policy asks for the schema.
    let ran = scratch.run(&["schema", "cedar", "--policy", &scratch.policy()]);
    assert!(ran.code == Some(0) && ran.out.contains("action \"refund\" in [Action::\"tools\"]"), "{ran:?}");
}

#[test]
fn schemas_of_action_policies_are_cedars() {
    let scratch = with_actions(ACTIONS);
    let fixed = scratch.run(&["schema", "cedar"]);
    let whole = scratch.run(&["schema", "cedar", "--policy", &scratch.policy()]);
    assert!(whole.out.starts_with(&fixed.out) && whole.out.contains("\"amount\": decimal"), "{whole:?}");
    for schema in [&fixed.out, &whole.out] {
        let (_, warnings) = cedar_policy::Schema::from_cedarschema_str(schema).unwrap();
        assert_eq!(warnings.count(), 0);
    }
    assert_eq!(scratch.run(&["schema", "--policy", &scratch.policy()]).code, Some(1));
    fs::write(scratch.0.join("policy.d/q.toml"), "[[tool]]").unwrap();
    assert_eq!(scratch.run(&["schema", "cedar", "--policy", &scratch.policy()]).code, Some(64));
}

/// What Cedar allows is not all: the daemon asks for what the tool's rule requires, and for a token that can be had.
#[test]
fn explain_action_says_what_else_refuses_and_what_opens() {
    const RULES: &str = r#"
[[delegation]]
name = "agents"
actors = ["no-such-cgroup"]
issuer = "corp"
subjects = ["eve"]
audiences = ["tickets"]
scopes = ["refunds", "reading"]
[[rule]]
name = "refunds"
from = ["no-such-cgroup"]
to = ["tickets"]
require = ["action", "token"]
token = { issuer = "own", audience = "tickets", scopes = ["refunds"], bound = true }
permit = { connections = 2, bytes = "64KiB" }
grant_ttl = "1m"
[[rule]]
name = "asked"
from = ["no-such-cgroup"]
to = ["tickets"]
require = ["action", "approval", "token"]
token = { issuer = "own", audience = "tickets" }
"#;
    let asked = |permit: &str, amount: u32, more: &[&str]| {
        let tools = TOOLS.replace("service = \"tickets\"", &format!("service = \"tickets\"\npermit = \"{permit}\""));
        let scratch = Scratch::new(&format!("{GOOD}{tools}{RULES}"));
        fs::write(scratch.0.join("policy.d/a.cedar"), ACTIONS).unwrap();
        let arguments = json!({ "amount": amount }).to_string();
        let base =
            ["explain", "action", "--from", "no-such-cgroup", "--tool", "refund", "--at", "2026-11-23T09:00:00Z"];
        scratch.run(&[&base[..], &["--arguments", &arguments, "--json"], more].concat()).json()
    };
    const EVE: [&str; 3] = ["--subject", "corp", "eve"];
    let of_eve = |more: &[&'static str]| [&EVE[..], more].concat();
    let told = asked("refunds", 20, &of_eve(&["--scope", "refunds"]));
    assert_eq!(told["outcome"], "allowed");
    let permit = json!({ "rule": "refunds", "to": ["tickets"], "connections": 2, "bytes": 65_536, "seconds": 60, "requires": ["token"] });
    assert_eq!(told["permit"], permit);
    for (permit, amount, more, outcome, reason) in [
        ("refunds", 20, vec![], "denied", "authorization_missing"),
        ("refunds", 20, of_eve(&["--scope", "reading"]), "denied", "token_wrong_scope"),
        ("refunds", 20, of_eve(&["--scope", "refunds", "--audience", "tickets"]), "allowed", "action_permitted"),
        ("refunds", 70, of_eve(&["--scope", "refunds"]), "pending", "action_needs_approval"),
        ("asked", 20, of_eve(&["--scope", "refunds"]), "denied", "approval_missing"),
        ("asked", 70, of_eve(&["--scope", "refunds"]), "pending", "action_needs_approval"),
        // Tokens that no delegation gives.
        ("refunds", 20, of_eve(&["--scope", "all"]), "denied", "exchange_not_allowed"),
        ("refunds", 20, of_eve(&["--scope", "refunds", "--audience", "mail"]), "denied", "exchange_not_allowed"),
        ("refunds", 20, vec!["--subject", "corp", "bob", "--scope", "refunds"], "denied", "exchange_not_allowed"),
    ] {
        let told = asked(permit, amount, &more);
        assert_eq!((&told["outcome"], &told["reason"]), (&json!(outcome), &json!(reason)), "{more:?}: {told}");
        assert_eq!(told["permit"].is_object(), outcome != "denied", "{told}");
    }
}

#[test]
fn explain_action_says_who_decided_and_who_would_have_to_approve() {
    let scratch = with_actions(ACTIONS);
    let delegation = "[[delegation]]\nname = \"d\"\nactors = [\"no-such-cgroup\"]\nissuer = \"corp\"\naudiences = [\"x\"]\nscopes = [\"y\"]\n";
    fs::write(scratch.0.join("policy.d/q.toml"), delegation).unwrap();
    let ask = |arguments: &str, more: &[&str]| {
        let base =
            ["explain", "action", "--from", "no-such-cgroup", "--tool", "refund", "--at", "2026-11-23T09:00:00Z"];
        scratch.run(&[&base[..], &["--arguments", arguments], more].concat())
    };
    let ran = ask(r#"{"amount": 20}"#, &[]);
    assert!(ran.code == Some(0) && ran.out.contains("allowed (action_permitted)"), "{ran:?}");
    assert!(ran.out.contains("permit small at a.cedar:2:1"), "{ran:?}");
    let told = ask(r#"{"amount": 70}"#, &["--subject", "corp", "eve", "--json"]).json();
    assert_eq!((&told["outcome"], &told["reason"]), (&json!("pending"), &json!("action_needs_approval")));
    assert_eq!(
        told["approvers"],
        json!([{ "approvers": "leads", "policy": "a.cedar:5", "users": ["alice"], "issuer": "corp", "audience": "approvals", "subjects": ["bob"] }])
    );
    let policy = &told["policies"][0];
    assert_eq!(
        (&policy["file"], &policy["line"], &policy["approval"]),
        (&json!("a.cedar"), &json!(5), &json!("leads"))
    );
    assert_eq!(told["others"].as_array().unwrap().len(), 2);
    let told = ask(r#"{"amount": 70}"#, &["--json"]).json();
    assert_eq!((&told["reason"], &told["policies"]), (&json!("action_not_permitted"), &json!([])));
    let told = ask(r#"{"amount": "much"}"#, &["--json"]).json();
    assert_eq!((&told["reason"], &told["argument"]), (&json!("action_bad_arguments"), &json!("/amount")));
    let ran = ask(r#"{"amount": 1, "amount": 2}"#, &[]);
    assert!(ran.code == Some(1) && ran.err.contains("stands twice"), "{ran:?}");
    let ran = ask("{}", &["--subject", "crop", "eve"]);
    assert!(ran.code == Some(1) && ran.err.contains("did you mean `corp`?"), "{ran:?}");
    let late = scratch.run(&[
        "explain",
        "action",
        "--from",
        "no-such-cgroup",
        "--tool",
        "refund",
        "--at",
        "2031-01-01T00:00:00Z",
        "--arguments",
        r#"{"amount": 1}"#,
    ]);
    assert!(
        late.out.contains("denied (action_forbidden)") && late.out.contains("forbid late at a.cedar:6:1"),
        "{late:?}"
    );
    let ran = scratch.run(&["explain", "action", "--from", "no-such", "--tool", "refund"]);
    assert!(ran.code == Some(1) && ran.err.contains("is no workload"), "{ran:?}");
    // Flows are asked about as before.
    assert_eq!(scratch.run(&["explain", "--from", "no-such-cgroup"]).code, Some(2));
}
