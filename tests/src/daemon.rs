//! The real daemon, as a child process, and its command line.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command, Output},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use authd::{
    audit::record::Record,
    daemon::{
        admin::{Answer, Applied, Request, client},
        status::Status,
    },
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::sandbox::Sandbox;

/// Nothing takes as long, even in an emulated machine that shares its processors with another one.
pub const PATIENCE: Duration = Duration::from_secs(if option_env!("AUTHD_IMPATIENT").is_some() { 15 } else { 300 });

/// Whether this machine's processor is a program, on which everything takes some fifty times as long.
pub fn emulated() -> bool {
    std::env::var_os("AUTHD_EMULATED").is_some()
}

pub struct Daemon {
    child: Option<Child>,
    settings: PathBuf,
    socket: PathBuf,
    audit: PathBuf,
    log: PathBuf,
}

/// Where the binary under test is.
pub fn binary() -> PathBuf {
    match std::env::var_os("AUTHD_BIN") {
        Some(path) => path.into(),
        None => beside("authd"),
    }
}

/// A program that was built with this one.
pub fn beside(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    let directories = own.ancestors().skip(1).take(2);
    directories.map(|d| d.join(name)).find(|path| path.exists()).unwrap_or_else(|| name.into())
}

impl Daemon {
    /// Starts it, and waits until it enforces.
    pub fn start(sandbox: &Sandbox, arguments: &[&str]) -> Result<Self> {
        Self::start_binary(sandbox, &binary(), arguments)
    }

    pub fn start_binary(sandbox: &Sandbox, binary: &std::path::Path, arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new(binary);
        command.arg("--config").arg(sandbox.settings()).arg("run").args(arguments);
        Self::start_command(sandbox, command)
    }

    /// With these capabilities (capabilities(7)) and no others, as a service manager would.
    pub fn start_with_capabilities(sandbox: &Sandbox, kept: &[libc::c_ulong]) -> Result<Self> {
        const LAST: libc::c_ulong = 63;
        let dropped: Vec<libc::c_ulong> = (0..=LAST).filter(|capability| !kept.contains(capability)).collect();
        let mut command = Command::new(binary());
        command.arg("--config").arg(sandbox.settings()).arg("run");
        // SAFETY: prctl(2) is a system call that allocates nothing, which is what a forked child may do.
        unsafe {
            command.pre_exec(move || {
                for capability in &dropped {
                    // Fails for numbers that this kernel does not know, which nobody has.
                    libc::prctl(libc::PR_CAPBSET_DROP, *capability, 0, 0, 0);
                }
                Ok(())
            });
        }
        Self::start_command(sandbox, command)
    }

    pub fn start_with_environment(sandbox: &Sandbox, environment: &[(&str, String)]) -> Result<Self> {
        let mut command = Command::new(binary());
        command.arg("--config").arg(sandbox.settings()).arg("run");
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        Self::start_command(sandbox, command)
    }

    /// In the sandbox's network namespace, where its peers can reach it.
    pub fn start_inside(sandbox: &Sandbox) -> Result<Self> {
        Self::start_inside_with(sandbox, &[])
    }

