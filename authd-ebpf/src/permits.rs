//! Permits: grants that let a counted number of flows and bytes pass.
//!
//! Enters: a verdict that rests on one. Leaves: the same, on one that still has something to give, or a denial. A flow takes
//! once, when it begins, and spends with each packet. Who is late finds less, and never more.

use authd_common::{
    reason::Reason,
    tables::{Grant, PERMIT_CHAIN, Permit, Root, Tables, Tag, WorkloadEntry, role, root_flags, workload_flags},
    verdict::{Action, Verdict},
};

use crate::{
    maps::{self, Kernel},
    raw,
};

/// Lets one more flow begin on the permit that a verdict rests on, or on one behind it.
#[inline(never)]
pub fn take(root: &Root, workload: u32, verdict: &mut Verdict) -> bool {
    let mut grant = verdict.grant;
    let mut tried = 0;
    while tried < PERMIT_CHAIN && grant.is_permit() {
        let Some(permit) = of(grant) else { break };
        if is_alive(grant) && permit.bytes < permit.most_bytes {
            if raw::take_and_add(&mut permit.begun, 1) < permit.most_begun as u64 {
                verdict.grant = grant;
                return true;
            }
            // Nothing begins: whoever gives back what it took is not to find it gone.
            raw::add(&mut permit.begun, u64::MAX);
        }
        grant = permit.next;
        tried += 1;
    }
    refuse(root, workload, verdict, Reason::PermitUsed)
}

/// Whether a flow that began on a permit may go on with it: it takes none anew.
#[inline(never)]
pub fn goes_on(root: &Root, workload: u32, before: Grant, verdict: &mut Verdict) -> bool {
    match of(before) {
        Some(permit) if permit.bytes < permit.most_bytes => {
            verdict.grant = before;
            true
        }
        _ => refuse(root, workload, verdict, Reason::PermitSpent),
    }
}

/// Counts a packet. Returns whether there was room for it.
#[inline(always)]
pub fn spend(grant: Grant, bytes: u64) -> bool {
    match of(grant) {
        Some(permit) => {
            let spent = raw::take_and_add(&mut permit.bytes, bytes);
            // No counter comes near the end of 64 bits: one that is not bounded by bytes never stops a packet.
            spent.saturating_add(bytes) <= permit.most_bytes
        }
        None => false,
    }
}

/// Of a packet of a TCP flow whose verdict is remembered.
#[inline(always)]
pub fn covers(tag: &Tag, bytes: u64) -> bool {
    !tag.grant.is_permit() || tag.role != role::CLIENT || spend(tag.grant, bytes)
}

/// A connection that never came to be gives back what it took.
#[inline(always)]
pub fn give_back(grant: Grant) {
    if let Some(permit) = of(grant) {
        raw::add(&mut permit.begun, u64::MAX);
    }
}

/// A flow began on it, under the same rule, and it lives.
#[inline(always)]
pub fn is_same(before: Grant, rule: u32, verdict: &Verdict) -> bool {
    before.is_permit() && rule == verdict.rule && is_alive(before)
}

#[inline(always)]
fn is_alive(grant: Grant) -> bool {
    matches!(Kernel.slot(grant.slot), Some(slot) if slot.is_alive(grant.serial, raw::coarse_now()))
}

#[inline(always)]
fn of<'a>(grant: Grant) -> Option<&'a mut Permit> {
    let permit: &mut Permit = raw::value(maps::permit(grant.slot)?);
    if permit.serial == grant.serial { Some(permit) } else { None }
}

#[inline(always)]
pub fn refuse(root: &Root, workload: u32, verdict: &mut Verdict, reason: Reason) -> bool {
    // Field by field: the frames of a program have no room for another verdict.
    let observes = |entry: WorkloadEntry| entry.flags & workload_flags::OBSERVE != 0;
    let observed = root.flags & root_flags::OBSERVE != 0 || Kernel.workload(root, workload).is_some_and(observes);
    verdict.action = if observed { Action::Observe } else { Action::Deny };
    verdict.reason = reason;
    verdict.grant = Grant::NONE;
    observed
}
