//! What an agent may do: its calls of tools, and what people say to them.

pub mod approvals;
pub mod call;
pub mod kept;
