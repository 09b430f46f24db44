//! The client's certificates, as a proxy passes them on.
//!
//! Enters: the value of the one header in which a proxy writes them. Leaves: certificates, of which nobody has vouched for
//! any. Never: an opinion about who set the header; [`super::forward`] asks only proxies that are known.

use percent_encoding::percent_decode_str;
use rustls::pki_types::{CertificateDer, pem::PemObject};

use super::problem::Problem;
use crate::digest::Digest;

/// Of `X-Forwarded-Client-Cert`, as Envoy sets it: `Key=value` pairs with `;` between, some values in quotes.
///
/// Envoy writes names of the certificate into it as they are, so that who made the certificate writes a part of the header.
/// Before that part stands `Hash`, which Envoy always sets: the certificate is the one of the only hash, or none.
pub fn of_envoy(value: &str) -> Result<Vec<CertificateDer<'static>>, Problem> {
    let pairs = pairs(value)?;
    let (hash, cert, chain) = (only("Hash", &pairs)?, only("Cert", &pairs)?, only("Chain", &pairs)?);
    let Some(pem) = chain.or(cert) else { return Ok(Vec::new()) };
    let chain = chain_of(pem)?;
    let shown = chain.first().map(|leaf| Digest::of(leaf).to_string());
    match shown.as_deref() == hash {
        true => Ok(chain),
        false => Err(ambiguous("the certificate in the header is not the one of its Hash")),
    }
}

/// Of `X-SSL-Client-Cert`, as the example sets it from nginx's `$ssl_client_escaped_cert`.
pub fn of_nginx(value: &str) -> Result<Vec<CertificateDer<'static>>, Problem> {
    if value.is_empty() { Ok(Vec::new()) } else { chain_of(value) }
}

/// Certificates in PEM, percent-encoded; at least one.
fn chain_of(escaped: &str) -> Result<Vec<CertificateDer<'static>>, Problem> {
    let malformed = || Problem::forbidden("forwarded_certificate_malformed", "the client certificate is no PEM");
    let pem = percent_decode_str(escaped).decode_utf8().map_err(|_| malformed())?;
    let chain = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>();
    chain.ok().filter(|chain| !chain.is_empty()).ok_or_else(malformed)
}

/// The pairs of one element. Several elements mean several proxies, of which only the last is known.
fn pairs(text: &str) -> Result<Vec<(String, String)>, Problem> {
    let (mut quoted, mut escaped) = (false, false);
    let mut parts = vec![String::new()];
    for c in text.chars() {
        match c {
            '\\' if quoted && !escaped => {
                escaped = true;
                continue;
            }
            '"' if !escaped => quoted = !quoted,
            ',' if !quoted => {
                return Err(ambiguous("the request passed more than one proxy: let Envoy SANITIZE_SET the header"));
            }
            ';' if !quoted => parts.push(String::new()),
            c => parts.last_mut().into_iter().for_each(|part| part.push(c)),
        }
        escaped = false;
    }
    if quoted {
        return Err(ambiguous("a quotation in the header does not end"));
    }
    let split = |part: String| part.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
    Ok(parts.into_iter().filter_map(split).collect())
}

/// The value of a key, which is there once or not at all: another one is somebody else's.
fn only<'a>(key: &str, pairs: &'a [(String, String)]) -> Result<Option<&'a str>, Problem> {
    let mut found = pairs.iter().filter(|(name, _)| name == key).map(|(_, value)| value.as_str());
    let first = found.next();
    match found.next() {
        None => Ok(first),
        Some(_) => Err(ambiguous(&format!("{key} is there twice"))),
    }
}

fn ambiguous(detail: &str) -> Problem {
    Problem::forbidden("forwarded_header_ambiguous", detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "-----BEGIN%20CERTIFICATE-----%0AMAA=%0A-----END%20CERTIFICATE-----%0A";
    const OTHER: &str = "-----BEGIN%20CERTIFICATE-----%0AMAEA%0A-----END%20CERTIFICATE-----%0A";

    fn hash_of(pem: &str) -> String {
        Digest::of(&chain_of(pem).unwrap()[0]).to_string()
    }

    /// The certificates that are found, or the reason for none.
    fn found(value: &str) -> Result<Vec<CertificateDer<'static>>, String> {
        of_envoy(value).map_err(|problem| problem.reason.clone())
    }

    #[test]
    fn envoys_header_is_taken_apart_as_it_is_written() {
        let (hash, own) = (hash_of(OWN), Ok(chain_of(OWN).unwrap()));
        let both = format!("{OWN}{OTHER}");
        assert_eq!(found(&format!(r#"By=spiffe://a/b;Hash={hash};Cert="{OWN}""#)), own);
        assert_eq!(found(&format!(r#"Hash={hash};Cert="{OWN}";Chain="{OWN}""#)), own);
        assert_eq!(found(&format!(r#"Hash={hash};Cert="{OWN}";Chain="{both}""#)), Ok(chain_of(&both).unwrap()));
        assert_eq!(found(&format!(r#"Hash={hash};Cert="{OWN}";Subject="CN=a;b,c=\"d\\";URI=;DNS=a;DNS=b"#)), own);
        // A client without a certificate, and one whose certificate Envoy does not pass on.
        assert_eq!(found(""), Ok(Vec::new()));
        assert_eq!(found(&format!("Hash={hash};Subject=\"\"")), Ok(Vec::new()));
    }

    #[test]
    fn names_of_a_certificate_cannot_name_another() {
        let (own, other) = (hash_of(OWN), hash_of(OTHER));
        let begin = format!(r#"Hash={own};Cert="{OWN}""#);
        for injected in [
            format!(r#"Chain="{OTHER}""#),
            format!("Chain={OTHER}"),
            format!(r#"Cert="{OTHER}""#),
            format!(r#"Hash={other};Chain="{OTHER}""#),
            format!(r#"x,Hash={other};Cert="{OTHER}""#),
            r#"""#.to_owned(),
        ] {
            for name in ["URI", "DNS"] {
                let header = format!("{begin};{name}=a;{injected}");
                assert_eq!(found(&header), Err("forwarded_header_ambiguous".to_owned()), "{header}");
            }
            // Where the certificate itself is not passed on.
            assert!(found(&format!("Hash={own};URI=a;{injected}")).is_err(), "{injected}");
            // OpenSSL and BoringSSL escape subjects (RFC 4514).
            let subject = format!("CN=\";{injected};\"").replace('\\', "\\\\").replace('"', "\\\"");
            assert_eq!(found(&format!("{begin};Subject=\"{subject}\"")), Ok(chain_of(OWN).unwrap()), "{subject}");
        }
    }

    #[test]
    fn without_its_hash_a_certificate_is_nobodys() {
        for header in [
            format!(r#"Cert="{OWN}""#),
            format!(r#"Hash=;Cert="{OWN}""#),
            format!(r#"Hash={};Cert="{OWN}""#, hash_of(OTHER)),
            format!(r#"hash={};Cert="{OWN}""#, hash_of(OWN)),
            "By=x;Hash=a,By=y;Hash=b".to_owned(),
        ] {
            assert_eq!(found(&header), Err("forwarded_header_ambiguous".to_owned()), "{header}");
        }
        let malformed = Err("forwarded_certificate_malformed".to_owned());
        for pem in ["", "x", "%ff", "-----BEGIN%20CERTIFICATE-----%0A*%0A-----END%20CERTIFICATE-----%0A"] {
            assert_eq!(found(&format!(r#"Hash=a;Cert="{pem}""#)), malformed, "{pem}");
        }
    }
}
