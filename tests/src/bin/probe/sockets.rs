//! Sockets, and calls on them, that the standard library does not know.

use std::{
    fs, io, mem,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use anyhow::{Context, Result};

use authd_tests::probe::Outcome;

use super::{Attempt, Failure, Kind, Step, echo, exchange, say, wait};

pub fn socket_of(kind: Kind) -> Result<OwnedFd, Failure> {
    let (family, kind, protocol) = match kind {
        Kind::Raw => (libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW),
        Kind::Ping => (libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP),
        Kind::Packet => (libc::AF_PACKET, libc::SOCK_RAW, 0x0300),
        Kind::PacketDgram => (libc::AF_PACKET, libc::SOCK_DGRAM, 0x0300),
        Kind::Tcp => (libc::AF_INET, libc::SOCK_STREAM, 0),
    };
    raw_socket(family, kind, protocol).step("socket")
}

fn raw_socket(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the result is checked before it becomes an owned descriptor.
    unsafe {
        let fd = libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

pub fn new_socket(to: SocketAddr, kind: i32, protocol: i32) -> Result<OwnedFd, Failure> {
    let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    raw_socket(family, kind, protocol).step("socket")
}

/// An address as the kernel reads it.
pub struct Address {
    storage: libc::sockaddr_storage,
    length: libc::socklen_t,
}

impl Address {
    fn new(address: SocketAddr) -> Self {
        // SAFETY: plain data; all zeroes is a value.
        let mut storage: libc::sockaddr_storage = unsafe { mem::zeroed() };
        let length = match address {
            SocketAddr::V4(v4) => {
                let own = libc::sockaddr_in {
                    sin_family: libc::AF_INET as u16,
                    sin_port: v4.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                    sin_zero: [0; 8],
                };
                // SAFETY: `sockaddr_storage` is larger than, and aligned for, every kind of address.
                unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(own) };
                size_of::<libc::sockaddr_in>()
            }
            SocketAddr::V6(v6) => {
                let own = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as u16,
                    sin6_port: v6.port().to_be(),
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                    sin6_scope_id: 0,
                };
                // SAFETY: as above.
                unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(own) };
                size_of::<libc::sockaddr_in6>()
            }
        };
        Self { storage, length: length as libc::socklen_t }
    }

    fn pointer(&self) -> *const libc::sockaddr {
        (&raw const self.storage).cast()
    }
}

pub fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

pub fn connect_fd(fd: RawFd, to: SocketAddr) -> io::Result<()> {
    let to = Address::new(to);
    // SAFETY: the address lives until the call returns, and its length is its own.
    checked(unsafe { libc::connect(fd, to.pointer(), to.length) }).map(drop)
}

pub fn bind_fd(fd: RawFd, to: SocketAddr) -> io::Result<()> {
    let to = Address::new(to);
    // SAFETY: as for `connect_fd`.
    checked(unsafe { libc::bind(fd, to.pointer(), to.length) }).map(drop)
}

