//! Frames as they are, sent from an interface of the calling thread's network namespace.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    ifaddrs::getifaddrs,
    sys::{
        socket::{
            AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket,
            sockopt,
        },
        time::{TimeVal, TimeValLike},
    },
};

pub struct Wire(OwnedFd);

impl Wire {
    pub fn open(interface: &str) -> Result<Self> {
        let wire = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
        bind(wire.as_raw_fd(), &link(interface)?)?;
        Ok(Self(wire))
    }

    /// One that sees every frame that passes the interface from now on, in either direction.
    pub fn watch(interface: &str) -> Result<Self> {
        let wire = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
        bind(wire.as_raw_fd(), &link(interface)?)?;
        setsockopt(&wire, sockopt::ReceiveTimeout, &TimeVal::milliseconds(100))?;
        Ok(Self(wire))
    }

    /// The next frame that fits, if one passes in time.
    pub fn next(&self, patience: Duration, fits: impl Fn(&[u8]) -> bool) -> Result<Option<Vec<u8>>> {
        let started = Instant::now();
        let mut frame = vec![0; 1 << 16];
        while started.elapsed() < patience {
            match recv(self.0.as_raw_fd(), &mut frame, MsgFlags::empty()) {
                Ok(length) if fits(&frame[..length]) => return Ok(Some(frame[..length].to_vec())),
                Ok(_) | Err(Errno::EAGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }

    /// Waits where there is no room.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        loop {
            match send(self.0.as_raw_fd(), frame, MsgFlags::empty()) {
                Ok(_) => return Ok(()),
                Err(Errno::ENOBUFS | Errno::EAGAIN) => std::thread::yield_now(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Frames that an interface had to drop before it sent them: the other end's queue was full.
pub fn unsent(interface: &str) -> Result<u64> {
    const TRANSMIT_DROPS: usize = 11;
    let text = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':'));
    let field = line.and_then(|line| line.split_whitespace().nth(TRANSMIT_DROPS));
    Ok(field.with_context(|| format!("there is no interface {interface}"))?.parse()?)
}

/// The interface's hardware address.
pub fn mac(interface: &str) -> Result<[u8; 6]> {
    link(interface)?.addr().context("an Ethernet interface has a hardware address")
}

fn link(interface: &str) -> Result<LinkAddr> {
    let of = getifaddrs()?.filter(|known| known.interface_name == interface);
    let mut addresses = of.filter_map(|known| known.address?.as_link_addr().copied());
    addresses.next().with_context(|| format!("there is no interface {interface}"))
}
