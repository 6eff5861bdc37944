//! What to measure, as typed and as checked.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};

use crate::config::Secret;

/// Connections open at once, whatever the rate: one each takes a file descriptor.
pub const CONNECTIONS_MAX: usize = 1024;
/// Requests of one run; their times are kept until its end.
pub const PROMPTS_MAX: usize = 1_000_000;
/// Tokens of one synthetic prompt or output.
pub const LENGTH_TOKENS_MAX: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Endpoint {
    /// /v1/chat/completions
    Chat,
    /// /v1/completions
    Completions,
}

#[derive(Args, Debug)]
pub struct BenchArgs {
    /// Server to load, without /v1
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,
    /// Model to ask for [default: the first of /v1/models]
    #[arg(long)]
    model: Option<String>,
    /// Key to send as bearer token
    #[arg(long, env = "CANDELA_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: Option<Secret>,
    /// Which of OpenAI's endpoints to use
    #[arg(long, value_enum, default_value = "chat")]
    endpoint: Endpoint,

    /// Prompts: JSON lines with `prompt` or `messages`, ShareGPT's JSON, or plain text, a prompt a
    /// line [default: synthetic ones]
    #[arg(long, value_name = "FILE", help_heading = "Workload")]
    dataset: Option<PathBuf>,
    /// Words of a synthetic prompt, about one token each; the report has the server's own count
    #[arg(long, default_value_t = 128, value_name = "N", help_heading = "Workload")]
    input_len: usize,
    /// Tokens to generate
    #[arg(long, default_value_t = 64, value_name = "N", help_heading = "Workload")]
    output_len: usize,
    /// Lengths vary evenly within this share around --input-len and --output-len
    #[arg(long, default_value_t = 0.0, value_name = "0..1", help_heading = "Workload")]
    range_ratio: f64,
    /// Let the model end early: by default it is told to ignore its end-of-text token
    #[arg(long, help_heading = "Workload")]
    respect_eos: bool,
    /// Sampling temperature
    #[arg(long, default_value_t = 0.0, help_heading = "Workload")]
    temperature: f64,
    /// Requests to send
    #[arg(long, default_value_t = 100, value_name = "N", help_heading = "Workload")]
    num_prompts: usize,
    /// Fixes prompts, lengths and arrival times
    #[arg(long, default_value_t = 0, help_heading = "Workload")]
    seed: u64,

    /// Requests in flight at most [default: 8, or with a rate as many as it takes, up to 1024]
    #[arg(long, value_name = "N", help_heading = "Load")]
    concurrency: Option<usize>,
    /// Requests per second, arriving at random (Poisson) [default: as fast as --concurrency allows]
    #[arg(long, value_name = "R", help_heading = "Load")]
    request_rate: Option<f64>,
    /// Shape of the gamma-distributed gaps: 1 is Poisson, less comes in bursts, more is steadier
    #[arg(long, default_value_t = 1.0, value_name = "SHAPE", help_heading = "Load")]
    burstiness: f64,
    /// Seconds after which a request counts as failed
    #[arg(long, default_value_t = 600, value_name = "S", help_heading = "Load")]
    request_timeout: u64,

    /// Limits that a good request meets: ttft:MS, tpot:MS, e2el:MS, one or more
    #[arg(long, num_args = 1.., value_name = "METRIC:MS", help_heading = "Report")]
    goodput: Vec<String>,
    /// Also write everything to this file
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    json: Option<PathBuf>,
}

/// A checked command line.
#[derive(Debug)]
pub struct Plan {
    pub url: String,
    pub model: Option<String>,
    pub api_key: Option<Secret>,
    pub endpoint: Endpoint,
    pub dataset: Option<PathBuf>,
    pub input_len: usize,
    pub output_len: usize,
    pub range_ratio: f64,
    pub ignore_eos: bool,
    pub temperature: f64,
    pub num_prompts: usize,
    pub seed: u64,
    pub concurrency: usize,
    pub request_rate: Option<f64>,
    pub burstiness: f64,
    pub request_timeout: Duration,
    pub slo: Slo,
    pub json: Option<PathBuf>,
}

