//! From the model to an image: equivalence classes, and one cell for each combination of classes that rules tell apart.
//!
//! Enters: a model, numbers, a moment. Leaves: an [`Image`], and numbers for its sets of rules; or what does not fit. Never: kernel
//! objects.
//!
//! A rule covers, for each service that it names, the service's address classes times its port classes; `any` covers all
//! of both. Three kinds of outbound cells result: exact in both coordinates, exact in the address, exact in none. A look-up
//! takes the first of them that is there. So a cell has to account for every rule that covers its coordinates, and where a
//! rule of `any` subject is more exact than a workload's own, the workload gets a cell of its own at that place.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use authd_common::{
    reason::Reason,
    tables::{
        ADDRESS_CLASS_OTHER, ALTERNATIVES, ANY_CLASS, ANY_PORT_CLASS, Cell, CellKey, MAX_WORKLOADS, NO_RULE,
        PORT_SLOTS, Phase, PortEntry, WorkloadEntry, path, phase_flags, port_flags, port_slot, root_flags,
        workload_flags,
    },
    tables::{IPPROTO_TCP, IPPROTO_UDP, UNMANAGED},
    verdict::Action,
};
use jiff::Timestamp;

use super::{
    image::{Image, Sets},
    model::{Model, Object, Rule, Service, Subject, Workload},
    network::{Network, Ports},
    numbers::Numbers,
};

/// The same instant on the clock of people and on the kernel's.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    pub wall: Timestamp,
    /// ns of the coarse monotonic clock.
    pub monotonic: u64,
}

/// What holds whatever the policy says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Ports that stay reachable, (protocol, port).
    pub failsafe: Vec<(u8, u16)>,
    /// Whether loopback DNS and DHCP are allowed unless a rule denies them.
    pub builtin_rules: bool,
    /// Whether interfaces are guarded: sockets then write down what is needed there.
    pub interfaces: bool,
}

impl Default for Options {
    /// SSH, and authd's own control port.
    fn default() -> Self {
        Self { failsafe: vec![(IPPROTO_TCP, 22), (IPPROTO_TCP, 7443)], builtin_rules: true, interfaces: false }
    }
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CompileError {
    #[error("services tell {0} kinds of ports apart, and tables have room for {max}: merge services", max = ANY_PORT_CLASS - 1)]
    PortClasses(usize),
    #[error("the policy has had {0} workloads lately, and tables have room for {max}", max = MAX_WORKLOADS - 1)]
    Workloads(usize),
    #[error(
        "rules {} ask for different proofs for the same flows, and a flow may have {ALTERNATIVES} such alternatives: \
         merge rules",
        .0.join(", ")
    )]
    Alternatives(Vec<String>),
}

/// Names and their numbers, as records and tables carry them.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Registry {
    pub workloads: Numbers,
    pub rules: Numbers,
    #[serde(default)]
    pub nodes: Numbers,
    /// Sets of rules that take the word of other nodes, by the names of their rules.
    #[serde(default)]
    sets: Numbers,
}

impl Registry {
    /// Gives every name of the model its number.
    pub fn assign(&mut self, model: &Model, options: &Options) {
        self.workloads.assign(model.workloads.iter().map(|w| w.name.as_str()));
        self.nodes.assign(model.nodes.iter().map(|n| n.name.as_str()));
        let builtin = Builtin::new(options);
        let rules = model.rules.iter().chain(&builtin.rules).map(|r| r.name.as_str());
        self.rules.assign(rules);
    }
}

