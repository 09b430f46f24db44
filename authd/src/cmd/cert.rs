//! `authd cert`

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail};
use jiff::Timestamp;
use rustls::pki_types::CertificateDer;
use serde_json::json;

use super::{BAD_CONFIG, FAILED, print_diagnostics, settings};
use crate::{
    cli::{CertCommand, CertUsage, Verify},
    policy::{load, model},
    proofs::x509::{
        bundle::{self, Authority, BundleError},
        chain::{self, ChainError, Usage},
        crl::{self, Crl, CrlError, CrlPolicy, NothingRevoked},
        identity::VerifiedCertificate,
        leaf::{Leaf, hex},
        spiffe::TrustDomain,
    },
};

pub fn run(config: Option<&Path>, command: CertCommand) -> anyhow::Result<ExitCode> {
    match command {
        CertCommand::Verify(arguments) => verify(config, arguments),
        CertCommand::Inspect { file } => inspect(&file),
    }
}

fn verify(config: Option<&Path>, arguments: Verify) -> anyhow::Result<ExitCode> {
    let configured = match configured(config, &arguments)? {
        Ok(configured) => configured,
        Err(code) => return Ok(code),
    };
    let verdict = judge(configured, &arguments);
    let refusal = verdict.as_ref().err();
    println!(
        "{}",
        json!({
            "accepted": verdict.is_ok(),
            "reason": refusal.map(Refusal::reason),
            "detail": refusal.map(ToString::to_string),
            "principal": verdict.as_ref().ok(),
        })
    );
    Ok(if verdict.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

/// Why a chain is not accepted: for what it is, or for what it is measured with.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("{path}: {error}")]
    Bundle { path: String, error: BundleError },
    #[error("{path}: {error}")]
    Crl { path: String, error: CrlError },
    #[error("{path}: {error}")]
    Unreadable { path: String, error: io::Error },
}

impl Refusal {
    fn reason(&self) -> &'static str {
        match self {
            Self::Chain(error) => error.reason(),
            Self::Bundle { error, .. } => error.reason(),
            Self::Crl { error, .. } => error.reason(),
            Self::Unreadable { .. } => "unreadable_file",
        }
    }
}

/// An authority before its files are read.
struct Configured {
    name: String,
    bundle: PathBuf,
    trust_domain: Option<TrustDomain>,
    crl_files: Vec<PathBuf>,
    crl: CrlPolicy,
}

/// The authorities to ask: those of the policy, or one made of the arguments.
fn configured(config: Option<&Path>, arguments: &Verify) -> anyhow::Result<Result<Vec<Configured>, ExitCode>> {
    let mut configured = Vec::new();
    if arguments.bundle.is_none() || arguments.policy.is_some() || arguments.authority.is_some() {
        let directory = match &arguments.policy {
            Some(directory) => directory.clone(),
            None => match settings(config) {
                Ok(config) => config.policy,
                Err(code) => return Ok(Err(code)),
            },
        };
        let policy = load::directory(&directory);
        let Some(model) = policy.model else {
            print_diagnostics(&policy.diagnostics);
            return Ok(Err(ExitCode::from(BAD_CONFIG)));
        };
        let asked = |authority: &&model::Authority| arguments.authority.as_ref().is_none_or(|n| *n == authority.name);
        configured.extend(model.authorities.iter().filter(asked).map(|authority| Configured {
            name: authority.name.clone(),
            bundle: directory.join(&authority.bundle),
            trust_domain: authority.trust_domain.clone(),
            crl_files: authority.crl_files.iter().map(|file| directory.join(file)).collect(),
            crl: authority.crl,
        }));
        match (&arguments.authority, &arguments.bundle) {
            (Some(name), _) if configured.is_empty() => bail!("no authority of the policy is called `{name}`"),
            (None, None) if configured.is_empty() => bail!("the policy has no `[[authority]]`: name a `--bundle`"),
            _ => {}
        }
    }
    if let Some(bundle) = &arguments.bundle {
        match arguments.authority.is_some() {
            true => configured.iter_mut().for_each(|authority| authority.bundle.clone_from(bundle)),
            false => {
                configured = vec![Configured {
                    name: "bundle".to_owned(),
                    bundle: bundle.clone(),
                    trust_domain: None,
                    crl_files: Vec::new(),
                    crl: CrlPolicy::IfPresent,
                }];
            }
        }
    }
    for authority in &mut configured {
        authority.crl_files.extend(arguments.crl.iter().cloned());
        if arguments.require_crl {
            authority.crl = CrlPolicy::Required;
        }
        if arguments.trust_domain.is_some() {
            authority.trust_domain.clone_from(&arguments.trust_domain);
        }
    }
    Ok(Ok(configured))
}

