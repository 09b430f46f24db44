//! TCP sockets in the packet hooks: taking a verdict anew and telling what changed.

use authd_common::{
    address::Address,
    event::{direction, kind},
    parse::tcp_flags,
    reason::Reason,
    tables::{Grant, IPPROTO_TCP, Tag, UNMANAGED, role, tag_flags},
    verdict::{Action, FarEnd, Verdict},
};

use crate::{
    caller::{far_end, known_now},
    emit::{self, Draft},
    judge,
    maps::Kernel,
    packet::Scene,
    permits,
    raw::{self, Ends, Sock},
    tag,
};

/// What a TCP socket without a known role is to its flow. Only sockets older than authd, and those that the kernel makes
/// itself (MPTCP subflows), get here.
#[inline(never)]
fn role_of(scene: &Scene) -> u8 {
    let packet = &scene.packet;
    let answered = packet.tcp_flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN | tcp_flags::ACK;
    if packet.opens_tcp() || (scene.arrives && answered) {
        return role::CLIENT;
    }
    // Whoever listens on the local port was called. The look-up names a remote end that no socket has, so that it can
    // only find a listener.
    let ends = Ends { remote: scene.local(), local: scene.local(), remote_port: 0, local_port: scene.local_port() };
    match scene.skb.with_socket(true, &ends, |sock| sock.is_listening()) {
        Some(true) => role::SERVER,
        _ => role::CLIENT,
    }
}

/// Decides an established (or opening) TCP flow, remembers the verdict and tells what changed.
#[inline(never)]
pub fn decide(scene: &Scene, tag: &mut Tag) -> Action {
    if tag.role == role::UNKNOWN {
        tag.role = role_of(scene);
    }
    tag.cgroup = scene.who.cgroup;
    tag.instance = scene.who.instance;
    tag.remote = *scene.remote();
    tag.remote_port = scene.remote_port();
    let workload = scene.who.workload;
    let mut verdict = Verdict::deny(Reason::Undecided);
    let passes = if tag.role == role::CLIENT {
        judge::outbound(scene, &mut verdict) && on_permit(scene, tag.grant, tag.rule, &mut verdict)
    } else {
        let mut far = FarEnd::default();
        far_end_of(scene, tag, &mut far);
        judge::inbound(scene, &far, &mut verdict)
    };
    if tag.flags & tag_flags::HELD != 0 {
        if verdict.hold && raw::now() - tag.opened < scene.root.hold_ms as u64 * 1_000_000 {
            return Action::Deny;
        }
        tag.flags &= !tag_flags::HELD;
        if verdict.hold {
            verdict.reason = Reason::ProofTimeout;
        }
    }
    verdict = verdict.after(tag.grant, &Kernel);
    // A new verdict of an open flow is told only if it changes what happens to it.
    let was = Action::from_code(tag.action);
    let opened = tag.flags & tag_flags::OPENED != 0;
    let told = match (opened, passes) {
        (false, true) => kind::OPENED,
        (false, false) => kind::DENIED,
        (true, false) if was.passes() => kind::CUT,
        (true, true) if !was.passes() => kind::RESUMED,
        (true, true) if tag.grant != verdict.grant => kind::REGRANTED,
        _ => 0,
    };
    tag::settle(tag, workload, scene.root.generation, &verdict);
    if told == kind::REGRANTED {
        tell_of(scene, tag, told);
        return verdict.action;
    }
    if told == kind::OPENED || told == kind::DENIED {
        tag.flags |= tag_flags::OPENED;
        tag.opened = raw::now();
    }
    if told != 0 {
        emit::count(tag.reason, if passes { 0 } else { scene.bytes() });
        tell_of(scene, tag, told);
    } else if !passes {
        emit::count(tag.reason, scene.bytes());
    }
    verdict.action
}

