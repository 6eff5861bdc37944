//! Reading ahead: what a group of jobs will ask for, in three round trips for all of them.

use std::collections::{BTreeSet, HashMap};

use super::{
    Book,
    budgets::budgets_of,
    open::{Account, key_of, read_terms},
    rates::{State, rates_of},
    requests::{OpenRequest, read_open, request_of},
};
use crate::{
    ledger::{
        db::{DbError, Question},
        rows::{Opening, Payer},
    },
    price::Terms,
    types::{KeyId, ModelId, RequestId, TenantId},
};

/// What was read before it was asked for. Only jobs that leave keys, tenants and prices alone may
/// follow.
#[derive(Default)]
pub(super) struct Ahead {
    pub accounts: HashMap<KeyId, Option<Account>>,
    pub terms: HashMap<(TenantId, ModelId), Option<Terms>>,
    /// Each until it is first taken.
    pub requests: HashMap<RequestId, Option<OpenRequest>>,
    /// Kept up to date.
    pub rates: HashMap<String, Option<State>>,
}

impl Book<'_> {
    /// Reads what opening some requests, and going on with others, will ask for.
    pub fn read_ahead(
        &mut self,
        openings: &[&Opening],
        requests: &[&RequestId],
    ) -> Result<(), DbError> {
        let keys = openings.iter().filter_map(|opening| match &opening.payer {
            Payer::Key(key) => Some(key),
            Payer::Tenant(_) => None,
        });
        let keys: BTreeSet<KeyId> = keys.cloned().collect();
        let requests: BTreeSet<&RequestId> = requests.iter().copied().collect();
        let questions = keys.iter().map(key_of);
        let questions: Vec<_> =
            questions.chain(requests.iter().flat_map(|id| request_of(id))).collect();
        let found = self.query_each(&questions)?;
        let (of_keys, of_requests) = found.split_at(keys.len());
        for (key, rows) in keys.into_iter().zip(of_keys) {
            let account = self.read_account(&key, rows)?;
            self.ahead.accounts.insert(key, account);
        }
        for (id, rows) in requests.into_iter().zip(of_requests.chunks(2)) {
            let request = read_open(rows)?;
            self.ahead.requests.insert(id.clone(), request);
        }
        self.read_limits_ahead(openings)?;
        self.read_windows_ahead()
    }

    /// Budgets and rates of all that pay, prices of what is opened, keys of what runs.
    fn read_limits_ahead(&mut self, openings: &[&Opening]) -> Result<(), DbError> {
        let scopes: BTreeSet<String> =
            self.payments().into_iter().map(|(scope, _)| scope).collect();
        let scopes: Vec<String> = scopes.into_iter().collect();
        let unknown = self.unknown_budgets(&scopes);
        let payer = |opening: &&Opening| match &opening.payer {
            Payer::Tenant(tenant) => Some((tenant.clone(), opening.model.clone())),
            Payer::Key(key) => {
                let account = self.ahead.accounts.get(key)?.as_ref()?;
                Some((account.chain.tenant.clone(), opening.model.clone()))
            }
        };
        let priced: BTreeSet<(TenantId, ModelId)> = openings.iter().filter_map(payer).collect();
        let running = self.ahead.requests.values().flatten();
        let keys: BTreeSet<KeyId> = running
            .filter_map(|request| request.chain.key.clone())
            .filter(|key| !self.ahead.accounts.contains_key(key))
            .collect();
        let mut questions: Vec<Question> = budgets_of(&unknown);
        questions.extend(rates_of(&scopes));
        questions.extend(priced.iter().map(|(tenant, model)| self.terms_of(tenant, model)));
        questions.extend(keys.iter().map(key_of));
        let mut found = self.query_each(&questions)?;
        let of_keys = found.split_off(unknown.len() + scopes.len() + priced.len());
        let of_prices = found.split_off(unknown.len() + scopes.len());
        let of_rates = found.split_off(unknown.len());
        self.keep_budgets(unknown, found)?;
        self.keep_rates(scopes, &of_rates)?;
        for (of, rows) in priced.into_iter().zip(&of_prices) {
            self.ahead.terms.insert(of, read_terms(rows)?);
        }
        for (key, rows) in keys.into_iter().zip(&of_keys) {
            let account = self.read_account(&key, rows)?;
            self.ahead.accounts.insert(key, account);
        }
        Ok(())
    }

    fn read_windows_ahead(&mut self) -> Result<(), DbError> {
        let payments = self.payments();
        self.read_windows(payments.iter().map(|(scope, at_ns)| (scope, *at_ns)))
    }

    /// Every scope that pays, with the times whose windows it pays in: now, and those of its leases.
    fn payments(&self) -> BTreeSet<(String, i64)> {
        let mut found = BTreeSet::new();
        let at =
            |scopes: Vec<String>, at_ns: i64| scopes.into_iter().map(move |scope| (scope, at_ns));
        for account in self.ahead.accounts.values().flatten() {
            found.extend(at(account.chain.scopes(), self.now_ns));
        }
        for request in self.ahead.requests.values().flatten() {
            found.extend(at(request.chain.scopes(), self.now_ns));
            for lease in &request.open {
                found.extend(at(request.chain.scopes(), lease.granted_ns));
            }
        }
        found
    }
}
