//! From policy files to an image of the kernel's tables.
pub mod image;
