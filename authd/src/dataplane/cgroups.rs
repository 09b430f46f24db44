//! Which cgroups there are, and whose they are.
//!
//! Enters: the cgroup tree and a classification of paths. Leaves: identities by cgroup number, and changes to them.
//! A directory gets an entry if its parent is *open*, that is, if a pattern could match below the parent; everything below
//! a closed directory inherits. The kernel treats a child of an open directory that has no entry yet as pending, so there
//! is no moment in which a new cgroup could be taken for nobody's.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use authd_common::tables::{IdentityEntry, identity_flags};
use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor},
};

/// What the policy says of one path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Classification {
    /// A workload's number, or `UNMANAGED`.
    pub workload: u32,
    /// A pattern could match a strict descendant.
    pub open: bool,
    /// Where grants go by instance: how much of the path is the instance's own.
    pub instance: Option<usize>,
}

/// Says whose a cgroup is, by its path below the root that is enforced (`/` for that root).
pub type Classify<'a> = &'a dyn Fn(&str) -> Classification;

/// One change for the writer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    Appeared { cgroup: u64, entry: IdentityEntry },
    Gone { cgroup: u64 },
}

/// The tree below one root, watched where something could appear that matters.
pub struct Tree {
    root: PathBuf,
    inotify: Inotify,
    /// Watched directories, by path relative to the root.
    watches: HashMap<WatchDescriptor, String>,
    /// Entries by path relative to the root.
    known: BTreeMap<String, (u64, IdentityEntry)>,
    /// Paths by number, of all that were ever known: records name cgroups that are gone.
    names: HashMap<u64, String>,
}

impl Tree {
    pub fn new(root: &Path) -> io::Result<Self> {
        Ok(Self {
            root: root.to_owned(),
            inotify: Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?,
            watches: HashMap::new(),
            known: BTreeMap::new(),
            names: HashMap::new(),
        })
    }

    /// Walks the whole tree under a new classification.
    pub fn rescan(&mut self, classify: Classify<'_>) -> io::Result<()> {
        for (descriptor, _) in self.watches.drain() {
            // A directory that is gone has lost its watch already.
            let _ = self.inotify.rm_watch(descriptor);
        }
        self.known.clear();
        self.visit("/".to_owned(), classify, &mut Vec::new())
    }

    /// All entries, for a generation.
    pub fn identities(&self) -> HashMap<u64, IdentityEntry> {
        self.known.values().copied().collect()
    }

    /// What the kernel knows of a cgroup by its path: its own entry, or the nearest one above it. As in the kernel, a cgroup
    /// below an open one that has none itself is not known yet.
    pub fn nearest(&self, path: &str) -> Option<IdentityEntry> {
        if let Some((_, entry)) = self.known.get(path) {
            return Some(*entry);
        }
        let mut end = path.len();
        while let Some(slash) = path.get(..end).and_then(|head| head.rfind('/')) {
            let above = if slash == 0 { "/" } else { path.get(..slash)? };
            if let Some((_, entry)) = self.known.get(above) {
                return (entry.flags & identity_flags::OPEN == 0).then_some(*entry);
            }
            if slash == 0 {
                return None;
            }
            end = slash;
        }
        None
    }

    /// Instances of workloads: path, number, entry.
    pub fn instances(&self) -> impl Iterator<Item = (&str, u64, IdentityEntry)> {
        self.known.iter().map(|(path, (cgroup, entry))| (path.as_str(), *cgroup, *entry))
    }

    /// The path of a cgroup, also of one that is gone. Below closed directories paths are looked up when first asked for.
    pub fn path_of(&mut self, cgroup: u64) -> Option<String> {
        if let Some(path) = self.names.get(&cgroup) {
            return Some(path.clone());
        }
        let path = find(&self.root, "", cgroup, 0)?;
        self.names.insert(cgroup, path.clone());
        Some(path)
    }

    /// Becomes readable when something changed.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }

    /// What changed since the last call.
    pub fn changes(&mut self, classify: Classify<'_>) -> io::Result<Vec<Change>> {
        let mut changes = Vec::new();
        loop {
            let events = match self.inotify.read_events() {
                Ok(events) => events,
                Err(Errno::EAGAIN) => return Ok(changes),
                Err(error) => return Err(error.into()),
            };
            for event in events {
                if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                    self.recover(classify, &mut changes)?;
                } else {
                    self.follow(&event, classify, &mut changes)?;
                }
            }
        }
    }

    fn follow(&mut self, event: &InotifyEvent, classify: Classify<'_>, changes: &mut Vec<Change>) -> io::Result<()> {
        if event.mask.contains(AddWatchFlags::IN_IGNORED) {
            self.watches.remove(&event.wd);
            return Ok(());
        }
        let (Some(parent), Some(name)) = (self.watches.get(&event.wd), event.name.as_deref().and_then(OsStr::to_str))
        else {
            return Ok(());
        };
        let path = join(parent, name);
        if event.mask.intersects(AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO) {
            self.visit(path, classify, changes)
        } else {
            self.forget(&path, changes);
            Ok(())
        }
    }

    /// Events were lost: compares the tree with what is known.
    fn recover(&mut self, classify: Classify<'_>, changes: &mut Vec<Change>) -> io::Result<()> {
        let before: Vec<String> = self.known.keys().cloned().collect();
        for path in before {
            if !below(&self.root, &path).is_dir() {
                self.forget(&path, changes);
            }
        }
        self.visit("/".to_owned(), classify, changes)
    }

    fn forget(&mut self, path: &str, changes: &mut Vec<Change>) {
        if let Some((cgroup, _)) = self.known.remove(path) {
            changes.push(Change::Gone { cgroup });
        }
    }

    /// Enters a directory, and what lies below it as far as patterns reach. A directory that vanishes meanwhile is none.
    fn visit(&mut self, path: String, classify: Classify<'_>, changes: &mut Vec<Change>) -> io::Result<()> {
        let directory = below(&self.root, &path);
        let Ok(metadata) = fs::metadata(&directory) else { return Ok(()) };
        if !metadata.is_dir() {
            return Ok(());
        }
        let Classification { workload, open, instance } = classify(&path);
        let cgroup = metadata.ino();
        let instance = match instance.and_then(|end| path.get(..end)) {
            None => 0,
            Some(own) if own == path => cgroup,
            // What lies on the way to an open directory was entered before it.
            Some(own) => self.known.get(own).map_or(cgroup, |(instance, _)| *instance),
        };
        let entry = IdentityEntry { workload, flags: if open { identity_flags::OPEN } else { 0 }, instance };
        if open {
            // The watch comes before the listing, so that nothing falls between them.
            let flags = AddWatchFlags::IN_CREATE
                | AddWatchFlags::IN_DELETE
                | AddWatchFlags::IN_MOVED_TO
                | AddWatchFlags::IN_MOVED_FROM
                | AddWatchFlags::IN_ONLYDIR;
            match self.inotify.add_watch(&directory, flags) {
                Ok(descriptor) => {
                    self.watches.insert(descriptor, path.clone());
                }
                Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
                // What is made below stays pending, which is closed.
                Err(Errno::ENOSPC) => tracing::error!(
                    cgroup = path,
                    "no inotify watch is left, so that cgroups made below stay closed: raise fs.inotify.max_user_watches"
                ),
                Err(error) => return Err(error.into()),
            }
        }
        self.names.insert(cgroup, path.clone());
        let before = self.known.insert(path.clone(), (cgroup, entry));
        if before != Some((cgroup, entry)) {
            changes.push(Change::Appeared { cgroup, entry });
        }
        if open {
            for child in children(&directory)? {
                self.visit(join(&path, &child), classify, changes)?;
            }
        }
        Ok(())
    }
}

fn join(parent: &str, name: &str) -> String {
    if parent == "/" { format!("/{name}") } else { format!("{parent}/{name}") }
}

fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// Names of the cgroups directly below one. One that vanished has none.
fn children(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in entries {
        let Ok(entry) = entry else { continue };
        if entry.file_type().is_ok_and(|kind| kind.is_dir())
            && let Ok(name) = entry.file_name().into_string()
        {
            names.push(name);
        }
    }
    Ok(names)
}

/// Looks for a directory by its number. Bounded, because a workload decides how deep its own tree is.
fn find(root: &Path, path: &str, cgroup: u64, depth: u32) -> Option<String> {
    const DEEPEST: u32 = 16;
    let directory = root.join(path.trim_start_matches('/'));
    if fs::metadata(&directory).ok()?.ino() == cgroup {
        return Some(if path.is_empty() { "/".to_owned() } else { path.to_owned() });
    }
    if depth == DEEPEST {
        return None;
    }
    children(&directory).ok()?.into_iter().find_map(|child| find(root, &format!("{path}/{child}"), cgroup, depth + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ordinary directory tree has what the code needs of a cgroup tree: directories with numbers.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("authd-cgroups-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
        fn make(&self, path: &str) -> u64 {
            let path = self.0.join(path);
            fs::create_dir_all(&path).unwrap();
            fs::metadata(path).unwrap().ino()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// `/agents/a-*` is workload 7, `/db` is workload 3.
    fn classify(path: &str) -> Classification {
        let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
        match parts.as_slice() {
            [] => Classification { workload: 0, open: true, instance: None },
            ["agents"] => Classification { workload: 0, open: true, instance: None },
            ["agents", name, ..] if name.starts_with("a-") => {
                Classification { workload: 7, open: false, instance: Some("/agents/".len() + name.len()) }
            }
            ["db", ..] => Classification { workload: 3, open: false, instance: None },
            _ => Classification { workload: 0, open: false, instance: None },
        }
    }

    #[test]
    fn entries_stop_below_closed_directories() {
        let scratch = Scratch::new("closed");
        let (db, inner) = (scratch.make("db"), scratch.make("db/inner"));
        let mut tree = Tree::new(&scratch.0).unwrap();
        tree.rescan(&classify).unwrap();
        let identities = tree.identities();
        assert_eq!(identities[&db], IdentityEntry { workload: 3, flags: 0, instance: 0 });
        assert!(!identities.contains_key(&inner));
        assert_eq!(tree.path_of(inner).as_deref(), Some("/db/inner"));
    }

    #[test]
    fn a_new_child_of_an_open_directory_is_reported_once() {
        let scratch = Scratch::new("new");
        scratch.make("agents");
        let mut tree = Tree::new(&scratch.0).unwrap();
        tree.rescan(&classify).unwrap();
        let cgroup = scratch.make("agents/a-1");
        let entry = IdentityEntry { workload: 7, flags: 0, instance: cgroup };
        assert_eq!(tree.changes(&classify).unwrap(), [Change::Appeared { cgroup, entry }]);
        assert_eq!(tree.changes(&classify).unwrap(), []);
    }

    #[test]
    fn a_whole_new_subtree_is_seen_although_only_its_top_was_watched() {
        let scratch = Scratch::new("subtree");
        let mut tree = Tree::new(&scratch.0).unwrap();
        tree.rescan(&classify).unwrap();
        let cgroup = scratch.make("agents/a-1");
        let changes = tree.changes(&classify).unwrap();
        let entry = IdentityEntry { workload: 7, flags: 0, instance: cgroup };
        assert!(changes.contains(&Change::Appeared { cgroup, entry }), "{changes:?}");
    }

    #[test]
    fn a_removed_cgroup_goes_and_keeps_its_name() {
        let scratch = Scratch::new("gone");
        let cgroup = scratch.make("agents/a-1");
        let mut tree = Tree::new(&scratch.0).unwrap();
        tree.rescan(&classify).unwrap();
        fs::remove_dir(scratch.0.join("agents/a-1")).unwrap();
        assert_eq!(tree.changes(&classify).unwrap(), [Change::Gone { cgroup }]);
        assert_eq!(tree.path_of(cgroup).as_deref(), Some("/agents/a-1"));
    }
}
