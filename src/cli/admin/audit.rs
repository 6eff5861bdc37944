//! `candela audit` and `candela events`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use serde_json::Value;

use crate::admin::{AUDIT, EVENTS, Given, Route};

use super::{
    table::{Column, cell},
    target::Place,
};

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
            let (given, mut rows) = (Given::default().with("after", Value::from(0)), Vec::new());
            target.all(route, &given, ("after", "id"), |mut row| {
                summarise(&mut row);
                rows.push(row);
                Ok(())
            })?;
            target.print_rows(&rows, columns)?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut page =
            target.call(route, Given::default().with("limit", Value::from(self.last)))?;
        let rows = page["data"].as_array_mut().map(Vec::as_mut_slice).unwrap_or_default();
        rows.iter_mut().for_each(summarise);
        target.print_rows(rows, columns)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Adds what differs between before and after: `limit_usd: 100 -> 50`.
fn summarise(row: &mut Value) {
    let (Value::Object(before), Value::Object(after)) = (&row["before"], &row["after"]) else {
        return;
    };
    let changed = after.iter().filter(|(name, value)| before.get(*name) != Some(value));
    let changed = changed.map(|(name, _)| {
        format!("{name}: {} -> {}", cell(&row["before"], name), cell(&row["after"], name))
    });
    row["change"] = changed.collect::<Vec<_>>().join("; ").into();
}

pub fn audit(args: AuditArgs) -> Result<ExitCode> {
    let columns = [
        ("ID", "id"),
        ("AT", "at"),
        ("WHO", "actor"),
        ("WHAT", "action"),
        ("TARGET", "target"),
        ("CHANGE", "change"),
    ];
    args.feed.print(&AUDIT, &columns)
}

pub fn events(args: EventsArgs) -> Result<ExitCode> {
    let columns =
        [("ID", "id"), ("AT", "at"), ("KIND", "kind"), ("SCOPE", "scope"), ("DETAIL", "detail")];
    args.feed.print(&EVENTS, &columns)
}
