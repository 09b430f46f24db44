//! LSM `socket_create`, where the kernel lets authd load it: socket families that no cgroup program sees.

use authd_common::{
    address::Address,
    event::direction,
    identity::resolve,
    reason::Reason,
    tables::{Tables, UNMANAGED, workload_flags},
    verdict::{Action, Verdict},
};
use aya_ebpf::{macros::lsm, programs::LsmContext};

use crate::{
    emit::{self, Refused, Task},
    maps::{CurrentTask, Kernel},
};

const EPERM: i32 = 1;
const AF_UNIX: i32 = 1;
const AF_INET: i32 = 2;
const AF_INET6: i32 = 10;
const AF_NETLINK: i32 = 16;
const AF_ALG: i32 = 38;

#[lsm(hook = "socket_create")]
pub fn authd_socket_create(ctx: LsmContext) -> i32 {
    let family: i32 = ctx.arg(0);
    let by_kernel: i32 = ctx.arg(3);
    let earlier: i32 = ctx.arg(4);
    if earlier != 0 {
        return earlier;
    }
    // What stays on the node, and what the cgroup programs judge.
    if by_kernel != 0 || matches!(family, AF_UNIX | AF_INET | AF_INET6 | AF_NETLINK | AF_ALG) {
        return 0;
    }
    let Some(root) = Kernel.root() else { return 0 };
    let who = resolve(&Kernel, &root, &CurrentTask);
    if who.workload == UNMANAGED {
        return 0;
    }
    let entry = Kernel.workload(&root, who.workload).unwrap_or_default();
    if entry.flags & workload_flags::RAW_SOCKETS != 0 {
        return 0;
    }
    let verdict = Verdict::refuse(Reason::SocketFamily, &root, &entry);
    let refused = Refused {
        cgroup: who.cgroup,
        peer_cgroup: 0,
        workload: who.workload,
        peer_workload: UNMANAGED,
        generation: root.generation,
        remote: Address::UNSPECIFIED,
        local_port: 0,
        // There are no ports; the family is what an operator looks for.
        remote_port: family as u16,
        protocol: 0,
        direction: direction::OUT,
        bytes: 0,
        flags: 0,
    };
    emit::refused(&refused, &verdict, &Task::Current { cookie: 0, netns: 0 });
    if verdict.action == Action::Deny { -EPERM } else { 0 }
}