/// Gives the sets of rules that cells need their numbers, too: they are known only here.
pub fn compile(model: &Model, registry: &mut Registry, options: &Options, at: Moment) -> Result<Image, CompileError> {
    if registry.workloads.end() > MAX_WORKLOADS as usize {
        return Err(CompileError::Workloads(registry.workloads.end() - 1));
    }
    let builtin = Builtin::new(options);
    let services: Vec<&Service> = model.services.iter().chain(&builtin.services).collect();
    // A built-in rule names built-in services by their place behind the model's own.
    let rules: Vec<Rule> = model.rules.iter().cloned().chain(builtin.rules_behind(model.services.len())).collect();
    let addresses = AddressClasses::new(model, &services);
    let ports = PortClasses::new(&services, options)?;
    let subjects = Subjects::new(model, &rules);
    let workloads = WorkloadClasses::new(model, &services, &subjects);
    let mut cells = Cells {
        rules: &rules,
        registry,
        at,
        made: BTreeMap::new(),
        known: HashMap::new(),
        sets: Vec::new(),
        next: None,
        too_many: None,
    };
    for (class, members) in workloads.members.iter().enumerate() {
        let Some(&workload) = members.first() else { continue };
        let own = &subjects.of_workload[workload];
        cells.outbound(class as u32 + 1, own, &subjects.any, &services, &addresses, &ports);
        cells.inbound(class as u32 + 1, workload, model, &services, &addresses, &ports, &workloads);
    }
    cells.outbound(ANY_CLASS, &[], &subjects.any, &services, &addresses, &ports);
    let Cells { mut made, sets, next, too_many, .. } = cells;
    if let Some(rules) = too_many {
        return Err(CompileError::Alternatives(rules));
    }
    let sets = number_sets(&mut made, &sets, registry);
    let mut entries = vec![WorkloadEntry::default(); registry.workloads.end()];
    for (index, workload) in model.workloads.iter().enumerate() {
        if let Some(number) = registry.workloads.number(&workload.name) {
            entries[number as usize] = WorkloadEntry { class: workloads.class[index], flags: flags_of(workload) };
        }
    }
    let hears = rules.iter().any(Rule::is_vouched);
    let speaks = model.nodes.iter().any(|node| node.address.is_some());
    Ok(Image {
        flags: flag(model.observe, root_flags::OBSERVE)
            | flag(options.interfaces, root_flags::NIC)
            | flag(hears, root_flags::HEARS)
            | flag(speaks, root_flags::SPEAKS),
        workloads: entries,
        addresses: addresses.prefixes,
        ports: ports.entries,
        sets,
        next_boundary: next,
        cells: made,
    })
}

/// Cells name sets by their place, from 1; from now on by their number, which stays with the same rules.
fn number_sets(cells: &mut BTreeMap<CellKey, Cell>, sets: &[Vec<u32>], registry: &mut Registry) -> Sets {
    let names: Vec<String> = sets
        .iter()
        .map(|rules| rules.iter().filter_map(|rule| registry.rules.name(*rule)).collect::<Vec<_>>().join(" "))
        .collect();
    registry.sets.assign(names.iter().map(String::as_str));
    let numbers: Vec<u32> = names.iter().map(|name| registry.sets.number(name).unwrap_or_default()).collect();
    for phase in cells.values_mut().flat_map(|cell| [&mut cell.first, &mut cell.second]) {
        if let Some(place) = phase.vouched.checked_sub(1) {
            phase.vouched = numbers.get(place as usize).copied().unwrap_or_default();
        }
    }
    numbers.into_iter().zip(sets.iter().cloned()).collect()
}

fn flag(on: bool, flag: u32) -> u32 {
    if on { flag } else { 0 }
}

fn flags_of(workload: &Workload) -> u32 {
    workload_flags::PRESENT
        | flag(workload.observe, workload_flags::OBSERVE)
        | flag(workload.raw_sockets, workload_flags::RAW_SOCKETS)
        | flag(workload.closed, workload_flags::CLOSED)
        | flag(workload.has_failsafe(), workload_flags::FAILSAFE)
}

/// Rules that every policy has: without them a first policy would cut its workloads off from names and leases.
pub struct Builtin {
    pub services: Vec<Service>,
    /// Their objects count from the first built-in service.
    pub rules: Vec<Rule>,
}

impl Builtin {
    pub fn new(options: &Options) -> Self {
        let (mut services, mut rules) = (Vec::new(), Vec::new());
        if options.builtin_rules {
            let dns = [Ports::Tcp { first: 53, last: 53 }, Ports::Udp { first: 53, last: 53 }];
            // Broadcast and link-local multicast only: a lease never needs more, and nothing leaves the link by them.
            let dhcp = [Ports::Udp { first: 67, last: 67 }, Ports::Udp { first: 547, last: 547 }];
            for (name, networks, ports) in [
                ("builtin/loopback-dns", ["127.0.0.0/8", "::1"], dns),
                ("builtin/dhcp", ["255.255.255.255", "ff02::1:2"], dhcp),
            ] {
                let networks = networks.iter().filter_map(|n| Network::parse(n).ok()).collect();
                rules.push(Rule::builtin(name, Object::Service(services.len())));
                services.push(Service::builtin(name, networks, ports.to_vec()));
            }
        }
        Self { services, rules }
    }

