//! The two databases behind one small trait. Every statement of the ledger is written once, in the
//! part of SQL that SQLite and PostgreSQL share: `$1`, `$2` first appear in that order, integers are
//! BIGINT, sums are cast back to it.

pub mod postgres;
mod sqlite;

use thiserror::Error;

pub use postgres::Postgres;
pub use sqlite::Sqlite;

/// A value of a row or a parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Val {
    Null,
    Int(i64),
    Text(String),
    Blob(Vec<u8>),
}

/// A statement that reads, and its parameters.
pub type Question = (&'static str, Vec<Val>);

/// A row, read by position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row(pub Vec<Val>);

/// Why the database did not do what it was asked.
#[derive(Debug, Error)]
pub enum DbError {
    /// Full disk, lost server, failed read: nothing of the transaction happened, trying again may help.
    #[error("the ledger's database is not available: {0}")]
    Unavailable(String),
    /// The connection was lost while committing: all of the transaction happened, or nothing.
    #[error("the ledger's database is not available: {0} (what was asked may have been done)")]
    Uncertain(String),
    /// Another process holds it.
    #[error("the ledger is locked: {0}")]
    Locked(String),
    /// The file or schema is not one this version can use.
    #[error("{0}")]
    Unusable(String),
    /// The database does not take this value or row; everything else goes on.
    #[error("the ledger does not take this: {0}")]
    Rejected(String),
    /// A row is not what this program writes.
    #[error("the ledger holds a row that it should not: {0}")]
    Corrupt(String),
}

/// One connection. A transaction is open between `begin` and `commit` or `rollback`.
pub trait Db: Send {
    /// Starts a transaction that no other writer can interleave with, and asks the first questions in
    /// it, at once where there is a way to go.
    fn begin_asking(&mut self, first: &[Question]) -> Result<Vec<Vec<Row>>, DbError>;
    fn begin(&mut self) -> Result<(), DbError> {
        self.begin_asking(&[]).map(drop)
    }
    /// Starts a transaction that sees one state and writes nothing. Ends with `rollback`.
    fn begin_reading(&mut self) -> Result<(), DbError> {
        self.begin()
    }
    fn commit(&mut self) -> Result<(), DbError>;
    /// Leaves nothing of the transaction. Never fails: a connection that cannot roll back is dropped
    /// and made anew at the next `begin`.
    fn rollback(&mut self);
    fn query(&mut self, sql: &'static str, values: &[Val]) -> Result<Vec<Row>, DbError>;
    /// The rows of each question, asked for all at once.
    fn query_each(&mut self, questions: &[Question]) -> Result<Vec<Vec<Row>>, DbError> {
        questions.iter().map(|(sql, values)| self.query(sql, values)).collect()
    }
    /// A statement of a transaction of which nobody asks what it changed. It may be sent with what
    /// follows, up to `commit`, and its failure told there.
    fn write(&mut self, sql: &'static str, values: &[Val]) -> Result<(), DbError> {
        self.execute(sql, values).map(drop)
    }
    /// The number of rows changed.
    fn execute(&mut self, sql: &'static str, values: &[Val]) -> Result<u64, DbError>;
    /// Runs several statements without parameters, for migrations.
    fn batch(&mut self, sql: &str) -> Result<(), DbError>;
    /// Nanoseconds since 1970 by the clock that judges leases.
    fn now_ns(&mut self) -> Result<i64, DbError>;
}

impl DbError {
    /// Whether one job's own data is the reason, so that the others of its group may go on.
    pub fn is_of_one_job(&self) -> bool {
        matches!(self, Self::Rejected(_) | Self::Corrupt(_))
    }
}

impl Row {
    pub fn int(&self, index: usize) -> Result<i64, DbError> {
        match self.0.get(index) {
            Some(Val::Int(value)) => Ok(*value),
            other => Err(DbError::Corrupt(format!("column {index} is {other:?}, not a number"))),
        }
    }

    pub fn int_or_null(&self, index: usize) -> Result<Option<i64>, DbError> {
        match self.0.get(index) {
            Some(Val::Null) => Ok(None),
            _ => self.int(index).map(Some),
        }
    }

    pub fn text(&self, index: usize) -> Result<&str, DbError> {
        match self.0.get(index) {
            Some(Val::Text(value)) => Ok(value),
            other => Err(DbError::Corrupt(format!("column {index} is {other:?}, not text"))),
        }
    }

    pub fn text_or_null(&self, index: usize) -> Result<Option<&str>, DbError> {
        match self.0.get(index) {
            Some(Val::Null) => Ok(None),
            _ => self.text(index).map(Some),
        }
    }

    pub fn blob(&self, index: usize) -> Result<&[u8], DbError> {
        match self.0.get(index) {
            Some(Val::Blob(value)) => Ok(value),
            other => Err(DbError::Corrupt(format!("column {index} is {other:?}, not bytes"))),
        }
    }
}

impl From<i64> for Val {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<&str> for Val {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<String> for Val {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

impl From<&[u8]> for Val {
    fn from(value: &[u8]) -> Self {
        Self::Blob(value.to_owned())
    }
}

impl<T: Into<Val>> From<Option<T>> for Val {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}
