//! `candela doctor`.

use std::{
    fs,
    io::Write,
    net::SocketAddr,
    path::Path,
    process::{Command, ExitCode, Stdio},
};

use super::{
    machine::{self, Memory},
    pull::registry_options,
};
use crate::{
    config::{ByteSize, Config, Device, Settings},
    engine::device::gpus::{self, GpuFacts},
    gpu::NvmlSource,
    registry::{NoProgress, Registry, RegistryOptions},
};

/// Less memory than this does not hold the default model with a useful KV cache.
const MEMORY_BYTES_MIN: u64 = 512 << 20;
/// Less disk than this does not hold the default model.
const DISK_BYTES_MIN: u64 = 256 << 20;
/// Commands the registry would use to fetch packages, in its order.
const PIP_COMMANDS: [&str; 3] = ["pip", "pip3", "python3 -m pip"];

/// One line of the report.
enum Finding {
    Good(String),
    /// Works, but less well: what to do.
    Poor(String),
    /// Does not work: what to do.
    Broken(String),
}

use Finding::{Broken, Good, Poor};

/// Prints what was found; 1 when something is broken.
pub fn doctor(settings: Settings) -> anyhow::Result<ExitCode> {
    let mut findings = Vec::new();
    match Config::load(settings) {
        Ok(config) => {
            let file = config.file.as_ref().map(|file| file.display().to_string());
            let file = file.unwrap_or_else(|| "no file, defaults".to_string());
            findings.push(("configuration", Good(file)));
            findings.extend(check_machine(&config));
            findings.extend(check_models(&config));
            findings.push(("port", check_port(&config)));
        }
        Err(error) => findings.push(("configuration", Broken(error.to_string()))),
    }
    let mut out = std::io::stdout().lock();
    let mut broken = 0;
    for (subject, finding) in &findings {
        let (mark, text) = match finding {
            Good(text) => ("ok     ", text),
            Poor(text) => ("warning", text),
            Broken(text) => ("BROKEN ", text),
        };
        broken += usize::from(matches!(finding, Broken(_)));
        writeln!(out, "{mark}  {subject:<14} {text}")?;
    }
    if broken == 0 {
        writeln!(out, "\nReady: run `candela serve`.")?;
        return Ok(ExitCode::SUCCESS);
    }
    writeln!(out, "\n{broken} broken: see above what to do.")?;
    Ok(ExitCode::FAILURE)
}

fn check_machine(config: &Config) -> Vec<(&'static str, Finding)> {
    vec![
        ("device", check_device(config)),
        ("SIMD", check_simd(&machine::simd_features())),
        ("threads", check_threads(config.threads)),
        ("memory", check_memory(Memory::read(), config.kv_cache_memory_bytes)),
    ]
}

fn check_device(config: &Config) -> Finding {
    let cpu = || machine::cpu_model().unwrap_or_else(|| "CPU".to_string());
    let ordinal = match config.device {
        Device::Cpu => return Good(format!("cpu: {}", cpu())),
        Device::Cuda(ordinal) => ordinal,
        Device::Auto => match gpus::count() {
            Ok(count) if count > 0 => 0,
            Err(why) if gpus::BUILT => return Poor(format!("cpu: {}. No GPU: {why}", cpu())),
            Err(why) if NvmlSource::open(None).is_ok() => {
                return Poor(format!("cpu: {}. The driver shows a GPU, but {why}", cpu()));
            }
            _ => return Good(format!("cpu: {}", cpu())),
        },
    };
    match gpus::open(ordinal) {
        Ok(open) => {
            let GpuFacts { name, capability: (major, minor), free_bytes, total_bytes, .. } =
                open.facts;
            let (free, total) = (ByteSize(free_bytes), ByteSize(total_bytes));
            Good(format!("cuda:{ordinal}: {name}, {major}.{minor}, {free} of {total} free"))
        }
        Err(why) => Broken(why),
    }
}

fn check_simd(features: &[(&str, bool)]) -> Finding {
    let here: Vec<_> = features.iter().filter(|(_, has)| *has).map(|(name, _)| *name).collect();
    if here.contains(&"avx2") && here.contains(&"fma") {
        Good(here.join(", "))
    } else {
        Poor("no AVX2 with FMA: plain code runs, many times slower".to_string())
    }
}

fn check_threads(configured: Option<usize>) -> Finding {
    let Ok(cores) = std::thread::available_parallelism().map(usize::from) else {
        return Poor("cannot tell the number of cores: set --threads".to_string());
    };
    match configured {
        Some(threads) if threads > cores => Poor(format!(
            "{threads} configured, {cores} cores: more threads than cores slow each step, lower --threads"
        )),
        Some(threads) => Good(format!("{threads} of {cores} cores")),
        None => Good(format!("{cores} cores")),
    }
}

