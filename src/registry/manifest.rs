//! What a manifest file says, checked before anything is fetched.

use std::path::PathBuf;

use serde::Deserialize;

use super::RegistryError;
use crate::price::{Prices, usd};

/// A model is at most this many packages.
const PARTS_MAX: usize = 1000;

/// One model file with its checksum and where to get it, in order of preference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    pub id: String,
    pub name: String,
    pub revision: String,
    pub file: String,
    /// Lower-case hex.
    pub sha256: String,
    pub size_bytes: u64,
    pub notes: String,
    pub prices: Option<Prices>,
    pub sources: Vec<Source>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Source {
    /// A file already on this machine, used in place.
    Path {
        path: PathBuf,
    },
    Hub {
        repo: String,
        file: String,
        revision: String,
    },
    /// Members of Python packages, one of each, joined in order.
    Package {
        packages: Vec<String>,
        members: Vec<String>,
        /// With one package and one member: how often to repeat them with `{n}` and `{nn}`.
        parts: Option<usize>,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawManifest {
    id: String,
    name: String,
    revision: String,
    file: String,
    sha256: String,
    size_bytes: u64,
    #[serde(default)]
    notes: String,
    prices: Option<RawPrices>,
    sources: Vec<Source>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPrices {
    input: String,
    cached_input: String,
    output: String,
}

impl Manifest {
    /// Parses and checks a manifest; `file` names it in errors.
    pub fn parse(file: &str, text: &str) -> Result<Self, RegistryError> {
        let refuse = |reason: String| RegistryError::Manifest { file: file.to_string(), reason };
        let raw: RawManifest = toml::from_str(text).map_err(|e| refuse(e.to_string()))?;
        for (key, name) in [("id", &raw.id), ("file", &raw.file)] {
            if !is_plain_name(name) {
                return Err(refuse(format!("{key} = {name:?} is not a plain file name")));
            }
        }
        if raw.sha256.len() != 64 || !raw.sha256.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(refuse("sha256 is not 64 hex digits".to_string()));
        }
        if raw.sources.is_empty() {
            return Err(refuse("sources is empty".to_string()));
        }
        let sources = raw.sources.into_iter().map(expand).collect::<Result<_, _>>();
        let prices = raw.prices.map(|p| {
            let amount =
                |key, text: &str| usd::parse(text).map_err(|e| format!("prices.{key}: {e}"));
            Ok(Prices {
                input: amount("input", &p.input)?,
                cached_input: amount("cached_input", &p.cached_input)?,
                output: amount("output", &p.output)?,
            })
        });
        Ok(Self {
            id: raw.id,
            name: raw.name,
            revision: raw.revision,
            file: raw.file,
            sha256: raw.sha256.to_ascii_lowercase(),
            size_bytes: raw.size_bytes,
            notes: raw.notes,
            prices: prices.transpose().map_err(refuse)?,
            sources: sources.map_err(refuse)?,
        })
    }
}

/// Checks a source and writes out its `{n}` patterns.
fn expand(source: Source) -> Result<Source, String> {
    match source {
        Source::Path { .. } => Ok(source),
        Source::Hub { ref repo, ref file, .. } => {
            if split_repo(repo).is_none() {
                return Err(format!("repo = {repo:?} is not of the form org/name"));
            }
            if !is_plain_path(file) {
                return Err(format!("file = {file:?} is not a plain relative path"));
            }
            Ok(source)
        }
        Source::Package { packages, members, parts } => {
            let (packages, members) = match parts {
                None => (packages, members),
                Some(parts) if (1..=PARTS_MAX).contains(&parts) => {
                    (repeat(&packages, parts)?, repeat(&members, parts)?)
                }
                Some(_) => return Err(format!("parts must be 1 to {PARTS_MAX}")),
            };
            if packages.is_empty() || packages.len() != members.len() {
                return Err("packages and members must pair up, one member a package".to_string());
            }
            if let Some(bad) = packages.iter().find(|p| !is_pinned(p)) {
                return Err(format!("packages: {bad:?} is not of the form name==version"));
            }
            if let Some(bad) = members.iter().find(|m| !is_plain_path(m)) {
                return Err(format!("members: {bad:?} is not a plain relative path"));
            }
            Ok(Source::Package { packages, members, parts: None })
        }
    }
}

fn repeat(patterns: &[String], parts: usize) -> Result<Vec<String>, String> {
    let [pattern] = patterns else {
        return Err("with parts, packages and members hold one pattern each".to_string());
    };
    let fill =
        |n: usize| pattern.replace("{nn}", &format!("{n:02}")).replace("{n}", &n.to_string());
    Ok((1..=parts).map(fill).collect())
}

/// A name that stays in the directory it is joined to and is no hidden file or option.
pub(super) fn is_plain_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'+');
    !name.is_empty() && !name.starts_with(['.', '-']) && name.bytes().all(allowed)
}

fn is_plain_path(path: &str) -> bool {
    path.split('/').all(is_plain_name)
}

fn is_pinned(package: &str) -> bool {
    package
        .split_once("==")
        .is_some_and(|(name, version)| is_plain_name(name) && is_plain_name(version))
}

/// `org/name` in two.
pub(super) fn split_repo(repo: &str) -> Option<(&str, &str)> {
    repo.split_once('/').filter(|(org, name)| is_plain_name(org) && is_plain_name(name))
}
