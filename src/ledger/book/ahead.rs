//! Reading ahead: what a group of jobs will ask for, in three round trips for all of them,
//! the first of which is that of the transaction's beginning.

use std::collections::{BTreeSet, HashMap};

use super::{
    Book,
    budgets::budgets_of,
    open::{Account, account_of, read_terms},
    rates::{State, rates_of},
    requests::{OpenRequest, read_open, request_of},
};
use crate::{
    ledger::{
        db::{DbError, Question, Row},
        rows::{Opening, Payer},
    },
    price::Terms,
    types::{ModelId, RequestId, TenantId},
};

/// What was read before it was asked for. Only jobs about requests may follow: what an operator
/// changes is not looked for here.
#[derive(Default)]
pub(super) struct Ahead {
    pub accounts: HashMap<Payer, Option<Account>>,
    pub terms: HashMap<(TenantId, ModelId), Option<Terms>>,
    /// Each until it is first taken.
    pub requests: HashMap<RequestId, Option<OpenRequest>>,
    /// Kept up to date.
    pub rates: HashMap<String, Option<State>>,
}

/// What a group of jobs is about: openings, running requests that want more, and those that end.
#[derive(Default)]
pub struct Subjects {
    payers: BTreeSet<Payer>,
    priced: BTreeSet<(Payer, ModelId)>,
    extended: BTreeSet<RequestId>,
    /// Those that end, and those that are extended.
    running: BTreeSet<RequestId>,
}

impl Subjects {
    pub fn opens(&mut self, opening: &Opening) {
        self.payers.insert(opening.payer.clone());
        self.priced.insert((opening.payer.clone(), opening.model.clone()));
    }

    pub fn extends(&mut self, request: &RequestId) {
        self.extended.insert(request.clone());
        self.running.insert(request.clone());
    }

    pub fn ends(&mut self, request: &RequestId) {
        self.running.insert(request.clone());
    }

    /// What is asked first; [`Book::read_ahead`] takes the answers.
    pub fn questions(&self) -> impl Iterator<Item = Question> {
        self.payers.iter().map(account_of).chain(self.running.iter().flat_map(request_of))
    }
}

impl Book<'_> {
    /// Reads what jobs about `subjects` will ask for. `found` are the answers to their questions.
    pub fn read_ahead(&mut self, subjects: &Subjects, found: &[Vec<Row>]) -> Result<(), DbError> {
        let (of_payers, of_requests) = found.split_at(subjects.payers.len());
        self.keep_accounts(subjects.payers.iter().cloned(), of_payers)?;
        for (id, rows) in subjects.running.iter().zip(of_requests.chunks(2)) {
            let request = read_open(rows)?;
            self.ahead.requests.insert(id.clone(), request);
        }
        let payments = self.payments();
        self.read_limits(subjects, &payments)?;
        self.read_windows(payments.iter().map(|(scope, at_ns)| (scope, *at_ns)))
    }

    /// Budgets and rates of all that pay, prices of what is opened, keys of what is extended.
    fn read_limits(
        &mut self,
        subjects: &Subjects,
        payments: &BTreeSet<(String, i64)>,
    ) -> Result<(), DbError> {
        let mut scopes: Vec<String> = payments.iter().map(|(scope, _)| scope.clone()).collect();
        scopes.dedup();
        let unknown = self.unknown_budgets(&scopes);
        let priced = subjects.priced.iter().filter_map(|(payer, model)| {
            let tenant = &self.ahead.accounts.get(payer)?.as_ref()?.chain.tenant;
            Some((tenant.clone(), model.clone()))
        });
        let priced: BTreeSet<(TenantId, ModelId)> = priced.collect();
        let extended = subjects.extended.iter();
        let extended = extended.filter_map(|id| self.ahead.requests.get(id)?.as_ref());
        let mut keys: BTreeSet<Payer> =
            extended.filter_map(|request| request.chain.key.clone().map(Payer::Key)).collect();
        keys.retain(|key| !self.ahead.accounts.contains_key(key));
        let mut questions: Vec<Question> = budgets_of(&unknown);
        let rates_at = questions.len();
        questions.extend(rates_of(&scopes));
        let prices_at = questions.len();
        questions.extend(priced.iter().map(|(tenant, model)| self.terms_of(tenant, model)));
        let keys_at = questions.len();
        questions.extend(keys.iter().map(account_of));
        let mut found = self.query_each(&questions)?;
        let of_keys = found.split_off(keys_at);
        let of_prices = found.split_off(prices_at);
        let of_rates = found.split_off(rates_at);
        self.keep_budgets(unknown, found)?;
        self.keep_rates(scopes, &of_rates)?;
        for (of, rows) in priced.into_iter().zip(&of_prices) {
            self.ahead.terms.insert(of, read_terms(rows)?);
        }
        self.keep_accounts(keys, &of_keys)
    }

    /// The answers to [`account_of`].
    fn keep_accounts(
        &mut self,
        payers: impl IntoIterator<Item = Payer>,
        found: &[Vec<Row>],
    ) -> Result<(), DbError> {
        for (payer, rows) in payers.into_iter().zip(found) {
            let account = self.read_account(&payer, rows)?;
            self.ahead.accounts.insert(payer, account);
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
