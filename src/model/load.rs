//! From files to packed weights. The only code that knows GGUF's block formats.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::ops::{Bits, DenseType, PackedWeight, PackedWeightBuilder, QuantRow, QuantSpec};

use super::{
    Biases, Family, LayerWeights, ModelConfig, ModelError, ModelWeights, RopeScaling,
    config::checked_layers,
    gguf::{Gguf, TensorInfo, TensorKind},
    safetensors::Shards,
    weights::MappedFile,
};

/// The files of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WeightFiles {
    Gguf(PathBuf),
    SafeTensors { config: PathBuf, shards: Vec<PathBuf> },
}

/// A mapped GGUF file and its header.
pub struct GgufFile {
    pub header: Gguf,
    bytes: MappedFile,
}

impl GgufFile {
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let io = |source| ModelError::Io { path: path.display().to_string(), source };
        let bytes = MappedFile::open(path).map_err(io)?;
        let header = Gguf::parse(&bytes)
            .map_err(|error| ModelError::Format(format!("{}: {error}", path.display())))?;
        Ok(Self { header, bytes })
    }
}

/// Reads configuration and weights.
pub fn load(files: &WeightFiles) -> Result<(ModelConfig, ModelWeights), ModelError> {
    match files {
        WeightFiles::Gguf(path) => {
            let file = GgufFile::open(path)?;
            let config = gguf_config(&file)?;
            let weights = assemble(&config, &GgufSource { file: &file, config: &config })?;
            Ok((config, weights))
        }
        WeightFiles::SafeTensors { config, shards } => {
            let io = |source| ModelError::Io { path: config.display().to_string(), source };
            let config = ModelConfig::from_hf_json(&std::fs::read_to_string(config).map_err(io)?)?;
            let shards = Shards::open(shards)?;
            let weights = assemble(&config, &shards)?;
            Ok((config, weights))
        }
    }
}

/// Where matrices and vectors come from, by their part in the model. `layer` is `None` outside of
/// the layers.
pub trait WeightSource {
    fn matrix(
        &self,
        layer: Option<usize>,
        part: Part,
        shape: (usize, usize),
        out: &mut PackedWeightBuilder,
    ) -> Result<(), ModelError>;
    fn vector(&self, layer: Option<usize>, part: Part, len: usize) -> Result<Vec<f32>, ModelError>;
}

/// A tensor's part in the model, with its name in GGUF and in Hugging Face files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub gguf: &'static str,
    pub hf: &'static str,
}

macro_rules! parts {
    ($($name:ident = $gguf:literal, $hf:literal;)*) => {
        $(pub const $name: Part = Part { gguf: $gguf, hf: $hf };)*
    };
}

parts! {
    EMBED = "token_embd.weight", "model.embed_tokens.weight";
    FINAL_NORM = "output_norm.weight", "model.norm.weight";
    LM_HEAD = "output.weight", "lm_head.weight";
    ATTN_NORM = "attn_norm.weight", "input_layernorm.weight";
    Q = "attn_q.weight", "self_attn.q_proj.weight";
    K = "attn_k.weight", "self_attn.k_proj.weight";
    V = "attn_v.weight", "self_attn.v_proj.weight";
    Q_BIAS = "attn_q.bias", "self_attn.q_proj.bias";
    K_BIAS = "attn_k.bias", "self_attn.k_proj.bias";
    V_BIAS = "attn_v.bias", "self_attn.v_proj.bias";
    Q_NORM = "attn_q_norm.weight", "self_attn.q_norm.weight";
    K_NORM = "attn_k_norm.weight", "self_attn.k_norm.weight";
    O = "attn_output.weight", "self_attn.o_proj.weight";
    O_BIAS = "attn_output.bias", "self_attn.o_proj.bias";
    FFN_NORM = "ffn_norm.weight", "post_attention_layernorm.weight";
    GATE = "ffn_gate.weight", "mlp.gate_proj.weight";
    UP = "ffn_up.weight", "mlp.up_proj.weight";
    DOWN = "ffn_down.weight", "mlp.down_proj.weight";
    GATE_BIAS = "ffn_gate.bias", "mlp.gate_proj.bias";
    UP_BIAS = "ffn_up.bias", "mlp.up_proj.bias";
    DOWN_BIAS = "ffn_down.bias", "mlp.down_proj.bias";
}

