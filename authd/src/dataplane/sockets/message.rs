//! What authd says to the kernel's socket diagnostics (sock_diag(7), netlink(7)), and how it reads the answers.
//!
//! Enters: sockets to name, datagrams from the kernel. Leaves: requests; answers of which every length was checked. Never:
//! I/O, or memory for a length that a message claims and does not have.
//!
//! Written by hand: the crate for these messages knows neither the destroying nor the storage attributes.

use std::os::fd::{AsRawFd, BorrowedFd};

use authd_common::{
    address::Address,
    tables::{IPPROTO_TCP, IPPROTO_UDP},
};
use nix::errno::Errno;

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    pub const ALL: [Self; 2] = [Self::Tcp, Self::Udp];

    /// From the number in an IP header.
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            IPPROTO_TCP => Some(Self::Tcp),
            IPPROTO_UDP => Some(Self::Udp),
            _ => None,
        }
    }

    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => IPPROTO_TCP,
            Self::Udp => IPPROTO_UDP,
        }
    }

    /// What answers for it in the kernel, where it is not built in.
    pub const fn module(self) -> &'static str {
        match self {
            Self::Tcp => "tcp_diag",
            Self::Udp => "udp_diag",
        }
    }

    /// A bit for each state, by its number in include/net/tcp_states.h, in which a socket is one end of a flow. Listening
    /// and unconnected sockets are none; what waits in TIME_WAIT belongs to no application any more.
    pub const fn flow_states(self) -> u32 {
        match self {
            Self::Tcp => {
                1 << state::ESTABLISHED
                    | 1 << state::SYN_SENT
                    | 1 << state::SYN_RECV
                    | 1 << state::FIN_WAIT1
                    | 1 << state::FIN_WAIT2
                    | 1 << state::CLOSE_WAIT
                    | 1 << state::LAST_ACK
                    | 1 << state::CLOSING
            }
            // A connected one.
            Self::Udp => 1 << state::ESTABLISHED,
        }
    }
}

/// include/net/tcp_states.h
pub mod state {
    pub const ESTABLISHED: u8 = 1;
    pub const SYN_SENT: u8 = 2;
    pub const SYN_RECV: u8 = 3;
    pub const FIN_WAIT1: u8 = 4;
    pub const FIN_WAIT2: u8 = 5;
    pub const CLOSE_WAIT: u8 = 8;
    pub const LAST_ACK: u8 = 9;
    pub const CLOSING: u8 = 11;
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    const fn number(self) -> u8 {
        match self {
            Self::V4 => libc::AF_INET as u8,
            Self::V6 => libc::AF_INET6 as u8,
        }
    }
}

/// One socket in a network namespace.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Socket {
    pub protocol: Protocol,
    pub local: Address,
    pub local_port: u16,
    pub remote: Address,
    pub remote_port: u16,
    /// The interface that the socket is bound to; 0: none.
    pub interface: u32,
    /// SO_COOKIE: tells the socket from a later one with the same ends.
    pub cookie: u64,
}

/// A socket, as a dump shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listed {
    pub socket: Socket,
    /// [`state`]
    pub state: u8,
    /// 0: no process holds it.
    pub inode: u32,
    /// What the map holds for the socket, if a map was asked for and has something.
    pub value: Option<Box<[u8]>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("an answer of the kernel is malformed")]
pub struct Malformed;

/// Bytes of one request to destroy a socket.
pub const DESTROY: usize = HEADER + REQUEST;
/// `struct nlmsghdr`, include/uapi/linux/netlink.h
const HEADER: usize = 16;
/// `struct inet_diag_req_v2`, include/uapi/linux/inet_diag.h
const REQUEST: usize = 8 + IDENTITY;
/// `struct inet_diag_sockid`
const IDENTITY: usize = 48;
/// `struct inet_diag_msg`
const LISTED: usize = 4 + IDENTITY + 20;
/// `struct nlattr`
const ATTRIBUTE: usize = 4;
const _: () = assert!(HEADER == size_of::<libc::nlmsghdr>() && ATTRIBUTE == size_of::<libc::nlattr>());
const _: () = assert!(DESTROY == 72 && LISTED == 72);

