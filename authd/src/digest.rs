//! SHA-256 values and other bytes that people see as hexadecimal digits.
//!
//! Enters: bytes, or the digits that OpenSSL and others print. Leaves: one spelling. Never: what was hashed.

use std::{fmt, str::FromStr};

use aws_lc_rs::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use serde::{Deserialize, Serialize};

/// A SHA-256 value.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; SHA256_OUTPUT_LEN]);

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a SHA-256 value has 64 hexadecimal digits, in pairs, with or without colons between them")]
pub struct DigestError;

impl Digest {
    pub fn of(bytes: &[u8]) -> Self {
        let mut value = [0; SHA256_OUTPUT_LEN];
        for (to, from) in value.iter_mut().zip(digest(&SHA256, bytes).as_ref()) {
            *to = *from;
        }
        Self(value)
    }

    pub const fn from_bytes(bytes: [u8; SHA256_OUTPUT_LEN]) -> Self {
        Self(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; SHA256_OUTPUT_LEN] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        read_hex(text).and_then(|bytes| bytes.try_into().ok()).map(Self).ok_or(DigestError)
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, DigestError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// Lower-case digits without colons.
pub fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

/// Pairs of digits of either case, with a colon between all of them or none. `None` if it is anything else.
pub fn read_hex(text: &str) -> Option<Vec<u8>> {
    fn byte(pair: &[u8]) -> Option<u8> {
        let [high, low] = pair else { return None };
        let digit = |c: u8| char::from(c).to_digit(16);
        u8::try_from(digit(*high)? << 4 | digit(*low)?).ok()
    }
    if text.contains(':') {
        return text.split(':').map(|pair| byte(pair.as_bytes())).collect();
    }
    text.as_bytes().chunks(2).map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_value_comes_out() {
        // FIPS 180-2, appendix B.1.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Digest::of(b"abc").to_string(), abc);
        assert_eq!(abc.to_uppercase().parse(), Ok(Digest::of(b"abc")));
    }

    #[test]
    fn digits_with_colons_are_read_and_other_marks_are_not() {
        assert_eq!(read_hex("0A:1b:ff"), Some(vec![0x0a, 0x1b, 0xff]));
        for text in ["0a:1b:", ":0a", "0a1b:ff", "0a 1b", "0x0a", "a", "0a:b", "+a", "é", "0a::1b"] {
            assert_eq!(read_hex(text), None, "{text}");
        }
        assert_eq!("00".parse::<Digest>(), Err(DigestError));
        assert_eq!("00".repeat(33).parse::<Digest>(), Err(DigestError));
    }
}
