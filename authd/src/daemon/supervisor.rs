//! The daemon's loop: every source of events, and what each leads to, on one screen.
//!
//! Work that takes long (reading and compiling a policy) happens on another thread; whatever touches the kernel's tables
//! happens here, one thing after the other.

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt, PermissionsExt},
    },
    path::Path,
    thread,
    time::Duration,
};

use jiff::Timestamp;
use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};
use sd_notify::NotifyState;
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::UnixListener,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use super::{
    Daemon, DaemonError,
    admin::{self, Answer, Applied, Asked, Call, Reply, Request},
    candidate::Candidate,
    clock,
    control::{Control, Happened, Who},
    forgetting::{Forgetting, Waiting},
    said,
    settings::Files,
};
use crate::{config::Config, decisions::asked, ipc, policy::diagnostic::Source};

/// The ring is emptied this often; the kernel wakes the daemon only when it fills up.
const DRAIN_EVERY: Duration = Duration::from_millis(20);
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// Key sets, bundles, lists and certificates are looked at this often.
const FILES_EVERY: Duration = Duration::from_secs(2);
const METRICS_EVERY: Duration = Duration::from_secs(5);
/// Where no service manager says otherwise.
const WATCHDOG_EVERY: Duration = Duration::from_secs(15);
/// A policy directory is read when it has been quiet for this long.
const SETTLED: Duration = Duration::from_millis(300);
/// The clock of people was set if it moved this much against the monotonic one.
const CLOCK_STEP_NS: i128 = 500_000_000;
/// Operators' connections at one time.
const MAX_CONNECTIONS: usize = 64;

