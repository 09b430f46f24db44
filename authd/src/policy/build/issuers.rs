//! Issuers: what their tokens say, how they are checked, and where keys and answers come from.

use std::path::PathBuf;

use fluent_uri::{Uri, component::Host};
use toml::Spanned;

use super::{Builder, place};
use crate::{
    policy::{
        diagnostic::{Place, Source},
        file::{self, IssuerKind},
        model::{Issuer, Keys, OWN_ISSUER, TokenCheck},
    },
    proofs::{
        claims::{Leeway, MAX_LEEWAY},
        jws::Algorithm,
    },
};

impl Builder {
    /// `None` only after an error.
    pub(super) fn issuer(&mut self, source: &Source, raw: file::Issuer) -> Option<Issuer> {
        let file::Issuer {
            name,
            kind,
            issuer,
            jwks_url,
            jwks_file,
            introspection_url,
            client_id,
            client_secret_file,
            algorithms,
            max_ttl,
            leeway,
            access_token_type,
            allow_private,
        } = raw;
        let at = place(source, name.span());
        self.name(&at, name.as_ref());
        if name.as_ref() == OWN_ISSUER {
            let message = format!("`{OWN_ISSUER}` is what policies call this node");
            self.error("reserved_name", &at, message, "choose another name");
        }
        // Known from here on, so that a rule that names it is not called wrong as well.
        match self.issuers.get(name.as_ref()) {
            Some((_, first)) => self.duplicate(&at, &first.clone(), "issuer", name.as_ref()),
            None => drop(self.issuers.insert(name.as_ref().clone(), (usize::MAX, at.clone()))),
        }
        self.issuer_claim(source, &issuer);
        for url in [&jwks_url, &introspection_url].into_iter().flatten() {
            self.endpoint(source, url);
        }
        if let Some(allow) = &allow_private
            && jwks_url.is_none()
            && introspection_url.is_none()
        {
            self.unused(source, allow, "allow_private", "nothing is fetched for this issuer");
        }
        let check = match kind {
            IssuerKind::Jwt => {
                let why = "tokens of this issuer are checked with its keys, not by asking it";
                self.unused_if(source, &introspection_url, "introspection_url", why);
                self.unused_if(source, &client_id, "client_id", why);
                self.unused_if(source, &client_secret_file, "client_secret_file", why);
                self.jwt(source, &at, name.as_ref(), jwks_url, jwks_file, algorithms)
            }
            IssuerKind::Introspection => {
                let why = "this issuer is asked about its tokens; no signature is checked";
                self.unused_if(source, &jwks_url, "jwks_url", why);
                self.unused_if(source, &jwks_file, "jwks_file", why);
                self.unused_if(source, &access_token_type, "access_token_type", why);
                self.unused_if(source, &algorithms.into_iter().next(), "algorithms", why);
                self.introspection(&at, name.as_ref(), introspection_url, client_id, client_secret_file)
            }
        };
        let max_ttl = max_ttl.and_then(|max_ttl| self.duration(source, &max_ttl));
        let leeway = leeway.map_or(Some(Leeway::default()), |text| self.leeway(source, &text));
        Some(Issuer {
            name: name.into_inner(),
            issuer: issuer.into_inner(),
            check: check?,
            max_ttl,
            leeway: leeway?,
            access_token_type: access_token_type.is_some_and(Spanned::into_inner),
            allow_private: allow_private.is_some_and(Spanned::into_inner),
            place: at,
        })
    }

    fn jwt(
        &mut self,
        source: &Source,
        at: &Place,
        name: &str,
        url: Option<Spanned<String>>,
        file: Option<Spanned<String>>,
        texts: Vec<Spanned<String>>,
    ) -> Option<TokenCheck> {
        if texts.is_empty() {
            self.error(
                "issuer_algorithms",
                at,
                format!("issuer `{name}` accepts no algorithm"),
                "list what it signs with, such as `algorithms = [\"ES256\"]`",
            );
        }
        let algorithms = self.algorithms(source, texts);
        let keys = match (url, file) {
            (Some(url), None) => Keys::Url(url.into_inner()),
            (None, Some(file)) if !file.as_ref().is_empty() => Keys::File(PathBuf::from(file.into_inner())),
            _ => {
                self.error(
                    "issuer_keys",
                    at,
                    format!("issuer `{name}` needs either `jwks_url` or `jwks_file`"),
                    "say where its public keys are, in one way",
                );
                return None;
            }
        };
        Some(TokenCheck::Jwt { keys, algorithms })
    }

    fn introspection(
        &mut self,
        at: &Place,
        name: &str,
        url: Option<Spanned<String>>,
        client_id: Option<Spanned<String>>,
        secret: Option<Spanned<String>>,
    ) -> Option<TokenCheck> {
        if url.is_none() {
            self.error(
                "issuer_introspection",
                at,
                format!("issuer `{name}` has no `introspection_url`"),
                "say where tokens are introspected (RFC 7662)",
            );
        }
        let client_id = client_id.map(Spanned::into_inner).filter(|id| !id.is_empty());
        if client_id.is_none() {
            self.error(
                "issuer_client",
                at,
                format!("issuer `{name}` has no `client_id`: it has to know who asks about tokens (RFC 7662, 2.1)"),
                "register authd with the issuer; add `client_id`, and `client_secret_file` unless TLS shows who asks",
            );
        }
        Some(TokenCheck::Introspection {
            url: url?.into_inner(),
            client_id: client_id?,
            client_secret_file: secret.map(|file| PathBuf::from(file.into_inner())),
        })
    }

