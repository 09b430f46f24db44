//! A conversation with a process that says what it should not, and with agents that do not do what they should.

use std::sync::atomic::Ordering;

use serde_json::json;
use tokio::time::timeout;

use super::*;
use crate::control::mcp::{
    Limits,
    testing::{SOON, Talk, next},
};

#[tokio::test]
async fn an_id_that_is_used_again_gets_no_answer_to_what_it_stood_for_before() {
    let mut talk = Talk::new(Limits::default());
    let (_, mut first) = talk.ask(json!({ "id": 1, "method": "tools/list" }));
    let mut server = talk.server().await;
    let listed = server.reads().await.unwrap()["id"].take();
    talk.cancel(json!(1)).await;
    let cancelled = server.reads().await.unwrap();
    assert_eq!((&cancelled["method"], &cancelled["params"]["requestId"]), (&json!("notifications/cancelled"), &listed));
    assert_eq!(next(&mut first).await, None);
    let (_, mut second) = talk.ask(json!({ "id": 1, "method": "resources/list" }));
    let other = server.reads().await.unwrap()["id"].take();
    assert_ne!(listed, other);
    let tools = json!({ "tools": [{ "name": "secret" }] });
    server.answers(&listed, tools.clone()).await;
    server.answers(&json!(1_000_000), tools).await;
    server.answers(&other, json!({ "resources": [] })).await;
    let expected = json!({ "jsonrpc": "2.0", "id": 1, "result": { "resources": [] } });
    assert_eq!(next(&mut second).await, Some(expected));
    assert_eq!(next(&mut second).await, None);
    // A list that says that it failed is a list.
    let (_, mut third) = talk.ask(json!({ "id": 1, "method": "tools/list" }));
    let id = server.reads().await.unwrap()["id"].take();
    server.answers(&id, json!({ "isError": true, "tools": [{ "name": "secret" }, { "name": "add" }] })).await;
    assert_eq!(next(&mut third).await.unwrap()["result"]["tools"], json!([{ "name": "add" }]));
}

#[tokio::test]
async fn a_place_is_taken_until_the_agent_has_read() {
    let mut talk = Talk::new(Limits { in_flight: 1, ..Limits::default() });
    let (task, mut slow) = talk.ask(json!({
        "id": 1, "method": "tools/call", "params": { "name": "t", "_meta": { "progressToken": 1 } },
    }));
    let mut server = talk.server().await;
    let id = server.reads().await.unwrap()["id"].take();
    let progress = json!({ "jsonrpc": "2.0", "method": "notifications/progress", "params": { "progressToken": 1 } });
    for _ in 0..QUEUE {
        server.says(progress.clone()).await;
    }
    server.answers(&id, json!({})).await;
    timeout(SOON, async {
        while lock(&talk.gate.reports).is_empty() {
            sleep(Duration::from_millis(5)).await
        }
    })
    .await
    .unwrap();
    // The server has answered, and there is no room for that.
    let (_, mut other) = talk.ask(json!({ "id": 2, "method": "ping" }));
    assert_eq!(next(&mut other).await, Some(json!({ "refused": "mcp_too_many_requests" })));
    while next(&mut slow).await.is_some() {}
    timeout(SOON, task).await.unwrap().unwrap();
    let (_, mut other) = talk.ask(json!({ "id": 2, "method": "ping" }));
    server.reads().await.unwrap();
    other.close();
}

#[tokio::test]
async fn who_does_not_read_holds_nothing_up_at_the_end() {
    for cancelled in [true, false] {
        let mut talk = Talk::new(Limits::default());
        let (task, _unread) = talk.ask(json!({
            "id": 1, "method": "tools/call", "params": { "name": "t", "_meta": { "progressToken": 1 } },
        }));
        let mut server = talk.server().await;
        server.reads().await.unwrap();
        for _ in 0..2 * QUEUE {
            let params = json!({ "progressToken": 1 });
            server.says(json!({ "jsonrpc": "2.0", "method": "notifications/progress", "params": params })).await;
        }
        sleep(Duration::from_millis(100)).await;
        assert!(!task.is_finished());
        match cancelled {
            true => talk.cancel(json!(1)).await,
            false => talk.conversation.end().await,
        }
        timeout(SOON, task).await.unwrap().unwrap();
        assert_eq!(*lock(&talk.gate.reports), [("t".to_owned(), "cancelled".to_owned())]);
    }
}

