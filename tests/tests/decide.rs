//! The verdict function over compiled policies, against the policies' meaning: two programs that share no code must agree.

use std::collections::{BTreeMap, BTreeSet};

use authd::{
    grants::caller_key,
    policy::{
        compile::{CompileError, Moment, Options, Registry, compile},
        diagnostic::Source,
        explain::{From, Policy, To},
        image::{Image, Sets},
        load::texts,
        model::Model,
        network::from_ip,
    },
};
use authd_common::{
    address::Address,
    reason::Reason,
    syn::Heard,
    tables::{Grant, GrantKey, IPPROTO_TCP, Slot, UNMANAGED, VouchedKey},
    verdict::{FarEnd, Opener, Verdict, decide_in, decide_out},
};
use authd_tests::meaning::{self, Caller, Held, Judgement, Meaning, Word};
use jiff::{SignedDuration, Timestamp};
use rand::{RngExt, SeedableRng, rngs::SmallRng};

const POLICIES: u64 = 2_000;
const QUESTIONS: usize = 100;

struct Compiled {
    model: Model,
    registry: Registry,
    options: Options,
    image: Image,
    moment: Moment,
}

/// `None` if too many rules ask for different proofs for the same flow, which is refused.
fn compiled(policy: &Meaning, moment: Moment) -> Option<Compiled> {
    let text = policy.text();
    let read = texts(vec![Source { name: "random.toml".into(), text: text.as_str().into() }]);
    let Some(model) = read.model else {
        let shown: Vec<String> = read.diagnostics.iter().map(|d| d.render(false)).collect();
        panic!("refused:\n{}\n{text}", shown.join("\n"));
    };
    let options = Options { failsafe: policy.failsafe.clone(), builtin_rules: policy.builtin, ..Options::default() };
    let mut registry = Registry::default();
    registry.assign(&model, &options);
    match compile(&model, &mut registry, &options, moment) {
        Ok(image) => Some(Compiled { model, registry, options, image, moment }),
        Err(CompileError::Alternatives(rules)) => {
            assert!(rules.len() > 4, "{rules:?}");
            None
        }
        Err(error) => panic!("{error}\n{text}"),
    }
}

/// What the kernel's tables of grants say: a live grant, and one that ended, for each caller and rule.
struct Ledger {
    held: Held,
    now: u64,
    grants: Vec<(GrantKey, Life)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    Alive,
    Over,
    /// Its slot is another grant's now.
    Replaced,
}

impl Ledger {
    fn new(random: &mut SmallRng, policy: &Meaning, compiled: &Compiled, caller: GrantKey, now: u64) -> Self {
        let mut ledger = Self { held: Held::default(), now, grants: Vec::new() };
        ledger.held.own = ledger.give(random, policy, compiled, caller);
        ledger
    }

    /// The same with grants of whom a label means.
    fn with_label(mut self, random: &mut SmallRng, policy: &Meaning, compiled: &Compiled, label: u32) -> Self {
        self.held.vouched = self.give(random, policy, compiled, caller_key(0, label));
        self
    }

    /// Gives somebody grants of some rules, whether these are open to it or not. Returns those that live.
    fn give(
        &mut self,
        random: &mut SmallRng,
        policy: &Meaning,
        compiled: &Compiled,
        holder: GrantKey,
    ) -> BTreeSet<String> {
        let mut alive = BTreeSet::new();
        for rule in &policy.rules {
            let life = match random.random_range(0..8) {
                0..=1 => Life::Alive,
                2 => Life::Over,
                3 => Life::Replaced,
                _ => continue,
            };
            if life == Life::Alive && rule.require.iter().any(|proof| *proof != "cgroup") {
                alive.insert(rule.name.clone());
            }
            let number = compiled.registry.rules.number(&rule.name).expect("rules have numbers");
            self.grants.push((GrantKey { rule: number, ..holder }, life));
        }
        alive
    }

    fn grant(&self, key: GrantKey) -> Option<Grant> {
        let at = self.grants.iter().position(|(known, _)| *known == key)?;
        Some(Grant { slot: at as u32 + 1, serial: 7 })
    }

    /// The first of a set's grants that lives, as the daemon keeps the kernel's entry.
    fn vouched(&self, sets: &Sets, key: VouchedKey) -> Option<Grant> {
        let lives = |rule: &u32| {
            let key = caller_key(*rule, key.label);
            self.grants.iter().any(|(known, life)| *known == key && *life == Life::Alive).then_some(key)
        };
        self.grant(sets.get(&key.set)?.iter().find_map(lives)?)
    }

    fn slot(&self, slot: u32) -> Option<Slot> {
        let (GrantKey { rule, .. }, life) = *self.grants.get(slot as usize - 1)?;
        Some(match life {
            Life::Alive => Slot { until: self.now + 1, serial: 7, rule },
            Life::Over => Slot { until: self.now, serial: 7, rule },
            Life::Replaced => Slot { until: self.now + 1, serial: 8, rule },
        })
    }
}

