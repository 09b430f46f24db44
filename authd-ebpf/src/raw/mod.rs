//! Calls of kernel helpers and reads of contexts, each with the claim that makes it sound. Everything that a program does
//! without the verifier's types being obvious in Rust is here; the other files are ordinary code.
//!
//! One claim holds throughout: the verifier admits a program only if every pointer that it hands to a helper or reads
//! through is of the type and size that the helper or the context asks for. What is stated beside each block is why Rust's
//! own rules hold as well.

pub mod xdp;

use core::{
    ffi::c_void,
    intrinsics::{AtomicOrdering, atomic_xadd, atomic_xchg},
    ptr::{read_volatile, write_volatile},
};

use authd_common::address::Address;
use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_CURRENT_NETNS, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_addr, bpf_sock_ops,
        bpf_sock_tuple,
    },
    helpers,
};

/// A copy of a map's value, field by field as the compiler likes. Values in use are not overwritten (see
/// `authd_common::tables`), so the copy is whole.
#[inline(always)]
pub fn copy<T: Copy>(value: Option<*const T>) -> Option<T> {
    // SAFETY: a map look-up that succeeded points at a value of the map's type, alive until the program ends.
    value.map(|p| unsafe { *p })
}

/// A map's value where it lies. For values that are not overwritten while in use.
#[inline(always)]
pub fn in_place<'a, T>(value: Option<*const T>) -> Option<&'a T> {
    // SAFETY: as for `copy`; the value lives until the program ends, which no reference outlives.
    value.map(|p| unsafe { &*p })
}

/// One load of a word that another CPU may write.
#[inline(always)]
pub fn volatile<T: Copy>(value: &T) -> T {
    // SAFETY: a reference is valid to read from.
    unsafe { read_volatile(value) }
}

/// A value to read and change in place. Only for values that belong to one socket, one conversation, one CPU or one ring
/// buffer reservation.
#[inline(always)]
pub fn value<'a, T>(value: *mut T) -> &'a mut T {
    // SAFETY: as for `copy`; these values have one writer at a time, or fields that may race without harm, as the type's
    // documentation says.
    unsafe { &mut *value }
}

#[inline(always)]
pub fn set<T>(field: *mut T, value: T) {
    // SAFETY: the pointer comes from a live map value or ring buffer reservation.
    unsafe { write_volatile(field, value) }
}

/// Adds to a number that several CPUs, or a packet that interrupts a system call on the same one, may add to.
#[inline(always)]
pub fn add(number: &mut u64, amount: u64) {
    // The target is declared without compare-and-swap, so that core's atomic types have no addition for it; the instruction
    // exists nevertheless.
    // SAFETY: a reference is valid and aligned; all that write this number use this function or one of the next two.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(number, amount) };
}

/// The same. Returns what it was.
#[inline(always)]
pub fn take_and_add(number: &mut u64, amount: u64) -> u64 {
    // BPF_ATOMIC with BPF_FETCH, Linux 5.12. Of a relaxed addition the compiler makes the instruction without BPF_FETCH even where
    // its result is used, which then is the amount.
    // SAFETY: as above.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(number, amount) }
}

/// Leaves zero, and returns what was there: nothing that is added meanwhile is lost.
#[inline(always)]
pub fn take(number: &mut u64) -> u64 {
    // BPF_XCHG, Linux 5.12.
    // SAFETY: as for `add`.
    unsafe { atomic_xchg::<u64, { AtomicOrdering::SeqCst }>(number, 0) }
}

macro_rules! nullary {
    ($($(#[$doc:meta])* $name:ident -> $ty:ty = $helper:ident;)+) => { $(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name() -> $ty {
            // SAFETY: takes no argument.
            unsafe { helpers::generated::$helper() as $ty }
        }
    )+ };
}

nullary! {
    /// ns of the coarse monotonic clock: a load, no reading of hardware.
    coarse_now -> u64 = bpf_ktime_get_coarse_ns;
    /// ns of the monotonic clock.
    now -> u64 = bpf_ktime_get_ns;
    current_cgroup -> u64 = bpf_get_current_cgroup_id;
    /// Thread group in the upper half, thread in the lower.
    pid_tgid -> u64 = bpf_get_current_pid_tgid;
    /// Group in the upper half, user in the lower.
    uid_gid -> u64 = bpf_get_current_uid_gid;
    cpu -> u32 = bpf_get_smp_processor_id;
}

#[inline(always)]
pub fn current_ancestor_cgroup(level: u32) -> u64 {
    // SAFETY: takes a number.
    unsafe { helpers::generated::bpf_get_current_ancestor_cgroup_id(level as i32) }
}

