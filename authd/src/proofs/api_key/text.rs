//! How an API key is written: `authd_<id>_<secret><checksum>`.
//!
//! Enters: randomness, or what somebody presents. Leaves: a key to be shown once, or its parts. Never: a secret in an error or
//! in debugging output.
//!
//! The alphabet is Crockford's, in lower case: no letter looks like a digit. There is one spelling of a key, so that whatever
//! compares or scans needs no normal form; scanners of source code match
//! `authd_[0-9a-hjkmnp-tv-z]{10}_[0-9a-hjkmnp-tv-z]{47}` and verify the checksum (CRC-32 of all that comes before it), which
//! also tells a typing error from a key that does not exist. CRC-32 notices every change within four neighbouring characters.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::digest::Digest;

const PREFIX: &str = "authd_";
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
/// Bits of a character.
const BITS: u32 = 5;
const ID: usize = 10;
/// 200 bits.
const SECRET: usize = 40;
const CHECKSUM: usize = 7;
const BODY: usize = PREFIX.len() + ID + 1 + SECRET;

/// Characters of a key.
pub const LENGTH: usize = BODY + CHECKSUM;
/// Bytes that make a key. Each gives one character, of which there are 32, so that none is likelier than another.
pub const RANDOMNESS: usize = ID + SECRET;

/// The public part of a key, under which it is listed, recorded and revoked.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyId([u8; ID]);

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the id of an API key has 10 characters of 0-9 and a-z without i, l, o and u")]
pub struct KeyIdError;

/// A key with its secret: made, shown once, wiped. It has neither `Debug` nor `Display`.
pub struct SecretKey(Zeroizing<String>);

/// What a well-formed key consists of.
pub struct Parts<'a> {
    pub id: KeyId,
    pub secret: &'a [u8],
}

impl SecretKey {
    /// From bytes of a cryptographic source. Whoever made them wipes them.
    pub fn generate(randomness: &[u8; RANDOMNESS]) -> Self {
        // With all its room from the start: growing would leave copies behind.
        let mut text = Zeroizing::new(String::with_capacity(LENGTH));
        text.push_str(PREFIX);
        let (id, secret) = randomness.split_at(ID);
        text.extend(id.iter().map(|byte| character(u32::from(*byte))));
        text.push('_');
        text.extend(secret.iter().map(|byte| character(u32::from(*byte))));
        let checksum = checksum(text.as_bytes());
        text.extend(checksum.iter().copied().map(char::from));
        Self(text)
    }

    /// The whole key, for the one who is to have it.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// What a daemon may know of it.
    pub fn public(&self) -> Option<(KeyId, Digest)> {
        parse(&self.0).map(|parts| (parts.id, parts.digest()))
    }
}

impl Parts<'_> {
    /// What is kept instead of the secret.
    ///
    /// One fast hash without salt is enough, and the right thing: salts and slow hashes make guessing costly for secrets that
    /// people choose. Nobody guesses one of 2^200, and a slow hash would only let callers keep the daemon busy.
    pub fn digest(&self) -> Digest {
        Digest::of(self.secret)
    }
}

/// The parts of a key. `None` if it is not one: cut short, mistyped, or something else altogether.
pub fn parse(text: &str) -> Option<Parts<'_>> {
    if text.len() != LENGTH {
        return None;
    }
    let (body, sum) = text.as_bytes().split_at_checked(BODY)?;
    let (id, secret) = body.strip_prefix(PREFIX.as_bytes())?.split_at_checked(ID)?;
    let id = KeyId::from_bytes(id)?;
    let secret = secret.strip_prefix(b"_")?;
    let written = secret.iter().all(|byte| ALPHABET.contains(byte));
    (written && sum == checksum(body)).then_some(Parts { id, secret })
}

impl KeyId {
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let id = bytes.try_into().ok()?;
        bytes.iter().all(|byte| ALPHABET.contains(byte)).then_some(Self(id))
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{}", char::from(*byte)))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for KeyId {
    type Err = KeyIdError;