/// Runs until told to end.
pub async fn run(config: Config, detach_on_exit: bool) -> Result<(), DaemonError> {
    let mut daemon = Daemon::start(config)?;
    let failed = |error: io::Error| DaemonError::Socket(Path::new("signals").to_owned(), error);
    let mut hangup = signal(SignalKind::hangup()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;

    let (calls, mut requests) = mpsc::channel::<Asked>(MAX_CONNECTIONS);
    let socket = daemon.config().socket.clone();
    // Operators are root alone.
    let listener = bind(&socket, 0o600).map_err(|error| DaemonError::Socket(socket.clone(), error))?;
    let cgroups = watch(daemon.tree().as_fd().try_clone_to_owned().map_err(DaemonError::Tree)?)?;
    let policy = PolicyWatch::new(&daemon.config().policy);
    let policy_events = policy.as_ref().map(|p| p.inotify.as_fd().try_clone_to_owned().map_err(DaemonError::Tree));
    let policy_events = policy_events.transpose()?.map(watch).transpose()?;

    let mut control = Control::new(daemon.config())?;
    let mut servers = daemon.server_events();
    let mut files = Files::default();
    let mut forgetting = Forgetting::default();
    let mut reload = Reload::default();
    let mut settle: Option<Instant> = None;
    let mut offset = clock::clock().offset;
    let mut ticks = Ticks::new();
    let mut more = false;
    let connections = std::sync::Arc::new(tokio::sync::Semaphore::new(MAX_CONNECTIONS));
    notify(&[NotifyState::Ready, NotifyState::Status(&format!("generation {}", daemon.generation()))]);

    loop {
        let boundary = daemon.next_boundary();
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => reload.ask(None, None),
            Some(asked) = requests.recv() => match asked {
                Asked::Call(call) => answer(&mut daemon, &mut reload, &mut control, &mut forgetting, call),
                Asked::Http { connection, uid, cgroup } => {
                    control.hand_over(connection, Who::Admin { uid, cgroup }, ipc::Caller::Admin { uid });
                }
            },
            Ok((stream, _)) = listener.accept() => {
                if let Ok(permit) = connections.clone().try_acquire_owned() {
                    let calls = calls.clone();
                    tokio::spawn(async move {
                        // The caller notices a failure by itself.
                        let _ = admin::serve(stream, calls).await;
                        drop(permit);
                    });
                }
            }
            ready = cgroups.readable() => {
                if let Ok(mut ready) = ready {
                    ready.clear_ready();
                    daemon.follow_cgroups()?;
                    said::tell_identities(&mut daemon, &mut control);
                }
            }
            ready = readable(policy_events.as_ref()) => {
                if let (Ok(mut ready), Some(policy)) = (ready, &policy) {
                    ready.clear_ready();
                    policy.drain();
                    settle = Some(Instant::now() + SETTLED);
                }
            }
            () = at(settle) => {
                settle = None;
                if policy_differs(&daemon) {
                    reload.changed();
                }
            }
            () = at(boundary.map(instant_of)) => reload.again(),
            () = at(daemon.trial_ends().map(Instant::from_std)) => {
                if let Some(before) = daemon.go_back() {
                    reload.back(before);
                }
            }
            candidate = reload.finished() => {
                let mut applied = daemon.apply(candidate);
                match (reload.terms, applied.ok) {
                    (Terms::Accepted, true) => {
                        daemon.confirm(None)?;
                        reload.stay();
                    }
                    (Terms::Trial(time), true) => {
                        daemon.put_on_trial(time, &mut applied)?;
                        reload.stay();
                    }
                    (Terms::Back, false) => daemon.go_back_later(),
                    _ => {}
                }
                if applied.ok {
                    control.tell_settings(&files.settings(&daemon));
                }
                settled(&applied);
                reload.tell(&applied);
            }
            // Each turn is short: a flood of events must not keep everything else waiting.
            () = due(&mut ticks.drain, more) => more = daemon.drain(),
            _ = ticks.sweep.tick() => {
                daemon.sweep()?;
                said::tell_identities(&mut daemon, &mut control);
                let now = clock::clock().offset;
                if (now - offset).abs() > CLOCK_STEP_NS {
                    tracing::info!("the clock was set: schedules are computed again");
                    offset = now;
                    reload.again();
                }
            }
            happened = control.happened() => {
                serve(&mut daemon, &mut control, &mut files, &mut forgetting, happened);
            }
            Some(event) = servers.recv() => daemon.server_happened(&mut control, event),
            _ = ticks.files.tick() => {
                if files.changed() {
                    control.tell_settings(&files.settings(&daemon));
                }
            }
            _ = ticks.watchdog.tick() => notify(&[NotifyState::Watchdog]),
            _ = ticks.metrics.tick() => daemon.write_metrics()?,
        }
        // Before it sees a token that they signed.
        if daemon.take_issuer_changed() {
            control.tell_settings(&files.settings(&daemon));
        }
        reload.start(&daemon);
    }
    notify(&[NotifyState::Stopping]);
    let _ = fs::remove_file(&socket);
    daemon.stop(detach_on_exit)
}

struct Ticks {
    drain: tokio::time::Interval,
    files: tokio::time::Interval,
    sweep: tokio::time::Interval,
    metrics: tokio::time::Interval,
    watchdog: tokio::time::Interval,
}

impl Ticks {
    fn new() -> Self {
        let every = |period| {
            let mut ticks = interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        };
        Self {
            drain: every(DRAIN_EVERY),
            files: every(FILES_EVERY),
            sweep: every(SWEEP_EVERY),
            metrics: every(METRICS_EVERY),
            watchdog: every(watchdog_period()),
        }
    }
}

/// A policy that is asked for, or being prepared. One at a time; who asks meanwhile gets the next one.
#[derive(Default)]
struct Reload {
    asked: Option<What>,
    waiting: Vec<oneshot::Sender<Reply>>,
    /// Of what is asked for, and of what is running.
    asked_terms: Terms,
    terms: Terms,
    running: Option<oneshot::Receiver<Candidate>>,
    /// Those who wait for the one that is running.
    served: Vec<oneshot::Sender<Reply>>,
}

#[derive(Clone, PartialEq, Eq)]
enum What {
    /// What lies in the directory now.
    Directory,
    /// The policy in force, for another moment.
    Again,
    /// These files, whatever lies in the directory.
    Back(Vec<Source>),
}

