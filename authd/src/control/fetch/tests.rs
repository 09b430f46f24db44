//! Issuers that are down, slow, huge, wrong or flapping, on real sockets.

use std::sync::atomic::{AtomicUsize, Ordering};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::*;
use crate::{ipc::Counted, proofs::testing::Signer};

/// A server of HTTP that answers each request with the next of some texts, the last one again and again.
struct Server {
    url: String,
    asked: Arc<AtomicUsize>,
}

#[derive(Clone)]
enum Reply {
    Text(String),
    /// Headers, and then a body without end.
    Endless,
    /// Nothing.
    Silence,
    Closed,
}

fn ok(body: &str) -> Reply {
    Reply::Text(format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len()))
}

fn status(line: &str) -> Reply {
    Reply::Text(format!("HTTP/1.1 {line}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"))
}

impl Server {
    async fn start(replies: Vec<Reply>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/keys", listener.local_addr().unwrap());
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let number = count.fetch_add(1, Ordering::SeqCst);
                let reply = replies[number.min(replies.len() - 1)].clone();
                tokio::spawn(async move {
                    let mut request = vec![0; 4096];
                    let _ = stream.read(&mut request).await;
                    match reply {
                        Reply::Text(text) => drop(stream.write_all(text.as_bytes()).await),
                        Reply::Endless => {
                            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").await;
                            while stream.write_all(&[b' '; 65_536]).await.is_ok() {}
                        }
                        Reply::Silence => tokio::time::sleep(Duration::from_secs(600)).await,
                        Reply::Closed => {}
                    }
                });
            }
        });
        Self { url, asked }
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    fn published(&self) -> Arc<Published> {
        let short = Duration::from_millis(500);
        let settings = Settings { fetch_timeout: short, retry_first: short, ..Settings::default() };
        let client = client(For::Keys, true, None).unwrap();
        let published = Published::new("corp".to_owned(), self.url.clone(), true, client, settings, Arc::default());
        let published = Arc::new(published);
        keep_fresh(&published);
        published
    }
}

fn keys() -> String {
    String::from_utf8(Signer::es256("k1").jwks()).unwrap()
}

/// The first caller after a start, as prove.rs serves it.
async fn first(published: &Published) -> Result<(), &'static str> {
    // The task that fetches may not have had its turn.
    tokio::task::yield_now().await;
    published.first(Timestamp::now()).await;
    published.keys(Timestamp::now()).map(drop).map_err(|error| error.reason())
}

#[tokio::test]
async fn an_issuer_that_is_down_slow_huge_or_wrong_has_no_keys() {
    let server = Server::start(vec![ok(&keys())]).await;
    assert_eq!(first(&server.published()).await, Ok(()));
    let half = Reply::Text(format!("HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{}", keys()));
    let private = json!({ "keys": [{ "kty": "EC", "crv": "P-256", "d": "AA" }] }).to_string();
    for (what, reply, result) in [
        ("an error", status("500 Internal Server Error"), "issuer_bad_status"),
        ("no such page", status("404 Not Found"), "issuer_bad_status"),
        ("no content", status("204 No Content"), "issuer_bad_status"),
        ("a redirect to nowhere", status("302 Found"), "issuer_bad_status"),
        ("a body without end", Reply::Endless, "issuer_answer_oversize"),
        ("silence", Reply::Silence, "issuer_unreachable"),
        ("a closed connection", Reply::Closed, "issuer_unreachable"),
        ("a page for people", ok("<html>Welcome</html>"), "json_syntax"),
        ("no keys", ok("{\"keys\":[]}"), "jwks_no_usable_key"),
        ("a private key", ok(&private), "jwks_private_material"),
        ("half an answer", half, "issuer_unreachable"),
        ("no HTTP", Reply::Text("SSH-2.0-OpenSSH_9.2\r\n".to_owned()), "issuer_unreachable"),
    ] {
        let server = Server::start(vec![reply]).await;
        let published = server.published();
        assert_eq!(first(&published).await, Err("keys_unavailable"), "{what}");
        assert!(server.asked() >= 1, "{what}");
        let fetch = Counted::Fetch { issuer: "corp".to_owned(), kind: Fetched::Jwks, result: result.to_owned() };
        assert_eq!(published.counts.seen(), [fetch], "{what}");
        assert_eq!(Fetched::Jwks.result(result), result, "{what}");
    }
    // Nobody listens at all.
    let server = Server { url: "http://127.0.0.1:1/keys".to_owned(), asked: Arc::default() };
    assert_eq!(first(&server.published()).await, Err("keys_unavailable"));
}

