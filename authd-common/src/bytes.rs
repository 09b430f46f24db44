//! A packet, as the code that judges it may see it: bounded copies at an offset.

/// No header that matters lies behind this offset. Both worlds refuse to read further, so that the kernel's verifier sees
/// a bound and user space sees the same one.
pub const MAX_OFFSET: usize = 512;

/// Bytes of one packet, starting at its network header.
pub trait Bytes {
    /// `N` bytes at `offset`, or `None` if the packet ends before or `offset` exceeds [`MAX_OFFSET`].
    fn array<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;

    /// The same, by words in memory order, which need not be aligned: what is compared or kept as a whole.
    #[inline(always)]
    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        let mut words = [0; N];
        let mut at = 0;
        while at < N {
            words[at] = u32::from_ne_bytes(self.array::<4>(offset + at * 4)?);
            at += 1;
        }
        Some(words)
    }
}

impl Bytes for [u8] {
    #[inline(always)]
    fn array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        if offset > MAX_OFFSET {
            return None;
        }
        self.get(offset..)?.first_chunk::<N>().copied()
    }
}