/// What an operator said of the policy to come.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Terms {
    #[default]
    None,
    /// It stays, whatever became of it before.
    Accepted,
    /// It goes back after so long unless it is confirmed.
    Trial(Duration),
    /// It is the one to go back to.
    Back,
}

impl Reload {
    /// Somebody wants the directory's policy. Of two who do, the more careful one has his way.
    fn ask(&mut self, answer: Option<oneshot::Sender<Reply>>, trial: Option<Duration>) {
        self.asked = Some(What::Directory);
        self.waiting.extend(answer);
        self.asked_terms = match (trial, self.asked_terms) {
            (Some(time), _) | (None, Terms::Trial(time)) => Terms::Trial(time),
            (None, _) => Terms::Accepted,
        };
    }

    /// The directory says something else. What goes back, goes back first.
    fn changed(&mut self) {
        if self.asked_terms != Terms::Back {
            self.asked = Some(What::Directory);
        }
    }

    fn again(&mut self) {
        self.asked.get_or_insert(What::Again);
    }

    /// Nobody confirmed a policy. Whoever has asked for one since then has his way.
    fn back(&mut self, sources: Vec<Source>) {
        if self.asked_terms == Terms::None {
            self.asked = Some(What::Back(sources));
            self.asked_terms = Terms::Back;
        }
    }

    /// An operator has decided about the policy in force: nothing goes back that was to.
    fn stay(&mut self) {
        if self.asked_terms == Terms::Back {
            self.asked = None;
            self.asked_terms = Terms::None;
        }
    }

    fn start(&mut self, daemon: &Daemon) {
        if self.running.is_some() {
            return;
        }
        let Some(what) = self.asked.take() else { return };
        if what == What::Directory {
            let micros = (clock::monotonic() / 1000) as i128;
            notify(&[NotifyState::Reloading, NotifyState::MonotonicUsec(micros)]);
        }
        self.served.append(&mut self.waiting);
        self.terms = std::mem::take(&mut self.asked_terms);
        let options = daemon.config().options.clone();
        let directory = daemon.config().policy.clone();
        let registry = daemon.persistent().registry.clone();
        let in_force = (what == What::Again).then(|| daemon.in_force().clone());
        let (done, running) = oneshot::channel();
        self.running = Some(running);
        let prepare = move || {
            let _ = done.send(match (what, in_force) {
                (_, Some(prepared)) => Candidate::again(&prepared, &options, clock::moment()),
                (What::Back(sources), None) => Candidate::from_sources(sources, &options, registry, clock::moment()),
                (_, None) => Candidate::from_directory(&directory, &options, registry, clock::moment()),
            });
        };
        // The runtime would panic where there is no thread to be had.
        if let Err(error) = thread::Builder::new().name("authd-policy".to_owned()).spawn(prepare) {
            tracing::error!(%error, "there is no thread for preparing the policy");
        }
    }

    async fn finished(&mut self) -> Candidate {
        let Some(running) = &mut self.running else { return std::future::pending().await };
        let result = running.await;
        self.running = None;
        match result {
            Ok(candidate) => candidate,
            Err(_) => Candidate::failed("preparing the policy failed; the log says why"),
        }
    }

    fn tell(&mut self, applied: &Applied) {
        for answer in self.served.drain(..) {
            let _ = answer.send(Reply::One(Answer::Applied(applied.clone())));
        }
    }
}

/// What the control process wants, or what became of it.
fn serve(
    daemon: &mut Daemon,
    control: &mut Control,
    files: &mut Files,
    forgetting: &mut Forgetting,
    happened: Happened,
) {
    match happened {
        Happened::Nothing => {}
        Happened::Restart => match control.start(&files.settings(daemon)) {
            Ok(()) => {}
            Err(error) => {
                tracing::error!(%error, "proofs cannot be shown");
                control.try_later();
            }
        },
        Happened::Ended(how) => {
            forgetting.all(control);
            daemon.control_ended(&how);
        }
        Happened::Accepted(fd, who) => match who {
            Ok(mut who) => {
                daemon.listen_to(fd.as_fd(), &mut who);
                let caller = daemon.introduce(&who);
                control.hand_over(fd, who, caller);
            }
            // The connection is closed: nobody can be told.
            Err(error) => daemon.not_attested(&error),
        },
        Happened::AcceptedTcp(stream) => match daemon.attest_maker(&stream) {
            Ok(who) => {
                let caller = daemon.introduce(&who);
                control.hand_over(stream.into(), who, caller);
            }
            Err(error) => daemon.not_attested(&error),
        },
        Happened::Message(message) => said::said(daemon, control, forgetting, message),
    }
}

