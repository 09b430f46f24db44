//! API keys from the command line to the disk, and what becomes of the daemon when that disk lies.

use std::{
    fs,
    io::{Read, Seek, SeekFrom, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Output,
};

use anyhow::{Context, Result, bail, ensure};
use authd::store::{
    Store,
    revocations::{Revocation, Revocations},
};
use authd_tests::{daemon::Daemon, sandbox::Sandbox};
use jiff::Timestamp;
use libtest_mimic::Trial;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use crate::{Verdict, basics::POLICY, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("keys_are_made_listed_revoked_and_survive", keys_are_made_listed_revoked_and_survive),
        trial("a_keys_secret_is_written_nowhere", a_keys_secret_is_written_nowhere),
        trial("wrong_keys_are_not_made", wrong_keys_are_not_made),
        trial("without_its_store_the_daemon_enforces_and_believes_nobody", without_its_store),
        trial("a_full_disk_loses_nothing_that_was_acknowledged", a_full_disk),
        trial("a_read_only_disk_is_an_error_at_the_start", a_read_only_disk),
    ]
}

struct Made {
    id: String,
    key: String,
}

fn make(daemon: &Daemon, arguments: &[&str]) -> Result<Made> {
    let output = daemon.command(&[&["key", "create", "--json"], arguments].concat())?;
    ensure!(output.status.success(), "{output:?}");
    let made: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let text = |field: &str| Ok::<_, anyhow::Error>(made[field].as_str().context("a text")?.to_owned());
    Ok(Made { id: text("id")?, key: text("key")? })
}

fn list(daemon: &Daemon) -> Result<Vec<serde_json::Value>> {
    let output = daemon.command(&["key", "list", "--json"])?;
    ensure!(output.status.success(), "{output:?}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn failure(output: Output) -> Result<String> {
    ensure!(!output.status.success(), "{output:?}");
    Ok(String::from_utf8(output.stderr)?)
}

fn keys_are_made_listed_revoked_and_survive() -> Result<Verdict> {
    let (sandbox, mut daemon) = Sandbox::with_policy(POLICY)?;
    let plain = daemon.command(&["key", "create", "--name", "plain"])?;
    let printed = String::from_utf8(plain.stdout)?;
    ensure!(printed.len() == 65 && printed.starts_with("authd_"), "{printed}");
    ensure!(String::from_utf8(plain.stderr)?.contains("shown this once"));
    let scope = ["--rule", "agents-open", "--rule", "agents-guarded", "--network", "10.0.0.0/8", "--workload", "agent"];
    let limits = ["--name", "deploy", "--expires", "30d", "--rate", "60/min"];
    let made = make(&daemon, &[&scope[..], &limits[..]].concat())?;
    ensure!(made.key.starts_with(&format!("authd_{}_", made.id)), "{}", made.id);
    let record = daemon.wait_for("the creation", |r| r.key_id.as_deref() == Some(&made.id))?;
    ensure!(record.event == "api_key_created" && record.uid == Some(0), "{record:?}");
    ensure!(record.message.is_some_and(|m| m.contains("`deploy`") && m.contains("10.0.0.0/8") && m.contains("60/min")));

    ensure!(daemon.command(&["key", "revoke", &made.id])?.status.success());
    daemon.wait_for("the revocation", |r| r.event == "api_key_revoked" && r.key_id.as_deref() == Some(&made.id))?;
    let before = list(&daemon)?;
    let deploy = before.iter().find(|key| key["name"] == "deploy").context("the key is listed")?;
    ensure!(deploy["scope"]["rules"] == serde_json::json!(["agents-open", "agents-guarded"]), "{deploy}");
    ensure!(deploy["scope"]["rate"] == "60/min" && deploy["revoked"]["by"] == 0, "{deploy}");
    let time = |field: &str| deploy[field].as_str().context("a time")?.parse::<Timestamp>().context("RFC 3339");
    ensure!(time("expires")?.duration_since(time("created")?).as_hours() == 30 * 24);
    let state = sandbox.directory().join("state/store.redb");
    ensure!(fs::metadata(&state)?.permissions().mode() & 0o777 == 0o600);

    // Both ways of ending.
    daemon.kill_hard()?;
    let mut daemon = sandbox.start()?;
    ensure!(list(&daemon)? == before);
    daemon.terminate()?;
    let daemon = sandbox.start()?;
    ensure!(list(&daemon)? == before);
    let shown = String::from_utf8(daemon.command(&["key", "list"])?.stdout)?;
    ensure!(shown.lines().count() == 3 && shown.contains("revoked") && shown.contains("active"), "{shown}");
    let again = failure(daemon.command(&["key", "revoke", "zzzzzzzzzz"])?)?;
    ensure!(again.contains("no API key zzzzzzzzzz"), "{again}");
    Ok(Verdict::Ran)
}

fn a_keys_secret_is_written_nowhere() -> Result<Verdict> {
    let (sandbox, mut daemon) = Sandbox::with_policy(POLICY)?;
    let made = make(&daemon, &["--name", "secret"])?;
    ensure!(daemon.command(&["key", "revoke", &made.key])?.status.code() == Some(2), "an id is asked for, not a key");
    ensure!(daemon.command(&["key", "revoke", &made.id])?.status.success());
    let status = daemon.command(&["status", "--prometheus"])?;
    let listed = daemon.command(&["key", "list", "--json"])?;
    daemon.wait_for("the revocation", |r| r.event == "api_key_revoked")?;
    daemon.terminate()?;
    let secret = made.key.get(17..57).context("the secret part")?;
    let contains = |bytes: &[u8], text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    let files = files_below(sandbox.directory())?;
    let mut with_id = Vec::new();
    for path in &files {
        let bytes = fs::read(path)?;
        ensure!(!contains(&bytes, secret), "the secret is in {}", path.display());
        if contains(&bytes, &made.id) {
            with_id.push(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
    }
    ensure!(!contains(&status.stdout, secret) && !contains(&listed.stdout, secret));
    // The search finds what is there.
    for name in ["audit.jsonl", "store.redb"] {
        ensure!(with_id.iter().any(|found| found == name), "{with_id:?}");
    }
    ensure!(files.iter().any(|path| path.ends_with("log")), "{files:?}");
    Ok(Verdict::Ran)
}

fn files_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(files_below(&path)?);
        } else if path.is_file() {
            files.push(path);
        }
    }
    Ok(files)
}

