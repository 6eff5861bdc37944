//! From files to packed weights.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::ops::{
    DenseType, Matrix, Vector, WeightPlace, matrix::MatrixBuilder, weight::read_dense,
};

use super::{
    Biases, Family, LayerWeights, ModelConfig, ModelError, ModelWeights, RopeScaling,
    config::checked_layers,
    gguf::{Gguf, GgufError, TensorInfo, TensorKind},
    gguf_blocks::decoder,
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
        let header = Gguf::parse(&bytes).map_err(|error| match error {
            GgufError::Unsupported(what) => {
                ModelError::Unsupported(format!("{}: {what}", path.display()))
            }
            damaged => ModelError::Format(format!("{}: {damaged}", path.display())),
        })?;
        Ok(Self { header, bytes })
    }
}

/// Reads configuration and weights, for the CPU.
pub fn load(files: &WeightFiles) -> Result<(ModelConfig, ModelWeights), ModelError> {
    load_to(files, WeightPlace::Cpu, &|_, _| {})
}

/// Reads configuration and weights to where they are used. `loaded` hears of layers: how many are
/// done, and of how many.
pub fn load_to(
    files: &WeightFiles,
    place: WeightPlace<'_>,
    loaded: &dyn Fn(usize, usize),
) -> Result<(ModelConfig, ModelWeights), ModelError> {
    match files {
        WeightFiles::Gguf(path) => {
            let file = GgufFile::open(path)?;
            let config = gguf_config(&file)?;
            let source = GgufSource { file: &file, config: &config };
            let weights = assemble_telling(&config, &source, place, loaded)?;
            Ok((config, weights))
        }
        WeightFiles::SafeTensors { config, shards } => {
            let io = |source| ModelError::Io { path: config.display().to_string(), source };
            let config = ModelConfig::from_hf_json(&std::fs::read_to_string(config).map_err(io)?)?;
            let shards = Shards::open(shards)?;
            if matches!(place, WeightPlace::Gpu(..)) {
                shards.read_ahead();
            }
            let weights = assemble_telling(&config, &shards, place, loaded)?;
            Ok((config, weights))
        }
    }
}

/// Weights of a `config.json` alone, made up on the GPU: for timing shapes whose weights nobody has.
pub fn load_dummy(
    config: &Path,
    place: WeightPlace<'_>,
) -> Result<(ModelConfig, ModelWeights), ModelError> {
    let io = |source| ModelError::Io { path: config.display().to_string(), source };
    let config = ModelConfig::from_hf_json(&std::fs::read_to_string(config).map_err(io)?)?;
    let weights = assemble(&config, &Dummy, place)?;
    Ok((config, weights))
}

/// Matrices of made-up values; norms are 1 and biases 0.
pub struct Dummy;

impl WeightSource for Dummy {
    fn matrix(
        &self,
        layer: Option<usize>,
        part: Part,
        (n, _): (usize, usize),
        out: &mut MatrixBuilder<'_>,
    ) -> Result<(), ModelError> {
        let name = part.hf.bytes().fold(0u32, |sum, byte| sum * 31 % 65521 + u32::from(byte));
        let layer = layer.map_or(0, |layer| layer as u32 + 1);
        Ok(out.push_dummy(n, name << 16 | layer)?)
    }

