//! Small models of every family, their configuration as transformers wrote it.

use candela::{
    model::{self, ModelConfig, WeightFiles},
    ops::KvDtype,
    registry::{ModelSource, NoProgress, Registry, RegistryOptions},
};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    common::model_files,
    gguf_files,
    runner::{Runner, argmax, error_max},
};

/// Both sides compute in f32 and differ in the order of summation. Measured: 1.2e-5, of which 5e-6
/// is the golden's rounding to five places, where the logits have a standard deviation of about 1.5.
const LOGIT_ERROR_MAX: f32 = 2e-5;
/// Two logits may each be off by the error.
const MARGIN_MIN: f32 = 2.0 * LOGIT_ERROR_MAX;
const CONTEXT: usize = 64;
/// Prompt whole, by token, and in pieces that do and do not end with a block.
const CHUNKS: [usize; 5] = [CONTEXT, 1, 7, 16, 33];

#[derive(Deserialize)]
struct Golden {
    prompt: Vec<u32>,
    /// Positions of the prompt whose logits are kept.
    rows: Vec<usize>,
    cases: Vec<Case>,
}

#[derive(Clone, Deserialize)]
struct Case {
    name: String,
    dtype: String,
    config: Value,
    shapes: Map<String, Value>,
    tokens: Vec<u32>,
    margins: Vec<f32>,
    logits: Vec<Vec<f32>>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../reference/families.json")).expect("a golden file")
}

/// How a case is written to disk.
#[derive(Clone, Copy, Debug)]
enum Files {
    SafeTensors { shards: usize },
    Gguf,
}

/// The case written to disk, found by the registry and loaded.
fn runner(case: &Case, files: Files) -> Runner {
    let dir = tempfile::tempdir().expect("a directory");
    let path = match files {
        Files::SafeTensors { shards } => {
            model_files::write(dir.path(), &case.config, &case.shapes, &case.dtype, shards);
            dir.path().to_owned()
        }
        Files::Gguf => dir.path().join("model.gguf"),
    };
    if let Files::Gguf = files {
        gguf_files::write(&path, &case.config, &case.shapes, &case.dtype);
    }
    let registry = Registry::new(RegistryOptions::default()).expect("built-in manifests");
    let found = registry.resolve(path.to_str().expect("UTF-8"), &NoProgress).expect("a model");
    let weights = match found.source {
        ModelSource::Dir { config, shards, .. } => WeightFiles::SafeTensors { config, shards },
        ModelSource::Gguf { path } => WeightFiles::Gguf(path),
    };
    let (config, weights) = model::load(&weights).expect(&case.name);
    Runner::new(config, weights, CONTEXT, CONTEXT, KvDtype::F32)
}

fn check(golden: &Golden, case: &Case, files: Files) {
    let runner = runner(case, files);
    let mut tokens = golden.prompt.clone();
    tokens.extend(&case.tokens);
    let last = golden.prompt.len() - 1;
    let kept = [&golden.rows[..], &(last + 1..last + case.tokens.len()).collect::<Vec<_>>()];
    let logits = runner.logits(&tokens, &kept.concat(), CONTEXT);
    for chunk in CHUNKS {
        let same = runner.logits(&tokens, &kept.concat(), chunk) == logits;
        assert!(same, "{}, {files:?}: chunks of {chunk} change the logits", case.name);
    }
    let (rows, greedy) = logits.split_at(golden.rows.len());
    let error = error_max(rows.iter().flatten().zip(case.logits.iter().flatten()));
    println!("{}, {files:?}: {error}", case.name);
    assert!(error <= LOGIT_ERROR_MAX, "{}, {files:?}: off by {error}", case.name);
    // The row that draws the first token is the last of those kept.
    let greedy = rows.last().into_iter().chain(greedy).map(|logits| argmax(logits));
    for (index, token) in greedy.enumerate() {
        let sure = case.margins[index] > MARGIN_MIN;
        assert!(!sure || token == case.tokens[index], "{}, token {index}: {token}", case.name);
    }
}

