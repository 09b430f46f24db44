//! Every way to a yes, and every way not to get one.

use proptest::prelude::*;

use super::*;
use crate::decisions::call::{Actor, Arguments, Delegation};

pub const ALICE: u32 = 1001;
pub const BOB: u32 = 1002;
pub const AGENT: u32 = 2001;
const IDP: &str = "https://idp.example.org";

pub fn noon() -> Timestamp {
    "2026-11-26T12:00:00Z".parse().unwrap()
}

pub fn later(seconds: i64) -> Timestamp {
    noon() + SignedDuration::from_secs(seconds)
}

pub fn policy() -> Digest {
    Digest::of(b"policy")
}

pub fn id(number: u32) -> Id {
    let [a, b, c, d] = number.to_be_bytes();
    Id([0, 0, a, b, c, d])
}

pub fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

pub fn call(amount: u32) -> Call {
    Call {
        tool: "refund".to_owned(),
        arguments: Arguments::read(format!("{{\"amount\":{amount}}}").as_bytes()).unwrap(),
        agent: Agent {
            workload: "support".to_owned(),
            cgroup: "/agents/support-1".to_owned(),
            instance: 7,
            spiffe_id: "spiffe://example.org/support/support-1".to_owned(),
        },
        delegation: Some(Delegation {
            issuer: IDP.to_owned(),
            subject: "carol".to_owned(),
            actors: vec![Actor { issuer: None, subject: "spiffe://example.org/router".to_owned() }],
        }),
        policy: policy(),
    }
}

/// One that waits, as a store keeps it.
pub fn entry(number: u32) -> Entry {
    Entry {
        id: id(number),
        call: call(number),
        uids: vec![AGENT],
        approvers: names(&["leads"]),
        policies: names(&["large-refunds"]),
        requested: noon(),
        expires: later(900),
        state: State::Pending,
    }
}

pub fn asked(number: u32, call: Call) -> Asked {
    let (approvers, policies) = (names(&["leads"]), names(&["large-refunds"]));
    Asked { id: id(number), call, uid: AGENT, approvers, policies }
}

pub fn group(name: &str, users: &[(u32, &str)]) -> Group {
    Group {
        name: name.to_owned(),
        users: users.iter().map(|(uid, name)| (*uid, (*name).to_owned())).collect(),
        step_up: None,
        ttl: SignedDuration::from_secs(900),
        valid: SignedDuration::from_secs(300),
        may_be_subject: false,
    }
}

fn strong() -> Group {
    let step_up = StepUp {
        issuer: "corp".to_owned(),
        audience: "approvals".to_owned(),
        subjects: names(&["alice", "carol", "spiffe://example.org/router", "spiffe://example.org/support/support-1"]),
        acr: names(&["phr", "phrh"]),
        max_age: Some(SignedDuration::from_secs(300)),
    };
    Group { step_up: Some(step_up), ..group("strong", &[(ALICE, "alice")]) }
}

pub fn groups() -> Vec<Group> {
    vec![group("leads", &[(ALICE, "alice"), (AGENT, "agent")]), group("night", &[(BOB, "1002")]), strong()]
}

pub fn approver(uid: u32) -> Approver {
    Approver { approvers: None, uid, token: None, text: "looks right".to_owned() }
}

fn token() -> TokenFacts {
    TokenFacts {
        issuer_name: "corp".to_owned(),
        issuer: IDP.to_owned(),
        subject: "alice".to_owned(),
        audience: vec!["approvals".to_owned()],
        acr: Some("phr".to_owned()),
        auth_time: Some(later(-60)),
    }
}

fn fresh() -> Approvals {
    let mut approvals = Approvals::default();
    approvals.policy_changed(noon(), policy(), groups());
    approvals
}

/// One call waits, of which people were told.
fn waiting() -> Approvals {
    let mut approvals = fresh();
    approvals.request(noon(), asked(1, call(1))).unwrap();
    approvals
}

fn granted() -> Approvals {
    let mut approvals = waiting();
    approvals.grant(later(60), &id(1), approver(ALICE)).unwrap();
    approvals
}

fn use_up(approvals: &mut Approvals, now: Timestamp) -> Result<Approval, &'static str> {
    approvals.use_up(now, &call(1).hash(), &names(&["leads"])).map_err(|error| error.reason())
}

fn state(approvals: &Approvals) -> &'static str {
    approvals.get(&id(1)).unwrap().state.name()
}

