//! Authorities, and what peers and rules say of certificates.

use std::path::PathBuf;

use toml::Spanned;

use super::{Builder, place};
use crate::{
    policy::{
        diagnostic::{Place, Source},
        file::{self, Proof, Texts},
        model::{Authority, Model, MtlsRequirement, Subject},
    },
    proofs::x509::{
        crl::CrlPolicy,
        identity::DnsPattern,
        spiffe::{SpiffeId, TrustDomain},
    },
};

impl Builder {
    pub(super) fn authorities(&mut self, raw: Vec<(Source, Spanned<file::Authority>)>) -> Vec<Authority> {
        raw.into_iter()
            .enumerate()
            .map(|(index, (source, raw))| self.authority(&source, index, raw.into_inner()))
            .collect()
    }

    fn authority(&mut self, source: &Source, index: usize, raw: file::Authority) -> Authority {
        let file::Authority { name, bundle, trust_domain, crl_files, crl } = raw;
        let at = place(source, name.span());
        self.name(&at, name.as_ref());
        if let Some((_, first)) = self.authorities.get(name.as_ref()) {
            self.duplicate(&at, &first.clone(), "authority", name.as_ref());
        } else {
            self.authorities.insert(name.as_ref().clone(), (index, at.clone()));
        }
        if let Some(crl) = &crl
            && *crl.as_ref() == CrlPolicy::Required
            && crl_files.is_empty()
        {
            self.error(
                "no_crl_files",
                &place(source, crl.span()),
                format!(
                    "authority `{}` requires revocation lists and has none: it would vouch for nobody",
                    name.as_ref()
                ),
                "add `crl_files = [\"ca.crl\"]`",
            );
        }
        Authority {
            bundle: self.file(source, bundle),
            trust_domain: trust_domain.and_then(|text| self.authority_trust_domain(source, text)),
            crl_files: crl_files.into_iter().map(|text| self.file(source, text)).collect(),
            crl: crl.map(Spanned::into_inner).unwrap_or_default(),
            name: name.into_inner(),
            place: at,
        }
    }

    fn file(&mut self, source: &Source, text: Spanned<String>) -> PathBuf {
        let at = place(source, text.span());
        let text = text.into_inner();
        if text.is_empty() || text.ends_with('/') || text.contains('\0') {
            self.error(
                "bad_path",
                &at,
                format!("`{}` names no file", text.escape_default()),
                "write a path, absolute or relative to the directory of the policy",
            );
        }
        PathBuf::from(text)
    }

    fn authority_trust_domain(&mut self, source: &Source, text: Spanned<String>) -> Option<TrustDomain> {
        let parsed = text.as_ref().parse().ok();
        if parsed.is_none() {
            self.error(
                "bad_trust_domain",
                &place(source, text.span()),
                format!("`{}` cannot be a trust domain", text.as_ref()),
                "use lower case letters, digits, `.`, `-` and `_` only, without `spiffe://`",
            );
        }
        parsed
    }

    pub(super) fn spiffe_id(&mut self, source: &Source, text: Spanned<String>) -> Option<SpiffeId> {
        match text.as_ref().parse() {
            Ok(id) => Some(id),
            Err(error) => {
                self.error(
                    "bad_spiffe_id",
                    &place(source, text.span()),
                    format!("`{}` is no SPIFFE ID of a caller: it {error}", text.as_ref()),
                    "write it in full, such as `spiffe://partner.example/billing`",
                );
                None
            }
        }
    }

    pub(super) fn dns(&mut self, source: &Source, text: Spanned<String>) -> Option<DnsPattern> {
        match text.as_ref().parse() {
            Ok(pattern) => Some(pattern),
            Err(error) => {
                self.error(
                    "bad_dns",
                    &place(source, text.span()),
                    format!("`{}` {error}", text.as_ref()),
                    "write a name such as `api.example.org`, or `*.example.org` for all that are one label longer",
                );
                None
            }
        }
    }

    /// Subjects are compared as text, so that only what has the form of one can ever fit.
    pub(super) fn certificate_subject(&mut self, source: &Source, text: Spanned<String>) -> Option<String> {
        let at = place(source, text.span());
        let text = text.into_inner();
        let part = |part: &str| part.split_once('=').is_some_and(|(kind, _)| is_attribute_type(kind));
        if !rdn_starts(&text).all(part) {
            self.error(
                "bad_subject",
                &at,
                format!("`{text}` is no distinguished name as RFC 4514 writes it"),
                "copy it from `openssl x509 -noout -subject -nameopt RFC2253,-esc_msb,utf8`, such as `CN=billing,O=Partner`",
            );
            return None;
        }
        Some(text)
    }

