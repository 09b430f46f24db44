//! What authd does, to be watched: a service, a job and an agent in cgroups and a network of their own, the sample policy,
//! real attempts, and what the kernel makes of each. Exits 0 only if every verdict was the expected one.

use std::{
    fs,
    io::{IsTerminal, Write, stdout},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use authd::audit::record::Record;
use authd_tests::{
    daemon::{self, Daemon, PATIENCE},
    netns::Netns,
    probe::{self, Outcome, Running},
    sandbox::{self, Sandbox},
};
use clap::Parser;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

#[derive(Parser)]
struct Cli {
    /// Keep everything running afterwards
    #[arg(long)]
    hold: bool,
    /// Only remove what a demo left that was killed
    #[arg(long)]
    clean: bool,
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupt(_: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    if cli.clean {
        sandbox::clean_up_after_others();
        return Ok(ExitCode::SUCCESS);
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let action = SigAction::new(SigHandler::Handler(interrupt), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler only stores to an atomic, which is safe at any moment (signal-safety(7)).
        unsafe { sigaction(signal, &action) }?;
    }
    let mut demo = Demo::start()?;
    demo.run()?;
    let good = demo.wrong == 0;
    match good {
        true => println!("\nEvery one of {} verdicts was the expected one.", demo.shown),
        false => println!("\n{} of {} verdicts were not the expected ones.", demo.wrong, demo.shown),
    }
    if cli.hold {
        demo.hold()?;
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

const LEDGER: &str = "/system.slice/ledger.service";
const JOB: &str = "/jobs.slice/report-7.service";
const AGENT: &str = "/agents.slice/support-4711.scope";
/// A process that no policy names.
const NOBODY: &str = "/user.slice/somebody.scope";
const ELSEWHERE: &str = "/elsewhere";

/// What should come of an attempt: the record that tells of it, and how the application notices.
struct Expected {
    verdict: &'static str,
    rule: Option<&'static str>,
    reason: &'static str,
    /// Of the record: `outbound` by address and port, `inbound` by the caller's address and the local port.
    direction: &'static str,
    address: Option<&'static str>,
    port: Option<u16>,
    felt: &'static str,
}

const fn allowed(rule: &'static str, direction: &'static str, address: &'static str, port: u16) -> Expected {
    let (address, port) = (Some(address), Some(port));
    Expected { verdict: "allowed", rule: Some(rule), reason: "rule", direction, address, port, felt: "ok" }
}

const fn refused(reason: &'static str, address: &'static str, port: u16) -> Expected {
    let (direction, address, port) = ("outbound", Some(address), Some(port));
    Expected { verdict: "denied", rule: None, reason, direction, address, port, felt: "EPERM" }
}

const fn dropped(address: &'static str, port: u16) -> Expected {
    let (direction, address, port) = ("inbound", Some(address), Some(port));
    Expected { verdict: "denied", rule: None, reason: "no_rule", direction, address, port, felt: "TIMEOUT" }
}

struct Demo {
    shown: usize,
    wrong: usize,
    /// Number of the last record that was looked at.
    seen: u64,
    _servers: Vec<Running>,
    policy: String,
    daemon: Daemon,
    elsewhere: Netns,
    sandbox: Sandbox,
}

impl Demo {
    fn start() -> Result<Self> {
        let sandbox = Sandbox::new()?;
        let policy = fs::read_to_string(sample())?;
        fs::write(sandbox.policy_directory().join("example.toml"), &policy)?;
        let elsewhere = sandbox.another_netns("far")?;
        let addresses: (&[&str], &[&str]) = (&["192.0.2.1/24"], &["192.0.2.2/24", "192.0.2.66/24"]);
        sandbox.netns.join(&elsewhere, ("node0", "far0"), addresses)?;
        let daemon = sandbox.start()?;
        let status = daemon.status()?;
        println!("authd {} enforces below {}", status.version, sandbox.cgroup.path().display());
        println!("policy: {}\n", sandbox.policy_directory().join("example.toml").display());
        let servers = vec![
            sandbox.spawn(LEDGER, &["serve-tcp", "0.0.0.0:8443"])?,
            sandbox.spawn_in(ELSEWHERE, &elsewhere, &["serve-tcp", "192.0.2.2:8080"])?,
            sandbox.spawn_in(ELSEWHERE, &elsewhere, &["serve-tcp", "192.0.2.66:443"])?,
            sandbox.spawn_in(ELSEWHERE, &elsewhere, &["serve-udp", "192.0.2.66:53"])?,
        ];
        Ok(Self { shown: 0, wrong: 0, seen: 0, _servers: servers, policy, daemon, elsewhere, sandbox })
    }

    fn run(&mut self) -> Result<()> {
        let row = |cells: [&str; 7]| Self::row(cells, "1");
        row(["VERDICT", "WHO", "TRIES TO", "REASON", "RULE", "APPLICATION", ""]);
        self.attempt(
            "nightly-report",
            "read the ledger",
            JOB,
            &["tcp", "127.0.0.1:8443"],
            &allowed("report-reads-ledger", "outbound", "127.0.0.1", 8443),
        )?;
        self.attempt(
            "support-agent",
            "read a ticket",
            AGENT,
            &["tcp", "192.0.2.2:8080"],
            &allowed("agents-read-tickets", "outbound", "192.0.2.2", 8080),
        )?;
        let proof = Expected { rule: Some("agents-change-ledger"), ..refused("proof_required", "127.0.0.1", 8443) };
        self.attempt("support-agent", "change the ledger", AGENT, &["tcp", "127.0.0.1:8443"], &proof)?;
        self.attempt(
            "support-agent",
            "send data elsewhere",
            AGENT,
            &["tcp", "192.0.2.66:443"],
            &refused("no_rule", "192.0.2.66", 443),
        )?;
        self.attempt(
            "support-agent",
            "the same, as mapped IPv6",
            AGENT,
            &["tcp", "[::ffff:192.0.2.66]:443"],
            &refused("no_rule", "192.0.2.66", 443),
        )?;
        self.attempt(
            "support-agent",
            "the same, by DNS",
            AGENT,
            &["udp", "192.0.2.66:53"],
            &refused("no_rule", "192.0.2.66", 53),
        )?;
        self.attempt(
            "support-agent",
            "the same, from a child cgroup",
            AGENT,
            &["child-cgroup", "hidden", "192.0.2.66:443"],
            &refused("no_rule", "192.0.2.66", 443),
        )?;
        let raw = Expected { address: None, port: None, ..refused("raw_socket", "", 0) };
        self.attempt("support-agent", "open a raw socket", AGENT, &["socket", "raw"], &raw)?;
        self.attempt(
            "somebody",
            "read the ledger",
            NOBODY,
            &["tcp", "127.0.0.1:8443", "--timeout-ms", "500"],
            &dropped("127.0.0.1", 8443),
        )?;
        self.call_from_afar(
            "head-office",
            "192.0.2.2:0",
            &allowed("office-uses-ledger", "inbound", "192.0.2.2", 8443),
        )?;
        self.call_from_afar("a stranger", "192.0.2.66:0", &dropped("192.0.2.66", 8443))?;
        self.edit_under_an_open_connection()?;
        self.edit_with_a_mistake()
    }

    fn attempt(&mut self, who: &str, what: &str, cgroup: &str, arguments: &[&str], expected: &Expected) -> Result<()> {
        check_interrupted()?;
        let outcome = self.sandbox.probe(cgroup, arguments)?;
        self.show(who, what, &felt(Some(&outcome)), expected)
    }

    fn call_from_afar(&mut self, who: &str, from: &str, expected: &Expected) -> Result<()> {
        check_interrupted()?;
        let arguments = ["tcp", "192.0.2.1:8443", "--from", from];
        let mut attempt = self.sandbox.spawn_quietly_in(ELSEWHERE, &self.elsewhere, &arguments)?;
        let patience = if expected.verdict == "allowed" { PATIENCE } else { Duration::from_secs(1) };
        let outcome = attempt.next_within(patience)?;
        self.show(who, "read the ledger from afar", &felt(outcome.as_ref()), expected)
    }

    /// Finds the record of what was just tried, and shows both.
    fn show(&mut self, who: &str, what: &str, felt: &str, expected: &Expected) -> Result<()> {
        let is_it = |r: &Record| {
            let (ours, port) = match expected.direction {
                "outbound" => (r.remote_address, r.remote_port),
                _ => (r.remote_address, r.local_port),
            };
            let at = expected.address.is_none_or(|a| ours.is_some_and(|ours| ours.to_string() == a))
                && (expected.port.is_none() || port == expected.port);
            matches!(r.event.as_str(), "flow_opened" | "flow_denied")
                && r.direction.as_deref() == Some(expected.direction)
                && at
        };
        let record = self.next_record(what, is_it)?;
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let (verdict, reason, rule) = (text(&record.verdict), text(&record.reason), text(&record.rule));
        let right = verdict == expected.verdict
            && reason == expected.reason
            && rule == expected.rule.unwrap_or_default()
            && felt == expected.felt;
        self.tell(right, [&verdict, who, what, &reason, &rule, felt]);
        Ok(())
    }

    fn tell(&mut self, right: bool, [verdict, who, what, reason, rule, felt]: [&str; 6]) {
        self.shown += 1;
        self.wrong += usize::from(!right);
        let colour = if verdict.starts_with("allowed") || verdict == "resumed" { "32" } else { "31" };
        Self::row([verdict, who, what, reason, rule, felt, if right { "" } else { "<- NOT EXPECTED" }], colour);
    }

    fn row([verdict, who, what, reason, rule, felt, note]: [&str; 7], colour: &str) {
        let verdict = format!("{verdict:<9}");
        let coloured = stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let verdict = if coloured { format!("\x1b[{colour}m{verdict}\x1b[0m") } else { verdict };
        println!("{verdict} {who:<15} {what:<30} {reason:<15} {rule:<21} {felt:<11} {note}");
    }

    /// The first record after the last one shown that is the one looked for.
    fn next_record(&mut self, what: &str, is_it: impl Fn(&Record) -> bool) -> Result<Record> {
        let seen = self.seen;
        let record = self.daemon.wait_for(what, |r| r.seq > seen && is_it(r))?;
        self.seen = record.seq;
        Ok(record)
    }

    fn edit_under_an_open_connection(&mut self) -> Result<()> {
        let mut held = self.sandbox.spawn(AGENT, &["hold-tcp", "192.0.2.2:8080"])?;
        println!("\nsupport-agent holds a connection to the tickets; the policy is edited:");
        let (before, after) =
            ("from = [\"support-agent\"]\nto = [\"tickets\"]", "from = [\"nightly-report\"]\nto = [\"tickets\"]");
        println!("  - from = [\"support-agent\"]\n  + from = [\"nightly-report\"]");
        self.edit(&self.policy.replace(before, after))?;
        let outcome = held.again()?;
        let cut = self.next_record("the cut", |r| r.event == "flow_cut")?;
        let right = outcome.errno == "TIMEOUT" && cut.reason.as_deref() == Some("no_rule");
        self.tell(
            right,
            ["cut", "support-agent", "go on reading", &cut.reason.unwrap_or_default(), "", &felt(Some(&outcome))],
        );
        self.attempt(
            "support-agent",
            "read another ticket",
            AGENT,
            &["tcp", "192.0.2.2:8080"],
            &refused("no_rule", "192.0.2.2", 8080),
        )?;

        println!("\nand edited back:");
        self.edit(&self.policy)?;
        let started = Instant::now();
        let outcome = loop {
            check_interrupted()?;
            let outcome = held.again()?;
            if outcome.ok || started.elapsed() > PATIENCE {
                break outcome;
            }
        };
        let resumed = self.next_record("the resumption", |r| r.event == "flow_resumed")?;
        let (reason, rule) = (resumed.reason.unwrap_or_default(), resumed.rule.unwrap_or_default());
        let right = outcome.ok && rule == "agents-read-tickets";
        self.tell(right, ["resumed", "support-agent", "go on reading", &reason, &rule, &felt(Some(&outcome))]);
        Ok(())
    }

    fn edit_with_a_mistake(&mut self) -> Result<()> {
        println!("\nand edited with a mistake, which changes nothing:");
        self.write(&self.policy.replace("to = [\"tickets\"]", "to = [\"tikets\"]"))?;
        let started = Instant::now();
        let status = loop {
            check_interrupted()?;
            let status = self.daemon.status()?;
            if !status.last_reload.ok {
                break status;
            }
            if started.elapsed() > PATIENCE {
                bail!("the mistake was not noticed\n{}", self.daemon.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        for line in status.last_reload.errors.iter().flat_map(|error| error.lines()) {
            println!("  {line}");
        }
        println!("  generation {} stays in force\n", status.generation);
        self.attempt(
            "support-agent",
            "read a ticket",
            AGENT,
            &["tcp", "192.0.2.2:8080"],
            &allowed("agents-read-tickets", "outbound", "192.0.2.2", 8080),
        )?;
        self.write(&self.policy)
    }

    /// Edits the policy file, and waits until the daemon has put it into force.
    fn edit(&self, policy: &str) -> Result<()> {
        let before = self.daemon.status()?.last_reload.successes;
        self.write(policy)?;
        let started = Instant::now();
        while self.daemon.status()?.last_reload.successes == before {
            check_interrupted()?;
            if started.elapsed() > PATIENCE {
                bail!("the edit was not noticed\n{}", self.daemon.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn policy_file(&self) -> PathBuf {
        self.sandbox.policy_directory().join("example.toml")
    }

    fn write(&self, policy: &str) -> Result<()> {
        let beside = self.sandbox.policy_directory().join(".example.toml.new");
        fs::write(&beside, policy)?;
        Ok(fs::rename(beside, self.policy_file())?)
    }

    fn hold(&self) -> Result<()> {
        let authd = format!("{} --config {}", daemon::binary().display(), self.sandbox.settings().display());
        let netns = self.sandbox.netns.path();
        let agent = self.sandbox.cgroup.child(AGENT)?;
        println!("\nIt goes on until you press Ctrl-C. From another shell, as root:\n");
        println!("  {authd} status");
        println!("  {authd} flows --follow");
        println!("  {authd} explain --from support-agent --to 192.0.2.66:443/tcp");
        println!("  $EDITOR {}", self.policy_file().display());
        println!("\nA shell of the agent's, in the demo's network:\n");
        println!("  sh -c 'echo $$ > {}/cgroup.procs; exec nsenter --net={} bash'", agent.display(), netns.display());
        println!("\nThere, for example:\n");
        let probe = format!("{} --cgroup {} --netns {}", probe::binary().display(), agent.display(), netns.display());
        println!("  {probe} tcp 192.0.2.2:8080");
        println!("  {probe} tcp 192.0.2.66:443");
        stdout().flush()?;
        while !INTERRUPTED.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(100));
        }
        println!("\ncleaning up");
        Ok(())
    }
}

fn felt(outcome: Option<&Outcome>) -> String {
    match outcome {
        Some(outcome) if outcome.ok => "ok".to_owned(),
        Some(outcome) => outcome.errno.clone(),
        None => "TIMEOUT".to_owned(),
    }
}

fn check_interrupted() -> Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}

fn sample() -> PathBuf {
    let packaging = std::env::var_os("AUTHD_PACKAGING");
    let packaging = packaging.map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging"), PathBuf::from);
    packaging.join("policy.d/example.toml")
}
