//! Safetensors files, strictly: every length is checked against the file before it is used.

use std::{collections::HashMap, path::PathBuf};

use serde::Deserialize;

use crate::ops::{DenseType, matrix::MatrixBuilder};

use super::{
    ModelError,
    load::{Part, WeightSource},
    weights::MappedFile,
};

/// Largest header the format allows.
const HEADER_BYTES_MAX: u64 = 100 << 20;

#[derive(Debug, Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// A tensor's place in its file.
#[derive(Debug)]
pub struct Tensor {
    pub dtype: DenseType,
    pub shape: Vec<usize>,
    /// From the start of the file.
    pub bytes: std::ops::Range<usize>,
}

/// Reads the header of a whole file.
pub fn parse(file: &[u8]) -> Result<HashMap<String, Tensor>, ModelError> {
    let wrong = |what: String| ModelError::Format(format!("safetensors header: {what}"));
    let head = file.first_chunk::<8>().ok_or_else(|| wrong("the file is too short".into()))?;
    let len = u64::from_le_bytes(*head);
    if len > HEADER_BYTES_MAX || len > file.len() as u64 - 8 {
        return Err(wrong(format!("{len} bytes do not fit into the file")));
    }
    let start = 8 + len as usize;
    let entries: HashMap<String, serde_json::Value> =
        serde_json::from_slice(&file[8..start]).map_err(|error| wrong(error.to_string()))?;
    let mut tensors = HashMap::new();
    let mut ranges = Vec::new();
    for (name, entry) in entries.into_iter().filter(|(name, _)| name != "__metadata__") {
        let entry: Entry =
            serde_json::from_value(entry).map_err(|error| wrong(format!("{name}: {error}")))?;
        let dtype = match entry.dtype.as_str() {
            "F32" => DenseType::F32,
            "F16" => DenseType::F16,
            "BF16" => DenseType::Bf16,
            other => return Err(ModelError::Unsupported(format!("tensor {name} of type {other}"))),
        };
        let (from, to) = entry.data_offsets;
        let elements = entry.shape.iter().try_fold(1usize, |total, size| total.checked_mul(*size));
        let expected = elements.and_then(|elements| elements.checked_mul(dtype.bytes()));
        if from > to || to > file.len() - start || expected != Some(to - from) {
            return Err(wrong(format!("{name}: {from}..{to} does not hold {:?}", entry.shape)));
        }
        ranges.push((from, to));
        tensors.insert(name, Tensor { dtype, shape: entry.shape, bytes: start + from..start + to });
    }
    ranges.sort_unstable();
    if ranges.windows(2).any(|pair| pair[0].1 > pair[1].0) {
        return Err(wrong("tensors overlap".into()));
    }
    Ok(tensors)
}

/// The shards of one model.
pub struct Shards {
    files: Vec<MappedFile>,
    tensors: HashMap<String, (usize, Tensor)>,
}

impl Shards {
    pub fn open(paths: &[PathBuf]) -> Result<Self, ModelError> {
        let mut shards = Self { files: Vec::new(), tensors: HashMap::new() };
        for path in paths {
            let io = |source| ModelError::Io { path: path.display().to_string(), source };
            let file = MappedFile::open(path).map_err(io)?;
            for (name, tensor) in parse(&file)? {
                if shards.tensors.insert(name.clone(), (shards.files.len(), tensor)).is_some() {
                    return Err(ModelError::Format(format!("tensor {name} is in two shards")));
                }
            }
            shards.files.push(file);
        }
        Ok(shards)
    }

    /// Asks for the pages of all shards at once.
    pub fn read_ahead(&self) {
        self.files.iter().for_each(MappedFile::read_ahead);
    }

    fn tensor(
        &self,
        layer: Option<usize>,
        part: Part,
        shape: &[usize],
    ) -> Result<(DenseType, &[u8]), ModelError> {
        let name = hf_name(layer, part);
        let Some((file, tensor)) = self.tensors.get(&name) else {
            return Err(ModelError::Format(format!("tensor {name} is missing")));
        };
        if tensor.shape != shape {
            let found = &tensor.shape;
            return Err(ModelError::Format(format!("tensor {name} is {found:?}, not {shape:?}")));
        }
        Ok((tensor.dtype, &self.files[*file][tensor.bytes.clone()]))
    }
}

fn hf_name(layer: Option<usize>, part: Part) -> String {
    layer.map_or_else(|| part.hf.to_owned(), |layer| format!("model.layers.{layer}.{}", part.hf))
}

impl WeightSource for Shards {
    fn matrix(
        &self,
        layer: Option<usize>,
        part: Part,
        (n, k): (usize, usize),
        out: &mut MatrixBuilder<'_>,
    ) -> Result<(), ModelError> {
        let (dtype, bytes) = self.tensor(layer, part, &[n, k])?;
        Ok(out.push_dense(n, dtype, bytes)?)
    }

    fn vector(&self, layer: Option<usize>, part: Part, len: usize) -> Result<Vec<f32>, ModelError> {
        let (dtype, bytes) = self.tensor(layer, part, &[len])?;
        Ok((0..len).map(|index| crate::ops::weight::read_dense(bytes, dtype, index)).collect())
    }
}
