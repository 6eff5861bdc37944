//! `candela usage`.

use std::{collections::BTreeMap, io::Write, process::ExitCode};

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};

use crate::{
    admin::{Given, REQUESTS, USAGE},
    clock::Clock,
    price::usd,
    types::NanoUsd,
};

use super::{
    table::{Column, cell},
    target::{Place, Target},
    times::moment,
};

const DIMENSIONS: [(&str, &str); 4] =
    [("tenant", "project_id"), ("key", "api_key_id"), ("model", "model"), ("user", "user_id")];
/// Days of one answer.
const BUCKETS: i64 = 180;

/// Columns of the raw rows as CSV.
const RAW: [&str; 23] = [
    "id",
    "org",
    "tenant",
    "key",
    "model",
    "user",
    "metadata",
    "state",
    "choices",
    "opened_at",
    "closed_at",
    "input_tokens",
    "cached_input_tokens",
    "output_tokens",
    "gpu_ns",
    "energy_uj",
    "energy_estimated_uj",
    "cost_usd",
    "token_cost_usd",
    "gpu_cost_usd",
    "price_version",
    "steps",
    "end_cause",
];

#[derive(Args, Debug)]
pub struct UsageArgs {
    /// From then on: 24h, 30d, 2026-11-01 or 2026-11-01T00:00:00Z
    #[arg(long, value_name = "TIME", default_value = "30d")]
    since: String,
    /// Until then [default: now]
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Of this tenant only
    #[arg(long, value_name = "ID")]
    tenant: Option<String>,
    /// What to tell apart: tenant, key, model, user
    #[arg(long, value_delimiter = ',', default_value = "tenant,model",
        value_parser = ["tenant", "key", "model", "user"])]
    by: Vec<String>,
    /// Print every request as comma-separated values (RFC 4180)
    #[arg(long, conflicts_with = "jsonl")]
    csv: bool,
    /// Print every request as a line of JSON
    #[arg(long)]
    jsonl: bool,
    #[command(flatten)]
    place: Place,
}

pub fn usage(args: UsageArgs) -> Result<ExitCode> {
    let now_s = Clock::system().unix_s() as i64;
    let since = moment(&args.since, now_s, -1)?.max(0);
    let until = args.until.as_deref().map(|text| moment(text, now_s, -1)).transpose()?;
    let times = Given::default()
        .with("start_time", Value::from(since))
        .with("end_time", until.map(Value::from));
    let target = args.place.target()?;
    if args.csv || args.jsonl {
        let given = times.with("tenant", args.tenant.map(Value::from));
        raw(&target, &given, args.csv)?;
    } else {
        report(&target, times, args.tenant, &args.by)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn raw(target: &Target, given: &Given, csv: bool) -> Result<()> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if csv {
        write!(out, "{}\r\n", RAW.join(","))?;
    }
    target.all(&REQUESTS, given, ("after", "cursor"), |mut row| {
        match csv {
            true => {
                let line: Vec<_> = RAW.iter().map(|name| csv_field(&row[*name])).collect();
                write!(out, "{}\r\n", line.join(","))?;
            }
            false => {
                if let Some(row) = row.as_object_mut() {
                    row.remove("cursor");
                }
                writeln!(out, "{row}")?;
            }
        }
        Ok(())
    })?;
    out.flush()?;
    Ok(())
}

/// A field of RFC 4180. What a spreadsheet would take for a formula is marked as text: labels come
/// from clients.
fn csv_field(value: &Value) -> String {
    let (text, is_text) = match value {
        Value::Null => return String::new(),
        Value::String(text) => (text.clone(), true),
        other => (other.to_string(), false),
    };
    let text = match text.starts_with(['=', '+', '-', '@', '\t', '\r']) && is_text {
        true => format!("'{text}"),
        false => text,
    };
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text,
    }
}

/// Sums of one group over all days.
#[derive(Default)]
struct Sums {
    requests: i64,
    input: i64,
    cached: i64,
    output: i64,
    device_ns: i64,
    cost: i128,
}

impl Sums {
    fn add(&mut self, result: &Value) -> Result<()> {
        let int = |key: &str| result[key].as_i64().unwrap_or(0);
        self.requests += int("num_model_requests");
        self.input += int("input_tokens");
        self.cached += int("input_cached_tokens");
        self.output += int("output_tokens");
        self.device_ns += int("gpu_ns");
        self.cost += usd::parse(&cell(result, "cost_usd"))?.0;
        Ok(())
    }
}

fn report(target: &Target, times: Given, tenant: Option<String>, by: &[String]) -> Result<()> {
    let told: Vec<_> =
        DIMENSIONS.into_iter().filter(|(name, _)| by.iter().any(|by| by == name)).collect();
    let groups: Vec<_> = told.iter().map(|(_, field)| *field).collect();
    let given = times
        .with("bucket_width", Value::from("1d"))
        .with("limit", Value::from(BUCKETS))
        .with("group_by", Value::from(groups))
        .with("project_ids", tenant.map(|tenant| json!([tenant])));
    let mut sums: BTreeMap<Vec<String>, Sums> = BTreeMap::new();
    let mut page: Option<Value> = None;
    loop {
        let answer = target.call(&USAGE, given.clone().with("page", page.take()))?;
        let Some(buckets) = answer["data"].as_array() else { bail!("the answer is no report") };
        let results = buckets.iter().filter_map(|bucket| bucket["results"].as_array()).flatten();
        for result in results {
            let group = told.iter().map(|(_, field)| cell(result, field)).collect();
            sums.entry(group).or_default().add(result)?;
        }
        match answer["next_page"].as_str() {
            Some(next) => page = Some(next.into()),
            None => break,
        }
    }
    let rows: Vec<Value> = sums
        .into_iter()
        .map(|(group, sums)| {
            let mut row = json!({
                "requests": sums.requests, "input_tokens": sums.input,
                "cached_input_tokens": sums.cached, "output_tokens": sums.output,
                "gpu_s": format!("{}.{:03}", sums.device_ns / 1_000_000_000, sums.device_ns / 1_000_000 % 1000),
                "cost_usd": usd::format(NanoUsd(sums.cost)),
            });
            for ((name, _), label) in told.iter().zip(group) {
                row[*name] = label.into();
            }
            row
        })
        .collect();
    let heads = [("TENANT", "tenant"), ("KEY", "key"), ("MODEL", "model"), ("USER", "user")];
    let heads = heads.into_iter().filter(|(_, name)| told.iter().any(|(told, _)| told == name));
    let sums: [Column; 6] = [
        ("REQUESTS", "requests"),
        ("INPUT", "input_tokens"),
        ("CACHED", "cached_input_tokens"),
        ("OUTPUT", "output_tokens"),
        ("GPU SECONDS", "gpu_s"),
        ("COST USD", "cost_usd"),
    ];
    let columns: Vec<Column> = heads.chain(sums).collect();
    target.print_rows(&rows, &columns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn csv_fields_are_quoted_and_are_no_formulas() {
        for (value, expected) in [
            (json!("plain"), "plain"),
            (json!("a,b"), "\"a,b\""),
            (json!("say \"x\""), "\"say \"\"x\"\"\""),
            (json!("=1+1"), "'=1+1"),
            (json!(-5), "-5"),
            (json!(null), ""),
            (json!({"a": "b"}), "\"{\"\"a\"\":\"\"b\"\"}\""),
        ] {
            assert_eq!(csv_field(&value), expected, "{value}");
        }
    }
}
