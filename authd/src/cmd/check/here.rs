//! What a policy names and this node has not: files, programs, users.
//!
//! Enters: a model and its directory. Leaves: warnings. Never: what is in a file; nothing is run.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::PermissionsExt,
    path::Path,
};

use nix::unistd::{Uid, User};

use crate::{
    daemon::settings::{MAX_FILE, named},
    policy::{
        diagnostic::{Diagnostic, Place},
        model::{Model, Reach},
    },
};

pub fn lint(model: &Model, directory: &Path) -> Vec<Diagnostic> {
    let mut warnings = Vec::new();
    files(model, directory, &mut warnings);
    approvers(model, &mut warnings);
    servers(model, &mut warnings);
    warnings
}

/// Bundles, revocation lists, keys of issuers, secrets.
fn files(model: &Model, directory: &Path, warnings: &mut Vec<Diagnostic>) {
    for (name, place) in named(model) {
        let path = directory.join(name);
        let Err(error) = readable(&path) else { continue };
        // The daemon is root.
        if error.kind() == io::ErrorKind::PermissionDenied && !Uid::effective().is_root() {
            continue;
        }
        warnings.push(Diagnostic::warning(
            "unreadable_file",
            place.clone(),
            format!("{}: {error}", path.display()),
            "put the file there: until then, nothing is accepted that needs it",
        ));
    }
}

fn readable(path: &Path) -> io::Result<()> {
    // Opening a pipe would wait for who writes.
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    if metadata.len() > MAX_FILE {
        return Err(io::Error::other(format!("it is larger than {} MiB", MAX_FILE >> 20)));
    }
    File::open(path).map(drop)
}

fn approvers(model: &Model, warnings: &mut Vec<Diagnostic>) {
    for approvers in &model.approvers {
        for user in &approvers.users {
            let message =
                format!("this node has no user `{user}`, who is to approve as one of approvers `{}`", approvers.name);
            unknown_user(user, &approvers.place, message, warnings);
        }
    }
}

/// What authd starts.
fn servers(model: &Model, warnings: &mut Vec<Diagnostic>) {
    for server in &model.mcp_servers {
        let Reach::Command { argv, user, environment: _ } = &server.reach else { continue };
        let message = format!("this node has no user `{user}`, as whom MCP server `{}` is to run", server.name);
        unknown_user(user, &server.place, message, warnings);
        let Some(program) = argv.first() else { continue };
        let why = match fs::metadata(program) {
            Ok(metadata) if !metadata.is_file() => "it is no regular file".to_owned(),
            Ok(metadata) if metadata.permissions().mode() & 0o111 == 0 => "nobody may execute it".to_owned(),
            Ok(_) => continue,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => continue,
            Err(error) => error.to_string(),
        };
        warnings.push(Diagnostic::warning(
            "no_program",
            server.place.clone(),
            format!("MCP server `{}` cannot be started: {program}: {why}", server.name),
            "install the program, or correct `command`",
        ));
    }
}

/// Numbers do not have to be in any list of users. Where users cannot be looked up now, nothing is said of them.
fn unknown_user(user: &str, place: &Place, message: String, warnings: &mut Vec<Diagnostic>) {
    let is_number = !user.is_empty() && user.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number && matches!(User::from_name(user), Ok(None)) {
        let help = "create the user, or name another one";
        warnings.push(Diagnostic::warning("unknown_user", place.clone(), message, help));
    }
}
