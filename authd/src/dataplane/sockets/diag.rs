//! A conversation with the socket diagnostics of one network namespace.
//!
//! Enters: sockets to destroy, or what to list. Leaves: what became of each, or the list. Never: a socket destroyed by its
//! addresses alone, an answer believed that is not the kernel's.

use std::{
    collections::HashMap,
    io::IoSliceMut,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    getsockopt_impl, sockopt_impl,
    sys::{
        socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, getsockopt, recvmsg, sendto,
            setsockopt, socket,
            sockopt::{RcvBufForce, ReceiveTimeout},
        },
        time::{TimeVal, TimeValLike},
    },
};

use super::{
    SocketError,
    message::{self, Acknowledgements, DESTROY, Family, Listed, Listing, Listings, Owner, Protocol, Socket, state},
};

sockopt_impl!(
    /// The number of the network namespace in which a socket was made (Linux 5.14).
    NetnsCookie,
    GetOnly,
    libc::SOL_SOCKET,
    libc::SO_NETNS_COOKIE,
    u64
);

/// What became of a socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    Destroyed,
    /// It was not there any more.
    Gone,
    Failed(SocketError),
}

/// Requests in one datagram. Their answers, at most 1 KiB each with the kernel's own data, fit into a receive buffer of
/// the default size.
const BATCH: usize = 128;
/// A better size: other processes of the namespace may send here too (their datagrams are passed over, but take room).
const RECEIVE_BUFFER: usize = 1 << 20;
/// As much as the kernel puts into one datagram of a list (`netlink_dump`, net/netlink/af_netlink.c), and then some.
const BUFFER: usize = 1 << 16;
/// Answers are there when sending returns, unless they are lost.
const PATIENCE: i64 = 5;
/// How often a list is begun anew that changed underneath.
const DUMPS: usize = 8;
/// How often sockets are looked for that the kernel did not find under their addresses.
const SEARCHES: usize = 4;
/// Datagrams of others that are passed over while waiting for one of the kernel's.
const FOREIGN: usize = 65_536;
/// How often the receive buffer may overflow in one exchange: others can fill it faster than it is emptied.
const OVERRUNS: usize = 64;

pub struct Diag {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
    broken: bool,
}

impl Diag {
    /// Opens one in the network namespace of the calling thread.
    pub fn open() -> Result<Self, Errno> {
        let protocol = SockProtocol::NetlinkSockDiag;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        setsockopt(&fd, ReceiveTimeout, &TimeVal::seconds(PATIENCE))?;
        // Needs a privilege that listing does without.
        let _ = setsockopt(&fd, RcvBufForce, &RECEIVE_BUFFER);
        Ok(Self { fd, sequence: 0, buffer: vec![0; BUFFER], broken: false })
    }

    /// Cookie of its network namespace.
    pub fn namespace(&self) -> Result<u64, Errno> {
        getsockopt(&self.fd, NetnsCookie)
    }

    /// An answer is outstanding that never came: further requests would be refused.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Destroys sockets. In the same order: what became of each.
    pub fn destroy(&mut self, sockets: &[Socket]) -> Vec<Fate> {
        let mut fates = vec![Fate::Gone; sockets.len()];
        let mut unclear: Vec<(usize, Socket)> = Vec::new();
        for (index, socket) in sockets.iter().enumerate() {
            match socket.cookie {
                // The kernel takes all ones for "any" (INET_DIAG_NOCOOKIE), and never gives out 0.
                0 | u64::MAX => set(&mut fates, index, Fate::Failed(SocketError::NoCookie)),
                _ => unclear.push((index, *socket)),
            }
        }
        unclear = self.attempt(unclear, &mut fates);
        // "Not found" is no proof: a socket bound to an interface is only found under it, one of several UDP sockets with
        // the same ends hides the others, and a missing module says the same. So the lists have the last word.
        for search in 0..=SEARCHES {
            if unclear.is_empty() {
                break;
            }
            unclear = self.still_there(unclear, &mut fates);
            if search < SEARCHES {
                unclear = self.attempt(unclear, &mut fates);
            }
        }
        fates
    }

    /// Lists sockets in some states (bits), with what the map of socket storage holds for each.
    ///
    /// The list is no snapshot: the kernel hands it out in parts, and a socket may be missed while others come and go.
    pub fn list(
        &mut self,
        family: Family,
        protocol: Protocol,
        states: u32,
        map: Option<BorrowedFd<'_>>,
    ) -> Result<Vec<Listed>, SocketError> {
        for _ in 0..DUMPS {
            match self.list_once(family, protocol, protocol.number(), states, map)? {
                Listings::Complete(sockets) => return Ok(sockets),
                Listings::Interrupted => {}
                Listings::Refused(Errno::ENOENT) => return Err(SocketError::NoModule { module: protocol.module() }),
                Listings::Refused(Errno::EPERM) if map.is_some() => return Err(SocketError::MayNotRead),
                Listings::Refused(error) => return Err(SocketError::Kernel(error)),
            }
        }
        Err(SocketError::Interrupted)
    }

