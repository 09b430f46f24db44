//! The daemon comes and goes; enforcement stays.

use std::{collections::BTreeMap, fs, time::Duration};

use anyhow::{Context, Result, ensure};
use authd_tests::{
    daemon::{Daemon, binary},
    sandbox::Sandbox,
};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;

use crate::{Verdict, basics::POLICY, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("enforcement_outlives_the_daemon_and_its_crashes", enforcement_outlives_the_daemon_and_its_crashes),
        trial("another_build_takes_over_without_a_gap", another_build_takes_over_without_a_gap),
        trial("enforcement_ends_when_asked_to", enforcement_ends_when_asked_to),
        trial("a_restart_with_a_bad_policy_keeps_the_last_good_one", a_restart_with_a_bad_policy_keeps_the_last_good_one),
        trial("bad_settings_and_policies_end_the_start_before_anything_is_attached", bad_start),
        trial("lost_events_are_counted_exactly", lost_events_are_counted_exactly),
    ]
}

const AGENT: &str = "/agents/a1";

/// Maps and programs of authd in the whole kernel.
fn kernel_objects() -> Result<(usize, usize)> {
    let maps = aya::maps::loaded_maps().filter(|map| {
        let names = ["HEAD", "ROOTS", "IDENTITIES", "CELLS", "EVENTS", "TAGS", "BARRIER", "CONVERSATIONS"];
        map.as_ref().is_ok_and(|map| map.name_as_str().is_some_and(|name| names.contains(&name)))
    });
    let programs = aya::programs::loaded_programs();
    let own = programs.filter(|p| p.as_ref().is_ok_and(|p| p.name_as_str().is_some_and(|name| name.starts_with("authd_"))));
    Ok((maps.count(), own.count()))
}

