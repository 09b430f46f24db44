//! What this node says in a SYN of who sends it, to nodes that listen to it.

use authd_common::{
    parse::tcp_flags,
    syn::{self, LabelKey, Voice},
    tables::{FlowKey, Tag, root_flags, tag_flags},
};

use crate::{
    maps,
    raw::{self, SockOps},
    tag,
};

/// Before the SYN: whether somebody listens. If there is nothing to say yet, there may be when the SYN is sent again.
#[inline(always)]
pub fn begins(ops: SockOps, tag: &mut Tag) {
    let Some(root) = maps::root() else { return };
    if root.flags & root_flags::SPEAKS != 0 && maps::node(&ops.remote()).is_some() {
        tag.flags |= tag_flags::SPEAKS;
        ops.write_options(true);
    }
}

/// The connection is open: its segments say nothing more. Options that another program writes are its own.
#[inline(always)]
pub fn ends(ops: SockOps, tag: &Tag) {
    if tag.flags & tag_flags::SPEAKS != 0 {
        ops.write_options(false);
    }
}

/// A segment is being made, and its options are counted.
#[inline(always)]
pub fn reserves(ops: SockOps) {
    if is_syn(ops) && what_to_say(ops).is_some() {
        ops.reserve_option(syn::OPTION as u32);
    }
}

/// They are written. If there is nothing to say any more, the room is left empty, and the far node refuses the SYN if it has to
/// know.
#[inline(always)]
pub fn writes(ops: SockOps) {
    if !is_syn(ops) {
        return;
    }
    let Some((voice, label)) = what_to_say(ops) else { return };
    let Some(sequence) = ops.segment_sequence() else { return };
    let key: FlowKey = syn::syn_key((ops.local(), ops.local_port()), (ops.remote(), ops.remote_port()), sequence);
    let mac = syn::mac(voice.secret, &key, voice.key_id, label);
    ops.store_option(&syn::option(mac, voice.key_id, label));
}

#[inline(always)]
fn is_syn(ops: SockOps) -> bool {
    ops.segment_flags() & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN
}

/// How the node is spoken to that is called, and by which label it knows the caller.
#[inline(always)]
fn what_to_say(ops: SockOps) -> Option<(Voice, u32)> {
    let node = maps::node(&ops.remote())?;
    let voice = maps::voice(node).filter(|voice| raw::coarse_now() < voice.until)?;
    let Tag { instance, workload, .. } = *tag::of(ops.socket()?)?;
    let label = maps::label(&LabelKey { instance, workload, node, bank: voice.bank, reserved: 0 })?;
    Some((voice, label))
}