fn answer(daemon: &mut Daemon, reload: &mut Reload, control: &mut Control, forgetting: &mut Forgetting, call: Call) {
    let Call { request, uid, cgroup, answer } = call;
    let error = |error: DaemonError| Answer::Error { message: error.to_string() };
    let reply = match request {
        Request::Apply { confirm } => {
            return reload.ask(Some(answer), confirm.map(|seconds| Duration::from_secs(seconds.into())));
        }
        Request::Confirm => Reply::One(match daemon.confirm(Some(uid)) {
            Ok(found) => Answer::Confirmed { found },
            Err(error) => Answer::Error { message: error.to_string() },
        }),
        Request::Status => {
            daemon.catch_up();
            // Cgroups that were made before the question was asked are part of the answer.
            let status = daemon.follow_cgroups().and_then(|()| daemon.status());
            Reply::One(status.map_or_else(error, |status| Answer::Status(Box::new(status))))
        }
        Request::Explain { from, to, at } => Reply::One(match daemon.explain(&from, &to, at.as_deref()) {
            Ok(explained) => Answer::Explanation(Box::new(explained)),
            Err(message) => Answer::Error { message },
        }),
        Request::Frames { frames } => Reply::One(match daemon.frames(&frames) {
            Ok(verdicts) => Answer::Frames { verdicts },
            Err(message) => Answer::Error { message },
        }),
        Request::Flows { follow, last } => {
            daemon.catch_up();
            let (lines, more) = daemon.recent(last);
            Reply::Lines(lines, follow.then_some(more))
        }
        Request::KeyCreate(new) => Reply::One(daemon.create_key(uid, *new)),
        Request::KeyList => Reply::One(daemon.list_keys()),
        Request::KeyRevoke { id } => Reply::One(daemon.revoke_key(uid, id)),
        Request::Revoke { what, text } => {
            let reply = Reply::One(match daemon.revoke(what, uid, &text) {
                Ok(effect) => Answer::Revoked(effect),
                Err(message) => Answer::Error { message },
            });
            return forgetting.then(control, Waiting::Operator(answer, reply));
        }
        Request::Reinstate { what } => Reply::One(daemon.reinstate(&what, uid)),
        Request::Revocations => Reply::One(daemon.revocations()),
        Request::SigningKeys => Reply::One(daemon.signing_keys()),
        Request::SigningKeyRotate => Reply::One(daemon.rotate_signing_key()),
        Request::Approvals(question) => {
            let who = Who::Admin { uid, cgroup };
            let refused = |ipc::Refusal { reason, message }| asked::Answer::Refused { reason, message };
            Reply::One(Answer::Approvals(daemon.approve(&who, question, None).unwrap_or_else(refused)))
        }
    };
    // Who asked has gone: nobody misses the answer.
    let _ = answer.send(reply);
}

fn settled(applied: &Applied) {
    let status = match applied.ok {
        true => format!("generation {}", applied.generation),
        false => format!("generation {}; the last policy was refused", applied.generation),
    };
    notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
}

/// Half of what the service manager waits for (sd_watchdog_enabled(3)).
fn watchdog_period() -> Duration {
    sd_notify::watchdog_enabled().map_or(WATCHDOG_EVERY, |timeout| timeout / 2)
}

