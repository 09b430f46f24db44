//! From policy files to an image of the kernel's tables.

pub mod build;
pub mod compile;
pub mod diagnostic;
pub mod diff;
pub mod explain;
pub mod file;
pub mod image;
pub mod lint;
pub mod load;
pub mod model;
pub mod network;
pub mod numbers;
pub mod pattern;
pub mod schedule;