/// The kernel frees what nobody refers to a little later.
fn settled_objects(expected: (usize, usize)) -> Result<(usize, usize)> {
    for _ in 0..200 {
        if kernel_objects()? == expected {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    kernel_objects()
}

fn only(outcome: &authd_tests::probe::Outcome, expected: &[&str]) -> Result<()> {
    let counts: BTreeMap<String, u64> =
        serde_json::from_str(&outcome.detail).with_context(|| format!("{outcome:?}"))?;
    for (result, count) in &counts {
        ensure!(expected.contains(&result.as_str()), "{count} times {result} in {counts:?}");
    }
    ensure!(!counts.is_empty(), "something was tried");
    Ok(())
}

fn enforcement_outlives_the_daemon_and_its_crashes() -> Result<Verdict> {
    let (sandbox, mut daemon) = Sandbox::with_policy(POLICY)?;
    let _open = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7001"])?;
    let _closed = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7003"])?;
    let mut held = sandbox.spawn(AGENT, &["hold-tcp", "127.0.0.1:7001"])?;
    let objects = kernel_objects()?;
    let _sink = sandbox.spawn("/servers", &["serve-sink", "127.0.0.2:7001"])?;
    let hammer = sandbox.spawn(AGENT, &["hammer", "127.0.0.2:7001", "127.0.0.1:7003", "--threads", "1"])?;
    let before = daemon.status()?;
    daemon.kill_hard()?;
    ensure!(held.again()?.ok);
    ensure!(sandbox.probe(AGENT, &["tcp", "127.0.0.1:7003"])?.is_eperm());
    // A cgroup that appears while nobody watches is not known, and stays closed.
    ensure!(sandbox.probe("/agents/unseen", &["tcp", "127.0.0.1:7001"])?.is_eperm());

    // Killed at any moment of its start.
    for turn in 0..12_u64 {
        let mut child = std::process::Command::new(binary())
            .arg("--config")
            .arg(sandbox.settings())
            .arg("run")
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()?;
        std::thread::sleep(Duration::from_millis(turn * 90));
        child.kill()?;
        child.wait()?;
    }
    let mut daemon = sandbox.start()?;
    ensure!(held.again()?.ok);
    only(&hammer.finish()?, &["7001 ok", "7003 EPERM"])?;
    let after = daemon.status()?;
    ensure!(after.generation > before.generation, "{} then {}", before.generation, after.generation);
    ensure!(after.reasons["no_rule"].verdicts > before.reasons["no_rule"].verdicts, "counts go on");
    ensure!(after.events.made > before.events.made, "numbers of events go on");
    let outcome = sandbox.probe("/agents/unseen", &["tcp", "127.0.0.1:7001"])?;
    ensure!(outcome.ok, "known again: {outcome:?}");
    let now = settled_objects(objects)?;
    ensure!(now == objects, "maps and programs: {objects:?}, then {now:?}");
    let numbers: Vec<u64> = daemon.records()?.iter().map(|record| record.seq).collect();
    ensure!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "records are numbered without gaps");

    daemon.terminate()?;
    ensure!(sandbox.probe(AGENT, &["tcp", "127.0.0.1:7003"])?.is_eperm(), "SIGTERM leaves enforcement to the kernel");
    ensure!(held.again()?.ok);
    Ok(Verdict::Ran)
}

fn another_build_takes_over_without_a_gap() -> Result<Verdict> {
    let (sandbox, mut daemon) = Sandbox::with_policy(POLICY)?;
    let _open = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7001"])?;
    let _closed = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7003"])?;
    let before = daemon.status()?;
    let _sink = sandbox.spawn("/servers", &["serve-sink", "127.0.0.2:7001"])?;
    let hammer = sandbox.spawn(AGENT, &["hammer", "127.0.0.2:7001", "127.0.0.1:7003", "--threads", "2"])?;
    // Another file; then one with tables of another size, which cannot be adopted and are switched to.
    let other = sandbox.directory().join("authd-other");
    fs::copy(binary(), &other)?;
    daemon.terminate()?;
    let mut daemon = Daemon::start_binary(&sandbox, &other, &[])?;
    let after = daemon.status()?;
    for (old, new) in before.programs.iter().zip(&after.programs) {
        ensure!(old.name == new.name && old.link == new.link, "the link stays: {old:?}, {new:?}");
        ensure!(old.id != new.id, "the program is another: {old:?}, {new:?}");
    }
    daemon.terminate()?;
    sandbox.add_settings("[limits]\ncells = 4096\n")?;
    let daemon = Daemon::start_binary(&sandbox, &other, &[])?;
    only(&hammer.finish()?, &["7001 ok", "7003 EPERM"])?;
    let directories = fs::read_dir(sandbox.pins())?.flatten().filter(|e| e.file_name().to_string_lossy().starts_with("maps-"));
    ensure!(directories.count() == 1, "the old tables are gone");
    drop(daemon);
    Ok(Verdict::Ran)
}

fn enforcement_ends_when_asked_to() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    let nothing = kernel_objects()?;
    sandbox.write_policy(POLICY)?;
    let _closed = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7003"])?;
    let denied = || -> Result<bool> { Ok(sandbox.probe(AGENT, &["tcp", "127.0.0.1:7003"])?.is_eperm()) };

    let mut daemon = Daemon::start(&sandbox, &["--detach-on-exit"])?;
    ensure!(denied()?);
    daemon.terminate()?;
    ensure!(!denied()?, "--detach-on-exit detaches");
    ensure!(settled_objects(nothing)? == nothing, "nothing is left in the kernel");
    ensure!(!sandbox.pins().exists());

    // With the daemon dead.
    let mut daemon = sandbox.start()?;
    ensure!(denied()?);
    daemon.kill_hard()?;
    ensure!(denied()?);
    ensure!(!daemon.command(&["panic-open"])?.status.success(), "it asks first");
    ensure!(denied()?);
    ensure!(daemon.command(&["panic-open", "--yes"])?.status.success());
    ensure!(!denied()?, "panic-open detaches");

    // The record comes with the next daemon, which enforces again; then with the daemon alive.
    let daemon = sandbox.start()?;
    ensure!(denied()?);
    daemon.wait_for("the first panic", |r| r.event == "panic_open" && r.uid == Some(0))?;
    ensure!(daemon.command(&["panic-open", "--yes"])?.status.success());
    ensure!(!denied()?);
    daemon.wait_for("the notice", |r| r.event == "enforcement_lost")?;
    ensure!(!daemon.status()?.enforcing);
    ensure!(daemon.command(&["status"])?.status.code() == Some(1));
    Ok(Verdict::Ran)
}

