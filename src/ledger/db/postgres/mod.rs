//! PostgreSQL, for several servers on one budget.
//!
//! Every transaction that writes first takes one advisory lock, so that the writers of all servers follow one
//! another and each sees what those before it committed. A lost connection is made anew when it is
//! next needed, with a back-off. No call waits longer than a limit, also where the server hangs.

mod error;
mod tls;
mod url;
mod value;

use std::{collections::HashMap, future::poll_fn, pin::Pin, task::Poll, time::Duration};

use futures_util::future::maybe_done;
use tokio::{
    runtime::{Builder, Runtime},
    task::JoinHandle,
    time::timeout,
};
use tokio_postgres::{
    Client, Config, Error, SimpleQueryMessage, Statement, config::SslMode, types::ToSql,
};

use super::{Db, DbError, Question, Row, Val};
use crate::clock::Clock;
use error::Failure;
use tls::Tls;

/// How long any call may take. Longer than the server's own limits below, which leave the
/// connection in use.
const CALL_MAX: Duration = Duration::from_secs(10);
/// What the server is told when a connection begins. A server of ours that hangs within a
/// transaction must not keep the lock from the others, and a commit is durable whatever the
/// database's default says.
const SESSION: &str = "
SET lock_timeout = '4s';
SET statement_timeout = '8s';
SET idle_in_transaction_session_timeout = '4s';
SELECT set_config('synchronous_commit', 'on', false)
    WHERE current_setting('synchronous_commit') = 'off'";
/// Begins, waits for the writers before this one, then reads the clock. The lock's number is the
/// ASCII of `candela`; it is one of this database alone.
const BEGIN: &str = "
BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;
SELECT pg_advisory_xact_lock(27973149453020257);
SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000000 AS BIGINT)";
/// One snapshot, which waits for nobody.
const BEGIN_READING: &str = "
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000000 AS BIGINT)";
const NOW: &str = "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000000 AS BIGINT)";
/// Waits between attempts to connect: the first, and the longest.
const BACK_OFF_MIN: Duration = Duration::from_millis(100);
const BACK_OFF_MAX: Duration = Duration::from_secs(2);

/// A connection to a database, and how to make it anew. It runs what it needs of tokio by itself, so
/// it must be used outside of async code: on a thread of its own, or one that may block.
pub struct Postgres {
    config: Config,
    tls: Tls,
    /// Host, port and database, for messages.
    target: String,
    clock: Clock,
    runtime: Own,
    session: Option<Session>,
    back_off: BackOff,
    in_transaction: bool,
    /// The server's time when the open transaction had the lock.
    begun_ns: Option<i64>,
    /// A statement failed: the server will not commit this transaction.
    failed: bool,
    /// Writes of the open transaction that are still to be sent, in order.
    unsent: Vec<Ask>,
}

