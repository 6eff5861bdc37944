//! What an operator sets up: organisations, tenants, keys, prices, credits. Every change leaves a
//! row in the audit log.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    Book,
    move_money::{CREDITS, Kind, Move, REFUNDS},
    nano,
    open::policy,
    requests::chain,
};
use crate::{
    ledger::{
        db::DbError,
        rows::{Chain, Payer, Policy},
    },
    price::{Billing, Rates},
    types::{KeyId, ModelId, NanoUsd, OrgId, RequestId, TenantId},
};

/// What a key may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Uses models and sees its own tenant.
    Tenant,
    /// Sees everything.
    Operator,
    /// Changes everything.
    Admin,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Self::Tenant => "tenant",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        [Self::Tenant, Self::Operator, Self::Admin].into_iter().find(|role| role.name() == name)
    }
}

/// A key to be made. Its secret is known to the caller alone; the ledger gets the hash.
#[derive(Clone, Debug)]
pub struct KeySpec {
    pub id: KeyId,
    pub tenant: TenantId,
    pub hash: [u8; 32],
    pub name: String,
    pub role: Role,
    pub policy: Policy,
    pub expires_ns: Option<i64>,
}

/// A price to be set.
#[derive(Clone, Debug)]
pub struct PriceSpec {
    pub model: ModelId,
    /// None is everyone without a price of their own.
    pub tenant: Option<TenantId>,
    pub rates: Rates,
    pub billing: Billing,
    /// None is from now on.
    pub from_ns: Option<i64>,
    pub until_ns: Option<i64>,
    /// Where it comes from: `manifest`, `file` or `api`.
    pub origin: &'static str,
}

/// A key as it is looked up by its hash.
#[derive(Clone, Debug, PartialEq)]
pub struct KnownKey {
    pub id: KeyId,
    pub tenant: TenantId,
    pub role: Role,
    pub policy: Policy,
    /// The earlier of expiry and revocation.
    pub ends_ns: Option<i64>,
}

