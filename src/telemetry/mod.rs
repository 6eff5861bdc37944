//! What Prometheus reads. Names are vLLM's where vLLM has the same measure, so that its dashboards
//! work; the rest begins with `candela:`.

mod gpus;

use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, Opts, Registry, TextEncoder,
    core::Collector,
};

use crate::{
    engine::EngineSnapshot,
    gpu::GpuSnapshot,
    meter::{Report, Usage},
};

/// Upper bounds in seconds.
const TTFT_BUCKETS_S: [f64; 15] =
    [0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0];
const INTER_TOKEN_BUCKETS_S: [f64; 13] =
    [0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5];
const END_TO_END_BUCKETS_S: [f64; 13] =
    [0.1, 0.3, 0.5, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0];

/// Histograms of what clients feel, in the server's measure.
pub struct Metrics {
    model: String,
    registry: Registry,
    first_token: Histogram,
    inter_token: Histogram,
    end_to_end: Histogram,
}

impl Metrics {
    /// # Errors
    /// When the model's name is no label value, which prometheus judges.
    pub fn new(model: &str) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let options = HistogramOpts::new(name, help).const_label("model_name", model);
            let histogram = Histogram::with_opts(options.buckets(buckets.to_vec()))?;
            registry.register(Box::new(histogram.clone()))?;
            prometheus::Result::Ok(histogram)
        };
        Ok(Self {
            model: model.to_owned(),
            first_token: histogram(
                "vllm:time_to_first_token_seconds",
                "From receiving a request to its first output.",
                &TTFT_BUCKETS_S,
            )?,
            inter_token: histogram(
                "vllm:inter_token_latency_seconds",
                "Between outputs of one choice.",
                &INTER_TOKEN_BUCKETS_S,
            )?,
            end_to_end: histogram(
                "vllm:e2e_request_latency_seconds",
                "From receiving a request to its last output.",
                &END_TO_END_BUCKETS_S,
            )?,
            registry,
        })
    }

    pub fn first_token(&self, ns: u64) {
        self.first_token.observe(ns as f64 / 1e9);
    }

    pub fn inter_token(&self, ns: u64) {
        self.inter_token.observe(ns as f64 / 1e9);
    }

    pub fn end_to_end(&self, ns: u64) {
        self.end_to_end.observe(ns as f64 / 1e9);
    }

    /// All metrics in Prometheus' text format; `tasks` is the number of live async tasks, `device` who
    /// used the device lately, by tenant: its owners are bounded, so these series are. `gpus` are the
    /// machine's, whichever computes.
    pub fn render(
        &self,
        engine: &EngineSnapshot,
        tasks: usize,
        device: &Report,
        gpus: &GpuSnapshot,
    ) -> prometheus::Result<String> {
        let snapshot = Registry::new();
        let options = |name: &str, help: &str| {
            Opts::new(name, help).const_label("model_name", self.model.as_str())
        };
        let add = |collector: Box<dyn Collector>| snapshot.register(collector);
        let gauge = |name: &str, help: &str, value: f64| {
            let gauge = Gauge::with_opts(options(name, help))?;
            gauge.set(value);
            add(Box::new(gauge))
        };
        let counter = |options: Opts, value: u64| {
            let counter = IntCounter::with_opts(options)?;
            counter.inc_by(value);
            add(Box::new(counter))
        };
        let used = engine.kv_blocks_used as f64 / engine.kv_blocks_total.max(1) as f64;
        gauge("vllm:num_requests_running", "Sequences in the batch.", engine.running_seqs as f64)?;
        let waiting = engine.waiting_requests as f64;
        gauge("vllm:num_requests_waiting", "Requests not yet in the batch.", waiting)?;
        gauge("vllm:kv_cache_usage_perc", "KV blocks in use, 1 is all of them.", used)?;
        let live = engine.live_seqs as f64;
        gauge("candela:live_sequences", "Sequences that hold any state.", live)?;
        let blocks = engine.kv_blocks_used as f64;
        gauge("candela:kv_blocks_used", "KV blocks in use.", blocks)?;
        gauge("candela:async_tasks", "Live tasks of the HTTP side.", tasks as f64)?;
        for (name, help, value) in [
            ("vllm:prompt_tokens_total", "Prompt tokens of ended requests.", engine.prompt_tokens),
            ("vllm:generation_tokens_total", "Tokens generated.", engine.generation_tokens),
            ("vllm:num_preemptions_total", "Sequences that lost their blocks.", engine.preemptions),
            ("candela:recomputed_tokens_total", "Tokens computed again.", engine.recomputed_tokens),
            ("candela:discarded_tokens_total", "Drawn past an end.", engine.discarded_tokens),
            ("candela:engine_steps_total", "Steps of the engine.", engine.steps),
        ] {
            counter(options(name, help), value)?;
        }
        for (reason, value) in [
            ("stop", engine.finished_eos + engine.finished_stop),
            ("length", engine.finished_length),
            ("abort", engine.finished_abort),
            ("error", engine.finished_error),
        ] {
            let name = options("vllm:request_success_total", "Ended choices by finish reason.");
            counter(name.const_label("finished_reason", reason), value)?;
        }
        for (name, help, ns) in [
            (
                "candela:device_busy_seconds_total",
                "Time the device spent in steps.",
                engine.device_busy_ns,
            ),
            (
                "candela:device_written_off_seconds_total",
                "Device time billed by time that was not held, and so is the operator's loss.",
                engine.device_written_off_ns,
            ),
        ] {
            let seconds = prometheus::Counter::with_opts(options(name, help))?;
            seconds.inc_by(ns as f64 / 1e9);
            add(Box::new(seconds))?;
        }
        self.add_device(&snapshot, device)?;
        gpus::add(&snapshot, gpus)?;
        let mut families = self.registry.gather();
        families.extend(snapshot.gather());
        let mut text = Vec::new();
        TextEncoder::new().encode(&families, &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Shares of the device's time, which make 1, and what else was used in that time.
    fn add_device(&self, to: &Registry, device: &Report) -> prometheus::Result<()> {
        let wall_ns = device.total().device_ns.max(1) as f64;
        type Measure<'a> = &'a dyn Fn(&Usage) -> f64;
        let measures: [(&str, &str, Measure<'_>); 5] = [
            ("candela:device_share", "Share of the device's time, lately.", &|usage| {
                usage.device_ns as f64 / wall_ns
            }),
            ("candela:device_joules", "Energy of the last minute.", &|usage| {
                usage.energy.total_uj() as f64 / 1e6
            }),
            ("candela:device_tokens", "Tokens read and generated in the last minute.", &|usage| {
                (usage.tokens.input + usage.tokens.cached_input + usage.tokens.output) as f64
            }),
            ("candela:device_kv_block_seconds", "KV blocks held, times how long.", &|usage| {
                usage.kv_block_ns as f64 / 1e9
            }),
            ("candela:device_cost_usd", "What was charged in the last minute.", &|usage| {
                usage.tokens.cost.0 as f64 / 1e9
            }),
        ];
        for (name, help, measure) in measures {
            let options = Opts::new(name, help).const_label("model_name", self.model.as_str());
            let gauges = GaugeVec::new(options, &["kind", "tenant"])?;
            let add = |kind: &str, tenant: &str, usage: &Usage| {
                gauges.with_label_values(&[kind, tenant]).add(measure(usage));
            };
            device.rows.iter().for_each(|(tenant, usage)| add("tenant", tenant, usage));
            add("other", "", &device.other);
            device.overhead.iter().for_each(|usage| add("overhead", "", usage));
            add("foreign", "", &device.foreign);
            add("idle", "", &device.idle);
            to.register(Box::new(gauges))?;
        }
        Ok(())
    }
}
