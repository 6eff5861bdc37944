//! A real database whose clock, connection and disk a test can meddle with.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use candela::ledger::db::{Db, DbError, Question, Row, Val};

/// What the test turns.
#[derive(Default)]
pub struct Switches {
    /// Added to the database's clock.
    pub shift_ns: AtomicI64,
    /// The network between this server and its database.
    pub cut: AtomicBool,
    /// The next commit happens and its answer does not arrive.
    pub lose_answer: AtomicBool,
    /// Pages that a SQLite file may have; 0 is as many as the disk has.
    pub pages_max: AtomicI64,
}

pub struct Rig {
    inner: Box<dyn Db>,
    switches: Arc<Switches>,
}

impl Rig {
    pub fn around(inner: Box<dyn Db>) -> (Box<dyn Db>, Arc<Switches>) {
        let switches = Arc::new(Switches::default());
        (Box::new(Self { inner, switches: switches.clone() }), switches)
    }

    fn reach(&self) -> Result<(), DbError> {
        match self.switches.cut.load(Ordering::SeqCst) {
            true => Err(DbError::Unavailable("the wire is cut".into())),
            false => Ok(()),
        }
    }
}

impl Switches {
    pub fn shift(&self, by: Duration, back: bool) {
        let by_ns = by.as_nanos() as i64;
        self.shift_ns.fetch_add(if back { -by_ns } else { by_ns }, Ordering::SeqCst);
    }

    pub fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::SeqCst);
    }
}

impl Db for Rig {
    fn begin_asking(&mut self, first: &[Question]) -> Result<Vec<Vec<Row>>, DbError> {
        self.reach()?;
        let pages = self.switches.pages_max.load(Ordering::SeqCst);
        if pages > 0 {
            self.inner.batch(&format!("PRAGMA max_page_count = {pages}"))?;
        }
        self.inner.begin_asking(first)
    }

    fn begin_reading(&mut self) -> Result<(), DbError> {
        self.reach()?;
        self.inner.begin_reading()
    }

    fn commit(&mut self) -> Result<(), DbError> {
        self.reach()?;
        self.inner.commit()?;
        match self.switches.lose_answer.swap(false, Ordering::SeqCst) {
            true => Err(DbError::Uncertain("the answer was lost".into())),
            false => Ok(()),
        }
    }

    fn rollback(&mut self) {
        self.inner.rollback();
    }

    fn query(&mut self, sql: &'static str, values: &[Val]) -> Result<Vec<Row>, DbError> {
        self.reach()?;
        self.inner.query(sql, values)
    }

    fn execute(&mut self, sql: &'static str, values: &[Val]) -> Result<u64, DbError> {
        self.reach()?;
        self.inner.execute(sql, values)
    }

    fn batch(&mut self, sql: &str) -> Result<(), DbError> {
        self.reach()?;
        self.inner.batch(sql)
    }

    fn now_ns(&mut self) -> Result<i64, DbError> {
        Ok(self.inner.now_ns()? + self.switches.shift_ns.load(Ordering::SeqCst))
    }
}
