//! The whole engine on an emulated GPU: real weights answer, and draws of every kind are the same with
//! graphs and without, at both depths of the pipeline, and what the CPU draws.

use std::{sync::Arc, time::Duration};

use candela::{
    cli::assemble::{EngineSpec, assemble as assemble_engine},
    clock::Clock,
    engine::{
        EngineOptions, EngineWithoutThread, GenerateRequest, RequestStream, StopParams,
        StreamEvent,
        device::{CpuDevice, Device, DeviceError, GpuDevice, GpuSpec, gpu::Graphs},
    },
    ledger::Lease,
    model::{
        Family, Llama, ModelConfig, RuntimeLimits, WeightFiles, load, load::assemble, load_to,
    },
    ops::{CpuPool, KV_BLOCK_TOKENS, KvDtype, WeightPlace, gpu::Half},
    registry::ModelSource,
    sampling::SamplingParams,
    scheduler::Limits,
    text::Tokenizer,
    types::{ModelId, RequestId, TokenId},
};

use crate::{common, forward, gpu::EmulatedGpu};

const SEATS: usize = 6;
const CONTEXT: usize = 128;

fn runtime_limits() -> RuntimeLimits {
    RuntimeLimits {
        step_tokens_max: 32,
        logits_rows_max: 32,
        kv_blocks: 24,
        kv_dtype: KvDtype::F32,
        context_tokens_max: CONTEXT,
    }
}

fn options(pipeline_depth: usize) -> EngineOptions {
    let limits = runtime_limits();
    EngineOptions {
        model: ModelId::new("test"),
        limits: Limits {
            step_tokens_max: limits.step_tokens_max,
            running_seqs_max: SEATS,
            logits_rows_max: limits.logits_rows_max,
            block_tokens: KV_BLOCK_TOKENS,
        },
        kv_blocks: limits.kv_blocks,
        context_tokens_max: CONTEXT,
        waiting_requests_max: 64,
        pipeline_depth,
        stream_buffer_events_max: 256,
        client_stall_max: Duration::from_secs(60),
        eos_token_ids: Vec::new(),
        sliding_window: None,
        calibration: Duration::ZERO,
        metered: true,
    }
}

fn refused(error: impl std::fmt::Display) -> DeviceError {
    DeviceError(error.to_string())
}

/// What a request came to: its tokens with their log-probabilities and alternatives.
type Told = Vec<(TokenId, Option<f32>, Vec<TokenId>)>;

/// Submits all before the first step, so that steps are the same whatever the machine does, and reads
/// all of their choices.
fn run<D: Device>(
    tokenizer: &Tokenizer,
    pipeline_depth: usize,
    make: impl FnOnce() -> Result<D, DeviceError>,
    requests: &[GenerateRequest],
) -> Vec<Vec<Told>> {
    let device = make().expect("a device");
    let (options, clock) = (options(pipeline_depth), Clock::system());
    let engine = EngineWithoutThread::new(options, tokenizer.clone(), clock, device);
    let mut engine = engine.expect("starts");
    let submit = |request: &GenerateRequest| {
        let choices = request.choices as usize;
        (engine.handle.submit(request.clone(), Lease::unlimited()).expect("submitted"), choices)
    };
    let streams: Vec<_> = requests.iter().map(submit).collect();
    while engine.turn().expect("a step") {}
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let all = runtime.block_on(read(streams));
    engine.end();
    all
}

async fn read(streams: Vec<(RequestStream, usize)>) -> Vec<Vec<Told>> {
    let mut all = Vec::new();
    for (mut stream, choices) in streams {
        let mut told = vec![Told::new(); choices];
        loop {
            match stream.next().await.expect("an event") {
                StreamEvent::Delta { choice, tokens, .. } => {
                    let tokens = tokens.into_iter().map(|token| {
                        let of = token.logprobs;
                        let top = of.iter().flat_map(|of| of.top.iter().map(|(id, _)| *id));
                        (token.id, of.as_ref().map(|of| of.logprob), top.collect())
                    });
                    told[choice as usize].extend(tokens);
                }
                StreamEvent::Done(..) => break,
                StreamEvent::Error(error) => panic!("{error}"),
                _ => {}
            }
        }
        all.push(told);
    }
    all
}

fn request(prompt: Vec<TokenId>, max_tokens: u32, sampling: SamplingParams) -> GenerateRequest {
    GenerateRequest {
        id: RequestId::new("r"),
        prompt: prompt.into(),
        choices: 1,
        sampling,
        stop: StopParams { max_tokens, ..Default::default() },
        prompt_logprobs: None,
    }
}

