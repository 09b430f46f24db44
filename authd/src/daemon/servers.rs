//! MCP servers that the policy starts: for whom, how many, and what is recorded of them.
//!
//! Enters: that control wants one for a caller. Leaves: a process of its own user in a cgroup of its own, and for control the ends
//! of its pipes. Never: a command, user or environment that the policy in force does not name.

mod process;

use std::{
    collections::HashMap,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    thread,
    time::Instant,
};

use jiff::Timestamp;
use tokio::{runtime::Handle, sync::mpsc};

use self::process::{Plan, StartError};
use super::{
    Daemon,
    control::{Control, Who},
    granting::{refusal, revoked_reason},
    issuing::Actor,
};
use crate::{
    audit::record::Record,
    grants::{
        Id,
        proof::{self, Shown},
    },
    ipc::{Question, Refusal, ToControl},
    policy::model::{self, Reach},
    store::revoked::Revoked,
};

/// Servers at one time.
const MAX_SERVERS: usize = 256;
/// Of these, for one instance of a workload, with whatever cgroups it makes below its own.
const MAX_PER_CALLER: usize = 16;
/// And for all instances of a workload: others need some too.
const MAX_PER_WORKLOAD: usize = MAX_SERVERS / 4;

/// All that run.
pub struct Servers {
    /// The cgroup below which each has its own: `NAME/ID`.
    cgroup: PathBuf,
    running: HashMap<Id, Running>,
    events: mpsc::UnboundedSender<Event>,
}

struct Running {
    name: String,
    caller: Who,
    /// Whose: SPIFFE ID, and workload.
    actor: (String, String),
    began: Instant,
    /// What control asked, until it is answered. Another process of its kind has asked other things under the same numbers.
    asked: Option<Question>,
}

const UNMANAGED: &str = "no workload of the policy matches the server's cgroup, and it would reach everything: add a `[[workload]]` that does";

/// A caller that may use a server.
pub struct Admitted {
    /// Where the policy has the server.
    pub at: usize,
    pub actor: Actor,
    /// By which it acts for somebody, as this node remembers it.
    pub token: Option<proof::Token>,
    /// By whose revocation it ends that it may.
    pub ends_with: Vec<(Revoked, Option<Timestamp>)>,
}

/// What became of one.
pub enum Event {
    Started { id: Id, result: Result<(u32, [OwnedFd; 3]), StartError> },
    Ended { id: Id, how: String },
}

impl Servers {
    /// What a daemon left here that could not end them is ended.
    pub fn new(cgroup: PathBuf) -> Self {
        if let Err(error) = process::clear(&cgroup) {
            tracing::warn!(%error, cgroup = %cgroup.display(), "MCP servers of the daemon before are left");
        }
        // Nobody hears it yet, and nothing is started yet.
        let (events, _) = mpsc::unbounded_channel();
        Self { cgroup, running: HashMap::new(), events }
    }

    /// Those that run, or are being started.
    pub fn len(&self) -> usize {
        self.running.len()
    }

    pub fn end(&self) {
        if let Err(error) = process::clear(&self.cgroup) {
            tracing::warn!(%error, cgroup = %self.cgroup.display(), "MCP servers are left");
        }
    }

    fn admits(&self, actor: &Actor) -> Result<(), Refusal> {
        let count =
            |is_same: &dyn Fn(&Running) -> bool| self.running.values().filter(|running| is_same(running)).count();
        if count(&|running| running.actor.0 == actor.spiffe_id) >= MAX_PER_CALLER {
            let message = format!("{MAX_PER_CALLER} servers run for this agent: end a session first");
            return Err(refusal("mcp_servers_full", message));
        }
        if count(&|running| running.actor.1 == actor.share) >= MAX_PER_WORKLOAD || self.running.len() >= MAX_SERVERS {
            let message = "as many servers run for agents of this workload, or on this node, as may: try again later";
            return Err(refusal("mcp_servers_full", message));
        }
        Ok(())
    }

    /// Nobody is there any more whom a server that is being started could be given to.
    pub fn control_ended(&mut self) {
        self.running.values_mut().for_each(|running| running.asked = None);
    }

    /// A cgroup for one more.
    fn place(&self, name: &str, id: Id) -> io::Result<PathBuf> {
        let of_name = self.cgroup.join(name);
        let cgroup = of_name.join(id.to_string());
        fs::create_dir_all(&cgroup)?;
        process::share(&self.cgroup);
        process::share(&of_name);
        process::bound(&cgroup);
        Ok(cgroup)
    }
}

impl Daemon {
    /// For the loop, which hands them to [`Daemon::server_happened`].
    pub(super) fn server_events(&mut self) -> mpsc::UnboundedReceiver<Event> {
        let (events, heard) = mpsc::unbounded_channel();
        self.servers.events = events;
        heard
    }