    fn rules_behind(&self, services: usize) -> Vec<Rule> {
        let shift = |object: &Object| match object {
            Object::Service(index) => Object::Service(index + services),
            Object::Any => Object::Any,
        };
        self.rules.iter().map(|rule| Rule { to: rule.to.iter().map(shift).collect(), ..rule.clone() }).collect()
    }
}

/// Which rules name whom.
struct Subjects {
    of_workload: Vec<Vec<usize>>,
    any: Vec<usize>,
    of_service: HashMap<usize, Vec<usize>>,
    to_any: Vec<usize>,
}

impl Subjects {
    fn new(model: &Model, rules: &[Rule]) -> Self {
        let mut subjects = Self {
            of_workload: vec![Vec::new(); model.workloads.len()],
            any: Vec::new(),
            of_service: HashMap::new(),
            to_any: Vec::new(),
        };
        for (index, rule) in rules.iter().enumerate() {
            for subject in &rule.from {
                match subject {
                    Subject::Any => subjects.any.push(index),
                    Subject::Workload(workload) => subjects.of_workload[*workload].push(index),
                    Subject::Unmanaged | Subject::Peer(_) => {}
                }
            }
            for object in &rule.to {
                match object {
                    Object::Any => subjects.to_any.push(index),
                    Object::Service(service) => subjects.of_service.entry(*service).or_default().push(index),
                }
            }
        }
        subjects
    }
}

/// Addresses that the same services and peers contain.
struct AddressClasses {
    prefixes: BTreeMap<(authd_common::address::Address, u8), u32>,
    of_service: Vec<Vec<u32>>,
    of_peer: Vec<Vec<u32>>,
    /// Peers of each class.
    peers: HashMap<u32, Vec<usize>>,
}

impl AddressClasses {
    fn new(model: &Model, services: &[&Service]) -> Self {
        let mut owners: BTreeMap<Network, Vec<usize>> = BTreeMap::new();
        for (index, service) in services.iter().enumerate() {
            for network in &service.networks {
                owners.entry(*network).or_default().push(index);
            }
        }
        for (index, peer) in model.peers.iter().enumerate() {
            for network in &peer.networks {
                owners.entry(*network).or_default().push(services.len() + index);
            }
        }
        // IPv4 lies inside IPv6 in the table, and is no part of it: nothing is inherited across this prefix.
        if owners.keys().any(|network| !network.is_v4()) {
            owners.entry(Network::ALL_V4).or_default();
        }
        let mut sets: HashMap<Vec<usize>, u32> = HashMap::from([(Vec::new(), ADDRESS_CLASS_OTHER)]);
        let mut prefixes = BTreeMap::new();
        // The prefixes that contain the present one, outermost first: a network sorts right before what it contains.
        let mut around: Vec<(Network, Vec<usize>)> = Vec::new();
        for (network, own) in owners {
            let contains = |outer: &Network| {
                outer.bits <= network.bits && super::network::masked(&network.address, outer.bits) == outer.address
            };
            while around.last().is_some_and(|(outer, _)| !contains(outer)) {
                around.pop();
            }
            let inherited = match around.last() {
                Some((outer, set)) if outer.is_v4() == network.is_v4() => set.clone(),
                _ => Vec::new(),
            };
            let set: Vec<usize> = inherited.into_iter().chain(own).collect::<BTreeSet<_>>().into_iter().collect();
            let next = sets.len() as u32;
            let class = *sets.entry(set.clone()).or_insert(next);
            prefixes.insert((network.address, network.bits), class);
            around.push((network, set));
        }
        let mut classes = Self {
            prefixes,
            of_service: vec![Vec::new(); services.len()],
            of_peer: vec![Vec::new(); model.peers.len()],
            peers: HashMap::new(),
        };
        for (set, class) in sets {
            for owner in set {
                match owner.checked_sub(services.len()) {
                    None => classes.of_service[owner].push(class),
                    Some(peer) => {
                        classes.of_peer[peer].push(class);
                        classes.peers.entry(class).or_default().push(peer);
                    }
                }
            }
        }
        classes
    }
}

