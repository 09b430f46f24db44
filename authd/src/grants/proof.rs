//! What was proven of a caller, as it goes from control to dataplane, into grants, records and the store.
//!
//! Enters: verified proofs. Leaves: what they say, and what they are revoked by. Never: a secret; of a token there is a hash,
//! of a key its public part.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    decisions::{approvals, call::CallHash},
    digest::Digest,
    policy::file::Proof,
    proofs::{
        api_key::text::KeyId,
        claims::{Confirmation, VerifiedToken},
        exchange,
        x509::{crl::CertificateIdentity, identity::VerifiedCertificate, spiffe::SpiffeId},
    },
    store::revoked::{Revoked, Serial},
};

/// One verified fact about a caller.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "proof", rename_all = "kebab-case")]
pub enum Shown {
    /// Possession of a certificate's key.
    Mtls(Box<VerifiedCertificate>),
    Token(Box<Token>),
    ApiKey(ApiKey),
    /// Another node's word.
    Node(Box<Vouched>),
    /// A call of a tool that the action policy allowed.
    Action(Box<Acted>),
    /// A person's yes to it.
    Approval(Box<Approved>),
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// The policy's name of the issuer.
    pub issuer: String,
    /// The `iss` claim.
    pub iss: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_id: Option<String>,
    pub audience: Vec<String>,
    pub scopes: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jti: Option<String>,
    /// [`crate::proofs::claims::VerifiedToken::token_hash`].
    pub hash: Digest,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,
    /// What it was bound to, and shown with.
    pub bound_to: Vec<Binding>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issued_at: Option<Timestamp>,
    pub not_after: Timestamp,
    /// Of a token of this node's own: by what else it ends. Only dataplane knows, and control is not believed about it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ends_with: Vec<(Revoked, Option<Timestamp>)>,
    /// Who acts by it for the subject, the present one first: SPIFFE IDs, or what other issuers call them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub actors: Vec<String>,
    /// Of a token of this node's own: the issuer who calls the subject so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject_issuer: Option<String>,
}

