//! Loading the kernel object: programs and maps, new or adopted from pins.
//!
//! Enters: the object that the binary carries, sizes, the directory of pins. Leaves: loaded programs and open maps.
//! Never: attaching.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use authd_common::{
    ABI_VERSION,
    event::Event,
    syn::{LabelKey, NodeKey, NodeKeyId, Speaker, Spoken, Voice},
    tables::{
        ADDRESS_KEY_BYTES, BANKS, Cell, CellKey, Conversation, ConversationKey, Counter, Denial, DenialKey, DropKey,
        Dropped, Flow, FlowKey, Grant, GrantKey, IdentityEntry, IdentityKey, Listener, MAX_WORKLOADS, PORT_SLOTS,
        Permit, PortEntry, Root, Sequence, Slot, Tag, VouchedKey, WorkloadEntry, names, nic,
    },
};
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Array, ArrayOfMaps, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, PerCpuHashMap, RingBuf},
    programs::{Program, ProgramError, ProgramFd},
};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::mapped::MappedArray;

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("AUTHD_EBPF_OBJECT"));

/// Sizes of tables, from the configuration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    pub identities: u32,
    pub addresses: u32,
    pub cells: u32,
    pub conversations: u32,
    pub locals: u32,
    /// Grants that live at one time.
    pub grants: u32,
    /// Flows that interfaces remember.
    pub flows: u32,
    /// Bytes; a power of two.
    pub events: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            identities: 65_536,
            addresses: 131_072,
            cells: 524_288,
            conversations: 65_536,
            locals: 65_536,
            grants: 65_536,
            flows: 65_536,
            events: 1 << 22,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{0} is not on a BPF file system: mount one with `mount -t bpf bpf /sys/fs/bpf`")]
    NotBpffs(PathBuf),
    #[error("{path}: {error}")]
    Pins { path: PathBuf, error: io::Error },
    #[error("the kernel does not take authd's maps: {0}")]
    Object(#[from] aya::EbpfError),
    #[error("the kernel does not take program {name}: {error}")]
    Program { name: String, error: ProgramError },
    #[error("map {name}: {error}")]
    Map { name: &'static str, error: MapError },
    #[error("mapping {name} into memory: {error}")]
    Mapping { name: &'static str, error: io::Error },
}

/// A program that is loaded and waits to be attached.
pub struct Loaded {
    pub name: String,
    pub fd: ProgramFd,
    pub id: u32,
    /// A link without a cgroup.
    pub lsm: bool,
    /// For interfaces, not for a cgroup.
    pub xdp: bool,
    /// Instructions that the verifier walked, where the kernel tells.
    pub verified: Option<u32>,
}

/// A map, and its descriptor for calls that aya has no method for.
pub struct Table<M> {
    pub map: M,
    pub fd: OwnedFd,
}

/// The maps, open.
pub struct Maps {
    pub head: MappedArray<u64>,
    pub roots: Array<MapData, Root>,
    pub identities: Table<HashMap<MapData, IdentityKey, IdentityEntry>>,
    pub workloads: MappedArray<WorkloadEntry>,
    pub addresses: Table<LpmTrie<MapData, [u8; ADDRESS_KEY_BYTES], u32>>,
    pub ports: MappedArray<PortEntry>,
    pub cells: Table<HashMap<MapData, CellKey, Cell>>,
    pub conversations: HashMap<MapData, ConversationKey, Conversation>,
    pub denials: Table<HashMap<MapData, DenialKey, Denial>>,
    pub counters: PerCpuArray<MapData, Counter>,
    pub sequence: PerCpuArray<MapData, Sequence>,
    pub events: RingBuf<MapData>,
    pub barrier: ArrayOfMaps<MapData, Array<MapData, u64>>,
    pub grants: HashMap<MapData, GrantKey, Grant>,
    pub vouched: HashMap<MapData, VouchedKey, Grant>,
    /// Two words each: end, serial number.
    pub slots: MappedArray<u64>,
    /// Five words each, as [`authd_common::tables::Permit`] has them.
    pub permits: MappedArray<u64>,
    pub tags: OwnedFd,
    pub nic: MappedArray<u64>,
    pub listeners: HashMap<MapData, FlowKey, Listener>,
    pub flows: HashMap<MapData, FlowKey, Flow>,
    pub drops: PerCpuHashMap<MapData, DropKey, Dropped>,
    pub other_drops: PerCpuArray<MapData, Dropped>,
    pub nodes: NodeMaps,
}

/// What passes between nodes.
pub struct NodeMaps {
    pub speakers: HashMap<MapData, u32, Speaker>,
    pub keys: HashMap<MapData, NodeKeyId, NodeKey>,
    pub spoken: HashMap<MapData, FlowKey, Spoken>,
    pub addresses: LpmTrie<MapData, [u8; 16], u32>,
    pub voices: HashMap<MapData, u32, Voice>,
    pub labels: HashMap<MapData, LabelKey, u32>,
}

/// What loading gave.
pub struct Object {
    pub programs: Vec<Loaded>,
    /// Optional programs that this kernel refuses, with its reason.
    pub refused: Vec<Refusal>,
    maps: Option<Maps>,
    /// The maps were pinned by an earlier daemon and go on as they are.
    pub adopted: bool,
    ebpf: Ebpf,
}

/// Pinned in each directory of maps; the others are written anew at each start.
const PINNED: &[&str] = &[
    names::HEAD,
    names::ROOTS,
    names::IDENTITIES,
    names::WORKLOADS,
    names::ADDRESSES,
    names::PORTS,
    names::CELLS,
    names::TAGS,
    names::LOCALS,
    names::CONVERSATIONS,
    names::DENIALS,
    names::COUNTERS,
    names::SEQUENCE,
    names::EVENTS,
    names::BARRIER,
    names::GRANTS,
    names::VOUCHED,
    names::SLOTS,
    names::PERMITS,
    names::NIC,
    names::LISTENERS,
    names::FLOWS,
    names::DROPS,
    names::OTHER_DROPS,
    names::SPEAKERS,
    names::NODE_KEYS,
    names::SPOKEN,
    names::NODES,
    names::VOICES,
    names::LABELS,
];

/// Where pins of one layout and size lie below authd's directory.
pub fn maps_directory(pins: &Path, sizes: &Sizes) -> PathBuf {
    pins.join(format!(
        "maps-v{ABI_VERSION}-{}-{}-{}-{}-{}-{}-{}-{}",
        sizes.identities,
        sizes.addresses,
        sizes.cells,
        sizes.conversations,
        sizes.locals,
        sizes.grants,
        sizes.flows,
        sizes.events
    ))
}

/// Which programs are of use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hooks {
    /// Those of cgroups
    Sockets,
    /// And that of interfaces, which takes the verifier nearly as long as all others
    SocketsAndInterfaces,
}

/// Loads maps and programs. Maps pinned with the same layout and sizes are adopted: their contents go on.
pub fn load(pins: &Path, sizes: &Sizes, hooks: Hooks) -> Result<Object, LoadError> {
    let directory = maps_directory(pins, sizes);
    let of_pins = |error| LoadError::Pins { path: directory.clone(), error };
    let parent = pins.parent().unwrap_or(pins);
    mount_bpffs(parent);
    if statfs(parent).map_err(io::Error::from).map_err(of_pins)?.filesystem_type() != BPF_FS_MAGIC {
        return Err(LoadError::NotBpffs(pins.to_owned()));
    }
    // An incomplete set is what a daemon left that was killed while it pinned: nothing is attached to it.
    let complete = PINNED.iter().all(|name| directory.join(name).exists());
    if directory.exists() && !complete {
        remove_directory(&directory).map_err(of_pins)?;
    }
    fs::create_dir_all(&directory).map_err(of_pins)?;

    let mut loader = EbpfLoader::new();
    loader
        .map_max_entries(names::IDENTITIES, sizes.identities)
        .map_max_entries(names::ADDRESSES, sizes.addresses)
        .map_max_entries(names::CELLS, sizes.cells)
        .map_max_entries(names::CONVERSATIONS, sizes.conversations)
        .map_max_entries(names::LOCALS, sizes.locals)
        .map_max_entries(names::GRANTS, sizes.grants)
        .map_max_entries(names::VOUCHED, vouched(sizes))
        .map_max_entries(names::SLOTS, slots(sizes))
        .map_max_entries(names::PERMITS, slots(sizes))
        .map_max_entries(names::FLOWS, sizes.flows)
        .map_max_entries(names::SPOKEN, sizes.flows)
        .map_max_entries(names::EVENTS, sizes.events);
    for name in PINNED {
        loader.map_pin_path(name, directory.join(name));
    }
    let mut ebpf = loader.load(OBJECT)?;
    // Programs first: their instructions hold the numbers of the maps' descriptors, which taking the maps may close.
    let (programs, refused) = load_programs(&mut ebpf, hooks)?;
    let maps = open(&mut ebpf, sizes)?;
    Ok(Object { programs, refused, maps: Some(maps), adopted: complete, ebpf })
}

/// Minimal systems have no BPF file system mounted at its usual place. If mounting fails, the check that follows says so.
fn mount_bpffs(directory: &Path) {
    use nix::mount::{MsFlags, mount};
    let usual = directory == Path::new("/sys/fs/bpf");
    if usual && statfs(directory).is_ok_and(|s| s.filesystem_type() != BPF_FS_MAGIC) {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        let _ = mount(Some("bpf"), directory, Some("bpf"), flags, Some("mode=0700"));
    }
}

impl Object {
    /// The maps, for the writer, who owns them from then on.
    pub fn take_maps(&mut self) -> Maps {
        self.maps.take().unwrap_or_else(|| unreachable!("maps are taken once"))
    }

    /// The interfaces' program, if it was loaded, for those that attach it.
    pub fn take_xdp(&mut self) -> Option<Loaded> {
        let at = self.programs.iter().position(|program| program.xdp)?;
        Some(self.programs.remove(at))
    }

    pub fn program_mut(&mut self, name: &str) -> &mut Program {
        self.ebpf.program_mut(name).unwrap_or_else(|| unreachable!("{name} was loaded"))
    }

    pub fn loaded(&self, name: &str) -> &Loaded {
        self.programs.iter().find(|p| p.name == name).unwrap_or_else(|| unreachable!("{name} was loaded"))
    }

    /// The loader's view of a program, for test runs.
    pub fn program(&self, name: &str) -> Option<&Program> {
        self.ebpf.program(name)
    }
}

/// Removes the maps of other layouts and sizes: nothing that is attached refers to them any more.
pub fn remove_other_maps(pins: &Path, sizes: &Sizes) {
    let own = maps_directory(pins, sizes);
    remove_maps(pins, |directory| directory != own);
}

/// Removes directories of maps.
pub fn remove_maps(pins: &Path, which: impl Fn(&Path) -> bool) {
    let Ok(entries) = fs::read_dir(pins) else { return };
    for path in entries.filter_map(|entry| entry.ok().map(|entry| entry.path())) {
        let is_maps = path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("maps-v"));
        if is_maps && which(&path) {
            // What cannot be removed now is tried again at the next start.
            let _ = remove_directory(&path);
        }
    }
}

