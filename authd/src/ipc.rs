//! What the two processes say to each other: few messages, typed, bounded.
//!
//! Enters and leaves: JSON messages over a pair of sequenced-packet sockets, some with a descriptor. Whoever reads believes
//! nothing: a message that is too long, or has a field too many, ends the connection. What *control* asks for is checked
//! again by *dataplane* against the policy in force; see `daemon/granting.rs`.

mod agents;
mod channel;

use std::{
    collections::BTreeMap,
    io::{self, Read, Seek, Write},
    net::SocketAddr,
    os::fd::OwnedFd,
};

use jiff::Timestamp;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use self::{
    agents::{Act, ActOutcome, Acted, Denied, Exchange, ExchangedToken, Fresh, Message, OwnIssuer, Webhook},
    channel::{Channel, IpcError, MAX_MESSAGE, pair},
};
use crate::{
    daemon::{
        granting::Effect,
        metrics::results::{Checked, Fetched},
    },
    decisions::asked,
    digest::Digest,
    grants::{
        Id,
        proof::{Shown, Token},
    },
    proofs::{api_key::text::KeyId, x509::identity::VerifiedCertificate},
    store::revoked::Revoked,
};

/// Entries of one message that has a list of them: names have 64 bytes at most, so that it is not too long.
pub const MAX_ENTRIES: usize = 64;
/// Settings travel as a file in memory; no policy with its files is larger.
pub const MAX_SETTINGS: u64 = 256 << 20;

/// A connection's number, given by dataplane.
pub type Connection = u64;
/// A question's number, given by who asks.
pub type Question = u64;

/// Who is at the other end of a connection, as dataplane found out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "caller", rename_all = "snake_case", deny_unknown_fields)]
pub enum Caller {
    /// A process of this node, known by its cgroup. Without a workload: unmanaged.
    Local {
        workload: Option<Workload>,
        uid: u32,
        /// Over TCP on loopback: for MCP alone.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        tcp: bool,
    },
    /// Somebody elsewhere, at an address; and whom another node vouches that it is.
    Remote { address: SocketAddr, vouched: Option<VouchedCaller> },
    /// An operator, on the operators' socket.
    Admin { uid: u32 },
}

/// A workload of another node, which vouches for it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VouchedCaller {
    pub node: String,
    pub spiffe_id: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    pub name: String,
    pub spiffe_id: String,
    pub cgroup: String,
}

/// From dataplane to control.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case", deny_unknown_fields)]
pub enum ToControl {
    /// Another policy, or other files. The descriptor holds [`Settings`].
    Settings,
    /// Somebody connected. The descriptor is the connection.
    Connected {
        connection: Connection,
        caller: Caller,
    },
    Granted {
        question: Question,
        grant: Granted,
    },
    /// The grant was not given, or does not exist.
    NotGranted {
        question: Question,
        refusal: Refusal,
    },
    Returned {
        question: Question,
    },
    Holds {
        question: Question,
        grants: Vec<Granted>,
    },
    Revoked {
        question: Question,
        effect: Effect,
    },
    /// A node may speak for these callers: for each one that it named, in their order, the number that means it.
    Admitted {
        question: Question,
        /// Which of the node's keys this session's is.
        key_id: u8,
        /// How long the key and the numbers hold from now.
        seconds: u32,
        labels: Vec<Option<u32>>,
    },
    /// A token for which one was exchanged.
    Exchanged {
        question: Question,
        token: Box<ExchangedToken>,
    },
    /// A server was started. The descriptors are its standard input and output, and one that is closed to end it.
    Launched {
        question: Question,
    },
    /// What became of a call.
    Acted {
        question: Question,
        acted: Box<Acted>,
    },
    /// A call waits for people: the webhook is told. The descriptor holds the message: [`Message`].
    Notify,
    /// What became of approvals. The descriptor holds the answer.
    Approvals {
        question: Question,
    },
    /// SPIFFE IDs of this node's workloads, for which it speaks to other nodes. The descriptor holds them: [`Identities`].
    Identities,
    /// Something was revoked: whatever was accepted before is checked anew. Answered by [`FromControl::Forgotten`].
    Forget {
        question: Question,
    },
}

