//! This node as an issuer of tokens: by which keys it signs, and what became of what it signed.
//!
//! Enters: exchanges that were decided, the time. Leaves: tokens, and by what each of them ends. Never: a decision, or a token of
//! which nothing is kept: one that nobody remembers is refused.

pub mod ring;

use std::collections::HashMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{digest::Digest, proofs::exchange::Exchanged, store::revoked::Revoked};

/// Tokens that live at one time. The longest ones take 10 KiB each.
const MAX_ISSUED: usize = 16_384;
/// Of these, of one actor.
const MAX_PER_ACTOR: usize = 1024;
/// And of all instances of one workload, or of one peer.
const MAX_PER_SHARE: usize = MAX_ISSUED / 4;
/// Bytes of everything by which one token ends: grants keep it too.
const MAX_NAMES: usize = 6 << 10;

/// One token, as it is remembered.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Issued {
    pub jti: String,
    /// By which key it is signed.
    pub kid: String,
    /// [`crate::proofs::claims::VerifiedToken::token_hash`]
    pub hash: Digest,
    pub delegation: String,
    /// SPIFFE ID.
    pub actor: String,
    /// The workload or peer that it is.
    pub share: String,
    /// All that it says: of a token of the node's own nobody is asked what it is worth.
    pub token: Exchanged,
    /// Everything besides itself by whose revocation it ends, and since when that exists: the token that it was exchanged for, and
    /// all before that one; whoever acts.
    pub ends_with: Vec<(Revoked, Option<Timestamp>)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IssueError {
    #[error("there are as many tokens as this node remembers: wait until some have expired")]
    Full,
    #[error("the caller has {MAX_PER_ACTOR} tokens that live: use them")]
    TooMany,
    #[error("the token would depend on too much: exchange a shorter chain")]
    TooLong,
    #[error("the token would depend on something whose name cannot be written down: rename it, if it is a cgroup")]
    Nameless,
}

impl IssueError {
    pub fn reason(self) -> &'static str {
        match self {
            Self::Full => "tokens_full",
            Self::TooMany => "too_many_tokens",
            Self::TooLong => "exchange_too_long",
            Self::Nameless => "exchange_nameless",
        }
    }
}

/// Those that live.
#[derive(Default)]
pub struct Tokens {
    live: HashMap<String, Issued>,
    of_actor: HashMap<String, usize>,
    of_share: HashMap<String, usize>,
}

impl Tokens {
    pub fn new(kept: Vec<Issued>) -> Self {
        let mut tokens = Self::default();
        kept.into_iter().for_each(|issued| tokens.enter(issued));
        tokens
    }

    pub fn get(&self, jti: &str) -> Option<&Issued> {
        self.live.get(jti)
    }

    pub fn len(&self) -> usize {
        self.live.len()
    }

    pub fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// Whether there is room for one more.
    pub fn admits(
        &self,
        actor: &str,
        share: &str,
        ends_with: &[(Revoked, Option<Timestamp>)],
    ) -> Result<(), IssueError> {
        if self.live.len() >= MAX_ISSUED {
            return Err(IssueError::Full);
        }
        let is_full = |counts: &HashMap<String, usize>, name: &str, most| counts.get(name).is_some_and(|n| *n >= most);
        if is_full(&self.of_actor, actor, MAX_PER_ACTOR) || is_full(&self.of_share, share, MAX_PER_SHARE) {
            return Err(IssueError::TooMany);
        }
        let mut bytes = 0;
        for (name, _) in ends_with {
            let text = name.to_string();
            // What could not be read back would make the store worth nothing at the next start.
            if text.parse::<Revoked>().as_ref() != Ok(name) {
                return Err(IssueError::Nameless);
            }
            bytes += text.len() + 40;
        }
        if bytes > MAX_NAMES { Err(IssueError::TooLong) } else { Ok(()) }
    }

