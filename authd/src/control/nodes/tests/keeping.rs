//! Sessions over time: when there is another one, and what dataplane hears.

use super::*;

#[tokio::test]
async fn dataplane_learns_of_each_session_and_new_callers_get_a_new_one() {
    let ca = Ca::new();
    let there = Control::new(verifier(&ca, Some(&ca.leaf(THERE)), vec![node("here", HERE, None)]));
    let address = there.listen().await;
    let nodes = vec![node("there", THERE, Some(address)), node("me", HERE, Some(address)), node("mute", THERE, None)];
    let settings = verifier(&ca, Some(&ca.leaf(HERE)), nodes);
    let here = Control::new(settings.clone());
    let mut sessions = Sessions::default();
    sessions.follow(&here.shared, &settings);
    assert_eq!(sessions.running.keys().collect::<Vec<_>>(), ["there"], "neither itself nor one without an address");
    sleep(Duration::from_millis(300)).await;
    assert!(there.sessions().is_empty(), "it is not known yet for whom to speak");
    here.speak_for(&[]);
    here.speak_for(&["spiffe://example.org/a", "spiffe://example.org/stranger", "not one"]);
    until(|| here.accepted().len() == 1).await;
    let (node, key, labels) = here.accepted().remove(0);
    assert_eq!((node.as_str(), labels), ("there", vec![("spiffe://example.org/a".to_owned(), 1)]));
    assert!(key == there.sessions()[0].1);
    // Fewer callers, or the same ones again, are nothing to tell.
    here.speak_for(&["spiffe://example.org/a"]);
    sleep(Duration::from_millis(600)).await;
    assert_eq!(there.sessions().len(), 1);
    here.speak_for(&["spiffe://example.org/a", "spiffe://example.org/b"]);
    here.speak_for(&["spiffe://example.org/a", "spiffe://example.org/b", "spiffe://example.org/c"]);
    until(|| here.accepted().len() == 2).await;
    assert_eq!(there.sessions()[1].3.len(), 3, "what comes at one time is told at one time");
    assert!(here.accepted()[1].1 != key);
    // Settings that change nothing here renew nothing, and a task that is not needed any more ends.
    sessions.follow(&here.shared, &settings);
    sleep(Duration::from_millis(300)).await;
    assert_eq!(there.sessions().len(), 2);
    let handle = sessions.running["there"].task.abort_handle();
    sessions.follow(&here.shared, &verifier(&ca, None, settings.model.nodes.clone()));
    assert!(sessions.running.is_empty(), "without a certificate nobody is dialled");
    until(|| handle.is_finished()).await;
}

#[tokio::test]
async fn a_node_that_comes_back_is_found() {
    let ca = Ca::new();
    let there = Control::new(verifier(&ca, Some(&ca.leaf(THERE)), vec![node("here", HERE, None)]));
    let real = there.listen().await;
    // Whoever comes is turned away at first.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (tried, is_back) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let (count, open) = (tried.clone(), is_back.clone());
    tokio::spawn(async move {
        while let Ok((mut caller, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::Relaxed);
            if open.load(Ordering::Relaxed) {
                let mut behind = TcpStream::connect(real).await.unwrap();
                tokio::spawn(async move { tokio::io::copy_bidirectional(&mut caller, &mut behind).await });
            }
        }
    });
    let settings = verifier(&ca, Some(&ca.leaf(HERE)), vec![node("there", THERE, Some(address))]);
    let here = Control::new(settings.clone());
    here.speak_for(&["spiffe://example.org/a"]);
    let mut sessions = Sessions::default();
    sessions.follow(&here.shared, &settings);
    let before = sessions.running["there"].task.id();
    until(|| tried.load(Ordering::Relaxed) >= 2).await;
    sessions.follow(&here.shared, &settings);
    assert_eq!(sessions.running["there"].task.id(), before);
    assert!(here.accepted().is_empty());
    is_back.store(true, Ordering::Relaxed);
    until(|| here.accepted().len() == 1).await;
    // Another address is another session.
    let settings = verifier(&ca, Some(&ca.leaf(HERE)), vec![node("there", THERE, Some(real))]);
    *here.shared.verifier.write().unwrap() = Some(settings.clone());
    sessions.follow(&here.shared, &settings);
    assert_ne!(sessions.running["there"].task.id(), before);
    until(|| here.accepted().len() == 2).await;
}

#[test]
fn pauses_grow_and_sessions_are_renewed_within_their_time() {
    let within = |duration: Duration, middle: u64| {
        let (duration, middle) = (duration.as_millis() as u64, middle);
        assert!((middle * 9 / 10..=middle * 11 / 10).contains(&duration), "{duration} {middle}");
    };
    for (times, milliseconds) in [(0, 200), (1, 400), (5, 6_400), (6, 10_000), (60, 10_000), (u32::MAX, 10_000)] {
        within(pause(times), milliseconds);
    }
    for (seconds, milliseconds) in [(1, 1_000), (600, 300_000), (u32::MAX, 3_600_000)] {
        within(renewal(seconds), milliseconds);
    }
}