#[test]
fn one_yes_is_one_call() {
    let mut approvals = fresh();
    let requested = approvals.request(noon(), asked(1, call(1))).unwrap();
    assert_eq!((requested.id, requested.granted, requested.until), (id(1), false, later(900)));
    assert_eq!(requested.told.unwrap().event, "approval_requested");
    assert_eq!(use_up(&mut approvals, noon()), Err("approval_pending"));
    let told = approvals.grant(later(60), &id(1), approver(ALICE)).unwrap();
    assert_eq!((told.event, told.uid, told.until), ("approval_granted", Some(ALICE), Some(later(360))));
    let approval = use_up(&mut approvals, later(61)).unwrap();
    assert_eq!((approval.id, approval.by.user.as_str(), approval.told.event), (id(1), "alice", "approval_used"));
    assert_eq!(use_up(&mut approvals, later(61)), Err("approval_used"));
    // Asking again is a new question.
    let again = approvals.request(later(62), asked(2, call(1))).unwrap();
    assert_eq!((again.id, again.granted), (id(2), false));
    assert_eq!(use_up(&mut approvals, later(62)), Err("approval_pending"));
}

#[test]
fn a_yes_is_for_the_call_that_was_shown() {
    let mut approvals = granted();
    let mut other = call(1);
    other.agent.instance = 8;
    for other in [call(2), other] {
        let used = approvals.use_up(later(61), &other.hash(), &names(&["leads"]));
        assert_eq!(used.unwrap_err().reason(), "approval_unknown");
    }
    assert!(use_up(&mut approvals, later(61)).is_ok());
}

#[test]
fn a_yes_of_others_than_the_policy_asks_now_is_none() {
    let mut approvals = granted();
    let hash = call(1).hash();
    let error = approvals.use_up(later(61), &hash, &names(&["night", "strong"])).unwrap_err();
    assert_eq!(error.reason(), "approval_wrong_approvers");
    // Whoever asks now gets a question for those.
    let night = Asked { approvers: names(&["night"]), ..asked(2, call(1)) };
    let requested = approvals.request(later(62), night).unwrap();
    assert_eq!((requested.id, requested.granted), (id(2), false));
    approvals.grant(later(63), &id(2), approver(BOB)).unwrap();
    assert_eq!(approvals.use_up(later(64), &hash, &names(&["night"])).unwrap().by.approvers, "night");
}

#[test]
fn time_ends_questions_and_answers() {
    let mut approvals = waiting();
    assert!(approvals.expire(later(899)).is_empty());
    let late = approvals.grant(later(900), &id(1), approver(ALICE)).unwrap_err();
    assert_eq!(late.reason(), "approval_expired");
    assert_eq!(approvals.deny(later(900), &id(1), approver(ALICE)).unwrap_err().reason(), "approval_expired");
    assert_eq!(use_up(&mut approvals, later(900)), Err("approval_expired"));
    let told = approvals.expire(later(900));
    assert_eq!((told.len(), told[0].event, told[0].reason), (1, "approval_expired", Some("approval_expired")));
    assert_eq!(use_up(&mut approvals, later(1)), Err("approval_expired"), "a clock that goes back brings nothing back");

    let mut approvals = granted();
    assert_eq!(use_up(&mut approvals, later(360)), Err("approval_expired"));
    assert_eq!(approvals.deny(later(360), &id(1), approver(ALICE)).unwrap_err().reason(), "approval_expired");
    let told = approvals.expire(later(360));
    assert_eq!(told[0].by.as_ref().unwrap().uid, ALICE);
    assert_eq!(use_up(&mut approvals, later(61)), Err("approval_expired"));
    assert!(use_up(&mut granted(), later(359)).is_ok());
}

#[test]
fn what_is_over_is_asked_anew_even_if_nobody_swept() {
    let mut approvals = waiting();
    assert_eq!(approvals.request(later(899), asked(2, call(1))).unwrap().id, id(1));
    assert_eq!(approvals.request(later(900), asked(2, call(1))).unwrap().id, id(2));
    let mut approvals = granted();
    let known = approvals.request(later(359), asked(2, call(1))).unwrap();
    assert_eq!((known.id, known.granted, known.until), (id(1), true, later(360)));
    let new = approvals.request(later(360), asked(2, call(1))).unwrap();
    assert_eq!((new.id, new.granted), (id(2), false));
    // Approvers to whom the policy gives more time meanwhile do not wake it up.
    let mut approvals = waiting();
    let patient = Group { ttl: SignedDuration::from_hours(1), ..group("leads", &[(ALICE, "alice")]) };
    approvals.policy_changed(noon(), policy(), [patient]);
    assert_eq!(approvals.grant(later(900), &id(1), approver(ALICE)).unwrap_err().reason(), "approval_expired");
}

