//! Asking issuers: for their keys, and about tokens.
//!
//! Enters: URLs of the policy. Leaves: bounded bodies. Never: an address that an issuer's name should not have (RFC 6890
//! special-purpose addresses, unless the policy allows them), a redirect to another scheme or many of them, a body without
//! end, or a second fetch beside one that is under way.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
    time::Duration,
};

use jiff::Timestamp;
use reqwest::{
    Client, Url,
    dns::{Addrs, Name, Resolve, Resolving},
    header::{ACCEPT, AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HeaderMap},
    redirect::Policy,
};
use tokio::sync::Notify;

use super::{counts::Counts, verifier::lock};
use crate::{
    daemon::metrics::results::{Fetched, OK},
    proofs::{
        introspection,
        jwk::KeySet,
        jwks_cache::{Attempt, Input, JwksCache, KeysError, Settings},
    },
};

const CONNECT: Duration = Duration::from_secs(3);
/// An introspection answer is waited for while a caller waits for his.
const INTROSPECT: Duration = Duration::from_secs(5);
const KEYS_BYTES: usize = 1 << 20;
const ANSWER_BYTES: usize = 64 << 10;
const MAX_REDIRECTS: usize = 3;

#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("the authorities that its server is known by: {0}")]
    Authorities(reqwest::Error),
    #[error("`{0}` is no URL that authd asks")]
    Url(String),
    #[error("{0} is an address that no issuer on the Internet has: set `allow_private = true` if it is meant")]
    Private(IpAddr),
    #[error("the issuer cannot be reached, or is too slow: {0}")]
    Unreachable(reqwest::Error),
    #[error("the issuer answers with status {0}")]
    Status(u16),
    #[error("the issuer's answer is longer than {0} bytes")]
    TooLong(usize),
}

impl FetchError {
    /// Stable name for answers and records.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Authorities(_) | Self::Url(_) => "issuer_misconfigured",
            Self::Private(_) => "issuer_address_private",
            Self::Unreachable(_) => "issuer_unreachable",
            Self::Status(_) => "issuer_bad_status",
            Self::TooLong(_) => "issuer_answer_oversize",
        }
    }
}

/// What an issuer is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum For {
    Keys,
    /// A token and a secret go with it: to where the policy says, and no further.
    Introspection,
    /// Calls of tools, with a token: likewise.
    Calls,
}