fn assemble(config: &ModelConfig, source: &dyn WeightSource) -> Result<ModelWeights, ModelError> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let fused = |layer, parts: &[(Part, usize)], k| -> Result<PackedWeight, ModelError> {
        let mut builder = PackedWeight::builder(k);
        for (part, n) in parts {
            source.matrix(layer, *part, (*n, k), &mut builder)?;
        }
        Ok(builder.build())
    };
    let joined = |layer, wanted, parts: &[(Part, usize)]| -> Result<Option<Vec<f32>>, ModelError> {
        let read = |(part, len): &(Part, usize)| source.vector(layer, *part, *len);
        let joined = || Ok(parts.iter().map(read).collect::<Result<Vec<_>, _>>()?.concat());
        if wanted { joined().map(Some) } else { Ok(None) }
    };
    let (biases, head) = (config.biases, config.head_dim);
    let mut layers = Vec::with_capacity(config.layers);
    for index in 0..config.layers {
        let layer = Some(index);
        let qkv_bias = [(Q_BIAS, q), (K_BIAS, kv), (V_BIAS, kv)];
        layers.push(LayerWeights {
            attn_norm: source.vector(layer, ATTN_NORM, hidden)?,
            qkv: fused(layer, &[(Q, q), (K, kv), (V, kv)], hidden)?,
            qkv_bias: joined(layer, biases.qkv, &qkv_bias)?,
            q_norm: joined(layer, config.qk_norm, &[(Q_NORM, head)])?,
            k_norm: joined(layer, config.qk_norm, &[(K_NORM, head)])?,
            o: fused(layer, &[(O, hidden)], q)?,
            o_bias: joined(layer, biases.o, &[(O_BIAS, hidden)])?,
            ffn_norm: source.vector(layer, FFN_NORM, hidden)?,
            gate_up: fused(layer, &[(GATE, inner), (UP, inner)], hidden)?,
            gate_up_bias: joined(layer, biases.mlp, &[(GATE_BIAS, inner), (UP_BIAS, inner)])?,
            down: fused(layer, &[(DOWN, hidden)], inner)?,
            down_bias: joined(layer, biases.mlp, &[(DOWN_BIAS, hidden)])?,
        });
    }
    let embed = Arc::new(fused(None, &[(EMBED, config.vocab_size)], hidden)?);
    let lm_head = match config.tie_word_embeddings {
        true => embed.clone(),
        false => Arc::new(fused(None, &[(LM_HEAD, config.vocab_size)], hidden)?),
    };
    let final_norm = source.vector(None, FINAL_NORM, hidden)?;
    Ok(ModelWeights { embed, layers, final_norm, lm_head })
}

fn gguf_config(file: &GgufFile) -> Result<ModelConfig, ModelError> {
    let header = &file.header;
    let arch = header.get_str("general.architecture").unwrap_or("(none)");
    let family = match arch {
        "llama" => Family::Llama,
        "qwen2" => Family::Qwen2,
        "qwen3" => Family::Qwen3,
        other => return Err(ModelError::Unsupported(format!("GGUF architecture {other}"))),
    };
    let optional = |key: &str| header.get_u32(&format!("{arch}.{key}")).map(|v| v as usize);
    let size = |key: &str| {
        optional(key).ok_or_else(|| ModelError::Format(format!("GGUF metadata lacks {arch}.{key}")))
    };
    let (hidden_size, heads) = (size("embedding_length")?, size("attention.head_count")?);
    let layers = checked_layers(size("block_count")?)?;
    let window = optional("attention.sliding_window").filter(|window| *window > 0);
    let has = |part| header.tensors.contains_key(&gguf_name(Some(0), part));
    let head_dim = optional("attention.key_length").unwrap_or(hidden_size / heads.max(1));
    if let Some(kind) = header.get_str(&format!("{arch}.rope.scaling.type"))
        && !matches!(kind, "none" | "linear")
    {
        return Err(ModelError::Unsupported(format!("GGUF rope scaling {kind}")));
    }
    let factor = header.get_f32(&format!("{arch}.rope.scaling.factor"));
    let rope_scaling = match (header.tensors.get("rope_freqs.weight"), factor) {
        (Some(tensor), _) => {
            RopeScaling::Factors(floats(&file.bytes, tensor, "rope_freqs.weight")?)
        }
        (None, Some(factor)) if factor > 0.0 && factor != 1.0 => {
            RopeScaling::Linear { factor: f64::from(factor) }
        }
        _ => RopeScaling::None,
    };
    let vocab = header.tensors.get(EMBED.gguf).and_then(|tensor| tensor.dims.get(1).copied());
    let eos = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];
    let mut eos_token_ids: Vec<u32> = eos.iter().filter_map(|key| header.get_u32(key)).collect();
    eos_token_ids.dedup();
    let epsilon = header.get_f32(&format!("{arch}.attention.layer_norm_rms_epsilon"));
    let config = ModelConfig {
        family,
        vocab_size: vocab.unwrap_or(0) as usize,
        hidden_size,
        intermediate_size: size("feed_forward_length")?,
        layers,
        heads,
        kv_heads: optional("attention.head_count_kv").unwrap_or(heads),
        head_dim,
        rms_norm_eps: epsilon.unwrap_or(1e-5),
        rope_theta: header.get_f32(&format!("{arch}.rope.freq_base")).unwrap_or(10_000.0).into(),
        rope_scaling,
        max_position: size("context_length")?,
        layer_windows: vec![window; layers],
        tie_word_embeddings: !header.tensors.contains_key(LM_HEAD.gguf),
        biases: Biases { qkv: has(Q_BIAS), o: has(O_BIAS), mlp: has(DOWN_BIAS) },
        qk_norm: family == Family::Qwen3,
        eos_token_ids,
        bos_token_id: header.get_u32("tokenizer.ggml.bos_token_id"),
    };
    config.validate()?;
    Ok(config)
}

