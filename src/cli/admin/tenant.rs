//! `candela tenant`.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};
use serde_json::Value;

use crate::admin::{Given, TENANT_CHANGE, TENANT_CREATE, TENANT_GET, TENANTS};

use super::{
    policy::{PolicyArgs, UnsetArgs},
    table::{Column, cell},
    target::Place,
};

const COLUMNS: [Column; 8] = [
    ("ID", "id"),
    ("ORG", "org"),
    ("NAME", "name"),
    ("MODELS", "policy.models"),
    ("MAX COST USD", "policy.max_cost_usd"),
    ("NATURAL STOP", "policy.natural_stop"),
    ("SOFT LANDING %", "policy.soft_landing_percent"),
    ("CREATED", "created_at"),
];

#[derive(Debug, Subcommand)]
pub enum TenantCommand {
    /// Make a tenant
    Create(CreateArgs),
    /// List tenants
    List(ListArgs),
    /// Show one tenant
    Show(ShowArgs),
    /// Change a tenant's name or policy
    Set(SetArgs),
}

#[derive(Args, Debug)]
pub struct CreateArgs {
    /// Its id: lower-case letters, digits, `.`, `_`, `-`
    id: String,
    /// Its organisation [default: local, the one of this server]
    #[arg(long, value_name = "ID")]
    org: Option<String>,
    /// For people
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    place: Place,
}

#[derive(Args, Debug)]
pub struct ListArgs {
    /// Of this organisation only
    #[arg(long, value_name = "ID")]
    org: Option<String>,
    #[command(flatten)]
    place: Place,
}

#[derive(Args, Debug)]
pub struct ShowArgs {
    /// The tenant
    id: String,
    #[command(flatten)]
    place: Place,
}

#[derive(Args, Debug)]
pub struct SetArgs {
    /// The tenant
    id: String,
    /// For people
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    unset: UnsetArgs,
    #[command(flatten)]
    place: Place,
}

pub fn tenant(command: TenantCommand) -> Result<ExitCode> {
    match command {
        TenantCommand::Create(args) => {
            let given = Given::default()
                .with("id", Value::from(args.id))
                .with("org", args.org.map(Value::from))
                .with("name", args.name.map(Value::from));
            let target = args.place.target()?;
            let made = target.call(&TENANT_CREATE, args.policy.add(given))?;
            target.say(&made, |made| {
                let id = cell(made, "id");
                format!(
                    "tenant {id} is there, in organisation {}; make it a key with\n  candela key create --tenant {id}",
                    cell(made, "org")
                )
            })?;
        }
        TenantCommand::List(args) => {
            let given = Given::default().with("org", args.org.map(Value::from));
            args.place.target()?.list(&TENANTS, &given, ("after", "id"), &COLUMNS)?;
        }
        TenantCommand::Show(args) => {
            let target = args.place.target()?;
            let found =
                target.call(&TENANT_GET, Given::default().with("id", Value::from(args.id)))?;
            target.print_rows(&[found], &COLUMNS)?;
        }
        TenantCommand::Set(args) => {
            let given = Given::default()
                .with("id", Value::from(args.id))
                .with("name", args.name.map(Value::from));
            let target = args.place.target()?;
            let changed = target.call(&TENANT_CHANGE, args.policy.add(args.unset.add(given)))?;
            target.print_rows(&[changed], &COLUMNS)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
