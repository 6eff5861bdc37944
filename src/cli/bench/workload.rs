//! What is sent, and when: prompts with lengths, and arrival times, all fixed by the seed.

use std::{fs, io::Read, path::Path, time::Duration};

use anyhow::{Context, bail, ensure};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use rand_distr::{Distribution, Gamma};
use serde_json::{Value, json};

use super::args::{LENGTH_TOKENS_MAX, PROMPTS_MAX, Plan};

/// A file of prompts larger than this should be cut first.
const DATASET_BYTES_MAX: u64 = 1 << 30;

/// Frequent short words: nearly every tokenizer has each of them, with its blank, as one token.
const WORDS: [&str; 64] = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world",
    "school", "state", "family", "student", "group", "country", "problem", "hand", "part", "place",
    "case", "week", "company", "system", "program", "question", "work", "number", "night", "point",
    "home", "water", "room", "mother", "area", "money", "story", "fact", "month", "lot", "right",
    "study", "book", "eye", "job", "word", "business", "issue", "side", "kind", "head", "house",
    "service", "friend", "father", "power", "hour", "game", "line", "end", "member", "law", "car",
];

#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    Text(String),
    /// Chat messages as they are in the file.
    Messages(Value),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    pub input: Input,
    pub output_tokens_max: usize,
    /// When it is sent, from the start of the run.
    pub arrival: Duration,
}

impl Prompt {
    /// The prompt as chat messages.
    pub fn messages(&self) -> Value {
        match &self.input {
            Input::Text(text) => json!([{"role": "user", "content": text}]),
            Input::Messages(messages) => messages.clone(),
        }
    }

    /// The prompt as one text; messages are joined, as completions know no roles.
    pub fn text(&self) -> String {
        match &self.input {
            Input::Text(text) => text.clone(),
            Input::Messages(messages) => {
                let parts = messages.as_array().into_iter().flatten();
                parts
                    .filter_map(|message| message["content"].as_str())
                    .collect::<Vec<_>>()
                    .join("\n")
            }
        }
    }
}

/// # Errors
/// When the file of prompts cannot be read or has none.
pub fn build(plan: &Plan) -> anyhow::Result<Vec<Prompt>> {
    let mut rng = StdRng::seed_from_u64(plan.seed);
    let file = match &plan.dataset {
        Some(path) => read(path)?,
        None => Vec::new(),
    };
    let mut prompts = Vec::with_capacity(plan.num_prompts);
    for index in 0..plan.num_prompts {
        let drawn = length(&mut rng, plan.output_len, plan.range_ratio);
        let (input, output_tokens_max) = match file.get(index % file.len().max(1)) {
            Some((input, named)) => (input.clone(), named.unwrap_or(drawn)),
            None => {
                let words = length(&mut rng, plan.input_len, plan.range_ratio);
                (Input::Text(synthetic(&mut rng, words)), drawn)
            }
        };
        prompts.push(Prompt { input, output_tokens_max, arrival: Duration::ZERO });
    }
    if let Some(rate) = plan.request_rate {
        let arrivals = arrivals(&mut rng, rate, plan.burstiness, plan.num_prompts)?;
        for (prompt, arrival) in prompts.iter_mut().zip(arrivals) {
            prompt.arrival = arrival;
        }
    }
    Ok(prompts)
}

/// Arrival times whose gaps are gamma-distributed with mean `1 / rate_per_s`; a shape of 1 makes
/// them exponential, so that arrivals are a Poisson process. The first request starts at once.
fn arrivals(
    rng: &mut StdRng,
    rate_per_s: f64,
    shape: f64,
    count: usize,
) -> anyhow::Result<Vec<Duration>> {
    let gaps =
        Gamma::new(shape, 1.0 / (rate_per_s * shape)).context("--request-rate and --burstiness")?;
    let mut at_s = 0.0;
    let mut arrivals = Vec::with_capacity(count);
    for _ in 0..count {
        let arrival = Duration::try_from_secs_f64(at_s);
        arrivals.push(arrival.context("--request-rate: so low that the run would never end")?);
        at_s += gaps.sample(rng);
    }
    Ok(arrivals)
}

/// A length drawn evenly from `mean` less to `mean` plus `ratio` of it; at least 1.
fn length(rng: &mut StdRng, mean: usize, ratio: f64) -> usize {
    let spread = (mean as f64 * ratio) as usize;
    rng.random_range(mean.saturating_sub(spread).max(1)..=mean + spread)
}

fn synthetic(rng: &mut StdRng, words: usize) -> String {
    // The table is not empty, so that there always is a word.
    let draw = |_| WORDS.choose(rng).copied().unwrap_or_default();
    (0..words).map(draw).collect::<Vec<_>>().join(" ")
}

