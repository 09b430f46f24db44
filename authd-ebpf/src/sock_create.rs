//! `cgroup/sock_create`: a new IP socket remembers who made it, whoever holds it later.

use authd_common::{
    address::Address,
    event::direction,
    identity::resolve,
    reason::Reason,
    tables::{IPPROTO_TCP, Tables, UNMANAGED, workload_flags},
    verdict::{Action, Verdict},
};
use aya_ebpf::{macros::cgroup_sock, programs::SockContext};

use crate::{
    emit::{self, Refused, Task},
    maps::{CurrentTask, Kernel},
    raw::{self, Sock},
    tag,
};

const PASS: i32 = 1;
/// The caller gets EPERM.
const DENY: i32 = 0;
const SOCK_RAW: u32 = 3;

#[cgroup_sock(sock_create)]
pub fn authd_sock_create(ctx: SockContext) -> i32 {
    let sock = Sock(ctx.sock);
    let Some(root) = Kernel.root() else { return PASS };
    let who = resolve(&Kernel, &root, &CurrentTask);
    let protocol = sock.protocol();
    // An unmanaged TCP socket gets its tag with its first packet; other sockets need their namespace's cookie from here.
    if who.workload == UNMANAGED && protocol == IPPROTO_TCP {
        return PASS;
    }
    if sock.kind() == SOCK_RAW && who.workload != UNMANAGED {
        let entry = Kernel.workload(&root, who.workload).unwrap_or_default();
        if entry.flags & workload_flags::RAW_SOCKETS == 0 {
            let verdict = Verdict::refuse(Reason::RawSocket, &root, &entry);
            let refused = Refused {
                cgroup: who.cgroup,
                peer_cgroup: 0,
                workload: who.workload,
                peer_workload: UNMANAGED,
                generation: root.generation,
                remote: Address::UNSPECIFIED,
                local_port: 0,
                remote_port: 0,
                protocol,
                direction: direction::OUT,
                bytes: 0,
                flags: 0,
            };
            let task = Task::Current { cookie: 0, netns: raw::netns_of_new(ctx.sock) };
            emit::refused(&refused, &verdict, &task);
            if verdict.action == Action::Deny {
                return DENY;
            }
        }
    }
    // Without memory for it the packet hooks find out for themselves, and refuse a managed socket's packets.
    let Some(tag) = tag::of_or_new(ctx.sock.cast(), protocol) else { return PASS };
    tag.netns = raw::netns_of_new(ctx.sock);
    tag.cgroup = who.cgroup;
    tag.workload = who.workload;
    tag.instance = who.instance;
    if who.is_managed() {
        tag::note_task(tag);
    }
    PASS
}
