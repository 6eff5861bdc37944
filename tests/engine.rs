//! The real engine on real weights: right answers, and the same tokens whatever else runs.

mod common;

use std::{cell::Cell, time::Duration};

use candela::{
    cli::assemble::{Assembled, EngineSpec, assemble},
    clock::Clock,
    engine::{GenerateRequest, RequestStream, StopParams, StreamEvent},
    ledger::Lease,
    ops::KvDtype,
    registry::ModelSource,
    sampling::SamplingParams,
    text::ChatMessage,
    types::{ModelId, RequestId},
};

fn start(change: impl FnOnce(&mut EngineSpec)) -> Assembled {
    let mut spec = EngineSpec {
        threads: 2,
        context_tokens_max: Some(512),
        kv_cache_bytes: 256 << 20,
        kv_dtype: KvDtype::F32,
        step_tokens_max: 128,
        running_seqs_max: 32,
        waiting_requests_max: 64,
        pipeline_depth: 2,
        stream_buffer_events_max: 256,
        client_stall_max: Duration::from_secs(60),
        calibration: Duration::ZERO,
        metered: true,
        gpu: None,
    };
    change(&mut spec);
    let source = ModelSource::Gguf { path: common::default_model() };
    assemble(&ModelId::new("test"), &source, &spec, Clock::system()).expect("the model loads")
}

fn chat(model: &Assembled, text: &str) -> Vec<u32> {
    let message = ChatMessage { role: "user".into(), content: text.into(), name: None };
    let template = model.template.as_ref().expect("a chat template");
    template.encode(&model.tokenizer, &[message], true).expect("tokens")
}

fn submit(model: &Assembled, prompt: Vec<u32>, choices: u32, temperature: f32) -> RequestStream {
    let stop = StopParams { max_tokens: 24, ..Default::default() };
    submit_until(model, prompt, choices, temperature, stop)
}

fn submit_until(
    model: &Assembled,
    prompt: Vec<u32>,
    choices: u32,
    temperature: f32,
    stop: StopParams,
) -> RequestStream {
    let request = GenerateRequest {
        id: RequestId::new("r"),
        prompt: prompt.into(),
        choices,
        sampling: SamplingParams { temperature, seed: 7, logprobs: Some(0), ..Default::default() },
        stop,
        prompt_logprobs: None,
    };
    model.engine.handle.submit(request, Lease::unlimited()).expect("submitted")
}

/// Text and token ids of every choice.
async fn read(mut stream: RequestStream, choices: usize) -> Vec<(String, Vec<u32>)> {
    let mut out = vec![(String::new(), Vec::new()); choices];
    while let Some(event) = stream.next().await {
        match event {
            StreamEvent::Delta { choice, text, tokens, .. } => {
                out[choice as usize].0.push_str(&text);
                out[choice as usize].1.extend(tokens.iter().map(|token| token.id));
            }
            StreamEvent::Done(..) => return out,
            StreamEvent::Error(error) => panic!("{error}"),
            _ => {}
        }
    }
    panic!("the stream ended without a last event");
}

/// Of an f32 cache: too few for all of the prompts at once.
const FEW_BLOCKS_BYTES: usize = 15 << 20;

const PROMPTS: [&str; 6] = [
    "What is the capital of Portugal?",
    "Hi",
    "List three colours.",
    "Write one sentence about the sea, with the words salt, wind and sail in it, please.",
    "2 + 2 =",
    "Translate 'good morning' into French and explain how it is pronounced, step by step.",
];

#[tokio::test]
async fn a_real_model_answers() {
    let model = start(|_| {});
    let prompt = model.tokenizer.encode("The capital of Portugal is", true).expect("tokens");
    let answer = read(submit(&model, prompt, 1, 0.0), 1).await;
    assert!(answer[0].0.starts_with(" Lisbon"), "{answer:?}");
    model.engine.handle.stop();
}

#[tokio::test]
async fn tokens_do_not_depend_on_batch_chunks_depth_or_recompute() {
    check_tokens(KvDtype::F32).await;
}

#[tokio::test]
async fn nor_do_they_with_an_f16_cache() {
    check_tokens(KvDtype::F16).await;
}

async fn check_tokens(kv_dtype: KvDtype) {
    let mut solo = Vec::new();
    let model = start(|spec| {
        spec.kv_dtype = kv_dtype;
        spec.pipeline_depth = 1;
    });
    for text in PROMPTS {
        for (choices, temperature) in [(1, 0.0), (3, 1.0)] {
            let prompt = chat(&model, text);
            solo.push(read(submit(&model, prompt, choices, temperature), choices as usize).await);
        }
    }
    model.engine.handle.stop();
    type Change = fn(&mut EngineSpec);
    let changes: [(&str, Change); 4] = [
        ("batched", |_| {}),
        ("chunks of 7, depth 1", |spec| {
            spec.step_tokens_max = 39;
            spec.pipeline_depth = 1;
        }),
        ("one thread", |spec| spec.threads = 1),
        ("few blocks", |spec| spec.kv_cache_bytes = FEW_BLOCKS_BYTES),
    ];
    for (name, change) in changes {
        let model = start(|spec| {
            change(spec);
            spec.kv_dtype = kv_dtype;
            if kv_dtype == KvDtype::F16 {
                // As many blocks in half the memory.
                spec.kv_cache_bytes /= 2;
            }
            spec.context_tokens_max = Some(128);
        });
        let mut streams = Vec::new();
        for text in PROMPTS {
            for (choices, temperature) in [(1, 0.0), (3, 1.0)] {
                let prompt = chat(&model, text);
                streams.push((submit(&model, prompt, choices, temperature), choices as usize));
            }
        }
        for ((stream, choices), expected) in streams.into_iter().zip(&solo) {
            assert_eq!(&read(stream, choices).await, expected, "{name}");
        }
        let snapshot = model.engine.handle.snapshot();
        if name == "few blocks" {
            assert!(snapshot.preemptions > 0, "nothing was recomputed: {snapshot:?}");
        }
        model.engine.handle.stop();
        model.engine.thread.join().expect("the engine ends in peace");
        let snapshot = model.engine.handle.snapshot();
        assert_eq!((snapshot.kv_blocks_used, snapshot.live_seqs), (0, 0), "{name}");
    }
}

