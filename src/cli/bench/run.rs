//! Sends the workload and collects what came of it.

use std::{sync::Arc, time::Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::{sync::Semaphore, task::JoinSet};

use super::{
    args::Plan,
    client::{BenchClient, measure},
    report::Report,
    workload,
};

/// Sends every prompt at its time, with at most `plan.concurrency` in flight.
///
/// # Errors
/// When there is nothing to send or no server to send it to; a failed request is part of the report.
pub async fn run(plan: &Plan) -> anyhow::Result<Report> {
    let prompts = workload::build(plan)?;
    let client = BenchClient::new(plan)?;
    let model = match &plan.model {
        Some(model) => model.clone(),
        None => client.first_model().await?,
    };
    let bar = ProgressBar::new(prompts.len() as u64);
    if let Ok(style) =
        ProgressStyle::with_template("{pos}/{len} {wide_bar} {per_sec} {elapsed_precise}")
    {
        bar.set_style(style);
    }
    let permits = Arc::new(Semaphore::new(plan.concurrency));
    let (mut tasks, mut results) = (JoinSet::new(), Vec::with_capacity(prompts.len()));
    let started = Instant::now();
    for prompt in &prompts {
        let request = client.request(&model, prompt);
        tokio::time::sleep(prompt.arrival.saturating_sub(started.elapsed())).await;
        let permit = permits.clone().acquire_owned().await.context("the semaphore is closed")?;
        let bar = bar.clone();
        tasks.spawn(async move {
            let result = measure(request).await.map_err(|error| format!("{error:#}"));
            bar.inc(1);
            drop(permit);
            result
        });
        // What has ended is taken at once, so that only running tasks take memory.
        while let Some(ended) = tasks.try_join_next() {
            results.push(ended.context("a request's task failed")?);
        }
    }
    while let Some(ended) = tasks.join_next().await {
        results.push(ended.context("a request's task failed")?);
    }
    let duration = started.elapsed();
    bar.finish_and_clear();
    Ok(Report::new(model, results, duration, plan.slo))
}
