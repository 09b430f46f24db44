//! MCP servers that authd starts: as whom, where, and how they end.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use authd_tests::{
    daemon::{Daemon, binary},
    mcp::{Peer, command},
    others, probe,
    sandbox::Sandbox,
};
use libtest_mimic::Trial;
use serde_json::json;

use crate::{Verdict, lifecycle::CAPABILITIES, reload::wait_until, trial};

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("a_server_is_nobody_but_its_user", a_server_is_nobody_but_its_user),
        trial("a_server_ends_with_all_that_it_started", a_server_ends_with_all_that_it_started),
        trial("a_server_starts_with_the_units_capabilities", a_server_starts_with_the_units_capabilities),
        trial("a_server_ends_when_it_is_nobodys_any_more", a_server_ends_when_it_is_nobodys_any_more),
        trial("nobody_starts_what_the_policy_does_not_name", nobody_starts_what_the_policy_does_not_name),
        trial("servers_of_a_daemon_that_was_killed_are_ended", servers_of_a_daemon_that_was_killed_are_ended),
    ];
    if others::directory().is_some() {
        trials.push(trial("an_agent_starts_its_server_by_its_command", an_agent_starts_its_server_by_its_command));
    }
    trials
}

const A: &str = "/agents/a";
const B: &str = "/agents/b";
const SERVER_USER: u32 = 40_003;
/// A server that does not end when it is told to, and starts something that would outlive it.
const STUBBORN: &str = "trap '' TERM; sleep 1000 & echo it is here >&2; while :; do sleep 1; done";
const INITIALIZE: &str = r#"{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"a","version":"1"}}}"#;

struct Scene {
    sandbox: Sandbox,
    daemon: Daemon,
}

impl Scene {
    fn new(argv: &[String], more: &str) -> Result<Self> {
        Self::started(argv, more, Sandbox::start)
    }

    fn started(argv: &[String], more: &str, start: impl FnOnce(&Sandbox) -> Result<Daemon>) -> Result<Self> {
        let sandbox = Sandbox::new()?;
        sandbox.write_policy(&format!(
            r#"
trust_domain = "example.org"
[[workload]]
name = "agent"
kind = "agent"
cgroup = "/agents/*"
[[workload]]
name = "service"
kind = "service"
cgroup = "/service"
[[workload]]
name = "tools"
kind = "service"
cgroup = "/authd.mcp/tools/*"
[[mcp_server]]
name = "tools"
command = {argv:?}
user = "{SERVER_USER}"
environment = {{ A = "b" }}
[[tool]]
name = "add"
server = "tools"
arguments = {{ a = "long", b = "long" }}
{more}
"#
        ))?;
        let permits = "permit (principal in Kind::\"agent\", action, resource);\n";
        fs::write(sandbox.policy_directory().join("actions.cedar"), permits)?;
        let daemon = start(&sandbox)?;
        wait_until("the control process", || Ok(daemon.status()?.control_ready)).with_context(|| daemon.log())?;
        Ok(Self { sandbox, daemon })
    }

    fn shell(script: &str) -> Result<Self> {
        Self::new(&["/bin/sh".to_owned(), "-c".to_owned(), script.to_owned()], "")
    }

    /// `authd mcp` in a cgroup.
    fn pipe(&self, cgroup: &str, arguments: &[&str]) -> Result<Command> {
        let cgroup = self.sandbox.cgroup.child(cgroup)?;
        self.daemon.status()?;
        let mut command = Command::new(probe::binary());
        command.arg("--cgroup").arg(&cgroup).arg("--netns").arg(self.sandbox.netns.path()).args(["exec", "--"]);
        command.arg(binary()).arg("--config").arg(self.sandbox.settings()).arg("mcp").args(arguments);
        Ok(command)
    }

    /// An agent that begins a session, and nothing more.
    fn begin(&self, cgroup: &str) -> Result<Child> {
        let mut agent = self.pipe(cgroup, &["tools"])?.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        writeln!(agent.stdin.as_mut().context("a pipe")?, "{INITIALIZE}")?;
        Ok(agent)
    }

    /// The process that was started as the first, second and so on, and its cgroup.
    fn started_as(&self, number: usize) -> Result<(u32, PathBuf)> {
        let is_it = |r: &authd::audit::record::Record| r.event == "mcp_server_started";
        let started = || -> Result<_> { Ok(self.daemon.records()?.into_iter().filter(is_it).nth(number - 1)) };
        wait_until("a server", || Ok(started()?.is_some()))?;
        let record = started()?.context("a record")?;
        ensure!(
            record.workload.as_deref() == Some("agent") && record.verdict.as_deref() == Some("allowed"),
            "{record:?}"
        );
        let message = record.message.context("a message")?;
        let (name, pid) = message.split_once(": process ").with_context(|| message.clone())?;
        Ok((pid.parse()?, self.sandbox.cgroup.path().join("authd.mcp").join(name)))
    }
}

