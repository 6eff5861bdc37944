//! Values of GGUF metadata, and the reader they come through. A vocabulary has hundreds of thousands
//! of them, so that arrays stay as compact as the file has them.

use super::gguf::{GgufError, bad};

const MAX_ARRAY_DEPTH: u32 = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
/// Least bytes of a string, its length, and of an array, its type and its length.
const MIN_STRING_BYTES: u64 = 8;
const MIN_ARRAY_BYTES: u64 = 12;

#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Str(String),
    Array(Array),
}

#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Little endian, as in the file.
    Numbers {
        kind: NumberKind,
        bytes: Vec<u8>,
    },
    /// One after the other, and where each ends.
    Strings {
        text: String,
        ends: Vec<usize>,
    },
    Arrays(Vec<Array>),
}

macro_rules! numbers {
    ($($name:ident = $id:literal, $type:ty, $value:ident;)*) => {
        /// The types of a fixed size.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum NumberKind { $($name),* }

        impl NumberKind {
            fn from_id(id: u32) -> Option<Self> {
                match id { $($id => Some(Self::$name),)* _ => None }
            }

            fn size(self) -> usize {
                match self { $(Self::$name => size_of::<$type>()),* }
            }

            /// The value whose bytes are all of `bytes`.
            fn decode(self, bytes: &[u8]) -> Option<Value> {
                Some(match self {
                    $(Self::$name => Value::$value(<$type>::from_le_bytes(bytes.try_into().ok()?).into())),*
                })
            }
        }
    };
}

/// A byte that the reader has found to be 0 or 1.
struct Flag(u8);

impl Flag {
    fn from_le_bytes([byte]: [u8; 1]) -> Self {
        Self(byte)
    }
}

impl From<Flag> for bool {
    fn from(Flag(byte): Flag) -> Self {
        byte != 0
    }
}

numbers! {
    U8 = 0, u8, Unsigned; I8 = 1, i8, Signed; U16 = 2, u16, Unsigned; I16 = 3, i16, Signed;
    U32 = 4, u32, Unsigned; I32 = 5, i32, Signed; F32 = 6, f32, Float; Bool = 7, Flag, Bool;
    U64 = 10, u64, Unsigned; I64 = 11, i64, Signed; F64 = 12, f64, Float;
}

impl Value {
    pub fn as_i32(&self) -> Option<i32> {
        match *self {
            Self::Signed(v) => v.try_into().ok(),
            Self::Unsigned(v) => v.try_into().ok(),
            _ => None,
        }
    }

    pub fn as_u32(&self) -> Option<u32> {
        match *self {
            Self::Signed(v) => v.try_into().ok(),
            Self::Unsigned(v) => v.try_into().ok(),
            _ => None,
        }
    }

    pub fn as_f32(&self) -> Option<f32> {
        match *self {
            Self::Float(v) => Some(v as f32),
            _ => None,
        }
    }
}

impl Array {
    /// The values of an array of numbers; none of any other.
    pub fn numbers(&self) -> Option<impl Iterator<Item = Value>> {
        match self {
            Self::Numbers { kind, bytes } => {
                Some(bytes.chunks_exact(kind.size()).filter_map(|one| kind.decode(one)))
            }
            _ => None,
        }
    }

    /// The values of an array of strings; none of any other.
    pub fn strings(&self) -> Option<impl Iterator<Item = &str>> {
        match self {
            Self::Strings { text, ends } => {
                let starts = std::iter::once(0).chain(ends.iter().copied());
                Some(starts.zip(ends).map(|(start, end)| &text[start..*end]))
            }
            _ => None,
        }
    }
}

/// Where the header is read from. Nothing is allocated for a length that the file cannot hold.
pub struct Reader<'a> {
    pub file: &'a [u8],
    pub at: usize,
}

impl<'a> Reader<'a> {
    pub fn take(&mut self, n: u64) -> Result<&'a [u8], GgufError> {
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

    pub fn u32(&mut self) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of things that take at least `least_bytes` each.
    pub fn count(&mut self, what: &str, least_bytes: u64) -> Result<u64, GgufError> {
        let n = self.u64()?;
        // Something else may still follow, so this is a bound and not the exact room.
        if n > (self.file.len() - self.at) as u64 / least_bytes {
            return bad(format!("it claims {n} {what}, more than its size can hold"));
        }
        Ok(n)
    }

    pub fn string(&mut self) -> Result<&'a str, GgufError> {
        let n = self.u64()?;
        let at = self.at;
        match std::str::from_utf8(self.take(n)?) {
            Ok(s) => Ok(s),
            Err(_) => bad(format!("the string at byte {at} is not UTF-8")),
        }
    }

    pub fn value(&mut self) -> Result<Value, GgufError> {
        match self.u32()? {
            STRING => Ok(Value::Str(self.string()?.to_owned())),
            ARRAY => Ok(Value::Array(self.values(0)?)),
            id => {
                let kind = number_kind(id)?;
                let value = kind.decode(self.numbers(kind, 1)?);
                value.map_or_else(|| bad("a value has the wrong size"), Ok)
            }
        }
    }

    fn values(&mut self, depth: u32) -> Result<Array, GgufError> {
        match self.u32()? {
            STRING => {
                let n = self.count("strings", MIN_STRING_BYTES)?;
                let (mut text, mut ends) = (String::new(), Vec::with_capacity(n as usize));
                for _ in 0..n {
                    text.push_str(self.string()?);
                    ends.push(text.len());
                }
                Ok(Array::Strings { text, ends })
            }
            ARRAY if depth + 1 < MAX_ARRAY_DEPTH => {
                let n = self.count("arrays", MIN_ARRAY_BYTES)?;
                // Grows as values are read: a false count allocates nothing.
                let mut arrays = Vec::new();
                for _ in 0..n {
                    arrays.push(self.values(depth + 1)?);
                }
                Ok(Array::Arrays(arrays))
            }
            ARRAY => bad("its arrays are nested too deep"),
            id => {
                let kind = number_kind(id)?;
                let n = self.count("array values", kind.size() as u64)?;
                Ok(Array::Numbers { kind, bytes: self.numbers(kind, n)?.to_vec() })
            }
        }
    }

    fn numbers(&mut self, kind: NumberKind, n: u64) -> Result<&'a [u8], GgufError> {
        let bytes = self.take(n.saturating_mul(kind.size() as u64))?;
        match bytes.iter().find(|byte| kind == NumberKind::Bool && **byte > 1) {
            Some(byte) => bad(format!("a boolean is {byte}")),
            None => Ok(bytes),
        }
    }
}

fn number_kind(id: u32) -> Result<NumberKind, GgufError> {
    let kind = NumberKind::from_id(id);
    kind.map_or_else(|| bad(format!("metadata type {id} is unknown")), Ok)
}