fn a_restart_with_a_bad_policy_keeps_the_last_good_one() -> Result<Verdict> {
    let (sandbox, mut daemon) = Sandbox::with_policy(POLICY)?;
    let _open = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7001"])?;
    daemon.terminate()?;
    sandbox.write_policy("nonsense = ")?;
    let daemon = sandbox.start()?;
    let status = daemon.status()?;
    ensure!(!status.last_reload.ok && status.workloads.len() == 3, "{status:?}");
    ensure!(sandbox.probe(AGENT, &["tcp", "127.0.0.1:7001"])?.ok);
    ensure!(sandbox.probe(AGENT, &["tcp", "127.0.0.1:7003"])?.is_eperm());
    ensure!(sandbox.probe("/agents/new", &["tcp", "127.0.0.1:7001"])?.ok, "new cgroups are known too");
    Ok(Verdict::Ran)
}

fn bad_start() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    let code = |sandbox: &Sandbox| -> Result<Option<i32>> {
        let output = std::process::Command::new(binary()).arg("--config").arg(sandbox.settings()).arg("run").output()?;
        Ok(output.status.code())
    };
    sandbox.write_policy("trust_domain = 1")?;
    ensure!(code(&sandbox)? == Some(64));
    ensure!(!sandbox.pins().exists());
    sandbox.write_policy(POLICY)?;
    let good = fs::read_to_string(sandbox.settings())?;
    sandbox.add_settings("no_such_setting = 1\n")?;
    ensure!(code(&sandbox)? == Some(64));
    ensure!(!sandbox.pins().exists());
    fs::write(sandbox.settings(), good)?;
    let _daemon = sandbox.start()?;
    ensure!(code(&sandbox)? == Some(1), "one daemon at a time");
    Ok(Verdict::Ran)
}

fn lost_events_are_counted_exactly() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    sandbox.add_settings("[limits]\nevent_bytes = 65536\n")?;
    sandbox.write_policy(POLICY)?;
    let daemon = sandbox.start()?;
    let _open = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7001"])?;
    // Known before the daemon stops: it makes the identities of new cgroups.
    sandbox.cgroup.child(AGENT)?;
    daemon.wait_for_instance(AGENT)?;
    daemon.signal(Signal::SIGSTOP)?;
    let _sink = sandbox.spawn("/servers", &["serve-sink", "127.0.0.2:7001"])?;
    let mut hammer = sandbox.spawn(AGENT, &["hammer", "127.0.0.2:7001", "--threads", "2"])?;
    let mut attempts = 0;
    while attempts < 2000 {
        std::thread::sleep(Duration::from_millis(20));
        attempts = hammer.again()?.count;
    }
    let done = hammer.finish()?;
    daemon.signal(Signal::SIGCONT)?;
    daemon.wait_for("the loss", |r| r.event == "events_lost")?;
    let records = daemon.records()?;
    let told: u64 = records.iter().filter(|r| r.event == "events_lost").filter_map(|r| r.count).sum();
    let flows = records.iter().filter(|r| r.event.starts_with("flow_")).count() as u64;
    let events = daemon.status()?.events;
    ensure!(events.lost > 0 && told == events.lost, "{told} told, {events:?}");
    ensure!(flows + events.lost == events.made, "{flows} records, {events:?}");
    // One that opens and one that closes for each connection.
    ensure!(events.made == 2 * done.count, "{events:?}, {done:?}");
    Ok(Verdict::Ran)
}
