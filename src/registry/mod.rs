//! Model ids and paths to verified files on disk.

mod checked;
mod error;
mod hub;
mod local;
mod manifest;
mod package;
mod progress;
mod sink;
mod snapshot;
mod store;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

pub use error::RegistryError;
pub use manifest::{Manifest, Source};
pub use progress::{BarProgress, NoProgress, Progress};

use crate::price::Prices;

/// What is served when nothing is named.
pub const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

const BUILT_IN: [(&str, &str); 2] = [
    ("models/smollm2-135m-instruct.toml", include_str!("../../models/smollm2-135m-instruct.toml")),
    (
        "models/qwen2.5-coder-1.5b-instruct.toml",
        include_str!("../../models/qwen2.5-coder-1.5b-instruct.toml"),
    ),
];

#[derive(Clone, Default)]
pub struct RegistryOptions {
    pub cache_dir: PathBuf,
    /// More manifests (`*.toml`); one with the id of a built-in manifest replaces it.
    pub manifests_dir: Option<PathBuf>,
    /// Use only what is on this machine. `HF_HUB_OFFLINE=1` does the same for the hub alone.
    pub offline: bool,
    pub hf_token: Option<String>,
    pub hf_endpoint: Option<String>,
    /// Weights need not be there: they are made up.
    pub without_weights: bool,
    /// The pip command line; when empty, the first of the usual ones that is installed.
    pub pip: String,
}

/// Knows the manifests and turns what a user calls a model into files.
pub struct Registry {
    options: RegistryOptions,
    manifests: BTreeMap<String, Manifest>,
}

/// Where the parts of a model are; everything named exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    Gguf {
        path: PathBuf,
    },
    Dir {
        config: PathBuf,
        tokenizer: PathBuf,
        tokenizer_config: Option<PathBuf>,
        chat_template: Option<PathBuf>,
        generation_config: Option<PathBuf>,
        shards: Vec<PathBuf>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedModel {
    /// The name it is served under unless the operator gives another.
    pub id: String,
    /// The manifest's revision, the hub's commit, or `local`.
    pub revision: String,
    pub source: ModelSource,
    /// The manifest's; a model from elsewhere has none until the operator sets them.
    pub prices: Option<Prices>,
    pub notes: String,
}

impl Registry {
    pub fn new(options: RegistryOptions) -> Result<Self, RegistryError> {
        let mut manifests = BTreeMap::new();
        for (file, text) in BUILT_IN {
            let manifest = Manifest::parse(file, text)?;
            manifests.insert(manifest.id.clone(), manifest);
        }
        if let Some(dir) = &options.manifests_dir {
            for manifest in read_manifests(dir)? {
                manifests.insert(manifest.id.clone(), manifest);
            }
        }
        Ok(Self { options, manifests })
    }

    /// The known manifests, by id.
    pub fn list(&self) -> impl Iterator<Item = &Manifest> {
        self.manifests.values()
    }

    /// Finds `model`: the id of a manifest, a path to a directory or .gguf file, or a hub id
    /// `org/name[@revision]`; fetches what is not on this machine yet. Blocks.
    pub fn resolve(
        &self,
        model: &str,
        progress: &dyn Progress,
    ) -> Result<ResolvedModel, RegistryError> {
        if let Some(manifest) = self.manifests.get(model) {
            let path = store::obtain(self, manifest, progress)?;
            return Ok(ResolvedModel {
                id: manifest.id.clone(),
                revision: manifest.revision.clone(),
                source: ModelSource::Gguf { path },
                prices: manifest.prices,
                notes: manifest.notes.clone(),
            });
        }
        let path = Path::new(model);
        if path.exists() || model.starts_with(['.', '/']) || model.ends_with(".gguf") {
            return resolve_path(path, self.options.without_weights);
        }
        let (repo, revision) = match model.split_once('@') {
            Some((repo, revision)) => (repo, Some(revision)),
            None => (model, None),
        };
        match manifest::split_repo(repo) {
            Some(parts) => self.resolve_hub(repo, parts, revision, progress),
            None => {
                let known = self.manifests.keys().cloned().collect::<Vec<_>>().join(", ");
                Err(RegistryError::Unknown { model: model.to_string(), known })
            }
        }
    }

    fn resolve_hub(
        &self,
        repo: &str,
        parts: (&str, &str),
        revision: Option<&str>,
        progress: &dyn Progress,
    ) -> Result<ResolvedModel, RegistryError> {
        progress.start(repo, None);
        let fetched =
            snapshot::fetch(&self.options, parts, revision, self.is_hub_offline(), progress);
        progress.finish();
        let dir = fetched?;
        let commit = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let source = local::open(&dir, self.options.without_weights)?;
        let (id, notes) = (repo.to_string(), String::new());
        Ok(ResolvedModel { id, revision: commit, source, prices: None, notes })
    }

    fn is_hub_offline(&self) -> bool {
        let set = |value: String| {
            matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on")
        };
        self.options.offline || std::env::var("HF_HUB_OFFLINE").is_ok_and(set)
    }
}

fn resolve_path(path: &Path, without_weights: bool) -> Result<ResolvedModel, RegistryError> {
    let source = local::open(path, without_weights)?;
    // `.` has no name of its own.
    let full = fs::canonicalize(path)
        .map_err(|source| RegistryError::Io { path: path.to_path_buf(), source })?;
    let named = match &source {
        ModelSource::Gguf { .. } => path.file_stem(),
        ModelSource::Dir { .. } => full.file_name(),
    };
    let id = named.unwrap_or_default().to_string_lossy().into_owned();
    let (revision, notes) = ("local".to_string(), String::new());
    Ok(ResolvedModel { id, revision, source, prices: None, notes })
}

fn read_manifests(dir: &Path) -> Result<Vec<Manifest>, RegistryError> {
    let io = |path: &Path, source| RegistryError::Io { path: path.to_path_buf(), source };
    let mut manifests = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| io(dir, e))? {
        let path = entry.map_err(|e| io(dir, e))?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            let text = fs::read_to_string(&path).map_err(|e| io(&path, e))?;
            manifests.push(Manifest::parse(&path.display().to_string(), &text)?);
        }
    }
    Ok(manifests)
}
