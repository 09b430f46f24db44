//! What proofs are verified against: the policy, authorities, issuers' keys, and the memory that replays and floods take.
//!
//! Enters: settings. Leaves: one consistent view of them, replaced as a whole. What has to outlive a change (which DPoP
//! proofs were used, issuers' keys that were fetched) goes over from the one before.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject},
};

use super::{
    counts::Counts,
    fetch::{self, Published},
    listed::Chains,
    notify::Hook,
};
use crate::{
    daemon::{control::network_of, settings::SERVER_AUTHORITIES},
    digest::Digest,
    ipc::{Caller, Ending, Identity, OwnIssuer, Settings},
    policy::{
        diagnostic::Source,
        load::texts,
        model::{self, Keys, Model, TokenCheck},
    },
    proofs::{
        api_key::rate::{Bucket, Rate},
        dpop::{nonce::Nonces, replay::Replays},
        introspection::ClientAuth,
        jwk::KeySet,
        jwks_cache,
        jwt::{IssuerPolicy, VerifiedToken},
        x509::{
            bundle, crl,
            leaf::{Certificate, Leaf},
            spiffe::SpiffeId,
            verifier::Possession,
        },
    },
};

/// Proofs of possession that are remembered; each for a minute.
const REPLAYS: usize = 262_144;
/// How long a nonce is good, at least.
const NONCE_WINDOW: Duration = Duration::from_secs(300);
/// Tokens whose verification is remembered.
const TOKENS: usize = 16_384;
/// How long at most: a key that an issuer withdrew verifies nothing after this.
pub const TOKEN_CACHE: Duration = Duration::from_secs(60);
/// Requests of one caller for itself.
const REQUESTS_PER_MINUTE: u32 = 6_000;
/// Actions that one caller may ask about at once, with what those cost dataplane.
const ACTIONS_AT_ONCE: i32 = 200;
/// Requests of one proxy: about each of its clients' requests there is one.
const PROXIED_PER_MINUTE: u32 = 1_000_000;
/// Callers whose requests are counted.
const CALLERS: usize = 65_536;

/// What a caller's requests are counted as.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Share {
    Caller,
    /// About an action, besides what it counts as a request.
    Action,
    /// About somebody else's request.
    Proxy,
}

/// How an issuer's tokens are verified.
pub enum Method {
    /// By keys of a file.
    Keys(Arc<KeySet>),
    /// By keys that the issuer publishes.
    Published(Arc<Published>),
    /// By asking the issuer.
    Introspection { url: String, client: ClientAuth },
    /// Not at all: what is wrong with it.
    Unusable(String),
}

pub struct Issuer {
    pub policy: IssuerPolicy,
    pub method: Method,
    pub client: Option<reqwest::Client>,
    pub allow_private: bool,
}

/// What goes over from one view to the next.
struct Memory {
    replays: Mutex<Replays>,
    nonces: Mutex<Nonces>,
    tokens: Mutex<HashMap<Digest, Remembered>>,
    callers: Mutex<HashMap<String, Bucket>>,
    chains: Mutex<Chains>,
}

/// A token that was verified, for one rule.
struct Remembered {
    token: Arc<VerifiedToken>,
    until: Timestamp,
}

pub struct Verifier {
    pub model: Model,
    /// By the model's index; `None` where the files are no authority.
    pub authorities: Vec<Option<bundle::Authority>>,
    pub issuers: Vec<Issuer>,
    tls: Option<Arc<ServerConfig>>,
    /// The listener's own certificate, which says by which names it is called.
    own: Option<CertificateDer<'static>>,
    /// When the first certificate of the listener's configured chain ends.
    own_end: Option<Timestamp>,
    /// PEM of the authorities that servers are known by.
    pub server_roots: Option<Vec<u8>>,
    /// Who is told of calls that wait for approval.
    pub hook: Option<Arc<Hook>>,
    /// This node as an issuer of tokens.
    pub own_issuer: Option<OwnIssuer>,
    /// The listener's configured chain and key, if they are any: what this node shows to other nodes.
    identity: Option<Identity>,
    memory: Arc<Memory>,
    pub counts: Arc<Counts>,
}

