//! What was set up, as an operator reads it. Lists come in pages: at most `limit` rows after a
//! given one.

use super::{Book, Budget, RateLimit, Role, open::policy, requests::billing};
use crate::{
    ledger::{
        db::{DbError, Row},
        rows::Policy,
        window::bounds_s,
    },
    price::{Billing, Rates},
    types::{KeyId, ModelId, NanoUsd, OrgId, TenantId},
};

/// An organisation.
#[derive(Clone, Debug, PartialEq)]
pub struct OrgRow {
    pub id: OrgId,
    pub name: String,
    pub created_ns: i64,
}

/// A tenant and what it is allowed.
#[derive(Clone, Debug, PartialEq)]
pub struct TenantRow {
    pub id: TenantId,
    pub org: OrgId,
    pub name: String,
    pub policy: Policy,
    pub created_ns: i64,
}

/// A key without its secret or hash, which no list ever shows.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyRow {
    pub id: KeyId,
    pub tenant: TenantId,
    pub name: String,
    pub role: Role,
    pub policy: Policy,
    pub created_ns: i64,
    pub expires_ns: Option<i64>,
    /// May lie ahead, while a rotated key overlaps with its successor.
    pub revoked_ns: Option<i64>,
}

/// One version of a price.
#[derive(Clone, Debug, PartialEq)]
pub struct PriceRow {
    pub version: i64,
    pub model: ModelId,
    /// None is everyone without a price of their own.
    pub tenant: Option<TenantId>,
    pub rates: Rates,
    pub billing: Billing,
    pub from_ns: i64,
    pub until_ns: Option<i64>,
    pub origin: String,
    pub created_ns: i64,
}

/// A budget and its present window.
#[derive(Clone, Debug, PartialEq)]
pub struct BudgetState {
    pub budget: Budget,
    pub spent: NanoUsd,
    pub held: NanoUsd,
    pub start_s: i64,
    /// None where the window has no end.
    pub resets_s: Option<i64>,
}

/// An entry of the feed of events.
#[derive(Clone, Debug, PartialEq)]
pub struct EventRow {
    pub id: i64,
    pub at_ns: i64,
    pub kind: String,
    pub scope: String,
    pub detail: String,
}

/// An entry of the audit log; the values are JSON or empty.
#[derive(Clone, Debug, PartialEq)]
pub struct AuditRow {
    pub id: i64,
    pub at_ns: i64,
    pub actor: String,
    pub action: String,
    pub target: String,
    pub old: String,
    pub new: String,
}

