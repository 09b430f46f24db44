//! The verdict function: the same code in the kernel, in `authd explain` and in the tests.
//!
//! Enters: who, where to (or where from), and tables. Leaves: a [`Verdict`]. Never: counting, writing, caching.

use crate::{
    address::Address,
    parse::{Packet, packet_flags},
    reason::Reason,
    syn::Heard,
    tables::{
        ALTERNATIVES, ANY_CLASS, ANY_PORT_CLASS, Cell, CellKey, Grant, GrantKey, NO_RULE, PENDING, Phase, Root, Tables,
        UNMANAGED, VouchedKey, WorkloadEntry, path, phase_flags, port_flags, root_flags, workload_flags,
    },
};

/// A flow that lacks a grant is decided again after so many ns: one may have been given meanwhile, and gives no sign.
pub const LOOK_AGAIN: u64 = 100_000_000;

/// What happens to the flow. The codes are part of the layout of cells, tags and events.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Action {
    Allow = 1,
    Deny = 2,
    /// It would be denied, but a mode says to let it pass and record it.
    Observe = 3,
}

impl Action {
    #[inline(always)]
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// Anything that is not a known pass is a denial.
    #[inline(always)]
    pub const fn from_code(code: u8) -> Self {
        match code {
            1 => Action::Allow,
            3 => Action::Observe,
            _ => Action::Deny,
        }
    }

    #[inline(always)]
    pub const fn passes(self) -> bool {
        !matches!(self, Action::Deny)
    }

    pub const fn name(self) -> &'static str {
        match self {
            Action::Allow => "allowed",
            Action::Deny => "denied",
            Action::Observe => "observed",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Verdict {
    pub action: Action,
    pub reason: Reason,
    /// Number of the rule that decided, or [`NO_RULE`].
    pub rule: u32,
    /// When it ends by itself, in ns of the coarse monotonic clock; 0: it does not.
    pub until: u64,
    /// What it rests on; it holds no longer than this grant. Of a denial: what it rested on before.
    pub grant: Grant,
    /// A denial that may wait for a grant.
    pub hold: bool,
}

impl Verdict {
    #[inline(always)]
    const fn new(action: Action, reason: Reason) -> Self {
        Self { action, reason, rule: NO_RULE, until: 0, grant: Grant::NONE, hold: false }
    }

    #[inline(always)]
    pub const fn allow(reason: Reason) -> Self {
        Self::new(Action::Allow, reason)
    }

    #[inline(always)]
    pub const fn deny(reason: Reason) -> Self {
        Self::new(Action::Deny, reason)
    }

    /// A denial, unless the node or the workload is only observed.
    #[inline(always)]
    pub const fn refuse(reason: Reason, root: &Root, workload: &WorkloadEntry) -> Self {
        let observed = root.flags & root_flags::OBSERVE != 0 || workload.flags & workload_flags::OBSERVE != 0;
        let action = if observed { Action::Observe } else { Action::Deny };
        Self::new(action, reason)
    }

    /// Of two verdicts of which both must pass, the one to follow.
    #[inline(always)]
    pub const fn and(self, other: Self) -> Self {
        match (self.action, other.action) {
            (Action::Deny, _) => self,
            (_, Action::Deny) => other,
            (Action::Observe, _) => self,
            (_, Action::Observe) => other,
            _ if !self.grant.is_some() => other,
            _ => self,
        }
    }

    /// The same verdict of a flow that rested on a grant before: it says what became of that.
    #[inline(always)]
    pub fn after(self, before: Grant, tables: &impl Tables) -> Self {
        let lacks =
            self.reason.code() == Reason::ProofRequired.code() || self.reason.code() == Reason::CallerNotNamed.code();
        if !before.is_some() || self.action != Action::Deny || !lacks {
            return self;
        }
        // Ending a grant leaves a zero in its slot; one that came to its end leaves the time, or has a successor.
        let revoked = matches!(tables.slot(before.slot), Some(slot) if slot.serial == before.serial && slot.until == 0);
        let reason = if revoked { Reason::GrantRevoked } else { Reason::GrantExpired };
        Self { reason, grant: before, hold: false, ..self }
    }
}

/// Who opens a flow from this node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Opener {
    pub workload: u32,
    /// [`crate::tables::IdentityEntry::instance`].
    pub instance: u64,
}

/// The far end of an inbound flow. Every field has a value: the form that the kernel's verifier can follow. In the kernel
/// `workload` is veiled ([`Root::veiled`]), and what else is branched on is in the second half of a word.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FarEnd {
    pub address: Address,
    /// Its cgroup, if it is on this node and managed.
    pub cgroup: u64,
    /// Its instance, if it is on this node; else the cookie of the network namespace in which its address is meant.
    pub scope: u64,
    /// Its workload, if it is on this node.
    pub workload: u32,
    /// A process of this node: its address says nothing.
    pub on_node: bool,
    /// Code of the reason for which no other node vouches for it.
    pub lacking: u16,
    /// The id of the key by which one does.
    pub key_id: u32,
    /// Its label, if another node vouches for it.
    pub label: u32,
}
const _: () = assert!(size_of::<FarEnd>() == 48);
const _: () = assert!(core::mem::offset_of!(FarEnd, on_node) % 8 >= 4);
const _: () = assert!(core::mem::offset_of!(FarEnd, lacking) % 8 >= 4);
const _: () = assert!(core::mem::offset_of!(FarEnd, label) % 8 >= 4);

