//! Single kernels of a step, and what the device can do at most.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Result;
use candela::{
    model::{
        Llama,
        load::{Dummy, assemble},
    },
    ops::{
        GpuPlace, Inbox, Packet, Region, Splits, WeightPlace,
        gpu::{
            Args, Buffer, Gpu, Graph, Half, Launch, Matmul, Pending, StepBuffers, StepLimits, Work,
        },
    },
};
use serde_json::{Value, json};

use crate::model::{self, Step};

const COPY_BYTES: usize = 2 << 30;
const MATMUL_SIZE: usize = 8192;
const ROUNDS: usize = 10;

/// The device's own copy, counting bytes read and written, and its matrix product on random values.
pub fn ceilings(device: &str) -> Result<Value> {
    let Some(open) = model::open(device)? else { return Ok(json!({ "note": "no GPU" })) };
    let gpu = &*open.gpu;
    let dtype = Half::Bf16;
    let copied = gpu.allocate(2 * COPY_BYTES)?;
    let pairs = gpu.allocate(8)?;
    gpu.upload(pairs.address, &[0, 0, 0, 0, 1, 0, 0, 0])?;
    let copy = Launch {
        kernel: "block_copy",
        grid: [8192, 1, 1],
        threads: 256,
        shared_bytes: 0,
        args: Args::default()
            .address(copied.address)
            .address(pairs.address)
            .u64(2)
            .u32(COPY_BYTES)
            .u32(1),
        work: Work { bytes: 2 * COPY_BYTES as u64, flops: 0 },
    };
    let copy_ns = best(gpu, &mut || Ok(gpu.launch(&copy)?))?;
    let n = MATMUL_SIZE;
    let operands = [0, 1, 2].map(|seed| filled(gpu, n * n, dtype, seed));
    let [x, w, y] = operands;
    let (x, w, y) = (x?, w?, y?);
    let product = Matmul {
        x: x.address,
        w: w.address,
        bias: None,
        y: y.address,
        m: n,
        n,
        k: n,
        dtype,
        wide: false,
        y_stride: n,
    };
    let product_ns = best(gpu, &mut || Ok(gpu.matmul(&product)?))?;
    Ok(json!({
        "copy_gb_per_s": 2.0 * COPY_BYTES as f64 / copy_ns as f64,
        "matmul_tflop_per_s": product.work().flops as f64 / product_ns as f64 / 1e3,
    }))
}

fn filled(gpu: &dyn Gpu, count: usize, dtype: Half, seed: u32) -> Result<Buffer> {
    let memory = gpu.allocate(count * Half::BYTES)?;
    let fill = candela::ops::fill::Fill { to: memory.address, count, dtype, seed, size: 1.0 };
    fill.run(gpu)?;
    Ok(memory)
}

fn best(gpu: &dyn Gpu, work: &mut dyn FnMut() -> Result<()>) -> Result<u64> {
    let mut least = u64::MAX;
    for _ in 0..ROUNDS {
        gpu.begin()?;
        work()?;
        least = least.min(gpu.end(0, 0)?.wait()?.1);
    }
    Ok(least)
}

/// Time, bytes and flops of a step by kernel, each launch timed by itself.
pub fn kernels(device: &str, step: &Step) -> Result<Vec<Value>> {
    let Some(open) = model::open(device)? else { return Ok(vec![json!({ "note": "no GPU" })]) };
    let gpu = Arc::new(Timed { inner: open.gpu, spent: Mutex::default() });
    let dtype = Half::Bf16;
    let config = model::config(device)?;
    let weights = assemble(&config, &Dummy, WeightPlace::Gpu(&*gpu, dtype))?;
    let (limits, inputs) = (step.limits(), step.asked(true).inputs);
    let buffers = StepLimits {
        tokens: limits.step_tokens_max,
        seqs: step.seats(),
        logits_rows: limits.logits_rows_max,
        blocks_per_seq: inputs.block_table_stride,
        block_copies: 1,
        slots: step.seats(),
    };
    let buffers = StepBuffers::new(&*gpu, buffers)?;
    let splits = Splits::new(&*gpu, step.seats(), config.kv_heads, config.heads, config.head_dim)?;
    let inbox = Inbox::new(&*gpu, buffers.packet_words_max())?;
    let mut packet = Packet::default();
    buffers.pack(&inputs, &mut packet)?;
    let place = GpuPlace { gpu: gpu.clone(), dtype, step: buffers, splits };
    let model = Llama::on_gpu(config, weights, limits, place)?;
    packet.send(&*gpu, &inbox)?;
    model.forward(&inputs, &[])?;
    gpu.spent().clear();
    for _ in 0..ROUNDS {
        model.forward(&inputs, &[])?;
    }
    let spent = std::mem::take(&mut *gpu.spent());
    let rounds = ROUNDS as u64;
    let lines = spent.into_iter().map(|(name, (launches, ns, work))| {
        json!({
            "kernel": name,
            "launches": launches / rounds,
            "ns": ns / rounds,
            "gb_per_s": work.bytes as f64 / ns.max(1) as f64,
            "tflop_per_s": work.flops as f64 / ns.max(1) as f64 / 1e3,
        })
    });
    Ok(lines.collect())
}

/// Launches, nanoseconds and work, by kernel or by shape of product.
type Spent = BTreeMap<String, (u64, u64, Work)>;

/// Waits for everything that it launches.
struct Timed {
    inner: Arc<dyn Gpu>,
    spent: Mutex<Spent>,
}

impl Timed {
    fn spent(&self) -> std::sync::MutexGuard<'_, Spent> {
        self.spent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn time(
        &self,
        name: String,
        work: Work,
        launch: impl FnOnce() -> candle_core::Result<()>,
    ) -> candle_core::Result<()> {
        self.inner.begin()?;
        launch()?;
        let (_, ns) = self.inner.end(0, 0)?.wait()?;
        let mut spent = self.spent();
        let of = spent.entry(name).or_default();
        of.0 += 1;
        of.1 += ns;
        of.2.bytes += work.bytes;
        of.2.flops += work.flops;
        Ok(())
    }
}

impl Gpu for Timed {
    fn allocate(&self, bytes: usize) -> candle_core::Result<Buffer> {
        self.inner.allocate(bytes)
    }

    fn region(&self, elements: usize, dtype: Half) -> candle_core::Result<Region> {
        self.inner.region(elements, dtype)
    }

    fn memory(&self) -> candle_core::Result<(u64, u64)> {
        self.inner.memory()
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> candle_core::Result<()> {
        self.inner.upload(to, bytes)
    }

    fn multiprocessors(&self) -> usize {
        self.inner.multiprocessors()
    }

    fn gemv_rows_max(&self) -> usize {
        self.inner.gemv_rows_max()
    }

    fn launch(&self, launch: &Launch) -> candle_core::Result<()> {
        self.time(launch.kernel.to_owned(), launch.work, || self.inner.launch(launch))
    }

    fn matmul(&self, op: &Matmul) -> candle_core::Result<()> {
        let name = format!("matmul {} x {} x {}", op.m, op.n, op.k);
        self.time(name, op.work(), || self.inner.matmul(op))
    }

    fn begin(&self) -> candle_core::Result<()> {
        self.inner.begin()
    }

    fn end(&self, from: u64, bytes: usize) -> candle_core::Result<Box<dyn Pending>> {
        self.inner.end(from, bytes)
    }

    fn capture(
        &self,
        work: &mut dyn FnMut() -> candle_core::Result<()>,
    ) -> candle_core::Result<Box<dyn Graph>> {
        self.inner.capture(work)
    }
}
