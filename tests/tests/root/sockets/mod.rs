//! Sockets are destroyed under their applications, in this network namespace and in others, and nothing else is; and the
//! tags that the kernel keeps for sockets are all found.

mod ends;
mod makers;

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read, Write},
    mem::offset_of,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsFd, AsRawFd},
        unix::process::CommandExt,
    },
    path::Path,
    sync::mpsc,
    thread::{self, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use authd::dataplane::{
    bpf,
    object::{Sizes, maps_directory},
    sockets::{
        Destroyed, Flow, Found, SocketError, Sockets,
        message::{Protocol, Socket, state},
        namespaces::{IDLE, Namespace, NamespaceError},
    },
};
use authd_common::{
    address::Address,
    tables::{Tag, names},
};
use authd_tests::{daemon::PATIENCE, netns::Netns, sandbox::Sandbox};
use libtest_mimic::Trial;
use nix::{
    getsockopt_impl,
    sched::{CloneFlags, setns},
    sockopt_impl,
    sys::socket::{
        self, AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, SockaddrStorage, getsockopt,
        setsockopt, sockopt,
    },
};

use self::ends::{connected_udp, flow_of, tcp_from, tcp_pair, tcp_socket, with_cookie};
use crate::{Verdict, kernel::Moved, reload::wait_until, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("sockets_of_every_kind_are_destroyed_under_their_applications", every_kind),
        trial("sockets_with_the_ends_of_a_destroyed_one_live_on", same_ends),
        trial("sockets_by_the_thousand_are_destroyed_in_one_call", thousands),
        trial("sockets_that_are_hard_to_find_are_destroyed", hard_to_find),
        trial("sockets_that_share_their_ends_are_all_destroyed", shared_ends),
        trial("sockets_are_listed_with_their_tags", tags),
        trial("sockets_are_known_by_the_cgroup_that_made_them", makers::makers),
        trial("sockets_in_namespaces_without_a_hint_are_found", namespaces),
        trial("sockets_kept_open_let_go_of_dead_namespaces", dead_namespaces),
        trial("sockets_that_privileges_do_not_reach_are_named", privileges),
        trial("sockets_diagnostics_believe_the_kernel_alone", forged_answers),
    ]
}

sockopt_impl!(
    /// Tells a socket from all others.
    Cookie,
    GetOnly,
    libc::SOL_SOCKET,
    libc::SO_COOKIE,
    u64
);
sockopt_impl!(
    /// Tells a network namespace from all others.
    NetnsCookie,
    GetOnly,
    libc::SOL_SOCKET,
    libc::SO_NETNS_COOKIE,
    u64
);

