//! What people are told when a call waits for them.
//!
//! Enters: an entry. Leaves: one JSON object, for the operator's own program (`command`), and with the headers of a webhook that its
//! receiver verifies. Never: a way to decide; whoever reads it decides with `authd approve`.
//!
//! Webhooks follow Standard Webhooks 1.0 (standardwebhooks.com), for which receivers have libraries: the signature is
//! HMAC-SHA256 of id, time and body, so that neither another body nor an old message passes for a new one.

pub mod command;

use aws_lc_rs::hmac::{HMAC_SHA256, Key, sign};
use base64::{Engine, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use serde::Serialize;
use zeroize::Zeroizing;

use super::{
    approvals::{Entry, Id},
    call::{Agent, CallHash, Delegation},
};

/// Standard Webhooks, "Signature scheme".
const SECRET_PREFIX: &str = "whsec_";
const SECRET_BYTES: std::ops::RangeInclusive<usize> = 24..=64;

/// The message.
#[derive(Clone, Debug, Serialize)]
pub struct Notice<'a> {
    /// `approval_requested`.
    pub event: &'static str,
    pub node: &'a str,
    pub id: Id,
    pub tool: &'a str,
    pub agent: &'a Agent,
    /// For whom the agent acts; `null`: for itself.
    pub subject: Option<&'a Delegation>,
    /// The whole call, in canonical text (RFC 8785). The agent chose what is in it: whoever shows it escapes it.
    pub arguments: &'a str,
    pub call_sha256: CallHash,
    /// Names of `[[approvers]]`: one of them is enough.
    pub approvers: &'a [String],
    pub policies: &'a [String],
    pub requested: Timestamp,
    pub expires: Timestamp,
    /// What to type on the node.
    pub decide: String,
}

impl<'a> Notice<'a> {
    pub fn new(entry: &'a Entry, node: &'a str) -> Self {
        let Entry { id, call, uids: _, approvers, policies, requested, expires, state: _ } = entry;
        Self {
            event: "approval_requested",
            node,
            id: *id,
            tool: &call.tool,
            agent: &call.agent,
            subject: call.delegation.as_ref(),
            arguments: call.arguments.text(),
            call_sha256: call.hash(),
            approvers,
            policies,
            requested: *requested,
            expires: *expires,
            decide: format!("authd approve show {id}"),
        }
    }

    pub fn body(&self) -> Vec<u8> {
        // Of strings and times: there is nothing in it that JSON cannot say.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "the webhook's secret is `whsec_` and the base64 of 24 to 64 random bytes: make one with `echo whsec_$(openssl rand -base64 32)`"
)]
pub struct SecretError;

impl SecretError {
    pub fn reason(&self) -> &'static str {
        "webhook_secret_malformed"
    }
}

/// What sender and receiver of webhooks share.
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// Reads the text of `webhook_secret_file`.
    pub fn read(text: &str) -> Result<Self, SecretError> {
        let encoded = text.trim_ascii_end().strip_prefix(SECRET_PREFIX).ok_or(SecretError)?;
        let bytes = STANDARD.decode(encoded).map(Zeroizing::new).map_err(|_| SecretError)?;
        if SECRET_BYTES.contains(&bytes.len()) { Ok(Self(bytes)) } else { Err(SecretError) }
    }
}

/// One POST.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Delivery {
    pub headers: [(&'static str, String); 4],
    pub body: Vec<u8>,
}

/// A message for a webhook, at the time at which it is sent. Sent again, it has the same id and a new time.
pub fn webhook(id: Id, body: Vec<u8>, now: Timestamp, secret: &Secret) -> Delivery {
    signed(format!("approval-requested-{id}"), body, now, secret)
}

fn signed(id: String, body: Vec<u8>, now: Timestamp, Secret(secret): &Secret) -> Delivery {
    let time = now.as_second().to_string();
    let content = [id.as_bytes(), b".", time.as_bytes(), b".", &body].concat();
    let tag = sign(&Key::new(HMAC_SHA256, secret), &content);
    let headers = [
        ("content-type", "application/json".to_owned()),
        ("webhook-id", id),
        ("webhook-timestamp", time),
        ("webhook-signature", format!("v1,{}", STANDARD.encode(tag))),
    ];
    Delivery { headers, body }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::decisions::approvals::tests::{entry, later, noon};

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

    #[test]
    fn people_are_told_all_that_they_decide_about() {
        let entry = entry(7);
        let message: Value = serde_json::from_slice(&Notice::new(&entry, "n1").body()).unwrap();
        let expected = json!({
            "event": "approval_requested",
            "node": "n1",
            "id": "000000000007",
            "tool": "refund",
            "agent": {
                "workload": "support",
                "cgroup": "/agents/support-1",
                "instance": 7,
                "spiffe_id": "spiffe://example.org/support/support-1",
            },
            "subject": {
                "issuer": "https://idp.example.org",
                "subject": "carol",
                "actors": [{ "issuer": null, "subject": "spiffe://example.org/router" }],
            },
            "arguments": "{\"amount\":7}",
            "call_sha256": entry.call.hash().to_string(),
            "approvers": ["leads"],
            "policies": ["large-refunds"],
            "requested": noon().to_string(),
            "expires": later(900).to_string(),
            "decide": "authd approve show 000000000007",
        });
        assert_eq!(message, expected);
    }

    /// The example of the standard's own libraries.
    #[test]
    fn the_published_signature_comes_out() {
        let now = Timestamp::from_second(1_614_265_330).unwrap();
        let body = br#"{"test": 2432232314}"#.to_vec();
        let id = "msg_p5jXN8AQM9LWM0D4loKWxJek".to_owned();
        let delivery = signed(id.clone(), body.clone(), now, &Secret::read(SECRET).unwrap());
        assert_eq!(
            delivery.headers[1..],
            [
                ("webhook-id", id),
                ("webhook-timestamp", "1614265330".to_owned()),
                ("webhook-signature", "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=".to_owned()),
            ]
        );
        assert_eq!(delivery.body, body);
    }

    #[test]
    fn id_time_and_body_are_signed() {
        let secret = Secret::read(SECRET).unwrap();
        let signature = |id, body: &[u8], now| webhook(id, body.to_vec(), now, &secret).headers[3].1.clone();
        let first = signature(entry(1).id, b"{}", noon());
        assert_eq!(first, signature(entry(1).id, b"{}", noon()));
        let others = [
            signature(entry(2).id, b"{}", noon()),
            signature(entry(1).id, b"{ }", noon()),
            signature(entry(1).id, b"{}", later(1)),
        ];
        assert!(others.iter().all(|other| *other != first));
    }

    #[test]
    fn a_secret_that_is_none_is_refused() {
        assert!(Secret::read(&format!("{SECRET}\n")).is_ok());
        let of = |length: usize| format!("whsec_{}", STANDARD.encode(vec![1; length]));
        assert!(Secret::read(&of(24)).is_ok() && Secret::read(&of(64)).is_ok());
        for text in ["", "whsec_", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_password", &of(23), &of(65)] {
            assert!(Secret::read(text).is_err(), "{text}");
        }
    }
}
