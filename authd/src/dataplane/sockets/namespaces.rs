//! From the cookie of a network namespace to its socket diagnostics.
//!
//! Enters: cookies, and pids that may be inside. Leaves: open diagnostics, or why there are none. Never: the calling thread
//! in another namespace; a namespace taken for another because a pid was reused: the cookie decides.
//!
//! An open socket keeps its namespace alive, with its interfaces and addresses, after the last process has left it. So
//! what is kept here is dropped when nobody has used it for [`IDLE`]; [`Namespaces::expire`] says when to call it again.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    os::unix::{ffi::OsStringExt, fs::MetadataExt, fs::OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
};

use super::diag::Diag;

/// How long the diagnostics of another namespace stay open unused.
pub const IDLE: Duration = Duration::from_secs(5);
/// Namespaces that are open at the same time.
pub const CAPACITY: usize = 128;

/// Why a namespace cannot be reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NamespaceError {
    #[error("no process and no mount shows this network namespace: it is gone, or only descriptors keep it")]
    NotFound,
    #[error("finding this network namespace needs CAP_SYS_PTRACE: a process that may be inside cannot be looked at")]
    MayNotLook,
    #[error("entering this network namespace needs CAP_SYS_ADMIN")]
    MayNotEnter,
    #[error("no thread could be started to enter a network namespace: {0}")]
    Thread(Errno),
    #[error("opening socket diagnostics: {0}")]
    Open(Errno),
}

impl NamespaceError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotFound => "namespace_not_found",
            Self::MayNotLook => "namespace_not_visible",
            Self::MayNotEnter => "namespace_not_enterable",
            Self::Thread(_) => "no_thread",
            Self::Open(_) => "diagnostics_not_opened",
        }
    }
}

/// A network namespace.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Namespace {
    /// SO_NETNS_COOKIE of its sockets.
    pub cookie: u64,
    /// A process that is, or was, inside; 0: none is known.
    pub pid: u32,
}

/// All network namespaces that could be found.
#[derive(Clone, Debug, Default)]
pub struct Discovered {
    pub namespaces: Vec<Namespace>,
    /// Some may be missing, for this reason.
    pub incomplete: Option<NamespaceError>,
}

pub struct Namespaces {
    own: (u64, Diag),
    others: HashMap<u64, Kept>,
}

struct Kept {
    diag: Diag,
    used: Instant,
}

impl Namespaces {
    pub fn new() -> Result<Self, NamespaceError> {
        let diag = Diag::open().map_err(NamespaceError::Open)?;
        let cookie = diag.namespace().map_err(NamespaceError::Open)?;
        Ok(Self { own: (cookie, diag), others: HashMap::new() })
    }

    /// Cookie of the network namespace that authd is in.
    pub fn own(&self) -> u64 {
        self.own.0
    }

    pub fn is_open(&self, cookie: u64) -> bool {
        cookie == self.own.0 || self.others.contains_key(&cookie)
    }

    /// The diagnostics of a namespace, if they are open.
    pub fn get(&mut self, cookie: u64, now: Instant) -> Option<&mut Diag> {
        if cookie == self.own.0 {
            return Some(&mut self.own.1);
        }
        let kept = self.others.get_mut(&cookie)?;
        kept.used = now;
        Some(&mut kept.diag)
    }

    /// Opens namespaces, at most [`CAPACITY`]; one may be named several times, with several pids. Returns those that it
    /// could not open.
    pub fn open(&mut self, wanted: &[Namespace], now: Instant) -> HashMap<u64, NamespaceError> {
        let mut missing: HashMap<u64, Vec<u32>> = HashMap::new();
        for namespace in wanted.iter().filter(|n| !self.is_open(n.cookie)) {
            let pids = missing.entry(namespace.cookie).or_default();
            if namespace.pid != 0 && !pids.contains(&namespace.pid) {
                pids.push(namespace.pid);
            }
        }
        if missing.is_empty() {
            return HashMap::new();
        }
        if self.others.len() + missing.len() > CAPACITY {
            let kept: HashSet<u64> = wanted.iter().map(|n| n.cookie).collect();
            self.others.retain(|cookie, _| kept.contains(cookie));
        }
        let cookies: Vec<u64> = missing.keys().copied().collect();
        let search = match elsewhere(move || Search::new(missing).run()) {
            Ok(search) => search,
            Err(error) => return cookies.into_iter().map(|cookie| (cookie, error)).collect(),
        };
        for (cookie, diag) in search.opened {
            self.others.insert(cookie, Kept { diag, used: now });
        }
        let why = search.trouble.unwrap_or(NamespaceError::NotFound);
        search.missing.into_keys().map(|cookie| (cookie, why)).collect()
    }

