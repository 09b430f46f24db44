//! SipHash-2-4 (Aumasson and Bernstein, 2012) of a whole number of words: what authenticates an identity in a SYN.
//!
//! Written here because the kernel's programs need it without a branch that depends on data, and without a buffer.

/// The hash of the little-endian words of a message.
#[inline(always)]
pub const fn siphash<const N: usize>(key: [u64; 2], message: &[u64; N]) -> u64 {
    let mut state = State([
        key[0] ^ 0x736f_6d65_7073_6575,
        key[1] ^ 0x646f_7261_6e64_6f6d,
        key[0] ^ 0x6c79_6765_6e65_7261,
        key[1] ^ 0x7465_6462_7974_6573,
    ]);
    let mut at = 0;
    while at < N {
        state = state.absorb(message[at]);
        at += 1;
    }
    // The last word is the rest of the message, of which there is none, and its length.
    let State([a, b, c, d]) = state.absorb(((N * 8) as u64) << 56);
    let State([a, b, c, d]) = State([a, b, c ^ 0xff, d]).round().round().round().round();
    a ^ b ^ c ^ d
}

#[derive(Clone, Copy)]
struct State([u64; 4]);

impl State {
    #[inline(always)]
    const fn absorb(self, word: u64) -> Self {
        let Self([a, b, c, d]) = self;
        let Self([a, b, c, d]) = Self([a, b, c, d ^ word]).round().round();
        Self([a ^ word, b, c, d])
    }

    #[inline(always)]
    const fn round(self) -> Self {
        let Self([mut a, mut b, mut c, mut d]) = self;
        a = a.wrapping_add(b);
        b = b.rotate_left(13) ^ a;
        a = a.rotate_left(32);
        c = c.wrapping_add(d);
        d = d.rotate_left(16) ^ c;
        a = a.wrapping_add(d);
        d = d.rotate_left(21) ^ a;
        c = c.wrapping_add(b);
        b = b.rotate_left(17) ^ c;
        c = c.rotate_left(32);
        Self([a, b, c, d])
    }
}

#[cfg(test)]
mod tests {
    use super::siphash;

    /// The reference implementation's key: octets 0 to 15.
    const KEY: [u64; 2] = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];

    /// Its vectors for messages of 0, 8, 16, 24 and 48 octets, each of which is its own place.
    #[test]
    fn agrees_with_the_reference_vectors() {
        let word = |n: u64| u64::from_le_bytes(core::array::from_fn(|i| (n * 8) as u8 + i as u8));
        assert_eq!(siphash(KEY, &[]), 0x726f_db47_dd0e_0e31);
        assert_eq!(siphash(KEY, &[word(0)]), 0x93f5_f579_9a93_2462);
        assert_eq!(siphash(KEY, &[word(0), word(1)]), 0x3f2a_cc7f_57c2_9bdb);
        assert_eq!(siphash(KEY, &[word(0), word(1), word(2)]), 0xb8ad_50c6_f649_af94);
        let six: [u64; 6] = core::array::from_fn(|n| word(n as u64));
        assert_eq!(siphash(KEY, &six), 0xe612_a3cb_9ecb_a951);
    }
}
