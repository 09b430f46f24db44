//! What the two processes say to each other: few messages, typed, bounded.
//!
//! Enters and leaves: JSON messages over a pair of sequenced-packet sockets, some with a descriptor. Whoever reads believes
//! nothing: a message that is too long, or has a field too many, ends the connection. What *control* asks for is checked
//! again by *dataplane* against the policy in force; see `daemon/granting.rs`.

use std::{
    collections::BTreeMap,
    io::{self, IoSlice, IoSliceMut, Read, Seek, Write},
    net::SocketAddr,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use jiff::Timestamp;
use nix::sys::{
    memfd::{MFdFlags, memfd_create},
    socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    daemon::{
        granting::Effect,
        metrics::results::{Checked, Fetched},
    },
    decisions::{
        approvals::{self, TokenFacts},
        asked,
        call::{Arguments, CallHash},
    },
    digest::Digest,
    grants::{
        Id,
        proof::{Shown, Token},
    },
    proofs::{
        api_key::text::KeyId,
        claims::{Confirmation, VerifiedToken},
        exchange::Asked,
        x509::identity::VerifiedCertificate,
    },
    store::revoked::Revoked,
};

/// No message is longer.
pub const MAX_MESSAGE: usize = 32 << 10;
/// Entries of one message that has a list of them: names have 64 bytes at most, so that it is not too long.
pub const MAX_ENTRIES: usize = 64;
/// Settings travel as a file in memory; no policy with its files is larger.
pub const MAX_SETTINGS: u64 = 256 << 20;
/// Messages that wait in the kernel for the other side.
const BUFFER: usize = 4 << 20;

/// A connection's number, given by dataplane.
pub type Connection = u64;
/// A question's number, given by who asks.
pub type Question = u64;

/// Who is at the other end of a connection, as dataplane found out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "caller", rename_all = "snake_case", deny_unknown_fields)]
pub enum Caller {
    /// A process of this node, known by its cgroup. Without a workload: unmanaged.
    Local { workload: Option<Workload>, uid: u32 },
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
        token: Option<Box<TokenFacts>>,
    },
    /// A token for an MCP server, by which this node passes on what the caller asks there. Answered by [`ToControl::Exchanged`] or
    /// [`ToControl::NotGranted`].
    Downstream {
        question: Question,
        connection: Connection,
        server: String,
        token: Option<Box<Token>>,
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

/// A call of a tool, as control decided about it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Act {
    /// As the policy calls it.
    pub tool: String,
    pub arguments: Arguments,
    pub ruling: Ruling,
    /// Names of the action policies that decided.
    pub policies: Vec<String>,
    /// By what the caller acts for somebody, and what else its permit asks for.
    pub proofs: Vec<Shown>,
}

/// What the action policy says of a call.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "ruling", rename_all = "snake_case", deny_unknown_fields)]
pub enum Ruling {
    Allowed,
    /// If one of these approves it.
    Pending {
        approvers: Vec<String>,
    },
    Denied {
        reason: String,
    },
}

/// What became of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Acted {
    pub call: CallHash,
    pub outcome: ActOutcome,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case", deny_unknown_fields)]
pub enum ActOutcome {
    Allowed {
        approval: Option<approvals::Id>,
        permit: Option<Granted>,
    },
    /// Nobody has said yes yet.
    Pending {
        approval: approvals::Id,
        until: Timestamp,
    },
    Denied {
        refusal: Refusal,
    },
}

/// What was verified of a request for a token (RFC 8693).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exchange {
    pub subject: VerifiedToken,
    pub asked: Asked,
    /// What the caller showed that it holds.
    pub holds: Confirmation,
    /// Of a caller elsewhere: the certificate of its connection, if an authority of the policy vouches for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<Box<VerifiedCertificate>>,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExchangedToken {
    pub text: String,
    pub scopes: Vec<String>,
    pub expires: Timestamp,
    /// Whether it has to be shown with a DPoP proof (RFC 9449).
    pub dpop: bool,
}

impl std::fmt::Debug for ExchangedToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ExchangedToken")
    }
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

/// Who is told of calls that wait for approval.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Webhook {
    pub url: String,
    /// As its file has it.
    pub secret: String,
}

impl std::fmt::Debug for Webhook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Webhook")
    }
}

