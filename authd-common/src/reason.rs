//! Why a verdict is what it is: stable codes, shared by kernel, audit, metrics and docs/REASONS.md.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $code:literal, $name:literal;)+) => {
        /// Stable code of a verdict. Numbers are never reused.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
        #[repr(u16)]
        pub enum Reason { $($(#[doc = $doc])+ $variant = $code,)+ }

        impl Reason {
            pub const ALL: &'static [Reason] = &[$(Reason::$variant,)+];

            /// The name that audit records, metrics and the documentation use.
            pub const fn name(self) -> &'static str {
                match self { $(Reason::$variant => $name,)+ }
            }

            /// What it means, in a sentence or two.
            pub const fn describe(self) -> &'static str {
                match self { $(Reason::$variant => concat!($($doc,)+),)+ }
            }

            pub const fn from_code(code: u16) -> Option<Self> {
                match code { $($code => Some(Reason::$variant),)+ _ => None }
            }
        }
    };
}

/// Codes below this one let traffic pass, the others refuse it.
pub const FIRST_DENIAL: u16 = 32;
/// One more than the highest code: the size of the kernel's table of counters.
pub const REASON_SLOTS: u32 = 64;

reasons! {
    /// No verdict was taken yet.
    Undecided = 0, "undecided";
    /// An allow rule matches and all that it requires is met.
    Rule = 1, "rule";
    /// The process belongs to no workload: authd does not touch it.
    Unmanaged = 2, "unmanaged";
    /// An inbound flow to a port that no service guards.
    Unguarded = 3, "unguarded";
    /// An inbound flow to a port of the failsafe list, which is always reachable.
    Failsafe = 4, "failsafe";
    /// A deny rule matches.
    DeniedByRule = 32, "denied_by_rule";
    /// No allow rule matches, and the default is to deny.
    NoRule = 33, "no_rule";
    /// A rule matches, but a proof that it requires was not shown.
    ProofRequired = 34, "proof_required";
    /// The cgroup is so new that it is not yet known whether a workload's pattern matches it.
    IdentityPending = 35, "identity_pending";
    /// A packet that ends inside its headers, or whose headers contradict each other.
    MalformedPacket = 36, "malformed_packet";
    /// An IP fragment made by the sender itself (the kernel fragments after authd has seen the whole packet).
    Fragment = 37, "fragment";
    /// IPv4 options, which can send a packet by way of another host.
    IpOptions = 38, "ip_options";
    /// An IPv6 routing header, which can send a packet by way of another host.
    RoutingHeader = 39, "routing_header";
    /// More IPv6 extension headers than authd follows.
    ExtensionHeaders = 40, "extension_headers";
    /// A raw IP socket, which can forge any header, asked for by a workload without `raw_sockets = true`.
    RawSocket = 41, "raw_socket";
    /// A socket of a family that cgroup programs do not see (AF_PACKET and the like), asked for by a managed workload.
    SocketFamily = 42, "socket_family";
    /// The rule's schedule ended and the daemon was not there to say what comes next.
    ScheduleStale = 43, "schedule_stale";
    /// An inbound flow to a workload that accepts none but through its guarded services.
    InboundClosed = 45, "inbound_closed";
    /// The tables hold no complete generation.
    NoGeneration = 44, "no_generation";
    /// The grant on which the flow rested was revoked, and there is no other.
    GrantRevoked = 46, "grant_revoked";
    /// The grant on which the flow rested came to its end, and there is no other.
    GrantExpired = 47, "grant_expired";
    /// The connection waited for its proofs for as long as it may.
    ProofTimeout = 48, "proof_timeout";
    /// A rule asks that another node vouches for the caller, and the connection's SYN carries no identity.
    NodeIdentityMissing = 49, "node_identity_missing";
    /// The identity in the SYN names a caller or a key that no session with another node has.
    NodeKeyUnknown = 50, "node_key_unknown";
    /// The identity in the SYN is by a key that came to its end.
    NodeKeyExpired = 51, "node_key_expired";
    /// The identity in the SYN is by another key, or for another connection.
    NodeMacWrong = 52, "node_mac_wrong";
    /// The SYN came before, and its handshake came to its end.
    NodeReplay = 53, "node_replay";
    /// Another node vouches for the caller, and no rule that asks for that lets this caller in.
    CallerNotNamed = 54, "caller_not_named";
    /// The permit of an allowed action has let all connections begin that it may, or the socket is not the permit's holder's.
    PermitUsed = 55, "permit_used";
    /// The permit of an allowed action has let all bytes pass that it may.
    PermitSpent = 56, "permit_spent";
}

impl Reason {
    pub const fn code(self) -> u16 {
        self as u16
    }

    pub const fn is_denial(self) -> bool {
        self.code() >= FIRST_DENIAL
    }
}
