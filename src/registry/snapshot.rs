//! Hub source: the whole of a model named `org/name`, in the hub's own cache layout. A snapshot
//! counts only once every file of it has been checked, which a record beside it says.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::StreamExt;
use hf_hub::{
    HFError,
    progress::{DownloadEvent, ProgressEvent, ProgressHandler},
    repository::RepoTreeEntry,
};

use super::{
    Progress, RegistryError, RegistryOptions,
    checked::{Record, check, fingerprint},
    hub::{Repo, STALL_MAX, TRANSFERS_MAX, block_on, client, reason, stalled},
    store,
};

/// What a model directory needs; the rest of a repository stays where it is.
const WANTED: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
];
/// Nothing below the repository's top, wherever such a name would lead.
const UNWANTED: &str = "*/*";
/// How often progress is shown, and looked for.
const TICK: Duration = Duration::from_millis(200);

/// A model's directory, named by the commit; fetched into the hub cache if it is not there yet.
pub(super) fn fetch(
    options: &RegistryOptions,
    (org, name): (&str, &str),
    revision: Option<&str>,
    offline: bool,
    progress: &dyn Progress,
) -> Result<PathBuf, RegistryError> {
    let model = format!("{org}/{name}");
    let no_source = |reason: String| RegistryError::NoSource {
        model: model.clone(),
        reasons: vec![format!("hub: {reason}")],
    };
    let repo = client(options).map_err(no_source)?.model(org, name);
    if offline {
        return block_on(cached(&repo, revision)).map_err(no_source);
    }
    let dir = options.cache_dir.join("hub");
    fs::create_dir_all(&dir).map_err(|e| RegistryError::io(&dir, e))?;
    // The hub's client locks single files, and only for seconds.
    let _lock = store::lock(&dir.join(format!("{org}--{name}.lock")), &model, progress)?;
    block_on(online(&repo, &model, revision, progress)).map_err(no_source)
}

/// What is in the cache, without a request.
async fn cached(repo: &Repo, revision: Option<&str>) -> Result<PathBuf, String> {
    let request = repo.snapshot_download().maybe_revision(revision).local_files_only(true);
    let dir = request.send().await.map_err(|error| reason(&error))?;
    let record = Record::of(&dir)?;
    match record.read() {
        Some(known) if known == fingerprint(&dir)? => Ok(dir),
        Some(_) => match check(&dir, None)? {
            Some(bad) => Err(bad.to_string()),
            None => record.write(&dir).map(|()| dir),
        },
        None => Err("the cache has only a part of it".to_owned()),
    }
}

async fn online(
    repo: &Repo,
    model: &str,
    revision: Option<&str>,
    progress: &dyn Progress,
) -> Result<PathBuf, String> {
    let mut last = String::new();
    for _ in 0..TRANSFERS_MAX {
        match transfer(repo, model, revision, progress).await {
            Ok(dir) => {
                let record = Record::of(&dir)?;
                if record
                    .read()
                    .is_some_and(|known| fingerprint(&dir).is_ok_and(|now| now == known))
                {
                    return Ok(dir);
                }
                let sizes = sizes(repo, &dir).await?;
                let Some(bad) = check(&dir, Some(&sizes))? else {
                    return record.write(&dir).map(|()| dir);
                };
                last = bad.to_string();
                progress.note(&format!("{last}; fetching it again"));
                bad.remove(&dir)?;
            }
            Err(Failure::Broken(reason)) => last = reason,
            Err(Failure::Away(reason)) => {
                let Ok(dir) = cached(repo, revision).await else { return Err(reason) };
                progress.note(&format!("the hub does not answer, using what is cached: {reason}"));
                return Ok(dir);
            }
            Err(Failure::Refused(reason)) => return Err(reason),
        }
    }
    Err(last)
}

enum Failure {
    /// What came whole is kept, the rest is tried again.
    Broken(String),
    /// No answer at all.
    Away(String),
    Refused(String),
}

async fn transfer(
    repo: &Repo,
    model: &str,
    revision: Option<&str>,
    progress: &dyn Progress,
) -> Result<PathBuf, Failure> {
    let counter = Arc::new(Counter::default());
    let request = repo
        .snapshot_download()
        .maybe_revision(revision)
        .allow_patterns(WANTED.map(String::from).to_vec())
        .ignore_patterns(vec![UNWANTED.to_owned()])
        .progress(counter.clone());
    let mut shown = false;
    let tick = || {
        let total = counter.total_bytes.load(Relaxed);
        if !std::mem::replace(&mut shown, total > 0) && total > 0 {
            progress.start(model, Some(total));
        }
        progress.advance(counter.done_bytes());
    };
    let result = watch(STALL_MAX, request.send(), || counter.events.load(Relaxed), tick).await;
    match result.map_err(Failure::Broken)? {
        Ok(dir) => Ok(dir),
        Err(error) => Err(match &error {
            HFError::Request { source, .. } if source.is_connect() || source.is_timeout() => {
                Failure::Away(reason(&error))
            }
            HFError::Request { .. } => Failure::Broken(reason(&error)),
            HFError::Http { context } if context.status.is_server_error() => {
                Failure::Away(reason(&error))
            }
            _ => Failure::Refused(reason(&error)),
        }),
    }
}

