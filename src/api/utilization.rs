//! `GET /admin/v1/gpu/utilization`: who used the device over the last while, in rows that make all
//! of its time.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{Query, State},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{ApiError, AppState, gpus};
use crate::{
    meter::{By, Overhead, Report, Usage},
    price::usd,
};

const WINDOW_DEFAULT: Duration = Duration::from_secs(300);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    /// `30s`, `5m`, `1h`.
    window: Option<String>,
    /// `tenant`, `key` or `model`.
    by: Option<String>,
}

pub async fn utilization(
    State(state): State<Arc<AppState>>,
    asked: Result<Query<Asked>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<Value>, ApiError> {
    let Query(asked) = asked.map_err(|error| ApiError::invalid(None, error.body_text()))?;
    let window = match asked.window.as_deref() {
        None => WINDOW_DEFAULT,
        Some(text) => window(text).ok_or_else(|| {
            ApiError::invalid(
                Some("window"),
                "`window` must be a length of time such as 30s, 5m or 1h",
            )
        })?,
    };
    let (by, name) = match asked.by.as_deref().unwrap_or("tenant") {
        "tenant" => (By::Tenant, "tenant"),
        "key" => (By::Key, "key"),
        "model" => (By::Model, "model"),
        _ => return Err(ApiError::invalid(Some("by"), "`by` must be tenant, key or model")),
    };
    let (now_ns, window_ns) = (state.clock.now_ns(), window.as_nanos() as u64);
    let report = state.books.utilization(now_ns, window_ns, by);
    let mut answer = describe(&report, name);
    let seen = state.gpus.snapshot();
    answer["gpus"] = gpus::describe(&seen, state.gpu_uuid.as_deref(), std::process::id());
    answer["gpus_fault"] = gpus::reason(&seen).into();
    Ok(Json(answer))
}

/// A number and its unit.
fn window(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return None,
    };
    let number: u64 = number.parse().ok().filter(|number| (1..=1_000_000).contains(number))?;
    Some(Duration::from_secs(number * seconds))
}

/// Rows of owners, then what nobody pays for; the shares make 1.
fn describe(report: &Report, by: &str) -> Value {
    let wall_ns = report.total().device_ns.max(1);
    let row = |kind: &str, name: &str, usage: &Usage| {
        json!({
            "kind": kind,
            "name": name,
            "share": usage.device_ns as f64 / wall_ns as f64,
            "device_ms": usage.device_ns as f64 / 1e6,
            "kv_block_seconds": usage.kv_block_ns as f64 / 1e9,
            "input_tokens": usage.tokens.input,
            "cached_input_tokens": usage.tokens.cached_input,
            "output_tokens": usage.tokens.output,
            "cost": usd::format(usage.tokens.cost),
            "joules": usage.energy.total_uj() as f64 / 1e6,
            "joules_estimated": usage.energy.estimated_uj > 0,
        })
    };
    let mut rows: Vec<Value> =
        report.rows.iter().map(|(name, usage)| row(by, name, usage)).collect();
    rows.push(row("other", "", &report.other));
    for (kind, usage) in Overhead::ALL.into_iter().zip(&report.overhead) {
        rows.push(row("overhead", kind.as_str(), usage));
    }
    rows.push(row("foreign", "", &report.foreign));
    rows.push(row("idle", "", &report.idle));
    let seconds = (report.to_ns - report.from_ns) as f64 / 1e9;
    json!({"object": "gpu.utilization", "by": by, "window_seconds": seconds, "rows": rows})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_numbers_with_a_unit() {
        for (text, seconds) in [
            ("30s", Some(30)),
            ("5m", Some(300)),
            ("1h", Some(3600)),
            ("", None),
            ("5", None),
            ("m", None),
            ("0s", None),
            ("-1s", None),
            ("5d", None),
            ("5µ", None),
            ("99999999h", None),
        ] {
            assert_eq!(window(text), seconds.map(Duration::from_secs), "{text:?}");
        }
    }
}
