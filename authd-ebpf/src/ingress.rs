//! `cgroup_skb/ingress`: every packet that reaches a socket.

use authd_common::{
    parse::packet_flags,
    reason::Reason,
    tables::{IPPROTO_TCP, Tables, Tag},
    verdict::{Action, FarEnd, Verdict},
};
use aya_ebpf::{macros::cgroup_skb, programs::SkBuffContext};

use crate::{
    caller::{far_end, introduce, note_introduction},
    datagram, emit, judge, listeners,
    maps::{self, Kernel},
    packet::Scene,
    permits,
    raw::{Skb, Sock},
    stream, tag,
};

const PASS: i32 = 1;
const DROP: i32 = 0;

#[cgroup_skb(ingress)]
pub fn authd_ingress(ctx: SkBuffContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
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
        emit::count(tag.reason, skb.length() as u64);
    } else if !permits::covers(tag, skb.length() as u64) {
        return None;
    }
    Some(known)
}

#[inline(always)]
fn judge(skb: Skb, sock: Sock) -> Action {
    let Some(root) = Kernel.root() else { return Action::Allow };
    let protocol = sock.protocol();
    let mut scene = Scene::new(skb, &root, true);
    let managed = judge::identify(&mut scene);
    if !managed && (protocol != IPPROTO_TCP || !stream::is_worth_a_tag(sock)) {
        return Action::Allow;
    }
    let Some(tag) = tag::of_or_new(sock.0.cast(), protocol) else {
        return if managed { Action::Deny } else { Action::Allow };
    };
    if !managed {
        stream::leave_alone(tag, root.generation);
        return Action::Allow;
    }
    match scene.read(packet_flags::UNFIT_IN) {
        None => of_managed(&scene, sock, tag),
        Some(reason) => datagram::refuse_unsound(&scene, tag, reason),
    }
}

#[inline(always)]
fn of_managed(scene: &Scene, sock: Sock, tag: &mut Tag) -> Action {
    if tag.protocol != IPPROTO_TCP || scene.packet.protocol != IPPROTO_TCP {
        return datagram::arrives(scene, tag);
    }
    if sock.is_listening() { called(scene, tag) } else { stream::decide(scene, tag) }
}

/// A listener's packet: a call, or the end of its handshake.
#[inline(never)]
fn called(scene: &Scene, tag: &mut Tag) -> Action {
    listeners::note_listener(scene, tag);
    let mut far = FarEnd::default();
    let vouched = !far_end(scene, tag, &mut far) && introduce(scene, &mut far);
    let mut verdict = Verdict::deny(Reason::Undecided);
    if !judge::inbound(scene, &far, &mut verdict) {
        return datagram::refuse(scene, tag, &verdict, &far);
    }
    if vouched {
        note_introduction(scene, &far);
    }
    Action::Allow
}