/// Prompts of a file, each with the output length it names, if it does.
fn read(path: &Path) -> anyhow::Result<Vec<(Input, Option<usize>)>> {
    let shown = path.display();
    let file = fs::File::open(path).with_context(|| format!("cannot open {shown}"))?;
    let mut text = String::new();
    file.take(DATASET_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read {shown}"))?;
    ensure!(
        text.len() as u64 <= DATASET_BYTES_MAX,
        "{shown} is larger than {DATASET_BYTES_MAX} bytes"
    );
    let prompts = parse(&text).with_context(|| shown.to_string())?;
    ensure!(!prompts.is_empty(), "{shown} has no prompts");
    Ok(prompts)
}

/// A JSON array (ShareGPT), JSON lines or plain lines, told apart by the first character.
fn parse(text: &str) -> anyhow::Result<Vec<(Input, Option<usize>)>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    match text.trim_start().chars().next() {
        Some('[') => {
            let items: Vec<Value> = serde_json::from_str(text)?;
            // ShareGPT has conversations that begin with the model's turn or are empty; they are
            // no prompts, and no mistake either.
            Ok(items.iter().filter_map(record).take(PROMPTS_MAX).collect())
        }
        Some('{') => lines
            .take(PROMPTS_MAX)
            .map(|(index, line)| {
                let item: Value =
                    serde_json::from_str(line).with_context(|| format!("line {}", index + 1))?;
                match record(&item) {
                    Some(record) => Ok(record),
                    None => bail!(
                        "line {}: neither `prompt` nor `messages` nor `conversations`",
                        index + 1
                    ),
                }
            })
            .collect(),
        _ => Ok(lines
            .take(PROMPTS_MAX)
            .map(|(_, line)| (Input::Text(line.to_string()), None))
            .collect()),
    }
}

fn record(item: &Value) -> Option<(Input, Option<usize>)> {
    let named = item["max_tokens"].as_u64().or_else(|| item["output_len"].as_u64());
    let named = named.map(|tokens| (tokens as usize).clamp(1, LENGTH_TOKENS_MAX));
    let input = if let Some(prompt) = item["prompt"].as_str() {
        Input::Text(prompt.to_string())
    } else if item["messages"].as_array().is_some_and(|messages| !messages.is_empty()) {
        Input::Messages(item["messages"].clone())
    } else {
        let first = item["conversations"].as_array()?.first()?;
        if !matches!(first["from"].as_str()?, "human" | "user") {
            return None;
        }
        Input::Text(first["value"].as_str()?.to_string())
    };
    Some((input, named))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files() {
        let check = |text: &str, want: Option<&[(&str, Option<usize>)]>| {
            let got = parse(text).ok().map(|prompts| {
                let show = |(input, named): (Input, _)| match input {
                    Input::Text(text) => (text, named),
                    Input::Messages(messages) => (messages.to_string(), named),
                };
                prompts.into_iter().map(show).collect::<Vec<_>>()
            });
            let want = want.map(|w| w.iter().map(|(t, n)| (t.to_string(), *n)).collect::<Vec<_>>());
            assert_eq!(got, want, "{text:?}");
        };
        check("one\n\n two\n", Some(&[("one", None), (" two", None)]));
        check(
            "{\"prompt\": \"a\"}\n{\"prompt\": \"b\", \"max_tokens\": 3}\n",
            Some(&[("a", None), ("b", Some(3))]),
        );
        check("{\"messages\": [{\"role\": \"user\"}]}", Some(&[("[{\"role\":\"user\"}]", None)]));
        let share = r#"[{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
                        {"conversations": [{"from": "gpt", "value": "x"}]}, {"conversations": []}]"#;
        check(share, Some(&[("q", None)]));
        check("", Some(&[]));
        check("{\"prompt\": 1}", None);
        check("{\"messages\": []}", None);
        check("{\"prompt\": \"a\"}\nnot json", None);
        check("[1, 2", None);
    }

    #[test]
    fn lengths_stay_in_their_range() {
        let check = |mean, ratio, least: usize, most: usize| {
            let mut rng = StdRng::seed_from_u64(1);
            let drawn: Vec<_> = (0..2000).map(|_| length(&mut rng, mean, ratio)).collect();
            assert_eq!(drawn.iter().min(), Some(&least), "{mean} {ratio}");
            assert_eq!(drawn.iter().max(), Some(&most), "{mean} {ratio}");
        };
        check(10, 0.0, 10, 10);
        check(10, 0.5, 5, 15);
        check(1, 0.9, 1, 1);
        check(2, 0.5, 1, 3);
    }

    #[test]
    fn arrivals_have_the_rate_and_the_shape() {
        // The coefficient of variation of gamma gaps is 1 / sqrt(shape).
        let check = |rate: f64, shape: f64| {
            let got = arrivals(&mut StdRng::seed_from_u64(7), rate, shape, 20_000).unwrap();
            let gaps: Vec<_> =
                got.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
            let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
            let variance =
                gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
            let variation = variance.sqrt() / mean;
            assert!((mean * rate - 1.0).abs() < 0.05, "mean gap {mean} at {rate}");
            assert!(
                (variation * shape.sqrt() - 1.0).abs() < 0.05,
                "variation {variation} at {shape}"
            );
            assert_eq!(got[0], Duration::ZERO);
        };
        check(10.0, 1.0);
        check(0.5, 4.0);
        check(100.0, 0.5);
        assert!(arrivals(&mut StdRng::seed_from_u64(7), 1e-300, 1.0, 3).is_err());
    }

    #[test]
    fn a_seed_fixes_the_words() {
        let draw = |seed| synthetic(&mut StdRng::seed_from_u64(seed), 50);
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert_eq!(draw(1).split(' ').count(), 50);
    }
}
