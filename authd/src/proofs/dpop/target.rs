//! What a request is for, as DPoP compares it: a URI without query and fragment, normalised (RFC 9449, 4.3; RFC 3986,
//! 6.2.2 and 6.2.3).
//!
//! Enters: a URI. Leaves: its normal form. Never: a name that is resolved.

use fluent_uri::Uri;

/// Scheme, authority and path in normal form.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    scheme: String,
    authority: String,
    path: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("this is no absolute http or https URI")]
pub struct NoTarget;

impl Target {
    /// From an absolute URI; query and fragment are dropped. User information is refused: no request is sent with it.
    pub fn parse(uri: &str) -> Result<Self, NoTarget> {
        let uri = Uri::parse(uri).map_err(|_| NoTarget)?.normalize();
        let scheme = uri.scheme().as_str();
        let authority = uri.authority().ok_or(NoTarget)?;
        if !["http", "https"].contains(&scheme) || authority.userinfo().is_some() || authority.host().is_empty() {
            return Err(NoTarget);
        }
        let path = match uri.path().as_str() {
            "" => "/",
            path => path,
        };
        Ok(Self { scheme: scheme.to_owned(), authority: authority.as_str().to_owned(), path: path.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_uri_are_the_same_target() {
        let plain = Target::parse("https://api.example.org/v1/pay~me").unwrap();
        for same in [
            "HTTPS://API.example.ORG/v1/pay~me",
            "https://api.example.org:443/v1/pay~me",
            "https://api.example.org:/v1/pay~me",
            "https://api.example.org/v1/pay%7Eme",
            "https://api.example.org/v1/pay%7eme?amount=1#top",
            "https://api.example.org/v1/x/../pay~me",
        ] {
            assert_eq!(Target::parse(same).as_ref(), Ok(&plain), "{same}");
        }
        assert_eq!(Target::parse("http://a:80"), Target::parse("http://a/"));
        assert_eq!(Target::parse("https://[2001:DB8::1]/"), Target::parse("https://[2001:db8:0::1]:443/"));
    }

    #[test]
    fn other_uris_are_other_targets() {
        let plain = Target::parse("https://api.example.org/v1/pay").unwrap();
        for other in [
            "http://api.example.org/v1/pay",
            "https://api.example.org:8443/v1/pay",
            "https://api.example.org:80/v1/pay",
            "https://api.example.org./v1/pay",
            "https://api.example.com/v1/pay",
            "https://api.example.org/v1/pay/",
            "https://api.example.org/v1/Pay",
            "https://api.example.org/v1%2Fpay",
            "https://api.example.org//v1/pay",
        ] {
            assert_ne!(Target::parse(other).as_ref(), Ok(&plain), "{other}");
        }
    }

    #[test]
    fn what_no_request_is_for_is_no_target() {
        for text in [
            "",
            "/v1/pay",
            "//api.example.org/",
            "https:/v1",
            "https:///v1",
            "ftp://a/",
            "https://u@a/",
            "https://u:p@a/",
            "https://a b/",
            "https://a/\u{e9}",
            "https://a/%zz",
            "https://a:99x/",
            "https://a\\b/",
            "urn:x",
        ] {
            assert_eq!(Target::parse(text), Err(NoTarget), "{text:?}");
        }
    }
}