/// What the server is asked.
enum Ask {
    Rows(&'static str, Vec<Val>),
    Change(&'static str, Vec<Val>),
    Commit,
}

enum Answer {
    Rows(Vec<tokio_postgres::Row>),
    Changed(u64),
    Committed,
}

/// A runtime that may be dropped anywhere, by async code too.
struct Own(Option<Runtime>);

struct Session {
    client: Client,
    statements: HashMap<&'static str, Statement>,
    driver: JoinHandle<()>,
}

#[derive(Default)]
struct BackOff {
    failures: u32,
    until_ns: u64,
    last: String,
}

impl Postgres {
    /// Connects. `url` is a `postgres://` URL, with `sslmode` and `sslrootcert` as
    /// libpq has them.
    ///
    /// # Errors
    /// `Unusable` where the URL, the user or the database is wrong, `Unavailable` where the server
    /// cannot be reached.
    pub fn connect(url: &str, clock: Clock) -> Result<Self, DbError> {
        let (config, tls) = url::parse(url).map_err(DbError::Unusable)?;
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| DbError::Unavailable(error.to_string()))?;
        let mut made = Self {
            target: url::target(&config),
            config,
            tls,
            clock,
            runtime: Own(Some(runtime)),
            session: None,
            back_off: BackOff::default(),
            in_transaction: false,
            begun_ns: None,
            failed: false,
            unsent: Vec::new(),
        };
        made.reconnect()?;
        Ok(made)
    }

    fn reconnect(&mut self) -> Result<(), DbError> {
        let now_ns = self.clock.now_ns();
        if now_ns < self.back_off.until_ns {
            return Err(DbError::Unavailable(self.back_off.last.clone()));
        }
        let made = self.runtime.wait(async {
            let made = timeout(CALL_MAX, connect(&self.config, &self.tls)).await;
            made.unwrap_or_else(|_| Err(Failure::late()))
        });
        match made {
            Ok(session) => {
                self.session = Some(session);
                self.back_off = BackOff::default();
                Ok(())
            }
            Err(failure) => {
                let error = failure.of_target(&self.target);
                let wait = BACK_OFF_MIN * (1 << self.back_off.failures.min(10));
                let wait_ns = wait.min(BACK_OFF_MAX).as_nanos() as u64;
                self.back_off.failures += 1;
                self.back_off.until_ns = self.clock.now_ns().saturating_add(wait_ns);
                self.back_off.last = error.to_string();
                Err(error)
            }
        }
    }

    fn begin_with(&mut self, statements: &'static str) -> Result<(), DbError> {
        (self.in_transaction, self.failed) = (false, false);
        self.unsent.clear();
        let fresh = self.session.is_none();
        let mut started = self.start(statements);
        if started.is_err() && !fresh && self.session.is_none() {
            // The server was restarted while nothing was asked of it: nothing is lost by it.
            started = self.start(statements);
        }
        if started.is_err() {
            self.rollback();
        }
        started
    }

    fn start(&mut self, statements: &'static str) -> Result<(), DbError> {
        let answer = self.call(async |session| session.client.simple_query(statements).await)?;
        let time = answer.iter().rev().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0)?.parse().ok(),
            _ => None,
        });
        let time = time.ok_or_else(|| DbError::Corrupt("the server has no time".into()))?;
        (self.in_transaction, self.begun_ns, self.failed) = (true, Some(time), false);
        Ok(())
    }

    /// One call within [`CALL_MAX`]. A connection that was lost by it is dropped, and made anew by
    /// the next call outside of a transaction.
    fn call<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut Session) -> Result<T, Error>,
    ) -> Result<T, DbError> {
        if self.session.is_none() && !self.in_transaction {
            self.reconnect()?;
        }
        let Some(session) = &mut self.session else {
            return Err(DbError::Unavailable("the connection was lost".into()));
        };
        let done = self.runtime.wait(async { timeout(CALL_MAX, work(session)).await });
        let failure = match done {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => Failure::of(&error, session.client.is_closed()),
            Err(_) => Failure::late(),
        };
        self.failed = true;
        if failure.lost {
            self.session = None;
        }
        Err(failure.error)
    }
}

impl Postgres {
    /// Sends what is unsent and then `asks`, and waits for the answers to all of it.
    fn send(&mut self, asks: impl IntoIterator<Item = Ask>) -> Result<Vec<Answer>, DbError> {
        let mut all = std::mem::take(&mut self.unsent);
        all.extend(asks);
        let ask = async |session: &mut Session| session.pipeline(&all).await;
        let fresh = self.session.is_none();
        let answers = self.call(ask);
        let only_reads = all.iter().all(|ask| matches!(ask, Ask::Rows(..)));
        if answers.is_err()
            && only_reads
            && !fresh
            && !self.in_transaction
            && self.session.is_none()
        {
            // As at `begin`: what only reads may be asked for again.
            return self.call(ask);
        }
        answers
    }
}

