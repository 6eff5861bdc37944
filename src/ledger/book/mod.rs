//! One transaction of the ledger: reads, decides, writes. Either all of it happens or nothing.
//!
//! Totals of windows are kept in memory while the book is open, so that a batch of many requests
//! writes each of them once.

mod ahead;
mod budgets;
mod listing;
mod move_money;
mod open;
mod quote;
mod rates;
mod requests;
mod roll_up;
mod running;
mod setup;
mod verify;

use std::collections::{BTreeMap, HashMap};

pub use ahead::Subjects;
pub use budgets::Budget;
pub use listing::{AuditRow, BudgetState, EventRow, KeyRow, OrgRow, PriceRow, TenantRow};
pub use quote::Quote;
pub use rates::RateLimit;
pub use roll_up::{DAY_NS, RETENTION_DAYS_MIN};
pub use running::replica_of;
pub use setup::{KeySpec, KnownKey, PriceSpec, Role, key_hash};
pub use verify::Problem;

use super::{
    db::{Db, DbError, Question, Row, Val},
    rows::{Event, EventKind},
    schema::COUNTERS,
};
use ahead::Ahead;
use budgets::{Total, TotalKey};

/// An open transaction.
pub struct Book<'a> {
    db: &'a mut dyn Db,
    now_ns: i64,
    counters: HashMap<&'static str, i64>,
    counters_read: HashMap<&'static str, i64>,
    /// Whether anything was written: a transaction that only reads leaves no trace and syncs nothing.
    written: bool,
    budgets: HashMap<String, Vec<Budget>>,
    totals: BTreeMap<TotalKey, Total>,
    ahead: Ahead,
    events: Vec<Event>,
}

