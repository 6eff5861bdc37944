//! Admission: everything that may refuse a request, then its first hold.

use super::{
    Book, nano,
    requests::{LeaseRow, billing},
};
use crate::{
    ledger::{
        db::{DbError, Question, Row},
        rows::{Chain, Opened, Opening, Payer, Policy, Refusal},
    },
    price::{Rates, Tally, Terms},
    types::{ModelId, NanoUsd, OrgId, RequestId, TenantId},
};

/// A hold above this is a mistake in a price, and would endanger the sums.
const HOLD_NANO_MAX: i64 = 1_000_000_000_000_000;

/// What a key or tenant row says.
#[derive(Clone)]
pub(super) struct Account {
    pub chain: Chain,
    pub policy: Policy,
}

impl Book<'_> {
    /// Admits a request with a hold for its whole input and one token of each sequence.
    pub fn open(
        &mut self,
        opening: &Opening,
        replica: &str,
    ) -> Result<Result<Opened, Refusal>, DbError> {
        let account = self.account(&opening.payer)?;
        let Some(Account { chain, policy }) = account else { return Ok(Err(Refusal::Key)) };
        if let Some(models) = &policy.models
            && !models.iter().any(|model| model == opening.model.as_str())
        {
            return Ok(Err(Refusal::ModelForbidden(opening.model.clone())));
        }
        if let Err(refusal) = self.check_idempotency(opening, &chain.tenant)? {
            return Ok(Err(refusal));
        }
        let Some(terms) = self.terms(&chain.tenant, &opening.model)? else {
            return Ok(Err(Refusal::UnknownPrice(opening.model.clone())));
        };
        let needed = first_hold(&terms, opening);
        let cap = policy.max_cost_usd.into_iter().chain(opening.cap).min();
        let cap = cap.map(|cap| NanoUsd(cap.0 / i128::from(opening.parts.max(1))));
        if let Some(cap) = cap
            && needed.0 > cap.0
        {
            return Ok(Err(Refusal::CapTooLow { cap, needed }));
        }
        let scopes = chain.scopes();
        let hold = nano(needed);
        if hold > HOLD_NANO_MAX {
            let cap = NanoUsd(HOLD_NANO_MAX.into());
            return Ok(Err(Refusal::CapTooLow { cap, needed }));
        }
        // Rates come last: a refused request must not use any of them up.
        if let Err(refusal) = self.check_budgets(&scopes, hold)? {
            return Ok(Err(refusal));
        }
        if let Err(refusal) = self.begin_rates(&scopes, opening.input_tokens, opening.choices)? {
            return Ok(Err(refusal));
        }
        self.count(&scopes, self.now_ns, 0, hold)?;
        self.insert_request(opening, &chain, &terms, hold, replica)?;
        let input_tokens = opening.input_tokens;
        Ok(Ok(Opened { chain, terms, input_tokens, granted: needed, cap, policy }))
    }

    pub(super) fn account(&mut self, payer: &Payer) -> Result<Option<Account>, DbError> {
        if let Some(known) = self.ahead.accounts.get(payer) {
            return Ok(known.clone());
        }
        let (sql, values) = account_of(payer);
        let rows = self.query(sql, &values)?;
        self.read_account(payer, &rows)
    }

    /// The answer to [`account_of`].
    pub(super) fn read_account(
        &self,
        payer: &Payer,
        rows: &[Row],
    ) -> Result<Option<Account>, DbError> {
        let Some(row) = rows.first() else { return Ok(None) };
        let (org, tenant) = (OrgId::new(row.text(0)?), TenantId::new(row.text(1)?));
        let of_tenant = policy(row.text(2)?)?;
        let Payer::Key(key) = payer else {
            let chain = Chain { org, tenant, key: None };
            return Ok(Some(Account { chain, policy: of_tenant }));
        };
        // A revocation may lie ahead, while a rotated key overlaps with its successor.
        let ends_ns = row.int_or_null(4)?.into_iter().chain(row.int_or_null(5)?).min();
        if ends_ns.is_some_and(|ends_ns| ends_ns <= self.now_ns) {
            return Ok(None);
        }
        let chain = Chain { org, tenant, key: Some(key.clone()) };
        Ok(Some(Account { chain, policy: policy(row.text(3)?)?.over(of_tenant) }))
    }

    fn check_idempotency(
        &mut self,
        opening: &Opening,
        tenant: &TenantId,
    ) -> Result<Result<(), Refusal>, DbError> {
        let Some((name, hash)) = &opening.idempotency else { return Ok(Ok(())) };
        let row = self.one(
            "SELECT body_hash, idempotency.request_id, request.state, posted FROM idempotency
            JOIN request ON request.id = idempotency.request_id
            WHERE idempotency.tenant_id = $1 AND name = $2",
            &[tenant.as_str().into(), name.as_str().into()],
        )?;
        let Some(row) = row else { return Ok(Ok(())) };
        if row.blob(0)? != hash {
            return Ok(Err(Refusal::IdempotencyMismatch));
        }
        let earlier = RequestId::new(row.text(1)?);
        match (row.text(2)?, row.int(3)?) {
            ("open", _) => Ok(Err(Refusal::IdempotencyRunning(earlier))),
            // It came to nothing and cost nothing: this is its second chance.
            (_, 0) => {
                self.write(
                    "DELETE FROM idempotency WHERE tenant_id = $1 AND name = $2",
                    &[tenant.as_str().into(), name.as_str().into()],
                )?;
                Ok(Ok(()))
            }
            _ => Ok(Err(Refusal::IdempotencyDone(earlier))),
        }
    }

    /// The price in force now: the tenant's own before the general one, the newest first.
    pub fn terms(&mut self, tenant: &TenantId, model: &ModelId) -> Result<Option<Terms>, DbError> {
        if let Some(known) = self.ahead.terms.get(&(tenant.clone(), model.clone())) {
            return Ok(*known);
        }
        let (sql, values) = self.terms_of(tenant, model);
        read_terms(&self.query(sql, &values)?)
    }

    /// What is asked to know a price.
    pub(super) fn terms_of(&self, tenant: &TenantId, model: &ModelId) -> Question {
        let sql = "SELECT version, input, cached_input, output, request, device_second, billing
            FROM price WHERE model = $1 AND tenant_id IN ($2, '') AND from_ns <= $3
            AND (until_ns IS NULL OR until_ns > $3)
            ORDER BY tenant_id DESC, from_ns DESC, version DESC LIMIT 1";
        (sql, vec![model.as_str().into(), tenant.as_str().into(), self.now_ns.into()])
    }

    fn insert_request(
        &mut self,
        opening: &Opening,
        chain: &Chain,
        terms: &Terms,
        hold: i64,
        replica: &str,
    ) -> Result<(), DbError> {
        let id = opening.request.as_str();
        self.write(
            "INSERT INTO request (id, org_id, tenant_id, key_id, model, user_label, metadata,
            price_version, choices, replica, state, opened_ns, closed_ns, granted, posted,
            uncached_input, cached_input, output, device_ns, billable_device_ns, token_cost,
            device_cost, energy_uj, leases, steps, end_cause, unrecorded_max)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, 'open', $11, NULL, $12, 0,
            0, 0, 0, 0, 0, 0, 0, NULL, 1, 0, '', 0)",
            &[
                id.into(),
                chain.org.as_str().into(),
                chain.tenant.as_str().into(),
                chain.key.as_ref().map_or("", |key| key.as_str()).into(),
                opening.model.as_str().into(),
                opening.user_label.as_str().into(),
                opening.metadata.as_str().into(),
                terms.version.into(),
                i64::from(opening.choices).into(),
                replica.into(),
                self.now_ns.into(),
                hold.into(),
            ],
        )?;
        let lease = LeaseRow { number: 1, granted_ns: self.now_ns, amount: hold, posted: 0 };
        self.write_lease(&opening.request, &lease)?;
        if let Some((name, hash)) = &opening.idempotency {
            self.write(
                "INSERT INTO idempotency (tenant_id, name, body_hash, request_id, created_ns)
                VALUES ($1, $2, $3, $4, $5)",
                &[
                    chain.tenant.as_str().into(),
                    name.as_str().into(),
                    hash.as_slice().into(),
                    id.into(),
                    self.now_ns.into(),
                ],
            )?;
        }
        Ok(())
    }
}

