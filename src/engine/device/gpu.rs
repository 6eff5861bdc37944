//! A GPU as a device: a launch puts a step on its stream and comes back, `collect` waits for what was
//! drawn.
//!
//! Decode steps are padded to a bucket of rows, and each bucket can be captured once as a graph, so that
//! a step is one copy, one kernel that puts its metadata in place, and one launch.

use std::{collections::VecDeque, sync::Arc};

use candle_core::Result;

use crate::{
    model::{Llama, ModelConfig, ModelError, ModelWeights, RuntimeLimits},
    ops::{
        GpuPlace, Inbox, KV_BLOCK_TOKENS, Packet, Splits, StepInputs,
        gpu::{Gpu, Graph, Half, Pending, StepBuffers, StepLimits},
        step_inputs::PAD_SLOT,
    },
    sampling::gpu::{Begin, Draw, GpuSampler, PAD, SampleLimits, Wanted, WantedToken},
};

use super::{Device, DeviceError, DeviceOutcome, DeviceStep, SampleSpec, ScoreSpec};

/// What a GPU's device is built with.
#[derive(Clone, Copy, Debug)]
pub struct GpuSpec {
    pub limits: RuntimeLimits,
    pub dtype: Half,
    pub seats: usize,
    pub graphs: Graphs,
}

/// Which decode steps are captured as graphs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Graphs {
    None,
    /// One, to see what it takes.
    Largest,
    All,
}

/// A model on a GPU and what it keeps per seat.
pub struct GpuDevice {
    gpu: Arc<dyn Gpu>,
    model: Llama,
    step: StepBuffers,
    sampler: GpuSampler,
    inbox: Inbox,
    /// Rows of decode steps, rising, and their graphs.
    buckets: Vec<(usize, Option<Box<dyn Graph>>)>,
    /// What a graph took of the GPU's memory.
    graph_bytes: u64,
    packet: Packet,
    /// Alternatives that each seat's occupant wants to hear of, where it wants log-probabilities.
    tops: Vec<Option<u32>>,
    under_way: VecDeque<UnderWay>,
    uuid: Option<String>,
}

/// A step whose outcome is still to be collected.
struct UnderWay {
    pending: Box<dyn Pending>,
    draws: usize,
    /// Whether each draw wants its log-probability.
    drawn_wanted: Vec<bool>,
    wanted: Vec<Wanted>,
}

impl GpuDevice {
    /// `captured` hears of graphs: how many are done, and of how many.
    pub fn new(
        gpu: Arc<dyn Gpu>,
        config: ModelConfig,
        weights: ModelWeights,
        spec: GpuSpec,
        uuid: Option<String>,
        captured: &dyn Fn(usize, usize),
    ) -> std::result::Result<Self, ModelError> {
        let GpuSpec { limits, dtype, seats, graphs } = spec;
        let step = StepBuffers::new(&*gpu, step_limits(&limits, seats))?;
        let ModelConfig { heads, kv_heads, head_dim, vocab_size, .. } = config;
        // What is barred are end tokens, before a request's least output.
        let banned = config.eos_token_ids.len();
        let splits = Splits::new(&*gpu, seats, kv_heads, heads, head_dim)?;
        let place = GpuPlace { gpu: gpu.clone(), dtype, step: step.clone(), splits };
        let model = Llama::on_gpu(config, weights, limits, place)?;
        let sample_limits = SampleLimits {
            slots: seats,
            samples: seats,
            scores: limits.logits_rows_max,
            context_tokens: limits.context_tokens_max,
            banned,
        };
        let sampler =
            GpuSampler::new(&*gpu, sample_limits, vocab_size, model.gpu_logits()?, step.sampled)?;
        let words = step.packet_words_max() + sampler.packet_words_max();
        let inbox = Inbox::new(&*gpu, words)?;
        let rows_max = seats.min(limits.step_tokens_max).min(limits.logits_rows_max);
        let mut made = Self {
            gpu,
            model,
            step,
            sampler,
            inbox,
            buckets: buckets(rows_max).into_iter().map(|rows| (rows, None)).collect(),
            graph_bytes: 0,
            packet: Packet::default(),
            tops: vec![None; seats],
            under_way: VecDeque::new(),
            uuid,
        };
        match graphs {
            Graphs::None => {}
            Graphs::Largest => made.capture(made.buckets.len() - 1, captured)?,
            Graphs::All => made.capture(0, captured)?,
        }
        Ok(made)
    }

