//! Finding and destroying sockets, in every network namespace, so that a revoked flow's application notices at once.
//!
//! Enters: flows, and maps of socket storage. Leaves: what became of each flow, and what the kernel keeps for each socket.
//! Never: a decision about which flows should end.
//!
//! Calls block: some hundred microseconds for a socket in a namespace that is open, milliseconds for one that has to be
//! looked for among all processes. The privileges: CAP_NET_ADMIN to destroy, CAP_BPF to read storage, CAP_SYS_ADMIN to
//! enter other network namespaces, CAP_SYS_PTRACE to see those of processes with other users or privileges.

pub mod diag;
pub mod message;
pub mod namespaces;

use std::{
    collections::{BTreeMap, HashMap},
    os::fd::BorrowedFd,
    time::Instant,
};

use nix::errno::Errno;

use self::{
    diag::Fate,
    message::{Family, Malformed, Protocol, Socket},
    namespaces::{CAPACITY, Discovered, Namespace, NamespaceError, Namespaces},
};

/// One end of a flow: a socket somewhere on this node.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Flow {
    pub namespace: Namespace,
    pub socket: Socket,
}

/// Why a socket was not destroyed, or sockets could not be listed. Packets are dropped without it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SocketError {
    // The caller's.
    #[error("no socket has such a cookie")]
    NoCookie,
    // The workload's.
    #[error("the kernel finds another socket under these addresses: several sockets share them")]
    Hidden,
    // Whoever set up this node.
    #[error("destroying sockets in this network namespace needs CAP_NET_ADMIN")]
    MayNotDestroy,
    #[error("reading socket storage needs CAP_BPF")]
    MayNotRead,
    #[error("the kernel has no diagnostics for these sockets: `modprobe inet_diag {module}`")]
    NoModule { module: &'static str },
    #[error("the kernel cannot destroy sockets: it was built without CONFIG_INET_DIAG_DESTROY")]
    NoDestroy,
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    // The kernel's.
    #[error("socket diagnostics: {0}")]
    Kernel(Errno),
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("the kernel did not answer")]
    Unanswered,
    #[error("answers of the kernel were lost: something fills the receive buffer")]
    Overrun,
    #[error("an answer of the kernel is longer than expected")]
    Truncated,
    #[error("the list of sockets changed as often as it was begun")]
    Interrupted,
}

impl SocketError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoCookie => "no_socket_cookie",
            Self::Hidden => "socket_hidden",
            Self::MayNotDestroy => "may_not_destroy_sockets",
            Self::MayNotRead => "may_not_read_storage",
            Self::NoModule { .. } => "no_socket_diagnostics",
            Self::NoDestroy => "kernel_cannot_destroy_sockets",
            Self::Namespace(error) => error.reason(),
            Self::Kernel(_) => "kernel_refused",
            Self::Malformed(_) => "kernel_answer_malformed",
            Self::Unanswered => "kernel_did_not_answer",
            Self::Overrun => "kernel_answers_lost",
            Self::Truncated => "kernel_answer_truncated",
            Self::Interrupted => "list_interrupted",
        }
    }
}

/// What became of flows.
#[derive(Clone, Debug, Default)]
pub struct Destroyed {
    pub destroyed: usize,
    /// Sockets that were not there any more. If something floods the namespace's socket with datagrams so that answers are
    /// lost, some of them are those just destroyed.
    pub gone: usize,
    pub failed: Vec<(Flow, SocketError)>,
}

/// A socket that is one end of a flow.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    pub flow: Flow,
    /// [`message::state`]
    pub state: u8,
    /// What the map holds for it. Never for UDP: the kernel shows no storage of sockets without a connection's state
    /// (`inet_sk_diag_fill`, net/ipv4/inet_diag.c). The table of conversations has the cookies of those.
    pub tag: Option<Box<[u8]>>,
}

#[derive(Clone, Debug, Default)]
pub struct Dumped {
    pub found: Vec<Found>,
    /// Lists that are missing. A namespace comes here once for each of its lists.
    pub failed: Vec<(Namespace, SocketError)>,
}

/// The sockets of this node.
pub struct Sockets {
    namespaces: Namespaces,
}

impl Sockets {
    pub fn new() -> Result<Self, SocketError> {
        Ok(Self { namespaces: Namespaces::new()? })
    }

    /// Cookie of the network namespace that authd is in.
    pub fn own_namespace(&self) -> u64 {
        self.namespaces.own()
    }

