//! From the times of single requests to what the run says, with `vllm bench serve`'s definitions:
//!
//! - TTFT: from sending the request to its first token.
//! - TPOT: (E2E - TTFT) / (output tokens - 1), over requests with two tokens or more.
//! - ITL: every gap between two chunks of one stream, over all streams.
//! - E2E: from sending the request to its last chunk.
//! - goodput: requests per second that meet every limit; a single token's TPOT counts as zero.

use std::{collections::BTreeMap, fmt::Write, time::Duration};

use serde::Serialize;

use super::{args::Slo, stats::Summary};

/// Different errors shown; a broken server would otherwise fill the report.
const ERROR_KINDS_MAX: usize = 8;

/// One request that was answered in full.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub ttft: Duration,
    pub e2e: Duration,
    pub gaps: Vec<Duration>,
    pub input_tokens: u64,
    pub output_tokens: u64,
    /// False when the server sent no usage and the chunks were counted.
    pub has_usage: bool,
}

#[derive(Debug, Serialize)]
pub struct Report {
    pub model: String,
    pub completed: usize,
    pub failed: usize,
    /// How often each error was seen.
    pub errors: BTreeMap<String, usize>,
    /// Answers without usage: their tokens are counted by chunks, their prompts not at all.
    pub without_usage: usize,
    pub duration_s: f64,
    pub input_tokens: u64,
    pub output_tokens: u64,
    pub request_throughput_per_s: f64,
    pub output_throughput_tokens_per_s: f64,
    pub total_throughput_tokens_per_s: f64,
    /// None without limits to meet.
    pub goodput_requests_per_s: Option<f64>,
    pub ttft_ms: Summary,
    pub tpot_ms: Summary,
    pub itl_ms: Summary,
    pub e2el_ms: Summary,
}

impl Report {
    pub fn new(
        model: String,
        results: Vec<Result<Sample, String>>,
        duration: Duration,
        slo: Slo,
    ) -> Self {
        let (mut samples, mut errors) = (Vec::new(), BTreeMap::new());
        for result in results {
            match result {
                Ok(sample) => samples.push(sample),
                Err(error) => *errors.entry(error).or_insert(0) += 1,
            }
        }
        let duration_s = duration.as_secs_f64();
        let rate = |count: u64| if duration_s > 0.0 { count as f64 / duration_s } else { 0.0 };
        let input_tokens = samples.iter().map(|sample| sample.input_tokens).sum();
        let output_tokens = samples.iter().map(|sample| sample.output_tokens).sum();
        let good = samples.iter().filter(|sample| is_good(sample, slo)).count();
        Self {
            model,
            completed: samples.len(),
            failed: errors.values().sum(),
            errors,
            without_usage: samples.iter().filter(|sample| !sample.has_usage).count(),
            duration_s,
            input_tokens,
            output_tokens,
            request_throughput_per_s: rate(samples.len() as u64),
            output_throughput_tokens_per_s: rate(output_tokens),
            total_throughput_tokens_per_s: rate(input_tokens + output_tokens),
            goodput_requests_per_s: (!slo.is_empty()).then(|| rate(good as u64)),
            ttft_ms: Summary::of(samples.iter().map(|sample| ms(sample.ttft)).collect()),
            tpot_ms: Summary::of(samples.iter().filter_map(tpot_ms).collect()),
            itl_ms: Summary::of(
                samples.iter().flat_map(|s| s.gaps.iter().copied().map(ms)).collect(),
            ),
            e2el_ms: Summary::of(samples.iter().map(|sample| ms(sample.e2e)).collect()),
        }
    }

