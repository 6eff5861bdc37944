//! A model that loads in no time and draws one printable character a token, so that a client can
//! count what was delivered.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::model_files;

const HIDDEN: u64 = 32;
const MLP: u64 = 64;
/// The printable characters of ASCII, as far as byte-level BPE writes them as themselves.
const CHARACTERS: std::ops::RangeInclusive<u8> = b'!'..=b'~';

/// Writes the model into `dir`.
pub fn write(dir: &Path) {
    let vocabulary = CHARACTERS.count() as u64 + 1;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": MLP, "num_attention_heads": 2, "num_hidden_layers": 1,
        "num_key_value_heads": 2, "max_position_embeddings": 16384, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "vocab_size": vocabulary, "tie_word_embeddings": false,
        "hidden_act": "silu", "torch_dtype": "float32", "attention_bias": false, "mlp_bias": false,
    });
    let mut shapes = Map::new();
    let mut shape = |name: &str, sizes: &[u64]| shapes.insert(name.to_owned(), json!(sizes));
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        shape(name, &[vocabulary, HIDDEN]);
    }
    shape("model.norm.weight", &[HIDDEN]);
    for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
        shape(&format!("model.layers.0.self_attn.{name}.weight"), &[HIDDEN, HIDDEN]);
    }
    for name in ["gate_proj", "up_proj"] {
        shape(&format!("model.layers.0.mlp.{name}.weight"), &[MLP, HIDDEN]);
    }
    shape("model.layers.0.mlp.down_proj.weight", &[HIDDEN, MLP]);
    for name in ["input_layernorm", "post_attention_layernorm"] {
        shape(&format!("model.layers.0.{name}.weight"), &[HIDDEN]);
    }
    model_files::write(dir, &config, &shapes, "float32", 1);
    std::fs::write(dir.join("tokenizer.json"), tokenizer().to_string()).expect("written");
    let template = json!({"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"});
    std::fs::write(dir.join("tokenizer_config.json"), template.to_string()).expect("written");
}

/// Byte-level BPE without merges. A space is written as U+0120.
pub fn tokenizer() -> Value {
    let characters = CHARACTERS.map(char::from).chain(['\u{120}']);
    let entries = characters.enumerate().map(|(id, one)| (one.to_string(), json!(id)));
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": Value::Object(entries.collect()), "merges": [],
        },
    })
}