// include/uapi/linux/sock_diag.h
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const SK_DIAG_BPF_STORAGE_REQ_MAP_FD: u16 = 1;
const SK_DIAG_BPF_STORAGE: u16 = 1;
const SK_DIAG_BPF_STORAGE_MAP_VALUE: u16 = 3;
// include/uapi/linux/inet_diag.h
const INET_DIAG_REQ_SK_BPF_STORAGES: u16 = 2;
const INET_DIAG_SK_BPF_STORAGES: u16 = 20;
const INET_DIAG_CGROUP_ID: u16 = 21;

/// Appends the request to destroy one socket, to be acknowledged under this number.
pub fn put_destroy(bytes: &mut Vec<u8>, sequence: u32, socket: &Socket) {
    put_header(bytes, DESTROY, SOCK_DESTROY, libc::NLM_F_REQUEST | libc::NLM_F_ACK, sequence);
    put_identity(bytes, socket);
}

/// The request to tell of one socket.
pub fn find(sequence: u32, socket: &Socket) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + REQUEST);
    put_header(&mut bytes, HEADER + REQUEST, SOCK_DIAG_BY_FAMILY, libc::NLM_F_REQUEST, sequence);
    put_identity(&mut bytes, socket);
    bytes
}

fn put_identity(bytes: &mut Vec<u8>, socket: &Socket) {
    // Looking for an IPv4 flow finds the IPv6 socket that carries it under mapped addresses, too.
    let v4 = socket.remote.is_v4();
    let family = if v4 { Family::V4 } else { Family::V6 };
    bytes.extend([family.number(), socket.protocol.number(), 0, 0]);
    bytes.extend(u32::MAX.to_ne_bytes());
    bytes.extend(socket.local_port.to_be_bytes());
    bytes.extend(socket.remote_port.to_be_bytes());
    for address in [&socket.local, &socket.remote] {
        let words = address.be_words();
        let words = if v4 { [words[3], 0, 0, 0] } else { words };
        bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
    }
    bytes.extend(socket.interface.to_ne_bytes());
    bytes.extend((socket.cookie as u32).to_ne_bytes());
    bytes.extend(((socket.cookie >> 32) as u32).to_ne_bytes());
}

/// Whose a socket is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    pub uid: u32,
    /// Number of the cgroup in which it was made.
    pub cgroup: u64,
}

/// The answer to [`find`]. `None`: there is no such socket, or no such answer among these.
pub fn owner(datagram: &[u8], sequence: u32) -> Result<Option<Result<Owner, Errno>>, Malformed> {
    for message in messages(datagram) {
        let message = message?;
        if message.sequence != sequence {
            continue;
        }
        if message.kind == libc::NLMSG_ERROR as u16 {
            return match message.result()? {
                Err(error) => Ok(Some(Err(error))),
                Ok(()) => Err(Malformed),
            };
        }
        let uid = u32_at(message.payload, LISTED - 8).ok_or(Malformed)?;
        for attribute in attributes(message.payload.get(LISTED..).ok_or(Malformed)?) {
            let (kind, content) = attribute?;
            if kind == INET_DIAG_CGROUP_ID {
                let cgroup = u64::from_ne_bytes(content.try_into().map_err(|_| Malformed)?);
                return Ok(Some(Ok(Owner { uid, cgroup })));
            }
        }
        // Kernels before 5.8 do not say.
        return Ok(Some(Err(Errno::EOPNOTSUPP)));
    }
    Ok(None)
}

