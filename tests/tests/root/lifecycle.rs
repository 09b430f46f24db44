//! The daemon comes and goes; enforcement stays.

use std::{collections::BTreeMap, fs, time::Duration};

use anyhow::{Context, Result, ensure};
use authd_tests::{
    daemon::{Daemon, PATIENCE, binary},
    sandbox::Sandbox,
};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;

use crate::{Verdict, alone, basics::POLICY, reload::wait_until, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        alone("enforcement_outlives_the_daemon_and_its_crashes", enforcement_outlives_the_daemon_and_its_crashes),
        trial("another_build_takes_over_without_a_gap", another_build_takes_over_without_a_gap),
        alone("enforcement_ends_when_asked_to", enforcement_ends_when_asked_to),
        trial("a_restart_needs_no_second_room", a_restart_needs_no_second_room),
        trial("cgroups_without_room_stay_closed", cgroups_without_room_stay_closed),
        trial("the_units_capabilities_are_enough", the_units_capabilities_are_enough),
        trial("lost_events_are_counted_exactly", lost_events_are_counted_exactly),
    ]
}

/// In which kernels have no part.
pub fn of_callers() -> Vec<Trial> {
    vec![
        trial(
            "a_restart_with_a_bad_policy_keeps_the_last_good_one",
            a_restart_with_a_bad_policy_keeps_the_last_good_one,
        ),
        trial("bad_settings_and_policies_end_the_start_before_anything_is_attached", bad_start),
        trial("the_service_manager_is_told", the_service_manager_is_told),
        trial("flows_can_be_followed", flows_can_be_followed),
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
    let own =
        programs.filter(|p| p.as_ref().is_ok_and(|p| p.name_as_str().is_some_and(|name| name.starts_with("authd_"))));
    Ok((maps.count(), own.count()))
}

/// The same, once what earlier tests left is freed: a number that holds still for half a second.
fn objects_at_rest() -> Result<(usize, usize)> {
    let (mut last, mut still) = (kernel_objects()?, 0);
    while still < 25 {
        std::thread::sleep(Duration::from_millis(20));
        let now = kernel_objects()?;
        still = if now == last { still + 1 } else { 0 };
        last = now;
    }
    Ok(last)
}

/// Whether there are no more than before. The kernel frees what nobody refers to a little later; and what somebody else
/// frees on this machine meanwhile is no leak of ours.
fn no_more_than(before: (usize, usize)) -> Result<()> {
    let started = std::time::Instant::now();
    loop {
        let now = kernel_objects()?;
        if now.0 <= before.0 && now.1 <= before.1 {
            return Ok(());
        }
        ensure!(started.elapsed() < PATIENCE, "maps and programs: {before:?}, then {now:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
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
    let objects = objects_at_rest()?;
    let _sink = sandbox.spawn("/servers", &["serve-sink", "127.0.0.2:7001"])?;
    let hammer = sandbox.spawn(AGENT, &["hammer", "127.0.0.2:7001", "127.0.0.1:7003", "--threads", "1"])?;
    ensure!(sandbox.probe(AGENT, &["tcp", "127.0.0.1:7003"])?.is_eperm());
    let before = daemon.status()?;
    daemon.kill_hard()?;
    ensure!(held.again()?.ok);
    ensure!(sandbox.probe(AGENT, &["tcp", "127.0.0.1:7003"])?.is_eperm());
    // A cgroup that appears while nobody watches is not known, and stays closed.
    ensure!(sandbox.probe("/agents/unseen", &["tcp", "127.0.0.1:7001"])?.is_eperm());

    // Sockets made there are not lost for it.
    let _udp = sandbox.spawn("/servers", &["serve-udp", "127.0.0.1:7002"])?;
    let _guarded = sandbox.spawn("/guarded", &["serve-tcp", "127.0.0.1:7005"])?;
    let unseen = |arguments: &[&str]| sandbox.spawn_quietly_in("/agents/unseen", &sandbox.netns, arguments);
    let (mut early_udp, mut early_tcp) =
        (unseen(&["hold-udp", "127.0.0.1:7002"])?, unseen(&["retry-tcp", "127.0.0.1:7005"])?);
    ensure!(early_udp.heard()?.is_eperm() && early_tcp.heard()?.ok && early_tcp.again()?.is_eperm());

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
    let (udp, tcp) = (early_udp.again()?, early_tcp.again()?);
    ensure!(udp.ok && tcp.ok, "and so are its older sockets: {udp:?}, {tcp:?}");
    no_more_than(objects)?;
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
        // Links of tracing programs cannot be updated: a new one is made beside the old one, which goes then.
        let renewed = old.name == "authd_socket_create";
        ensure!(old.name == new.name && (old.link == new.link || renewed), "the link stays: {old:?}, {new:?}");
        ensure!(old.id != new.id, "the program is another: {old:?}, {new:?}");
    }
    daemon.terminate()?;
    sandbox.add_settings("[limits]\ncells = 4096\n")?;
    let daemon = Daemon::start_binary(&sandbox, &other, &[])?;
    only(&hammer.finish()?, &["7001 ok", "7003 EPERM"])?;
    let directories =
        fs::read_dir(sandbox.pins())?.flatten().filter(|e| e.file_name().to_string_lossy().starts_with("maps-"));
    ensure!(directories.count() == 1, "the old tables are gone");
    drop(daemon);
    Ok(Verdict::Ran)
}

/// Tables that are more than half full leave no room for the same policy beside itself.
fn a_restart_needs_no_second_room() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    sandbox.add_settings("[limits]\ncells = 64\n")?;
    let mut policy = POLICY.to_owned();
    for n in 0..40 {
        policy += &format!(
            "[[service]]\nname = \"s{n}\"\naddresses = [\"10.0.0.{n}\"]\nports = [\"tcp/443\"]\n\
             [[rule]]\nname = \"r{n}\"\nfrom = [\"agent\"]\nto = [\"s{n}\"]\n"
        );
    }
    sandbox.write_policy(&policy)?;
    let _open = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7001"])?;
    let mut daemon = sandbox.start()?;
    let cells = daemon.status()?.tables.into_iter().find(|t| t.0 == "cells").map(|t| t.1.entries);
    ensure!(cells > Some(32), "the policy fills more than half: {cells:?}");
    daemon.wait_for("the policy", |r| r.event == "policy_loaded")?;
    daemon.kill_hard()?;
    let daemon = sandbox.start()?;
    ensure!(daemon.status()?.last_reload.ok && sandbox.probe(AGENT, &["tcp", "127.0.0.1:7001"])?.ok);
    let loaded: Vec<Option<String>> =
        daemon.records()?.into_iter().filter(|r| r.event == "policy_loaded").map(|r| r.message).collect();
    let last = loaded.last().cloned().flatten().unwrap_or_default();
    ensure!(loaded.len() == 2 && last.starts_with("0 entries written"), "what is in force was read back: {loaded:?}");
    Ok(Verdict::Ran)
}

/// A workload that may make cgroups can fill the table; it must not end the daemon, nor open anything.
fn cgroups_without_room_stay_closed() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    sandbox.add_settings("[limits]\nidentities = 32\n")?;
    sandbox.write_policy(POLICY)?;
    let daemon = sandbox.start()?;
    let _open = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7001"])?;
    ensure!(sandbox.probe("/agents/first", &["tcp", "127.0.0.1:7001"])?.ok);
    for n in 0..64 {
        sandbox.cgroup.child(&format!("/agents/many-{n}"))?;
    }
    daemon.wait_for("the full table", |r| r.event == "identities_full")?;
    // The last one had no room.
    let outcome = sandbox.probe("/agents/many-63", &["tcp", "127.0.0.1:7001"])?;
    ensure!(outcome.is_eperm(), "{outcome:?}");
    daemon.wait_for("its refusal", |r| r.reason.as_deref() == Some("identity_pending"))?;
    ensure!(sandbox.probe("/agents/first", &["tcp", "127.0.0.1:7001"])?.ok, "others go on");
    for n in 0..63 {
        fs::remove_dir(sandbox.cgroup.child(&format!("/agents/many-{n}"))?)?;
    }
    let started = std::time::Instant::now();
    while !sandbox.probe("/agents/many-63", &["tcp", "127.0.0.1:7001"])?.ok {
        ensure!(started.elapsed() < PATIENCE, "it is known once there is room\n{}", daemon.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(Verdict::Ran)
}

/// sd_notify(3): also of reloads, with the time that `Type=notify-reload` asks for (systemd.service(5)).
fn the_service_manager_is_told() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    sandbox.write_policy(POLICY)?;
    let path = sandbox.directory().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    // Everything told up to a message with this line; watchdog messages may come at any time.
    let told_until = |line: &str| -> Result<String> {
        let mut told = String::new();
        let mut buffer = [0; 4096];
        loop {
            let length = socket.recv(&mut buffer).with_context(|| format!("waiting for {line} after\n{told}"))?;
            told += std::str::from_utf8(&buffer[..length])?;
            told += "\n";
            if told.lines().any(|l| l == line) {
                return Ok(told);
            }
        }
    };
    let environment = [("NOTIFY_SOCKET", path.to_string_lossy().into_owned()), ("WATCHDOG_USEC", "200000".to_owned())];
    let mut daemon = Daemon::start_with_environment(&sandbox, &environment)?;
    let told = told_until("READY=1")?;
    ensure!(!told.contains("RELOADING") && told.contains("STATUS=generation 1"), "{told}");
    told_until("WATCHDOG=1")?;
    daemon.signal(Signal::SIGHUP)?;
    let told = told_until("RELOADING=1")?;
    let since = told.lines().find_map(|line| line.strip_prefix("MONOTONIC_USEC="));
    ensure!(since.is_some_and(|micros| micros.parse::<u64>().is_ok_and(|micros| micros > 0)), "{told}");
    let told = told_until("READY=1")?;
    ensure!(told.contains("STATUS=generation 2"), "{told}");
    sandbox.write_policy("nonsense = ")?;
    daemon.signal(Signal::SIGHUP)?;
    told_until("RELOADING=1")?;
    let told = told_until("READY=1")?;
    ensure!(told.contains("STATUS=generation 2; the last policy was refused"), "{told}");
    daemon.signal(Signal::SIGTERM)?;
    told_until("STOPPING=1")?;
    daemon.wait()?;
    Ok(Verdict::Ran)
}

fn flows_can_be_followed() -> Result<Verdict> {
    use std::io::BufRead;
    let (sandbox, daemon) = Sandbox::with_policy(POLICY)?;
    let _open = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7001"])?;
    ensure!(sandbox.probe(AGENT, &["tcp", "127.0.0.1:7003"])?.is_eperm());
    daemon.wait_for("the first flow", |r| r.event == "flow_denied")?;
    let mut follower = std::process::Command::new(binary())
        .args(["--config", &sandbox.settings().to_string_lossy(), "flows", "--follow", "--last", "1"])
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    let mut lines = std::io::BufReader::new(follower.stdout.take().context("the pipe was asked for")?).lines();
    let mut next = || lines.next().context("it goes on")?.context("it says something");
    let before = next()?;
    ensure!(before.contains("denied") && before.contains("no_rule"), "what was comes first: {before}");
    ensure!(sandbox.probe(AGENT, &["tcp", "127.0.0.1:7001"])?.ok);
    let opened = next()?;
    ensure!(opened.contains("opened") && opened.contains("agents-open"), "{opened}");
    ensure!(opened.contains("agent") && opened.contains("-> 127.0.0.1:7001 tcp"), "{opened}");
    let closed = next()?;
    ensure!(closed.contains("closed") && closed.contains(" B out, "), "{closed}");
    follower.kill()?;
    follower.wait()?;
    Ok(Verdict::Ran)
}

/// The names of `packaging/authd.service` and their numbers (include/uapi/linux/capability.h).
pub const CAPABILITIES: [(&str, libc::c_ulong); 10] = [
    ("CAP_BPF", 39),
    ("CAP_NET_ADMIN", 12),
    ("CAP_PERFMON", 38),
    ("CAP_DAC_READ_SEARCH", 2),
    ("CAP_SYS_CHROOT", 18),
    ("CAP_SETUID", 7),
    ("CAP_SETGID", 6),
    ("CAP_KILL", 5),
    ("CAP_SYS_ADMIN", 21),
    ("CAP_SYS_PTRACE", 19),
];

fn the_units_capabilities_are_enough() -> Result<Verdict> {
    let unit = include_str!("../../../packaging/authd.service");
    let named = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).context("a bounding set")?;
    ensure!(named.split(' ').eq(CAPABILITIES.map(|(name, _)| name)), "the test keeps what the unit keeps: {named}");
    let sandbox = Sandbox::new()?;
    sandbox.write_policy(POLICY)?;
    let _open = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7001"])?;
    let _closed = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7003"])?;
    let mut daemon = Daemon::start_with_capabilities(&sandbox, &CAPABILITIES.map(|(_, number)| number))?;
    let has = fs::read_to_string(format!("/proc/{}/status", daemon.pid()))?;
    let effective =
        has.lines().find_map(|line| line.strip_prefix("CapEff:\t")).context("a process has capabilities")?;
    let meant = CAPABILITIES.iter().fold(0_u64, |all, (_, number)| all | 1 << number);
    ensure!(u64::from_str_radix(effective, 16)? == meant, "{effective} is not {meant:x}");
    ensure!(sandbox.probe(AGENT, &["tcp", "127.0.0.1:7001"])?.ok);
    ensure!(sandbox.probe(AGENT, &["tcp", "127.0.0.1:7003"])?.is_eperm());
    sandbox.write_policy(&POLICY.replace("tcp/7001", "tcp/7003"))?;
    daemon.must_apply()?;
    ensure!(sandbox.probe(AGENT, &["tcp", "127.0.0.1:7003"])?.ok);
    daemon.wait_for("the flow", |r| r.event == "flow_opened" && r.remote_port == Some(7003))?;
    daemon.terminate()?;
    let daemon = Daemon::start_with_capabilities(&sandbox, &CAPABILITIES.map(|(_, number)| number))?;
    ensure!(daemon.status()?.enforcing, "it takes over too");
    Ok(Verdict::Ran)
}