fn wrong_keys_are_not_made() -> Result<Verdict> {
    let (_sandbox, daemon) = Sandbox::with_policy(POLICY)?;
    let create = |arguments: &[&str]| daemon.command(&[&["key", "create"], arguments].concat());
    for (arguments, code, expected) in [
        (&["--name", "a b"][..], 1, "cannot be the name"),
        (&["--name", "k", "--rule", "no-such"], 1, "no rule `no-such`"),
        (&["--name", "k", "--workload", "no-such"], 1, "no workload `no-such`"),
        (&["--name", "k", "--network", "10.0.0.1/8"], 2, "10.0.0.0/8"),
        (&["--name", "k", "--expires", "2y"], 2, "a year"),
        (&["--name", "k", "--expires", "0s"], 2, "a year"),
        (&["--name", "k", "--expires", "soon"], 2, "90d"),
        (&["--name", "k", "--rate", "60"], 2, "60/min"),
        (&[], 2, "--name"),
    ] {
        let output = create(arguments)?;
        ensure!(output.status.code() == Some(code) && output.stdout.is_empty(), "{arguments:?}: {output:?}");
        let told = failure(output)?;
        ensure!(told.contains(expected), "{arguments:?}: {told}");
    }
    ensure!(list(&daemon)?.is_empty());
    Ok(Verdict::Ran)
}

