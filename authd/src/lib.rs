//! authd, the library behind the binary: two flows, in order.

pub mod cmd;
pub mod dataplane;
pub mod policy;
