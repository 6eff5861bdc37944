//! Budgets and the totals of their windows.

use std::collections::{BTreeSet, HashMap};

use super::{Book, TOGETHER, nano, of_scopes, together};
use crate::{
    ledger::{
        db::{DbError, Question, Row, Val},
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
    /// Held of the tightest budget, by anyone, in its window.
    pub held: i64,
    window: Option<(Budget, i64)>,
}

impl Headroom {
    /// Whether a lease of that time is in the window of the tightest budget.
    pub fn counts(&self, granted_ns: i64) -> bool {
        let window = self.window.as_ref();
        window.is_some_and(|(of, start)| start_s(of.span, &of.zone, granted_ns) == *start)
    }
}

const BUDGETS: &str = "SELECT scope, span, zone, limit_nano, soft FROM budget
    WHERE scope IN ($1, $2, $3, $4) ORDER BY scope, span";
const TOTALS: &str = "SELECT scope, span, start_s, posted, held, fired FROM window_total
    WHERE (scope = $1 AND span = $2 AND start_s = $3)
    OR (scope = $4 AND span = $5 AND start_s = $6)
    OR (scope = $7 AND span = $8 AND start_s = $9)
    OR (scope = $10 AND span = $11 AND start_s = $12)";

/// Writes totals, one for each row of parameters.
macro_rules! put_totals {
    ($rows:literal) => {
        concat!(
            "INSERT INTO window_total (scope, span, start_s, posted, held, fired) VALUES ",
            $rows,
            " ON CONFLICT (scope, span, start_s) DO UPDATE
            SET posted = excluded.posted, held = excluded.held, fired = excluded.fired"
        )
    };
}
const PUT_ONE: &str = put_totals!("($1, $2, $3, $4, $5, $6)");
const PUT_FOUR: &str = put_totals!(
    "($1, $2, $3, $4, $5, $6), ($7, $8, $9, $10, $11, $12),
    ($13, $14, $15, $16, $17, $18), ($19, $20, $21, $22, $23, $24)"
);

/// What is asked to know the budgets of `scopes`.
pub(super) fn budgets_of(scopes: &[String]) -> Vec<Question> {
    of_scopes(BUDGETS, scopes)
}

fn key_values((scope, span, start_s): &TotalKey) -> [Val; 3] {
    [scope.as_str().into(), span.name().into(), (*start_s).into()]
}

fn total_key(budget: &Budget, at_ns: i64) -> TotalKey {
    (budget.scope.clone(), budget.span, start_s(budget.span, &budget.zone, at_ns))
}

impl Book<'_> {
    /// Budgets of one scope.
    pub fn budgets(&mut self, scope: &str) -> Result<Vec<Budget>, DbError> {
        if !self.budgets.contains_key(scope) {
            self.read_budgets(&[scope.to_owned()])?;
        }
        Ok(self.budgets.get(scope).cloned().unwrap_or_default())
    }

    fn read_budgets(&mut self, scopes: &[String]) -> Result<(), DbError> {
        let unknown = self.unknown_budgets(scopes);
        let found = self.query_each(&budgets_of(&unknown))?;
        self.keep_budgets(unknown, found)
    }

    /// Those of `scopes` whose budgets are not known yet, each once.
    pub(super) fn unknown_budgets(&self, scopes: &[String]) -> Vec<String> {
        let unknown = scopes.iter().filter(|scope| !self.budgets.contains_key(*scope));
        unknown.collect::<BTreeSet<_>>().into_iter().cloned().collect()
    }

    /// The answers to [`budgets_of`].
    pub(super) fn keep_budgets(
        &mut self,
        scopes: Vec<String>,
        found: Vec<Vec<Row>>,
    ) -> Result<(), DbError> {
        let mut budgets: HashMap<String, Vec<Budget>> =
            scopes.into_iter().map(|scope| (scope, Vec::new())).collect();
        for row in found.iter().flatten() {
            let budget = read(row)?;
            budgets.entry(budget.scope.clone()).or_default().push(budget);
        }
        self.budgets.extend(budgets);
        Ok(())
    }

    /// Reads what the budgets of `scopes` have in their windows, each at the times beside it.
    pub(super) fn read_windows<'s>(
        &mut self,
        scopes: impl IntoIterator<Item = (&'s String, i64)>,
    ) -> Result<(), DbError> {
        let of = |(scope, at_ns): (&'s String, i64)| {
            let budgets = self.budgets.get(scope).into_iter().flatten();
            budgets.map(move |budget| total_key(budget, at_ns))
        };
        let keys = scopes.into_iter().flat_map(of).collect();
        self.read_totals(keys)
    }

    /// Reads the budgets of `scopes` and their windows of `at_ns`, each kind at once, where they are
    /// not known yet.
    fn read_totals_at(&mut self, scopes: &[String], at_ns: i64) -> Result<(), DbError> {
        self.read_budgets(scopes)?;
        self.read_windows(scopes.iter().map(|scope| (scope, at_ns)))
    }

    fn read_totals(&mut self, mut keys: BTreeSet<TotalKey>) -> Result<(), DbError> {
        keys.retain(|key| !self.totals.contains_key(key));
        let keys: Vec<TotalKey> = keys.into_iter().collect();
        let questions: Vec<_> = together(&keys)
            .map(|some| (TOTALS, some.into_iter().flat_map(key_values).collect()))
            .collect();
        let found = self.query_each(&questions)?;
        self.totals.extend(keys.into_iter().map(|key| (key, Total::default())));
        for row in found.iter().flatten() {
            let key = (row.text(0)?.to_owned(), read_span(row)?, row.int(2)?);
            let (posted, held) = (row.int(3)?, row.int(4)?);
            self.totals.insert(key, Total { posted, held, fired: row.int(5)?, changed: false });
        }
        Ok(())
    }

    fn total(&mut self, budget: &Budget, at_ns: i64) -> Result<(TotalKey, Total), DbError> {
        let key = total_key(budget, at_ns);
        self.read_totals(BTreeSet::from([key.clone()]))?;
        let total = self.totals.get(&key).copied().unwrap_or_default();
        Ok((key, total))
    }

    /// What the budgets of `scopes` leave now.
    pub(super) fn headroom(&mut self, scopes: &[String]) -> Result<Headroom, DbError> {
        self.read_totals_at(scopes, self.now_ns)?;
        let mut tightest = Headroom { left: None, held: 0, window: None };
        for scope in scopes {
            for budget in self.budgets(scope)? {
                let (key, total) = self.total(&budget, self.now_ns)?;
                let left = nano(NanoUsd(
                    budget.limit.0 - i128::from(total.posted) - i128::from(total.held),
                ))
                .max(0);
                if tightest.left.is_none_or(|least| left < least) {
                    let window = Some((budget, key.2));
                    tightest = Headroom { left: Some(left), held: total.held, window };
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
        self.read_totals_at(scopes, self.now_ns)?;
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
        self.read_totals_at(scopes, at_ns)?;
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
        let fired = passed(budget, total.posted) & !total.fired;
        for (index, percent) in budget.soft_percent.iter().enumerate() {
            if fired & (1 << index) != 0 {
                let detail = format!("{percent} %: {}", describe(budget, total.posted));
                self.event(EventKind::BudgetSoft, &budget.scope, detail);
            }
        }
        fired
    }

    pub(super) fn write_totals(&mut self) -> Result<(), DbError> {
        let totals = std::mem::take(&mut self.totals).into_iter();
        let changed: Vec<(TotalKey, Total)> = totals.filter(|(_, total)| total.changed).collect();
        let (four, rest) = changed.as_chunks::<TOGETHER>();
        let values = |(key, total): &(TotalKey, Total)| {
            let Total { posted, held, fired, .. } = *total;
            key_values(key).into_iter().chain([posted.into(), held.into(), fired.into()])
        };
        for some in four {
            self.write(PUT_FOUR, &some.iter().flat_map(values).collect::<Vec<Val>>())?;
        }
        for one in rest {
            self.write(PUT_ONE, &values(one).collect::<Vec<Val>>())?;
        }
        Ok(())
    }

    /// Makes or changes a budget. Its windows count what was spent and is held before it was there.
    pub fn set_budget(&mut self, budget: &Budget) -> Result<(), DbError> {
        let old = self.budgets(&budget.scope)?.into_iter().find(|old| old.span == budget.span);
        let soft: Vec<String> = budget.soft_percent.iter().map(u8::to_string).collect();
        self.write(
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
        self.write("DELETE FROM window_total WHERE scope = $1 AND span = $2", &key)?;
        self.totals.retain(|(of, other, _), _| of != scope || *other != span);
        self.budgets.remove(scope);
        Ok(self.execute("DELETE FROM budget WHERE scope = $1 AND span = $2", &key)? > 0)
    }

    /// Sums transfers and open leases into windows, for a budget that is new.
    fn rebuild_totals(&mut self, budget: &Budget) -> Result<(), DbError> {
        let key = [budget.scope.as_str().into(), budget.span.name().into()];
        self.write("DELETE FROM window_total WHERE scope = $1 AND span = $2", &key)?;
        self.totals.retain(|(of, span, _), _| *of != budget.scope || *span != budget.span);
        let leases = self.open_leases(&budget.scope)?;
        // Windows that are over matter only to leases that still run.
        let oldest_ns = leases.iter().map(|lease| lease.0).min().unwrap_or(self.now_ns);
        let first_ns = start_s(budget.span, &budget.zone, oldest_ns.min(self.now_ns))
            .saturating_mul(1_000_000_000);
        for (slot_ns, spend) in self.spend_by_slot(&budget.scope, first_ns)? {
            let (key, total) = self.total(budget, slot_ns)?;
            let posted = total.posted.saturating_add(spend);
            // Thresholds that were passed before the budget was there are not news.
            let fired = passed(budget, posted);
            self.totals.insert(key, Total { posted, fired, changed: true, ..total });
        }
        for (granted_ns, left) in leases {
            // Of this budget alone: the others of its scope know these leases.
            let (key, total) = self.total(budget, granted_ns)?;
            let held = total.held.saturating_add(left);
            self.totals.insert(key, Total { held, changed: true, ..total });
        }
        Ok(())
    }

    /// The grant that fits between `least` and `wanted`, which is more than nothing, or `None`. Where
    /// it is not all, it grows from the least by whole tokens of `unit`: what does not pay for a token
    /// would be out of everyone's reach until the request ends.
    pub(super) fn share(
        &self,
        headroom: &Headroom,
        least: i64,
        wanted: i64,
        unit: i64,
    ) -> Option<i64> {
        let least = least.max(1);
        match headroom.left {
            None => Some(wanted.max(least)),
            Some(left) if left < least => None,
            Some(left) if wanted <= left / SHARE => Some(wanted.max(least)),
            Some(left) => Some(least + (left / SHARE - least).max(0) / unit.max(1) * unit.max(1)),
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

/// Bits of the soft thresholds that `posted` reaches.
fn passed(budget: &Budget, posted: i64) -> i64 {
    let reached = |percent: u8| i128::from(posted) * 100 >= budget.limit.0 * i128::from(percent);
    let bits = budget.soft_percent.iter().enumerate();
    bits.filter(|(_, percent)| reached(**percent)).map(|(index, _)| 1 << index).sum()
}

/// The second column.
fn read_span(row: &Row) -> Result<Span, DbError> {
    let name = row.text(1)?;
    Span::parse(name).ok_or_else(|| DbError::Corrupt(format!("a window of the span {name}")))
}

fn describe(budget: &Budget, posted: i64) -> String {
    let (spent, limit) = (usd::format(NanoUsd(posted.into())), usd::format(budget.limit));
    format!("{spent} of {limit} USD spent in this {}", budget.span.name())
}

/// The columns `scope, span, zone, limit_nano, soft`.
pub(super) fn read(row: &Row) -> Result<Budget, DbError> {
    let scope = row.text(0)?;
    let corrupt = |what: &str| DbError::Corrupt(format!("budget of {scope}: {what}"));
    let soft = row.text(4)?.split(',').filter(|part| !part.is_empty());
    Ok(Budget {
        scope: scope.to_owned(),
        span: Span::parse(row.text(1)?).ok_or_else(|| corrupt("span"))?,
        zone: Zone::parse(row.text(2)?).ok_or_else(|| corrupt("zone"))?,
        limit: NanoUsd(row.int(3)?.into()),
        soft_percent: soft
            .map(|part| part.parse().map_err(|_| corrupt("soft")))
            .collect::<Result<_, _>>()?,
    })
}
