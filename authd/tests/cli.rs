//! The command line without a daemon: what it prints, where, and with which exit code.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
    sync::atomic::{AtomicU32, Ordering},
};

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
    assert!(ran.out.contains("1 workloads, 0 peers, 1 services, 2 rules; 0 errors, "), "{ran:?}");
    assert!(ran.err.contains("warning[no_cgroup_now]") && ran.err.contains("p.toml:3:8"), "{ran:?}");
    assert!(ran.err.contains("warning[pointless]"), "{ran:?}");
    assert_eq!(scratch.run(&["check", "--strict"]).code, Some(1));
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
fn diff_says_which_verdicts_change() {
    let (old, new) = (Scratch::new(GOOD), Scratch::new(&GOOD.replace("tcp/443", "tcp/8443")));
    let ran = old.run(&["diff", &old.policy(), &new.policy(), "--json"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let changes = ran.json();
    let changes = changes.as_array().unwrap();
    assert!(
        changes.iter().any(|c| c["to"] == "10.20.0.0:443/tcp" && c["before"].as_str().unwrap().contains("allowed")),
        "{changes:?}"
    );
    assert!(
        changes.iter().any(|c| c["to"] == "10.20.0.0:8443/tcp" && c["after"].as_str().unwrap().contains("allowed")),
        "{changes:?}"
    );
    let ran = old.run(&["diff", &old.policy(), &old.policy()]);
    assert!(ran.out.contains("0 verdicts change"), "{ran:?}");
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