    /// Finds all namespaces of this node that a process or a mount shows, this one included.
    pub fn discover(&self) -> Discovered {
        let own = Namespace { cookie: self.own.0, pid: std::process::id() };
        match elsewhere(|| Search::new(HashMap::new()).discover()) {
            Ok(search) => {
                let others = search.seen.into_iter().filter(|n| n.cookie != own.cookie);
                Discovered { namespaces: [own].into_iter().chain(others).collect(), incomplete: search.trouble }
            }
            Err(error) => Discovered { namespaces: vec![own], incomplete: Some(error) },
        }
    }

    /// Lets go of a namespace. authd's own gets a new socket instead.
    pub fn forget(&mut self, cookie: u64) {
        self.others.remove(&cookie);
        if cookie == self.own.0
            && let Ok(diag) = Diag::open()
            && diag.namespace() == Ok(cookie)
        {
            self.own.1 = diag;
        }
    }

    /// Lets go of namespaces that nobody used for [`IDLE`]. Returns when the next one is due.
    pub fn expire(&mut self, now: Instant) -> Option<Instant> {
        self.others.retain(|_, kept| now.saturating_duration_since(kept.used) < IDLE);
        self.others.values().map(|kept| kept.used + IDLE).min()
    }
}

/// Runs something on a thread that ends with it, so that no other thread changes its namespace.
fn elsewhere<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> Result<T, NamespaceError> {
    let errno = |error: io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EAGAIN));
    let thread = thread::Builder::new()
        .name("authd-netns".to_owned())
        .spawn(body)
        .map_err(|error| NamespaceError::Thread(errno(error)))?;
    thread.join().map_err(|_| NamespaceError::Thread(Errno::ECANCELED))
}

/// A walk through namespaces, on a thread of its own.
struct Search {
    /// Cookies that are looked for, and pids to look at first.
    missing: HashMap<u64, Vec<u32>>,
    opened: Vec<(u64, Diag)>,
    seen: Vec<Namespace>,
    /// Inode numbers of namespaces that were looked at.
    visited: HashSet<u64>,
    /// The first thing that kept a namespace from being looked at.
    trouble: Option<NamespaceError>,
}

impl Search {
    fn new(missing: HashMap<u64, Vec<u32>>) -> Self {
        Self { missing, opened: Vec::new(), seen: Vec::new(), visited: HashSet::new(), trouble: None }
    }

    /// The likely places first, and no further than needed.
    fn run(mut self) -> Self {
        let hints: Vec<u32> = self.missing.values().flatten().copied().collect();
        for pid in hints {
            self.visit_process(pid);
            self.visit_threads(pid);
        }
        type Place = fn(&mut Search);
        let places: [Place; 3] = [Self::visit_mounts, Self::visit_processes, Self::visit_all_threads];
        for place in places {
            if self.missing.is_empty() {
                break;
            }
            place(&mut self);
        }
        self
    }

    fn discover(mut self) -> Self {
        self.visit_processes();
        self.visit_all_threads();
        self.visit_mounts();
        self
    }

    fn visit_mounts(&mut self) {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for (inode, path) in namespace_mounts(&mounts) {
            self.visit(&path, inode, 0);
        }
    }

    fn visit_processes(&mut self) {
        for pid in numbers(Path::new("/proc")) {
            self.visit_process(pid);
        }
    }

    fn visit_process(&mut self, pid: u32) {
        self.visit_link(format!("/proc/{pid}/ns/net").into(), pid);
    }

    /// A thread may be in another namespace than its process.
    fn visit_all_threads(&mut self) {
        for pid in numbers(Path::new("/proc")) {
            self.visit_threads(pid);
        }
    }

    fn visit_threads(&mut self, pid: u32) {
        let tasks = PathBuf::from(format!("/proc/{pid}/task"));
        // The first one is the process itself.
        for tid in numbers(&tasks).into_iter().filter(|tid| *tid != pid) {
            self.visit_link(tasks.join(format!("{tid}/ns/net")), pid);
        }
    }

    fn visit_link(&mut self, path: PathBuf, pid: u32) {
        match fs::read_link(&path) {
            Ok(target) => {
                if let Some(inode) = target.to_str().and_then(inode_of) {
                    self.visit(&path, inode, pid);
                }
            }
            Err(error) => self.note(&error),
        }
    }

    fn visit(&mut self, path: &Path, inode: u64, pid: u32) {
        if self.visited.contains(&inode) {
            return;
        }
        match self.enter(path, pid) {
            Ok(inode) => drop(self.visited.insert(inode)),
            Err(error) => drop(self.trouble.get_or_insert(error)),
        }
    }

