//! Every sum of the ledger, computed again from what it is a sum of.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
};

use super::{
    Book,
    budgets::read,
    move_money::Kind,
    nano,
    requests::{OpenRequest, read_request},
    running::SLOT_NS,
};
use crate::ledger::{
    db::{DbError, Row, Val},
    rows::{Chain, EndCause},
    window::start_s,
};

/// A sum that does not hold, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem(pub String);

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Problems found so far.
#[derive(Default)]
struct Findings(Vec<Problem>);

impl Findings {
    fn equal<T: PartialEq + fmt::Debug>(&mut self, what: impl fmt::Display, has: T, should: T) {
        if has != should {
            self.0.push(Problem(format!("{what} is {has:?} and should be {should:?}")));
        }
    }

    fn wrong(&mut self, what: impl fmt::Display) {
        self.0.push(Problem(what.to_string()));
    }
}

/// Posted and held.
type Sums = (i64, i64);

/// By their start.
type Windows = BTreeMap<i64, Sums>;
/// Spend of a slot of time, and what is held of it.
type Slots = BTreeMap<i64, Sums>;

impl Book<'_> {
    /// What does not add up, which is nothing. Reads the whole ledger once.
    ///
    /// # Errors
    /// The database fails, or holds a value that this program never writes.
    pub fn verify(&mut self) -> Result<Vec<Problem>, DbError> {
        // What this transaction has changed so far is to be seen as well.
        self.write_totals()?;
        let mut found = Findings::default();
        self.verify_accounts(&mut found)?;
        self.verify_requests(&mut found)?;
        self.verify_leases(&mut found)?;
        self.verify_windows(&mut found)?;
        self.verify_rates(&mut found)?;
        self.verify_days(&mut found)?;
        Ok(found.0)
    }

    fn verify_accounts(&mut self, found: &mut Findings) -> Result<(), DbError> {
        let mut moved: BTreeMap<String, Sums> = BTreeMap::new();
        for row in self.query(
            "SELECT debit, CAST(SUM(amount) AS BIGINT) FROM (
                    SELECT debit, amount FROM transfer
                    UNION ALL SELECT debit, amount FROM transfer_day
                ) AS moved GROUP BY debit",
            &[],
        )? {
            moved.entry(row.text(0)?.to_owned()).or_default().0 = row.int(1)?;
        }
        for row in self.query(
            "SELECT credit, CAST(SUM(amount) AS BIGINT) FROM (
                SELECT credit, amount FROM transfer
                UNION ALL SELECT credit, amount FROM transfer_day
            ) AS moved GROUP BY credit",
            &[],
        )? {
            moved.entry(row.text(0)?.to_owned()).or_default().1 = row.int(1)?;
        }
        let (mut debits, mut credits) = (0i128, 0i128);
        for row in self.query("SELECT id, debits, credits FROM account", &[])? {
            let (id, has) = (row.text(0)?, (row.int(1)?, row.int(2)?));
            debits += i128::from(has.0);
            credits += i128::from(has.1);
            let should = moved.remove(id).unwrap_or_default();
            found.equal(format_args!("account {id}: (debits, credits)"), has, should);
        }
        for (id, sums) in moved {
            found.wrong(format_args!("account {id} is missing, its transfers are {sums:?}"));
        }
        found.equal("the sum of all debits", debits, credits);
        let bad = "SELECT id, kind, amount FROM transfer WHERE amount <= 0 OR debit = credit
            OR kind NOT IN ('charge', 'refund', 'credit', 'writeoff')";
        for row in self.query(bad, &[])? {
            let (id, kind, amount) = (row.int(0)?, row.text(1)?, row.int(2)?);
            found.wrong(format_args!("transfer {id} is a {kind:?} of {amount}"));
        }
        Ok(())
    }

    fn verify_requests(&mut self, found: &mut Findings) -> Result<(), DbError> {
        let mut charged = self.moved_by_request("charge")?;
        let mut refunded = self.moved_by_request("refund")?;
        let held = self.held_by_request()?;
        let mut priced = 0;
        for row in self.query(
            "SELECT request.org_id, request.tenant_id, request.key_id, choices, granted, posted,
            uncached_input, request.cached_input, request.output, device_ns, billable_device_ns,
            leases, price_version, price.input, price.cached_input, price.output, price.request,
            price.device_second, price.billing, request.id, state, token_cost, device_cost,
            end_cause, closed_ns, unrecorded_max
            FROM request JOIN price ON price.version = request.price_version",
            &[],
        )? {
            priced += 1;
            let (request, id) = (read_request(&row)?, row.text(19)?);
            let charges = charged.remove(id).unwrap_or(0);
            found.equal(format_args!("request {id}: posted"), request.posted, charges);
            let refunds = refunded.remove(id).unwrap_or(0);
            if refunds > request.posted {
                found.wrong(format_args!("request {id}: {refunds} of {charges} refunded"));
            }
            verify_price(found, id, &request, &row)?;
            let held = held.get(id).copied();
            verify_state(found, id, &request, held, &row)?;
        }
        let all = self.one("SELECT CAST(COUNT(*) AS BIGINT) FROM request", &[])?;
        let all = all.map_or(Ok(0), |row| row.int(0))?;
        found.equal("the number of requests with a price", priced, all);
        for (id, amount) in charged.into_iter().chain(refunded) {
            found.wrong(format_args!("request {id:?} is missing, {amount} moved for it"));
        }
        let wrong = "SELECT id FROM request WHERE energy_uj < 0 OR energy_estimated_uj < 0
            OR energy_estimated_uj > energy_uj";
        for row in self.query(wrong, &[])? {
            found.wrong(format_args!("request {}: its energy", row.text(0)?));
        }
        let strange = "SELECT transfer.id FROM transfer
            JOIN request ON request.id = transfer.request_id
            WHERE transfer.org_id <> request.org_id OR transfer.tenant_id <> request.tenant_id
            OR transfer.key_id <> request.key_id";
        for row in self.query(strange, &[])? {
            found.wrong(format_args!("transfer {} names another payer", row.int(0)?));
        }
        Ok(())
    }

    fn moved_by_request(&mut self, kind: &str) -> Result<HashMap<String, i64>, DbError> {
        self.query(
            "SELECT request_id, CAST(SUM(amount) AS BIGINT) FROM transfer WHERE kind = $1
            GROUP BY request_id",
            &[kind.into()],
        )?
        .iter()
        .map(|row| Ok((row.text(0)?.to_owned(), row.int(1)?)))
        .collect()
    }

    fn held_by_request(&mut self) -> Result<HashMap<String, i64>, DbError> {
        self.query(
            "SELECT request_id, CAST(SUM(amount - posted) AS BIGINT) FROM lease GROUP BY request_id",
            &[],
        )?
        .iter()
        .map(|row| Ok((row.text(0)?.to_owned(), row.int(1)?)))
        .collect()
    }

    fn verify_leases(&mut self, found: &mut Findings) -> Result<(), DbError> {
        let bad = "SELECT lease.request_id, number FROM lease
            LEFT JOIN request ON request.id = lease.request_id AND request.state = 'open'
            WHERE request.id IS NULL OR amount < lease.posted OR lease.posted < 0";
        for row in self.query(bad, &[])? {
            let (request, number) = (row.text(0)?, row.int(1)?);
            found.wrong(format_args!("lease {number} of request {request} should not be there"));
        }
        Ok(())
    }

    /// Every window of every budget. One that has no row is empty, or was over before its budget
    /// was made.
    fn verify_windows(&mut self, found: &mut Findings) -> Result<(), DbError> {
        let (mut slots, mut rows) = (self.slots()?, self.window_rows()?);
        let mut budgets = Vec::new();
        for row in self.query("SELECT scope, span, zone, limit_nano, soft FROM budget", &[])? {
            budgets.push(read(&row)?);
        }
        for budget in budgets {
            let mut should: BTreeMap<i64, Sums> = BTreeMap::new();
            for (slot, sums) in slots.entry(budget.scope.clone()).or_default() {
                let window = start_s(budget.span, &budget.zone, slot.saturating_mul(SLOT_NS));
                let window = should.entry(window).or_default();
                *window = (window.0 + sums.0, window.1 + sums.1);
            }
            let key = (budget.scope.clone(), budget.span.name().to_owned());
            let has = rows.remove(&key).unwrap_or_default();
            let now_s = start_s(budget.span, &budget.zone, self.now_ns);
            let held = should.iter().filter(|(_, sums)| sums.1 != 0).map(|(start_s, _)| *start_s);
            let live: BTreeSet<i64> = held.chain([now_s]).collect();
            for start_s in live.union(&has.keys().copied().collect()) {
                let should = should.get(start_s).copied().unwrap_or_default();
                let has = has.get(start_s).copied().unwrap_or_default();
                let what = format_args!("window {start_s} of {key:?}: (posted, held)");
                found.equal(what, has, should);
            }
        }
        for key in rows.keys() {
            found.wrong(format_args!("there are windows of {key:?}, which is no budget"));
        }
        Ok(())
    }

    fn window_rows(&mut self) -> Result<HashMap<(String, String), Windows>, DbError> {
        let mut rows: HashMap<_, Windows> = HashMap::new();
        let sql = "SELECT scope, span, start_s, posted, held FROM window_total";
        for row in self.query(sql, &[])? {
            let key = (row.text(0)?.to_owned(), row.text(1)?.to_owned());
            rows.entry(key).or_default().insert(row.int(2)?, (row.int(3)?, row.int(4)?));
        }
        Ok(rows)
    }

    /// Of every scope that anything was spent by or is held for.
    fn slots(&mut self) -> Result<HashMap<String, Slots>, DbError> {
        let mut slots: HashMap<String, Slots> = HashMap::new();
        for row in self.query(
            "SELECT org_id, tenant_id, key_id, kind, at_ns / $1 AS slot,
            CAST(SUM(amount) AS BIGINT) FROM (
                SELECT org_id, tenant_id, key_id, kind, window_ns AS at_ns, amount FROM transfer
                UNION ALL
                SELECT org_id, tenant_id, key_id, kind, day_ns, amount FROM transfer_day
            ) AS moved GROUP BY org_id, tenant_id, key_id, kind, slot",
            &[Val::Int(SLOT_NS)],
        )? {
            let Some(kind) = Kind::parse(row.text(3)?) else { continue };
            for scope in chain(&row)?.scopes() {
                let spend = kind.spend(&scope, row.int(5)?);
                slots.entry(scope).or_default().entry(row.int(4)?).or_default().0 += spend;
            }
        }
        for row in self.query(
            "SELECT org_id, tenant_id, key_id, granted_ns / $1, amount - lease.posted FROM lease
            JOIN request ON request.id = lease.request_id",
            &[Val::Int(SLOT_NS)],
        )? {
            for scope in chain(&row)?.scopes() {
                slots.entry(scope).or_default().entry(row.int(3)?).or_default().1 += row.int(4)?;
            }
        }
        Ok(slots)
    }

    /// Rolled-up days: what their requests were charged is what moved for them.
    fn verify_days(&mut self, found: &mut Findings) -> Result<(), DbError> {
        let mut moved: BTreeMap<[String; 5], Sums> = BTreeMap::new();
        for row in self.query(
            "SELECT org_id, tenant_id, key_id, model, user_label, kind,
            CAST(SUM(amount) AS BIGINT) FROM transfer_day WHERE kind IN ('charge', 'refund')
            GROUP BY org_id, tenant_id, key_id, model, user_label, kind",
            &[],
        )? {
            let sums = moved.entry(labels(&row)?).or_default();
            match row.text(5)? {
                "charge" => sums.0 += row.int(6)?,
                _ => sums.1 += row.int(6)?,
            }
        }
        for row in self.query(
            "SELECT org_id, tenant_id, key_id, model, user_label, CAST(SUM(posted) AS BIGINT),
            MIN(requests) FROM usage_day GROUP BY org_id, tenant_id, key_id, model, user_label",
            &[],
        )? {
            let of = labels(&row)?;
            let (charged, refunded) = moved.remove(&of).unwrap_or_default();
            found.equal(format_args!("days of {of:?}: posted"), row.int(5)?, charged);
            if refunded > charged || row.int(6)? <= 0 {
                found.wrong(format_args!("days of {of:?}: {refunded} of {charged} refunded"));
            }
        }
        for (of, sums) in moved {
            found.wrong(format_args!("days of {of:?} are missing, {sums:?} moved in them"));
        }
        let bad =
            "SELECT day_ns, kind, amount FROM transfer_day WHERE amount <= 0 OR debit = credit
            OR kind NOT IN ('charge', 'refund', 'writeoff') OR entries <= 0";
        for row in self.query(bad, &[])? {
            let (day_ns, kind, amount) = (row.int(0)?, row.text(1)?, row.int(2)?);
            found.wrong(format_args!("the entries of day {day_ns} are a {kind:?} of {amount}"));
        }
        for row in self.query("SELECT request_id FROM rolling", &[])? {
            found.wrong(format_args!("request {} is half rolled up", row.text(0)?));
        }
        Ok(())
    }

    fn verify_rates(&mut self, found: &mut Findings) -> Result<(), DbError> {
        for row in self.query("SELECT scope, sequences FROM rate_limit", &[])? {
            let scope = row.text(0)?;
            let open = self.open_sequences(scope)?;
            found.equal(format_args!("sequences of {scope}"), row.int(1)?, open);
        }
        Ok(())
    }
}

