//! `candela top`: who uses the device now.

mod render;

use std::{
    io::{ErrorKind, IsTerminal, Write, stdout},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

use render::render;

/// A key of role operator or admin; a flag would show it to other users.
const KEY_VARIABLE: &str = "CANDELA_ADMIN_KEY";
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(10);
/// Cursor to the corner, and everything below it cleared (ECMA-48: CUP, ED).
const CLEAR: &str = "\x1b[H\x1b[J";

#[derive(Args, Debug)]
pub struct TopArgs {
    /// Server to ask; its key, of role operator or admin, in CANDELA_ADMIN_KEY
    #[arg(
        long,
        env = "CANDELA_SERVER",
        value_name = "URL",
        default_value = "http://127.0.0.1:8000"
    )]
    server: String,
    /// What to tell apart
    #[arg(long, default_value = "tenant", value_parser = ["tenant", "key", "model"])]
    by: String,
    /// How far back to look: 30s, 5m, 10m
    #[arg(long, value_name = "TIME", default_value = "1m", value_parser = window)]
    window: String,
    /// Seconds between looks
    #[arg(long, value_name = "S", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// Print one table and end
    #[arg(long)]
    once: bool,
    /// Print the server's answer as JSON, one line a look
    #[arg(long)]
    json: bool,
}

/// A number and `s`, `m` or `h`; what it may be at most is the server's to say.
fn window(text: &str) -> Result<String, String> {
    let number = text.strip_suffix(['s', 'm', 'h']);
    match number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())) {
        true => Ok(text.to_owned()),
        false => Err("write a length of time such as 30s, 5m or 1h".to_owned()),
    }
}

pub fn top(args: TopArgs) -> Result<ExitCode> {
    match watch(&args) {
        // A reader that went away, as in `candela top | head`, has seen enough.
        Err(error) if is_closed_pipe(&error) => Ok(ExitCode::SUCCESS),
        other => other.map(|()| ExitCode::SUCCESS),
    }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<std::io::Error>();
    error.is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

fn watch(args: &TopArgs) -> Result<()> {
    let http = reqwest::Client::builder().timeout(ANSWER_WAIT_MAX).build()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let is_dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
    let clears = !args.once && !args.json && stdout().is_terminal() && !is_dumb;
    let mut seen = false;
    loop {
        let shown = match runtime.block_on(ask(&http, args)) {
            Ok(report) if args.json => format!("{report}\n"),
            Ok(report) => render(&report)?,
            // One that was there may come back.
            Err(error) if seen => format!("candela: {error:#}\n"),
            Err(error) => return Err(error),
        };
        seen = true;
        let mut out = stdout().lock();
        let (before, after) = match (clears, args.once || args.json) {
            (true, _) => (CLEAR, ""),
            (false, true) => ("", ""),
            (false, false) => ("", "\n"),
        };
        write!(out, "{before}{shown}{after}")?;
        out.flush()?;
        drop(out);
        if args.once {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(args.interval));
    }
}

async fn ask(http: &reqwest::Client, args: &TopArgs) -> Result<Value> {
    let url = args.server.trim_end_matches('/');
    let path = format!("/admin/v1/gpu/utilization?window={}&by={}", args.window, args.by);
    let mut request = http.get(format!("{url}{path}"));
    if let Some(key) = std::env::var(KEY_VARIABLE).ok().filter(|key| !key.is_empty()) {
        request = request.bearer_auth(key);
    }
    let response = request.send().await.with_context(|| format!("asking {url}"))?;
    let status = response.status();
    let text = response.text().await.with_context(|| format!("reading the answer of {url}"))?;
    let answer: Value = serde_json::from_str(&text).unwrap_or_default();
    if status == reqwest::StatusCode::UNAUTHORIZED {
        bail!("{url} wants a key: set {KEY_VARIABLE} to one of role operator or admin");
    }
    if !status.is_success() {
        let message = answer["error"]["message"].as_str().unwrap_or("no reason given");
        bail!("{message} ({status})");
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_numbers_with_a_unit() {
        for (text, is_one) in [
            ("30s", true),
            ("5m", true),
            ("1h", true),
            ("5", false),
            ("s", false),
            ("5m&by=x", false),
            ("", false),
        ] {
            assert_eq!(window(text).is_ok(), is_one, "{text:?}");
        }
    }
}
