//! Servers that are not the one they seem to be.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::Arc,
};

use candela::{
    clock::Clock,
    ledger::db::{DbError, Postgres},
};
use rustls::{
    ServerConfig, ServerConnection,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

use crate::{
    certificates::Authority,
    tls::{Is::Refused, NAMES, check},
};

/// Shows one certificate whoever asks, with a key that need not be its own.
#[derive(Debug)]
struct Shown(Arc<CertifiedKey>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

/// The port of something that says it speaks TLS, once, and then does `then`.
fn impostor(then: impl FnOnce(TcpStream) + Send + 'static) -> u16 {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = socket.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        let (mut stream, _) = socket.accept().expect("a client");
        let mut asked = [0; 8];
        stream.read_exact(&mut asked).expect("asks for TLS");
        stream.write_all(b"S").expect("answers");
        then(stream);
    });
    port
}

/// Channel binding ties a password to a certificate, so its owner alone may show it.
#[test]
fn who_shows_the_certificate_of_another_is_refused() {
    let right = Authority::new("right");
    let (server, thief) = (right.server(&NAMES), right.server(&NAMES));
    let provider = Arc::new(aws_lc_rs::default_provider());
    let certificate = CertificateDer::from_pem_slice(server.certificate.as_bytes()).expect("PEM");
    let key = PrivateKeyDer::from_pem_slice(thief.key.as_bytes()).expect("PEM");
    let key = provider.key_provider.load_private_key(key).expect("a key");
    let shown = Shown(Arc::new(CertifiedKey::new(vec![certificate], key)));
    for versions in [&[&rustls::version::TLS13], &[&rustls::version::TLS12]] {
        let config = ServerConfig::builder_with_provider(provider.clone());
        let config = config.with_protocol_versions(versions).expect("versions");
        let config = config.with_no_client_auth();
        let config = config.with_cert_resolver(Arc::new(Shown(shown.0.clone())));
        let mut session = ServerConnection::new(Arc::new(config)).expect("a session");
        let port =
            impostor(
                move |mut stream| {
                    while session.is_handshaking() && session.complete_io(&mut stream).is_ok() {}
                },
            );
        let url = format!("postgres://u:pass-hidden@127.0.0.1:{port}/db?sslmode=require");
        check(&url, Refused("no other server answers at this address"));
    }
}

#[test]
fn a_connection_that_is_lost_in_the_handshake_may_be_tried_again() {
    for mode in ["require", "prefer"] {
        let port = impostor(drop);
        let url = format!("postgres://u:pass-hidden@127.0.0.1:{port}/db?sslmode={mode}");
        let Err(error) = Postgres::connect(&url, Clock::system()) else { panic!("connects") };
        assert!(matches!(error, DbError::Unavailable(_)), "{mode}: {error:?}");
        assert!(!error.to_string().contains("-hidden"), "{error}");
    }
}
