//! Grants against a kernel that does as it is told.

use authd_common::{address::Address, tables::NO_SLOT};
use proptest::prelude::*;

use super::{
    permits::{Limits, is_over},
    *,
};

fn id(n: u8) -> Id {
    Id([n; 16])
}

fn key(rule: u32) -> GrantKey {
    GrantKey { rule, workload: 1, scope: 0, address: Address::UNSPECIFIED }
}

fn given(n: u8) -> Given {
    Given {
        id: id(n),
        rule: "r".to_owned(),
        holder: Holder::Workload { name: "w".to_owned(), cgroup: "/w".to_owned(), instance: 0 },
        proofs: Vec::new(),
        terms: 0,
        issued: Timestamp::UNIX_EPOCH,
        until: Timestamp::UNIX_EPOCH,
        permit: None,
    }
}

/// The kernel's side, as the commands make it.
#[derive(Default)]
struct Kernel {
    index: HashMap<GrantKey, Grant>,
    vouched: HashMap<VouchedKey, Grant>,
    slots: HashMap<u32, (u32, u64)>,
    permits: HashMap<u32, Permit>,
}

impl Kernel {
    fn follow(&mut self, commands: Vec<Command>) {
        for command in commands {
            match command {
                Command::Fill { grant, until, .. } => drop(self.slots.insert(grant.slot, (grant.serial, until))),
                Command::Permit { slot, permit } => drop(self.permits.insert(slot, permit)),
                Command::Next { slot, next } => self.permits.get_mut(&slot).expect("it is one").next = next,
                Command::Extend { slot, until } => self.slots.get_mut(&slot).expect("it was filled").1 = until,
                Command::Empty { slot } => self.slots.get_mut(&slot).expect("it was filled").1 = 0,
                Command::Point { key, grant } => drop(self.index.insert(key, grant)),
                Command::Unpoint { key } => drop(self.index.remove(&key)),
                Command::Vouch { key, grant } => drop(self.vouched.insert(key, grant)),
                Command::Unvouch { key } => drop(self.vouched.remove(&key)),
            }
        }
    }

    fn lets_pass(&self, key: &GrantKey, now: u64) -> bool {
        self.index.get(key).is_some_and(|grant| self.is_alive(*grant, now))
    }

    fn is_alive(&self, grant: Grant, now: u64) -> bool {
        self.slots.get(&grant.slot).is_some_and(|(serial, until)| *serial == grant.serial && now < *until)
    }
}

#[test]
fn a_full_table_refuses_the_asker_and_nobody_else() {
    let mut grants = Grants::new(vec![0; 3]);
    let mut kernel = Kernel::default();
    kernel.follow(grants.give(0, given(1), key(1), 100).unwrap());
    kernel.follow(grants.give(0, given(2), key(2), 100).unwrap());
    assert_eq!(grants.give(0, given(3), key(3), 100), Err(GrantError::Full(2)));
    assert_eq!(grants.has_room(0, &key(3)), Err(GrantError::Full(2)));
    assert!(kernel.lets_pass(&key(1), 50) && kernel.lets_pass(&key(2), 50));
}

#[test]
fn a_slot_rests_and_returns_under_another_serial() {
    let mut grants = Grants::new(vec![0; 2]);
    let mut kernel = Kernel::default();
    kernel.follow(grants.give(0, given(1), key(1), 100).unwrap());
    let first = grants.get(&id(1)).unwrap().grant;
    kernel.follow(grants.end(10, &[id(1)]).1);
    assert_eq!(grants.give(11, given(2), key(1), 100), Err(GrantError::Full(1)));
    assert!(grants.has_room(11, &key(1)).is_err() && grants.has_room(10 + REST, &key(1)).is_ok());
    kernel.follow(grants.give(10 + REST, given(2), key(1), 2 * REST).unwrap());
    let second = grants.get(&id(2)).unwrap().grant;
    assert_eq!(first.slot, second.slot);
    assert!(!kernel.is_alive(first, 11 + REST) && kernel.is_alive(second, 11 + REST));
}

