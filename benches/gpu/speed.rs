//! Times steps of Llama-3.1-8B's shapes with made-up weights on a GPU or, to rehearse, of a tiny model on
//! the CPU: the program of the stage `speed`.
//!
//!     gpu_speed --device cuda:0 --list
//!     gpu_speed --device cuda:0 --case decode:64:1024
//!
//! Cases are `ceilings`, `decode:ROWS:CONTEXT`, `busy:ROWS:CONTEXT`, `prefill:TOKENS` and
//! `profile:ROWS:CONTEXT`, and print a JSON line each, a profile one for every kernel. Times are medians;
//! bytes and flops are those that must cross the bus and be computed, not those that did.

mod model;
mod profile;

use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

/// Steps that warm up, and steps that are timed.
const WARM: usize = 5;
const TIMED: usize = 40;
const ON_GPU: [&str; 14] = [
    "ceilings",
    "decode:1:128",
    "decode:1:1024",
    "decode:1:8192",
    "decode:8:1024",
    "decode:32:1024",
    "decode:64:1024",
    "decode:128:1024",
    "decode:256:1024",
    "prefill:512",
    "prefill:2048",
    "prefill:8192",
    "busy:64:1024",
    "profile:64:1024",
];
const ON_CPU: [&str; 4] = ["ceilings", "decode:4:64", "prefill:64", "busy:4:64"];

fn main() -> Result<()> {
    // cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["--device", device, "--list"] => {
            let cases = if device == "cpu" { &ON_CPU[..] } else { &ON_GPU[..] };
            cases.iter().for_each(|case| println!("{case}"));
        }
        ["--device", device, "--case", case] => {
            for line in run(device, case)? {
                println!("{line}");
            }
        }
        // Every bench runs once under `cargo bench`.
        _ => println!("usage: gpu_speed --device cuda:N|cpu --list|--case CASE"),
    }
    Ok(())
}

fn run(device: &str, case: &str) -> Result<Vec<Value>> {
    let (kind, sizes) = case.split_once(':').unwrap_or((case, ""));
    let sizes = sizes.split(':').filter(|size| !size.is_empty());
    let sizes: Vec<usize> = sizes.map(str::parse).collect::<Result<_, _>>().context("a size")?;
    let mut lines = match (kind, &sizes[..]) {
        ("ceilings", []) => vec![profile::ceilings(device)?],
        ("decode", &[rows, context]) => vec![time(device, &model::Step::decode(rows, context))?],
        ("prefill", &[tokens]) => vec![time(device, &model::Step::prefill(tokens))?],
        ("busy", &[rows, context]) => vec![busy(device, &model::Step::decode(rows, context))?],
        ("profile", &[rows, context]) => {
            profile::kernels(device, &model::Step::decode(rows, context))?
        }
        _ => bail!("`{case}` is no case"),
    };
    lines.iter_mut().for_each(|line| line["case"] = json!(case));
    Ok(lines)
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("{error}")
}

/// One step at a time: what the device says it took.
fn time(device: &str, step: &model::Step) -> Result<Value> {
    let floor_bytes = step.floor_bytes(&model::config(device)?);
    let mut device = model::device(device, step)?;
    let mut times = Vec::new();
    for round in 0..WARM + TIMED {
        device.launch(step.asked(round == 0)).map_err(failed)?;
        let took = device.collect().map_err(failed)?.device_ns;
        times.extend((round >= WARM).then_some(took));
    }
    times.sort_unstable();
    let median_ns = times[times.len() / 2];
    let tokens_per_second = step.tokens() as f64 * 1e9 / median_ns.max(1) as f64;
    Ok(json!({
        "median_ns": median_ns,
        "p10_ns": times[times.len() / 10],
        "p90_ns": times[times.len() * 9 / 10],
        "tokens_per_second": tokens_per_second,
        "floor_bytes": floor_bytes,
        "floor_gb_per_s": floor_bytes as f64 / median_ns.max(1) as f64,
    }))
}

/// Two steps in flight, as the engine runs them: how much of the time the device computes, and what a
/// launch costs the host.
fn busy(device: &str, step: &model::Step) -> Result<Value> {
    let mut device = model::device(device, step)?;
    let (mut device_ns, mut host_ns) = (0, 0);
    device.launch(step.asked(true)).map_err(failed)?;
    let began = Instant::now();
    for _ in 0..TIMED {
        let launched = Instant::now();
        device.launch(step.asked(false)).map_err(failed)?;
        host_ns += launched.elapsed().as_nanos() as u64;
        device_ns += device.collect().map_err(failed)?.device_ns;
    }
    let wall_ns = began.elapsed().as_nanos() as u64;
    device.collect().map_err(failed)?;
    Ok(json!({
        "busy_share": device_ns as f64 / wall_ns as f64,
        "host_ns_per_launch": host_ns / TIMED as u64,
        "step_ns": wall_ns / TIMED as u64,
    }))
}
