//! Requests and tokens a minute, and sequences at once.
//!
//! Rates are the generic cell rate algorithm (ITU-T I.371): one number a limit, the time at which
//! all that was used is paid off. A minute's worth may be used at once.

use std::collections::HashMap;

use super::{Book, of_scopes};
use crate::ledger::{
    db::{DbError, Question, Row},
    rows::Refusal,
};

const MINUTE_NS: i64 = 60_000_000_000;

/// Limits of one scope; `None` is unlimited.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RateLimit {
    pub requests_per_minute: Option<i64>,
    pub tokens_per_minute: Option<i64>,
    pub sequences_max: Option<i64>,
}

#[derive(Clone)]
pub(super) struct State {
    limit: RateLimit,
    requests_free_ns: i64,
    tokens_free_ns: i64,
    sequences: i64,
}

impl Book<'_> {
    /// What is limited among `scopes`, with how far it is used.
    fn rates<'a>(&mut self, scopes: &'a [String]) -> Result<Vec<(&'a String, State)>, DbError> {
        let known = |scope: &String| self.ahead.rates.get(scope).cloned();
        let states: Vec<_> = match scopes.iter().map(known).collect() {
            Some(known) => known,
            None => {
                let found = states(&self.query_each(&rates_of(scopes))?)?;
                scopes.iter().map(|scope| found.get(scope.as_str()).cloned()).collect()
            }
        };
        let of_scope = scopes.iter().zip(states);
        Ok(of_scope.filter_map(|(scope, state)| Some((scope, state?))).collect())
    }

    /// The answers to [`rates_of`].
    pub(super) fn keep_rates(
        &mut self,
        scopes: Vec<String>,
        found: &[Vec<Row>],
    ) -> Result<(), DbError> {
        let mut found = states(found)?;
        let states = scopes.into_iter().map(|scope| {
            let state = found.remove(&scope);
            (scope, state)
        });
        self.ahead.rates.extend(states);
        Ok(())
    }

    fn write_rate(&mut self, scope: &str, state: &State) -> Result<(), DbError> {
        if let Some(known) = self.ahead.rates.get_mut(scope) {
            *known = Some(state.clone());
        }
        self.write(
            "UPDATE rate_limit SET requests_free_ns = $1, tokens_free_ns = $2, sequences = $3
            WHERE scope = $4",
            &[
                state.requests_free_ns.into(),
                state.tokens_free_ns.into(),
                state.sequences.into(),
                scope.into(),
            ],
        )?;
        Ok(())
    }

    /// Counts a new request in every scope, or in none where one refuses it.
    pub(super) fn begin_rates(
        &mut self,
        scopes: &[String],
        input_tokens: u64,
        sequences: u32,
    ) -> Result<Result<(), Refusal>, DbError> {
        let mut next = Vec::new();
        for (scope, mut state) in self.rates(scopes)? {
            if let Err(refusal) = state.begin(scope, self.now_ns, input_tokens, sequences) {
                return Ok(Err(refusal));
            }
            next.push((scope, state));
        }
        for (scope, state) in next {
            self.write_rate(scope, &state)?;
        }
        Ok(Ok(()))
    }

    /// Counts output tokens as they come, and sequences as they end. Never refuses: they are made.
    pub(super) fn count_rates(
        &mut self,
        scopes: &[String],
        output_tokens: u64,
        ended_sequences: i64,
    ) -> Result<(), DbError> {
        for (scope, mut state) in self.rates(scopes)? {
            if let Some(limit) = state.limit.tokens_per_minute {
                state.tokens_free_ns = state
                    .tokens_free_ns
                    .max(self.now_ns)
                    .saturating_add(cost_ns(output_tokens, limit));
            }
            state.sequences = (state.sequences - ended_sequences).max(0);
            self.write_rate(scope, &state)?;
        }
        Ok(())
    }

    /// The limits of a scope.
    pub fn rate_limit(&mut self, scope: &str) -> Result<RateLimit, DbError> {
        let scopes = [scope.to_owned()];
        Ok(self
            .rates(&scopes)?
            .into_iter()
            .next()
            .map(|(_, state)| state.limit)
            .unwrap_or_default())
    }

    /// Changes the limits of a scope; what runs is counted from the start.
    pub fn set_rate_limit(&mut self, scope: &str, limit: &RateLimit) -> Result<(), DbError> {
        let sequences = self.open_sequences(scope)?;
        self.write(
            "INSERT INTO rate_limit (scope, requests_per_minute, tokens_per_minute, sequences_max,
            requests_free_ns, tokens_free_ns, sequences) VALUES ($1, $2, $3, $4, 0, 0, $5)
            ON CONFLICT (scope) DO UPDATE SET requests_per_minute = excluded.requests_per_minute,
            tokens_per_minute = excluded.tokens_per_minute,
            sequences_max = excluded.sequences_max, sequences = excluded.sequences",
            &[
                scope.into(),
                limit.requests_per_minute.into(),
                limit.tokens_per_minute.into(),
                limit.sequences_max.into(),
                sequences.into(),
            ],
        )?;
        Ok(())
    }

    /// Whether there was one.
    pub fn delete_rate_limit(&mut self, scope: &str) -> Result<bool, DbError> {
        Ok(self.execute("DELETE FROM rate_limit WHERE scope = $1", &[scope.into()])? > 0)
    }
}