#[test]
fn when_the_longest_grant_ends_the_next_one_serves() {
    let mut grants = Grants::new(vec![0; 4]);
    let mut kernel = Kernel::default();
    kernel.follow(grants.give(0, given(1), key(1), 100).unwrap());
    kernel.follow(grants.give(0, given(2), key(1), 200).unwrap());
    kernel.follow(grants.end(1, &[id(2)]).1);
    assert!(kernel.lets_pass(&key(1), 50));
    kernel.follow(grants.end(2, &[id(1)]).1);
    assert!(!kernel.lets_pass(&key(1), 50) && kernel.index.is_empty());
}

#[test]
fn the_one_held_is_the_one_that_lives_longest() {
    let mut grants = Grants::new(vec![0; 4]);
    let held = |grants: &Grants, rule| grants.held(&key(rule)).next().map(|live| live.given.id);
    assert_eq!(held(&grants, 1), None);
    grants.give(0, given(1), key(1), 200).unwrap();
    grants.give(0, given(2), key(1), 100).unwrap();
    grants.give(0, given(3), key(2), 300).unwrap();
    assert_eq!((held(&grants, 1), held(&grants, 2), held(&grants, 3)), (Some(id(1)), Some(id(3)), None));
    grants.end(1, &[id(1)]);
    assert_eq!(held(&grants, 1), Some(id(2)));
    grants.expire(100);
    assert_eq!((held(&grants, 1), held(&grants, 2)), (None, Some(id(3))));
}

#[test]
fn an_extended_grant_lives_on_in_its_slot() {
    let mut grants = Grants::new(vec![0; 4]);
    let mut kernel = Kernel::default();
    kernel.follow(grants.give(0, given(1), key(1), 100).unwrap());
    let before = grants.get(&id(1)).unwrap().clone();
    let wall = Timestamp::from_second(7).unwrap();
    let commands = grants.extend(99, &id(1), 200, wall);
    assert_eq!(commands[0], Command::Extend { slot: before.grant.slot, until: 200 });
    kernel.follow(commands);
    let given = Given { until: wall, ..before.given.clone() };
    assert_eq!(grants.get(&id(1)), Some(&Live { until: 200, given, ..before.clone() }));
    // What flows remember is the same grant.
    assert!(kernel.is_alive(before.grant, 199) && !kernel.is_alive(before.grant, 200));
    assert_eq!(grants.next_end(), Some(200));
    assert!(grants.expire(199).0.is_empty());
    assert_eq!(grants.expire(200).0.len(), 1);
    assert!(grants.is_empty() && grants.by_key.is_empty() && grants.by_end.is_empty());
}

#[test]
fn a_grant_is_not_extended_past_its_end_nor_shortened() {
    let mut grants = Grants::new(vec![0; 4]);
    grants.give(0, given(1), key(1), 100).unwrap();
    let before = grants.get(&id(1)).unwrap().clone();
    let wall = Timestamp::from_second(7).unwrap();
    // Shorter, as long, over but not yet swept, and nobody's.
    for (now, which, until) in [(50, 1, 99), (50, 1, 0), (50, 1, 100), (100, 1, 200), (101, 1, 200), (50, 2, 200)] {
        assert_eq!(grants.extend(now, &id(which), until, wall), [], "at {now} to {until}");
        assert_eq!(grants.get(&id(1)), Some(&before));
    }
    grants.end(60, &[id(1)]);
    assert_eq!(grants.extend(61, &id(1), 200, wall), []);
    assert!(grants.is_empty() && grants.next_end().is_none());
}

#[test]
fn the_index_names_whom_an_extension_lets_live_longest() {
    let mut grants = Grants::new(vec![0; 4]);
    let mut kernel = Kernel::default();
    kernel.follow(grants.give(0, given(1), key(1), 100).unwrap());
    kernel.follow(grants.give(0, given(2), key(1), 200).unwrap());
    let named = |kernel: &Kernel, grants: &Grants, n| {
        kernel.index.get(&key(1)) == grants.get(&id(n)).map(|live| &live.grant)
            && grants.held(&key(1)).next() == grants.get(&id(n))
    };
    assert!(named(&kernel, &grants, 2));
    kernel.follow(grants.extend(1, &id(1), 150, Timestamp::UNIX_EPOCH));
    assert!(named(&kernel, &grants, 2));
    kernel.follow(grants.extend(1, &id(1), 300, Timestamp::UNIX_EPOCH));
    assert!(named(&kernel, &grants, 1));
    kernel.follow(grants.expire(200).1);
    assert!(named(&kernel, &grants, 1) && kernel.lets_pass(&key(1), 299));
    kernel.follow(grants.expire(300).1);
    assert!(kernel.index.is_empty());
}