/// Ports that the same services name.
struct PortClasses {
    entries: BTreeMap<u32, PortEntry>,
    /// Classes that a service names; empty for one that has every port.
    of_service: Vec<BTreeSet<u16>>,
    /// Services with every port.
    every: Vec<bool>,
}

impl PortClasses {
    fn new(services: &[&Service], options: &Options) -> Result<Self, CompileError> {
        let mut starts: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        let mut ends: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        let mut every = vec![false; services.len()];
        for (index, service) in services.iter().enumerate() {
            every[index] = service.ports.contains(&Ports::Any);
            for ports in &service.ports {
                let (first, last) = match *ports {
                    Ports::Tcp { first, last } => (port_slot(IPPROTO_TCP, first), port_slot(IPPROTO_TCP, last)),
                    Ports::Udp { first, last } => (port_slot(IPPROTO_UDP, first), port_slot(IPPROTO_UDP, last)),
                    Ports::Other(protocol) => (port_slot(protocol, 0), port_slot(protocol, 0)),
                    Ports::Any => continue,
                };
                starts.entry(first).or_default().push(index);
                ends.entry(last + 1).or_default().push(index);
            }
        }
        let all_guarded = services.iter().any(|s| s.workload.is_some() && s.ports.contains(&Ports::Any));
        let failsafe: BTreeSet<u32> =
            options.failsafe.iter().map(|(protocol, port)| port_slot(*protocol, *port)).collect();
        let mut sets: HashMap<Vec<usize>, u16> = HashMap::from([(Vec::new(), 0)]);
        let mut of_service = vec![BTreeSet::new(); services.len()];
        let mut entries = BTreeMap::new();
        // A service may name a port twice, so that its ranges are counted.
        let mut active: BTreeMap<usize, usize> = BTreeMap::new();
        let mut class = 0;
        // Slots at which something changes; between two of them all are alike.
        let mut edges: BTreeSet<u32> = starts.keys().chain(ends.keys()).copied().collect();
        edges.extend(failsafe.iter().flat_map(|slot| [*slot, slot + 1]));
        edges.extend([0, PORT_SLOTS]);
        let edges: Vec<u32> = edges.into_iter().collect();
        for (slot, end) in edges.iter().copied().zip(edges.iter().skip(1).copied()) {
            let (started, ended) = (starts.get(&slot), ends.get(&slot));
            if started.is_some() || ended.is_some() {
                for service in ended.into_iter().flatten() {
                    match active.get_mut(service) {
                        Some(count) if *count > 1 => *count -= 1,
                        _ => drop(active.remove(service)),
                    }
                }
                for service in started.into_iter().flatten() {
                    *active.entry(*service).or_default() += 1;
                }
                let set: Vec<usize> = active.keys().copied().collect();
                if sets.len() >= ANY_PORT_CLASS as usize && !sets.contains_key(&set) {
                    return Err(CompileError::PortClasses(sets.len()));
                }
                let next = sets.len() as u16;
                class = *sets.entry(set).or_insert(next);
                for service in active.keys() {
                    of_service[*service].insert(class);
                }
            }
            let guarded = all_guarded || active.keys().any(|s| services[*s].workload.is_some());
            let mut flags = if guarded { port_flags::GUARDED } else { 0 };
            if failsafe.contains(&slot) {
                flags |= port_flags::FAILSAFE;
            }
            if class != 0 || flags != 0 {
                entries.extend((slot..end).map(|slot| (slot, PortEntry { class, flags, reserved: 0 })));
            }
        }
        Ok(Self { entries, of_service, every })
    }

    /// Port classes of a service's cells.
    fn of(&self, service: usize) -> Vec<u16> {
        let own = self.of_service[service].iter().copied();
        own.chain(self.every[service].then_some(ANY_PORT_CLASS)).collect()
    }
}

