//! What operators ask about API keys, and the records that it leaves.

use jiff::Timestamp;

use super::{
    Daemon,
    admin::Answer,
    trust::{KeyError, NewKey, Trust},
};
use crate::{audit::record::Record, proofs::api_key::text::KeyId, store::StoreError};

impl Daemon {
    pub fn create_key(&mut self, by: u32, new: NewKey) -> Answer {
        let model = &self.active.prepared.model;
        let created = trusted(&mut self.trust).and_then(|trust| trust.create_key(Timestamp::now(), by, model, new));
        match created {
            Ok(key) => {
                let message = format!("`{}` until {}: {}", key.name, key.expires, key.scope);
                self.report_key("api_key_created", key.id, by, message);
                Answer::KeyCreated(Box::new(key))
            }
            Err(error) => Answer::Error { message: error.to_string() },
        }
    }

    pub fn list_keys(&mut self) -> Answer {
        match trusted(&mut self.trust) {
            Ok(trust) => Answer::Keys { keys: trust.keys() },
            Err(error) => Answer::Error { message: error.to_string() },
        }
    }

    pub fn revoke_key(&mut self, by: u32, id: KeyId) -> Answer {
        match trusted(&mut self.trust).and_then(|trust| trust.revoke_key(Timestamp::now(), by, id)) {
            Ok(key) => {
                self.report_key("api_key_revoked", id, by, format!("`{}`", key.name));
                Answer::KeyRevoked(Box::new(key))
            }
            Err(error) => {
                if matches!(error, KeyError::Store(_)) {
                    self.report_key("api_key_revoked", id, by, format!("until the next start only: {error}"));
                }
                Answer::Error { message: error.to_string() }
            }
        }
    }

    fn report_key(&mut self, event: &str, id: KeyId, by: u32, message: String) {
        let mut record = Record::about(event, message);
        record.key_id = Some(id.to_string());
        record.uid = Some(by);
        self.report(record);
    }

    /// Writes what could wait of the store.
    pub(super) fn settle(&mut self) {
        if let Ok(trust) = &mut self.trust
            && let Err(error) = trust.settle()
        {
            tracing::error!(%error, "what could wait of the store cannot be written");
        }
    }
}

fn trusted(trust: &mut Result<Trust, StoreError>) -> Result<&mut Trust, KeyError> {
    trust.as_mut().map_err(|error| KeyError::Unusable(error.to_string()))
}
