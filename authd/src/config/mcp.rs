//! `[mcp]`: where servers of the Model Context Protocol are started, and where agents come besides the Unix socket.

use std::net::SocketAddr;

use schemars::JsonSchema;
use serde::Deserialize;
use toml::Spanned;

use crate::policy::diagnostic::{Diagnostic, Place};

const CGROUP: &str = "/authd.mcp";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mcp {
    /// Below the cgroup that is enforced. Nobody else has processes there.
    pub cgroup: String,
    /// Where agents come that speak HTTP over TCP alone: on loopback.
    pub listen: Option<SocketAddr>,
}

#[derive(Deserialize, JsonSchema, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct McpFile {
    /// The cgroup, below the one that is enforced, in which each server that authd starts has its own: `CGROUP/NAME/ID`. What is
    /// in it belongs to authd, and is ended with it. Default: `/authd.mcp`.
    #[schemars(with = "Option<String>")]
    cgroup: Option<Spanned<String>>,
    /// Loopback address and port at which agents reach the MCP gateway that speak HTTP over TCP alone, such as `127.0.0.1:7444`. They
    /// are known by the cgroups that their sockets were made in. Default: nowhere.
    #[schemars(with = "Option<String>")]
    listen: Option<Spanned<String>>,
}

impl McpFile {
    pub(super) fn mcp(self, at: &dyn Fn(std::ops::Range<usize>) -> Place) -> Result<Mcp, Diagnostic> {
        let listen = match &self.listen {
            None => None,
            Some(text) => match text.as_ref().parse::<SocketAddr>() {
                Ok(address) if address.ip().is_loopback() && address.port() != 0 => Some(address),
                _ => {
                    let message = format!("`{}` is no address and port on loopback", text.as_ref().escape_default());
                    let help = "write `127.0.0.1:7444` or `[::1]:7444`: on another host, nobody is known by a cgroup";
                    return Err(Diagnostic::error("bad_listen", at(text.span()), message, help));
                }
            },
        };
        let Some(cgroup) = self.cgroup else { return Ok(Mcp { cgroup: CGROUP.to_owned(), listen }) };
        let text = cgroup.as_ref();
        let is_name = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
        // The root itself is everybody's.
        if !text.strip_prefix('/').is_some_and(|rest| rest.split('/').all(is_name)) {
            let message = format!("`{}` is no path of a cgroup", text.escape_default());
            let help = "write it as policies do, such as \"/system.slice/authd.service/mcp\"";
            return Err(Diagnostic::error("bad_cgroup", at(cgroup.span()), message, help));
        }
        Ok(Mcp { cgroup: cgroup.into_inner(), listen })
    }
}
