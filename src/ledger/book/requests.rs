//! Rows of requests and their leases.

use super::{Book, nano};
use crate::{
    ledger::{
        db::{DbError, Question, Row},
        rows::{Bill, Chain, EndCause, GLOBAL},
    },
    price::{Billing, Rates, Tally, Terms},
    types::{KeyId, NanoUsd, OrgId, RequestId, TenantId},
};

/// A request that is open.
pub(super) struct OpenRequest {
    pub chain: Chain,
    pub terms: Terms,
    pub choices: i64,
    pub granted: i64,
    pub posted: i64,
    pub used: Tally,
    /// Leases so far.
    pub leases: i64,
    /// Those of which something is left, oldest first.
    pub open: Vec<LeaseRow>,
}

impl OpenRequest {
    /// What it is charged, were it to end now.
    pub fn bill(&self) -> Bill {
        let (rates, used) = (&self.terms.rates, &self.used);
        Bill {
            cost: NanoUsd(self.posted.into()),
            token_cost: rates.token_cost(used),
            device_cost: rates.device_cost(used.device_ns),
            price_version: self.terms.version,
            used: *used,
        }
    }
}

/// A part of a hold, and the window it belongs to.
pub(super) struct LeaseRow {
    pub number: i64,
    pub granted_ns: i64,
    pub amount: i64,
    pub posted: i64,
}

impl LeaseRow {
    pub fn left(&self) -> i64 {
        self.amount - self.posted
    }
}

/// SQL cannot have its columns as parameters, so a query per kind of scope is written out by this.
macro_rules! by_scope {
    ($scope:expr, $select:literal, $and:literal) => {
        match $scope.split_once(':') {
            Some(("org", id)) => (concat!($select, " WHERE request.org_id = $1", $and), id),
            Some(("tenant", id)) => (concat!($select, " WHERE request.tenant_id = $1", $and), id),
            Some(("key", id)) => (concat!($select, " WHERE request.key_id = $1", $and), id),
            _ => (concat!($select, " WHERE $1 = 'global'", $and), GLOBAL),
        }
    };
}

impl Book<'_> {
    /// `None` where it is not open (any more).
    pub(super) fn open_request(&mut self, id: &RequestId) -> Result<Option<OpenRequest>, DbError> {
        // As it was before anything was done with it, so it serves once.
        if let Some(known) = self.ahead.requests.remove(id) {
            return Ok(known);
        }
        let found = self.query_each(&request_of(id))?;
        read_open(&found)
    }

    pub(super) fn write_progress(
        &mut self,
        id: &RequestId,
        request: &OpenRequest,
    ) -> Result<(), DbError> {
        let used = &request.used;
        self.write(
            "UPDATE request SET granted = $1, posted = $2, uncached_input = $3, cached_input = $4,
            output = $5, device_ns = $6, billable_device_ns = $7, token_cost = $8,
            device_cost = $9, leases = $10 WHERE id = $11",
            &[
                request.granted.into(),
                request.posted.into(),
                count(used.uncached_input),
                count(used.cached_input),
                count(used.output),
                count(used.device_ns),
                count(used.billable_device_ns),
                nano(request.terms.rates.token_cost(used)).into(),
                nano(request.terms.rates.device_cost(used.device_ns)).into(),
                request.leases.into(),
                id.as_str().into(),
            ],
        )?;
        Ok(())
    }

    pub(super) fn end_request(
        &mut self,
        id: &RequestId,
        state: &'static str,
        cause: EndCause,
        unrecorded_max: i64,
        steps: u64,
    ) -> Result<(), DbError> {
        self.write(
            "UPDATE request SET state = $1, end_cause = $2, unrecorded_max = $3, steps = $4,
            closed_ns = $5 WHERE id = $6",
            &[
                state.into(),
                cause.name().into(),
                unrecorded_max.into(),
                count(steps),
                self.now_ns.into(),
                id.as_str().into(),
            ],
        )?;
        self.write("DELETE FROM lease WHERE request_id = $1", &[id.as_str().into()])?;
        Ok(())
    }

    pub(super) fn write_lease(&mut self, id: &RequestId, lease: &LeaseRow) -> Result<(), DbError> {
        self.write(
            "INSERT INTO lease (request_id, number, granted_ns, amount, posted)
            VALUES ($1, $2, $3, $4, $5) ON CONFLICT (request_id, number)
            DO UPDATE SET amount = excluded.amount, posted = excluded.posted",
            &[
                id.as_str().into(),
                lease.number.into(),
                lease.granted_ns.into(),
                lease.amount.into(),
                lease.posted.into(),
            ],
        )?;
        Ok(())
    }

    pub(super) fn delete_lease(&mut self, id: &RequestId, number: i64) -> Result<(), DbError> {
        let key = [id.as_str().into(), number.into()];
        self.write("DELETE FROM lease WHERE request_id = $1 AND number = $2", &key)?;
        Ok(())
    }

    /// Time of grant and what is left of every open lease below a scope.
    pub(super) fn open_leases(&mut self, scope: &str) -> Result<Vec<(i64, i64)>, DbError> {
        let (sql, id) = by_scope!(
            scope,
            "SELECT lease.granted_ns, lease.amount - lease.posted FROM lease
            JOIN request ON request.id = lease.request_id",
            " AND request.state = 'open'"
        );
        self.query(sql, &[id.into()])?.iter().map(|row| Ok((row.int(0)?, row.int(1)?))).collect()
    }

    pub(super) fn open_sequences(&mut self, scope: &str) -> Result<i64, DbError> {
        let (sql, id) = by_scope!(
            scope,
            "SELECT CAST(COALESCE(SUM(choices), 0) AS BIGINT) FROM request",
            " AND request.state = 'open'"
        );
        self.one(sql, &[id.into()])?.map_or(Ok(0), |row| row.int(0))
    }

    /// The bill of a request that was closed; `None` where it was given up.
    pub fn settled(&mut self, id: &RequestId) -> Result<Option<Bill>, DbError> {
        let sql = "SELECT id FROM request WHERE id = $1 AND state = 'done'";
        match self.one(sql, &[id.as_str().into()])? {
            Some(_) => self.bill(id),
            None => Ok(None),
        }
    }

    /// What an ended request was charged.
    pub fn bill(&mut self, id: &RequestId) -> Result<Option<Bill>, DbError> {
        let row = self.one(
            "SELECT posted, token_cost, device_cost, price_version, uncached_input, cached_input,
            output, device_ns, billable_device_ns FROM request WHERE id = $1",
            &[id.as_str().into()],
        );
        let bill = |row: Row| {
            Ok(Bill {
                cost: NanoUsd(row.int(0)?.into()),
                token_cost: NanoUsd(row.int(1)?.into()),
                device_cost: NanoUsd(row.int(2)?.into()),
                price_version: row.int(3)?,
                used: tally(&row, 4)?,
            })
        };
        row?.map(bill).transpose()
    }
}