    /// The report for people.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let mut line = |name: &str, value: String| {
            // Writing to a string cannot fail.
            let _ = writeln!(out, "{name:<32}{value:>14}");
        };
        line("model", format!(" {}", self.model));
        line("completed requests", self.completed.to_string());
        line("failed requests", self.failed.to_string());
        line("duration (s)", format!("{:.2}", self.duration_s));
        line("input tokens", self.input_tokens.to_string());
        line("output tokens", self.output_tokens.to_string());
        line("requests per second", format!("{:.2}", self.request_throughput_per_s));
        line("output tokens per second", format!("{:.2}", self.output_throughput_tokens_per_s));
        line("all tokens per second", format!("{:.2}", self.total_throughput_tokens_per_s));
        if let Some(goodput) = self.goodput_requests_per_s {
            line("good requests per second", format!("{goodput:.2}"));
        }
        let _ = writeln!(
            out,
            "\n{:<6}{:>10}{:>10}{:>10}{:>10}{:>10}",
            "ms", "mean", "p50", "p90", "p95", "p99"
        );
        for (name, s) in [
            ("TTFT", &self.ttft_ms),
            ("TPOT", &self.tpot_ms),
            ("ITL", &self.itl_ms),
            ("E2E", &self.e2el_ms),
        ] {
            let _ = writeln!(
                out,
                "{name:<6}{:>10.2}{:>10.2}{:>10.2}{:>10.2}{:>10.2}",
                s.mean, s.p50, s.p90, s.p95, s.p99
            );
        }
        if self.without_usage > 0 {
            let _ = writeln!(
                out,
                "\n{} answers had no usage: output tokens are chunks there, input tokens are missing.",
                self.without_usage
            );
        }
        let mut errors: Vec<_> = self.errors.iter().collect();
        errors.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        for (error, count) in errors.iter().take(ERROR_KINDS_MAX) {
            let _ = writeln!(out, "\n{count} x {error}");
        }
        if errors.len() > ERROR_KINDS_MAX {
            let _ = writeln!(out, "\nand {} other errors", errors.len() - ERROR_KINDS_MAX);
        }
        out
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn tpot_ms(sample: &Sample) -> Option<f64> {
    let later = sample.output_tokens.checked_sub(1).filter(|later| *later > 0)?;
    Some(ms(sample.e2e.saturating_sub(sample.ttft)) / later as f64)
}

fn is_good(sample: &Sample, slo: Slo) -> bool {
    let meets = |value: f64, max: Option<f64>| max.is_none_or(|max| value <= max);
    meets(ms(sample.ttft), slo.ttft_ms_max)
        && meets(tpot_ms(sample).unwrap_or(0.0), slo.tpot_ms_max)
        && meets(ms(sample.e2e), slo.e2el_ms_max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(ttft_ms: u64, e2e_ms: u64, output_tokens: u64) -> Sample {
        let ms = Duration::from_millis;
        let gaps = (1..output_tokens).map(|_| ms((e2e_ms - ttft_ms) / (output_tokens - 1)));
        Sample {
            ttft: ms(ttft_ms),
            e2e: ms(e2e_ms),
            gaps: gaps.collect(),
            input_tokens: 10,
            output_tokens,
            has_usage: true,
        }
    }

    fn report(samples: &[(u64, u64, u64)], slo: Slo) -> Report {
        let mut results: Vec<_> = samples.iter().map(|s| Ok(sample(s.0, s.1, s.2))).collect();
        results.push(Err("refused".to_string()));
        Report::new("m".to_string(), results, Duration::from_secs(2), slo)
    }

    #[test]
    fn definitions() {
        // TTFT 100 and 300 ms; TPOT 50 ms in the first, none in the second, which has one token.
        let got = report(&[(100, 200, 3), (300, 300, 1)], Slo::default());
        assert_eq!((got.completed, got.failed, got.errors["refused"]), (2, 1, 1));
        assert_eq!((got.input_tokens, got.output_tokens), (20, 4));
        assert_eq!(got.request_throughput_per_s, 1.0);
        assert_eq!(got.output_throughput_tokens_per_s, 2.0);
        assert_eq!(got.total_throughput_tokens_per_s, 12.0);
        assert_eq!(got.goodput_requests_per_s, None);
        assert_eq!((got.ttft_ms.mean, got.ttft_ms.count), (200.0, 2));
        assert_eq!((got.tpot_ms.mean, got.tpot_ms.count), (50.0, 1));
        assert_eq!((got.itl_ms.mean, got.itl_ms.count), (50.0, 2));
        assert_eq!(got.e2el_ms.p50, 250.0);
    }

    #[test]
    fn goodput_needs_every_limit() {
        let check = |ttft_ms_max, tpot_ms_max, e2el_ms_max, want: f64| {
            let slo = Slo { ttft_ms_max, tpot_ms_max, e2el_ms_max };
            let got = report(&[(100, 200, 3), (300, 300, 1)], slo).goodput_requests_per_s;
            assert_eq!(got, Some(want), "{slo:?}");
        };
        check(Some(300.0), None, None, 1.0);
        check(Some(299.0), None, None, 0.5);
        check(Some(99.0), None, None, 0.0);
        check(None, Some(49.0), None, 0.5);
        check(None, Some(50.0), Some(250.0), 0.5);
        check(None, None, Some(1.0), 0.0);
        check(Some(100.0), Some(49.0), Some(1000.0), 0.0);
    }

    #[test]
    fn nothing_completed() {
        let got = report(&[], Slo::default());
        assert_eq!((got.completed, got.ttft_ms), (0, Summary::default()));
        assert!(got.table().contains("1 x refused"));
        let instant = Report::new(String::new(), Vec::new(), Duration::ZERO, Slo::default());
        assert_eq!(instant.request_throughput_per_s, 0.0);
    }
}