fn real_tokenizer() -> Tokenizer {
    let limits = runtime_limits();
    let spec = EngineSpec {
        threads: 1,
        context_tokens_max: Some(CONTEXT),
        kv_cache_bytes: 16 << 20,
        kv_dtype: limits.kv_dtype,
        step_tokens_max: limits.step_tokens_max,
        running_seqs_max: 1,
        waiting_requests_max: 1,
        pipeline_depth: 1,
        stream_buffer_events_max: 16,
        client_stall_max: Duration::from_secs(1),
        calibration: Duration::ZERO,
        metered: false,
        gpu: None,
    };
    let source = ModelSource::Gguf { path: common::default_model() };
    let whole = assemble_engine(&ModelId::new("test"), &source, &spec, Clock::system());
    let whole = whole.expect("the model loads");
    whole.engine.handle.stop();
    whole.tokenizer
}

#[test]
fn real_weights_answer_as_on_the_cpu() {
    let path = common::default_model();
    let tokenizer = real_tokenizer();
    let prompt = tokenizer.encode("The capital of Portugal is", true).expect("tokens");
    let greedy = SamplingParams { temperature: 0.0, logprobs: Some(2), ..Default::default() };
    let asked = [request(prompt, 5, greedy)];
    let files = WeightFiles::Gguf(path);
    let on_gpu = || {
        let gpu = Arc::new(EmulatedGpu::new(2, 0));
        let place = WeightPlace::Gpu(&*gpu, Half::F16);
        let (config, weights) = load_to(&files, place, &|_, _| {}).map_err(refused)?;
        let spec =
            GpuSpec { limits: runtime_limits(), dtype: Half::F16, seats: 1, graphs: Graphs::All };
        GpuDevice::new(gpu, config, weights, spec, None, &|_, _| {}).map_err(refused)
    };
    let ours = run(&tokenizer, 2, on_gpu, &asked);
    let on_cpu = || {
        let (config, weights) = load(&files).map_err(refused)?;
        let pool = Arc::new(CpuPool::new(2).map_err(refused)?);
        let model = Llama::new(config, weights, runtime_limits(), pool).map_err(refused)?;
        Ok(CpuDevice::new(model, SEATS, Clock::system()))
    };
    let expected = run(&tokenizer, 2, on_cpu, &asked);
    let ids = |told: &[Vec<Told>]| -> Vec<(TokenId, Vec<TokenId>)> {
        told[0][0].iter().map(|(id, _, top)| (*id, top.clone())).collect()
    };
    let text = tokenizer.decode(&ours[0][0].iter().map(|told| told.0).collect::<Vec<_>>());
    assert!(text.starts_with(" Lisbon"), "{text}");
    assert_eq!(ids(&ours), ids(&expected), "{text}");
    for (ours, expected) in ours[0][0].iter().zip(&expected[0][0]) {
        let (ours, expected) = (ours.1.expect("wanted"), expected.1.expect("wanted"));
        assert!((ours - expected).abs() < 0.01, "log-probability {ours}, not {expected}");
    }
}

/// Every kind of sampling at once, with more sequences than seats, choices, penalties and bans.
fn mixed(vocab: u32) -> Vec<GenerateRequest> {
    let base = SamplingParams { seed: 3, ..Default::default() };
    let samplings = [
        SamplingParams { temperature: 0.0, logprobs: Some(3), ..base.clone() },
        SamplingParams { temperature: 1.3, ..base.clone() },
        SamplingParams { top_k: 7, temperature: 0.8, ..base.clone() },
        SamplingParams { top_p: 0.7, logprobs: Some(20), ..base.clone() },
        SamplingParams { min_p: 0.2, presence_penalty: 0.5, ..base.clone() },
        SamplingParams { frequency_penalty: 1.5, repetition_penalty: 1.2, ..base.clone() },
        SamplingParams { logit_bias: vec![(5, 4.0), (9, -100.0)].into(), ..base.clone() },
        SamplingParams { temperature: 0.0, repetition_penalty: 1.4, ..base },
    ];
    let each = samplings.into_iter().enumerate().map(|(index, sampling)| {
        let prompt = (0..9 + 5 * index as u32).map(|at| (at * 37 + index as u32) % vocab);
        let mut request = request(prompt.collect(), 6 + index as u32, sampling);
        request.choices = if index == 1 { 3 } else { 1 };
        request.prompt_logprobs = (index == 2).then_some(2);
        request
    });
    each.collect()
}

fn tiny() -> ModelConfig {
    let one_layer = forward::config(Family::Qwen2);
    ModelConfig { layers: 1, layer_windows: vec![None], ..one_layer }
}