impl Verifier {
    pub fn new(settings: Settings, before: Option<&Self>, counts: Arc<Counts>) -> Self {
        let sources = settings.sources.iter();
        let sources = sources.map(|(name, text)| Source { name: name.as_str().into(), text: text.as_str().into() });
        // Dataplane has it in force, so it is one.
        let model = texts(sources.collect()).model.unwrap_or_default();
        let file = |name: &std::path::Path| {
            let text = settings.files.get(&name.display().to_string())?;
            STANDARD.decode(text).ok()
        };
        let authorities = model.authorities.iter().map(|authority| read_authority(authority, &file)).collect();
        let roots = settings.files.get(SERVER_AUTHORITIES).and_then(|text| STANDARD.decode(text).ok());
        let own = settings.issuer.as_ref();
        let issuer = |issuer| read_issuer(issuer, &file, roots.as_deref(), before, own, &counts);
        let issuers = model.issuers.iter().map(issuer).collect();
        let memory = before.map_or_else(Memory::new, |before| before.memory.clone());
        // What was accepted under other settings may not be under these.
        lock(&memory.tokens).clear();
        let (tls, own) = match listener(&settings, before) {
            Ok((tls, own)) => (Some(tls), Some(own)),
            Err(error) => {
                tracing::error!(%error, "the listener's certificate");
                (None, None)
            }
        };
        let own_end = settings.identity.as_ref().and_then(|identity| first_end(&identity.certificates));
        let identity = settings.identity.filter(|_| tls.is_some());
        let own_issuer = settings.issuer;
        let hook = settings.webhook.and_then(|webhook| {
            Hook::new(&webhook, roots.as_deref())
                .map_err(|error| tracing::error!(%error, "nobody is told by the webhook"))
                .ok()
                .map(Arc::new)
        });
        let server_roots = roots;
        Self {
            model,
            authorities,
            issuers,
            tls,
            own,
            own_end,
            server_roots,
            hook,
            own_issuer,
            identity,
            memory,
            counts,
        }
    }

    /// When certificates and lists end, of which somebody has to bring the next one in time.
    pub fn ends(&self) -> Vec<(Ending, Option<Timestamp>)> {
        let of_authorities = self.model.authorities.iter().zip(&self.authorities).flat_map(|(named, read)| {
            let authority = || named.name.clone();
            let anchors = read.iter().flat_map(|read| read.anchors());
            let bundle = anchors.map(|anchor| anchor.certificate.not_after).min();
            let lists = read.as_ref().and_then(bundle::Authority::crls_due);
            [(Ending::Bundle { authority: authority() }, bundle), (Ending::Lists { authority: authority() }, lists)]
        });
        of_authorities.chain([(Ending::Listener, self.own_end)]).collect()
    }

    /// Starts what runs by itself: fetching keys. They stop with the last view that has them.
    pub fn begin(self: Arc<Self>) {
        for issuer in &self.issuers {
            if let Method::Published(published) = &issuer.method {
                fetch::keep_fresh(published);
            }
        }
    }

    pub fn tls(&self) -> Option<Arc<ServerConfig>> {
        self.tls.clone()
    }

    /// What this node shows to other nodes.
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// Which node this one is, by the listener's configured certificate.
    pub fn own_spiffe_id(&self) -> Option<SpiffeId> {
        let own = self.own.as_ref().filter(|_| self.identity.is_some())?;
        Leaf::read(own).ok()?.spiffe_id().ok()?
    }

    /// Whether this listener is called by a name.
    pub fn is_called(&self, host: &str) -> bool {
        let name = rustls::pki_types::ServerName::try_from(host);
        let (Some(own), Ok(name)) = (&self.own, name) else { return false };
        webpki::EndEntityCert::try_from(own).is_ok_and(|own| own.verify_is_valid_for_subject_name(&name).is_ok())
    }

    /// Something was revoked: nothing that was accepted before counts.
    pub fn forget(&self) {
        lock(&self.memory.tokens).clear();
    }

    pub fn replays(&self) -> &Mutex<Replays> {
        &self.memory.replays
    }

    pub fn nonces(&self) -> &Mutex<Nonces> {
        &self.memory.nonces
    }

    pub fn chains(&self) -> &Mutex<Chains> {
        &self.memory.chains
    }

    pub fn remembered(&self, key: &Digest, now: Timestamp) -> Option<Arc<VerifiedToken>> {
        lock(&self.memory.tokens).get(key).filter(|found| now < found.until).map(|found| found.token.clone())
    }

