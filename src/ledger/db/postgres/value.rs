//! Values on PostgreSQL's wire.

use std::error::Error;

use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, private::BytesMut, to_sql_checked};

use super::{DbError, Row, Val};

type Failure = Box<dyn Error + Sync + Send>;

impl ToSql for Val {
    fn to_sql(&self, kind: &Type, out: &mut BytesMut) -> Result<IsNull, Failure> {
        match self {
            Self::Null => Ok(IsNull::Yes),
            Self::Int(value) if *kind == Type::INT8 => value.to_sql(kind, out),
            Self::Int(value) if *kind == Type::INT4 => i32::try_from(*value)?.to_sql(kind, out),
            Self::Text(value) if <&str as ToSql>::accepts(kind) => value.to_sql(kind, out),
            Self::Blob(value) if *kind == Type::BYTEA => value.to_sql(kind, out),
            other => Err(format!("{other:?} is no value of a {kind} column").into()),
        }
    }

    /// What does not fit is told by `to_sql`, which sees the value.
    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}

impl<'a> FromSql<'a> for Val {
    fn from_sql(kind: &Type, raw: &'a [u8]) -> Result<Self, Failure> {
        match *kind {
            Type::INT8 => i64::from_sql(kind, raw).map(Self::Int),
            Type::INT4 => i32::from_sql(kind, raw).map(|value| Self::Int(value.into())),
            Type::BYTEA => <&[u8]>::from_sql(kind, raw).map(|bytes| Self::Blob(bytes.to_vec())),
            _ if <&str as FromSql>::accepts(kind) => String::from_sql(kind, raw).map(Self::Text),
            _ => Err(format!("a column of type {kind}").into()),
        }
    }

    fn from_sql_null(_: &Type) -> Result<Self, Failure> {
        Ok(Self::Null)
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

/// A row by position.
pub(super) fn row(row: &tokio_postgres::Row) -> Result<Row, DbError> {
    let value =
        |index| row.try_get(index).map_err(|error| DbError::Corrupt(super::error::chain(&error)));
    (0..row.len()).map(value).collect::<Result<_, _>>().map(Row)
}