struct GgufSource<'a> {
    file: &'a GgufFile,
    config: &'a ModelConfig,
}

impl GgufSource<'_> {
    fn tensor(
        &self,
        layer: Option<usize>,
        part: Part,
    ) -> Result<(String, &TensorInfo), ModelError> {
        let name = gguf_name(layer, part);
        match self.file.header.tensors.get(&name) {
            Some(tensor) => Ok((name, tensor)),
            None => Err(ModelError::Format(format!("tensor {name} is missing"))),
        }
    }

    /// File row of output row `row`: converters interleave the halves of each rotated head of the
    /// llama architecture, and this undoes it.
    fn source_row(&self, part: Part, row: usize) -> usize {
        if self.config.family != Family::Llama || ![Q, K, Q_BIAS, K_BIAS].contains(&part) {
            return row;
        }
        let dim = self.config.head_dim;
        let (head, index) = (row / dim, row % dim);
        head * dim + 2 * (index % (dim / 2)) + index / (dim / 2)
    }
}

fn gguf_name(layer: Option<usize>, part: Part) -> String {
    layer.map_or_else(|| part.gguf.to_owned(), |layer| format!("blk.{layer}.{}", part.gguf))
}

impl WeightSource for GgufSource<'_> {
    fn matrix(
        &self,
        layer: Option<usize>,
        part: Part,
        (n, k): (usize, usize),
        out: &mut PackedWeightBuilder,
    ) -> Result<(), ModelError> {
        let (name, tensor) = self.tensor(layer, part)?;
        if tensor.dims != [k as u64, n as u64] {
            let found = &tensor.dims;
            return Err(ModelError::Format(format!("tensor {name} is {found:?}, not [{k}, {n}]")));
        }
        let bytes = &self.file.bytes[tensor.bytes.clone()];
        let row_bytes = bytes.len() / n;
        let row_of = |row: usize| &bytes[self.source_row(part, row) * row_bytes..][..row_bytes];
        let dense = match tensor.kind {
            TensorKind::F32 => Some(DenseType::F32),
            TensorKind::F16 => Some(DenseType::F16),
            TensorKind::BF16 => Some(DenseType::Bf16),
            _ => None,
        };
        if let Some(dtype) = dense {
            let rows: Vec<u8> = (0..n).flat_map(|row| row_of(row).iter().copied()).collect();
            return Ok(out.push_dense(n, dtype, &rows)?);
        }
        let (spec, decode) = decoder(tensor.kind).ok_or_else(|| {
            ModelError::Unsupported(format!("tensor {name} of type {:?}", tensor.kind))
        })?;
        Ok(out.push_quant(n, spec, &mut |row, to| decode(row_of(row), to))?)
    }

    fn vector(&self, layer: Option<usize>, part: Part, len: usize) -> Result<Vec<f32>, ModelError> {
        let (name, tensor) = self.tensor(layer, part)?;
        let values = floats(&self.file.bytes, tensor, &name)?;
        if values.len() != len {
            return Err(ModelError::Format(format!(
                "tensor {name} has {} values, not {len}",
                values.len()
            )));
        }
        Ok((0..len).map(|row| values[self.source_row(part, row)]).collect())
    }
}