    pub fn start_inside_with(sandbox: &Sandbox, environment: &[(&str, String)]) -> Result<Self> {
        let netns = File::open(sandbox.netns.path())?;
        let mut command = Command::new(binary());
        command.arg("--config").arg(sandbox.settings()).arg("run");
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        // SAFETY: setns(2) is a system call that allocates nothing, which is what a forked child may do.
        unsafe { command.pre_exec(move || Ok(nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET)?)) };
        Self::start_command(sandbox, command)
    }

    fn start_command(sandbox: &Sandbox, mut command: Command) -> Result<Self> {
        let log = sandbox.directory().join("log");
        let output = File::options().create(true).append(true).open(&log)?;
        command.stdout(output.try_clone()?).stderr(output);
        // SAFETY: prctl(2) is a system call that allocates nothing, which is what a forked child may do.
        unsafe {
            // Whoever started it and was killed cannot end it any more.
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
        }
        let mut child =
            command.spawn().with_context(|| format!("starting {}", command.get_program().to_string_lossy()))?;
        let socket = sandbox.directory().join("admin.sock");
        let started = Instant::now();
        loop {
            if let Some(status) = child.try_wait()? {
                bail!("authd ended: {status}\n{}", fs::read_to_string(&log)?);
            }
            let answer = client::ask(&socket, &Request::Status);
            if matches!(answer, Ok(Answer::Status(status)) if status.pid == child.id()) {
                break;
            }
            if started.elapsed() > PATIENCE {
                bail!("authd is not ready\n{}", fs::read_to_string(&log)?);
            }
            sleep(Duration::from_millis(20));
        }
        Ok(Self { child: Some(child), settings: sandbox.settings(), socket, audit: sandbox.audit_file(), log })
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// The daemon's control process.
    pub fn control_pid(&self) -> Result<i32> {
        let parent = format!("PPid:\t{}", self.pid());
        let is_child = |pid: &i32| {
            fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|text| text.lines().any(|l| l == parent))
                && fs::read(format!("/proc/{pid}/cmdline"))
                    .is_ok_and(|line| line.split(|octet| *octet == 0).nth(1) == Some(b"control"))
        };
        let pids = fs::read_dir("/proc")?.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
        pids.filter(is_child).max().context("the daemon has a control process")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn status(&self) -> Result<Status> {
        match client::ask(&self.socket, &Request::Status)? {
            Answer::Status(status) => Ok(*status),
            other => bail!("{other:?}"),
        }
    }

    pub fn apply(&self) -> Result<Applied> {
        match client::ask(&self.socket, &Request::Apply { confirm: None })? {
            Answer::Applied(applied) => Ok(applied),
            other => bail!("{other:?}"),
        }
    }

    /// Applies, and fails unless the policy is good.
    pub fn must_apply(&self) -> Result<Applied> {
        let applied = self.apply()?;
        if !applied.ok {
            bail!("policy refused: {}", applied.errors.join("\n"));
        }
        Ok(applied)
    }

    /// Runs the command line.
    pub fn command(&self, arguments: &[&str]) -> Result<Output> {
        Ok(Command::new(binary()).arg("--config").arg(&self.settings).args(arguments).output()?)
    }

    /// All audit records so far.
    pub fn records(&self) -> Result<Vec<Record>> {
        // Asking for the status makes the daemon empty the ring first.
        if self.child.is_some() {
            self.status()?;
            sleep(Duration::from_millis(50));
        }
        let text = fs::read_to_string(&self.audit)?;
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        // A daemon that was killed leaves a line without its end; the next one ends the line and goes on behind it.
        let torn = |line: &&str| !line.ends_with('}');
        whole
            .lines()
            .filter(|line| !torn(line))
            .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
            .collect()
    }

    /// Waits for a record.
    pub fn wait_for(&self, what: &str, matches: impl Fn(&Record) -> bool) -> Result<Record> {
        let started = Instant::now();
        loop {
            if let Some(record) = self.records()?.into_iter().find(&matches) {
                return Ok(record);
            }
            if started.elapsed() > PATIENCE {
                let all: Vec<String> = self.records()?.iter().filter_map(|r| serde_json::to_string(r).ok()).collect();
                bail!("no record of {what} among\n{}\n{}", all.join("\n"), self.log());
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// Waits until a cgroup is known as some workload's.
    pub fn wait_for_instance(&self, path: &str) -> Result<()> {
        let started = Instant::now();
        while !self.status()?.workloads.iter().any(|w| w.instances.iter().any(|i| i == path)) {
            if started.elapsed() > PATIENCE {
                bail!("{path} is not known\n{}", self.log());
            }
            sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.pid() as i32), signal)?)
    }

    /// Asks it to end, and waits.
    pub fn terminate(&mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        self.wait()
    }

    pub fn kill_hard(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.wait()
    }

    pub fn wait(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- the daemon's log\n{}", self.log());
        }
    }
}
