//! What PostgreSQL's errors mean to the ledger (its manual, appendix A, names the codes).

use std::error::Error as _;

use tokio_postgres::{Error, error::DbError as Told};

use super::{CALL_MAX, DbError, tls};

/// An error, and whether the connection is of no use any more.
pub(super) struct Failure {
    pub error: DbError,
    pub lost: bool,
}

impl Failure {
    /// The server did not answer in time. The connection still waits for its answer.
    pub fn late() -> Self {
        let what = format!("no answer within {} s", CALL_MAX.as_secs());
        Self { error: DbError::Unavailable(what), lost: true }
    }

    pub fn of(error: &Error, closed: bool) -> Self {
        match error.as_db_error() {
            Some(told) => {
                let (error, lost) = meaning(told);
                Self { error, lost: lost || closed }
            }
            // A value that does not fit its column is the caller's; the connection goes on.
            None if is_value(error) => {
                Self { error: DbError::Rejected(chain(error)), lost: closed }
            }
            None => Self { error: unanswered(error), lost: true },
        }
    }

    /// Adds where the server is.
    pub fn of_target(self, target: &str) -> DbError {
        let at = |what: String| format!("PostgreSQL at {target}: {what}");
        match self.error {
            DbError::Unavailable(what) => DbError::Unavailable(at(what)),
            DbError::Unusable(what) => DbError::Unusable(at(what)),
            other => other,
        }
    }
}

/// The kind of error, and whether the connection has to be made anew.
fn meaning(told: &Told) -> (DbError, bool) {
    let code = told.code().code();
    // The detail of an error quotes rows; its message does not.
    let what = format!("{} (SQLSTATE {code})", told.message());
    let advice = |advice: &str| DbError::Unusable(format!("{what}: {advice}"));
    match code {
        "3D000" => (advice("create the database, or name another one in --ledger"), true),
        "42501" | "3F000" => {
            let advice = advice(
                "make the user of --ledger the owner of its database, or grant it CREATE and USAGE on its schema",
            );
            (advice, false)
        }
        "26000" | "42P05" => {
            (advice("connect to the server itself, or through a pool of sessions"), true)
        }
        // Another version has changed a table: the statements have to be prepared anew.
        "0A000" => (DbError::Unavailable(what), true),
        // Not the primary any more.
        "25006" => (DbError::Unavailable(what), true),
        _ => match &code[..code.len().min(2)] {
            "28" => (advice("correct user and password in --ledger, or pg_hba.conf"), true),
            "22" | "23" => (DbError::Rejected(what), false),
            "42" => (advice("this is no ledger, or one that something else has changed"), false),
            // Connection, resources (disk full, too many connections), operator, system.
            "08" | "57" if code != "57014" => (DbError::Unavailable(what), true),
            _ => (DbError::Unavailable(what), false),
        },
    }
}

/// The kind of an error that is not the server's.
fn unanswered(error: &Error) -> DbError {
    tls::meaning(error).unwrap_or_else(|| match is_setting(error) {
        true => DbError::Unusable(chain(error)),
        false => DbError::Unavailable(chain(error)),
    })
}

/// `tokio_postgres` keeps the kind of its errors to itself; what they print is documented by it.
fn is_value(error: &Error) -> bool {
    error.to_string().starts_with("error serializing parameter")
}

fn is_setting(error: &Error) -> bool {
    let text = error.to_string();
    ["invalid configuration", "authentication error"].iter().any(|start| text.starts_with(start))
}

/// An error with its causes.
pub(super) fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}