fn members(cgroup: &Path) -> Result<Vec<u32>> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs"))?;
    Ok(text.lines().map(str::parse).collect::<Result<_, _>>()?)
}

fn is_there(pid: u32) -> bool {
    // What has ended and was not waited for has no descriptors.
    Path::new(&format!("/proc/{pid}/fd/0")).symlink_metadata().is_ok()
}

fn a_server_is_nobody_but_its_user() -> Result<Verdict> {
    // Whoever runs the tests may have them where nobody else can read.
    let copy = std::env::temp_dir().join(format!("authd-test-{}-probe", std::process::id()));
    fs::copy(probe::binary(), &copy)?;
    let result = nobody_but_its_user(&copy);
    fs::remove_file(copy)?;
    result
}

fn nobody_but_its_user(probe: &Path) -> Result<Verdict> {
    let script = format!("echo it is here >&2; {} tcp 127.0.0.1:7999 >&2; while :; do sleep 1; done", probe.display());
    let scene = Scene::shell(&script)?;
    let mut agent = scene.begin(A)?;
    let (pid, cgroup) = scene.started_as(1)?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let user = SERVER_USER;
    for line in [
        format!("Uid:\t{user}\t{user}\t{user}\t{user}"),
        format!("Gid:\t{user}\t{user}\t{user}\t{user}"),
        "NoNewPrivs:\t1".to_owned(),
        "CapEff:\t0000000000000000".to_owned(),
        "CapPrm:\t0000000000000000".to_owned(),
    ] {
        ensure!(status.lines().any(|known| known == line), "{line}: {status}");
    }
    ensure!(status.lines().any(|line| line.trim_end() == "Groups:"), "{status}");
    ensure!(fs::read(format!("/proc/{pid}/environ"))? == b"A=b\0");
    // It is a workload of the policy, and nothing else: no rule lets it go anywhere.
    let denied = scene.daemon.wait_for("its connection", |r| {
        r.workload.as_deref() == Some("tools") && r.remote_port == Some(7999) && r.verdict.as_deref() == Some("denied")
    })?;
    ensure!(denied.cgroup.as_deref().is_some_and(|path| path.starts_with("/authd.mcp/tools/")), "{denied:?}");
    // By now neither the loader nor a redirection has anything open.
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let (number, at) = (entry.file_name(), fs::read_link(entry.path())?);
        let number: u32 = number.to_string_lossy().parse()?;
        // Shells keep what they redirect at 10 and above.
        ensure!(!(3..10).contains(&number), "{number} is {at:?}");
        ensure!(at.to_string_lossy().starts_with("pipe:"), "{number} is {at:?}");
    }
    ensure!(members(&cgroup)?.contains(&pid));
    wait_until("what it logs", || Ok(scene.daemon.log().contains("it is here")))?;
    agent.kill()?;
    agent.wait()?;
    Ok(Verdict::Ran)
}

fn a_server_starts_with_the_units_capabilities() -> Result<Verdict> {
    let argv = ["/bin/sh", "-c", STUBBORN].map(str::to_owned);
    let numbers = CAPABILITIES.map(|(_, number)| number);
    let scene = Scene::started(&argv, "", |sandbox| Daemon::start_with_capabilities(sandbox, &numbers))?;
    let mut agent = scene.begin(A)?;
    let (pid, cgroup) = scene.started_as(1)?;
    agent.kill()?;
    agent.wait()?;
    wait_until("the server's end", || Ok(!is_there(pid) && !cgroup.exists()))?;
    Ok(Verdict::Ran)
}