fn every_kind() -> Result<Verdict> {
    let netns = own_netns("kinds")?;
    let mut sockets = Sockets::new()?;
    for netns in [None, Some(&netns)] {
        for (from, to) in [
            ("127.0.0.1:0", "127.0.0.1:0"),
            ("[::1]:0", "[::1]:0"),
            // An IPv6 socket that talks IPv4, to an IPv4 socket; the other way round; and among themselves.
            ("[::ffff:127.0.0.1]:0", "127.0.0.1:0"),
            ("127.0.0.1:0", "[::]:0"),
            ("[::ffff:127.0.0.1]:0", "[::ffff:127.0.0.1]:0"),
        ] {
            for side in [Side::Client, Side::Server] {
                let pair = inside(netns, || tcp_pair(from.parse()?, to.parse()?))?;
                let (own, far) = if side == Side::Client { pair } else { (pair.1, pair.0) };
                destroyed_under_a_reader(&mut sockets, &own, &far).with_context(|| {
                    format!("TCP from {from} to {to}, {side:?}, own namespace: {}", netns.is_none())
                })?;
            }
        }
        for (from, to) in [
            ("127.0.0.1:0", "127.0.0.1:9"),
            ("[::1]:0", "[::1]:9"),
            ("[::ffff:127.0.0.1]:0", "[::ffff:127.0.0.1]:9"),
            ("[::]:0", "[::ffff:127.0.0.1]:9"),
        ] {
            let socket = inside(netns, || connected_udp(from, to))?;
            let flow = flow_of(&socket, Protocol::Udp)?;
            let reader = socket.try_clone()?;
            let error = error_of_reader(
                move || reader.recv(&mut [0; 8]),
                || {
                    let result = sockets.destroy(&[flow], Instant::now());
                    expect(&result, 1, 0)
                },
            );
            ensure!(error?.raw_os_error() == Some(libc::ECONNABORTED), "UDP from {from} to {to}");
        }
    }
    Ok(Verdict::Ran)
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Side {
    Client,
    Server,
}

fn destroyed_under_a_reader(sockets: &mut Sockets, own: &TcpStream, far: &TcpStream) -> Result<()> {
    let flow = flow_of(own, Protocol::Tcp)?;
    let mut reader = own.try_clone()?;
    let error =
        error_of_reader(move || reader.read(&mut [0; 8]), || expect(&sockets.destroy(&[flow], Instant::now()), 1, 0))?;
    ensure!(error.raw_os_error() == Some(libc::ECONNABORTED), "the application saw {error}");
    far.set_read_timeout(Some(PATIENCE))?;
    let mut far = far;
    let seen = far.read(&mut [0; 8]);
    ensure!(matches!(&seen, Err(e) if e.kind() == io::ErrorKind::ConnectionReset), "the far end saw {seen:?}");
    // Once more: there is nothing left to destroy.
    expect(&sockets.destroy(&[flow], Instant::now()), 0, 1)
}

fn same_ends() -> Result<Verdict> {
    let netns = own_netns("again")?;
    let mut sockets = Sockets::new()?;
    let listener = inside(Some(&netns), || Ok(TcpListener::bind("127.0.0.1:7001")?))?;
    let connect = || {
        inside(Some(&netns), || {
            let stream = tcp_from("127.0.0.1:7002".parse()?, listener.local_addr()?)?;
            Ok((stream, listener.accept()?.0))
        })
    };
    let (first, first_far) = connect()?;
    let revoked = flow_of(&first, Protocol::Tcp)?;
    // A reset leaves nothing behind, so that the ends are free at once.
    setsockopt(&first, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    drop((first, first_far));
    let (mut second, mut second_far) = connect()?;
    let live = flow_of(&second, Protocol::Tcp)?;
    ensure!(live.socket == Socket { cookie: live.socket.cookie, ..revoked.socket } && live != revoked);

    expect(&sockets.destroy(&[revoked, revoked], Instant::now()), 0, 2)?;
    second.write_all(b"alive")?;
    let mut heard = [0; 5];
    second_far.read_exact(&mut heard)?;
    ensure!(&heard == b"alive");

    // Nor the listener, which the kernel finds for the ends of a flow that is no more.
    drop((second, second_far));
    let closed = sockets.destroy(&[live], Instant::now());
    // Newer kernels drop what waits in TIME_WAIT, too.
    ensure!(closed.destroyed + closed.gone == 1, "{closed:?}");
    inside(Some(&netns), || Ok(TcpStream::connect(listener.local_addr()?)?))?;
    Ok(Verdict::Ran)
}

fn thousands() -> Result<Verdict> {
    const PAIRS: usize = 3_000;
    raise_descriptor_limit()?;
    let netns = own_netns("many")?;
    let mut sockets = Sockets::new()?;
    let pairs = inside(Some(&netns), || {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        (0..PAIRS).map(|_| Ok((TcpStream::connect(address)?, listener.accept()?.0))).collect::<Result<Vec<_>>>()
    })?;
    let mut flows = pairs.iter().map(|(near, _)| flow_of(near, Protocol::Tcp)).collect::<Result<Vec<_>>>()?;
    // Every third stays. And some in the namespace of this process, of which the order knows nothing.
    let kept: Vec<Flow> = flows.iter().copied().skip(2).step_by(3).collect();
    flows.retain(|flow| !kept.contains(flow));
    let own = (0..10).map(|_| tcp_pair("127.0.0.1:0".parse()?, "127.0.0.1:0".parse()?)).collect::<Result<Vec<_>>>()?;
    for (index, (near, _)) in own.iter().enumerate() {
        flows.insert(index * 100, flow_of(near, Protocol::Tcp)?);
    }
    // Names of sockets that never were.
    let phantoms: Vec<Flow> = flows.iter().take(50).map(|f| with_cookie(f, f.socket.cookie ^ 1 << 60)).collect();
    flows.extend(&phantoms);

    let started = Instant::now();
    let result = sockets.destroy(&flows, Instant::now());
    let took = started.elapsed();
    let destroyed = flows.len() - phantoms.len();
    expect(&result, destroyed, phantoms.len())?;
    println!("{destroyed} sockets destroyed in {took:?}");
    for (index, (near, _)) in pairs.iter().enumerate() {
        let error = near.take_error()?.and_then(|error| error.raw_os_error());
        let expected = (index % 3 != 2).then_some(libc::ECONNABORTED);
        ensure!(error == expected, "pair {index}: {error:?}");
    }
    for (near, _) in &own {
        ensure!(near.take_error()?.and_then(|error| error.raw_os_error()) == Some(libc::ECONNABORTED));
    }
    expect(&sockets.destroy(&flows, Instant::now()), 0, flows.len())?;
    expect(&sockets.destroy(&kept, Instant::now()), kept.len(), 0)?;
    Ok(Verdict::Ran)
}

fn hard_to_find() -> Result<Verdict> {
    let netns = own_netns("hard")?;
    let mut sockets = Sockets::new()?;
    // Bound to an interface, the kernel finds it for requests that name the interface only.
    let (bound, _far) = inside(Some(&netns), || {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let bound = tcp_socket(AddressFamily::Inet)?;
        setsockopt(&bound, sockopt::BindToDevice, &"lo".into())?;
        socket::connect(bound.as_raw_fd(), &SockaddrStorage::from(listener.local_addr()?))?;
        Ok((TcpStream::from(bound), listener.accept()?.0))
    })?;
    let (plain, _far_too) = inside(Some(&netns), || tcp_pair("[::1]:0".parse()?, "[::1]:0".parse()?))?;
    let bound_flow = flow_of(&bound, Protocol::Tcp)?;
    ensure!(bound_flow.socket.interface == 0, "it is for the kernel to say");
    // A tag knows the far end only; and nothing but the cookie has to be right.
    let mut vague = flow_of(&plain, Protocol::Tcp)?;
    (vague.socket.local, vague.socket.local_port) = (Address::UNSPECIFIED, 0);
    (vague.socket.remote, vague.socket.remote_port) = (Address::UNSPECIFIED, 0);
    let udp = inside(Some(&netns), || connected_udp("127.0.0.1:0", "127.0.0.1:9"))?;
    let mut vague_udp = flow_of(&udp, Protocol::Udp)?;
    vague_udp.socket.local_port = 1;
    // A handshake that never ends.
    let silent = inside(Some(&netns), || {
        let opening = tcp_socket(AddressFamily::Inet)?;
        netns.ip(&["link", "add", "void", "type", "veth", "peer", "name", "void2"])?;
        netns.ip(&["address", "add", "203.0.113.1/24", "dev", "void"])?;
        netns.ip(&["link", "set", "void", "up"])?;
        netns.ip(&["link", "set", "void2", "up"])?;
        nix::fcntl::fcntl(&opening, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
        let far: SocketAddr = "203.0.113.9:9".parse()?;
        let started = socket::connect(opening.as_raw_fd(), &SockaddrStorage::from(far));
        ensure!(started == Err(nix::errno::Errno::EINPROGRESS), "{started:?}");
        Ok(TcpStream::from(opening))
    })?;
    let mut opening = flow_of(&plain, Protocol::Tcp)?;
    opening.socket = Socket { cookie: getsockopt(&silent, Cookie)?, ..opening.socket };

    let flows = [bound_flow, vague, vague_udp, opening];
    expect(&sockets.destroy(&flows, Instant::now()), flows.len(), 0)?;
    let errors = [bound.take_error()?, plain.take_error()?, udp.take_error()?, silent.take_error()?]
        .map(|e| e.map(|e| e.raw_os_error()));
    ensure!(errors == [Some(Some(libc::ECONNABORTED)); 4], "{errors:?}");
    Ok(Verdict::Ran)
}

fn shared_ends() -> Result<Verdict> {
    let netns = own_netns("shared")?;
    let mut sockets = Sockets::new()?;
    let twins = inside(Some(&netns), || {
        (0..3)
            .map(|_| {
                let kind = (SockType::Datagram, SockFlag::SOCK_CLOEXEC);
                let udp = socket::socket(AddressFamily::Inet, kind.0, kind.1, None)?;
                setsockopt(&udp, sockopt::ReusePort, &true)?;
                let (near, far): (SocketAddr, SocketAddr) = ("127.0.0.1:7003".parse()?, "127.0.0.1:9".parse()?);
                socket::bind(udp.as_raw_fd(), &SockaddrStorage::from(near))?;
                socket::connect(udp.as_raw_fd(), &SockaddrStorage::from(far))?;
                Ok(UdpSocket::from(udp))
            })
            .collect::<Result<Vec<_>>>()
    })?;
    let flows = twins.iter().map(|twin| flow_of(twin, Protocol::Udp)).collect::<Result<Vec<_>>>()?;
    // One that another one hides is named as such, and the other one left alone; whichever the kernel shows first.
    let first = sockets.destroy(&flows[..1], Instant::now());
    ensure!(first.gone == 0 && first.destroyed + first.failed.len() == 1, "{first:?}");
    ensure!(first.failed.iter().all(|(_, error)| *error == SocketError::Hidden), "{first:?}");
    let result = sockets.destroy(&flows, Instant::now());
    ensure!(first.destroyed + result.destroyed == 3 && result.failed.is_empty(), "{first:?} {result:?}");
    for twin in &twins {
        ensure!(twin.take_error()?.and_then(|error| error.raw_os_error()) == Some(libc::ECONNABORTED));
    }
    Ok(Verdict::Ran)
}

const POLICY: &str = r#"
trust_domain = "example.org"

[[workload]]
name = "web"
kind = "service"
cgroup = "/web"

[[service]]
name = "backend"
addresses = ["127.0.0.0/8", "::1"]
ports = ["tcp/7004", "tcp/7005", "udp/7006"]

[[rule]]
name = "web-backend"
from = ["web"]
to = ["backend"]
"#;

fn tags() -> Result<Verdict> {
    // A list comes in parts of 32 KiB, and a socket with its tag is some 200 bytes.
    const EACH: usize = 200;
    raise_descriptor_limit()?;
    let (sandbox, daemon) = Sandbox::with_policy(POLICY)?;
    let map = bpf::open_pin(&maps_directory(sandbox.pins(), &Sizes::default()).join(names::TAGS))?;
    let other = sandbox.another_netns("other")?;
    let web = sandbox.cgroup.child("/web")?;
    daemon.wait_for_instance("/web")?;
    let moved = Moved::to(&web)?;
    let (mut streams, mut datagrams, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
    for netns in [&sandbox.netns, &other] {
        inside(Some(netns), || {
            let (v4, v6) = (TcpListener::bind("127.0.0.1:7004")?, TcpListener::bind("[::1]:7005")?);
            for to in ["127.0.0.1:7004", "[::ffff:127.0.0.1]:7004", "[::1]:7005"] {
                for _ in 0..EACH {
                    let near = TcpStream::connect(to)?;
                    let (far, _) = if to == "[::1]:7005" { v6.accept()? } else { v4.accept()? };
                    streams.push((near, far));
                }
            }
            for to in ["127.0.0.1:7006", "[::1]:7006"] {
                for _ in 0..EACH {
                    let from = if to.starts_with('[') { "[::1]:0" } else { "127.0.0.1:0" };
                    datagrams.push(connected_udp(from, to)?);
                }
            }
            Ok(())
        })?;
        wanted.push(Namespace { cookie: cookie_of(netns)?, pid: 0 });
    }
    drop(moved);

    let dumped = Sockets::new()?.dump(map.as_fd(), &wanted, Instant::now());
    ensure!(dumped.failed.is_empty(), "{:?}", dumped.failed);
    let mut found: HashMap<u64, &Found> = HashMap::new();
    for one in &dumped.found {
        ensure!(found.insert(one.flow.socket.cookie, one).is_none(), "twice: {one:?}");
    }
    let mut flows = Vec::new();
    let check = |flow: Flow| -> Result<Flow> {
        let found = found.get(&flow.socket.cookie).with_context(|| format!("missing: {flow:?}"))?;
        ensure!(found.flow == flow && found.state == state::ESTABLISHED, "{found:?} is not {flow:?}");
        if flow.socket.protocol == Protocol::Udp {
            return Ok(flow);
        }
        let tag = found.tag.as_deref().with_context(|| format!("no tag: {found:?}"))?;
        ensure!(tag.len() == size_of::<Tag>(), "a tag of {} bytes", tag.len());
        let field = |at: usize, length: usize| tag.get(at..at + length);
        ensure!(field(offset_of!(Tag, netns), 8) == Some(&flow.namespace.cookie.to_ne_bytes()), "{found:?}");
        ensure!(field(offset_of!(Tag, pid), 4) == Some(&std::process::id().to_ne_bytes()), "{found:?}");
        ensure!(field(offset_of!(Tag, workload), 4).is_some_and(|number| number != [0; 4]), "{found:?}");
        Ok(flow)
    };
    for (near, _) in &streams {
        flows.push(check(flow_of(near, Protocol::Tcp)?)?);
    }
    for socket in &datagrams {
        flows.push(check(flow_of(socket, Protocol::Udp)?)?);
    }
    ensure!(flows.len() == 2 * 5 * EACH);

    // What a dump found can be destroyed as it was found.
    let all: Vec<Flow> = dumped.found.iter().map(|one| one.flow).collect();
    let result = Sockets::new()?.destroy(&all, Instant::now());
    // The far ends of TCP are among them; where the near end came first, its reset has destroyed them.
    ensure!(result.failed.is_empty() && result.destroyed >= flows.len() - streams.len(), "{result:?}");
    ensure!(result.destroyed + result.gone == all.len(), "{result:?}");
    for (near, far) in &streams {
        let errors = [near.take_error()?, far.take_error()?].map(|e| e.and_then(|e| e.raw_os_error()));
        ensure!(errors.contains(&Some(libc::ECONNABORTED)) && !errors.contains(&None), "{errors:?}");
    }
    for socket in &datagrams {
        ensure!(socket.take_error()?.and_then(|error| error.raw_os_error()) == Some(libc::ECONNABORTED));
    }
    Ok(Verdict::Ran)
}

fn namespaces() -> Result<Verdict> {
    let netns = own_netns("hidden")?;
    let cookie = cookie_of(&netns)?;
    let pair = || inside(Some(&netns), || tcp_pair("127.0.0.1:0".parse()?, "127.0.0.1:0".parse()?));
    // A mount shows it; hints lead nowhere: to another namespace, as after the reuse of a pid, or to no process.
    for pid in [0, 1, std::process::id(), u32::MAX, 4_000_000_000] {
        let mut sockets = Sockets::new()?;
        let (near, _far) = pair()?;
        let flow = flow_of(&near, Protocol::Tcp)?;
        ensure!(flow.namespace.cookie == cookie && cookie != sockets.own_namespace());
        let flow = Flow { namespace: Namespace { cookie, pid }, ..flow };
        expect(&sockets.destroy(&[flow], Instant::now()), 1, 0).with_context(|| format!("pid {pid}"))?;
    }
    let discovered = Sockets::new()?.discover();
    let incomplete = Some(why_not_found()?).filter(|why| *why != NamespaceError::NotFound);
    ensure!(discovered.incomplete == incomplete, "{discovered:?}");
    for cookie in [cookie, Sockets::new()?.own_namespace()] {
        ensure!(discovered.namespaces.iter().filter(|n| n.cookie == cookie).count() == 1, "{discovered:?}");
    }

    // Without the mount, only a thread that is inside shows it: no process is.
    let (near, _far) = pair()?;
    let flow = flow_of(&near, Protocol::Tcp)?;
    let (leave, left) = mpsc::channel::<()>();
    let (arrived, arrival) = mpsc::channel();
    let path = netns.path().to_owned();
    let resident = thread::spawn(move || -> Result<()> {
        setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?;
        arrived.send(nix::unistd::gettid())?;
        let _ = left.recv();
        Ok(())
    });
    let task = format!("/proc/self/task/{}", arrival.recv()?);
    drop(netns);
    for pid in [std::process::id(), 0] {
        let mut sockets = Sockets::new()?;
        let wanted = Flow { namespace: Namespace { cookie, pid }, ..flow };
        let result = sockets.destroy(&[wanted], Instant::now());
        ensure!(result.destroyed + result.gone == 1 && result.failed.is_empty(), "{result:?}");
    }
    ensure!(near.take_error()?.and_then(|error| error.raw_os_error()) == Some(libc::ECONNABORTED));
    // And then nobody does.
    drop(leave);
    resident.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
    // The kernel shows it for a moment longer.
    wait_until("the thread is gone", || Ok(!Path::new(&task).exists()))?;
    let mut sockets = Sockets::new()?;
    let own = tcp_pair("127.0.0.1:0".parse()?, "127.0.0.1:0".parse()?)?;
    let result = sockets.destroy(&[flow, flow_of(&own.0, Protocol::Tcp)?], Instant::now());
    ensure!(result.destroyed == 1 && result.gone == 0, "{result:?}");
    ensure!(result.failed == [(flow, SocketError::Namespace(why_not_found()?))], "{result:?}");
    // The search left this thread where it was.
    ensure!(getsockopt(&UdpSocket::bind("127.0.0.1:0")?, NetnsCookie)? == sockets.own_namespace());
    Ok(Verdict::Ran)
}

fn dead_namespaces() -> Result<Verdict> {
    let witness = own_netns("witness")?;
    for explicit in [true, false] {
        let dying = own_netns("dying")?;
        // This end of the pair exists as long as the other end's namespace.
        witness.join(&dying, ("near0", "far0"), (&[], &[]))?;
        let mut sockets = Sockets::new()?;
        let now = Instant::now();
        let (near, far) = inside(Some(&dying), || tcp_pair("127.0.0.1:0".parse()?, "127.0.0.1:0".parse()?))?;
        let flow = flow_of(&near, Protocol::Tcp)?;
        expect(&sockets.destroy(&[flow], now), 1, 0)?;
        drop((near, far, dying));
        sleep(Duration::from_millis(300));
        let due = sockets.expire(now + IDLE / 2);
        ensure!(due == Some(now + IDLE), "it is kept, and its end is known: {due:?}");
        ensure!(has_link(&witness, "near0"), "what is kept open keeps the namespace alive");
        if explicit {
            sockets.forget(flow.namespace.cookie);
        } else {
            ensure!(sockets.expire(now + IDLE).is_none());
        }
        let started = Instant::now();
        while has_link(&witness, "near0") {
            ensure!(started.elapsed() < PATIENCE, "the namespace lives on");
            sleep(Duration::from_millis(20));
        }
    }
    Ok(Verdict::Ran)
}

fn privileges() -> Result<Verdict> {
    const CAP_NET_ADMIN: u32 = 12;
    const CAP_SYS_PTRACE: u32 = 19;
    const CAP_SYS_ADMIN: u32 = 21;
    const CAP_BPF: u32 = 39;
    let netns = own_netns("locked")?;
    let pair = |netns| inside(netns, || tcp_pair("127.0.0.1:0".parse()?, "127.0.0.1:0".parse()?));
    let (other, _other_far) = pair(Some(&netns))?;
    let (own, _own_far) = pair(None)?;
    let (other_flow, own_flow) = (flow_of(&other, Protocol::Tcp)?, flow_of(&own, Protocol::Tcp)?);

    let result = without(&[CAP_SYS_ADMIN], || Ok(Sockets::new()?.destroy(&[other_flow], Instant::now())))?;
    ensure!(result.failed == [(other_flow, NamespaceError::MayNotEnter.into())], "{result:?}");
    // Only a process shows it now, one with more privileges.
    let inner = File::open(netns.path())?;
    let mut resident = std::process::Command::new("sleep");
    resident.arg("1000");
    // SAFETY: setns(2) is a system call that allocates nothing, which is what a forked child may do.
    unsafe { resident.pre_exec(move || Ok(setns(&inner, CloneFlags::CLONE_NEWNET)?)) };
    let mut resident = resident.spawn()?;
    let entered = Instant::now();
    let link = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net"));
    while link(&resident.id().to_string())? == link("self")? {
        ensure!(entered.elapsed() < PATIENCE);
        sleep(Duration::from_millis(5));
    }
    drop(netns);
    let hint = Namespace { pid: resident.id(), ..other_flow.namespace };
    let hinted = Flow { namespace: hint, ..other_flow };
    let result = without(&[CAP_SYS_PTRACE, CAP_NET_ADMIN], || Ok(Sockets::new()?.destroy(&[hinted], Instant::now())));
    resident.kill()?;
    resident.wait()?;
    let result = result?;
    ensure!(result.failed == [(hinted, NamespaceError::MayNotLook.into())], "{result:?}");

    let result = without(&[CAP_NET_ADMIN], || Ok(Sockets::new()?.destroy(&[own_flow], Instant::now())))?;
    ensure!(result.failed == [(own_flow, SocketError::MayNotDestroy)], "{result:?}");
    let (sandbox, _daemon) = Sandbox::with_policy(POLICY)?;
    let map = bpf::open_pin(&maps_directory(sandbox.pins(), &Sizes::default()).join(names::TAGS))?;
    let dumped = without(&[CAP_BPF, CAP_SYS_ADMIN], || {
        Ok(Sockets::new()?.dump(map.as_fd(), &[own_flow.namespace], Instant::now()))
    })?;
    ensure!(dumped.failed == [(own_flow.namespace, SocketError::MayNotRead); 2], "{dumped:?}");
    // None of all that did anything; and in its own namespace, destroying needs no more than this.
    ensure!(own.take_error()?.is_none() && other.take_error()?.is_none());
    let result =
        without(
            &[CAP_SYS_ADMIN, CAP_SYS_PTRACE, CAP_BPF],
            || Ok(Sockets::new()?.destroy(&[own_flow], Instant::now())),
        )?;
    expect(&result, 1, 0)?;
    Ok(Verdict::Ran)
}

/// Whoever administers a network namespace can send to netlink sockets in it.
fn forged_answers() -> Result<Verdict> {
    let netns = own_netns("forger")?;
    let mut sockets = Sockets::new()?;
    let (near, _far) = inside(Some(&netns), || tcp_pair("127.0.0.1:0".parse()?, "127.0.0.1:0".parse()?))?;
    let flow = flow_of(&near, Protocol::Tcp)?;
    let phantom = with_cookie(&flow, flow.socket.cookie + 1_000_000);
    let now = Instant::now();
    expect(&sockets.destroy(&[phantom], now), 0, 1)?;

    let (ports, forger) = inside(Some(&netns), || {
        let flags = SockFlag::SOCK_CLOEXEC;
        let forger = socket::socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkSockDiag)?;
        Ok((diag_ports()?, forger))
    })?;
    ensure!(!ports.is_empty(), "the namespace's socket is shown");
    // "Done, no error", for every number that the next requests may have: to a forger's delight, they count from 1.
    let forge = |kind: libc::c_int, code: i32| -> Result<u32> {
        let mut sent = 0;
        for sequence in 0..64u32 {
            let mut message = Vec::new();
            message.extend(20u32.to_ne_bytes());
            message.extend((kind as u16).to_ne_bytes());
            message.extend([0; 2]);
            message.extend(sequence.to_ne_bytes());
            message.extend([0; 4]);
            message.extend(code.to_ne_bytes());
            for port in &ports {
                let to = NetlinkAddr::new(*port, 0);
                sent += u32::from(socket::sendto(forger.as_raw_fd(), &message, &to, MsgFlags::MSG_DONTWAIT).is_ok());
            }
        }
        Ok(sent)
    };
    // An error, and lists that are empty: the socket would be taken for gone.
    ensure!(forge(libc::NLMSG_ERROR, -libc::ENOENT)? >= 64);
    ensure!(forge(libc::NLMSG_DONE, 0)? >= 64);
    expect(&sockets.destroy(&[flow], now), 1, 0)?;
    ensure!(near.take_error()?.and_then(|error| error.raw_os_error()) == Some(libc::ECONNABORTED));
    // And one that is gone would be taken for destroyed.
    ensure!(forge(libc::NLMSG_ERROR, 0)? >= 64);
    expect(&sockets.destroy(&[phantom], now), 0, 1)?;

    // As much as the buffer takes, and more: answers are lost, and still nothing is made up.
    let (near, _far) = inside(Some(&netns), || tcp_pair("127.0.0.1:0".parse()?, "127.0.0.1:0".parse()?))?;
    let flow = flow_of(&near, Protocol::Tcp)?;
    while forge(libc::NLMSG_ERROR, -libc::ENOENT)? > 0 {}
    let started = Instant::now();
    let result = sockets.destroy(&[flow], now);
    ensure!(result.destroyed + result.gone == 1, "{result:?}");
    ensure!(near.take_error()?.and_then(|error| error.raw_os_error()) == Some(libc::ECONNABORTED));
    println!("under a full buffer: {result:?} in {:?}", started.elapsed());
    Ok(Verdict::Ran)
}

/// Port numbers of the sock_diag sockets in this thread's namespace.
fn diag_ports() -> Result<Vec<u32>> {
    let table = fs::read_to_string("/proc/thread-self/net/netlink")?;
    let ports = table.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let (protocol, port) = (fields.nth(1)?, fields.next()?.parse().ok()?);
        (protocol == libc::NETLINK_SOCK_DIAG.to_string() && port != 0).then_some(port)
    });
    Ok(ports.collect())
}

fn own_netns(name: &str) -> Result<Netns> {
    Netns::new(&format!("{}{}-{name}", authd_tests::cgroup::PREFIX, std::process::id()))
}

/// Does something in a network namespace. `None`: in this one.
fn inside<T: Send>(netns: Option<&Netns>, body: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    match netns {
        None => body(),
        Some(netns) => netns.within(body),
    }
}

fn elsewhere<T: Send>(body: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| scope.spawn(body).join().map_err(|panic| std::panic::resume_unwind(panic)).and_then(|r| r))
}