/// The hash that keys are stored and found by.
pub fn key_hash(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

impl Book<'_> {
    /// Whether it is new.
    pub fn add_org(&mut self, id: &OrgId, name: &str) -> Result<bool, DbError> {
        let added = self.execute(
            "INSERT INTO org (id, name, created_ns) VALUES ($1, $2, $3) ON CONFLICT (id) DO NOTHING",
            &[id.as_str().into(), name.into(), self.now_ns.into()],
        )?;
        Ok(added > 0)
    }

    /// Whether it is new. The organisation has to be there.
    pub fn add_tenant(
        &mut self,
        id: &TenantId,
        org: &OrgId,
        name: &str,
        policy: &Policy,
    ) -> Result<bool, DbError> {
        let added = self.execute(
            "INSERT INTO tenant (id, org_id, name, settings, created_ns)
            VALUES ($1, $2, $3, $4, $5) ON CONFLICT (id) DO NOTHING",
            &[
                id.as_str().into(),
                org.as_str().into(),
                name.into(),
                settings(policy).into(),
                self.now_ns.into(),
            ],
        )?;
        Ok(added > 0)
    }

    pub fn add_key(&mut self, key: &KeySpec) -> Result<(), DbError> {
        self.write(
            "INSERT INTO api_key (id, tenant_id, hash, name, role, settings, created_ns,
            expires_ns, revoked_ns) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, NULL)",
            &[
                key.id.as_str().into(),
                key.tenant.as_str().into(),
                key.hash.as_slice().into(),
                key.name.as_str().into(),
                key.role.name().into(),
                settings(&key.policy).into(),
                self.now_ns.into(),
                key.expires_ns.into(),
            ],
        )?;
        self.changed();
        Ok(())
    }

    /// Gives a tenant a name and a policy. Whether there is one.
    pub fn change_tenant(
        &mut self,
        id: &TenantId,
        name: &str,
        policy: &Policy,
    ) -> Result<bool, DbError> {
        let sql = "UPDATE tenant SET name = $1, settings = $2 WHERE id = $3";
        let values = [name.into(), settings(policy).into(), id.as_str().into()];
        Ok(self.execute(sql, &values)? > 0)
    }

    /// Gives a key a name, a policy and an end. Whether there is one.
    pub fn change_key(
        &mut self,
        id: &KeyId,
        name: &str,
        policy: &Policy,
        expires_ns: Option<i64>,
    ) -> Result<bool, DbError> {
        let sql = "UPDATE api_key SET name = $1, settings = $2, expires_ns = $3 WHERE id = $4";
        let values = [name.into(), settings(policy).into(), expires_ns.into(), id.as_str().into()];
        let changed = self.execute(sql, &values)? > 0;
        self.changed();
        Ok(changed)
    }

    /// As `add_key`, in the place of an older key with this id.
    pub fn replace_key(&mut self, key: &KeySpec) -> Result<(), DbError> {
        self.write("DELETE FROM api_key WHERE id = $1", &[key.id.as_str().into()])?;
        self.add_key(key)
    }

    /// By the whole hash. Revoked and expired keys are found too; `ends_ns` says so.
    pub fn find_key(&mut self, hash: &[u8; 32]) -> Result<Option<KnownKey>, DbError> {
        let row = self.one(
            "SELECT id, tenant_id, role, settings, expires_ns, revoked_ns FROM api_key
            WHERE hash = $1",
            &[hash.as_slice().into()],
        )?;
        let Some(row) = row else { return Ok(None) };
        let role = Role::parse(row.text(2)?)
            .ok_or_else(|| DbError::Corrupt(format!("role {:?}", row.text(2))))?;
        Ok(Some(KnownKey {
            id: KeyId::new(row.text(0)?),
            tenant: TenantId::new(row.text(1)?),
            role,
            policy: policy(row.text(3)?)?,
            ends_ns: row.int_or_null(4)?.into_iter().chain(row.int_or_null(5)?).min(),
        }))
    }

    /// Whether any key was ever made.
    pub fn has_keys(&mut self) -> Result<bool, DbError> {
        Ok(self.one("SELECT id FROM api_key LIMIT 1", &[])?.is_some())
    }

    /// Whether a key is known and neither revoked nor expired.
    pub fn key_is_valid(&mut self, id: &KeyId) -> Result<bool, DbError> {
        Ok(self.account(&Payer::Key(id.clone()))?.is_some())
    }

    /// Ends a key at `at_ns`, or earlier if it ends earlier. Whether there is one.
    pub fn revoke_key(&mut self, id: &KeyId, at_ns: i64) -> Result<bool, DbError> {
        let changed = self.execute(
            "UPDATE api_key SET revoked_ns = $1 WHERE id = $2
            AND (revoked_ns IS NULL OR revoked_ns > $1)",
            &[at_ns.into(), id.as_str().into()],
        )?;
        let found = self.one("SELECT id FROM api_key WHERE id = $1", &[id.as_str().into()])?;
        if changed > 0 {
            self.changed();
        }
        Ok(found.is_some())
    }

    /// The version of the new price.
    pub fn set_price(&mut self, price: &PriceSpec) -> Result<i64, DbError> {
        let version = self.next("price");
        let rates = &price.rates;
        let billing = match price.billing {
            Billing::Tokens => "tokens",
            Billing::Device => "device",
        };
        self.write(
            "INSERT INTO price (version, tenant_id, model, from_ns, until_ns, input, cached_input,
            output, request, device_second, billing, origin, created_ns)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
            &[
                version.into(),
                price.tenant.as_ref().map_or("", |tenant| tenant.as_str()).into(),
                price.model.as_str().into(),
                price.from_ns.unwrap_or(self.now_ns).into(),
                price.until_ns.into(),
                nano(rates.input).into(),
                nano(rates.cached_input).into(),
                nano(rates.output).into(),
                nano(rates.request).into(),
                nano(rates.device_second).into(),
                billing.into(),
                price.origin.into(),
                self.now_ns.into(),
            ],
        )?;
        self.changed();
        Ok(version)
    }

    /// Money given to a tenant or paid by it in advance.
    pub fn credit(
        &mut self,
        tenant: &TenantId,
        amount: NanoUsd,
        memo: &str,
    ) -> Result<bool, DbError> {
        let sql = "SELECT org_id FROM tenant WHERE id = $1";
        let Some(row) = self.one(sql, &[tenant.as_str().into()])? else { return Ok(false) };
        let chain = Chain { org: OrgId::new(row.text(0)?), tenant: tenant.clone(), key: None };
        self.transfer(&Move {
            kind: Kind::Credit,
            debit: CREDITS,
            credit: &format!("tenant:{tenant}"),
            amount: nano(amount),
            window_ns: self.now_ns,
            request: "",
            chain: &chain,
            memo,
        })?;
        Ok(true)
    }

    /// Gives back part of what an ended request was charged; at most what is left of it. `None`
    /// where there is no such request.
    pub fn refund(
        &mut self,
        request: &RequestId,
        amount: NanoUsd,
        memo: &str,
    ) -> Result<Option<NanoUsd>, DbError> {
        let row = self.one(
            "SELECT org_id, tenant_id, key_id, posted FROM request WHERE id = $1 AND state <> 'open'",
            &[request.as_str().into()],
        )?;
        let Some(row) = row else { return Ok(None) };
        let chain = chain(row.text(0)?, row.text(1)?, row.text(2)?);
        let refunded = self.one(
            "SELECT CAST(COALESCE(SUM(amount), 0) AS BIGINT) FROM transfer
            WHERE request_id = $1 AND kind = 'refund'",
            &[request.as_str().into()],
        )?;
        let refunded = refunded.map_or(Ok(0), |row| row.int(0))?;
        let amount = nano(amount).min(row.int(3)? - refunded).max(0);
        if amount > 0 {
            self.transfer(&Move {
                kind: Kind::Refund,
                debit: REFUNDS,
                credit: &format!("tenant:{}", chain.tenant),
                amount,
                window_ns: self.now_ns,
                request: request.as_str(),
                chain: &chain,
                memo,
            })?;
        }
        Ok(Some(NanoUsd(amount.into())))
    }

    /// Who changed what; `old` and `new` are JSON or empty.
    pub fn audit(
        &mut self,
        actor: &str,
        action: &str,
        target: &str,
        old: &str,
        new: &str,
    ) -> Result<(), DbError> {
        let id = self.next("audit");
        self.changed();
        self.write(
            "INSERT INTO audit (id, at_ns, actor, action, target, old_value, new_value)
            VALUES ($1, $2, $3, $4, $5, $6, $7)",
            &[
                id.into(),
                self.now_ns.into(),
                actor.into(),
                action.into(),
                target.into(),
                old.into(),
                new.into(),
            ],
        )?;
        Ok(())
    }

    /// Tells every server that what it remembers of keys and prices may be old.
    pub(super) fn changed(&mut self) {
        self.next("revision");
    }
}

/// A policy as it is stored.
fn settings(policy: &Policy) -> String {
    serde_json::to_string(policy).unwrap_or_else(|_| "{}".to_owned())
}
