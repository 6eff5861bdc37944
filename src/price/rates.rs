//! What a request costs: rates, token buckets, and exact integer arithmetic between them.

use serde::{Deserialize, Serialize};

use crate::types::NanoUsd;

/// Tokens that a token price is for.
const TOKENS_PER_PRICE: i128 = 1_000_000;
const NS_PER_S: i128 = 1_000_000_000;

/// One version's prices of one model. Token prices are nano-USD per million tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    pub input: NanoUsd,
    pub cached_input: NanoUsd,
    pub output: NanoUsd,
    /// Once per request.
    pub request: NanoUsd,
    /// Per second of device time.
    pub device_second: NanoUsd,
}

/// Which of the two recorded costs a tenant is charged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Billing {
    #[default]
    Tokens,
    Device,
}

/// The price of one request, fixed when it is admitted and never changed after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// The price version that the charge names.
    pub version: i64,
    pub rates: Rates,
    pub billing: Billing,
}

/// What a request has used so far. The token buckets are disjoint: reasoning is part of output,
/// recomputed tokens are in none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub uncached_input: u64,
    pub cached_input: u64,
    pub output: u64,
    /// Device time attributed to the request, in nanoseconds.
    pub device_ns: u64,
    /// The part of `device_ns` that may be charged: each step counts at most its bound held before.
    pub billable_device_ns: u64,
}

impl Tally {
    /// Whether nothing was used.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Rates {
    /// `request + ceil(sum(tokens * price) / 1e6)`: rounded up once, over all buckets. A request
    /// that never used anything, such as one that found the queue full, costs nothing.
    pub fn token_cost(&self, tally: &Tally) -> NanoUsd {
        if tally.is_empty() {
            return NanoUsd(0);
        }
        NanoUsd(self.request.0 + div_ceil(self.token_sum(tally), TOKENS_PER_PRICE))
    }

    /// Tokens times prices, in millionths of a nano-USD.
    fn token_sum(&self, tally: &Tally) -> i128 {
        i128::from(tally.uncached_input) * self.input.0
            + i128::from(tally.cached_input) * self.cached_input.0
            + i128::from(tally.output) * self.output.0
    }

    /// `ceil(ns * price / 1e9)`.
    pub fn device_cost(&self, device_ns: u64) -> NanoUsd {
        NanoUsd(div_ceil(i128::from(device_ns) * self.device_second.0, NS_PER_S))
    }
}

impl Terms {
    /// The charge of one output token, rounded up; 0 where time is billed.
    pub fn token_unit(&self) -> NanoUsd {
        match self.billing {
            Billing::Tokens => NanoUsd(div_ceil(self.rates.output.0, TOKENS_PER_PRICE)),
            Billing::Device => NanoUsd(0),
        }
    }

    /// The most times that `more` can be added to `used` with a charge of no more than `limit`;
    /// `u64::MAX` where that is without end, 0 where `used` alone costs more.
    pub fn fitting(&self, used: &Tally, more: &Tally, limit: NanoUsd) -> u64 {
        let rates = &self.rates;
        let device = |tally: &Tally| i128::from(tally.billable_device_ns) * rates.device_second.0;
        let (scale, used, more) = match self.billing {
            Billing::Tokens => (TOKENS_PER_PRICE, rates.token_sum(used), rates.token_sum(more)),
            Billing::Device => (NS_PER_S, device(used), device(more)),
        };
        let left = (limit.0 - rates.request.0) * scale - used;
        match more {
            _ if left < 0 => 0,
            0 => u64::MAX,
            _ => u64::try_from(left / more).unwrap_or(u64::MAX),
        }
    }

    /// What the tenant owes for `tally`. It grows with every part of the tally, so the charge of
    /// one more token is the difference of two of these.
    pub fn charge(&self, tally: &Tally) -> NanoUsd {
        match self.billing {
            Billing::Tokens => self.rates.token_cost(tally),
            Billing::Device => {
                let device = self.rates.device_cost(tally.billable_device_ns);
                let request = if tally.is_empty() { NanoUsd(0) } else { self.rates.request };
                NanoUsd(request.0 + device.0)
            }
        }
    }
}

