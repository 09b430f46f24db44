//! What the interfaces' program is measured against, and what makes the frames that it is measured with. Not installed:
//! `cargo xtask bench` builds it.
#![no_std]
#![no_main]

use authd_common::{
    address::Address,
    syn,
    tables::{Flow, FlowKey},
};
use aya_ebpf::{
    bindings::{
        xdp_action::{XDP_DROP, XDP_PASS, XDP_TX},
        xdp_md,
    },
    helpers::generated::bpf_get_prandom_u32,
    macros::{map, xdp},
    maps::LruHashMap,
    programs::XdpContext,
};

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// As authd's own table of flows.
#[map]
static FLOOR_FLOWS: LruHashMap<FlowKey, Flow> = LruHashMap::with_max_entries(65_536, 0);

/// Ethernet, IPv4 without options, and the beginning of TCP.
const PLAIN: usize = 14 + 20 + 14;
const SOURCE: usize = 14 + 12;

#[inline(always)]
fn plain(ctx: *mut xdp_md) -> Option<*mut [u8; PLAIN]> {
    // SAFETY: a context is readable.
    let (data, end) = unsafe { ((*ctx).data as usize, (*ctx).data_end as usize) };
    if data + PLAIN > end { None } else { Some(data as *mut [u8; PLAIN]) }
}

/// The least that there is.
#[xdp(frags)]
pub fn floor_drop(_: XdpContext) -> u32 {
    XDP_DROP
}

/// Reads a frame, and looks its flow up.
#[xdp(frags)]
pub fn floor_lookup(ctx: XdpContext) -> u32 {
    let Some(frame) = plain(ctx.ctx) else { return XDP_PASS };
    // SAFETY: the range was compared with the frame's end.
    let f = unsafe { &*frame };
    if f[12] != 8 || f[13] != 0 || f[14] != 0x45 || f[23] != 6 {
        return XDP_PASS;
    }
    let source = (Address::v4([f[26], f[27], f[28], f[29]]), u16::from_be_bytes([f[34], f[35]]));
    let destination = (Address::v4([f[30], f[31], f[32], f[33]]), u16::from_be_bytes([f[36], f[37]]));
    let key = FlowKey::new(0, 6, source, destination);
    if FLOOR_FLOWS.get_ptr(&key).is_some() { XDP_PASS } else { XDP_DROP }
}

/// The same of a SYN that says who sends it, with one hash over what that is.
#[xdp(frags)]
pub fn floor_hash(ctx: XdpContext) -> u32 {
    const WHOLE: usize = 14 + 20 + 36;
    const SECRET: [u64; 2] = [1, 2];
    // SAFETY: a context is readable.
    let (data, end) = unsafe { ((*ctx.ctx).data as usize, (*ctx.ctx).data_end as usize) };
    if data + WHOLE > end {
        return XDP_PASS;
    }
    // SAFETY: the range was compared with the frame's end.
    let f = unsafe { &*(data as *const [u8; WHOLE]) };
    if f[12] != 8 || f[13] != 0 || f[14] != 0x45 || f[23] != 6 {
        return XDP_PASS;
    }
    let source = (Address::v4([f[26], f[27], f[28], f[29]]), u16::from_be_bytes([f[34], f[35]]));
    let destination = (Address::v4([f[30], f[31], f[32], f[33]]), u16::from_be_bytes([f[36], f[37]]));
    if FLOOR_FLOWS.get_ptr(&FlowKey::new(0, 6, source, destination)).is_none() {
        return XDP_DROP;
    }
    let sequence = u32::from_be_bytes([f[38], f[39], f[40], f[41]]);
    let label = u32::from_be_bytes([0, f[67], f[68], f[69]]);
    let said = u64::from_be_bytes([f[58], f[59], f[60], f[61], f[62], f[63], f[64], f[65]]);
    let meant = syn::mac(SECRET, &syn::syn_key(source, destination, sequence), f[66] as u32, label);
    if said == meant { XDP_PASS } else { XDP_DROP }
}

/// Sends what it is run with.
#[xdp(frags)]
pub fn floor_send(_: XdpContext) -> u32 {
    XDP_TX
}

/// The same, each time from another source below 198.18.0.0/15 (RFC 2544: for measurements).
#[xdp(frags)]
pub fn floor_send_spoofed(ctx: XdpContext) -> u32 {
    let Some(frame) = plain(ctx.ctx) else { return XDP_PASS };
    // SAFETY: takes nothing.
    let random = unsafe { bpf_get_prandom_u32() };
    let source = (0xc612_0000 | random & 0x1_ffff).to_be_bytes();
    // SAFETY: the range was compared with the frame's end; frames of test runs are writable.
    unsafe { (&raw mut (*frame)[SOURCE]).cast::<[u8; 4]>().write_unaligned(source) };
    XDP_TX
}