#[test]
fn who_is_asked_is_who_the_policy_asked_last() {
    let mut approvals = waiting();
    let night = Asked { approvers: names(&["unknown", "night"]), ..asked(2, call(1)) };
    assert!(approvals.request(later(1), night).unwrap().changed);
    assert_eq!(approvals.get(&id(1)).unwrap().approvers, ["night"]);
    assert_eq!(approvals.grant(later(2), &id(1), approver(ALICE)).unwrap_err().reason(), "approval_not_approver");
    assert!(approvals.grant(later(2), &id(1), approver(BOB)).is_ok());
}

#[test]
fn approvers_with_a_shorter_time_have_only_that() {
    let mut approvals = fresh();
    let hasty = Group { ttl: SignedDuration::from_secs(60), ..group("hasty", &[(ALICE, "alice")]) };
    approvals.policy_changed(noon(), policy(), groups().into_iter().chain([hasty]));
    let both = Asked { approvers: names(&["hasty", "night"]), ..asked(1, call(1)) };
    assert_eq!(approvals.request(noon(), both).unwrap().until, later(900));
    assert_eq!(approvals.grant(later(60), &id(1), approver(ALICE)).unwrap_err().reason(), "approval_expired");
    assert_eq!(approvals.grant(later(60), &id(1), approver(BOB)).unwrap().event, "approval_granted");
}

#[test]
fn a_no_is_final_for_as_long_as_the_question_would_have_waited() {
    let mut approvals = waiting();
    let told = approvals.deny(later(60), &id(1), approver(ALICE)).unwrap();
    assert_eq!((told.event, told.reason), ("approval_denied", Some("approval_denied")));
    assert_eq!(use_up(&mut approvals, later(61)), Err("approval_denied"));
    assert_eq!(approvals.grant(later(61), &id(1), approver(ALICE)).unwrap_err().reason(), "approval_denied");
    assert_eq!(approvals.request(later(899), asked(2, call(1))).unwrap_err().reason(), "approval_denied");
    assert!(approvals.request(later(900), asked(2, call(1))).is_ok());
}

#[test]
fn a_yes_can_be_taken_back_until_it_is_used() {
    let mut approvals = granted();
    approvals.deny(later(61), &id(1), approver(ALICE)).unwrap();
    assert_eq!(use_up(&mut approvals, later(62)), Err("approval_denied"));
    let mut approvals = granted();
    use_up(&mut approvals, later(61)).unwrap();
    assert_eq!(approvals.deny(later(62), &id(1), approver(ALICE)).unwrap_err().reason(), "approval_used");
    assert_eq!(approvals.grant(later(62), &id(1), approver(ALICE)).unwrap_err().reason(), "approval_used");
}

#[test]
fn only_who_is_asked_decides() {
    let mut approvals = waiting();
    let refused =
        |approvals: &mut Approvals, approver| approvals.grant(later(1), &id(1), approver).unwrap_err().reason();
    assert_eq!(refused(&mut approvals, approver(BOB)), "approval_not_approver");
    assert_eq!(
        refused(&mut approvals, approver(0)),
        "approval_not_approver",
        "root is an approver if the policy says so"
    );
    let named = |name: &str, uid| Approver { approvers: Some(name.to_owned()), ..approver(uid) };
    assert_eq!(refused(&mut approvals, named("night", BOB)), "approval_wrong_approvers");
    assert_eq!(refused(&mut approvals, named("nobody", ALICE)), "approval_wrong_approvers");
    assert_eq!(approvals.deny(later(1), &id(1), approver(BOB)).unwrap_err().reason(), "approval_not_approver");
    assert_eq!(approvals.grant(later(1), &id(9), approver(ALICE)).unwrap_err().reason(), "approval_unknown");
    assert_eq!(approvals.deny(later(1), &id(9), approver(ALICE)).unwrap_err().reason(), "approval_unknown");
    let long = Approver { text: "x".repeat(MAX_TEXT + 1), ..approver(ALICE) };
    assert_eq!(refused(&mut approvals, long), "approval_text_too_long");
    assert_eq!(state(&approvals), "pending");
    approvals.grant(later(1), &id(1), named("leads", ALICE)).unwrap();
    assert_eq!(refused(&mut approvals, approver(ALICE)), "approval_granted");
    // Root may always say no.
    assert_eq!(approvals.deny(later(2), &id(1), approver(0)).unwrap().by.unwrap().user, "root");
}

