//! Encryption of a connection: what `sslmode` and `sslrootcert` mean to libpq (PostgreSQL's manual,
//! "SSL Support" of the chapter on libpq). Not so: `allow` is refused, and no file is looked for that
//! `sslrootcert` does not name.

use std::{error::Error as _, fs, io, path::Path, sync::Arc};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as Broken, RootCertStore,
    SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor, verify_server_name,
    },
    crypto::{
        WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature, verify_tls13_signature,
    },
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
    server::ParsedCertificate,
};
use tokio_postgres::{Error, config::SslMode, error::SqlState};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{DbError, error::chain};

/// The protocol's name within TLS, which `sslnegotiation=direct` needs.
const PROTOCOL: &[u8] = b"postgresql";
/// What `tokio_postgres` prints of an error, and of one of its causes.
const HANDSHAKE: &str = "error performing TLS handshake";
const NO_TLS: &str = "server does not support TLS";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Disable,
    /// Encrypted where that can be done.
    Prefer,
    /// Encrypted, by whoever answers; with `sslrootcert` the same as [`Mode::VerifyCa`].
    Require,
    /// By one whose certificate an authority of `sslrootcert` signed.
    VerifyCa,
    /// By one whose certificate is for this host's name, too.
    VerifyFull,
}

/// How a connection is encrypted.
pub(super) struct Tls {
    mode: Mode,
    connector: MakeRustlsConnect,
}

/// Judges the certificate of a server.
#[derive(Debug)]
struct Judge {
    /// None trusts any certificate.
    authorities: Option<RootCertStore>,
    by_name: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Mode {
    /// # Errors
    /// Lists the names, without this one: it may be a part of a password that was not escaped.
    pub fn named(name: Option<&str>) -> Result<Self, String> {
        Ok(match name {
            Some("disable") => Self::Disable,
            None | Some("prefer") => Self::Prefer,
            Some("require") => Self::Require,
            Some("verify-ca") => Self::VerifyCa,
            Some("verify-full") => Self::VerifyFull,
            Some(_) => {
                let names = "disable, prefer, require, verify-ca or verify-full";
                return Err(format!("sslmode of the ledger's URL is none of {names}"));
            }
        })
    }
}

impl Tls {
    /// `authorities` is a file of certificates in PEM, which is read where it may be of use.
    ///
    /// # Errors
    /// Says what is wrong with the file, or that there has to be one.
    pub fn new(mode: Mode, authorities: Option<&Path>) -> Result<Self, String> {
        let authorities = match authorities {
            _ if mode == Mode::Disable => None,
            Some(path) => Some(read(path)?),
            None if matches!(mode, Mode::VerifyCa | Mode::VerifyFull) => {
                return Err(
                    "sslmode=verify-ca and verify-full need sslrootcert=FILE in the ledger's URL: \
                     the certificate of the authority that signed the server's, in PEM"
                        .into(),
                );
            }
            None => None,
        };
        let provider = Arc::new(aws_lc_rs::default_provider());
        let judge = Judge {
            authorities,
            by_name: mode == Mode::VerifyFull,
            algorithms: provider.signature_verification_algorithms,
        };
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?;
        // Dangerous is what `require` asks for: libpq promises no more with it than encryption.
        let config = config.dangerous().with_custom_certificate_verifier(Arc::new(judge));
        let mut config = config.with_no_client_auth();
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(Self { mode, connector: MakeRustlsConnect::new(config) })
    }

    /// What `tokio_postgres` has to know; the rest is for the judge.
    pub fn mode(&self) -> SslMode {
        match self.mode {
            Mode::Disable => SslMode::Disable,
            Mode::Prefer => SslMode::Prefer,
            Mode::Require | Mode::VerifyCa | Mode::VerifyFull => SslMode::Require,
        }
    }

    pub fn connector(&self) -> MakeRustlsConnect {
        self.connector.clone()
    }

    /// Whether to try without encryption after this: under `prefer`, where the handshake failed or
    /// the server's rules (`pg_hba.conf`) refuse an encrypted connection.
    pub fn may_do_without(&self, error: &Error) -> bool {
        let refused = error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
        self.mode == Mode::Prefer && (refused || handshake(error).is_some())
    }
}

/// The authorities of a file.
fn read(path: &Path) -> Result<RootCertStore, String> {
    let of_file =
        |what: &str| format!("sslrootcert of the ledger's URL, {}: {what}", path.display());
    if path.as_os_str().is_empty() {
        return Err("sslrootcert of the ledger's URL names no file".into());
    }
    let text = fs::read(path).map_err(|error| of_file(&format!("cannot be read: {error}")))?;
    // What is wrong with it is not quoted: it may be a key.
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let found = found.map_err(|_| of_file("is damaged: it has to be certificates in PEM"))?;
    let mut authorities = RootCertStore::empty();
    // The bundles of systems have some that no library reads.
    let (usable, _) = authorities.add_parsable_certificates(found);
    if usable == 0 {
        return Err(of_file("holds no usable certificate in PEM"));
    }
    Ok(authorities)
}

/// What a failed handshake means; none for other errors.
pub(super) fn meaning(error: &Error) -> Option<DbError> {
    let what = chain(error);
    let advice = |advice: &str| DbError::Unusable(format!("{what}: {advice}"));
    let Some(cause) = handshake(error) else {
        return what.starts_with(HANDSHAKE).then(|| match what.ends_with(NO_TLS) {
            true => advice("turn it on there (ssl = on), or write sslmode=prefer or disable"),
            false => DbError::Unusable(what.clone()),
        });
    };
    let broken = cause.get_ref().and_then(|inner| inner.downcast_ref::<Broken>());
    Some(match broken {
        Some(Broken::InvalidCertificate(why)) => advice(remedy(why)),
        Some(_) => advice("the server has to speak TLS 1.2 or 1.3; its log may say more"),
        // The connection was lost meanwhile.
        None => DbError::Unavailable(what),
    })
}

fn remedy(why: &CertificateError) -> &'static str {
    match why {
        CertificateError::UnknownIssuer => {
            "no authority of sslrootcert signed the server's certificate: name the file of the one that did"
        }
        // An authority of the same name and another key, or a server that shows what is not its own.
        CertificateError::BadSignature => {
            "another key signed this: name the file of the authority in use in sslrootcert, and see \
             that no other server answers at this address"
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "name the server in --ledger as its certificate does, or give it a certificate with this \
             name as subjectAltName; sslmode=verify-ca accepts any name"
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "renew the server's certificate, and its authority's where that is the old one"
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "set the clock of this machine, or wait"
        }
        _ => {
            "give the server a certificate of its own (X.509 version 3, with subjectAltName, CA:FALSE), \
             signed by an authority of sslrootcert"
        }
    }
}

/// Why a handshake that had begun came to no end.
fn handshake(error: &Error) -> Option<&io::Error> {
    let cause = error.source()?.downcast_ref::<io::Error>()?;
    error.to_string().starts_with(HANDSHAKE).then_some(cause)
}

impl ServerCertVerifier for Judge {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Broken> {
        if let Some(authorities) = &self.authorities {
            let parsed = ParsedCertificate::try_from(certificate)?;
            let all = self.algorithms.all;
            verify_server_cert_signed_by_trust_anchor(&parsed, authorities, between, now, all)?;
            if self.by_name {
                verify_server_name(&parsed, name)?;
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    // Under `require` too: who answers has to own the certificate it shows, or channel binding would
    // bind to nothing.
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Broken> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Broken> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
