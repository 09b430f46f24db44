//! Addresses as both worlds store them: 16 bytes in network order, IPv4 as IPv4-mapped IPv6 (RFC 4291, 2.5.5.2).

use core::cmp::Ordering;

/// An IPv6 address, or an IPv4 address in its mapped form, so that one table serves both families. Its words are in network
/// order, and are words, not octets: the compiler would keep sixteen of those on the kernel's stack, one by one.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Address([u32; 4]);

impl Ord for Address {
    fn cmp(&self, other: &Self) -> Ordering {
        self.octets().cmp(&other.octets())
    }
}

impl PartialOrd for Address {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Address {
    /// Stands where an address is not known (yet), as in a denied `connect()` before a source address was chosen.
    pub const UNSPECIFIED: Self = Self([0; 4]);
    /// Bits that come before an IPv4 address in its mapped form.
    pub const V4_PREFIX_BITS: u8 = 96;

    #[inline(always)]
    pub const fn v4(octets: [u8; 4]) -> Self {
        Self::from_be_word(u32::from_ne_bytes(octets))
    }

    #[inline(always)]
    pub const fn v6(o: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ])
    }

    /// From the four 32-bit words in network order that `bpf_sock_addr` and `bpf_sock_ops` show.
    #[inline(always)]
    pub const fn from_be_words(words: [u32; 4]) -> Self {
        Self(words)
    }

    /// From the one 32-bit word in network order that the same contexts show for IPv4.
    #[inline(always)]
    pub const fn from_be_word(word: u32) -> Self {
        Self([0, 0, 0xffff_u32.to_be(), word])
    }

    /// The four 32-bit words in network order.
    #[inline(always)]
    pub const fn be_words(&self) -> [u32; 4] {
        self.0
    }

    #[inline(always)]
    pub const fn octets(&self) -> [u8; 16] {
        let [a, b, c, d] = self.0;
        let (a, b, c, d) = (a.to_ne_bytes(), b.to_ne_bytes(), c.to_ne_bytes(), d.to_ne_bytes());
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
    }

    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        let [a, b, c, _] = self.0;
        a | b == 0 && c == 0xffff_u32.to_be()
    }
}