/// Does something on a thread without some capabilities (capabilities(7)).
fn without<T: Send>(capabilities: &[u32], body: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    elsewhere(|| {
        // `struct __user_cap_header_struct` of version 3, and twice `struct __user_cap_data_struct`.
        let mut header = [0x2008_0522_u32, 0];
        let mut data = [0_u32; 6];
        // SAFETY: capget(2) writes six words for version 3, and both arrays outlive the call.
        let got = unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), data.as_mut_ptr()) };
        ensure!(got == 0, "{}", io::Error::last_os_error());
        for capability in capabilities {
            let (word, bit) = (*capability as usize / 32 * 3, 1 << (capability % 32));
            // Effective and permitted: the latter is what others compare with.
            data[word] &= !bit;
            data[word + 1] &= !bit;
        }
        // SAFETY: capset(2) reads the same, and changes this thread alone.
        let set = unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), data.as_ptr()) };
        ensure!(set == 0, "{}", io::Error::last_os_error());
        body()
    })
}

fn cookie_of(netns: &Netns) -> Result<u64> {
    inside(Some(netns), || Ok(getsockopt(&UdpSocket::bind("127.0.0.1:0")?, NetnsCookie)?))
}

fn has_link(netns: &Netns, name: &str) -> bool {
    netns.ip(&["link", "show", "dev", name]).is_ok()
}

