//! The header of a GGUF file, version 2 or 3. Every length is checked against the bytes that are
//! left before anything is allocated for it.

use std::{collections::BTreeMap, ops::Range};

use thiserror::Error;

const MAX_DIMS: u32 = 4;
const MAX_ARRAY_DEPTH: u32 = 4;
const MAX_ALIGNMENT: u64 = 1 << 20;
/// Least bytes of one metadata entry: key length, type, one byte of value.
const MIN_ENTRY_BYTES: u64 = 13;
/// Least bytes of one tensor entry: name length, dimension count, type, offset.
const MIN_TENSOR_BYTES: u64 = 24;

#[derive(Debug, Error, PartialEq, Eq)]
#[error("not a valid GGUF file: {0}; download the file again")]
pub struct GgufError(String);

fn bad<T>(what: impl Into<String>) -> Result<T, GgufError> {
    Err(GgufError(what.into()))
}

#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Str(String),
    Array(Vec<Value>),
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
    Q5_1 = 7, 32, 24; Q8_0 = 8, 32, 34; Q2_K = 10, 256, 84; Q3_K = 11, 256, 110;
    Q4_K = 12, 256, 144; Q5_K = 13, 256, 176; Q6_K = 14, 256, 210; BF16 = 30, 1, 2;
}

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
            let kind = r.u32()?;
            let value = r.value(kind, 0)?;
            if metadata.insert(key.clone(), value).is_some() {
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
        match *self.metadata(key)? {
            Value::Unsigned(v) => v.try_into().ok(),
            Value::Signed(v) => v.try_into().ok(),
            _ => None,
        }
    }

    pub fn get_f32(&self, key: &str) -> Option<f32> {
        match *self.metadata(key)? {
            Value::Float(v) => Some(v as f32),
            _ => None,
        }
    }

    pub fn get_bool(&self, key: &str) -> Option<bool> {
        match *self.metadata(key)? {
            Value::Bool(v) => Some(v),
            _ => None,
        }
    }

    pub fn get_str_array(&self, key: &str) -> Option<Vec<&str>> {
        self.array(key)?
            .iter()
            .map(|v| if let Value::Str(s) = v { Some(s.as_str()) } else { None })
            .collect()
    }

    pub fn get_i32_array(&self, key: &str) -> Option<Vec<i32>> {
        let one = |v: &Value| match *v {
            Value::Signed(v) => v.try_into().ok(),
            Value::Unsigned(v) => v.try_into().ok(),
            _ => None,
        };
        self.array(key)?.iter().map(one).collect()
    }

    pub fn get_f32_array(&self, key: &str) -> Option<Vec<f32>> {
        self.array(key)?
            .iter()
            .map(|v| if let Value::Float(f) = *v { Some(f as f32) } else { None })
            .collect()
    }

    fn array(&self, key: &str) -> Option<&[Value]> {
        match self.metadata(key)? {
            Value::Array(values) => Some(values),
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
            let name = r.string()?;
            let dim_count = r.u32()?;
            if !(1..=MAX_DIMS).contains(&dim_count) {
                return bad(format!("tensor {name:?} has {dim_count} dimensions"));
            }
            let dims = (0..dim_count).map(|_| r.u64()).collect::<Result<Vec<_>, _>>()?;
            let id = r.u32()?;
            let Some(kind) = TensorKind::from_id(id) else {
                return bad(format!("tensor {name:?} has the unsupported type {id}"));
            };
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

/// The tensor's place in the file; none where it is empty, has a part of a block, or overflows.
fn span(dims: &[u64], kind: TensorKind, start: u64, offset: u64) -> Option<Range<usize>> {
    let (block, block_bytes) = kind.block();
    let values = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d))?;
    if values == 0 || !dims[0].is_multiple_of(block) {
        return None;
    }
    let from = start.checked_add(offset)?;
    let to = from.checked_add((values / block).checked_mul(block_bytes)?)?;
    Some(from.try_into().ok()?..to.try_into().ok()?)
}

struct Reader<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: u64) -> Result<&'a [u8], GgufError> {
        let rest = &self.file[self.at..];
        if n > rest.len() as u64 {
            return bad(format!("it ends at byte {}, inside its header", self.file.len()));
        }
        self.at += n as usize;
        Ok(&rest[..n as usize])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of things that take at least `least_bytes` each.
    fn count(&mut self, what: &str, least_bytes: u64) -> Result<u64, GgufError> {
        let n = self.u64()?;
        // The other count may still follow, so this is a bound and not the exact room.
        if n > (self.file.len() - self.at) as u64 / least_bytes {
            return bad(format!("it claims {n} {what}, more than its size can hold"));
        }
        Ok(n)
    }

    fn string(&mut self) -> Result<String, GgufError> {
        let n = self.u64()?;
        let at = self.at;
        match std::str::from_utf8(self.take(n)?) {
            Ok(s) => Ok(s.to_owned()),
            Err(_) => bad(format!("the string at byte {at} is not UTF-8")),
        }
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<Value, GgufError> {
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.array()?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => match self.array()? {
                [b @ 0..=1] => Value::Bool(b == 1),
                [b] => return bad(format!("a boolean is {b}")),
            },
            8 => Value::Str(self.string()?),
            9 if depth < MAX_ARRAY_DEPTH => {
                let item = self.u32()?;
                let n = self.count("array values", 1)?;
                // Grows as values are read: a false count allocates nothing.
                let mut values = Vec::new();
                for _ in 0..n {
                    values.push(self.value(item, depth + 1)?);
                }
                Value::Array(values)
            }
            9 => return bad("its arrays are nested too deep"),
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            _ => return bad(format!("metadata type {kind} is unknown")),
        })
    }
}
