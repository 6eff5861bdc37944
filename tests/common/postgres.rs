//! A real PostgreSQL server of a test's own, in a temporary directory.

use std::{
    fs,
    net::TcpListener,
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use candela::{
    clock::Clock,
    ledger::db::{Db, Postgres},
};

/// How long a start may take, recovery after a crash included.
const START_MAX: Duration = Duration::from_secs(60);
const PASSWORD: &str = "pass-hidden";

/// Stopped and removed when dropped.
pub struct Cluster {
    dir: tempfile::TempDir,
    bin: PathBuf,
    /// The user and group it runs as: PostgreSQL refuses to run as root.
    user: Option<(u32, u32)>,
    port: u16,
    process: Option<Child>,
}

impl Cluster {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = socket.local_addr().expect("an address").port();
        drop(socket);
        let mut made = Self { dir, bin: binaries(), user: other_user(), port, process: None };
        let data = made.data();
        fs::create_dir(&data).expect("a directory");
        let password = made.dir.path().join("password");
        fs::write(&password, PASSWORD).expect("writes");
        if let Some((uid, gid)) = made.user {
            let open = fs::Permissions::from_mode(0o755);
            fs::set_permissions(made.dir.path(), open).expect("ours");
            for path in [&data, &password] {
                chown(path, Some(uid), Some(gid)).expect("root");
            }
        }
        let mut init = made.command("initdb");
        init.args(["--username", "candela", "--auth", "scram-sha-256", "--encoding", "UTF8"]);
        init.args(["--locale", "C", "--no-sync", "--pwfile"]).arg(&password);
        let done = init.arg("--pgdata").arg(&data).output().expect("runs");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        made.resume();
        made
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        // Its own working directory, for the test's may be closed to the other user.
        command.current_dir(self.dir.path()).env_clear().stdout(Stdio::null());
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
        command
    }

    /// A URL of a database, which has to be there.
    pub fn url(&self, database: &str) -> String {
        self.url_of("candela", PASSWORD, database)
    }

    pub fn url_of(&self, user: &str, password: &str, database: &str) -> String {
        format!("postgres://{user}:{password}@127.0.0.1:{}/{database}", self.port)
    }

    /// The socket of this machine's own, in place of an address.
    pub fn socket_url(&self, database: &str) -> String {
        let dir = self.data().display().to_string().replace('/', "%2F");
        self.url(database).replace("127.0.0.1", &dir)
    }

    /// Speaks TLS from now on, by a certificate and its key in PEM, with more settings. What is
    /// connected stays as it is.
    pub fn encrypt(&self, certificate: &str, key: &str, settings: &str) {
        self.put("server.crt", certificate);
        self.put("server.key", key);
        self.put("postgresql.auto.conf", &format!("ssl = on\n{settings}"));
        self.reload();
    }

    /// Replaces the rules of who may connect, and how.
    pub fn set_rules(&self, rules: &str) {
        self.put("pg_hba.conf", rules);
        self.reload();
    }

    /// A file of the server's own that nobody else reads.
    fn put(&self, name: &str, text: &str) {
        let path = self.data().join(name);
        fs::write(&path, text).expect("writes");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("ours");
        if let Some((uid, gid)) = self.user {
            chown(&path, Some(uid), Some(gid)).expect("root");
        }
    }

    fn reload(&self) {
        let log = self.dir.path().join("log");
        let said = || fs::read_to_string(&log).expect("a log");
        let before = said().len();
        signal("HUP", &self.process.as_ref().expect("runs").id().to_string());
        let start = Instant::now();
        // It says so first, and takes no connection until it is done.
        while !said()[before..].contains("SIGHUP") {
            assert!(start.elapsed() < START_MAX, "no reload: {}", said());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A new database.
    pub fn database(&self, name: &str) -> String {
        self.admin("postgres", &format!("CREATE DATABASE {name}"));
        self.url(name)
    }

    /// Runs statements as the database's owner.
    pub fn admin(&self, database: &str, sql: &str) {
        let mut db = self.open(&self.url(database));
        db.batch(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    pub fn open(&self, url: &str) -> Postgres {
        Postgres::connect(url, Clock::system()).expect("connects")
    }

    /// SIGKILL to every process of the server, as a machine that loses power.
    pub fn kill(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        let id = process.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"));
        process.kill().expect("kills");
        let children = children.unwrap_or_default();
        for child in children.split_whitespace() {
            signal("KILL", child);
        }
        process.wait().expect("ends");
    }

    /// Suspends or resumes the processes that serve connections.
    pub fn freeze(&self, frozen: bool) {
        let id = self.process.as_ref().expect("runs").id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).expect("lives");
        let name = if frozen { "STOP" } else { "CONT" };
        for one in children.split_whitespace().chain([&*id.to_string()]) {
            signal(name, one);
        }
    }

    /// Starts it, and waits until it answers.
    pub fn resume(&mut self) {
        let start = Instant::now();
        let log = self.dir.path().join("log");
        while start.elapsed() < START_MAX {
            if self
                .process
                .as_mut()
                .is_none_or(|process| process.try_wait().expect("waits").is_some())
            {
                let errors = fs::File::create(&log).expect("a log");
                let mut command = self.command("postgres");
                command.arg("-D").arg(self.data()).args(["-p", &self.port.to_string()]);
                command.args(["-c", "listen_addresses=127.0.0.1"]);
                let sockets = format!("unix_socket_directories={}", self.data().display());
                command.args(["-c", &sockets]);
                self.process = Some(command.stderr(errors).spawn().expect("starts"));
            }
            if Postgres::connect(&self.url("postgres"), Clock::system()).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("PostgreSQL does not start: {}", fs::read_to_string(&log).unwrap_or_default());
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            // At once, yet leaving no shared memory behind.
            signal("QUIT", &process.id().to_string());
            let _ = process.wait();
        }
    }
}

fn signal(name: &str, process: &str) {
    let _ = Command::new("kill").args(["-s", name, process]).stderr(Stdio::null()).status();
}

/// Where `initdb` and `postgres` are: on the path, or where Debian keeps them.
fn binaries() -> PathBuf {
    let has = |dir: &PathBuf| ["initdb", "postgres"].iter().all(|name| dir.join(name).is_file());
    let path = std::env::var_os("PATH").unwrap_or_default();
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut versions: Vec<PathBuf> = versions.map(|entry| entry.path().join("bin")).collect();
    versions.sort();
    let all = std::env::split_paths(&path).chain(versions.into_iter().rev());
    all.into_iter().find(has).expect(
        "no initdb and postgres on PATH or in /usr/lib/postgresql: install PostgreSQL (apt-get install postgresql)",
    )
}

/// Somebody who is not root, where this is root.
fn other_user() -> Option<(u32, u32)> {
    let root = fs::metadata("/proc/self").expect("Linux").uid() == 0;
    let users = fs::read_to_string(Path::new("/etc/passwd")).expect("users");
    let id = |name: &str| {
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2).map(|field| field.parse().ok());
        Some((fields.next()??, fields.next()??))
    };
    root.then(|| id("postgres").or_else(|| id("nobody")).expect("a user besides root"))
}