#[tokio::test]
async fn an_answer_is_not_owed_for_ever_whatever_comes_instead() {
    let (silence, owed) = (Duration::from_secs(1), Duration::from_secs(3));
    let mut talk = Talk::new(Limits { silence, owed, ..Limits::default() });
    let (task, gone) = talk.ask(json!({
        "id": 1, "method": "tools/call", "params": { "name": "t", "_meta": { "progressToken": 1 } },
    }));
    let mut server = talk.server().await;
    server.reads().await.unwrap();
    // What the server does for an agent that left is followed to its end all the same, and that comes.
    drop(gone);
    let params = json!({ "progressToken": 1 });
    let progress = json!({ "jsonrpc": "2.0", "method": "notifications/progress", "params": params });
    let begun = tokio::time::Instant::now();
    while !task.is_finished() {
        assert!(begun.elapsed() < SOON);
        server.says(progress.clone()).await;
        sleep(Duration::from_millis(50)).await;
    }
    assert!(begun.elapsed() > silence * 2, "{:?}", begun.elapsed());
    assert_eq!(*lock(&talk.gate.reports), [("t".to_owned(), "failed".to_owned())]);
}

#[tokio::test]
async fn nothing_but_a_call_passes_for_whoever_is_not_let_in_any_more() {
    for notifies in [false, true] {
        let mut talk = Talk::new(Limits::default());
        let (_, mut heard) = talk.ask(json!({ "id": 1, "method": "ping" }));
        let mut server = talk.server().await;
        let id = server.reads().await.unwrap()["id"].take();
        server.answers(&id, json!({})).await;
        next(&mut heard).await.unwrap();
        let mut listening = talk.conversation.listen(talk.agent.clone(), None).await.unwrap();
        talk.gate.lost.store(true, Ordering::SeqCst);
        if notifies {
            let notification = Notification { method: "notifications/initialized".to_owned(), params: None };
            let refused = talk.conversation.notify(&talk.agent, notification).await.unwrap_err();
            assert_eq!(refused.error.reason(), "workload_revoked");
        } else {
            server.says(json!({ "jsonrpc": "2.0", "method": "notifications/message", "params": {} })).await;
        }
        assert_eq!(next(&mut listening).await, None);
        assert!(talk.conversation.has_ended());
        assert_eq!(server.reads().await, None, "the process has ended, and heard nothing");
        let (_, mut heard) = talk.ask(json!({ "id": 2, "method": "tools/list" }));
        assert_eq!(next(&mut heard).await, Some(json!({ "refused": "workload_revoked" })));
    }
}

#[tokio::test]
async fn a_subscription_of_a_process_has_the_agents_id_in_all_that_comes_of_it() {
    const TAG: &str = "io.modelcontextprotocol/subscriptionId";
    let mut talk = Talk::new(Limits::default());
    let (_, mut heard) = talk.ask_in(Era::Stateless, json!({ "id": "s", "method": "subscriptions/listen" }));
    let mut server = talk.server().await;
    let id = server.reads().await.unwrap()["id"].take();
    let params = json!({ "_meta": { TAG: id } });
    server.says(json!({ "jsonrpc": "2.0", "method": "notifications/tools/list_changed", "params": params })).await;
    server.answers(&id, json!({ "_meta": { TAG: id } })).await;
    assert_eq!(next(&mut heard).await.unwrap()["params"]["_meta"][TAG], "s");
    let end = next(&mut heard).await.unwrap();
    assert_eq!((&end["id"], &end["result"]["_meta"][TAG]), (&json!("s"), &json!("s")));
}

#[tokio::test]
async fn a_call_is_forwarded_as_it_was_decided() {
    let mut talk = Talk::new(Limits::default());
    let arguments = json!({ "b": 1.0, "a": "\u{e9}" });
    let params = json!({ "name": "t", "arguments": arguments, "_meta": { "vendor/x": "unseen" } });
    let (_, _heard) = talk.ask(json!({ "id": 1, "method": "tools/call", "params": params }));
    let sent = talk.server().await.reads().await.unwrap();
    assert_eq!(sent["params"], json!({ "name": "t", "arguments": { "a": "\u{e9}", "b": 1 }, "_meta": {} }));
    assert_eq!(sent["params"]["arguments"].to_string(), "{\"a\":\"\u{e9}\",\"b\":1}");
    // What has no canonical form is denied, and not an error of the protocol: a model can mend it.
    let params = json!({ "name": "t", "arguments": { "n": 9_007_199_254_740_993_u64 } });
    let (_, mut heard) = talk.ask(json!({ "id": 2, "method": "tools/call", "params": params }));
    let denied = next(&mut heard).await.unwrap();
    assert_eq!(denied["result"]["_meta"]["authd/reason"], "json_number_inexact", "{denied}");
}
