//! Who is at the far end of a flow: a process of this node, or an address.

use authd_common::{
    address::Address,
    bytes::Bytes,
    identity::resolve,
    syn::{Spoken, hear, hear_answer, syn_key},
    tables::{FlowKey, IPPROTO_TCP, Root, Tables, Tag, UNMANAGED, root_flags},
    verdict::{FarEnd, Opener},
};

use crate::{
    maps::{self, Kernel},
    packet::{LOOPBACK, Scene},
    raw::Ends,
    tag,
};

/// One direction of a loopback flow: from where to where.
#[inline(always)]
pub fn local_key(
    netns: u64,
    source: Address,
    source_port: u16,
    destination: Address,
    destination_port: u16,
    protocol: u8,
) -> FlowKey {
    FlowKey::new(netns, protocol, (source, source_port), (destination, destination_port))
}

/// The sender of a packet that arrives, or the receiver of one that leaves.
///
/// What passes loopback was sent by a process of this network namespace, which wrote itself down on its way out if it is
/// managed. A socket older than authd does not remember its namespace's cookie, and learns it from the far socket.
///
/// Returns whether it is on this node.
#[inline(always)]
pub fn far_end(scene: &Scene, tag: &mut Tag, far: &mut FarEnd) -> bool {
    match noted(scene, tag, far) {
        ELSEWHERE => false,
        NOTED => true,
        // Nobody's, or older than authd, or forgotten because the table is full: the socket itself tells them apart.
        _ => {
            far_socket(scene, far);
            true
        }
    }
}

const ELSEWHERE: u32 = 0;
const NOTED: u32 = 1;
const NOT_NOTED: u32 = 2;

/// What the far end wrote down of itself.
#[inline(never)]
fn noted(scene: &Scene, tag: &mut Tag, far: &mut FarEnd) -> u32 {
    let nobody = scene.root.veiled(UNMANAGED);
    *far = FarEnd::remote(*scene.remote(), tag.netns);
    far.workload = nobody;
    if scene.skb.interface() != LOOPBACK {
        return ELSEWHERE;
    }
    far.on_node = true;
    far.scope = 0;
    if tag.netns == 0 {
        tag.netns = netns_of_far_end(scene);
    }
    let key = local_key(
        tag.netns,
        far.address,
        scene.remote_port(),
        *scene.local(),
        scene.local_port(),
        scene.packet.protocol,
    );
    if let Some(entry) = maps::local(&key) {
        far.cgroup = entry.cgroup;
        let now = known_now(&scene.root, entry.cgroup, entry.workload, entry.instance);
        far.workload = scene.root.veiled(now.workload);
        far.scope = now.instance;
        return NOTED;
    }
    NOT_NOTED
}

/// Notes in `far` whether another node vouches for a caller from elsewhere. Returns whether one does.
#[inline(never)]
pub fn introduce(scene: &Scene, far: &mut FarEnd) -> bool {
    if scene.root.flags & root_flags::HEARS == 0 || scene.packet.protocol != IPPROTO_TCP {
        return false;
    }
    let heard = hear(&Kernel, &scene.skb, &scene.packet);
    far.introduce(&heard);
    heard.is_vouched()
}

/// The same where a listener answers.
#[inline(never)]
pub fn introduce_again(scene: &Scene, far: &mut FarEnd) -> bool {
    if scene.root.flags & root_flags::HEARS == 0 || scene.packet.protocol != IPPROTO_TCP {
        return false;
    }
    let heard = hear_answer(&Kernel, &scene.skb, &scene.packet);
    far.introduce(&heard);
    heard.is_vouched()
}

/// Remembers what a SYN said that passes. Returns whether it is one.
#[inline(never)]
pub fn note_introduction(scene: &Scene, far: &FarEnd) -> bool {
    let packet = &scene.packet;
    if !packet.opens_tcp() {
        return false;
    }
    let (source, destination) = ((packet.source, packet.source_port), (packet.destination, packet.destination_port));
    let at = packet.transport as usize * 4;
    let Some([sequence]) = scene.skb.words::<1>(at + 4) else { return false };
    let spoken = Spoken { label: far.label, key_id: far.key_id, used: 0, reserved: 0 };
    maps::set_spoken(&syn_key(source, destination, u32::from_be(sequence)), &spoken);
    true
}

/// Whose a cgroup is under this generation: what was noted of it may be older.
#[inline(always)]
pub fn known_now(root: &Root, cgroup: u64, workload: u32, instance: u64) -> Opener {
    if cgroup != 0
        && let Some(entry) = Kernel.identity(root, cgroup)
    {
        return Opener { workload: entry.workload, instance: entry.instance };
    }
    Opener { workload, instance }
}

/// Whose the socket at the far end of a loopback flow is, by the cgroup in which it was made. Returns whether there is one.
#[inline(never)]
fn far_socket(scene: &Scene, far: &mut FarEnd) -> bool {
    let ends = Ends {
        remote: scene.local(),
        local: scene.remote(),
        remote_port: scene.local_port(),
        local_port: scene.remote_port(),
    };
    let tcp = scene.packet.protocol == IPPROTO_TCP;
    let found = scene.skb.with_socket(tcp, &ends, |sock| {
        let who = resolve(&Kernel, &scene.root, &sock);
        far.cgroup = who.cgroup;
        far.workload = scene.root.veiled(who.workload);
        far.scope = who.instance;
    });
    found.is_some()
}

/// The cookie that the socket at the far end of a loopback flow remembers; 0 if it remembers none either.
#[inline(never)]
fn netns_of_far_end(scene: &Scene) -> u64 {
    // The far socket's own view: its remote end is our local one.
    let ends = Ends {
        remote: scene.local(),
        local: scene.remote(),
        remote_port: scene.local_port(),
        local_port: scene.remote_port(),
    };
    let tcp = scene.packet.protocol == IPPROTO_TCP;
    scene.skb.with_socket(tcp, &ends, |sock| tag::of(sock.0.cast()).map_or(0, |far| far.netns)).unwrap_or(0)
}