    /// The model again, without what was made for it.
    pub fn into_model(self) -> (ModelConfig, ModelWeights) {
        self.model.into_parts()
    }

    /// Bytes that graphs of all buckets take at most, by what one took; none where none was captured.
    pub fn graph_bytes(&self) -> u64 {
        self.graph_bytes * self.buckets.len() as u64
    }

    /// Captures buckets down to number `least`, the largest first: what it needs, the others need as
    /// well.
    fn capture(&mut self, least: usize, captured: &dyn Fn(usize, usize)) -> Result<()> {
        let all = self.buckets.len();
        for index in (least..all).rev() {
            let rows = self.buckets[index].0;
            let mut inputs = StepInputs { cu_seqlens_q: vec![0], ..StepInputs::default() };
            pad(&mut inputs, rows);
            // Once as it is: what is made at first use must not be made while capturing.
            self.packet.clear();
            self.step.pack(&inputs, &mut self.packet)?;
            self.sampler.pack_draws(&pads(rows), &mut self.packet)?;
            self.packet.send(&*self.gpu, &self.inbox)?;
            self.compute(&inputs, rows)?;
            let (before, _) = self.gpu.memory()?;
            let mut work = || self.compute(&inputs, rows);
            let graph = self.gpu.capture(&mut work)?;
            let (after, _) = self.gpu.memory()?;
            self.graph_bytes = self.graph_bytes.max(before.saturating_sub(after));
            self.buckets[index].1 = Some(graph);
            captured(all - index, all);
        }
        Ok(())
    }

    /// The forward, and `draws` tokens.
    fn compute(&self, inputs: &StepInputs, draws: usize) -> Result<()> {
        self.model.forward(inputs, &[])?;
        if draws > 0 { self.sampler.draw(&*self.gpu, draws) } else { Ok(()) }
    }

    fn run(&mut self, step: DeviceStep) -> Result<UnderWay> {
        let DeviceStep { begins, mut inputs, samples, scores } = step;
        for begin in &begins {
            self.tops[begin.slot.0 as usize] = begin.params.logprobs;
        }
        let (drawn_wanted, wanted) = self.wanted(&samples, &scores);
        let begins = begins.iter().map(|begin| Begin {
            slot: begin.slot.0,
            params: &begin.params,
            choice: begin.choice,
            prompt: &begin.prompt,
            output: &begin.output,
        });
        let draws = samples.iter().map(|spec| Draw {
            logits_row: spec.logits_row,
            slot: spec.slot.0,
            position: spec.position,
            banned: &spec.banned,
        });
        let mut draws: Vec<Draw<'_>> = draws.collect();
        let bucket = self.bucket_of(&inputs, samples.len());
        if let Some(index) = bucket {
            let rows = self.buckets[index].0;
            pad(&mut inputs, rows);
            draws.extend(pads(rows - draws.len()));
        }
        self.gpu.begin()?;
        self.sampler.seat(&*self.gpu, &self.inbox, &begins.collect::<Vec<_>>())?;
        self.packet.clear();
        self.step.pack(&inputs, &mut self.packet)?;
        self.sampler.pack_draws(&draws, &mut self.packet)?;
        self.sampler.pack_wanted(&wanted, &mut self.packet)?;
        self.packet.send(&*self.gpu, &self.inbox)?;
        match bucket.and_then(|index| self.buckets[index].1.as_ref()) {
            Some(graph) => graph.replay()?,
            None => self.compute(&inputs, draws.len())?,
        }
        if !wanted.is_empty() {
            self.sampler.score(&*self.gpu, wanted.len())?;
        }
        let (from, bytes) = self.sampler.results(samples.len(), wanted.len());
        let pending = self.gpu.end(from, bytes)?;
        Ok(UnderWay { pending, draws: samples.len(), drawn_wanted, wanted })
    }

    /// The bucket of a step that is one row of each sequence, which draws from its own logits.
    fn bucket_of(&self, inputs: &StepInputs, samples: usize) -> Option<usize> {
        let rows = inputs.tokens();
        let own = inputs.sample_rows.iter().enumerate().all(|(at, row)| at == *row as usize);
        let decode = rows == inputs.seqs()
            && inputs.sample_rows.len() == rows
            && own
            && samples <= rows
            && inputs.block_copies.is_empty();
        decode.then(|| self.buckets.iter().position(|(bucket, _)| *bucket >= rows)).flatten()
    }

