//! Commands on the ledger: one file per subcommand. They do what REST does, on the ledger of a data
//! directory or on a server.

mod audit;
mod budget;
mod credit;
mod explain;
mod key;
mod limit;
mod org;
mod policy;
mod price;
mod refund;
mod scope;
mod table;
mod target;
mod tenant;
mod times;
mod usage;

pub use audit::{AuditArgs, EventsArgs, audit, events};
pub use budget::{BudgetCommand, budget};
pub use credit::{CreditArgs, credit};
pub use explain::{ExplainArgs, explain};
pub use key::{KeyCommand, key};
pub use limit::{LimitCommand, limit};
pub use org::{OrgCommand, org};
pub use price::{PriceCommand, price};
pub use refund::{RefundArgs, refund};
pub use tenant::{TenantCommand, tenant};
pub use usage::{UsageArgs, usage};
