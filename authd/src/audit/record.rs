//! Audit records: one JSON object per line, flat, with stable names.
//!
//! Enters: kernel events and the names that numbers stand for. Leaves: records. Never: secrets.

use std::net::IpAddr;

use authd_common::{
    event::{Event, direction, kind},
    reason::Reason,
    tables::{Conversation, ConversationKey, Denial, DenialKey, Dropped, Grant, PENDING, UNMANAGED, role, tag_flags},
    verdict::Action,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    dataplane::drops::DropKind,
    grants::proof::Told,
    policy::{
        file::Kind,
        network::{display, protocol_name},
    },
};

/// One record. Fields that do not apply are left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// Number of the record, from 1, without gaps in one target.
    pub seq: u64,
    /// RFC 3339, UTC, nanoseconds.
    pub time: String,
    pub event: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direction: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workload: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<Kind>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spiffe_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cgroup_id: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local_address: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local_port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remote_address: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remote_port: Option<u16>,
    /// The other end, if it is on this node: a workload's name, or `unmanaged`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_workload: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_spiffe_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_cgroup: Option<String>,
    /// The node that vouches for the other end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_node: Option<String>,
    /// With which of its keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_key_id: Option<u32>,
    /// Cookie of the socket, the same in all records of one flow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<u64>,
    /// Cookie of the network namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub netns: Option<u64>,
    /// `xdp`: refused at an interface, before the stack. Else at a socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hook: Option<String>,
    /// How many senders these packets had, where they are too many to name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sources: Option<u64>,
    /// How many like it this record stands for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_out: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_in: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packets_out: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packets_in: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub duration_ns: Option<u64>,
    /// Id of the grant that the verdict rests on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grant: Option<String>,
    /// What was proven, and refused if it is a refusal.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub proofs: Vec<Told>,
    /// Of a token that was issued: what it says, and the delegation of the policy by which.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub issued: Option<Told>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delegation: Option<String>,
    /// End of what was given, RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
    /// Public id of an API key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,
    /// Of a record about authd itself: what happened, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What records say of a workload.
#[derive(Clone, Debug)]
pub struct Who {
    pub name: String,
    pub kind: Option<Kind>,
    pub tenant: Option<String>,
    pub spiffe_id: Option<String>,
}

/// What the numbers of an event stand for.
pub trait Names {
    fn workload(&mut self, number: u32, cgroup: u64) -> Option<Who>;
    fn rule(&self, number: u32) -> Option<String>;
    fn cgroup(&mut self, id: u64) -> Option<String>;
    fn grant(&self, grant: Grant) -> Option<String>;
    /// Node and SPIFFE ID of a caller for whom another node vouches.
    fn caller(&self, label: u32) -> Option<(String, String)>;
}

/// Names of event kinds, as records have them.
pub fn event_name(of: u8) -> &'static str {
    match of {
        kind::OPENED => "flow_opened",
        kind::DENIED => "flow_denied",
        kind::CUT => "flow_cut",
        kind::RESUMED => "flow_resumed",
        kind::CLOSED => "flow_closed",
        kind::HELD => "flow_held",
        kind::REGRANTED => "flow_regranted",
        _ => "unknown",
    }
}

/// From the monotonic clock to the one of people, as they stand to each other now.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// ns since 1970 at which the monotonic clock was 0.
    pub offset: i128,
}

impl Clock {
    pub fn time(&self, monotonic: u64) -> Timestamp {
        Timestamp::from_nanosecond(self.offset + i128::from(monotonic)).unwrap_or(Timestamp::UNIX_EPOCH)
    }
}

impl Record {
    /// A record about authd itself.
    pub fn about(event: &str, message: impl Into<String>) -> Self {
        Self {
            event: event.to_owned(),
            time: format_time(Timestamp::now()),
            message: Some(message.into()),
            ..Self::default()
        }
    }

    /// A record whose fields say it all.
    pub fn event(event: &str) -> Self {
        Self { event: event.to_owned(), time: format_time(Timestamp::now()), ..Self::default() }
    }