#[test]
fn every_family_agrees_with_transformers() {
    let golden = golden();
    assert_eq!(golden.rows.last(), Some(&(golden.prompt.len() - 1)));
    assert_eq!(golden.cases.len(), 13);
    for (index, case) in golden.cases.iter().enumerate() {
        assert_eq!((case.logits.len(), case.tokens.len()), (golden.rows.len(), case.margins.len()));
        // One case in three files, the others in one.
        check(&golden, case, Files::SafeTensors { shards: if index == 0 { 3 } else { 1 } });
        // GGUF has one window for all layers.
        if case.config["max_window_layers"] != 1 {
            check(&golden, case, Files::Gguf);
        }
    }
}

/// A golden that a wrong key would pass as well would prove nothing.
#[test]
fn a_changed_key_changes_the_logits() {
    let golden = golden();
    for (name, key, value) in [
        ("llama 2", "/rms_norm_eps", json!(1e-5)),
        ("llama 2", "/rope_parameters/rope_theta", json!(10001.0)),
        ("llama 3", "/rope_parameters/factor", json!(8.01)),
        ("llama 3", "/rope_parameters/low_freq_factor", json!(1.01)),
        ("llama 3", "/rope_parameters/high_freq_factor", json!(4.01)),
        ("llama 3", "/rope_parameters/original_max_position_embeddings", json!(17)),
        ("llama 3, tied", "/rope_parameters/rope_type", json!("default")),
        ("llama, linear rope", "/rope_parameters/factor", json!(4.01)),
        ("llama, biases", "/attention_bias", json!(false)),
        ("llama, biases", "/mlp_bias", json!(false)),
        ("mistral", "/sliding_window", json!(7)),
        ("mistral", "/sliding_window", json!(9)),
        ("mistral", "/sliding_window", json!(null)),
        ("qwen2, window above layer 1", "/sliding_window", json!(5)),
        ("qwen2, window above layer 1", "/layer_types/0", json!("sliding_attention")),
        ("qwen2, window above layer 1", "/layer_types/1", json!("full_attention")),
        ("qwen2, window above layer 1", "/use_sliding_window", json!(false)),
        ("qwen3, biases, tied", "/attention_bias", json!(false)),
    ] {
        let case = golden.cases.iter().find(|case| case.name == name).expect(name);
        let mut changed = case.clone();
        *changed.config.pointer_mut(key).expect(key) = value.clone();
        if key == "/use_sliding_window" {
            changed.config["layer_types"] = json!(null);
        }
        let runner = runner(&changed, Files::SafeTensors { shards: 1 });
        let logits = runner.logits(&golden.prompt, &golden.rows, CONTEXT);
        let error = error_max(logits.iter().flatten().zip(case.logits.iter().flatten()));
        assert!(error > LOGIT_ERROR_MAX, "{name}: {key} of {value} changes nothing: {error}");
    }
}

/// The same configuration as transformers wrote it before version 5.
fn old_style(config: &Value) -> Value {
    let mut old = config.as_object().expect("an object").clone();
    let mut rope = old.remove("rope_parameters").expect("rope parameters");
    let rope = rope.as_object_mut().expect("an object");
    old.insert("rope_theta".into(), rope.remove("rope_theta").expect("theta"));
    let kind = rope.remove("rope_type").expect("a type");
    let scaling = if kind == "default" { Value::Null } else { json!(rope) };
    old.insert("rope_scaling".into(), scaling);
    // Llama 3.1 came with `rope_type`, what preceded it with `type`.
    if let Some(scaling) = old["rope_scaling"].as_object_mut() {
        scaling.insert(if kind == "linear" { "type" } else { "rope_type" }.into(), kind);
    }
    old.remove("layer_types");
    Value::Object(old)
}

#[test]
fn old_configurations_read_the_same() {
    for case in golden().cases {
        let read = |json: &Value| ModelConfig::from_hf_json(&json.to_string()).expect(&case.name);
        assert_eq!(read(&old_style(&case.config)), read(&case.config), "{}", case.name);
    }
}