/// Writes the current task's command; leaves zeros if it has none.
#[inline(always)]
pub fn comm(into: &mut [u64; 2]) {
    // SAFETY: the helper writes at most the 16 bytes of the array.
    unsafe {
        helpers::generated::bpf_get_current_comm(core::ptr::from_mut(into).cast(), 16);
    }
}

/// Storage of a socket, if it has any.
#[inline(always)]
pub fn storage<T>(map: *mut c_void, sock: *mut c_void) -> Option<*mut T> {
    // SAFETY: see the module; a null socket is refused by the verifier, not dereferenced.
    let p = unsafe { helpers::generated::bpf_sk_storage_get(map, sock, core::ptr::null_mut(), 0) };
    if p.is_null() { None } else { Some(p.cast()) }
}

/// Storage of a socket, made of zeros if it has none. `None` if there is no memory for it.
#[inline(always)]
pub fn storage_or_new<T>(map: *mut c_void, sock: *mut c_void) -> Option<*mut T> {
    let flags = BPF_SK_STORAGE_GET_F_CREATE as u64;
    // SAFETY: see the module; without an initial value the kernel writes zeros.
    let p = unsafe { helpers::generated::bpf_sk_storage_get(map, sock, core::ptr::null_mut(), flags) };
    if p.is_null() { None } else { Some(p.cast()) }
}

/// The context of a cgroup_skb program.
#[derive(Clone, Copy)]
pub struct Skb(pub *mut __sk_buff);

impl Skb {
    #[inline(always)]
    pub fn length(self) -> u32 {
        // SAFETY: a context is readable.
        unsafe { (*self.0).len }
    }

    /// Index of the interface that it leaves or came by.
    #[inline(always)]
    pub fn interface(self) -> u32 {
        // SAFETY: a context is readable.
        unsafe { (*self.0).ifindex }
    }

    /// The socket that sends or receives it, whatever it is: only good for asking for its storage.
    #[inline(always)]
    pub fn any_socket(self) -> Option<Sock> {
        // SAFETY: a context is readable.
        let sk = unsafe { (*self.0).__bindgen_anon_2.sk };
        if sk.is_null() { None } else { Some(Sock(sk)) }
    }

    #[inline(always)]
    pub fn cgroup(self) -> u64 {
        // SAFETY: the helper takes the context.
        unsafe { helpers::generated::bpf_skb_cgroup_id(self.0) }
    }

    #[inline(always)]
    pub fn ancestor_cgroup(self, level: u32) -> u64 {
        // SAFETY: the helper takes the context and a number.
        unsafe { helpers::generated::bpf_skb_ancestor_cgroup_id(self.0, level as i32) }
    }

    #[inline(always)]
    pub fn cookie(self) -> u64 {
        // SAFETY: the helper takes the context.
        unsafe { helpers::generated::bpf_get_socket_cookie(self.0.cast()) }
    }

    /// `N` bytes, wherever in the packet's pages they lie.
    #[inline(always)]
    pub fn load<const N: usize>(self, offset: usize) -> Option<[u8; N]> {
        let mut bytes = [0u8; N];
        // SAFETY: the helper writes exactly `N` bytes to the buffer, or none.
        let failed = unsafe {
            helpers::generated::bpf_skb_load_bytes(self.0.cast(), offset as u32, bytes.as_mut_ptr().cast(), N as u32)
        };
        if failed == 0 { Some(bytes) } else { None }
    }

    /// The same, by words in memory order.
    #[inline(always)]
    pub fn load_words<const N: usize>(self, offset: usize) -> Option<[u32; N]> {
        let mut words = [0u32; N];
        // SAFETY: the helper writes exactly `N` words to the buffer, or none.
        let failed = unsafe {
            let into = words.as_mut_ptr().cast();
            helpers::generated::bpf_skb_load_bytes(self.0.cast(), offset as u32, into, N as u32 * 4)
        };
        if failed == 0 { Some(words) } else { None }
    }

    /// The first `N` bytes, if they lie in the packet's linear part: no helper call.
    #[inline(always)]
    pub fn head<const N: usize>(self) -> Option<[u8; N]> {
        // SAFETY: a context is readable; the range was compared with the packet's end.
        unsafe {
            let (data, end) = ((*self.0).data as usize, (*self.0).data_end as usize);
            if data + N > end { None } else { Some(*(data as *const [u8; N])) }
        }
    }

