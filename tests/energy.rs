//! Energy from the driver to answers, ledger rows and the books of the device: a real server on real
//! weights, with a driver library of our own (`fake_nvml.c`).

mod common;
#[path = "common/nvml.rs"]
mod nvml;

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use common::server::{DEADLINE, Server};
use nvml::Fake;
use reqwest::Method;
use serde_json::{Value, json};

const UUID: &str = "GPU-a0000000-0000-0000-0000-000000000001";
const OTHER: &str = "GPU-b0000000-0000-0000-0000-000000000002";
/// What it draws, busy or not.
const WATTS: u64 = 200;
const FOREIGN_PERCENT: u64 = 10;
/// NVML's own times of use, in steps that no look misses.
const STEP: Duration = Duration::from_millis(50);

/// Tells the use of two GPUs, one of them shared with another process, until it is dropped.
struct Driver {
    stop: Arc<AtomicBool>,
    /// The server's process.
    pid: Arc<AtomicU32>,
    thread: Option<JoinHandle<()>>,
}

impl Driver {
    fn start(fake: Arc<Fake>) -> Self {
        let (stop, pid) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let begun = Instant::now();
        fake.script(&script(begun.elapsed(), 0));
        let thread = std::thread::spawn({
            let (stop, pid) = (stop.clone(), pid.clone());
            move || {
                while !stop.load(Ordering::SeqCst) {
                    fake.script(&script(begun.elapsed(), pid.load(Ordering::SeqCst)));
                    std::thread::sleep(STEP);
                }
            }
        });
        Self { stop, pid, thread: Some(thread) }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().expect("runs").join().expect("no panic");
    }
}

fn script(elapsed: Duration, pid: u32) -> String {
    let us = 1 + elapsed.as_micros() as u64;
    let device = |uuid: &str| {
        format!(
            "device {uuid} gpu=37 mem_busy=12 mem_total=85899345920 mem_used=1073741824 \
             power={} draws=1 sm_clock=1755 mem_clock=2619 throttle=4\n",
            WATTS * 1000
        )
    };
    let process = |pid: u32, sm: u64| format!("process {UUID} pid={pid} mem=1 sm={sm} ts={us}\n");
    device(OTHER) + &device(UUID) + &process(pid, 60) + &process(4_000_000, FOREIGN_PERCENT)
}

async fn get(server: &Server, path: &str) -> Value {
    let response = server.send(Method::GET, path, &Value::Null).await;
    assert_eq!(response.status(), 200, "{path}");
    response.json().await.expect("json")
}

async fn utilization(server: &Server) -> Value {
    get(server, "/admin/v1/gpu/utilization?window=1h").await
}

/// Asks until the answer is as wanted.
async fn until(server: &Server, path: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    let begun = Instant::now();
    loop {
        let answer = get(server, path).await;
        if is_so(&answer) {
            return answer;
        }
        assert!(begun.elapsed() < DEADLINE, "{path}: {answer}");
        tokio::time::sleep(STEP).await;
    }
}

async fn complete(server: &Server, tokens: u32) -> Value {
    let body = json!({"model": "m", "prompt": "The sky is", "max_tokens": tokens,
        "ignore_eos": true, "temperature": 0});
    let (status, answer) = server.post("/v1/completions", body).await;
    assert_eq!(status, 200, "{answer}");
    answer["usage"]["cost_details"].clone()
}

fn row<'a>(report: &'a Value, kind: &str, name: &str) -> &'a Value {
    let mut rows = report["rows"].as_array().expect("rows").iter();
    let found = rows.find(|row| row["kind"] == kind && row["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name:?} in {report}"))
}

fn sum(report: &Value, field: &str) -> f64 {
    report["rows"].as_array().expect("rows").iter().filter_map(|row| row[field].as_f64()).sum()
}

fn is_near(value: f64, expected: f64, share: f64) -> bool {
    (value - expected).abs() <= expected * share
}

