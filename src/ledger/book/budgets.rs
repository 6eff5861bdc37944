//! Budgets and the totals of their windows.

use super::{Book, nano};
use crate::{
    ledger::{
        db::{DbError, Row},
        rows::{EventKind, Refusal},
        window::{Span, Zone, bounds_s, start_s},
    },
    price::usd,
    types::NanoUsd,
};

/// Bit of `fired` for a budget that turned something away.
const HARD_FIRED: i64 = 1 << 62;
/// Share of what is left that one lease may take, so that many streams near a limit get some each.
const SHARE: i64 = 8;

/// A limit on the spend of a scope in each window.
#[derive(Clone, Debug, PartialEq)]
pub struct Budget {
    pub scope: String,
    pub span: Span,
    pub zone: Zone,
    pub limit: NanoUsd,
    /// Percentages of the limit that raise an event once a window.
    pub soft_percent: Vec<u8>,
}

pub(super) type TotalKey = (String, Span, i64);

/// Posted and held in one window.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Total {
    pub posted: i64,
    pub held: i64,
    pub fired: i64,
    changed: bool,
}

/// The tightest budget over a chain of scopes.
pub(super) struct Headroom {
    /// `None` where there is no budget.
    pub left: Option<i64>,
    /// Held of the tightest budget, by anyone.
    pub held: i64,
}

