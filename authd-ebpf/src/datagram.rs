//! Everything but TCP: one conversation per socket and remote end.

use authd_common::{
    address::Address,
    event::{direction, kind},
    reason::Reason,
    tables::{
        Conversation, ConversationKey, Grant, IPPROTO_UDP, NO_RULE, Root, Tables, Tag, UNMANAGED, port_flags, role,
        tag_flags,
    },
    verdict::{Action, FarEnd, Opener, Verdict, decide_packet_out},
};

use crate::{
    caller::{far_end, known_now, local_key},
    emit::{self, Draft, Refused, Task},
    judge, listeners,
    maps::{self, Kernel},
    packet::{LOOPBACK, Scene},
    permits, raw, stream, tag,
};

/// A packet that leaves.
#[inline(never)]
pub fn leaves(scene: &Scene, tag: &mut Tag) -> Action {
    let (root, packet) = (&scene.root, &scene.packet);
    let key = key_of(scene.skb.cookie(), packet.destination, packet.destination_port, packet.protocol);
    if packet.protocol == IPPROTO_UDP && scene.skb.interface() == LOOPBACK {
        write_down(scene, tag);
    }
    let known = maps::conversation(&key).map(raw::value);
    if let Some(c) = &known
        && is_current(c, root)
    {
        return account(known, scene);
    }
    let mut verdict = Verdict::deny(Reason::Undecided);
    let passes = if matches!(&known, Some(c) if c.role == role::SERVER) {
        let far = remembered_far_end(&known, root, &packet.destination, tag.netns);
        judge::inbound(scene, &far, &mut verdict)
    } else {
        judge::outbound(scene, &mut verdict) && on_permit(scene, &known, &mut verdict)
    };
    if let Some(c) = known {
        renew(c, scene, &verdict, &key);
        return account(Some(c), scene);
    }
    let far = FarEnd::default();
    if passes { begin(&key, scene, tag, &verdict, &far) } else { refuse(scene, tag, &verdict, &far) }
}

/// A packet that arrives.
#[inline(never)]
pub fn arrives(scene: &Scene, tag: &mut Tag) -> Action {
    let (root, packet) = (&scene.root, &scene.packet);
    let key = key_of(scene.skb.cookie(), packet.source, packet.source_port, packet.protocol);
    let known = maps::conversation(&key).map(raw::value);
    if let Some(c) = &known
        // A local caller is looked at again with every packet: another process may have taken its port.
        && (c.role == role::CLIENT || c.flags & tag_flags::PEER_LOCAL == 0)
        && is_current(c, root)
    {
        return account(known, scene);
    }
    let client = matches!(&known, Some(c) if c.role == role::CLIENT);
    if !client && packet.protocol != IPPROTO_UDP {
        // Without ports there is nobody to tell a call from an answer. It passes, and opens nothing the other way.
        return Action::Allow;
    }
    let mut far = FarEnd::remote(packet.source, tag.netns);
    let mut verdict = Verdict::deny(Reason::Undecided);
    let passes = if client {
        judge::outbound(scene, &mut verdict) && on_permit(scene, &known, &mut verdict)
    } else {
        listeners::note_listener(scene, tag);
        far_end(scene, tag, &mut far);
        judge::inbound(scene, &far, &mut verdict)
    };
    if let Some(c) = known {
        if !client {
            note_peer(c, &far);
        }
        renew(c, scene, &verdict, &key);
        return account(Some(c), scene);
    }
    if passes { begin(&key, scene, tag, &verdict, &far) } else { refuse(scene, tag, &verdict, &far) }
}

/// Whether a socket may send to a remote end that called it first.
#[inline(always)]
pub fn answers(cookie: u64, remote: &Address, remote_port: u16, root: &Root) -> bool {
    match maps::conversation(&key_of(cookie, *remote, remote_port, IPPROTO_UDP)).map(raw::value) {
        // One that must be decided anew is decided by the packet hook.
        Some(c) => c.role == role::SERVER && (!is_current(c, root) || Action::from_code(c.action).passes()),
        None => false,
    }
}

/// On loopback the receiver learns the sender from this entry. Only guarded ports are worth one.
#[inline(never)]
pub fn write_down(scene: &Scene, tag: &Tag) {
    let packet = &scene.packet;
    if Kernel.port(&scene.root, packet.protocol, packet.destination_port).flags & port_flags::GUARDED == 0 {
        return;
    }
    let key = local_key(
        tag.netns,
        packet.source,
        packet.source_port,
        packet.destination,
        packet.destination_port,
        packet.protocol,
    );
    if !scene.who.is_managed() {
        maps::remove_local(&key);
        return;
    }
    let entry = scene.sender(tag.pid);
    if maps::local(&key) != Some(entry) {
        maps::set_local(&key, &entry);
    }
}

