//! Old requests become daily sums: a row a day for each tenant, key, model and user label, and one
//! for each kind of entry. No sum of the ledger changes by it.
//!
//! A day is one of UTC, and its sums lie at its start. Budgets count in windows that start in zones
//! of their own, so no present window may reach back into rolled-up days: see [`RETENTION_DAYS_MIN`].

use super::{Book, budgets::Total};
use crate::ledger::db::{DbError, Val};

pub const DAY_NS: i64 = 24 * 60 * 60 * 1_000_000_000;
/// The longest window with an end is a month of 31 days, an hour longer where clocks are put back,
/// and a zone may be a day off UTC.
pub const RETENTION_DAYS_MIN: u64 = 35;

impl Book<'_> {
    /// Rolls up at most `requests_max` requests that ended, with all that moved for them, before the
    /// day `retention_ns` ago. Returns how many; less than the most says that no more are due.
    ///
    /// A request waits while any entry of it is younger, as a late refund is.
    pub fn roll_up(&mut self, retention_ns: i64, requests_max: i64) -> Result<u64, DbError> {
        let least_ns = DAY_NS * RETENTION_DAYS_MIN as i64;
        let mut before_ns = self.now_ns.saturating_sub(retention_ns.max(least_ns));
        // What an open request posts counts in the windows of its grants, however old they are.
        let open = "SELECT MIN(opened_ns) FROM request WHERE state = 'open'";
        if let Some(row) = self.one(open, &[])?
            && let Some(opened_ns) = row.int_or_null(0)?
        {
            before_ns = before_ns.min(opened_ns.saturating_sub(least_ns));
        }
        let before_ns = before_ns.div_euclid(DAY_NS) * DAY_NS;
        let chosen = self.execute(
            "INSERT INTO rolling (request_id) SELECT id FROM request
            WHERE closed_ns < $1 AND state <> 'open' AND NOT EXISTS (
                SELECT 1 FROM transfer WHERE transfer.request_id = request.id AND window_ns >= $1
            ) ORDER BY closed_ns, id LIMIT $2",
            &[before_ns.into(), requests_max.into()],
        )?;
        if chosen > 0 {
            self.add_days()?;
            self.forget_rolled()?;
        }
        self.forget_windows(before_ns / 1_000_000_000)?;
        Ok(chosen)
    }

    fn add_days(&mut self) -> Result<(), DbError> {
        let day = [Val::Int(DAY_NS)];
        self.write(
            "INSERT INTO usage_day (day_ns, org_id, tenant_id, key_id, model, user_label, requests,
            uncached_input, cached_input, output, device_ns, billable_device_ns, posted, token_cost,
            device_cost, energy_uj, energy_estimated_uj, steps, unrecorded_max)
            SELECT closed_ns / $1 * $1, org_id, tenant_id, key_id, model, user_label, COUNT(*),
            CAST(SUM(uncached_input) AS BIGINT), CAST(SUM(cached_input) AS BIGINT),
            CAST(SUM(output) AS BIGINT), CAST(SUM(device_ns) AS BIGINT),
            CAST(SUM(billable_device_ns) AS BIGINT), CAST(SUM(posted) AS BIGINT),
            CAST(SUM(token_cost) AS BIGINT), CAST(SUM(device_cost) AS BIGINT),
            CAST(SUM(COALESCE(energy_uj, 0)) AS BIGINT),
            CAST(SUM(COALESCE(energy_estimated_uj, 0)) AS BIGINT), CAST(SUM(steps) AS BIGINT),
            CAST(SUM(unrecorded_max) AS BIGINT)
            FROM request WHERE id IN (SELECT request_id FROM rolling) GROUP BY 1, 2, 3, 4, 5, 6
            ON CONFLICT (day_ns, org_id, tenant_id, key_id, model, user_label) DO UPDATE SET
            requests = usage_day.requests + excluded.requests,
            uncached_input = usage_day.uncached_input + excluded.uncached_input,
            cached_input = usage_day.cached_input + excluded.cached_input,
            output = usage_day.output + excluded.output,
            device_ns = usage_day.device_ns + excluded.device_ns,
            billable_device_ns = usage_day.billable_device_ns + excluded.billable_device_ns,
            posted = usage_day.posted + excluded.posted,
            token_cost = usage_day.token_cost + excluded.token_cost,
            device_cost = usage_day.device_cost + excluded.device_cost,
            energy_uj = usage_day.energy_uj + excluded.energy_uj,
            energy_estimated_uj = usage_day.energy_estimated_uj + excluded.energy_estimated_uj,
            steps = usage_day.steps + excluded.steps,
            unrecorded_max = usage_day.unrecorded_max + excluded.unrecorded_max",
            &day,
        )?;
        self.write(
            "INSERT INTO transfer_day (day_ns, kind, debit, credit, org_id, tenant_id, key_id, model,
            user_label, amount, entries)
            SELECT window_ns / $1 * $1, kind, debit, credit, transfer.org_id, transfer.tenant_id,
            transfer.key_id, model, user_label, CAST(SUM(amount) AS BIGINT), COUNT(*)
            FROM transfer JOIN request ON request.id = transfer.request_id
            WHERE transfer.request_id IN (SELECT request_id FROM rolling)
            GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9
            ON CONFLICT (day_ns, kind, debit, credit, org_id, tenant_id, key_id, model, user_label)
            DO UPDATE SET amount = transfer_day.amount + excluded.amount,
            entries = transfer_day.entries + excluded.entries",
            &day,
        )
    }

    fn forget_rolled(&mut self) -> Result<(), DbError> {
        for sql in [
            "DELETE FROM transfer WHERE request_id IN (SELECT request_id FROM rolling)",
            "DELETE FROM idempotency WHERE request_id IN (SELECT request_id FROM rolling)",
            "DELETE FROM request WHERE id IN (SELECT request_id FROM rolling)",
            "DELETE FROM rolling",
        ] {
            self.write(sql, &[])?;
        }
        Ok(())
    }

    /// Windows that began on rolled-up days are over, and could not be computed again.
    fn forget_windows(&mut self, before_s: i64) -> Result<(), DbError> {
        let of = "SELECT COUNT(*) FROM window_total WHERE span <> 'total' AND start_s < $1";
        let some = self.one(of, &[before_s.into()])?.map_or(Ok(0), |row| row.int(0))?;
        if some > 0 {
            let sql = "DELETE FROM window_total WHERE span <> 'total' AND start_s < $1";
            self.write(sql, &[before_s.into()])?;
            self.totals.retain(|(_, span, start_s), _: &mut Total| {
                *span == crate::ledger::Span::Total || *start_s >= before_s
            });
        }
        Ok(())
    }
}
