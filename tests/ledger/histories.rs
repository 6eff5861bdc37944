//! Random histories: whatever happens in whatever order, every sum holds and no limit is passed.

use std::collections::BTreeMap;

use candela::{
    ledger::{
        EndCause, Extension, Opening, Payer, Refusal, Span,
        book::{KeySpec, RateLimit, Role},
    },
    price::{Tally, Terms},
    types::{KeyId, ModelId, NanoUsd, RequestId, TenantId},
};
use proptest::{prelude::*, test_runner::Config};

use super::world::{KEYS, MODEL, NS_PER_S, TENANTS, World, budget, cost, key_spec, price, rates};

const SCOPES: [&str; 8] = [
    "global",
    "org:acme",
    "org:globex",
    "tenant:red",
    "tenant:blue",
    "tenant:green",
    "key:k0",
    "key:k2",
];
const ZONES: [&str; 4] = ["UTC", "Europe/Berlin", "Asia/Kolkata", "Australia/Lord_Howe"];
const MODELS: [&str; 3] = [MODEL, "fine", "unpriced"];

#[derive(Clone, Debug)]
enum Step {
    Open {
        payer: usize,
        model: usize,
        input: u64,
        choices: u32,
        cap: Option<i128>,
        idempotency: Option<(u8, u8)>,
    },
    /// Uses a share of what is granted, then asks for more tokens.
    Extend {
        which: usize,
        share: u64,
        tokens: u64,
    },
    Close {
        which: usize,
        share: u64,
        cause: usize,
    },
    Budget {
        scope: usize,
        span: usize,
        zone: usize,
        limit: i128,
    },
    DeleteBudget {
        scope: usize,
        span: usize,
    },
    Rate {
        scope: usize,
        sequences: Option<i64>,
        tokens: Option<i64>,
    },
    Revoke {
        key: usize,
        in_s: i64,
    },
    Key {
        tenant: usize,
        life_s: i64,
    },
    Price {
        model: usize,
        output: i128,
        request: i128,
    },
    Credit {
        tenant: usize,
        amount: i128,
    },
    Refund {
        which: usize,
        amount: i128,
    },
    Advance {
        seconds: u64,
    },
    ClockBack {
        seconds: i64,
    },
    /// In the middle of an admission.
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    let any = 0usize..1000;
    let limit = prop_oneof![Just(0i128), 0i128..400_000, Just(1 << 50)];
    let scope = 0..SCOPES.len();
    let span = 0..Span::ALL.len();
    let open = (
        0..TENANTS.len() + KEYS.len(),
        0..12usize,
        1u64..200,
        1u32..4,
        prop::option::weighted(0.2, 10_000i128..100_000),
        prop::option::weighted(0.2, (0u8..4, 0u8..2)),
    );
    let open = open.prop_map(|(payer, model, input, choices, cap, idempotency)| {
        let model = model.saturating_sub(9);
        Step::Open { payer, model, input, choices, cap, idempotency }
    });
    let seconds = prop_oneof![Just(0u64), 1u64..60, 600u64..7200, 40_000u64..200_000];
    prop_oneof![
        8 => open,
        8 => (any.clone(), 0u64..=100, 1u64..80)
            .prop_map(|(which, share, tokens)| Step::Extend { which, share, tokens }),
        4 => (any.clone(), 0u64..=100, 0..CAUSES.len())
            .prop_map(|(which, share, cause)| Step::Close { which, share, cause }),
        4 => (scope.clone(), span.clone(), 0..ZONES.len(), limit)
            .prop_map(|(scope, span, zone, limit)| Step::Budget { scope, span, zone, limit }),
        1 => (scope.clone(), span).prop_map(|(scope, span)| Step::DeleteBudget { scope, span }),
        1 => (scope, prop::option::of(0i64..12), prop::option::of(100i64..10_000))
            .prop_map(|(scope, sequences, tokens)| Step::Rate { scope, sequences, tokens }),
        1 => (0..KEYS.len(), 0i64..4000).prop_map(|(key, in_s)| Step::Revoke { key, in_s }),
        1 => (0..TENANTS.len(), 1i64..9000).prop_map(|(tenant, life_s)| Step::Key { tenant, life_s }),
        1 => (0..2usize, 0i128..900, 0i128..500)
            .prop_map(|(model, output, request)| Step::Price { model, output, request }),
        1 => (0..TENANTS.len(), 1i128..50_000).prop_map(|(tenant, amount)| Step::Credit { tenant, amount }),
        1 => (any, 0i128..100_000).prop_map(|(which, amount)| Step::Refund { which, amount }),
        3 => seconds.prop_map(|seconds| Step::Advance { seconds }),
        1 => (1i64..100_000).prop_map(|seconds| Step::ClockBack { seconds }),
        1 => Just(Step::Crash),
    ]
}

const CAUSES: [EndCause; 4] =
    [EndCause::Finished, EndCause::Aborted, EndCause::Failed, EndCause::Budget];

