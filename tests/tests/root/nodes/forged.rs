//! SYNs that are not what they say, each wrong in one thing, and one that is right and comes twice.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, ensure};
use authd_common::{
    address::Address,
    syn::{LabelKey, Voice, mac, option, syn_key},
    tables::names,
};
use authd_tests::{
    daemon::PATIENCE,
    wire::{self, Wire},
};
use serde_json::Value;

use super::{LONG, Node, Pair, V4, denials};
use crate::{Verdict, reload::wait_until};

/// Octets of a SYN of `a`'s, from its IP header on, behind which nobody waits for an answer.
#[derive(Clone)]
pub struct Syn {
    source: [u8; 4],
    port: u16,
    sequence: u32,
    pub option: Vec<u8>,
    flags: u8,
}

impl Syn {
    fn new(option: &[u32; 4], port: u16, sequence: u32) -> Self {
        let option = option.iter().flat_map(|word| word.to_ne_bytes()).collect();
        Self { source: [192, 0, 2, 1], port, sequence, option, flags: 0x02 }
    }

    pub fn frame(&self, to: [u8; 6]) -> Vec<u8> {
        let words = (20 + self.option.len()) / 4;
        let mut tcp = [self.port.to_be_bytes(), 7001_u16.to_be_bytes()].concat();
        tcp.extend(self.sequence.to_be_bytes());
        tcp.extend([0, 0, 0, 0, (words as u8) << 4, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(&self.option);
        let pseudo = [&self.source[..], &[192, 0, 2, 2, 0, 6], &(tcp.len() as u16).to_be_bytes(), &tcp].concat();
        tcp[16..18].copy_from_slice(&checksum(&pseudo).to_be_bytes());
        let mut ip = vec![0x45, 0];
        ip.extend((20 + tcp.len() as u16).to_be_bytes());
        ip.extend([0, 0, 0, 0, 64, 6, 0, 0]);
        ip.extend([self.source, [192, 0, 2, 2]].concat());
        let sum = checksum(&ip).to_be_bytes();
        ip[10..12].copy_from_slice(&sum);
        [&to[..], &[2, 0, 0, 0, 0, 9, 8, 0], &ip, &tcp].concat()
    }
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

/// What `a` has of its session with `b`.
pub struct Stolen {
    secret: [u64; 2],
    key_id: u32,
    pub web: u32,
    pub batch: u32,
}

impl Stolen {
    /// From the kernel's tables, as root of `a` could.
    pub fn from(a: &Node) -> Result<Self> {
        let voices: Vec<(u32, Voice)> = a.sandbox.table(names::VOICES)?;
        let (_, voice) = *voices.first().context("there is a session")?;
        let mut known: Vec<(LabelKey, u32)> = a.sandbox.table(names::LABELS)?;
        known.retain(|(key, _)| key.bank == voice.bank);
        // Numbers of workloads are in the order of the policy.
        known.sort_by_key(|(key, _)| key.workload);
        let [(_, web), (_, batch)] = known[..] else { anyhow::bail!("labels: {known:?}") };
        Ok(Self { secret: voice.secret, key_id: voice.key_id, web, batch })
    }

    pub fn syn(&self, label: u32, port: u16, sequence: u32) -> Syn {
        let ends = ((Address::v4([192, 0, 2, 1]), port), (Address::v4([192, 0, 2, 2]), 7001));
        let mac = mac(self.secret, &syn_key(ends.0, ends.1, sequence), self.key_id, label);
        Syn::new(&option(mac, self.key_id, label), port, sequence)
    }
}

pub fn forgeries_are_refused() -> Result<Verdict> {
    forgeries("")
}

pub fn forgeries_are_refused_at_interfaces() -> Result<Verdict> {
    forgeries("interfaces = [\"far0\"]\n")
}

fn forgeries(of_b: &str) -> Result<Verdict> {
    let pair = Pair::new(LONG, of_b)?;
    // Whose port it is, is known from now on.
    pair.connects("/web", V4)?;
    let stolen = Stolen::from(&pair.a)?;
    let to = pair.b.sandbox.netns.within(|| wire::mac("far0"))?;
    let send = |syn: &Syn| pair.a.sandbox.netns.within(|| Wire::open("near0")?.send(&syn.frame(to)));
    let (port, sequence) = (40_000, 0x1234_5678);
    let sound = stolen.syn(stolen.web, port, sequence);
    let answered_within = |syn: &Syn, patience: Duration| -> Result<bool> {
        let ports = [7001_u16.to_be_bytes(), syn.port.to_be_bytes()].concat();
        let is_answer = |frame: &[u8]| frame.get(34..38) == Some(&ports[..]) && frame.get(47) == Some(&0x12);
        pair.a.sandbox.netns.within(|| {
            let watch = Wire::watch("near0")?;
            Wire::open("near0")?.send(&syn.frame(to))?;
            Ok(watch.next(patience, is_answer)?.is_some())
        })
    };
    let answered = |syn: &Syn| answered_within(syn, Duration::from_secs(1));
    // What follows is refused for what is changed, and for nothing else.
    ensure!(answered_within(&sound, PATIENCE)?, "{}", pair.logs());
    let changed = |change: &dyn Fn(&mut Syn)| {
        let mut syn = sound.clone();
        change(&mut syn);
        syn
    };
    let other_key = Stolen { secret: [stolen.secret[0] ^ 1, stolen.secret[1]], ..stolen };
    let mut cases: Vec<(&str, Syn)> = vec![
        ("node_mac_wrong", other_key.syn(stolen.web, port, sequence)),
        ("node_mac_wrong", changed(&|syn| syn.source = [192, 0, 2, 200])),
        ("node_mac_wrong", changed(&|syn| syn.port += 1)),
        ("node_mac_wrong", changed(&|syn| syn.sequence += 1)),
        ("node_key_unknown", Stolen { key_id: stolen.key_id ^ 0x80, ..stolen }.syn(stolen.web, port, sequence)),
        ("node_key_unknown", stolen.syn(stolen.web ^ 1, port, sequence)),
        ("node_identity_missing", changed(&|syn| syn.option.clear())),
        ("node_identity_missing", changed(&|syn| syn.option[0] = 254)),
        ("node_identity_missing", changed(&|syn| syn.option[3] ^= 1)),
        // Not the last of the header: somebody put something behind it.
        ("node_identity_missing", changed(&|syn| syn.option.extend([1, 1, 1, 1]))),
        ("node_identity_missing", changed(&|syn| syn.option.truncate(12))),
        ("caller_not_named", stolen.syn(stolen.batch, port, sequence)),
    ];
    // Each octet of what authenticates; a key or a label that nobody has is as good as a wrong one.
    cases.extend((4..12).map(|octet| ("node_mac_wrong", changed(&|syn| syn.option[octet] ^= 0x10))));
    let mut meant: BTreeMap<&str, u64> = BTreeMap::new();
    for (reason, _) in &cases {
        *meant.entry(reason).or_default() += 1;
    }
    if !of_b.is_empty() {
        explained(&pair, to, &sound, &cases)?;
    }
    let told = || -> Result<BTreeMap<&str, u64>> {
        meant.keys().map(|reason| Ok((*reason, denials(&pair.b, reason)?))).collect()
    };
    ensure!(told()?.values().all(|count| *count == 0), "{:?}", told()?);
    let is_answer = |frame: &[u8]| frame.get(34..36) == Some(&7001_u16.to_be_bytes()) && frame.get(47) == Some(&0x12);
    let watch = pair.a.sandbox.netns.within(|| Wire::watch("near0"))?;
    cases.iter().try_for_each(|(_, syn)| send(syn))?;
    wait_until("the refusals", || Ok(told()?.values().sum::<u64>() >= cases.len() as u64))
        .with_context(|| format!("{:?}", told()))?;
    ensure!(told()? == meant, "{:?}, not {meant:?}", told()?);
    ensure!(watch.next(Duration::from_millis(200), is_answer)?.is_none(), "a forgery is answered");
    // A flood of forged SYNs with the caller's own address does not keep the caller out.
    pair.a.sandbox.netns.within(|| {
        let wire = Wire::open("near0")?;
        (0..2_000).try_for_each(|n| wire.send(&other_key.syn(stolen.web, 1_024 + n, sequence).frame(to)))
    })?;
    pair.connects("/web", V4)?;
    replayed(&pair, &answered)?;
    Ok(Verdict::Ran)
}

/// What is said of them where somebody asks what became of a capture's frames.
fn explained(pair: &Pair, to: [u8; 6], sound: &Syn, cases: &[(&str, Syn)]) -> Result<()> {
    // A capture as tcpdump makes them, of Ethernet frames (pcap-savefile(5)).
    let mut capture: Vec<u8> = [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65_535, 1].map(u32::to_le_bytes).concat();
    for syn in std::iter::once(sound).chain(cases.iter().map(|(_, syn)| syn)) {
        let frame = syn.frame(to);
        capture.extend([0, 0, frame.len() as u32, frame.len() as u32].map(u32::to_le_bytes).concat());
        capture.extend(frame);
    }
    let file = pair.b.sandbox.directory().join("syns.pcap");
    std::fs::write(&file, capture)?;
    let output = pair.b.daemon.command(&["explain", "--pcap", file.to_str().context("a path")?, "--json"])?;
    let told = String::from_utf8(output.stdout)?;
    let lines: Vec<Value> = told.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure!(lines.len() == 1 + cases.len(), "{told}{}", String::from_utf8_lossy(&output.stderr));
    ensure!(lines[0]["verdict"] == "passes" && lines[0]["rule"] == "web-sql", "{}", lines[0]);
    for (line, (reason, _)) in lines[1..].iter().zip(cases) {
        ensure!(line["verdict"] == "dropped" && line["reason"] == *reason, "{reason}: {line}");
    }
    Ok(())
}

/// A SYN that was seen on its way is worth nothing once its connection came about, whatever became of that.
fn replayed(pair: &Pair, answered: &dyn Fn(&Syn) -> Result<bool>) -> Result<()> {
    let is_syn = |frame: &[u8]| frame.get(36..38) == Some(&7001_u16.to_be_bytes()) && frame.get(47) == Some(&0x02);
    let watch = pair.a.sandbox.netns.within(|| Wire::watch("near0"))?;
    pair.connects("/web", V4)?;
    let seen = watch.next(PATIENCE, is_syn)?.context("a SYN passes")?;
    let tcp = &seen[34..];
    let length = usize::from(tcp[12] >> 4) * 4;
    let syn = Syn {
        source: [192, 0, 2, 1],
        port: u16::from_be_bytes([tcp[0], tcp[1]]),
        sequence: u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]),
        option: tcp[20..length].to_vec(),
        flags: 0x02,
    };
    ensure!(syn.option.len() > 16 && syn.option[syn.option.len() - 16..][..4] == [253, 16, 0xa0, 0x7d], "{tcp:02x?}");
    let before = denials(&pair.b, "node_replay")?;
    // While the server has not closed the connection yet, it is that one's.
    wait_until("the replay", || {
        ensure!(!answered(&syn)?, "a SYN is answered twice");
        Ok(denials(&pair.b, "node_replay")? > before)
    })
}
