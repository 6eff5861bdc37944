//! Encrypted connections: `sslmode` and `sslrootcert` against a server that speaks TLS, one that does
//! not, and one that is not the right one.

use std::{
    fs,
    io::{self, Write},
    path::Path,
    process::Command,
    sync::{Arc, Mutex},
};

use candela::{
    clock::Clock,
    ledger::{
        db::{Db, DbError, Postgres},
        schema::migrate,
    },
};
use rcgen::{PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PKCS_RSA_SHA256, PKCS_RSA_SHA512};

use crate::{
    certificates::{Authority, Identity},
    common::postgres::Cluster,
};

/// What becomes of a connection.
#[derive(Clone, Copy, Debug)]
pub enum Is {
    Encrypted,
    Plain,
    /// It is not made, for a reason that says this.
    Refused(&'static str),
}

use Is::{Encrypted, Plain, Refused};

const NO_TLS: Is = Refused("turn it on there (ssl = on)");
const STRANGER: Is = Refused("no authority of sslrootcert signed the server's certificate");
const WRONG_NAME: Is = Refused("name the server in --ledger as its certificate does");
const NO_FILE: Is = Refused("need sslrootcert=FILE");
const NO_MODE: Is = Refused("none of disable, prefer, require, verify-ca or verify-full");
const RULES: Is = Refused("pg_hba.conf");
/// What a right certificate is for.
pub const NAMES: [&str; 2] = ["localhost", "127.0.0.1"];

/// A server, and a directory with the files that URLs name.
struct World {
    cluster: Cluster,
    files: tempfile::TempDir,
}

impl World {
    fn new(files: &[(&str, &str)]) -> Self {
        let made = Self { cluster: Cluster::start(), files: tempfile::tempdir().expect("a place") };
        for (name, text) in files {
            fs::write(made.files.path().join(name), text).expect("writes");
        }
        made
    }

    fn become_server(&self, identity: &Identity) {
        self.cluster.encrypt(&identity.certificate, &identity.key, "");
    }

    /// The server's URL, with `~` of parameters as the directory of the files.
    fn url(&self, parameters: &str) -> String {
        complete(&self.cluster.url("postgres"), parameters, self.files.path())
    }