#[tokio::test]
async fn redirects_are_followed_a_few_times_and_not_to_another_scheme() {
    let good = Server::start(vec![ok(&keys())]).await;
    let to = |url: &str| {
        Reply::Text(format!("HTTP/1.1 302 Found\r\nLocation: {url}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"))
    };
    let once = Server::start(vec![to(&good.url)]).await;
    assert_eq!(first(&once.published()).await, Ok(()));
    let around = Server::start(vec![to("/keys")]).await;
    assert_eq!(first(&around.published()).await, Err("keys_unavailable"));
    assert!((2..=5).contains(&around.asked()), "{}", around.asked());
    let away = Server::start(vec![to(&good.url.replace("http://", "https://"))]).await;
    assert_eq!(first(&away.published()).await, Err("keys_unavailable"));
    assert_eq!(good.asked(), 1, "nobody else came through");
}

#[tokio::test]
async fn an_issuer_that_comes_and_goes_keeps_the_keys_that_it_gave() {
    let server =
        Server::start(vec![status("503 Service Unavailable"), ok(&keys()), status("503 Service Unavailable")]).await;
    let published = server.published();
    assert_eq!(first(&published).await, Err("keys_unavailable"));
    // The second attempt comes by itself, after a pause.
    while published.keys(Timestamp::now()).is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(server.asked(), 2);
    published.after_unknown_kid().await;
    assert!(published.keys(Timestamp::now()).is_ok(), "what was fetched before goes on to serve");
}

#[tokio::test]
async fn a_crowd_asks_an_issuer_once() {
    let server = Server::start(vec![ok(&keys())]).await;
    let published = server.published();
    let crowd: Vec<_> = (0..500)
        .map(|_| {
            let published = published.clone();
            tokio::spawn(async move {
                let known = first(&published).await;
                // Tokens with keys that nobody has.
                published.after_unknown_kid().await;
                known
            })
        })
        .collect();
    for one in crowd {
        assert_eq!(one.await.unwrap(), Ok(()));
    }
    assert!(server.asked() <= 2, "one for the keys, one for keys that are not known: {}", server.asked());
    // The same with one that never answers: nobody waits for longer than one fetch may take.
    let server = Server::start(vec![Reply::Silence]).await;
    let published = server.published();
    let crowd: Vec<_> = (0..500)
        .map(|_| {
            let published = published.clone();
            tokio::spawn(async move { first(&published).await })
        })
        .collect();
    for one in crowd {
        assert_eq!(one.await.unwrap(), Err("keys_unavailable"));
    }
    assert!(server.asked() <= 2, "{}", server.asked());
}

#[tokio::test]
async fn a_token_goes_to_its_issuer_and_no_further() {
    let ask = |url: String| async move {
        let request = introspection::Request { authorization: Some("Basic YTpi".into()), body: "token=secret".into() };
        let client = client(For::Introspection, true, None).unwrap();
        introspect(&client, &url, true, request).await.map_err(|error| error.reason())
    };
    let good = Server::start(vec![ok("{\"active\":false}")]).await;
    assert_eq!(ask(good.url.clone()).await.as_deref(), Ok(&b"{\"active\":false}"[..]));
    for code in ["301 Moved Permanently", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"] {
        let to = Reply::Text(format!(
            "HTTP/1.1 {code}\r\nLocation: {}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
            good.url
        ));
        let elsewhere = Server::start(vec![to]).await;
        assert_eq!(ask(elsewhere.url.clone()).await, Err("issuer_bad_status"), "{code}");
    }
    assert_eq!(good.asked(), 1, "the token did not follow a redirect");
    for (reply, reason) in [
        (status("500 Internal Server Error"), "issuer_bad_status"),
        (status("401 Unauthorized"), "issuer_bad_status"),
        (Reply::Endless, "issuer_answer_oversize"),
        (Reply::Closed, "issuer_unreachable"),
        (Reply::Silence, "issuer_unreachable"),
    ] {
        let server = Server::start(vec![reply]).await;
        assert_eq!(ask(server.url.clone()).await, Err(reason));
    }
    assert_eq!(ask("http://127.0.0.1:1/".to_owned()).await, Err("issuer_unreachable"));
}