/// What is asked to know who pays.
pub(super) fn account_of(payer: &Payer) -> Question {
    let of_key = "SELECT tenant.org_id, tenant.id, tenant.settings, api_key.settings, expires_ns,
        revoked_ns FROM api_key JOIN tenant ON tenant.id = api_key.tenant_id
        WHERE api_key.id = $1";
    let of_tenant = "SELECT org_id, id, settings FROM tenant WHERE id = $1";
    match payer {
        Payer::Key(key) => (of_key, vec![key.as_str().into()]),
        Payer::Tenant(tenant) => (of_tenant, vec![tenant.as_str().into()]),
    }
}

/// The answer to [`Book::terms_of`].
pub(super) fn read_terms(rows: &[Row]) -> Result<Option<Terms>, DbError> {
    let Some(row) = rows.first() else { return Ok(None) };
    let amount = |index| row.int(index).map(|value| NanoUsd(value.into()));
    let rates = Rates {
        input: amount(1)?,
        cached_input: amount(2)?,
        output: amount(3)?,
        request: amount(4)?,
        device_second: amount(5)?,
    };
    Ok(Some(Terms { version: row.int(0)?, rates, billing: billing(row.text(6)?)? }))
}

/// The whole input, all of it uncached, and one token of each sequence.
pub fn first_hold(terms: &Terms, opening: &Opening) -> NanoUsd {
    terms.charge(&Tally {
        uncached_input: opening.input_tokens,
        output: opening.choices.into(),
        billable_device_ns: opening.device_bound_ns,
        ..Tally::default()
    })
}

pub(super) fn policy(json: &str) -> Result<Policy, DbError> {
    serde_json::from_str(json).map_err(|error| DbError::Corrupt(format!("settings: {error}")))
}