/// Prices are never negative, so this rounds away from zero.
fn div_ceil(value: i128, by: i128) -> i128 {
    (value + by - 1).div_euclid(by)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tally(uncached_input: u64, cached_input: u64, output: u64) -> Tally {
        Tally { uncached_input, cached_input, output, ..Tally::default() }
    }

    #[test]
    fn costs_round_up_once() {
        let rates = Rates {
            input: NanoUsd(150_000_000),
            cached_input: NanoUsd(75_000_000),
            output: NanoUsd(600_000_000),
            request: NanoUsd(10),
            device_second: NanoUsd(1_000),
        };
        for (tally, expected) in [
            (tally(0, 0, 0), 0),
            (tally(1, 0, 0), 160),
            (tally(0, 0, 1), 610),
            (tally(1000, 24, 7), 10 + 150_000 + 1_800 + 4_200),
        ] {
            assert_eq!(rates.token_cost(&tally), NanoUsd(expected), "{tally:?}");
        }
        let fine = Rates { input: NanoUsd(1), output: NanoUsd(1), ..Rates::default() };
        assert_eq!(fine.token_cost(&tally(1, 0, 1)), NanoUsd(1), "two millionths, one rounding");
        for (ns, expected) in [(0, 0), (1, 1), (1_000_000, 1), (1_000_001, 2)] {
            assert_eq!(rates.device_cost(ns), NanoUsd(expected), "{ns} ns");
        }
    }

    proptest! {
        #[test]
        fn device_time_within_a_limit_is_the_most_there_is(
            limit in 0i128..10_000_000_000, second in 1i128..10_000_000_000, request in 0i128..100,
        ) {
            let rates = Rates {
                device_second: NanoUsd(second), request: NanoUsd(request), ..Rates::default()
            };
            let terms = Terms { rates, billing: Billing::Device, ..Terms::default() };
            let one_ns = Tally { billable_device_ns: 1, ..Tally::default() };
            let most_ns = terms.fitting(&Tally::default(), &one_ns, NanoUsd(limit));
            let charge = |ns| {
                terms.charge(&Tally { output: 1, billable_device_ns: ns, ..Tally::default() }).0
            };
            prop_assert!(charge(most_ns) <= limit.max(request), "{most_ns}");
            prop_assert!(charge(most_ns + 1) > limit, "{most_ns} is not the most");
        }

        #[test]
        fn as_many_fit_as_the_charge_allows(
            prices in prop::array::uniform3(0i128..2_000_000_000), request in 0i128..1000,
            used in (0u64..1000, 0u64..1000, 0u64..1000), more in (1u64..4, 1u64..1_000_000),
            limit in 0i128..2_000_000, by_time in any::<bool>(),
        ) {
            let rates = Rates {
                input: NanoUsd(prices[0]),
                cached_input: NanoUsd(0),
                output: NanoUsd(prices[1]),
                device_second: NanoUsd(prices[2]),
                request: NanoUsd(request),
            };
            let billing = if by_time { Billing::Device } else { Billing::Tokens };
            let terms = Terms { rates, billing, ..Terms::default() };
            let more = Tally { output: more.0, billable_device_ns: more.1, ..Tally::default() };
            let used = Tally {
                uncached_input: 1 + used.0, output: used.1, billable_device_ns: used.2,
                ..Tally::default()
            };
            let charge = |count: u64| {
                let output = used.output + count * more.output;
                let billable_device_ns = used.billable_device_ns + count * more.billable_device_ns;
                terms.charge(&Tally { output, billable_device_ns, ..used }).0
            };
            let count = terms.fitting(&used, &more, NanoUsd(limit));
            let seen = if count == u64::MAX { 1_000_000_000 } else { count };
            prop_assert!(charge(seen) <= limit || (count == 0 && charge(0) > limit), "{count}");
            prop_assert!(count == u64::MAX || charge(count + 1) > limit, "{count} and one more");
        }

        #[test]
        fn token_by_token_adds_up_to_the_whole(
            prices in prop::array::uniform3(0i128..10_000_000_000), steps in prop::collection::vec(0usize..3, 0..200),
        ) {
            let rates = Rates {
                input: NanoUsd(prices[0]),
                cached_input: NanoUsd(prices[1]),
                output: NanoUsd(prices[2]),
                ..Rates::default()
            };
            let (mut now, mut charged) = (Tally::default(), 0);
            for bucket in steps {
                let before = rates.token_cost(&now).0;
                match bucket {
                    0 => now.uncached_input += 1,
                    1 => now.cached_input += 1,
                    _ => now.output += 1,
                }
                let charge = rates.token_cost(&now).0 - before;
                prop_assert!(charge >= 0);
                charged += charge;
            }
            prop_assert_eq!(charged, rates.token_cost(&now).0);
        }
    }
}