/// Workloads that the same rules name and that guard the same services.
struct WorkloadClasses {
    /// By index of the workload, from 1.
    class: Vec<u32>,
    members: Vec<Vec<usize>>,
    /// Services that a workload guards.
    guards: Vec<Vec<usize>>,
}

impl WorkloadClasses {
    fn new(model: &Model, services: &[&Service], subjects: &Subjects) -> Self {
        let mut guards = vec![Vec::new(); model.workloads.len()];
        for (index, service) in services.iter().enumerate() {
            if let Some(workload) = service.workload {
                guards[workload].push(index);
            }
        }
        let mut known: HashMap<(&[usize], &[usize]), u32> = HashMap::new();
        let (mut class, mut members) = (Vec::new(), Vec::new());
        for (index, (rules, guarded)) in subjects.of_workload.iter().zip(&guards).enumerate() {
            let next = known.len() as u32 + 1;
            let own = *known.entry((rules, guarded)).or_insert(next);
            if own == next {
                members.push(Vec::new());
            }
            members[own as usize - 1].push(index);
            class.push(own);
        }
        Self { class, members, guards }
    }
}

/// The cells, as they are made.
struct Cells<'a> {
    rules: &'a [Rule],
    registry: &'a Registry,
    at: Moment,
    made: BTreeMap<CellKey, Cell>,
    known: HashMap<(Vec<usize>, bool), Cell>,
    /// Sets of rules that take the word of other nodes, in the order in which cells came to need them.
    sets: Vec<Vec<u32>>,
    next: Option<Timestamp>,
    /// Names of rules that are too many for one cell.
    too_many: Option<Vec<String>>,
}

/// Object and port of an outbound cell.
type Spot = (u32, u16);
const EVERYWHERE: Spot = (ANY_CLASS, ANY_PORT_CLASS);

