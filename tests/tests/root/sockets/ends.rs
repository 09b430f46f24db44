//! Sockets of the test's own, and their ends as the application sees them.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use anyhow::Result;
use authd::dataplane::sockets::{
    Flow,
    message::{Protocol, Socket},
    namespaces::Namespace,
};
use authd_common::address::Address;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, getsockopt, setsockopt, sockopt};

use super::{Cookie, NetnsCookie};

pub fn tcp_socket(family: AddressFamily) -> Result<OwnedFd> {
    Ok(socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?)
}

/// Connects from a given end, by a socket of that end's family.
pub fn tcp_from(from: SocketAddr, to: SocketAddr) -> Result<TcpStream> {
    let stream = tcp_socket(if from.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 })?;
    setsockopt(&stream, sockopt::ReuseAddr, &true)?;
    socket::bind(stream.as_raw_fd(), &SockaddrStorage::from(from))?;
    socket::connect(stream.as_raw_fd(), &SockaddrStorage::from(to))?;
    Ok(stream.into())
}

/// Both ends of a connection.
pub fn tcp_pair(from: SocketAddr, to: SocketAddr) -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind(to)?;
    let port = listener.local_addr()?.port();
    let v4 = |address: IpAddr| matches!(address, IpAddr::V4(_)) || octets(address)[10..12] == [0xff, 0xff];
    let target: IpAddr = match (from.ip(), v4(from.ip())) {
        (IpAddr::V4(_), _) => Ipv4Addr::LOCALHOST.into(),
        (IpAddr::V6(_), true) => Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(),
        (IpAddr::V6(_), false) => Ipv6Addr::LOCALHOST.into(),
    };
    let near = tcp_from(from, SocketAddr::new(target, port))?;
    Ok((near, listener.accept()?.0))
}

pub fn connected_udp(from: &str, to: &str) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(from)?;
    socket.connect(to)?;
    Ok(socket)
}

/// As the application sees it. The namespace without a hint.
pub fn flow_of<S: AsFd + Ends>(socket: &S, protocol: Protocol) -> Result<Flow> {
    let (local, remote) = socket.ends()?;
    Ok(Flow {
        namespace: Namespace { cookie: getsockopt(socket, NetnsCookie)?, pid: 0 },
        socket: Socket {
            protocol,
            local: Address::v6(octets(local.ip())),
            local_port: local.port(),
            remote: Address::v6(octets(remote.ip())),
            remote_port: remote.port(),
            interface: 0,
            cookie: getsockopt(socket, Cookie)?,
        },
    })
}

pub fn with_cookie(flow: &Flow, cookie: u64) -> Flow {
    Flow { socket: Socket { cookie, ..flow.socket }, ..*flow }
}

pub fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

pub trait Ends {
    fn ends(&self) -> io::Result<(SocketAddr, SocketAddr)>;
}

impl Ends for TcpStream {
    fn ends(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.local_addr()?, self.peer_addr()?))
    }
}

impl Ends for UdpSocket {
    fn ends(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.local_addr()?, self.peer_addr()?))
    }
}
