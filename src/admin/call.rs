//! An operation, and one call of it.

use rand::{TryRng, rngs::SysRng};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::{
    ledger::{
        Book,
        book::Role,
        db::{Db, DbError},
    },
    types::{KeyId, TenantId},
};

use super::{Field, Given};

/// HTTP's methods as operations use them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Get,
    Post,
    Put,
    Patch,
    Delete,
}

type Answer = Result<Value, AdminError>;

/// How an operation is done.
#[derive(Clone, Copy)]
pub enum Work {
    /// In a transaction.
    Change(fn(&mut Book<'_>, &Call) -> Answer),
    /// In one statement on a connection of its own: it may read much, and nothing waits for it.
    Read(fn(&mut dyn Db, &Call) -> Answer),
}

/// An operation.
pub struct Route {
    /// Unique; the operation id in OpenAPI.
    pub name: &'static str,
    pub summary: &'static str,
    pub verb: Verb,
    /// With `{field}` where a field is part of the path.
    pub path: &'static str,
    /// Who may ask for it.
    pub least: Role,
    pub fields: &'static [&'static [Field]],
    pub work: Work,
}

impl Route {
    pub fn all_fields(&self) -> impl Iterator<Item = &'static Field> {
        self.fields.iter().copied().flatten()
    }

    pub fn in_path(&self, field: &Field) -> bool {
        self.path.contains(&format!("{{{}}}", field.name))
    }

    /// Whether fields that are not in the path come in the body, else in the query.
    pub fn has_body(&self) -> bool {
        !matches!(self.verb, Verb::Get | Verb::Delete)
    }

    /// Checks what came in path, query and body.
    pub fn given(
        &self,
        texts: impl IntoIterator<Item = (String, String)>,
        body: Map<String, Value>,
    ) -> Result<Given, AdminError> {
        let mut given = Given::of_body(body);
        for (name, text) in texts {
            given.add_text(self.fields, &name, &text)?;
        }
        given.check(self.fields)?;
        Ok(given)
    }
}

/// By what right a call is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authority {
    /// Of a key, which must still be valid when the call is done.
    Key(KeyId),
    /// Without a key, as long as there is none.
    BeforeFirstKey,
    /// Without a key, for good, and for reading only.
    Anonymous,
    /// Of whoever may open the ledger itself.
    Owner(String),
}

impl Authority {
    /// Who, for the audit log.
    pub fn actor(&self) -> String {
        match self {
            Self::Key(id) => format!("key:{id}"),
            Self::BeforeFirstKey | Self::Anonymous => "anonymous".to_owned(),
            Self::Owner(name) => format!("cli:{name}"),
        }
    }
}

/// Random values for a call that makes a key. No `Debug`: nothing may print it.
pub struct Fresh {
    /// Of the operating system, 256 bits.
    pub secret: String,
    pub id: String,
}

const SECRET_BYTES: usize = 32;
const ID_BYTES: usize = 8;
/// What secrets begin with, so that scanners for leaked ones know them.
const SECRET_PREFIX: &str = "cnd-";

impl Fresh {
    /// # Errors
    /// The operating system has no random numbers.
    pub fn draw() -> Result<Self, rand::rngs::SysError> {
        let mut bytes = [0; SECRET_BYTES + ID_BYTES];
        SysRng.try_fill_bytes(&mut bytes)?;
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let (secret, id) = bytes.split_at(SECRET_BYTES);
        Ok(Self {
            secret: format!("{SECRET_PREFIX}{}", hex(secret)),
            id: format!("key-{}", hex(id)),
        })
    }
}

/// One call. No `Debug`, because of the secret.
pub struct Call {
    pub authority: Authority,
    /// The only tenant that the caller may see; none is all.
    pub only: Option<TenantId>,
    pub given: Given,
    pub fresh: Fresh,
}

impl Call {
    /// Does the work of a changing operation; for [`Work::Change`].
    ///
    /// # Errors
    /// The outer one is the database's: nothing happened. The inner one is a refusal.
    pub fn change(
        &self,
        book: &mut Book<'_>,
        work: fn(&mut Book<'_>, &Self) -> Answer,
    ) -> Result<Answer, DbError> {
        // The key was looked up before, and may have ended since.
        let ended = match &self.authority {
            Authority::Key(id) => !book.key_is_valid(id)?,
            Authority::BeforeFirstKey => book.has_keys()?,
            Authority::Anonymous | Authority::Owner(_) => false,
        };
        if ended {
            return Ok(Err(AdminError::Ended));
        }
        match work(book, self) {
            Err(AdminError::Db(error)) => Err(error),
            answer => Ok(answer),
        }
    }

    /// A field that the check found.
    pub fn needed(&self, name: &'static str) -> Result<&str, AdminError> {
        let missing = || AdminError::field(name, format!("`{name}` is missing"));
        self.given.text(name).ok_or_else(missing)
    }

    /// Seconds since 1970 as nanoseconds; has to lie ahead.
    pub fn future_ns(&self, name: &'static str, now_ns: i64) -> Result<Option<i64>, AdminError> {
        let at_ns = self.given.int(name).map(|at_s| at_s.saturating_mul(NS_PER_S));
        if at_ns.is_some_and(|at_ns| at_ns <= now_ns) {
            return Err(AdminError::field(name, format!("`{name}` must lie ahead")));
        }
        Ok(at_ns)
    }

    /// Writes the audit log: what was, and what is now.
    pub fn audit(
        &self,
        book: &mut Book<'_>,
        action: &str,
        target: &str,
        old: &Value,
        new: &Value,
    ) -> Result<(), DbError> {
        audit(book, &self.authority.actor(), action, target, old, new)
    }
}

/// As [`Call::audit`], for what nobody called for.
pub(super) fn audit(
    book: &mut Book<'_>,
    actor: &str,
    action: &str,
    target: &str,
    old: &Value,
    new: &Value,
) -> Result<(), DbError> {
    let text = |value: &Value| match value {
        Value::Null => String::new(),
        other => other.to_string(),
    };
    book.audit(actor, action, target, &text(old), &text(new))
}

pub(super) const NS_PER_S: i64 = 1_000_000_000;

/// Why an operation was not done. Knows no HTTP.
#[derive(Debug, Error)]
pub enum AdminError {
    /// A field has to be changed.
    #[error("{message}")]
    Field { field: String, message: String },
    #[error("there is no {kind} `{id}`")]
    NotFound { field: &'static str, kind: &'static str, id: String },
    #[error("{message}")]
    Conflict { field: &'static str, message: String },
    /// The key ended between its look-up and the change.
    #[error("the key has ended")]
    Ended,
    #[error(transparent)]
    Db(#[from] DbError),
}

impl AdminError {
    pub fn field(field: &str, message: impl Into<String>) -> Self {
        // Names of unknown fields come from the caller, and may be of any length.
        Self::Field { field: field.chars().take(64).collect(), message: message.into() }
    }

    pub fn not_found(field: &'static str, kind: &'static str, id: &str) -> Self {
        Self::NotFound { field, kind, id: id.to_owned() }
    }
}