fn check_memory(memory: Memory, kv_bytes: Option<u64>) -> Finding {
    let Some(available) = memory.available_bytes() else {
        return Poor("cannot tell how much is available: set --kv-cache-memory".to_string());
    };
    let show =
        |bytes: Option<u64>| bytes.map_or("unknown".to_string(), |b| ByteSize(b).to_string());
    let limit = memory.cgroup_limit_bytes.map(|limit| format!(", limited to {}", ByteSize(limit)));
    let text = format!(
        "{} available of {}{}",
        ByteSize(available),
        show(memory.total_bytes),
        limit.unwrap_or_default()
    );
    match kv_bytes {
        Some(kv) if kv > available => Broken(format!(
            "{text}, but --kv-cache-memory is {}: lower it or free memory",
            ByteSize(kv)
        )),
        _ if available < MEMORY_BYTES_MIN => Broken(format!(
            "{text}: at least {} is needed; stop other programs or raise the container's limit",
            ByteSize(MEMORY_BYTES_MIN)
        )),
        _ => Good(text),
    }
}

fn check_models(config: &Config) -> Vec<(&'static str, Finding)> {
    let dir = &config.sources.model_dir;
    let options = RegistryOptions { offline: true, ..registry_options(&config.sources) };
    let registry = match Registry::new(options) {
        Ok(registry) => registry,
        Err(error) => return vec![("models", Broken(error.to_string()))],
    };
    // Offline, a manifest resolves exactly if its files are here and whole.
    let present: Vec<_> = registry
        .list()
        .map(|manifest| manifest.id.as_str())
        .filter(|id| registry.resolve(id, &NoProgress).is_ok())
        .collect();
    let models = match (present.is_empty(), config.sources.offline) {
        (false, _) => Good(format!("here: {}", present.join(", "))),
        (true, false) => Good("none here yet: `candela serve` fetches the default one".to_string()),
        (true, true) if config.model.is_some() => {
            Poor("none here and offline: only a --model that is a path can be served".to_string())
        }
        (true, true) => Broken(
            "none here and offline: allow the network once, or give --model a path".to_string(),
        ),
    };
    let fetches = present.is_empty() && !config.sources.offline;
    vec![
        ("model dir", check_model_dir(dir, fetches)),
        ("models", models),
        ("pip", check_pip(&config.sources.pip, fetches)),
    ]
}

fn check_model_dir(dir: &Path, fetches: bool) -> Finding {
    let shown = dir.display();
    if let Err(error) = fs::create_dir_all(dir).and_then(|()| tempfile::tempfile_in(dir).map(drop))
    {
        return Broken(format!(
            "{shown} cannot be written ({error}): choose another with --model-dir"
        ));
    }
    match machine::disk_free_bytes(dir) {
        Some(free) if free < DISK_BYTES_MIN && fetches => Broken(format!(
            "{shown}: only {} free, the default model needs {}: free some or choose another --model-dir",
            ByteSize(free),
            ByteSize(DISK_BYTES_MIN)
        )),
        Some(free) => Good(format!("{shown}, {} free", ByteSize(free))),
        None => Poor(format!("{shown}: cannot tell how much is free")),
    }
}

/// Only models from packages need pip; what is missing matters when one has to be fetched.
fn check_pip(configured: &str, fetches: bool) -> Finding {
    let runs = |command: &str| {
        let mut words = command.split_whitespace();
        let Some(program) = words.next() else { return false };
        let mut child = Command::new(program);
        child
            .args(words)
            .arg("--version")
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .stdout(Stdio::null());
        child.status().is_ok_and(|status| status.success())
    };
    if !configured.is_empty() {
        return match runs(configured) {
            true => Good(configured.to_string()),
            false => Broken(format!("`{configured} --version` fails: correct --pip")),
        };
    }
    match PIP_COMMANDS.into_iter().find(|command| runs(command)) {
        Some(command) => Good(command.to_string()),
        None if fetches => {
            Poor("not found: models from packages cannot be fetched; install pip".to_string())
        }
        None => Good("not found, not needed now".to_string()),
    }
}

fn check_port(config: &Config) -> Finding {
    let address = SocketAddr::new(config.host, config.port);
    match std::net::TcpListener::bind(address) {
        Ok(_) => Good(format!("{address} is free")),
        Err(error) => {
            Broken(format!("{address}: {error}: stop what uses it or choose another --port"))
        }
    }
}
