//! Certificates for which grants live, to be looked at again when an issuer publishes another revocation list.
//!
//! Enters: chains for which dataplane gave a grant. Leaves: those of which a list says now that they are revoked, after its
//! signature was verified as for anybody who comes. Never: another reason to end a grant; a list that is late, or damaged,
//! refuses who comes, and cuts nobody off.

use std::{collections::HashMap, sync::Arc};

use jiff::Timestamp;
use rustls::pki_types::CertificateDer;

use super::{
    Shared,
    verifier::{Verifier, lock},
};
use crate::{
    digest::Digest,
    grants::proof::Shown,
    ipc::FromControl,
    proofs::x509::{
        chain::{ChainError, Usage},
        crl::NothingRevoked,
        identity::VerifiedCertificate,
    },
};

/// All chains together. What has no room is not looked at again: its grants end at their time.
const MAX_BYTES: usize = 64 << 20;

/// Who vouched for a certificate, and its SHA-256.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Name {
    authority: String,
    certificate: Digest,
}

impl Name {
    pub fn of_certificate(found: &VerifiedCertificate) -> Self {
        Self { authority: found.authority.clone(), certificate: Digest::from_bytes(found.fingerprint) }
    }

    /// Of the certificate among some proofs.
    pub fn of(shown: &[Shown]) -> Option<Self> {
        shown.iter().find_map(|shown| match shown {
            Shown::Mtls(found) => Some(Self::of_certificate(found)),
            _ => None,
        })
    }
}

