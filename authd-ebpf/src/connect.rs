//! `cgroup/connect4` and `connect6`: a task gives a socket its remote end.

use authd_common::{
    address::Address,
    event::direction,
    identity::{Identity, resolve},
    reason::Reason,
    tables::{IPPROTO_TCP, IPPROTO_UDP, Root, Tables, UNMANAGED, role, tag_flags},
    verdict::{Action, Opener, Verdict, decide_out},
};
use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    caller::known_now,
    emit::{self, Refused, Task},
    maps::{CurrentTask, Kernel},
    permits,
    raw::{self, SockAddr},
    tag,
};

const PASS: i32 = 1;
/// The caller gets EPERM.
const DENY: i32 = 0;

#[cgroup_sock_addr(connect4)]
pub fn authd_connect4(ctx: SockAddrContext) -> i32 {
    let ctx = SockAddr(ctx.sock_addr);
    connect(ctx, ctx.remote_v4())
}

#[cgroup_sock_addr(connect6)]
pub fn authd_connect6(ctx: SockAddrContext) -> i32 {
    let ctx = SockAddr(ctx.sock_addr);
    connect(ctx, ctx.remote_v6())
}

#[inline(always)]
fn connect(ctx: SockAddr, remote: Address) -> i32 {
    let Some(root) = Kernel.root() else { return PASS };
    let task = resolve(&Kernel, &root, &CurrentTask);
    let port = ctx.remote_port();
    let (owner, mut verdict) = of_both(ctx, &root, &task, &remote, port, ctx.protocol());
    if verdict.grant.is_permit() && ctx.protocol() == IPPROTO_TCP {
        permits::take(&root, owner.workload, &mut verdict);
    }
    // Only what has a handshake can wait: its SYNs are dropped until there is a grant.
    let held = verdict.hold && ctx.protocol() == IPPROTO_TCP && tag::of(ctx.socket()).is_some();
    if verdict.action == Action::Deny && !held {
        refuse(ctx, &root, &task, &remote, port, &verdict);
        return DENY;
    }
    if ctx.protocol() == IPPROTO_TCP
        && verdict.reason != Reason::Unmanaged
        && let Some(tag) = tag::of(ctx.socket())
    {
        tag.role = role::CLIENT;
        tag.remote = remote;
        tag.remote_port = port;
        // Another connection of the same socket is another flow.
        tag.flags &= !(tag_flags::OPENED | tag_flags::ESTABLISHED | tag_flags::PEER_LOCAL | tag_flags::HELD);
        tag::settle(tag, owner.workload, root.generation, &verdict);
        tag.instance = owner.instance;
        tag::note_task(tag);
        if held {
            tag.flags |= tag_flags::HELD;
            tag.opened = raw::now();
            // Undecided: each SYN is looked at.
            tag.generation = 0;
        }
    }
    PASS
}

/// Task and socket may belong to different workloads (a descriptor that was passed, a task that was moved): both must be
/// allowed. The socket's own workload answers for the packets, so its verdict is the one remembered. Returns that workload
/// too.
#[inline(always)]
pub fn of_both(
    ctx: SockAddr,
    root: &Root,
    task: &Identity,
    remote: &Address,
    port: u16,
    protocol: u8,
) -> (Opener, Verdict) {
    let owner = owner_of(ctx, root, task);
    if owner.workload == UNMANAGED && task.workload == UNMANAGED {
        return (owner, Verdict::allow(Reason::Unmanaged));
    }
    let protocol = known_protocol(protocol);
    let of_socket = decide_out(&Kernel, root, &owner, remote, protocol, port);
    let doer = Opener { workload: task.workload, instance: task.instance };
    if owner == doer {
        return (owner, of_socket);
    }
    let of_task = decide_out(&Kernel, root, &doer, remote, protocol, port);
    let mut verdict = of_socket.and(of_task);
    if of_socket.grant.is_permit() || of_task.grant.is_permit() {
        // One permit is for one holder's own socket: who else has it could not be counted.
        permits::refuse(root, owner.workload, &mut verdict, Reason::PermitUsed);
    }
    // Nobody waits with somebody else's socket: its packets are judged as its owner's alone, who may need no proof.
    (owner, Verdict { hold: false, ..verdict })
}

/// Whose the socket is under this generation. What its tag says may be older: its cgroup was not known yet, or belonged to
/// another workload.
#[inline(always)]
fn owner_of(ctx: SockAddr, root: &Root, task: &Identity) -> Opener {
    match tag::of(ctx.socket()) {
        // A tag without a cgroup was made for a socket whose maker is not known.
        Some(tag) if tag.cgroup != 0 && tag.cgroup != task.cgroup => {
            known_now(root, tag.cgroup, tag.workload, tag.instance)
        }
        _ => Opener { workload: task.workload, instance: task.instance },
    }
}

/// Raw sockets name any protocol; 0 stands for the one of the family's default.
#[inline(always)]
fn known_protocol(protocol: u8) -> u8 {
    if protocol == 0 { IPPROTO_UDP } else { protocol }
}

#[inline(always)]
pub fn refuse(ctx: SockAddr, root: &Root, task: &Identity, remote: &Address, port: u16, verdict: &Verdict) {
    let refused = Refused {
        cgroup: task.cgroup,
        peer_cgroup: 0,
        workload: task.workload,
        peer_workload: UNMANAGED,
        generation: root.generation,
        remote: *remote,
        local_port: 0,
        remote_port: port,
        protocol: ctx.protocol(),
        direction: direction::OUT,
        bytes: 0,
        flags: 0,
    };
    emit::refused(&refused, verdict, &Task::Current { cookie: ctx.cookie(), netns: ctx.netns() });
}