/// A packet whose headers cannot be trusted: its addresses are not told, they may be made up.
#[inline(never)]
pub fn refuse_unsound(scene: &Scene, tag: &Tag, reason: Reason) -> Action {
    let (root, who) = (&scene.root, &scene.who);
    let opener = Opener { workload: who.workload, instance: who.instance };
    let verdict = decide_packet_out(&Kernel, root, &opener, &Err(reason));
    let refused = Refused {
        cgroup: who.cgroup,
        peer_cgroup: 0,
        workload: who.workload,
        peer_workload: UNMANAGED,
        generation: root.generation,
        remote: Address::UNSPECIFIED,
        local_port: 0,
        remote_port: 0,
        protocol: 0,
        direction: scene.direction(),
        bytes: scene.bytes(),
        flags: 0,
    };
    let task = Task::Tagged { tag, cookie: scene.skb.cookie(), local: Address::UNSPECIFIED };
    emit::refused(&refused, &verdict, &task);
    verdict.action
}

/// A packet that was judged by its own addresses.
#[inline(never)]
pub fn refuse(scene: &Scene, tag: &Tag, verdict: &Verdict, far: &FarEnd) -> Action {
    let refused = Refused {
        cgroup: scene.who.cgroup,
        peer_cgroup: if far.label != 0 { far.key_id as u64 } else { far.cgroup },
        workload: scene.who.workload,
        peer_workload: if far.label != 0 { far.label } else { far.workload },
        generation: scene.root.generation,
        remote: *scene.remote(),
        local_port: scene.local_port(),
        remote_port: scene.remote_port(),
        protocol: scene.packet.protocol,
        direction: scene.direction(),
        bytes: scene.bytes(),
        flags: if far.on_node {
            tag_flags::PEER_LOCAL
        } else if far.label != 0 {
            tag_flags::VOUCHED
        } else {
            0
        },
    };
    let task = Task::Tagged { tag, cookie: scene.skb.cookie(), local: *scene.local() };
    emit::refused(&refused, verdict, &task);
    Action::Deny
}

#[inline(always)]
fn key_of(cookie: u64, remote: Address, remote_port: u16, protocol: u8) -> ConversationKey {
    ConversationKey { cookie, remote, remote_port, protocol, reserved: [0; 5] }
}

#[inline(always)]
fn is_current(c: &Conversation, root: &Root) -> bool {
    c.generation == root.generation
        && (c.until == 0 || raw::coarse_now() < c.until)
        && (!c.grant.is_some() || tag::rests_well(c.action, c.grant))
}

#[inline(always)]
fn remembered_far_end(known: &Option<&mut Conversation>, root: &Root, remote: &Address, netns: u64) -> FarEnd {
    let nobody = root.veiled(UNMANAGED);
    let mut far = FarEnd::remote(*remote, netns);
    far.workload = nobody;
    if let Some(c) = known
        && c.flags & tag_flags::PEER_LOCAL != 0
    {
        let now = known_now(root, c.peer_cgroup, c.peer_workload, c.peer_instance);
        far.workload = root.veiled(now.workload);
        far.scope = now.instance;
        far.cgroup = c.peer_cgroup;
        far.on_node = true;
    }
    far
}

/// A verdict that rests on a permit: see [`stream::on_permit`].
#[inline(always)]
fn on_permit(scene: &Scene, known: &Option<&mut Conversation>, verdict: &mut Verdict) -> bool {
    let (grant, rule) = known.as_ref().map_or((Grant::NONE, NO_RULE), |c| (c.grant, c.rule));
    stream::on_permit(scene, grant, rule, verdict)
}

/// Follows the verdict of a conversation, and counts what passes and what does not.
#[inline(always)]
fn account(known: Option<&mut Conversation>, scene: &Scene) -> Action {
    let Some(c) = known else { return Action::Deny };
    let action = Action::from_code(c.action);
    if action == Action::Deny {
        emit::count(c.reason, scene.bytes());
        return action;
    }
    if c.grant.is_permit() && c.role == role::CLIENT && !permits::spend(c.grant, scene.bytes()) {
        // Decided anew with the next packet, and told then.
        raw::set(&raw mut c.generation, 0);
        emit::count(Reason::PermitSpent.code(), scene.bytes());
        return Action::Deny;
    }
    if scene.arrives {
        raw::add(&mut c.bytes_in, scene.bytes());
        raw::add(&mut c.packets_in, 1);
    } else {
        raw::add(&mut c.bytes_out, scene.bytes());
        raw::add(&mut c.packets_out, 1);
    }
    c.last_seen = raw::coarse_now();
    action
}

