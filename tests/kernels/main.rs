//! The CUDA kernels of `kernels/`, compiled as C++ and run on the CPU under AddressSanitizer, against
//! slow references in f64.

mod cache;
mod draws;
mod emulator;
mod gemv;
mod harness;
mod logprobs;
mod matrix;
mod rows;
mod sampling;
mod values;
