//! `candela limit`.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};
use serde_json::Value;

use crate::admin::{Given, LIMIT_DELETE, LIMIT_SET, LIMITS};

use super::{
    scope::Scope,
    table::{Column, cell},
    target::Place,
};

const COLUMNS: [Column; 4] = [
    ("SCOPE", "scope"),
    ("REQUESTS/MIN", "requests_per_minute"),
    ("TOKENS/MIN", "tokens_per_minute"),
    ("SEQUENCES", "sequences_max"),
];

#[derive(Debug, Subcommand)]
pub enum LimitCommand {
    /// Set rate limits; those that are not named stay
    Set(SetArgs),
    /// List rate limits
    List(Place),
    /// Take the rate limits of a scope away
    Delete(DeleteArgs),
}

#[derive(Args, Debug)]
pub struct SetArgs {
    #[command(flatten)]
    scope: Scope,
    /// Requests begun a minute
    #[arg(long, value_name = "N")]
    requests: Option<i64>,
    /// Tokens a minute, input and output together
    #[arg(long, value_name = "N")]
    tokens: Option<i64>,
    /// Choices running at once
    #[arg(long, value_name = "N")]
    sequences: Option<i64>,
    #[command(flatten)]
    place: Place,
}

#[derive(Args, Debug)]
pub struct DeleteArgs {
    #[command(flatten)]
    scope: Scope,
    #[command(flatten)]
    place: Place,
}

pub fn limit(command: LimitCommand) -> Result<ExitCode> {
    match command {
        LimitCommand::Set(args) => {
            let given = Given::default()
                .with("scope", Value::from(args.scope.name()))
                .with("requests_per_minute", args.requests.map(Value::from))
                .with("tokens_per_minute", args.tokens.map(Value::from))
                .with("sequences_max", args.sequences.map(Value::from));
            let target = args.place.target()?;
            let set = target.call(&LIMIT_SET, given)?;
            target.print_rows(&[set], &COLUMNS)?;
        }
        LimitCommand::List(place) => {
            place.target()?.list(&LIMITS, &Given::default(), ("after", "scope"), &COLUMNS)?;
        }
        LimitCommand::Delete(args) => {
            let given = Given::default().with("scope", Value::from(args.scope.name()));
            let target = args.place.target()?;
            let gone = target.call(&LIMIT_DELETE, given)?;
            target.say(&gone, |gone| format!("the limits of {} are gone", cell(gone, "scope")))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
