//! Certificates by OpenSSL's command line: an implementation that shares nothing with ours.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

/// In the middle of what certificates here are valid for.
pub const NOW: &str = "2026-06-15T12:00:00Z";

/// Extensions of a CA, and of a leaf to which names are added.
pub const CA: &str = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign";
pub const LEAF: &str =
    "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=clientAuth,serverAuth";

/// A directory of keys, certificates and lists, each under its name.
pub struct Pki(PathBuf);

/// What to make. The defaults are a CA of its own with a P-256 key.
#[derive(Clone, Copy)]
pub struct Make<'a> {
    pub name: &'a str,
    /// As `-subj` takes it.
    pub subject: &'a str,
    /// Name of the issuer; `None` signs itself.
    pub issuer: Option<&'a str>,
    /// `ec:P-256`, `rsa:2048`, `ed25519`, or the name of what has the key already.
    pub key: &'a str,
    pub extensions: &'a str,
    pub from: &'a str,
    pub to: &'a str,
    pub digest: &'a str,
}

impl Default for Make<'_> {
    fn default() -> Self {
        Self {
            name: "root",
            subject: "/O=Example/CN=Root",
            issuer: None,
            key: "ec:P-256",
            extensions: CA,
            from: "20260101000000Z",
            to: "20270101000000Z",
            digest: "default",
        }
    }
}

impl Pki {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("authd-pki-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).unwrap();
        Self(directory)
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.0.join(file)
    }

    pub fn read(&self, file: &str) -> Vec<u8> {
        fs::read(self.path(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
    }

    /// Runs openssl in the directory, and returns what it prints.
    pub fn openssl(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("openssl");
        let output = command.args(arguments).current_dir(&self.0).stdin(Stdio::null()).output();
        let output = output.expect("the tests need the openssl command");
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "openssl {arguments:?}\n{complaint}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Makes a certificate `NAME.pem` with its key `NAME.key`.
    pub fn make(&self, make: Make<'_>) {
        let Make { name, subject, issuer, key, extensions, from, to, digest } = make;
        let key_file = format!("{name}.key");
        match key.split_once(':') {
            Some(("ec", curve)) => self.genpkey(&key_file, &["EC", "-pkeyopt", &format!("ec_paramgen_curve:{curve}")]),
            Some(("rsa", bits)) => self.genpkey(&key_file, &["RSA", "-pkeyopt", &format!("rsa_keygen_bits:{bits}")]),
            _ if key == "ed25519" => self.genpkey(&key_file, &["ED25519"]),
            _ => fs::write(self.path(&key_file), self.read(&format!("{key}.key"))).unwrap(),
        }
        let (request, certificate, extension_file) =
            (format!("{name}.csr"), format!("{name}.pem"), format!("{name}.ext"));
        fs::write(self.path(&extension_file), extensions).unwrap();
        self.openssl(&["req", "-new", "-utf8", "-key", &key_file, "-subj", subject, "-out", &request]);
        let signer = issuer.unwrap_or(name);
        let config = self.authority(signer);
        let (signer_key, signer_certificate) = (format!("{signer}.key"), format!("{signer}.pem"));
        let mut arguments = vec!["ca", "-batch", "-notext", "-preserveDN", "-config", &config, "-keyfile", &signer_key];
        match issuer {
            Some(_) => arguments.extend(["-cert", &signer_certificate]),
            None => arguments.push("-selfsign"),
        }
        arguments.extend(["-in", &request, "-out", &certificate, "-extfile", &extension_file, "-md", digest]);
        arguments.extend(["-startdate", from, "-enddate", to]);
        self.openssl(&arguments);
    }

    /// Makes a leaf with the usual extensions and these alternative names.
    pub fn leaf(&self, name: &str, issuer: &str, names: &str) {
        let extensions = format!("{LEAF}\nsubjectAltName={names}");
        let subject = format!("/O=Example/CN={name}");
        self.make(Make { name, subject: &subject, issuer: Some(issuer), extensions: &extensions, ..Make::default() });
    }

    pub fn revoke(&self, issuer: &str, name: &str) {
        let config = self.authority(issuer);
        let (key, certificate) = (format!("{issuer}.key"), format!("{issuer}.pem"));
        let revoked = format!("{name}.pem");
        self.openssl(&["ca", "-config", &config, "-keyfile", &key, "-cert", &certificate, "-revoke", &revoked]);
    }

    /// Makes a list `FILE` of what the issuer has revoked.
    pub fn list(&self, issuer: &str, file: &str, from: &str, to: &str) {
        let config = self.authority(issuer);
        let (key, certificate) = (format!("{issuer}.key"), format!("{issuer}.pem"));
        self.openssl(&[
            "ca",
            "-config",
            &config,
            "-keyfile",
            &key,
            "-cert",
            &certificate,
            "-gencrl",
            "-out",
            file,
            "-crl_lastupdate",
            from,
            "-crl_nextupdate",
            to,
        ]);
    }

    /// One file of several.
    pub fn join(&self, files: &[&str]) -> Vec<u8> {
        files.iter().flat_map(|file| self.read(file)).collect()
    }

    fn genpkey(&self, file: &str, algorithm: &[&str]) {
        let mut arguments = vec!["genpkey", "-out", file, "-algorithm"];
        arguments.extend(algorithm);
        self.openssl(&arguments);
    }

    /// The books of an issuer.
    fn authority(&self, name: &str) -> String {
        let books = self.path(&format!("{name}.ca"));
        let config = format!("{name}.cnf");
        if books.exists() {
            return config;
        }
        fs::create_dir_all(books.join("new")).unwrap();
        fs::write(books.join("index.txt"), "").unwrap();
        fs::write(books.join("crlnumber"), "01\n").unwrap();
        let text = format!(
            "[ca]\ndefault_ca=d\n[d]\ndatabase={name}.ca/index.txt\nnew_certs_dir={name}.ca/new\ncrlnumber={name}.ca/crlnumber\n\
             rand_serial=yes\nunique_subject=no\npolicy=any\ndefault_md=default\ncrl_extensions=crl\n\
             string_mask=utf8only\n[any]\ncommonName=optional\n[crl]\nauthorityKeyIdentifier=keyid\n"
        );
        fs::write(self.path(&config), text).unwrap();
        config
    }
}

impl Drop for Pki {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A `subjectAltName` of raw bytes: one name with this context tag.
pub fn raw_name(tag: u8, name: &[u8]) -> String {
    let mut der = vec![0x30, name.len() as u8 + 2, 0x80 | tag, name.len() as u8];
    der.extend(name);
    let hex: Vec<String> = der.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("DER:{}", hex.join(":"))
}
