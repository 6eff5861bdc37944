//! Rules of the house that the compiler does not know.

use std::path::{Path, PathBuf};

/// Top-level modules, and those of this crate that each may name.
const MAY_KNOW: [(&str, &[&str]); 19] = [
    ("types", &[]),
    ("clock", &[]),
    ("config", &["types", "price"]),
    ("price", &["types"]),
    ("meter", &["types"]),
    ("gpu", &["types"]),
    ("scheduler", &["types", "cache"]),
    ("cache", &["types"]),
    ("ops", &[]),
    ("model", &["types", "ops"]),
    ("sampling", &["types", "ops"]),
    ("text", &["types"]),
    ("telemetry", &["engine", "meter", "gpu"]),
    ("admission", &["types", "clock", "price", "ledger"]),
    ("ledger", &["types", "clock", "price"]),
    ("admin", &["types", "price", "ledger"]),
    ("registry", &["types", "price", "model", "text"]),
    (
        "engine",
        &[
            "types",
            "clock",
            "scheduler",
            "cache",
            "model",
            "ops",
            "sampling",
            "text",
            "ledger",
            "meter",
            "price",
        ],
    ),
    (
        "api",
        &[
            "types",
            "clock",
            "admission",
            "admin",
            "ledger",
            "meter",
            "gpu",
            "text",
            "registry",
            "price",
            "engine",
            "sampling",
            "telemetry",
        ],
    ),
];
/// Where `unsafe` may be written, as prefixes below `src`.
const UNSAFE: [&str; 3] = ["ops/", "engine/device/", "model/weights.rs"];
/// Where code may depend on the `cuda` feature.
const CUDA: [&str; 2] = ["ops/", "engine/device/"];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("an entry"))
    {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Every source file: its path below `src`, and its lines without comments and tests.
fn code() -> Vec<(String, Vec<String>)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    sources(&src, &mut paths);
    assert!(paths.len() > 40, "found only {}", paths.len());
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).expect("readable");
        let lines = text.lines().take_while(|line| *line != "#[cfg(test)]");
        let lines = lines.map(|line| line.split("//").next().unwrap_or("").to_owned()).collect();
        let name = path.strip_prefix(&src).expect("below src").to_string_lossy().into_owned();
        (name, lines)
    };
    paths.into_iter().map(read).collect()
}

/// Modules of this crate that a file names: after `crate::`, or first in a list of `use crate::{..}`.
fn named(lines: &[String]) -> Vec<String> {
    let text = lines.join("\n");
    let word = |text: &str| -> String {
        text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let mut names = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        let Some(list) = rest.strip_prefix('{') else {
            names.push(word(rest));
            continue;
        };
        let (mut depth, mut item) = (0, String::new());
        for c in list.chars() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => names.push(word(&std::mem::take(&mut item))),
                _ => {}
            }
            if depth == 0 && c != ',' && c != '}' {
                item.push(c);
            }
        }
        names.push(word(&item));
    }
    names.retain(|name| !name.is_empty());
    names
}

#[test]
fn modules_know_only_what_they_may() {
    let mut wrong = Vec::new();
    for (file, lines) in code() {
        let module = file.split(['/', '.']).next().expect("a name");
        let Some((_, allowed)) = MAY_KNOW.iter().find(|(name, _)| *name == module) else {
            let outer = ["cli", "lib", "main"];
            assert!(outer.contains(&module), "{file}: the table does not have `{module}`");
            continue;
        };
        for name in named(&lines) {
            if name != module && !allowed.contains(&name.as_str()) {
                wrong.push(format!("{file} names {name}"));
            }
        }
    }
    wrong.sort();
    wrong.dedup();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn unsafe_and_cuda_have_their_places() {
    for (file, lines) in code() {
        let within = |places: &[&str]| places.iter().any(|place| file.starts_with(place));
        for (index, line) in lines.iter().enumerate() {
            let mut words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
            let line_of = format!("{file}:{}", index + 1);
            assert!(within(&UNSAFE) || !words.any(|word| word == "unsafe"), "unsafe in {line_of}");
            let cuda = line.contains("feature = \"cuda\"");
            assert!(within(&CUDA) || !cuda, "the cuda feature in {line_of}");
        }
    }
}

#[test]
fn the_scanner_sees_what_it_should() {
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let text = "use crate::{\n    a,\n    b::{c, d},\n    e::f,\n};\ncrate::g::h();\n";
    assert_eq!(named(&lines(text)), ["a", "b", "e", "g"]);
}
