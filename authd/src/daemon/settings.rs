//! What control is told of policy and files: read here, because control sees no files.
//!
//! Enters: the policy in force, the settings. Leaves: their texts. Never: their meaning; nothing in a file is parsed here.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::Daemon;
use crate::{
    ipc::{Identity, Settings, Webhook},
    policy::{
        diagnostic::Place,
        model::{Keys, Model, TokenCheck},
    },
};

/// No file that a policy names is larger.
pub const MAX_FILE: u64 = 16 << 20;

/// The files that were read last, as they were then.
#[derive(Default)]
pub struct Files {
    seen: BTreeMap<PathBuf, Option<Stamp>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: SystemTime,
    length: u64,
    inode: u64,
}

impl Files {
    /// Whether a file is another than the one that was read.
    pub fn changed(&self) -> bool {
        self.seen.iter().any(|(path, stamp)| stamp_of(path) != *stamp)
    }

    /// Everything, read anew.
    pub fn settings(&mut self, daemon: &Daemon) -> Settings {
        self.seen.clear();
        let config = daemon.config();
        let prepared = daemon.in_force();
        let mut files = BTreeMap::new();
        for (name, _) in named(&prepared.model) {
            if let Some(bytes) = self.read(&config.policy.join(name)) {
                files.insert(name.display().to_string(), encode(&bytes));
            }
        }
        if let Some(bytes) = self.read(&config.control.server_authorities) {
            files.insert(SERVER_AUTHORITIES.to_owned(), encode(&bytes));
        }
        let pem = |files: &mut Self, path: &Option<PathBuf>| {
            path.as_ref().and_then(|path| files.read(path)).and_then(|bytes| String::from_utf8(bytes).ok())
        };
        let webhook = config.approvals.webhook.as_ref().and_then(|webhook| {
            let secret = pem(self, &Some(webhook.secret_file.clone()))?;
            Some(Webhook { url: webhook.url.to_string(), secret })
        });
        let (certificates, key) = (pem(self, &config.control.certificate), pem(self, &config.control.key));
        Settings {
            generation: daemon.generation(),
            sources: prepared.sources.iter().map(|s| (s.name.to_string(), s.text.to_string())).collect(),
            files,
            identity: certificates.zip(key).map(|(certificates, key)| Identity { certificates, key }),
            tls12: config.control.tls12,
            issuer: daemon.own_issuer(),
            webhook,
        }
    }

    fn read(&mut self, path: &Path) -> Option<Vec<u8>> {
        // The stamp comes first: a change while the file is read is seen the next time.
        let stamp = stamp_of(path);
        self.seen.insert(path.to_owned(), stamp);
        if stamp.is_none_or(|stamp| stamp.length > MAX_FILE) {
            tracing::error!(path = %path.display(), "a file that the policy or the settings name cannot be read");
            return None;
        }
        match fs::read(path) {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                tracing::error!(%error, path = %path.display(), "a file that the policy or the settings name");
                None
            }
        }
    }
}

/// The name under which settings carry the authorities of issuers' servers: no policy can name such a file.
pub const SERVER_AUTHORITIES: &str = "/server-authorities";

/// Files that a policy names, relative to its directory, and what names them.
pub fn named(model: &Model) -> impl Iterator<Item = (&PathBuf, &Place)> {
    let authorities = model.authorities.iter().flat_map(|authority| {
        std::iter::once(&authority.bundle).chain(&authority.crl_files).map(|path| (path, &authority.place))
    });
    let issuers = model.issuers.iter().filter_map(|issuer| {
        let path = match &issuer.check {
            TokenCheck::Jwt { keys: Keys::File(path), .. } => Some(path),
            TokenCheck::Jwt { keys: Keys::Url(_), .. } => None,
            TokenCheck::Introspection { client_secret_file, .. } => client_secret_file.as_ref(),
            TokenCheck::Own => None,
        };
        Some((path?, &issuer.place))
    });
    authorities.chain(issuers)
}

fn stamp_of(path: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt;
    let metadata = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    Some(Stamp { modified: metadata.modified().ok()?, length: metadata.len(), inode: metadata.ino() })
}

fn encode(bytes: &[u8]) -> String {
    use base64::{Engine, engine::general_purpose::STANDARD};
    STANDARD.encode(bytes)
}
