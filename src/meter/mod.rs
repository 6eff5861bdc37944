//! Time and energy: who used the device, to the nanosecond and microjoule, with nothing lost.
//!
//! Pure: no clock, no I/O, no tensors. The engine tells what ran and how long it took.
//!
//! **A step** takes, by the model of one (model, device) pair,
//!
//! ```text
//! step_ns = fixed + a * new_tokens + b * decode_kv_tokens + c * prefill_qk_pairs
//! ```
//!
//! coefficients in nanoseconds, none negative: `fixed` is the weights read once and the launches,
//! `a` the arithmetic of a row, `b` the reading of one cached K and V, `c` one query row against one
//! key row. [`StepModel`] learns them from timed steps at start-up (Huber-weighted non-negative least
//! squares on relative errors) and from every step after (recursive least squares with a ridge
//! towards the calibration), and gives an upper bound with a stated coverage (split conformal
//! prediction). Before calibration [`Coefficients::roofline`] serves.
//!
//! **A split** divides the measured time of a step over its sequences in proportion to
//!
//! ```text
//! w_i = fixed / n + a * new_i + b * kv_i + c * qk_i
//! ```
//!
//! by the largest remainder method, so that the parts are integers and sum to the time measured.
//! The model decides shares only; what is shared out is what the clock said.
//!
//! **An account** keeps a device's last minutes in a ring of windows. In every window
//!
//! ```text
//! owners + other owners + overhead (recompute, discarded, warm-up, padding) + foreign + idle = wall time
//! ```
//!
//! to the nanosecond: idle is the remainder, and foreign, which is sampled, takes from idle alone.
//! Energy comes in as a running total, in microjoules, and is settled by window once a reading
//! covers it: `idle_power * idle_time` to idle (at most idle's share of the time), the rest by
//! device time, again by largest remainder. The settled rows of a window sum to what the device drew
//! in it. Energy of time that is not settled yet is estimated at the powers seen lately and marked
//! so, as is that of gaps and counter resets.

mod account;
mod apportion;
mod calibration;
mod claims;
mod coefficients;
mod energy;
mod least_squares;
mod load;
mod report;
mod residuals;
mod split;
mod step_model;
mod usage;
mod window;

pub use account::{Account, AccountLimits, DeviceStep, StepPiece};
pub use calibration::{CALIBRATION_SAMPLES_MIN, CalibrateError, Sample};
pub use claims::{Claims, Settled};
pub use coefficients::{BadCoefficient, Coefficients, DeviceRates, ModelShape};
pub use energy::{EnergyClaim, EnergyReading};
pub use load::{Load, SeqWork, StepWork};
pub use report::{By, Report};
pub use residuals::BOUND_SHARE;
pub use split::{SeqShare, Split, split};
pub use step_model::{StepBound, StepModel};
pub use usage::{Energy, Overhead, Owner, Tokens, Usage};