    /// Whose one socket is. `None`: there is none with these ends.
    pub fn owner(&mut self, socket: &Socket) -> Result<Option<Owner>, SocketError> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        self.send(&message::find(sequence, socket))?;
        loop {
            let length = self.receive(MsgFlags::empty())?;
            match message::owner(self.buffer.get(..length).unwrap_or_default(), sequence)? {
                Some(Ok(owner)) => return Ok(Some(owner)),
                Some(Err(Errno::ENOENT)) => return Ok(None),
                Some(Err(error)) => return Err(SocketError::Kernel(error)),
                None => {}
            }
        }
    }

    /// One try each; what is not clear after it comes back, with the reason in its fate.
    fn attempt(&mut self, sockets: Vec<(usize, Socket)>, fates: &mut [Fate]) -> Vec<(usize, Socket)> {
        let mut unclear = Vec::new();
        for batch in sockets.chunks(BATCH) {
            let answers = match self.destroy_batch(batch) {
                Ok(answers) => answers,
                Err(error) => {
                    batch.iter().for_each(|(index, _)| set(fates, *index, Fate::Failed(error)));
                    continue;
                }
            };
            for (&(index, socket), answer) in batch.iter().zip(answers) {
                let (fate, is_clear) = match answer {
                    Some(Ok(())) => (Fate::Destroyed, true),
                    Some(Err(Errno::ENOENT)) => (Fate::Failed(SocketError::Hidden), false),
                    // Linux before 6.11 says it of sockets in TIME_WAIT, too.
                    Some(Err(Errno::EOPNOTSUPP)) => (Fate::Failed(SocketError::NoDestroy), false),
                    Some(Err(Errno::EPERM)) => (Fate::Failed(SocketError::MayNotDestroy), true),
                    Some(Err(error)) => (Fate::Failed(SocketError::Kernel(error)), true),
                    None => (Fate::Failed(SocketError::Unanswered), false),
                };
                set(fates, index, fate);
                if !is_clear {
                    unclear.push((index, socket));
                }
            }
        }
        unclear
    }

    /// Sends one datagram of requests, and waits for the answer to each.
    fn destroy_batch(&mut self, batch: &[(usize, Socket)]) -> Result<Vec<Option<Result<(), Errno>>>, SocketError> {
        let first = self.sequence.wrapping_add(1);
        self.sequence = self.sequence.wrapping_add(batch.len() as u32);
        let mut bytes = Vec::with_capacity(batch.len() * DESTROY);
        for (number, (_, socket)) in batch.iter().enumerate() {
            message::put_destroy(&mut bytes, first.wrapping_add(number as u32), socket);
        }
        self.send(&bytes)?;
        let mut acknowledgements = Acknowledgements::new(first, batch.len());
        let mut overruns = 0;
        while !acknowledgements.is_complete() {
            // Every answer that comes is there by now. So if some are lost, nobody waits for them: the lists will tell what
            // became of those sockets.
            let wait = if overruns > 0 { MsgFlags::MSG_DONTWAIT } else { MsgFlags::empty() };
            match self.receive(wait) {
                Ok(length) => acknowledgements.take(self.buffer.get(..length).unwrap_or_default())?,
                Err(SocketError::Overrun) if overruns < OVERRUNS => overruns += 1,
                Err(SocketError::Overrun | SocketError::Unanswered) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(acknowledgements.into_answers())
    }

    /// Those that the lists show, by their cookies, as the lists show them. The others are gone.
    fn still_there(&mut self, sockets: Vec<(usize, Socket)>, fates: &mut [Fate]) -> Vec<(usize, Socket)> {
        let mut shown: HashMap<(Protocol, u64), Socket> = HashMap::new();
        let mut failed: HashMap<Protocol, SocketError> = HashMap::new();
        for protocol in Protocol::ALL {
            if !sockets.iter().any(|(_, socket)| socket.protocol == protocol) {
                continue;
            }
            for family in Family::ALL {
                match self.list(family, protocol, protocol.flow_states(), None) {
                    Ok(listed) => {
                        let held = listed.into_iter().filter(|l| !(l.state == state::FIN_WAIT2 && l.inode == 0));
                        shown.extend(held.map(|l| ((protocol, l.socket.cookie), l.socket)));
                    }
                    Err(error) => drop(failed.insert(protocol, error)),
                }
            }
        }
        let mut unclear = Vec::new();
        for (index, socket) in sockets {
            match (failed.get(&socket.protocol), shown.get(&(socket.protocol, socket.cookie))) {
                (_, Some(shown)) => unclear.push((index, *shown)),
                (Some(error), None) => set(fates, index, Fate::Failed(*error)),
                (None, None) => set(fates, index, Fate::Gone),
            }
        }
        unclear
    }

    fn list_once(
        &mut self,
        family: Family,
        protocol: Protocol,
        number: u8,
        states: u32,
        map: Option<BorrowedFd<'_>>,
    ) -> Result<Listings, SocketError> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        self.send(&message::dump(sequence, family, number, states, map))?;
        let mut listing = Listing::new(sequence, protocol);
        let mut overruns = 0;
        // Unless it is read to its end.
        self.broken = true;
        while !listing.is_complete() {
            match self.receive(MsgFlags::empty()) {
                Ok(length) => listing.take(self.buffer.get(..length).unwrap_or_default())?,
                Err(SocketError::Overrun) if overruns < OVERRUNS => {
                    overruns += 1;
                    listing.interrupt();
                }
                Err(error) => return Err(error),
            }
        }
        self.broken = false;
        Ok(listing.into_result())
    }

    fn send(&self, bytes: &[u8]) -> Result<(), SocketError> {
        let kernel = NetlinkAddr::new(0, 0);
        loop {
            match sendto(self.fd.as_raw_fd(), bytes, &kernel, MsgFlags::empty()) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(SocketError::Kernel(error)),
            }
        }
    }

    /// The next datagram of the kernel's, into the buffer.
    fn receive(&mut self, wait: MsgFlags) -> Result<usize, SocketError> {
        for _ in 0..FOREIGN {
            let mut parts = [IoSliceMut::new(&mut self.buffer)];
            let received = recvmsg::<NetlinkAddr>(self.fd.as_raw_fd(), &mut parts, None, wait);
            let (length, flags, sender) = match received {
                Ok(received) => (received.bytes, received.flags, received.address),
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => return Err(SocketError::Unanswered),
                Err(Errno::ENOBUFS) => return Err(SocketError::Overrun),
                Err(error) => return Err(SocketError::Kernel(error)),
            };
            // Whoever administers this namespace can send here, and is not authd.
            if sender.is_none_or(|sender| sender.pid() != 0) {
                continue;
            }
            if flags.contains(MsgFlags::MSG_TRUNC) {
                return Err(SocketError::Truncated);
            }
            return Ok(length);
        }
        Err(SocketError::Unanswered)
    }
}