impl Book<'_> {
    pub fn org(&mut self, id: &OrgId) -> Result<Option<OrgRow>, DbError> {
        let sql = "SELECT id, name, created_ns FROM org WHERE id = $1";
        self.one(sql, &[id.as_str().into()])?.as_ref().map(org).transpose()
    }

    pub fn orgs(&mut self, after: &str, limit: i64) -> Result<Vec<OrgRow>, DbError> {
        let sql = "SELECT id, name, created_ns FROM org WHERE id > $1 ORDER BY id LIMIT $2";
        self.query(sql, &[after.into(), limit.into()])?.iter().map(org).collect()
    }

    pub fn tenant(&mut self, id: &TenantId) -> Result<Option<TenantRow>, DbError> {
        let sql = "SELECT id, org_id, name, settings, created_ns FROM tenant WHERE id = $1";
        self.one(sql, &[id.as_str().into()])?.as_ref().map(tenant).transpose()
    }

    /// Of one organisation, or of all where `org` is empty.
    pub fn tenants(
        &mut self,
        org: &str,
        after: &str,
        limit: i64,
    ) -> Result<Vec<TenantRow>, DbError> {
        let rows = self.query(
            "SELECT id, org_id, name, settings, created_ns FROM tenant
            WHERE ($1 = '' OR org_id = $1) AND id > $2 ORDER BY id LIMIT $3",
            &[org.into(), after.into(), limit.into()],
        )?;
        rows.iter().map(tenant).collect()
    }

    pub fn key(&mut self, id: &KeyId) -> Result<Option<KeyRow>, DbError> {
        let row = self.one(
            "SELECT id, tenant_id, name, role, settings, created_ns, expires_ns, revoked_ns
            FROM api_key WHERE id = $1",
            &[id.as_str().into()],
        )?;
        row.as_ref().map(key).transpose()
    }

    /// Of one tenant, or of all where `tenant` is empty.
    pub fn keys(&mut self, tenant: &str, after: &str, limit: i64) -> Result<Vec<KeyRow>, DbError> {
        let rows = self.query(
            "SELECT id, tenant_id, name, role, settings, created_ns, expires_ns, revoked_ns
            FROM api_key WHERE ($1 = '' OR tenant_id = $1) AND id > $2 ORDER BY id LIMIT $3",
            &[tenant.into(), after.into(), limit.into()],
        )?;
        rows.iter().map(key).collect()
    }

    /// Every version of a model's prices, or of all models' where `model` is empty; newest first,
    /// below `before`.
    pub fn price_history(
        &mut self,
        model: &str,
        before: i64,
        limit: i64,
    ) -> Result<Vec<PriceRow>, DbError> {
        let rows = self.query(
            "SELECT version, model, tenant_id, input, cached_input, output, request, device_second,
            billing, from_ns, until_ns, origin, created_ns FROM price
            WHERE ($1 = '' OR model = $1) AND version < $2 ORDER BY version DESC LIMIT $3",
            &[model.into(), before.into(), limit.into()],
        )?;
        rows.iter().map(price).collect()
    }

    /// The price in force of each model and tenant, and those that are still to come, in the order
    /// of models after `after`.
    pub fn prices_in_force(
        &mut self,
        model: &str,
        after: &str,
        limit: i64,
    ) -> Result<Vec<PriceRow>, DbError> {
        let models = self.query(
            "SELECT DISTINCT model FROM price WHERE ($1 = '' OR model = $1) AND model > $2
            ORDER BY model LIMIT $3",
            &[model.into(), after.into(), limit.into()],
        )?;
        let mut found = Vec::new();
        for model in &models {
            let rows = self.query(
                "SELECT version, model, tenant_id, input, cached_input, output, request,
                device_second, billing, from_ns, until_ns, origin, created_ns FROM price
                WHERE model = $1 AND (until_ns IS NULL OR until_ns > $2)
                ORDER BY tenant_id, from_ns DESC, version DESC",
                &[model.text(0)?.into(), self.now_ns.into()],
            )?;
            let mut settled: Option<Option<TenantId>> = None;
            for row in &rows {
                let row = price(row)?;
                let now = row.from_ns <= self.now_ns;
                if now && settled.as_ref() == Some(&row.tenant) {
                    continue;
                }
                if now {
                    settled = Some(row.tenant.clone());
                }
                found.push(row);
            }
        }
        Ok(found)
    }

    /// The last price that was set for a model and tenant, whenever it is in force.
    pub fn price_last_set(
        &mut self,
        model: &ModelId,
        tenant: Option<&TenantId>,
    ) -> Result<Option<PriceRow>, DbError> {
        let row = self.one(
            "SELECT version, model, tenant_id, input, cached_input, output, request, device_second,
            billing, from_ns, until_ns, origin, created_ns FROM price
            WHERE model = $1 AND tenant_id = $2 ORDER BY version DESC LIMIT 1",
            &[model.as_str().into(), tenant.map_or("", |tenant| tenant.as_str()).into()],
        )?;
        row.as_ref().map(price).transpose()
    }

    /// Scopes that have budgets.
    pub fn budget_scopes(&mut self, after: &str, limit: i64) -> Result<Vec<String>, DbError> {
        let sql = "SELECT DISTINCT scope FROM budget WHERE scope > $1 ORDER BY scope LIMIT $2";
        let rows = self.query(sql, &[after.into(), limit.into()])?;
        rows.iter().map(|row| Ok(row.text(0)?.to_owned())).collect()
    }

    /// The budgets of a scope with what is spent and held of them now.
    pub fn budget_states(&mut self, scope: &str) -> Result<Vec<BudgetState>, DbError> {
        let budgets = self.budgets(scope)?;
        let state = |budget: Budget| {
            let (spent, held) = self.spent_and_held(&budget)?;
            let (start_s, resets_s) = bounds_s(budget.span, &budget.zone, self.now_ns);
            Ok(BudgetState { budget, spent, held, start_s, resets_s })
        };
        budgets.into_iter().map(state).collect()
    }

    /// Scopes that have rate limits, and those.
    pub fn rate_limits(
        &mut self,
        after: &str,
        limit: i64,
    ) -> Result<Vec<(String, RateLimit)>, DbError> {
        let rows = self.query(
            "SELECT scope, requests_per_minute, tokens_per_minute, sequences_max FROM rate_limit
            WHERE scope > $1 ORDER BY scope LIMIT $2",
            &[after.into(), limit.into()],
        )?;
        let read = |row: &Row| {
            let limit = RateLimit {
                requests_per_minute: row.int_or_null(1)?,
                tokens_per_minute: row.int_or_null(2)?,
                sequences_max: row.int_or_null(3)?,
            };
            Ok((row.text(0)?.to_owned(), limit))
        };
        rows.iter().map(read).collect()
    }

    /// Oldest first after `after`.
    pub fn events(&mut self, after: i64, limit: i64) -> Result<Vec<EventRow>, DbError> {
        let rows = self.query(
            "SELECT id, at_ns, kind, scope, detail FROM event WHERE id > $1 ORDER BY id LIMIT $2",
            &[after.into(), limit.into()],
        )?;
        let read = |row: &Row| {
            Ok(EventRow {
                id: row.int(0)?,
                at_ns: row.int(1)?,
                kind: row.text(2)?.to_owned(),
                scope: row.text(3)?.to_owned(),
                detail: row.text(4)?.to_owned(),
            })
        };
        rows.iter().map(read).collect()
    }

    /// Oldest first after `after`.
    pub fn audits(&mut self, after: i64, limit: i64) -> Result<Vec<AuditRow>, DbError> {
        let rows = self.query(
            "SELECT id, at_ns, actor, action, target, old_value, new_value FROM audit
            WHERE id > $1 ORDER BY id LIMIT $2",
            &[after.into(), limit.into()],
        )?;
        let read = |row: &Row| {
            let text = |index| row.text(index).map(str::to_owned);
            Ok(AuditRow {
                id: row.int(0)?,
                at_ns: row.int(1)?,
                actor: text(2)?,
                action: text(3)?,
                target: text(4)?,
                old: text(5)?,
                new: text(6)?,
            })
        };
        rows.iter().map(read).collect()
    }

    /// The last id that was given to an event and to an entry of the audit log.
    pub fn feed_ends(&self) -> (i64, i64) {
        let last = |counter| self.counters.get(counter).copied().unwrap_or(0);
        (last("event"), last("audit"))
    }
}