/// A request as the engine would know it.
struct Running {
    id: RequestId,
    tenant: TenantId,
    input: u64,
    terms: Terms,
    granted: NanoUsd,
    used: Tally,
    /// What the ledger was told of.
    recorded: Tally,
}

#[derive(Default)]
struct History {
    running: Vec<Running>,
    /// Charge of every ended request.
    ended: BTreeMap<RequestId, (TenantId, i128)>,
    given: BTreeMap<TenantId, i128>,
    keys: Vec<(String, String)>,
}

impl Running {
    /// Input first, then as much output as a share of the grant pays for.
    fn work(&mut self, share: u64) {
        self.used.uncached_input = self.input - self.input / 4;
        self.used.cached_input = self.input / 4;
        let fits =
            |output| cost(&self.terms.rates, &Tally { output, ..self.used }) <= self.granted.0;
        let mut output = self.used.output;
        while output < self.used.output + 40 * share / 100 && fits(output + 1) {
            output += 1;
        }
        self.used.output = output;
    }
}

impl History {
    fn run(&mut self, world: &mut World, step: Step) {
        match step {
            Step::Open { payer, model, input, choices, cap, idempotency } => {
                let opening = self.opening(world, payer, model, input, choices);
                let idempotency = idempotency.map(|(name, body)| (name.to_string(), [body; 32]));
                self.open(world, Opening { cap: cap.map(NanoUsd), idempotency, ..opening });
            }
            Step::Extend { which, share, tokens } => self.extend(world, which, share, tokens),
            Step::Close { which, share, cause } => self.close(world, which, share, CAUSES[cause]),
            Step::Refund { which, amount } => self.refund(world, which, amount),
            Step::Credit { tenant, amount } => {
                let tenant = TenantId::new(TENANTS[tenant].1);
                assert!(world.write(|book| book.credit(&tenant, NanoUsd(amount), "")));
                *self.given.entry(tenant).or_default() += amount;
            }
            Step::Crash => {
                let opening = self.opening(world, 0, 0, 10, 1);
                let replica = world.replica.clone();
                world.crash(|book| book.open(&opening, &replica).map(|_| ()));
                for one in self.running.drain(..) {
                    let charge = cost(&one.terms.rates, &one.recorded);
                    self.ended.insert(one.id, (one.tenant, charge));
                }
            }
            other => self.operate(world, other),
        }
    }

    /// What operators and clocks do.
    fn operate(&mut self, world: &mut World, step: Step) {
        match step {
            Step::Budget { scope, span, zone, limit } => {
                let budget = budget(SCOPES[scope], Span::ALL[span], ZONES[zone], limit);
                world.write(|book| book.set_budget(&budget));
            }
            Step::DeleteBudget { scope, span } => {
                world.write(|book| book.delete_budget(SCOPES[scope], Span::ALL[span]));
            }
            Step::Rate { scope, sequences, tokens } => {
                let limit = RateLimit {
                    requests_per_minute: None,
                    tokens_per_minute: tokens,
                    sequences_max: sequences,
                };
                world.write(|book| book.set_rate_limit(SCOPES[scope], &limit));
            }
            Step::Revoke { key, in_s } => {
                let key = KeyId::new(self.keys.get(key).map_or(KEYS[key].0, |key| &key.0));
                world.write(|book| {
                    let at_ns = book.now_ns() + in_s * NS_PER_S;
                    book.revoke_key(&key, at_ns)
                });
            }
            Step::Key { tenant, life_s } => {
                let (name, tenant) = (format!("n{}", self.keys.len()), TENANTS[tenant].1);
                let spec = key_spec(&name, tenant);
                world.write(|book| {
                    let expires_ns = Some(book.now_ns() + life_s * NS_PER_S);
                    book.add_key(&KeySpec { expires_ns, role: Role::Admin, ..spec })
                });
                self.keys.push((name, tenant.into()));
            }
            Step::Price { model, output, request } => {
                let mut rates = rates(150, 75, output);
                // `fine` has a price below a nano-USD per token.
                rates.output.0 /= if model == 1 { 1_000 } else { 1 };
                rates.request = NanoUsd(request);
                world.write(|book| book.set_price(&price(MODELS[model], rates)));
            }
            Step::Advance { seconds } => world.advance(seconds),
            Step::ClockBack { seconds } => {
                let to_ns = (world.clock.unix_ns() - seconds * NS_PER_S).max(NS_PER_S);
                world.clock.set_wall(to_ns);
            }
            other => unreachable!("{other:?} is a request's"),
        }
    }

    fn opening(
        &self,
        world: &mut World,
        payer: usize,
        model: usize,
        input: u64,
        choices: u32,
    ) -> Opening {
        let keys = KEYS.map(|(key, tenant)| (key.to_owned(), tenant.to_owned()));
        let mut keys: Vec<(String, String)> = keys.into();
        keys.extend(self.keys.iter().rev().take(1).cloned());
        let payer = match payer.checked_sub(TENANTS.len()) {
            None => Payer::Tenant(TenantId::new(TENANTS[payer].1)),
            Some(key) => Payer::Key(KeyId::new(&keys[(key + self.keys.len()) % keys.len()].0)),
        };
        let model = ModelId::new(MODELS[model]);
        Opening { payer, model, choices, ..world.opening("red", input) }
    }