/// Waits for `work` as long as `events` grows; `tick` is called meanwhile.
async fn watch<T>(
    limit: Duration,
    work: impl Future<Output = T>,
    events: impl Fn() -> u64,
    mut tick: impl FnMut(),
) -> Result<T, String> {
    let mut work = pin!(work);
    let (mut last, mut idle) = (events(), Duration::ZERO);
    while idle < limit {
        let pause = TICK.min(limit);
        if let Ok(result) = tokio::time::timeout(pause, &mut work).await {
            return Ok(result);
        }
        tick();
        let now = events();
        idle = if now == last { idle + pause } else { Duration::ZERO };
        last = now;
    }
    Err(stalled(limit))
}

/// Hears of a download on whatever thread it runs.
#[derive(Default)]
struct Counter {
    files: Mutex<BTreeMap<String, u64>>,
    total_bytes: AtomicU64,
    events: AtomicU64,
}

impl Counter {
    fn done_bytes(&self) -> u64 {
        self.files.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }

    fn note(&self, file: &str, done_bytes: u64) {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.insert(file.to_owned(), done_bytes);
    }
}

impl ProgressHandler for Counter {
    fn on_progress(&self, event: &ProgressEvent) {
        self.events.fetch_add(1, Relaxed);
        match event {
            // Each file says again how large it is; the first time it is the sum.
            ProgressEvent::Download(DownloadEvent::Start { total_bytes, .. }) => {
                self.total_bytes.fetch_max(*total_bytes, Relaxed);
            }
            ProgressEvent::Download(DownloadEvent::Progress { files }) => {
                files.iter().for_each(|file| self.note(&file.filename, file.bytes_completed));
            }
            ProgressEvent::Download(DownloadEvent::AggregateProgress {
                bytes_completed, ..
            }) => {
                self.note("", *bytes_completed);
            }
            _ => {}
        }
    }
}

/// Sizes of the wanted files of a snapshot's commit, as the hub states them.
async fn sizes(repo: &Repo, dir: &Path) -> Result<BTreeMap<String, u64>, String> {
    let commit = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let entries = repo.list_tree().revision(commit).send().map_err(|error| reason(&error))?;
    let mut entries = pin!(entries);
    let mut sizes = BTreeMap::new();
    loop {
        match tokio::time::timeout(STALL_MAX, entries.next()).await {
            Ok(Some(Ok(RepoTreeEntry::File { path, size, .. }))) if is_wanted(&path) => {
                sizes.insert(path, size);
            }
            Ok(Some(Ok(_))) => {}
            Ok(Some(Err(error))) => return Err(reason(&error)),
            Ok(None) => return Ok(sizes),
            Err(_) => return Err(stalled(STALL_MAX)),
        }
    }
}

/// As [`WANTED`] and [`UNWANTED`] say.
fn is_wanted(path: &str) -> bool {
    let fits = |pattern: &str| match pattern.split_once('*') {
        Some((start, end)) => path.starts_with(start) && path.ends_with(end),
        None => path == pattern,
    };
    !path.contains('/') && WANTED.into_iter().any(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_transfer_that_stands_still_is_given_up() {
        let count = AtomicU64::new(0);
        let limit = TICK * 2;
        let slow = tokio::time::sleep(TICK * 5);
        let moving = watch(limit, slow, || count.fetch_add(1, Relaxed), || {}).await;
        assert_eq!(moving, Ok(()), "slow work that moves is waited for");
        let still = watch(limit, std::future::pending::<()>(), || 7, || {}).await;
        assert!(still.is_err_and(|reason| reason.contains("nothing came")));
    }

    #[test]
    fn names_are_wanted_at_the_top_alone() {
        for (path, wanted) in [
            ("config.json", true),
            ("model.safetensors", true),
            ("model-00001-of-00002.safetensors", true),
            ("a/config.json", false),
            ("model/../../x.safetensors", false),
            ("consolidated.safetensors", false),
            ("config.json.bak", false),
        ] {
            assert_eq!(is_wanted(path), wanted, "{path}");
        }
    }
}