    /// A full socket of this packet's namespace by its addresses, as seen by the packets that it receives.
    #[inline(always)]
    pub fn with_socket<T>(self, tcp: bool, ends: &Ends, look: impl FnOnce(Sock) -> T) -> Option<T> {
        let netns = BPF_F_CURRENT_NETNS as i64 as u64;
        // SAFETY: the helpers read `size` bytes of the tuple; the reference that they return is given back below.
        unsafe {
            let found = ends.look_up(|tuple, size| {
                if tcp {
                    helpers::generated::bpf_sk_lookup_tcp(self.0.cast(), tuple, size, netns, 0)
                } else {
                    helpers::generated::bpf_sk_lookup_udp(self.0.cast(), tuple, size, netns, 0)
                }
            });
            if found.is_null() {
                return None;
            }
            let result = look(Sock(found));
            helpers::generated::bpf_sk_release(found.cast());
            Some(result)
        }
    }
}

/// The far and the near end of a socket, for a look-up.
pub struct Ends<'a> {
    pub remote: &'a Address,
    pub local: &'a Address,
    pub remote_port: u16,
    pub local_port: u16,
}

impl Ends<'_> {
    /// Looks something up with `struct bpf_sock_tuple` and its size: remote and local address, remote and local port, all in
    /// network order. Once for each family, so that the verifier knows the size wherever the compiler keeps it.
    #[inline(always)]
    fn look_up<T>(&self, look: impl Fn(*mut bpf_sock_tuple, u32) -> T) -> T {
        let ports = (self.remote_port.to_be() as u32) | (self.local_port.to_be() as u32) << 16;
        let (r, l) = (self.remote.be_words(), self.local.be_words());
        if self.local.is_v4() {
            let mut tuple = [r[3], l[3], ports];
            return look(tuple.as_mut_ptr().cast(), 12);
        }
        let mut tuple = [r[0], r[1], r[2], r[3], l[0], l[1], l[2], l[3], ports];
        look(tuple.as_mut_ptr().cast(), 36)
    }
}

/// A full socket.
#[derive(Clone, Copy)]
pub struct Sock(pub *mut bpf_sock);

impl Sock {
    /// Segments that a TCP socket has sent and received so far; 0 for others.
    #[inline(always)]
    pub fn segments(self) -> u32 {
        // SAFETY: the helper takes a full socket; what it returns is readable once it is not null.
        unsafe {
            let tcp = helpers::generated::bpf_tcp_sock(self.0);
            if tcp.is_null() { 0 } else { (*tcp).segs_out.wrapping_add((*tcp).segs_in) }
        }
    }

    /// The same socket, if it is a full one.
    #[inline(always)]
    pub fn full(self) -> Option<Self> {
        // SAFETY: the helper takes the socket that a context shows.
        let full = unsafe { helpers::generated::bpf_sk_fullsock(self.0) };
        if full.is_null() { None } else { Some(Self(full)) }
    }

    /// The cgroup in which it was made.
    #[inline(always)]
    pub fn cgroup(self) -> u64 {
        // SAFETY: the helper takes a socket.
        unsafe { helpers::generated::bpf_sk_cgroup_id(self.0.cast()) }
    }

    #[inline(always)]
    pub fn ancestor_cgroup(self, level: u32) -> u64 {
        // SAFETY: the helper takes a socket.
        unsafe { helpers::generated::bpf_sk_ancestor_cgroup_id(self.0.cast(), level as i32) }
    }

    #[inline(always)]
    pub fn protocol(self) -> u8 {
        // SAFETY: full sockets are readable.
        unsafe { (*self.0).protocol as u8 }
    }

    #[inline(always)]
    pub fn kind(self) -> u32 {
        // SAFETY: full sockets are readable.
        unsafe { (*self.0).type_ }
    }

    #[inline(always)]
    pub fn is_listening(self) -> bool {
        const TCP_LISTEN: u32 = 10;
        // SAFETY: full sockets are readable.
        unsafe { (*self.0).state == TCP_LISTEN }
    }
}

/// The context of connect and sendmsg programs.
#[derive(Clone, Copy)]
pub struct SockAddr(pub *mut bpf_sock_addr);

impl SockAddr {
    #[inline(always)]
    pub fn socket(self) -> *mut c_void {
        // SAFETY: a context is readable; its socket is never null in these programs.
        unsafe { (*self.0).__bindgen_anon_1.sk.cast() }
    }

    #[inline(always)]
    pub fn protocol(self) -> u8 {
        // SAFETY: a context is readable.
        unsafe { (*self.0).protocol as u8 }
    }

    /// The destination as the caller gave it, for a program of the IPv4 hooks.
    #[inline(always)]
    pub fn remote_v4(self) -> Address {
        // SAFETY: a context is readable.
        Address::from_be_word(unsafe { read_volatile(&raw const (*self.0).user_ip4) })
    }