    /// [`check`] with each of these parameters.
    fn check(&self, cases: &[(&str, Is)]) {
        for (parameters, expected) in cases {
            check(&self.url(parameters), *expected);
        }
    }
}

fn complete(url: &str, parameters: &str, files: &Path) -> String {
    format!("{url}?{}", parameters.replace('~', &files.display().to_string()))
}

/// Connects, and looks at what came of it as the server sees it.
pub fn check(url: &str, expected: Is) {
    let made = Postgres::connect(url, Clock::system());
    match (made, expected) {
        (Ok(mut db), Encrypted | Plain) => {
            let encrypted = matches!(expected, Encrypted);
            assert_eq!(is_encrypted(&mut db), encrypted, "{url}: {expected:?}");
        }
        (Err(error), Refused(part)) => {
            let text = error.to_string();
            assert!(matches!(error, DbError::Unusable(_)), "{url}: {error:?}");
            assert!(text.contains(part), "{url}: {text}");
            for hidden in ["-hidden", "PRIVATE"] {
                assert!(!text.contains(hidden), "a secret is shown: {text}");
            }
        }
        (Ok(_), Refused(part)) => panic!("{url} connects, in spite of: {part}"),
        (Err(error), _) => panic!("{url}: {error}"),
    }
}

/// What the server says of this connection.
fn is_encrypted(db: &mut Postgres) -> bool {
    let sql = "SELECT CASE WHEN ssl THEN 1 ELSE 0 END, COALESCE(version, 'none') FROM pg_stat_ssl \
        WHERE pid = pg_backend_pid()";
    let rows = db.query(sql, &[]).expect("rows");
    let encrypted = rows[0].int(0).expect("a number") == 1;
    let version = rows[0].text(1).expect("a text");
    assert_eq!(version.starts_with("TLSv1."), encrypted, "{version}");
    encrypted
}

#[test]
fn each_mode_with_right_and_wrong_servers() {
    let (right, other) = (Authority::new("right"), Authority::new("other"));
    let both = other.own.certificate.clone() + &right.own.certificate;
    let namesake = Authority::new("right");
    let world = World::new(&[
        ("right", &right.own.certificate),
        ("other", &other.own.certificate),
        ("namesake", &namesake.own.certificate),
        ("both of them", &both),
    ]);
    world.check(&[
        ("", Plain),
        ("sslmode=disable", Plain),
        ("sslmode=prefer", Plain),
        ("sslmode=prefer&sslrootcert=~/right", Plain),
        ("sslmode=require", NO_TLS),
        ("sslmode=require&sslrootcert=~/right", NO_TLS),
        ("sslmode=verify-ca&sslrootcert=~/right", NO_TLS),
        ("sslmode=verify-full&sslrootcert=~/right", NO_TLS),
        ("channel_binding=require", Refused("channel binding")),
    ]);
    world.become_server(&right.server(&NAMES));
    world.check(&[
        ("", Encrypted),
        ("sslmode=disable", Plain),
        ("sslmode=disable&sslrootcert=~/other", Plain),
        ("sslmode=prefer", Encrypted),
        ("sslrootcert=~/right", Encrypted),
        ("sslmode=prefer&sslrootcert=~/other", Plain),
        ("sslmode=require", Encrypted),
        ("sslmode=require&sslrootcert=~/right", Encrypted),
        ("sslmode=require&sslrootcert=~/other", STRANGER),
        ("sslmode=verify-ca&sslrootcert=~/right", Encrypted),
        ("sslmode=verify-ca&sslrootcert=~/both%20of%20them", Encrypted),
        ("sslmode=verify-ca&sslrootcert=~/other", STRANGER),
        ("sslmode=verify-ca&sslrootcert=~/namesake", Refused("another key signed this")),
        ("sslmode=verify-full&sslrootcert=~/right", Encrypted),
        ("sslmode=verify-full&sslrootcert=~/other", STRANGER),
        ("sslmode=require&application_name=x&sslmode=disable", Plain),
        ("ssl%6dode=verify-full&sslrootc%65rt=~/other", STRANGER),
    ]);
    world.become_server(&right.server(&["localhost", "db.example"]));
    world.check(&[
        ("", Encrypted),
        ("sslmode=require", Encrypted),
        ("sslmode=require&sslrootcert=~/right", Encrypted),
        ("sslmode=verify-ca&sslrootcert=~/right", Encrypted),
        ("sslmode=verify-ca&sslrootcert=~/other", STRANGER),
        ("sslmode=verify-full&sslrootcert=~/right", WRONG_NAME),
        ("sslmode=verify-full&sslrootcert=~/right", Refused("db.example")),
        ("sslmode=verify-full&sslrootcert=~/other", STRANGER),
    ]);
    let local =
        world.url("sslmode=verify-full&sslrootcert=~/right").replace("127.0.0.1", "localhost");
    check(&local, Encrypted);
    let socket = world.cluster.socket_url("postgres");
    for parameters in
        ["", "sslmode=require", "sslmode=verify-full", "sslmode=verify-ca&sslrootcert=~/x"]
    {
        check(&complete(&socket, parameters, world.files.path()), Plain);
    }
}

#[test]
fn parameters_that_mean_nothing_are_refused() {
    let right = Authority::new("right");
    let server = right.server(&NAMES);
    let cut = &right.own.certificate[..right.own.certificate.len() / 2];
    let unreadable = right.own.certificate.replace("MII", "AAA");
    let world = World::new(&[
        ("right", &right.own.certificate),
        ("empty", ""),
        ("text", "no certificate"),
        ("cut", cut),
        ("unreadable", &unreadable),
        ("key", &server.key),
    ]);
    world.become_server(&server);
    let usable = Refused("holds no usable certificate in PEM");
    world.check(&[
        ("sslmode=", NO_MODE),
        ("sslmode", NO_MODE),
        ("sslmode=allow", NO_MODE),
        ("sslmode=verify_full", NO_MODE),
        ("sslmode=VERIFY-FULL&sslrootcert=~/right", NO_MODE),
        ("sslmode=%ff", NO_MODE),
        ("sslmode=-hidden", NO_MODE),
        ("sslmode=verify-ca", NO_FILE),
        ("sslmode=verify-full", NO_FILE),
        ("sslmode=verify-full&sslrootcert=", Refused("names no file")),
        ("sslmode=require&sslrootcert=", Refused("names no file")),
        ("sslmode=verify-full&sslrootcert=~/missing", Refused("missing: cannot be read")),
        ("sslmode=verify-full&sslrootcert=~", Refused("cannot be read")),
        ("sslmode=verify-full&sslrootcert=system", Refused("system: cannot be read")),
        ("sslrootcert=~/missing", Refused("cannot be read")),
        ("sslmode=verify-full&sslrootcert=~/empty", usable),
        ("sslmode=verify-full&sslrootcert=~/text", usable),
        ("sslmode=verify-full&sslrootcert=~/key", usable),
        ("sslmode=verify-full&sslrootcert=~/unreadable", usable),
        ("sslmode=require&sslrootcert=~/cut", Refused("is damaged")),
        ("sslmode=require&sslcert=~/right", Refused("sslmode, sslrootcert")),
        ("sslcrl=~/right", Refused("sslmode, sslrootcert")),
        ("ssl_mode=disable", Refused("sslmode, sslrootcert")),
        ("sslnegotiation=direct", Refused("sslmode")),
        ("no_such_option=1&sslmode=require", Refused("postgres://user:password@host")),
        ("sslmode=require&x", Refused("postgres://user:password@host")),
    ]);
    for odd in [
        "postgres://u:p@ss/-hidden@127.0.0.1/db?sslmode=require",
        "postgres://u:p@s?sslrootcert=-hidden@127.0.0.1/db",
        "postgres://u:p@s?sslmode=-hidden@127.0.0.1/db",
    ] {
        check(odd, Refused("%40"));
    }
    // A question mark of a password begins no parameters.
    world.cluster.admin("postgres", "CREATE ROLE odd LOGIN PASSWORD 'a?sslmode=disable&b'");
    check(&world.cluster.url_of("odd", "a?sslmode=disable&b", "postgres"), Encrypted);
}

#[test]
fn certificates_that_are_not_right_for_a_server() {
    let right = Authority::new("right");
    let between = right.below("between");
    let leaf = between.server(&NAMES);
    let world =
        World::new(&[("right", &right.own.certificate), ("between", &between.own.certificate)]);
    let verified = "sslmode=verify-full&sslrootcert=~/right";
    let renew = Refused("renew the server's certificate");
    let chain = Identity {
        certificate: leaf.certificate.clone() + &between.own.certificate,
        ..leaf.clone()
    };
    for (identity, expected) in [
        (right.server_of_years(&NAMES, 2000, 2001), renew),
        (right.server_of_years(&NAMES, 3000, 3001), Refused("set the clock")),
        (right.own.clone(), Refused("a certificate of its own")),
        (right.server(&[]), WRONG_NAME),
        (leaf, STRANGER),
        (chain, Encrypted),
    ] {
        world.become_server(&identity);
        world.check(&[(verified, expected), ("sslmode=require", Encrypted)]);
    }
    world.check(&[("sslmode=verify-full&sslrootcert=~/between", Encrypted)]);
}

#[test]
fn scram_binds_to_the_channel() {
    let world = World::new(&[]);
    for (algorithm, binds) in [
        (&PKCS_RSA_SHA256, true),
        (&PKCS_RSA_SHA512, true),
        (&PKCS_ECDSA_P384_SHA384, true),
        // No hash belongs to it, so nothing can be bound (RFC 5929, section 4.1).
        (&PKCS_ED25519, false),
    ] {
        let server = Authority::of("right", algorithm).server(&NAMES);
        for settings in ["", "ssl_max_protocol_version = 'TLSv1.2'"] {
            world.cluster.encrypt(&server.certificate, &server.key, settings);
            let bound = if binds { Encrypted } else { Refused("channel binding") };
            world.check(&[
                ("sslmode=require", Encrypted),
                ("sslmode=require&channel_binding=disable", Encrypted),
                ("sslmode=require&channel_binding=require", bound),
            ]);
        }
    }
    let wrong = world.cluster.url_of("candela", "wrong-hidden", "postgres");
    check(&format!("{wrong}?sslmode=require"), Refused("correct user and password"));
}

#[test]
fn prefer_takes_what_the_rules_of_the_server_leave() {
    let (right, other) = (Authority::new("right"), Authority::new("other"));
    let world = World::new(&[("other", &other.own.certificate)]);
    world.become_server(&right.server(&NAMES));
    world.cluster.set_rules("hostssl all all all scram-sha-256");
    world.check(&[
        ("", Encrypted),
        ("sslmode=disable", RULES),
        ("sslmode=require", Encrypted),
        ("sslrootcert=~/other", STRANGER),
    ]);
    world.cluster.set_rules("hostnossl all all all scram-sha-256");
    let log = Log::default();
    let heard = log.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || heard.clone());
    let subscriber = subscriber.with_max_level(tracing::Level::TRACE).finish();
    tracing::subscriber::with_default(subscriber, || {
        world.check(&[("", Plain), ("sslmode=disable", Plain), ("sslmode=require", RULES)]);
    });
    let text = String::from_utf8(log.0.lock().expect("no panic").clone()).expect("text");
    assert_eq!(text.matches("is not encrypted").count(), 1, "{text}");
    assert!(!text.contains("-hidden"), "a password is logged: {text}");
}

