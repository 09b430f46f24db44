//! Sessions of agents over HTTP: which there are, whose, and how many.
//!
//! Enters: callers, ids that they show, the time. Leaves: what a session holds, to the one whose it is. Never: a difference
//! between a session that is somebody else's and one that does not exist; and no id that a server gave.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use jiff::Timestamp;

use crate::{control::verifier::lock, proofs::base64url};

#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub all: usize,
    pub per_caller: usize,
    /// A session that is not used for so long ends.
    pub idle: Duration,
    /// Requests of one caller that are under way without a session, as those of the stateless version are.
    pub visits: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { all: 1024, per_caller: 16, idle: Duration::from_secs(30 * 60), visits: 64 }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SessionError {
    #[error("the caller has as many sessions as it may: end one")]
    TooManyOfCaller,
    #[error("there are as many sessions as there may be")]
    TooMany,
    #[error("the caller has as many requests under way as it may")]
    TooManyVisits,
    #[error("there is no randomness for a session's id")]
    NoRandomness,
    #[error("the policy reaches the server in another way by now: begin again")]
    Replaced,
}

impl SessionError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TooManyOfCaller => "mcp_too_many_sessions",
            Self::TooMany => "mcp_sessions_full",
            Self::TooManyVisits => "mcp_too_many_requests",
            Self::NoRandomness => "internal",
            Self::Replaced => "mcp_server_changed",
        }
    }
}

/// 192 random bits: whoever has it still has to be the caller whose it is.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SessionId(String);

impl SessionId {
    fn random() -> Result<Self, SessionError> {
        let mut bytes = [0; 24];
        aws_lc_rs::rand::fill(&mut bytes).map_err(|_| SessionError::NoRandomness)?;
        Ok(Self(base64url::encode(bytes)))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionId")
    }
}

struct Entry<T> {
    server: String,
    /// Whose it is.
    key: String,
    /// Who it is counted for.
    caller: String,
    used: Timestamp,
    content: T,
}

/// A request without a session, as long as it is under way.
pub struct Visit {
    visits: Arc<Mutex<HashMap<String, usize>>>,
    caller: String,
}

impl Drop for Visit {
    fn drop(&mut self) {
        let mut visits = lock(&self.visits);
        if let Some(count) = visits.get_mut(&self.caller) {
            *count -= 1;
            if *count == 0 {
                visits.remove(&self.caller);
            }
        }
    }
}

pub struct Sessions<T> {
    bounds: Bounds,
    visits: Arc<Mutex<HashMap<String, usize>>>,
    entries: Mutex<HashMap<SessionId, Entry<T>>>,
}