/// From control to dataplane.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case", deny_unknown_fields)]
pub enum FromControl {
    /// Settings are in use: callers can be served.
    Ready {
        generation: u32,
    },
    /// A caller showed these proofs for this rule.
    Grant {
        question: Question,
        connection: Connection,
        wanted: Wanted,
    },
    /// A caller has no more use for a grant of his.
    Return {
        question: Question,
        connection: Connection,
        grant: Id,
    },
    /// Which grants a caller holds.
    Held {
        question: Question,
        connection: Connection,
    },
    /// A caller was refused before it came to a grant.
    Refused {
        connection: Connection,
        rule: Option<String>,
        reason: String,
        proofs: Vec<Shown>,
    },
    /// The same for a request that a proxy received: no grant, but whether it may pass.
    Forward {
        question: Question,
        connection: Connection,
        wanted: Wanted,
        request: String,
    },
    /// A proxy's request was decided without asking.
    Forwarded {
        connection: Connection,
        rule: String,
        reason: Option<String>,
        proofs: Vec<Shown>,
        request: String,
    },
    /// A caller wants to act for the subject of a token that was verified. Answered by [`ToControl::Exchanged`] or
    /// [`ToControl::NotGranted`].
    Exchange {
        question: Question,
        connection: Connection,
        exchange: Box<Exchange>,
    },
    /// A caller wants to call a tool, and the action policy decided. Answered by [`ToControl::Acted`] or
    /// [`ToControl::NotGranted`].
    Act {
        question: Question,
        connection: Connection,
        act: Box<Act>,
    },
    /// Somebody of this node asks about calls that wait for approval, or decides one. Answered by [`ToControl::Approvals`].
    Approve {
        question: Question,
        connection: Connection,
        asked: asked::Question,
        token: Option<Box<Fresh>>,
    },
    /// A token for an MCP server, by which this node passes on what the caller asks there. Answered by [`ToControl::Exchanged`] or
    /// [`ToControl::NotGranted`].
    Downstream {
        question: Question,
        connection: Connection,
        server: String,
        /// For whom it is, by the policy that control follows: it may have not heard of the one in force.
        audience: String,
        token: Option<Box<Token>>,
    },
    /// Whether a caller may still use an MCP server, by that token if it shows one. Answered by [`ToControl::Returned`] or
    /// [`ToControl::NotGranted`].
    Admit {
        question: Question,
        connection: Connection,
        server: String,
        token: Option<Box<Token>>,
    },
    /// An MCP server that the policy starts, for a session of the caller. Answered by [`ToControl::Launched`] or
    /// [`ToControl::NotGranted`].
    Launch {
        question: Question,
        connection: Connection,
        server: String,
    },
    /// What became of a call that went through the MCP gateway.
    Called {
        connection: Connection,
        server: String,
        /// Its name in the policy, if it has one.
        tool: Option<String>,
        outcome: String,
        microseconds: u64,
    },
    /// An operator revokes something.
    Revoke {
        question: Question,
        connection: Connection,
        what: Revoked,
        text: String,
    },
    Forgotten {
        question: Question,
    },
    /// Another node's authd, known by its certificate, wants to speak for callers. Answered by [`ToControl::Admitted`] or
    /// [`ToControl::NotGranted`]. The same connection may ask again, for further ones.
    NodeSession {
        question: Question,
        connection: Connection,
        certificate: Box<VerifiedCertificate>,
        key: NodeKey,
        speaks_for: Vec<String>,
    },
    /// Another node's authd accepted this one: by which number each of this node's callers is known there.
    NodeAccepted {
        /// Its name in the policy.
        node: String,
        key: NodeKey,
        key_id: u8,
        seconds: u32,
        labels: Vec<(String, u32)>,
        /// There come no more labels of this session: it is in use from now on.
        last: bool,
    },
    /// A revocation list of an authority names a certificate for which it vouched.
    Listed {
        authority: String,
        certificate: Digest,
    },
    /// What happened since the last message of this kind, and how often.
    Counted {
        counts: Vec<(Counted, u32)>,
    },
    /// When certificates and lists end that settings brought. `None`: there is none now that can be read.
    Ends {
        ends: Vec<(Ending, Option<Timestamp>)>,
    },
    Closed {
        connection: Connection,
    },
}

