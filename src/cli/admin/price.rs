//! `candela price`.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};
use serde_json::Value;

use crate::{
    admin::{GPUS, Given, PRICE_SET, PRICES},
    clock::Clock,
};

use super::{table::Column, target::Place, times::moment};

const COLUMNS: [Column; 13] = [
    ("VERSION", "version"),
    ("MODEL", "model"),
    ("TENANT", "tenant"),
    ("INPUT/1M", "input_usd"),
    ("CACHED/1M", "cached_input_usd"),
    ("OUTPUT/1M", "output_usd"),
    ("REQUEST", "request_usd"),
    ("GPU SECOND", "gpu_second_usd"),
    ("BILLING", "billing"),
    ("STATE", "state"),
    ("FROM", "from"),
    ("UNTIL", "until"),
    ("ORIGIN", "origin"),
];

#[derive(Debug, Subcommand)]
pub enum PriceCommand {
    /// Set a price in USD; requests that run keep theirs
    Set(Box<SetArgs>),
    /// List prices in force and to come
    List(ListArgs),
    /// List every version, newest first
    History(ListArgs),
    /// List example hourly rates of common GPUs
    Gpus(Place),
}

#[derive(Args, Debug)]
pub struct SetArgs {
    /// The model, by the name it is served under
    model: String,
    /// For this tenant only
    #[arg(long, value_name = "ID")]
    tenant: Option<String>,
    /// A million input tokens
    #[arg(long, value_name = "USD")]
    input: Option<String>,
    /// A million input tokens that were cached [default: as others]
    #[arg(long, value_name = "USD")]
    cached_input: Option<String>,
    /// A million output tokens
    #[arg(long, value_name = "USD")]
    output: Option<String>,
    /// Each request
    #[arg(long, value_name = "USD")]
    request: Option<String>,
    /// A second of device time
    #[arg(long, value_name = "USD")]
    gpu_second: Option<String>,
    /// An hour of device time
    #[arg(long, value_name = "USD")]
    gpu_hour: Option<String>,
    /// Device time at the example rate of this GPU; see `candela price gpus`
    #[arg(long, value_name = "NAME")]
    gpu: Option<String>,
    /// What a tenant is charged: tokens or device [default: tokens]
    #[arg(long)]
    billing: Option<String>,
    /// When it begins: 7d, 2026-12-31 or 2026-12-31T12:00:00Z [default: now]
    #[arg(long, value_name = "TIME")]
    from: Option<String>,
    /// When it ends [default: never]
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    #[command(flatten)]
    place: Place,
}

#[derive(Args, Debug)]
pub struct ListArgs {
    /// Of this model only
    model: Option<String>,
    #[command(flatten)]
    place: Place,
}

pub fn price(command: PriceCommand) -> Result<ExitCode> {
    match command {
        PriceCommand::Set(args) => set(*args)?,
        PriceCommand::List(args) => {
            let given = Given::default().with("model", args.model.map(Value::from));
            args.place.target()?.list(&PRICES, &given, ("after", "model"), &COLUMNS)?;
        }
        PriceCommand::History(args) => {
            let given = Given::default()
                .with("model", args.model.map(Value::from))
                .with("history", Value::from(true));
            args.place.target()?.list(&PRICES, &given, ("before", "version"), &COLUMNS)?;
        }
        PriceCommand::Gpus(place) => {
            let target = place.target()?;
            let rates = target.call(&GPUS, Given::default())?;
            let rows = rates["data"].as_array().map(Vec::as_slice).unwrap_or_default();
            let columns =
                [("GPU", "name"), ("EXAMPLE USD/HOUR", "gpu_hour_usd"), ("AS OF", "as_of")];
            target.print_rows(rows, &columns)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn set(args: SetArgs) -> Result<()> {
    let now_s = Clock::system().unix_s() as i64;
    let time = |text: Option<String>| {
        let at = text.map(|text| moment(&text, now_s, 1)).transpose();
        at.map(|at| at.map(Value::from))
    };
    let given = Given::default()
        .with("model", Value::from(args.model))
        .with("tenant", args.tenant.map(Value::from))
        .with("input_usd", args.input.map(Value::from))
        .with("cached_input_usd", args.cached_input.map(Value::from))
        .with("output_usd", args.output.map(Value::from))
        .with("request_usd", args.request.map(Value::from))
        .with("gpu_second_usd", args.gpu_second.map(Value::from))
        .with("gpu_hour_usd", args.gpu_hour.map(Value::from))
        .with("gpu", args.gpu.map(Value::from))
        .with("billing", args.billing.map(Value::from))
        .with("from", time(args.from)?)
        .with("until", time(args.until)?);
    let target = args.place.target()?;
    let made = target.call(&PRICE_SET, given)?;
    target.print_rows(&[made], &COLUMNS)
}