fn a_server_ends_with_all_that_it_started() -> Result<Verdict> {
    let scene = Scene::shell(STUBBORN)?;
    // The agent goes away.
    let mut agent = scene.begin(A)?;
    let (pid, cgroup) = scene.started_as(1)?;
    wait_until("both processes", || Ok(members(&cgroup)?.len() >= 2))?;
    let all = members(&cgroup)?;
    ensure!(all.contains(&pid));
    agent.kill()?;
    agent.wait()?;
    let ended = scene.daemon.wait_for("the end of a server", |r| r.event == "mcp_server_ended")?;
    ensure!(ended.message.as_deref().is_some_and(|m| m.contains("killed")), "{ended:?}");
    ensure!(ended.workload.as_deref() == Some("agent") && ended.duration_ns.is_some(), "{ended:?}");
    ensure!(!all.iter().any(|pid| is_there(*pid)) && !cgroup.exists());
    drop(scene);
    // The control process ends.
    let scene = Scene::shell(STUBBORN)?;
    let mut agent = scene.begin(A)?;
    let (pid, cgroup) = scene.started_as(1)?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(scene.daemon.control_pid()?), nix::sys::signal::Signal::SIGKILL)?;
    wait_until("the server's end", || Ok(!cgroup.exists() && !is_there(pid)))?;
    agent.wait()?;
    drop(scene);
    // The daemon ends.
    let mut scene = Scene::shell(STUBBORN)?;
    let mut agent = scene.begin(A)?;
    let (pid, cgroup) = scene.started_as(1)?;
    scene.daemon.terminate()?;
    ensure!(!is_there(pid) && !cgroup.exists());
    agent.wait()?;
    Ok(Verdict::Ran)
}

fn servers_of_a_daemon_that_was_killed_are_ended() -> Result<Verdict> {
    let mut scene = Scene::shell(STUBBORN)?;
    let mut agent = scene.begin(A)?;
    let (pid, cgroup) = scene.started_as(1)?;
    // What it has to say nobody reads any more: it would end by itself.
    wait_until("what it logs", || Ok(scene.daemon.log().contains("it is here")))?;
    scene.daemon.kill_hard()?;
    agent.wait()?;
    ensure!(is_there(pid), "nobody was left to end it");
    scene.daemon = scene.sandbox.start()?;
    ensure!(!is_there(pid) && !cgroup.exists());
    Ok(Verdict::Ran)
}

/// It would reach everything: no rule is about it any more.
fn a_server_ends_when_it_is_nobodys_any_more() -> Result<Verdict> {
    let scene = Scene::shell(STUBBORN)?;
    let mut agent = scene.begin(A)?;
    let (pid, cgroup) = scene.started_as(1)?;
    let path = scene.sandbox.policy_directory().join("policy.toml");
    let policy = fs::read_to_string(&path)?.replace("/authd.mcp/tools/*", "/authd.mcp/others/*");
    scene.sandbox.write_policy(&policy)?;
    scene.daemon.must_apply()?;
    wait_until("its end", || Ok(!is_there(pid) && !cgroup.exists())).with_context(|| scene.daemon.log())?;
    let _ = agent.kill();
    agent.wait()?;
    Ok(Verdict::Ran)
}

