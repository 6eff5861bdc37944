//! The table of `candela top`, as text.

use anyhow::{Result, bail};
use serde_json::Value;

const HEADS: [&str; 8] =
    ["", "SHARE %", "DEVICE S", "TOKENS IN", "OUT", "KV BLOCK-S", "JOULES", "COST USD"];
/// Shares are shown in tenths of a percent.
const WHOLE: u64 = 1000;
const GIB: f64 = (1u64 << 30) as f64;

/// The GPUs, a line each, and the rows of the report, whose shares make 100.0 %.
pub fn render(report: &Value) -> Result<String> {
    let Some(rows) = report["rows"].as_array() else { bail!("the server's answer is no report") };
    let rows: Vec<&Value> = rows.iter().filter(|row| is_shown(row)).collect();
    let mut text = String::new();
    for gpu in report["gpus"].as_array().into_iter().flatten() {
        text.push_str(&gpu_line(gpu));
    }
    let by = report["by"].as_str().unwrap_or_default();
    let seconds = report["window_seconds"].as_f64().unwrap_or(0.0);
    text.push_str(&format!("last {seconds:.0} s by {by}\n"));
    let shares: Vec<f64> = rows.iter().map(|row| row["share"].as_f64().unwrap_or(0.0)).collect();
    let mut lines = vec![HEADS.map(str::to_owned)];
    lines.extend(rows.iter().zip(tenths(&shares)).map(|(row, share)| line(row, share)));
    let widths: [usize; 8] = std::array::from_fn(|column| {
        lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0)
    });
    for line in &lines {
        // Names to the left, numbers to the right.
        let mut shown = format!("{:1$}", line[0], widths[0]);
        for (cell, width) in line.iter().zip(widths).skip(1) {
            shown.push_str(&format!("  {cell:>width$}"));
        }
        text.push_str(shown.trim_end());
        text.push('\n');
    }
    if rows.iter().any(|row| row["joules_estimated"] == true) {
        text.push_str("~ estimated: the last seconds are not settled yet\n");
    }
    Ok(text)
}

/// Idle, foreign and all overhead that there was are always of interest.
fn is_shown(row: &Value) -> bool {
    let is_used = |key: &str| row[key].as_f64().is_some_and(|value| value > 0.0);
    let kind = row["kind"].as_str().unwrap_or_default();
    match kind {
        "other" | "overhead" => is_used("share") || is_used("joules"),
        _ => true,
    }
}

fn line(row: &Value, share: u64) -> [String; 8] {
    let (kind, name) =
        (row["kind"].as_str().unwrap_or_default(), row["name"].as_str().unwrap_or_default());
    let head = match (kind, name) {
        ("overhead", name) => format!("({kind}: {name})"),
        ("idle" | "foreign" | "other", _) => format!("({kind})"),
        // Of requests without a key.
        (_, "") => "-".to_owned(),
        (_, name) => plain(name),
    };
    let number = |key: &str| row[key].as_f64().unwrap_or(0.0);
    let mark = if row["joules_estimated"] == true { "~" } else { "" };
    [
        head,
        format!("{}.{}", share / 10, share % 10),
        format!("{:.3}", number("device_ms") / 1e3),
        format!("{:.0}", number("input_tokens") + number("cached_input_tokens")),
        format!("{:.0}", number("output_tokens")),
        format!("{:.1}", number("kv_block_seconds")),
        format!("{mark}{:.1}", number("joules")),
        row["cost"].as_str().unwrap_or("0").to_owned(),
    ]
}

/// Tenths of a percent that sum to 100.0 %: what rounding leaves goes to the largest remainders.
fn tenths(shares: &[f64]) -> Vec<u64> {
    let exact = shares.iter().map(|share| share.clamp(0.0, 1.0) * WHOLE as f64);
    let mut parts: Vec<(u64, f64)> = exact.map(|part| (part as u64, part.fract())).collect();
    let mut order: Vec<usize> = (0..parts.len()).collect();
    order.sort_by(|a, b| parts[*b].1.total_cmp(&parts[*a].1));
    let left = WHOLE.saturating_sub(parts.iter().map(|(part, _)| part).sum());
    for index in order.into_iter().take(left as usize) {
        parts[index].0 += 1;
    }
    parts.into_iter().map(|(part, _)| part).collect()
}

