//! Shared by the tests that need real weights.

#[allow(dead_code, reason = "not every test keeps books")]
pub mod books;
#[allow(dead_code, reason = "not every test wants a hub")]
pub mod hub;
#[allow(dead_code, reason = "not every test makes models")]
pub mod model_files;
#[allow(dead_code, reason = "not every test wants a database server")]
pub mod postgres;
#[allow(dead_code, reason = "not every test breaks a database")]
pub mod rig;
#[allow(dead_code, reason = "not every test wants a server")]
pub mod server;
#[allow(dead_code, reason = "not every test wants a model of no size")]
pub mod tiny;

use std::path::{Path, PathBuf};

use candela::registry::{
    BarProgress, DEFAULT_MODEL, ModelSource, Registry, RegistryOptions, ResolvedModel,
};

/// The default model's file, downloaded once for all tests of this build directory.
#[allow(dead_code, reason = "not every test wants weights")]
pub fn default_model() -> PathBuf {
    gguf(resolve_default())
}

#[allow(dead_code, reason = "not every test wants weights")]
pub fn resolve_default() -> ResolvedModel {
    resolve(DEFAULT_MODEL)
}

/// A model of the built-in manifests, downloaded once for all tests of this build directory.
#[allow(dead_code, reason = "not every test wants weights")]
pub fn resolve(model: &str) -> ResolvedModel {
    let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let cache_dir = tmp.parent().unwrap_or(tmp).join("candela-test-models");
    let options = RegistryOptions { cache_dir, ..RegistryOptions::default() };
    let registry = Registry::new(options).expect("built-in manifests");
    registry.resolve(model, &BarProgress::default()).expect(model)
}

#[allow(dead_code, reason = "not every test wants weights")]
pub fn gguf(model: ResolvedModel) -> PathBuf {
    match model.source {
        ModelSource::Gguf { path } => path,
        ModelSource::Dir { .. } => panic!("{} is a .gguf file", model.id),
    }
}