/// Without a service manager there is nobody to tell.
fn notify(states: &[NotifyState<'_>]) {
    let _ = sd_notify::notify(states);
}

/// Whether the directory says something else than the policy in force, and what it says was not tried in vain. A refused policy
/// that did not change since is not refused again and again.
fn policy_differs(daemon: &Daemon) -> bool {
    let (sources, _) = crate::policy::load::read_sources(&daemon.config().policy);
    sources != daemon.in_force().sources && !daemon.was_not_confirmed(&sources)
}

/// A socket that whoever the mode admits can connect to.
pub(super) fn bind(path: &Path, mode: u32) -> io::Result<UnixListener> {
    if let Some(directory) = path.parent()
        && !directory.exists()
    {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

/// Changes in the policy directory.
struct PolicyWatch {
    inotify: Inotify,
}

impl PolicyWatch {
    /// A directory that cannot be watched is read on request only.
    fn new(directory: &Path) -> Option<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).ok()?;
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE;
        match inotify.add_watch(directory, flags) {
            Ok(_) => Some(Self { inotify }),
            Err(error) => {
                tracing::warn!(%error, directory = %directory.display(), "policy files are not watched");
                None
            }
        }
    }

    fn drain(&self) {
        loop {
            match self.inotify.read_events() {
                Ok(events) if events.is_empty() => return,
                Ok(_) => {}
                Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }
}

fn watch(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>, DaemonError> {
    // SAFETY: an `OwnedFd` is open, and the same one, for as long as it exists; the `AsyncFd` owns it.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(|error| DaemonError::Tree(error.into()))
}

async fn readable(fd: Option<&AsyncFd<OwnedFd>>) -> io::Result<tokio::io::unix::AsyncFdReadyGuard<'_, OwnedFd>> {
    match fd {
        Some(fd) => fd.readable().await,
        None => std::future::pending().await,
    }
}

/// The next tick, or as soon as everything else had its turn: without the yield nobody would look at sockets and signals.
async fn due(ticks: &mut tokio::time::Interval, at_once: bool) {
    if at_once {
        tokio::task::yield_now().await;
    } else {
        ticks.tick().await;
    }
}

async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}

/// A moment after a boundary, never before it.
fn instant_of(boundary: Timestamp) -> Instant {
    let ahead = boundary.as_nanosecond() - Timestamp::now().as_nanosecond();
    let ahead = u64::try_from(ahead.max(0)).unwrap_or(u64::MAX / 2);
    Instant::now() + Duration::from_nanos(ahead) + Duration::from_millis(20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(text: &str) -> Vec<Source> {
        vec![Source { name: "policy.toml".into(), text: text.into() }]
    }

    fn is_back(reload: &Reload) -> bool {
        matches!(&reload.asked, Some(What::Back(before)) if *before == sources("before"))
    }

    #[test]
    fn going_back_waits_for_nobody_but_operators() {
        let mut reload = Reload::default();
        reload.again();
        reload.changed();
        reload.back(sources("before"));
        reload.again();
        reload.changed();
        assert!(is_back(&reload) && reload.asked_terms == Terms::Back);
        // Asked for before the time was over, or after it: what lies in the directory.
        reload.ask(None, None);
        assert!(reload.asked == Some(What::Directory) && reload.asked_terms == Terms::Accepted);
        reload.back(sources("before"));
        assert!(reload.asked == Some(What::Directory) && reload.asked_terms == Terms::Accepted);
    }

    #[test]
    fn an_operator_who_decided_meanwhile_is_not_overruled() {
        let mut reload = Reload::default();
        reload.back(sources("before"));
        reload.stay();
        assert!(reload.asked.is_none() && reload.asked_terms == Terms::None);
        reload.ask(None, Some(Duration::from_secs(1)));
        reload.stay();
        assert!(reload.asked_terms == Terms::Trial(Duration::from_secs(1)));
    }

    #[test]
    fn of_two_who_ask_the_more_careful_one_has_his_way() {
        let mut reload = Reload::default();
        reload.ask(None, Some(Duration::from_secs(9)));
        reload.ask(None, None);
        assert!(reload.asked_terms == Terms::Trial(Duration::from_secs(9)));
    }
}
