//! `cgroup/sendmsg4` and `sendmsg6`: a datagram with a destination of its own.

use authd_common::{
    address::Address,
    identity::resolve,
    tables::{IPPROTO_UDP, Tables},
    verdict::Action,
};
use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    connect, datagram,
    maps::{CurrentTask, Kernel},
    raw::SockAddr,
};

const PASS: i32 = 1;
/// The caller gets EPERM.
const DENY: i32 = 0;

#[cgroup_sock_addr(sendmsg4)]
pub fn authd_sendmsg4(ctx: SockAddrContext) -> i32 {
    let ctx = SockAddr(ctx.sock_addr);
    sendmsg(ctx, ctx.remote_v4())
}

#[cgroup_sock_addr(sendmsg6)]
pub fn authd_sendmsg6(ctx: SockAddrContext) -> i32 {
    let ctx = SockAddr(ctx.sock_addr);
    sendmsg(ctx, ctx.remote_v6())
}

#[inline(always)]
fn sendmsg(ctx: SockAddr, remote: Address) -> i32 {
    let Some(root) = Kernel.root() else { return PASS };
    let port = ctx.remote_port();
    // An answer was decided when the call came in; the packet hook looks at it again.
    if datagram::answers(ctx.cookie(), &remote, port, &root) {
        return PASS;
    }
    let task = resolve(&Kernel, &root, &CurrentTask);
    let (_, verdict) = connect::of_both(ctx, &root, &task, &remote, port, IPPROTO_UDP);
    if verdict.action == Action::Deny {
        connect::refuse(ctx, &root, &task, &remote, port, &verdict);
        return DENY;
    }
    PASS
}
