//! From the configuration to a running ledger.

use std::{
    fs::{self, File, TryLockError},
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, bail};

use super::reload::set_prices;
use crate::{
    admission::LOCAL,
    clock::Clock,
    config::{Config, LedgerPlace},
    ledger::{
        Event, Ledger, LedgerOptions, Policy, Reader,
        book::{KeySpec, PriceSpec, Role, key_hash, transact},
        db::{Db, Postgres, Sqlite},
        lease::LeaseLimits,
        schema::migrate,
        thread::LedgerThread,
    },
    price::{Billing, Prices, Rates},
    types::{KeyId, ModelId, NanoUsd, OrgId, TenantId},
};

/// The ledger's file in the data directory.
pub const FILE: &str = "ledger.sqlite";
/// Held by the server that uses the file.
const LOCK: &str = "server.lock";
/// The key of the configuration, in the ledger.
const CONFIGURED_KEY: &str = "configured";
const REPLICA_TTL: Duration = Duration::from_secs(10);
const CLOCK_ERROR_MAX: Duration = Duration::from_secs(2);
/// How long a sequence without money sits out.
const LEASE_WAIT_MAX: Duration = Duration::from_secs(5);

/// A running ledger, and what keeps other servers off its file.
pub struct OpenLedger {
    pub thread: LedgerThread,
    pub reader: Reader,
    _lock: Option<File>,
}

/// Opens the database, sets up what a server needs in it, and starts the thread.
pub fn open(config: &Config, model: &ModelId, prices: Option<Prices>) -> Result<OpenLedger> {
    let clock = Clock::system();
    let lock = match &config.ledger {
        LedgerPlace::Directory(dir) => Some(lock(dir)?),
        LedgerPlace::Postgres(_) => None,
    };
    let mut db = open_db(&config.ledger)?;
    migrate(&mut *db)?;
    set_up(&mut *db, config, model, prices)?;
    let options = LedgerOptions {
        replica: format!("server-{}", uuid::Uuid::now_v7().simple()),
        name: format!("{}:{}", config.host, config.port),
        exclusive: lock.is_some(),
        replica_ttl: REPLICA_TTL,
        clock_error_max: CLOCK_ERROR_MAX,
        lease: LeaseLimits {
            outstanding_tokens_max: config.lease_outstanding_tokens_max as u64,
            wait_max: LEASE_WAIT_MAX,
        },
    };
    let thread = Ledger::start(db, clock, options, say)?;
    if let Some(retention) = config.retention {
        thread.ledger.retain(retention);
    }
    let reader = Reader::new(open_db(&config.ledger)?);
    Ok(OpenLedger { thread, reader, _lock: lock })
}

/// A connection to a ledger, which is made if it is not there.
pub fn open_db(place: &LedgerPlace) -> Result<Box<dyn Db>> {
    match place {
        LedgerPlace::Directory(dir) => open_file(dir, Clock::system()),
        LedgerPlace::Postgres(url) => {
            Ok(Box::new(Postgres::connect(url.reveal(), Clock::system())?))
        }
    }
}

/// The file of a data directory, which is made if it is not there.
pub fn open_file(dir: &Path, clock: Clock) -> Result<Box<dyn Db>> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(Box::new(Sqlite::open(&dir.join(FILE), clock)?))
}

/// Keeps servers off the file of a data directory, or says that one is there.
pub fn lock(dir: &Path) -> Result<File> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let path = dir.join(LOCK);
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!(
            "another candela serves from {}: stop it, or give this one its own --data-dir; \
             several servers on one budget need PostgreSQL (--ledger)",
            dir.display()
        ),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// What has to be there: the local tenant, the configured key, a price.
fn set_up(db: &mut dyn Db, config: &Config, model: &ModelId, prices: Option<Prices>) -> Result<()> {
    transact(db, |book| {
        let (org, local) = (OrgId::new(LOCAL), TenantId::new(LOCAL));
        book.add_org(&org, "this server")?;
        book.add_tenant(&local, &org, "without a key", &Policy::default())?;
        if let Some(secret) = &config.api_key {
            let hash = key_hash(secret.reveal());
            if book.find_key(&hash)?.is_none() {
                book.replace_key(&KeySpec {
                    id: KeyId::new(CONFIGURED_KEY),
                    tenant: local.clone(),
                    hash,
                    name: "of the configuration".into(),
                    role: Role::Admin,
                    policy: Policy::default(),
                    expires_ns: None,
                })?;
            }
        }
        set_prices(book, &config.prices)?;
        if book.terms(&local, model)?.is_none() {
            let price = first_price(model, prices, &local);
            book.set_price(&price)?;
        }
        Ok(())
    })?;
    Ok(())
}

/// The price of a model's manifest; without one, the local tenant alone may use it, for nothing.
fn first_price(model: &ModelId, prices: Option<Prices>, local: &TenantId) -> PriceSpec {
    let zero = NanoUsd(0);
    let price = PriceSpec {
        model: model.clone(),
        tenant: None,
        rates: Rates::default(),
        billing: Billing::Tokens,
        from_ns: None,
        until_ns: None,
        origin: "manifest",
    };
    match prices {
        Some(Prices { input, cached_input, output }) => {
            let rates = Rates { input, cached_input, output, request: zero, device_second: zero };
            PriceSpec { rates, ..price }
        }
        None => {
            tracing::warn!(
                model = %model,
                "no price: use without a key costs nothing, keys are refused until `candela price set`"
            );
            PriceSpec { tenant: Some(local.clone()), origin: "quick start", ..price }
        }
    }
}

/// Events of the ledger, as log lines.
fn say(event: &Event) {
    tracing::warn!(kind = event.kind.name(), scope = event.scope, "{}", event.detail);
}
