//! One request, sent and timed.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use reqwest::{Client, RequestBuilder, Response};
use serde_json::{Value, json};

use super::{
    args::{Endpoint, Plan},
    report::Sample,
    sse::SseParser,
    workload::Prompt,
};

/// Part of an error answer that is read and shown.
const ERROR_CHARS_MAX: usize = 200;
const ERROR_BYTES_MAX: usize = 64 << 10;
/// A list of models larger than this is none.
const MODELS_BYTES_MAX: usize = 4 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

pub struct BenchClient<'a> {
    http: Client,
    plan: &'a Plan,
}

impl<'a> BenchClient<'a> {
    /// # Errors
    /// When TLS cannot be set up.
    pub fn new(plan: &'a Plan) -> anyhow::Result<Self> {
        let http = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(plan.request_timeout)
            .pool_max_idle_per_host(plan.concurrency)
            .tcp_nodelay(true)
            .build()
            .context("cannot set up the HTTP client")?;
        Ok(Self { http, plan })
    }

    /// The first model the server offers.
    ///
    /// # Errors
    /// When the server cannot be reached, refuses, or offers none.
    pub async fn first_model(&self) -> anyhow::Result<String> {
        let url = format!("{}/v1/models", self.plan.url);
        let answer = self.authorize(self.http.get(&url)).send().await;
        let answer =
            answer.with_context(|| format!("cannot reach {url}: is the server running?"))?;
        if !answer.status().is_success() {
            bail!("{url}: {}", refusal(answer).await);
        }
        let bytes = read_start(answer, MODELS_BYTES_MAX).await?;
        let list: Value =
            serde_json::from_slice(&bytes).with_context(|| format!("{url}: no JSON"))?;
        let id = list["data"][0]["id"].as_str().map(str::to_string);
        id.with_context(|| format!("{url} lists no model: name one with --model"))
    }

    /// The request for `prompt`, ready to be sent: what takes time to build is built before.
    pub fn request(&self, model: &str, prompt: &Prompt) -> RequestBuilder {
        let mut body = json!({
            "model": model,
            "stream": true,
            "stream_options": {"include_usage": true},
            "temperature": self.plan.temperature,
            "max_tokens": prompt.output_tokens_max,
        });
        if self.plan.ignore_eos {
            // Not one of OpenAI's: sent only when asked for, as strict servers refuse it.
            body["ignore_eos"] = json!(true);
        }
        let path = match self.plan.endpoint {
            Endpoint::Chat => {
                body["messages"] = prompt.messages();
                "chat/completions"
            }
            Endpoint::Completions => {
                body["prompt"] = json!(prompt.text());
                "completions"
            }
        };
        self.authorize(self.http.post(format!("{}/v1/{path}", self.plan.url))).json(&body)
    }

    fn authorize(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.plan.api_key {
            Some(key) => request.bearer_auth(key.reveal()),
            None => request,
        }
    }
}

/// Sends a request and reads its stream to the end.
///
/// # Errors
/// When it is refused, breaks off, reports an error or brings no token.
pub async fn measure(request: RequestBuilder) -> anyhow::Result<Sample> {
    let sent = Instant::now();
    let mut answer = request.send().await.map_err(plain)?;
    if !answer.status().is_success() {
        bail!("{}", refusal(answer).await);
    }
    let (mut parser, mut stream) = (SseParser::default(), Stream::default());
    while let Some(bytes) = answer.chunk().await.map_err(plain)? {
        let at = sent.elapsed();
        parser.push(&bytes, |data| stream.event(data, at)).map_err(anyhow::Error::msg)?;
        if let Some(error) = stream.error.take() {
            bail!("{error}");
        }
    }
    stream.finish()
}

/// What one stream has brought so far.
#[derive(Debug, Default)]
struct Stream {
    first: Option<Duration>,
    /// The last chunk with text, from which the next gap counts.
    last_text: Duration,
    /// The last chunk of a choice, with text or without.
    last: Option<Duration>,
    gaps: Vec<Duration>,
    chunks: u64,
    usage: Option<(u64, u64)>,
    is_done: bool,
    error: Option<String>,
}

impl Stream {
    fn event(&mut self, data: &str, at: Duration) {
        if data == "[DONE]" {
            self.is_done = true;
            return;
        }
        let Ok(chunk) = serde_json::from_str::<Value>(data) else {
            self.error = Some("an event is no JSON".to_string());
            return;
        };
        if !chunk["error"].is_null() {
            let message = chunk["error"]["message"].as_str().unwrap_or("no message");
            self.error = Some(format!("error in the stream: {}", shortened(message)));
            return;
        }
        let usage = &chunk["usage"];
        if let Some(output) = usage["completion_tokens"].as_u64() {
            self.usage = Some((usage["prompt_tokens"].as_u64().unwrap_or(0), output));
        }
        let choice = &chunk["choices"][0];
        if choice.is_null() {
            return;
        }
        self.last = Some(at);
        // The role comes before the first token: only text tells that there is one.
        let delta = &choice["delta"];
        let texts =
            [&choice["text"], &delta["content"], &delta["reasoning_content"], &delta["reasoning"]];
        if texts.iter().all(|text| text.as_str().is_none_or(str::is_empty)) {
            return;
        }
        match self.first {
            None => self.first = Some(at),
            Some(_) => self.gaps.push(at.saturating_sub(self.last_text)),
        }
        self.last_text = at;
        self.chunks += 1;
    }

