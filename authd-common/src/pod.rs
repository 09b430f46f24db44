//! The crate's only unsafe code: that the shared records may be read from and written to maps as bytes.
#![expect(unsafe_code, reason = "aya's `Pod` is an unsafe trait")]

use crate::{event::Event, syn, tables};

macro_rules! pod {
    ($($record:ty),+ $(,)?) => { $(
        // SAFETY: `repr(C)`, `Copy`, made of integers and arrays of them alone; the size assertion beside each
        // definition equals the sum of its fields, so no byte is padding.
        unsafe impl aya::Pod for $record {}
    )+ };
}

pod!(
    Event,
    tables::Root,
    tables::IdentityKey,
    tables::IdentityEntry,
    tables::WorkloadEntry,
    tables::PortEntry,
    tables::CellKey,
    tables::Cell,
    tables::Tag,
    tables::FlowKey,
    tables::LocalEntry,
    tables::ConversationKey,
    tables::Conversation,
    tables::DenialKey,
    tables::Denial,
    tables::Counter,
    tables::Sequence,
    tables::GrantKey,
    tables::VouchedKey,
    tables::Grant,
    tables::Slot,
    tables::Permit,
    tables::Listener,
    tables::Flow,
    tables::DropKey,
    tables::Dropped,
    syn::Speaker,
    syn::NodeKeyId,
    syn::NodeKey,
    syn::Spoken,
    syn::Voice,
    syn::LabelKey,
);
