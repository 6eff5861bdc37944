//! Hourly rates of common GPUs, as examples to begin with.

/// What a GPU costs an hour, in nano-USD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpu {
    pub name: &'static str,
    pub hour_nano_usd: i128,
}

/// When the rates were written down.
pub const GPU_RATES_AS_OF: &str = "2026-11";

/// Round figures in the range that on-demand hosts ask. They are examples: rates differ by provider,
/// region and contract, so set your own with `gpu_hour_usd`.
pub const GPUS: [Gpu; 14] = [
    gpu("b200", 5_50),
    gpu("h200", 3_80),
    gpu("h100-sxm", 3_00),
    gpu("h100-pcie", 2_40),
    gpu("a100-80gb", 1_80),
    gpu("a100-40gb", 1_30),
    gpu("mi300x", 2_50),
    gpu("l40s", 1_00),
    gpu("l4", 60),
    gpu("a10", 75),
    gpu("v100", 55),
    gpu("t4", 35),
    gpu("rtx-4090", 45),
    gpu("rtx-3090", 25),
];

/// As [`GPUS`], for messages and schemas.
pub const GPU_NAMES: [&str; GPUS.len()] = {
    let mut names = [""; GPUS.len()];
    let mut index = 0;
    while index < GPUS.len() {
        names[index] = GPUS[index].name;
        index += 1;
    }
    names
};

const fn gpu(name: &'static str, cents: i128) -> Gpu {
    Gpu { name, hour_nano_usd: cents * 10_000_000 }
}