    fn finish(self) -> anyhow::Result<Sample> {
        ensure!(self.is_done, "the stream broke off before [DONE]");
        let (input_tokens, output_tokens) = self.usage.unwrap_or((0, self.chunks));
        let last = self.last.filter(|_| output_tokens > 0).context("no token arrived")?;
        // Tokens without text (special ones alone) are known to be there by the last chunk only.
        let ttft = self.first.unwrap_or(last);
        let has_usage = self.usage.is_some();
        Ok(Sample { ttft, e2e: last, gaps: self.gaps, input_tokens, output_tokens, has_usage })
    }
}

/// Status and message of a refusal.
async fn refusal(answer: Response) -> String {
    let status = answer.status();
    let body = read_start(answer, ERROR_BYTES_MAX).await.unwrap_or_default();
    let message = match serde_json::from_slice::<Value>(&body) {
        Ok(value) => value["error"]["message"].as_str().map(str::to_string),
        Err(_) => None,
    };
    let text = message.unwrap_or_else(|| String::from_utf8_lossy(&body).into_owned());
    format!("HTTP {status}: {}", shortened(&text))
}

async fn read_start(mut answer: Response, bytes_max: usize) -> anyhow::Result<Vec<u8>> {
    let mut body = Vec::new();
    while let Some(bytes) = answer.chunk().await.map_err(plain)? {
        body.extend_from_slice(&bytes[..bytes.len().min(bytes_max - body.len())]);
        if body.len() == bytes_max {
            break;
        }
    }
    Ok(body)
}

/// An error of the connection with its deepest cause and without the address, so that equal ones
/// are counted together.
fn plain(error: reqwest::Error) -> anyhow::Error {
    if error.is_timeout() {
        return anyhow::anyhow!("timed out");
    }
    let error = anyhow::Error::new(error.without_url());
    anyhow::anyhow!("{error}: {}", error.root_cause())
}

fn shortened(text: &str) -> String {
    text.trim().chars().take(ERROR_CHARS_MAX).collect::<String>().replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{"choices":[{"delta":{"content":"x"}}]}"#;
    const ROLE: &str = r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#;
    const END: &str = r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#;
    const USAGE: &str = r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}"#;

    /// Feeds an event every 10 ms.
    fn stream(events: &[&str]) -> Result<Sample, String> {
        let mut stream = Stream::default();
        for (index, event) in events.iter().enumerate() {
            stream.event(event, Duration::from_millis(10 * (index as u64 + 1)));
            if let Some(error) = stream.error.take() {
                return Err(error);
            }
        }
        stream.finish().map_err(|error| error.to_string())
    }

    #[test]
    fn times_of_a_stream() {
        let check =
            |events: &[&str], ttft_ms, e2e_ms, gaps_ms: &[u64], tokens: (u64, u64), has_usage| {
                let ms = Duration::from_millis;
                let want = Sample {
                    ttft: ms(ttft_ms),
                    e2e: ms(e2e_ms),
                    gaps: gaps_ms.iter().copied().map(ms).collect(),
                    input_tokens: tokens.0,
                    output_tokens: tokens.1,
                    has_usage,
                };
                assert_eq!(stream(events), Ok(want), "{events:?}");
            };
        check(&[ROLE, TEXT, TEXT, END, USAGE, "[DONE]"], 20, 40, &[10], (7, 3), true);
        check(&[TEXT, ROLE, TEXT, "[DONE]"], 10, 30, &[20], (0, 2), false);
        check(&[r#"{"choices":[{"text":"x"}]}"#, "[DONE]"], 10, 10, &[], (0, 1), false);
        check(
            &[r#"{"choices":[{"delta":{"reasoning_content":"x"}}]}"#, "[DONE]"],
            10,
            10,
            &[],
            (0, 1),
            false,
        );
        check(&[ROLE, END, USAGE, "[DONE]"], 20, 20, &[], (7, 3), true);
    }

    #[test]
    fn a_stream_that_is_no_answer() {
        let check = |events: &[&str], part: &str| {
            let error = stream(events).unwrap_err();
            assert!(error.contains(part), "{events:?}: {error:?} lacks {part:?}");
        };
        check(&[], "broke off");
        check(&[TEXT, END, USAGE], "broke off");
        check(&["[DONE]"], "no token");
        check(&[ROLE, END, "[DONE]"], "no token");
        check(&["nonsense", "[DONE]"], "no JSON");
        check(&[TEXT, r#"{"error":{"message":"out of luck"}}"#, "[DONE]"], "out of luck");
        check(&[r#"{"error":"text"}"#], "error in the stream");
    }
}
