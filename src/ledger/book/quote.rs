//! What a request would cost: the look-ups of admission, without a hold.

use super::{
    Book,
    open::{Account, first_hold},
};
use crate::{
    ledger::{
        db::DbError,
        rows::{Opening, Refusal},
    },
    price::{Tally, Terms},
    types::NanoUsd,
};

/// The cost of a request before it runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Quote {
    pub terms: Terms,
    /// Held at admission.
    pub hold: NanoUsd,
    /// With the longest output, uncached, and whatever the cap.
    pub worst: NanoUsd,
    /// The lowest of the request's, the key's and the tenant's.
    pub cap: Option<NanoUsd>,
}

impl Book<'_> {
    /// For an output of at most `output_tokens` over all choices, and device time of at most
    /// `device_ns`. Refuses what admission would
    /// refuse whatever is left of budgets and rates.
    pub fn quote(
        &mut self,
        opening: &Opening,
        output_tokens: u64,
        device_ns: u64,
    ) -> Result<Result<Quote, Refusal>, DbError> {
        let account = self.account(&opening.payer)?;
        let Some(Account { chain, policy }) = account else { return Ok(Err(Refusal::Key)) };
        if let Some(models) = &policy.models
            && !models.iter().any(|model| model == opening.model.as_str())
        {
            return Ok(Err(Refusal::ModelForbidden(opening.model.clone())));
        }
        let Some(terms) = self.terms(&chain.tenant, &opening.model)? else {
            return Ok(Err(Refusal::UnknownPrice(opening.model.clone())));
        };
        let worst = terms.charge(&Tally {
            uncached_input: opening.input_tokens,
            output: output_tokens,
            billable_device_ns: device_ns.max(opening.device_bound_ns),
            ..Tally::default()
        });
        let hold = first_hold(&terms, opening);
        let cap = policy.max_cost_usd.into_iter().chain(opening.cap).min();
        Ok(Ok(Quote { terms, hold, worst, cap }))
    }
}