type Chain = Arc<[CertificateDer<'static>]>;

/// Chains, each until the last of its grants ends. One for each certificate, the first: more of them would let a caller fill
/// the room of others with chains that he makes up around his certificate.
#[derive(Default)]
pub struct Chains {
    live: HashMap<Name, (Chain, Timestamp)>,
    bytes: usize,
}

impl Chains {
    fn keep(&mut self, name: Name, chain: &[CertificateDer<'static>], until: Timestamp) {
        if let Some((_, end)) = self.live.get_mut(&name) {
            *end = until.max(*end);
            return;
        }
        let bytes = size_of(chain);
        if self.bytes + bytes > MAX_BYTES {
            self.forget_ended(Timestamp::now());
        }
        if self.bytes + bytes <= MAX_BYTES {
            self.bytes += bytes;
            self.live.insert(name, (chain.into(), until));
        }
    }

    fn forget_ended(&mut self, now: Timestamp) {
        self.live.retain(|_, (_, until)| now < *until);
        self.bytes = self.live.values().map(|(chain, _)| size_of(chain)).sum();
    }

    fn all(&mut self, now: Timestamp) -> Vec<(Name, Chain)> {
        self.forget_ended(now);
        self.live.iter().map(|(name, (chain, _))| (name.clone(), chain.clone())).collect()
    }
}

fn size_of(chain: &[CertificateDer<'_>]) -> usize {
    chain.iter().map(|der| der.len()).sum()
}

/// A grant was given for a certificate, of which these settings had nothing bad to say.
pub async fn granted(
    shared: &Shared,
    before: Option<Arc<Verifier>>,
    name: Name,
    chain: &[CertificateDer<'static>],
    until: Timestamp,
) {
    let Some(before) = before else { return };
    lock(before.chains()).keep(name.clone(), chain, until);
    // If there were others meanwhile, they have been looked at without this one.
    if let Some(now) = shared.verifier().filter(|now| !Arc::ptr_eq(now, &before)) {
        look_at(shared, &now, name, chain).await;
    }
}

/// There are new settings, maybe with new lists.
pub async fn changed(shared: Arc<Shared>, settings: Arc<Verifier>) {
    let all = lock(settings.chains()).all(Timestamp::now());
    for (name, chain) in all {
        if shared.verifier().is_none_or(|now| !Arc::ptr_eq(&now, &settings)) {
            // There are newer ones, which look at all of them again.
            return;
        }
        look_at(&shared, &settings, name, &chain).await;
        // Callers are not kept waiting.
        tokio::task::yield_now().await;
    }
}

async fn look_at(shared: &Shared, settings: &Verifier, name: Name, chain: &[CertificateDer<'static>]) {
    let authority = settings.authorities.iter().flatten().find(|authority| authority.name == name.authority);
    let verified = authority.map(|by| by.verify(chain, Usage::Client, Timestamp::now(), &NothingRevoked));
    if matches!(verified, Some(Err(ChainError::RevokedByIssuer))) {
        let Name { authority, certificate } = name;
        shared.tell(FromControl::Listed { authority, certificate }).await;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use base64::{Engine, engine::general_purpose::STANDARD};
    use jiff::SignedDuration;
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose, SerialNumber};

    use super::*;
    use crate::ipc::{Channel, Settings, pair};

    const POLICY: &str = r#"
        trust_domain = "example.org"
        [[authority]]
        name = "ca"
        bundle = "ca.crt"
        crl_files = ["ca.crl"]
    "#;

    /// A CA, a certificate of its own making, and settings with its list: an empty one, and one that names the certificate.
    struct Scene {
        chain: Vec<CertificateDer<'static>>,
        empty: Arc<Verifier>,
        full: Arc<Verifier>,
        name: Name,
    }

    impl Scene {
        fn new() -> Self {
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
            let mut params = CertificateParams::default();
            params.serial_number = Some(SerialNumber::from(7));
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            let leaf = params.signed_by(&KeyPair::generate().unwrap(), &ca).unwrap();
            let (past, future) = (rcgen::date_time_ymd(2020, 1, 1), rcgen::date_time_ymd(2100, 1, 1));
            let list = |serials: &[u64]| {
                let revoked = |serial: &u64| rcgen::RevokedCertParams {
                    serial_number: SerialNumber::from(*serial),
                    revocation_time: past,
                    reason_code: None,
                    invalidity_date: None,
                };
                let params = rcgen::CertificateRevocationListParams {
                    this_update: past,
                    next_update: future,
                    crl_number: SerialNumber::from(1),
                    issuing_distribution_point: None,
                    revoked_certs: serials.iter().map(revoked).collect(),
                    key_identifier_method: rcgen::KeyIdMethod::Sha256,
                };
                params.signed_by(&ca).unwrap().der().to_vec()
            };
            let bundle =
                format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", STANDARD.encode(ca.der()));
            let settings = |list: Vec<u8>, before: Option<&Verifier>| {
                let files = [("ca.crt", bundle.clone().into_bytes()), ("ca.crl", list)];
                let files = files.map(|(name, bytes)| (name.to_owned(), STANDARD.encode(bytes)));
                let sources = vec![("p.toml".to_owned(), POLICY.to_owned())];
                let settings = Settings { sources, files: BTreeMap::from(files), ..Settings::default() };
                Arc::new(Verifier::new(settings, before, Arc::default()))
            };
            let empty = settings(list(&[6, 8]), None);
            let full = settings(list(&[6, 7, 8]), Some(&empty));
            let name = Name { authority: "ca".to_owned(), certificate: Digest::of(leaf.der()) };
            Self { chain: vec![leaf.der().clone()], empty, full, name }
        }

        /// Control with settings in force, and dataplane's end.
        fn control(&self, in_force: &Arc<Verifier>) -> (Arc<Shared>, Channel) {
            let (ours, theirs) = pair().unwrap();
            let shared = Shared::new(Channel::new(ours).unwrap());
            *shared.verifier.write().unwrap() = Some(in_force.clone());
            (shared, Channel::new(theirs).unwrap())
        }
    }

    fn later() -> Timestamp {
        Timestamp::now() + SignedDuration::from_hours(1)
    }

    /// What dataplane is told, until control is gone.
    async fn told(shared: Arc<Shared>, dataplane: &Channel) -> Vec<String> {
        drop(shared);
        let mut told = Vec::new();
        while let Some((message, _)) = dataplane.receive::<FromControl>().await.unwrap() {
            told.push(serde_json::to_string(&message).unwrap());
        }
        told
    }

    #[tokio::test]
    async fn what_a_new_list_names_is_told_while_its_grant_lives() {
        let scene = Scene::new();
        let message = FromControl::Listed { authority: "ca".to_owned(), certificate: scene.name.certificate };
        let message = serde_json::to_string(&message).unwrap();
        for (ends, in_force, expected) in [
            (later(), &scene.full, vec![message]),
            (later(), &scene.empty, vec![]),
            (Timestamp::UNIX_EPOCH, &scene.full, vec![]),
        ] {
            let (shared, dataplane) = scene.control(&scene.empty);
            *lock(scene.empty.chains()) = Chains::default();
            granted(&shared, Some(scene.empty.clone()), scene.name.clone(), &scene.chain, ends).await;
            *shared.verifier.write().unwrap() = Some(in_force.clone());
            changed(shared.clone(), in_force.clone()).await;
            assert_eq!(told(shared, &dataplane).await, expected);
        }
        // Newer settings look at everything themselves.
        let (shared, dataplane) = scene.control(&scene.empty);
        granted(&shared, Some(scene.empty.clone()), scene.name.clone(), &scene.chain, later()).await;
        changed(shared.clone(), scene.full.clone()).await;
        assert!(told(shared, &dataplane).await.is_empty());
    }

    #[tokio::test]
    async fn a_list_that_comes_while_a_grant_is_given_is_not_missed() {
        let scene = Scene::new();
        let (shared, dataplane) = scene.control(&scene.full);
        changed(shared.clone(), scene.full.clone()).await;
        granted(&shared, Some(scene.empty.clone()), scene.name.clone(), &scene.chain, later()).await;
        assert_eq!(told(shared, &dataplane).await.len(), 1);
    }

    #[test]
    fn chains_take_no_more_room_than_there_is() {
        let mut chains = Chains::default();
        let large = [CertificateDer::from(vec![0; MAX_BYTES / 4])];
        let name = |n: u8| Name { authority: "ca".to_owned(), certificate: Digest::of(&[n]) };
        for n in 0..10 {
            // Of those that are over, none is in the way.
            let until = if n < 2 { Timestamp::UNIX_EPOCH } else { later() };
            chains.keep(name(n), &large, until);
            assert!(chains.bytes <= MAX_BYTES);
        }
        let kept = chains.all(Timestamp::now());
        assert_eq!(kept.len(), 4);
        assert!((2..6).all(|n| chains.live.contains_key(&name(n))));
        chains.keep(name(2), &large, later() + SignedDuration::from_hours(1));
        assert_eq!((chains.all(later()).len(), chains.bytes), (1, MAX_BYTES / 4));
    }
}
