//! The client's certificates, as a proxy passes them on.
//!
//! Enters: the value of the one header in which a proxy writes them. Leaves: certificates, of which nobody has vouched for
//! any. Never: an opinion about who set the header; [`super::forward`] asks only proxies that are known.

use percent_encoding::percent_decode_str;
use rustls::pki_types::{CertificateDer, pem::PemObject};

use super::problem::Problem;

/// Of `X-Forwarded-Client-Cert`, as Envoy sets it.
pub fn of_envoy(value: &str) -> Result<Vec<CertificateDer<'static>>, Problem> {
    chain_of(certificate_of(value)?.as_deref().unwrap_or_default())
}

/// Of `X-SSL-Client-Cert`, as the example sets it from nginx's `$ssl_client_escaped_cert`.
pub fn of_nginx(value: &str) -> Result<Vec<CertificateDer<'static>>, Problem> {
    chain_of(value)
}

/// Certificates in PEM, percent-encoded; nothing means that the client showed none.
fn chain_of(escaped: &str) -> Result<Vec<CertificateDer<'static>>, Problem> {
    if escaped.is_empty() {
        return Ok(Vec::new());
    }
    let malformed = || Problem::forbidden("forwarded_certificate_malformed", "the client certificate is no PEM");
    let pem = percent_decode_str(escaped).decode_utf8().map_err(|_| malformed())?;
    let chain = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>();
    chain.ok().filter(|chain| !chain.is_empty()).ok_or_else(malformed)
}

/// The certificate of Envoy's header: one element of `Key="value"` pairs. Several elements mean several proxies, of which
/// only the last is known.
fn certificate_of(xfcc: &str) -> Result<Option<String>, Problem> {
    let mut quoted = false;
    let mut parts = vec![String::new()];
    for c in xfcc.chars() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => {
                let detail = "the request passed more than one proxy: let Envoy SANITIZE_SET the header";
                return Err(Problem::forbidden("forwarded_header_ambiguous", detail));
            }
            ';' if !quoted => parts.push(String::new()),
            c => {
                if let Some(part) = parts.last_mut() {
                    part.push(c);
                }
            }
        }
    }
    let value = |key: &str| parts.iter().find_map(|part| part.strip_prefix(key)?.strip_prefix('='));
    Ok(value("Chain").or_else(|| value("Cert")).map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn envoys_header_is_taken_apart_as_it_is_written() {
        let found = |text: &str| certificate_of(text).ok().flatten();
        assert_eq!(found(r#"Hash=ab;Cert="-----BEGIN%20X";Subject="CN=a;b,c""#).as_deref(), Some("-----BEGIN%20X"));
        assert_eq!(found("Hash=ab").as_deref(), None);
        assert_eq!(found(r#"Cert="a";Chain="a%0Ab""#).as_deref(), Some("a%0Ab"));
        assert!(certificate_of("By=x;Hash=a,By=y;Hash=b").is_err());
    }
}