    fn vector(&self, _: Option<usize>, part: Part, len: usize) -> Result<Vec<f32>, ModelError> {
        Ok(vec![if part.hf.ends_with("norm.weight") { 1.0 } else { 0.0 }; len])
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
        out: &mut MatrixBuilder<'_>,
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

/// Gives every matrix and vector its place.
pub fn assemble(
    config: &ModelConfig,
    source: &dyn WeightSource,
    place: WeightPlace<'_>,
) -> Result<ModelWeights, ModelError> {
    assemble_telling(config, source, place, &|_, _| {})
}

fn assemble_telling(
    config: &ModelConfig,
    source: &dyn WeightSource,
    place: WeightPlace<'_>,
    loaded: &dyn Fn(usize, usize),
) -> Result<ModelWeights, ModelError> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let fused = |layer, parts: &[(Part, usize)], k| -> Result<Matrix, ModelError> {
        let mut builder = place.matrix(parts.iter().map(|(_, n)| n).sum(), k)?;
        for (part, n) in parts {
            source.matrix(layer, *part, (*n, k), &mut builder)?;
        }
        Ok(builder.build()?)
    };
    let vector = |layer, part, len| -> Result<Vector, ModelError> {
        Ok(place.vector(source.vector(layer, part, len)?)?)
    };
    let joined = |layer, wanted, parts: &[(Part, usize)]| -> Result<Option<Vector>, ModelError> {
        let read = |(part, len): &(Part, usize)| source.vector(layer, *part, *len);
        let joined = || {
            let parts = parts.iter().map(read).collect::<Result<Vec<_>, _>>()?;
            Ok(place.vector(parts.concat())?)
        };
        if wanted { joined().map(Some) } else { Ok(None) }
    };
    let (biases, head) = (config.biases, config.head_dim);
    let mut layers = Vec::with_capacity(config.layers);
    for index in 0..config.layers {
        let layer = Some(index);
        let qkv_bias = [(Q_BIAS, q), (K_BIAS, kv), (V_BIAS, kv)];
        layers.push(LayerWeights {
            attn_norm: vector(layer, ATTN_NORM, hidden)?,
            qkv: fused(layer, &[(Q, q), (K, kv), (V, kv)], hidden)?,
            qkv_bias: joined(layer, biases.qkv, &qkv_bias)?,
            q_norm: joined(layer, config.qk_norm, &[(Q_NORM, head)])?,
            k_norm: joined(layer, config.qk_norm, &[(K_NORM, head)])?,
            o: fused(layer, &[(O, hidden)], q)?,
            o_bias: joined(layer, biases.o, &[(O_BIAS, hidden)])?,
            ffn_norm: vector(layer, FFN_NORM, hidden)?,
            gate_up: fused(layer, &[(GATE, inner), (UP, inner)], hidden)?,
            gate_up_bias: joined(layer, biases.mlp, &[(GATE_BIAS, inner), (UP_BIAS, inner)])?,
            down: fused(layer, &[(DOWN, hidden)], inner)?,
            down_bias: joined(layer, biases.mlp, &[(DOWN_BIAS, hidden)])?,
        });
        loaded(index + 1, config.layers);
    }
    let embed = Arc::new(fused(None, &[(EMBED, config.vocab_size)], hidden)?);
    let lm_head = match config.tie_word_embeddings {
        true => embed.clone(),
        false => Arc::new(fused(None, &[(LM_HEAD, config.vocab_size)], hidden)?),
    };
    let final_norm = vector(None, FINAL_NORM, hidden)?;
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
        out: &mut MatrixBuilder<'_>,
    ) -> Result<(), ModelError> {
        let (name, tensor) = self.tensor(layer, part)?;
        if tensor.dims != [k as u64, n as u64] {
            let found = &tensor.dims;
            return Err(ModelError::Format(format!("tensor {name} is {found:?}, not [{k}, {n}]")));
        }
        let bytes = &self.file.bytes[tensor.bytes.clone()];
        let row_bytes = bytes.len() / n;
        let row_of = |row: usize| &bytes[self.source_row(part, row) * row_bytes..][..row_bytes];
        if let Some((spec, decode)) = decoder(tensor.kind) {
            return Ok(out.push_quant(n, spec, &mut |row, to| decode(row_of(row), to))?);
        }
        let dtype = dense(tensor, &name)?;
        let rows: Vec<u8> = (0..n).flat_map(|row| row_of(row).iter().copied()).collect();
        Ok(out.push_dense(n, dtype, &rows)?)
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

fn dense(tensor: &TensorInfo, name: &str) -> Result<DenseType, ModelError> {
    match tensor.kind {
        TensorKind::F32 => Ok(DenseType::F32),
        TensorKind::F16 => Ok(DenseType::F16),
        TensorKind::BF16 => Ok(DenseType::Bf16),
        kind => Err(ModelError::Unsupported(format!("tensor {name} of type {kind:?} as a vector"))),
    }
}

/// The values of a tensor that is no matrix of the model, which is never quantised.
fn floats(file: &[u8], tensor: &TensorInfo, name: &str) -> Result<Vec<f32>, ModelError> {
    let (dtype, bytes) = (dense(tensor, name)?, &file[tensor.bytes.clone()]);
    Ok((0..bytes.len() / dtype.bytes()).map(|index| read_dense(bytes, dtype, index)).collect())
}
