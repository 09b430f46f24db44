//! What sockets write down for the program of the interfaces: who is called where, and which flows began here.

use authd_common::{
    address::Address,
    tables::{
        Flow, FlowKey, Grant, Listener, Root, Tables, Tag, listener_flags, nic, port_flags, role, root_flags, tag_flags,
    },
};

use crate::{
    maps::{self, Kernel},
    packet::{LOOPBACK, Scene},
    raw::Ends,
    tag,
};

/// Whether interfaces want to know of this packet's local end.
#[inline(always)]
fn matters(scene: &Scene, root: &Root) -> bool {
    root.flags & root_flags::NIC != 0
        && scene.skb.interface() != LOOPBACK
        && Kernel.port(root, scene.packet.protocol, scene.local_port()).flags & port_flags::GUARDED != 0
}

/// The flow of packets that arrive.
#[inline(always)]
fn inbound(scene: &Scene, tag: &Tag) -> FlowKey {
    let (remote, local) = ((*scene.remote(), scene.remote_port()), (*scene.local(), scene.local_port()));
    FlowKey::new(tag.netns, scene.packet.protocol, remote, local)
}

/// Notes to whom a packet came that calls somebody. Returns whether something was written.
#[inline(never)]
pub fn note_listener(scene: &Scene, tag: &mut Tag) -> bool {
    if !matters(scene, &scene.root) {
        return false;
    }
    if tag.netns == 0 {
        tag.netns = netns_of_beacon(scene);
    }
    let key = inbound(scene, tag).callee();
    let epoch = maps::nic(nic::EPOCH);
    let mut flags = 0;
    if let Some(known) = maps::listener(&key)
        && known.epoch == epoch
    {
        if known.cgroup == scene.who.cgroup {
            return false;
        }
        flags = listener_flags::SHARED;
    }
    tag.flags |= tag_flags::LISTED;
    maps::set_listener(&key, &Listener { epoch, cgroup: scene.who.cgroup, workload: scene.who.workload, flags });
    true
}

/// Notes a flow that a socket began from a port that some workload guards: its answers are no calls. Returns whether
/// something was written.
#[inline(never)]
pub fn note_client(scene: &Scene, tag: &Tag) -> bool {
    if !matters(scene, &scene.root) {
        return false;
    }
    let generation = scene.root.generation;
    maps::set_flow(
        &inbound(scene, tag),
        &Flow { until: 0, grant: Grant::NONE, generation, role: role::CLIENT as u32, label: 0, reserved: 0 },
    );
    true
}

/// The cookie of the packet's namespace, if the daemon is in it; else 0.
#[inline(always)]
fn netns_of_beacon(scene: &Scene) -> u64 {
    let (port, loopback) = (maps::nic(nic::BEACON) as u16, Address::v4([127, 0, 0, 1]));
    let ends = Ends { remote: &loopback, local: &loopback, remote_port: port, local_port: port };
    scene.skb.with_socket(false, &ends, |sock| tag::of(sock.0.cast()).map_or(0, |tag| tag.netns)).unwrap_or(0)
}