/// What is asked to know what is limited among `scopes`.
pub(super) fn rates_of(scopes: &[String]) -> Vec<Question> {
    let sql = "SELECT requests_per_minute, tokens_per_minute, sequences_max, requests_free_ns,
        tokens_free_ns, sequences, scope FROM rate_limit WHERE scope IN ($1, $2, $3, $4)";
    of_scopes(sql, scopes)
}

/// The answers to [`rates_of`]: of scopes that have a limit.
fn states(found: &[Vec<Row>]) -> Result<HashMap<String, State>, DbError> {
    let of_scope = |row: &Row| Ok((row.text(6)?.to_owned(), state(row)?));
    found.iter().flatten().map(of_scope).collect()
}

fn state(row: &Row) -> Result<State, DbError> {
    let limit = RateLimit {
        requests_per_minute: row.int_or_null(0)?,
        tokens_per_minute: row.int_or_null(1)?,
        sequences_max: row.int_or_null(2)?,
    };
    let (requests_free_ns, tokens_free_ns) = (row.int(3)?, row.int(4)?);
    Ok(State { limit, requests_free_ns, tokens_free_ns, sequences: row.int(5)? })
}

impl State {
    fn begin(
        &mut self,
        scope: &str,
        now_ns: i64,
        input_tokens: u64,
        sequences: u32,
    ) -> Result<(), Refusal> {
        let scope = || scope.to_owned();
        if let Some(limit) = self.limit.requests_per_minute {
            let free_ns = self.requests_free_ns.max(now_ns).saturating_add(cost_ns(1, limit));
            let late_ns = free_ns - now_ns - MINUTE_NS;
            if late_ns > 0 {
                let retry_after_ns = late_ns;
                return Err(Refusal::RequestsPerMinute { scope: scope(), limit, retry_after_ns });
            }
            self.requests_free_ns = free_ns;
        }
        if let Some(limit) = self.limit.tokens_per_minute {
            let cost_ns = cost_ns(input_tokens, limit);
            if cost_ns > MINUTE_NS {
                return Err(Refusal::InputOverRate { scope: scope(), limit, tokens: input_tokens });
            }
            let free_ns = self.tokens_free_ns.max(now_ns).saturating_add(cost_ns);
            let late_ns = free_ns - now_ns - MINUTE_NS;
            if late_ns > 0 {
                let retry_after_ns = late_ns;
                return Err(Refusal::TokensPerMinute { scope: scope(), limit, retry_after_ns });
            }
            self.tokens_free_ns = free_ns;
        }
        let wanted = self.sequences + i64::from(sequences);
        if let Some(limit) = self.limit.sequences_max
            && wanted > limit
        {
            return Err(Refusal::Sequences { scope: scope(), limit });
        }
        self.sequences = wanted;
        Ok(())
    }
}

/// How long `count` units of a rate take to be paid off.
fn cost_ns(count: u64, per_minute: i64) -> i64 {
    // A limit of zero lets nothing in.
    let cost = (i128::from(count) * i128::from(MINUTE_NS)).checked_div(per_minute.into());
    cost.and_then(|cost| i64::try_from(cost).ok()).unwrap_or(i64::MAX / 4)
}
