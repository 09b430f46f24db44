//! The MCP gateway between agents and servers that its authors did not write.

mod hostile;
mod npm;
mod python;
mod raw;
mod sdk;
mod stdio;
