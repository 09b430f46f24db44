//! Nonces that a server gives out and need not remember (RFC 9449, 8 and 9): a MAC of the time they were made.
//!
//! Enters: a secret, the time. Leaves: nonces, and whether one is fresh. Never: state per client.

use std::time::Duration;

use aws_lc_rs::{
    constant_time::verify_slices_are_equal,
    hmac::{HMAC_SHA256, Key, sign},
};
use jiff::Timestamp;

use crate::proofs::base64url;

const TAG_BYTES: usize = 16;
const NONCE_BYTES: usize = 8 + TAG_BYTES;

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NonceError {
    #[error("the DPoP proof has no nonce, and needs one")]
    Missing,
    #[error("the DPoP proof's nonce is not of this server")]
    Unknown,
    #[error("the DPoP proof's nonce is too old")]
    Old,
}

impl NonceError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Missing => "dpop_nonce_missing",
            Self::Unknown => "dpop_nonce_unknown",
            Self::Old => "dpop_nonce_old",
        }
    }
}

/// Gives out nonces, and takes them back while they are fresh.
pub struct Nonces {
    current: Key,
    previous: Option<Key>,
    window: Duration,
}

impl Nonces {
    /// A nonce is taken in the window of time in which it was made, and in the next.
    pub fn new(secret: &[u8; 32], window: Duration) -> Self {
        let window = window.max(Duration::from_secs(1));
        Self { current: Key::new(HMAC_SHA256, secret), previous: None, window }
    }

    /// From now on nonces are made with this secret. Those of the one before are taken until the next rotation.
    pub fn rotate(&mut self, secret: &[u8; 32]) {
        let key = Key::new(HMAC_SHA256, secret);
        self.previous = Some(std::mem::replace(&mut self.current, key));
    }

    /// The nonce of this window: the same for everybody, as it is no secret.
    pub fn issue(&self, now: Timestamp) -> String {
        let window = self.window_of(now);
        let mut nonce = window.to_be_bytes().to_vec();
        nonce.extend(tag(&self.current, window));
        base64url::encode(nonce)
    }

    pub fn check(&self, nonce: &str, now: Timestamp) -> Result<(), NonceError> {
        let nonce: [u8; NONCE_BYTES] = base64url::decode_array(nonce).map_err(|_| NonceError::Unknown)?;
        let (window, given) = nonce.split_first_chunk::<8>().ok_or(NonceError::Unknown)?;
        let window = u64::from_be_bytes(*window);
        let is_of = |key: &Key| verify_slices_are_equal(&tag(key, window), given).is_ok();
        if !is_of(&self.current) && !self.previous.as_ref().is_some_and(is_of) {
            return Err(NonceError::Unknown);
        }
        let now = self.window_of(now);
        // One of a later window was made before the clock was set back: it will have its time.
        if window == now || Some(window) == now.checked_sub(1) { Ok(()) } else { Err(NonceError::Old) }
    }

    fn window_of(&self, now: Timestamp) -> u64 {
        u64::try_from(now.as_second()).unwrap_or(0) / self.window.as_secs()
    }
}

fn tag(key: &Key, window: u64) -> [u8; TAG_BYTES] {
    let mut message = b"authd dpop nonce".to_vec();
    message.extend(window.to_be_bytes());
    let full = sign(key, &message);
    let mut tag = [0; TAG_BYTES];
    tag.iter_mut().zip(full.as_ref()).for_each(|(to, from)| *to = *from);
    tag
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proofs::testing::at;

    const WINDOW: Duration = Duration::from_secs(100);

    #[test]
    fn a_nonce_is_taken_in_its_window_and_the_next() {
        // Windows of 100 s begin at multiples of 100, as the tests' time does.
        let nonces = Nonces::new(&[7; 32], WINDOW);
        let nonce = nonces.issue(at(0));
        assert_eq!(nonce, nonces.issue(at(99)));
        assert_ne!(nonce, nonces.issue(at(100)));
        for offset in [0, 99, 100, 199] {
            assert_eq!(nonces.check(&nonce, at(offset)), Ok(()), "{offset}");
        }
        for offset in [200, 100_000, -1] {
            assert_eq!(nonces.check(&nonce, at(offset)), Err(NonceError::Old), "{offset}");
        }
    }

    #[test]
    fn a_nonce_of_nobody_is_unknown_whatever_bit_is_changed() {
        let nonces = Nonces::new(&[7; 32], WINDOW);
        let nonce = base64url::decode(nonces.issue(at(0))).unwrap();
        for bit in 0..nonce.len() * 8 {
            let mut changed = nonce.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(nonces.check(&base64url::encode(changed), at(0)), Err(NonceError::Unknown), "{bit}");
        }
        for text in ["", "a", "AAAA", &base64url::encode([0; NONCE_BYTES]), &format!("{}=", nonces.issue(at(0)))] {
            assert_eq!(nonces.check(text, at(0)), Err(NonceError::Unknown), "{text}");
        }
        let others = Nonces::new(&[8; 32], WINDOW).issue(at(0));
        assert_eq!(nonces.check(&others, at(0)), Err(NonceError::Unknown));
    }

    #[test]
    fn a_secret_is_forgotten_with_the_second_rotation() {
        let mut nonces = Nonces::new(&[1; 32], WINDOW);
        let nonce = nonces.issue(at(0));
        nonces.rotate(&[2; 32]);
        assert_ne!(nonce, nonces.issue(at(0)));
        assert_eq!(nonces.check(&nonce, at(0)), Ok(()));
        assert_eq!(nonces.check(&nonces.issue(at(0)), at(0)), Ok(()));
        nonces.rotate(&[3; 32]);
        assert_eq!(nonces.check(&nonce, at(0)), Err(NonceError::Unknown));
    }
}