fn without_its_store() -> Result<Verdict> {
    let (sandbox, mut daemon) = Sandbox::with_policy(POLICY)?;
    let _open = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7001"])?;
    make(&daemon, &["--name", "k"])?;
    daemon.terminate()?;
    let path = sandbox.directory().join("state/store.redb");
    let whole = fs::read(&path)?;
    // As the error asks for it: with the mode that it had.
    let put_back = || -> Result<()> {
        fs::write(&path, &whole)?;
        Ok(fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?)
    };
    let damages: [(&str, &dyn Fn() -> Result<()>); 3] = [
        ("store_damaged", &|| Ok(fs::write(&path, &whole[..whole.len() / 2])?)),
        ("store_damaged", &|| spoil(&path)),
        ("store_missing", &|| Ok(fs::remove_file(&path)?)),
    ];
    for (reason, damage) in damages {
        put_back()?;
        damage()?;
        let mut daemon = sandbox.start()?;
        let seen =
            |r: &authd::audit::record::Record| r.event == "store_unusable" && r.reason.as_deref() == Some(reason);
        daemon.wait_for(reason, seen)?;
        let status = daemon.status()?;
        ensure!(status.enforcing && status.store_error.is_some(), "{status:?}");
        ensure!(status.metrics().contains("authd_store_usable 0"));
        ensure!(daemon.command(&["status"])?.status.code() == Some(1));
        ensure!(
            sandbox.probe("/agents/a1", &["tcp", "127.0.0.1:7001"])?.ok,
            "what the kernel attests is enough as before"
        );
        ensure!(sandbox.probe("/agents/a1", &["tcp", "127.0.0.1:7003"])?.is_eperm());
        for arguments in [&["key", "list"][..], &["key", "create", "--name", "k"]] {
            let output = daemon.command(arguments)?;
            ensure!(output.stdout.is_empty(), "{output:?}");
            let told = failure(output)?;
            ensure!(told.contains("put a copy back") && told.contains("store.mark"), "{told}");
        }
        daemon.terminate()?;
    }
    put_back()?;
    let daemon = sandbox.start()?;
    ensure!(list(&daemon)?.len() == 1, "with the copy back, all is as before");
    ensure!(daemon.status()?.store_error.is_none());
    Ok(Verdict::Ran)
}

/// Changes a byte of the key's row, which lies in the file as text.
fn spoil(path: &Path) -> Result<()> {
    let mut file = fs::File::options().read(true).write(true).open(path)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let wanted = b"created_by";
    let places = bytes.windows(wanted.len()).enumerate().filter(|(_, window)| window == wanted).map(|(place, _)| place);
    let places: Vec<usize> = places.collect();
    ensure!(!places.is_empty(), "the row is there");
    for place in places {
        file.seek(SeekFrom::Start(place as u64))?;
        file.write_all(b"X")?;
    }
    Ok(())
}

/// Runs with a small file system of its own, which nobody else sees.
fn on_a_disk(megabytes: u32, body: fn(&Path) -> Result<()>) -> Result<Verdict> {
    let run = move || -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        let directory = std::env::temp_dir();
        let options = format!("size={megabytes}m,mode=700");
        mount(Some("tmpfs"), &directory, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))?;
        body(&directory)
    };
    // The namespace is this thread's, and ends with it.
    match std::thread::spawn(run).join() {
        Ok(result) => result.map(|()| Verdict::Ran),
        Err(_) => bail!("the test panicked"),
    }
}

fn entry(number: usize) -> Result<Revocation> {
    Ok(Revocation::new(format!("peer p{number}").parse()?, Timestamp::UNIX_EPOCH, 0, "x".repeat(1000)))
}

fn a_full_disk() -> Result<Verdict> {
    on_a_disk(4, |directory| {
        let store = Store::open(directory)?;
        let mut revocations = Revocations::default();
        fs::write(directory.join("other"), vec![0; 1 << 20])?;
        let mut count = 0;
        let error = loop {
            match revocations.revoke(&store, vec![entry(count)?]) {
                Ok(()) => count += 1,
                Err(error) => break error,
            }
            ensure!(count < 100_000, "the disk never was full");
        };
        ensure!(count > 10, "{count}");
        ensure!(matches!(error.reason(), "store_write_failed" | "store_unreadable"), "{error:?}");
        ensure!(revocations.find(&entry(count)?.what, None).is_some(), "in force although it is not on disk");
        ensure!(store.revocations()?.len() >= count, "what was acknowledged is there meanwhile");
        // With room again, the same store goes on.
        fs::remove_file(directory.join("other"))?;
        revocations.revoke(&store, vec![entry(count)?])?;
        drop(store);
        let found = Revocations::load(&Store::open(directory)?)?;
        for number in 0..=count {
            ensure!(found.find(&entry(number)?.what, None).is_some(), "{number} of {count} is lost");
        }
        Ok(())
    })
}

fn a_read_only_disk() -> Result<Verdict> {
    on_a_disk(4, |directory| {
        drop(Store::open(directory)?);
        let none = None::<&str>;
        mount(none, directory, none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none)?;
        let error = Store::open(directory).err().context("nothing can be kept there")?;
        ensure!(error.reason() == "store_unreadable" && error.to_string().contains("Read-only"), "{error}");
        Ok(())
    })
}
