//! A socket's storage: finding it, and writing a verdict into it.

use core::ffi::c_void;

use authd_common::{
    tables::{Grant, Tables, Tag},
    verdict::{Action, Verdict},
};

use crate::{
    maps::{self, Kernel},
    raw,
};

/// A socket's tag, if it has one.
#[inline(always)]
pub fn of<'a>(socket: *mut c_void) -> Option<&'a mut Tag> {
    raw::storage(maps::tags(), socket).map(raw::value)
}

/// A socket's tag; a new one is all zero but for the protocol. `None` if there is no memory for it.
#[inline(always)]
pub fn of_or_new<'a>(socket: *mut c_void, protocol: u8) -> Option<&'a mut Tag> {
    let tag: &mut Tag = raw::storage_or_new(maps::tags(), socket).map(raw::value)?;
    tag.protocol = protocol;
    Some(tag)
}

/// Remembers a verdict. The generation is written last: until then the tag counts as undecided.
#[inline(always)]
pub fn settle(tag: &mut Tag, workload: u32, generation: u32, verdict: &Verdict) {
    raw::set(&raw mut tag.generation, 0);
    tag.workload = workload;
    tag.rule = verdict.rule;
    tag.reason = verdict.reason.code();
    tag.action = verdict.action.code();
    tag.until = verdict.until;
    tag.grant = verdict.grant;
    raw::set(&raw mut tag.generation, generation);
}

/// Whether the remembered verdict still holds.
#[inline(always)]
pub fn is_current(tag: &Tag, generation: u32) -> bool {
    tag.generation == generation
        && (tag.until == 0 || raw::coarse_now() < tag.until)
        && (!tag.grant.is_some() || rests_well(tag.action, tag.grant))
}

/// Whether the grant that a verdict rests on lives. A denial rests on none: it only remembers which one is gone.
#[inline(always)]
pub fn rests_well(action: u8, grant: Grant) -> bool {
    !Action::from_code(action).passes()
        || matches!(Kernel.slot(grant.slot), Some(slot) if slot.is_alive(grant.serial, raw::coarse_now()))
}

/// Notes the task that acts: the one that an operator will want to find.
#[inline(always)]
pub fn note_task(tag: &mut Tag) {
    tag.pid = (raw::pid_tgid() >> 32) as u32;
    tag.uid = raw::uid_gid() as u32;
    raw::comm(&mut tag.comm);
}
