//! `candela.toml`.

use std::{
    fs,
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
};

use super::{
    ConfigError, Settings,
    limits::{FILE_BYTES_MAX, FILE_NAME},
};

/// `settings` over the file they name, or over `candela.toml` if there is one here. Returns the
/// file that was read.
pub fn merge(settings: Settings) -> Result<(Settings, Option<PathBuf>), ConfigError> {
    let named = settings.config.clone();
    let path = named.clone().unwrap_or_else(|| PathBuf::from(FILE_NAME));
    match read(&path) {
        Ok(text) => Ok((settings.or(parse(&path, &text)?), Some(path))),
        Err(ConfigError::Read { source, .. })
            if named.is_none() && source.kind() == ErrorKind::NotFound =>
        {
            Ok((settings, None))
        }
        Err(error) => Err(error),
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let fail = |source| ConfigError::Read { path: path.to_path_buf(), source };
    let file = fs::File::open(path).map_err(fail)?;
    let mut text = String::new();
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(fail)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(ConfigError::TooLarge { path: path.to_path_buf(), bytes_max: FILE_BYTES_MAX });
    }
    Ok(text)
}

fn parse(path: &Path, text: &str) -> Result<Settings, ConfigError> {
    toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start).min(text.len());
        let before = &text.as_bytes()[..start];
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        let source = text.lines().nth(line - 1).unwrap_or_default();
        let key = key_of(source);
        // toml's own report quotes the line, which may hold the API key: only its message is kept.
        let message = match nearest(&key) {
            // Only at the top level are the keys those of the settings.
            Some(known)
                if !Settings::KEYS.contains(&key.as_str())
                    && error.message().starts_with("unknown field")
                    && !text[..start].contains("[[") =>
            {
                format!("no such key; did you mean `{known}`?")
            }
            _ => error.message().replace('\n', " "),
        };
        ConfigError::File { path: path.to_path_buf(), line, key, message }
    })
}

/// The key of a line, without any part of its value.
fn key_of(line: &str) -> String {
    let key = line.split(['=', '#']).next().unwrap_or_default();
    key.trim().trim_matches(['"', '\'', '[', ']']).to_string()
}

/// The known key closest to a mistyped one, if close enough to be meant.
fn nearest(key: &str) -> Option<&'static str> {
    let scored = Settings::KEYS.iter().map(|known| (distance(key, known), *known));
    let (steps, known) = scored.min()?;
    (steps <= 2 && steps < key.chars().count()).then_some(known)
}

/// Edits between two short words (Levenshtein), one row at a time.
fn distance(a: &str, b: &str) -> usize {
    let mut row = (0..=b.chars().count()).collect::<Vec<_>>();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.chars().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row.last().copied().unwrap_or(0)
}
