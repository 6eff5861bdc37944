//! Models from a hub, over real sockets: what is asked for, what is kept, and what is refused.

mod common;

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use candela::{
    cli::assemble::{EngineSpec, assemble},
    clock::Clock,
    ops::KvDtype,
    registry::{ModelSource, Progress, Registry, RegistryError, RegistryOptions, ResolvedModel},
    types::ModelId,
};
use candle_core::{DType, Device, Tensor};
use common::hub::{COMMIT, Fault, Hub};
use serde_json::json;
use sha2::{Digest, Sha256};

const TOKEN: &str = "hf_test";
const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Notes {
    fn text(&self) -> String {
        self.0.lock().expect("no panic").join("\n")
    }
}

impl Progress for Notes {
    fn start(&self, _what: &str, _total_bytes: Option<u64>) {}
    fn advance(&self, _done_bytes: u64) {}
    fn note(&self, line: &str) {
        self.0.lock().expect("no panic").push(line.to_owned());
    }
    fn finish(&self) {}
}

/// A cache on this machine, and a manifest of the file `m.gguf`.
struct Here(tempfile::TempDir);

impl Here {
    fn new(gguf: &[u8]) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir(dir.path().join("manifests")).expect("creates");
        let here = Self(dir);
        here.write_manifest(gguf);
        here
    }

    fn write_manifest(&self, gguf: &[u8]) {
        let sha256: String = Sha256::digest(gguf).iter().map(|b| format!("{b:02x}")).collect();
        let manifest = format!(
            "id = \"tiny\"\nname = \"Tiny\"\nrevision = \"1\"\nfile = \"m.gguf\"\n\
             sha256 = \"{sha256}\"\nsize_bytes = {}\n\
             [[sources]]\nkind = \"hub\"\nrepo = \"org/name\"\nfile = \"m.gguf\"\nrevision = \"main\"\n",
            gguf.len()
        );
        fs::write(self.0.path().join("manifests/tiny.toml"), manifest).expect("writes");
    }

    fn cache(&self) -> PathBuf {
        self.0.path().join("cache")
    }

    fn resolve(
        &self,
        hub: &str,
        model: &str,
        how: How,
    ) -> (Result<ResolvedModel, RegistryError>, String) {
        let options = RegistryOptions {
            without_weights: false,
            cache_dir: self.cache(),
            manifests_dir: Some(self.0.path().join("manifests")),
            offline: how == How::Offline,
            hf_token: (how != How::NoToken).then(|| TOKEN.to_owned()),
            hf_endpoint: Some(hub.to_owned()),
            pip: String::new(),
        };
        let notes = Notes::default();
        let registry = Registry::new(options).expect("manifests");
        (registry.resolve(model, &notes), notes.text())
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Online,
    Offline,
    NoToken,
}