fn org(row: &Row) -> Result<OrgRow, DbError> {
    let (id, name) = (OrgId::new(row.text(0)?), row.text(1)?.to_owned());
    Ok(OrgRow { id, name, created_ns: row.int(2)? })
}

fn tenant(row: &Row) -> Result<TenantRow, DbError> {
    Ok(TenantRow {
        id: TenantId::new(row.text(0)?),
        org: OrgId::new(row.text(1)?),
        name: row.text(2)?.to_owned(),
        policy: policy(row.text(3)?)?,
        created_ns: row.int(4)?,
    })
}

fn key(row: &Row) -> Result<KeyRow, DbError> {
    let role = Role::parse(row.text(3)?);
    Ok(KeyRow {
        id: KeyId::new(row.text(0)?),
        tenant: TenantId::new(row.text(1)?),
        name: row.text(2)?.to_owned(),
        role: role.ok_or_else(|| DbError::Corrupt(format!("role {:?}", row.text(3))))?,
        policy: policy(row.text(4)?)?,
        created_ns: row.int(5)?,
        expires_ns: row.int_or_null(6)?,
        revoked_ns: row.int_or_null(7)?,
    })
}

fn price(row: &Row) -> Result<PriceRow, DbError> {
    let amount = |index| row.int(index).map(|value| NanoUsd(value.into()));
    let tenant = row.text(2)?;
    Ok(PriceRow {
        version: row.int(0)?,
        model: ModelId::new(row.text(1)?),
        tenant: (!tenant.is_empty()).then(|| TenantId::new(tenant)),
        rates: Rates {
            input: amount(3)?,
            cached_input: amount(4)?,
            output: amount(5)?,
            request: amount(6)?,
            device_second: amount(7)?,
        },
        billing: billing(row.text(8)?)?,
        from_ns: row.int(9)?,
        until_ns: row.int_or_null(10)?,
        origin: row.text(11)?.to_owned(),
        created_ns: row.int(12)?,
    })
}
