//! A client of TLS that does what no library does: hellos made by hand, and another hello after the handshake.

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
};

use anyhow::{Context, Result, bail};
use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use rustls::{
    ClientConfig, ClientConnection, ConnectionTrafficSecrets, crypto::CryptoProvider, crypto::aws_lc_rs::cipher_suite,
    pki_types::ServerName,
};

pub const ALERT: u8 = 21;
pub const HANDSHAKE: u8 = 22;
pub const DATA: u8 = 23;
/// Of a hello, among handshake messages.
const CLIENT_HELLO: u8 = 1;
const MAX_RECORD: usize = 1 << 14;

/// A list of names (RFC 6066, 3), each with its kind: 0 is a host's.
pub fn names(names: &[(u8, &[u8])]) -> Vec<u8> {
    with_length(&names.iter().flat_map(|(kind, name)| [&[*kind][..], &with_length(name)].concat()).collect::<Vec<_>>())
}

/// A list of protocols (RFC 7301, 3.1).
pub fn protocols(names: &[&[u8]]) -> Vec<u8> {
    with_length(&names.iter().flat_map(|name| [&[name.len() as u8][..], name].concat()).collect::<Vec<_>>())
}

/// A ClientHello of TLS 1.3 (RFC 8446, 4.1.2) as a handshake message, with lists of names and protocols as they are given.
/// Without a share of a key a server asks for another hello, with one it goes on.
pub fn hello(names: Option<&[u8]>, protocols: Option<&[u8]>, has_share: bool) -> Vec<u8> {
    const X25519: [u8; 2] = [0, 29];
    let extension = |kind: u8, content: &[u8]| [&[0, kind][..], &with_length(content)].concat();
    // Any 32 bytes are somebody's public key.
    let share = [&X25519[..], &with_length(&[9; 32])].concat();
    let extensions = [
        names.map(|names| extension(0, names)).unwrap_or_default(),
        extension(10, &with_length(&X25519)),
        // ecdsa_secp256r1_sha256
        extension(13, &with_length(&[4, 3])),
        protocols.map(|protocols| extension(16, protocols)).unwrap_or_default(),
        // TLS 1.3
        extension(43, &[2, 3, 4]),
        extension(51, &with_length(if has_share { &share } else { &[] })),
    ];
    // TLS_AES_128_GCM_SHA256; no session; no compression.
    let body =
        [&[3, 3][..], &[7; 32], &[0], &with_length(&[0x13, 1]), &[1, 0], &with_length(&extensions.concat())].concat();
    let length = body.len() as u32;
    [&[CLIENT_HELLO][..], &length.to_be_bytes()[1..], &body].concat()
}

/// A handshake message in as many records as it takes.
pub fn records(message: &[u8]) -> Vec<u8> {
    message.chunks(MAX_RECORD).flat_map(|part| [&[HANDSHAKE, 3, 1][..], &with_length(part)].concat()).collect()
}

fn with_length(content: &[u8]) -> Vec<u8> {
    [&(content.len() as u16).to_be_bytes()[..], content].concat()
}

/// The next record, if the other end does not close the connection.
pub fn record(stream: &mut impl Read) -> Result<Option<(u8, Vec<u8>)>> {
    let mut header = [0; 5];
    match stream.read_exact(&mut header) {
        Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => return Ok(None),
        read => read.context("waiting for a record")?,
    }
    let mut content = vec![0; usize::from(u16::from_be_bytes([header[3], header[4]]))];
    stream.read_exact(&mut content)?;
    Ok(Some((header[0], content)))
}

/// A connection of TLS 1.2 after its handshake, whose records are in the caller's hands.
pub struct Established {
    stream: TcpStream,
    send: Direction,
    receive: Direction,
}

struct Direction {
    key: LessSafeKey,
    iv: [u8; 12],
    number: u64,
}

impl Established {
    /// The one cipher that it speaks: its nonces are not part of records (RFC 7905).
    pub fn provider() -> CryptoProvider {
        let cipher_suites = vec![cipher_suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256];
        CryptoProvider { cipher_suites, ..rustls::crypto::aws_lc_rs::default_provider() }
    }

    /// With a configuration of that provider's.
    pub fn new(mut config: ClientConfig, name: &str, mut stream: TcpStream) -> Result<Self> {
        config.enable_secret_extraction = true;
        let mut client = ClientConnection::new(config.into(), ServerName::try_from(name.to_owned())?)?;
        while client.is_handshaking() {
            client.complete_io(&mut stream)?;
        }
        let secrets = client.dangerous_extract_secrets()?;
        Ok(Self { stream, send: Direction::new(secrets.tx)?, receive: Direction::new(secrets.rx)? })
    }

    pub fn send(&mut self, kind: u8, content: &[u8]) -> Result<()> {
        let (nonce, aad) = self.send.next(kind, content.len());
        let mut sealed = content.to_vec();
        self.send.key.seal_in_place_append_tag(nonce, Aad::from(aad), &mut sealed)?;
        let record = [&[kind, 3, 3][..], &with_length(&sealed)].concat();
        Ok(self.stream.write_all(&record)?)
    }

    /// The next record, if the other end does not close the connection.
    pub fn receive(&mut self) -> Result<Option<(u8, Vec<u8>)>> {
        let Some((kind, mut sealed)) = record(&mut self.stream)? else { return Ok(None) };
        let length = sealed.len().checked_sub(CHACHA20_POLY1305.tag_len()).context("a sealed record")?;
        let (nonce, aad) = self.receive.next(kind, length);
        let content = self.receive.key.open_in_place(nonce, Aad::from(aad), &mut sealed)?;
        Ok(Some((kind, content.to_vec())))
    }

    /// An answer over HTTP/1.1, to its last byte.
    pub fn request(&mut self, text: &str) -> Result<String> {
        self.send(DATA, text.as_bytes())?;
        let mut answer = String::new();
        loop {
            match self.receive()? {
                Some((DATA, part)) => answer += std::str::from_utf8(&part)?,
                other => bail!("instead of the answer after {answer:?}: {other:?}"),
            }
            let Some((head, body)) = answer.split_once("\r\n\r\n") else { continue };
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap_or("0");
            if body.len() >= length.parse()? {
                return Ok(answer);
            }
        }
    }
}

impl Direction {
    fn new((number, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self> {
        let ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } = secrets else { bail!("another cipher") };
        let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key.as_ref())?);
        Ok(Self { key, iv: iv.as_ref().try_into()?, number })
    }

    /// Nonce (RFC 7905, 2) and additional data (RFC 5246, 6.2.3.3) of the next record.
    fn next(&mut self, kind: u8, length: usize) -> (Nonce, [u8; 13]) {
        let number = self.number.to_be_bytes();
        self.number += 1;
        let mut nonce = self.iv;
        for (byte, number) in nonce[4..].iter_mut().zip(number) {
            *byte ^= number;
        }
        let mut aad = [0; 13];
        aad[..8].copy_from_slice(&number);
        aad[8..11].copy_from_slice(&[kind, 3, 3]);
        aad[11..].copy_from_slice(&(length as u16).to_be_bytes());
        (Nonce::assume_unique_for_key(nonce), aad)
    }
}
