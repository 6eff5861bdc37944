//! `candela key`.

use std::{io::Write, process::ExitCode};

use anyhow::Result;
use clap::{Args, Subcommand};
use serde_json::Value;

use crate::{
    admin::{Given, KEY_CHANGE, KEY_CREATE, KEY_REVOKE, KEY_ROTATE, KEYS},
    clock::Clock,
};

use super::{
    policy::{PolicyArgs, UnsetArgs},
    table::{Column, cell},
    target::{Place, Target},
    times::{moment, seconds},
};

const COLUMNS: [Column; 9] = [
    ("ID", "id"),
    ("TENANT", "tenant"),
    ("NAME", "name"),
    ("ROLE", "role"),
    ("STATE", "state"),
    ("MODELS", "policy.models"),
    ("CREATED", "created_at"),
    ("EXPIRES", "expires_at"),
    ("REVOKED", "revoked_at"),
];

#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a key; its secret is shown this once
    Create(CreateArgs),
    /// List keys, without their secrets
    List(ListArgs),
    /// Change a key's name, end or policy
    Set(SetArgs),
    /// Make a new key in the place of one, which ends after an overlap
    Rotate(RotateArgs),
    /// End a key now
    Revoke(RevokeArgs),
}

#[derive(Args, Debug)]
pub struct CreateArgs {
    /// Who pays for its use
    #[arg(long, value_name = "ID")]
    tenant: String,
    /// Its id, which is not the secret [default: made up]
    #[arg(long)]
    id: Option<String>,
    /// For people
    #[arg(long)]
    name: Option<String>,
    /// tenant uses models, operator sees everything, admin changes everything [default: tenant]
    #[arg(long)]
    role: Option<String>,
    /// When it ends: 30d, 2026-12-31 or 2026-12-31T12:00:00Z [default: never]
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    place: Place,
}

#[derive(Args, Debug)]
pub struct ListArgs {
    /// Of this tenant only
    #[arg(long, value_name = "ID")]
    tenant: Option<String>,
    #[command(flatten)]
    place: Place,
}

#[derive(Args, Debug)]
pub struct SetArgs {
    /// The key's id
    id: String,
    /// For people
    #[arg(long)]
    name: Option<String>,
    /// When it ends: 30d, 2026-12-31, 2026-12-31T12:00:00Z or never
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    unset: UnsetArgs,
    #[command(flatten)]
    place: Place,
}

#[derive(Args, Debug)]
pub struct RotateArgs {
    /// The id of the key that is to end
    id: String,
    /// Id of the new key [default: made up]
    #[arg(long, value_name = "ID")]
    new_id: Option<String>,
    /// How long the old key still works, such as 90s, 12h or 7d [default: 1d]
    #[arg(long, value_name = "TIME")]
    overlap: Option<String>,
    #[command(flatten)]
    place: Place,
}

#[derive(Args, Debug)]
pub struct RevokeArgs {
    /// The key's id
    id: String,
    #[command(flatten)]
    place: Place,
}

fn expires(text: Option<&str>) -> Result<Option<Value>> {
    match text {
        None => Ok(None),
        Some("never") => Ok(Some(Value::Null)),
        Some(text) => Ok(Some(moment(text, Clock::system().unix_s() as i64, 1)?.into())),
    }
}

pub fn key(command: KeyCommand) -> Result<ExitCode> {
    match command {
        KeyCommand::Create(args) => {
            let given = Given::default()
                .with("tenant", Value::from(args.tenant))
                .with("id", args.id.map(Value::from))
                .with("name", args.name.map(Value::from))
                .with("role", args.role.map(Value::from))
                .with("expires_at", expires(args.expires.as_deref())?);
            let target = args.place.target()?;
            let made = target.call(&KEY_CREATE, args.policy.add(given))?;
            show_secret(&target, &made)?;
        }
        KeyCommand::List(args) => {
            let given = Given::default().with("tenant", args.tenant.map(Value::from));
            args.place.target()?.list(&KEYS, &given, ("after", "id"), &COLUMNS)?;
        }
        KeyCommand::Set(args) => {
            let given = Given::default()
                .with("id", Value::from(args.id))
                .with("name", args.name.map(Value::from))
                .with("expires_at", expires(args.expires.as_deref())?);
            let target = args.place.target()?;
            let changed = target.call(&KEY_CHANGE, args.policy.add(args.unset.add(given)))?;
            target.print_rows(&[changed], &COLUMNS)?;
        }
        KeyCommand::Rotate(args) => {
            let overlap_s = args.overlap.as_deref().map(seconds).transpose()?;
            let given = Given::default()
                .with("id", Value::from(args.id))
                .with("new_id", args.new_id.map(Value::from))
                .with("overlap_s", overlap_s.map(Value::from));
            let target = args.place.target()?;
            let made = target.call(&KEY_ROTATE, given)?;
            show_secret(&target, &made)?;
        }
        KeyCommand::Revoke(args) => {
            let target = args.place.target()?;
            let ended =
                target.call(&KEY_REVOKE, Given::default().with("id", Value::from(args.id)))?;
            target.say(&ended, |ended| format!("key {} has ended", cell(ended, "id")))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The secret alone on standard output, so that `KEY=$(candela key create ...)` works; the rest beside.
fn show_secret(target: &Target, made: &Value) -> Result<()> {
    if !target.json {
        let mut about = format!("key {} of tenant {}", cell(made, "id"), cell(made, "tenant"));
        if made["replaces"].is_object() {
            let (id, end) = (cell(made, "replaces.id"), cell(made, "replaces.revoked_at"));
            about = format!("{about}; {id} works until {end}");
        }
        let shown = "its secret, which is shown this once:";
        // The secret must come out even where nobody reads this.
        let _ = writeln!(std::io::stderr(), "{about}\n{shown}");
    }
    target.say(made, |made| cell(made, "secret"))
}
