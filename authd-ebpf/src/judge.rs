//! The common code's questions, each as a subprogram with a stack of its own: the frames of a call chain share 512 bytes.
//! Each returns a scalar that its callers use: a subprogram that returns nothing may leave a pointer in the return register,
//! which the verifier refuses.

use authd_common::{
    identity::resolve,
    verdict::{FarEnd, Opener, Verdict, decide_in, decide_out},
};

use crate::{maps::Kernel, packet::Scene};

/// Whose socket it is: whether a workload's.
#[inline(never)]
pub fn identify(scene: &mut Scene) -> bool {
    scene.who = resolve(&Kernel, &scene.root, &scene.skb);
    scene.who.workload = scene.root.veiled(scene.who.workload);
    scene.who.is_managed()
}

/// May the socket's workload open a flow to the remote end?
#[inline(never)]
pub fn outbound(scene: &Scene, verdict: &mut Verdict) -> bool {
    let opener = Opener { workload: scene.who.workload, instance: scene.who.instance };
    *verdict = decide_out(&Kernel, &scene.root, &opener, scene.remote(), scene.packet.protocol, scene.remote_port());
    verdict.action.passes()
}

/// May the far end open a flow to the socket's workload?
#[inline(never)]
pub fn inbound(scene: &Scene, far: &FarEnd, verdict: &mut Verdict) -> bool {
    *verdict = decide_in(&Kernel, &scene.root, scene.who.workload, far, scene.packet.protocol, scene.local_port());
    verdict.action.passes()
}