/// A verdict that rests on a permit: the flow took one before, or takes one now.
#[inline(never)]
pub fn on_permit(scene: &Scene, before: Grant, rule: u32, verdict: &mut Verdict) -> bool {
    if !verdict.grant.is_permit() {
        return true;
    }
    let workload = scene.who.workload;
    let passes = match permits::is_same(before, rule, verdict) {
        true => permits::goes_on(&scene.root, workload, before, verdict),
        false => permits::take(&scene.root, workload, verdict),
    };
    // Of each datagram, its conversation counts the bytes.
    if scene.packet.protocol == IPPROTO_TCP
        && verdict.grant.is_permit()
        && !permits::spend(verdict.grant, scene.bytes())
    {
        return permits::refuse(&scene.root, workload, verdict, Reason::PermitSpent);
    }
    passes
}

#[inline(never)]
fn tell_of(scene: &Scene, tag: &Tag, kind: u8) {
    tell(scene.skb.cookie(), tag, kind, scene.local(), scene.local_port(), &Totals::default());
}

/// The far end of an accepted socket, learned once. Returns whether it is on this node.
#[inline(never)]
fn far_end_of(scene: &Scene, tag: &mut Tag, far: &mut FarEnd) -> bool {
    let nobody = scene.root.veiled(UNMANAGED);
    *far = FarEnd::remote(*scene.remote(), 0);
    far.workload = nobody;
    far.on_node = true;
    if tag.flags & tag_flags::PEER_LOCAL == 0 && far_end(scene, tag, far) {
        tag.peer_workload = far.workload;
        tag.peer_cgroup = far.cgroup;
        tag.peer_instance = far.scope;
        tag.flags |= tag_flags::PEER_LOCAL;
    }
    if far.on_node {
        let now = known_now(&scene.root, tag.peer_cgroup, tag.peer_workload, tag.peer_instance);
        tag.peer_workload = now.workload;
        tag.peer_instance = now.instance;
        far.workload = scene.root.veiled(now.workload);
        far.scope = now.instance;
        far.cgroup = tag.peer_cgroup;
    } else if tag.flags & tag_flags::VOUCHED != 0 {
        far.label = tag.peer_workload;
        far.key_id = tag.peer_cgroup as u32;
    }
    far.on_node
}

/// Sums of a flow that ended.
#[derive(Default)]
pub struct Totals {
    pub bytes_out: u64,
    pub bytes_in: u64,
    pub packets_out: u64,
    pub packets_in: u64,
    pub duration: u64,
}

/// One record about a TCP flow.
#[inline(always)]
pub fn tell(cookie: u64, tag: &Tag, kind: u8, local: &Address, local_port: u16, totals: &Totals) {
    let Some(mut draft) = Draft::new() else { return };
    let e = draft.event();
    e.cgroup = tag.cgroup;
    e.peer_cgroup = tag.peer_cgroup;
    e.cookie = cookie;
    e.netns = tag.netns;
    e.bytes_out = totals.bytes_out;
    e.bytes_in = totals.bytes_in;
    e.packets_out = totals.packets_out;
    e.packets_in = totals.packets_in;
    e.duration = totals.duration;
    e.count = 1;
    e.local = *local;
    e.remote = tag.remote;
    e.comm = tag.comm;
    e.grant = tag.grant;
    e.generation = tag.generation;
    e.workload = tag.workload;
    e.peer_workload = tag.peer_workload;
    e.rule = tag.rule;
    e.pid = tag.pid;
    e.uid = tag.uid;
    e.local_port = local_port;
    e.remote_port = tag.remote_port;
    e.reason = tag.reason;
    e.kind = kind;
    e.action = tag.action;
    e.direction = if tag.role == role::SERVER { direction::IN } else { direction::OUT };
    e.protocol = IPPROTO_TCP;
    e.flags = tag.flags;
    draft.submit();
}

/// Whether remembering that nobody manages a socket is cheaper than finding it out again with each packet. Making a tag
/// costs as much as some ten look-ups; most connections are short.
#[inline(always)]
pub fn is_worth_a_tag(sock: Sock) -> bool {
    const LONG: u32 = 16;
    !sock.is_listening() && sock.segments() >= LONG
}

/// An unmanaged socket needs no verdict until the next generation.
#[inline(always)]
pub fn leave_alone(tag: &mut Tag, generation: u32) {
    let verdict = Verdict::allow(Reason::Unmanaged);
    tag::settle(tag, UNMANAGED, generation, &verdict);
}
