use jiff::Timestamp;

use super::*;
use crate::{
    decisions::approvals::tests::{AGENT, ALICE, approver, call, groups, later, names, noon, policy},
    store::tests::Scratch,
};

fn wanted(amount: u32) -> Wanted {
    let (approvers, policies) = (names(&["leads"]), names(&["large-refunds"]));
    Wanted { call: call(amount), uid: AGENT, approvers, policies }
}

fn load(store: &Store, now: Timestamp) -> Kept {
    let mut kept = Kept::load(store).unwrap();
    let (told, result) = kept.policy_changed(store, now, policy(), groups());
    result.unwrap();
    assert!(told.is_empty(), "{told:?}");
    kept
}

/// What the next daemon would know if this one were killed now.
fn after_a_kill(scratch: &Scratch) -> (Scratch, Store, Kept) {
    let copy = scratch.copy();
    let store = copy.open().unwrap();
    let kept = load(&store, noon());
    (copy, store, kept)
}

fn use_up(kept: &mut Kept, store: &Store, now: Timestamp) -> Result<Approval, &'static str> {
    kept.use_up(store, now, &call(1).hash(), &names(&["leads"])).map_err(|error| error.reason())
}

#[test]
fn a_yes_survives_a_kill_and_a_use_does() {
    let (scratch, store) = Scratch::with_store();
    let mut kept = load(&store, noon());
    let requested = kept.request(&store, noon(), wanted(1)).unwrap();
    let (_copy, other, mut killed) = after_a_kill(&scratch);
    assert_eq!(use_up(&mut killed, &other, noon()), Err("approval_unknown"), "who asked asks again");

    kept.grant(&store, later(1), &requested.id, approver(ALICE)).unwrap();
    let (_copy, other, mut killed) = after_a_kill(&scratch);
    assert!(use_up(&mut killed, &other, later(2)).is_ok());

    use_up(&mut kept, &store, later(2)).unwrap();
    let (_copy, other, mut killed) = after_a_kill(&scratch);
    assert_eq!(use_up(&mut killed, &other, later(3)), Err("approval_used"));
    assert_eq!(use_up(&mut kept, &store, later(3)), Err("approval_used"));
}

#[test]
fn a_no_and_an_end_survive_a_kill() {
    let granted = || {
        let (scratch, store) = Scratch::with_store();
        let mut kept = load(&store, noon());
        let id = kept.request(&store, noon(), wanted(1)).unwrap().id;
        kept.grant(&store, noon(), &id, approver(ALICE)).unwrap();
        (scratch, store, kept, id)
    };
    let (scratch, store, mut kept, id) = granted();
    kept.deny(&store, later(1), &id, approver(ALICE)).unwrap();
    let (_copy, other, mut killed) = after_a_kill(&scratch);
    assert_eq!(use_up(&mut killed, &other, later(2)), Err("approval_denied"));

    for what in ["workload support", "agent support", "instance /agents/support-1", "issuer https://idp.example.org"] {
        let (scratch, store, mut kept, _) = granted();
        assert!(kept.revoked(&store, later(1), &"peer support".parse().unwrap()).0.is_empty());
        let (told, result) = kept.revoked(&store, later(1), &what.parse().unwrap());
        assert!(result.is_ok() && told.len() == 1, "{what}");
        let (_copy, other, mut killed) = after_a_kill(&scratch);
        assert_eq!(use_up(&mut killed, &other, later(2)), Err("approval_revoked"), "{what}");
    }

    let (scratch, store, mut kept, _) = granted();
    let (told, result) = kept.policy_changed(&store, later(1), crate::digest::Digest::of(b"other"), groups());
    assert!(result.is_ok() && told.len() == 1);
    let (_copy, other, mut killed) = after_a_kill(&scratch);
    assert_eq!(use_up(&mut killed, &other, later(2)), Err("approval_policy_changed"));
}

#[test]
fn another_policy_at_the_next_start_ends_what_was_asked_under_this_one() {
    let (scratch, store) = Scratch::with_store();
    let mut kept = load(&store, noon());
    let id = kept.request(&store, noon(), wanted(1)).unwrap().id;
    kept.grant(&store, noon(), &id, approver(ALICE)).unwrap();
    drop(store);
    let store = scratch.open().unwrap();
    let mut kept = Kept::load(&store).unwrap();
    let (told, _) = kept.policy_changed(&store, later(1), crate::digest::Digest::of(b"other"), groups());
    assert_eq!(told.len(), 1);
    assert_eq!(use_up(&mut kept, &store, later(1)), Err("approval_policy_changed"));
}

#[test]
fn what_expired_is_kept_a_day_and_then_is_nowhere() {
    let (scratch, store) = Scratch::with_store();
    let mut kept = load(&store, noon());
    kept.request(&store, noon(), wanted(1)).unwrap();
    assert_eq!(kept.expire(&store, later(900)).0.len(), 1);
    kept.expire(&store, later(900 + 24 * 60 * 60)).1.unwrap();
    store.flush().unwrap();
    assert_eq!(scratch.copy().open().unwrap().approvals().unwrap().len(), 1);
    kept.expire(&store, later(901 + 24 * 60 * 60)).1.unwrap();
    store.flush().unwrap();
    assert_eq!(scratch.copy().open().unwrap().approvals().unwrap(), []);
    assert!(kept.approvals().list().is_empty());
}

/// A store that refuses: what it is to keep is too large for a row.
#[test]
fn if_the_store_refuses_the_narrower_state_holds() {
    let (_scratch, store) = Scratch::with_store();
    let mut kept = load(&store, noon());
    let large = || Wanted { policies: vec!["x".repeat(1 << 20)], ..wanted(1) };
    // Nobody was asked.
    assert_eq!(kept.request(&store, noon(), large()).unwrap_err().reason(), "store_entry_too_long");
    assert!(kept.approvals().list().is_empty());

    let id = kept.request(&store, noon(), wanted(1)).unwrap().id;
    let grow = |kept: &mut Kept| {
        let mut entry = kept.approvals.get(&id).unwrap().clone();
        entry.policies = large().policies;
        kept.approvals.put(entry);
    };
    // A yes that is not on disk was not given.
    grow(&mut kept);
    let refused = kept.grant(&store, noon(), &id, approver(ALICE));
    assert_eq!(refused.unwrap_err().reason(), "store_entry_too_long");
    assert_eq!(use_up(&mut kept, &store, noon()), Err("approval_pending"));

    let mut entry = kept.approvals.get(&id).unwrap().clone();
    entry.policies = Vec::new();
    kept.approvals.put(entry);
    kept.grant(&store, noon(), &id, approver(ALICE)).unwrap();
    // A use that is not on disk is no permission, and there is no second try.
    grow(&mut kept);
    assert_eq!(use_up(&mut kept, &store, noon()), Err("store_entry_too_long"));
    assert_eq!(use_up(&mut kept, &store, noon()), Err("approval_used"));
}