    /// Which draws want their log-probability, and all that are wanted: theirs, then those of the prompt.
    fn wanted(&self, samples: &[SampleSpec], scores: &[ScoreSpec]) -> (Vec<bool>, Vec<Wanted>) {
        let tops = samples.iter().map(|spec| self.tops[spec.slot.0 as usize]);
        let mut wanted = Vec::new();
        for (draw, (spec, top)) in samples.iter().zip(tops.clone()).enumerate() {
            let of = WantedToken::Drawn { draw, slot: spec.slot.0 };
            wanted.extend(top.map(|top| Wanted { logits_row: spec.logits_row, of, top }));
        }
        wanted.extend(scores.iter().map(|spec| Wanted {
            logits_row: spec.logits_row,
            of: WantedToken::Given(spec.token),
            top: spec.top,
        }));
        (tops.map(|top| top.is_some()).collect(), wanted)
    }

    fn finish(&self, step: UnderWay) -> Result<DeviceOutcome> {
        let (bytes, device_ns) = step.pending.wait()?;
        let (tokens, found) = self.sampler.read(&bytes, step.draws, &step.wanted)?;
        let mut found = found.into_iter();
        let sampled = tokens.into_iter().zip(&step.drawn_wanted);
        let sampled = sampled.map(|(token, wanted)| {
            let logprobs = if *wanted { found.next() } else { None };
            (token, logprobs)
        });
        let sampled = sampled.collect();
        Ok(DeviceOutcome { sampled, scores: found.collect(), device_ns })
    }
}

impl Device for GpuDevice {
    fn launch(&mut self, step: DeviceStep) -> std::result::Result<(), DeviceError> {
        let under_way = self.run(step).map_err(|error| DeviceError(error.to_string()))?;
        self.under_way.push_back(under_way);
        Ok(())
    }

    fn collect(&mut self) -> std::result::Result<DeviceOutcome, DeviceError> {
        let step = self.under_way.pop_front();
        let step = step.ok_or_else(|| DeviceError("no step was launched".into()))?;
        self.finish(step).map_err(|error| DeviceError(error.to_string()))
    }

    fn gpu_uuid(&self) -> Option<String> {
        self.uuid.clone()
    }
}

fn step_limits(limits: &RuntimeLimits, seats: usize) -> StepLimits {
    StepLimits {
        tokens: limits.step_tokens_max,
        seqs: seats,
        logits_rows: limits.logits_rows_max,
        blocks_per_seq: limits.context_tokens_max.div_ceil(KV_BLOCK_TOKENS),
        // A choice that is forked off has one of its own.
        block_copies: seats,
        slots: seats,
    }
}

/// Batches of decode steps: few enough to capture, close enough that padding costs little.
fn buckets(rows_max: usize) -> Vec<usize> {
    let mut buckets = Vec::new();
    let mut rows = 1;
    while rows < rows_max {
        buckets.push(rows);
        rows += match rows {
            0..4 => rows,
            4..8 => 4,
            8..64 => 8,
            64..256 => 16,
            _ => 32,
        };
    }
    buckets.push(rows_max);
    buckets
}

/// Adds sequences that have nothing, and write nothing, up to `rows`.
fn pad(inputs: &mut StepInputs, rows: usize) {
    inputs.block_table_stride = inputs.block_table_stride.max(1);
    for _ in inputs.tokens()..rows {
        inputs.token_ids.push(0);
        inputs.last_token_slot.push(0);
        inputs.positions.push(0);
        inputs.slot_mapping.push(PAD_SLOT);
        inputs.cu_seqlens_q.push(inputs.token_ids.len() as u32);
        inputs.seq_lens.push(0);
        inputs.block_tables.resize(inputs.block_tables.len() + inputs.block_table_stride, 0);
        inputs.sample_rows.push(PAD);
    }
}

fn pads(count: usize) -> Vec<Draw<'static>> {
    let pad = || Draw { logits_row: 0, slot: PAD, position: 0, banned: &[] };
    std::iter::repeat_with(pad).take(count).collect()
}