impl Cells<'_> {
    /// What a class of workloads (or every one) may open.
    fn outbound(
        &mut self,
        subject: u32,
        own: &[usize],
        any: &[usize],
        services: &[&Service],
        addresses: &AddressClasses,
        ports: &PortClasses,
    ) {
        let by_own = self.spots(own, services, addresses, ports);
        let by_any = self.spots(any, services, addresses, ports);
        let mut spots: BTreeSet<Spot> = by_own.keys().copied().collect();
        let broad = |spot: &Spot| by_own.contains_key(&EVERYWHERE) || by_own.contains_key(&(spot.0, ANY_PORT_CLASS));
        spots.extend(by_any.keys().filter(|spot| subject == ANY_CLASS || broad(spot)));
        for (object, port) in spots {
            let covering = [(object, port), (object, ANY_PORT_CLASS), EVERYWHERE];
            let rules = covering.iter().flat_map(|spot| by_own.get(spot).into_iter().chain(by_any.get(spot))).flatten();
            let key = CellKey { epoch: 0, subject, object, port, path: path::OUT, reserved: 0 };
            self.put(key, rules.copied().collect(), true);
        }
    }

    /// Where rules apply outbound.
    fn spots(
        &self,
        rules: &[usize],
        services: &[&Service],
        addresses: &AddressClasses,
        ports: &PortClasses,
    ) -> BTreeMap<Spot, Vec<usize>> {
        let mut spots: BTreeMap<Spot, Vec<usize>> = BTreeMap::new();
        for &rule in rules {
            for object in &self.rules[rule].to {
                match object {
                    Object::Any => spots.entry(EVERYWHERE).or_default().push(rule),
                    Object::Service(service) => {
                        debug_assert!(*service < services.len());
                        for &address in &addresses.of_service[*service] {
                            for port in ports.of(*service) {
                                spots.entry((address, port)).or_default().push(rule);
                            }
                        }
                    }
                }
            }
        }
        spots
    }

    /// Who may call what a class of workloads guards.
    #[expect(clippy::too_many_arguments, reason = "each is one table of the policy; a struct would only rename them")]
    fn inbound(
        &mut self,
        class: u32,
        workload: usize,
        model: &Model,
        services: &[&Service],
        addresses: &AddressClasses,
        ports: &PortClasses,
        workloads: &WorkloadClasses,
    ) {
        let guarded = &workloads.guards[workload];
        let at: BTreeSet<u16> = guarded.iter().flat_map(|service| ports.of(*service)).collect();
        for port in at {
            let here: BTreeSet<usize> =
                guarded.iter().copied().filter(|s| ports.every[*s] || ports.of_service[*s].contains(&port)).collect();
            debug_assert!(here.iter().all(|s| services[*s].workload.is_some()));
            let guard = CellKey { epoch: 0, subject: 0, object: class, port, path: path::GUARD, reserved: 0 };
            self.made.insert(guard, Cell::default());
            let applies = |rule: &Rule| {
                rule.to.iter().any(|object| match object {
                    Object::Any => true,
                    Object::Service(service) => here.contains(service),
                })
            };
            let (mut base, mut base_remote) = (Vec::new(), Vec::new());
            let mut local: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
            let mut remote: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
            for (index, rule) in self.rules.iter().enumerate().filter(|(_, rule)| applies(rule)) {
                for subject in &rule.from {
                    match *subject {
                        Subject::Any => base.push(index),
                        Subject::Unmanaged => local.entry(UNMANAGED).or_default().push(index),
                        Subject::Workload(caller) => local.entry(workloads.class[caller]).or_default().push(index),
                        // Known by its certificate alone: it may call from anywhere, and shows it first.
                        Subject::Peer(peer) if addresses.of_peer[peer].is_empty() => base_remote.push(index),
                        Subject::Peer(peer) => {
                            for &address in &addresses.of_peer[peer] {
                                remote.entry(address).or_default().push(index);
                            }
                        }
                    }
                }
            }
            debug_assert!(remote.keys().all(|address| addresses.peers.contains_key(address)));
            debug_assert!(model.workloads.len() == workloads.class.len());
            for (path, subjects) in [(path::IN_LOCAL, local), (path::IN_REMOTE, remote)] {
                let attested = path == path::IN_LOCAL;
                if !attested {
                    base.append(&mut base_remote);
                }
                for (subject, own) in subjects {
                    let key = CellKey { epoch: 0, subject, object: class, port, path, reserved: 0 };
                    self.put(key, own.into_iter().chain(base.iter().copied()).collect(), attested);
                }
                let key = CellKey { epoch: 0, subject: ANY_CLASS, object: class, port, path, reserved: 0 };
                self.put(key, base.iter().copied().collect(), attested);
            }
        }
    }

    fn put(&mut self, key: CellKey, rules: BTreeSet<usize>, attested: bool) {
        if rules.is_empty() {
            return;
        }
        let rules: Vec<usize> = rules.into_iter().collect();
        let cell = match self.known.get(&(rules.clone(), attested)) {
            Some(cell) => *cell,
            None => {
                let cell = self.cell(&rules, attested);
                self.known.insert((rules, attested), cell);
                cell
            }
        };
        self.made.insert(key, cell);
    }

    /// The verdict now and, where schedules are involved, the next one.
    fn cell(&mut self, rules: &[usize], attested: bool) -> Cell {
        let change = |after: Timestamp| {
            let schedules = rules.iter().filter_map(|rule| self.rules[*rule].when.as_ref());
            schedules.filter_map(|schedule| schedule.next_change(after)).min()
        };
        let first = self.phase(rules, attested, self.at.wall);
        let Some(end) = change(self.at.wall) else { return Cell { first, ..Cell::default() } };
        let second = self.phase(rules, attested, end);
        let second_end = change(end);
        self.next = Some(self.next.map_or(end, |next| next.min(end)));
        Cell {
            first,
            second,
            first_until: self.monotonic(end),
            second_until: second_end.map_or(0, |end| self.monotonic(end)),
        }
    }

    fn monotonic(&self, at: Timestamp) -> u64 {
        let ahead = (at.as_nanosecond() - self.at.wall.as_nanosecond()).max(0);
        self.at.monotonic.saturating_add(u64::try_from(ahead).unwrap_or(u64::MAX)).max(1)
    }

    fn phase(&mut self, rules: &[usize], attested: bool, at: Timestamp) -> Phase {
        let in_force = rules.iter().map(|index| &self.rules[*index]).filter(|rule| is_in_force(rule, at));
        let combined = combine(in_force, attested);
        let number = |rule: &Rule| self.registry.rules.number(&rule.name).unwrap_or(NO_RULE);
        let mut phase = Phase {
            rule: combined.rule.map_or(NO_RULE, number),
            reason: combined.reason.code(),
            action: combined.action.code(),
            watched_by: combined.watch.map_or(NO_RULE, number),
            ..Phase::default()
        };
        let (vouched, shown): (Vec<&Rule>, Vec<&Rule>) = combined.open_to.iter().partition(|rule| rule.is_vouched());
        if shown.len() > ALTERNATIVES {
            self.too_many.get_or_insert_with(|| shown.iter().map(|rule| rule.name.clone()).collect());
        }
        for (place, rule) in phase.granted_by.iter_mut().zip(shown) {
            *place = number(rule);
        }
        if vouched.iter().any(|rule| !rule.is_given_by_word()) {
            phase.flags |= phase_flags::ASKS_MORE;
        }
        if !vouched.is_empty() {
            let set: Vec<u32> = vouched.into_iter().map(number).collect();
            let place = self.sets.iter().position(|known| *known == set).unwrap_or_else(|| {
                self.sets.push(set);
                self.sets.len() - 1
            });
            phase.vouched = place as u32 + 1;
        }
        if combined.open_to.iter().any(|rule| rule.hold) {
            phase.flags |= phase_flags::HOLD;
        }
        phase
    }
}

