//! Addresses and networks, and ports: the two coordinates of a service.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use authd_common::{
    address::Address,
    tables::{IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP},
};
use serde::{Deserialize, Serialize};

/// A network. An IPv4 network lies inside `::ffff:0:0/96` here, and no IPv6 network of the policy reaches into it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Network {
    pub address: Address,
    /// Prefix length, 96 more than written for IPv4.
    pub bits: u8,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("`{0}` is no address or network: write 10.0.0.7, 10.0.0.0/8 or fd00::/8 (names are not resolved)")]
    Syntax(String),
    #[error("`{given}` has bits set behind its prefix: write `{meant}`")]
    HostBits { given: String, meant: Network },
    #[error("`{0}` is an IPv4 network in its IPv6 form: write it as IPv4")]
    Mapped(String),
}

impl Network {
    pub const ALL_V4: Self = Self { address: Address::v4([0; 4]), bits: Address::V4_PREFIX_BITS };
    pub const ALL_V6: Self = Self { address: Address::v6([0; 16]), bits: 0 };

    pub fn parse(text: &str) -> Result<Self, NetworkError> {
        let syntax = || NetworkError::Syntax(text.to_owned());
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => {
                let plain = !bits.is_empty() && bits.bytes().all(|b| b.is_ascii_digit());
                (address, Some(bits.parse::<u8>().ok().filter(|_| plain).ok_or_else(syntax)?))
            }
            None => (text, None),
        };
        let network = match address.parse::<IpAddr>().map_err(|_| syntax())? {
            IpAddr::V4(v4) => {
                let bits = bits.unwrap_or(32);
                if bits > 32 {
                    return Err(syntax());
                }
                Self { address: Address::v4(v4.octets()), bits: bits + Address::V4_PREFIX_BITS }
            }
            IpAddr::V6(v6) => {
                let bits = bits.unwrap_or(128);
                if bits > 128 {
                    return Err(syntax());
                }
                if v6.to_ipv4_mapped().is_some() && bits >= Address::V4_PREFIX_BITS {
                    return Err(NetworkError::Mapped(text.to_owned()));
                }
                Self { address: Address::v6(v6.octets()), bits }
            }
        };
        let meant = Self { address: masked(&network.address, network.bits), ..network };
        if meant == network { Ok(network) } else { Err(NetworkError::HostBits { given: text.to_owned(), meant }) }
    }

    pub fn is_v4(&self) -> bool {
        self.bits >= Address::V4_PREFIX_BITS && self.address.is_v4()
    }

    /// An address belongs to networks of its own family only.
    pub fn contains(&self, address: &Address) -> bool {
        self.is_v4() == address.is_v4() && masked(address, self.bits) == self.address
    }

    pub fn covers(&self, other: &Self) -> bool {
        self.is_v4() == other.is_v4() && self.bits <= other.bits && masked(&other.address, self.bits) == self.address
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = if self.is_v4() { self.bits - Address::V4_PREFIX_BITS } else { self.bits };
        write!(f, "{}/{bits}", display(&self.address))
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        Self::parse(text)
    }
}

impl TryFrom<String> for Network {
    type Error = NetworkError;

    fn try_from(text: String) -> Result<Self, NetworkError> {
        Self::parse(&text)
    }
}

impl From<Network> for String {
    fn from(network: Network) -> Self {
        network.to_string()
    }
}

/// As people write it.
pub fn display(address: &Address) -> IpAddr {
    let octets = address.octets();
    if address.is_v4() {
        IpAddr::V4(Ipv4Addr::new(octets[12], octets[13], octets[14], octets[15]))
    } else {
        IpAddr::V6(Ipv6Addr::from(octets))
    }
}

pub fn from_ip(address: IpAddr) -> Address {
    match address.to_canonical() {
        IpAddr::V4(v4) => Address::v4(v4.octets()),
        IpAddr::V6(v6) => Address::v6(v6.octets()),
    }
}

pub fn masked(address: &Address, bits: u8) -> Address {
    let value = u128::from_be_bytes(address.octets());
    let mask = if bits == 0 { 0 } else { u128::MAX << (128 - u32::from(bits)) };
    Address::v6((value & mask).to_be_bytes())
}

