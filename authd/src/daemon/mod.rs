//! The daemon: what it holds, and what it does when something happens. The loop that tells it so is in `supervisor`.
//!
//! Enters: policies, changes of the cgroup tree, kernel events, questions. Leaves: generations, records, answers.

mod acting;
pub mod admin;
mod applying;
mod approving;
mod callers;
pub mod candidate;
pub mod cgroupfs;
pub mod clock;
mod closing;
pub mod control;
mod forgetting;
pub mod frames;
pub mod granting;
mod issuing;
mod keys;
mod listening;
pub mod metrics;
pub mod names;
pub mod nodes;
mod questions;
mod said;
mod servers;
pub mod settings;
pub mod state;
pub mod status;
pub mod supervisor;
pub mod trial;
pub mod trust;
mod users;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    net::UdpSocket,
    time::{Duration, Instant},
};

use authd_common::{
    event::Event,
    tables::{Conversation, ConversationKey, IdentityEntry, tag_flags},
};
use aya::maps::MapError;
use jiff::Timestamp;
use tokio::sync::broadcast;

use self::{
    candidate::{Candidate, Prepared},
    cgroupfs::{Base, CgroupError},
    granting::Ledger,
    metrics::Metrics,
    names::{Directory, Resolver},
    state::{Persistent, State, StateError},
    status::{Flows, GrantTotals, Reload},
    trial::Trial,
    trust::Trust,
};
use crate::{
    audit::{
        record::{Record, format_time},
        sink::Sink,
    },
    config::Config,
    dataplane::{
        attach::{self, AttachError, Attached},
        cgroups::{Change, Classification, Tree},
        interfaces::{Guard, Interfaces},
        object::{self, Hooks, LoadError},
        ring,
        sockets::SocketError,
        writer::{WriteError, Writer},
    },
    decisions::notify::command::Hook,
    ipc::Message,
    policy::{
        diagnostic::{Diagnostic, Source},
        load::read_sources,
        pattern::Patterns,
    },
    store::StoreError,
};

/// Records of flows that are kept for those who ask.
const RECENT: usize = 4096;
/// Kernel events that are taken at once.
const DRAIN: usize = 512;
/// Other things get their turn after so much time with kernel events.
const DRAIN_FOR: Duration = Duration::from_millis(5);
/// What the ring keeps beside each event (`BPF_RINGBUF_HDR_SZ`).
const RING_HEADER: usize = 8;
/// Repetitions of a denial are told when it is over, at the latest after this long, in ns.
const DENIAL_SETTLES: u64 = 1_000_000_000;

