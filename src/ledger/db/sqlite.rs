//! SQLite in one file of the data directory: write-ahead log, every commit synced.

use std::{path::Path, time::Duration};

use rusqlite::{
    Connection, ErrorCode, OpenFlags, ToSql,
    types::{ToSqlOutput, Value, ValueRef},
};

use super::{Db, DbError, Question, Row, Val};
use crate::clock::Clock;

/// How long a writer waits for another process, such as a command beside the server.
const BUSY: Duration = Duration::from_secs(5);
const STATEMENTS_CACHED: usize = 128;

/// A connection to a ledger file.
pub struct Sqlite {
    connection: Connection,
    clock: Clock,
}

impl Sqlite {
    /// Opens or makes the file.
    pub fn open(path: &Path, clock: Clock) -> Result<Self, DbError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE;
        Self::open_as(path, flags, clock)
    }

    /// Opens a file that is there.
    pub fn open_existing(path: &Path, clock: Clock) -> Result<Self, DbError> {
        Self::open_as(path, OpenFlags::SQLITE_OPEN_READ_WRITE, clock)
    }

    /// Writes what is committed to a new file, while others go on writing to this one.
    ///
    /// # Errors
    /// The file is there already, or cannot be written.
    pub fn copy_to(&mut self, path: &Path) -> Result<(), DbError> {
        let name = path.to_str().ok_or_else(|| {
            DbError::Unusable(format!("{}: the name is not UTF-8", path.display()))
        })?;
        let copied = self.connection.execute("VACUUM INTO ?1", [name]);
        copied.map(|_| ()).map_err(|error| at(path, of(error)))
    }

    /// What is wrong with the file below the level of the ledger: pages, indexes, references.
    pub fn damage(&mut self) -> Result<Vec<String>, DbError> {
        let mut found = Vec::new();
        for row in self.query("PRAGMA integrity_check", &[])? {
            found.extend(
                (row.text(0)? != "ok").then(|| row.text(0).map(str::to_owned)).transpose()?,
            );
        }
        for row in self.query("PRAGMA foreign_key_check", &[])? {
            found.push(format!("a row of {} names a row that is not there", row.text(0)?));
        }
        Ok(found)
    }

    fn open_as(path: &Path, flags: OpenFlags, clock: Clock) -> Result<Self, DbError> {
        let opened = Connection::open_with_flags(path, flags).and_then(|connection| {
            connection.busy_timeout(BUSY)?;
            connection.set_prepared_statement_cache_capacity(STATEMENTS_CACHED);
            // The answer to `journal_mode` is a row, so this is a query.
            let mode: String =
                connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))?;
            connection.execute_batch("PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON")?;
            Ok((connection, mode))
        });
        let (connection, mode) = opened.map_err(|error| at(path, of(error)))?;
        if mode != "wal" {
            let what =
                format!("{}: this file system cannot hold a write-ahead log", path.display());
            return Err(DbError::Unusable(what));
        }
        Ok(Self { connection, clock })
    }
}

impl Db for Sqlite {
    fn begin_asking(&mut self, first: &[Question]) -> Result<Vec<Vec<Row>>, DbError> {
        self.batch("BEGIN IMMEDIATE")?;
        self.query_each(first)
    }

    fn begin_reading(&mut self) -> Result<(), DbError> {
        self.batch("BEGIN")
    }

    fn commit(&mut self) -> Result<(), DbError> {
        self.batch("COMMIT")
    }

    fn rollback(&mut self) {
        if !self.connection.is_autocommit() {
            // A failed COMMIT may have rolled back already; then there is nothing to undo.
            let _ = self.connection.execute_batch("ROLLBACK");
        }
    }

    fn query(&mut self, sql: &'static str, values: &[Val]) -> Result<Vec<Row>, DbError> {
        let mut statement = self.connection.prepare_cached(sql).map_err(of)?;
        let columns = statement.column_count();
        let mut rows = statement.query(rusqlite::params_from_iter(values)).map_err(of)?;
        let mut found = Vec::new();
        while let Some(row) = rows.next().map_err(of)? {
            let value = |index| row.get_ref(index).map_err(of).and_then(read);
            found.push(Row((0..columns).map(value).collect::<Result<_, _>>()?));
        }
        Ok(found)
    }

    fn execute(&mut self, sql: &'static str, values: &[Val]) -> Result<u64, DbError> {
        let mut statement = self.connection.prepare_cached(sql).map_err(of)?;
        let changed = statement.execute(rusqlite::params_from_iter(values)).map_err(of)?;
        Ok(changed as u64)
    }

    fn batch(&mut self, sql: &str) -> Result<(), DbError> {
        self.connection.execute_batch(sql).map_err(of)
    }

    fn now_ns(&mut self) -> Result<i64, DbError> {
        Ok(self.clock.unix_ns())
    }
}

impl ToSql for Val {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self {
            Self::Null => ToSqlOutput::Owned(Value::Null),
            Self::Int(value) => ToSqlOutput::Owned(Value::Integer(*value)),
            Self::Text(value) => ToSqlOutput::Borrowed(ValueRef::Text(value.as_bytes())),
            Self::Blob(value) => ToSqlOutput::Borrowed(ValueRef::Blob(value)),
        })
    }
}

fn read(value: ValueRef<'_>) -> Result<Val, DbError> {
    Ok(match value {
        ValueRef::Null => Val::Null,
        ValueRef::Integer(value) => Val::Int(value),
        ValueRef::Text(value) => Val::Text(
            String::from_utf8(value.to_vec())
                .map_err(|_| DbError::Corrupt("text that is not UTF-8".into()))?,
        ),
        ValueRef::Blob(value) => Val::Blob(value.to_vec()),
        ValueRef::Real(value) => return Err(DbError::Corrupt(format!("the float {value}"))),
    })
}

fn of(error: rusqlite::Error) -> DbError {
    let code = error.sqlite_error_code();
    match code {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            DbError::Locked(format!("another process writes to it ({error})"))
        }
        Some(ErrorCode::ConstraintViolation) => DbError::Rejected(error.to_string()),
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => DbError::Unusable(format!(
            "this is no ledger, or a damaged one ({error}): restore a backup with `candela ledger restore`"
        )),
        _ => DbError::Unavailable(error.to_string()),
    }
}

fn at(path: &Path, error: DbError) -> DbError {
    match error {
        DbError::Unavailable(what) => DbError::Unavailable(format!("{}: {what}", path.display())),
        DbError::Unusable(what) => DbError::Unusable(format!("{}: {what}", path.display())),
        DbError::Locked(what) => DbError::Locked(format!("{}: {what}", path.display())),
        other => other,
    }
}