    /// What the kernel told.
    pub fn of_event(e: &Event, clock: &Clock, names: &mut dyn Names) -> Self {
        let mut record = Self {
            time: format_time(clock.time(e.time)),
            event: event_name(e.kind).to_owned(),
            verdict: Some(Action::from_code(e.action).name().to_owned()),
            reason: Some(reason_name(e.reason)),
            rule: names.rule(e.rule),
            generation: Some(e.generation),
            direction: Some(direction_name(e.direction)),
            protocol: Some(protocol_name(e.protocol)),
            cgroup_id: Some(e.cgroup),
            pid: (e.pid != 0).then_some(e.pid),
            uid: (e.pid != 0).then_some(e.uid),
            command: command(&e.comm),
            local_address: known(&e.local),
            local_port: (e.local_port != 0).then_some(e.local_port),
            remote_address: known(&e.remote),
            remote_port: (e.remote_port != 0).then_some(e.remote_port),
            socket: (e.cookie != 0).then_some(e.cookie),
            netns: (e.netns != 0).then_some(e.netns),
            grant: names.grant(e.grant),
            ..Self::default()
        };
        record.identify(e.workload, e.cgroup, names);
        if e.flags & tag_flags::VOUCHED != 0 {
            record.identify_caller(e.peer_workload, Some(e.peer_cgroup), names);
        } else {
            record.identify_peer(e.peer_workload, e.peer_cgroup, names);
        }
        if e.flags & tag_flags::PEER_LOCAL != 0 && e.peer_workload == UNMANAGED {
            record.peer_workload = Some("unmanaged".to_owned());
        }
        match e.kind {
            kind::DENIED => record.count = Some(e.count),
            kind::CLOSED => {
                record.bytes_out = Some(e.bytes_out);
                record.bytes_in = Some(e.bytes_in);
                record.packets_out = Some(e.packets_out);
                record.packets_in = Some(e.packets_in);
                record.duration_ns = Some(e.duration);
            }
            _ => {}
        }
        record
    }

    /// The end of an exchange that has no end of its own: it was idle for long.
    pub fn of_conversation(key: &ConversationKey, c: &Conversation, clock: &Clock, names: &mut dyn Names) -> Self {
        let out = c.role == role::CLIENT;
        let mut record = Self {
            time: format_time(clock.time(c.last_seen)),
            event: event_name(kind::CLOSED).to_owned(),
            verdict: Some(Action::from_code(c.action).name().to_owned()),
            reason: Some(reason_name(c.reason)),
            rule: names.rule(c.rule),
            generation: Some(c.generation),
            direction: Some(direction_name(if out { direction::OUT } else { direction::IN })),
            protocol: Some(protocol_name(key.protocol)),
            cgroup_id: Some(c.cgroup),
            pid: (c.pid != 0).then_some(c.pid),
            uid: (c.pid != 0).then_some(c.uid),
            command: command(&c.comm),
            local_address: known(&c.local),
            local_port: (c.local_port != 0).then_some(c.local_port),
            remote_address: known(&key.remote),
            remote_port: (key.remote_port != 0).then_some(key.remote_port),
            socket: Some(key.cookie),
            netns: (c.netns != 0).then_some(c.netns),
            grant: names.grant(c.grant),
            bytes_out: Some(c.bytes_out),
            bytes_in: Some(c.bytes_in),
            packets_out: Some(c.packets_out),
            packets_in: Some(c.packets_in),
            duration_ns: Some(c.last_seen.saturating_sub(c.opened)),
            ..Self::default()
        };
        record.identify(c.workload, c.cgroup, names);
        record.identify_peer(c.peer_workload, c.peer_cgroup, names);
        record
    }

    /// Denials that were repeated and not told one by one.
    pub fn of_denial(key: &DenialKey, denial: &Denial, clock: &Clock, now: u64, names: &mut dyn Names) -> Self {
        let out = key.direction == direction::OUT;
        let port = (key.port != 0).then_some(key.port);
        let mut record = Self {
            time: format_time(clock.time(now)),
            event: event_name(kind::DENIED).to_owned(),
            verdict: Some(Action::from_code(key.action).name().to_owned()),
            reason: Some(reason_name(key.reason)),
            rule: names.rule(denial.rule),
            generation: Some(denial.generation),
            direction: Some(direction_name(key.direction)),
            protocol: Some(protocol_name(key.protocol)),
            cgroup_id: Some(key.cgroup),
            local_port: port.filter(|_| !out),
            remote_address: known(&key.remote),
            remote_port: port.filter(|_| out),
            count: Some(denial.untold),
            ..Self::default()
        };
        record.identify(denial.workload, key.cgroup, names);
        if key.flags & tag_flags::VOUCHED != 0 {
            record.identify_caller(denial.peer_workload, None, names);
        } else {
            record.identify_peer(denial.peer_workload, 0, names);
        }
        record
    }