    pub fn remember(&self, key: Digest, token: Arc<VerifiedToken>, until: Timestamp, now: Timestamp) {
        let mut tokens = lock(&self.memory.tokens);
        if tokens.len() >= TOKENS {
            tokens.retain(|_, found| now < found.until);
        }
        // More than fit within a minute: those are verified each time, which is slower and not less strict.
        if tokens.len() < TOKENS {
            tokens.insert(key, Remembered { token, until });
        }
    }

    /// Whether a caller may ask once more now.
    pub fn admit(&self, caller: &Caller, share: Share, now: Timestamp) -> bool {
        let (rate, key) = match (caller, share) {
            (Caller::Local { workload: Some(workload), .. }, Share::Proxy) => {
                (PROXIED_PER_MINUTE, format!("proxy {}", workload.cgroup))
            }
            (Caller::Local { workload: Some(workload), .. }, Share::Action) => {
                (REQUESTS_PER_MINUTE, format!("action {}", workload.cgroup))
            }
            (Caller::Local { workload: Some(workload), .. }, Share::Caller) => {
                (REQUESTS_PER_MINUTE, workload.cgroup.clone())
            }
            (Caller::Local { workload: None, uid, .. }, _) => (REQUESTS_PER_MINUTE, format!("uid {uid}")),
            (Caller::Admin { .. }, _) => return true,
            (Caller::Remote { address, .. }, _) => (REQUESTS_PER_MINUTE, network_of(address.ip()).to_string()),
        };
        let Some(rate) = Rate::per_minute(rate) else { return false };
        let mut callers = lock(&self.memory.callers);
        if callers.len() >= CALLERS && !callers.contains_key(&key) {
            callers.clear();
        }
        let bucket = callers.entry(key).or_default();
        match share {
            Share::Action => bucket.take_of(now, rate, ACTIONS_AT_ONCE),
            Share::Caller | Share::Proxy => bucket.take(now, rate),
        }
    }
}

