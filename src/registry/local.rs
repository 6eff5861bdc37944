//! Models that lie on this machine: a .gguf file, or a directory as the hub lays it out.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{ModelSource, RegistryError, manifest::is_plain_name};

/// An index is a few hundred kilobytes even for the largest models.
const INDEX_BYTES_MAX: u64 = 64 << 20;

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

/// The parts of the model at `path`; what is missing is named.
pub(super) fn open(path: &Path, without_weights: bool) -> Result<ModelSource, RegistryError> {
    let metadata = fs::metadata(path)
        .map_err(|source| RegistryError::Io { path: path.to_path_buf(), source })?;
    if metadata.is_dir() {
        return open_dir(path, without_weights);
    }
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
        return Ok(ModelSource::Gguf { path: path.to_path_buf() });
    }
    let reason = "neither a model directory nor a .gguf file".to_string();
    Err(RegistryError::Invalid { path: path.to_path_buf(), reason })
}

fn open_dir(dir: &Path, without_weights: bool) -> Result<ModelSource, RegistryError> {
    let optional = |name: &str| Some(dir.join(name)).filter(|path| path.is_file());
    let shards = match optional("model.safetensors.index.json") {
        _ if without_weights => Vec::new(),
        Some(index) => shards(dir, &index)?,
        None => vec![dir.join("model.safetensors")],
    };
    let config = dir.join("config.json");
    let tokenizer = dir.join("tokenizer.json");
    let missing: Vec<String> = [&config, &tokenizer]
        .into_iter()
        .chain(&shards)
        .filter(|path| !path.is_file())
        .map(|path| path.file_name().unwrap_or_default().to_string_lossy().into_owned())
        .collect();
    if !missing.is_empty() {
        return Err(RegistryError::Missing { dir: dir.to_path_buf(), missing });
    }
    Ok(ModelSource::Dir {
        config,
        tokenizer,
        tokenizer_config: optional("tokenizer_config.json"),
        chat_template: optional("chat_template.jinja"),
        generation_config: optional("generation_config.json"),
        shards,
    })
}

/// The shard files that the index names, each once, in the order of their names.
fn shards(dir: &Path, index: &Path) -> Result<Vec<PathBuf>, RegistryError> {
    let invalid = |reason: String| RegistryError::Invalid { path: index.to_path_buf(), reason };
    let size = fs::metadata(index).map_err(|e| invalid(e.to_string()))?.len();
    if size > INDEX_BYTES_MAX {
        return Err(invalid(format!("{size} bytes, at most {INDEX_BYTES_MAX} are read")));
    }
    let text = fs::read_to_string(index).map_err(|e| invalid(e.to_string()))?;
    let parsed: ShardIndex = serde_json::from_str(&text).map_err(|e| invalid(e.to_string()))?;
    let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
    if names.is_empty() {
        return Err(invalid("weight_map names no file".to_string()));
    }
    if let Some(bad) = names.iter().find(|name| !is_plain_name(name)) {
        return Err(invalid(format!("{bad:?} is not a plain file name")));
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}
