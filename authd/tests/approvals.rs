//! Approvals against `kill -9`: a yes that was acknowledged is there, and no use is ever answered twice.

use std::{
    collections::HashSet,
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::Duration,
};

use authd::{
    decisions::{
        approvals::{Approver, Group},
        call::{Agent, Arguments, Call},
        kept::{Kept, Wanted},
    },
    digest::Digest,
    store::Store,
};
use jiff::{SignedDuration, Timestamp};

const DIRECTORY: &str = "AUTHD_TEST_APPROVALS";
const KILLS: u64 = 25;
const UID: u32 = 1001;

/// Nothing expires here.
fn now() -> Timestamp {
    "2026-11-26T12:00:00Z".parse().unwrap()
}

fn policy() -> Digest {
    Digest::of(b"policy")
}

fn call(number: usize) -> Call {
    Call {
        tool: "refund".to_owned(),
        arguments: Arguments::read(format!("{{\"number\":{number}}}").as_bytes()).unwrap(),
        agent: Agent {
            workload: "agent".to_owned(),
            cgroup: "/agent".to_owned(),
            instance: 1,
            spiffe_id: "spiffe://example.org/agent".to_owned(),
        },
        delegation: None,
        policy: policy(),
    }
}

fn leads() -> Vec<String> {
    vec!["leads".to_owned()]
}

fn open(directory: &Path) -> (Store, Kept) {
    let store = Store::open(directory).unwrap_or_else(|error| panic!("{error}"));
    let mut kept = Kept::load(&store).unwrap();
    let group = Group {
        name: "leads".to_owned(),
        users: [(UID, "alice".to_owned())].into(),
        step_up: None,
        ttl: SignedDuration::from_hours(1),
        valid: SignedDuration::from_hours(1),
        may_be_subject: false,
    };
    kept.policy_changed(&store, now(), policy(), [group]).1.unwrap();
    (store, kept)
}

/// Asks, approves and uses without end: `+N` when a yes is acknowledged, `*N` when a use is.
#[test]
#[ignore = "the child of the test below"]
fn child() {
    let directory = std::env::var_os(DIRECTORY).expect("the parent names a directory");
    let (store, mut kept) = open(&PathBuf::from(directory));
    let mut out = std::io::stdout();
    let known: HashSet<_> = kept.approvals().list().into_iter().map(|entry| entry.call.hash()).collect();
    let first = (0..).find(|number| !known.contains(&call(*number).hash())).unwrap_or_default();
    for number in first.. {
        let wanted = Wanted { call: call(number), uid: 2001, approvers: leads(), policies: Vec::new() };
        let id = kept.request(&store, now(), wanted).unwrap().id;
        let approver = Approver { approvers: None, uid: UID, token: None, text: String::new() };
        kept.grant(&store, now(), &id, approver).unwrap();
        writeln!(out, "\n+{number}").unwrap();
        kept.use_up(&store, now(), &call(number).hash(), &leads()).unwrap();
        writeln!(out, "\n*{number}").unwrap();
    }
}

/// Lets the child work until it acknowledged so many steps, and for some time more; returns all that it acknowledged.
fn work_until_killed(directory: &Path, least: usize, after: Duration) -> Vec<String> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "child", "--nocapture"])
        .env(DIRECTORY, directory)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let is_change = |line: &String| line.starts_with(['+', '*']);
    let mut acknowledged: Vec<String> = lines.by_ref().filter(is_change).take(least).collect();
    assert_eq!(acknowledged.len(), least, "the child acknowledged too little");
    sleep(after);
    child.kill().unwrap();
    // What it said before it was killed is still in the pipe.
    acknowledged.extend(lines.filter(is_change));
    child.wait().unwrap();
    acknowledged
}

#[test]
fn a_yes_is_used_once_whatever_is_killed_when() {
    let directory = std::env::temp_dir().join(format!("authd-approvals-kill-{}", std::process::id()));
    let _ = fs::remove_dir_all(&directory);
    fs::DirBuilder::new().mode(0o700).create(&directory).unwrap();
    let (mut used, mut approved, mut answered, mut left) = (HashSet::new(), HashSet::new(), 0, 0);
    for kill in 0..KILLS {
        // At the last the second step, which is to use the first yes up, is waited for: how long it takes is the disk's affair.
        let least = if kill + 1 == KILLS { 2 } else { 1 };
        for line in work_until_killed(&directory, least, Duration::from_micros(kill * 7919 % 40_000)) {
            let number: usize = line[1..].parse().unwrap();
            let known = if line.starts_with('+') { &mut approved } else { &mut used };
            answered += usize::from(line.starts_with('*'));
            assert!(known.insert(number), "kill {kill}: {line} for the second time");
        }
        let (store, mut kept) = open(&directory);
        for number in &approved {
            let hash = call(*number).hash();
            let entry = kept.approvals().list().into_iter().find(|entry| entry.call.hash() == hash);
            let state = entry.map(|entry| entry.state.name());
            assert!(matches!(state, Some("granted" | "used")), "kill {kill}: {number} is {state:?}");
        }
        // One may have been approved and not used; it can be used now, once.
        let all: HashSet<usize> = approved.iter().chain(&used).copied().collect();
        for number in all {
            let mut again = || kept.use_up(&store, now(), &call(number).hash(), &leads());
            if again().is_ok() {
                assert!(used.insert(number), "kill {kill}: {number} was used twice");
                left += 1;
            }
            assert_eq!(again().unwrap_err().reason(), "approval_used", "kill {kill}: {number}");
        }
    }
    fs::remove_dir_all(&directory).unwrap();
    assert!(answered > 0, "every kill came too early to prove anything");
    assert!(left > 0, "no kill came between a yes and its use");
}
