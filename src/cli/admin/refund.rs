//! `candela refund`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use serde_json::Value;

use crate::admin::{Given, REFUND};

use super::{table::cell, target::Place};

#[derive(Args, Debug)]
pub struct RefundArgs {
    /// Id of the request, as in its `x-request-id`
    request: String,
    /// How much, in USD [default: all that is left of the charge]
    amount: Option<String>,
    /// Why, for the ledger
    #[arg(long, value_name = "TEXT")]
    memo: Option<String>,
    #[command(flatten)]
    place: Place,
}

pub fn refund(args: RefundArgs) -> Result<ExitCode> {
    let given = Given::default()
        .with("request", Value::from(args.request))
        .with("amount_usd", args.amount.map(Value::from))
        .with("memo", args.memo.map(Value::from));
    let target = args.place.target()?;
    let made = target.call(&REFUND, given)?;
    target.say(&made, |made| {
        format!("{} USD of {} are given back", cell(made, "amount_usd"), cell(made, "request"))
    })?;
    Ok(ExitCode::SUCCESS)
}
