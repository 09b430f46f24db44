//! What the two processes say to each other of agents: tokens, calls, approvals.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Granted, Refusal};
use crate::{
    decisions::{
        approvals,
        call::{Arguments, CallHash},
    },
    grants::proof::{Shown, Token},
    proofs::{
        claims::{Confirmation, VerifiedToken},
        exchange::Asked,
        x509::identity::VerifiedCertificate,
    },
};

/// A call of a tool. Dataplane decides about it itself, unless control has found already that it is denied.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Act {
    /// As the policy calls it.
    pub tool: String,
    pub arguments: Arguments,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub denied: Option<Denied>,
    /// By what the caller acts for somebody, and what else its permit asks for.
    pub proofs: Vec<Shown>,
}

/// Why the action policy does not let a call pass.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Denied {
    pub reason: String,
    /// For whoever called.
    pub message: String,
    /// Names of the action policies that decided.
    pub policies: Vec<String>,
}

/// An approver's token, as it was verified in his hands.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fresh {
    pub token: Token,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acr: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth_time: Option<Timestamp>,
}

/// What became of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Acted {
    pub call: CallHash,
    /// Names of the action policies that decided.
    pub policies: Vec<String>,
    pub outcome: ActOutcome,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case", deny_unknown_fields)]
pub enum ActOutcome {
    Allowed {
        approval: Option<approvals::Id>,
        permit: Option<Granted>,
    },
    /// Nobody has said yes yet.
    Pending {
        approval: approvals::Id,
        until: Timestamp,
    },
    Denied {
        refusal: Refusal,
    },
}

/// What was verified of a request for a token (RFC 8693).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exchange {
    pub subject: VerifiedToken,
    pub asked: Asked,
    /// What the caller showed that it holds.
    pub holds: Confirmation,
    /// Of a caller elsewhere: the certificate of its connection, if an authority of the policy vouches for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<Box<VerifiedCertificate>>,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExchangedToken {
    pub text: String,
    pub scopes: Vec<String>,
    pub expires: Timestamp,
    /// Whether it has to be shown with a DPoP proof (RFC 9449).
    pub dpop: bool,
}

impl std::fmt::Debug for ExchangedToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ExchangedToken")
    }
}

/// Who is told of calls that wait for approval.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Webhook {
    pub url: String,
    /// As its file has it.
    pub secret: String,
}

impl std::fmt::Debug for Webhook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Webhook")
    }
}

/// What [`super::ToControl::Notify`] comes with.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    pub id: approvals::Id,
    pub body: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnIssuer {
    /// The `iss` of its tokens.
    pub url: String,
    /// Its public keys, as a key set (RFC 7517, 5).
    pub keys: String,
}