fn nobody_starts_what_the_policy_does_not_name() -> Result<Verdict> {
    let more = "[[mcp_server]]\nname = \"lost\"\ncommand = [\"/bin/no-such-program\"]\nuser = \"40003\"\n\
                [[mcp_server]]\nname = \"nobodys\"\ncommand = [\"/bin/sh\"]\nuser = \"nobody-at-all\"\n\
                [[mcp_server]]\nname = \"loose\"\ncommand = [\"/bin/true\"]\nuser = \"40003\"\n\
                [[tool]]\nname = \"x\"\nserver = \"lost\"\n[[tool]]\nname = \"y\"\nserver = \"nobodys\"\n\
                [[tool]]\nname = \"z\"\nserver = \"loose\"\n\
                [[workload]]\nname = \"others\"\nkind = \"service\"\n\
                cgroup = [\"/authd.mcp/lost/*\", \"/authd.mcp/nobodys/*\"]\n";
    let scene = Scene::new(&["/bin/sh".to_owned(), "-c".to_owned(), STUBBORN.to_owned()], more)?;
    let says = |cgroup: &str, arguments: &[&str]| -> Result<String> {
        let mut command = scene.pipe(cgroup, arguments)?;
        let mut agent = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        // Whoever is refused does not read it.
        let _ = writeln!(agent.stdin.as_mut().context("a pipe")?, "{INITIALIZE}");
        let mut line = String::new();
        BufReader::new(agent.stdout.as_mut().context("a pipe")?).read_line(&mut line)?;
        drop(agent.stdin.take());
        let output = agent.wait_with_output()?;
        Ok(line + &String::from_utf8_lossy(&output.stderr))
    };
    for (cgroup, arguments, reason) in [
        (A, &["--", "/bin/sh", "-c", "true"][..], "mcp_server_unknown"),
        // In the policy, as somebody who does not exist.
        (A, &["--", "/bin/sh"], "mcp_server_unusable"),
        (A, &["nothing"], "mcp_server_unknown"),
        (A, &["lost"], "mcp_server_unusable"),
        (A, &["nobodys"], "mcp_server_unusable"),
        // As nobody whom the policy knows, it would reach everything.
        (A, &["loose"], "mcp_server_unmanaged"),
        ("/service", &["tools"], "mcp_server_not_allowed"),
        ("/elsewhere", &["tools"], "caller_unmanaged"),
    ] {
        let text = says(cgroup, arguments)?;
        ensure!(text.contains(reason), "{arguments:?} of {cgroup}: {text}");
    }
    wait_until("why", || Ok(scene.daemon.log().contains("no-such-program")))?;
    ensure!(scene.daemon.log().contains("there is no user `nobody-at-all`"), "{}", scene.daemon.log());
    ensure!(
        !scene
            .daemon
            .records()?
            .iter()
            .any(|r| r.event == "mcp_server_started" && r.verdict.as_deref() == Some("allowed"))
    );
    // So many for one cgroup, and others have theirs.
    let mut agents = Vec::new();
    let started = || -> Result<usize> {
        let is_one = |r: &&authd::audit::record::Record| {
            r.event == "mcp_server_started" && r.verdict.as_deref() == Some("allowed")
        };
        Ok(scene.daemon.records()?.iter().filter(is_one).count())
    };
    for number in 1..=16 {
        agents.push(scene.begin(A)?);
        wait_until("the next one", || Ok(started()? >= number))?;
    }
    ensure!(started()? == 16);
    let text = says(A, &["tools"])?;
    ensure!(text.contains("mcp_servers_full") || text.contains("too_many_sessions"), "{text}");
    let other = scene.begin(B)?;
    wait_until("one of another cgroup", || {
        let of_b = |r: &authd::audit::record::Record| {
            r.event == "mcp_server_started" && r.cgroup.as_deref() == Some("/agents/b")
        };
        Ok(scene.daemon.records()?.iter().any(of_b))
    })?;
    agents.push(other);
    for agent in &mut agents {
        agent.kill()?;
        agent.wait()?;
    }
    Ok(Verdict::Ran)
}

/// An agent and a server of others, neither of which knows of authd.
fn an_agent_starts_its_server_by_its_command() -> Result<Verdict> {
    let place = std::env::temp_dir().join(format!("authd-test-{}-mcp", std::process::id()));
    let copied = Command::new("cp").arg("-r").arg(others::program("mcp")?).arg(&place).status()?;
    ensure!(copied.success());
    let result = with_server_at(&place);
    fs::remove_dir_all(&place)?;
    result
}

fn with_server_at(place: &Path) -> Result<Verdict> {
    let node = Command::new("node").args(["-p", "process.execPath"]).output()?;
    let node = String::from_utf8(node.stdout)?.trim().to_owned();
    let argv = [node, place.join("server.mjs").display().to_string(), "stdio".to_owned()];
    let scene = Scene::new(&argv, "")?;
    let agents = [("client.mjs", &[][..]), ("client2.mjs", &["auto"]), ("client.py", &["auto"])];
    for (number, (program, mode)) in agents.into_iter().enumerate() {
        let authd = binary().display().to_string();
        let settings = scene.sandbox.settings().display().to_string();
        let cgroup = scene.sandbox.cgroup.child(A)?;
        scene.daemon.status()?;
        let mut command_line = Command::new(probe::binary());
        command_line.arg("--cgroup").arg(&cgroup).arg("--netns").arg(scene.sandbox.netns.path()).args(["exec", "--"]);
        command_line.args(command(program)?).args(mode).args(["stdio", &authd, "--config", &settings, "mcp", "--"]);
        let mut agent = Peer::start(command_line.args(&argv))?;
        agent.ask(json!({ "do": "connect" }))?;
        let (pid, cgroup) = scene.started_as(number + 1)?;
        ensure!(agent.names()? == ["add"], "{program}");
        ensure!(agent.text("add", json!({ "a": 2, "b": 40 }))? == "42");
        for (tool, arguments) in [("secret", json!({})), ("add", json!({ "a": 2, "b": 40, "c": 1 }))] {
            ensure!(agent.call(tool, arguments)?["is_error"] == true, "{program}: {tool}");
        }
        drop(agent);
        wait_until("the server's end", || Ok(!is_there(pid) && !cgroup.exists()))?;
    }
    Ok(Verdict::Ran)
}