/// Bytes without a period, so that a part in the wrong place shows.
fn noise(len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

fn one_file() -> BTreeMap<String, Vec<u8>> {
    [("m.gguf".to_owned(), noise(10_000))].into()
}

/// A model of one layer in two shards, with files that are not wanted.
fn repository() -> BTreeMap<String, Vec<u8>> {
    let (hidden, inner, vocab) = (64, 96, 32);
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": inner,
        "vocab_size": vocab, "num_hidden_layers": 1, "num_attention_heads": 4,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "eos_token_id": 1,
    });
    let tokens: serde_json::Map<_, _> =
        (0..26u8).map(|i| (char::from(b'a' + i).to_string(), i.into())).collect();
    let tokenizer = json!({
        "model": {"type": "BPE", "vocab": tokens, "merges": []},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
    });
    let prefix = "model.layers.0";
    let shapes = [
        ("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]),
        ("lm_head.weight".to_owned(), vec![vocab, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
        (format!("{prefix}.input_layernorm.weight"), vec![hidden]),
        (format!("{prefix}.post_attention_layernorm.weight"), vec![hidden]),
        (format!("{prefix}.self_attn.q_proj.weight"), vec![hidden, hidden]),
        (format!("{prefix}.self_attn.k_proj.weight"), vec![hidden, hidden]),
        (format!("{prefix}.self_attn.v_proj.weight"), vec![hidden, hidden]),
        (format!("{prefix}.self_attn.o_proj.weight"), vec![hidden, hidden]),
        (format!("{prefix}.mlp.gate_proj.weight"), vec![inner, hidden]),
        (format!("{prefix}.mlp.up_proj.weight"), vec![inner, hidden]),
        (format!("{prefix}.mlp.down_proj.weight"), vec![hidden, inner]),
    ];
    let dir = tempfile::tempdir().expect("a directory");
    let mut files = BTreeMap::new();
    let mut map = serde_json::Map::new();
    for (shard, shapes) in SHARDS.iter().zip(shapes.chunks(6)) {
        let mut tensors = HashMap::new();
        for (name, shape) in shapes {
            let tensor = Tensor::ones(shape.clone(), DType::F32, &Device::Cpu).expect("a tensor");
            tensors.insert(name.clone(), tensor);
            map.insert(name.clone(), (*shard).into());
        }
        let path = dir.path().join(shard);
        candle_core::safetensors::save(&tensors, &path).expect("saves");
        files.insert((*shard).to_owned(), fs::read(path).expect("reads"));
    }
    for (name, text) in [
        ("config.json", config.to_string()),
        ("tokenizer.json", tokenizer.to_string()),
        ("tokenizer_config.json", "{}".to_owned()),
        ("model.safetensors.index.json", json!({"weight_map": map}).to_string()),
        ("README.md", "not wanted".to_owned()),
        ("pytorch_model.bin", "not wanted".to_owned()),
        ("onnx/model.safetensors", "not wanted".to_owned()),
        ("model/../../../../escape.safetensors", "not wanted".to_owned()),
    ] {
        files.insert(name.to_owned(), text.into_bytes());
    }
    files
}

/// Files below a directory, without those that only lock.
fn files_below(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut found = Vec::new();
    for path in entries.map(|entry| entry.expect("an entry").path()) {
        match path.is_dir() {
            true => found.extend(files_below(&path)),
            false => found.push(path.to_string_lossy().into_owned()),
        }
    }
    found.retain(|path| !path.ends_with("lock"));
    found.sort();
    found
}

fn refused(what: &str, result: Result<ResolvedModel, RegistryError>, said: &[&str]) {
    let error = result.err().unwrap_or_else(|| panic!("{what}: not refused")).to_string();
    for said in said {
        assert!(error.contains(said), "{what}: {error:?} lacks {said:?}");
    }
}

#[test]
fn a_file_of_a_manifest_comes_whole_or_not_at_all() {
    let bytes = &one_file()["m.gguf"];
    let check = |what: &str, faults: &[Fault], expected: Result<&[&str], &str>| {
        let (hub, here) = (Hub::start(one_file(), Some(TOKEN)), Here::new(bytes));
        hub.fail("m.gguf", faults);
        let (result, _) = here.resolve(&hub.url, "tiny", How::Online);
        let requests = hub.take_requests();
        assert!(requests.iter().all(|line| line.ends_with(" with token")), "{what}: {requests:?}");
        let path = here.cache().join("tiny/m.gguf");
        match expected {
            Ok(ranges) => {
                let source = result.unwrap_or_else(|error| panic!("{what}: {error}")).source;
                assert_eq!(source, ModelSource::Gguf { path: path.clone() }, "{what}");
                assert_eq!(&fs::read(&path).expect("reads"), bytes, "{what}");
                let asked = |line: &String| {
                    let range = line.strip_prefix("GET blob m.gguf")?;
                    Some(range.trim_end_matches(" with token").trim_start().to_owned())
                };
                assert_eq!(requests.iter().filter_map(asked).collect::<Vec<_>>(), ranges, "{what}");
                let (result, _) = here.resolve(&hub.url, "tiny", How::Offline);
                assert_eq!(result.expect("cached").source, source, "{what}");
                assert_eq!(hub.take_requests(), [""; 0], "{what}: nothing is asked when cached");
            }
            Err(said) => {
                refused(what, result, &["hub org/name/m.gguf", said]);
                assert_eq!(files_below(&here.cache()), [""; 0], "{what}");
            }
        }
    };
    check("as it should be", &[], Ok(&[""]));
    check("cut once", &[Fault::Cut(3000)], Ok(&["", "bytes=3000-9999"]));
    check("cut before anything came", &[Fault::Cut(0)], Ok(&["", ""]));
    check(
        "cut twice",
        &[Fault::Cut(3000), Fault::Cut(5000)],
        Ok(&["", "bytes=3000-9999", "bytes=8000-9999"]),
    );
    check("no ranges", &[Fault::Cut(3000), Fault::Whole], Ok(&["", "bytes=3000-9999"]));
    check("cut again and again", &vec![Fault::Cut(1000); 4], Err("4000 of 10000 bytes"));
    check(
        "other bytes",
        &[Fault::Instead(noise(9_999).into_iter().chain([7]).collect())],
        Err("sha256 is"),
    );
    check(
        "other bytes after a cut",
        &[Fault::Cut(2000), Fault::Instead(vec![1; 8000])],
        Err("sha256 is"),
    );
    check(
        "too many bytes",
        &[Fault::Instead(noise(10_001))],
        Err("more than the stated 10000 bytes"),
    );
    check("too few bytes", &vec![Fault::Instead(noise(100)); 4], Err("of 10000 bytes"));
    check("an error in the end", &[Fault::Status(403)], Err("Forbidden"));
}

#[test]
fn a_wrong_checksum_or_token_is_refused() {
    let hub = Hub::start(one_file(), Some(TOKEN));
    let here = Here::new(&vec![7; 10_000]);
    let (result, _) = here.resolve(&hub.url, "tiny", How::Online);
    refused("another file in the manifest", result, &["sha256 is", "the manifest states"]);
    here.write_manifest(&one_file()["m.gguf"]);
    let (result, _) = here.resolve(&hub.url, "tiny", How::NoToken);
    refused("no token", result, &["Access is restricted", "HF_TOKEN"]);
    assert_eq!(files_below(&here.cache()), [""; 0]);
}

#[test]
fn a_repository_becomes_a_model_that_opens() {
    let (hub, here) = (Hub::start(repository(), Some(TOKEN)), Here::new(b"x"));
    let (model, _) = here.resolve(&hub.url, "org/name", How::Online);
    let model = model.expect("resolves");
    assert_eq!((model.id.as_str(), model.revision.as_str()), ("org/name", COMMIT));
    let requests = hub.take_requests();
    assert!(requests.iter().all(|line| line.ends_with(" with token")), "{requests:?}");
    for unwanted in ["README", "pytorch", "onnx", "escape"] {
        assert!(!requests.iter().any(|line| line.contains(unwanted)), "{unwanted}: {requests:?}");
    }
    let ModelSource::Dir { shards, tokenizer_config, .. } = &model.source else {
        panic!("{:?}", model.source)
    };
    assert!(tokenizer_config.is_some());
    for (path, name) in shards.iter().zip(SHARDS) {
        assert!(path.ends_with(name), "{path:?}");
        assert_eq!(fs::read(path).expect("reads"), repository()[name]);
    }
    let spec = EngineSpec {
        threads: 1,
        context_tokens_max: None,
        kv_cache_bytes: 1 << 20,
        kv_dtype: KvDtype::F32,
        step_tokens_max: 64,
        running_seqs_max: 4,
        waiting_requests_max: 4,
        pipeline_depth: 1,
        stream_buffer_events_max: 64,
        client_stall_max: Duration::from_secs(60),
        calibration: Duration::ZERO,
        metered: true,
        gpu: None,
    };
    let opened =
        assemble(&ModelId::new("m"), &model.source, &spec, Clock::system()).expect("opens");
    assert_eq!(opened.tokenizer.encode("bad", false).expect("encodes"), [1, 0, 3]);

    for (how, named) in [
        (How::Offline, "org/name"),
        (How::Offline, "org/name@main"),
        (How::Offline, &format!("org/name@{COMMIT}")),
    ] {
        let (again, _) = here.resolve(&hub.url, named, how);
        assert_eq!(again.expect("cached").source, model.source, "{named}");
        assert_eq!(hub.take_requests(), [""; 0], "{named}: nothing is asked");
    }
    let (again, _) = here.resolve(&hub.url, "org/name", How::Online);
    assert_eq!(again.expect("resolves").source, model.source);
    let requests = hub.take_requests();
    assert!(
        !requests.iter().any(|line| line.contains("blob")),
        "nothing comes twice: {requests:?}"
    );

    let url = hub.url.clone();
    drop(hub);
    let (again, notes) = here.resolve(&url, "org/name", How::Online);
    assert_eq!(again.expect("cached").source, model.source, "the hub is away");
    assert!(notes.contains("using what is cached"), "{notes}");
}

#[test]
fn a_repository_is_refused_with_what_is_wrong() {
    let hub = Hub::start(repository(), Some(TOKEN));
    let check = |model: &str, how, said: &[&str]| {
        let here = Here::new(b"x");
        let (result, _) = here.resolve(&hub.url, model, how);
        refused(model, result, said);
        assert_eq!(files_below(&here.cache()), [""; 0], "{model}");
    };
    check("org/name", How::NoToken, &["Access is restricted", "HF_TOKEN"]);
    check("org/name", How::Offline, &["org/name", "cache"]);
    check(&format!("org/name@{COMMIT}"), How::Offline, &["org/name", "cache"]);
    check("org/name@absent", How::Online, &["Revision not found: absent"]);
    check("org/other", How::Online, &["org/other", "not found"]);
    let incomplete = repository().into_iter().filter(|(name, _)| name != SHARDS[1]).collect();
    let hub = Hub::start(incomplete, None);
    let (result, _) = Here::new(b"x").resolve(&hub.url, "org/name", How::Online);
    refused("a shard is missing", result, &["missing", SHARDS[1]]);
}

#[test]
fn a_broken_transfer_never_leaves_a_broken_model() {
    let check = |what: &str, file: &str, faults: &[Fault], said: Option<&[&str]>| {
        let (hub, here) = (Hub::start(repository(), None), Here::new(b"x"));
        hub.fail(file, faults);
        let (mut result, _) = here.resolve(&hub.url, "org/name", How::Online);
        hub.take_requests();
        if let Some(said) = said {
            refused(what, result, said);
            for named in ["org/name", &format!("org/name@{COMMIT}")] {
                let (offline, _) = here.resolve(&hub.url, named, How::Offline);
                refused(what, offline, &["org/name", "cache"]);
            }
            assert_eq!(hub.take_requests(), [""; 0], "{what}: nothing is asked offline");
            (result, _) = here.resolve(&hub.url, "org/name", How::Online);
            let requests = hub.take_requests();
            let came = requests.iter().filter(|line| line.starts_with("GET blob")).count();
            let expected = usize::from(file.ends_with(".safetensors"));
            assert_eq!(came, expected, "{what}: what is whole comes once: {requests:?}");
        }
        let source = result.unwrap_or_else(|error| panic!("{what}: {error}")).source;
        let ModelSource::Dir { shards, config, .. } = source else { panic!("{source:?}") };
        let expected = repository();
        for path in shards.iter().chain([&config]) {
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            assert_eq!(fs::read(path).expect("reads"), expected[&name], "{what}: {name}");
        }
    };
    let (first, cut) = (SHARDS[0], Fault::Cut(2000));
    let size = repository()[first].len();
    check("cut once", first, std::slice::from_ref(&cut), None);
    check("cut again and again", first, &vec![cut; 4], Some(&["hub:"]));
    check("an error in the end", first, &[Fault::Status(403)], None);
    check("errors in the end", first, &vec![Fault::Status(403); 4], Some(&[first, "13 bytes"]));
    check(
        "other bytes",
        first,
        &vec![Fault::Instead(vec![7; size]); 4],
        Some(&[first, "sha256 is"]),
    );
    check("other bytes once", first, &[Fault::Instead(vec![7; size])], None);
    check(
        "a short file",
        "config.json",
        &vec![Fault::Instead(b"{}".to_vec()); 4],
        Some(&["config.json", "2 bytes"]),
    );
    check(
        "not there at first",
        "tokenizer_config.json",
        &vec![Fault::Absent; 4],
        Some(&["tokenizer_config.json"]),
    );
}

#[test]
fn damage_in_the_cache_is_found_and_mended() {
    let (hub, here) = (Hub::start(repository(), None), Here::new(b"x"));
    let (model, _) = here.resolve(&hub.url, "org/name", How::Online);
    let ModelSource::Dir { shards, .. } = model.expect("resolves").source else { panic!("a file") };
    let path = fs::canonicalize(&shards[1]).expect("a blob");
    let good = fs::read(&path).expect("reads");
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    for (damaged, said) in [(flipped, "sha256 is"), (good[..100].to_vec(), "100 bytes")] {
        fs::write(&path, &damaged).expect("writes");
        let (result, _) = here.resolve(&hub.url, "org/name", How::Offline);
        refused("offline", result, &[SHARDS[1], "sha256 is"]);
        let (result, notes) = here.resolve(&hub.url, "org/name", How::Online);
        result.expect("mended");
        assert_eq!(fs::read(&shards[1]).expect("reads"), good, "{notes}");
        fs::write(&path, &damaged).expect("writes");
        let (result, notes) = here.resolve(&hub.url, "org/name", How::Online);
        result.expect("mended");
        assert!(notes.contains(SHARDS[1]) && notes.contains(said), "{notes}");
    }
}

#[test]
fn two_at_once_fetch_once() {
    let (hub, here) = (Hub::start(repository(), None), Here::new(b"x"));
    std::thread::scope(|scope| {
        let threads =
            [(); 2].map(|()| scope.spawn(|| here.resolve(&hub.url, "org/name", How::Online).0));
        let [one, two] = threads.map(|thread| thread.join().expect("no panic").expect("resolves"));
        assert_eq!(one, two);
    });
    let requests = hub.take_requests();
    assert_eq!(
        requests.iter().filter(|line| line.starts_with("GET blob")).count(),
        2,
        "{requests:?}"
    );
}
