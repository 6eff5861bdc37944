//! The CUDA kernels of `kernels/`, compiled as C++ and run on the CPU under AddressSanitizer, against
//! slow references in f64.

mod attention;
mod attention_decode;
mod attention_prefill;
mod cache;
#[path = "../common/mod.rs"]
mod common;
mod device;
mod draws;
mod emulator;
mod forward;
mod gemv;
mod gpu;
mod harness;
mod logprobs;
mod matrix;
mod memory;
mod plan;
mod rows;
mod sampling;
mod values;