#[tokio::test]
async fn energy_reaches_answers_rows_and_books() {
    let fake = Arc::new(Fake::new(""));
    let driver = Driver::start(fake.clone());
    let extra = ["--meter-gpu-uuid", UUID];
    let server = Server::start_with(&extra, &[("LD_LIBRARY_PATH", fake.dir())]);
    driver.pid.store(server.id(), Ordering::SeqCst);
    // The first settled window tells what the device draws.
    let path = "/admin/v1/gpu/utilization?window=1h";
    until(&server, path, |report| sum(report, "joules") > 0.0).await;
    let mut told = 0.0;
    for tokens in [40, 10, 40] {
        let details = complete(&server, tokens).await;
        let joules = details["joules"].as_f64().unwrap_or_else(|| panic!("{details}"));
        let busy_s = details["gpu_ms"].as_f64().expect("time") / 1e3;
        // At no time more than the whole of what the device draws, as well as a look that is kept
        // waiting between clock and counter can tell.
        assert!(joules > 0.0 && joules <= WATTS as f64 * busy_s * 1.2, "{details}");
        assert_eq!(details["joules_estimated"], true, "{details}");
        told += joules;
    }
    let all_settled = |rows: &Value| {
        let rows = rows["data"].as_array().expect("rows");
        rows.len() == 3 && rows.iter().all(|row| row["energy_uj"].is_i64())
    };
    let rows = until(&server, "/admin/v1/requests", all_settled).await;
    let settled: f64 = rows["data"].as_array().expect("rows").iter().fold(0.0, |sum, row| {
        assert_eq!(row["energy_estimated_uj"], 0, "{row}");
        sum + row["energy_uj"].as_f64().expect("energy") / 1e6
    });
    assert!(is_near(settled, told, 0.25), "{settled} J settled, {told} J estimated before");
    let report = utilization(&server).await;
    let local = row(&report, "tenant", "local");
    assert!(is_near(settled, local["joules"].as_f64().expect("joules"), 1e-4), "{rows} {report}");
    // All of the time, and all that was drawn in it, has a row.
    assert!(is_near(sum(&report, "share"), 1.0, 1e-9), "{report}");
    let drawn = WATTS as f64 * report["window_seconds"].as_f64().expect("seconds");
    // The first and last seconds are estimates.
    assert!(is_near(sum(&report, "joules"), drawn, 0.1), "{drawn} J drawn: {report}");
    let foreign = row(&report, "foreign", "");
    let share = foreign["share"].as_f64().expect("share");
    assert!(share > 0.0 && share <= FOREIGN_PERCENT as f64 / 100.0, "{report}");
    assert!(foreign["joules"].as_f64() > Some(0.0), "{report}");
    the_gpus_are_shown(&server, &report).await;
    explained(&server, &rows["data"][0]).await;
    top_says_it_in_a_table(&server);
}

/// What a command prints, and its exit code.
fn run(line: &[&str]) -> (String, Option<i32>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_candela"));
    let out = command.args(line).env_remove("CANDELA_ADMIN_KEY").output().expect("runs");
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    (text, out.status.code())
}