fn enforcement_ends_when_asked_to() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    let nothing = objects_at_rest()?;
    sandbox.write_policy(POLICY)?;
    let _closed = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7003"])?;
    let denied = || -> Result<bool> { Ok(sandbox.probe(AGENT, &["tcp", "127.0.0.1:7003"])?.is_eperm()) };

    let mut daemon = Daemon::start(&sandbox, &["--detach-on-exit"])?;
    ensure!(denied()?);
    daemon.terminate()?;
    ensure!(!denied()?, "--detach-on-exit detaches");
    no_more_than(nothing).context("nothing is left in the kernel")?;
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
        let output =
            std::process::Command::new(binary()).arg("--config").arg(sandbox.settings()).arg("run").output()?;
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
    // The records of those that were not lost are written in their own time.
    let mut records = Vec::new();
    wait_until("every record", || {
        records = daemon.records()?;
        let events = daemon.status()?.events;
        let flows = records.iter().filter(|r| r.event.starts_with("flow_")).count() as u64;
        let told: u64 = records.iter().filter(|r| r.event == "events_lost").filter_map(|r| r.count).sum();
        Ok(told > 0 && flows + told >= events.made)
    })?;
    let told: u64 = records.iter().filter(|r| r.event == "events_lost").filter_map(|r| r.count).sum();
    let flows = records.iter().filter(|r| r.event.starts_with("flow_")).count() as u64;
    let events = daemon.status()?.events;
    ensure!(events.lost > 0 && told == events.lost, "{told} told, {events:?}");
    ensure!(flows + events.lost == events.made, "{flows} records, {events:?}");
    // One that opens and one that closes for each connection.
    ensure!(events.made == 2 * done.count, "{events:?}, {done:?}");
    Ok(Verdict::Ran)
}
