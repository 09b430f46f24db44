//! UDP in packets made by hand, as no application sends it.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::AsRawFd,
};

use super::{
    Attempt, Shape, Step,
    sockets::{new_socket, sendto_fd, set_option},
    wait,
};

pub fn crafted(to: SocketAddr, shape: Shape) -> Attempt {
    let listener = UdpSocket::bind(SocketAddr::new(to.ip(), 0)).step("bind for the echo")?;
    listener.set_read_timeout(Some(wait())).step("set a limit")?;
    let from = listener.local_addr().step("the own address")?;
    let socket = new_socket(to, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    if to.is_ipv6() {
        // The kernel takes the packet as it is (raw(7), ipv6(7)).
        set_option(socket.as_raw_fd(), libc::IPPROTO_IPV6, libc::IPV6_HDRINCL, &1_i32).step("IPV6_HDRINCL")?;
    }
    for packet in packets(from, to, shape) {
        sendto_fd(socket.as_raw_fd(), &packet, 0, SocketAddr::new(to.ip(), 0)).step("sendto")?;
    }
    listener.recv(&mut [0; 64]).step("wait for the echo").map(drop)
}

fn packets(from: SocketAddr, to: SocketAddr, shape: Shape) -> Vec<Vec<u8>> {
    let mut datagram = Vec::new();
    datagram.extend(from.port().to_be_bytes());
    datagram.extend(to.port().to_be_bytes());
    datagram.extend(24_u16.to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend([b'x'; 16]);
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let packet = |payload: &[u8], fragment: u16, options: &[u8]| {
                let words = 5 + options.len() / 4;
                let mut packet = vec![0x40 | words as u8, 0];
                packet.extend(((words * 4 + payload.len()) as u16).to_be_bytes());
                packet.extend([0x12, 0x34]);
                packet.extend(fragment.to_be_bytes());
                packet.extend([64, 17, 0, 0]);
                packet.extend(from.octets());
                packet.extend(to.octets());
                packet.extend(options);
                packet.extend(payload);
                packet
            };
            match shape {
                Shape::Fragments => vec![packet(&datagram[..16], 0x2000, &[]), packet(&datagram[16..], 2, &[])],
                // RFC 791: no operation, twice, and the end.
                Shape::Options => vec![packet(&datagram, 0, &[1, 1, 1, 0])],
                _ => vec![packet(&datagram, 0, &[])],
            }
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            // A UDP checksum is not optional in IPv6 (RFC 8200, 8.1).
            let sum = checksum(&from.octets(), &to.octets(), &datagram);
            datagram[6..8].copy_from_slice(&sum.to_be_bytes());
            let options = |next: u8| [next, 0, 1, 4, 0, 0, 0, 0];
            let (first, headers): (u8, Vec<u8>) = match shape {
                Shape::DestinationOptions => (60, options(17).to_vec()),
                // RFC 4302-like padding by destination options, one after the other.
                Shape::ManyHeaders => (60, (0..9).flat_map(|i| options(if i == 8 { 17 } else { 60 })).collect()),
                // Type 2 with no segment left would be ignored; the header alone is what matters.
                Shape::Routing => (43, vec![17, 0, 253, 0, 0, 0, 0, 0]),
                Shape::Fragments => {
                    let head = |offset: u16, more: u16| {
                        let mut head = vec![17, 0];
                        head.extend((offset << 3 | more).to_be_bytes());
                        head.extend([0, 0, 0, 9]);
                        head
                    };
                    return [(0, 1, &datagram[..16]), (2, 0, &datagram[16..])]
                        .into_iter()
                        .map(|(offset, more, part)| v6(from, to, 44, &[head(offset, more), part.to_vec()].concat()))
                        .collect();
                }
                _ => (17, Vec::new()),
            };
            vec![v6(from, to, first, &[headers, datagram].concat())]
        }
        _ => Vec::new(),
    }
}

fn v6(from: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, 64]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    packet
}

/// RFC 8200, 8.1.
fn checksum(from: &[u8], to: &[u8], datagram: &[u8]) -> u16 {
    let mut bytes = [from, to, &(datagram.len() as u32).to_be_bytes(), &[0, 0, 0, 17], datagram].concat();
    if bytes.len() % 2 == 1 {
        bytes.push(0);
    }
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}