#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("audit target: {0}")]
    Audit(io::Error),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Attach(#[from] AttachError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("guarding interfaces: {0}")]
    Interfaces(io::Error),
    #[error("watching the cgroup tree: {0}")]
    Tree(io::Error),
    #[error("reading {table}: {error}")]
    Map { table: &'static str, error: MapError },
    #[error("the policy is refused, and none was in force before")]
    Policy(Vec<Diagnostic>),
    #[error("{0}: {1}")]
    Socket(std::path::PathBuf, io::Error),
    #[error("socket diagnostics: {0}")]
    Sockets(#[from] SocketError),
    #[error(transparent)]
    Control(#[from] control::ControlError),
}

/// The policy in force.
struct Active {
    prepared: Prepared,
    patterns: Patterns,
    since: Timestamp,
}

pub struct Daemon {
    config: Config,
    state: State,
    persistent: Persistent,
    /// A store that cannot be read ends nothing that the kernel enforces; but no proof is believed without it.
    trust: Result<Trust, StoreError>,
    ledger: Ledger,
    /// The operators' program that is told of calls that wait for approval.
    hook: Option<Hook>,
    /// What the webhook is to be told.
    messages: Vec<Message>,
    /// Whom the policy lets approve.
    users: users::Users,
    /// `None`: no tokens are exchanged here.
    issuing: Option<issuing::Issuing>,
    servers: servers::Servers,
    nodes: nodes::Nodes,
    totals: GrantTotals,
    metrics: Metrics,
    /// Whether control serves callers.
    control_ready: bool,
    base: Base,
    writer: Writer,
    tree: Tree,
    active: Active,
    /// Files that were in force before those of this policy, and since when these are.
    before: Option<(Vec<Source>, Instant)>,
    trial: Option<Trial>,
    directory: Directory,
    attached: Vec<Attached>,
    interfaces: Interfaces,
    /// Sockets older than authd learn from this one where they are.
    _beacon: Option<UdpSocket>,
    refused: Vec<(String, String)>,
    sink: Sink,
    recent: VecDeque<String>,
    follow: broadcast::Sender<String>,
    flows: Flows,
    last_reload: Reload,
    started: Timestamp,
    enforcing: bool,
    /// Cgroups that were looked for below the enforced one in vain, since the last sweep.
    strangers: HashSet<u64>,
    /// Cgroups for which the table has no room.
    unwritten: HashMap<u64, IdentityEntry>,
}

impl Daemon {
    /// Loads programs, puts the policy into force, attaches. Nothing is attached before a generation is in force.
    pub fn start(config: Config) -> Result<Self, DaemonError> {
        let base = Base::find(config.cgroup.as_deref())?;
        let state = State::open(&config.state)?;
        let mut persistent = state.persistent()?;
        let trust = Trust::open(&config.state);
        let trial = Trial::left(&state)?;
        let (prepared, last_reload) = first_policy(&config, &state, &persistent, trial.as_ref())?;
        let sink = Sink::open(&config.audit).map_err(DaemonError::Audit)?;
        let hooks = if config.interfaces.is_empty() { Hooks::Sockets } else { Hooks::SocketsAndInterfaces };
        let mut object = object::load(&config.pins, &config.sizes, hooks)?;
        let maps = object.take_maps();
        let mut writer = Writer::new(maps, config.sizes)?;

        let ledger = Ledger::new(writer.slots().iter().map(|slot| slot.serial).collect())?;
        writer.set_netns(ledger.own_namespace());
        let beacon = (!config.interfaces.is_empty()).then(|| writer.beacon()).transpose().unwrap_or_else(|error| {
            tracing::warn!(%error, "services that are older than authd are guarded at their sockets only");
            None
        });
        let mut tree = Tree::new(&base.path).map_err(DaemonError::Tree)?;
        let patterns = prepared.patterns();
        tree.rescan(&|path| classify(&patterns, path)).map_err(DaemonError::Tree)?;
        // Names are on disk before numbers are in the kernel.
        persistent.registry = prepared.registry.clone();
        state.keep(&persistent)?;
        let loaded = writer.load(&prepared.image, &tree.identities(), base.level, config.hold_ms())?;
        state.keep_policy(&prepared.sources)?;
        let attached = attach::attach(&mut object, &base.path, &config.pins)?;
        let interfaces =
            Interfaces::new(&config.interfaces, object.take_xdp(), &config.pins).map_err(DaemonError::Interfaces)?;
        object::remove_other_maps(&config.pins, &config.sizes);
        let mut directory = Directory::default();
        directory.learn(&prepared.model, &prepared.registry);
        let (follow, _) = broadcast::channel(RECENT);
        let now = Timestamp::now();
        let servers = servers::Servers::new(servers::cgroup(&base.path, &config.mcp.cgroup));
        let hook = Hook::new(&config.approvals.command);
        let mut daemon = Self {
            refused: object.refused.clone(),
            config,
            state,
            persistent,
            trust,
            ledger,
            hook,
            messages: Vec::new(),
            users: users::Users::default(),
            issuing: None,
            servers,
            nodes: nodes::Nodes::default(),
            totals: GrantTotals::default(),
            metrics: Metrics::default(),
            control_ready: false,
            base,
            writer,
            tree,
            active: Active { prepared, patterns, since: now },
            before: None,
            trial,
            directory,
            attached,
            interfaces,
            _beacon: beacon,
            sink,
            recent: VecDeque::new(),
            follow,
            flows: Flows::default(),
            last_reload,
            started: now,
            enforcing: true,
            strangers: HashSet::new(),
            unwritten: HashMap::new(),
        };
        let how = if object.adopted { "adopted the tables of the daemon before" } else { "made new tables" };
        daemon.report(Record::about("daemon_started", format!("authd {} {how}", env!("CARGO_PKG_VERSION"))));
        daemon.report_loaded(&loaded);
        let changes = daemon.interfaces.attach();
        daemon.report_interfaces(changes);
        daemon.begin_issuing();
        daemon.restore_grants()?;
        daemon.place_nodes();
        if !daemon.last_reload.ok {
            daemon.report_rejected();
        }
        if let Err(error) = &daemon.trust {
            tracing::error!(%error, "no proof is believed");
            let mut record = Record::about("store_unusable", error.to_string());
            record.reason = Some(error.reason().to_owned());
            daemon.report(record);
        }
        tracing::info!(
            generation = loaded.generation,
            programs = daemon.attached.len(),
            cgroup = %daemon.base.path.display(),
            "{how}; enforcing"
        );
        for (program, why) in &daemon.refused {
            tracing::warn!(program, why, "this kernel refuses an optional program");
        }
        Ok(daemon)
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    pub fn generation(&self) -> u32 {
        self.writer.generation()
    }

    pub fn persistent(&self) -> &Persistent {
        &self.persistent
    }

    /// When the policy has to be compiled again because a schedule's boundary passes.
    pub fn next_boundary(&self) -> Option<Timestamp> {
        self.active.prepared.image.next_boundary
    }

    /// The policy in force, to be compiled again for another moment.
    pub fn in_force(&self) -> &Prepared {
        &self.active.prepared
    }

    /// Follows the cgroup tree.
    pub fn follow_cgroups(&mut self) -> Result<(), DaemonError> {
        let patterns = &self.active.patterns;
        for change in self.tree.changes(&|path| classify(patterns, path)).map_err(DaemonError::Tree)? {
            match change {
                Change::Appeared { cgroup, entry } => self.make_known(cgroup, entry),
                Change::Gone { cgroup } => {
                    self.unwritten.remove(&cgroup);
                    self.writer.remove_identity(cgroup);
                }
            }
        }
        Ok(())
    }

    /// A cgroup for which the table has no room stays pending, so that whoever makes many of them only harms himself.
    fn make_known(&mut self, cgroup: u64, entry: IdentityEntry) {
        match self.writer.insert_identity(cgroup, entry) {
            Ok(()) => drop(self.unwritten.remove(&cgroup)),
            Err(error) => {
                if self.unwritten.is_empty() {
                    let message =
                        format!("new cgroups stay closed until there is room: {error}; raise limits.identities");
                    tracing::error!("{message}");
                    self.report(Record::about("identities_full", message));
                }
                self.unwritten.insert(cgroup, entry);
            }
        }
    }

    /// Tries those again for which there was no room.
    fn retry_unwritten(&mut self) {
        if self.unwritten.is_empty() {
            return;
        }
        let waiting: Vec<(u64, IdentityEntry)> =
            self.unwritten.iter().map(|(cgroup, entry)| (*cgroup, *entry)).collect();
        for (cgroup, entry) in waiting {
            if self.writer.insert_identity(cgroup, entry).is_err() {
                return;
            }
            self.unwritten.remove(&cgroup);
        }
        tracing::info!("there is room for all cgroups again");
    }

    /// Takes what the kernel told, for a few milliseconds. Returns whether there may be more.
    pub fn drain(&mut self) -> bool {
        let started = Instant::now();
        while self.drain_some() == DRAIN {
            if started.elapsed() > DRAIN_FOR {
                return true;
            }
        }
        false
    }

    /// Takes everything that the kernel told until now. What it tells meanwhile has to wait: there may be no end to it.
    pub fn catch_up(&mut self) {
        let full_ring = self.config.sizes.events as usize / (size_of::<Event>() + RING_HEADER) + 1;
        let mut taken = 0;
        while taken < full_ring {
            match self.drain_some() {
                DRAIN => taken += DRAIN,
                _ => return,
            }
        }
    }

    fn drain_some(&mut self) -> usize {
        let events = ring::drain(&mut self.writer.maps_mut().events, DRAIN);
        let clock = clock::clock();
        for event in &events {
            if let Some(grant) = self.ledger.flows.told(event) {
                self.ledger.grants.flow_ended(grant);
            }
            self.permit_told(event);
            let record = Record::of_event(event, &clock, &mut self.resolver());
            self.count(&record);
            self.report(record);
        }
        events.len()
    }

    /// What is due every second: ends of exchanges, repeated denials, losses, records of others.
    pub fn sweep(&mut self) -> Result<(), DaemonError> {
        self.writer.clean()?;
        self.strangers.clear();
        self.retry_unwritten();
        self.expire_grants();
        self.tend_issuing();
        self.follow_policy();
        self.expire_approvals();
        self.sweep_nodes()?;
        self.save_grants();
        if self.ledger.grants.iter().next().is_some() {
            self.find_flows();
        }
        self.end_conversations(self.config.conversation_idle.as_nanos() as u64)?;
        self.tell_denials()?;
        self.tell_drops()?;
        self.tell_losses()?;
        let changes = self.interfaces.keep();
        self.report_interfaces(changes);
        for record in self.state.take_pending() {
            self.report(record);
        }
        self.verify();
        self.settle();
        Ok(())
    }

    /// Whether every program is still where it was put.
    fn verify(&mut self) {
        let links = attach::links_directory(&self.config.pins);
        let enforcing = self.attached.iter().all(|a| links.join(&a.program).exists());
        if self.enforcing && !enforcing {
            let message = "programs were detached; restart authd to enforce again";
            tracing::error!("{message}");
            self.report(Record::about("enforcement_lost", message));
        }
        self.enforcing = enforcing;
    }

    /// Tells of exchanges that have been idle for so many ns.
    fn end_conversations(&mut self, idle: u64) -> Result<(), DaemonError> {
        let of = |error| DaemonError::Map { table: "conversations", error };
        let now = clock::monotonic();
        let over: Vec<(ConversationKey, Conversation)> = self
            .writer
            .maps()
            .conversations
            .iter()
            .filter_map(Result::ok)
            .filter(|(_, c)| now.saturating_sub(c.last_seen) > idle)
            .collect();
        let clock = clock::clock();
        for (key, conversation) in over {
            match self.writer.maps_mut().conversations.remove(&key) {
                Ok(()) => {}
                // The kernel made room meanwhile.
                Err(MapError::KeyNotFound) => continue,
                Err(error) => return Err(of(error)),
            }
            if let Some(grant) = self.ledger.flows.conversation_ended(&key) {
                self.ledger.grants.flow_ended(grant);
            }
            if conversation.flags & tag_flags::OPENED != 0 {
                let record = Record::of_conversation(&key, &conversation, &clock, &mut self.resolver());
                self.count(&record);
                self.report(record);
            }
        }
        Ok(())
    }

    /// Tells of denials that were repeated and not told one by one.
    fn tell_denials(&mut self) -> Result<(), DaemonError> {
        let now = clock::monotonic();
        let settled: Vec<_> = self
            .writer
            .maps()
            .denials
            .map
            .iter()
            .filter_map(Result::ok)
            .filter(|(_, denial)| denial.untold > 0 && now.saturating_sub(denial.told) > DENIAL_SETTLES)
            .map(|(key, _)| key)
            .collect();
        let clock = clock::clock();
        for key in settled {
            let Some(denial) = self.writer.take_denial(&key)? else { continue };
            if denial.untold == 0 {
                continue;
            }
            let record = Record::of_denial(&key, &denial, &clock, now, &mut self.resolver());
            self.count(&record);
            self.report(record);
        }
        Ok(())
    }

    /// Tells of packets that interfaces dropped.
    fn tell_drops(&mut self) -> Result<(), DaemonError> {
        let clock = clock::clock();
        for (kind, dropped) in self.writer.take_drops()?.told() {
            let record = Record::of_drop(&kind, &dropped, &clock, &mut self.resolver());
            self.count(&record);
            self.report(record);
        }
        Ok(())
    }

    fn report_interfaces(&mut self, changes: Vec<(String, Guard)>) {
        for (interface, guard) in changes {
            let event = match &guard {
                Guard::Attached(_) => {
                    tracing::info!(interface, mode = guard.name(), "interface guarded");
                    "interface_guarded"
                }
                Guard::Open(why) => {
                    tracing::error!(interface, why, "interface not guarded: its packets are judged at sockets only");
                    "interface_unguarded"
                }
            };
            let message = match guard {
                Guard::Open(why) => format!("{interface}: {why}"),
                _ => format!("{interface}: {}", guard.name()),
            };
            self.report(Record::about(event, message));
        }
    }

    fn tell_losses(&mut self) -> Result<(), DaemonError> {
        let totals = self.kernel_totals()?;
        // New tables count from 0 again.
        let told = if totals.lost < self.persistent.lost_told { 0 } else { self.persistent.lost_told };
        if totals.lost > told {
            let lost = totals.lost - told;
            let mut record = Record::about("events_lost", format!("the ring had no room for {lost} kernel events"));
            record.count = Some(lost);
            tracing::warn!(lost, "the ring had no room for kernel events");
            self.ledger.flows.miss();
            self.report(record);
        }
        if self.persistent.lost_told != totals.lost {
            self.persistent.lost_told = totals.lost;
            self.state.keep(&self.persistent)?;
        }
        Ok(())
    }

    fn kernel_totals(&self) -> Result<authd_common::tables::Sequence, DaemonError> {
        ring::totals(&self.writer.maps().sequence).map_err(|error| DaemonError::Map { table: "sequence", error })
    }

    /// The last things: what is still in the ring is told, and enforcement stays or goes.
    pub fn stop(mut self, detach: bool) -> Result<(), DaemonError> {
        self.servers.end();
        self.catch_up();
        self.tell_drops()?;
        self.tell_losses()?;
        self.save_grants();
        if detach {
            self.detach()?;
        }
        let how = if detach { "programs are detached" } else { "enforcement goes on" };
        self.report(Record::about("daemon_stopped", how));
        self.sink.flush();
        self.settle();
        self.state.keep(&self.persistent)?;
        tracing::info!("stopped; {how}");
        Ok(())
    }

    fn detach(&mut self) -> Result<(), DaemonError> {
        remove_enforcement(&self.config.pins)
            .map(|_| ())
            .map_err(|error| DaemonError::Socket(self.config.pins.clone(), error))
    }

    fn resolver(&mut self) -> Resolver<'_> {
        Resolver {
            directory: &self.directory,
            registry: &self.active.prepared.registry,
            patterns: &self.active.patterns,
            tree: &mut self.tree,
        }
    }

    fn count(&mut self, record: &Record) {
        match record.event.as_str() {
            "flow_opened" => self.flows.opened += 1,
            "flow_denied" => self.flows.denied += record.count.unwrap_or(1),
            "flow_closed" => self.flows.closed += 1,
            "flow_cut" => self.flows.cut += 1,
            _ => {}
        }
    }

    fn report(&mut self, record: Record) {
        let is_flow = record.event.starts_with("flow_");
        let Some(line) = self.sink.put(record) else { return };
        if is_flow {
            if self.recent.len() == RECENT {
                self.recent.pop_front();
            }
            self.recent.push_back(line.clone());
        }
        // Nobody listens: nothing is lost.
        let _ = self.follow.send(line);
    }

    fn report_loaded(&mut self, loaded: &crate::dataplane::writer::Loaded) {
        let message = format!("{} entries written in {} us", loaded.written, loaded.microseconds);
        let mut record = Record::about("policy_loaded", message);
        record.generation = Some(loaded.generation);
        self.report(record);
    }

    fn report_rejected(&mut self) {
        let errors = self.last_reload.errors.len();
        for error in &self.last_reload.errors {
            tracing::error!("policy refused:\n{error}");
        }
        let first = self.last_reload.errors.first().and_then(|e| e.lines().next()).unwrap_or_default().to_owned();
        let generation = self.generation();
        tracing::error!(errors, generation, "the policy is refused; the generation in force stays");
        let mut record = Record::about("policy_rejected", format!("{errors} errors; the first: {first}"));
        record.generation = Some(generation);
        self.report(record);
    }
}

/// The policy to begin with: the directory's, or, if that is bad, the one that was in force last.
fn first_policy(
    config: &Config,
    state: &State,
    persistent: &Persistent,
    trial: Option<&Trial>,
) -> Result<(Prepared, Reload), DaemonError> {
    let now = format_time(Timestamp::now());
    let (sources, _) = read_sources(&config.policy);
    if let Some(before) = trial.and_then(|trial| trial.instead_of(&sources)) {
        let before = Candidate::from_sources(before, &config.options, persistent.registry.clone(), clock::moment());
        if let Ok(prepared) = before.result {
            let errors = vec!["the policy in the directory was not confirmed: `authd apply` takes it".to_owned()];
            return Ok((prepared, Reload { ok: false, time: now, failures: 1, errors, ..Reload::default() }));
        }
    }
    let candidate =
        Candidate::from_directory(&config.policy, &config.options, persistent.registry.clone(), clock::moment());
    let diagnostics = match candidate.result {
        Ok(prepared) => return Ok((prepared, Reload { ok: true, time: now, successes: 1, ..Reload::default() })),
        Err(diagnostics) => diagnostics,
    };
    let Some(last) = state.policy()? else { return Err(DaemonError::Policy(diagnostics)) };
    let sources = trial.and_then(|trial| trial.instead_of(&last)).unwrap_or(last);
    let last = Candidate::from_sources(sources, &config.options, persistent.registry.clone(), clock::moment());
    let Ok(prepared) = last.result else { return Err(DaemonError::Policy(diagnostics)) };
    let errors = diagnostics.iter().map(|d| d.render(false)).collect();
    Ok((prepared, Reload { ok: false, time: now, failures: 1, errors, ..Reload::default() }))
}

pub(crate) fn classify(patterns: &Patterns, path: &str) -> Classification {
    let classified = patterns.classify(path);
    Classification { workload: classified.workload, open: classified.open, instance: patterns.instance_end(path) }
}

/// Detaches every program and removes all pins. Returns how many programs were detached.
pub fn remove_enforcement(pins: &std::path::Path) -> io::Result<usize> {
    let detached = attach::detach(pins)?;
    object::remove_maps(pins, |_| true);
    let _ = std::fs::remove_dir(pins);
    Ok(detached)
}
