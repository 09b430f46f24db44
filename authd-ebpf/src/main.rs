//! authd's kernel programs: one hook per file. A hook reads its context, asks the common code, writes down what follows,
//! and answers the kernel. Policy lives in `authd-common`; map access in [`maps`]; helper calls in [`raw`].
#![no_std]
#![feature(asm_experimental_arch, core_intrinsics)]
#![expect(internal_features, reason = "an atomic addition has no other name on this target")]
#![no_main]

mod caller;
mod connect;
mod datagram;
mod egress;
mod emit;
mod ingress;
mod judge;
mod listeners;
mod maps;
mod packet;
mod permits;
mod raw;
mod sendmsg;
mod sock_create;
mod sock_release;
mod socket_create;
mod sockops;
mod speaks;
mod stream;
mod tag;
mod xdp;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// Several helpers are for programs under the GPL only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