fn top_says_it_in_a_table(server: &Server) {
    let top = |more: &[&str]| run(&[&["top", "--server", &server.url], more].concat());
    let (text, code) = top(&["--once", "--window", "1h"]);
    assert_eq!(code, Some(0), "{text}");
    for part in ["200 W", "not used here", "SHARE %", "local ", "(foreign)", "(idle)"] {
        assert!(text.contains(part), "no {part} in {text}");
    }
    assert!(!text.contains('\u{1b}'), "no terminal: {text:?}");
    let shares = text.lines().skip_while(|line| !line.contains("SHARE %")).skip(1);
    let shares = shares.filter(|line| !line.starts_with('~'));
    let shares = shares.map(|line| {
        let cells: Vec<&str> = line.split_whitespace().collect();
        cells[cells.len() - 7].replace('.', "").parse::<u32>().expect("a share")
    });
    assert_eq!(shares.sum::<u32>(), 1000, "{text}");
    let (text, code) = top(&["--once", "--by", "model", "--json"]);
    let report: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}"));
    assert_eq!((code, &report["by"]), (Some(0), &json!("model")));
    assert_eq!(top(&["--once", "--window", "5x"]).1, Some(2));
    assert_eq!(top(&["--once", "--by", "user"]).1, Some(2));
    let (text, code) = run(&["top", "--once", "--server", "http://127.0.0.1:1"]);
    assert!(code == Some(1) && text.contains("asking http://127.0.0.1:1"), "{text}");
    // Live, until its reader leaves.
    let mut live = Command::new(env!("CARGO_BIN_EXE_candela"))
        .args(["top", "--server", &server.url, "--interval", "1"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut lines = BufReader::new(live.stdout.take().expect("piped")).lines();
    let tables =
        lines.by_ref().filter(|line| line.as_ref().is_ok_and(|line| line.contains("SHARE %")));
    assert_eq!(tables.take(2).count(), 2);
    drop(lines);
    assert!(live.wait().expect("ends").success());
}

/// Both GPUs, whichever computes, in the report and as metrics.
async fn the_gpus_are_shown(server: &Server, report: &Value) {
    let gpus = report["gpus"].as_array().expect("GPUs");
    let told: Vec<_> = gpus.iter().map(|gpu| (&gpu["uuid"], &gpu["attributed"])).collect();
    assert_eq!(told, [(&json!(UUID), &json!(true)), (&json!(OTHER), &json!(false))]);
    assert_eq!((&gpus[0]["power_watts"], &gpus[0]["gpu_percent"]), (&json!(200.0), &json!(37)));
    assert_eq!(gpus[0]["throttle_reasons"], json!(["sw_power_cap"]));
    assert_eq!(gpus[0]["fault"], Value::Null);
    assert_eq!(server.metric("candela:gpu_power_watts").await, WATTS as f64);
    assert_eq!(server.metric("candela:gpu_memory_bytes").await, 85_899_345_920.0);
    assert_eq!(server.metric("candela:gpu_throttled").await, 1.0);
    assert!(server.metric("candela:gpu_energy_joules_total").await > 0.0);
    let response = server.send(Method::GET, "/metrics", &Value::Null).await;
    let text = response.text().await.expect("text");
    for name in ["device_joules", "device_share", "device_tokens", "device_cost_usd"] {
        let series = text.lines().filter(|line| line.starts_with(&format!("candela:{name}{{")));
        assert!(series.count() >= 4, "{name}: {text}");
    }
}

async fn explained(server: &Server, row: &Value) {
    let id = row["id"].as_str().expect("an id");
    let shown = get(server, &format!("/admin/v1/requests/{id}")).await;
    assert_eq!(shown["energy_uj"], row["energy_uj"]);
    assert!(shown["price"]["input_usd"].is_string(), "{shown}");
}

/// A GPU that the engine does not compute on is shown, and nothing is made of it.
#[tokio::test]
async fn another_gpu_is_only_shown() {
    let fake = Arc::new(Fake::new(""));
    let driver = Driver::start(fake.clone());
    let server = Server::start_with(&[], &[("LD_LIBRARY_PATH", fake.dir())]);
    driver.pid.store(server.id(), Ordering::SeqCst);
    let path = "/admin/v1/gpu/utilization";
    let is_read = |report: &Value| {
        let gpus = report["gpus"].as_array().expect("GPUs");
        gpus.len() == 2 && gpus.iter().all(|gpu| gpu["joules"].as_f64() > Some(0.0))
    };
    until(&server, path, is_read).await;
    let details = complete(&server, 10).await;
    assert!(details.get("joules").is_none(), "{details}");
    let is_booked = |report: &Value| sum(report, "output_tokens") >= 10.0;
    let report = until(&server, path, is_booked).await;
    assert_eq!(sum(&report, "joules"), 0.0, "{report}");
    assert_eq!(row(&report, "foreign", "")["share"], 0.0, "not our device: {report}");
    assert!(report["gpus"].as_array().expect("GPUs").iter().all(|gpu| gpu["attributed"] == false));
    let rows = get(&server, "/admin/v1/requests").await;
    assert_eq!(rows["data"][0]["energy_uj"], Value::Null, "{rows}");
}

/// Whoever has a GPU and a program that cannot use it hears of it.
#[test]
fn doctor_sees_a_gpu_that_this_build_cannot_use() {
    let dir = tempfile::tempdir().expect("a directory");
    let doctor = |fake: &Fake, device: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_candela"));
        command.args(["doctor", "--port", "0", "--device", device]).current_dir(dir.path());
        command.env("LD_LIBRARY_PATH", fake.dir()).env("CANDELA_MODEL_DIR", dir.path());
        let out = command.output().expect("runs");
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    let gpus = Fake::new(&format!("device {UUID}\n"));
    let told = doctor(&gpus, "auto");
    assert!(told.contains("warning  device"), "{told}");
    assert!(told.contains("The driver shows a GPU") && told.contains("--features cuda"), "{told}");
    assert!(doctor(&gpus, "cpu").contains("ok       device"), "who wants the CPU gets it");
    let none = Fake::new("init 9\n");
    assert!(doctor(&none, "auto").contains("ok       device"), "no GPU is no fault");
}

/// The normal state of a machine without a GPU.
#[tokio::test]
async fn no_gpu_is_said_once() {
    let fake = Fake::new("init 9\n");
    let server = Server::start_with(&[], &[("LD_LIBRARY_PATH", fake.dir())]);
    let details = complete(&server, 4).await;
    assert!(details["gpu_ms"].as_f64() > Some(0.0) && details.get("joules").is_none(), "{details}");
    let report = utilization(&server).await;
    assert_eq!(report["gpus"], json!([]));
    assert_eq!(report["gpus_fault"], "the NVIDIA driver is not loaded");
    assert_eq!(server.log().matches("no NVIDIA GPU is monitored").count(), 1);
    let response = server.send(Method::GET, "/metrics", &Value::Null).await;
    assert!(!response.text().await.expect("text").contains("candela:gpu_"));
}