/// What [`ToControl::Notify`] comes with.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    pub id: approvals::Id,
    pub body: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnIssuer {
    /// The `iss` of its tokens.
    pub url: String,
    /// Its public keys, as a key set (RFC 7517, 5).
    pub keys: String,
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

#[derive(Debug, thiserror::Error)]
pub enum IpcError {
    #[error("the other process does not read")]
    Full,
    #[error("a message of {0} bytes is too long")]
    TooLong(usize),
    #[error("no message that this process knows: {0}")]
    Unknown(serde_json::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The two ends, each for one process.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    for end in [&a, &b] {
        nix::sys::socket::setsockopt(end, nix::sys::socket::sockopt::SndBuf, &BUFFER)?;
    }
    Ok((a, b))
}

/// One end.
pub struct Channel {
    fd: AsyncFd<OwnedFd>,
}

impl Channel {
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        // SAFETY: an `OwnedFd` is open, and the same one, for as long as it exists; the `AsyncFd` owns it.
        Ok(Self { fd: unsafe { AsyncFd::register_with_interest(fd, interest) }? })
    }

    /// Sends at once, or says that there is no room.
    pub fn try_send<T: Serialize>(&self, message: &T, attached: Option<BorrowedFd<'_>>) -> Result<(), IpcError> {
        let bytes = encode(message)?;
        match transmit(self.fd.get_ref(), &bytes, attached) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(IpcError::Full),
            Err(error) => Err(error.into()),
            Ok(()) => Ok(()),
        }
    }

    /// Sends when there is room.
    pub async fn send<T: Serialize>(&self, message: &T) -> Result<(), IpcError> {
        let bytes = encode(message)?;
        loop {
            let mut ready = self.fd.writable().await?;
            match ready.try_io(|fd| transmit(fd.get_ref(), &bytes, None)) {
                Ok(result) => return Ok(result?),
                Err(_would_block) => {}
            }
        }
    }

    /// The next message, with its descriptor if it has one; `None` when the other process is gone.
    pub async fn receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Option<OwnedFd>)>, IpcError> {
        loop {
            let mut ready = self.fd.readable().await?;
            match ready.try_io(|fd| collect(fd.get_ref())) {
                Ok(Ok((bytes, _))) if bytes.is_empty() => return Ok(None),
                Ok(Ok((bytes, attached))) => {
                    let message = serde_json::from_slice(&bytes).map_err(IpcError::Unknown)?;
                    return Ok(Some((message, attached)));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Ok(Err(error)) => return Err(error.into()),
                Err(_would_block) => {}
            }
        }
    }
}

fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, IpcError> {
    let bytes = serde_json::to_vec(message).map_err(IpcError::Unknown)?;
    if bytes.len() > MAX_MESSAGE { Err(IpcError::TooLong(bytes.len())) } else { Ok(bytes) }
}

fn transmit(fd: &OwnedFd, bytes: &[u8], attached: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let descriptors: Vec<RawFd> = attached.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = ControlMessage::ScmRights(&descriptors);
    let control: &[ControlMessage<'_>] = if descriptors.is_empty() { &[] } else { std::slice::from_ref(&rights) };
    sendmsg::<()>(fd.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

fn collect(fd: &OwnedFd) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let (length, truncated, received) = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<()>(fd.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let mut received = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(descriptors) = control {
                // SAFETY: the kernel just made these descriptors for this process, and nobody else has them.
                received.extend(descriptors.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        let truncated = message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
        (message.bytes, truncated, received)
    };
    if truncated {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message that is longer than any"));
    }
    bytes.truncate(length);
    Ok((bytes, received.into_iter().next()))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn channels() -> (Channel, Channel) {
        let (a, b) = pair().unwrap();
        (Channel::new(a).unwrap(), Channel::new(b).unwrap())
    }

    #[tokio::test]
    async fn messages_arrive_whole_and_with_their_descriptor() {
        let (a, b) = channels();
        let settings = Settings { generation: 7, ..Settings::default() }.seal().unwrap();
        a.try_send(&ToControl::Settings, Some(settings.as_fd())).unwrap();
        let (message, fd) = b.receive::<ToControl>().await.unwrap().unwrap();
        assert!(matches!(message, ToControl::Settings));
        assert_eq!(Settings::open(fd.unwrap()).unwrap().generation, 7);
    }

    #[tokio::test]
    async fn a_message_that_is_too_long_is_not_sent() {
        let (a, _b) = channels();
        let refusal = Refusal { reason: "x".repeat(MAX_MESSAGE), message: String::new() };
        let message = ToControl::NotGranted { question: 1, refusal };
        assert!(matches!(a.try_send(&message, None), Err(IpcError::TooLong(_))));
    }

    #[tokio::test]
    async fn what_is_no_message_is_an_error() {
        let (a, b) = channels();
        for bytes in [&b"{}"[..], b"\xff", br#"{"message":"closed","connection":1,"more":2}"#] {
            transmit(a.fd.get_ref(), bytes, None).unwrap();
            assert!(matches!(b.receive::<FromControl>().await, Err(IpcError::Unknown(_))));
        }
        transmit(a.fd.get_ref(), &vec![b' '; MAX_MESSAGE + 1], None).unwrap();
        assert!(matches!(b.receive::<FromControl>().await, Err(IpcError::Io(_))));
    }

    #[tokio::test]
    async fn the_end_of_the_other_process_is_seen() {
        let (a, b) = channels();
        drop(a);
        assert!(b.receive::<FromControl>().await.unwrap().is_none());
    }

    #[test]
    fn sealed_settings_cannot_be_changed() {
        let fd = Settings::default().seal().unwrap();
        let mut file = std::fs::File::from(fd);
        assert!(file.write_all(b"x").is_err());
    }
}
