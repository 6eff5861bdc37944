//! The models of `model_files` as llama.cpp's converter would write them to GGUF: other names,
//! vectors in f32, and for the llama architecture the halves of each rotated head interleaved.

use std::path::Path;

use half::{bf16, f16};
use serde_json::{Map, Value};

use super::common::model_files::{bytes, sizes, values};

const ALIGN: usize = 32;

/// Name parts in Hugging Face's files and in GGUF.
const NAMES: [(&str, &str); 15] = [
    ("model.layers.", "blk."),
    ("model.embed_tokens.", "token_embd."),
    ("model.norm.", "output_norm."),
    ("lm_head.", "output."),
    ("input_layernorm.", "attn_norm."),
    ("post_attention_layernorm.", "ffn_norm."),
    ("self_attn.q_proj.", "attn_q."),
    ("self_attn.k_proj.", "attn_k."),
    ("self_attn.v_proj.", "attn_v."),
    ("self_attn.o_proj.", "attn_output."),
    ("self_attn.q_norm.", "attn_q_norm."),
    ("self_attn.k_norm.", "attn_k_norm."),
    ("mlp.gate_proj.", "ffn_gate."),
    ("mlp.up_proj.", "ffn_up."),
    ("mlp.down_proj.", "ffn_down."),
];

/// Number of a dtype in GGUF.
fn kind(dtype: &str) -> u32 {
    match dtype {
        "float32" => 0,
        "float16" => 1,
        "bfloat16" => 30,
        other => panic!("dtype {other}"),
    }
}

pub fn write(path: &Path, config: &Value, shapes: &Map<String, Value>, dtype: &str) {
    let arch = match config["model_type"].as_str().expect("a type") {
        // The converter makes no difference between the two.
        "mistral" => "llama",
        other => other,
    };
    let mut tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)> = Vec::new();
    for (name, shape) in shapes {
        let (sizes, heads) = (sizes(shape), rotated_heads(name, config));
        let (rows, row) = (sizes[0] as usize, sizes[1..].iter().product::<u64>() as usize);
        let values: Vec<f32> = values(name, (rows * row) as u64).collect();
        let source = |at: usize| heads.map_or(at, |heads| interleaved(at, rows / heads));
        let dtype_of = |value: f32| if sizes.len() == 1 { rounded(value, dtype) } else { value };
        let kept = if sizes.len() == 1 { "float32" } else { dtype };
        let rows = (0..rows).flat_map(|at| &values[source(at) * row..][..row]);
        let data = rows.flat_map(|value| bytes(dtype_of(*value), kept)).collect();
        let name = NAMES.iter().fold(name.clone(), |name, (hf, gguf)| name.replace(hf, gguf));
        tensors.push((name, sizes.into_iter().rev().collect(), kind(kept), data));
    }
    if let Some(factors) = rope_factors(config) {
        let data = factors.iter().flat_map(|factor| factor.to_le_bytes()).collect();
        tensors.push(("rope_freqs.weight".into(), vec![factors.len() as u64], 0, data));
    }
    let mut file = header(arch, config, tensors.len());
    let mut offset = 0;
    for (name, dims, kind, data) in &tensors {
        string(&mut file, name);
        file.extend((dims.len() as u32).to_le_bytes());
        file.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        file.extend(kind.to_le_bytes());
        file.extend((offset as u64).to_le_bytes());
        offset += data.len().next_multiple_of(ALIGN);
    }
    for (_, _, _, data) in tensors {
        file.resize(file.len().next_multiple_of(ALIGN), 0);
        file.extend(data);
    }
    std::fs::write(path, file).expect("written");
}

fn header(arch: &str, config: &Value, tensors: usize) -> Vec<u8> {
    let number = |key: &str| config[key].as_f64();
    let head_dim = number("head_dim")
        .or_else(|| Some(number("hidden_size")? / number("num_attention_heads")?));
    let rope = &config["rope_parameters"];
    let linear = rope["rope_type"] == "linear";
    let integers = [
        ("embedding_length", number("hidden_size")),
        ("feed_forward_length", number("intermediate_size")),
        ("block_count", number("num_hidden_layers")),
        ("context_length", number("max_position_embeddings")),
        ("attention.head_count", number("num_attention_heads")),
        ("attention.head_count_kv", number("num_key_value_heads")),
        ("attention.key_length", head_dim),
        ("attention.sliding_window", number("sliding_window")),
    ];
    let floats = [
        ("attention.layer_norm_rms_epsilon", number("rms_norm_eps")),
        ("rope.freq_base", rope["rope_theta"].as_f64()),
        ("rope.scaling.factor", rope["factor"].as_f64().filter(|_| linear)),
    ];
    let mut entries = Vec::new();
    let mut entry = |key: &str, kind: u32, value: &[u8]| {
        let mut bytes = Vec::new();
        string(&mut bytes, key);
        entries.push([&bytes, &kind.to_le_bytes()[..], value].concat());
    };
    let mut name = Vec::new();
    string(&mut name, arch);
    entry("general.architecture", 8, &name);
    for (key, value) in integers {
        if let Some(value) = value {
            entry(&format!("{arch}.{key}"), 4, &(value as u32).to_le_bytes());
        }
    }
    for (key, value) in floats {
        if let Some(value) = value {
            entry(&format!("{arch}.{key}"), 6, &(value as f32).to_le_bytes());
        }
    }
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend((tensors as u64).to_le_bytes());
    file.extend((entries.len() as u64).to_le_bytes());
    file.extend(entries.concat());
    file
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn rounded(value: f32, dtype: &str) -> f32 {
    match dtype {
        "float16" => f16::from_f32(value).to_f32(),
        "bfloat16" => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// Heads of a q or k projection whose rows the converter reorders.
fn rotated_heads(name: &str, config: &Value) -> Option<usize> {
    if !["llama", "mistral"].contains(&config["model_type"].as_str()?) {
        return None;
    }
    let key = match name {
        name if name.contains("q_proj") => "num_attention_heads",
        name if name.contains("k_proj") => "num_key_value_heads",
        _ => return None,
    };
    config[key].as_u64().map(|heads| heads as usize)
}

/// Which row of the original comes to row `at`: first halves and second halves alternate.
fn interleaved(at: usize, head_dim: usize) -> usize {
    let (head, within) = (at / head_dim, at % head_dim);
    head * head_dim + within % 2 * (head_dim / 2) + within / 2
}

/// Divisors of the frequencies of Llama 3.1, by wavelength.
fn rope_factors(config: &Value) -> Option<Vec<f32>> {
    let rope = &config["rope_parameters"];
    let number = |key: &str| rope[key].as_f64();
    if rope["rope_type"] != "llama3" {
        return None;
    }
    let (factor, low, high) =
        (number("factor")?, number("low_freq_factor")?, number("high_freq_factor")?);
    let (theta, context) = (number("rope_theta")?, number("original_max_position_embeddings")?);
    let head_dim = config["head_dim"].as_u64()?;
    let divisor = |index: u64| {
        let wavelength = std::f64::consts::TAU * theta.powf(2.0 * index as f64 / head_dim as f64);
        if wavelength < context / high {
            return 1.0;
        }
        if wavelength > context / low {
            return factor as f32;
        }
        let smooth = (context / wavelength - low) / (high - low);
        (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
    };
    Some((0..head_dim / 2).map(divisor).collect())
}