    fn open(&mut self, world: &mut World, opening: Opening) {
        match world.open(&opening) {
            Ok(opened) => {
                let first = Tally {
                    uncached_input: opening.input_tokens,
                    output: opening.choices.into(),
                    ..Tally::default()
                };
                assert_eq!(opened.granted.0, cost(&opened.terms.rates, &first), "never clipped");
                assert!(opening.cap.is_none_or(|cap| opened.granted <= cap));
                self.running.push(Running {
                    id: opening.request,
                    tenant: opened.chain.tenant,
                    input: opening.input_tokens,
                    terms: opened.terms,
                    granted: opened.granted,
                    used: Tally::default(),
                    recorded: Tally::default(),
                });
            }
            Err(Refusal::IdempotencyDone(earlier)) => assert!(self.ended[&earlier].1 > 0),
            Err(Refusal::IdempotencyRunning(earlier)) => {
                assert!(self.running.iter().any(|one| one.id == earlier));
            }
            Err(_) => {}
        }
    }

    fn extend(&mut self, world: &mut World, which: usize, share: u64, tokens: u64) {
        let count = self.running.len().max(1);
        let Some(one) = self.running.get_mut(which % count) else { return };
        one.work(share);
        let after =
            |more| cost(&one.terms.rates, &Tally { output: one.used.output + more, ..one.used });
        let asked = Extension {
            request: one.id.clone(),
            used: one.used,
            wanted: NanoUsd(after(tokens)),
            least: NanoUsd(after(1)),
        };
        let grant = world.extend(&asked);
        assert!(grant.granted >= one.granted, "what was granted stays granted");
        let enough = grant.granted >= asked.least;
        assert!(enough || grant.denied.is_some(), "{asked:?} {grant:?}");
        one.granted = grant.granted;
        one.recorded = one.used;
    }

    fn close(&mut self, world: &mut World, which: usize, share: u64, cause: EndCause) {
        if self.running.is_empty() {
            return;
        }
        let mut one = self.running.swap_remove(which % self.running.len());
        if share > 0 {
            one.work(share);
        }
        let bill = world.close(&one.id, &one.used, cause).expect("it is open");
        let charge = cost(&one.terms.rates, &one.used);
        assert_eq!((bill.cost.0, bill.used), (charge, one.used), "tokens times price");
        assert_eq!(world.close(&one.id, &one.used, cause), None, "holds resolve once");
        self.ended.insert(one.id, (one.tenant, charge));
    }

    fn refund(&mut self, world: &mut World, which: usize, amount: i128) {
        let count = self.ended.len().max(1);
        let Some((id, (tenant, charge))) = self.ended.iter().nth(which % count) else { return };
        let refunded = world.write(|book| book.refund(id, NanoUsd(amount), "")).expect("ended");
        assert!(refunded.0 <= amount.min(*charge), "{refunded:?} of {charge}");
        *self.given.entry(tenant.clone()).or_default() += refunded.0;
    }

    /// Ends what runs; then what every tenant owes is the sum of its requests' tokens times price.
    fn finish(mut self, world: &mut World) {
        while !self.running.is_empty() {
            self.close(world, 0, 10, EndCause::Finished);
        }
        for (_, tenant) in TENANTS {
            let tenant = TenantId::new(tenant);
            let charges = self.ended.values().filter(|(of, _)| *of == tenant);
            let owed: i128 = charges.map(|(_, charge)| charge).sum();
            let owed = owed - self.given.get(&tenant).copied().unwrap_or(0);
            let account = format!("tenant:{tenant}");
            let sql = "SELECT debits - credits FROM account WHERE id = $1";
            let rows = candela::ledger::db::Db::query(world.db(), sql, &[account.into()]);
            let balance = rows.expect("reads").first().map_or(0, |row| row.int(0).expect("a sum"));
            assert_eq!(i128::from(balance), owed, "{tenant}");
        }
        let open = "SELECT COUNT(*) FROM request WHERE state = 'open'";
        let held = "SELECT CAST(COALESCE(SUM(held), 0) AS BIGINT) FROM window_total";
        let sequences = "SELECT CAST(COALESCE(SUM(sequences), 0) AS BIGINT) FROM rate_limit";
        for sql in [open, held, sequences, "SELECT COUNT(*) FROM lease"] {
            assert_eq!(world.number(sql), 0, "{sql}");
        }
    }
}

fn histories(cases: u32) -> Config {
    // `PROPTEST_CASES` lengthens it.
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(cases);
    Config { cases, failure_persistence: None, ..Config::default() }
}

proptest! {
    #![proptest_config(histories(40))]

    #[test]
    fn every_sum_holds_and_no_limit_is_passed(steps in prop::collection::vec(step(), 20..120)) {
        let (mut world, mut history) = (World::new(), History::default());
        for step in steps {
            history.run(&mut world, step);
        }
        history.finish(&mut world);
    }
}
