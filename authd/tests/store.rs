//! The store against `kill -9`: what was acknowledged is there, whatever the process was doing.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::Duration,
};

use authd::{
    grants::{Given, Holder, Id},
    store::{
        Store,
        grants::Grant,
        revocations::{Revocation, Revocations, Revoked},
    },
};
use jiff::Timestamp;

const DIRECTORY: &str = "AUTHD_TEST_STORE";
const KILLS: u64 = 25;

fn peer(number: usize) -> Revoked {
    Revoked::Peer(format!("p{number}"))
}

fn grant(number: usize) -> Grant {
    let given = Given {
        id: Id((number as u128).to_be_bytes()),
        rule: "r".to_owned(),
        holder: Holder::Workload { name: "w".to_owned(), cgroup: "/w".to_owned(), instance: 1 },
        proofs: Vec::new(),
        terms: 0,
        issued: Timestamp::UNIX_EPOCH,
        until: Timestamp::UNIX_EPOCH,
        permit: None,
    };
    let slot = number as u32;
    Grant { given, rule_number: 0, workload_number: 1, slot, serial: 1, boot: "b".to_owned() }
}

/// Writes without end, and says of each change when it is acknowledged: `+N` a revocation, `-N` its end.
#[test]
#[ignore = "the child of the test below"]
fn child() {
    let store =
        Store::open(&PathBuf::from(std::env::var_os(DIRECTORY).expect("the parent names a directory"))).unwrap();
    let mut revocations = Revocations::load(&store).unwrap();
    let first = revocations.len() * 2;
    let mut out = std::io::stdout();
    for number in first.. {
        store.put_grants(&[grant(number)]).unwrap();
        revocations
            .revoke(&store, vec![Revocation::new(peer(number), Timestamp::UNIX_EPOCH, 0, "x".repeat(500))])
            .unwrap();
        writeln!(out, "\n+{number}").unwrap();
        if number.is_multiple_of(3) {
            revocations.undo(&store, &peer(number), None).unwrap();
            writeln!(out, "\n-{number}").unwrap();
        }
    }
}

/// Lets the child write until it acknowledged so many changes, and for some time more; returns all that it acknowledged.
fn write_until_killed(directory: &Path, least: usize, after: Duration) -> Vec<String> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "child", "--nocapture"])
        .env(DIRECTORY, directory)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let is_change = |line: &String| line.starts_with(['+', '-']);
    let mut acknowledged: Vec<String> = lines.by_ref().filter(is_change).take(least).collect();
    assert_eq!(acknowledged.len(), least, "the child wrote too little");
    sleep(after);
    child.kill().unwrap();
    // What it said before it was killed is still in the pipe.
    acknowledged.extend(lines.filter(is_change));
    child.wait().unwrap();
    acknowledged
}

#[test]
fn what_was_acknowledged_is_there_after_a_kill() {
    let directory = std::env::temp_dir().join(format!("authd-store-kill-{}", std::process::id()));
    let _ = fs::remove_dir_all(&directory);
    fs::DirBuilder::new().mode(0o700).create(&directory).unwrap();
    let mut changes = 0;
    for kill in 0..KILLS {
        // How long a change takes is the disk's affair.
        let least = 1 + 2 * (kill as usize % 3);
        let acknowledged = write_until_killed(&directory, least, Duration::from_micros(kill * 7919 % 40_000));
        let store = Store::open(&directory).unwrap_or_else(|error| panic!("kill {kill}: {error}"));
        let revocations = Revocations::load(&store).unwrap();
        let ended: Vec<usize> = acknowledged.iter().filter_map(|line| line.strip_prefix('-')?.parse().ok()).collect();
        // The last one may be about to end.
        let last = acknowledged.iter().filter_map(|line| line.strip_prefix('+')?.parse().ok()).max().unwrap_or(0);
        for line in &acknowledged {
            let number: usize = line[1..].parse().unwrap();
            let found = revocations.find(&peer(number), None).is_some();
            if ended.contains(&number) {
                assert!(!found, "kill {kill}: {number} was undone");
            } else if number != last || !number.is_multiple_of(3) {
                assert!(found, "kill {kill}: {number} is lost");
            }
        }
        // A grant is on disk with the revocation that came after it.
        let grants = store.grants().unwrap();
        assert!(grants.contains(&grant(last)), "kill {kill}: grant {last} is lost");
        changes += acknowledged.len();
    }
    fs::remove_dir_all(&directory).unwrap();
    assert!(changes as u64 > KILLS * 2, "only {changes} changes: the kills came too early to prove anything");
}
