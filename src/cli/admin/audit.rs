//! `candela audit` and `candela events`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use serde_json::Value;

use crate::admin::{AUDIT, EVENTS, Given, Route};

use super::{table::Column, target::Place};

const LAST: i64 = 20;

#[derive(Args, Debug)]
pub struct AuditArgs {
    #[command(flatten)]
    feed: FeedArgs,
}

#[derive(Args, Debug)]
pub struct EventsArgs {
    #[command(flatten)]
    feed: FeedArgs,
}

#[derive(Args, Debug)]
struct FeedArgs {
    /// How many of the last entries
    #[arg(short = 'n', long, value_name = "N", default_value_t = LAST)]
    last: i64,
    /// All entries
    #[arg(long, conflicts_with = "last")]
    all: bool,
    #[command(flatten)]
    place: Place,
}

impl FeedArgs {
    fn print(self, route: &'static Route, columns: &[Column]) -> Result<ExitCode> {
        let target = self.place.target()?;
        if self.all {
            let given = Given::default().with("after", Value::from(0));
            target.list(route, &given, ("after", "id"), columns)?;
            return Ok(ExitCode::SUCCESS);
        }
        let page = target.call(route, Given::default().with("limit", Value::from(self.last)))?;
        let rows = page["data"].as_array().map(Vec::as_slice).unwrap_or_default();
        target.print_rows(rows, columns)?;
        Ok(ExitCode::SUCCESS)
    }
}

pub fn audit(args: AuditArgs) -> Result<ExitCode> {
    let columns = [
        ("ID", "id"),
        ("AT", "at"),
        ("WHO", "actor"),
        ("WHAT", "action"),
        ("TARGET", "target"),
        ("BEFORE", "before"),
        ("AFTER", "after"),
    ];
    args.feed.print(&AUDIT, &columns)
}

pub fn events(args: EventsArgs) -> Result<ExitCode> {
    let columns =
        [("ID", "id"), ("AT", "at"), ("KIND", "kind"), ("SCOPE", "scope"), ("DETAIL", "detail")];
    args.feed.print(&EVENTS, &columns)
}