    /// Destroys the sockets of flows: their applications see ECONNABORTED, and the far ends of TCP a reset, if it passes.
    /// Namespaces that are open come first, so that nobody waits for those that have to be looked for.
    pub fn destroy(&mut self, flows: &[Flow], now: Instant) -> Destroyed {
        let mut groups: BTreeMap<u64, Vec<Flow>> = BTreeMap::new();
        for flow in flows {
            groups.entry(flow.namespace.cookie).or_default().push(*flow);
        }
        let mut result = Destroyed::default();
        let (open, closed): (Vec<_>, Vec<_>) =
            groups.into_iter().partition(|(cookie, _)| self.namespaces.is_open(*cookie));
        for (cookie, flows) in &open {
            self.destroy_in(*cookie, flows, now, &mut result);
        }
        for groups in closed.chunks(CAPACITY) {
            let wanted: Vec<Namespace> = groups.iter().flat_map(|(_, flows)| flows).map(|f| f.namespace).collect();
            let unreachable = self.namespaces.open(&wanted, now);
            for (cookie, flows) in groups {
                match unreachable.get(cookie) {
                    Some(error) => result.failed.extend(flows.iter().map(|flow| (*flow, (*error).into()))),
                    None => self.destroy_in(*cookie, flows, now, &mut result),
                }
            }
        }
        self.namespaces.expire(now);
        result
    }

    /// Lists all sockets in some namespaces that are ends of flows, with what a map of socket storage holds for each.
    ///
    /// The lists are no snapshots: while sockets come and go, one may be missed. Whoever must find all of a kind makes sure
    /// that no new ones come, and asks until none is found.
    pub fn dump(&mut self, map: BorrowedFd<'_>, namespaces: &[Namespace], now: Instant) -> Dumped {
        let mut result = Dumped::default();
        // One list for each, even if it is named with several pids.
        let mut wanted: HashMap<u64, Namespace> = HashMap::new();
        for namespace in namespaces {
            wanted.entry(namespace.cookie).or_insert(*namespace);
        }
        let wanted: Vec<Namespace> = wanted.into_values().collect();
        for chunk in wanted.chunks(CAPACITY) {
            let hints: Vec<Namespace> =
                namespaces.iter().copied().filter(|n| chunk.iter().any(|c| c.cookie == n.cookie)).collect();
            let unreachable = self.namespaces.open(&hints, now);
            for namespace in chunk {
                match unreachable.get(&namespace.cookie) {
                    Some(error) => result.failed.push((*namespace, (*error).into())),
                    None => self.dump_in(*namespace, map, now, &mut result),
                }
            }
        }
        self.namespaces.expire(now);
        result
    }

    /// The TCP sockets of authd's own namespace that are connected, or about to be.
    pub fn connected(&mut self, now: Instant) -> Result<Vec<Socket>, SocketError> {
        let own = self.namespaces.own();
        let mut found = Vec::new();
        for family in Family::ALL {
            let diag = self.namespaces.get(own, now).ok_or(SocketError::Namespace(NamespaceError::NotFound))?;
            let listed = diag.list(family, Protocol::Tcp, Protocol::Tcp.flow_states(), None)?;
            found.extend(listed.into_iter().map(|listed| listed.socket));
        }
        Ok(found)
    }

    /// Finds all network namespaces of this node that a process or a mount shows.
    pub fn discover(&self) -> Discovered {
        self.namespaces.discover()
    }

    /// Lets go of a namespace, which an open socket would keep alive.
    pub fn forget(&mut self, cookie: u64) {
        self.namespaces.forget(cookie);
    }

    /// Lets go of namespaces that were not used for [`namespaces::IDLE`]. Returns when to call it again.
    pub fn expire(&mut self, now: Instant) -> Option<Instant> {
        self.namespaces.expire(now)
    }

    fn destroy_in(&mut self, cookie: u64, flows: &[Flow], now: Instant, result: &mut Destroyed) {
        let Some(diag) = self.namespaces.get(cookie, now) else {
            let error = SocketError::Namespace(NamespaceError::NotFound);
            result.failed.extend(flows.iter().map(|flow| (*flow, error)));
            return;
        };
        let sockets: Vec<Socket> = flows.iter().map(|flow| flow.socket).collect();
        let fates = diag.destroy(&sockets);
        let broken = diag.is_broken();
        for (flow, fate) in flows.iter().zip(fates) {
            match fate {
                Fate::Destroyed => result.destroyed += 1,
                Fate::Gone => result.gone += 1,
                Fate::Failed(error) => result.failed.push((*flow, error)),
            }
        }
        if broken {
            self.namespaces.forget(cookie);
        }
    }

    fn dump_in(&mut self, namespace: Namespace, map: BorrowedFd<'_>, now: Instant, result: &mut Dumped) {
        let lists = Protocol::ALL.into_iter().flat_map(|protocol| Family::ALL.map(|family| (family, protocol)));
        for (family, protocol) in lists {
            let Some(diag) = self.namespaces.get(namespace.cookie, now) else {
                result.failed.push((namespace, NamespaceError::NotFound.into()));
                return;
            };
            let map = (protocol == Protocol::Tcp).then_some(map);
            let listed = diag.list(family, protocol, protocol.flow_states(), map);
            let broken = diag.is_broken();
            match listed {
                Ok(listed) => result.found.extend(listed.into_iter().map(|l| Found {
                    flow: Flow { namespace, socket: l.socket },
                    state: l.state,
                    tag: l.value,
                })),
                Err(error) => result.failed.push((namespace, error)),
            }
            if broken {
                self.namespaces.forget(namespace.cookie);
            }
        }
    }
}
