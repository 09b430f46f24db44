//! What the SYN of a connection to authd's own listener said of its caller.
//!
//! Enters: a listener, then connections that it accepted. Leaves: the headers of their SYNs, as the kernel keeps them. Never:
//! belief in what they say, which is for `syn::hear`.

use std::{
    io,
    net::TcpListener,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Octets of an IPv6 header and of a TCP header, each with all the options that the kernel takes in a SYN.
const HEADERS: usize = 512;

/// Lets the kernel keep the SYN of each connection.
pub fn keep(listener: &TcpListener) -> io::Result<()> {
    let on: libc::c_int = 1;
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option reads one integer, whose size is given.
    let result = unsafe {
        let value: *const libc::c_int = &raw const on;
        libc::setsockopt(listener.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_SAVE_SYN, value.cast(), length)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The SYN that opened a connection, from its IP header on. The kernel tells it once; it has none where it answered with a
/// cookie because too many callers came at once.
pub fn syn(connection: BorrowedFd<'_>) -> io::Result<Option<Vec<u8>>> {
    let mut headers = vec![0_u8; HEADERS];
    let mut length = HEADERS as libc::socklen_t;
    // SAFETY: the option writes at most as many octets as are given, and says how many.
    let result = unsafe {
        let value = headers.as_mut_ptr().cast();
        libc::getsockopt(connection.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_SAVED_SYN, value, &raw mut length)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    headers.truncate(length as usize);
    Ok(Some(headers).filter(|headers| !headers.is_empty()))
}

#[cfg(test)]
mod tests {
    use std::{
        io::Result,
        net::{TcpListener, TcpStream},
        os::fd::AsFd,
    };

    use authd_common::parse::parse;

    use super::*;

    #[test]
    fn the_syn_of_a_connection_is_told_once() -> Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        keep(&listener)?;
        let caller = TcpStream::connect(listener.local_addr()?)?;
        let (connection, _) = listener.accept()?;
        let headers = syn(connection.as_fd())?.expect("the kernel has it");
        let packet = parse(headers.as_slice()).expect("it is one");
        assert!(packet.opens_tcp());
        assert_eq!(packet.source_port, caller.local_addr()?.port());
        assert_eq!(packet.destination_port, listener.local_addr()?.port());
        assert_eq!(syn(connection.as_fd())?, None);
        Ok(())
    }
}