/// Removes a directory of pins; on a BPF file system only what authd pinned can be removed.
pub fn remove_directory(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        fs::remove_file(entry?.path())?;
    }
    fs::remove_dir(directory)
}

/// Name and the kernel's reason.
type Refusal = (String, String);

fn load_programs(ebpf: &mut Ebpf, hooks: Hooks) -> Result<(Vec<Loaded>, Vec<Refusal>), LoadError> {
    let (mut loaded, mut refused) = (Vec::new(), Vec::new());
    for (name, program) in ebpf.programs_mut() {
        let failed = |error| LoadError::Program { name: name.to_owned(), error };
        if matches!(program, Program::Xdp(_)) && hooks == Hooks::Sockets {
            continue;
        }
        let result = match program {
            Program::CgroupSkb(p) => p.load(),
            Program::CgroupSock(p) => p.load(),
            Program::CgroupSockAddr(p) => p.load(),
            Program::SockOps(p) => p.load(),
            Program::Xdp(p) => p.load(),
            Program::Lsm(p) => match Btf::from_sys_fs() {
                Ok(btf) => p.load("socket_create", &btf),
                Err(error) => Err(ProgramError::Btf(error)),
            },
            other => unreachable!("the object has no program of type {:?}", other.prog_type()),
        };
        if let Err(error) = result {
            // LSM programs are a backstop that not every kernel admits.
            if matches!(program, Program::Lsm(_)) {
                refused.push((name.to_owned(), one_line(&error)));
                continue;
            }
            return Err(failed(error));
        }
        let (lsm, xdp) = (matches!(program, Program::Lsm(_)), matches!(program, Program::Xdp(_)));
        let fd = program.fd().and_then(|fd| fd.try_clone().map_err(ProgramError::IOError)).map_err(failed)?;
        let info = program.info().map_err(failed)?;
        loaded.push(Loaded {
            name: name.to_owned(),
            fd,
            id: info.id(),
            lsm,
            xdp,
            verified: info.verified_instruction_count(),
        });
    }
    loaded.sort_by(|a, b| a.name.cmp(&b.name));
    Ok((loaded, refused))
}

