//! `xdp`: every frame that arrives at an interface, before there is a packet of the stack.

use authd_common::{
    nic::{self, Behind, Sockets},
    parse::{Packet, parse, plain},
    reason::Reason,
    syn::Heard,
    tables::{DropKey, Dropped, Flow, FlowKey, Listener, Root, nic as words, root_flags},
    verdict::Verdict,
};
use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS},
    macros::xdp,
    programs::XdpContext,
};

use crate::{
    emit,
    maps::{self, Kernel},
    raw::{
        self, Ends,
        xdp::{Frame, Scattered},
    },
};

#[xdp(frags)]
pub fn authd_xdp(ctx: XdpContext) -> u32 {
    let frame = Frame(ctx.ctx);
    let Some(at) = nic::network_offset(&frame) else { return XDP_PASS };
    let mut seen = Seen { frame, packet: Packet::UNREAD, at };
    if !seen.read_plain() && !seen.read() || passes(&seen) { XDP_PASS } else { XDP_DROP }
}

/// A frame, read. Lives once on the stack, as a scene of the packet hooks does.
#[repr(C)]
struct Seen {
    frame: Frame,
    packet: Packet,
    /// Where its packet begins.
    at: usize,
}
const _: () = assert!(core::mem::offset_of!(Seen, packet.protocol) % 8 >= 4);
const _: () = assert!(core::mem::offset_of!(Seen, packet.tcp_flags) % 8 >= 4);
const _: () = assert!(core::mem::offset_of!(Seen, packet.flags) % 8 >= 4);

impl Seen {
    /// Reads a packet whose headers lie in one piece at fixed offsets. Returns whether it is one.
    #[inline(always)]
    fn read_plain(&mut self) -> bool {
        match plain(&Behind { frame: &self.frame, at: self.at }) {
            Some(packet) => {
                self.packet = packet;
                true
            }
            None => false,
        }
    }

    /// Reads any other. Returns whether it can be read.
    #[inline(never)]
    fn read(&mut self) -> bool {
        match parse(&Behind { frame: &Scattered(self.frame), at: self.at }) {
            Ok(packet) => {
                self.packet = packet;
                true
            }
            Err(_) => false,
        }
    }
}

/// Asks the questions of [`nic::rule`], and does what follows. Returns whether the frame passes.
#[inline(never)]
fn passes(seen: &Seen) -> bool {
    let Some(root) = maps::root() else { return true };
    let packet = &seen.packet;
    if !nic::concerns(&Kernel, root, packet) {
        return true;
    }
    let key = nic::flow_of(packet, seen.frame.netns());
    if nic::is_known(&Kernel, &seen.frame, root, packet, &key) {
        return true;
    }
    let mut heard = Heard::NOTHING;
    let is_vouched = root.flags & root_flags::HEARS != 0 && hear(seen, root, &key, &mut heard);
    // Only after that: one flow of a source may be known, and another one refused.
    if !is_vouched && !nic::may_be_connected(packet) && is_refused_again(seen, root.generation, heard.lacking) {
        return false;
    }
    let Some(workload) = nic::addressee(&Kernel, &seen.frame, root, &key) else { return true };
    let mut verdict = Verdict::deny(Reason::Undecided);
    if decide(seen, root, workload, &heard, &mut verdict) {
        remember(seen, root, &key, &heard, &verdict);
        return true;
    }
    if nic::may_be_connected(packet) && is_connected(seen) {
        return true;
    }
    // Whoever is vouched for is judged each time. Who is not, and lacks the same, may lack it for another reason.
    let generation = if is_vouched { 0 } else { root.generation };
    refuse(seen, generation, workload, &verdict);
    false
}

/// Who opens the flow, if another node vouches for that. Returns whether one does.
#[inline(never)]
fn hear(seen: &Seen, root: &Root, key: &FlowKey, heard: &mut Heard) -> bool {
    let bytes = Behind { frame: &Scattered(seen.frame), at: seen.at };
    *heard = nic::caller(&Kernel, &seen.frame, root, &seen.packet, key, &bytes);
    heard.is_vouched()
}

