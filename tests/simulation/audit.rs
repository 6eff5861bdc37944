//! A real database that fails when a story wants it to, and is looked at before every commit: no window
//! that grew may be over its limit.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use candela::ledger::db::{Db, DbError, Question, Row, Sqlite, Val};

/// What a story turns, and what it counts.
#[derive(Default)]
pub struct Switches {
    /// Between the server and its database.
    pub cut: AtomicBool,
    /// The next commit does not happen.
    pub fail_commit: AtomicBool,
    /// The next commit happens and its answer does not arrive.
    pub lose_answer: AtomicBool,
    pub commits: AtomicU64,
}

/// Posted and held of every window that has a budget, and the limit.
type Windows = BTreeMap<(String, String, i64), (i64, i64)>;

pub struct Audited {
    db: Sqlite,
    switches: Arc<Switches>,
    before: Windows,
}

impl Audited {
    pub fn new(db: Sqlite, switches: Arc<Switches>) -> Self {
        Self { db, switches, before: Windows::new() }
    }

    fn reach(&self) -> Result<(), DbError> {
        match self.switches.cut.load(Ordering::Relaxed) {
            true => Err(DbError::Unavailable("the wire is cut".into())),
            false => Ok(()),
        }
    }

    fn windows(&mut self) -> Result<Windows, DbError> {
        let sql = "SELECT window_total.scope, window_total.span, start_s, posted + held, limit_nano
            FROM window_total JOIN budget ON budget.scope = window_total.scope
            AND budget.span = window_total.span";
        let row = |row: &Row| {
            let key = (row.text(0)?.to_owned(), row.text(1)?.to_owned(), row.int(2)?);
            Ok((key, (row.int(3)?, row.int(4)?)))
        };
        self.db.query(sql, &[])?.iter().map(row).collect()
    }
}

impl Db for Audited {
    fn begin_asking(&mut self, first: &[Question]) -> Result<Vec<Vec<Row>>, DbError> {
        self.reach()?;
        let found = self.db.begin_asking(first)?;
        self.before = self.windows()?;
        Ok(found)
    }

    fn commit(&mut self) -> Result<(), DbError> {
        self.reach()?;
        for (window, (sum, limit)) in self.windows()? {
            let old = self.before.get(&window).map_or(0, |(old, _)| *old);
            assert!(sum <= old.max(limit), "{window:?}: {old} grew to {sum} of {limit}");
        }
        if self.switches.fail_commit.swap(false, Ordering::Relaxed) {
            return Err(DbError::Unavailable("the disk is full".into()));
        }
        self.db.commit()?;
        self.switches.commits.fetch_add(1, Ordering::Relaxed);
        match self.switches.lose_answer.swap(false, Ordering::Relaxed) {
            true => Err(DbError::Uncertain("the answer was lost".into())),
            false => Ok(()),
        }
    }

    fn rollback(&mut self) {
        self.db.rollback();
    }

    fn query(&mut self, sql: &'static str, values: &[Val]) -> Result<Vec<Row>, DbError> {
        self.reach()?;
        self.db.query(sql, values)
    }

    fn execute(&mut self, sql: &'static str, values: &[Val]) -> Result<u64, DbError> {
        self.reach()?;
        self.db.execute(sql, values)
    }

    fn batch(&mut self, sql: &str) -> Result<(), DbError> {
        self.db.batch(sql)
    }

    fn now_ns(&mut self) -> Result<i64, DbError> {
        self.db.now_ns()
    }
}
