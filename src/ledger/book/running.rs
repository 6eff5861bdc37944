//! Running requests: posts, further leases, the end, and giving up those of a dead server.

use super::{
    Book,
    budgets::Headroom,
    move_money::{DEVICE, Kind, Move, REVENUE, WRITE_OFF},
    nano,
    requests::{LeaseRow, OpenRequest, count},
};
use crate::{
    ledger::{
        db::{DbError, Question, Row},
        rows::{Bill, Denial, EndCause, EnergyRow, EventKind, Extension, Grant, Payer},
    },
    price::{Billing, Tally, usd},
    types::{NanoUsd, RequestId},
};

/// What is asked to know whether a server was given up: there is a row where it was not.
pub fn replica_of(replica: &str) -> Question {
    ("SELECT id FROM replica WHERE id = $1", vec![replica.into()])
}

/// Every window of every zone starts at a multiple of this, so grants within one may share a lease.
pub(super) const SLOT_NS: i64 = 15 * 60 * 1_000_000_000;

impl Book<'_> {
    /// Posts what a request has used and holds more for it.
    pub fn extend(&mut self, asked: &Extension) -> Result<Grant, DbError> {
        let id = &asked.request;
        let Some(mut request) = self.open_request(id)? else {
            return Ok(Grant { granted: NanoUsd(0), denied: Some(Denial::Lost) });
        };
        self.post(id, &mut request, &asked.used)?;
        let denied = self.grant(id, &mut request, asked)?;
        self.write_progress(id, &request)?;
        Ok(Grant { granted: NanoUsd(request.granted.into()), denied })
    }

    fn grant(
        &mut self,
        id: &RequestId,
        request: &mut OpenRequest,
        asked: &Extension,
    ) -> Result<Option<Denial>, DbError> {
        if let Some(key) = &request.chain.key
            && self.account(&Payer::Key(key.clone()))?.is_none()
        {
            return Ok(Some(Denial::Revoked));
        }
        let more = |total: NanoUsd| nano(NanoUsd(total.0 - i128::from(request.granted))).max(0);
        let (least, wanted) = (more(asked.least), more(asked.wanted));
        if wanted == 0 {
            return Ok(None);
        }
        let scopes = request.chain.scopes();
        let headroom = self.headroom(&scopes)?;
        let Some(amount) = self.share(&headroom, least, wanted, nano(request.terms.token_unit()))
        else {
            return self.deny(request, &scopes, least.max(1), &headroom).map(Some);
        };
        self.count(&scopes, self.now_ns, 0, amount)?;
        request.granted += amount;
        let slot = self.now_ns / SLOT_NS;
        let lease = match request.open.pop_if(|last| last.granted_ns / SLOT_NS == slot) {
            Some(last) => LeaseRow { amount: last.amount + amount, ..last },
            None => {
                request.leases += 1;
                LeaseRow { number: request.leases, granted_ns: self.now_ns, amount, posted: 0 }
            }
        };
        self.write_lease(id, &lease)?;
        request.open.push(lease);
        Ok(None)
    }

    fn deny(
        &mut self,
        request: &OpenRequest,
        scopes: &[String],
        least: i64,
        headroom: &Headroom,
    ) -> Result<Denial, DbError> {
        let mut own = 0;
        for lease in &request.open {
            own += if headroom.counts(lease.granted_ns) { lease.left() } else { 0 };
        }
        for budget in self.exhausted(scopes, least)? {
            self.turned_away(&budget)?;
        }
        let others = headroom.held > own;
        Ok(if others { Denial::BudgetForNow } else { Denial::BudgetForGood })
    }

    /// Turns held money into spend up to what `used` costs, oldest lease first, each in the window
    /// of its grant. Never posts more than is held.
    fn post(
        &mut self,
        id: &RequestId,
        request: &mut OpenRequest,
        used: &Tally,
    ) -> Result<(), DbError> {
        let scopes = request.chain.scopes();
        let output = used.output.saturating_sub(request.used.output);
        if output > 0 {
            self.count_rates(&scopes, output, 0)?;
        }
        let owed = nano(request.terms.charge(used)).min(request.granted);
        let mut left = (owed - request.posted).max(0);
        for mut lease in std::mem::take(&mut request.open) {
            let amount = left.min(lease.left());
            if amount <= 0 {
                request.open.push(lease);
                continue;
            }
            left -= amount;
            lease.posted += amount;
            request.posted += amount;
            self.count(&scopes, lease.granted_ns, amount, -amount)?;
            self.transfer(&Move {
                kind: Kind::Charge,
                debit: &format!("tenant:{}", request.chain.tenant),
                credit: REVENUE,
                amount,
                window_ns: lease.granted_ns,
                request: id.as_str(),
                chain: &request.chain,
                memo: "",
            })?;
            if lease.left() == 0 {
                self.delete_lease(id, lease.number)?;
            } else {
                self.write_lease(id, &lease)?;
                request.open.push(lease);
            }
        }
        request.used = *used;
        Ok(())
    }

    /// Posts the rest, gives back what is still held, and closes a request. `None` where it is not
    /// open: it was closed before, or given up.
    pub fn close(
        &mut self,
        id: &RequestId,
        used: &Tally,
        cause: EndCause,
        steps: u64,
    ) -> Result<Option<Bill>, DbError> {
        let Some(mut request) = self.open_request(id)? else { return Ok(None) };
        self.post(id, &mut request, used)?;
        self.void(&request)?;
        self.write_off(id, &request)?;
        self.write_progress(id, &request)?;
        self.end_request(id, "done", cause, 0, steps)?;
        Ok(Some(request.bill()))
    }

    /// Notes what the device drew for a request, which is known only some time after its end.
    pub fn note_energy(&mut self, row: &EnergyRow) -> Result<(), DbError> {
        self.write(
            "UPDATE request SET energy_uj = $1, energy_estimated_uj = $2 WHERE id = $3",
            &[count(row.total_uj), count(row.estimated_uj), row.request.as_str().into()],
        )
    }

    /// Voids a request whose admission was never told to anyone, so that nothing of it was delivered.
    pub fn forget(&mut self, id: &RequestId) -> Result<(), DbError> {
        let Some(request) = self.open_request(id)? else { return Ok(()) };
        self.void(&request)?;
        self.end_request(id, "done", EndCause::LedgerLost, 0, 0)
    }

    /// Device time above what was held for it is the operator's.
    fn write_off(&mut self, id: &RequestId, request: &OpenRequest) -> Result<(), DbError> {
        let (rates, used) = (&request.terms.rates, &request.used);
        let billable = rates.device_cost(used.billable_device_ns);
        let amount = nano(NanoUsd(rates.device_cost(used.device_ns).0 - billable.0));
        if request.terms.billing != Billing::Device || amount <= 0 {
            return Ok(());
        }
        self.transfer(&Move {
            kind: Kind::WriteOff,
            debit: WRITE_OFF,
            credit: DEVICE,
            amount,
            window_ns: self.now_ns,
            request: id.as_str(),
            chain: &request.chain,
            memo: "device time above its bound",
        })
    }

    /// Gives back what is held. Returns how much that was.
    fn void(&mut self, request: &OpenRequest) -> Result<i64, DbError> {
        let scopes = request.chain.scopes();
        let mut given_back = 0;
        for lease in &request.open {
            given_back += lease.left();
            self.count(&scopes, lease.granted_ns, 0, -lease.left())?;
        }
        self.count_rates(&scopes, 0, request.choices)?;
        Ok(given_back)
    }

    /// Gives up the open requests of a server that is gone: what is on record stays charged, the
    /// rest of their holds is void. Returns how many there were.
    pub fn recover(&mut self, replica: &str) -> Result<u64, DbError> {
        let sql = "SELECT id FROM request WHERE replica = $1 AND state = 'open'";
        let ids: Vec<RequestId> = self
            .query(sql, &[replica.into()])?
            .iter()
            .map(|row| Ok(RequestId::new(row.text(0)?)))
            .collect::<Result<_, DbError>>()?;
        let mut unrecorded = 0;
        for id in &ids {
            let Some(request) = self.open_request(id)? else { continue };
            let given_back = self.void(&request)?;
            unrecorded += given_back;
            self.end_request(id, "crashed", EndCause::Crashed, given_back, 0)?;
        }
        self.write("DELETE FROM replica WHERE id = $1", &[replica.into()])?;
        if !ids.is_empty() {
            let at_most = usd::format(NanoUsd(unrecorded.into()));
            let detail = format!("{} requests, at most {at_most} USD not on record", ids.len());
            self.event(EventKind::Recovered, replica, detail);
        }
        Ok(ids.len() as u64)
    }

    /// Says that a server is alive until `now + ttl_ns`. False where it was given up meanwhile, as the
    /// answer to [`replica_of`] says.
    pub fn heartbeat(
        &mut self,
        replica: &str,
        ttl_ns: i64,
        found: &[Row],
    ) -> Result<bool, DbError> {
        if found.is_empty() {
            return Ok(false);
        }
        let sql = "UPDATE replica SET expires_ns = $1 WHERE id = $2";
        let until_ns = self.now_ns.saturating_add(ttl_ns);
        self.write(sql, &[until_ns.into(), replica.into()])?;
        Ok(true)
    }

    /// A server begins.
    pub fn join(&mut self, replica: &str, name: &str, ttl_ns: i64) -> Result<(), DbError> {
        let until_ns = self.now_ns.saturating_add(ttl_ns);
        self.write(
            "INSERT INTO replica (id, name, expires_ns) VALUES ($1, $2, $3)",
            &[replica.into(), name.into(), until_ns.into()],
        )?;
        Ok(())
    }

    /// Servers whose time ran out `margin_ns` ago or earlier.
    pub fn expired_replicas(&mut self, margin_ns: i64) -> Result<Vec<String>, DbError> {
        let before_ns = self.now_ns.saturating_sub(margin_ns);
        self.query("SELECT id FROM replica WHERE expires_ns <= $1", &[before_ns.into()])?
            .iter()
            .map(|row| Ok(row.text(0)?.to_owned()))
            .collect()
    }
}
