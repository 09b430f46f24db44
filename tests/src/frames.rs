//! IP packets that somebody might send: random bytes, and packets with a structure, sound or not.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rand::{Rng, RngExt, rngs::SmallRng, seq::IndexedRandom};

use crate::meaning;

/// Bytes without any plan, but for a first nibble that is mostly an IP version.
pub fn random(random: &mut SmallRng) -> Vec<u8> {
    let mut bytes = vec![0; random.random_range(1..160)];
    random.fill_bytes(&mut bytes);
    let version = [4, 4, 4, 6, 6, 6, bytes[0] >> 4].choose(random).copied().unwrap_or_default();
    bytes[0] = version << 4 | bytes[0] & 0xf;
    if version == 4 && random.random_bool(0.7) {
        bytes[0] = 0x45;
    }
    bytes
}

/// A packet as stacks make them, or nearly so.
pub fn structured(random: &mut SmallRng) -> Vec<u8> {
    let protocol = meaning::protocol(random);
    let port = meaning::port(random);
    structured_to(random, protocol, port)
}

/// The same to a port, if the protocol has any.
pub fn structured_to(random: &mut SmallRng, protocol: u8, port: u16) -> Vec<u8> {
    let (source, destination) = loop {
        let (a, b) = (meaning::address(random), meaning::address(random));
        if a.is_ipv4() == b.is_ipv4() {
            break (a, b);
        }
    };
    let payload = transport(random, protocol, port);
    let mut packet = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => v4(random, source, destination, protocol, &payload),
        (IpAddr::V6(source), IpAddr::V6(destination)) => v6(random, source, destination, protocol, &payload),
        _ => unreachable!("families were compared"),
    };
    // Sometimes cut, sometimes damaged.
    if random.random_ratio(1, 8) {
        packet.truncate(random.random_range(1..=packet.len()));
    }
    if random.random_ratio(1, 8) {
        for _ in 0..random.random_range(1..4) {
            let at = random.random_range(0..packet.len());
            packet[at] = random.random();
        }
    }
    packet
}

fn transport(random: &mut SmallRng, protocol: u8, destination: u16) -> Vec<u8> {
    let source = meaning::port(random);
    let mut bytes = Vec::new();
    bytes.extend(source.to_be_bytes());
    bytes.extend(destination.to_be_bytes());
    match protocol {
        6 => {
            bytes.extend([0; 8]);
            let flags = [0x02, 0x12, 0x10, 0x18, 0x04, 0x11, 0x00, 0xff].choose(random).copied().unwrap_or_default();
            bytes.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        }
        17 => bytes.extend([0, 13, 0, 0]),
        _ => {}
    }
    bytes.extend(b"hello");
    bytes
}

/// RFC 791.
fn v4(random: &mut SmallRng, source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let options = if random.random_ratio(1, 6) { random.random_range(1..=10) } else { 0 };
    let fragment: u16 = match random.random_range(0..16) {
        0 => 0x2000,
        1 => random.random_range(1..0x2000),
        2 => 0x2000 | random.random_range(1..0x2000),
        3 => 0x4000,
        _ => 0,
    };
    let length = 20 + options * 4 + payload.len();
    let mut packet = vec![0x40 | (5 + options as u8), 0];
    packet.extend((length as u16).to_be_bytes());
    packet.extend(random.random::<u16>().to_be_bytes());
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    // Router alert (RFC 2113), or loose source routing.
    for _ in 0..options {
        packet.extend([[0x94, 4, 0, 0], [0x83, 4, 4, 0], [1, 1, 1, 1]].choose(random).copied().unwrap_or_default());
    }
    packet.extend(payload);
    packet
}

/// RFC 8200, with a chain of extension headers.
fn v6(random: &mut SmallRng, source: Ipv6Addr, destination: Ipv6Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let number = if random.random_bool(0.5) { 0 } else { random.random_range(1..12) };
    let kinds: Vec<u8> =
        (0..number).map(|_| [0, 43, 44, 51, 60, 60, 60].choose(random).copied().unwrap_or_default()).collect();
    let mut chain = Vec::new();
    for (at, kind) in kinds.iter().enumerate() {
        let next = kinds.get(at + 1).copied().unwrap_or(protocol);
        let units = if random.random_bool(0.7) { 0 } else { random.random_range(1..4) };
        match kind {
            44 => {
                let offset: u16 = if random.random_bool(0.5) { 0 } else { random.random() };
                chain.extend([next, 0]);
                chain.extend(offset.to_be_bytes());
                chain.extend([0; 4]);
            }
            // RFC 4302: in units of four bytes, less two.
            51 => {
                chain.extend([next, units + 1]);
                chain.extend(vec![0; (units as usize + 3) * 4 - 2]);
            }
            _ => {
                chain.extend([next, units]);
                chain.extend(vec![0; (units as usize + 1) * 8 - 2]);
            }
        }
    }
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(((chain.len() + payload.len()) as u16).to_be_bytes());
    packet.extend([kinds.first().copied().unwrap_or(protocol), 64]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(chain);
    packet.extend(payload);
    packet
}
