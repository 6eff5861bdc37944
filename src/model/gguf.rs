//! The header of a GGUF file, version 2 or 3. Every length is checked against the bytes that are
//! left before anything is allocated for it.

use std::{collections::BTreeMap, ops::Range};

use thiserror::Error;

pub use super::gguf_value::{Array, Value};

use super::gguf_value::Reader;

const MAX_DIMS: u32 = 4;
const MAX_ALIGNMENT: u64 = 1 << 20;
/// Least bytes of one metadata entry: key length, type, one byte of value.
const MIN_ENTRY_BYTES: u64 = 13;
/// Least bytes of one tensor entry: name length, dimension count, type, offset.
const MIN_TENSOR_BYTES: u64 = 24;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum GgufError {
    #[error("not a valid GGUF file: {0}; download the file again")]
    Damaged(String),
    #[error("{0} is not supported")]
    Unsupported(String),
}

pub(super) fn bad<T>(what: impl Into<String>) -> Result<T, GgufError> {
    Err(GgufError::Damaged(what.into()))
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Innermost dimension first, as the file has it.
    pub dims: Vec<u64>,
    pub kind: TensorKind,
    /// Where the tensor's bytes lie, from the start of the file.
    pub bytes: Range<usize>,
}

macro_rules! kinds {
    ($($name:ident = $id:literal, $block:literal, $bytes:literal;)*) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(non_camel_case_types, reason = "the format's own names")]
        pub enum TensorKind { $($name),* }

        impl TensorKind {
            fn from_id(id: u32) -> Option<Self> {
                match id { $($id => Some(Self::$name),)* _ => None }
            }

            /// Values in a block and bytes of a block.
            pub fn block(self) -> (u64, u64) {
                match self { $(Self::$name => ($block, $bytes)),* }
            }
        }
    };
}

kinds! {
    F32 = 0, 1, 4; F16 = 1, 1, 2; Q4_0 = 2, 32, 18; Q4_1 = 3, 32, 20; Q5_0 = 6, 32, 22;
    Q5_1 = 7, 32, 24; Q8_0 = 8, 32, 34; Q8_1 = 9, 32, 36; Q2_K = 10, 256, 84; Q3_K = 11, 256, 110;
    Q4_K = 12, 256, 144; Q5_K = 13, 256, 176; Q6_K = 14, 256, 210; Q8_K = 15, 256, 292;
    BF16 = 30, 1, 2;
}

