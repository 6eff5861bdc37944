//! The registry against real pip, real wheels, real files and a hub nobody answers for.

mod common;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::Mutex,
    thread,
};

use candela::registry::{
    ModelSource, NoProgress, Progress, Registry, RegistryError, RegistryOptions, ResolvedModel,
};
use sha2::{Digest, Sha256};
use zip::{ZipWriter, write::SimpleFileOptions};

const HUB: &str =
    "[[sources]]\nkind = \"hub\"\nrepo = \"org/name\"\nfile = \"m.gguf\"\nrevision = \"main\"\n";
const PARTS: &str = "[[sources]]\nkind = \"package\"\nparts = 3\n\
    packages = [\"tiny-part{n}==1.0\"]\nmembers = [\"tiny_part{n}/part{nn}.bin\"]\n";

#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Notes {
    fn text(&self) -> String {
        self.0.lock().unwrap().join("\n")
    }
}

impl Progress for Notes {
    fn start(&self, _what: &str, _total_bytes: Option<u64>) {}
    fn advance(&self, _done_bytes: u64) {}
    fn note(&self, line: &str) {
        self.0.lock().unwrap().push(line.to_string());
    }
    fn finish(&self) {}
}

/// A cache, a manifest directory and a directory of three wheels that pip finds without an index.
struct Setup {
    dir: tempfile::TempDir,
    content: Vec<u8>,
}

impl Setup {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["manifests", "wheels"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let mut content = Vec::new();
        for n in 1..=3_u8 {
            let part = vec![n; 1000 * usize::from(n)];
            write_wheel(&dir.path().join("wheels"), n, &part);
            content.extend(part);
        }
        Self { dir, content }
    }

    fn manifest(&self, sources: &str) -> String {
        let sha256: String =
            Sha256::digest(&self.content).iter().map(|byte| format!("{byte:02x}")).collect();
        format!(
            "id = \"tiny\"\nname = \"Tiny\"\nrevision = \"1\"\nfile = \"m.gguf\"\n\
             sha256 = \"{sha256}\"\nsize_bytes = {}\n{sources}",
            self.content.len()
        )
    }

    fn registry(&self, manifest: &str, offline: bool) -> Result<Registry, RegistryError> {
        let manifests = self.dir.path().join("manifests");
        fs::write(manifests.join("tiny.toml"), manifest).unwrap();
        let wheels = self.dir.path().join("wheels");
        Registry::new(RegistryOptions {
            without_weights: false,
            cache_dir: self.dir.path().join("cache"),
            manifests_dir: Some(manifests),
            offline,
            hf_token: None,
            hf_endpoint: Some("http://127.0.0.1:9".to_string()),
            pip: format!("env PIP_NO_INDEX=1 PIP_FIND_LINKS={} python3 -m pip", wheels.display()),
        })
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("cache/tiny/m.gguf")
    }

    fn resolve(&self, sources: &str, notes: &Notes) -> Result<ResolvedModel, RegistryError> {
        self.registry(&self.manifest(sources), false)?.resolve("tiny", notes)
    }
}

