//! Whether a snapshot of the hub's cache is what the hub says, and the record that it was.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use super::store;

/// A file that is not as the hub says.
pub(super) struct Bad {
    file: String,
    what: String,
}

impl std::fmt::Display for Bad {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.file, self.what)
    }
}

impl Bad {
    /// Removes the file and what it points to.
    pub(super) fn remove(&self, dir: &Path) -> Result<(), String> {
        let path = dir.join(&self.file);
        let blob = fs::canonicalize(&path);
        for path in blob.into_iter().chain([path]) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(format!("{}: {error}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The first file of a snapshot that is missing, has another size than stated, or, where its blob
/// is named by a SHA-256, other bytes.
pub(super) fn check(
    dir: &Path,
    sizes: Option<&BTreeMap<String, u64>>,
) -> Result<Option<Bad>, String> {
    let bad = |file: &str, what: String| Ok(Some(Bad { file: file.to_owned(), what }));
    let present = files(dir)?;
    for (file, stated) in sizes.into_iter().flatten() {
        match present.get(file) {
            None => return bad(file, "the hub lists it and does not give it".to_owned()),
            Some(metadata) if metadata.len() != *stated => {
                return bad(file, format!("{} bytes, the hub states {stated}", metadata.len()));
            }
            Some(_) => {}
        }
    }
    for file in present.keys() {
        let Some(blob) = blob(&dir.join(file)).filter(|blob| is_sha256(blob)) else { continue };
        let path = dir.join(file);
        let sha256 = store::sha256(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        if sha256 != blob {
            return bad(file, format!("sha256 is {sha256}, the hub states {blob}"));
        }
    }
    Ok(None)
}

fn is_sha256(blob: &str) -> bool {
    blob.len() == 64 && blob.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The name of the blob that a snapshot's file points to.
fn blob(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

/// The files of a snapshot, with what is known of those they point to.
fn files(dir: &Path) -> Result<BTreeMap<String, fs::Metadata>, String> {
    let failed = |e: io::Error| format!("{}: {e}", dir.display());
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        // A pointer to nothing counts as no file.
        if let Ok(metadata) = fs::metadata(&path)
            && metadata.is_file()
        {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            found.insert(name, metadata);
        }
    }
    Ok(found)
}

/// What the record of an unchanged snapshot says: large files are hashed once, not at each start.
pub(super) fn fingerprint(dir: &Path) -> Result<String, String> {
    let line = |(file, metadata): (&String, &fs::Metadata)| {
        let blob = blob(&dir.join(file)).unwrap_or_default();
        let changed_ns = store::changed_ns(metadata).unwrap_or_default();
        format!("{file} {blob} {} {changed_ns}\n", metadata.len())
    };
    Ok(files(dir)?.iter().map(line).collect())
}

/// The file that says which snapshot has been checked, and as what.
pub(super) struct Record(PathBuf);

impl Record {
    pub(super) fn of(snapshot: &Path) -> Result<Self, String> {
        let (commit, repo) = (snapshot.file_name(), snapshot.ancestors().nth(2));
        let (Some(commit), Some(repo)) = (commit, repo) else {
            return Err(format!("{} is no snapshot", snapshot.display()));
        };
        Ok(Self(repo.join("checked").join(commit)))
    }

    pub(super) fn read(&self) -> Option<String> {
        fs::read_to_string(&self.0).ok()
    }

    pub(super) fn write(&self, snapshot: &Path) -> Result<(), String> {
        let failed = |e: io::Error| format!("{}: {e}", self.0.display());
        fs::create_dir_all(self.0.parent().unwrap_or(&self.0)).map_err(failed)?;
        fs::write(&self.0, fingerprint(snapshot)?).map_err(failed)
    }
}