const STAYING: usize = 32;
const OTHERS: usize = 6;

/// Request `index`: no two have the same prompt, and half of them sample. Those that stay end
/// together, late.
fn ask(model: &Assembled, index: usize) -> RequestStream {
    let text = format!("{index}. {}", PROMPTS[index % PROMPTS.len()].repeat(1 + index % 3));
    let prompt = model.tokenizer.encode(&text, true).expect("tokens");
    let max_tokens = if index < STAYING { 24 } else { 8 };
    let stop = StopParams { max_tokens, ignore_eos: true, ..Default::default() };
    submit_until(model, prompt, 1, (index % 2) as f32, stop)
}

/// Others beside those that stay, until `done`: of three one is read to its end, one leaves after
/// some tokens, one at once. Returns how many left, and the most sequences that ran together.
async fn come_and_go(
    model: &Assembled,
    solo: &[Vec<(String, Vec<u32>)>],
    done: &Cell<bool>,
) -> (u64, usize) {
    let (mut left, mut running_max) = (0, 0);
    for round in 0.. {
        let streams: Vec<_> = (0..OTHERS).map(|other| ask(model, STAYING + other)).collect();
        for (other, mut stream) in streams.into_iter().enumerate() {
            if (other + round) % 3 == 0 {
                assert_eq!(read(stream, 1).await, solo[STAYING + other], "other {other}");
                continue;
            }
            for _ in 0..(other + round) % 3 * round % 7 {
                stream.next().await;
            }
            drop(stream);
            left += 1;
            running_max = running_max.max(model.engine.handle.snapshot().running_seqs);
        }
        if done.get() {
            break;
        }
    }
    (left, running_max)
}

#[tokio::test]
async fn a_full_batch_with_others_coming_and_going_gives_solo_tokens() {
    let model = start(|spec| (spec.pipeline_depth, spec.threads) = (1, 1));
    let mut solo = Vec::new();
    for index in 0..STAYING + OTHERS {
        solo.push(read(ask(&model, index), 1).await);
    }
    model.engine.handle.stop();
    // Steps smaller than what arrives, so that prompts are cut.
    let model = start(|spec| {
        spec.running_seqs_max = STAYING + OTHERS / 2;
        spec.step_tokens_max = 160;
    });
    let done = Cell::new(false);
    let streams: Vec<_> = (0..STAYING).map(|index| ask(&model, index)).collect();
    let stay = async {
        for (index, stream) in streams.into_iter().enumerate() {
            assert_eq!(read(stream, 1).await, solo[index], "staying {index}");
        }
        done.set(true);
    };
    let ((), (left, running_max)) = tokio::join!(stay, come_and_go(&model, &solo, &done));
    assert!(running_max > STAYING, "at most {running_max} ran together");
    model.engine.handle.stop();
    model.engine.thread.join().expect("the engine ends in peace");
    let end = model.engine.handle.snapshot();
    assert!(
        left > 0 && end.finished_abort > 0 && end.finished_abort <= left,
        "{left} left: {end:?}"
    );
    assert_eq!((end.kv_blocks_used, end.live_seqs), (0, 0));
}

#[tokio::test]
async fn a_dropped_stream_frees_everything() {
    let model = start(|_| {});
    let streams: Vec<_> =
        PROMPTS.iter().map(|text| submit(&model, chat(&model, text), 2, 1.0)).collect();
    drop(streams);
    for _ in 0..200 {
        let snapshot = model.engine.handle.snapshot();
        if snapshot.finished_abort == 12 && snapshot.kv_blocks_used == 0 {
            return model.engine.handle.stop();
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("left over: {:?}", model.engine.handle.snapshot());
}

#[tokio::test]
async fn a_short_context_is_calibrated_within_itself() {
    for tokens in [32, 100] {
        let model = start(|spec| {
            spec.context_tokens_max = Some(tokens);
            spec.calibration = Duration::from_millis(50);
        });
        let prompt = model.tokenizer.encode("The capital of Portugal is", true).expect("tokens");
        let answer = read(submit(&model, prompt, 1, 0.0), 1).await;
        assert!(answer[0].0.starts_with(" Lisbon"), "{tokens}: {answer:?}");
        model.engine.handle.stop();
    }
}