    /// Packets of one kind that an interface dropped.
    pub fn of_drop(kind: &DropKind, dropped: &Dropped, clock: &Clock, names: &mut dyn Names) -> Self {
        let single = dropped.packets == 1 && kind.ends.is_some();
        let mut record = Self {
            time: format_time(clock.time(dropped.last)),
            event: event_name(kind::DENIED).to_owned(),
            verdict: Some(Action::Deny.name().to_owned()),
            reason: Some(reason_name(kind.reason)),
            generation: Some(dropped.generation),
            direction: Some(direction_name(direction::IN)),
            protocol: kind.port.map(|(protocol, _)| protocol_name(protocol)),
            local_port: kind.port.map(|(_, port)| port),
            remote_address: kind.ends.as_ref().and_then(|ends| known(&ends.0)),
            remote_port: single.then_some(dropped.source_port),
            hook: Some("xdp".to_owned()),
            count: Some(dropped.packets),
            sources: kind.sources,
            bytes_in: Some(dropped.bytes),
            duration_ns: (!single).then(|| dropped.last.saturating_sub(dropped.first)),
            ..Self::default()
        };
        if let Some((_, destination)) = &kind.ends {
            record.rule = names.rule(dropped.rule);
            record.local_address = known(destination);
        }
        if kind.port.is_some() {
            record.identify(dropped.workload, 0, names);
        }
        record
    }

    fn identify(&mut self, workload: u32, cgroup: u64, names: &mut dyn Names) {
        self.cgroup = names.cgroup(cgroup);
        if let Some(who) = names.workload(workload, cgroup) {
            self.workload = Some(who.name);
            self.kind = who.kind;
            self.tenant = who.tenant;
            self.spiffe_id = who.spiffe_id;
        }
    }

    /// A caller for whom another node vouches.
    fn identify_caller(&mut self, label: u32, key_id: Option<u64>, names: &dyn Names) {
        self.peer_key_id = key_id.and_then(|id| id.try_into().ok());
        if let Some((node, spiffe_id)) = names.caller(label) {
            self.peer_node = Some(node);
            self.peer_spiffe_id = Some(spiffe_id);
        }
    }

    fn identify_peer(&mut self, workload: u32, cgroup: u64, names: &mut dyn Names) {
        if workload == UNMANAGED {
            return;
        }
        self.peer_cgroup = names.cgroup(cgroup);
        if let Some(who) = names.workload(workload, cgroup) {
            self.peer_workload = Some(who.name);
            self.peer_spiffe_id = who.spiffe_id;
        }
    }
}

/// RFC 3339 in UTC with nine digits, so that lines sort as text.
pub fn format_time(time: Timestamp) -> String {
    format!("{time:.9}")
}

/// How records name the workload of a cgroup that is not known yet.
pub const PENDING_NAME: &str = "pending";

pub fn is_pending(number: u32) -> bool {
    number == PENDING
}

fn reason_name(code: u16) -> String {
    Reason::from_code(code).map_or_else(|| format!("reason_{code}"), |reason| reason.name().to_owned())
}

fn direction_name(of: u8) -> String {
    if of == direction::IN { "inbound" } else { "outbound" }.to_owned()
}

fn known(address: &authd_common::address::Address) -> Option<IpAddr> {
    (*address != authd_common::address::Address::UNSPECIFIED).then(|| display(address))
}

/// The task's name: up to 15 bytes, which the task itself chose.
fn command(comm: &[u64; 2]) -> Option<String> {
    let bytes: Vec<u8> = comm.iter().flat_map(|word| word.to_ne_bytes()).take_while(|byte| *byte != 0).collect();
    (!bytes.is_empty()).then(|| String::from_utf8_lossy(&bytes).into_owned())
}