impl<T: Clone> Sessions<T> {
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, visits: Arc::default(), entries: Mutex::default() }
    }

    /// A new session. What is idle makes room first, and is returned, as somebody has to end it.
    pub fn open(
        &self,
        now: Timestamp,
        server: &str,
        key: &str,
        caller: &str,
        content: T,
    ) -> (Result<SessionId, SessionError>, Vec<T>) {
        let id = match SessionId::random() {
            Ok(id) => id,
            Err(error) => return (Err(error), Vec::new()),
        };
        let mut entries = lock(&self.entries);
        let idle = take(&mut entries, |entry| is_idle(entry.used, now, self.bounds.idle));
        if entries.len() >= self.bounds.all {
            return (Err(SessionError::TooMany), idle);
        }
        if entries.values().filter(|entry| entry.caller == caller).count() >= self.bounds.per_caller {
            return (Err(SessionError::TooManyOfCaller), idle);
        }
        let (server, key, caller) = (server.to_owned(), key.to_owned(), caller.to_owned());
        entries.insert(id.clone(), Entry { server, key, caller, used: now, content });
        (Ok(id), idle)
    }

    /// A request that needs no session.
    pub fn visit(&self, caller: &str) -> Result<Visit, SessionError> {
        let mut visits = lock(&self.visits);
        let count = visits.entry(caller.to_owned()).or_default();
        if *count >= self.bounds.visits {
            return Err(SessionError::TooManyVisits);
        }
        *count += 1;
        Ok(Visit { visits: self.visits.clone(), caller: caller.to_owned() })
    }

    /// What the caller's session with a server holds; it is used by that.
    pub fn get(&self, now: Timestamp, server: &str, key: &str, id: &str) -> Option<T> {
        let mut entries = lock(&self.entries);
        let entry = entries.get_mut(&SessionId(id.to_owned()))?;
        let is_theirs = entry.server == server && entry.key == key;
        if !is_theirs || is_idle(entry.used, now, self.bounds.idle) {
            return None;
        }
        entry.used = entry.used.max(now);
        Some(entry.content.clone())
    }

    /// Ends a session, if it is the caller's.
    pub fn close(&self, server: &str, key: &str, id: &str) -> Option<T> {
        let mut entries = lock(&self.entries);
        let id = SessionId(id.to_owned());
        entries.get(&id).filter(|entry| entry.server == server && entry.key == key)?;
        entries.remove(&id).map(|entry| entry.content)
    }

    /// Takes out what is idle, and what `ended` says has ended.
    pub fn sweep(&self, now: Timestamp, ended: impl Fn(&T) -> bool) -> Vec<T> {
        take(&mut lock(&self.entries), |entry| is_idle(entry.used, now, self.bounds.idle) || ended(&entry.content))
    }

    /// Takes out all sessions that fit, by server, whose they are, and what they hold.
    pub fn close_where(&self, fits: impl Fn(&str, &str, &T) -> bool) -> Vec<T> {
        take(&mut lock(&self.entries), |entry| fits(&entry.server, &entry.key, &entry.content))
    }

    pub fn all(&self) -> Vec<T> {
        lock(&self.entries).values().map(|entry| entry.content.clone()).collect()
    }

    pub fn len(&self) -> usize {
        lock(&self.entries).len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn take<T>(entries: &mut HashMap<SessionId, Entry<T>>, fits: impl Fn(&Entry<T>) -> bool) -> Vec<T> {
    entries.extract_if(|_, entry| fits(entry)).map(|(_, entry)| entry.content).collect()
}

/// A clock that went back makes nothing idle.
fn is_idle(used: Timestamp, now: Timestamp, idle: Duration) -> bool {
    Duration::try_from(now.duration_since(used)).is_ok_and(|unused| unused >= idle)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn sessions() -> Sessions<u32> {
        Sessions::new(Bounds { all: 4, per_caller: 2, idle: Duration::from_secs(60), visits: 2 })
    }

    /// For a caller who acts for nobody.
    fn open(
        sessions: &Sessions<u32>,
        second: i64,
        server: &str,
        caller: &str,
        content: u32,
    ) -> Result<SessionId, SessionError> {
        sessions.open(at(second), server, caller, caller, content).0
    }

    #[test]
    fn a_session_is_its_callers_at_its_server() {
        let sessions = sessions();
        let id = open(&sessions, 0, "files", "a", 1).unwrap();
        assert_eq!(sessions.get(at(1), "files", "a", id.as_str()), Some(1));
        assert_eq!(sessions.get(at(1), "files", "b", id.as_str()), None);
        assert_eq!(sessions.get(at(1), "tools", "a", id.as_str()), None);
        assert_eq!(sessions.get(at(1), "files", "a", "other"), None);
        assert_eq!(sessions.close("files", "b", id.as_str()), None);
        assert_eq!(sessions.close("files", "a", id.as_str()), Some(1));
        assert_eq!(sessions.get(at(1), "files", "a", id.as_str()), None);
    }

    #[test]
    fn ids_are_long_and_never_the_same() {
        let sessions = sessions();
        let one = open(&sessions, 0, "files", "a", 1).unwrap();
        let other = open(&sessions, 0, "files", "a", 2).unwrap();
        assert_ne!(one, other);
        assert_eq!(one.as_str().len(), 32);
        assert!(!format!("{one:?}").contains(one.as_str()));
    }

    #[test]
    fn there_are_so_many_and_no_more() {
        let sessions = sessions();
        for content in 1..=2 {
            open(&sessions, 0, "files", "a", content).unwrap();
        }
        assert_eq!(open(&sessions, 1, "tools", "a", 0), Err(SessionError::TooManyOfCaller));
        open(&sessions, 1, "files", "b", 0).unwrap();
        open(&sessions, 1, "files", "c", 0).unwrap();
        assert_eq!(open(&sessions, 1, "files", "d", 0), Err(SessionError::TooMany));
        // The first two are idle by now, and are to be ended.
        let (opened, mut idle) = sessions.open(at(60), "files", "d", "d", 7);
        idle.sort();
        assert!(opened.is_ok() && idle == [1, 2], "{idle:?}");
    }

    #[test]
    fn a_caller_with_many_tokens_has_no_more_than_with_one() {
        let sessions = sessions();
        let ids: Vec<_> = ["a 1", "a 2"].map(|key| sessions.open(at(0), "files", key, "a", 0).0.unwrap()).into();
        assert_eq!(sessions.open(at(0), "files", "a 3", "a", 0).0, Err(SessionError::TooManyOfCaller));
        assert_eq!(sessions.get(at(1), "files", "a 2", ids[0].as_str()), None, "it acts for somebody else there");
    }

    #[test]
    fn a_caller_has_so_many_requests_under_way() {
        let sessions = sessions();
        let one = sessions.visit("a").unwrap();
        let _two = sessions.visit("a").unwrap();
        assert_eq!(sessions.visit("a").err(), Some(SessionError::TooManyVisits));
        assert!(sessions.visit("b").is_ok());
        drop(one);
        assert!(sessions.visit("a").is_ok());
    }

    #[test]
    fn a_session_that_is_not_used_ends() {
        let sessions = sessions();
        let id = open(&sessions, 0, "files", "a", 1).unwrap();
        assert_eq!(sessions.get(at(59), "files", "a", id.as_str()), Some(1));
        assert_eq!(sessions.get(at(118), "files", "a", id.as_str()), Some(1));
        assert_eq!(sessions.get(at(178), "files", "a", id.as_str()), None);
        assert_eq!(sessions.sweep(at(178), |_| false), [1]);
        open(&sessions, 200, "files", "a", 2).unwrap();
        // A clock that was set back.
        assert!(sessions.sweep(at(0), |_| false).is_empty());
        assert_eq!(sessions.sweep(at(200), |content| *content == 2), [2]);
        assert!(sessions.is_empty());
    }
}
