//! `candela ledger`: verify, backup, restore.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use super::open_ledger::{FILE, lock, open_db};
use crate::{
    clock::Clock,
    config::{LedgerPlace, Secret, Settings},
    ledger::{
        book::{Problem, inspect},
        db::Sqlite,
        schema::{SCHEMA_VERSION, version},
    },
};

#[derive(Args, Debug)]
pub struct LedgerArgs {
    #[command(subcommand)]
    action: Action,
    /// Configuration file [default: candela.toml in the working directory, where there is one]
    #[arg(long, global = true, env = "CANDELA_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the ledger is kept [default: ~/.local/share/candela]
    #[arg(long, global = true, env = "CANDELA_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// PostgreSQL URL of the ledger, in place of a directory (better given in the environment)
    #[arg(long, global = true, env = "CANDELA_LEDGER", hide_env_values = true, value_name = "URL")]
    ledger: Option<Secret>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Compute every sum again; exits with 1 where one does not hold. A server may run meanwhile
    Verify {
        /// A backup, in place of the ledger
        file: Option<PathBuf>,
    },
    /// Write a verified copy to a new file. A server may run meanwhile
    Backup { file: PathBuf },
    /// Put a backup in the place of the ledger, once it is verified. No server may run
    Restore {
        file: PathBuf,
        /// Replace a ledger that is there; it is kept beside the new one
        #[arg(long)]
        force: bool,
    },
}

/// 0 where all is well, 1 where a sum does not hold or the command failed.
pub fn ledger(args: LedgerArgs) -> Result<ExitCode> {
    let settings = Settings {
        config: args.config,
        data_dir: args.data_dir,
        ledger: args.ledger,
        ..Settings::default()
    };
    let place = LedgerPlace::load(settings)?;
    let dir = match (&place, &args.action) {
        (LedgerPlace::Directory(dir), _) => dir.clone(),
        (LedgerPlace::Postgres(_), Action::Verify { file: Some(file) }) => return verify(file),
        (LedgerPlace::Postgres(_), Action::Verify { file: None }) => {
            return verify_database(&place);
        }
        (LedgerPlace::Postgres(_), _) => {
            bail!(
                "the ledger is in PostgreSQL: back it up with pg_dump, restore it with pg_restore"
            )
        }
    };
    match args.action {
        Action::Verify { file } => verify(&file.unwrap_or_else(|| dir.join(FILE))),
        Action::Backup { file } => backup(&dir.join(FILE), &file),
        Action::Restore { file, force } => restore(&file, &dir, force),
    }
}

fn verify(path: &Path) -> Result<ExitCode> {
    report(&path.display().to_string(), &problems(path)?)
}

fn verify_database(place: &LedgerPlace) -> Result<ExitCode> {
    let mut db = open_db(place)?;
    let found = version(&mut *db).context("the database has no ledger")?;
    if found != SCHEMA_VERSION {
        bail!("the ledger has schema version {found}, this candela knows {SCHEMA_VERSION}");
    }
    report("the database", &inspect(&mut *db, |book| book.verify())?)
}

fn report(what: &str, problems: &[Problem]) -> Result<ExitCode> {
    for problem in problems {
        writeln!(std::io::stdout(), "{problem}")?;
    }
    if problems.is_empty() {
        writeln!(std::io::stdout(), "{what}: every sum holds")?;
        return Ok(ExitCode::SUCCESS);
    }
    bail!("{what}: {} problems", problems.len())
}

fn problems(path: &Path) -> Result<Vec<Problem>> {
    let mut db = open(path)?;
    let damage: Vec<Problem> = db.damage()?.into_iter().map(Problem).collect();
    if !damage.is_empty() {
        // Sums over damaged pages mean nothing.
        return Ok(damage);
    }
    Ok(inspect(&mut db, |book| book.verify())?)
}

/// A ledger that this version can read.
fn open(path: &Path) -> Result<Sqlite> {
    if !path.is_file() {
        bail!("{}: there is no such ledger", path.display());
    }
    let mut db = Sqlite::open_existing(path, Clock::system())?;
    let found = version(&mut db).with_context(|| format!("{} is no ledger", path.display()))?;
    if found != SCHEMA_VERSION {
        bail!(
            "{}: it has schema version {found}, this candela knows {SCHEMA_VERSION}: use the \
             candela that wrote it, or let `candela serve` bring an older one up to date",
            path.display()
        );
    }
    Ok(db)
}

/// Refuses a copy whose sums do not hold.
fn check_sums(path: &Path) -> Result<()> {
    match &problems(path)?[..] {
        [] => Ok(()),
        [first, rest @ ..] => {
            bail!("{}: {first} (and {} more problems)", path.display(), rest.len())
        }
    }
}

fn backup(from: &Path, to: &Path) -> Result<ExitCode> {
    if to.exists() {
        bail!("{} is there already: name a new file", to.display());
    }
    let part = beside(to, ".part");
    copy(from, &part)?;
    put(&part, to)?;
    writeln!(std::io::stdout(), "{} is a verified copy of {}", to.display(), from.display())?;
    Ok(ExitCode::SUCCESS)
}

/// A durable, verified copy.
fn copy(from: &Path, part: &Path) -> Result<()> {
    let mut db = open(from)?;
    remove(part)?;
    db.copy_to(part)?;
    let checked = check_sums(part).and_then(|()| sync(part));
    // What the check left of a write-ahead log is of no use to anyone.
    for suffix in ["-wal", "-shm"] {
        remove(&beside(part, suffix))?;
    }
    if checked.is_err() {
        remove(part)?;
    }
    checked
}

fn restore(from: &Path, dir: &Path, force: bool) -> Result<ExitCode> {
    let _lock = lock(dir)?;
    let to = dir.join(FILE);
    if to.exists() && !force {
        bail!("{} is there already: --force puts the backup in its place", to.display());
    }
    let part = beside(&to, ".part");
    copy(from, &part)?;
    if to.exists() {
        set_aside(&to)?;
    }
    put(&part, &to)?;
    writeln!(std::io::stdout(), "{} is restored from {}", to.display(), from.display())?;
    Ok(ExitCode::SUCCESS)
}

/// Moves a ledger and its log out of the way: a log must never meet a file that it is not of.
fn set_aside(path: &Path) -> Result<()> {
    // Opening and closing it folds the log into the file, where it can still be opened.
    drop(Sqlite::open_existing(path, Clock::system()));
    let old = beside(path, &format!(".replaced-{}", Clock::system().unix_ns()));
    for suffix in ["-wal", "-shm", ""] {
        let (from, to) = (beside(path, suffix), beside(&old, suffix));
        if from.exists() {
            fs::rename(&from, &to).with_context(|| format!("cannot move {}", from.display()))?;
        }
    }
    sync_dir(path)?;
    writeln!(std::io::stderr(), "the ledger that was there is {} now", old.display())?;
    Ok(())
}

fn put(part: &Path, to: &Path) -> Result<()> {
    fs::rename(part, to).with_context(|| format!("cannot make {}", to.display()))?;
    sync_dir(to)
}

fn sync(path: &Path) -> Result<()> {
    let synced = File::open(path).and_then(|file| file.sync_all());
    synced.with_context(|| format!("cannot sync {}", path.display()))
}

fn sync_dir(path: &Path) -> Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    sync(dir.unwrap_or(Path::new(".")))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// `path` with something after its name.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
