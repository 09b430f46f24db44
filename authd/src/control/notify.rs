//! Telling people, by a webhook, that a call waits for them.
//!
//! Enters: a message. Leaves: one POST, signed, and again a few times if nobody takes it. Never: a wait of the caller whose call it
//! is about, or an answer that is read.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use reqwest::Client;

use super::{
    Shared,
    fetch::{self, FetchError},
};
use crate::{
    daemon::metrics::results::OK,
    decisions::notify::{Secret, SecretError, webhook},
    ipc::{Message, Webhook},
};

/// From the connection to the first byte of the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Before each further attempt.
const AGAIN: [Duration; 3] = [Duration::from_secs(2), Duration::from_secs(10), Duration::from_secs(30)];
/// Messages that are on their way at one time. Whoever makes more calls wait than that is told of by `authd approve list`.
const AT_ONCE: usize = 64;

static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);

#[derive(Debug, thiserror::Error)]
pub enum HookError {
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error(transparent)]
    Client(#[from] FetchError),
}

/// Where messages go, and what signs them.
pub struct Hook {
    url: String,
    client: Client,
    secret: Secret,
}

impl Hook {
    /// An operator's own receiver may be on a private network: the settings name it, and no policy does.
    pub fn new(settings: &Webhook, roots: Option<&[u8]>) -> Result<Self, HookError> {
        let client = fetch::client(fetch::For::Introspection, true, roots)?;
        Ok(Self { url: settings.url.clone(), client, secret: Secret::read(&settings.secret)? })
    }

    async fn post(&self, message: &Message) -> Result<(), String> {
        let delivery = webhook(message.id, message.body.clone().into_bytes(), Timestamp::now(), &self.secret);
        let request = self.client.post(&self.url).timeout(PATIENCE).body(delivery.body);
        let request = delivery.headers.into_iter().fold(request, |request, (name, value)| request.header(name, value));
        match request.send().await {
            Ok(answer) if answer.status().is_success() => Ok(()),
            Ok(answer) => Err(format!("it answers with status {}", answer.status())),
            Err(error) => Err(error.without_url().to_string()),
        }
    }
}

/// Sends a message, in its own time.
pub fn send(shared: &Arc<Shared>, message: Message) {
    let Some(hook) = shared.verifier().and_then(|verifier| verifier.hook.clone()) else { return };
    if UNDER_WAY.fetch_add(1, Ordering::Relaxed) >= AT_ONCE {
        UNDER_WAY.fetch_sub(1, Ordering::Relaxed);
        tracing::warn!(approval = %message.id, "the webhook is not told: too many messages are on their way");
        shared.counts.webhook("failed");
        return;
    }
    let shared = shared.clone();
    tokio::spawn(async move {
        let mut pauses = AGAIN.into_iter();
        let mut result = OK;
        while let Err(error) = hook.post(&message).await {
            match pauses.next() {
                Some(pause) => tokio::time::sleep(pause).await,
                None => {
                    tracing::error!(approval = %message.id, error, "nobody was told by the webhook that a call waits");
                    result = "failed";
                    break;
                }
            }
        }
        shared.counts.webhook(result);
        UNDER_WAY.fetch_sub(1, Ordering::Relaxed);
    });
}