#[test]
fn whoever_asks_does_not_approve() {
    let mut approvals = waiting();
    let refused =
        |approvals: &mut Approvals, uid| approvals.grant(later(1), &id(1), approver(uid)).unwrap_err().reason();
    assert_eq!(refused(&mut approvals, AGENT), "approval_by_agent");
    // Nor whoever asked for the same call besides.
    let again = approvals.request(later(1), Asked { uid: ALICE, ..asked(2, call(1)) }).unwrap();
    assert_eq!((again.id, again.changed, again.told), (id(1), true, None));
    assert_eq!(refused(&mut approvals, ALICE), "approval_by_agent");
    assert!(!approvals.request(later(1), Asked { uid: ALICE, ..asked(2, call(1)) }).unwrap().changed);
    // A crowd of users is not taken in; those who are known stay.
    for uid in 0..MOST_UIDS as u32 - 2 {
        approvals.request(later(1), Asked { uid: 3000 + uid, ..asked(2, call(1)) }).unwrap();
    }
    let more = approvals.request(later(1), Asked { uid: 4000, ..asked(2, call(1)) });
    assert_eq!(more.unwrap_err().reason(), "too_many_approvals");
    assert_eq!(refused(&mut approvals, ALICE), "approval_by_agent");
}

#[test]
fn strong_approvers_show_a_token_that_says_enough() {
    let mut approvals = fresh();
    approvals.request(noon(), Asked { approvers: names(&["strong"]), ..asked(1, call(1)) }).unwrap();
    let mut refused = |change: fn(&mut TokenFacts)| {
        let mut token = token();
        change(&mut token);
        approvals.grant(noon(), &id(1), Approver { token: Some(token), ..approver(ALICE) }).unwrap_err().reason()
    };
    assert_eq!(refused(|t| t.issuer_name = "other".to_owned()), "approval_wrong_issuer");
    assert_eq!(refused(|t| t.subject = "bob".to_owned()), "approval_wrong_subject");
    assert_eq!(refused(|t| t.acr = None), "approval_acr");
    assert_eq!(refused(|t| t.acr = Some("pwd".to_owned())), "approval_acr");
    assert_eq!(refused(|t| t.auth_time = None), "approval_auth_time");
    assert_eq!(refused(|t| t.auth_time = Some(later(-301))), "approval_auth_time");
    assert_eq!(refused(|t| t.auth_time = Some(later(31))), "approval_auth_time");
    assert_eq!(refused(|t| t.subject = "carol".to_owned()), "approval_by_subject");
    assert_eq!(refused(|t| t.subject = "spiffe://example.org/router".to_owned()), "approval_by_agent");
    assert_eq!(refused(|t| t.subject = call(1).agent.spiffe_id), "approval_by_agent");
    assert_eq!(approvals.grant(noon(), &id(1), approver(ALICE)).unwrap_err().reason(), "approval_step_up_required");
    let shown = Approver { token: Some(token()), ..approver(ALICE) };
    let stranger = Approver { uid: BOB, ..shown.clone() };
    assert_eq!(approvals.grant(noon(), &id(1), stranger).unwrap_err().reason(), "approval_not_approver");
    let told = approvals.grant(noon(), &id(1), shown).unwrap();
    assert_eq!(told.by.unwrap().token, Some(token()));
}

#[test]
fn the_limits_of_a_tokens_age_are_exact() {
    for (auth_time, taken) in [(-300, true), (-301, false), (30, true), (31, false)] {
        let token = TokenFacts { auth_time: Some(later(auth_time)), ..token() };
        assert_eq!(strong().step_up.unwrap().is_met_by(noon(), &token).is_ok(), taken, "{auth_time}");
    }
    let nothing = TokenFacts { acr: None, auth_time: None, ..token() };
    let lax = StepUp { acr: Vec::new(), max_age: None, ..strong().step_up.unwrap() };
    assert_eq!(lax.is_met_by(noon(), &nothing), Ok(()));
}