/// The charge is what the price says, whether or not the request is over.
fn verify_price(
    found: &mut Findings,
    id: &str,
    request: &OpenRequest,
    row: &Row,
) -> Result<(), DbError> {
    let owed = nano(request.terms.charge(&request.used));
    found.equal(format_args!("request {id}: posted for its tokens"), request.posted, owed);
    let rates = &request.terms.rates;
    let costs =
        (nano(rates.token_cost(&request.used)), nano(rates.device_cost(request.used.device_ns)));
    found.equal(
        format_args!("request {id}: (token, device) cost"),
        (row.int(21)?, row.int(22)?),
        costs,
    );
    Ok(())
}

/// An open request has posted or holds all that was granted to it; an ended one holds nothing.
fn verify_state(
    found: &mut Findings,
    id: &str,
    request: &OpenRequest,
    held: Option<i64>,
    row: &Row,
) -> Result<(), DbError> {
    let (state, cause) = (row.text(20)?, row.text(23)?);
    let (closed, unrecorded) = (row.int_or_null(24)?.is_some(), row.int(25)?);
    let crashed = cause == EndCause::Crashed.name();
    let fits = match state {
        "open" => !closed && cause.is_empty() && unrecorded == 0,
        "done" => closed && !cause.is_empty() && !crashed && unrecorded == 0,
        "crashed" => closed && crashed && unrecorded == request.granted - request.posted,
        _ => false,
    };
    if !fits {
        found.wrong(format_args!(
            "request {id} is {state:?}, ended by {cause:?}, with {unrecorded} not on record"
        ));
    }
    if state == "open" {
        let sum = request.posted + held.unwrap_or(0);
        found.equal(format_args!("request {id}: granted"), request.granted, sum);
    } else if request.posted > request.granted {
        found.wrong(format_args!("request {id} was charged more than was held for it"));
    }
    Ok(())
}

/// The first three columns.
fn chain(row: &Row) -> Result<Chain, DbError> {
    Ok(super::requests::chain(row.text(0)?, row.text(1)?, row.text(2)?))
}

/// The first five columns.
fn labels(row: &Row) -> Result<[String; 5], DbError> {
    let text = |index| row.text(index).map(str::to_owned);
    Ok([text(0)?, text(1)?, text(2)?, text(3)?, text(4)?])
}
