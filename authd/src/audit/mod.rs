//! What happened, for those who have to answer for it.

pub mod record;
pub mod sink;