#[test]
fn the_subject_may_approve_where_the_policy_lets_him_and_the_agent_never() {
    let mut approvals = fresh();
    let lenient = Group { may_be_subject: true, ..strong() };
    approvals.policy_changed(noon(), policy(), [lenient]);
    approvals.request(noon(), Asked { approvers: names(&["strong"]), ..asked(1, call(1)) }).unwrap();
    let router = TokenFacts { subject: "spiffe://example.org/router".to_owned(), ..token() };
    let refused = approvals.grant(noon(), &id(1), Approver { token: Some(router), ..approver(ALICE) });
    assert_eq!(refused.unwrap_err().reason(), "approval_by_agent");
    let carol = TokenFacts { subject: "carol".to_owned(), ..token() };
    assert!(approvals.grant(noon(), &id(1), Approver { token: Some(carol), ..approver(ALICE) }).is_ok());
    // Somebody of that name at another issuer is somebody else.
    let mut approvals = fresh();
    approvals.request(noon(), asked(1, call(1))).unwrap();
    let carol = TokenFacts { issuer: "https://other.example.org".to_owned(), subject: "carol".to_owned(), ..token() };
    assert!(approvals.grant(noon(), &id(1), Approver { token: Some(carol), ..approver(ALICE) }).is_ok());
}

#[test]
fn one_who_is_named_twice_approves_where_he_may() {
    let mut approvals = fresh();
    approvals.request(noon(), Asked { approvers: names(&["strong", "leads"]), ..asked(1, call(1)) }).unwrap();
    assert_eq!(approvals.grant(noon(), &id(1), approver(ALICE)).unwrap().by.unwrap().approvers, "leads");
    let mut approvals = fresh();
    approvals.request(noon(), Asked { approvers: names(&["strong", "night"]), ..asked(1, call(1)) }).unwrap();
    let why = approvals.grant(noon(), &id(1), approver(ALICE)).unwrap_err();
    assert_eq!(why.reason(), "approval_step_up_required", "and not that he is no approver of the others");
}

#[test]
fn another_policy_ends_what_was_asked_under_the_one_before() {
    let other = Digest::of(b"other");
    for (mut approvals, by) in [(waiting(), None), (granted(), Some(ALICE))] {
        assert!(approvals.policy_changed(later(61), policy(), groups()).is_empty(), "the same one again");
        let told = approvals.policy_changed(later(62), other, groups());
        assert_eq!(
            (told.len(), told[0].event, told[0].reason),
            (1, "approval_cancelled", Some("approval_policy_changed"))
        );
        assert_eq!(told[0].by.as_ref().map(|by| by.uid), by);
        assert_eq!(use_up(&mut approvals, later(63)), Err("approval_policy_changed"));
        let error = approvals.grant(later(63), &id(1), approver(ALICE)).unwrap_err();
        assert_eq!(error.reason(), "approval_policy_changed");
        assert_eq!(approvals.request(later(63), asked(2, call(1))).unwrap_err().reason(), "approval_policy_changed");
        approvals.policy_changed(later(64), policy(), groups());
        assert_eq!(use_up(&mut approvals, later(65)), Err("approval_policy_changed"), "ended is ended");
    }
}

#[test]
fn nothing_is_approved_or_used_before_a_policy_is_in_force() {
    let kept = granted().get(&id(1)).unwrap().clone();
    let mut approvals = Approvals::load([kept, entry(2)]);
    assert_eq!(use_up(&mut approvals, later(61)), Err("approval_policy_changed"));
    assert_eq!(approvals.grant(later(61), &id(2), approver(ALICE)).unwrap_err().reason(), "approval_policy_changed");
    assert_eq!(approvals.request(later(61), asked(3, call(3))).unwrap_err().reason(), "approval_policy_changed");
    assert!(approvals.policy_changed(later(61), policy(), groups()).is_empty());
    assert!(use_up(&mut approvals, later(61)).is_ok());
    assert!(approvals.grant(later(61), &id(2), approver(ALICE)).is_ok());
}

#[test]
fn a_policy_that_names_nobody_lets_nobody_wait() {
    let mut approvals = fresh();
    for approvers in [names(&[]), names(&["unknown"])] {
        let error = approvals.request(noon(), Asked { approvers, ..asked(1, call(1)) }).unwrap_err();
        assert_eq!(error.reason(), "approval_nobody");
    }
}

