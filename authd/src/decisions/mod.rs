//! What an agent may do: its calls of tools, and what people say to them.

pub mod approvals;
pub mod asked;
pub mod call;
pub mod kept;
pub mod notify;
