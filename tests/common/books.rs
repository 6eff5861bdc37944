//! Books to test with: who pays, what things cost, and whether the sums are right.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use candela::{
    clock::Clock,
    ledger::{
        Ledger, LedgerError, LedgerOptions, Opening, Payer, Policy, Span, Zone,
        book::{Book, Budget, PriceSpec, inspect, transact},
        db::{Db, DbError},
        lease::{Demand, Lease, LeaseLimits},
        rows::{Bill, EndCause},
        thread::LedgerThread,
    },
    price::{Billing, Rates},
    types::{ModelId, NanoUsd, OrgId, RequestId, TenantId},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::sync::oneshot;

pub const MODEL: &str = "m";
/// Nano-USD for a token of input, and of output.
pub const INPUT_NANO: i128 = 1_000;
pub const OUTPUT_NANO: i128 = 2_000;

/// An organisation, its tenants and a price.
pub fn set_up(db: &mut dyn Db, tenants: &[&str]) {
    candela::ledger::schema::migrate(db).expect("migrates");
    let done = transact(db, |book| {
        let org = OrgId::new("acme");
        book.add_org(&org, "Acme")?;
        for tenant in tenants {
            book.add_tenant(&TenantId::new(tenant), &org, tenant, &Policy::default())?;
        }
        book.set_price(&price(MODEL))
    });
    done.expect("sets up");
}

pub fn price(model: &str) -> PriceSpec {
    let rates = Rates {
        input: NanoUsd(INPUT_NANO * 1_000_000),
        cached_input: NanoUsd(0),
        output: NanoUsd(OUTPUT_NANO * 1_000_000),
        request: NanoUsd(0),
        device_second: NanoUsd(0),
    };
    PriceSpec {
        model: ModelId::new(model),
        tenant: None,
        rates,
        billing: Billing::Tokens,
        from_ns: None,
        until_ns: None,
        origin: "file",
    }
}

/// A budget for ever.
pub fn budget(scope: &str, limit: i128) -> Budget {
    Budget {
        scope: scope.to_owned(),
        span: Span::Total,
        zone: Zone::utc(),
        limit: NanoUsd(limit),
        soft_percent: vec![50, 95],
    }
}

pub fn limit(db: &mut dyn Db, scope: &str, limit: i128) {
    transact(db, |book| book.set_budget(&budget(scope, limit))).expect("a budget");
}

pub fn opening(tenant: &str, request: &str, input_tokens: u64) -> Opening {
    Opening {
        request: RequestId::new(request),
        payer: Payer::Tenant(TenantId::new(tenant)),
        model: ModelId::new(MODEL),
        user_label: String::new(),
        metadata: "{}".into(),
        input_tokens,
        choices: 1,
        device_bound_ns: 0,
        cap: None,
        parts: 1,
        idempotency: None,
    }
}

pub fn run<T>(
    db: &mut dyn Db,
    work: impl FnOnce(&mut Book<'_>) -> Result<T, DbError>,
) -> Result<T, DbError> {
    transact(db, work).map(|(value, _)| value)
}

/// Starts a ledger as one of several servers.
pub fn replica(db: Box<dyn Db>, name: &str, ttl: Duration) -> LedgerThread {
    Ledger::start(db, Clock::system(), options(name, ttl), |_| {}).expect("starts")
}

pub fn options(name: &str, ttl: Duration) -> LedgerOptions {
    LedgerOptions {
        replica: name.to_owned(),
        name: name.to_owned(),
        exclusive: false,
        replica_ttl: ttl,
        clock_error_max: ttl / 5,
        lease: LeaseLimits { outstanding_tokens_max: 64, wait_max: Duration::from_secs(2) },
    }
}

pub fn stop(ledger: LedgerThread) {
    ledger.ledger.stop();
    ledger.thread.join().expect("no panic");
}

/// Closes, and waits for the bill.
pub async fn close(lease: Lease, cause: EndCause) -> Option<Bill> {
    let (sender, bill) = oneshot::channel();
    lease.close(cause, move |bill| drop(sender.send(bill)));
    bill.await.expect("an answer")
}

/// What a request came to.
#[derive(Debug)]
pub struct Ran {
    pub cause: EndCause,
    pub delivered: i128,
    pub bill: Option<Bill>,
}

/// Runs a request as the engine does: a token at a time, never more than the lease allows.
pub async fn generate(
    ledger: &Ledger,
    opening: Opening,
    output_tokens: u64,
    seed: u64,
) -> Result<Ran, LedgerError> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut lease = ledger.open(opening.clone()).await?;
    lease.use_input(opening.input_tokens, 0);
    let mut left = output_tokens;
    let cause = loop {
        lease.renew(Demand { sequences: 1, in_flight: 0, left });
        if left == 0 {
            break EndCause::Finished;
        }
        if let Some(cause) = lease.end(0) {
            break cause;
        }
        if lease.affordable() > 0 {
            lease.use_output(1);
            left -= 1;
        }
        tokio::time::sleep(Duration::from_micros(random.random_range(0..2000))).await;
    };
    let delivered = lease.cost().0;
    if random.random_range(0..8) == 0 {
        // The client is gone: nobody waits for the bill.
        drop(lease);
        return Ok(Ran { cause, delivered, bill: None });
    }
    let bill = close(lease, cause).await;
    Ok(Ran { cause, delivered, bill })
}

/// Posted and held of a scope's budget for ever.
pub fn total(db: &mut dyn Db, scope: &str) -> Result<(i64, i64), DbError> {
    let sql = "SELECT posted, held FROM window_total WHERE scope = $1 AND span = 'total'";
    let rows = db.query(sql, &[scope.into()])?;
    rows.first().map_or(Ok((0, 0)), |row| Ok((row.int(0)?, row.int(1)?)))
}

/// Computes every sum again; a budget that was never lowered is not passed either.
pub fn prove(db: &mut dyn Db) {
    let problems = inspect(db, |book| book.verify()).expect("reads");
    assert!(problems.is_empty(), "{problems:#?}");
    let sql = "SELECT window_total.scope, posted, held, limit_nano FROM window_total
        JOIN budget ON budget.scope = window_total.scope AND budget.span = window_total.span
        WHERE posted + held > limit_nano";
    assert_eq!(db.query(sql, &[]).expect("reads"), [], "over the limit");
}

/// Looks at a budget again and again until it is told to stop; returns the most it ever saw.
pub fn watch(
    mut db: Box<dyn Db>,
    scope: &'static str,
    stop: Arc<AtomicBool>,
) -> JoinHandle<(i64, u64)> {
    std::thread::spawn(move || {
        let (mut most, mut looks) = (0, 0);
        while !stop.load(Ordering::SeqCst) {
            match total(&mut *db, scope) {
                Ok((posted, held)) => {
                    most = most.max(posted + held);
                    looks += 1;
                }
                // A lost connection is made anew by a transaction.
                Err(_) => {
                    let _ = db.begin();
                    db.rollback();
                }
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        (most, looks)
    })
}
