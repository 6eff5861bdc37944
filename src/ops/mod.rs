//! One file per op of the forward.

pub mod pool;
pub mod step_inputs;
pub mod view;

pub use pool::CpuPool;
pub use step_inputs::StepInputs;
pub use view::View;
