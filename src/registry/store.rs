//! The cache directory: one verified file a model, whatever else happens to the process.

use std::{
    fs::{self, File, Metadata, TryLockError},
    io::{self, Read},
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use sha2::{Digest, Sha256};

use super::{
    Progress, Registry, RegistryError, hub,
    manifest::{Manifest, Source, split_repo},
    package,
    sink::{Sink, hex},
};

/// Unfinished files start with this; whoever holds the lock may remove them.
pub(super) const PARTIAL_PREFIX: &str = ".partial-";
const READ_BYTES: usize = 1 << 20;

/// The model's file, fetched and verified if it is not in the cache yet.
pub(super) fn obtain(
    registry: &Registry,
    manifest: &Manifest,
    progress: &dyn Progress,
) -> Result<PathBuf, RegistryError> {
    let dir = registry.options.cache_dir.join(&manifest.id);
    let path = dir.join(&manifest.file);
    let marker = dir.join(format!("{}.ok", manifest.file));
    if is_marked(&path, &marker, manifest) {
        return Ok(path);
    }
    fs::create_dir_all(&dir).map_err(|e| RegistryError::io(&dir, e))?;
    // Held to the end of this function; the system releases it if the process dies.
    let _lock = lock(&dir.join("lock"), &manifest.id, progress)?;
    remove_partials(&dir)?;
    if is_marked(&path, &marker, manifest) {
        return Ok(path);
    }
    if path.exists() {
        match verify(&path, &marker, manifest)? {
            Ok(()) => return Ok(path),
            Err(reason) => {
                progress.note(&format!("{}: {reason}; fetching it again", path.display()));
                fs::remove_file(&path).map_err(|e| RegistryError::io(&path, e))?;
            }
        }
    }
    let mut reasons = Vec::new();
    for source in &manifest.sources {
        let label = label(source);
        match fetch(registry, manifest, source, &path, &marker, progress) {
            Ok(path) => return Ok(path),
            Err(Failure::Local(error)) => return Err(error),
            Err(Failure::Source(reason)) => {
                progress.note(&format!("skipping {label}: {reason}"));
                reasons.push(format!("{label}: {reason}"));
            }
        }
    }
    Err(RegistryError::NoSource { model: manifest.id.clone(), reasons })
}

enum Failure {
    /// The next source may do better.
    Source(String),
    /// No source would.
    Local(RegistryError),
}

fn fetch(
    registry: &Registry,
    manifest: &Manifest,
    source: &Source,
    path: &Path,
    marker: &Path,
    progress: &dyn Progress,
) -> Result<PathBuf, Failure> {
    let options = &registry.options;
    let offline = match source {
        Source::Path { path } => {
            return match verify(path, marker, manifest) {
                Ok(Ok(())) => Ok(path.clone()),
                Ok(Err(reason)) => Err(Failure::Source(reason)),
                Err(error) => Err(Failure::Source(error.to_string())),
            };
        }
        Source::Hub { .. } => registry.is_hub_offline(),
        Source::Package { .. } => options.offline,
    };
    if offline {
        return Err(Failure::Source("offline".to_string()));
    }
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut sink = Sink::create(dir, manifest, progress).map_err(Failure::Local)?;
    progress.start(&manifest.id, Some(manifest.size_bytes));
    let result = match source {
        Source::Hub { repo, file, revision } => match split_repo(repo) {
            Some(repo) => hub::fetch_file(options, repo, file, revision, &mut sink),
            None => Err(format!("{repo:?} is not of the form org/name")),
        },
        Source::Package { packages, members, .. } => {
            let pairs = packages.iter().map(String::as_str).zip(members.iter().map(String::as_str));
            let pairs: Vec<_> = pairs.collect();
            package::fetch(&options.pip, &pairs, dir, &mut sink, progress)
        }
        Source::Path { .. } => Ok(()),
    };
    progress.finish();
    if let Some(error) = sink.take_local_error() {
        return Err(Failure::Local(error));
    }
    result.map_err(Failure::Source)?;
    sink.finish(path).map_err(Failure::Local)?.map_err(Failure::Source)?;
    mark(path, marker, manifest).map_err(Failure::Local)?;
    Ok(path.to_path_buf())
}

fn label(source: &Source) -> String {
    match source {
        Source::Path { path } => format!("path {}", path.display()),
        Source::Hub { repo, file, .. } => format!("hub {repo}/{file}"),
        Source::Package { packages, .. } => {
            format!("package {}", packages.first().map_or("", String::as_str))
        }
    }
}

/// Takes the lock file at `path`, waiting for whoever holds it; `what` is fetched under it.
pub(super) fn lock(
    path: &Path,
    what: &str,
    progress: &dyn Progress,
) -> Result<File, RegistryError> {
    let file = File::create(path).map_err(|e| RegistryError::io(path, e))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            progress.note(&format!("waiting for another process to fetch {what}"));
            file.lock().map_err(|e| RegistryError::io(path, e))?;
        }
        Err(TryLockError::Error(e)) => return Err(RegistryError::io(path, e)),
    }
    Ok(file)
}

fn remove_partials(dir: &Path) -> Result<(), RegistryError> {
    let entries = fs::read_dir(dir).map_err(|e| RegistryError::io(dir, e))?;
    for entry in entries {
        let path = entry.map_err(|e| RegistryError::io(dir, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(PARTIAL_PREFIX) {
            let removed =
                if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(|e| RegistryError::io(&path, e))?;
        }
    }
    Ok(())
}

/// Hashes the file; on a match leaves the marker. The inner error says what is wrong with it.
fn verify(
    path: &Path,
    marker: &Path,
    manifest: &Manifest,
) -> Result<Result<(), String>, RegistryError> {
    if is_marked(path, marker, manifest) {
        return Ok(Ok(()));
    }
    let io = |e| RegistryError::io(path, e);
    let size = fs::metadata(path).map_err(io)?.len();
    if size != manifest.size_bytes {
        return Ok(Err(format!("{size} bytes, the manifest states {}", manifest.size_bytes)));
    }
    let sha256 = sha256(path).map_err(io)?;
    if sha256 != manifest.sha256 {
        return Ok(Err(format!("sha256 is {sha256}, the manifest states {}", manifest.sha256)));
    }
    mark(path, marker, manifest)?;
    Ok(Ok(()))
}

/// The SHA-256 of a file, in hex.
pub(super) fn sha256(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..read]);
    }
}

/// When a file was last written, if the system knows.
pub(super) fn changed_ns(metadata: &Metadata) -> Option<u128> {
    Some(metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?.as_nanos())
}

/// What the marker of an unchanged file says: a large file is hashed once, not at each start.
fn fingerprint(path: &Path, manifest: &Manifest) -> Option<String> {
    let metadata = fs::metadata(path).ok()?;
    let mtime_ns = changed_ns(&metadata)?;
    let size = metadata.len();
    (size == manifest.size_bytes)
        .then(|| format!("{} {size} {mtime_ns} {}\n", manifest.sha256, path.display()))
}

fn is_marked(path: &Path, marker: &Path, manifest: &Manifest) -> bool {
    fingerprint(path, manifest)
        .is_some_and(|expected| fs::read_to_string(marker).is_ok_and(|text| text == expected))
}

fn mark(path: &Path, marker: &Path, manifest: &Manifest) -> Result<(), RegistryError> {
    let text = fingerprint(path, manifest).unwrap_or_default();
    fs::write(marker, text).map_err(|e| RegistryError::io(marker, e))
}
