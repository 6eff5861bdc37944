//! Who runs in the next step. Pure: no tensors, no clock, no I/O.
//!
//! First come, first served: the waiting set is ordered by one key, [`WaitKey`], and a sequence
//! that loses its blocks goes back to the place it came from.

mod fcfs;
mod plan;
mod sequence;

pub use fcfs::Scheduler;
pub use plan::{Admission, Limits, PlannedSeq, SampleTarget, StepPlan};
pub use sequence::{SeqSpec, Sequence, WaitKey};