impl Book<'_> {
    /// Budgets of one scope.
    pub fn budgets(&mut self, scope: &str) -> Result<Vec<Budget>, DbError> {
        if let Some(known) = self.budgets.get(scope) {
            return Ok(known.clone());
        }
        let sql = "SELECT span, zone, limit_nano, soft FROM budget WHERE scope = $1 ORDER BY span";
        let rows = self.query(sql, &[scope.into()])?;
        let found = rows.iter().map(|row| read(scope, row)).collect::<Result<Vec<_>, _>>()?;
        self.budgets.insert(scope.to_owned(), found.clone());
        Ok(found)
    }

    fn total(&mut self, budget: &Budget, at_ns: i64) -> Result<(TotalKey, Total), DbError> {
        let start_s = start_s(budget.span, &budget.zone, at_ns);
        let key = (budget.scope.clone(), budget.span, start_s);
        if let Some(total) = self.totals.get(&key) {
            return Ok((key, *total));
        }
        let row = self.one(
            "SELECT posted, held, fired FROM window_total
            WHERE scope = $1 AND span = $2 AND start_s = $3",
            &[budget.scope.as_str().into(), budget.span.name().into(), start_s.into()],
        )?;
        let total = match row {
            Some(row) => {
                Total { posted: row.int(0)?, held: row.int(1)?, fired: row.int(2)?, changed: false }
            }
            None => Total::default(),
        };
        self.totals.insert(key.clone(), total);
        Ok((key, total))
    }

    /// What the budgets of `scopes` leave now.
    pub(super) fn headroom(&mut self, scopes: &[String]) -> Result<Headroom, DbError> {
        let mut tightest = Headroom { left: None, held: 0 };
        for scope in scopes {
            for budget in self.budgets(scope)? {
                let (_, total) = self.total(&budget, self.now_ns)?;
                let left = nano(NanoUsd(
                    budget.limit.0 - i128::from(total.posted) - i128::from(total.held),
                ))
                .max(0);
                if tightest.left.is_none_or(|least| left < least) {
                    tightest = Headroom { left: Some(left), held: total.held };
                }
            }
        }
        Ok(tightest)
    }

    /// Refuses `amount` where a budget of `scopes` does not leave it now.
    pub(super) fn check_budgets(
        &mut self,
        scopes: &[String],
        amount: i64,
    ) -> Result<Result<(), Refusal>, DbError> {
        for scope in scopes {
            for budget in self.budgets(scope)? {
                let (_, total) = self.total(&budget, self.now_ns)?;
                let used = i128::from(total.posted) + i128::from(total.held);
                if used + i128::from(amount) <= budget.limit.0 {
                    continue;
                }
                self.turned_away(&budget)?;
                let resets_s = bounds_s(budget.span, &budget.zone, self.now_ns).1;
                return Ok(Err(Refusal::Budget {
                    scope: scope.clone(),
                    span: budget.span,
                    limit: budget.limit,
                    used: NanoUsd(used),
                    needed: NanoUsd(amount.into()),
                    resets_s,
                }));
            }
        }
        Ok(Ok(()))
    }

    /// Says once a window that a budget is used up.
    pub(super) fn turned_away(&mut self, budget: &Budget) -> Result<(), DbError> {
        let (key, total) = self.total(budget, self.now_ns)?;
        if total.fired & HARD_FIRED == 0 {
            let fired = total.fired | HARD_FIRED;
            self.totals.insert(key, Total { fired, changed: true, ..total });
            let detail = describe(budget, total.posted);
            self.event(EventKind::BudgetHard, &budget.scope, detail);
        }
        Ok(())
    }

    /// Spent and held in the present window of a budget.
    pub(super) fn spent_and_held(
        &mut self,
        budget: &Budget,
    ) -> Result<(NanoUsd, NanoUsd), DbError> {
        let (_, total) = self.total(budget, self.now_ns)?;
        Ok((NanoUsd(total.posted.into()), NanoUsd(total.held.into())))
    }

    /// Adds to the totals of the window that holds `at_ns`, in every budget of `scopes`.
    pub(super) fn count(
        &mut self,
        scopes: &[String],
        at_ns: i64,
        posted: i64,
        held: i64,
    ) -> Result<(), DbError> {
        for scope in scopes {
            for budget in self.budgets(scope)? {
                let (key, total) = self.total(&budget, at_ns)?;
                let mut next = Total {
                    posted: total.posted + posted,
                    held: total.held + held,
                    fired: total.fired,
                    changed: true,
                };
                if next.held < 0 {
                    let what = format!("{key:?}: held would be {}", next.held);
                    return Err(DbError::Corrupt(what));
                }
                if posted > 0 {
                    next.fired |= self.soft_thresholds(&budget, next);
                }
                self.totals.insert(key, next);
            }
        }
        Ok(())
    }

    /// Raises the events of thresholds that are passed for the first time in this window.
    fn soft_thresholds(&mut self, budget: &Budget, total: Total) -> i64 {
        let mut fired = 0;
        for (index, percent) in budget.soft_percent.iter().enumerate() {
            let reached = i128::from(total.posted) * 100 >= budget.limit.0 * i128::from(*percent);
            if reached && total.fired & (1 << index) == 0 {
                fired |= 1 << index;
                let detail = format!("{percent} %: {}", describe(budget, total.posted));
                self.event(EventKind::BudgetSoft, &budget.scope, detail);
            }
        }
        fired
    }

    pub(super) fn write_totals(&mut self) -> Result<(), DbError> {
        for ((scope, span, start_s), total) in std::mem::take(&mut self.totals) {
            if !total.changed {
                continue;
            }
            self.execute(
                "INSERT INTO window_total (scope, span, start_s, posted, held, fired)
                VALUES ($1, $2, $3, $4, $5, $6)
                ON CONFLICT (scope, span, start_s) DO UPDATE
                SET posted = excluded.posted, held = excluded.held, fired = excluded.fired",
                &[
                    scope.into(),
                    span.name().into(),
                    start_s.into(),
                    total.posted.into(),
                    total.held.into(),
                    total.fired.into(),
                ],
            )?;
        }
        Ok(())
    }

    /// Makes or changes a budget. Its windows count what was spent and is held before it was there.
    pub fn set_budget(&mut self, budget: &Budget) -> Result<(), DbError> {
        let old = self.budgets(&budget.scope)?.into_iter().find(|old| old.span == budget.span);
        let soft: Vec<String> = budget.soft_percent.iter().map(u8::to_string).collect();
        self.execute(
            "INSERT INTO budget (scope, span, zone, limit_nano, soft, created_ns)
            VALUES ($1, $2, $3, $4, $5, $6)
            ON CONFLICT (scope, span) DO UPDATE SET zone = excluded.zone,
            limit_nano = excluded.limit_nano, soft = excluded.soft",
            &[
                budget.scope.as_str().into(),
                budget.span.name().into(),
                budget.zone.name().into(),
                nano(budget.limit).into(),
                soft.join(",").into(),
                self.now_ns.into(),
            ],
        )?;
        self.budgets.remove(&budget.scope);
        if old.is_none_or(|old| old.zone != budget.zone) {
            self.rebuild_totals(budget)?;
        }
        Ok(())
    }

    /// Whether there was one. What is held and posted stays with the wider budgets.
    pub fn delete_budget(&mut self, scope: &str, span: Span) -> Result<bool, DbError> {
        let key = [scope.into(), span.name().into()];
        self.execute("DELETE FROM window_total WHERE scope = $1 AND span = $2", &key)?;
        self.totals.retain(|(of, other, _), _| of != scope || *other != span);
        self.budgets.remove(scope);
        Ok(self.execute("DELETE FROM budget WHERE scope = $1 AND span = $2", &key)? > 0)
    }

    /// Sums transfers and open leases into windows, for a budget that is new.
    fn rebuild_totals(&mut self, budget: &Budget) -> Result<(), DbError> {
        let key = [budget.scope.as_str().into(), budget.span.name().into()];
        self.execute("DELETE FROM window_total WHERE scope = $1 AND span = $2", &key)?;
        self.totals.retain(|(of, span, _), _| *of != budget.scope || *span != budget.span);
        // Windows that are over matter only to leases that still run, which are from now on.
        let first_ns =
            start_s(budget.span, &budget.zone, self.now_ns).saturating_mul(1_000_000_000);
        let posted = self.posted_since(&budget.scope, first_ns)?;
        let scopes = [budget.scope.clone()];
        // Thresholds that were passed before the budget was there are not news.
        if posted != 0 {
            let (key, total) = self.total(budget, self.now_ns)?;
            let mut next = Total { posted, changed: true, ..total };
            for (index, percent) in budget.soft_percent.iter().enumerate() {
                if i128::from(posted) * 100 >= budget.limit.0 * i128::from(*percent) {
                    next.fired |= 1 << index;
                }
            }
            self.totals.insert(key, next);
        }
        for (granted_ns, left) in self.open_leases(&budget.scope)? {
            self.count(&scopes, granted_ns, 0, left)?;
        }
        Ok(())
    }

    /// The grant that fits between `least` and `wanted`, or which kind of nothing.
    pub(super) fn share(&self, headroom: &Headroom, least: i64, wanted: i64) -> Option<i64> {
        match headroom.left {
            None => Some(wanted.max(least)),
            Some(left) if left < least => None,
            Some(left) => Some(wanted.min(left / SHARE).max(least)),
        }
    }

    /// Every budget of `scopes` that does not leave `amount` now.
    pub(super) fn exhausted(
        &mut self,
        scopes: &[String],
        amount: i64,
    ) -> Result<Vec<Budget>, DbError> {
        let mut found = Vec::new();
        for scope in scopes {
            for budget in self.budgets(scope)? {
                let (_, total) = self.total(&budget, self.now_ns)?;
                let used = i128::from(total.posted) + i128::from(total.held);
                if used + i128::from(amount) > budget.limit.0 {
                    found.push(budget);
                }
            }
        }
        Ok(found)
    }
}

fn describe(budget: &Budget, posted: i64) -> String {
    let (spent, limit) = (usd::format(NanoUsd(posted.into())), usd::format(budget.limit));
    format!("{spent} of {limit} USD spent in this {}", budget.span.name())
}

fn read(scope: &str, row: &Row) -> Result<Budget, DbError> {
    let corrupt = |what: &str| DbError::Corrupt(format!("budget of {scope}: {what}"));
    let soft = row.text(3)?.split(',').filter(|part| !part.is_empty());
    Ok(Budget {
        scope: scope.to_owned(),
        span: Span::parse(row.text(0)?).ok_or_else(|| corrupt("span"))?,
        zone: Zone::parse(row.text(1)?).ok_or_else(|| corrupt("zone"))?,
        limit: NanoUsd(row.int(2)?.into()),
        soft_percent: soft
            .map(|part| part.parse().map_err(|_| corrupt("soft")))
            .collect::<Result<_, _>>()?,
    })
}
