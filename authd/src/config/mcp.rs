//! `[mcp]`: servers of the Model Context Protocol that are started here.

use schemars::JsonSchema;
use serde::Deserialize;
use toml::Spanned;

use crate::policy::diagnostic::{Diagnostic, Place};

const CGROUP: &str = "/authd.mcp";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mcp {
    /// Below the cgroup that is enforced. Nobody else has processes there.
    pub cgroup: String,
}

#[derive(Deserialize, JsonSchema, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct McpFile {
    /// The cgroup, below the one that is enforced, in which each server that authd starts has its own: `CGROUP/NAME/ID`. What is
    /// in it belongs to authd, and is ended with it. Default: `/authd.mcp`.
    #[schemars(with = "Option<String>")]
    cgroup: Option<Spanned<String>>,
}

impl McpFile {
    pub(super) fn mcp(self, at: &dyn Fn(std::ops::Range<usize>) -> Place) -> Result<Mcp, Diagnostic> {
        let Some(cgroup) = self.cgroup else { return Ok(Mcp { cgroup: CGROUP.to_owned() }) };
        let text = cgroup.as_ref();
        let is_name = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
        // The root itself is everybody's.
        if !text.strip_prefix('/').is_some_and(|rest| rest.split('/').all(is_name)) {
            let message = format!("`{}` is no path of a cgroup", text.escape_default());
            let help = "write it as policies do, such as \"/system.slice/authd.service/mcp\"";
            return Err(Diagnostic::error("bad_cgroup", at(cgroup.span()), message, help));
        }
        Ok(Mcp { cgroup: cgroup.into_inner() })
    }
}
