//! The `Authorization` header of a request: one scheme and one token (RFC 6750, 2.1; RFC 9449, 7.1).
//!
//! Enters: all values of the header. Leaves: scheme and token. Never: a choice between two, and never a token from
//! elsewhere: those in queries and bodies end up in logs.

use std::fmt;

use super::jws::MAX_BYTES;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scheme {
    Bearer,
    Dpop,
}

impl Scheme {
    pub fn name(self) -> &'static str {
        match self {
            Self::Bearer => "Bearer",
            Self::Dpop => "DPoP",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Credentials<'a> {
    pub scheme: Scheme,
    pub token: &'a str,
}

impl fmt::Debug for Credentials<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("scheme", &self.scheme).finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SchemeError {
    #[error("there is no Authorization header")]
    Missing,
    #[error("there is more than one Authorization header")]
    Repeated,
    #[error("the scheme is neither Bearer nor DPoP")]
    Unsupported,
    #[error("the Authorization header is not a scheme, a space and a token")]
    Malformed,
    #[error("the token is too long")]
    Oversize,
}

impl SchemeError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Missing => "authorization_missing",
            Self::Repeated => "authorization_repeated",
            Self::Unsupported => "authorization_scheme",
            Self::Malformed => "authorization_malformed",
            Self::Oversize => "token_oversize",
        }
    }
}

/// Reads the values of all `Authorization` headers of a request.
pub fn parse<'a>(values: &[&'a [u8]]) -> Result<Credentials<'a>, SchemeError> {
    let value = match values {
        [] => return Err(SchemeError::Missing),
        [value] => std::str::from_utf8(value).map_err(|_| SchemeError::Malformed)?,
        _ => return Err(SchemeError::Repeated),
    };
    let (scheme, token) = value.split_once(' ').unwrap_or((value, ""));
    // RFC 9110, 11.1: in any case.
    let scheme = [Scheme::Bearer, Scheme::Dpop]
        .into_iter()
        .find(|known| known.name().eq_ignore_ascii_case(scheme))
        .ok_or(SchemeError::Unsupported)?;
    let token = token.trim_start_matches(' ');
    if token.len() > MAX_BYTES {
        return Err(SchemeError::Oversize);
    }
    if !is_token68(token) {
        return Err(SchemeError::Malformed);
    }
    Ok(Credentials { scheme, token })
}

/// RFC 9110, 11.2.
pub fn is_token68(token: &str) -> bool {
    let body = token.trim_end_matches('=');
    !body.is_empty() && body.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~+/".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(values: &[&[u8]]) -> &'static str {
        parse(values).map_or_else(|error| error.reason(), |_| "taken")
    }

    #[test]
    fn one_scheme_and_one_token_are_taken() {
        for value in ["Bearer a.b.c", "bearer a.b.c", "BEARER   a.b.c"] {
            assert_eq!(
                parse(&[value.as_bytes()]),
                Ok(Credentials { scheme: Scheme::Bearer, token: "a.b.c" }),
                "{value}"
            );
        }
        let dpop = parse(&[b"DPoP Kz~8mXK1EalYznwH-LC-1fBAo.4Ljp~zsPE_NeO.gxU="]).unwrap();
        assert_eq!((dpop.scheme, dpop.token.len()), (Scheme::Dpop, 44));
        assert!(!format!("{dpop:?}").contains("Kz~8"));
    }

    #[test]
    fn everything_else_is_refused_for_its_own_reason() {
        assert_eq!(reason(&[]), "authorization_missing");
        assert_eq!(reason(&[b"Bearer a", b"Bearer a"]), "authorization_repeated");
        for value in ["Basic YTpi", "Bearer2 a", "", " Bearer a", "Bearer\ta"] {
            assert_eq!(reason(&[value.as_bytes()]), "authorization_scheme", "{value:?}");
        }
        for value in ["Bearer", "Bearer ", "Bearer a b", "Bearer a,DPoP b", "Bearer =", "Bearer a=b", "Bearer \u{e9}"] {
            assert_eq!(reason(&[value.as_bytes()]), "authorization_malformed", "{value:?}");
        }
        for value in [&b"Bearer \xff"[..], b"Bearer a\0", b"Bearer a\r\nX: y"] {
            assert_eq!(reason(&[value]), "authorization_malformed", "{value:?}");
        }
        assert_eq!(reason(&[format!("Bearer {}", "a".repeat(MAX_BYTES + 1)).as_bytes()]), "token_oversize");
    }
}