fn set(fates: &mut [Fate], index: usize, fate: Fate) {
    if let Some(slot) = fates.get_mut(index) {
        *slot = fate;
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn anybody_may_list_what_is_connected() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut diag = Diag::open().unwrap();
        let listed = diag.list(Family::V4, Protocol::Tcp, Protocol::Tcp.flow_states(), None).unwrap();
        let (own, far) = (client.local_addr().unwrap().port(), client.peer_addr().unwrap().port());
        let is_own = |l: &&Listed| l.socket.local_port == own && l.socket.remote_port == far;
        let found: Vec<_> = listed.iter().filter(is_own).collect();
        assert!(matches!(found.as_slice(), [one] if one.state == state::ESTABLISHED && one.socket.cookie != 0));
        assert!(listed.iter().all(|l| l.socket.local_port != far || l.socket.remote_port != 0), "it listens");
    }

    #[test]
    fn a_protocol_without_diagnostics_is_an_error_and_no_empty_list() {
        // Nobody has diagnostics for this one, as on a kernel without the module for TCP.
        const UNUSED: u8 = 200;
        let mut diag = Diag::open().unwrap();
        let refused = diag.list_once(Family::V4, Protocol::Tcp, UNUSED, 1, None).unwrap();
        assert_eq!(refused, Listings::Refused(Errno::ENOENT));
        assert!(!diag.is_broken());
    }

    #[test]
    fn no_socket_is_destroyed_without_its_cookie() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut diag = Diag::open().unwrap();
        let listed = diag.list(Family::V4, Protocol::Tcp, Protocol::Tcp.flow_states(), None).unwrap();
        let own = client.local_addr().unwrap().port();
        let socket = listed.iter().find(|l| l.socket.local_port == own).unwrap().socket;
        let asked: Vec<_> = [0, u64::MAX].map(|cookie| Socket { cookie, ..socket }).into();
        assert_eq!(diag.destroy(&asked), [Fate::Failed(SocketError::NoCookie); 2]);
        assert!(client.take_error().unwrap().is_none());
    }
}
