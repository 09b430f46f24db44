//! Issuers and certificate authorities of tests' own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use authd::proofs::{base64url, x509::leaf::Certificate};
use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair},
};
use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType, IsCa, KeyIdMethod,
    KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber, date_time_ymd,
};
use serde_json::{Value, json};

pub const ISSUER: &str = "https://idp.example.org";

/// Signs tokens with ES256.
pub struct Issuer {
    pair: EcdsaKeyPair,
    kid: String,
}

impl Issuer {
    pub fn new(kid: &str) -> Result<Self> {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING)?;
        Ok(Self { pair, kid: kid.to_owned() })
    }

    /// Its key set (RFC 7517).
    pub fn jwks(&self) -> Result<String> {
        let point = self.pair.public_key().as_ref();
        let (x, y) = point.get(1..65).context("an uncompressed point")?.split_at(32);
        let key = json!({
            "kty": "EC", "crv": "P-256", "kid": self.kid, "use": "sig", "alg": "ES256",
            "x": base64url::encode(x), "y": base64url::encode(y),
        });
        Ok(json!({ "keys": [key] }).to_string())
    }

    /// A token that is good for everything the tests' rules ask, with some claims changed.
    pub fn token(&self, changed: &Value) -> Result<String> {
        let now = Timestamp::now().as_second();
        let mut claims = json!({
            "iss": ISSUER, "sub": "one", "aud": "ledger", "client_id": "one", "scope": "ledger:write",
            "iat": now, "exp": now + 600, "jti": format!("{:x}", rand::random::<u128>()),
        });
        for (name, value) in changed.as_object().into_iter().flatten() {
            claims[name] = value.clone();
        }
        let header = json!({ "alg": "ES256", "typ": "at+jwt", "kid": self.kid });
        let signed = format!("{}.{}", base64url::encode(header.to_string()), base64url::encode(claims.to_string()));
        let signature = self.pair.sign(&SystemRandom::new(), signed.as_bytes())?;
        Ok(format!("{signed}.{}", base64url::encode(signature.as_ref())))
    }
}

/// Issues client and server certificates.
pub struct Authority {
    issuer: CertifiedIssuer<'static, rcgen::KeyPair>,
    /// What has to be shown behind a certificate of its own, in PEM.
    intermediates: String,
}

impl Authority {
    pub fn new(name: &str) -> Result<Self> {
        Self::until(name, 4096)
    }

    /// One whose own certificate ends with the beginning of a year.
    pub fn until(name: &str, year: i32) -> Result<Self> {
        let issuer = CertifiedIssuer::self_signed(Self::params(name, year), rcgen::KeyPair::generate()?)?;
        Ok(Self { issuer, intermediates: String::new() })
    }

    /// One that this one vouches for.
    pub fn below(&self, name: &str) -> Result<Self> {
        let params = Self::params(name, 4096);
        let issuer = CertifiedIssuer::signed_by(params, rcgen::KeyPair::generate()?, &self.issuer)?;
        let intermediates = issuer.pem() + &self.intermediates;
        Ok(Self { issuer, intermediates })
    }

    fn params(name: &str, year: i32) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.not_after = date_time_ymd(year, 1, 1);
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
    }

    /// Of its own certificate.
    pub fn serial(&self) -> Result<Vec<u8>> {
        serial_of(self.issuer.der())
    }

    /// Its revocation list (RFC 5280, 5), in PEM, with some serial numbers.
    pub fn list(&self, serials: &[Vec<u8>]) -> Result<String> {
        self.list_until(serials, 2100)
    }

    /// One that is due for an update with the beginning of a year.
    pub fn list_until(&self, serials: &[Vec<u8>], year: i32) -> Result<String> {
        let long_ago = date_time_ymd(2020, 1, 1);
        let revoked_certs = serials.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial),
            revocation_time: long_ago,
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: long_ago,
            next_update: date_time_ymd(year, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked_certs.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(params.signed_by(&self.issuer)?.pem()?)
    }

    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// Writes `NAME.pem` and `NAME.key` into a directory. Returns the certificate's SHA-256.
    pub fn issue(&self, directory: &Path, name: &str, names: Vec<SanType>) -> Result<[u8; 32]> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names = names;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let key = rcgen::KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        fs::write(directory.join(format!("{name}.pem")), certificate.pem() + &self.intermediates)?;
        fs::write(directory.join(format!("{name}.key")), key.serialize_pem())?;
        Ok(*authd::digest::Digest::of(certificate.der()).as_bytes())
    }

    /// The same for a workload that is known by its SPIFFE ID.
    pub fn issue_spiffe(&self, directory: &Path, name: &str, id: &str) -> Result<[u8; 32]> {
        self.issue(directory, name, vec![SanType::URI(id.try_into()?)])
    }
}

pub fn serial_of(certificate: &[u8]) -> Result<Vec<u8>> {
    let hex = Certificate::read(&certificate.into())?.serial;
    let digits = hex.as_bytes().chunks(2).map(|pair| Ok(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?));
    digits.collect()
}

/// An authority of OpenSSL's: `ca.crt`, and what it issues, in one directory.
pub struct OpenSsl {
    directory: PathBuf,
}

impl OpenSsl {
    const KEY: [&str; 5] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];

    pub fn new(directory: &Path) -> Result<Self> {
        let authority = Self { directory: directory.to_owned() };
        let ca = ["-x509", "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=tests", "-days", "2"];
        let usage = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"];
        authority.openssl(&[&["req"], &Self::KEY[..], &ca, &usage].concat())?;
        Ok(authority)
    }

    pub fn pem(&self) -> Result<String> {
        Ok(fs::read_to_string(self.directory.join("ca.crt"))?)
    }

    /// Writes `NAME.pem` and `NAME.key`, for a client that is known by its SPIFFE ID.
    pub fn issue_spiffe(&self, name: &str, id: &str) -> Result<()> {
        let file = |end: &str| format!("{name}.{end}");
        let (key, request, certificate, extensions) = (file("key"), file("csr"), file("pem"), file("ext"));
        let text = format!(
            "subjectAltName=URI:{id}\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=clientAuth\nbasicConstraints=CA:FALSE\n"
        );
        fs::write(self.directory.join(&extensions), text)?;
        let subject = format!("/CN={name}");
        let new = ["-keyout", &key, "-out", &request, "-subj", &subject];
        self.openssl(&[&["req"], &Self::KEY[..], &new].concat())?;
        let signed =
            ["x509", "-req", "-in", &request, "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "1"];
        self.openssl(&[&signed[..], &["-extfile", &extensions, "-out", &certificate]].concat())
    }

    fn openssl(&self, arguments: &[&str]) -> Result<()> {
        let output = Command::new("openssl").current_dir(&self.directory).args(arguments).output()?;
        ensure!(output.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}