#[inline(never)]
fn decide(seen: &Seen, root: &Root, workload: u32, heard: &Heard, verdict: &mut Verdict) -> bool {
    *verdict = nic::decide(&Kernel, root, workload, &seen.packet, seen.frame.netns(), heard);
    verdict.action.passes()
}

/// What later packets of the flow rest on. Returns whether there is something.
#[inline(never)]
fn remember(seen: &Seen, root: &Root, key: &FlowKey, heard: &Heard, verdict: &Verdict) -> bool {
    if let Some(flow) = nic::lasting(root, &seen.packet, verdict, heard) {
        maps::set_flow(key, &flow);
        return true;
    }
    if let Some((key, spoken)) = nic::said(&seen.packet, heard) {
        maps::set_spoken(&key, &spoken);
        return true;
    }
    false
}

#[inline(never)]
fn is_connected(seen: &Seen) -> bool {
    seen.frame.is_connected(&seen.packet)
}

#[inline(always)]
fn drop_key(seen: &Seen) -> DropKey {
    let Packet { source, destination, destination_port, protocol, .. } = seen.packet;
    DropKey::new(maps::nic(words::BANK) as u32, protocol, source, destination, destination_port)
}

/// Whether the frame is one of those that this CPU refused a moment ago, by a verdict that still holds; then it is counted.
/// Nothing is told here: a flood costs this.
#[inline(never)]
fn is_refused_again(seen: &Seen, generation: u32, lacking: u32) -> bool {
    let Some(dropped) = maps::dropped(&drop_key(seen)).map(raw::value) else { return false };
    if dropped.packets == 0
        || dropped.generation != generation
        || dropped.epoch != maps::nic(words::EPOCH)
        || !nic::lacks_alike(dropped.reason, lacking)
        || (dropped.until != 0 && raw::coarse_now() >= dropped.until)
    {
        return false;
    }
    count(dropped, seen);
    true
}

/// Counts a frame that was refused just now with others of its kind, of the generation in which the next like it need not be
/// judged; 0: in none. Returns whether its kind has a place of its own.
#[inline(never)]
fn refuse(seen: &Seen, generation: u32, workload: u32, verdict: &Verdict) -> bool {
    let reason = verdict.reason.code();
    let key = drop_key(seen);
    let Some(other) = maps::other_dropped(key.bank, reason).map(raw::value) else { return false };
    // Once there was no room for a new kind, there is none until the daemon has emptied the table.
    let place = match maps::dropped(&key) {
        None if other.packets == 0 => maps::new_dropped(&key),
        known => known,
    };
    // A kind that is refused for another reason than before is counted by reason for a second.
    let place = place.map(raw::value).filter(|place| place.packets == 0 || place.reason == reason);
    let has_place = place.is_some();
    let dropped = place.unwrap_or(other);
    if dropped.packets == 0 {
        dropped.first = raw::coarse_now();
    }
    dropped.until = verdict.until;
    dropped.epoch = maps::nic(words::EPOCH);
    dropped.generation = generation;
    dropped.workload = workload;
    dropped.rule = verdict.rule;
    dropped.reason = reason;
    count(dropped, seen);
    has_place
}

#[inline(always)]
fn count(dropped: &mut Dropped, seen: &Seen) {
    let bytes = seen.frame.length() - seen.at as u64;
    emit::count(dropped.reason, bytes);
    dropped.packets += 1;
    dropped.bytes += bytes;
    dropped.last = raw::coarse_now();
    dropped.source_port = seen.packet.source_port;
}

impl Sockets for Frame {
    #[inline(always)]
    fn netns(&self) -> u64 {
        maps::nic(words::NETNS)
    }

    #[inline(always)]
    fn flow(&self, key: &FlowKey) -> Option<Flow> {
        maps::flow(key)
    }

    #[inline(always)]
    fn listener(&self, key: &FlowKey) -> Option<Listener> {
        maps::listener(key).filter(|listener| listener.epoch == maps::nic(words::EPOCH))
    }

    #[inline(always)]
    fn is_connected(&self, packet: &Packet) -> bool {
        let Packet { source, destination, source_port, destination_port, .. } = packet;
        let ends =
            Ends { remote: source, local: destination, remote_port: *source_port, local_port: *destination_port };
        self.has_connection(&ends)
    }
}