fn judge(configured: Vec<Configured>, arguments: &Verify) -> Result<VerifiedCertificate, Refusal> {
    let chain = chain::read(&read(&arguments.file, chain::MAX_PEM_BYTES)?)?;
    let adopt = arguments.bundle.is_some() && arguments.authority.is_none() && arguments.trust_domain.is_none();
    let mut authorities = Vec::new();
    for mut authority in configured {
        if adopt {
            authority.trust_domain = own_trust_domain(&chain);
        }
        authorities.push(open(authority)?);
    }
    let usage = match arguments.usage {
        CertUsage::Client => Usage::Client,
        CertUsage::Server => Usage::Server,
    };
    let now = arguments.at.unwrap_or_else(Timestamp::now);
    Ok(chain::verify_by_any(&authorities, &chain, usage, now, &NothingRevoked)?)
}

fn open(configured: Configured) -> Result<Authority, Refusal> {
    let Configured { name, bundle, trust_domain, crl_files, crl: policy } = configured;
    let anchors = bundle::read(&read(&bundle, bundle::MAX_BYTES)?)
        .map_err(|error| Refusal::Bundle { path: bundle.display().to_string(), error })?;
    let mut crls: Vec<Crl> = Vec::new();
    for file in crl_files {
        let lists = crl::read(&read(&file, crl::MAX_BYTES)?)
            .map_err(|error| Refusal::Crl { path: file.display().to_string(), error })?;
        crls.extend(lists);
    }
    Ok(Authority::new(name, anchors, trust_domain, crls, policy))
}

/// Whoever names a bundle by hand says with it that the bundle speaks for the leaf's trust domain.
fn own_trust_domain(chain: &[CertificateDer<'_>]) -> Option<TrustDomain> {
    let id = Leaf::read(chain.first()?).ok()?.spiffe_id().ok()??;
    id.trust_domain().parse().ok()
}

/// One byte more than the limit is enough for whoever checks it.
fn read(path: &Path, limit: usize) -> Result<Vec<u8>, Refusal> {
    let mut bytes = Vec::new();
    let limit = limit as u64 + 1;
    match path == Path::new("-") {
        true => io::stdin().take(limit).read_to_end(&mut bytes),
        false => File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes)),
    }
    .map_err(|error| Refusal::Unreadable { path: path.display().to_string(), error })?;
    Ok(bytes)
}

fn inspect(file: &Path) -> anyhow::Result<ExitCode> {
    let chain = chain::read(&read(file, chain::MAX_PEM_BYTES)?).map_err(Refusal::from)?;
    for (index, der) in chain.iter().enumerate() {
        let leaf = Leaf::read(der).with_context(|| format!("certificate {}", index + 1))?;
        if index > 0 {
            println!();
        }
        print!("{}", describe(&leaf));
    }
    Ok(ExitCode::SUCCESS)
}

/// Names in certificates are their makers' choice; their control characters are escaped or refused where they are read.
fn describe(leaf: &Leaf) -> String {
    let certificate = &leaf.certificate;
    let mut usages = Vec::new();
    if let Some(usage) = certificate.key_usage {
        let named = [
            ("digitalSignature", usage.digital_signature),
            ("keyCertSign", usage.certificate_sign),
            ("cRLSign", usage.crl_sign),
        ];
        usages.extend(named.into_iter().filter(|(_, set)| *set).map(|(name, _)| name));
    }
    let length = certificate.path_length.map(|length| format!(", at most {length} CAs below it")).unwrap_or_default();
    let kind = if certificate.is_ca { format!("a CA{length}") } else { "a leaf".to_owned() };
    let key = certificate.key().map_or_else(|error| error.to_string(), |()| "accepted".to_owned());
    let mut lines = vec![
        ("subject", certificate.subject.clone()),
        ("issuer", certificate.issuer.clone()),
        ("serial", certificate.serial.clone()),
        ("kind", kind),
        ("key", key),
        ("key usage", usages.join(", ")),
        ("valid from", certificate.not_before.to_string()),
        ("valid to", certificate.not_after.to_string()),
        ("dns names", leaf.dns_names.join(", ")),
        ("uris", leaf.uris.join(", ")),
        ("sha-256", hex(&certificate.fingerprint)),
        ("key sha-256", hex(&certificate.key_hash)),
    ];
    if let Err(error) = leaf.spiffe_id() {
        lines.push(("spiffe id", error.to_string()));
    }
    lines
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(label, value)| format!("{label:<12}{value}\n"))
        .collect()
}