#[test]
fn revocation_ends_what_the_revoked_asked_for_and_nothing_else() {
    let others = [
        Whose::Workload("other"),
        Whose::Instance("/agents/support-2"),
        Whose::SpiffeId("spiffe://example.org/support/support-2"),
        Whose::Issuer("https://other.example.org"),
        Whose::Subject { issuer: IDP, subject: "alice" },
        Whose::Subject { issuer: "https://other.example.org", subject: "carol" },
    ];
    for whose in [
        Whose::Workload("support"),
        Whose::Instance("/agents/support-1"),
        Whose::SpiffeId("spiffe://example.org/support/support-1"),
        Whose::SpiffeId("spiffe://example.org/router"),
        Whose::Issuer(IDP),
        Whose::Subject { issuer: IDP, subject: "carol" },
    ] {
        let mut approvals = granted();
        assert!(others.iter().all(|other| approvals.cancel_of(later(61), *other).is_empty()));
        let told = approvals.cancel_of(later(61), whose);
        assert_eq!(
            (told.len(), told[0].event, told[0].reason),
            (1, "approval_cancelled", Some("approval_revoked")),
            "{whose:?}"
        );
        assert_eq!(use_up(&mut approvals, later(62)), Err("approval_revoked"));
        assert_eq!(approvals.grant(later(62), &id(1), approver(ALICE)).unwrap_err().reason(), "approval_revoked");
        assert!(approvals.cancel_of(later(63), whose).is_empty(), "once");
    }
}

#[test]
fn an_agent_cannot_flood() {
    let mut approvals = fresh();
    for number in 0..PER_AGENT as u32 {
        approvals.request(noon(), asked(number, call(number))).unwrap();
    }
    let refused = approvals.request(noon(), asked(99, call(99)));
    assert_eq!(refused.unwrap_err().reason(), "too_many_approvals");
    // What waits already waits on, and others are not concerned.
    assert_eq!(approvals.request(noon(), asked(99, call(3))).unwrap().id, id(3));
    let mut other = call(1);
    other.agent.instance += 1;
    assert!(approvals.request(noon(), asked(98, other)).is_ok());
    // An approved one counts until it is used.
    approvals.grant(noon(), &id(1), approver(ALICE)).unwrap();
    assert!(approvals.request(noon(), asked(99, call(99))).is_err());
    use_up(&mut approvals, noon()).unwrap();
    assert!(approvals.request(noon(), asked(99, call(99))).is_ok());
}

fn of_instance(number: u32) -> Asked {
    let mut call = call(number);
    call.agent.instance = u64::from(number) + 100;
    call.agent.workload = format!("support-{}", number % 9);
    asked(number, call)
}

#[test]
fn all_agents_together_cannot_flood() {
    let mut approvals = fresh();
    for number in 0..MOST as u32 {
        approvals.request(later(i64::from(number % 7)), of_instance(number)).unwrap();
    }
    assert_eq!(approvals.request(later(9), of_instance(9999)).unwrap_err().reason(), "approvals_full");
    // What ended makes room, the oldest end first; what waits never.
    for (ends, number) in [(11, 5), (10, 6)] {
        approvals.grant(later(9), &id(number), approver(ALICE)).unwrap();
        approvals.use_up(later(ends), &of_instance(number).call.hash(), &names(&["leads"])).unwrap();
    }
    assert_eq!(approvals.request(later(12), of_instance(9999)).unwrap().forgotten, [id(6)]);
    assert_eq!(approvals.request(later(12), of_instance(9998)).unwrap().forgotten, [id(5)]);
    assert_eq!(approvals.request(later(12), of_instance(9997)).unwrap_err().reason(), "approvals_full");
    // Nor a no before its time.
    approvals.deny(later(13), &id(7), approver(ALICE)).unwrap();
    assert_eq!(approvals.request(later(899), of_instance(9997)).unwrap_err().reason(), "approvals_full");
    assert_eq!(approvals.request(later(899), of_instance(7)).unwrap_err().reason(), "approval_denied");
    assert_eq!(approvals.request(later(900), of_instance(9997)).unwrap().forgotten, [id(7)]);
    assert_eq!(approvals.list().len(), MOST);
}

