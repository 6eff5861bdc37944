//! What accounting costs: decode throughput with metering, caps, budgets and the ledger, against
//! without any of them. Both engines run the same weights in one process, in turns.
//!
//! `CANDELA_BENCH_MODEL` names a GGUF file. The ledger lies in the temporary directory (`TMPDIR`).

#[allow(dead_code, reason = "made for tests, which use all of it")]
#[path = "../tests/common/books.rs"]
mod books;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use candela::{
    cli::assemble::{Assembled, EngineSpec, assemble},
    clock::Clock,
    engine::{GenerateRequest, RequestStream, StopParams, StreamEvent},
    ledger::{
        Lease, Ledger, LedgerOptions, Opening,
        db::{Db, Sqlite},
        lease::LeaseLimits,
    },
    ops::KvDtype,
    registry::ModelSource,
    sampling::SamplingParams,
    types::{ModelId, NanoUsd, RequestId},
};

const PROMPT_TOKENS: usize = 16;
const OUTPUT_TOKENS: u32 = 128;
/// Rounds of one measurement: off, on, and off again, whose ratio to the first says how noisy the
/// machine is. Who begins changes from round to round.
const ROUNDS: usize = 15;
const STREAMS: [usize; 2] = [1, 8];
/// Far above what is spent.
const LIMIT_NANO: i128 = 1_000_000_000_000_000;

fn main() {
    let path = std::env::var_os("CANDELA_BENCH_MODEL").map(PathBuf::from);
    let path = path.expect("CANDELA_BENCH_MODEL names a GGUF file");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("ledger.sqlite");
    let open = || -> Box<dyn Db> { Box::new(Sqlite::open(&file, Clock::system()).expect("opens")) };
    set_up(&mut *open());
    let options = LedgerOptions {
        replica: "bench".into(),
        name: "bench".into(),
        exclusive: true,
        replica_ttl: Duration::from_secs(10),
        clock_error_max: Duration::from_secs(2),
        lease: LeaseLimits { outstanding_tokens_max: 256, wait_max: Duration::from_secs(5) },
    };
    let ledger = Ledger::start(open(), Clock::system(), options, |_| {}).expect("starts");
    let (on, off) = (engine(&path, true), engine(&path, false));
    println!("| streams | off tok/s | on tok/s | on / off: median, quartiles | off / off |");
    println!("| ---: | ---: | ---: | ---: | ---: |");
    let mut number = 0;
    for streams in STREAMS {
        let mut rounds = Vec::new();
        // The first round warms both up.
        for round in 0..=ROUNDS {
            let mut rates = [0.0; 3];
            for turn in 0..rates.len() {
                let side = (turn + round) % rates.len();
                let is_on = side == 1;
                let leases = (0..streams).map(|_| {
                    if !is_on {
                        return Lease::unlimited();
                    }
                    number += 1;
                    runtime.block_on(ledger.ledger.open(opening(number))).expect("admitted")
                });
                let leases = leases.collect();
                rates[side] = runtime.block_on(decode(if is_on { &on } else { &off }, leases));
            }
            rounds.push(rates);
        }
        rounds.remove(0);
        report(streams, &rounds);
    }
    // Rows, sums and entries are those of a server.
    books::stop(ledger);
    books::prove(&mut *open());
}

fn engine(path: &std::path::Path, metered: bool) -> Assembled {
    let spec = EngineSpec {
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        context_tokens_max: Some(512),
        kv_cache_bytes: 256 << 20,
        kv_dtype: KvDtype::F16,
        step_tokens_max: 512,
        running_seqs_max: 32,
        waiting_requests_max: 64,
        pipeline_depth: 2,
        stream_buffer_events_max: 256,
        client_stall_max: Duration::from_secs(60),
        calibration: Duration::from_secs(1),
        metered,
        gpu: None,
    };
    let source = ModelSource::Gguf { path: path.to_owned() };
    assemble(&ModelId::new(books::MODEL), &source, &spec, Clock::system()).expect("loads")
}

/// Budgets at three levels.
fn set_up(db: &mut dyn Db) {
    books::set_up(db, &["t"]);
    for scope in ["tenant:t", "org:acme", "global"] {
        books::limit(db, scope, LIMIT_NANO);
    }
}

/// With a cap.
fn opening(number: usize) -> Opening {
    let cap = Some(NanoUsd(1_000_000_000));
    Opening { cap, ..books::opening("t", &format!("r{number}"), PROMPT_TOKENS as u64) }
}

/// Tokens a second from the first token of the last stream to the last token of all.
async fn decode(model: &Assembled, leases: Vec<Lease>) -> f64 {
    let streams: Vec<RequestStream> = leases
        .into_iter()
        .enumerate()
        .map(|(index, lease)| {
            let request = GenerateRequest {
                id: RequestId::new(format!("r{index}")),
                prompt: (0..PROMPT_TOKENS).map(|at| 1000 + (at * 37 + index) as u32).collect(),
                choices: 1,
                sampling: SamplingParams::default(),
                stop: StopParams {
                    max_tokens: OUTPUT_TOKENS,
                    ignore_eos: true,
                    ..StopParams::default()
                },
                prompt_logprobs: None,
            };
            model.engine.handle.submit(request, lease).expect("submitted")
        })
        .collect();
    let times = futures_util::future::join_all(streams.into_iter().map(read)).await;
    let (begun, ended): (Vec<Instant>, Vec<Instant>) = times.into_iter().unzip();
    let count = begun.len();
    let begun = begun.into_iter().max().expect("a stream");
    let ended = ended.into_iter().max().expect("a stream");
    (count as u32 * (OUTPUT_TOKENS - 1)) as f64 / (ended - begun).as_secs_f64()
}

/// When the first and the last token came.
async fn read(mut stream: RequestStream) -> (Instant, Instant) {
    let (mut first, mut last) = (None, Instant::now());
    while let Some(event) = stream.next().await {
        match event {
            StreamEvent::Delta { .. } => {
                first.get_or_insert_with(Instant::now);
            }
            StreamEvent::Finish { .. } => last = Instant::now(),
            StreamEvent::Error(error) => panic!("{error}"),
            _ => {}
        }
    }
    (first.unwrap_or(last), last)
}

/// Rates of a round are those of off, on, and off once more.
fn report(streams: usize, rounds: &[[f64; 3]]) {
    let sorted = |of: &dyn Fn(&[f64; 3]) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        [0.25, 0.5, 0.75].map(|share| values[((values.len() - 1) as f64 * share).round() as usize])
    };
    let ([_, off, _], [_, on, _]) = (sorted(&|round| round[0]), sorted(&|round| round[1]));
    let show = |[low, middle, high]: [f64; 3]| format!("{middle:.3}, {low:.3} to {high:.3}");
    // Against the mean of both runs without.
    let ratio = show(sorted(&|[off, on, again]| 2.0 * on / (off + again)));
    let control = show(sorted(&|[off, _, again]| again / off));
    println!("| {streams} | {off:.0} | {on:.0} | {ratio} | {control} |");
}