fn expect(result: &Destroyed, destroyed: usize, gone: usize) -> Result<()> {
    if result.destroyed != destroyed || result.gone != gone || !result.failed.is_empty() {
        let some: Vec<_> = result.failed.iter().take(5).collect();
        bail!(
            "expected {destroyed} destroyed and {gone} gone: {} and {}, {} failed: {some:?}",
            result.destroyed,
            result.gone,
            result.failed.len()
        );
    }
    Ok(())
}

/// Starts to read, does something, and returns the error that the reader saw.
fn error_of_reader(
    read: impl FnOnce() -> io::Result<usize> + Send + 'static,
    act: impl FnOnce() -> Result<()>,
) -> Result<io::Error> {
    let (sender, receiver) = mpsc::channel();
    let reader = thread::spawn(move || {
        let _ = sender.send(read());
    });
    sleep(Duration::from_millis(20));
    act()?;
    let seen = receiver.recv_timeout(PATIENCE).context("the reader waits on")?;
    reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?;
    seen.err().context("the reader saw no error")
}

fn raise_descriptor_limit() -> Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    const ENOUGH: u64 = 16_384;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let most = most.max(ENOUGH);
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?)
}

/// What a search ends with that finds nothing: some places have processes that even this one may not look at.
fn why_not_found() -> Result<NamespaceError> {
    let processes =
        fs::read_dir("/proc")?.flatten().filter(|entry| entry.file_name().as_encoded_bytes()[0].is_ascii_digit());
    let refused = |error: io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    let mut links = processes.map(|process| fs::read_link(process.path().join("ns/net")));
    let blind = links.any(|link| link.is_err_and(refused));
    Ok(if blind { NamespaceError::MayNotLook } else { NamespaceError::NotFound })
}