/// Lines of a log.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no panic").write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The command line goes the same way.
#[test]
fn a_command_says_what_to_do() {
    let (right, other) = (Authority::new("right"), Authority::new("other"));
    let world = World::new(&[("right", &right.own.certificate), ("other", &other.own.certificate)]);
    world.become_server(&right.server(&NAMES));
    migrate(&mut world.cluster.open(&world.url("sslmode=require"))).expect("migrates");
    for (parameters, expected) in [
        ("sslmode=verify-full&sslrootcert=~/right", "every sum holds"),
        ("sslmode=verify-full&sslrootcert=~/other", "no authority of sslrootcert"),
        ("sslmode=verify-full", "need sslrootcert=FILE"),
        ("sslmode=perhaps", "none of disable, prefer, require"),
    ] {
        let done = Command::new(env!("CARGO_BIN_EXE_candela"))
            .args(["ledger", "verify"])
            .env("CANDELA_LEDGER", world.url(parameters))
            .env("RUST_LOG", "trace")
            .current_dir(world.files.path())
            .output()
            .expect("runs");
        let said = [done.stdout, done.stderr].map(|bytes| String::from_utf8(bytes).expect("text"));
        let said = said.concat();
        assert!(said.contains(expected), "{parameters}: {said}");
        assert_eq!(done.status.success(), expected == "every sum holds", "{parameters}: {said}");
        assert!(!said.contains("-hidden"), "a password is shown: {said}");
    }
}
