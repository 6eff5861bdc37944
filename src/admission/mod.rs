//! Who may enter: from an API key to who pays.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use crate::{
    clock::Clock,
    ledger::{
        Ledger, LedgerError, Payer,
        book::{KnownKey, Role, key_hash},
    },
    types::TenantId,
};

/// How long an answer of the ledger is believed. Admission itself asks the ledger again in the same
/// transaction as the hold, so a revoked key is never charged; other routes may see it this long.
const BELIEVED: Duration = Duration::from_secs(1);
/// Keys remembered at once.
const REMEMBERED_MAX: usize = 100_000;

/// Who is let in without a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anonymous {
    /// Nobody.
    Never,
    /// Anyone, until the first key is made: the quick start on one's own machine.
    UntilFirstKey,
    /// Anyone, always; they pay as the local tenant.
    Always,
}

/// Someone who was let in.
#[derive(Clone, Debug, PartialEq)]
pub struct Caller {
    pub payer: Payer,
    pub tenant: TenantId,
    pub role: Role,
}

/// Why someone was not.
#[derive(Debug)]
pub enum Denied {
    Key,
    Ledger(LedgerError),
}

/// The tenant that pays without a key.
pub const LOCAL: &str = "local";

/// Finds out who calls.
pub struct Door {
    ledger: Ledger,
    clock: Clock,
    anonymous: Anonymous,
    seen: Mutex<Seen>,
}

/// What the ledger said lately, by the hash of the whole key.
#[derive(Default)]
struct Seen {
    keys: HashMap<[u8; 32], (Option<KnownKey>, u64)>,
    has_keys: Option<(bool, u64)>,
}

impl Door {
    pub fn new(ledger: Ledger, clock: Clock, anonymous: Anonymous) -> Self {
        Self { ledger, clock, anonymous, seen: Mutex::default() }
    }

    /// `bearer` is what the caller sent, if anything.
    pub async fn identify(&self, bearer: Option<&str>) -> Result<Caller, Denied> {
        if let Some(secret) = bearer.filter(|secret| !secret.is_empty())
            && let Some(key) = self.key(key_hash(secret)).await.map_err(Denied::Ledger)?
        {
            // A key that has ended is refused even where none is needed.
            let valid = key.ends_ns.is_none_or(|ends_ns| ends_ns > self.clock.unix_ns());
            let caller = Caller { payer: Payer::Key(key.id), tenant: key.tenant, role: key.role };
            return if valid { Ok(caller) } else { Err(Denied::Key) };
        }
        let role = match self.anonymous {
            Anonymous::Never => return Err(Denied::Key),
            Anonymous::Always => Role::Tenant,
            Anonymous::UntilFirstKey if self.has_keys().await.map_err(Denied::Ledger)? => {
                return Err(Denied::Key);
            }
            Anonymous::UntilFirstKey => Role::Admin,
        };
        let tenant = TenantId::new(LOCAL);
        Ok(Caller { payer: Payer::Tenant(tenant.clone()), tenant, role })
    }

    async fn key(&self, hash: [u8; 32]) -> Result<Option<KnownKey>, LedgerError> {
        let now_ns = self.clock.now_ns();
        if let Some((key, until_ns)) = self.seen().keys.get(&hash)
            && now_ns < *until_ns
        {
            return Ok(key.clone());
        }
        let found = self.ledger.run(move |book| book.find_key(&hash)).await?;
        let mut seen = self.seen();
        if seen.keys.len() >= REMEMBERED_MAX {
            seen.keys.retain(|_, (_, until_ns)| now_ns < *until_ns);
        }
        if seen.keys.len() < REMEMBERED_MAX {
            seen.keys.insert(hash, (found.clone(), now_ns + BELIEVED.as_nanos() as u64));
        }
        Ok(found)
    }

    async fn has_keys(&self) -> Result<bool, LedgerError> {
        let now_ns = self.clock.now_ns();
        if let Some((has_keys, until_ns)) = self.seen().has_keys
            && now_ns < until_ns
        {
            return Ok(has_keys);
        }
        let found = self.ledger.run(|book| book.has_keys()).await?;
        self.seen().has_keys = Some((found, now_ns + BELIEVED.as_nanos() as u64));
        Ok(found)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
