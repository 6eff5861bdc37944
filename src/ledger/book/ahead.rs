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
        db::{DbError, Question, Row},
        rows::{Opening, Payer},
    },
    price::Terms,
    types::{KeyId, ModelId, RequestId, TenantId},
};

/// What was read before it was asked for. Only jobs about requests may follow: what an operator
/// changes is not looked for here.
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
    /// Reads what opening some requests, holding more for others and closing others will ask for.
    pub fn read_ahead(
        &mut self,
        openings: &[&Opening],
        extended: &[&RequestId],
        closed: &[&RequestId],
    ) -> Result<(), DbError> {
        let keys = openings.iter().filter_map(|opening| match &opening.payer {
            Payer::Key(key) => Some(key),
            Payer::Tenant(_) => None,
        });
        let keys: BTreeSet<KeyId> = keys.cloned().collect();
        let requests: BTreeSet<&RequestId> = extended.iter().chain(closed).copied().collect();
        let questions = keys.iter().map(key_of);
        let questions: Vec<_> =
            questions.chain(requests.iter().flat_map(|id| request_of(id))).collect();
        let found = self.query_each(&questions)?;
        let (of_keys, of_requests) = found.split_at(keys.len());
        self.keep_accounts(keys, of_keys)?;
        for (id, rows) in requests.into_iter().zip(of_requests.chunks(2)) {
            let request = read_open(rows)?;
            self.ahead.requests.insert(id.clone(), request);
        }
        let payments = self.payments();
        self.read_limits(openings, extended, &payments)?;
        self.read_windows(payments.iter().map(|(scope, at_ns)| (scope, *at_ns)))
    }

    /// Budgets and rates of all that pay, prices of what is opened, keys of what is extended.
    fn read_limits(
        &mut self,
        openings: &[&Opening],
        extended: &[&RequestId],
        payments: &BTreeSet<(String, i64)>,
    ) -> Result<(), DbError> {
        let mut scopes: Vec<String> = payments.iter().map(|(scope, _)| scope.clone()).collect();
        scopes.dedup();
        let unknown = self.unknown_budgets(&scopes);
        let priced = openings.iter().filter_map(|opening| {
            let tenant = match &opening.payer {
                Payer::Tenant(tenant) => tenant,
                Payer::Key(key) => &self.ahead.accounts.get(key)?.as_ref()?.chain.tenant,
            };
            Some((tenant.clone(), opening.model.clone()))
        });
        let priced: BTreeSet<(TenantId, ModelId)> = priced.collect();
        let running = extended.iter().filter_map(|id| self.ahead.requests.get(*id)?.as_ref());
        let mut keys: BTreeSet<KeyId> =
            running.filter_map(|request| request.chain.key.clone()).collect();
        keys.retain(|key| !self.ahead.accounts.contains_key(key));
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
        self.keep_accounts(keys, &of_keys)
    }

    /// The answers to [`key_of`].
    fn keep_accounts(&mut self, keys: BTreeSet<KeyId>, found: &[Vec<Row>]) -> Result<(), DbError> {
        for (key, rows) in keys.into_iter().zip(found) {
            let account = self.read_account(&key, rows)?;
            self.ahead.accounts.insert(key, account);
        }
        Ok(())
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
