//! What the machine offers: processor, memory, disk.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::bail;

use crate::config::{ByteSize, KV_CACHE_MEMORY_BYTES_MIN, KV_CACHE_MEMORY_SHARE};

/// Nested control groups looked at; deeper ones are not found in practice.
const CGROUP_DEPTH_MAX: usize = 32;

/// Memory in bytes; what cannot be read is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    pub total_bytes: Option<u64>,
    /// Of the machine, without swapping.
    pub machine_available_bytes: Option<u64>,
    /// The tightest limit of the control groups around this process.
    pub cgroup_limit_bytes: Option<u64>,
    /// What is left under that limit.
    pub cgroup_available_bytes: Option<u64>,
}

impl Memory {
    pub fn read() -> Self {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let (cgroup_limit_bytes, cgroup_available_bytes) = cgroup(Path::new("/sys/fs/cgroup"));
        Self {
            total_bytes: meminfo_bytes(&meminfo, "MemTotal"),
            machine_available_bytes: meminfo_bytes(&meminfo, "MemAvailable"),
            cgroup_limit_bytes,
            cgroup_available_bytes,
        }
    }

    /// What this process may still take, by the machine and by its control group.
    pub fn available_bytes(&self) -> Option<u64> {
        match (self.machine_available_bytes, self.cgroup_available_bytes) {
            (Some(machine), Some(group)) => Some(machine.min(group)),
            (machine, group) => machine.or(group),
        }
    }
}

/// Bytes for the KV cache: as configured, else a share of what is available now.
///
/// # Errors
/// When the machine does not say what it has, or has nearly nothing.
pub fn kv_cache_memory_bytes(configured: Option<u64>) -> anyhow::Result<u64> {
    if let Some(bytes) = configured {
        return Ok(bytes);
    }
    let Some(available) = Memory::read().available_bytes() else {
        bail!("cannot read how much memory is available: say --kv-cache-memory, such as 2GiB");
    };
    let bytes = (available as f64 * KV_CACHE_MEMORY_SHARE) as u64;
    if bytes < KV_CACHE_MEMORY_BYTES_MIN {
        bail!("only {} of memory is available: free some, or raise the limit", ByteSize(available));
    }
    Ok(bytes)
}

fn meminfo_bytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Tightest limit and least room of the control groups around this process: version 2 from its own
/// group up to the root, else version 1's memory controller.
fn cgroup(root: &Path) -> (Option<u64>, Option<u64>) {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let groups = own.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?.trim_start_matches('/'));
        match controllers {
            "" => Some((root.to_path_buf(), path.to_string(), "memory.max", "memory.current")),
            names if names.split(',').any(|name| name == "memory") => {
                let files = ("memory.limit_in_bytes", "memory.usage_in_bytes");
                Some((root.join("memory"), path.to_string(), files.0, files.1))
            }
            _ => None,
        }
    });
    let (mut limit, mut room) = (None, None);
    for (mount, path, limit_file, used_file) in groups {
        // In a container the path is the host's and absent here; the mount's root still counts.
        let dirs: Vec<PathBuf> =
            mount.join(path).ancestors().take(CGROUP_DEPTH_MAX).map(Path::to_path_buf).collect();
        for dir in dirs.iter().filter(|dir| dir.starts_with(&mount)) {
            // Version 1 says "no limit" with a number near 2^63, version 2 with the word `max`.
            let Some(max) = number(&dir.join(limit_file)).filter(|max| *max < 1 << 60) else {
                continue;
            };
            limit = Some(limit.map_or(max, |least: u64| least.min(max)));
            let left = max.saturating_sub(
                number(&dir.join(used_file)).unwrap_or(0).saturating_sub(reclaimable(dir)),
            );
            room = Some(room.map_or(left, |least: u64| least.min(left)));
        }
    }
    (limit, room)
}

/// Page cache counts as used in a control group but is given back under pressure.
fn reclaimable(dir: &Path) -> u64 {
    let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let inactive = stat.lines().find_map(|line| line.strip_prefix("inactive_file "));
    inactive.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The processor's name.
pub fn cpu_model() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

/// The vector instructions our kernels look for, and whether this processor has them.
#[cfg(target_arch = "x86_64")]
pub fn simd_features() -> Vec<(&'static str, bool)> {
    vec![
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512-vnni", is_x86_feature_detected!("avx512vnni")),
    ]
}

/// No kernels of our own on this processor: plain code runs.
#[cfg(not(target_arch = "x86_64"))]
pub fn simd_features() -> Vec<(&'static str, bool)> {
    Vec::new()
}

/// Free bytes of the disk under `dir` or its nearest parent that exists, as `df` counts them.
pub fn disk_free_bytes(dir: &Path) -> Option<u64> {
    let existing = dir.ancestors().find(|part| part.is_dir()).unwrap_or(Path::new("."));
    let out = Command::new("df").args(["-P", "-k", "--"]).arg(existing).output().ok()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.lines().nth(1)?.split_whitespace().nth(3)?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo() {
        let check =
            |text: &str, want| assert_eq!(meminfo_bytes(text, "MemAvailable"), want, "{text:?}");
        check("MemTotal: 9 kB\nMemAvailable:    12 kB\n", Some(12 * 1024));
        check("", None);
        check("MemAvailable: 12\n", None);
        check("MemAvailable: x kB\n", None);
        check("MemAvailableX: 12 kB\n", None);
        check("MemAvailable: 18446744073709551615 kB\n", None);
    }

    #[test]
    fn available_is_the_tighter_of_both() {
        let check = |machine, group, want| {
            let memory = Memory {
                machine_available_bytes: machine,
                cgroup_available_bytes: group,
                ..Memory::default()
            };
            assert_eq!(memory.available_bytes(), want);
        };
        check(Some(8), Some(3), Some(3));
        check(Some(2), Some(3), Some(2));
        check(Some(2), None, Some(2));
        check(None, Some(3), Some(3));
        check(None, None, None);
    }
}
