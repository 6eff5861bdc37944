//! What operators do: declared once, for REST and for the command line.
//!
//! A [`Route`] is one operation with its path, the least role that may ask for it, its fields and its
//! work. [`ROUTES`] is all of them; the server mounts nothing else below `/admin/v1`, and the command
//! line runs the same work on the ledger of a data directory.
//!
//! Operations refuse before they write: a refusal rolls nothing back, since others share its
//! transaction.

mod budgets;
mod call;
mod feeds;
mod field;
mod keys;
mod limits;
mod money;
mod orgs;
mod policy;
mod prices;
mod requests;
mod tenants;
mod usage;
mod view;

pub use budgets::{BUDGET_DELETE, BUDGET_SET, BUDGETS};
pub use call::{AdminError, Authority, Call, Fresh, Route, Verb, Work};
pub use feeds::{AUDIT, EVENTS};
pub use field::{Field, Given, Kind};
pub use keys::{KEY_CHANGE, KEY_CREATE, KEY_GET, KEY_REVOKE, KEY_ROTATE, KEYS};
pub use limits::{LIMIT_DELETE, LIMIT_SET, LIMITS};
pub use money::{CREDIT, REFUND};
pub use orgs::{ORG_CREATE, ORGS};
pub use prices::{GPUS, PRICE_SET, PRICES, set_from_file};
pub use requests::{EXPLAIN, REQUESTS};
pub use tenants::{TENANT_CHANGE, TENANT_CREATE, TENANT_GET, TENANTS};
pub use usage::{COSTS, USAGE};

/// Every operation.
pub const ROUTES: [&Route; 29] = [
    &ORGS,
    &ORG_CREATE,
    &TENANTS,
    &TENANT_CREATE,
    &TENANT_GET,
    &TENANT_CHANGE,
    &KEYS,
    &KEY_CREATE,
    &KEY_GET,
    &KEY_CHANGE,
    &KEY_REVOKE,
    &KEY_ROTATE,
    &BUDGETS,
    &BUDGET_SET,
    &BUDGET_DELETE,
    &LIMITS,
    &LIMIT_SET,
    &LIMIT_DELETE,
    &PRICES,
    &PRICE_SET,
    &GPUS,
    &CREDIT,
    &REFUND,
    &EVENTS,
    &AUDIT,
    &REQUESTS,
    &EXPLAIN,
    &USAGE,
    &COSTS,
];
