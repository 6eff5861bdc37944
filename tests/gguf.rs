//! Every type of tensor in GGUF files that candle writes, against candle's own dequantisation; and
//! files that must be refused, with what the message has to name.

use std::{borrow::Cow, path::Path, sync::Arc};

use candela::{
    model::{ModelWeights, WeightFiles, load},
    ops::{CpuPool, Linear, Matrix, Place, View},
};
use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QStorage, QTensor, gguf_file},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

const HIDDEN: usize = 256;
const INNER: usize = 512;
const VOCAB: usize = 40;
const KV: usize = 128;
/// Matrices of the model's one layer and around it: name, outputs, inputs.
const MATRICES: [(&str, usize, usize); 9] = [
    ("blk.0.attn_q.weight", HIDDEN, HIDDEN),
    ("blk.0.attn_k.weight", KV, HIDDEN),
    ("blk.0.attn_v.weight", KV, HIDDEN),
    ("blk.0.attn_output.weight", HIDDEN, HIDDEN),
    ("blk.0.ffn_gate.weight", INNER, HIDDEN),
    ("blk.0.ffn_up.weight", INNER, HIDDEN),
    ("blk.0.ffn_down.weight", HIDDEN, INNER),
    ("token_embd.weight", VOCAB, HIDDEN),
    ("output.weight", VOCAB, HIDDEN),
];
const VECTORS: [&str; 3] =
    ["blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"];
const DENSE: [GgmlDType; 3] = [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16];
const QUANTISED: [GgmlDType; 12] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q8_1,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
    GgmlDType::Q8K,
];
/// Half a step of a group's 16-bit activations, as a part of the largest, and some rounding.
const QUANTISED_ERROR: f64 = 1.6e-5;
const DENSE_ERROR: f64 = 1e-6;

/// Values about zero with outliers, and rows that quantisers find hard: zeros, tiny, equal, one sign.
fn rows(rng: &mut StdRng, n: usize, k: usize) -> Vec<f32> {
    let value = |rng: &mut StdRng, row: usize| match row % 8 {
        0 => 0.0,
        1 => rng.random_range(-1e-6..1e-6f32),
        2 => 0.75,
        3 => rng.random_range(0.5..1.0f32),
        _ if rng.random_ratio(1, 64) => rng.random_range(-40.0..40.0f32),
        _ => rng.random_range(-1.0..1.0f32),
    };
    (0..n * k).map(|index| value(rng, index / k)).collect()
}

fn quantised(rng: &mut StdRng, kind: GgmlDType, n: usize, k: usize) -> QTensor {
    let values = Tensor::from_vec(rows(rng, n, k), (n, k), &Device::Cpu).expect("a tensor");
    QTensor::quantize(&values, kind).expect("quantises")
}

/// Blocks of any bits at all, which no quantiser would write.
fn any_bits(rng: &mut StdRng, kind: GgmlDType, n: usize, k: usize) -> QTensor {
    let mut bytes = vec![0u8; n * k / kind.block_size() * kind.type_size()];
    rng.fill(&mut bytes[..]);
    let storage = QStorage::from_data(Cow::Owned(bytes), &Device::Cpu, kind).expect("storage");
    QTensor::new(storage, (n, k)).expect("a tensor")
}

/// A model file of one layer. `vector` is the type of its norms.
fn write(path: &Path, matrices: &[(&str, QTensor)], vector: GgmlDType) {
    let ones = Tensor::ones(HIDDEN, candle_core::DType::F32, &Device::Cpu).expect("a tensor");
    let norm = QTensor::quantize(&ones, vector).expect("quantises");
    let mut tensors: Vec<_> = matrices.iter().map(|(name, tensor)| (*name, tensor)).collect();
    tensors.extend(VECTORS.map(|name| (name, &norm)));
    let number = |n: usize| gguf_file::Value::U32(n as u32);
    // An architecture whose rows of q and k lie in the file as in the model.
    let metadata = [
        ("general.architecture", gguf_file::Value::String("qwen2".into())),
        ("qwen2.embedding_length", number(HIDDEN)),
        ("qwen2.feed_forward_length", number(INNER)),
        ("qwen2.block_count", number(1)),
        ("qwen2.context_length", number(64)),
        ("qwen2.attention.head_count", number(4)),
        ("qwen2.attention.head_count_kv", number(2)),
    ];
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let mut file = std::fs::File::create(path).expect("creates");
    gguf_file::write(&mut file, &metadata, &tensors).expect("writes");
}

/// Our matrix for each of `MATRICES`, with the first of its rows.
fn ours(weights: &ModelWeights) -> [(&Matrix, usize); 9] {
    let layer = &weights.layers[0];
    [
        (&layer.qkv, 0),
        (&layer.qkv, HIDDEN),
        (&layer.qkv, HIDDEN + KV),
        (&layer.o, 0),
        (&layer.gate_up, 0),
        (&layer.gate_up, INNER),
        (&layer.down, 0),
        (&weights.embed, 0),
        (&weights.lm_head, 0),
    ]
}

fn dequantised(tensor: &QTensor) -> Vec<Vec<f32>> {
    tensor.dequantize(&Device::Cpu).expect("dequantises").to_vec2().expect("a matrix")
}

fn linear(weight: &Matrix, x: &[f32]) -> Vec<f32> {
    let pool = Arc::new(CpuPool::new(1).expect("threads"));
    let (n, k) = (weight.n(), weight.k());
    let mut arena = x.to_vec();
    arena.resize(k + n, f32::NAN);
    let arena = Tensor::from_vec(arena, k + n, &Device::Cpu).expect("a tensor");
    let op = Linear {
        weight,
        bias: None,
        x: View { offset: 0, cols: k },
        y: View { offset: k, cols: n },
        rows: 1,
        wide: false,
        place: &Place::on_cpu(pool, 1, k),
    };
    arena.inplace_op1(&op).expect("runs");
    arena.narrow(0, k, n).expect("inside").to_vec1().expect("f32")
}