/// For whom a node vouches, and the certificate that it showed itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vouched {
    /// The policy's name of the node.
    pub node: String,
    pub spiffe_id: SpiffeId,
    pub certificate: VerifiedCertificate,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Acted {
    /// As the policy calls it.
    pub tool: String,
    pub call: CallHash,
    /// Names of the action policies that decided.
    pub policies: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Approved {
    pub id: approvals::Id,
    pub call: CallHash,
    pub by: approvals::By,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Binding {
    Certificate,
    Dpop,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiKey {
    pub id: KeyId,
    pub name: String,
    pub not_after: Timestamp,
}

/// What records say of a proof: as little as tells which one it was.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Told {
    pub proof: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub issuer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spiffe_id: Option<String>,
    /// Which node vouches for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// SHA-256 of the certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate_sha256: Option<Digest>,
    /// SHA-256 of the token's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jti_sha256: Option<Digest>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_sha256: Option<Digest>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub bound_to: Vec<Binding>,
    /// Who acts by it, the present one first.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub actors: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub audience: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub scopes: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool: Option<String>,
    /// Of the whole call: docs/ACTIONS.md.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub call_sha256: Option<CallHash>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub policies: Vec<String>,
    /// Its id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub approval: Option<approvals::Id>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
}

impl Token {
    /// As it was verified, in the hands of somebody who met these bindings.
    pub fn new(token: &VerifiedToken, bound_to: Vec<Binding>) -> Self {
        let VerifiedToken { issuer_name, issuer, subject, client_id, audience, scopes, jti, key_id, .. } =
            token.clone();
        let actors = exchange::actors(token.act.as_ref()).unwrap_or_default();
        Self {
            issuer: issuer_name,
            iss: issuer,
            subject,
            client_id,
            audience,
            scopes,
            jti,
            hash: Digest::from_bytes(token.token_hash),
            key_id,
            bound_to,
            issued_at: token.issued_at,
            not_after: token.not_after,
            ends_with: Vec::new(),
            actors: actors.into_iter().map(str::to_owned).collect(),
            subject_issuer: token.subject_issuer.clone(),
        }
    }
}

impl Binding {
    pub fn of(confirmation: &Confirmation) -> Vec<Self> {
        let Confirmation { x5t_s256, jkt } = confirmation;
        let bound = [x5t_s256.map(|_| Self::Certificate), jkt.map(|_| Self::Dpop)];
        bound.into_iter().flatten().collect()
    }
}

impl Shown {
    /// What a rule calls it.
    pub fn kind(&self) -> Proof {
        match self {
            Self::Mtls(_) => Proof::Mtls,
            Self::Token(_) => Proof::Token,
            Self::ApiKey(_) => Proof::ApiKey,
            Self::Node(_) => Proof::Node,
            Self::Action(_) => Proof::Action,
            Self::Approval(_) => Proof::Approval,
        }
    }

    /// When it ends by itself.
    pub fn not_after(&self) -> Timestamp {
        match self {
            Self::Mtls(certificate) => certificate.valid_until,
            Self::Token(token) => token.not_after,
            Self::ApiKey(key) => key.not_after,
            Self::Node(vouched) => vouched.certificate.valid_until,
            // Each is for the permit that is given at once.
            Self::Action(_) | Self::Approval(_) => Timestamp::MAX,
        }
    }

    /// Everything by which it can be revoked, and since when that exists.
    pub fn revocable(&self) -> Vec<(Revoked, Option<Timestamp>)> {
        match self {
            Self::Mtls(certificate) => certificate_names(certificate),
            Self::Token(token) => {
                let id = token.jti.as_ref().map(|jti| Revoked::Token { issuer: token.iss.clone(), jti: jti.clone() });
                // What an issuer calls its keys may be nothing that can be written down.
                let key = token.key_id.as_ref().and_then(|kid| Revoked::issuer_key(&token.iss, kid));
                let names = [Some(Revoked::TokenHash(token.hash)), Some(Revoked::Issuer(token.iss.clone())), id, key];
                let names = names.into_iter().flatten().map(|name| (name, token.issued_at));
                names.chain(token.ends_with.iter().cloned()).collect()
            }
            Self::ApiKey(key) => vec![(Revoked::Key(key.id), None)],
            Self::Node(vouched) => {
                let mut names = certificate_names(&vouched.certificate);
                names.push((Revoked::SpiffeId(vouched.spiffe_id.as_str().to_owned()), None));
                names
            }
            // The agent is revoked, or the token by which it acts.
            Self::Action(_) | Self::Approval(_) => Vec::new(),
        }
    }

    pub fn told(&self) -> Told {
        let proof = self.kind().name().to_owned();
        match self {
            Self::Mtls(certificate) => Told {
                proof,
                issuer: Some(certificate.issuer.clone()),
                subject: Some(certificate.subject.clone()).filter(|subject| !subject.is_empty()),
                spiffe_id: certificate.spiffe_id.as_ref().map(|id| id.as_str().to_owned()),
                serial: Some(certificate.serial.clone()),
                certificate_sha256: Some(Digest::from_bytes(certificate.fingerprint)),
                ..Told::default()
            },
            Self::Token(token) => Told {
                proof,
                issuer: Some(token.iss.clone()),
                subject: token.subject.clone(),
                client_id: token.client_id.clone(),
                jti_sha256: token.jti.as_ref().map(|jti| Digest::of(jti.as_bytes())),
                token_sha256: Some(token.hash),
                key_id: token.key_id.clone(),
                bound_to: token.bound_to.clone(),
                actors: token.actors.clone(),
                ..Told::default()
            },
            Self::ApiKey(key) => {
                Told { proof, subject: Some(key.name.clone()), key_id: Some(key.id.to_string()), ..Told::default() }
            }
            Self::Action(acted) => Told {
                proof,
                tool: Some(acted.tool.clone()),
                call_sha256: Some(acted.call),
                policies: acted.policies.clone(),
                ..Told::default()
            },
            Self::Approval(approved) => Told {
                proof,
                subject: Some(approved.by.user.clone()),
                uid: Some(approved.by.uid),
                call_sha256: Some(approved.call),
                approval: Some(approved.id),
                ..Told::default()
            },
            Self::Node(vouched) => Told {
                proof,
                spiffe_id: Some(vouched.spiffe_id.as_str().to_owned()),
                node: Some(vouched.node.clone()),
                serial: Some(vouched.certificate.serial.clone()),
                certificate_sha256: Some(Digest::from_bytes(vouched.certificate.fingerprint)),
                ..Told::default()
            },
        }
    }
}

/// Every certificate of the chain, by itself, by its number, by its key; and the leaf by whom it names.
pub fn certificate_names(certificate: &VerifiedCertificate) -> Vec<(Revoked, Option<Timestamp>)> {
    let mut names = Vec::new();
    let issuers = certificate.issuers.iter().map(|issuer| issuer.issuer_hash);
    let hashes = std::iter::once(certificate.issuer_hash).chain(issuers);
    for (CertificateIdentity { serial, fingerprint, key_hash, spiffe_id, .. }, issuer) in
        certificate.identities().zip(hashes)
    {
        names.push(Revoked::Certificate(Digest::from_bytes(fingerprint)));
        names.push(Revoked::Spki(Digest::from_bytes(key_hash)));
        if let Some(serial) = Serial::parse(serial) {
            names.push(Revoked::Serial { issuer: Digest::from_bytes(issuer), serial });
        }
        names.extend(spiffe_id.map(|id| Revoked::SpiffeId(id.as_str().to_owned())));
    }
    // When a key came to be, no certificate says: a revocation of what came before a time refuses it too.
    names.into_iter().map(|name| (name, None)).collect()
}