/// Types that are not read, with ggml's names for them: what a user has to look for in a file name.
const UNREAD_KINDS: [(u32, &str); 18] = [
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

#[derive(Debug)]
pub struct Gguf {
    metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, TensorInfo>,
}

impl Gguf {
    /// Reads the header from the bytes of the whole file.
    pub fn parse(file: &[u8]) -> Result<Self, GgufError> {
        let mut r = Reader { file, at: 0 };
        if r.take(4)? != b"GGUF" {
            return bad("it does not start with GGUF");
        }
        let version = r.u32()?;
        if !(2..=3).contains(&version) {
            return bad(format!("version {version} is not 2 or 3"));
        }
        let tensor_count = r.count("tensors", MIN_TENSOR_BYTES)?;
        let entry_count = r.count("metadata entries", MIN_ENTRY_BYTES)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..entry_count {
            let key = r.string()?;
            let value = r.value()?;
            if metadata.insert(key.to_owned(), value).is_some() {
                return bad(format!("metadata {key:?} appears twice"));
            }
        }
        let mut gguf = Self { metadata, tensors: BTreeMap::new() };
        gguf.read_tensors(&mut r, tensor_count)?;
        Ok(gguf)
    }

    pub fn metadata(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    pub fn get_str(&self, key: &str) -> Option<&str> {
        match self.metadata(key)? {
            Value::Str(s) => Some(s),
            _ => None,
        }
    }

    pub fn get_u32(&self, key: &str) -> Option<u32> {
        self.metadata(key)?.as_u32()
    }

    pub fn get_f32(&self, key: &str) -> Option<f32> {
        self.metadata(key)?.as_f32()
    }

    pub fn get_bool(&self, key: &str) -> Option<bool> {
        match *self.metadata(key)? {
            Value::Bool(v) => Some(v),
            _ => None,
        }
    }

    pub fn get_str_array(&self, key: &str) -> Option<Vec<&str>> {
        Some(self.array(key)?.strings()?.collect())
    }

    pub fn get_i32_array(&self, key: &str) -> Option<Vec<i32>> {
        self.array(key)?.numbers()?.map(|value| value.as_i32()).collect()
    }

    pub fn get_f32_array(&self, key: &str) -> Option<Vec<f32>> {
        self.array(key)?.numbers()?.map(|value| value.as_f32()).collect()
    }

    fn array(&self, key: &str) -> Option<&Array> {
        match self.metadata(key)? {
            Value::Array(array) => Some(array),
            _ => None,
        }
    }

    fn read_tensors(&mut self, r: &mut Reader, count: u64) -> Result<(), GgufError> {
        let align = match self.metadata("general.alignment") {
            None => 32,
            Some(&Value::Unsigned(a)) if a.is_power_of_two() && a <= MAX_ALIGNMENT => a,
            Some(v) => return bad(format!("general.alignment is {v:?}")),
        };
        let mut entries = Vec::new();
        for _ in 0..count {
            let name = r.string()?.to_owned();
            let dim_count = r.u32()?;
            if !(1..=MAX_DIMS).contains(&dim_count) {
                return bad(format!("tensor {name:?} has {dim_count} dimensions"));
            }
            let dims = (0..dim_count).map(|_| r.u64()).collect::<Result<Vec<_>, _>>()?;
            let id = r.u32()?;
            let Some(kind) = TensorKind::from_id(id) else {
                return Err(unread(&name, id));
            };
            if !dims[0].is_multiple_of(kind.block().0) {
                return bad(format!(
                    "tensor {name:?} has rows of {}, which {kind:?} cannot hold: its blocks have {}",
                    dims[0],
                    kind.block().0
                ));
            }
            let offset = r.u64()?;
            if !offset.is_multiple_of(align) {
                return bad(format!(
                    "tensor {name:?} starts at {offset}, not a multiple of {align}"
                ));
            }
            entries.push((name, dims, kind, offset));
        }
        let start = (r.at as u64).next_multiple_of(align);
        let mut spans = Vec::new();
        for (name, dims, kind, offset) in entries {
            let bytes = span(&dims, kind, start, offset).filter(|b| b.end <= r.file.len());
            let Some(bytes) = bytes else {
                return bad(format!(
                    "tensor {name:?} of shape {dims:?} ({kind:?}) does not fit the file"
                ));
            };
            spans.push((bytes.start, bytes.end, name.clone()));
            if self.tensors.insert(name.clone(), TensorInfo { dims, kind, bytes }).is_some() {
                return bad(format!("tensor {name:?} appears twice"));
            }
        }
        spans.sort();
        match spans.windows(2).find(|w| w[0].1 > w[1].0) {
            Some(w) => bad(format!("tensors {:?} and {:?} overlap", w[0].2, w[1].2)),
            None => Ok(()),
        }
    }
}

fn unread(tensor: &str, id: u32) -> GgufError {
    match UNREAD_KINDS.iter().find(|(unread, _)| *unread == id) {
        Some((_, kind)) => GgufError::Unsupported(format!("tensor {tensor:?} of type {kind}")),
        None => GgufError::Unsupported(format!("tensor {tensor:?} of the unknown type {id}")),
    }
}

/// The tensor's place in the file, whose rows are whole blocks; none where it is empty or overflows.
fn span(dims: &[u64], kind: TensorKind, start: u64, offset: u64) -> Option<Range<usize>> {
    let (block, block_bytes) = kind.block();
    let values = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d))?;
    if values == 0 {
        return None;
    }
    let from = start.checked_add(offset)?;
    let to = from.checked_add((values / block).checked_mul(block_bytes)?)?;
    Some(from.try_into().ok()?..to.try_into().ok()?)
}