    /// Goes there and looks. Returns the inode number of where it was.
    fn enter(&mut self, path: &Path, pid: u32) -> Result<u64, NamespaceError> {
        // Where a mount was, anything may be by now.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let (file, inode) = match file.and_then(|file| Ok((file.metadata()?.ino(), file))) {
            Ok((inode, file)) => (file, inode),
            Err(error) => {
                self.note(&error);
                // Gone meanwhile.
                return Ok(0);
            }
        };
        match setns(&file, CloneFlags::CLONE_NEWNET) {
            Ok(()) => {}
            Err(Errno::EPERM) => return Err(NamespaceError::MayNotEnter),
            // No namespace of this kind.
            Err(_) => return Ok(inode),
        }
        let diag = Diag::open().map_err(NamespaceError::Open)?;
        let cookie = diag.namespace().map_err(NamespaceError::Open)?;
        self.seen.push(Namespace { cookie, pid });
        if self.missing.remove(&cookie).is_some() {
            self.opened.push((cookie, diag));
        }
        Ok(inode)
    }

    /// A place that cannot be looked at may be the one; a process that has ended is none.
    fn note(&mut self, error: &io::Error) {
        if error.kind() == io::ErrorKind::PermissionDenied {
            self.trouble.get_or_insert(NamespaceError::MayNotLook);
        }
    }
}

/// Entries of a directory of /proc that are numbers: processes, or threads.
fn numbers(directory: &Path) -> Vec<u32> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// From `net:[4026531840]`.
fn inode_of(link: &str) -> Option<u64> {
    link.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}

/// Network namespaces that are mounted somewhere, such as in /run/netns, from /proc/self/mountinfo (proc(5)).
fn namespace_mounts(mountinfo: &str) -> Vec<(u64, PathBuf)> {
    let of_line = |line: &str| {
        let (head, tail) = line.split_once(" - ")?;
        let mut fields = head.split(' ');
        let (root, point) = (fields.nth(3)?, fields.next()?);
        (tail.split(' ').next() == Some("nsfs")).then_some(())?;
        Some((inode_of(root)?, unescaped(point)))
    };
    mountinfo.lines().filter_map(of_line).collect()
}

/// A path of mountinfo, where blanks and backslashes are three octal digits behind a backslash.
fn unescaped(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..3).filter(|_| *first == b'\\').and_then(|d| std::str::from_utf8(d).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounted_namespaces_are_found_under_paths_with_blanks() {
        let mounts = "25 1 259:2 / / rw,relatime shared:1 - ext4 /dev/root rw\n\
                      411 24 0:4 net:[4026532205] /run/netns/blue rw shared:212 - nsfs nsfs rw\n\
                      412 24 0:4 mnt:[4026532206] /run/snapd/ns/lxd.mnt rw - nsfs nsfs rw\n\
                      413 24 0:4 net:[4026532207] /run/my\\040name\\134s rw master:3 - nsfs nsfs rw\n\
                      414 24 0:4 net:[4026532208] /tmp/x rw - tmpfs net rw\n\
                      broken\n";
        let found = namespace_mounts(mounts);
        assert_eq!(
            found,
            [(4026532205, PathBuf::from("/run/netns/blue")), (4026532207, PathBuf::from("/run/my name\\s"))]
        );
    }

    #[test]
    fn backslashes_without_digits_are_themselves() {
        for text in ["/a\\", "/a\\04", "/a\\999", "/a\\x40é"] {
            assert_eq!(unescaped(text), PathBuf::from(text));
        }
    }

    #[test]
    fn the_own_namespace_needs_no_search_and_no_privilege() {
        let mut namespaces = Namespaces::new().unwrap();
        let own = namespaces.own();
        let now = Instant::now();
        assert_eq!(namespaces.open(&[Namespace { cookie: own, pid: 0 }], now), HashMap::new());
        assert!(namespaces.get(own, now).is_some());
        namespaces.forget(own);
        assert_eq!(namespaces.expire(now + IDLE), None);
        assert!(namespaces.get(own, now).is_some());
    }

    #[test]
    fn a_cookie_of_no_namespace_is_never_open() {
        let mut namespaces = Namespaces::new().unwrap();
        let now = Instant::now();
        let wanted = Namespace { cookie: u64::MAX, pid: std::process::id() };
        // Who runs this decides whether it was not found or could not be looked for.
        assert_eq!(namespaces.open(&[wanted], now).len(), 1);
        assert!(namespaces.get(u64::MAX, now).is_none());
    }
}