    /// Where a rule requires a certificate, if it does; an error if nobody could vouch for one.
    pub(super) fn mtls_place(&mut self, source: &Source, require: &[Spanned<Proof>]) -> Option<Place> {
        let required = require.iter().find(|proof| *proof.as_ref() == Proof::Mtls)?;
        let at = place(source, required.span());
        if self.authorities.is_empty() {
            self.error(
                "no_authority",
                &at,
                "the rule requires a certificate, and no authority vouches for any",
                "define an `[[authority]]` with the bundle of its CAs",
            );
        }
        Some(at)
    }

    /// A certificate is asked for only where a rule requires one; a caller that is named by one is nobody without it.
    pub(super) fn provable(&mut self, at: &Place, subject: Subject, deny: bool, mtls: bool, model: &Model) {
        let Subject::Peer(index) = subject else { return };
        let peer = &model.peers[index];
        if let (Some(id), true) = (&peer.spiffe_id, mtls) {
            self.spoken_for(at, id, None, model);
        }
        if !peer.has_certificate() || mtls {
            return;
        }
        let message = format!("peer `{}` is known by its certificate, and the rule asks for none", peer.name);
        if deny {
            let help = "deny it by networks instead: who is to be denied shows no certificate";
            self.error("unenforceable_peer", at, message, help);
        } else {
            self.error("unenforceable_peer", at, message, "add `\"mtls\"` to `require`");
        }
    }

    pub(super) fn mtls(
        &mut self,
        source: &Source,
        raw: Option<Spanned<file::Mtls>>,
        required: Option<&Place>,
        model: &Model,
    ) -> Option<MtlsRequirement> {
        let raw = raw?;
        if required.is_none() {
            self.error(
                "unused_mtls",
                &place(source, raw.span()),
                "the rule says what a certificate has to be, and requires none",
                "add `\"mtls\"` to `require`",
            );
        }
        let file::Mtls { authority, spiffe_id, dns, subject } = raw.into_inner();
        let authority = authority.and_then(|name| self.named_authority(source, &name));
        let mut spiffe_ids = Vec::new();
        for text in spiffe_id.map(|texts| self.some(source, texts)).unwrap_or_default() {
            let at = place(source, text.span());
            if let Some(id) = self.spiffe_id(source, text) {
                self.spoken_for(&at, &id, authority, model);
                spiffe_ids.push(id);
            }
        }
        let dns = dns.map(|texts| self.some(source, texts)).unwrap_or_default();
        let subjects = subject.map(|texts| self.some(source, texts)).unwrap_or_default();
        Some(MtlsRequirement {
            authority,
            spiffe_ids,
            dns: dns.into_iter().filter_map(|text| self.dns(source, text)).collect(),
            subjects: subjects.into_iter().filter_map(|text| self.certificate_subject(source, text)).collect(),
        })
    }

    pub(super) fn named_authority(&mut self, source: &Source, name: &Spanned<String>) -> Option<usize> {
        let found = self.authorities.get(name.as_ref()).map(|(index, _)| *index);
        if found.is_none() {
            let known = self.authorities.keys().cloned().collect();
            let help = self.similar(name.as_ref(), known, "define an `[[authority]]`");
            let message = format!("no authority is called `{}`", name.as_ref());
            self.error("unknown_authority", &place(source, name.span()), message, help);
        }
        found
    }

    /// An empty list would ask for nothing, where its author meant that nobody fits.
    fn some(&mut self, source: &Source, texts: Spanned<Texts>) -> Vec<Spanned<String>> {
        let at = place(source, texts.span());
        let texts = Texts::spanned(texts);
        if texts.is_empty() {
            self.error("empty_mtls", &at, "the list names nobody", "name whom it is about, or remove the key");
        }
        texts
    }

    /// Whether some authority whose word counts may give out the ID; if none may, no certificate fits.
    pub(super) fn spoken_for(&mut self, at: &Place, id: &SpiffeId, authority: Option<usize>, model: &Model) {
        let mut asked = model.authorities.iter().enumerate().filter(|(index, _)| authority.is_none_or(|a| a == *index));
        let speaks =
            |authority: &Authority| authority.trust_domain.as_ref().is_some_and(|d| d.as_str() == id.trust_domain());
        if model.authorities.is_empty() || asked.any(|(_, authority)| speaks(authority)) {
            return;
        }
        self.error(
            "foreign_spiffe_id",
            at,
            format!("no authority that counts here speaks for the trust domain of `{id}`"),
            format!("add `trust_domain = \"{}\"` to its `[[authority]]`", id.trust_domain()),
        );
    }
}

/// RFC 4512, 1.4: a short name, or numbers with dots.
fn is_attribute_type(text: &str) -> bool {
    let letters = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    let numbers = text.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
    letters || numbers
}

/// What stands between the commas and plus signs that are not escaped.
fn rdn_starts(text: &str) -> impl Iterator<Item = &str> {
    let mut escaped = false;
    text.split(move |c| {
        let separates = !escaped && (c == ',' || c == '+');
        escaped = !escaped && c == '\\';
        separates
    })
}