/// One slot is nobody's.
fn slots(sizes: &Sizes) -> u32 {
    sizes.grants + 1
}

/// A grant may be in several sets, and a policy that is about to be in force has sets of its own.
fn vouched(sizes: &Sizes) -> u32 {
    sizes.grants.saturating_mul(4)
}

fn open(ebpf: &mut Ebpf, sizes: &Sizes) -> Result<Maps, LoadError> {
    Ok(Maps {
        head: mapped(ebpf, names::HEAD, 1)?,
        roots: typed(ebpf, names::ROOTS)?,
        identities: table(ebpf, names::IDENTITIES)?,
        workloads: mapped(ebpf, names::WORKLOADS, (BANKS * MAX_WORKLOADS) as usize)?,
        addresses: table(ebpf, names::ADDRESSES)?,
        ports: mapped(ebpf, names::PORTS, (BANKS * PORT_SLOTS) as usize)?,
        cells: table(ebpf, names::CELLS)?,
        conversations: typed(ebpf, names::CONVERSATIONS)?,
        denials: table(ebpf, names::DENIALS)?,
        counters: typed(ebpf, names::COUNTERS)?,
        sequence: typed(ebpf, names::SEQUENCE)?,
        events: typed(ebpf, names::EVENTS)?,
        barrier: typed(ebpf, names::BARRIER)?,
        grants: typed(ebpf, names::GRANTS)?,
        vouched: typed(ebpf, names::VOUCHED)?,
        slots: mapped(ebpf, names::SLOTS, slots(sizes) as usize * (size_of::<Slot>() / size_of::<u64>()))?,
        permits: mapped(ebpf, names::PERMITS, slots(sizes) as usize * (size_of::<Permit>() / size_of::<u64>()))?,
        tags: descriptor(&take(ebpf, names::TAGS)).map_err(|error| LoadError::Mapping { name: names::TAGS, error })?,
        nic: mapped(ebpf, names::NIC, nic::WORDS as usize)?,
        listeners: typed(ebpf, names::LISTENERS)?,
        flows: typed(ebpf, names::FLOWS)?,
        drops: typed(ebpf, names::DROPS)?,
        other_drops: typed(ebpf, names::OTHER_DROPS)?,
        nodes: NodeMaps {
            speakers: typed(ebpf, names::SPEAKERS)?,
            keys: typed(ebpf, names::NODE_KEYS)?,
            spoken: typed(ebpf, names::SPOKEN)?,
            addresses: typed(ebpf, names::NODES)?,
            voices: typed(ebpf, names::VOICES)?,
            labels: typed(ebpf, names::LABELS)?,
        },
    })
}