    fn algorithms(&mut self, source: &Source, texts: Vec<Spanned<String>>) -> Vec<Algorithm> {
        let mut algorithms = Vec::new();
        for text in texts {
            let at = place(source, text.span());
            let name = text.as_ref();
            match Algorithm::from_name(name) {
                Some(algorithm) if algorithms.contains(&algorithm) => {
                    self.error("duplicate_algorithm", &at, format!("`{name}` stands here twice"), "remove one");
                }
                Some(algorithm) => algorithms.push(algorithm),
                None => {
                    let why = match name.get(..2) {
                        Some("HS") => ": with a shared secret, everybody who can check a token can make one",
                        _ => "",
                    };
                    self.error(
                        "bad_algorithm",
                        &at,
                        format!("`{name}` is no signature algorithm that authd accepts{why}"),
                        format!("use some of {}", Algorithm::ALL.map(Algorithm::name).join(", ")),
                    );
                }
            }
        }
        algorithms
    }

    fn leeway(&mut self, source: &Source, text: &Spanned<String>) -> Option<Leeway> {
        let leeway = self.duration(source, text)?;
        if leeway > MAX_LEEWAY {
            self.error(
                "long_leeway",
                &place(source, text.span()),
                "every token would live that much longer",
                format!("keep the clocks together, and choose {}s at most", MAX_LEEWAY.as_secs()),
            );
        }
        Some(Leeway::new(leeway))
    }

    fn issuer_claim(&mut self, source: &Source, issuer: &Spanned<String>) {
        if !is_safe(issuer.as_ref()) {
            self.error(
                "bad_issuer",
                &place(source, issuer.span()),
                format!("issuer `{}` is no https URL", issuer.as_ref()),
                "write the `iss` claim exactly as the issuer's tokens carry it (RFC 8414, 2)",
            );
        }
    }

    fn endpoint(&mut self, source: &Source, url: &Spanned<String>) {
        if !is_safe(url.as_ref()) {
            self.error(
                "bad_url",
                &place(source, url.span()),
                format!("`{}` is no https URL", url.as_ref()),
                "keys and answers must not come over a connection that anybody can change; http is for loopback only",
            );
        }
    }

    pub(super) fn unused_if<T>(&mut self, source: &Source, setting: &Option<Spanned<T>>, key: &str, why: &str) {
        if let Some(setting) = setting {
            self.unused(source, setting, key, why);
        }
    }

    pub(super) fn unused<T>(&mut self, source: &Source, setting: &Spanned<T>, key: &str, why: &str) {
        let at = place(source, setting.span());
        self.error("unused_setting", &at, format!("`{key}` has no use here: {why}"), format!("remove `{key}`"));
    }
}

/// An absolute https URL, or an http one on loopback, without user information and fragment.
pub(super) fn is_safe(url: &str) -> bool {
    let Ok(uri) = Uri::parse(url) else { return false };
    let Some(authority) = uri.authority() else { return false };
    let on_loopback = match authority.host_parsed() {
        Host::Ipv4(address) => address.is_loopback(),
        Host::Ipv6(address) => address.is_loopback(),
        _ => authority.host().eq_ignore_ascii_case("localhost"),
    };
    let scheme = match uri.scheme().as_str() {
        "https" => true,
        "http" => on_loopback,
        _ => false,
    };
    let plain = authority.userinfo().is_none() && !uri.has_fragment();
    scheme && plain && !authority.host().is_empty() && authority.port_to_u16().is_ok()
}

#[cfg(test)]
mod tests {
    use super::is_safe;

    #[test]
    fn keys_come_over_https_or_from_this_node() {
        for url in [
            "https://idp.example.org",
            "https://idp.example.org:8443/jwks.json?v=1",
            "https://[2001:db8::1]/k",
            "http://127.0.0.1:8080/k",
            "http://127.1.2.3/k",
            "http://[::1]:80/k",
            "http://localhost/k",
        ] {
            assert!(is_safe(url), "{url}");
        }
        for url in [
            "http://idp.example.org",
            "http://10.0.0.1/k",
            "http://127.0.0.1.evil.example/k",
            "http://0.0.0.0/k",
            "http://localhost.evil.example/",
            "http://[::ffff:127.0.0.1]/k",
            "https://user:pass@idp/k",
            "https://idp#k",
            "https://",
            "https:///k",
            "https://idp:99999/k",
            "ftp://idp/k",
            "file:///etc/k",
            "idp.example.org",
            "",
            "https://idp example/k",
            "HTTP\\://x",
        ] {
            assert!(!is_safe(url), "{url}");
        }
    }
}
