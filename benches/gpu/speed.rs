//! Times steps of a model whose weights are made up, on a GPU or, to rehearse, on the CPU. One case a
//! run, one JSON line a case:
//!
//!     cargo bench --features cuda --bench gpu_speed -- CONFIG_JSON DEVICE CASE
//!
//! DEVICE is `cuda:N` or `cpu`. CASE is `ceilings`, `decode:ROWS:CONTEXT`, `busy:ROWS:CONTEXT`,
//! `prefill:TOKENS` or `profile:ROWS:CONTEXT`. Times are medians; bytes and flops are those that the ops
//! plan (`ops::gpu::Work`), so that rates are of what must cross the bus, not of what did.

mod model;
mod profile;

use std::{path::Path, time::Instant};

use anyhow::{Context, Result, anyhow, bail};
use candela::engine::device::Device;
use serde_json::{Value, json};

/// Steps that warm up, and steps that are timed.
const WARM: usize = 5;
const TIMED: usize = 40;

fn main() -> Result<()> {
    // cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let [config, device, case] = &args[..] else {
        // Every bench runs once under `cargo bench`: without a model there is nothing to do.
        println!("usage: gpu_speed CONFIG_JSON DEVICE CASE");
        return Ok(());
    };
    let line = run(Path::new(config), device, case)?;
    println!("{line}");
    Ok(())
}

fn run(config: &Path, device: &str, case: &str) -> Result<Value> {
    let (kind, sizes) = case.split_once(':').unwrap_or((case, ""));
    let sizes = sizes.split(':').filter(|size| !size.is_empty());
    let sizes: Vec<usize> = sizes.map(str::parse).collect::<Result<_, _>>().context("a size")?;
    let mut line = match (kind, &sizes[..]) {
        ("ceilings", []) => profile::ceilings(device)?,
        ("decode", &[rows, context]) => {
            let step = model::Step::decode(rows, context);
            time(&mut *model::device(config, device, &step)?, &step)?
        }
        ("prefill", &[tokens]) => {
            let step = model::Step::prefill(tokens);
            time(&mut *model::device(config, device, &step)?, &step)?
        }
        ("busy", &[rows, context]) => {
            let step = model::Step::decode(rows, context);
            busy(&mut *model::device(config, device, &step)?, &step)?
        }
        ("profile", &[rows, context]) => {
            profile::kernels(config, device, &model::Step::decode(rows, context))?
        }
        _ => bail!("`{case}` is no case"),
    };
    line["case"] = json!(case);
    line["device"] = json!(model::name(device)?);
    Ok(line)
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("{error}")
}

/// One step at a time: what the device says it took.
fn time(device: &mut dyn Device, step: &model::Step) -> Result<Value> {
    let mut times = Vec::new();
    for round in 0..WARM + TIMED {
        device.launch(&step.asked(round == 0)).map_err(failed)?;
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
    }))
}

/// Two steps in flight, as the engine runs them: how much of the time the device computes, and what a
/// launch costs the host.
fn busy(device: &mut dyn Device, step: &model::Step) -> Result<Value> {
    let (mut device_ns, mut host_ns) = (0, 0);
    device.launch(&step.asked(true)).map_err(failed)?;
    let began = Instant::now();
    for _ in 0..TIMED {
        let launched = Instant::now();
        device.launch(&step.asked(false)).map_err(failed)?;
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
