//! The URL of a database: what it has to look like, and what the ledger adds to it.

use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf, time::Duration};

use percent_encoding::percent_decode_str;
use tokio_postgres::{
    Config,
    config::{Host, TargetSessionAttrs},
};

use super::tls::{Mode, Tls};

const APPLICATION: &str = "candela";
/// How long a connection to one address may take to be made.
const CONNECT_MAX: Duration = Duration::from_secs(3);
/// How long sent data may stay without an acknowledgement.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(5);
/// What a URL has to look like.
const SHAPE: &str = "no PostgreSQL URL: write postgres://user:password@host:5432/database, with %40 \
     for an @ in a password and so on";
const OTHER_TLS: &str = "of the parameters about TLS the ledger's URL may have sslmode, sslrootcert \
     and sslnegotiation alone";

/// Parameters that `tokio_postgres` does not know, or not as libpq does.
#[derive(Debug, Default)]
struct Taken {
    mode: Option<String>,
    authorities: Option<PathBuf>,
}

/// Reads a URL and adds what the ledger relies on. The file of `sslrootcert` is read here, once.
///
/// # Errors
/// Says what it should look like, without any part of it but the name of that file.
pub(super) fn parse(url: &str) -> Result<(Config, Tls), String> {
    // A second @ belongs to a password that was not escaped: what follows the first one would be
    // taken for a host, and shown.
    if url.matches('@').count() > 1 {
        return Err(SHAPE.into());
    }
    let (url, taken) = take(url)?;
    // The parser's own message may quote a part of a password that was not escaped.
    let config: Option<Config> = url.parse().ok();
    let named = |config: &Config| {
        let mut hosts = config.get_hosts().iter();
        let whole = |host: &Host| !matches!(host, Host::Tcp(name) if name.contains('@'));
        !config.get_hosts().is_empty() && hosts.all(whole)
    };
    let mut config = config.filter(named).ok_or(SHAPE)?;
    if config.get_application_name().is_none() {
        config.application_name(APPLICATION);
    }
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(CONNECT_MAX);
    }
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(UNACKNOWLEDGED_MAX);
    }
    // Of several hosts the one that can be written to.
    config.target_session_attrs(TargetSessionAttrs::ReadWrite);
    let mut mode = Mode::named(taken.mode.as_deref())?;
    if config.get_hosts().iter().all(|host| matches!(host, Host::Unix(_))) {
        // As libpq: a socket of this machine's own is not encrypted, whatever is asked.
        mode = Mode::Disable;
    }
    let tls = Tls::new(mode, taken.authorities.as_deref())?;
    config.ssl_mode(tls.mode());
    Ok((config, tls))
}

/// Splits a URL into what `tokio_postgres` is to read, and what is read here.
fn take(url: &str) -> Result<(String, Taken), String> {
    let mut taken = Taken::default();
    // A password may hold a question mark.
    let host = url.find('@').map_or(0, |at| at + 1);
    let Some(query) = url[host..].find('?').map(|at| host + at) else {
        return Ok((url.into(), taken));
    };
    let mut left = Vec::new();
    for pair in url[query + 1..].split('&') {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        match &*percent_decode_str(key).decode_utf8_lossy() {
            "sslmode" => taken.mode = Some(percent_decode_str(value).decode_utf8_lossy().into()),
            "sslrootcert" => {
                let name = OsString::from_vec(percent_decode_str(value).collect());
                taken.authorities = Some(name.into());
            }
            other if other.starts_with("ssl") && other != "sslnegotiation" => {
                return Err(OTHER_TLS.into());
            }
            _ => left.push(pair),
        }
    }
    Ok((format!("{}?{}", &url[..query], left.join("&")), taken))
}

/// For messages: without user and password.
pub(super) fn target(config: &Config) -> String {
    let ports = config.get_ports();
    let port = |index: usize| ports.get(index).or(ports.first()).copied().unwrap_or(5432);
    let hosts = config.get_hosts().iter().enumerate().map(|(index, host)| match host {
        Host::Tcp(name) => format!("{name}:{}", port(index)),
        Host::Unix(path) => format!("{}:{}", path.display(), port(index)),
    });
    let database = config.get_dbname().or(config.get_user()).unwrap_or_default();
    format!("{}/{database}", hosts.collect::<Vec<_>>().join(","))
}
