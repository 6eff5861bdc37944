//! Models whose weights are a hash of tensor name and index, as `tests/reference/families.py`
//! makes them, written as a directory of Hugging Face files.

use std::path::Path;

use half::{bf16, f16};
use serde_json::{Map, Value, json};

/// Writes a model into `dir`: `config.json`, weights in `shards` files and, where there is more
/// than one, their index. `shapes` is name to list of sizes; `dtype` is torch's name.
pub fn write(dir: &Path, config: &Value, shapes: &Map<String, Value>, dtype: &str, shards: usize) {
    let file = |name: &str, bytes: &[u8]| std::fs::write(dir.join(name), bytes).expect("written");
    file("config.json", config.to_string().as_bytes());
    // Where a tokenizer would be; this test reads none.
    file("tokenizer.json", b"{}");
    if shards == 1 {
        return file("model.safetensors", &safetensors(shapes.iter(), dtype));
    }
    let mut index = Map::new();
    for shard in 0..shards {
        let name = format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
        // Every `shards`-th tensor, so that the parts of one matrix lie in different files.
        let tensors = || shapes.iter().skip(shard).step_by(shards);
        file(&name, &safetensors(tensors(), dtype));
        index.extend(tensors().map(|(tensor, _)| (tensor.clone(), json!(name))));
    }
    file("model.safetensors.index.json", json!({"weight_map": index}).to_string().as_bytes());
}

fn safetensors<'a>(tensors: impl Iterator<Item = (&'a String, &'a Value)>, dtype: &str) -> Vec<u8> {
    let short = match dtype {
        "float32" => "F32",
        "float16" => "F16",
        "bfloat16" => "BF16",
        other => panic!("dtype {other}"),
    };
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, shape) in tensors {
        let count = sizes(shape).iter().product();
        let start = data.len();
        data.extend(values(name, count).flat_map(|value| bytes(value, dtype)));
        let entry = json!({"dtype": short, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), entry);
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

pub fn sizes(shape: &Value) -> Vec<u64> {
    let sizes = shape.as_array().expect("a shape").iter();
    sizes.map(|size| size.as_u64().expect("a size")).collect()
}

/// Norms lie about one, all else about zero; not yet rounded to a dtype.
pub fn values(name: &str, count: u64) -> impl Iterator<Item = f32> {
    let norm = name.ends_with("norm.weight");
    hashed(name, count).map(move |value| if norm { 1.0 + 0.5 * value } else { 0.3 * value })
}

/// Uniform in -1 .. 1: splitmix64 (Steele et al., 2014) of FNV-1a of the name plus the index.
fn hashed(name: &str, count: u64) -> impl Iterator<Item = f32> {
    let fnv = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3);
    let seed = name.bytes().fold(0xCBF2_9CE4_8422_2325, fnv);
    (0..count).map(move |index| {
        let z = seed.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        let z = z ^ z >> 31;
        (z >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// A value as the dtype of this name has it.
pub fn bytes(value: f32, dtype: &str) -> Vec<u8> {
    match dtype {
        "float16" => f16::from_f32(value).to_le_bytes().to_vec(),
        "bfloat16" => bf16::from_f32(value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    }
}