impl Compiled {
    fn number(&self, workload: usize) -> u32 {
        self.registry.workloads.number(&format!("w{workload}")).expect("every workload has a number")
    }

    fn judgement(&self, verdict: &Verdict) -> Judgement {
        Judgement {
            verdict: verdict.action.name(),
            reason: verdict.reason.name(),
            rule: self.registry.rules.name(verdict.rule).map(str::to_owned),
        }
    }
}

const LABEL: u32 = 0x000a_0b0c;

/// What a SYN says; other protocols say nothing.
fn word(random: &mut SmallRng, protocol: u8) -> Word {
    let lacking = [
        Reason::NodeIdentityMissing,
        Reason::NodeKeyUnknown,
        Reason::NodeKeyExpired,
        Reason::NodeMacWrong,
        Reason::NodeReplay,
    ];
    match random.random_range(0..2 * lacking.len()) {
        _ if protocol != IPPROTO_TCP => Word::Lacking(lacking[0].name()),
        at => lacking.get(at).map_or(Word::Vouched, |reason| Word::Lacking(reason.name())),
    }
}

fn introduced(mut far: FarEnd, word: Word) -> FarEnd {
    let heard = match word {
        Word::Vouched => Heard { key_id: 5, label: LABEL, sequence: 1, lacking: 0 },
        Word::Lacking(name) => {
            let reason = Reason::ALL.iter().find(|reason| reason.name() == name).expect("it is a reason's name");
            Heard { lacking: reason.code().into(), ..Heard::NOTHING }
        }
    };
    far.introduce(&heard);
    far
}

fn some_time(random: &mut SmallRng) -> Timestamp {
    // Some minute of 2026 and 2027, changes of summer time included.
    let minutes = random.random_range(0..2 * 365 * 24 * 60);
    "2026-01-01T00:00:00Z".parse::<Timestamp>().expect("a time") + SignedDuration::from_mins(minutes)
}

/// One question of each kind, asked of both.
fn agree(random: &mut SmallRng, policy: &Meaning, compiled: &Compiled, seed: u64) {
    // Later than the compilation: schedules go on without it.
    let later = match random.random_range(0..3) {
        0 => 0,
        1 => random.random_range(0..48 * 60),
        _ => random.random_range(0..14 * 24 * 60),
    };
    let at = compiled.moment.wall + SignedDuration::from_mins(later);
    let now = compiled.moment.monotonic + later as u64 * 60_000_000_000;
    let root = compiled.image.root();
    let workload = random.random_range(0..policy.workloads.len());
    let (address, protocol) = (meaning::address(random), meaning::protocol(random));
    let port = if protocol == 6 || protocol == 17 { meaning::port(random) } else { 0 };

    let opener = Opener { workload: compiled.number(workload), instance: random.random_range(0..3) };
    let holder = GrantKey { rule: 0, workload: opener.workload, scope: opener.instance, address: Address::UNSPECIFIED };
    let ledger = Ledger::new(random, policy, compiled, holder, now);
    let view = compiled.image.at(now).with_grants(|key| ledger.grant(key), |slot| ledger.slot(slot));
    let found = decide_out(&view, &root, &opener, &from_ip(address), protocol, port);
    let meant = policy.outbound(workload, address, protocol, port, at, &ledger.held);
    compare(policy, compiled, seed, at, &found, &meant, &format!("w{workload} out to {address} {protocol}/{port}"));

    let caller = match random.random_range(0..6) {
        0 => Caller::Unmanaged,
        1..=3 => Caller::Remote(address, word(random, protocol)),
        _ => Caller::Workload(random.random_range(0..policy.workloads.len())),
    };
    let calling = match caller {
        Caller::Unmanaged => FarEnd::local(UNMANAGED, 0),
        Caller::Workload(index) => FarEnd::local(compiled.number(index), random.random_range(0..3)),
        Caller::Remote(address, word) => introduced(FarEnd::remote(from_ip(address), random.random_range(1..3)), word),
    };
    let holder = GrantKey {
        rule: 0,
        workload: calling.workload,
        scope: calling.scope,
        address: if calling.on_node { Address::UNSPECIFIED } else { calling.address },
    };
    let ledger = Ledger::new(random, policy, compiled, holder, now);
    // Others are vouched for, too: their grants are for nobody else.
    let ledger = ledger.with_label(random, policy, compiled, LABEL);
    let view = compiled
        .image
        .at(now)
        .with_grants(|key| ledger.grant(key), |slot| ledger.slot(slot))
        .with_vouched(|key| ledger.vouched(&compiled.image.sets, key));
    let found = decide_in(&view, &root, compiled.number(workload), &calling, protocol, port);
    let meant = policy.inbound(workload, caller, protocol, port, at, &ledger.held);
    compare(policy, compiled, seed, at, &found, &meant, &format!("{caller:?} in to w{workload} {protocol}/{port}"));
}