const LABEL: u32 = 7;

fn in_set(kernel: &Kernel, grants: &Grants, set: u32) -> Option<Id> {
    let grant = kernel.vouched.get(&VouchedKey { set, label: LABEL })?;
    Some(grants.at(*grant).expect("no entry outlives its grant").given.id)
}

#[test]
fn a_label_is_in_each_set_that_has_a_rule_of_its_grants() {
    let mut grants = Grants::new(vec![0; 6]);
    let mut kernel = Kernel::default();
    kernel.follow(grants.adopt(Sets::from([(1, vec![10, 11]), (2, vec![11, 12]), (3, vec![13])])));
    kernel.follow(grants.give(0, given(1), caller_key(10, LABEL), 100).unwrap());
    kernel.follow(grants.give(0, given(2), caller_key(11, LABEL), 100).unwrap());
    // Another caller's is nobody else's, and a workload's is none of a label.
    kernel.follow(grants.give(0, given(3), caller_key(13, LABEL + 1), 100).unwrap());
    kernel.follow(grants.give(0, given(4), key(13), 100).unwrap());
    let sets = |kernel: &Kernel, grants: &Grants| [1, 2, 3].map(|set| in_set(kernel, grants, set));
    assert_eq!(sets(&kernel, &grants), [Some(id(1)), Some(id(2)), None]);
    assert_eq!(kernel.index.len(), 1);
    // Of several the one that lives longest, whose rule is the first.
    kernel.follow(grants.extend(1, &id(2), 200, Timestamp::UNIX_EPOCH));
    assert_eq!(sets(&kernel, &grants), [Some(id(2)), Some(id(2)), None]);
    kernel.follow(grants.end(2, &[id(2)]).1);
    assert_eq!(sets(&kernel, &grants), [Some(id(1)), None, None]);
    assert!(grants.is_carried(&Live { key: caller_key(11, LABEL), ..grants.get(&id(1)).unwrap().clone() }));
    assert!(!grants.is_carried(&Live { key: caller_key(12, LABEL), ..grants.get(&id(1)).unwrap().clone() }));
    kernel.follow(grants.expire(100).1);
    assert!(kernel.vouched.is_empty() && kernel.index.is_empty() && grants.by_label.is_empty());
}

#[test]
fn callers_are_in_the_sets_of_the_next_policy_before_it_is_in_force() {
    let mut grants = Grants::new(vec![0; 6]);
    let mut kernel = Kernel::default();
    kernel.follow(grants.adopt(Sets::from([(1, vec![10])])));
    kernel.follow(grants.give(0, given(1), caller_key(10, LABEL), 100).unwrap());
    let next = Sets::from([(2, vec![9, 10]), (3, vec![12])]);
    let foreseen = grants.foresee(&next);
    kernel.follow(foreseen.clone());
    assert_eq!([1, 2, 3].map(|set| in_set(&kernel, &grants, set)), [Some(id(1)), Some(id(1)), None]);
    // The policy did not come into force after all.
    kernel.follow(Grants::undone(&foreseen));
    assert_eq!([1, 2, 3].map(|set| in_set(&kernel, &grants, set)), [Some(id(1)), None, None]);
    kernel.follow(foreseen);
    kernel.follow(grants.adopt(next));
    assert_eq!([1, 2, 3].map(|set| in_set(&kernel, &grants, set)), [None, Some(id(1)), None]);
    kernel.follow(grants.give(0, given(2), caller_key(12, LABEL), 100).unwrap());
    assert_eq!(in_set(&kernel, &grants, 3), Some(id(2)));
    assert_eq!(grants.vouched(&VouchedKey { set: 1, label: LABEL }), None);
}

#[test]
fn ids_are_read_as_they_are_written() {
    assert_eq!(id(0xab).to_string().parse(), Ok(id(0xab)));
    for text in ["", "AB", &"AB".repeat(16), &"+f".repeat(16), &"0".repeat(33)] {
        assert_eq!(text.parse::<Id>(), Err(IdError), "{text}");
    }
}

