//! One file per op of the forward.

pub mod step_inputs;

pub use step_inputs::StepInputs;
