//! Double entry: every amount leaves one account and enters another.

use std::collections::BTreeMap;

use super::{Book, running::SLOT_NS};
use crate::ledger::{
    db::DbError,
    rows::{Chain, GLOBAL},
};

/// Accounts of the operator. Those of tenants are `tenant:ID`.
pub const REVENUE: &str = "operator:revenue";
pub const REFUNDS: &str = "operator:refunds";
pub const CREDITS: &str = "operator:credits";
/// Device time above its bound, which no tenant is charged for.
pub const WRITE_OFF: &str = "operator:gpu_writeoff";
/// The other side of what is written off.
pub const DEVICE: &str = "operator:device";

/// Entries and those of rolled-up days, summed by kind and slot, where a condition holds; SQL cannot
/// have its columns as parameters.
macro_rules! by_slot {
    ($condition:literal) => {
        concat!(
            "SELECT kind, at_ns / $1 AS slot, CAST(SUM(amount) AS BIGINT) FROM (
                SELECT kind, window_ns AS at_ns, amount, org_id, tenant_id, key_id FROM transfer
                UNION ALL
                SELECT kind, day_ns, amount, org_id, tenant_id, key_id FROM transfer_day
            ) AS moved WHERE at_ns >= $2 AND ",
            $condition,
            " GROUP BY kind, slot"
        )
    };
}

/// Why money moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Charge,
    Refund,
    /// Given or paid in advance: counts against what the tenant and its organisation spend, and not
    /// against what a key or the operator does.
    Credit,
    WriteOff,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Charge => "charge",
            Self::Refund => "refund",
            Self::Credit => "credit",
            Self::WriteOff => "writeoff",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        [Self::Charge, Self::Refund, Self::Credit, Self::WriteOff]
            .into_iter()
            .find(|kind| kind.name() == name)
    }

    /// What `amount` adds to the spend of a scope.
    pub fn spend(self, scope: &str, amount: i64) -> i64 {
        match self {
            Self::Charge => amount,
            Self::Refund => -amount,
            Self::Credit if scope.starts_with("tenant:") || scope.starts_with("org:") => -amount,
            Self::Credit | Self::WriteOff => 0,
        }
    }
}

/// One movement.
pub(super) struct Move<'a> {
    pub kind: Kind,
    pub debit: &'a str,
    pub credit: &'a str,
    pub amount: i64,
    /// Whose window it counts in.
    pub window_ns: i64,
    pub request: &'a str,
    pub chain: &'a Chain,
    pub memo: &'a str,
}

impl Book<'_> {
    pub(super) fn transfer(&mut self, moved: &Move<'_>) -> Result<(), DbError> {
        let id = self.next("transfer");
        let chain = moved.chain;
        self.write(
            "INSERT INTO transfer (id, at_ns, window_ns, kind, debit, credit, amount, request_id,
            org_id, tenant_id, key_id, memo)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
            &[
                id.into(),
                self.now_ns.into(),
                moved.window_ns.into(),
                moved.kind.name().into(),
                moved.debit.into(),
                moved.credit.into(),
                moved.amount.into(),
                moved.request.into(),
                chain.org.as_str().into(),
                chain.tenant.as_str().into(),
                chain.key.as_ref().map_or("", |key| key.as_str()).into(),
                moved.memo.into(),
            ],
        )?;
        for (account, debit, credit) in
            [(moved.debit, moved.amount, 0), (moved.credit, 0, moved.amount)]
        {
            self.write(
                "INSERT INTO account (id, debits, credits) VALUES ($1, $2, $3)
                ON CONFLICT (id) DO UPDATE SET debits = account.debits + excluded.debits,
                credits = account.credits + excluded.credits",
                &[account.into(), debit.into(), credit.into()],
            )?;
        }
        let scopes = chain.scopes();
        for scope in &scopes {
            let spend = moved.kind.spend(scope, moved.amount);
            // A charge is counted by the caller, together with what it frees of the hold.
            if moved.kind != Kind::Charge && spend != 0 {
                self.count(std::slice::from_ref(scope), moved.window_ns, spend, 0)?;
            }
        }
        Ok(())
    }

    /// Net spend of a scope in every slot of time from the one at `first_ns` on, with its start.
    pub(super) fn spend_by_slot(
        &mut self,
        scope: &str,
        first_ns: i64,
    ) -> Result<BTreeMap<i64, i64>, DbError> {
        let (kind, id) = scope.split_once(':').unwrap_or((GLOBAL, ""));
        let sql = match kind {
            "org" => by_slot!("org_id = $3"),
            "tenant" => by_slot!("tenant_id = $3"),
            "key" => by_slot!("key_id = $3"),
            _ => by_slot!("'' = $3"),
        };
        let mut spend: BTreeMap<i64, i64> = BTreeMap::new();
        for row in self.query(sql, &[SLOT_NS.into(), first_ns.into(), id.into()])? {
            let kind = Kind::parse(row.text(0)?)
                .ok_or_else(|| DbError::Corrupt(format!("transfer kind {:?}", row.text(0))))?;
            let slot = spend.entry(row.int(1)?.saturating_mul(SLOT_NS)).or_default();
            *slot = slot.saturating_add(kind.spend(scope, row.int(2)?));
        }
        Ok(spend)
    }
}
