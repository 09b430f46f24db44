//! The MCP gateway between agents and servers that its authors did not write.

mod npm;
mod python;
mod raw;
mod stdio;
