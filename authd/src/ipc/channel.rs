//! Messages over a pair of sequenced-packet sockets, each whole or not at all, some with descriptors.
//!
//! Whoever receives believes nothing: a message that is too long, or has a field too many, is an error.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    sync::{Mutex, PoisonError},
};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{Interest, unix::AsyncFd};

/// No message is longer: the arguments of a call, and what proves that it may be made.
pub const MAX_MESSAGE: usize = 192 << 10;
/// Descriptors of one message.
const MAX_DESCRIPTORS: usize = 3;
/// Messages that wait in the kernel for the other side.
const BUFFER: usize = 4 << 20;

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

/// A message, and what came with it.
pub type Received<T> = (T, Vec<OwnedFd>);

/// One end.
pub struct Channel {
    fd: AsyncFd<OwnedFd>,
    /// What is received is read into this.
    buffer: Mutex<Vec<u8>>,
}

impl Channel {
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        // SAFETY: an `OwnedFd` is open, and the same one, for as long as it exists; the `AsyncFd` owns it.
        Ok(Self { fd: unsafe { AsyncFd::register_with_interest(fd, interest) }?, buffer: Mutex::default() })
    }

    /// Sends at once, or says that there is no room.
    pub fn try_send<T: Serialize>(&self, message: &T, attached: &[BorrowedFd<'_>]) -> Result<(), IpcError> {
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
            match ready.try_io(|fd| transmit(fd.get_ref(), &bytes, &[])) {
                Ok(result) => return Ok(result?),
                Err(_would_block) => {}
            }
        }
    }

    /// The next message, with its descriptors if it has some; `None` when the other process is gone.
    pub async fn receive<T: DeserializeOwned>(&self) -> Result<Option<Received<T>>, IpcError> {
        loop {
            let mut ready = self.fd.readable().await?;
            match ready.try_io(|fd| self.collect(fd.get_ref())) {
                Ok(Ok(message)) => return message.map_err(IpcError::Unknown),
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Ok(Err(error)) => return Err(error.into()),
                Err(_would_block) => {}
            }
        }
    }

    fn collect<T: DeserializeOwned>(&self, fd: &OwnedFd) -> io::Result<serde_json::Result<Option<Received<T>>>> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        buffer.resize(MAX_MESSAGE, 0);
        let mut space = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let message = recvmsg::<()>(fd.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let mut received = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(descriptors) = control {
                // SAFETY: the kernel just made these descriptors for this process, and nobody else has them.
                received.extend(descriptors.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        let truncated = message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
        let length = message.bytes;
        if truncated {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message that is longer than any"));
        }
        if length == 0 {
            return Ok(Ok(None));
        }
        Ok(serde_json::from_slice(&buffer[..length]).map(|message| Some((message, received))))
    }
}

fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, IpcError> {
    let bytes = serde_json::to_vec(message).map_err(IpcError::Unknown)?;
    if bytes.len() > MAX_MESSAGE { Err(IpcError::TooLong(bytes.len())) } else { Ok(bytes) }
}

fn transmit(fd: &OwnedFd, bytes: &[u8], attached: &[BorrowedFd<'_>]) -> io::Result<()> {
    let descriptors: Vec<RawFd> = attached.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = ControlMessage::ScmRights(&descriptors);
    let control: &[ControlMessage<'_>] = if descriptors.is_empty() { &[] } else { std::slice::from_ref(&rights) };
    sendmsg::<()>(fd.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::ipc::{FromControl, Refusal, Sealed, Settings, ToControl};

    fn channels() -> (Channel, Channel) {
        let (a, b) = pair().unwrap();
        (Channel::new(a).unwrap(), Channel::new(b).unwrap())
    }

    #[tokio::test]
    async fn messages_arrive_whole_and_with_their_descriptor() {
        let (a, b) = channels();
        let settings = Settings { generation: 7, ..Settings::default() }.seal().unwrap();
        a.try_send(&ToControl::Settings, &[settings.as_fd(); 3]).unwrap();
        let (message, mut fds) = b.receive::<ToControl>().await.unwrap().unwrap();
        assert!(matches!(message, ToControl::Settings));
        assert_eq!(fds.len(), 3);
        assert_eq!(Settings::open(fds.pop().unwrap()).unwrap().generation, 7);
    }

    #[tokio::test]
    async fn a_message_that_is_too_long_is_not_sent() {
        let (a, _b) = channels();
        let refusal = Refusal { reason: "x".repeat(MAX_MESSAGE), message: String::new() };
        let message = ToControl::NotGranted { question: 1, refusal };
        assert!(matches!(a.try_send(&message, &[]), Err(IpcError::TooLong(_))));
    }

    #[tokio::test]
    async fn what_is_no_message_is_an_error() {
        let (a, b) = channels();
        for bytes in [&b"{}"[..], b"\xff", br#"{"message":"closed","connection":1,"more":2}"#] {
            transmit(a.fd.get_ref(), bytes, &[]).unwrap();
            assert!(matches!(b.receive::<FromControl>().await, Err(IpcError::Unknown(_))));
        }
        transmit(a.fd.get_ref(), &vec![b' '; MAX_MESSAGE + 1], &[]).unwrap();
        assert!(matches!(b.receive::<FromControl>().await, Err(IpcError::Io(_))));
    }

    #[tokio::test]
    async fn the_end_of_the_other_process_is_seen() {
        let (a, b) = channels();
        drop(a);
        assert!(b.receive::<FromControl>().await.unwrap().is_none());
    }
}