/// What control counts. A result that dataplane does not know counts as another one: `daemon/metrics/results.rs`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(tag = "counted", rename_all = "snake_case", deny_unknown_fields)]
pub enum Counted {
    /// A TLS handshake came to its end.
    Handshake { result: String },
    /// Another node asked for a session, and this process refused.
    NodeSession { result: String },
    /// A proof was looked at, and dataplane hears no more of it: it, or another one of the same request, was refused.
    Proof { proof: Checked, result: String },
    /// A token came whose verification was remembered.
    CachedToken,
    /// The webhook was told of a call that waits, or could not be.
    Webhook { result: String },
    /// An issuer, by its name in the policy, was asked.
    Fetch { issuer: String, kind: Fetched, result: String },
}

/// Something of the settings that ends, of authorities by their names in the policy.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "ending", rename_all = "snake_case", deny_unknown_fields)]
pub enum Ending {
    /// The first of an authority's certificates.
    Bundle { authority: String },
    /// The first of its revocation lists.
    Lists { authority: String },
    /// The first certificate of the listener's chain.
    Listener,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    pub rule: String,
    pub proofs: Vec<Shown>,
    /// An API key is checked by dataplane, which alone knows the keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key: Option<PresentedKey>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u32>,
}

/// What dataplane needs of an API key: its public part, and the SHA-256 of its secret one.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PresentedKey {
    pub id: KeyId,
    pub hash: Digest,
}

impl std::fmt::Debug for PresentedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PresentedKey").field("id", &self.id).finish_non_exhaustive()
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Granted {
    pub id: Id,
    pub rule: String,
    pub until: Timestamp,
}

/// The secret of a session between two nodes, of one direction: what the sender authenticates identities with.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeKey(pub [u8; 16]);

impl std::fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NodeKey")
    }
}

/// What [`ToControl::Identities`] comes with.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identities {
    pub spiffe_ids: Vec<String>,
}

/// Why not: a stable reason, and a sentence for people.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[serde(deny_unknown_fields)]
#[error("{message}")]
pub struct Refusal {
    pub reason: String,
    pub message: String,
}

/// What control needs to know of policy and settings.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub generation: u32,
    /// Policy files: name and text.
    pub sources: Vec<(String, String)>,
    /// Files that the policy and the settings name, by the path that they name them by. Absent if unreadable.
    pub files: BTreeMap<String, String>,
    /// PEM chain and key of the listener for peers.
    pub identity: Option<Identity>,
    pub tls12: bool,
    /// This node as an issuer of tokens, if it is one.
    #[serde(default)]
    pub issuer: Option<OwnIssuer>,
    #[serde(default)]
    pub webhook: Option<Webhook>,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    pub certificates: String,
    pub key: String,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Identity")
    }
}

/// What travels as a file in memory, because no message has room for it.
pub trait Sealed: Serialize + DeserializeOwned {
    /// As a file that nobody can change any more.
    fn seal(&self) -> io::Result<OwnedFd> {
        let fd = memfd_create(c"authd-settings", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let mut file = std::fs::File::from(fd);
        file.write_all(&serde_json::to_vec(self)?)?;
        let seals = nix::fcntl::SealFlag::all();
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_ADD_SEALS(seals))?;
        Ok(file.into())
    }

    fn open(fd: OwnedFd) -> io::Result<Self> {
        let mut file = std::fs::File::from(fd);
        file.rewind()?;
        let mut text = Vec::new();
        file.take(MAX_SETTINGS).read_to_end(&mut text)?;
        Ok(serde_json::from_slice(&text)?)
    }
}

impl Sealed for asked::Answer {}
impl Sealed for Message {}
impl Sealed for Settings {}
impl Sealed for Identities {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_settings_cannot_be_changed() {
        let fd = Settings::default().seal().unwrap();
        let mut file = std::fs::File::from(fd);
        assert!(file.write_all(b"x").is_err());
    }
}