fn compare(
    policy: &Meaning,
    compiled: &Compiled,
    seed: u64,
    at: Timestamp,
    found: &Verdict,
    meant: &Judgement,
    question: &str,
) {
    let found = compiled.judgement(found);
    if found == *meant {
        return;
    }
    // An image knows the present phase of a schedule and the next one. After that it may only refuse.
    let stale = found.reason == "schedule_stale" && policy.changes_twice(compiled.moment.wall, at);
    let text = policy.text();
    assert!(
        stale,
        "seed {seed}: {question} at {at}, compiled {}\nfound {found:?}\nmeant {meant:?}\n{text}",
        compiled.moment.wall
    );
}

#[test]
fn decide_agrees_with_the_meaning_of_random_policies() {
    let mut refused = 0;
    for seed in 0..POLICIES {
        let mut random = SmallRng::seed_from_u64(seed);
        let policy = meaning::policy(&mut random, true);
        let moment = Moment { wall: some_time(&mut random), monotonic: random.random_range(1..1 << 50) };
        let Some(compiled) = compiled(&policy, moment) else {
            refused += 1;
            continue;
        };
        for _ in 0..QUESTIONS {
            agree(&mut random, &policy, &compiled, seed);
        }
    }
    assert!(refused < POLICIES / 4, "{refused} policies were refused");
}

#[test]
fn every_reason_that_policies_can_give_occurs() {
    let mut seen = BTreeMap::new();
    for seed in 0..POLICIES / 4 {
        let mut random = SmallRng::seed_from_u64(seed);
        let policy = meaning::policy(&mut random, true);
        let at = some_time(&mut random);
        for _ in 0..QUESTIONS {
            let workload = random.random_range(0..policy.workloads.len());
            let (address, protocol, port) = (meaning::address(&mut random), 6, meaning::port(&mut random));
            let out = policy.outbound(workload, address, protocol, port, at, &Held::default());
            let caller = Caller::Remote(address, word(&mut random, protocol));
            let inbound = policy.inbound(workload, caller, protocol, port, at, &Held::default());
            for judgement in [out, inbound] {
                *seen.entry((judgement.verdict, judgement.reason)).or_insert(0_u64) += 1;
            }
        }
    }
    for expected in [
        ("allowed", "rule"),
        ("allowed", "unguarded"),
        ("allowed", "failsafe"),
        ("denied", "no_rule"),
        ("denied", "denied_by_rule"),
        ("denied", "proof_required"),
        ("denied", "inbound_closed"),
        ("observed", "no_rule"),
        ("observed", "denied_by_rule"),
        ("observed", "proof_required"),
        ("observed", "inbound_closed"),
        ("denied", "node_identity_missing"),
        ("denied", "node_mac_wrong"),
        ("denied", "caller_not_named"),
        ("observed", "caller_not_named"),
    ] {
        assert!(seen.get(&expected).is_some_and(|times| *times > 50), "{expected:?} hardly occurs: {seen:?}");
    }
}

#[test]
fn explain_says_what_decide_says() {
    for seed in 0..POLICIES / 10 {
        let mut random = SmallRng::seed_from_u64(seed);
        let policy = meaning::policy(&mut random, true);
        let moment = Moment { wall: some_time(&mut random), monotonic: 1 };
        let Some(Compiled { model, registry, options, image, .. }) = compiled(&policy, moment) else { continue };
        let asked = Policy { model: &model, registry: &registry, options: &options, image: &image, moment };
        for _ in 0..20 {
            let workload = random.random_range(0..policy.workloads.len());
            let (address, port) = (meaning::address(&mut random), meaning::port(&mut random).max(1));
            let to: To = format!("{}/tcp", std::net::SocketAddr::new(address, port)).parse().expect("a destination");
            let from = From::parse(&format!("w{workload}"), &model).expect("a workload");
            let explained = asked.explain(from, to);
            let out = policy.outbound(workload, address, 6, port, moment.wall, &Held::default());
            let step = &explained.steps[0];
            assert_eq!((step.verdict, step.reason, &step.rule), (out.verdict, out.reason, &out.rule), "seed {seed}");
            // Every rule that names the workload is accounted for: it decided, or it says why not.
            for rule in policy
                .rules
                .iter()
                .filter(|r| r.from.iter().any(|f| matches!(f, meaning::From::Workload(w) if *w == workload)))
            {
                let told = step.rule.as_ref() == Some(&rule.name) || step.others.iter().any(|o| o.rule == rule.name);
                assert!(told, "seed {seed}: nothing on {}\n{explained}", rule.name);
            }
        }
    }
}