#[derive(Clone, Debug)]
enum Step {
    Give { key: u32, lives: u64 },
    Extend { which: usize, lives: u64 },
    End { which: usize },
    Wait { ns: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..4_u32, 1..3 * REST).prop_map(|(key, lives)| Step::Give { key, lives }),
        (any::<usize>(), 0..3 * REST).prop_map(|(which, lives)| Step::Extend { which, lives }),
        any::<usize>().prop_map(|which| Step::End { which }),
        (0..2 * REST).prop_map(|ns| Step::Wait { ns }),
    ]
}

proptest! {
    /// Whatever happens: a key passes exactly if somebody holds a live grant of it, no slot has two grants or gets
    /// lost, a grant ends no sooner than it was said to, and one that ended never lives again.
    #[test]
    fn the_kernel_lets_pass_whom_the_table_says(steps in proptest::collection::vec(step(), 1..120)) {
        let mut grants = Grants::new(vec![0; 9]);
        let mut kernel = Kernel::default();
        let (mut now, mut made) = (0, 0_u8);
        let mut all: Vec<(Id, GrantKey, Grant)> = Vec::new();
        for step in steps {
            let some = |which: usize| (!all.is_empty()).then(|| all[which % all.len()].0);
            match step {
                Step::Give { key: rule, lives } => {
                    made = made.wrapping_add(1);
                    if let Ok(commands) = grants.give(now, given(made), key(rule), now + lives) {
                        kernel.follow(commands);
                        all.push((id(made), key(rule), grants.get(&id(made)).unwrap().grant));
                    } else {
                        prop_assert_eq!(grants.len() + grants.resting.len(), 8);
                    }
                }
                Step::Extend { which, lives } => {
                    if let Some(id) = some(which) {
                        let meant = grants.get(&id).map(|live| live.until.max(now + lives));
                        kernel.follow(grants.extend(now, &id, now + lives, Timestamp::UNIX_EPOCH));
                        prop_assert_eq!(grants.get(&id).map(|live| live.until), meant);
                    }
                }
                Step::End { which } => {
                    if let Some(id) = some(which) {
                        kernel.follow(grants.end(now, &[id]).1);
                    }
                }
                Step::Wait { ns } => {
                    now += ns;
                    kernel.follow(grants.expire(now).1);
                }
            }
            prop_assert_eq!(grants.live.len() + grants.free.len() + grants.resting.len(), 8);
            for rule in 0..4 {
                let holds = grants.iter().any(|live| live.key == key(rule) && now < live.until);
                prop_assert_eq!(kernel.lets_pass(&key(rule), now), holds);
                // What the index names serves as long as anything does.
                let longest = grants.iter().filter(|live| live.key == key(rule)).map(|live| live.until).max();
                let held = grants.held(&key(rule)).next();
                prop_assert_eq!(held.map(|live| live.until), longest);
                prop_assert_eq!(kernel.index.get(&key(rule)), held.map(|live| &live.grant));
            }
            for (id, _, grant) in &all {
                prop_assert!(grant.slot != NO_SLOT);
                let lives = grants.get(id).is_some_and(|live| live.grant == *grant && now < live.until);
                prop_assert_eq!(kernel.is_alive(*grant, now), lives);
                if let Some(live) = grants.get(id) {
                    prop_assert_eq!(kernel.slots.get(&grant.slot), Some(&(grant.serial, live.until)));
                }
            }
        }
    }
}

/// The slots of the permits that a new flow tries, in turn.
fn tried(kernel: &Kernel, key: &GrantKey) -> Vec<u32> {
    let next = |grant: &Grant| kernel.permits.get(&grant.slot).map(|permit| permit.next).filter(Grant::is_some);
    std::iter::successors(kernel.index.get(key).copied(), next).map(|grant| grant.slot).collect()
}

