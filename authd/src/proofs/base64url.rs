//! base64url without padding (RFC 7515, 2), in its one canonical form.
//!
//! Enters: text. Leaves: bytes. Never: a second spelling of the same bytes; else one token would have several hashes, and
//! a revoked one could come back in another spelling.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("this is no canonical base64url without padding")]
pub struct NotBase64Url;

impl NotBase64Url {
    pub fn reason(&self) -> &'static str {
        "base64url"
    }
}

/// The engine refuses padding, white space, other alphabets, and trailing bits that are not zero (RFC 4648, 3.5).
pub fn decode(text: impl AsRef<[u8]>) -> Result<Vec<u8>, NotBase64Url> {
    URL_SAFE_NO_PAD.decode(text).map_err(|_| NotBase64Url)
}

/// Exactly `N` bytes.
pub fn decode_array<const N: usize>(text: impl AsRef<[u8]>) -> Result<[u8; N], NotBase64Url> {
    decode(text)?.try_into().map_err(|_| NotBase64Url)
}

pub fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_the_canonical_form_is_taken() {
        assert_eq!(decode("AQ"), Ok(vec![1]));
        for other in ["AR", "AQ=", "AQ==", "AQ\n", " AQ", "A Q", "A", "-_+/", "AQ.", "AQ\0", "ÄQ"] {
            assert_eq!(decode(other), Err(NotBase64Url), "{other:?}");
        }
        assert_eq!(decode_array::<1>("AQ"), Ok([1]));
        assert_eq!(decode_array::<2>("AQ"), Err(NotBase64Url));
    }

    proptest! {
        #[test]
        fn what_is_taken_is_written_the_same_way(text in "[A-Za-z0-9_=+/ -]{0,12}") {
            if let Ok(bytes) = decode(&text) {
                prop_assert_eq!(encode(bytes), text);
            }
        }
    }
}
