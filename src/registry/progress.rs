//! How a download tells what it is doing.

use std::sync::{Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressStyle};

/// Hears about a download. `done_bytes` counts from the start of `what`.
pub trait Progress: Send + Sync {
    fn start(&self, what: &str, total_bytes: Option<u64>);
    fn advance(&self, done_bytes: u64);
    fn note(&self, line: &str);
    fn finish(&self);
}

/// Shows nothing.
pub struct NoProgress;

impl Progress for NoProgress {
    fn start(&self, _what: &str, _total_bytes: Option<u64>) {}
    fn advance(&self, _done_bytes: u64) {}
    fn note(&self, _line: &str) {}
    fn finish(&self) {}
}

/// A bar on standard error; only the notes where that is no terminal.
#[derive(Default)]
pub struct BarProgress {
    bar: Mutex<Option<ProgressBar>>,
}

impl Progress for BarProgress {
    fn start(&self, what: &str, total_bytes: Option<u64>) {
        let bar = total_bytes.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
        let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what.to_string());
        *self.bar.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar);
    }

    fn advance(&self, done_bytes: u64) {
        if let Some(bar) = &*self.bar.lock().unwrap_or_else(PoisonError::into_inner) {
            bar.set_position(done_bytes);
        }
    }

    fn note(&self, line: &str) {
        match &*self.bar.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }

    fn finish(&self) {
        if let Some(bar) = self.bar.lock().unwrap_or_else(PoisonError::into_inner).take() {
            bar.finish_and_clear();
        }
    }
}