#[test]
fn a_permit_that_is_used_up_makes_room_for_the_next() {
    let mut grants = Grants::new(vec![0; 9]);
    let mut kernel = Kernel::default();
    let permit = |n| Given { permit: Some(Limits { connections: 1, bytes: Some(99) }), ..given(n) };
    for (n, until) in [(1, 100), (2, 300), (3, 200)] {
        kernel.follow(grants.give(0, permit(n), key(1), until).unwrap());
    }
    let slots: Vec<u32> = grants.iter().map(|live| live.grant.slot).collect();
    assert!(slots.iter().all(|slot| kernel.slots[slot].0 & PERMIT != 0), "flows tell them by their serial numbers");
    let slot = |grants: &Grants, n| grants.get(&given(n).id).unwrap().grant.slot;
    let [one, two, three] = [1, 2, 3].map(|n| slot(&grants, n));
    assert_eq!(tried(&kernel, &key(1)), [two, three, one]);
    assert_eq!(kernel.permits[&two].most_bytes, 99);
    kernel.follow(grants.use_up(&given(2).id));
    assert_eq!(tried(&kernel, &key(1)), [three, one]);
    assert!(grants.use_up(&given(2).id).is_empty(), "once is enough");
    let (_, commands) = grants.end(0, &[given(3).id]);
    kernel.follow(commands);
    assert_eq!(tried(&kernel, &key(1)), [one]);
    // Used up, it says so for as long as it lives.
    kernel.follow(grants.use_up(&given(1).id));
    assert_eq!(kernel.index[&key(1)].slot, two);
    assert!(grants.is_used(&given(1).id) && grants.is_used(&given(2).id));
    let (_, commands) = grants.expire(300);
    kernel.follow(commands);
    assert!(kernel.index.is_empty() && !grants.is_used(&given(1).id));
    // The slot's next grant is none.
    kernel.follow(grants.give(10_000_000_000, given(4), key(1), 20_000_000_000).unwrap());
    assert_eq!(kernel.slots[&slot(&grants, 4)].0 & PERMIT, 0);
}

#[test]
fn a_permit_ends_with_the_last_flow_that_began_on_it() {
    let permit =
        |begun, bytes| Permit { begun, bytes, ..Limits { connections: 3, bytes: Some(99) }.permit(Grant::NONE) };
    assert!(!is_over(permit(2, 0), 2), "one more may begin");
    // The third is under way, and nothing was told of it yet.
    assert!(!is_over(permit(3, 0), 2));
    assert!(is_over(permit(3, 0), 3));
    assert!(!is_over(permit(2, 99), 1) && is_over(permit(2, 99), 2), "its bytes are spent");
}

#[test]
fn flows_that_ended_are_counted_for_as_long_as_their_permit_lives() {
    let mut grants = Grants::new(vec![0; 3]);
    grants.give(0, Given { permit: Some(Limits { connections: 2, bytes: None }), ..given(1) }, key(1), 100).unwrap();
    grants.give(0, given(2), key(2), 100).unwrap();
    let on = |grants: &Grants, n| grants.get(&id(n)).unwrap().grant;
    let (permit, other) = (on(&grants, 1), on(&grants, 2));
    grants.flow_ended(permit);
    grants.flow_ended(other);
    assert_eq!((grants.ended_on(&id(1)), grants.ended_on(&id(2))), (1, 0), "other grants have no count");
    grants.end(1, &[id(1)]);
    // What ends later was on a permit that is no more.
    grants.flow_ended(permit);
    assert!(grants.ended.is_empty());
}

#[test]
fn a_permit_to_which_a_connection_was_given_back_is_tried_again() {
    let mut grants = Grants::new(vec![0; 9]);
    let mut kernel = Kernel::default();
    let permit = |n| Given { permit: Some(Limits { connections: 1, bytes: None }), ..given(n) };
    for (n, until) in [(1, 200), (2, 300)] {
        kernel.follow(grants.give(0, permit(n), key(1), until).unwrap());
    }
    let [one, two] = [1, 2].map(|n| grants.get(&id(n)).unwrap().grant.slot);
    kernel.follow(grants.use_up(&id(2)));
    assert_eq!(tried(&kernel, &key(1)), [one]);
    kernel.follow(grants.give_back(&id(2)));
    assert_eq!(tried(&kernel, &key(1)), [two, one]);
    assert!(!grants.is_used(&id(2)) && grants.give_back(&id(2)).is_empty(), "once is enough");
    kernel.follow(grants.use_up(&id(2)));
    assert_eq!(tried(&kernel, &key(1)), [one], "it can be used up again");
    grants.end(0, &[id(2)]);
    assert!(grants.give_back(&id(2)).is_empty());
}