impl Memory {
    fn new() -> Arc<Self> {
        let mut secret = [0; 32];
        // Without randomness nothing here works; nonces by a secret of zeroes would only be guessed.
        let random = aws_lc_rs::rand::fill(&mut secret).is_ok();
        if !random {
            tracing::error!("the kernel gives no randomness");
        }
        Arc::new(Self {
            replays: Mutex::new(Replays::new(if random { REPLAYS } else { 0 })),
            nonces: Mutex::new(Nonces::new(&secret, NONCE_WINDOW)),
            tokens: Mutex::new(HashMap::new()),
            callers: Mutex::new(HashMap::new()),
            chains: Mutex::default(),
        })
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type ReadFile<'a> = &'a dyn Fn(&std::path::Path) -> Option<Vec<u8>>;

fn read_authority(authority: &model::Authority, file: ReadFile<'_>) -> Option<bundle::Authority> {
    let name = &authority.name;
    let refused = |what: &std::path::Path, error: &dyn std::fmt::Display| {
        tracing::error!(authority = name, file = %what.display(), %error, "certificates by this authority are refused");
    };
    let bytes = file(&authority.bundle).or_else(|| {
        refused(&authority.bundle, &"it cannot be read");
        None
    })?;
    let anchors = bundle::read(&bytes).map_err(|error| refused(&authority.bundle, &error)).ok()?;
    let mut lists = Vec::new();
    for path in &authority.crl_files {
        // A list that is meant to be there and is not: who is on it would pass.
        let bytes = file(path).or_else(|| {
            refused(path, &"it cannot be read");
            None
        })?;
        lists.extend(crl::read(&bytes).map_err(|error| refused(path, &error)).ok()?);
    }
    Some(bundle::Authority::new(name.clone(), anchors, authority.trust_domain.clone(), lists, authority.crl))
}

/// When the first of some certificates in PEM ends.
fn first_end(pem: &str) -> Option<Timestamp> {
    let certificates = CertificateDer::pem_slice_iter(pem.as_bytes()).flatten();
    certificates.filter_map(|der| Certificate::read(&der).ok()).map(|certificate| certificate.not_after).min()
}

fn read_issuer(
    issuer: &model::Issuer,
    file: ReadFile<'_>,
    roots: Option<&[u8]>,
    before: Option<&Verifier>,
    own: Option<&OwnIssuer>,
    counts: &Arc<Counts>,
) -> Issuer {
    let mut policy = issuer.policy();
    if let (TokenCheck::Own, Some(own)) = (&issuer.check, own) {
        policy.issuer.clone_from(&own.url);
    }
    let allow_private = issuer.allow_private;
    let made = |method, client| Issuer { policy: policy.clone(), method, client, allow_private };
    let unusable = |why: String| {
        tracing::error!(issuer = issuer.name, why, "tokens of this issuer are refused");
        made(Method::Unusable(why), None)
    };
    let client = |asks| fetch::client(asks, allow_private, roots);
    match &issuer.check {
        TokenCheck::Jwt { keys: Keys::File(path), .. } => match file(path).map(|bytes| KeySet::parse(&bytes)) {
            Some(Ok(keys)) => made(Method::Keys(Arc::new(keys)), None),
            Some(Err(error)) => unusable(format!("{}: {error}", path.display())),
            None => unusable(format!("{} cannot be read", path.display())),
        },
        TokenCheck::Jwt { keys: Keys::Url(url), .. } => {
            let known = before.and_then(|before| {
                before.issuers.iter().find_map(|known| match &known.method {
                    Method::Published(published) if published.is_of(&issuer.name, url, allow_private) => {
                        Some(published.clone())
                    }
                    _ => None,
                })
            });
            match (known, client(fetch::For::Keys)) {
                (Some(known), _) => made(Method::Published(known), None),
                (None, Ok(client)) => {
                    let (name, counts, settings) =
                        (issuer.name.clone(), counts.clone(), jwks_cache::Settings::default());
                    let published = Published::new(name, url.clone(), allow_private, client, settings, counts);
                    made(Method::Published(Arc::new(published)), None)
                }
                (None, Err(error)) => unusable(error.to_string()),
            }
        }
        TokenCheck::Own => match own.map(|own| KeySet::parse(own.keys.as_bytes())) {
            Some(Ok(keys)) => made(Method::Keys(Arc::new(keys)), None),
            Some(Err(error)) => unusable(format!("the keys by which this node signs: {error}")),
            // Nobody has such a token: nothing to say.
            None => made(Method::Unusable("this node issues no tokens".to_owned()), None),
        },
        TokenCheck::Introspection { url, client_id, client_secret_file } => {
            let secret = client_secret_file.as_deref().and_then(file);
            let Some(secret) = secret.and_then(|bytes| String::from_utf8(bytes).ok()) else {
                return unusable("a readable `client_secret_file` is needed to ask it".to_owned());
            };
            let auth =
                ClientAuth::Basic { id: client_id.clone(), secret: secret.trim_end_matches(['\r', '\n']).to_owned() };
            match client(fetch::For::Introspection) {
                Ok(client) => made(Method::Introspection { url: url.clone(), client: auth }, Some(client)),
                Err(error) => unusable(error.to_string()),
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum ListenerError {
    #[error("PEM: {0}")]
    Pem(#[from] rustls::pki_types::pem::Error),
    #[error("there is none in the file")]
    Empty,
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    #[error("making one for the Unix socket: {0}")]
    Make(#[from] rcgen::Error),
}

/// The listener's TLS: by its own certificate, or, for the Unix socket alone, by one that is made now.
fn listener(
    settings: &Settings,
    before: Option<&Verifier>,
) -> Result<(Arc<ServerConfig>, CertificateDer<'static>), ListenerError> {
    let (chain, key) = match &settings.identity {
        Some(identity) => {
            let chain =
                CertificateDer::pem_slice_iter(identity.certificates.as_bytes()).collect::<Result<Vec<_>, _>>()?;
            (chain, PrivateKeyDer::from_pem_slice(identity.key.as_bytes())?)
        }
        None => {
            if let Some(before) = before
                && let (Some(tls), Some(own)) = (&before.tls, &before.own)
            {
                return Ok((tls.clone(), own.clone()));
            }
            let made = rcgen::generate_simple_self_signed([super::LOCAL_HOST.to_owned()])?;
            let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
            (vec![made.cert.der().clone()], PrivateKeyDer::from(key))
        }
    };
    let own = chain.first().cloned().ok_or(ListenerError::Empty)?;
    let versions: &[&rustls::SupportedProtocolVersion] =
        if settings.tls12 { &[&rustls::version::TLS13, &rustls::version::TLS12] } else { &[&rustls::version::TLS13] };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)?
        .with_client_cert_verifier(Arc::new(Possession))
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    // Each connection proves possession anew.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok((Arc::new(config), own))
}