fn write_wheel(dir: &Path, n: u8, part: &[u8]) {
    let path = dir.join(format!("tiny_part{n}-1.0-py3-none-any.whl"));
    let mut zip = ZipWriter::new(fs::File::create(path).unwrap());
    let info = format!("tiny_part{n}-1.0.dist-info");
    let metadata = format!("Metadata-Version: 2.1\nName: tiny-part{n}\nVersion: 1.0\n");
    let wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n";
    for (name, bytes) in [
        (format!("tiny_part{n}/part{n:02}.bin"), part),
        (format!("{info}/METADATA"), metadata.as_bytes()),
        (format!("{info}/WHEEL"), wheel.as_bytes()),
        (format!("{info}/RECORD"), b"".as_slice()),
    ] {
        zip.start_file(name, SimpleFileOptions::default()).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
}

#[test]
fn default_model_comes_from_its_package() {
    let path = common::default_model();
    assert_eq!(fs::metadata(&path).unwrap().len(), 98_362_432);
    assert_eq!(&fs::read(&path).unwrap()[..4], b"GGUF");
    assert!(common::resolve_default().prices.is_some());
}

#[test]
fn unreachable_hub_falls_through_to_packages_joined_in_order() {
    let (setup, notes) = (Setup::new(), Notes::default());
    let model = setup.resolve(&format!("{HUB}{PARTS}"), &notes).unwrap();
    assert_eq!(model.source, ModelSource::Gguf { path: setup.file() });
    assert_eq!(fs::read(setup.file()).unwrap(), setup.content);
    assert!(notes.text().contains("skipping hub org/name/m.gguf: "), "{}", notes.text());
}

#[test]
fn a_path_source_is_used_in_place_if_it_is_the_stated_file() {
    let setup = Setup::new();
    let mine = setup.dir.path().join("mine.gguf");
    let source = format!("[[sources]]\nkind = \"path\"\npath = \"{}\"\n", mine.display());
    let error = setup.resolve(&source, &Notes::default()).unwrap_err().to_string();
    assert!(error.contains("mine.gguf"), "{error}");
    fs::write(&mine, vec![0; setup.content.len()]).unwrap();
    let error = setup.resolve(&source, &Notes::default()).unwrap_err().to_string();
    assert!(error.contains("sha256 is"), "{error}");
    fs::write(&mine, &setup.content).unwrap();
    let offline = setup.registry(&setup.manifest(&source), true).unwrap();
    let model = offline.resolve("tiny", &NoProgress).unwrap();
    assert_eq!(model.source, ModelSource::Gguf { path: mine });
}

#[test]
fn an_unwritable_cache_says_what_to_do() {
    let setup = Setup::new();
    fs::write(setup.dir.path().join("cache"), "a file where the cache should be").unwrap();
    let error = setup.resolve(PARTS, &Notes::default()).unwrap_err().to_string();
    assert!(error.contains("choose another cache directory"), "{error}");
}

#[test]
fn damaged_and_unfinished_files_are_never_used() {
    let setup = Setup::new();
    let cache = setup.dir.path().join("cache/tiny");
    fs::create_dir_all(&cache).unwrap();
    let partial = cache.join(".partial-dead");
    fs::write(&partial, b"half").unwrap();
    setup.resolve(PARTS, &Notes::default()).unwrap();
    assert!(!partial.exists());

    let mut flipped = setup.content.clone();
    flipped[17] ^= 1;
    let truncated = setup.content[..100].to_vec();
    for (damage, said) in [(flipped, "sha256 is"), (truncated, "100 bytes")] {
        fs::write(setup.file(), damage).unwrap();
        let notes = Notes::default();
        setup.resolve(PARTS, &notes).unwrap();
        assert!(notes.text().contains(said), "{}", notes.text());
        assert_eq!(fs::read(setup.file()).unwrap(), setup.content);
    }
    fs::write(setup.file(), b"damaged").unwrap();
    let offline = setup.registry(&setup.manifest(PARTS), true).unwrap();
    let error = offline.resolve("tiny", &NoProgress).unwrap_err().to_string();
    assert!(error.contains("offline"), "{error}");
    assert!(!setup.file().exists());
}

#[test]
fn a_failed_fetch_names_every_source_and_leaves_nothing() {
    let setup = Setup::new();
    let good = setup.manifest(&format!("{HUB}{PARTS}"));
    let sha256 = good.lines().find(|line| line.starts_with("sha256")).unwrap();
    let wrong_sha = good.replace(sha256, &format!("sha256 = \"{}\"", "0".repeat(64)));
    let wrong_size = good.replace("size_bytes = 6000", "size_bytes = 5999");
    let no_package = good.replace("tiny-part{n}", "tiny-absent{n}");
    let no_member = good.replace("part{nn}", "absent{nn}");
    for (manifest, said) in [
        (wrong_sha, "the manifest states 0000"),
        (wrong_size, "more than the stated 5999 bytes"),
        (no_package, "tiny-absent1"),
        (no_member, "absent01.bin"),
    ] {
        let registry = setup.registry(&manifest, false).unwrap();
        let error = registry.resolve("tiny", &NoProgress).unwrap_err().to_string();
        assert!(error.contains(said) && error.contains("hub org/name"), "{error}");
        let left: Vec<_> = fs::read_dir(setup.dir.path().join("cache/tiny"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, ["lock"]);
    }
}

#[test]
fn two_at_once_fetch_once() {
    let (setup, notes) = (Setup::new(), Notes::default());
    let registry = setup.registry(&setup.manifest(PARTS), false).unwrap();
    thread::scope(|scope| {
        let threads = [(); 2].map(|()| scope.spawn(|| registry.resolve("tiny", &notes).unwrap()));
        let [one, two] = threads.map(|thread| thread.join().unwrap());
        assert_eq!(one, two);
    });
    assert_eq!(notes.text().matches("downloading package").count(), 3, "{}", notes.text());
}

#[test]
fn bad_manifests_are_refused_with_the_key() {
    let setup = Setup::new();
    let good = setup.manifest(PARTS);
    for (from, to, said) in [
        ("revision =", "revison =", "revison"),
        ("parts = 3", "pieces = 3", "pieces"),
        ("file = \"m.gguf\"", "file = \"../m.gguf\"", "file ="),
        ("id = \"tiny\"", "id = \"a/b\"", "id ="),
        ("tiny_part{n}/", "../", "members"),
        ("tiny_part{n}/", "/", "members"),
        ("tiny-part{n}==1.0", "--index-url==x", "packages"),
        ("tiny-part{n}==1.0", "tiny-part{n}", "packages"),
        ("parts = 3", "parts = 0", "parts"),
    ] {
        let text = good.replace(from, to);
        assert_ne!(text, good);
        let error = setup.registry(&text, false).err().expect(said).to_string();
        assert!(error.contains("tiny.toml") && error.contains(said), "{error}");
    }
}

#[test]
fn directories_and_files_are_used_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::new(RegistryOptions::default()).unwrap();
    let resolve = |path: &Path| registry.resolve(path.to_str().unwrap(), &NoProgress);
    let index = r#"{"weight_map": {"b": "s-2.safetensors", "a": "s-1.safetensors"}}"#;
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    fs::write(dir.path().join("s-1.safetensors"), "").unwrap();
    let error = resolve(dir.path()).unwrap_err().to_string();
    assert!(error.ends_with("missing config.json, tokenizer.json, s-2.safetensors"), "{error}");
    let options = RegistryOptions { without_weights: true, ..RegistryOptions::default() };
    let shapes = Registry::new(options).unwrap();
    let shapes = || shapes.resolve(dir.path().to_str().unwrap(), &NoProgress);
    let error = shapes().unwrap_err().to_string();
    assert!(error.ends_with("missing config.json, tokenizer.json"), "{error}");
    for name in ["config.json", "tokenizer.json", "m.gguf"] {
        fs::write(dir.path().join(name), "").unwrap();
    }
    assert!(
        matches!(shapes().unwrap().source, ModelSource::Dir { shards, .. } if shards.is_empty())
    );
    fs::write(dir.path().join("s-2.safetensors"), "").unwrap();
    match resolve(dir.path()).unwrap().source {
        ModelSource::Dir { shards, tokenizer_config, .. } => {
            assert_eq!(
                shards,
                ["s-1", "s-2"].map(|s| dir.path().join(s.to_string() + ".safetensors"))
            );
            assert_eq!(tokenizer_config, None);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(resolve(&dir.path().join("m.gguf")).unwrap().id, "m");
    for bad in [dir.path().join("config.json"), dir.path().join("absent.gguf")] {
        assert!(resolve(&bad).unwrap_err().to_string().contains(bad.to_str().unwrap()));
    }
    let escape = r#"{"weight_map": {"a": "../s-1.safetensors"}}"#;
    fs::write(dir.path().join("model.safetensors.index.json"), escape).unwrap();
    assert!(matches!(resolve(dir.path()), Err(RegistryError::Invalid { .. })));
    assert!(matches!(registry.resolve("nothing", &NoProgress), Err(RegistryError::Unknown { .. })));
}