impl FarEnd {
    /// A process of this node.
    pub const fn local(workload: u32, instance: u64) -> Self {
        Self { workload, scope: instance, on_node: true, ..Self::somewhere(Address::UNSPECIFIED, 0) }
    }

    /// Known only by its address, as one network namespace means it.
    pub const fn remote(address: Address, netns: u64) -> Self {
        Self::somewhere(address, netns)
    }

    /// Nobody vouches for it.
    const fn somewhere(address: Address, scope: u64) -> Self {
        let lacking = Reason::NodeIdentityMissing.code();
        Self { address, cgroup: 0, scope, workload: UNMANAGED, on_node: false, key_id: 0, label: 0, lacking }
    }

    /// The same, as its connection's SYN introduces it.
    #[inline(always)]
    pub fn introduce(&mut self, heard: &Heard) {
        self.key_id = heard.key_id;
        self.label = heard.label;
        self.lacking = heard.lacking as u16;
    }
}

/// May `opener` open a flow to `remote`?
#[inline(always)]
pub fn decide_out(
    tables: &impl Tables,
    root: &Root,
    opener: &Opener,
    remote: &Address,
    protocol: u8,
    port: u16,
) -> Verdict {
    let workload = opener.workload;
    let entry = match entry_of(tables, root, workload) {
        Ok(entry) => entry,
        Err(verdict) => return verdict,
    };
    let at = tables.port(root, protocol, port).class;
    let mut key = CellKey {
        epoch: root.cells,
        subject: entry.class,
        object: tables.address_class(root, remote),
        port: at,
        path: path::OUT,
        reserved: 0,
    };
    let Some(cell) = most_exact(tables, &mut key, at) else { return Verdict::refuse(Reason::NoRule, root, &entry) };
    let holder = GrantKey { rule: NO_RULE, workload, scope: opener.instance, address: Address::UNSPECIFIED };
    current(tables, root, &entry, cell, holder, &NOBODY)
}

/// Nobody vouches for who opens a flow here, and need not.
static NOBODY: FarEnd = FarEnd::remote(Address::UNSPECIFIED, 0);

/// From the workload's own cells to everybody's, each from the most exact to the least: the first there is holds.
#[inline(always)]
fn most_exact<'a>(tables: &'a impl Tables, key: &mut CellKey, at: u16) -> Option<&'a Cell> {
    let object = key.object;
    if let Some(cell) = tables.cell(key) {
        return Some(cell);
    }
    key.port = ANY_PORT_CLASS;
    if let Some(cell) = tables.cell(key) {
        return Some(cell);
    }
    key.object = ANY_CLASS;
    if let Some(cell) = tables.cell(key) {
        return Some(cell);
    }
    key.subject = ANY_CLASS;
    key.object = object;
    key.port = at;
    if let Some(cell) = tables.cell(key) {
        return Some(cell);
    }
    key.port = ANY_PORT_CLASS;
    if let Some(cell) = tables.cell(key) {
        return Some(cell);
    }
    key.object = ANY_CLASS;
    tables.cell(key)
}