fn floats(file: &[u8], tensor: &TensorInfo, name: &str) -> Result<Vec<f32>, ModelError> {
    if tensor.kind != TensorKind::F32 {
        return Err(ModelError::Unsupported(format!("tensor {name} of type {:?}", tensor.kind)));
    }
    let bytes = file[tensor.bytes.clone()].chunks_exact(4);
    Ok(bytes.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

type Decode = fn(&[u8], QuantRow<'_>);

/// The layout and the row decoder of each quantised type, as ggml defines its blocks.
fn decoder(kind: TensorKind) -> Option<(QuantSpec, Decode)> {
    let spec = |bits, group, zero, has_min, half_scales| QuantSpec {
        bits,
        group,
        zero,
        has_min,
        half_scales,
    };
    Some(match kind {
        TensorKind::Q4_0 => {
            (spec(Bits::Four, 32, 8, false, true), |row, to| nibbles(row, to, false))
        }
        TensorKind::Q4_1 => (spec(Bits::Four, 32, 0, true, true), |row, to| nibbles(row, to, true)),
        TensorKind::Q5_0 => {
            (spec(Bits::Eight, 32, 16, false, true), |row, to| five(row, to, false))
        }
        TensorKind::Q5_1 => (spec(Bits::Eight, 32, 0, true, true), |row, to| five(row, to, true)),
        TensorKind::Q8_0 => (spec(Bits::Eight, 32, 128, false, true), q8_0),
        TensorKind::Q4_K => (spec(Bits::Four, 32, 0, true, false), |row, to| k45(row, to, false)),
        TensorKind::Q5_K => (spec(Bits::Eight, 32, 0, true, false), |row, to| k45(row, to, true)),
        TensorKind::Q6_K => (spec(Bits::Eight, 16, 32, false, false), q6_k),
        _ => return None,
    })
}

fn f16(bytes: &[u8]) -> f32 {
    half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

fn nibbles(row: &[u8], to: QuantRow<'_>, has_min: bool) {
    let head = if has_min { 4 } else { 2 };
    for (group, block) in row.chunks_exact(head + 16).enumerate() {
        to.scale[group] = f16(block);
        if has_min {
            to.min[group] = f16(&block[2..]);
        }
        for (index, byte) in block[head..].iter().enumerate() {
            to.q[group * 32 + index] = byte & 15;
            to.q[group * 32 + 16 + index] = byte >> 4;
        }
    }
}

fn five(row: &[u8], to: QuantRow<'_>, has_min: bool) {
    let head = if has_min { 4 } else { 2 };
    for (group, block) in row.chunks_exact(head + 20).enumerate() {
        to.scale[group] = f16(block);
        if has_min {
            to.min[group] = f16(&block[2..]);
        }
        let high =
            u32::from_le_bytes([block[head], block[head + 1], block[head + 2], block[head + 3]]);
        for (index, byte) in block[head + 4..].iter().enumerate() {
            let bit = |at: usize| ((high >> at & 1) as u8) << 4;
            to.q[group * 32 + index] = byte & 15 | bit(index);
            to.q[group * 32 + 16 + index] = byte >> 4 | bit(index + 16);
        }
    }
}

fn q8_0(row: &[u8], to: QuantRow<'_>) {
    for (group, block) in row.chunks_exact(34).enumerate() {
        to.scale[group] = f16(block);
        for (q, byte) in to.q[group * 32..].iter_mut().zip(&block[2..]) {
            *q = byte ^ 128;
        }
    }
}

/// Q4_K and Q5_K: 256 values, eight 6-bit scales and minimums packed into 12 bytes.
fn k45(row: &[u8], to: QuantRow<'_>, five: bool) {
    for (index, block) in row.chunks_exact(if five { 176 } else { 144 }).enumerate() {
        let (d, d_min, packed) = (f16(block), f16(&block[2..]), &block[4..16]);
        let (high, low) =
            if five { (&block[16..48], &block[48..]) } else { (&[][..], &block[16..]) };
        for group in 0..8 {
            let (scale, min) = match group {
                0..4 => (packed[group] & 63, packed[group + 4] & 63),
                _ => (
                    packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
                    packed[group + 4] >> 4 | packed[group] >> 6 << 4,
                ),
            };
            to.scale[index * 8 + group] = d * f32::from(scale);
            to.min[index * 8 + group] = -d_min * f32::from(min);
            for value in 0..32 {
                let byte = low[group / 2 * 32 + value];
                let nibble = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
                let top = high.get(value).map_or(0, |bits| (bits >> group & 1) << 4);
                to.q[index * 256 + group * 32 + value] = nibble | top;
            }
        }
    }
}

fn q6_k(row: &[u8], to: QuantRow<'_>) {
    for (index, block) in row.chunks_exact(210).enumerate() {
        let (low, high, scales, d) =
            (&block[..128], &block[128..192], &block[192..208], f16(&block[208..]));
        for (group, scale) in scales.iter().enumerate() {
            to.scale[index * 16 + group] = d * f32::from(*scale as i8);
        }
        for value in 0..256 {
            let (half, within) = (value / 128, value % 128);
            let byte = low[half * 64 + within % 64];
            let nibble = if within < 64 { byte & 15 } else { byte >> 4 };
            let top = high[half * 32 + within % 32] >> (within / 32 * 2) & 3;
            to.q[index * 256 + value] = nibble | top << 4;
        }
    }
}