/// The request to list all sockets of one family and protocol in some states, with what a map of socket storage holds for them.
pub fn dump(sequence: u32, family: Family, protocol: u8, states: u32, map: Option<BorrowedFd<'_>>) -> Vec<u8> {
    const STORAGES: usize = 3 * ATTRIBUTE;
    let length = HEADER + REQUEST + if map.is_some() { STORAGES } else { 0 };
    let mut bytes = Vec::with_capacity(length);
    put_header(&mut bytes, length, SOCK_DIAG_BY_FAMILY, libc::NLM_F_REQUEST | libc::NLM_F_DUMP, sequence);
    bytes.extend([family.number(), protocol, 0, 0]);
    bytes.extend(states.to_ne_bytes());
    // Any address, port, interface and cookie.
    bytes.extend([0; IDENTITY]);
    if let Some(map) = map {
        put_attribute(&mut bytes, STORAGES, INET_DIAG_REQ_SK_BPF_STORAGES | libc::NLA_F_NESTED as u16);
        put_attribute(&mut bytes, ATTRIBUTE + 4, SK_DIAG_BPF_STORAGE_REQ_MAP_FD);
        bytes.extend((map.as_raw_fd() as u32).to_ne_bytes());
    }
    bytes
}

/// Collects what the kernel says to numbered requests.
pub struct Acknowledgements {
    first: u32,
    answers: Vec<Option<Result<(), Errno>>>,
    open: usize,
}

impl Acknowledgements {
    /// For so many requests, numbered from this on.
    pub fn new(first: u32, requests: usize) -> Self {
        Self { first, answers: vec![None; requests], open: requests }
    }

    /// Reads a datagram. What belongs to other requests is passed over.
    pub fn take(&mut self, datagram: &[u8]) -> Result<(), Malformed> {
        for message in messages(datagram) {
            let message = message?;
            if message.kind != libc::NLMSG_ERROR as u16 {
                continue;
            }
            let index = message.sequence.wrapping_sub(self.first) as usize;
            if let Some(answer @ None) = self.answers.get_mut(index) {
                *answer = Some(message.result()?);
                self.open -= 1;
            }
        }
        Ok(())
    }

    pub fn is_complete(&self) -> bool {
        self.open == 0
    }

    /// In the order of the requests; nothing where no answer came.
    pub fn into_answers(self) -> Vec<Option<Result<(), Errno>>> {
        self.answers
    }
}

/// Collects a list of sockets, which comes in many datagrams.
pub struct Listing {
    sequence: u32,
    protocol: Protocol,
    sockets: Vec<Listed>,
    interrupted: bool,
    end: Option<Result<(), Errno>>,
}

/// How a dump ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Listings {
    Complete(Vec<Listed>),
    /// Something changed meanwhile, so that sockets may be missing.
    Interrupted,
    Refused(Errno),
}

impl Listing {
    pub fn new(sequence: u32, protocol: Protocol) -> Self {
        Self { sequence, protocol, sockets: Vec::new(), interrupted: false, end: None }
    }

