//! Addresses as both worlds store them: 16 bytes in network order, IPv4 as IPv4-mapped IPv6 (RFC 4291, 2.5.5.2).

/// An IPv6 address, or an IPv4 address in its mapped form, so that one table serves both families. Aligned, so that the
/// kernel side copies and compares it in words.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Address(pub [u8; 16]);

impl Address {
    /// Stands where an address is not known (yet), as in a denied `connect()` before a source address was chosen.
    pub const UNSPECIFIED: Self = Self([0; 16]);
    /// Bits that come before an IPv4 address in its mapped form.
    pub const V4_PREFIX_BITS: u8 = 96;

    #[inline(always)]
    pub const fn v4(a: [u8; 4]) -> Self {
        Self([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a[0], a[1], a[2], a[3]])
    }

    #[inline(always)]
    pub const fn v6(a: [u8; 16]) -> Self {
        Self(a)
    }

    /// From the four 32-bit words in network order that `bpf_sock_addr` and `bpf_sock_ops` show.
    #[inline(always)]
    pub const fn from_be_words(w: [u32; 4]) -> Self {
        let (a, b, c, d) = (w[0].to_ne_bytes(), w[1].to_ne_bytes(), w[2].to_ne_bytes(), w[3].to_ne_bytes());
        Self([a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]])
    }

    /// From the one 32-bit word in network order that the same contexts show for IPv4.
    #[inline(always)]
    pub const fn from_be_word(w: u32) -> Self {
        Self::v4(w.to_ne_bytes())
    }

    /// The four 32-bit words in network order.
    #[inline(always)]
    pub const fn be_words(&self) -> [u32; 4] {
        let a = &self.0;
        [
            u32::from_ne_bytes([a[0], a[1], a[2], a[3]]),
            u32::from_ne_bytes([a[4], a[5], a[6], a[7]]),
            u32::from_ne_bytes([a[8], a[9], a[10], a[11]]),
            u32::from_ne_bytes([a[12], a[13], a[14], a[15]]),
        ]
    }

    #[inline(always)]
    pub const fn octets(&self) -> [u8; 16] {
        self.0
    }

    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        let w = self.be_words();
        w[0] | w[1] == 0 && w[2] == 0xffff_u32.to_be()
    }
}
