//! `cgroup_skb/egress`: every packet that a socket sends.

use authd_common::{
    parse::packet_flags,
    reason::Reason,
    tables::{IPPROTO_TCP, IPPROTO_UDP, Tables, Tag, UNMANAGED, role, tag_flags},
    verdict::{Action, FarEnd, Verdict},
};
use aya_ebpf::{macros::cgroup_skb, programs::SkBuffContext};

use crate::{
    caller::{far_end, introduce_again},
    datagram, emit, judge,
    maps::{self, Kernel},
    packet::{LOOPBACK, Scene, is_bare_reset, is_plain_tcp},
    permits,
    raw::{Skb, Sock},
    sockops, stream, tag,
};

const PASS: i32 = 1;
const DROP: i32 = 0;

#[cgroup_skb(egress)]
pub fn authd_egress(ctx: SkBuffContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    // The kernel runs this hook for full sockets only.
    let Some(sock) = skb.any_socket() else { return PASS };
    let action = match remembered(skb, sock) {
        Some(action) => action,
        None => match sock.full() {
            Some(sock) => judge(skb, sock),
            None => return PASS,
        },
    };
    if action.passes() { PASS } else { DROP }
}

/// The verdict of an earlier packet of this TCP flow, if it still holds.
#[inline(always)]
fn remembered(skb: Skb, sock: Sock) -> Option<Action> {
    let tag = tag::of(sock.0.cast())?;
    if tag.protocol != IPPROTO_TCP || !tag::is_current(tag, maps::generation()) {
        return None;
    }
    let known = Action::from_code(tag.action);
    if known == Action::Deny {
        // A connection that was cut ends for both sides when its socket goes.
        if tag.flags & tag_flags::ESTABLISHED != 0 && is_bare_reset(skb) {
            return Some(Action::Allow);
        }
        emit::count(tag.reason, skb.length() as u64);
        return Some(known);
    }
    if tag.workload == UNMANAGED {
        return Some(known);
    }
    // What a permit has no room for is decided anew, and refused then.
    if is_plain_tcp(skb) && permits::covers(tag, skb.length() as u64) { Some(known) } else { None }
}

#[inline(always)]
fn judge(skb: Skb, sock: Sock) -> Action {
    // Nothing is guarded before the first generation.
    let Some(root) = Kernel.root() else { return Action::Allow };
    let protocol = sock.protocol();
    let mut scene = Scene::new(skb, &root, false);
    let managed = judge::identify(&mut scene);
    if !managed && protocol == IPPROTO_TCP && !stream::is_worth_a_tag(sock) {
        return Action::Allow;
    }
    let Some(tag) = tag::of_or_new(sock.0.cast(), protocol) else {
        // Without memory for a tag nothing can be remembered, and a managed flow not be followed.
        return if managed { Action::Deny } else { Action::Allow };
    };
    if !managed {
        if protocol == IPPROTO_TCP {
            stream::leave_alone(tag, root.generation);
        }
        if protocol == IPPROTO_UDP && skb.interface() == LOOPBACK && scene.read(0).is_none() {
            datagram::write_down(&scene, tag);
        }
        return Action::Allow;
    }
    match scene.read(packet_flags::UNFIT_OUT) {
        None => of_managed(&scene, sock, tag),
        Some(reason) => datagram::refuse_unsound(&scene, tag, reason),
    }
}

#[inline(always)]
fn of_managed(scene: &Scene, sock: Sock, tag: &mut Tag) -> Action {
    if tag.protocol != IPPROTO_TCP || scene.packet.protocol != IPPROTO_TCP {
        return datagram::leaves(scene, tag);
    }
    if sock.is_listening() {
        return answered(scene, tag);
    }
    if tag.role == role::UNKNOWN && scene.packet.opens_tcp() {
        // Made by the kernel for a managed socket: nobody wrote it down on the way here.
        sockops::write_down(scene, tag);
    }
    let action = stream::decide(scene, tag);
    // A connection that was cut ends for both sides when its socket goes.
    if action == Action::Deny && tag.flags & tag_flags::ESTABLISHED != 0 && is_bare_reset(scene.skb) {
        return Action::Allow;
    }
    action
}

/// A listener's answer to a call that its ingress hook judged; no flow of its own.
#[inline(never)]
fn answered(scene: &Scene, tag: &mut Tag) -> Action {
    let mut far = FarEnd::default();
    if !far_end(scene, tag, &mut far) {
        introduce_again(scene, &mut far);
    }
    let mut verdict = Verdict::deny(Reason::Undecided);
    if judge::inbound(scene, &far, &mut verdict) { Action::Allow } else { Action::Deny }
}
