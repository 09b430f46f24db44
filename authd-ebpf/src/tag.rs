//! A socket's storage: finding it, and writing a verdict into it.

use core::ffi::c_void;

use authd_common::{tables::Tag, verdict::Verdict};

use crate::{maps, raw};

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
    raw::set(&raw mut tag.generation, generation);
}

/// Whether the remembered verdict still holds.
#[inline(always)]
pub fn is_current(tag: &Tag, generation: u32) -> bool {
    tag.generation == generation && (tag.until == 0 || raw::coarse_now() < tag.until)
}

/// Notes the task that acts: the one that an operator will want to find.
#[inline(always)]
pub fn note_task(tag: &mut Tag) {
    tag.pid = (raw::pid_tgid() >> 32) as u32;
    tag.uid = raw::uid_gid() as u32;
    raw::comm(&mut tag.comm);
}