/// A client for one issuer.
pub fn client(asks: For, allow_private: bool, roots: Option<&[u8]>) -> Result<Client, FetchError> {
    let roots = match roots {
        Some(pem) => reqwest::Certificate::from_pem_bundle(pem).map_err(FetchError::Authorities)?,
        None => Vec::new(),
    };
    let builder = match asks {
        // What HTTP/2 says was not taken is sent again otherwise, and the one who says so is the server.
        For::Calls => Client::builder().retry(reqwest::retry::never()),
        For::Keys | For::Introspection => Client::builder(),
    };
    builder
        .tls_certs_only(roots)
        .no_proxy()
        .connect_timeout(CONNECT)
        .dns_resolver(Arc::new(Public { allow_private }))
        .redirect(Policy::custom(move |attempt| {
            let downgrade = attempt.previous().last().is_some_and(|before| before.scheme() != attempt.url().scheme());
            let most = if asks == For::Keys { MAX_REDIRECTS } else { 0 };
            if attempt.previous().len() > most || downgrade || check(attempt.url(), allow_private).is_err() {
                attempt.stop()
            } else {
                attempt.follow()
            }
        }))
        .user_agent(concat!("authd/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(FetchError::Authorities)
}

/// Resolves names, and leaves out what they should not resolve to: the connection goes to an address that was checked.
struct Public {
    allow_private: bool,
}

impl Resolve for Public {
    fn resolve(&self, name: Name) -> Resolving {
        let allow_private = self.allow_private;
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let allowed: Vec<SocketAddr> = found.filter(|address| allow_private || !is_special(address.ip())).collect();
            if allowed.is_empty() {
                return Err("the name has no address on the Internet".into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

/// https anywhere, http only to this machine; and addresses written as such are checked like those of names.
pub(super) fn check(url: &Url, allow_private: bool) -> Result<(), FetchError> {
    let wrong = || FetchError::Url(url.to_string());
    // The URL parser has made an address of everything that could be one.
    let host = url.host_str().ok_or_else(wrong)?;
    let address: Option<IpAddr> = host.trim_start_matches('[').trim_end_matches(']').parse().ok();
    match url.scheme() {
        "https" => {}
        "http" if allow_private && address.is_some_and(|address| address.is_loopback()) => {}
        _ => return Err(wrong()),
    }
    match address {
        Some(address) if !allow_private && is_special(address) => Err(FetchError::Private(address)),
        _ => Ok(()),
    }
}

/// Addresses that lead into this machine or its own networks (RFC 6890, RFC 4193, RFC 3849, RFC 6598), whatever family they
/// are written in.
fn is_special(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            v4.is_private()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_broadcast()
                || v4.is_documentation()
                || v4.is_multicast()
                || a == 0
                || a >= 240
                || (a == 100 && b & 0xc0 == 64)
                || (a == 192 && b == 0 && c == 0)
                || (a == 198 && b & 0xfe == 18)
        }
        IpAddr::V6(v6) => {
            let [first, second, ..] = v6.segments();
            v6.is_loopback()
                || v6.is_unspecified()
                || v6.is_multicast()
                || first & 0xfe00 == 0xfc00
                || first & 0xffc0 == 0xfe80
                || first & 0xffc0 == 0xfec0
                || (first == 0x2001 && second == 0xdb8)
                // NAT64 (RFC 6052) and 6to4 (RFC 3056) carry an IPv4 address that could be any of the above.
                || (first == 0x64 && second == 0xff9b)
                || first == 0x2002
                || (first == 0x2001 && second == 0)
        }
    }
}

async fn body(mut response: reqwest::Response, most: usize) -> Result<Vec<u8>, FetchError> {
    if response.status() != reqwest::StatusCode::OK {
        return Err(FetchError::Status(response.status().as_u16()));
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(FetchError::Unreachable)? {
        if bytes.len() + chunk.len() > most {
            return Err(FetchError::TooLong(most));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// Asks the issuer about a token (RFC 7662). One question at a time for one token; answers are remembered by the caller.
pub async fn introspect(
    client: &Client,
    url: &str,
    allow_private: bool,
    request: introspection::Request,
) -> Result<Vec<u8>, FetchError> {
    let url = Url::parse(url).map_err(|_| FetchError::Url(url.to_owned()))?;
    check(&url, allow_private)?;
    let mut asked = client
        .post(url)
        .timeout(INTROSPECT)
        .header(ACCEPT, "application/json")
        .header(CONTENT_TYPE, introspection::CONTENT_TYPE)
        .body(request.body);
    if let Some(authorization) = request.authorization {
        asked = asked.header(AUTHORIZATION, authorization);
    }
    let response = asked.send().await.map_err(|error| FetchError::Unreachable(error.without_url()))?;
    body(response, ANSWER_BYTES).await
}

/// The keys that an issuer publishes, kept fresh by a task of their own.
pub struct Published {
    /// The issuer's name in the policy.
    issuer: String,
    url: String,
    allow_private: bool,
    client: Client,
    fetch_timeout: Duration,
    cache: Mutex<JwksCache>,
    /// A token with an unknown key came.
    wanted: Notify,
    /// A fetch ended.
    arrived: Notify,
    begun: std::sync::Once,
    counts: Arc<Counts>,
}

impl Published {
    pub fn new(
        issuer: String,
        url: String,
        allow_private: bool,
        client: Client,
        settings: Settings,
        counts: Arc<Counts>,
    ) -> Self {
        let fetch_timeout = settings.fetch_timeout;
        Self {
            fetch_timeout,
            issuer,
            url,
            allow_private,
            client,
            cache: Mutex::new(JwksCache::new(settings)),
            wanted: Notify::new(),
            arrived: Notify::new(),
            begun: std::sync::Once::new(),
            counts,
        }
    }

    pub fn is_of(&self, issuer: &str, url: &str, allow_private: bool) -> bool {
        self.issuer == issuer && self.url == url && self.allow_private == allow_private
    }

    pub fn keys(&self, now: Timestamp) -> Result<Arc<KeySet>, KeysError> {
        lock(&self.cache).keys(now).cloned()
    }

    /// A token names a key that is not there: waits for the fetch that may bring it, for as long as that one may take.
    pub async fn after_unknown_kid(&self) {
        let arrived = self.arrived.notified();
        tokio::pin!(arrived);
        arrived.as_mut().enable();
        self.wanted.notify_one();
        // Whether there will be a fetch, the task decides; it says so at once.
        arrived.await;
    }

    /// For the first token after a start: there may be no keys yet, but a fetch for them.
    pub async fn first(&self, now: Timestamp) {
        let arrived = self.arrived.notified();
        tokio::pin!(arrived);
        arrived.as_mut().enable();
        let fetching = {
            let cache = lock(&self.cache);
            cache.keys(now).is_err() && cache.is_fetching()
        };
        if fetching {
            arrived.await;
        }
    }

    async fn fetch(&self) -> Result<(Vec<u8>, Option<Duration>), FetchError> {
        let url = Url::parse(&self.url).map_err(|_| FetchError::Url(self.url.clone()))?;
        check(&url, self.allow_private)?;
        let asked = self.client.get(url).timeout(self.fetch_timeout);
        let response = asked
            .header(ACCEPT, "application/jwk-set+json, application/json")
            .send()
            .await
            .map_err(|error| FetchError::Unreachable(error.without_url()))?;
        let max_age = max_age(response.headers());
        Ok((body(response, KEYS_BYTES).await?, max_age))
    }

    async fn fetch_for(&self, attempt: Attempt) {
        let fetched = self.fetch().await;
        let now = Timestamp::now();
        let mut cache = lock(&self.cache);
        let result = match fetched {
            Ok((body, max_age)) => {
                cache.handle(now, Input::Fetched { attempt, body: &body, max_age }, jitter());
                match cache.trouble() {
                    (failures, Some(fault)) if failures > 0 => {
                        tracing::warn!(url = self.url, error = %fault, failures, "an issuer's keys");
                        fault.reason()
                    }
                    _ => OK,
                }
            }
            Err(error) => {
                cache.handle(now, Input::Failed { attempt }, jitter());
                let (failures, _) = cache.trouble();
                tracing::warn!(url = self.url, %error, failures, "an issuer's keys");
                error.reason()
            }
        };
        self.counts.fetch(&self.issuer, Fetched::Jwks, result);
    }
}

/// Fetches whenever the cache says so, until nobody has the keys any more.
pub fn keep_fresh(published: &Arc<Published>) {
    let weak = Arc::downgrade(published);
    published.begun.call_once(|| {
        tokio::spawn(async move {
            let mut input = None;
            loop {
                let Some(published) = weak.upgrade() else { return };
                let commands =
                    lock(&published.cache).handle(Timestamp::now(), input.take().unwrap_or(Input::Tick), jitter());
                if let Some(attempt) = commands.fetch {
                    published.fetch_for(attempt).await;
                    published.arrived.notify_waiters();
                    continue;
                }
                published.arrived.notify_waiters();
                let ahead = commands.wake_at.duration_since(Timestamp::now());
                let ahead = Duration::try_from(ahead).unwrap_or(Duration::from_millis(10)).min(Duration::from_secs(60));
                // Holding the keys for as long as it waits: a minute at most after the last view went.
                let wanted = {
                    let published = published.clone();
                    async move { published.wanted.notified().await }
                };
                drop(published);
                if tokio::time::timeout(ahead, wanted).await.is_ok() {
                    input = Some(Input::UnknownKid);
                }
            }
        });
    });
}

/// RFC 9111, 5.2.2.1.
fn max_age(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(CACHE_CONTROL)?.to_str().ok()?;
    let seconds = value.split(',').find_map(|part| part.trim().strip_prefix("max-age=")?.parse().ok())?;
    Some(Duration::from_secs(seconds))
}

pub fn jitter() -> u32 {
    let mut bytes = [0; 4];
    // Without randomness nodes only ask at the same time.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    u32::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests;
