//! `candela credit`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use serde_json::Value;

use crate::admin::{CREDIT, Given};

use super::{table::cell, target::Place};

#[derive(Args, Debug)]
pub struct CreditArgs {
    /// Who gets it
    tenant: String,
    /// How much, in USD
    amount: String,
    /// Why, for the ledger
    #[arg(long, value_name = "TEXT")]
    memo: Option<String>,
    #[command(flatten)]
    place: Place,
}

pub fn credit(args: CreditArgs) -> Result<ExitCode> {
    let given = Given::default()
        .with("tenant", Value::from(args.tenant))
        .with("amount_usd", Value::from(args.amount))
        .with("memo", args.memo.map(Value::from));
    let target = args.place.target()?;
    let made = target.call(&CREDIT, given)?;
    target.say(&made, |made| {
        format!("{} USD are credited to {}", cell(made, "amount_usd"), cell(made, "tenant"))
    })?;
    Ok(ExitCode::SUCCESS)
}