#[test]
fn one_workload_with_many_instances_leaves_room_for_others() {
    let of = |workload: &str, number: u32, text: usize| {
        let mut asked = of_instance(number);
        asked.call.agent.workload = workload.to_owned();
        let text = format!("{{\"a\":\"{number}{}\"}}", "x".repeat(text));
        asked.call.arguments = Arguments::read(text.as_bytes()).unwrap();
        asked
    };
    for (text, most) in [(0, PER_WORKLOAD), (60_000, PER_WORKLOAD_BYTES / 60_000)] {
        let mut approvals = fresh();
        let refused = (0..MOST as u32).find(|number| approvals.request(noon(), of("many", *number, text)).is_err());
        let refused = refused.unwrap();
        assert_eq!(refused as usize, most);
        assert_eq!(approvals.request(noon(), of("many", refused, text)).unwrap_err().reason(), "too_many_approvals");
        assert!(approvals.request(noon(), of("other", refused, text)).is_ok());
    }
}

#[test]
fn a_no_is_not_pushed_out_by_more_questions() {
    let mut approvals = fresh();
    let of = |number: u32| {
        let mut asked = of_instance(number);
        asked.call.agent.workload = "many".to_owned();
        asked
    };
    for number in 0..PER_WORKLOAD as u32 {
        approvals.request(noon(), of(number)).unwrap();
        approvals.deny(later(1), &id(number), approver(ALICE)).unwrap();
    }
    assert_eq!(approvals.request(later(2), of(9999)).unwrap_err().reason(), "too_many_approvals");
    assert_eq!(approvals.request(later(899), of(0)).unwrap_err().reason(), "approval_denied");
    assert!(approvals.request(later(2), of_instance(9998)).is_ok(), "others have their own share");
    assert!(approvals.request(later(900), of(9999)).is_ok(), "its time is over");
}

#[test]
fn large_calls_are_bounded_together() {
    let mut approvals = fresh();
    let large = |number: u32| {
        let mut asked = of_instance(number);
        let text = format!("{{\"a\":\"{number}{}\"}}", "x".repeat(64_000));
        asked.call.arguments = Arguments::read(text.as_bytes()).unwrap();
        asked
    };
    let refused = (0..MOST as u32).find(|number| approvals.request(noon(), large(*number)).is_err()).unwrap();
    assert_eq!(refused as usize, MOST_BYTES / 64_010);
    assert_eq!(approvals.request(noon(), large(refused)).unwrap_err().reason(), "approvals_full");
    assert!(approvals.request(noon(), of_instance(9999)).is_ok(), "a small one fits");
    approvals.expire(later(900));
    assert_eq!(approvals.request(later(900), large(refused)).unwrap().forgotten.len(), 1);
}

#[test]
fn what_ended_can_be_looked_up_for_a_day() {
    let mut approvals = granted();
    use_up(&mut approvals, later(61)).unwrap();
    let day = 24 * 60 * 60;
    assert!(approvals.prune(later(61 + day)).is_empty());
    assert_eq!(approvals.prune(later(62 + day)), [id(1)]);
    assert_eq!(use_up(&mut approvals, later(62 + day)), Err("approval_unknown"));
    let mut approvals = waiting();
    assert!(approvals.prune(later(62 + day)).is_empty(), "what waits is not over");
    // An old entry takes nothing along.
    let mut approvals = granted();
    use_up(&mut approvals, later(61)).unwrap();
    approvals.request(later(day), asked(2, call(1))).unwrap();
    approvals.grant(later(day), &id(2), approver(ALICE)).unwrap();
    assert_eq!(approvals.prune(later(62 + day)), [id(1)]);
    assert_eq!(use_up(&mut approvals, later(62 + day)).unwrap().id, id(2));
}

#[test]
fn what_was_kept_is_taken_up_as_it_was() {
    let mut approvals = granted();
    approvals.request(later(61), asked(2, call(2))).unwrap();
    use_up(&mut approvals, later(62)).unwrap();
    approvals.request(later(63), asked(3, call(1))).unwrap();
    approvals.grant(later(64), &id(3), approver(ALICE)).unwrap();
    // In whatever order, the newest entry of a call is the one that counts.
    for backwards in [false, true] {
        let mut kept: Vec<Entry> = approvals.list().into_iter().cloned().collect();
        if backwards {
            kept.reverse();
        }
        let text = serde_json::to_string(&kept).unwrap();
        let mut again = Approvals::load(serde_json::from_str::<Vec<Entry>>(&text).unwrap());
        assert_eq!(again.list(), approvals.list());
        again.policy_changed(later(65), policy(), groups());
        assert_eq!(use_up(&mut again, later(65)).unwrap().id, id(3));
        assert_eq!(use_up(&mut again, later(65)), Err("approval_used"));
    }
}