    /// The destination as the caller gave it, for a program of the IPv6 hooks; IPv4-mapped ones are IPv4 to us.
    #[inline(always)]
    pub fn remote_v6(self) -> Address {
        // SAFETY: a context is readable, by words.
        let words = unsafe {
            let a = &raw const (*self.0).user_ip6;
            let a: *const u32 = a.cast();
            [read_volatile(a), read_volatile(a.add(1)), read_volatile(a.add(2)), read_volatile(a.add(3))]
        };
        Address::from_be_words(words)
    }

    #[inline(always)]
    pub fn remote_port(self) -> u16 {
        // SAFETY: a context is readable. The port is in network order in the lower half.
        u16::from_be(unsafe { (*self.0).user_port } as u16)
    }

    #[inline(always)]
    pub fn cookie(self) -> u64 {
        // SAFETY: the helper takes the context.
        unsafe { helpers::generated::bpf_get_socket_cookie(self.0.cast()) }
    }

    #[inline(always)]
    pub fn netns(self) -> u64 {
        // SAFETY: the helper takes the context.
        unsafe { helpers::generated::bpf_get_netns_cookie(self.0.cast()) }
    }
}

/// The context of sock_create programs, which is the socket itself.
#[inline(always)]
pub fn netns_of_new(sock: *mut bpf_sock) -> u64 {
    // SAFETY: the helper takes the context.
    unsafe { helpers::generated::bpf_get_netns_cookie(sock.cast()) }
}

/// The context of sockops programs.
#[derive(Clone, Copy)]
pub struct SockOps(pub *mut bpf_sock_ops);

impl SockOps {
    #[inline(always)]
    pub fn operation(self) -> u32 {
        // SAFETY: a context is readable.
        unsafe { (*self.0).op }
    }

    /// The full socket, if there is one.
    #[inline(always)]
    pub fn socket(self) -> Option<*mut c_void> {
        // SAFETY: a context is readable.
        let sk = unsafe { (*self.0).__bindgen_anon_2.sk };
        if sk.is_null() { None } else { Some(sk.cast()) }
    }

    #[inline(always)]
    pub fn new_state(self) -> u32 {
        // SAFETY: a context is readable; a state change has the old and the new state for arguments.
        unsafe { read_volatile((&raw const (*self.0).__bindgen_anon_1.args).cast::<u32>().add(1)) }
    }

    #[inline(always)]
    fn is_v4(self) -> bool {
        const AF_INET: u32 = 2;
        // SAFETY: a context is readable.
        unsafe { (*self.0).family == AF_INET }
    }

    // Both forms are loaded and then one is chosen: a choice between two offsets into the context is not for the verifier.

    #[inline(always)]
    pub fn local(self) -> Address {
        // SAFETY: a context is readable, by words.
        let (v4, v6) = unsafe {
            let a = (&raw const (*self.0).local_ip6).cast::<u32>();
            let v6 = [read_volatile(a), read_volatile(a.add(1)), read_volatile(a.add(2)), read_volatile(a.add(3))];
            (read_volatile(&raw const (*self.0).local_ip4), v6)
        };
        if self.is_v4() { Address::from_be_word(v4) } else { Address::from_be_words(v6) }
    }

    #[inline(always)]
    pub fn remote(self) -> Address {
        // SAFETY: a context is readable, by words.
        let (v4, v6) = unsafe {
            let a = (&raw const (*self.0).remote_ip6).cast::<u32>();
            let v6 = [read_volatile(a), read_volatile(a.add(1)), read_volatile(a.add(2)), read_volatile(a.add(3))];
            (read_volatile(&raw const (*self.0).remote_ip4), v6)
        };
        if self.is_v4() { Address::from_be_word(v4) } else { Address::from_be_words(v6) }
    }

    #[inline(always)]
    pub fn local_port(self) -> u16 {
        // SAFETY: a context is readable. In host order, unlike the remote one.
        unsafe { (*self.0).local_port as u16 }
    }

    #[inline(always)]
    pub fn remote_port(self) -> u16 {
        // SAFETY: a context is readable. In network order, in the upper half of the word.
        u32::from_be(unsafe { (*self.0).remote_port }) as u16
    }

    #[inline(always)]
    pub fn bytes_in(self) -> u64 {
        // SAFETY: a context is readable.
        unsafe { (*self.0).bytes_received }
    }

    #[inline(always)]
    pub fn bytes_out(self) -> u64 {
        // SAFETY: a context is readable.
        unsafe { (*self.0).bytes_acked }
    }

