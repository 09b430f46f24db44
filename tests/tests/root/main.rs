//! Tests of the real daemon with real processes, as root. `cargo xtask test root` runs them; so does `cargo xtask test vm`,
//! on other kernels.

mod agents;
mod approvals;
mod basics;
mod bypass;
mod frames;
mod grants;
mod handshakes;
mod interfaces;
mod kernel;
mod keys;
mod lifecycle;
mod lists;
mod metrics;
mod modes;
mod nodes;
mod oauth;
mod openssl;
mod peers;
mod proxies;
mod reload;
mod remote;
mod sockets;
mod takeover;

use std::fs::File;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::utsname::uname,
};

/// A test that may find out that it cannot run here, and says why.
pub enum Verdict {
    Ran,
    Skipped(&'static str),
}

type Body = fn() -> anyhow::Result<Verdict>;

/// As libtest shows it, with a line for a skip that the counting of stages reads.
pub fn trial(name: &'static str, body: Body) -> Trial {
    beside(FlockArg::LockShared, name, body)
}

/// One that looks at all of the kernel: no other process runs a test meanwhile.
pub fn alone(name: &'static str, body: Body) -> Trial {
    beside(FlockArg::LockExclusive, name, body)
}

fn beside(others: FlockArg, name: &'static str, body: Body) -> Trial {
    let run = move || {
        let path = std::env::temp_dir().join("authd-root-tests.lock");
        let file = File::options().create(true).append(true).open(path)?;
        let _lock = Flock::lock(file, others).map_err(|(_, error)| error)?;
        body()
    };
    Trial::ignorable_test(name, move || match run() {
        Ok(Verdict::Ran) => Ok(Completion::Completed),
        Ok(Verdict::Skipped(why)) => {
            println!("\nSKIP {name}: {why}");
            Ok(Completion::ignored_with(why))
        }
        Err(error) => Err(Failed::from(format!("{error:?}"))),
    })
}

fn main() {
    let mut arguments = Arguments::from_args();
    // How many run at once is for the shares to say.
    arguments.test_threads = Some(1);
    let trials = [
        basics::trials(),
        bypass::trials(),
        kernel::trials(),
        frames::trials(),
        modes::trials(),
        remote::trials(),
        interfaces::trials(),
        nodes::trials(),
        reload::trials(),
        lifecycle::trials(),
        grants::trials(),
        agents::actions::trials(),
        takeover::trials(),
        sockets::trials(),
        of_callers(),
    ]
    .into_iter()
    .flatten()
    .collect();
    let trials = share_of(trials);
    let conclusion = libtest_mimic::run(&arguments, trials);
    bypass::end();
    conclusion.exit();
}

/// Tests in which kernels have no part, as those of what the control process says to callers: they run on this machine. Of agents, one
/// emulated one runs those that start processes; the oldest kernel, on which loading the programs takes longest, does without.
fn of_callers() -> Vec<Trial> {
    let of_agents = agents::trials();
    let others: Vec<Trial> = [
        agents::of_callers(),
        agents::actions::of_callers(),
        takeover::of_callers(),
        grants::of_callers(),
        reload::of_callers(),
        lifecycle::of_callers(),
        keys::trials(),
        approvals::trials(),
        peers::trials(),
        handshakes::trials(),
        lists::trials(),
        metrics::trials(),
        oauth::trials(),
        openssl::trials(),
        proxies::trials(),
    ]
    .into_iter()
    .flatten()
    .collect();
    let release = uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    let (here, elsewhere) = match std::env::var_os("AUTHD_EMULATED") {
        None => (of_agents.into_iter().chain(others).collect(), 0),
        Some(_) if release.starts_with("6.1.") => (Vec::new(), of_agents.len() + others.len()),
        Some(_) => (of_agents, others.len()),
    };
    if elsewhere > 0 {
        println!("{elsewhere} tests in which kernels have no part run on other machines");
    }
    here
}

/// Every n-th test, where several processes or machines share them: `AUTHD_SHARE=1/2` is the second half.
fn share_of(trials: Vec<Trial>) -> Vec<Trial> {
    let share = std::env::var("AUTHD_SHARE").unwrap_or_else(|_| "0/1".to_owned());
    let numbers = share.split_once('/').and_then(|(at, of)| Some((at.parse().ok()?, of.parse().ok()?)));
    let Some((at, of)): Option<(usize, usize)> = numbers.filter(|(at, of)| at < of) else {
        panic!("AUTHD_SHARE={share} is no share");
    };
    trials.into_iter().enumerate().filter(|(index, _)| index % of == at).map(|(_, trial)| trial).collect()
}