/// May the far end open a flow to `workload`, on its local `port`?
#[inline(always)]
pub fn decide_in(tables: &impl Tables, root: &Root, workload: u32, far: &FarEnd, protocol: u8, port: u16) -> Verdict {
    let entry = match entry_of(tables, root, workload) {
        Ok(entry) => entry,
        Err(verdict) => return verdict,
    };
    let at = tables.port(root, protocol, port);
    let mut key =
        CellKey { epoch: root.cells, subject: 0, object: entry.class, port: at.class, path: path::GUARD, reserved: 0 };
    if at.flags & port_flags::FAILSAFE != 0 && entry.flags & workload_flags::FAILSAFE != 0 {
        return Verdict::allow(Reason::Failsafe);
    }
    let mut guarded = at.flags & port_flags::GUARDED != 0;
    if guarded && tables.cell(&key).is_none() {
        key.port = ANY_PORT_CLASS;
        guarded = tables.cell(&key).is_some();
    }
    if !guarded {
        return if entry.flags & workload_flags::CLOSED == 0 {
            Verdict::allow(Reason::Unguarded)
        } else {
            Verdict::refuse(Reason::InboundClosed, root, &entry)
        };
    }
    let mut holder = GrantKey { rule: NO_RULE, workload: UNMANAGED, scope: far.scope, address: Address::UNSPECIFIED };
    if far.on_node {
        if far.workload == PENDING {
            return Verdict::refuse(Reason::IdentityPending, root, &entry);
        }
        key.path = path::IN_LOCAL;
        // A workload that this generation no longer has is unmanaged.
        key.subject = tables.workload(root, far.workload).map_or(0, |w| w.class);
        holder.workload = far.workload;
    } else {
        key.path = path::IN_REMOTE;
        key.subject = tables.address_class(root, &far.address);
        holder.address = far.address;
    }
    let mut cell = tables.cell(&key);
    if cell.is_none() {
        key.subject = ANY_CLASS;
        cell = tables.cell(&key);
    }
    match cell {
        Some(cell) => current(tables, root, &entry, cell, holder, far),
        None => Verdict::refuse(Reason::NoRule, root, &entry),
    }
}

/// An outbound packet that opens a flow, or of which nothing is remembered.
#[inline(always)]
pub fn decide_packet_out(
    tables: &impl Tables,
    root: &Root,
    opener: &Opener,
    packet: &Result<Packet, Reason>,
) -> Verdict {
    let packet = match sound(tables, root, opener.workload, packet, packet_flags::UNFIT_OUT) {
        Ok(packet) => packet,
        Err(verdict) => return verdict,
    };
    decide_out(tables, root, opener, &packet.destination, packet.protocol, packet.destination_port)
}

/// An inbound packet that opens a flow, or of which nothing is remembered.
#[inline(always)]
pub fn decide_packet_in(
    tables: &impl Tables,
    root: &Root,
    workload: u32,
    packet: &Result<Packet, Reason>,
    far: &FarEnd,
) -> Verdict {
    let packet = match sound(tables, root, workload, packet, packet_flags::UNFIT_IN) {
        Ok(packet) => packet,
        Err(verdict) => return verdict,
    };
    decide_in(tables, root, workload, far, packet.protocol, packet.destination_port)
}

/// The packet, if its headers can be trusted to say where it goes.
#[inline(always)]
fn sound<'a>(
    tables: &impl Tables,
    root: &Root,
    workload: u32,
    packet: &'a Result<Packet, Reason>,
    unfit: u8,
) -> Result<&'a Packet, Verdict> {
    let reason = match packet {
        Ok(packet) => match packet.unfit(unfit) {
            None => return Ok(packet),
            Some(reason) => reason,
        },
        Err(reason) => *reason,
    };
    let entry = entry_of(tables, root, workload)?;
    Err(Verdict::refuse(reason, root, &entry))
}