    /// Begins to start a server for a caller. Control is told when that is done, or has failed.
    pub fn launch(&mut self, who: &Who, question: Question, server: &str) -> Result<(), Refusal> {
        let (plan, actor) = self.plan(who, server)?;
        self.servers.admits(&actor)?;
        let unusable = |error: String| {
            tracing::error!(server, error, "this MCP server cannot be started");
            refusal("mcp_server_unusable", "the server cannot be started; the log says why")
        };
        let id = Id::random().map_err(|error| unusable(error.to_string()))?;
        let cgroup = self.servers.place(server, id).map_err(|error| unusable(error.to_string()))?;
        // The kernel knows who it is before it is there.
        self.follow_cgroups().map_err(|error| unusable(error.to_string()))?;
        if !self.is_a_workloads(&cgroup) {
            let _ = fs::remove_dir(&cgroup);
            let message = format!("{server}: {UNMANAGED}");
            self.server_refused(who, "mcp_server_unmanaged", &message);
            return Err(refusal("mcp_server_unmanaged", UNMANAGED));
        }
        let (events, name) = (self.servers.events.clone(), server.to_owned());
        let (runtime, place) = (Handle::current(), cgroup.clone());
        let begin = move || {
            let _entered = runtime.enter();
            let started = process::start(&plan, &cgroup);
            let (result, process) = match started {
                Ok((process, ends)) => (Ok((process.pid(), ends)), Some(process)),
                Err(error) => (Err(error), None),
            };
            // The loop has ended: so do all servers.
            let _ = events.send(Event::Started { id, result });
            tokio::spawn(async move {
                let how = match process {
                    Some(process) => process.watch(&name).await,
                    None => "it did not start".to_owned(),
                };
                process::remove(&cgroup).await;
                let _ = events.send(Event::Ended { id, how });
            });
        };
        // Looking a user up can take long. The runtime would panic where there is no thread to be had.
        if let Err(error) = thread::Builder::new().name("authd-server".to_owned()).spawn(begin) {
            tokio::spawn(async move { process::remove(&place).await });
            return Err(unusable(error.to_string()));
        }
        let running = Running {
            name: server.to_owned(),
            caller: who.clone(),
            actor: (actor.spiffe_id, actor.share),
            began: Instant::now(),
            asked: Some(question),
        };
        self.servers.running.insert(id, running);
        Ok(())
    }

    /// What to start, if the policy has it and the caller may call a tool of it.
    fn plan(&self, who: &Who, server: &str) -> Result<(Plan, Actor), Refusal> {
        let Admitted { at, actor, .. } = self.admit_to_server(who, server, None)?;
        match &self.active.prepared.model.mcp_servers[at].reach {
            Reach::Command { argv, user, environment } => {
                Ok((Plan { argv: argv.clone(), user: user.clone(), environment: environment.clone() }, actor))
            }
            Reach::Url(_) => Err(refusal("mcp_server_unknown", "the policy has no such server that is started")),
        }
    }

    /// Whether a workload of this node may use a server of the policy now: for itself, or by a token of this node's own.
    pub fn admit_to_server(&self, who: &Who, server: &str, token: Option<proof::Token>) -> Result<Admitted, Refusal> {
        let actor = self.actor(who, None)?;
        let [model::Actor::Workload(index)] = actor.named[..] else {
            return Err(refusal("caller_not_local", "workloads ask on their own node's socket"));
        };
        let model = &self.active.prepared.model;
        let at = model.mcp_servers.iter().position(|known| known.name == server);
        let at = at.ok_or_else(|| refusal("mcp_server_unknown", "the policy has no such MCP server"))?;
        let callable = model.actions.may_call(index);
        if !model.tools.iter().any(|tool| tool.server == Some(at) && callable.contains(&tool.name.as_str())) {
            return Err(refusal("mcp_server_not_allowed", "no policy lets the caller call a tool of this server"));
        }
        let mut proofs: Vec<Shown> = token.into_iter().map(|token| Shown::Token(Box::new(token))).collect();
        self.complete_all(&mut proofs, Some(&actor.spiffe_id))?;
        self.only_own(&proofs)?;
        let now = Timestamp::now();
        let token = proofs.into_iter().find_map(|shown| match shown {
            Shown::Token(token) => Some(*token),
            _ => None,
        });
        if token.as_ref().is_some_and(|token| token.not_after <= now) {
            return Err(refusal("token_expired", "the token has expired"));
        }
        let shown = token.iter().flat_map(|token| Shown::Token(Box::new(token.clone())).revocable());
        let ends_with: Vec<_> = shown.chain(actor.names.iter().map(|name| (name.clone(), Some(now)))).collect();
        let trust = self.trust.as_ref().map_err(|error| refusal("store_unusable", error))?;
        if let Some((found, _)) = ends_with.iter().find(|(name, since)| trust.is_revoked(name, *since)) {
            return Err(refusal(revoked_reason(found), format!("{} was revoked", found.kind())));
        }
        Ok(Admitted { at, actor, token, ends_with })
    }