fn gpu_line(gpu: &Value) -> String {
    let name = plain(gpu["name"].as_str().unwrap_or_default());
    let mut parts = Vec::new();
    let mut add = |key: &str, show: &dyn Fn(f64) -> String| {
        parts.extend(gpu[key].as_f64().map(show));
    };
    add("power_watts", &|watts| format!("{watts:.0} W"));
    add("gpu_percent", &|percent| format!("{percent:.0} % busy"));
    let total = gpu["memory_total_bytes"].as_f64().unwrap_or(0.0) / GIB;
    add("memory_used_bytes", &|bytes| format!("{:.1} of {total:.1} GiB", bytes / GIB));
    add("sm_clock_mhz", &|mhz| format!("{mhz:.0} MHz"));
    let held: Vec<&str> = gpu["throttle_reasons"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    if !held.is_empty() {
        parts.push(format!("held by {}", held.join(", ")));
    }
    if let Some(fault) = gpu["fault"].as_str() {
        parts = vec![plain(fault)];
    }
    let own = if gpu["attributed"] == true { "" } else { ", not used here" };
    format!("GPU {} {name}{own}: {}\n", gpu["index"], parts.join(", "))
}

/// A name of someone else's, which must not move the cursor.
fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn shares_make_a_hundred() {
        for shares in [vec![1.0 / 3.0; 3], vec![0.0, 1.0], vec![0.1999, 0.8001], vec![1.0 / 7.0; 7]]
        {
            let parts = tenths(&shares);
            assert_eq!(parts.iter().sum::<u64>(), 1000, "{shares:?} {parts:?}");
        }
        assert_eq!(tenths(&[0.0, 1.0]), [0, 1000]);
        assert_eq!(tenths(&[]), [0; 0]);
    }

    #[test]
    fn a_report_becomes_a_table() {
        let row = |kind: &str, name: &str, share: f64, joules: f64| {
            json!({
                "kind": kind, "name": name, "share": share, "device_ms": share * 60_000.0,
                "kv_block_seconds": 1.25, "input_tokens": 7, "cached_input_tokens": 3,
                "output_tokens": 12, "cost": "0.5", "joules": joules,
                "joules_estimated": joules > 100.0,
            })
        };
        let rows = [
            row("tenant", "acme\u{1b}[2J", 0.5, 120.0),
            row("other", "", 0.0, 0.0),
            row("overhead", "recompute", 0.125, 4.0),
            row("overhead", "padding", 0.0, 0.0),
            row("foreign", "", 0.0, 0.0),
            row("idle", "", 0.375, 9.0),
        ];
        let gpu = json!({
            "index": 0, "name": "H100", "attributed": true, "power_watts": 250.4, "gpu_percent": 37,
            "memory_used_bytes": 1u64 << 30, "memory_total_bytes": 80u64 << 30,
            "sm_clock_mhz": null, "throttle_reasons": ["sw_power_cap"], "fault": null,
        });
        let lost = json!({"index": 1, "name": "H100", "attributed": false, "fault": "lost"});
        let report = json!({
            "by": "tenant", "window_seconds": 60.0, "rows": rows, "gpus": [gpu, lost],
        });
        let text = render(&report).expect("a table");
        let expected = "\
GPU 0 H100: 250 W, 37 % busy, 1.0 of 80.0 GiB, held by sw_power_cap
GPU 1 H100, not used here: lost
last 60 s by tenant
                       SHARE %  DEVICE S  TOKENS IN  OUT  KV BLOCK-S  JOULES  COST USD
acme[2J                   50.0    30.000         10   12         1.2  ~120.0       0.5
(overhead: recompute)     12.5     7.500         10   12         1.2     4.0       0.5
(foreign)                  0.0     0.000         10   12         1.2     0.0       0.5
(idle)                    37.5    22.500         10   12         1.2     9.0       0.5
~ estimated: the last seconds are not settled yet
";
        assert_eq!(text, expected);
        assert!(render(&json!({})).is_err());
    }
}
