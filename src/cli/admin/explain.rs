//! `candela explain`.

use std::{fmt::Write, process::ExitCode};

use anyhow::Result;
use clap::Args;
use serde_json::Value;

use crate::admin::{EXPLAIN, Given};

use super::{table::cell, target::Place};

#[derive(Args, Debug)]
pub struct ExplainArgs {
    /// Id of the request, as in its `x-request-id`
    request: String,
    #[command(flatten)]
    place: Place,
}

pub fn explain(args: ExplainArgs) -> Result<ExitCode> {
    let given = Given::default().with("id", Value::from(args.request));
    let target = args.place.target()?;
    let found = target.call(&EXPLAIN, given)?;
    target.say(&found, story)?;
    Ok(ExitCode::SUCCESS)
}

/// What became of a request, line by line.
fn story(request: &Value) -> String {
    let field = |key| cell(request, key);
    let count = |key: &str| request[key].as_i64().unwrap_or(0);
    let mut text = String::new();
    let mut line = |head: &str, rest: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{head:<9} {rest}");
    };
    line("request", field("id"));
    line(
        "paid by",
        format!("tenant {}, organisation {}, key {}", field("tenant"), field("org"), field("key")),
    );
    line("labels", format!("user {}, metadata {}", field("user"), field("metadata")));
    let (opened, closed) = (field("opened_at"), field("closed_at"));
    line("model", format!("{}, {} choice(s)", field("model"), field("choices")));
    line("time", format!("{opened} to {closed}, {} ms", field("duration_ms")));
    line(
        "price",
        format!(
            "version {} ({}), billed by {}: a million input tokens {} USD, cached {}, output {}; a request {}; a GPU second {}",
            field("price.version"),
            field("price.origin"),
            field("price.billing"),
            field("price.input_usd"),
            field("price.cached_input_usd"),
            field("price.output_usd"),
            field("price.request_usd"),
            field("price.gpu_second_usd"),
        ),
    );
    line(
        "tokens",
        format!(
            "{} input, {} cached input, {} output",
            count("input_tokens") - count("cached_input_tokens"),
            count("cached_input_tokens"),
            count("output_tokens"),
        ),
    );
    line("device", format!("{:.3} ms in {} steps", count("gpu_ns") as f64 / 1e6, field("steps")));
    if let Some(uj) = request["energy_uj"].as_i64() {
        let estimated = count("energy_estimated_uj") as f64 / 1e6;
        line("energy", format!("{:.3} J, of which {estimated:.3} J estimated", uj as f64 / 1e6));
    }
    line(
        "held",
        format!("{} USD in all, in {} lease(s)", field("held_in_all_usd"), field("leases")),
    );
    line(
        "cost",
        format!(
            "{} USD charged; by tokens {}, by GPU time {}",
            field("cost_usd"),
            field("token_cost_usd"),
            field("gpu_cost_usd"),
        ),
    );
    for moved in request["transfers"].as_array().into_iter().flatten() {
        let part = |key| cell(moved, key);
        line(
            "entry",
            format!(
                "{} {} USD from {} to {}, window of {}",
                part("kind"),
                part("amount_usd"),
                part("debit"),
                part("credit"),
                part("window_of"),
            ),
        );
    }
    line("ended", format!("{}: {}", field("state"), reason(&field("end_cause"))));
    text.trim_end().to_owned()
}

fn reason(cause: &str) -> String {
    let why = match cause {
        "finished" => "finished, by an end token, a stop string or its longest length",
        "cost_cap" => "cost_cap, at the last token that its cap pays for",
        "budget" => "budget, which was used up",
        "revoked" => "revoked, because its key ended",
        "natural_stop" => "natural_stop, at the end of a sentence",
        "soft_landing" => "soft_landing, at the end of a sentence near its cap",
        "ledger_lost" => "ledger_lost, because the ledger could not be reached",
        "aborted" => "aborted, because the client left or the server stopped",
        "failed" => "failed, in the engine",
        "crashed" => "crashed, with its server; what was on record is charged",
        "-" => "not yet",
        other => other,
    };
    why.to_owned()
}
