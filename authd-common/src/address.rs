//! Addresses as both worlds store them: 16 bytes in network order, IPv4 as IPv4-mapped IPv6 (RFC 4291, 2.5.5.2).

use core::cmp::Ordering;

/// An IPv6 address, or an IPv4 address in its mapped form, so that one table serves both families. Two words of eight octets
/// in memory order: a processor waits when it reads a word that was just written in halves, and the compiler would keep sixteen
/// octets on the kernel's stack, one by one.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Address([u64; 2]);
const _: () = assert!(size_of::<Address>() == 16 && align_of::<Address>() == 8);

/// Two words, one behind the other in memory.
#[inline(always)]
const fn pair(first: u32, second: u32) -> u64 {
    if cfg!(target_endian = "little") {
        first as u64 | (second as u64) << 32
    } else {
        second as u64 | (first as u64) << 32
    }
}

/// The reverse.
#[inline(always)]
const fn halves(word: u64) -> [u32; 2] {
    let (low, high) = (word as u32, (word >> 32) as u32);
    if cfg!(target_endian = "little") { [low, high] } else { [high, low] }
}

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
    pub const UNSPECIFIED: Self = Self([0; 2]);
    /// Bits that come before an IPv4 address in its mapped form.
    pub const V4_PREFIX_BITS: u8 = 96;

    #[inline(always)]
    pub const fn v4(octets: [u8; 4]) -> Self {
        Self::from_be_word(u32::from_ne_bytes(octets))
    }

    #[inline(always)]
    pub const fn v6(o: [u8; 16]) -> Self {
        Self([
            u64::from_ne_bytes([o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7]]),
            u64::from_ne_bytes([o[8], o[9], o[10], o[11], o[12], o[13], o[14], o[15]]),
        ])
    }

    /// From the four 32-bit words in network order that `bpf_sock_addr` and `bpf_sock_ops` show.
    #[inline(always)]
    pub const fn from_be_words(words: [u32; 4]) -> Self {
        let [a, b, c, d] = words;
        Self([pair(a, b), pair(c, d)])
    }

    /// From the one 32-bit word in network order that the same contexts show for IPv4.
    #[inline(always)]
    pub const fn from_be_word(word: u32) -> Self {
        Self([0, pair(0xffff_u32.to_be(), word)])
    }

    /// The same address, of which the kernel's verifier knows nothing any more: `zero` is 0, which it cannot tell. Else it would
    /// go on from IPv4's constant half apart from all other addresses.
    #[inline(always)]
    pub const fn veiled(&self, zero: u32) -> Self {
        let zero = pair(zero, zero);
        Self([self.0[0] ^ zero, self.0[1] ^ zero])
    }

    /// The four 32-bit words in network order.
    #[inline(always)]
    pub const fn be_words(&self) -> [u32; 4] {
        let ([a, b], [c, d]) = (halves(self.0[0]), halves(self.0[1]));
        [a, b, c, d]
    }

    #[inline(always)]
    pub const fn octets(&self) -> [u8; 16] {
        let (a, b) = (self.0[0].to_ne_bytes(), self.0[1].to_ne_bytes());
        [a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]
    }

    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && halves(self.0[1])[0] == 0xffff_u32.to_be()
    }
}
