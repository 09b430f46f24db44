//! The other end of a crowd: an echo server for thousands of connections.

use std::{
    collections::{BTreeMap, HashMap},
    io::{self, BufRead, IoSliceMut, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    sync::{Arc, Mutex, PoisonError},
    thread::{self, sleep},
    time::Duration,
};

use anyhow::Result;
use authd_tests::probe::Outcome;
use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    socket::{
        Backlog, ControlMessageOwned, MsgFlags, SockaddrStorage, listen, recvmsg, setsockopt,
        sockopt::{RcvBufForce, ReceiveTimestampns},
    },
};

use super::{crowd::raise_descriptor_limit, nanoseconds, say};

/// Room for a datagram of every client, and more of one that sends without a pause.
const RECEIVE_BUFFER: usize = 64 << 20;

/// When the last datagram of each client came, by its port.
type Last = Arc<Mutex<HashMap<u16, u64>>>;

/// TCP on one thread, UDP on another. `last PORT` asks when a client's last datagram came, in ns since 1970.
pub fn run(at: SocketAddr) -> Result<()> {
    raise_descriptor_limit()?;
    let listener = TcpListener::bind(at)?;
    listen(&listener, Backlog::new(4096)?)?;
    let udp = UdpSocket::bind(at)?;
    setsockopt(&udp, RcvBufForce, &RECEIVE_BUFFER)?;
    setsockopt(&udp, ReceiveTimestampns, &true)?;
    let last = Last::default();
    thread::spawn({
        let (udp, last) = (udp.try_clone()?, last.clone());
        move || ended(serve_udp(&udp, &last))
    });
    thread::spawn(move || ended(serve_tcp(&listener)));
    say(&Outcome { ok: true, ..Outcome::default() });
    for line in io::stdin().lock().lines() {
        let line = line?;
        let Some(port) = line.strip_prefix("last ").and_then(|port| port.parse::<u16>().ok()) else { continue };
        // Nothing more comes; what came is taken out of the queue.
        let is_waiting = || {
            let mut waiting: libc::c_int = 0;
            // SAFETY: the kernel writes one integer there (udp(7), SIOCINQ).
            unsafe { libc::ioctl(udp.as_raw_fd(), libc::FIONREAD, &raw mut waiting) };
            waiting > 0
        };
        sleep(Duration::from_millis(5));
        while is_waiting() {
            sleep(Duration::from_millis(1));
        }
        let at = last.lock().unwrap_or_else(PoisonError::into_inner).get(&port).copied();
        say(&Outcome { ok: at.is_some(), count: at.unwrap_or_default(), ..Outcome::default() });
    }
    say(&Outcome { ok: true, ..Outcome::default() });
    std::process::exit(0)
}

/// Nobody waits for a server that is half there.
fn ended(result: Result<()>) {
    eprintln!("a server of a crowd ended: {result:?}");
    std::process::exit(1)
}

/// Echoes single bytes, and swallows longer datagrams.
fn serve_udp(socket: &UdpSocket, last: &Last) -> Result<()> {
    let mut control = nix::cmsg_space!(libc::timespec);
    loop {
        let mut bytes = [0; 64];
        let mut vector = [IoSliceMut::new(&mut bytes)];
        let fd = socket.as_raw_fd();
        let message = recvmsg::<SockaddrStorage>(fd, &mut vector, Some(&mut control), MsgFlags::empty())?;
        let length = message.bytes;
        let from = message.address.as_ref().and_then(|from| {
            let four = from.as_sockaddr_in().map(|from| SocketAddr::from(std::net::SocketAddrV4::from(*from)));
            four.or_else(|| from.as_sockaddr_in6().map(|from| std::net::SocketAddrV6::from(*from).into()))
        });
        // When the kernel had it, whenever this thread is given a processor.
        let at = message.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::ScmTimestampns(at) => Some(nanoseconds(at.tv_sec() as u64, at.tv_nsec() as u64)),
            _ => None,
        });
        let Some((from, at)) = from.zip(at) else { continue };
        last.lock().unwrap_or_else(PoisonError::into_inner).insert(from.port(), at);
        if length == 1 {
            // Who was refused in the meantime waits for no answer.
            let _ = socket.send_to(b"x", from);
        }
    }
}

fn serve_tcp(listener: &TcpListener) -> Result<()> {
    listener.set_nonblocking(true)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let readable = |fd: i32| EpollEvent::new(EpollFlags::EPOLLIN, fd as u64);
    epoll.add(listener, readable(listener.as_raw_fd()))?;
    let mut streams: BTreeMap<i32, TcpStream> = BTreeMap::new();
    let mut events = vec![EpollEvent::empty(); 1024];
    loop {
        let ready = epoll.wait(&mut events, EpollTimeout::NONE)?;
        for event in events.iter().take(ready) {
            let fd = event.data() as i32;
            if fd == listener.as_raw_fd() {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true)?;
                    epoll.add(&stream, readable(stream.as_raw_fd()))?;
                    streams.insert(stream.as_raw_fd(), stream);
                }
                continue;
            }
            let mut buffer = [0; 64];
            let gone = match streams.get_mut(&fd).map(|stream| (stream.read(&mut buffer), stream)) {
                Some((Ok(length @ 1..), stream)) => stream.write_all(&buffer[..length]).is_err(),
                Some((Err(error), _)) if error.kind() == io::ErrorKind::WouldBlock => false,
                _ => true,
            };
            if gone {
                streams.remove(&fd);
            }
        }
    }
}