pub fn sendto_fd(fd: RawFd, data: &[u8], flags: i32, to: SocketAddr) -> io::Result<()> {
    let to = Address::new(to);
    // SAFETY: as for `connect_fd`; the data's length is its own.
    let sent = unsafe { libc::sendto(fd, data.as_ptr().cast(), data.len(), flags, to.pointer(), to.length) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub fn set_option<T>(fd: RawFd, level: i32, name: i32, value: &T) -> io::Result<()> {
    // SAFETY: the value lives until the call returns, and its size is its own.
    checked(unsafe { libc::setsockopt(fd, level, name, std::ptr::from_ref(value).cast(), size_of::<T>() as u32) })
        .map(drop)
}

pub fn sendmmsg(fd: RawFd, to: SocketAddr) -> io::Result<()> {
    let mut to = Address::new(to);
    let mut data = *b"hello";
    let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    // SAFETY: plain data; all zeroes is a value.
    let mut message: libc::mmsghdr = unsafe { mem::zeroed() };
    message.msg_hdr.msg_name = (&raw mut to.storage).cast();
    message.msg_hdr.msg_namelen = to.length;
    message.msg_hdr.msg_iov = &raw mut part;
    message.msg_hdr.msg_iovlen = 1;
    // SAFETY: one message, whose parts live until the call returns.
    checked(unsafe { libc::sendmmsg(fd, &raw mut message, 1, 0) }).map(drop)
}

fn wait_readable(fd: RawFd) -> io::Result<()> {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry.
    match checked(unsafe { libc::poll(&raw mut poll, 1, wait().as_millis() as i32) })? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

/// Waits for an echo on any kind of connected socket.
fn echo_on(fd: RawFd) -> Attempt {
    wait_readable(fd).step("wait for the echo")?;
    let mut buffer = [0_u8; 64];
    // SAFETY: the buffer's length is its own.
    let got = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    match got {
        1.. => Ok(()),
        0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof)).step("wait for the echo"),
        _ => Err(io::Error::last_os_error()).step("wait for the echo"),
    }
}

pub fn ping(to: IpAddr) -> Attempt {
    let to = SocketAddr::new(to, 0);
    // Who may make ping sockets is a setting of the namespace.
    let _ = fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
    let (protocol, kind) = if to.is_ipv4() { (libc::IPPROTO_ICMP, 8) } else { (libc::IPPROTO_ICMPV6, 128) };
    let socket = new_socket(to, libc::SOCK_DGRAM, protocol)?;
    sendto_fd(socket.as_raw_fd(), &[kind, 0, 0, 0, 0, 1, 0, 1], 0, to).step("sendto")?;
    echo_on(socket.as_raw_fd())
}

pub fn fast_open(to: SocketAddr) -> Attempt {
    let _ = fs::write("/proc/sys/net/ipv4/tcp_fastopen", "1543");
    let socket = new_socket(to, libc::SOCK_STREAM, 0)?;
    sendto_fd(socket.as_raw_fd(), b"hello", libc::MSG_FASTOPEN, to).step("sendto")?;
    echo_on(socket.as_raw_fd())
}

const IPPROTO_MPTCP: i32 = 262;

pub fn connect_mptcp(to: SocketAddr) -> Result<TcpStream, Failure> {
    let _ = fs::write("/proc/sys/net/mptcp/enabled", "1");
    let socket = new_socket(to, libc::SOCK_STREAM, IPPROTO_MPTCP)?;
    connect_fd(socket.as_raw_fd(), to).step("connect")?;
    Ok(TcpStream::from(socket))
}

pub fn mptcp(to: SocketAddr) -> Attempt {
    exchange(&mut connect_mptcp(to)?, wait())
}

/// A line of names is followed by a line of values.
pub fn counter(family: &str, name: &str) -> Result<()> {
    let text = fs::read_to_string("/proc/thread-self/net/netstat")?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(family)?.strip_prefix(": "));
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else { anyhow::bail!("no family {family}") };
    let value = names.split(' ').zip(values.split(' ')).find(|(n, _)| *n == name).context("no such counter")?.1;
    say(&Outcome { ok: true, count: value.parse()?, ..Outcome::default() });
    Ok(())
}

pub fn serve_mptcp(at: SocketAddr) -> Result<()> {
    let socket = new_socket(at, libc::SOCK_STREAM, IPPROTO_MPTCP).map_err(|failure| failure.error)?;
    bind_fd(socket.as_raw_fd(), at)?;
    // SAFETY: no pointers.
    checked(unsafe { libc::listen(socket.as_raw_fd(), 16) })?;
    echo(TcpListener::from(socket))
}

fn submit(ring: &mut io_uring::IoUring, entry: &io_uring::squeue::Entry) -> io::Result<()> {
    // SAFETY: what the entry points at lives in the caller until the completion below was taken.
    unsafe { ring.submission().push(entry) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let result = ring.completion().next().map_or(-libc::EIO, |done| done.result());
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
}

pub fn uring_connect(to: SocketAddr) -> Attempt {
    let mut ring = io_uring::IoUring::new(4).step("io_uring_setup")?;
    let socket = new_socket(to, libc::SOCK_STREAM, 0)?;
    let address = Address::new(to);
    let fd = io_uring::types::Fd(socket.as_raw_fd());
    let connect = io_uring::opcode::Connect::new(fd, address.pointer(), address.length).build();
    submit(&mut ring, &connect).step("connect")?;
    let mut stream = TcpStream::from(socket);
    exchange(&mut stream, wait())
}

pub fn uring_send(to: SocketAddr) -> Attempt {
    let mut ring = io_uring::IoUring::new(4).step("io_uring_setup")?;
    let socket = new_socket(to, libc::SOCK_DGRAM, 0)?;
    let mut address = Address::new(to);
    let mut data = *b"hello";
    let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    // SAFETY: plain data; all zeroes is a value.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_name = (&raw mut address.storage).cast();
    message.msg_namelen = address.length;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    let send = io_uring::opcode::SendMsg::new(io_uring::types::Fd(socket.as_raw_fd()), &raw const message).build();
    submit(&mut ring, &send).step("sendmsg")?;
    echo_on(socket.as_raw_fd())
}