/// A server of HTTP/2 that refuses each request as one that it has not begun with (RFC 9113, 8.7). Returns the authority that it is
/// known by, its URL, and how many requests there were.
async fn refusing() -> (String, String, Arc<AtomicUsize>) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut config = config.with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key.into()).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}/", listener.local_addr().unwrap().port());
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, count) = (acceptor.clone(), count.clone());
            tokio::spawn(async move {
                let mut stream = acceptor.accept(stream).await?;
                let mut preface = [0; 24];
                stream.read_exact(&mut preface).await?;
                // SETTINGS, empty.
                stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await?;
                loop {
                    let mut head = [0; 9];
                    stream.read_exact(&mut head).await?;
                    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
                    let mut payload = vec![0; length as usize];
                    stream.read_exact(&mut payload).await?;
                    match (head[3], head[4]) {
                        // HEADERS, answered by RST_STREAM with REFUSED_STREAM.
                        (1, _) => {
                            count.fetch_add(1, Ordering::SeqCst);
                            let mut reset = vec![0, 0, 4, 3, 0];
                            reset.extend(&head[5..]);
                            reset.extend([0, 0, 0, 7]);
                            stream.write_all(&reset).await?;
                        }
                        // SETTINGS, acknowledged.
                        (4, 0) => stream.write_all(&[0, 0, 0, 4, 1, 0, 0, 0, 0]).await?,
                        _ => {}
                    }
                }
                #[expect(unreachable_code, reason = "it says what the block fails with")]
                std::io::Result::Ok(())
            });
        }
    });
    let pem = format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", STANDARD.encode(made.cert.der()));
    (pem, url, asked)
}

#[tokio::test]
async fn a_call_is_sent_once_whatever_its_server_says_of_it() {
    for (asks, once) in [(For::Calls, true), (For::Keys, false)] {
        let (authority, url, asked) = refusing().await;
        let client = client(asks, true, Some(authority.as_bytes())).unwrap();
        let sent = client.post(&url).body("{}").timeout(Duration::from_secs(10)).send().await;
        assert!(sent.is_err());
        assert_eq!(asked.load(Ordering::SeqCst) == 1, once, "{asks:?}: {sent:?}");
    }
}

#[test]
fn addresses_of_this_machine_and_its_networks_are_no_issuers() {
    for text in [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "255.255.255.255",
        "224.0.0.1",
        "198.18.0.1",
        "192.0.0.1",
        "::1",
        "::",
        "fe80::1",
        "fd00::1",
        "ff02::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "2002:a00:1::",
        "2001::1",
        "2001:db8::1",
    ] {
        assert!(is_special(text.parse().unwrap()), "{text}");
    }
    for text in ["1.1.1.1", "8.8.8.8", "100.128.0.1", "2606:4700::1111"] {
        assert!(!is_special(text.parse().unwrap()), "{text}");
    }
}

#[test]
fn only_https_and_loopback_http_are_asked() {
    let ask = |url: &str, allow| check(&Url::parse(url).unwrap(), allow).is_ok();
    assert!(ask("https://idp.example.org/jwks", false));
    assert!(!ask("https://127.0.0.1/jwks", false) && ask("https://127.0.0.1/jwks", true));
    assert!(!ask("https://[::ffff:169.254.169.254]/", false));
    assert!(!ask("http://idp.example.org/", true));
    assert!(!ask("http://127.0.0.1:1/", false) && ask("http://127.0.0.1:1/", true));
    assert!(!ask("file:///etc/passwd", true) && !ask("ftp://127.0.0.1/", true));
    // Numbers that some resolvers take for addresses are addresses to the URL parser too.
    assert!(!ask("https://2130706433/", false) && !ask("https://0x7f.1/", false));
}

#[test]
fn max_age_is_read_and_nonsense_is_not() {
    let read = |value: &str| {
        let mut headers = HeaderMap::new();
        headers.insert(CACHE_CONTROL, value.parse().unwrap());
        max_age(&headers)
    };
    assert_eq!(read("public, max-age=60"), Some(Duration::from_secs(60)));
    assert_eq!(read("max-age=soon"), None);
}