    fn from_str(text: &str) -> Result<Self, KeyIdError> {
        Self::from_bytes(text.as_bytes()).ok_or(KeyIdError)
    }
}

impl TryFrom<String> for KeyId {
    type Error = KeyIdError;

    fn try_from(text: String) -> Result<Self, KeyIdError> {
        text.parse()
    }
}

impl From<KeyId> for String {
    fn from(id: KeyId) -> Self {
        id.to_string()
    }
}

/// The character of the lowest five bits.
fn character(value: u32) -> char {
    // In range: an index below 32 into 32 characters.
    char::from(ALPHABET[(value & 31) as usize])
}

/// CRC-32 (ISO-HDLC, the one of zip), highest bits first.
fn checksum(body: &[u8]) -> [u8; CHECKSUM] {
    let crc = crc32fast::hash(body);
    let mut sum = [0; CHECKSUM];
    for (position, to) in (0u32..).zip(sum.iter_mut().rev()) {
        *to = character(crc.checked_shr(BITS * position).unwrap_or(0)) as u8;
    }
    sum
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key() -> SecretKey {
        SecretKey::generate(&std::array::from_fn(|at| (at * 37) as u8))
    }

    #[test]
    fn a_key_reads_as_documented() {
        // zlib.crc32 of Python gives 0x8d4817c8 for the first 57 characters.
        let text = key().reveal().to_owned();
        assert_eq!(text.len(), 64);
        assert_eq!(text, "authd_05afmsy38d_jqw16bgntz49ekrx27chpv05afmsy38djqw16bgn26mg5y8");
    }

    #[test]
    fn the_parts_are_what_went_in() {
        let key = key();
        let parts = parse(key.reveal()).unwrap();
        assert_eq!(parts.id.to_string(), &key.reveal()[6..16]);
        assert_eq!(parts.secret, &key.reveal().as_bytes()[17..57]);
        assert_eq!(key.public(), Some((parts.id, Digest::of(parts.secret))));
    }

    #[test]
    fn every_change_of_one_character_is_refused() {
        let key = key();
        for at in 0..LENGTH {
            for to in (0..=127u8).map(char::from) {
                let changed: String =
                    key.reveal().chars().enumerate().map(|(i, c)| if i == at { to } else { c }).collect();
                assert_eq!(parse(&changed).is_some(), changed == key.reveal(), "{changed}");
            }
        }
    }

    #[test]
    fn neighbours_that_changed_places_are_noticed() {
        let key = key();
        for at in 0..LENGTH - 1 {
            let mut bytes = key.reveal().as_bytes().to_vec();
            bytes.swap(at, at + 1);
            let swapped = String::from_utf8(bytes).unwrap();
            assert_eq!(parse(&swapped).is_some(), swapped == key.reveal(), "{swapped}");
        }
    }

    #[test]
    fn all_characters_are_equally_likely() {
        let mut counts = [0; 32];
        for byte in 0..=255u32 {
            counts[ALPHABET.iter().position(|c| char::from(*c) == character(byte)).unwrap()] += 1;
        }
        assert_eq!(counts, [8; 32]);
    }

    proptest! {
        #[test]
        fn no_text_is_too_odd_to_be_refused(text in any::<String>()) {
            prop_assert!(parse(&text).is_none());
            prop_assert!(text.parse::<KeyId>().is_err() || text.len() == ID);
        }

        #[test]
        fn no_text_of_the_right_length_is_too_odd(text in "authd_[0-9a-zé]{10}_[0-9a-zé]{46}") {
            prop_assert!(parse(&text).is_none());
        }

        #[test]
        fn every_generated_key_is_well_formed(bytes in any::<[[u8; 25]; 2]>()) {
            let key = SecretKey::generate(bytes.as_flattened().try_into().unwrap());
            prop_assert!(key.public().is_some());
            prop_assert_eq!(key.reveal().len(), LENGTH);
        }
    }
}
