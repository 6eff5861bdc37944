//! `candela budget`.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};
use serde_json::Value;

use crate::admin::{BUDGET_DELETE, BUDGET_SET, BUDGETS, Given};

use super::{
    scope::Scope,
    table::{Column, cell},
    target::Place,
};

const COLUMNS: [Column; 9] = [
    ("SCOPE", "scope"),
    ("SPAN", "span"),
    ("LIMIT USD", "limit_usd"),
    ("SPENT", "spent_usd"),
    ("HELD", "held_usd"),
    ("LEFT", "left_usd"),
    ("SOFT %", "soft_percent"),
    ("ZONE", "zone"),
    ("RESETS", "resets_at"),
];

#[derive(Debug, Subcommand)]
pub enum BudgetCommand {
    /// Make, raise or lower a budget
    Set(SetArgs),
    /// List budgets with what is spent, held and left
    List(Place),
    /// Take a budget away
    Delete(DeleteArgs),
}

#[derive(Args, Debug)]
pub struct SetArgs {
    #[command(flatten)]
    scope: Scope,
    #[command(flatten)]
    limit: LimitInUsd,
    /// Whose days, weeks and months, such as Europe/Berlin [default: UTC, or as it was]
    #[arg(long)]
    zone: Option<String>,
    /// Percentages that raise an event, such as 50,80,95 [default: 50,80,95, or as they were]
    #[arg(long, value_name = "PERCENT", value_delimiter = ',')]
    soft: Option<Vec<u8>>,
    #[command(flatten)]
    place: Place,
}

#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub struct LimitInUsd {
    /// USD an hour
    #[arg(long, value_name = "USD")]
    hour: Option<String>,
    /// USD a day
    #[arg(long, value_name = "USD")]
    day: Option<String>,
    /// USD a week, from Monday
    #[arg(long, value_name = "USD")]
    week: Option<String>,
    /// USD a month
    #[arg(long, value_name = "USD")]
    month: Option<String>,
    /// USD in all
    #[arg(long, value_name = "USD")]
    total: Option<String>,
}

#[derive(Args, Debug)]
pub struct DeleteArgs {
    #[command(flatten)]
    scope: Scope,
    /// hour, day, week, month or total
    span: String,
    #[command(flatten)]
    place: Place,
}

impl LimitInUsd {
    fn add(self, given: Given) -> Given {
        let named = [
            ("hour", self.hour),
            ("day", self.day),
            ("week", self.week),
            ("month", self.month),
            ("total", self.total),
        ];
        // clap lets exactly one of them through.
        named.into_iter().fold(given, |given, (span, limit)| {
            let span = limit.is_some().then(|| span.into());
            given.with("span", span).with("limit_usd", limit.map(Value::from))
        })
    }
}

pub fn budget(command: BudgetCommand) -> Result<ExitCode> {
    match command {
        BudgetCommand::Set(args) => {
            let given = Given::default()
                .with("scope", Value::from(args.scope.name()))
                .with("zone", args.zone.map(Value::from))
                .with("soft_percent", args.soft.map(Value::from));
            let target = args.place.target()?;
            let set = target.call(&BUDGET_SET, args.limit.add(given))?;
            target.print_rows(&[set], &COLUMNS)?;
        }
        BudgetCommand::List(place) => {
            place.target()?.list(&BUDGETS, &Given::default(), ("after", "scope"), &COLUMNS)?;
        }
        BudgetCommand::Delete(args) => {
            let given = Given::default()
                .with("scope", Value::from(args.scope.name()))
                .with("span", Value::from(args.span));
            let target = args.place.target()?;
            let gone = target.call(&BUDGET_DELETE, given)?;
            target.say(&gone, |gone| {
                format!("the {} budget of {} is gone", cell(gone, "span"), cell(gone, "scope"))
            })?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
