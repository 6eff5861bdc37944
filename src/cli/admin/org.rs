//! `candela org`.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};
use serde_json::Value;

use crate::admin::{Given, ORG_CREATE, ORGS};

use super::{table::cell, target::Place};

#[derive(Debug, Subcommand)]
pub enum OrgCommand {
    /// Make an organisation
    Create(CreateArgs),
    /// List organisations
    List(Place),
}

#[derive(Args, Debug)]
pub struct CreateArgs {
    /// Its id: lower-case letters, digits, `.`, `_`, `-`
    id: String,
    /// For people
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    place: Place,
}

pub fn org(command: OrgCommand) -> Result<ExitCode> {
    match command {
        OrgCommand::Create(args) => {
            let given = Given::default()
                .with("id", Value::from(args.id))
                .with("name", args.name.map(Value::from));
            let target = args.place.target()?;
            let made = target.call(&ORG_CREATE, given)?;
            target.say(&made, |made| format!("organisation {} is there", cell(made, "id")))?;
        }
        OrgCommand::List(place) => {
            let columns = [("ID", "id"), ("NAME", "name"), ("CREATED", "created_at")];
            place.target()?.list(&ORGS, &Given::default(), ("after", "id"), &columns)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