    pub(super) fn server_happened(&mut self, control: &mut Control, event: Event) {
        match event {
            Event::Started { id, result } => self.server_started(control, id, result),
            Event::Ended { id, how } => {
                let Some(Running { name, caller, began, .. }) = self.servers.running.remove(&id) else { return };
                let mut record = Record::event("mcp_server_ended");
                record.duration_ns = Some(u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX));
                record.message = Some(format!("{name}/{id}: {how}"));
                self.describe(&caller, &mut record);
                self.report(record);
            }
        }
    }

    /// Ends servers that are nobody's any more under the policy in force.
    pub(super) fn end_unmanaged_servers(&self) {
        for (id, running) in &self.servers.running {
            let cgroup = self.servers.cgroup.join(&running.name).join(id.to_string());
            if self.is_a_workloads(&cgroup) {
                continue;
            }
            tracing::error!(server = running.name, "ending an MCP server: {UNMANAGED}");
            if let Err(error) = process::kill_all(&cgroup) {
                tracing::error!(server = running.name, %error, "this MCP server goes on");
            }
        }
    }

    /// Whether rules say what a cgroup of a server's may reach.
    fn is_a_workloads(&self, cgroup: &Path) -> bool {
        let below = cgroup.strip_prefix(&self.base.path).ok().and_then(Path::to_str);
        below.is_some_and(|below| self.instance_at(&format!("/{below}")).is_some())
    }

    fn server_refused(&mut self, who: &Who, reason: &str, message: &str) {
        tracing::error!(reason, message, "an MCP server is not started");
        let mut record = Record::event("mcp_server_started");
        record.verdict = Some("denied".to_owned());
        record.reason = Some(reason.to_owned());
        record.message = Some(message.to_owned());
        self.describe(who, &mut record);
        self.report(record);
    }

    fn server_started(&mut self, control: &mut Control, id: Id, result: Result<(u32, [OwnedFd; 3]), StartError>) {
        let Some(Running { name, caller, asked, .. }) = self.servers.running.get_mut(&id) else { return };
        // Without anybody who asks, its pipes are closed here, by which it ends.
        let Some(question) = asked.take() else { return };
        let mut record = Record::event("mcp_server_started");
        match result {
            Ok((pid, ends)) => {
                let [input, output, life] = &ends;
                control.tell(&ToControl::Launched { question }, &[input.as_fd(), output.as_fd(), life.as_fd()]);
                record.verdict = Some("allowed".to_owned());
                record.message = Some(format!("{name}/{id}: process {pid}"));
            }
            Err(error) => {
                let refusal = refusal("mcp_server_unusable", "the server cannot be started; the log says why");
                control.tell(&ToControl::NotGranted { question, refusal }, &[]);
                let (caller, message) = (caller.clone(), format!("{name}: {error}"));
                return self.server_refused(&caller, "mcp_server_unusable", &message);
            }
        }
        let caller = caller.clone();
        self.describe(&caller, &mut record);
        self.report(record);
        // Another policy may be in force since.
        self.end_unmanaged_servers();
    }
}

/// Where servers have their cgroups.
pub fn cgroup(base: &Path, configured: &str) -> PathBuf {
    base.join(configured.trim_start_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn actor(number: usize, workload: &str) -> Actor {
        Actor {
            named: Vec::new(),
            spiffe_id: format!("spiffe://example.org/{workload}/{number}"),
            share: format!("workload {workload}"),
            tenant: None,
            names: Vec::new(),
        }
    }

    fn run(servers: &mut Servers, actor: &Actor) -> Result<(), Refusal> {
        servers.admits(actor)?;
        let running = Running {
            name: "tools".to_owned(),
            caller: Who::Admin { uid: 0, cgroup: None },
            actor: (actor.spiffe_id.clone(), actor.share.clone()),
            began: Instant::now(),
            asked: Some(1),
        };
        servers.running.insert(Id::random().unwrap(), running);
        Ok(())
    }

    #[test]
    fn one_workload_leaves_servers_to_others() {
        let mut servers = Servers::new(std::env::temp_dir().join("authd-no-such-cgroup"));
        let one = actor(0, "many");
        for _ in 0..MAX_PER_CALLER {
            run(&mut servers, &one).unwrap();
        }
        assert_eq!(run(&mut servers, &one).unwrap_err().reason, "mcp_servers_full");
        let begun = (1..MAX_SERVERS).take_while(|number| run(&mut servers, &actor(*number, "many")).is_ok()).count();
        assert_eq!(begun + MAX_PER_CALLER, MAX_PER_WORKLOAD);
        run(&mut servers, &actor(0, "other")).unwrap();
    }

    #[test]
    fn what_a_control_process_asked_the_next_one_is_not_answered() {
        let mut servers = Servers::new(std::env::temp_dir().join("authd-no-such-cgroup"));
        run(&mut servers, &actor(0, "agent")).unwrap();
        servers.control_ended();
        assert!(servers.running.values().all(|running| running.asked.is_none()));
    }
}