/// The workload's entry, or the verdict that needs none.
#[inline(always)]
fn entry_of(tables: &impl Tables, root: &Root, workload: u32) -> Result<WorkloadEntry, Verdict> {
    match workload {
        UNMANAGED => Err(Verdict::allow(Reason::Unmanaged)),
        PENDING => Err(Verdict::refuse(Reason::IdentityPending, root, &WorkloadEntry::default())),
        workload => tables.workload(root, workload).ok_or(Verdict::allow(Reason::Unmanaged)),
    }
}

/// The phase of a cell that holds now. Cells say what the rules say; whether a denial blocks also depends on the modes of
/// node and workload, and whether proofs were shown, on the grants of the caller (`holder`, without a rule; or `far`, if another
/// node vouches for it).
#[inline(always)]
fn current(
    tables: &impl Tables,
    root: &Root,
    workload: &WorkloadEntry,
    cell: &Cell,
    mut holder: GrantKey,
    far: &FarEnd,
) -> Verdict {
    let mut phase = &cell.first;
    let mut until = cell.first_until;
    if until != 0 {
        let now = tables.now();
        if now >= until {
            phase = &cell.second;
            until = cell.second_until;
            if until != 0 && now >= until {
                return Verdict { rule: cell.second.rule, ..Verdict::refuse(Reason::ScheduleStale, root, workload) };
            }
        }
    }
    let reason = Reason::from_code(phase.reason).unwrap_or(Reason::NoGeneration);
    let mut verdict = Verdict { rule: phase.rule, until, ..Verdict::refuse(reason, root, workload) };
    let action = Action::from_code(phase.action);
    if action.passes() {
        verdict.action = action;
    }
    if phase.granted_by[0] == NO_RULE && phase.vouched == 0 {
        return verdict;
    }
    let now = tables.now();
    let mut at = 0;
    while at < ALTERNATIVES {
        holder.rule = phase.granted_by[at];
        if holder.rule == NO_RULE {
            break;
        }
        if let Some(grant) = tables.grant(&holder)
            && matches!(tables.slot(grant.slot), Some(slot) if slot.is_alive(grant.serial, now))
        {
            return granted(verdict, phase, grant, holder.rule);
        }
        at += 1;
    }
    if phase.vouched != 0 {
        let key = VouchedKey { set: phase.vouched, label: far.label };
        if far.label != 0
            && let Some(grant) = tables.vouched(&key)
            && let Some(slot) = tables.slot(grant.slot)
            && slot.is_alive(grant.serial, now)
        {
            return granted(verdict, phase, grant, slot.rule);
        }
        verdict.reason = unheard(verdict.reason, phase, far);
    }
    if verdict.action == Action::Deny {
        verdict.hold = phase.flags & phase_flags::HOLD != 0;
        let again = now + LOOK_AGAIN;
        if until == 0 || again < until {
            verdict.until = again;
        }
    }
    verdict
}

/// What a cell says that asks for proofs, of a caller with a grant of one of its rules.
#[inline(always)]
fn granted(verdict: Verdict, phase: &Phase, grant: Grant, rule: u32) -> Verdict {
    if phase.watched_by == NO_RULE {
        Verdict { action: Action::Allow, reason: Reason::Rule, rule, grant, ..verdict }
    } else {
        Verdict { action: Action::Observe, reason: Reason::DeniedByRule, rule: phase.watched_by, grant, ..verdict }
    }
}

/// Why a caller does not pass for whom another node has to vouch, where rules ask for that.
#[inline(always)]
fn unheard(otherwise: Reason, phase: &Phase, far: &FarEnd) -> Reason {
    if far.label != 0 {
        return if phase.flags & phase_flags::ASKS_MORE == 0 { Reason::CallerNotNamed } else { otherwise };
    }
    // Who says nothing may have meant to show other proofs.
    let only = phase.granted_by[0] == NO_RULE;
    if !only && far.lacking == Reason::NodeIdentityMissing.code() {
        return otherwise;
    }
    Reason::from_code(far.lacking).unwrap_or(otherwise)
}