#[test]
fn a_failure_is_in_the_log_once_until_there_is_a_session() {
    let ca = Ca::new();
    let settings = verifier(&ca, Some(&ca.leaf(HERE)), vec![node("there", THERE, Some(nowhere()))]);
    let peer = Peer::all(&settings).remove(0);
    let mut log = Log::default();
    let refused = |reason: &str| DialError::Refused { status: hyper::StatusCode::FORBIDDEN, reason: reason.into() };
    assert!(log.failed(&peer, &DialError::Slow) && log.failed(&peer, &refused("node_unknown")));
    assert!(!log.failed(&peer, &DialError::Slow) && !log.failed(&peer, &refused("node_unknown")));
    // Another node does not fill the log, or the memory, with reasons of its own.
    let told = (0..100).filter(|n| log.failed(&peer, &refused(&format!("reason_{n}")))).count();
    assert!(told < MAX_KINDS && log.kinds.len() == MAX_KINDS);
    let batch = |id: &str| {
        let labels = BTreeMap::from([(id.parse().unwrap(), None)]);
        NodeSessionAnswer { key_id: 1, seconds: 60, labels }
    };
    let opened = |id| Opened { key: NodeKey([0; 16]), key_id: 1, batches: vec![batch(id)] };
    log.opened(&peer, &opened("spiffe://example.org/a"));
    assert!(log.failed(&peer, &DialError::Slow));
    assert_eq!(log.refused, ids(&["spiffe://example.org/a"]));
    log.opened(&peer, &opened("spiffe://example.org/b"));
    assert_eq!(log.refused, ids(&["spiffe://example.org/b"]));
}

#[tokio::test]
async fn a_session_is_renewed_by_another_key_before_it_ends() {
    let ca = Ca::new();
    let there = Control::new(verifier(&ca, Some(&ca.leaf(THERE)), vec![node("here", HERE, None)]));
    let address = there.listen().await;
    let settings = verifier(&ca, Some(&ca.leaf(HERE)), vec![node("there", THERE, Some(address))]);
    let here = Control::new(settings.clone());
    here.speak_for(&["spiffe://example.org/brief"]);
    let mut sessions = Sessions::default();
    sessions.follow(&here.shared, &settings);
    until(|| here.accepted().len() == 1).await;
    let begun = Instant::now();
    until(|| here.accepted().len() == 3).await;
    let between = begun.elapsed() / 2;
    assert!(between >= Duration::from_millis(700), "half of 2 s, about: {between:?}");
    let accepted = here.accepted();
    assert!(accepted[0].1 != accepted[1].1 && accepted[1].1 != accepted[2].1);
    // Nobody to speak for is no session: the last one ends by itself.
    here.speak_for(&[]);
    sleep(Duration::from_millis(500)).await;
    let before = here.accepted().len();
    sleep(Duration::from_millis(1_500)).await;
    assert_eq!(here.accepted().len(), before);
}

#[tokio::test]
async fn a_node_that_began_anew_is_spoken_to_again() {
    let ca = Ca::new();
    let there = Control::new(verifier(&ca, Some(&ca.leaf(THERE)), vec![node("here", HERE, None)]));
    let address = there.listen().await;
    let settings = verifier(&ca, Some(&ca.leaf(HERE)), vec![node("there", THERE, Some(address))]);
    let here = Control::new(settings.clone());
    let mut sessions = Sessions::default();
    sessions.follow(&here.shared, &settings);
    here.speak_for(&["spiffe://example.org/a"]);
    until(|| there.sessions().len() == 1).await;
    let (one, other) = (Instance::default(), Instance::default());
    here.shared.nodes.met("there", one);
    until(|| there.sessions().len() == 2).await;
    // The same one again, or another node, has lost nothing.
    here.shared.nodes.met("there", one);
    here.shared.nodes.met("elsewhere", other);
    sleep(Duration::from_millis(600)).await;
    assert_eq!(there.sessions().len(), 2);
    here.shared.nodes.met("there", other);
    until(|| there.sessions().len() == 3).await;
}

#[tokio::test]
async fn whoever_asks_for_a_session_says_which_start_of_it_asks() {
    let ca = Ca::new();
    let listening = node("here", HERE, None);
    let there = Control::new(verifier(&ca, Some(&ca.leaf(THERE)), vec![listening]));
    let renewed = there.shared.nodes.renewal("here");
    let scene_address = there.listen().await;
    let settings = verifier(&ca, Some(&ca.leaf(HERE)), vec![node("there", THERE, Some(scene_address))]);
    let here = Control::new(settings.clone());
    let mut sessions = Sessions::default();
    sessions.follow(&here.shared, &settings);
    here.speak_for(&["spiffe://example.org/a"]);
    timeout(SOON, renewed.notified()).await.expect("the node was not heard of");
}