fn take(ebpf: &mut Ebpf, name: &'static str) -> Map {
    ebpf.take_map(name).unwrap_or_else(|| unreachable!("the object has a map {name}"))
}

fn typed<T: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, LoadError> {
    T::try_from(take(ebpf, name)).map_err(|error| LoadError::Map { name, error })
}

fn table<T: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<Table<T>, LoadError> {
    let map = take(ebpf, name);
    let fd = descriptor(&map).map_err(|error| LoadError::Mapping { name, error })?;
    Ok(Table { map: T::try_from(map).map_err(|error| LoadError::Map { name, error })?, fd })
}

fn mapped<T: aya::Pod>(ebpf: &mut Ebpf, name: &'static str, length: usize) -> Result<MappedArray<T>, LoadError> {
    let failed = |error| LoadError::Mapping { name, error };
    MappedArray::new(descriptor(&take(ebpf, name)).map_err(failed)?, length).map_err(failed)
}

fn descriptor(map: &Map) -> io::Result<OwnedFd> {
    match map {
        Map::Array(data) | Map::HashMap(data) | Map::LruHashMap(data) | Map::LpmTrie(data) | Map::SkStorage(data) => {
            data.fd().as_fd().try_clone_to_owned()
        }
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

fn one_line(error: &ProgramError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// A tag, from the bytes of a socket's storage.
pub fn tag(bytes: &[u8]) -> Option<Tag> {
    if bytes.len() != size_of::<Tag>() {
        return None;
    }
    // SAFETY: the size was compared, and `Tag` is plain data without padding: every bit pattern is a value.
    Some(unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) })
}

/// An event, from the bytes of the ring. `None` if they have another size: another layout, which the ABI number rules out.
pub fn event(bytes: &[u8]) -> Option<Event> {
    if bytes.len() != size_of::<Event>() {
        return None;
    }
    // SAFETY: the size was compared, and `Event` is plain data without padding: every bit pattern is a value.
    Some(unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) })
}