/// The product of a row, and how far ours may be from it.
fn product(w: &[f32], x: &[f32], dense: bool) -> (f64, f64) {
    let exact = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
    let largest = |values: &[f32]| values.iter().fold(0.0, |top, v| f64::from(v.abs()).max(top));
    let groups = w.chunks(32).zip(x.chunks(32));
    let size: f64 = groups.map(|(w, x)| largest(x) * 32.0 * largest(w)).sum();
    (exact, size * if dense { DENSE_ERROR } else { QUANTISED_ERROR })
}

#[test]
fn every_type_agrees_with_candle() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("model.gguf");
    let mut rng = StdRng::seed_from_u64(20);
    for kind in DENSE.into_iter().chain(QUANTISED) {
        for make in [quantised, any_bits] {
            let matrices = MATRICES.map(|(name, n, k)| (name, make(&mut rng, kind, n, k)));
            write(&path, &matrices, DENSE[rng.random_range(0..3)]);
            let (_, weights) = load(&WeightFiles::Gguf(path.clone())).expect("loads");
            for ((name, tensor), (weight, first)) in matrices.iter().zip(ours(&weights)) {
                let mut row = vec![0f32; weight.k()];
                for (index, expected) in dequantised(tensor).iter().enumerate() {
                    weight.host().expect("on the CPU").dequant_row(first + index, &mut row);
                    let differs = |(a, b): (&f32, &f32)| a != b && !(a.is_nan() && b.is_nan());
                    let at = row.iter().zip(expected).position(differs);
                    assert_eq!(at, None, "{kind:?} {name} row {index}: {row:?} {expected:?}");
                }
            }
        }
    }
}

#[test]
fn products_agree_with_f64() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("model.gguf");
    let mut rng = StdRng::seed_from_u64(21);
    for kind in DENSE.into_iter().chain(QUANTISED) {
        let matrices = MATRICES.map(|(name, n, k)| (name, quantised(&mut rng, kind, n, k)));
        write(&path, &matrices, GgmlDType::F32);
        let (_, weights) = load(&WeightFiles::Gguf(path.clone())).expect("loads");
        for ((name, tensor), (weight, first)) in matrices.iter().zip(ours(&weights)) {
            // The fifth row is of the kind with outliers.
            let x = rows(&mut rng, 5, weight.k()).split_off(4 * weight.k());
            let y = linear(weight, &x);
            for (index, w) in dequantised(tensor).iter().enumerate() {
                let (exact, bound) = product(w, &x, DENSE.contains(&kind));
                let error = (f64::from(y[first + index]) - exact).abs();
                assert!(error <= bound, "{kind:?} {name} row {index}: {error} above {bound}");
            }
        }
    }
}

/// Writes `value` over the file where a tensor's header has its dimensions and its type.
fn patch(file: &mut [u8], tensor: &str, dims: [u64; 2], kind: u32) {
    let name = file.windows(tensor.len()).position(|bytes| bytes == tensor.as_bytes());
    let at = name.expect("the tensor") + tensor.len() + 4;
    file[at..at + 8].copy_from_slice(&dims[0].to_le_bytes());
    file[at + 8..at + 16].copy_from_slice(&dims[1].to_le_bytes());
    file[at + 16..at + 20].copy_from_slice(&kind.to_le_bytes());
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("model.gguf");
    let mut rng = StdRng::seed_from_u64(22);
    let matrices = MATRICES.map(|(name, n, k)| (name, quantised(&mut rng, GgmlDType::Q8_0, n, k)));
    let refused = |said: &[&str]| {
        let error = load(&WeightFiles::Gguf(path.clone())).err().expect("refused").to_string();
        assert!(said.iter().all(|said| error.contains(said)), "{error:?} lacks one of {said:?}");
    };
    write(&path, &matrices, GgmlDType::Q8_0);
    refused(&["tensor blk.0.attn_norm.weight", "type Q8_0", "not supported"]);
    write(&path, &matrices, GgmlDType::F32);
    let good = std::fs::read(&path).expect("reads");
    load(&WeightFiles::Gguf(path.clone())).expect("loads");
    let (up, shape) = ("blk.0.ffn_up.weight", [HIDDEN as u64, INNER as u64]);
    for (dims, kind, said) in [
        (shape, 23, &["of type IQ4_XS", "not supported"][..]),
        (shape, 39, &["of type MXFP4", "not supported"]),
        (shape, 4, &["of the unknown type 4", "not supported"]),
        (shape, u32::MAX, &["of the unknown type 4294967295"]),
        ([255, 2], 8, &["rows of 255", "Q8_0", "32"]),
        ([16, 16], 8, &["rows of 16", "Q8_0", "32"]),
        ([128, 1024], 12, &["rows of 128", "Q4_K", "256"]),
        ([32, 8], 10, &["rows of 32", "Q2_K", "256"]),
        ([32, 8], 15, &["rows of 32", "Q8_K", "256"]),
        ([0, 512], 8, &["does not fit the file"]),
        ([256, u64::MAX], 8, &["does not fit the file"]),
        ([256, 1 << 20], 8, &["does not fit the file"]),
        ([256, 256], 8, &["[256, 256]", "not [256, 512]"]),
        ([512, 256], 8, &["[512, 256]", "not [256, 512]"]),
    ] {
        let mut file = good.clone();
        patch(&mut file, up, dims, kind);
        std::fs::write(&path, file).expect("writes");
        let mut said = said.to_vec();
        said.push(up);
        refused(&said);
    }
}