impl Own {
    fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.0.as_ref().expect("is there until it is dropped").block_on(work)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Db for Postgres {
    fn begin(&mut self) -> Result<(), DbError> {
        self.begin_with(BEGIN)
    }

    fn begin_reading(&mut self) -> Result<(), DbError> {
        self.begin_with(BEGIN_READING)
    }

    fn commit(&mut self) -> Result<(), DbError> {
        self.begun_ns = None;
        if self.failed {
            // The server would answer `COMMIT` by rolling back, and call that a success.
            return Err(DbError::Unavailable("a statement of the transaction failed".into()));
        }
        // Where a write fails, the server takes what follows for a rollback.
        let done = self.send([Ask::Commit]);
        self.in_transaction = false;
        match done {
            Err(error) if self.session.is_none() => Err(DbError::Uncertain(error.to_string())),
            other => other.map(drop),
        }
    }

    fn rollback(&mut self) {
        self.begun_ns = None;
        self.unsent.clear();
        if self.session.is_some() {
            let done = self.call(async |session| session.client.batch_execute("ROLLBACK").await);
            if done.is_err() {
                self.session = None;
            }
        }
        self.in_transaction = false;
    }

    fn query(&mut self, sql: &'static str, values: &[Val]) -> Result<Vec<Row>, DbError> {
        let rows = self.query_each(&[(sql, values.to_vec())])?;
        Ok(rows.into_iter().next().unwrap_or_default())
    }

    fn query_each(&mut self, questions: &[Question]) -> Result<Vec<Vec<Row>>, DbError> {
        let rows = |answer| match answer {
            Answer::Rows(rows) => Some(rows.iter().map(value::row).collect()),
            _ => None,
        };
        let asks = questions.iter().map(|(sql, values)| Ask::Rows(sql, values.clone()));
        self.send(asks)?.into_iter().filter_map(rows).collect()
    }

    fn write(&mut self, sql: &'static str, values: &[Val]) -> Result<(), DbError> {
        if !self.in_transaction {
            return self.execute(sql, values).map(drop);
        }
        self.unsent.push(Ask::Change(sql, values.to_vec()));
        Ok(())
    }

    fn execute(&mut self, sql: &'static str, values: &[Val]) -> Result<u64, DbError> {
        let answers = self.send([Ask::Change(sql, values.to_vec())])?;
        match answers.last() {
            Some(Answer::Changed(rows)) => Ok(*rows),
            _ => Err(DbError::Corrupt("no count of changed rows".into())),
        }
    }

    fn batch(&mut self, sql: &str) -> Result<(), DbError> {
        self.send([])?;
        self.call(async |session| session.client.batch_execute(sql).await)
    }

    fn now_ns(&mut self) -> Result<i64, DbError> {
        if let Some(begun_ns) = self.begun_ns {
            return Ok(begun_ns);
        }
        let rows = self.query(NOW, &[])?;
        rows.first().map_or_else(|| Err(DbError::Corrupt("no time".into())), |row| row.int(0))
    }
}

impl Session {
    async fn statement(&mut self, sql: &'static str) -> Result<Statement, Error> {
        if let Some(known) = self.statements.get(sql) {
            return Ok(known.clone());
        }
        let made = self.client.prepare(sql).await?;
        self.statements.insert(sql, made.clone());
        Ok(made)
    }

    /// Sends everything before it waits for the first answer, so that all of it is one round trip.
    /// What follows a failure within a transaction fails as well: the first failure is told.
    async fn pipeline(&mut self, asks: &[Ask]) -> Result<Vec<Answer>, Error> {
        let mut statements = Vec::with_capacity(asks.len());
        for ask in asks {
            statements.push(match ask {
                Ask::Rows(sql, _) | Ask::Change(sql, _) => Some(self.statement(sql).await?),
                Ask::Commit => None,
            });
        }
        let client = &self.client;
        let calls = asks.iter().zip(&statements).map(|(ask, statement)| {
            maybe_done(Box::pin(async move {
                Ok(match (ask, statement) {
                    (Ask::Rows(_, values), Some(statement)) => {
                        Answer::Rows(client.query(statement, &parameters(values)).await?)
                    }
                    (Ask::Change(_, values), Some(statement)) => {
                        Answer::Changed(client.execute(statement, &parameters(values)).await?)
                    }
                    _ => {
                        client.batch_execute("COMMIT").await?;
                        Answer::Committed
                    }
                })
            }))
        });
        let mut calls: Vec<_> = calls.collect();
        // The first poll of each sends it, in this order.
        poll_fn(|context| {
            let mut pending = false;
            for call in &mut calls {
                pending |= Pin::new(call).poll(context).is_pending();
            }
            if pending { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
        calls.iter_mut().filter_map(|call| Pin::new(call).take_output()).collect()
    }
}

/// Makes a connection, under `sslmode=prefer` without encryption where there is no other way.
async fn connect(config: &Config, tls: &Tls) -> Result<Session, Failure> {
    let refused = match session(config, tls).await {
        Err(error) if tls.may_do_without(&error) => error,
        done => return done.map_err(|error| Failure::of(&error, true)),
    };
    let mut plain = config.clone();
    plain.ssl_mode(SslMode::Disable);
    // Where that fails as well, the first reason is the one to do something about.
    let made = session(&plain, tls).await.map_err(|_| Failure::of(&refused, true))?;
    tracing::warn!(
        reason = error::chain(&refused),
        "the connection to PostgreSQL is not encrypted; sslmode=require would refuse it"
    );
    Ok(made)
}

async fn session(config: &Config, tls: &Tls) -> Result<Session, Error> {
    let (client, connection) = config.connect(tls.connector()).await?;
    let driver = tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(error = error::chain(&error), "connection to PostgreSQL ended");
        }
    });
    let session = Session { client, statements: HashMap::new(), driver };
    session.client.batch_execute(SESSION).await?;
    Ok(session)
}

fn parameters(values: &[Val]) -> Vec<&(dyn ToSql + Sync)> {
    values.iter().map(|value| value as &(dyn ToSql + Sync)).collect()
}
