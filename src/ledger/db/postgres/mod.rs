//! PostgreSQL, for several servers on one budget.
//!
//! Every transaction that writes first takes one advisory lock, so that the writers of all servers follow one
//! another and each sees what those before it committed. A lost connection is made anew when it is
//! next needed, with a back-off. No call waits longer than a limit, also where the server hangs.

mod error;
mod tls;
mod url;
mod value;

use std::{
    borrow::Cow, collections::HashMap, future::poll_fn, pin::Pin, task::Poll, time::Duration,
};

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
    unsent: Vec<Ask<'static>>,
}

/// What the server is asked.
enum Ask<'a> {
    /// Statements that begin a transaction, of which the last one tells the time.
    Begin(&'static str),
    Rows(&'static str, Cow<'a, [Val]>),
    Change(&'static str, Cow<'a, [Val]>),
    Commit,
}

enum Answer {
    Begun(Option<i64>),
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

    /// Begins, and asks `first` in the same round trip. Where the beginning fails the transaction, as
    /// a wait for the lock can, so do they; else they see what was committed before it.
    fn begin_with(
        &mut self,
        statements: &'static str,
        first: &[Question],
    ) -> Result<Vec<Vec<Row>>, DbError> {
        (self.in_transaction, self.failed) = (false, false);
        self.unsent.clear();
        let begun = self.send([Ask::Begin(statements)].into_iter().chain(rows_of(first)));
        let begun = begun.and_then(|answers| {
            let time = answers.iter().find_map(|answer| match answer {
                Answer::Begun(time) => *time,
                _ => None,
            });
            let time = time.ok_or_else(|| DbError::Corrupt("the server has no time".into()))?;
            (self.in_transaction, self.begun_ns) = (true, Some(time));
            read(answers)
        });
        if begun.is_err() {
            self.rollback();
        }
        begun
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
    fn send<'a>(
        &mut self,
        asks: impl IntoIterator<Item = Ask<'a>>,
    ) -> Result<Vec<Answer>, DbError> {
        let mut all: Vec<Ask<'a>> = std::mem::take(&mut self.unsent);
        all.extend(asks);
        let ask = async |session: &mut Session| session.pipeline(&all).await;
        let fresh = self.session.is_none();
        let answers = self.call(ask);
        let only_reads = all.iter().all(|ask| matches!(ask, Ask::Begin(_) | Ask::Rows(..)));
        if answers.is_err()
            && only_reads
            && !fresh
            && !self.in_transaction
            && self.session.is_none()
        {
            // The server was restarted while nothing was asked of it: what only reads may be asked
            // for again.
            self.failed = false;
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
    fn begin_asking(&mut self, first: &[Question]) -> Result<Vec<Vec<Row>>, DbError> {
        self.begin_with(BEGIN, first)
    }

    fn begin_reading(&mut self) -> Result<(), DbError> {
        self.begin_with(BEGIN_READING, &[]).map(drop)
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
        let answers = self.send([Ask::Rows(sql, values.into())])?;
        Ok(read(answers)?.pop().unwrap_or_default())
    }

    fn query_each(&mut self, questions: &[Question]) -> Result<Vec<Vec<Row>>, DbError> {
        read(self.send(rows_of(questions))?)
    }

    fn write(&mut self, sql: &'static str, values: &[Val]) -> Result<(), DbError> {
        if !self.in_transaction {
            return self.execute(sql, values).map(drop);
        }
        self.unsent.push(Ask::Change(sql, values.to_vec().into()));
        Ok(())
    }

    fn execute(&mut self, sql: &'static str, values: &[Val]) -> Result<u64, DbError> {
        let answers = self.send([Ask::Change(sql, values.into())])?;
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
    async fn pipeline(&mut self, asks: &[Ask<'_>]) -> Result<Vec<Answer>, Error> {
        let mut statements = Vec::with_capacity(asks.len());
        for ask in asks {
            statements.push(match ask {
                Ask::Rows(sql, _) | Ask::Change(sql, _) => Some(self.statement(sql).await?),
                Ask::Begin(_) | Ask::Commit => None,
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
                    (Ask::Begin(statements), _) => {
                        Answer::Begun(time(&client.simple_query(statements).await?))
                    }
                    _ => {
                        client.batch_execute("COMMIT").await?;
                        Answer::Committed
                    }
                })
            }))
        });
        let mut calls: Vec<_> = calls.collect();
        // The first poll of each sends it, in this order. They are answered in the same.
        poll_fn(|context| {
            for call in &mut calls {
                let _ = Pin::new(call).poll(context);
            }
            Poll::Ready(())
        })
        .await;
        let mut answers = Vec::with_capacity(calls.len());
        for call in &mut calls {
            Pin::new(&mut *call).await;
            answers.extend(Pin::new(call).take_output().transpose()?);
        }
        Ok(answers)
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

/// The time that the last of some statements tells.
fn time(answer: &[SimpleQueryMessage]) -> Option<i64> {
    answer.iter().rev().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0)?.parse().ok(),
        _ => None,
    })
}

fn rows_of(questions: &[Question]) -> impl Iterator<Item = Ask<'_>> {
    questions.iter().map(|(sql, values)| Ask::Rows(sql, values.into()))
}

/// The rows among some answers, of one after the other.
fn read(answers: Vec<Answer>) -> Result<Vec<Vec<Row>>, DbError> {
    let rows = answers.into_iter().filter_map(|answer| match answer {
        Answer::Rows(rows) => Some(rows.iter().map(value::row).collect()),
        _ => None,
    });
    rows.collect()
}

fn parameters(values: &[Val]) -> Vec<&(dyn ToSql + Sync)> {
    values.iter().map(|value| value as &(dyn ToSql + Sync)).collect()
}
