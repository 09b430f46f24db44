//! Numbers of the users that a policy names.
//!
//! Enters: names, and what the system's user database says of each. Leaves: numbers, or nobody; names whose look-up failed, until it
//! does not. Never: a name whose look-up failed for one that is not there: a directory may come after this daemon does.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use nix::{errno::Errno, unistd::User};

/// Names whose look-up failed are looked up again after so long.
const AGAIN: Duration = Duration::from_mins(1);

/// Of one policy.
#[derive(Default)]
pub struct Users {
    known: HashMap<String, Option<u32>>,
    failed: HashSet<String>,
    /// When one failed last.
    tried: Option<Instant>,
}

impl Users {
    /// A number is itself, and is looked up nowhere. What is known is not looked up again.
    pub fn number(
        &mut self,
        user: &str,
        now: Instant,
        look_up: impl Fn(&str) -> Result<Option<u32>, Errno>,
    ) -> Option<u32> {
        if !user.is_empty() && user.bytes().all(|byte| byte.is_ascii_digit()) {
            return user.parse().ok();
        }
        if let Some(known) = self.known.get(user) {
            return *known;
        }
        match look_up(user) {
            Ok(number) => {
                if number.is_none() {
                    tracing::warn!(user, "this node has no such user, who so approves nothing here");
                }
                if self.failed.remove(user) && number.is_some() {
                    tracing::info!(user, "this user was found after all");
                }
                self.known.insert(user.to_owned(), number);
                number
            }
            Err(error) => {
                self.tried = Some(now);
                if self.failed.insert(user.to_owned()) {
                    tracing::warn!(user, %error, "looking up this user failed, who approves nothing here until it does not");
                }
                None
            }
        }
    }

    /// Whether some names have to be looked up again.
    pub fn is_due(&self, now: Instant) -> bool {
        !self.failed.is_empty() && self.tried.is_none_or(|tried| now.duration_since(tried) >= AGAIN)
    }

    /// Names whose look-up failed.
    pub fn failed(&self) -> usize {
        self.failed.len()
    }
}

/// What the system says. `None`: there is no such user.
pub fn look_up(user: &str) -> Result<Option<u32>, Errno> {
    Ok(User::from_name(user)?.map(|user| user.uid.as_raw()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_up_that_failed_is_made_again_and_one_that_found_nobody_is_not() {
        let (start, mut users) = (Instant::now(), Users::default());
        let later = |seconds| start + Duration::from_secs(seconds);
        let absent = |_: &str| Err(Errno::ECONNREFUSED);
        assert_eq!(users.number("alice", start, absent), None);
        assert_eq!(users.number("bob", start, |_| Ok(None)), None);
        assert_eq!((users.failed(), users.is_due(later(59)), users.is_due(later(60))), (1, false, true));
        // It failed once more, and is left alone as long again.
        assert_eq!(users.number("alice", later(60), absent), None);
        assert_eq!((users.is_due(later(119)), users.is_due(later(120))), (false, true));
        let found = |user: &str| if user == "bob" { panic!("nobody is nobody") } else { Ok(Some(1001)) };
        assert_eq!(users.number("alice", later(120), found), Some(1001));
        assert_eq!(users.number("bob", later(120), found), None);
        assert!(!users.is_due(later(999)));
        // What was found is not lost with the next failure.
        assert_eq!(users.number("alice", later(999), absent), Some(1001));
        assert_eq!(users.number("1002", later(999), absent), Some(1002));
        assert_eq!(users.failed(), 0);
    }
}
