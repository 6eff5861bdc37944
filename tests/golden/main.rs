//! Right answers: logits, tokens and text against those of Hugging Face transformers and llama.cpp
//! that the files of `tests/reference` hold.

#[path = "../common/mod.rs"]
mod common;
mod families;
mod gguf_files;
mod real;
mod runner;
