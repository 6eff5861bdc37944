//! A server process on the default model, and a client of it.

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use reqwest::{Method, StatusCode};
use serde_json::Value;

/// How long anything here may take.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Killed when dropped. Its model is called `m`.
pub struct Server {
    process: Child,
    data_dir: Arc<tempfile::TempDir>,
    pub url: String,
    pub http: reqwest::Client,
    log: Arc<Mutex<String>>,
}

impl Server {
    pub fn start(extra: &[&str]) -> Self {
        Self::start_with(extra, &[])
    }

    /// With variables of the environment as well.
    pub fn start_with(extra: &[&str], variables: &[(&str, &Path)]) -> Self {
        let data_dir = Arc::new(tempfile::tempdir().expect("a directory"));
        let variables: Vec<_> =
            variables.iter().map(|(name, value)| (*name, value.as_os_str())).collect();
        let started = Self::start_in(data_dir, &super::default_model(), extra, &variables);
        started.unwrap_or_else(|log| panic!("{log}"))
    }

    /// On a data directory of before, with more in its environment. How it ended and its log, where that is
    /// before it listens.
    pub fn start_in(
        data_dir: Arc<tempfile::TempDir>,
        model: &Path,
        extra: &[&str],
        variables: &[(&str, &OsStr)],
    ) -> Result<Self, String> {
        let mut process = Command::new(env!("CARGO_BIN_EXE_candela"))
            .args(["serve", "--port", "0", "--served-model-name", "m", "--log-format", "json"])
            .arg("--model")
            .arg(model)
            .arg("--data-dir")
            .arg(data_dir.path())
            .args(extra)
            .envs(variables.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        let log = Arc::new(Mutex::new(String::new()));
        let mut errors = process.stderr.take().expect("piped");
        let reader = std::thread::spawn({
            let log = log.clone();
            move || {
                let mut part = [0; 4096];
                while let Ok(count @ 1..) = errors.read(&mut part) {
                    let text = String::from_utf8_lossy(&part[..count]).into_owned();
                    log.lock().expect("not poisoned").push_str(&text);
                }
            }
        });
        let mut line = String::new();
        let out = process.stdout.take().expect("piped");
        BufReader::new(out).read_line(&mut line).expect("says where it listens");
        let Some(url) = line.split("on ").nth(1).map(|url| url.trim().to_owned()) else {
            let status = process.wait().expect("ends");
            reader.join().expect("reads");
            return Err(format!("{status}: {}", log.lock().expect("not poisoned")));
        };
        let http = reqwest::Client::builder().no_proxy().build().expect("client");
        Ok(Self { process, data_dir, url, http, log })
    }

    pub async fn send(&self, method: Method, path: &str, body: &Value) -> reqwest::Response {
        let request = self.http.request(method, format!("{}{path}", self.url));
        request.body(body.to_string()).send().await.expect("answers")
    }

    pub async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        let response = self.send(Method::POST, path, &body).await;
        let status = response.status();
        (status, response.json().await.expect("json"))
    }

    pub async fn metric(&self, name: &str) -> f64 {
        let response = self.send(Method::GET, "/metrics", &Value::Null).await;
        let text = response.text().await.expect("text");
        let line = text.lines().find(|line| line.starts_with(&format!("{name}{{")));
        let line = line.unwrap_or_else(|| panic!("no {name} in {text}"));
        line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
    }

    /// The first line of the log that holds all of `parts`.
    pub async fn logged(&self, parts: &[&str]) -> Value {
        let start = Instant::now();
        while start.elapsed() < DEADLINE {
            let log = self.log.lock().expect("not poisoned").clone();
            let line = log.lines().find(|line| parts.iter().all(|part| line.contains(part)));
            if let Some(line) = line.and_then(|line| serde_json::from_str(line).ok()) {
                return line;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("no line with {parts:?} in {}", self.log.lock().expect("not poisoned"));
    }

    /// Asks it to shut down.
    pub fn terminate(&self) {
        let asked = Command::new("kill").arg(self.id().to_string()).status();
        assert!(asked.is_ok(), "{asked:?}");
    }

    pub fn wait(&mut self) -> std::process::ExitStatus {
        self.process.wait().expect("waits")
    }

    pub fn data_dir(&self) -> &std::path::Path {
        self.data_dir.path()
    }

    /// Everything it has logged so far.
    pub fn log(&self) -> String {
        self.log.lock().expect("not poisoned").clone()
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
