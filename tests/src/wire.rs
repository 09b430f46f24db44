//! Frames as they are, sent from an interface of the calling thread's network namespace.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    ifaddrs::getifaddrs,
    sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, bind, send, socket},
};

pub struct Wire(OwnedFd);

impl Wire {
    pub fn open(interface: &str) -> Result<Self> {
        let wire = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
        bind(wire.as_raw_fd(), &link(interface)?)?;
        Ok(Self(wire))
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
