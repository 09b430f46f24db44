//! What this process counts: dataplane keeps the sums, because they have to outlive this process.
//!
//! Enters: that something happened. Leaves: how often it did, to dataplane, at most once a second. Never: a caller's text.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{sync::Notify, time::sleep};

use super::{Shared, verifier::lock};
use crate::{
    daemon::metrics::results::{ACCEPTED, Checked, Fetched},
    grants::proof::Shown,
    ipc::{Counted, FromControl, MAX_ENTRIES},
};

const PAUSE: Duration = Duration::from_secs(1);

#[derive(Default)]
pub struct Counts {
    untold: Mutex<BTreeMap<Counted, u32>>,
    changed: Notify,
}

impl Counts {
    pub fn handshake(&self, result: &str) {
        self.add(Counted::Handshake { result: result.to_owned() });
    }

    /// A node asked for a session, and dataplane hears nothing of it.
    pub fn node_session(&self, result: &str) {
        self.add(Counted::NodeSession { result: result.to_owned() });
    }

    /// A proof was refused. Dataplane is asked for nothing then, so that what was accepted before is counted here too.
    pub fn refused(&self, proof: Checked, reason: &str, accepted: &[Shown]) {
        for proof in accepted.iter().flat_map(Checked::of) {
            self.proof(*proof, ACCEPTED);
        }
        self.proof(proof, reason);
    }

    pub fn cached_token(&self) {
        self.add(Counted::CachedToken);
    }

    pub fn fetch(&self, issuer: &str, kind: Fetched, result: &str) {
        self.add(Counted::Fetch { issuer: issuer.to_owned(), kind, result: result.to_owned() });
    }

    pub fn webhook(&self, result: &str) {
        self.add(Counted::Webhook { result: result.to_owned() });
    }

    #[cfg(test)]
    pub fn seen(&self) -> Vec<Counted> {
        lock(&self.untold).keys().cloned().collect()
    }

    fn proof(&self, proof: Checked, result: &str) {
        self.add(Counted::Proof { proof, result: result.to_owned() });
    }

    fn add(&self, what: Counted) {
        let mut untold = lock(&self.untold);
        let times = untold.entry(what).or_default();
        *times = times.saturating_add(1);
        self.changed.notify_one();
    }
}

/// Tells dataplane, as long as this process lives.
pub async fn tell(shared: Arc<Shared>) {
    loop {
        shared.counts.changed.notified().await;
        let untold: Vec<(Counted, u32)> = std::mem::take(&mut *lock(&shared.counts.untold)).into_iter().collect();
        for part in untold.chunks(MAX_ENTRIES) {
            shared.tell(FromControl::Counted { counts: part.to_vec() }).await;
        }
        sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ipc::{Ending, MAX_MESSAGE};

    #[test]
    fn the_same_thing_is_one_entry() {
        let counts = Counts::default();
        counts.handshake("ok");
        counts.handshake("ok");
        counts.refused(Checked::Token, "token_expired", &[]);
        counts.fetch("corp", Fetched::Jwks, "ok");
        let untold = lock(&counts.untold);
        assert_eq!(untold.values().sum::<u32>(), 4);
        assert_eq!(untold.len(), 3);
    }

    #[test]
    fn a_list_of_the_longest_entries_is_one_message() {
        let (issuer, result) = ("x".repeat(64), "x".repeat(32));
        let longest = (Counted::Fetch { issuer, kind: Fetched::Introspection, result }, u32::MAX);
        let counts = FromControl::Counted { counts: vec![longest; MAX_ENTRIES] };
        let longest = (Ending::Bundle { authority: "x".repeat(64) }, Some(jiff::Timestamp::MAX));
        let ends = FromControl::Ends { ends: vec![longest; MAX_ENTRIES] };
        for message in [counts, ends] {
            let length = serde_json::to_vec(&message).unwrap().len();
            assert!(length <= MAX_MESSAGE / 2, "{length}");
        }
    }
}