/// Ports, or protocols, that belong to a service.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Ports {
    Tcp {
        first: u16,
        last: u16,
    },
    Udp {
        first: u16,
        last: u16,
    },
    /// An IP protocol without ports.
    Other(u8),
    /// Every port of every protocol.
    Any,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` names no ports: use tcp/443, tcp/8000-8100, udp/53, tcp, udp, icmp, proto/47 or any")]
pub struct PortsError(String);

impl Ports {
    /// `icmp` stands for ICMP and ICMPv6, so one text may give two.
    pub fn parse(text: &str) -> Result<Vec<Self>, PortsError> {
        let wrong = || PortsError(text.to_owned());
        let (protocol, ports) = match text.split_once('/') {
            Some((protocol, ports)) => (protocol, Some(ports)),
            None => (text, None),
        };
        let number = |text: &str| text.parse::<u16>().ok().filter(|_| text.bytes().all(|b| b.is_ascii_digit()));
        let range = || -> Result<(u16, u16), PortsError> {
            let Some(ports) = ports else { return Ok((0, u16::MAX)) };
            let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
            let (first, last) = (number(first).ok_or_else(wrong)?, number(last).ok_or_else(wrong)?);
            if first == 0 || first > last { Err(wrong()) } else { Ok((first, last)) }
        };
        Ok(match (protocol, ports) {
            ("tcp", _) => range().map(|(first, last)| vec![Self::Tcp { first, last }])?,
            ("udp", _) => range().map(|(first, last)| vec![Self::Udp { first, last }])?,
            ("icmp", None) => vec![Self::Other(IPPROTO_ICMP), Self::Other(IPPROTO_ICMPV6)],
            ("any", None) => vec![Self::Any],
            ("proto", Some(ports)) => match number(ports).and_then(|n| u8::try_from(n).ok()).ok_or_else(wrong)? {
                IPPROTO_TCP => vec![Self::Tcp { first: 0, last: u16::MAX }],
                IPPROTO_UDP => vec![Self::Udp { first: 0, last: u16::MAX }],
                other => vec![Self::Other(other)],
            },
            _ => return Err(wrong()),
        })
    }

    pub fn contains(&self, protocol: u8, port: u16) -> bool {
        match *self {
            Self::Tcp { first, last } => protocol == IPPROTO_TCP && (first..=last).contains(&port),
            Self::Udp { first, last } => protocol == IPPROTO_UDP && (first..=last).contains(&port),
            Self::Other(other) => protocol == other,
            Self::Any => true,
        }
    }

    pub fn covers(&self, other: &Self) -> bool {
        match (*self, *other) {
            (Self::Any, _) => true,
            (Self::Tcp { first: a, last: b }, Self::Tcp { first: c, last: d })
            | (Self::Udp { first: a, last: b }, Self::Udp { first: c, last: d }) => a <= c && d <= b,
            (Self::Other(a), Self::Other(b)) => a == b,
            _ => false,
        }
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Tcp { first, last } if first == last => write!(f, "tcp/{first}"),
            Self::Udp { first, last } if first == last => write!(f, "udp/{first}"),
            Self::Tcp { first: 0, last: u16::MAX } => f.write_str("tcp"),
            Self::Udp { first: 0, last: u16::MAX } => f.write_str("udp"),
            Self::Tcp { first, last } => write!(f, "tcp/{first}-{last}"),
            Self::Udp { first, last } => write!(f, "udp/{first}-{last}"),
            Self::Other(IPPROTO_ICMP) => f.write_str("icmp"),
            Self::Other(IPPROTO_ICMPV6) => f.write_str("icmpv6"),
            Self::Other(protocol) => write!(f, "proto/{protocol}"),
            Self::Any => f.write_str("any"),
        }
    }
}

/// Name of an IP protocol, as policies and records write it.
pub fn protocol_name(protocol: u8) -> String {
    match protocol {
        IPPROTO_TCP => "tcp".to_owned(),
        IPPROTO_UDP => "udp".to_owned(),
        IPPROTO_ICMP => "icmp".to_owned(),
        IPPROTO_ICMPV6 => "icmpv6".to_owned(),
        other => format!("proto/{other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_do_not_reach_into_each_other() {
        let v6 = Network::parse("::/0").unwrap();
        assert!(!v6.contains(&Address::v4([10, 0, 0, 1])));
        assert!(v6.contains(&from_ip("fd00::1".parse().unwrap())));
        assert!(!v6.covers(&Network::parse("10.0.0.0/8").unwrap()));
        assert!(Network::parse("0.0.0.0/0").unwrap().contains(&from_ip("::ffff:10.0.0.1".parse().unwrap())));
    }

    #[test]
    fn networks_that_say_two_things_are_refused() {
        assert!(matches!(Network::parse("10.0.0.1/8"), Err(NetworkError::HostBits { .. })));
        assert!(matches!(Network::parse("::ffff:10.0.0.0/104"), Err(NetworkError::Mapped(_))));
        for text in ["10.0.0.0/33", "10.0.0", "fd00::/129", "example.org", "10.0.0.0/+8", "10.0.0.0/", ""] {
            assert!(matches!(Network::parse(text), Err(NetworkError::Syntax(_))), "{text}");
        }
    }

    #[test]
    fn ports_are_read_as_they_are_written() {
        assert_eq!(Ports::parse("tcp/80-90").unwrap(), [Ports::Tcp { first: 80, last: 90 }]);
        assert_eq!(Ports::parse("udp").unwrap(), [Ports::Udp { first: 0, last: u16::MAX }]);
        assert_eq!(Ports::parse("icmp").unwrap().len(), 2);
        for text in
            ["tcp/0", "tcp/90-80", "tcp/65536", "tcp/", "http", "sctp/1", "icmp/8", "proto/256", "tcp/+80", "any/1"]
        {
            assert!(Ports::parse(text).is_err(), "{text}");
        }
    }
}