/// Upper bounds in milliseconds; all that are given must hold.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Slo {
    pub ttft_ms_max: Option<f64>,
    pub tpot_ms_max: Option<f64>,
    pub e2el_ms_max: Option<f64>,
}

impl BenchArgs {
    /// # Errors
    /// Names the flag that is out of range.
    pub fn check(self) -> anyhow::Result<Plan> {
        let url = self.url.trim_end_matches('/').trim_end_matches("/v1").to_string();
        ensure!(
            url.starts_with("http://") || url.starts_with("https://"),
            "--url: `{url}` lacks http:// or https://"
        );
        within("--num-prompts", self.num_prompts, PROMPTS_MAX)?;
        within("--input-len", self.input_len, LENGTH_TOKENS_MAX)?;
        within("--output-len", self.output_len, LENGTH_TOKENS_MAX)?;
        let concurrency = self.concurrency.unwrap_or(if self.request_rate.is_some() {
            CONNECTIONS_MAX
        } else {
            8
        });
        within("--concurrency", concurrency, CONNECTIONS_MAX)?;
        ensure!((0.0..1.0).contains(&self.range_ratio), "--range-ratio: at least 0 and below 1");
        ensure!((0.0..=2.0).contains(&self.temperature), "--temperature: 0 to 2");
        let positive = |value: f64| value.is_finite() && value > 0.0;
        ensure!(self.request_rate.is_none_or(positive), "--request-rate: more than 0");
        ensure!(positive(self.burstiness), "--burstiness: more than 0");
        ensure!(self.request_timeout > 0, "--request-timeout: more than 0");
        Ok(Plan {
            url,
            model: self.model,
            api_key: self.api_key,
            endpoint: self.endpoint,
            dataset: self.dataset,
            input_len: self.input_len,
            output_len: self.output_len,
            range_ratio: self.range_ratio,
            ignore_eos: !self.respect_eos,
            temperature: self.temperature,
            num_prompts: self.num_prompts,
            seed: self.seed,
            concurrency,
            request_rate: self.request_rate,
            burstiness: self.burstiness,
            request_timeout: Duration::from_secs(self.request_timeout),
            slo: Slo::parse(&self.goodput)?,
            json: self.json,
        })
    }
}

impl Slo {
    /// # Errors
    /// When a metric is unknown, named twice, or its bound no positive number.
    pub fn parse(words: &[String]) -> anyhow::Result<Self> {
        let mut slo = Self::default();
        for word in words {
            let (metric, bound) = word.split_once(':').with_context(|| {
                format!("--goodput: `{word}` is not METRIC:MS, such as ttft:500")
            })?;
            let place = match metric {
                "ttft" => &mut slo.ttft_ms_max,
                "tpot" => &mut slo.tpot_ms_max,
                "e2el" => &mut slo.e2el_ms_max,
                other => bail!("--goodput: `{other}` is not ttft, tpot or e2el"),
            };
            let bound = bound.parse::<f64>().ok().filter(|ms| ms.is_finite() && *ms > 0.0);
            let bound =
                bound.with_context(|| format!("--goodput: `{word}` needs milliseconds above 0"))?;
            ensure!(place.replace(bound).is_none(), "--goodput: {metric} is named twice");
        }
        Ok(slo)
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

fn within(flag: &str, value: usize, max: usize) -> anyhow::Result<()> {
    ensure!((1..=max).contains(&value), "{flag}: {value} is out of range: 1 to {max}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goodput() {
        let check = |words: &[&str], want: Option<(Option<f64>, Option<f64>, Option<f64>)>| {
            let words: Vec<_> = words.iter().map(|word| word.to_string()).collect();
            let got =
                Slo::parse(&words).ok().map(|s| (s.ttft_ms_max, s.tpot_ms_max, s.e2el_ms_max));
            assert_eq!(got, want, "{words:?}");
        };
        check(&[], Some((None, None, None)));
        check(&["ttft:500", "tpot:50.5"], Some((Some(500.0), Some(50.5), None)));
        check(&["e2el:1"], Some((None, None, Some(1.0))));
        check(&["ttft"], None);
        check(&["ttft:"], None);
        check(&["ttft:-1"], None);
        check(&["ttft:inf"], None);
        check(&["itl:5"], None);
        check(&["ttft:5", "ttft:6"], None);
    }
}