    pub fn enter(&mut self, issued: Issued) {
        *self.of_actor.entry(issued.actor.clone()).or_default() += 1;
        *self.of_share.entry(issued.share.clone()).or_default() += 1;
        self.live.insert(issued.jti.clone(), issued);
    }

    /// Forgets those that have expired; their ids.
    pub fn expire(&mut self, now: Timestamp) -> Vec<String> {
        self.remove(|issued| issued.token.expires <= now)
    }

    /// Forgets those that end with something; their ids.
    pub fn forget(&mut self, name: &Revoked) -> Vec<String> {
        self.remove(|issued| issued.ends_with.iter().any(|(found, _)| found == name))
    }

    fn remove(&mut self, is_over: impl Fn(&Issued) -> bool) -> Vec<String> {
        let over: Vec<String> =
            self.live.values().filter(|issued| is_over(issued)).map(|issued| issued.jti.clone()).collect();
        let one_less = |counts: &mut HashMap<String, usize>, name: &str| {
            if let Some(count) = counts.get_mut(name) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(name);
                }
            }
        };
        for issued in over.iter().filter_map(|jti| self.live.remove(jti)) {
            one_less(&mut self.of_actor, &issued.actor);
            one_less(&mut self.of_share, &issued.share);
        }
        over
    }
}

#[cfg(test)]
pub mod tests {
    use jiff::SignedDuration;

    use super::*;

    pub fn token(subject: &str, expires: Timestamp) -> Exchanged {
        Exchanged {
            subject: subject.into(),
            audience: vec!["ledger".into()],
            scopes: vec!["read".into()],
            issued_at: noon(),
            expires,
            confirmation: Default::default(),
            act: Default::default(),
            may_act: None,
            tenant: None,
            subject_issuer: "https://idp.example.org".into(),
        }
    }

    fn noon() -> Timestamp {
        "2026-11-26T12:00:00Z".parse().unwrap()
    }

    fn issued(number: usize, actor: &str) -> Issued {
        Issued {
            jti: number.to_string(),
            kid: "k".into(),
            hash: Digest::of(b"x"),
            delegation: "d".into(),
            actor: actor.into(),
            share: "workload w".into(),
            token: token("alice", noon() + SignedDuration::from_secs(number as i64)),
            ends_with: Vec::new(),
        }
    }

    #[test]
    fn nobody_fills_the_memory_alone() {
        let mut tokens = Tokens::new((1..=MAX_PER_ACTOR).map(|number| issued(number, "a")).collect());
        assert_eq!(tokens.admits("a", "w", &[]), Err(IssueError::TooMany));
        assert_eq!(tokens.admits("b", "w", &[]), Ok(()));
        assert_eq!(tokens.expire(noon() + SignedDuration::from_secs(1)), ["1"]);
        assert_eq!(tokens.admits("a", "w", &[]), Ok(()));
        assert!(tokens.get("1").is_none() && tokens.get("2").is_some());
        for number in 0..MAX_ISSUED - tokens.len() {
            tokens.enter(issued(10_000 + number, &format!("c{}", number / MAX_PER_ACTOR)));
        }
        assert_eq!(tokens.admits("b", "w", &[]), Err(IssueError::Full));
        tokens.expire(noon() + SignedDuration::from_hours(1_000));
        assert!(tokens.is_empty() && tokens.of_actor.is_empty());
    }

    #[test]
    fn what_a_token_depends_on_has_a_bound() {
        let name = |n: usize| (Revoked::Issuer(format!("https://{n}.{}", "x".repeat(1000))), None);
        let names: Vec<_> = (0..6).map(name).collect();
        assert_eq!(Tokens::default().admits("a", "w", &names), Err(IssueError::TooLong));
        assert_eq!(Tokens::default().admits("a", "w", &names[..5]), Ok(()));
        for odd in [Revoked::Instance("/a\nb".into()), Revoked::Workload(String::new())] {
            assert_eq!(Tokens::default().admits("a", "w", &[(odd, None)]), Err(IssueError::Nameless));
        }
    }
}