/// What is asked to know an open request.
pub(super) fn request_of(id: &RequestId) -> [Question; 2] {
    let request = "SELECT request.org_id, request.tenant_id, request.key_id, choices, granted,
        posted, uncached_input, request.cached_input, request.output, device_ns,
        billable_device_ns, leases, price_version, price.input, price.cached_input, price.output,
        price.request, price.device_second, price.billing
        FROM request JOIN price ON price.version = request.price_version
        WHERE request.id = $1 AND request.state = 'open'";
    let leases = "SELECT number, granted_ns, amount, posted FROM lease WHERE request_id = $1
        ORDER BY number";
    [(request, vec![id.as_str().into()]), (leases, vec![id.as_str().into()])]
}

/// The answers to [`request_of`].
pub(super) fn read_open(found: &[Vec<Row>]) -> Result<Option<OpenRequest>, DbError> {
    let [requests, leases] = found else { return Ok(None) };
    let Some(row) = requests.first() else { return Ok(None) };
    let lease = |row: &Row| {
        Ok(LeaseRow {
            number: row.int(0)?,
            granted_ns: row.int(1)?,
            amount: row.int(2)?,
            posted: row.int(3)?,
        })
    };
    let open = leases.iter().map(lease).collect::<Result<_, DbError>>()?;
    Ok(Some(OpenRequest { open, ..read_request(row)? }))
}

/// The columns in the order of [`request_of`], without its leases.
pub(super) fn read_request(row: &Row) -> Result<OpenRequest, DbError> {
    let rates = Rates {
        input: NanoUsd(row.int(13)?.into()),
        cached_input: NanoUsd(row.int(14)?.into()),
        output: NanoUsd(row.int(15)?.into()),
        request: NanoUsd(row.int(16)?.into()),
        device_second: NanoUsd(row.int(17)?.into()),
    };
    Ok(OpenRequest {
        chain: chain(row.text(0)?, row.text(1)?, row.text(2)?),
        choices: row.int(3)?,
        granted: row.int(4)?,
        posted: row.int(5)?,
        used: tally(row, 6)?,
        leases: row.int(11)?,
        open: Vec::new(),
        terms: Terms { version: row.int(12)?, rates, billing: billing(row.text(18)?)? },
    })
}

/// A request without a key has an empty one in its row.
pub(super) fn chain(org: &str, tenant: &str, key: &str) -> Chain {
    let key = (!key.is_empty()).then(|| KeyId::new(key));
    Chain { org: OrgId::new(org), tenant: TenantId::new(tenant), key }
}

/// Five columns from `first` on.
fn tally(row: &Row, first: usize) -> Result<Tally, DbError> {
    let at = |index: usize| row.int(first + index).map(|value| value.max(0) as u64);
    Ok(Tally {
        uncached_input: at(0)?,
        cached_input: at(1)?,
        output: at(2)?,
        device_ns: at(3)?,
        billable_device_ns: at(4)?,
    })
}

pub(super) fn billing(name: &str) -> Result<Billing, DbError> {
    match name {
        "tokens" => Ok(Billing::Tokens),
        "device" => Ok(Billing::Device),
        other => Err(DbError::Corrupt(format!("billing {other:?}"))),
    }
}

/// Counts stay far below 2^63.
pub(super) fn count(value: u64) -> crate::ledger::db::Val {
    i64::try_from(value).unwrap_or(i64::MAX).into()
}