    /// Reads a datagram. What belongs to other requests is passed over.
    pub fn take(&mut self, datagram: &[u8]) -> Result<(), Malformed> {
        for message in messages(datagram) {
            let message = message?;
            if message.sequence != self.sequence || self.end.is_some() {
                continue;
            }
            self.interrupted |= message.flags & libc::NLM_F_DUMP_INTR as u16 != 0;
            match libc::c_int::from(message.kind) {
                // Errors of listing come at the end, not as errors.
                libc::NLMSG_DONE => self.end = Some(message.result()?),
                libc::NLMSG_ERROR => match message.result()? {
                    Ok(()) => {}
                    Err(error) => self.end = Some(Err(error)),
                },
                libc::NLMSG_OVERRUN => self.interrupted = true,
                kind if kind == libc::c_int::from(SOCK_DIAG_BY_FAMILY) => {
                    self.sockets.push(listed(message.payload, self.protocol).ok_or(Malformed)?);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Data were lost on the way.
    pub fn interrupt(&mut self) {
        self.interrupted = true;
    }

    pub fn is_complete(&self) -> bool {
        self.end.is_some()
    }

    pub fn into_result(self) -> Listings {
        match self.end {
            Some(Err(error)) => Listings::Refused(error),
            Some(Ok(())) if !self.interrupted => Listings::Complete(self.sockets),
            _ => Listings::Interrupted,
        }
    }
}

struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl Message<'_> {
    /// The number that an acknowledgement, an error or the end of a list begins with: 0, or a negated errno.
    fn result(&self) -> Result<Result<(), Errno>, Malformed> {
        let code = u32_at(self.payload, 0).ok_or(Malformed)? as i32;
        match code.checked_neg() {
            Some(0) => Ok(Ok(())),
            Some(errno) if errno > 0 => Ok(Err(Errno::from_raw(errno))),
            _ => Err(Malformed),
        }
    }
}

/// The messages in a datagram, up to the first that is malformed.
fn messages(datagram: &[u8]) -> impl Iterator<Item = Result<Message<'_>, Malformed>> {
    sequence_of(datagram, |bytes| {
        let length = u32_at(bytes, 0)? as usize;
        let message = Message {
            kind: u16_at(bytes, 4)?,
            flags: u16_at(bytes, 6)?,
            sequence: u32_at(bytes, 8)?,
            payload: bytes.get(HEADER..length)?,
        };
        Some((message, length))
    })
}

/// The attributes in a message, by their type, up to the first that is malformed.
fn attributes(bytes: &[u8]) -> impl Iterator<Item = Result<(u16, &[u8]), Malformed>> {
    sequence_of(bytes, |bytes| {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & libc::NLA_TYPE_MASK as u16;
        Some(((kind, bytes.get(ATTRIBUTE..length)?), length))
    })
}

/// Splits bytes by a function that says what comes first and how long it is, which is at least 4; the next begins at a
/// multiple of 4.
fn sequence_of<'a, T>(
    bytes: &'a [u8],
    first: impl Fn(&'a [u8]) -> Option<(T, usize)>,
) -> impl Iterator<Item = Result<T, Malformed>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let bytes = std::mem::take(&mut rest);
        let Some((item, length)) = first(bytes) else { return Some(Err(Malformed)) };
        rest = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Ok(item))
    })
}

fn listed(bytes: &[u8], protocol: Protocol) -> Option<Listed> {
    let family = libc::c_int::from(*bytes.first()?);
    let address = |at: usize| {
        let octets: [u8; 16] = bytes.get(at..at + 16)?.try_into().ok()?;
        match (family, octets) {
            (libc::AF_INET, [a, b, c, d, ..]) => Some(Address::v4([a, b, c, d])),
            (libc::AF_INET6, octets) => Some(Address::v6(octets)),
            _ => None,
        }
    };
    let socket = Socket {
        protocol,
        local: address(8)?,
        local_port: u16_at(bytes, 4)?.to_be(),
        remote: address(24)?,
        remote_port: u16_at(bytes, 6)?.to_be(),
        interface: u32_at(bytes, 40)?,
        cookie: u64::from(u32_at(bytes, 44)?) | u64::from(u32_at(bytes, 48)?) << 32,
    };
    let (state, inode) = (*bytes.get(1)?, u32_at(bytes, 68)?);
    let value = storage_value(bytes.get(LISTED..)?).ok()?.map(Box::from);
    Some(Listed { socket, state, inode, value })
}

/// The first value among the maps' values: one map is asked for at a time.
fn storage_value(bytes: &[u8]) -> Result<Option<&[u8]>, Malformed> {
    let nested = |bytes, wanted| -> Result<Option<&[u8]>, Malformed> {
        for attribute in attributes(bytes) {
            let (kind, content) = attribute?;
            if kind == wanted {
                return Ok(Some(content));
            }
        }
        Ok(None)
    };
    let mut bytes = bytes;
    for kind in [INET_DIAG_SK_BPF_STORAGES, SK_DIAG_BPF_STORAGE, SK_DIAG_BPF_STORAGE_MAP_VALUE] {
        match nested(bytes, kind)? {
            Some(content) => bytes = content,
            None => return Ok(None),
        }
    }
    Ok(Some(bytes))
}

