//! Tables, one migration a version. A migration that has shipped never changes.

use super::db::{Db, DbError, Val};

/// `meta.schema` after all migrations.
pub const SCHEMA_VERSION: i64 = MIGRATIONS.len() as i64;

/// Amounts are nano-USD, times nanoseconds since 1970 (`_ns`) or seconds (`_s`), all BIGINT. A scope
/// is `global`, `org:ID`, `tenant:ID` or `key:ID`.
const MIGRATIONS: &[&str] = &[
    "
CREATE TABLE org (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, created_ns BIGINT NOT NULL
);
CREATE TABLE tenant (
    id TEXT PRIMARY KEY, org_id TEXT NOT NULL REFERENCES org (id), name TEXT NOT NULL,
    settings TEXT NOT NULL, created_ns BIGINT NOT NULL
);
CREATE TABLE api_key (
    id TEXT PRIMARY KEY, tenant_id TEXT NOT NULL REFERENCES tenant (id), hash BYTEA NOT NULL UNIQUE,
    name TEXT NOT NULL, role TEXT NOT NULL, settings TEXT NOT NULL, created_ns BIGINT NOT NULL,
    expires_ns BIGINT, revoked_ns BIGINT
);
CREATE INDEX api_key_tenant ON api_key (tenant_id);
CREATE TABLE budget (
    scope TEXT NOT NULL, span TEXT NOT NULL, zone TEXT NOT NULL, limit_nano BIGINT NOT NULL,
    soft TEXT NOT NULL, created_ns BIGINT NOT NULL, PRIMARY KEY (scope, span)
);
CREATE TABLE window_total (
    scope TEXT NOT NULL, span TEXT NOT NULL, start_s BIGINT NOT NULL, posted BIGINT NOT NULL,
    held BIGINT NOT NULL, fired BIGINT NOT NULL, PRIMARY KEY (scope, span, start_s)
);
CREATE TABLE rate_limit (
    scope TEXT PRIMARY KEY, requests_per_minute BIGINT, tokens_per_minute BIGINT,
    sequences_max BIGINT, requests_free_ns BIGINT NOT NULL, tokens_free_ns BIGINT NOT NULL,
    sequences BIGINT NOT NULL
);
CREATE TABLE price (
    version BIGINT PRIMARY KEY, tenant_id TEXT NOT NULL, model TEXT NOT NULL,
    from_ns BIGINT NOT NULL, until_ns BIGINT, input BIGINT NOT NULL, cached_input BIGINT NOT NULL,
    output BIGINT NOT NULL, request BIGINT NOT NULL, device_second BIGINT NOT NULL,
    billing TEXT NOT NULL, origin TEXT NOT NULL, created_ns BIGINT NOT NULL
);
CREATE INDEX price_model ON price (model, tenant_id, from_ns);
CREATE TABLE request (
    id TEXT PRIMARY KEY, org_id TEXT NOT NULL, tenant_id TEXT NOT NULL, key_id TEXT NOT NULL,
    model TEXT NOT NULL, user_label TEXT NOT NULL, metadata TEXT NOT NULL,
    price_version BIGINT NOT NULL, choices BIGINT NOT NULL, replica TEXT NOT NULL,
    state TEXT NOT NULL, opened_ns BIGINT NOT NULL, closed_ns BIGINT,
    granted BIGINT NOT NULL, posted BIGINT NOT NULL,
    uncached_input BIGINT NOT NULL, cached_input BIGINT NOT NULL, output BIGINT NOT NULL,
    device_ns BIGINT NOT NULL, billable_device_ns BIGINT NOT NULL,
    token_cost BIGINT NOT NULL, device_cost BIGINT NOT NULL,
    energy_uj BIGINT, leases BIGINT NOT NULL, steps BIGINT NOT NULL, end_cause TEXT NOT NULL,
    unrecorded_max BIGINT NOT NULL
);
CREATE INDEX request_open ON request (replica) WHERE state = 'open';
CREATE INDEX request_key_open ON request (key_id) WHERE state = 'open';
CREATE INDEX request_closed ON request (closed_ns);
CREATE INDEX request_tenant ON request (tenant_id, closed_ns);
CREATE TABLE lease (
    request_id TEXT NOT NULL REFERENCES request (id), number BIGINT NOT NULL,
    granted_ns BIGINT NOT NULL, amount BIGINT NOT NULL, posted BIGINT NOT NULL,
    PRIMARY KEY (request_id, number)
);
CREATE TABLE account (
    id TEXT PRIMARY KEY, debits BIGINT NOT NULL, credits BIGINT NOT NULL
);
CREATE TABLE transfer (
    id BIGINT PRIMARY KEY, at_ns BIGINT NOT NULL, window_ns BIGINT NOT NULL, kind TEXT NOT NULL,
    debit TEXT NOT NULL, credit TEXT NOT NULL, amount BIGINT NOT NULL, request_id TEXT NOT NULL,
    org_id TEXT NOT NULL, tenant_id TEXT NOT NULL, key_id TEXT NOT NULL, memo TEXT NOT NULL
);
CREATE INDEX transfer_tenant ON transfer (tenant_id, window_ns);
CREATE INDEX transfer_window ON transfer (window_ns);
CREATE INDEX transfer_request ON transfer (request_id);
CREATE TABLE idempotency (
    tenant_id TEXT NOT NULL, name TEXT NOT NULL, body_hash BYTEA NOT NULL, request_id TEXT NOT NULL,
    created_ns BIGINT NOT NULL, PRIMARY KEY (tenant_id, name)
);
CREATE INDEX idempotency_request ON idempotency (request_id);
CREATE TABLE replica (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, expires_ns BIGINT NOT NULL
);
CREATE TABLE audit (
    id BIGINT PRIMARY KEY, at_ns BIGINT NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL,
    target TEXT NOT NULL, old_value TEXT NOT NULL, new_value TEXT NOT NULL
);
CREATE TABLE event (
    id BIGINT PRIMARY KEY, at_ns BIGINT NOT NULL, kind TEXT NOT NULL, scope TEXT NOT NULL,
    detail TEXT NOT NULL
);
",
    "
ALTER TABLE request ADD COLUMN energy_estimated_uj BIGINT;
",
    "
CREATE TABLE usage_day (
    day_ns BIGINT NOT NULL, org_id TEXT NOT NULL, tenant_id TEXT NOT NULL, key_id TEXT NOT NULL,
    model TEXT NOT NULL, user_label TEXT NOT NULL, requests BIGINT NOT NULL,
    uncached_input BIGINT NOT NULL, cached_input BIGINT NOT NULL, output BIGINT NOT NULL,
    device_ns BIGINT NOT NULL, billable_device_ns BIGINT NOT NULL, posted BIGINT NOT NULL,
    token_cost BIGINT NOT NULL, device_cost BIGINT NOT NULL, energy_uj BIGINT NOT NULL,
    energy_estimated_uj BIGINT NOT NULL, steps BIGINT NOT NULL, unrecorded_max BIGINT NOT NULL,
    PRIMARY KEY (day_ns, org_id, tenant_id, key_id, model, user_label)
);
CREATE TABLE transfer_day (
    day_ns BIGINT NOT NULL, kind TEXT NOT NULL, debit TEXT NOT NULL, credit TEXT NOT NULL,
    org_id TEXT NOT NULL, tenant_id TEXT NOT NULL, key_id TEXT NOT NULL, model TEXT NOT NULL,
    user_label TEXT NOT NULL, amount BIGINT NOT NULL, entries BIGINT NOT NULL,
    PRIMARY KEY (day_ns, kind, debit, credit, org_id, tenant_id, key_id, model, user_label)
);
CREATE TABLE rolling (request_id TEXT PRIMARY KEY);
",
];