    #[inline(always)]
    pub fn segments_in(self) -> u32 {
        // SAFETY: a context is readable.
        unsafe { (*self.0).segs_in }
    }

    /// Numbers that were sent and that the other end has not acknowledged.
    #[inline(always)]
    pub fn unacknowledged(self) -> u32 {
        // SAFETY: a context is readable.
        let (next, first) = unsafe { ((*self.0).snd_nxt, (*self.0).snd_una) };
        next.wrapping_sub(first)
    }

    #[inline(always)]
    pub fn segments_out(self) -> u32 {
        // SAFETY: a context is readable.
        unsafe { (*self.0).segs_out }
    }

    #[inline(always)]
    pub fn cookie(self) -> u64 {
        // SAFETY: the helper takes the context.
        unsafe { helpers::generated::bpf_get_socket_cookie(self.0.cast()) }
    }

    #[inline(always)]
    pub fn netns(self) -> u64 {
        // SAFETY: the helper takes the context.
        unsafe { helpers::generated::bpf_get_netns_cookie(self.0.cast()) }
    }

    /// What the kernel asked for.
    #[inline(always)]
    pub fn reply(self, value: u32) {
        // SAFETY: a context is writable in this member.
        unsafe { (*self.0).__bindgen_anon_1.reply = value }
    }

    /// Lets the SYN be sent again more often than usual before the connection counts as failed: it starts early.
    #[inline(always)]
    pub fn retry_often(self) {
        const IPPROTO_TCP: i32 = 6;
        const TCP_SYNCNT: i32 = 7;
        let mut times: u32 = 12;
        // SAFETY: the helper takes the context and reads the four bytes of the option. If it fails, the wait is shorter.
        unsafe {
            helpers::generated::bpf_setsockopt(
                self.0.cast(),
                IPPROTO_TCP,
                TCP_SYNCNT,
                (&raw mut times).cast(),
                size_of::<u32>() as i32,
            );
        }
    }

    /// Number of the next byte that it awaits.
    #[inline(always)]
    pub fn awaited(self) -> u32 {
        // SAFETY: a context is readable.
        unsafe { (*self.0).rcv_nxt }
    }

    /// TCP flags of the segment that is being made; 0 if there is none yet.
    #[inline(always)]
    pub fn segment_flags(self) -> u8 {
        // SAFETY: a context is readable.
        unsafe { (*self.0).skb_tcp_flags as u8 }
    }

    /// Sequence number of the segment that is being made, from its header.
    #[inline(always)]
    pub fn segment_sequence(self) -> Option<u32> {
        const END: usize = 8;
        // SAFETY: a context is readable; the range was compared with the header's end.
        unsafe {
            let data = (*self.0).__bindgen_anon_3.skb_data as usize;
            let end = (*self.0).__bindgen_anon_4.skb_data_end as usize;
            if data + END > end { None } else { Some(u32::from_be(*((data + 4) as *const u32))) }
        }
    }

    /// Asks for room for so many bytes of options in the segment that is being made.
    #[inline(always)]
    pub fn reserve_option(self, bytes: u32) {
        // SAFETY: the helper takes the context. Without room there is no option, and whoever needs it refuses the segment.
        unsafe {
            helpers::generated::bpf_reserve_hdr_opt(self.0, bytes, 0);
        }
    }

    /// Writes an option into the segment that is being made.
    #[inline(always)]
    pub fn store_option(self, option: &[u32; 4]) {
        // SAFETY: the helper takes the context and reads the option's bytes.
        unsafe {
            helpers::generated::bpf_store_hdr_opt(self.0, option.as_ptr().cast(), 16, 0);
        }
    }

    /// Asks to be called for the options of segments, or not any more.
    #[inline(always)]
    pub fn write_options(self, on: bool) {
        const BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG: u32 = 64;
        // SAFETY: as for `watch_states`.
        unsafe {
            let flags = (*self.0).bpf_sock_ops_cb_flags;
            let flags = if on {
                flags | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG
            } else {
                flags & !BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG
            };
            helpers::generated::bpf_sock_ops_cb_flags_set(self.0, flags as i32);
        }
    }

    /// Asks to be told of every later change of this socket's state.
    #[inline(always)]
    pub fn watch_states(self) {
        const BPF_SOCK_OPS_STATE_CB_FLAG: u32 = 4;
        // SAFETY: a context is readable, and the helper takes it. It can only fail for a socket that is no full one.
        unsafe {
            let flags = (*self.0).bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG;
            helpers::generated::bpf_sock_ops_cb_flags_set(self.0, flags as i32);
        }
    }
}
