//! `cgroup/sock_release`: the last descriptor of a socket is closed.

use authd_common::tables::tag_flags;
use aya_ebpf::{macros::cgroup_sock, programs::SockContext};

use crate::{maps, tag};

/// Somebody else may take the port of a socket that interfaces were told of.
#[cgroup_sock(sock_release)]
pub fn authd_sock_release(ctx: SockContext) -> i32 {
    if let Some(tag) = tag::of(ctx.sock.cast())
        && tag.flags & tag_flags::LISTED != 0
    {
        maps::forget_listeners();
    }
    1
}