pub fn is_in_force(rule: &Rule, at: Timestamp) -> bool {
    rule.when.as_ref().is_none_or(|schedule| schedule.contains(at))
}

/// What rules that cover the same flow say together.
pub struct Combined<'a> {
    pub action: Action,
    pub reason: Reason,
    pub rule: Option<&'a Rule>,
    /// If proofs are what lacks: rules whose grants let the flow pass.
    pub open_to: Vec<&'a Rule>,
    /// The observed denial that turns what a grant lets pass into something observed.
    pub watch: Option<&'a Rule>,
}

/// Combines rules, in the order in which they are named.
///
/// Rules add up, and a denial wins. A denial that is only observed turns what would pass into something observed; a rule
/// that is only observed lets pass, on record, whoever lacks its proofs.
pub fn combine<'a>(rules: impl Iterator<Item = &'a Rule>, attested: bool) -> Combined<'a> {
    let (mut denies, mut watches, mut allows, mut unmet, mut unmet_watched) = (None, None, None, None, None);
    let mut open_to = Vec::new();
    for rule in rules {
        let slot = match (rule.deny, rule.observe) {
            (true, false) => &mut denies,
            (true, true) => &mut watches,
            (false, _) if rule.is_met_by(attested) => &mut allows,
            (false, false) => &mut unmet,
            (false, true) => &mut unmet_watched,
        };
        if slot.is_none() {
            *slot = Some(rule);
        }
        // No other node vouches for callers of this one.
        if if rule.is_vouched() { !attested } else { rule.is_grantable() || attested && rule.is_permitted() } {
            open_to.push(rule);
        }
    }
    let (action, reason, rule) = match (denies, watches, allows, unmet_watched, unmet) {
        (Some(rule), ..) => (Action::Deny, Reason::DeniedByRule, Some(rule)),
        (None, Some(rule), Some(_), ..) | (None, Some(rule), None, Some(_), _) => {
            (Action::Observe, Reason::DeniedByRule, Some(rule))
        }
        (None, None, Some(rule), ..) => (Action::Allow, Reason::Rule, Some(rule)),
        (None, None, None, Some(rule), _) => (Action::Observe, Reason::ProofRequired, Some(rule)),
        (None, _, None, None, Some(rule)) => (Action::Deny, Reason::ProofRequired, Some(rule)),
        (None, _, None, None, None) => (Action::Deny, Reason::NoRule, None),
    };
    let (open_to, watch) = if reason == Reason::ProofRequired { (open_to, watches) } else { (Vec::new(), None) };
    Combined { action, reason, rule, open_to, watch }
}
