//! What an operator does on a ledger of its own beside the servers, as `candela budget set` and its like.

use candela::{
    clock::Clock,
    ledger::{
        Policy, Span, Zone,
        book::{Budget, KeySpec, PriceSpec, RateLimit, Role, key_hash, transact},
        db::Sqlite,
    },
    price::{Billing, Rates},
    types::{KeyId, ModelId, NanoUsd, OrgId, RequestId, TenantId},
};
use rand::{RngExt, rngs::StdRng};

use super::server::MODEL;

pub const TENANTS: [(&str, &str); 3] = [("acme", "red"), ("acme", "blue"), ("globex", "green")];
/// The secret of a key is its name.
pub const KEYS: [(&str, &str); 4] = [("k0", "red"), ("k1", "red"), ("k2", "blue"), ("k3", "green")];
const SCOPES: [&str; 8] = [
    "global",
    "org:acme",
    "tenant:red",
    "tenant:red",
    "tenant:blue",
    "tenant:green",
    "key:k0",
    "key:k1",
];
const NS_PER_S: i64 = 1_000_000_000;

pub struct Operator {
    pub db: Sqlite,
    clock: Clock,
    /// How far it has set the wall clock back.
    pub behind_ns: i64,
}

impl Operator {
    pub fn new(db: Sqlite, clock: Clock) -> Self {
        Self { db, clock, behind_ns: 0 }
    }

    /// Who is there, and what things cost.
    pub fn set_up(&mut self, random: &mut StdRng) {
        let price = price(random);
        let done = transact(&mut self.db, |book| {
            for (org, tenant) in TENANTS {
                book.add_org(&OrgId::new(org), org)?;
                book.add_tenant(&TenantId::new(tenant), &OrgId::new(org), "", &Policy::default())?;
            }
            for (key, tenant) in KEYS {
                book.add_key(&KeySpec {
                    id: KeyId::new(key),
                    tenant: TenantId::new(tenant),
                    hash: key_hash(key),
                    name: key.into(),
                    role: Role::Tenant,
                    policy: Policy::default(),
                    expires_ns: None,
                })?;
            }
            book.set_price(&price)
        });
        done.expect("sets up");
        for _ in 0..random.random_range(0..5) {
            self.set_budget(random);
        }
    }

    fn set_budget(&mut self, random: &mut StdRng) {
        let scope = SCOPES[random.random_range(0..SCOPES.len())];
        let zones = ["UTC", "Europe/Berlin", "Asia/Kolkata"];
        // About what one request, some or all of them cost.
        let limit = match random.random_range(0..6) {
            0 => 0,
            1 => 1 << 50,
            2 => random.random_range(0..30_000),
            _ => random.random_range(0..300_000),
        };
        let budget = Budget {
            scope: scope.into(),
            span: Span::ALL[random.random_range(0..Span::ALL.len())],
            zone: Zone::parse(zones[random.random_range(0..zones.len())]).expect("a zone"),
            limit: NanoUsd(limit),
            soft_percent: vec![50, 95],
        };
        transact(&mut self.db, |book| book.set_budget(&budget)).expect("a budget");
    }

    /// Does something at random. `known` is a request, in the ledger or not.
    pub fn act(&mut self, random: &mut StdRng, known: &RequestId) {
        let scope = SCOPES[random.random_range(0..SCOPES.len())];
        let span = Span::ALL[random.random_range(0..Span::ALL.len())];
        let tenant = TenantId::new(TENANTS[random.random_range(0..TENANTS.len())].1);
        let amount = NanoUsd(random.random_range(0..20_000));
        let done = match random.random_range(0..12) {
            0 => {
                let key = KeyId::new(KEYS[random.random_range(0..KEYS.len())].0);
                let in_ns = random.random_range(0..2) * NS_PER_S;
                transact(&mut self.db, |book| {
                    let at_ns = book.now_ns() + in_ns;
                    book.revoke_key(&key, at_ns).map(drop)
                })
            }
            1 => {
                let price = price(random);
                transact(&mut self.db, |book| book.set_price(&price).map(drop))
            }
            2 => transact(&mut self.db, |book| book.delete_budget(scope, span).map(drop)),
            3 => transact(&mut self.db, |book| book.credit(&tenant, amount, "").map(drop)),
            4 => transact(&mut self.db, |book| book.refund(known, amount, "").map(drop)),
            5 => {
                let limit = RateLimit {
                    requests_per_minute: random
                        .random_ratio(1, 3)
                        .then(|| random.random_range(0..30)),
                    tokens_per_minute: random
                        .random_ratio(1, 3)
                        .then(|| random.random_range(50..2_000)),
                    sequences_max: random.random_ratio(1, 2).then(|| random.random_range(0..9)),
                };
                transact(&mut self.db, |book| book.set_rate_limit(scope, &limit))
            }
            6 => transact(&mut self.db, |book| book.delete_rate_limit(scope).map(drop)),
            7 => {
                let back_ns = [1, 20, 5_000][random.random_range(0..3)] * NS_PER_S;
                self.behind_ns += back_ns;
                return self.clock.set_wall(self.clock.unix_ns() - back_ns);
            }
            _ => return self.set_budget(random),
        };
        done.expect("is done");
    }

    /// Puts the wall clock right.
    pub fn put_right(&mut self) {
        self.clock.set_wall(self.clock.unix_ns() + std::mem::take(&mut self.behind_ns));
    }
}

fn price(random: &mut StdRng) -> PriceSpec {
    let million = |price: i128| NanoUsd(price * 1_000_000);
    // Round ones, ones below a nano-USD a token, free ones and large ones.
    let output = [million(600), NanoUsd(333_333), NanoUsd(0), million(5_001)];
    let rates = Rates {
        input: million(random.random_range(0..300)),
        cached_input: million(75),
        output: output[[0, 0, 0, 1, 2, 3][random.random_range(0..6)]],
        request: NanoUsd([0, 0, 500][random.random_range(0..3)]),
        device_second: NanoUsd(random.random_range(0..2_000_000)),
    };
    PriceSpec {
        model: ModelId::new(MODEL),
        tenant: random.random_ratio(1, 4).then(|| TenantId::new("blue")),
        rates,
        billing: if random.random_ratio(1, 6) { Billing::Device } else { Billing::Tokens },
        from_ns: None,
        until_ns: None,
        origin: "test",
    }
}