fn put_header(bytes: &mut Vec<u8>, length: usize, kind: u16, flags: libc::c_int, sequence: u32) {
    bytes.extend((length as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((flags as u16).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    // The kernel fills in the sender.
    bytes.extend([0; 4]);
}

fn put_attribute(bytes: &mut Vec<u8>, length: usize, kind: u16) {
    bytes.extend((length as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn socket() -> Socket {
        Socket {
            protocol: Protocol::Tcp,
            local: Address::v4([127, 0, 0, 1]),
            local_port: 0x1234,
            remote: Address::v4([10, 0, 0, 2]),
            remote_port: 443,
            interface: 7,
            cookie: 0x1122_3344_5566_7788,
        }
    }

    fn v6() -> Socket {
        Socket { local: Address::v6([1; 16]), remote: Address::v6([2; 16]), ..socket() }
    }

    fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_header(&mut bytes, HEADER + payload.len(), kind, libc::c_int::from(flags), sequence);
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn attribute(kind: u16, content: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_attribute(&mut bytes, ATTRIBUTE + content.len(), kind);
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// As the kernel lists a socket: its identity is at the same place as in a request.
    fn shown(socket: &Socket, attributes: &[u8]) -> Vec<u8> {
        let mut request = Vec::new();
        put_destroy(&mut request, 0, socket);
        let mut bytes = vec![request[HEADER], state::ESTABLISHED, 0, 0];
        bytes.extend(&request[HEADER + 8..]);
        bytes.extend([0; 16]);
        bytes.extend(4711u32.to_ne_bytes());
        bytes.extend(attributes);
        bytes
    }

    fn storages(value: &[u8]) -> Vec<u8> {
        let map = attribute(2, &9u32.to_ne_bytes());
        let value = attribute(SK_DIAG_BPF_STORAGE_MAP_VALUE, value);
        let one = attribute(SK_DIAG_BPF_STORAGE | libc::NLA_F_NESTED as u16, &[map, value].concat());
        [attribute(8, &[0]), attribute(INET_DIAG_SK_BPF_STORAGES | libc::NLA_F_NESTED as u16, &one)].concat()
    }

    #[test]
    fn a_request_has_the_kernels_layout() {
        let mut bytes = Vec::new();
        put_destroy(&mut bytes, 3, &socket());
        let expected: &[&[u8]] = &[
            &72u32.to_ne_bytes(),
            &21u16.to_ne_bytes(),
            &5u16.to_ne_bytes(),
            &3u32.to_ne_bytes(),
            &[0; 4],
            &[2, 6, 0, 0, 0xff, 0xff, 0xff, 0xff],
            &[0x12, 0x34, 1, 187],
            &[127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &7u32.to_ne_bytes(),
            &0x5566_7788u32.to_ne_bytes(),
            &0x1122_3344u32.to_ne_bytes(),
        ];
        assert_eq!(bytes, expected.concat());
    }

    #[test]
    fn what_is_listed_can_be_destroyed_as_it_was_listed() {
        for socket in [socket(), v6()] {
            let mut listing = Listing::new(5, Protocol::Tcp);
            let list = message(SOCK_DIAG_BY_FAMILY, 2, 5, &shown(&socket, &storages(b"tag bytes")));
            let more = message(SOCK_DIAG_BY_FAMILY, 2, 5, &shown(&socket, &[]));
            listing.take(&[list, more].concat()).unwrap();
            assert!(!listing.is_complete());
            listing.take(&message(libc::NLMSG_DONE as u16, 2, 5, &[0; 4])).unwrap();
            assert!(listing.is_complete());
            let Listings::Complete(sockets) = listing.into_result() else { panic!("it is complete") };
            let values: Vec<_> = sockets.iter().map(|s| s.value.as_deref()).collect();
            assert_eq!(values, [Some(b"tag bytes".as_slice()), None]);
            assert!(sockets.iter().all(|s| s.socket == socket && s.state == state::ESTABLISHED && s.inode == 4711));
        }
    }

    #[test]
    fn an_error_at_the_end_of_a_list_is_an_error() {
        for kind in [libc::NLMSG_DONE, libc::NLMSG_ERROR] {
            let mut listing = Listing::new(5, Protocol::Udp);
            listing.take(&message(kind as u16, 2, 5, &(-libc::ENOENT).to_ne_bytes())).unwrap();
            assert_eq!(listing.into_result(), Listings::Refused(Errno::ENOENT));
        }
    }

    #[test]
    fn an_interrupted_list_is_not_taken_for_complete() {
        let mut listing = Listing::new(5, Protocol::Tcp);
        let flags = libc::NLM_F_DUMP_INTR as u16;
        listing.take(&message(SOCK_DIAG_BY_FAMILY, flags, 5, &shown(&socket(), &[]))).unwrap();
        listing.take(&message(libc::NLMSG_DONE as u16, 0, 5, &[0; 4])).unwrap();
        assert_eq!(listing.into_result(), Listings::Interrupted);
        assert_eq!(Listing::new(5, Protocol::Tcp).into_result(), Listings::Interrupted);
    }

    #[test]
    fn answers_belong_to_the_request_whose_number_they_carry() {
        let error = |sequence, code: i32| message(libc::NLMSG_ERROR as u16, 0, sequence, &code.to_ne_bytes());
        let mut acknowledgements = Acknowledgements::new(u32::MAX, 3);
        acknowledgements.take(&error(1, -libc::ENOENT)).unwrap();
        // Others', before and behind; and a second answer, which changes nothing.
        for (sequence, code) in [(u32::MAX - 1, 0), (2, 0), (1, 0)] {
            acknowledgements.take(&error(sequence, code)).unwrap();
        }
        acknowledgements.take(&error(u32::MAX, 0)).unwrap();
        assert!(!acknowledgements.is_complete());
        let (ok, gone) = (Some(Ok(())), Some(Err(Errno::ENOENT)));
        assert_eq!(acknowledgements.into_answers(), [ok, None, gone]);
    }

    #[test]
    fn a_list_passes_over_answers_to_others() {
        let mut listing = Listing::new(5, Protocol::Tcp);
        listing.take(&message(libc::NLMSG_DONE as u16, 0, 4, &[0; 4])).unwrap();
        listing.take(&message(SOCK_DIAG_BY_FAMILY, 0, 6, &shown(&socket(), &[]))).unwrap();
        assert!(!listing.is_complete());
    }

    #[test]
    fn every_cut_is_malformed_or_a_shorter_list() {
        let list = message(SOCK_DIAG_BY_FAMILY, 2, 5, &shown(&socket(), &storages(&[7; 104])));
        for cut in 1..list.len() {
            let mut listing = Listing::new(5, Protocol::Tcp);
            assert_eq!(listing.take(&list[..cut]), Err(Malformed), "cut at {cut}");
            // The same, with a header that agrees.
            let mut shorter = list[..cut.max(HEADER)].to_vec();
            let length = (shorter.len() as u32).to_ne_bytes();
            shorter[..4].copy_from_slice(&length);
            let mut listing = Listing::new(5, Protocol::Tcp);
            // Behind no attribute, or behind the first, whose last three bytes fill it up.
            let at = HEADER + LISTED;
            let is_whole = cut == at || (at + 5..=at + 8).contains(&cut);
            assert_eq!(listing.take(&shorter).is_ok(), is_whole, "shortened to {cut}");
        }
    }

    #[test]
    fn lengths_that_are_too_short_or_too_long_are_malformed() {
        for length in [0, 1, 15, 21, u32::MAX] {
            let mut bytes = message(libc::NLMSG_ERROR as u16, 0, 1, &[0; 4]);
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(Acknowledgements::new(1, 1).take(&bytes), Err(Malformed), "{length}");
        }
        for length in [0u16, 3, u16::MAX] {
            let mut bad = attribute(1, &[0; 4]);
            bad[..2].copy_from_slice(&length.to_ne_bytes());
            let list = message(SOCK_DIAG_BY_FAMILY, 2, 5, &shown(&socket(), &bad));
            assert_eq!(Listing::new(5, Protocol::Tcp).take(&list), Err(Malformed), "{length}");
        }
    }

    #[test]
    fn numbers_that_are_no_errors_are_malformed() {
        for code in [1, i32::MAX, i32::MIN] {
            let bytes = message(libc::NLMSG_ERROR as u16, 0, 1, &code.to_ne_bytes());
            assert_eq!(Acknowledgements::new(1, 1).take(&bytes), Err(Malformed), "{code}");
        }
        let empty = message(libc::NLMSG_DONE as u16, 0, 5, &[]);
        assert_eq!(Listing::new(5, Protocol::Tcp).take(&empty), Err(Malformed));
    }

    #[test]
    fn a_socket_of_another_family_is_malformed() {
        let mut bytes = shown(&socket(), &[]);
        bytes[0] = libc::AF_UNIX as u8;
        let list = message(SOCK_DIAG_BY_FAMILY, 2, 5, &bytes);
        assert_eq!(Listing::new(5, Protocol::Tcp).take(&list), Err(Malformed));
    }

    proptest! {
        #[test]
        fn hostile_bytes_do_no_harm(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), at in 0usize..400) {
            let _ = Acknowledgements::new(0, 3).take(&bytes);
            let _ = Listing::new(0, Protocol::Tcp).take(&bytes);
            // A good list with a few bytes replaced gets further.
            let good = message(SOCK_DIAG_BY_FAMILY, 2, 5, &shown(&v6(), &storages(&[7; 104])));
            bytes.truncate(3);
            let mut changed = good.repeat(2);
            for (target, byte) in changed.iter_mut().skip(at).zip(&bytes) {
                *target = *byte;
            }
            let mut listing = Listing::new(5, Protocol::Tcp);
            let _ = listing.take(&changed);
            prop_assert!(listing.sockets.len() <= 2);
        }
    }

    #[test]
    fn an_owner_is_read_from_a_whole_answer() {
        let told = |cgroup: &[u8]| {
            let mut bytes = shown(&socket(), &attribute(INET_DIAG_CGROUP_ID, cgroup));
            bytes[LISTED - 8..LISTED - 4].copy_from_slice(&40_001_u32.to_ne_bytes());
            message(SOCK_DIAG_BY_FAMILY, 0, 5, &bytes)
        };
        let good = told(&77_u64.to_ne_bytes());
        assert_eq!(owner(&good, 5), Ok(Some(Ok(Owner { uid: 40_001, cgroup: 77 }))));
        assert_eq!(owner(&good, 6), Ok(None), "an answer to something else");
        assert_eq!(owner(&told(&[1, 2, 3, 4]), 5), Err(Malformed));
        let without = message(SOCK_DIAG_BY_FAMILY, 0, 5, &shown(&socket(), &[]));
        assert_eq!(owner(&without, 5), Ok(Some(Err(Errno::EOPNOTSUPP))));
        let error = message(libc::NLMSG_ERROR as u16, 0, 5, &(-libc::ENOENT).to_ne_bytes());
        assert_eq!(owner(&error, 5), Ok(Some(Err(Errno::ENOENT))));
        for length in 17..good.len() {
            assert!(owner(&good[..length], 5).is_err(), "{length}");
        }
    }
}