/// Counters of `meta`: the last id given out, and the latest time seen.
pub const COUNTERS: [&str; 6] = ["transfer", "price", "audit", "event", "revision", "clock"];

/// Brings a database to [`SCHEMA_VERSION`]; refuses one from a newer program.
pub fn migrate(db: &mut dyn Db) -> Result<(), DbError> {
    // Within the transaction, for servers that start at the same time take their turns in it.
    db.begin()?;
    let moved = steps(db);
    match moved {
        Ok(()) => db.commit(),
        Err(error) => {
            db.rollback();
            Err(error)
        }
    }
}

/// The version of a database; 0 before its first migration.
pub fn version(db: &mut dyn Db) -> Result<i64, DbError> {
    let found = db.query("SELECT value FROM meta WHERE name = 'schema'", &[])?;
    found.first().map_or(Ok(0), |row| row.int(0))
}

fn steps(db: &mut dyn Db) -> Result<(), DbError> {
    db.batch("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BIGINT NOT NULL)")?;
    let version = version(db)?;
    if !(0..=SCHEMA_VERSION).contains(&version) {
        return Err(DbError::Unusable(format!(
            "the ledger has schema version {version}, this candela knows {SCHEMA_VERSION}: \
             upgrade candela, or restore a backup made with this version"
        )));
    }
    for migration in &MIGRATIONS[version as usize..] {
        db.batch(migration)?;
    }
    if version == 0 {
        for counter in COUNTERS {
            let sql = "INSERT INTO meta (name, value) VALUES ($1, 0)";
            db.execute(sql, &[counter.into()])?;
        }
    }
    if version < SCHEMA_VERSION {
        let sql = "INSERT INTO meta (name, value) VALUES ('schema', $1)
            ON CONFLICT (name) DO UPDATE SET value = excluded.value";
        db.execute(sql, &[Val::Int(SCHEMA_VERSION)])?;
    }
    Ok(())
}
