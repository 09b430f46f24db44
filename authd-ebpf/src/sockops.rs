//! `sockops`: a TCP connection opens, is accepted, ends.

use authd_common::{
    event::kind,
    syn::syn_key,
    tables::{
        FlowKey, Grant, IPPROTO_TCP, LocalEntry, Tables, Tag, UNMANAGED, port_flags, role, root_flags, tag_flags,
    },
    verdict::Action,
};
use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_HDR_OPT_LEN_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TIMEOUT_INIT, BPF_SOCK_OPS_WRITE_HDR_OPT_CB,
    },
    macros::sock_ops,
    programs::SockOpsContext,
};

use crate::{
    caller::local_key,
    emit,
    maps::{self, Kernel},
    packet::Scene,
    permits,
    raw::{self, SockOps},
    speaks,
    stream::{self, Totals},
    tag,
};

const TCP_CLOSE: u32 = 7;

#[sock_ops]
pub fn authd_sockops(ctx: SockOpsContext) -> u32 {
    let ops = SockOps(ctx.ops);
    match ops.operation() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => opens(ops),
        BPF_SOCK_OPS_HDR_OPT_LEN_CB => speaks::reserves(ops),
        BPF_SOCK_OPS_WRITE_HDR_OPT_CB => speaks::writes(ops),
        BPF_SOCK_OPS_TIMEOUT_INIT => return first_timeout(ops),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => established(ops),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(ops),
        BPF_SOCK_OPS_STATE_CB if ops.new_state() == TCP_CLOSE => ended(ops),
        _ => {}
    }
    1
}

/// Right before the SYN: the local port is chosen now.
#[inline(always)]
fn opens(ops: SockOps) {
    let Some(socket) = ops.socket() else { return };
    let tagged = tag::of(socket);
    let is_tagged = tagged.is_some();
    let mut managed = false;
    if let Some(tag) = tagged {
        managed = tag.workload != UNMANAGED;
        if managed && tag.role == role::CLIENT {
            if tag.flags & tag_flags::HELD != 0 {
                ops.retry_often();
                stream::tell(ops.cookie(), tag, kind::HELD, &ops.local(), ops.local_port(), &Totals::default());
            } else if Action::from_code(tag.action).passes() && tag.flags & tag_flags::OPENED == 0 {
                tag.flags |= tag_flags::OPENED;
                tag.opened = raw::now();
                emit::count(tag.reason, 0);
                stream::tell(ops.cookie(), tag, kind::OPENED, &ops.local(), ops.local_port(), &Totals::default());
            }
            let entry = LocalEntry { cgroup: tag.cgroup, instance: tag.instance, workload: tag.workload, pid: tag.pid };
            maps::set_local(&key_of(ops, tag.netns), &entry);
            speaks::begins(ops, tag);
        }
    }
    if managed || !is_tagged {
        // An untagged socket may turn out to be managed with its first packet.
        ops.watch_states();
    }
    if !managed {
        // Whoever had these ports before, it is not this process.
        let Some(root) = Kernel.root() else { return };
        if Kernel.port(&root, IPPROTO_TCP, ops.remote_port()).flags & port_flags::GUARDED != 0 {
            maps::remove_local(&key_of(ops, ops.netns()));
        }
    }
}

/// How soon an unanswered SYN is sent again, in jiffies; the kernel's own choice but for one that waits for its proofs.
#[inline(always)]
fn first_timeout(ops: SockOps) -> u32 {
    const SOON: u32 = 2;
    let Some(socket) = ops.socket() else { return 1 };
    if let Some(tag) = tag::of(socket)
        && tag.role == role::CLIENT
        && tag.flags & tag_flags::HELD != 0
    {
        ops.reply(SOON);
    }
    1
}

#[inline(always)]
fn established(ops: SockOps) {
    let Some(socket) = ops.socket() else { return };
    if let Some(tag) = tag::of(socket) {
        tag.flags |= tag_flags::ESTABLISHED;
        speaks::ends(ops, tag);
    }
}

/// An accepted socket inherits nothing. Whose it is, its first packet says; what it is and where, is known here.
#[inline(always)]
fn accepted(ops: SockOps) {
    let Some(socket) = ops.socket() else { return };
    if let Some(tag) = tag::of_or_new(socket, IPPROTO_TCP) {
        if tag.role == role::CLIENT {
            // Both ends called at once (RFC 9293, 3.5): it called, and stays a caller.
            tag.flags |= tag_flags::ESTABLISHED;
            speaks::ends(ops, tag);
            return;
        }
        tag.netns = ops.netns();
        tag.role = role::SERVER;
        tag.remote = ops.remote();
        tag.remote_port = ops.remote_port();
        tag.flags |= tag_flags::ESTABLISHED;
        was_introduced(ops, tag);
    }
    ops.watch_states();
}

/// What the SYN said of the caller. It does not come again.
#[inline(always)]
fn was_introduced(ops: SockOps, tag: &mut Tag) {
    if !matches!(maps::root(), Some(root) if root.flags & root_flags::HEARS != 0) {
        return;
    }
    let sequence = ops.awaited().wrapping_sub(1);
    let key = syn_key((tag.remote, tag.remote_port), (ops.local(), ops.local_port()), sequence);
    if let Some(spoken) = maps::spoken_in_place(&key).map(raw::value) {
        spoken.used = 1;
        tag.peer_workload = spoken.label;
        tag.peer_cgroup = spoken.key_id as u64;
        tag.flags |= tag_flags::VOUCHED;
    }
}

#[inline(always)]
fn ended(ops: SockOps) {
    let Some(socket) = ops.socket() else { return };
    let Some(tag) = tag::of(socket) else { return };
    if tag.grant.is_permit() && tag.role == role::CLIENT && tag.flags & tag_flags::ESTABLISHED == 0 {
        // A SYN alone is one number (RFC 9293, 3.4). One that carried data may have been all that was wanted (RFC 7413).
        if ops.unacknowledged() <= 1 {
            permits::give_back(tag.grant);
        }
        tag.grant = Grant::NONE;
    }
    if tag.workload == UNMANAGED || tag.flags & tag_flags::OPENED == 0 {
        return;
    }
    let totals = Totals {
        bytes_out: ops.bytes_out(),
        bytes_in: ops.bytes_in(),
        packets_out: ops.segments_out() as u64,
        packets_in: ops.segments_in() as u64,
        duration: raw::now() - tag.opened,
    };
    stream::tell(ops.cookie(), tag, kind::CLOSED, &ops.local(), ops.local_port(), &totals);
    tag.flags &= !tag_flags::OPENED;
    if tag.role == role::CLIENT {
        maps::remove_local(&key_of(ops, tag.netns));
    }
}

#[inline(always)]
fn key_of(ops: SockOps, netns: u64) -> FlowKey {
    local_key(netns, ops.local(), ops.local_port(), ops.remote(), ops.remote_port(), IPPROTO_TCP)
}

/// The same note for a SYN whose socket nobody connected through a system call.
#[inline(never)]
pub fn write_down(scene: &Scene, tag: &Tag) {
    let packet = &scene.packet;
    if Kernel.port(&scene.root, IPPROTO_TCP, packet.destination_port).flags & port_flags::GUARDED == 0 {
        return;
    }
    let key = local_key(
        tag.netns,
        packet.source,
        packet.source_port,
        packet.destination,
        packet.destination_port,
        IPPROTO_TCP,
    );
    maps::set_local(&key, &scene.sender(tag.pid));
}