/// Runs `work` in one transaction. An error leaves the database as it was.
pub fn transact<T>(
    db: &mut dyn Db,
    work: impl FnOnce(&mut Book<'_>) -> Result<T, DbError>,
) -> Result<(T, Vec<Event>), DbError> {
    transact_asking(db, Vec::new(), |book, _| work(book))
}

/// As [`transact`], and `work` gets the answers to `first`, which were asked for with the beginning.
pub fn transact_asking<T>(
    db: &mut dyn Db,
    first: Vec<Question>,
    work: impl FnOnce(&mut Book<'_>, Vec<Vec<Row>>) -> Result<T, DbError>,
) -> Result<(T, Vec<Event>), DbError> {
    let mut questions = first;
    questions.push(counters());
    let done = db.begin_asking(&questions).and_then(|mut answers| {
        let counters = answers.pop().unwrap_or_default();
        let mut book = Book::begun(db, &counters)?;
        let value = work(&mut book, answers)?;
        Ok((value, book.flush()?))
    });
    let committed = done.and_then(|done| db.commit().map(|()| done));
    if committed.is_err() {
        db.rollback();
    }
    committed
}

/// Reads in one snapshot, which keeps no writer waiting. What `work` writes is undone.
pub fn inspect<T>(
    db: &mut dyn Db,
    work: impl FnOnce(&mut Book<'_>) -> Result<T, DbError>,
) -> Result<T, DbError> {
    let begun = db.begin_reading().and_then(|()| {
        let (sql, values) = counters();
        db.query(sql, &values)
    });
    let found = begun.and_then(|counters| work(&mut Book::begun(db, &counters)?));
    db.rollback();
    found
}

fn counters() -> Question {
    ("SELECT name, value FROM meta", Vec::new())
}

impl<'a> Book<'a> {
    fn begun(db: &'a mut dyn Db, found: &[Row]) -> Result<Self, DbError> {
        let mut counters = HashMap::new();
        for row in found {
            let name = row.text(0)?;
            if let Some(known) = COUNTERS.into_iter().find(|counter| *counter == name) {
                counters.insert(known, row.int(1)?);
            }
        }
        // The wall clock may step back; the ledger's time does not, or spend would move into a
        // window that is over.
        let latest = counters.get("clock").copied().unwrap_or(0);
        let now_ns = db.now_ns()?.max(latest);
        let counters_read = counters.clone();
        counters.insert("clock", now_ns);
        Ok(Self {
            db,
            now_ns,
            counters_read,
            written: false,
            counters,
            budgets: HashMap::new(),
            totals: BTreeMap::new(),
            ahead: Ahead::default(),
            events: Vec::new(),
        })
    }

    /// Nanoseconds since 1970; never before any time seen by an earlier transaction.
    pub fn now_ns(&self) -> i64 {
        self.now_ns
    }

    /// Changes with everything an operator changes.
    pub fn revision(&self) -> i64 {
        self.counters.get("revision").copied().unwrap_or(0)
    }

    /// Writes what is kept in memory.
    fn flush(mut self) -> Result<Vec<Event>, DbError> {
        self.write_totals()?;
        for event in std::mem::take(&mut self.events) {
            let id = self.next("event");
            self.write(
                "INSERT INTO event (id, at_ns, kind, scope, detail) VALUES ($1, $2, $3, $4, $5)",
                &[
                    id.into(),
                    event.at_ns.into(),
                    event.kind.name().into(),
                    event.scope.as_str().into(),
                    event.detail.as_str().into(),
                ],
            )?;
            self.events.push(event);
        }
        if self.written {
            for (name, value) in std::mem::take(&mut self.counters) {
                if self.counters_read.get(name) != Some(&value) {
                    let sql = "UPDATE meta SET value = $1 WHERE name = $2";
                    self.write(sql, &[value.into(), name.into()])?;
                }
            }
        }
        Ok(self.events)
    }

    /// The next id of a counter.
    fn next(&mut self, counter: &'static str) -> i64 {
        let value = self.counters.entry(counter).or_insert(0);
        *value += 1;
        *value
    }

    fn event(&mut self, kind: EventKind, scope: &str, detail: String) {
        self.events.push(Event { at_ns: self.now_ns, kind, scope: scope.to_owned(), detail });
    }

    pub(super) fn query(&mut self, sql: &'static str, values: &[Val]) -> Result<Vec<Row>, DbError> {
        self.db.query(sql, values)
    }

    fn one(&mut self, sql: &'static str, values: &[Val]) -> Result<Option<Row>, DbError> {
        Ok(self.db.query(sql, values)?.into_iter().next())
    }

    fn query_each(&mut self, questions: &[Question]) -> Result<Vec<Vec<Row>>, DbError> {
        if questions.is_empty() {
            return Ok(Vec::new());
        }
        self.db.query_each(questions)
    }

    /// As `execute`, where the number of rows does not matter; see [`Db::write`].
    fn write(&mut self, sql: &'static str, values: &[Val]) -> Result<(), DbError> {
        self.written = true;
        self.db.write(sql, values)
    }

    fn execute(&mut self, sql: &'static str, values: &[Val]) -> Result<u64, DbError> {
        self.written = true;
        self.db.execute(sql, values)
    }
}

/// Rows that one statement reads or writes: what a request needs is four scopes, and a statement costs
/// more than a row.
const TOGETHER: usize = 4;

/// [`TOGETHER`] at a time; the last one is repeated where there are fewer.
fn together<T>(items: &[T]) -> impl Iterator<Item = [&T; TOGETHER]> {
    let chunks = items.chunks(TOGETHER);
    chunks.map(|some| std::array::from_fn(|at| &some[at.min(some.len() - 1)]))
}

/// Asks for `scopes`, together.
fn of_scopes(sql: &'static str, scopes: &[String]) -> Vec<Question> {
    together(scopes).map(|some| (sql, some.map(|scope| scope.as_str().into()).to_vec())).collect()
}

/// Amounts fit 64 bits: 9 billion USD in nano-USD. What does not is kept at the edge, where every
/// limit refuses it.
fn nano(amount: crate::types::NanoUsd) -> i64 {
    i64::try_from(amount.0).unwrap_or(if amount.0 < 0 { i64::MIN } else { i64::MAX })
}