#[test]
fn graphs_and_depth_change_no_token() {
    let tokenizer = real_tokenizer();
    let mut seen: Vec<Vec<Vec<Told>>> = Vec::new();
    for (graphs, depth) in [(Graphs::None, 1), (Graphs::All, 1), (Graphs::All, 2)] {
        let on_gpu = || {
            let gpu = Arc::new(EmulatedGpu::new(0, 2));
            let source = forward::Random { seed: 8, dtype: Half::F16 };
            let weights = assemble(&tiny(), &source, WeightPlace::Gpu(&*gpu, Half::F16));
            let spec = GpuSpec { limits: runtime_limits(), dtype: Half::F16, seats: SEATS, graphs };
            GpuDevice::new(gpu, tiny(), weights.map_err(refused)?, spec, None, &|_, _| {})
                .map_err(refused)
        };
        seen.push(run(&tokenizer, depth, on_gpu, &mixed(tiny().vocab_size as u32)));
    }
    assert_eq!(seen[0], seen[1], "graphs");
    // A row that is in one step with a prompt is summed in another order than among decodes alone.
    let ids = |all: &[Vec<Told>]| -> Vec<Vec<TokenId>> {
        all.iter().flatten().map(|told| told.iter().map(|one| one.0).collect()).collect()
    };
    assert_eq!(ids(&seen[0]), ids(&seen[2]), "depth 2");
    let on_cpu = || {
        let source = forward::Random { seed: 8, dtype: Half::F16 };
        let weights = assemble(&tiny(), &source, WeightPlace::Cpu).map_err(refused)?;
        let pool = Arc::new(CpuPool::new(2).map_err(refused)?);
        let model = Llama::new(tiny(), weights, runtime_limits(), pool).map_err(refused)?;
        Ok(CpuDevice::new(model, SEATS, Clock::system()))
    };
    let expected = run(&tokenizer, 2, on_cpu, &mixed(tiny().vocab_size as u32));
    // Logits differ by their rounding, and with them a draw here and there: most are equal, and up to
    // the first that differs log-probabilities are close.
    let (mut equal, mut all) = (0, 0);
    for (ours, expected) in seen[0].iter().flatten().zip(expected.iter().flatten()) {
        assert_eq!(ours.len(), expected.len());
        let same = ours.iter().zip(expected).take_while(|(ours, expected)| ours.0 == expected.0);
        for (ours, expected) in same.clone() {
            if let (Some(ours), Some(expected)) = (ours.1, expected.1) {
                assert!((ours - expected).abs() < 0.02, "{ours}, not {expected}");
            }
        }
        (equal, all) = (equal + same.count(), all + ours.len());
    }
    assert!(equal * 10 >= all * 9, "{equal} of {all} tokens are those of the CPU");
}

/// A fault that the driver tells when a step is waited for: whoever runs hears of it, and nobody else is
/// let in.
#[test]
fn a_lost_device_ends_what_runs() {
    let tokenizer = real_tokenizer();
    let gpu = Arc::new(EmulatedGpu::new(0, 0));
    gpu.steps_left.store(3, std::sync::atomic::Ordering::Relaxed);
    let source = forward::Random { seed: 8, dtype: Half::F16 };
    let weights = assemble(&tiny(), &source, WeightPlace::Gpu(&*gpu, Half::F16)).expect("fits");
    let limits = runtime_limits();
    let spec = GpuSpec { limits, dtype: Half::F16, seats: SEATS, graphs: Graphs::None };
    let device = GpuDevice::new(gpu, tiny(), weights, spec, None, &|_, _| {}).expect("fits");
    let engine = EngineWithoutThread::new(options(2), tokenizer, Clock::system(), device);
    let mut engine = engine.expect("starts");
    let asked = || request(vec![1, 2, 3], 20, SamplingParams::default());
    let submit =
        |engine: &EngineWithoutThread<GpuDevice>| engine.handle.submit(asked(), Lease::unlimited());
    let mut stream = submit(&engine).expect("submitted");
    let lost = loop {
        match engine.turn() {
            Ok(more) => assert!(more, "the request ended before the device did"),
            Err(error) => break error.to_string(),
        }
    };
    assert!(lost.contains("illegal memory access"), "{lost}");
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let told = runtime.block_on(async {
        loop {
            match stream.next().await.expect("an event") {
                StreamEvent::Error(error) => break error.to_string(),
                StreamEvent::Done(..) => panic!("the request ended as if nothing had happened"),
                _ => {}
            }
        }
    });
    assert!(!told.is_empty());
    assert!(!engine.handle.is_alive());
    assert!(submit(&engine).is_err(), "nobody else is let in");
}