#[test]
fn ids_have_one_spelling() {
    let text = id(0x0a1b2c3d).to_string();
    assert_eq!((text.as_str(), text.parse()), ("00000a1b2c3d", Ok(id(0x0a1b2c3d))));
    for text in
        ["", "00000a1b2c3", "00000a1b2c3d0", "00000A1B2C3D", "00:00:0a:1b:2c:3d", "00000a1b2c3g", "+0000a1b2c3d"]
    {
        assert!(text.parse::<Id>().is_err(), "{text}");
    }
}

/// Anything that can happen, in any order.
#[derive(Clone, Debug)]
enum Step {
    Request(u32),
    Grant(u32, u32),
    Deny(u32, u32),
    Use(u32),
    Wait(i64),
    Policy(bool),
    Cancel,
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let uid = proptest::sample::select(vec![ALICE, BOB, AGENT]);
    prop_oneof![
        4 => (0..3_u32).prop_map(Step::Request),
        4 => (0..12_u32, uid.clone()).prop_map(|(id, uid)| Step::Grant(id, uid)),
        1 => (0..12_u32, uid).prop_map(|(id, uid)| Step::Deny(id, uid)),
        6 => (0..3_u32).prop_map(Step::Use),
        2 => proptest::sample::select(vec![1, 200, 899, 1000]).prop_map(Step::Wait),
        1 => any::<bool>().prop_map(Step::Policy),
        1 => Just(Step::Cancel),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    /// Every use was preceded by a yes of alice for that very call, no older than it may be, under the same policy, that nothing
    /// had used or ended.
    #[test]
    fn no_order_of_events_gives_a_use_without_its_own_yes(steps in proptest::collection::vec(step(), 0..60)) {
        let mut approvals = fresh();
        let (mut now, mut next, mut original) = (noon(), 0, true);
        // Of each call, when a yes was given that can still be used.
        let mut open: HashMap<u32, Timestamp> = HashMap::new();
        let mut calls: HashMap<Id, u32> = HashMap::new();
        for step in steps {
            match step {
                Step::Request(number) => {
                    if let Ok(requested) = approvals.request(now, asked(next, call(number))) {
                        prop_assert_eq!(requested.granted, open.get(&number).is_some_and(|at| now < *at + SignedDuration::from_secs(300)));
                        calls.entry(requested.id).or_insert(number);
                        next += 1;
                    }
                }
                Step::Grant(number, uid) => {
                    if approvals.grant(now, &id(number), approver(uid)).is_ok() {
                        prop_assert_eq!(uid, ALICE);
                        prop_assert!(original);
                        open.insert(calls[&id(number)], now);
                    }
                }
                Step::Deny(number, uid) => {
                    if approvals.deny(now, &id(number), approver(uid)).is_ok() {
                        prop_assert!(uid == ALICE || uid == AGENT);
                        open.remove(&calls[&id(number)]);
                    }
                }
                Step::Use(number) => {
                    let used = approvals.use_up(now, &call(number).hash(), &names(&["leads"])).is_ok();
                    let yes = open.get(&number).is_some_and(|at| now < *at + SignedDuration::from_secs(300));
                    prop_assert_eq!(used, yes && original);
                    if used {
                        open.remove(&number);
                    }
                }
                Step::Wait(seconds) => {
                    now += SignedDuration::from_secs(seconds);
                    if seconds == 1000 {
                        approvals.expire(now);
                        approvals.prune(now);
                    }
                }
                Step::Policy(same) => {
                    original = same;
                    open.retain(|_, _| same);
                    let digest = if same { policy() } else { Digest::of(b"other") };
                    approvals.policy_changed(now, digest, groups());
                }
                Step::Cancel => {
                    approvals.cancel_of(now, Whose::Workload("support"));
                    open.clear();
                }
                Step::Restart => {
                    let kept: Vec<Entry> = approvals.list().into_iter().cloned().collect();
                    approvals = Approvals::load(kept);
                    let digest = if original { policy() } else { Digest::of(b"other") };
                    approvals.policy_changed(now, digest, groups());
                }
            }
        }
    }
}