/// What a conversation is made of before its fields are known. Generation 0: undecided.
static BLANK: Conversation = Conversation {
    until: 0,
    opened: 0,
    last_seen: 0,
    bytes_out: 0,
    bytes_in: 0,
    packets_out: 0,
    packets_in: 0,
    cgroup: 0,
    peer_cgroup: 0,
    peer_instance: 0,
    netns: 0,
    grant: Grant::NONE,
    local: Address::UNSPECIFIED,
    comm: [0; 2],
    generation: 0,
    workload: 0,
    peer_workload: 0,
    rule: 0,
    pid: 0,
    uid: 0,
    local_port: 0,
    reason: 0,
    action: 0,
    role: role::UNKNOWN,
    flags: 0,
    reserved: 0,
};

/// The first packet of a conversation, which passes.
#[inline(never)]
fn begin(key: &ConversationKey, scene: &Scene, tag: &Tag, verdict: &Verdict, far: &FarEnd) -> Action {
    emit::count(verdict.reason.code(), 0);
    if !scene.arrives {
        listeners::note_client(scene, tag);
    }
    maps::set_conversation(key, &BLANK);
    // Without a place the next packet is decided anew, and told again.
    let Some(c) = maps::conversation(key).map(raw::value) else { return Action::Allow };
    let now = raw::coarse_now();
    c.opened = now;
    c.netns = tag.netns;
    c.local = *scene.local();
    c.local_port = scene.local_port();
    c.comm = tag.comm;
    c.pid = tag.pid;
    c.uid = tag.uid;
    // Whoever receives the first packet was called.
    c.role = if scene.arrives { role::SERVER } else { role::CLIENT };
    c.flags = tag_flags::OPENED;
    note_peer(c, far);
    write_verdict(c, scene, verdict);
    tell(key, c, kind::OPENED);
    account(Some(c), scene)
}

#[inline(always)]
fn note_peer(c: &mut Conversation, far: &FarEnd) {
    c.flags = if far.on_node { c.flags | tag_flags::PEER_LOCAL } else { c.flags & !tag_flags::PEER_LOCAL };
    c.peer_workload = far.workload;
    c.peer_cgroup = far.cgroup;
    c.peer_instance = if far.on_node { far.scope } else { 0 };
}

#[inline(always)]
fn write_verdict(c: &mut Conversation, scene: &Scene, verdict: &Verdict) {
    raw::set(&raw mut c.generation, 0);
    c.workload = scene.who.workload;
    c.cgroup = scene.who.cgroup;
    c.rule = verdict.rule;
    c.reason = verdict.reason.code();
    c.action = verdict.action.code();
    c.until = verdict.until;
    c.grant = verdict.grant;
    raw::set(&raw mut c.generation, scene.root.generation);
}

/// Writes a new verdict into a conversation, and tells of it if it changes what happens.
#[inline(always)]
fn renew(c: &mut Conversation, scene: &Scene, verdict: &Verdict, key: &ConversationKey) {
    let was = Action::from_code(c.action).passes();
    let verdict = &verdict.after(c.grant, &Kernel);
    let regranted = c.grant != verdict.grant;
    write_verdict(c, scene, verdict);
    let is = verdict.action.passes();
    if was != is {
        tell(key, c, if is { kind::RESUMED } else { kind::CUT });
    } else if is && regranted {
        tell(key, c, kind::REGRANTED);
    }
}

/// One record about a conversation.
#[inline(never)]
fn tell(key: &ConversationKey, c: &Conversation, kind: u8) {
    let Some(mut draft) = Draft::new() else { return };
    let e = draft.event();
    e.cgroup = c.cgroup;
    e.peer_cgroup = c.peer_cgroup;
    e.cookie = key.cookie;
    e.netns = c.netns;
    e.bytes_out = c.bytes_out;
    e.bytes_in = c.bytes_in;
    e.packets_out = c.packets_out;
    e.packets_in = c.packets_in;
    e.duration = 0;
    e.count = 1;
    e.local = c.local;
    e.remote = key.remote;
    e.comm = c.comm;
    e.grant = c.grant;
    e.generation = c.generation;
    e.workload = c.workload;
    e.peer_workload = c.peer_workload;
    e.rule = c.rule;
    e.pid = c.pid;
    e.uid = c.uid;
    e.local_port = c.local_port;
    e.remote_port = key.remote_port;
    e.reason = c.reason;
    e.kind = kind;
    e.action = c.action;
    e.direction = if c.role == role::SERVER { direction::IN } else { direction::OUT };
    e.protocol = key.protocol;
    e.flags = c.flags;
    draft.submit();
}
