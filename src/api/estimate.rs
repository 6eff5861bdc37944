//! `POST /v1/cost/estimate`: what a body would cost, before it is sent.

use std::sync::Arc;

use axum::{
    Extension, Json,
    body::Bytes,
    extract::{State, rejection::BytesRejection},
    http::HeaderMap,
};
use serde_json::{Value, json};

use crate::{
    admission::Caller,
    ledger::{LedgerError, Opening},
    price::{Billing, usd},
    types::NanoUsd,
};

use super::{
    ApiError, AppState,
    answer::Shape,
    generate::{Money, Prepared, prepare},
    record::Record,
    request::Body,
};

/// Takes a body of chat/completions, or of completions. Holds and charges nothing.
pub async fn estimate(
    State(state): State<Arc<AppState>>,
    Extension(record): Extension<Arc<Record>>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, ApiError> {
    record.tenant(caller.tenant.as_str());
    let body = body?;
    let shape = match Body::parse(&body)?.get("messages") {
        Some(_) => Shape::Chat,
        None => Shape::Completion,
    };
    let money = Money::of_headers(&headers, &body)?;
    let task = tokio::task::spawn_blocking({
        let state = state.clone();
        move || prepare(&state, &record, caller, money, &body, shape)
    });
    let Prepared { requests, .. } =
        task.await.map_err(|_| ApiError::internal("preparing the estimate failed"))??;
    let bound = state.model.engine.snapshot().device_bound;
    let asked: Vec<(Opening, u64, u64)> = requests
        .into_iter()
        .map(|(request, opening)| {
            let output = u64::from(request.stop.max_tokens) * u64::from(request.choices);
            let worst_ns = bound.map_or(0, |bound| {
                let scored = request.prompt_logprobs.is_some();
                let (input, max) = (request.prompt.len(), request.stop.max_tokens);
                bound.worst_ns(input, max, request.choices, scored)
            });
            (opening, output, worst_ns)
        })
        .collect();
    let input_tokens: u64 = asked.iter().map(|(opening, ..)| opening.input_tokens).sum();
    let output_tokens: u64 = asked.iter().map(|(_, output, _)| output).sum();
    let quotes = state.ledger.run(move |book| {
        let quotes = asked.iter().map(|(opening, output, ns)| book.quote(opening, *output, *ns));
        quotes.collect::<Result<Vec<_>, _>>()
    });
    let quotes = quotes.await?.into_iter().collect::<Result<Vec<_>, _>>();
    let quotes = quotes.map_err(LedgerError::Refused)?;
    let Some(first) = quotes.first() else { return Err(ApiError::internal("nothing to price")) };
    let sum = |amounts: &mut dyn Iterator<Item = i128>| NanoUsd(amounts.sum());
    let hold = sum(&mut quotes.iter().map(|quote| quote.hold.0));
    let worst = sum(&mut quotes.iter().map(|quote| quote.worst.0));
    Ok(Json(json!({
        "object": "cost.estimate", "model": state.model.id.as_str(),
        "input_tokens": input_tokens, "output_tokens_max": output_tokens,
        "hold_usd": usd::format(hold),
        "worst_case_usd": usd::format(first.cap.map_or(worst, |cap| cap.min(worst))),
        "uncapped_usd": usd::format(worst), "max_cost_usd": first.cap.map(usd::format),
        "price_version": first.terms.version,
        "billing": match first.terms.billing {
            Billing::Tokens => "tokens",
            Billing::Device => "device",
        },
    })))
}
