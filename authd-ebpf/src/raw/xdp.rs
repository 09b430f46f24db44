//! The context of the interfaces' program.

use authd_common::bytes::{Bytes, MAX_OFFSET};
use core::arch::asm;

use aya_ebpf::{
    bindings::{BPF_F_CURRENT_NETNS, xdp_md},
    helpers,
};

use super::Ends;

/// A frame, read where it lies. Only for offsets that the compiler knows, or knows all of: the verifier follows no others.
#[derive(Clone, Copy)]
pub struct Frame(pub *mut xdp_md);

impl Frame {
    /// Bytes of the whole frame, in however many pieces it lies.
    #[inline(always)]
    pub fn length(self) -> u64 {
        // SAFETY: the helper takes the context.
        unsafe { helpers::generated::bpf_xdp_get_buff_len(self.0) }
    }

    /// Whether there is a TCP socket with these ends that is no listener. Nothing is looked at but its state.
    #[inline(always)]
    pub fn has_connection(self, ends: &Ends) -> bool {
        const TCP_LISTEN: u32 = 10;
        let netns = BPF_F_CURRENT_NETNS as i64 as u64;
        // SAFETY: the helper reads `size` bytes of the tuple; the reference that it returns is given back.
        unsafe {
            let found = ends
                .look_up(|tuple, size| helpers::generated::bpf_skc_lookup_tcp(self.0.cast(), tuple, size, netns, 0));
            if found.is_null() {
                return false;
            }
            let listens = (*found).state == TCP_LISTEN;
            helpers::generated::bpf_sk_release(found.cast());
            !listens
        }
    }
}

impl Bytes for Frame {
    #[inline(always)]
    fn array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        if offset > MAX_OFFSET {
            return None;
        }
        // SAFETY: a context is readable; the range was compared with the end of what lies here.
        unsafe {
            let at = (*self.0).data as usize + offset;
            if at + N > (*self.0).data_end as usize { None } else { Some(*(at as *const [u8; N])) }
        }
    }

    #[inline(always)]
    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        if offset > MAX_OFFSET {
            return None;
        }
        // SAFETY: as above.
        let at = unsafe {
            let at = (*self.0).data as usize + offset;
            if at + N * 4 > (*self.0).data_end as usize {
                return None;
            }
            at
        };
        let mut words = [0; N];
        let mut n = 0;
        while n < N {
            // SAFETY: inside the range that was compared.
            words[n] = unsafe { word(at + n * 4) };
            n += 1;
        }
        Some(words)
    }
}

/// One load of a word of a packet, aligned or not: the processors that authd supports do not mind, and the verifier knows. The
/// compiler would make four loads of it.
///
/// # Safety
///
/// Four bytes at the address are readable.
#[inline(always)]
unsafe fn word(at: usize) -> u32 {
    let value: u64;
    // SAFETY: by the caller; nothing else is touched.
    unsafe {
        asm!("{value} = *(u32 *)({at} + 0)", value = out(reg) value, at = in(reg) at, options(pure, readonly, nostack));
    }
    value as u32
}

/// The same frame, wherever its pieces lie, copied by a helper.
#[derive(Clone, Copy)]
pub struct Scattered(pub Frame);

impl Bytes for Scattered {
    #[inline(always)]
    fn array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        if offset > MAX_OFFSET {
            return None;
        }
        let mut bytes = [0u8; N];
        // SAFETY: the helper writes exactly `N` bytes to the buffer, or none.
        let failed = unsafe {
            let into = bytes.as_mut_ptr().cast();
            helpers::generated::bpf_xdp_load_bytes(self.0.0, offset as u32, into, N as u32)
        };
        if failed == 0 { Some(bytes) } else { None }
    }

    /// By one call for all of them.
    #[inline(always)]
    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        if offset + N * 4 - 4 > MAX_OFFSET {
            return None;
        }
        let mut words = [0u32; N];
        // SAFETY: as above.
        let failed = unsafe {
            let into = words.as_mut_ptr().cast();
            helpers::generated::bpf_xdp_load_bytes(self.0.0, offset as u32, into, N as u32 * 4)
        };
        if failed == 0 { Some(words) } else { None }
    }
}
