//! Values of settings, read the same way from a flag, a variable and the file.

use std::{fmt, path::PathBuf, str::FromStr};

use serde::{Deserialize, Deserializer, de};
use thiserror::Error;

#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} is larger than {bytes_max} bytes: not a configuration file", path.display())]
    TooLarge { path: PathBuf, bytes_max: u64 },
    #[error("{} line {line}, key `{key}`: {message}", path.display())]
    File { path: PathBuf, line: usize, key: String, message: String },
    #[error("{setting}: {message}")]
    Value { setting: &'static str, message: String },
    #[error(
        "host {host} can be reached from other machines and there is no key: set CANDELA_API_KEY, \
         or say --allow-anonymous if everyone who reaches it may use it"
    )]
    OpenToAll { host: std::net::IpAddr },
}

/// A string that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text itself, for the one place that needs it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl FromStr for Secret {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_string()))
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // The usual error would quote the value, which may be the key itself.
        String::deserialize(deserializer)
            .map(Self)
            .map_err(|_| de::Error::custom("must be a string in quotes"))
    }
}

/// A number of bytes: `4GiB`, `512 MiB`, `2GB` or a plain number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteSize(pub u64);

const UNITS: [(&str, u64); 9] = [
    ("", 1),
    ("b", 1),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
];

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no size: write for example 512MiB or 4GiB");
        let lower = text.trim().to_ascii_lowercase();
        let digits = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
        let (number, unit) = (&lower[..digits], lower[digits..].trim());
        let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(*factor).map(Self).ok_or_else(wrong);
        }
        let bytes = number.parse::<f64>().map_err(|_| wrong())? * *factor as f64;
        // Above 2^63 a float holds no exact count, and no machine has as much.
        if bytes.is_finite() && bytes < 9.2e18 { Ok(Self(bytes as u64)) } else { Err(wrong()) }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, factor) = match self.0 {
            bytes if bytes >= 1 << 30 => ("GiB", 1u64 << 30),
            bytes if bytes >= 1 << 20 => ("MiB", 1 << 20),
            bytes if bytes >= 1 << 10 => ("KiB", 1 << 10),
            bytes => return write!(f, "{bytes} B"),
        };
        write!(f, "{:.1} {unit}", self.0 as f64 / factor as f64)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes or a size such as \"4GiB\"")
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<ByteSize, E> {
                u64::try_from(value).map(ByteSize).map_err(|_| E::custom("cannot be negative"))
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(value))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

/// An enum whose members are words, with one message for a word that is none of them.
macro_rules! words {
    ($(#[$attr:meta])* $name:ident, $($word:literal => $member:ident),+; $hint:expr) => {
        $(#[$attr])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($member),+ }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok(Self::$member),)+
                    other => Err($hint(other)),
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    };
}

/// What the model runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// A GPU where this build and this machine have one, else the CPU.
    Auto,
    Cpu,
    /// A GPU by the number that CUDA gives it.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not auto, cpu, cuda or cuda:N");
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", number)) => number.parse().map(Self::Cuda).map_err(|_| wrong()),
            _ => Err(wrong()),
        }
    }
}

impl<'de> Deserialize<'de> for Device {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

words!(
    /// Element type of weights, activations and KV cache on a GPU.
    GpuDtype, "bf16" => Bf16, "f16" => F16; |word| format!("`{word}` is not bf16 or f16")
);
words!(
    /// Where weights come from.
    LoadFormat, "auto" => Auto, "dummy" => Dummy; |word| format!("`{word}` is not auto or dummy")
);
words!(KvCacheDtype, "f16" => F16, "f32" => F32; |word| format!("`{word}` is not f16 or f32"));
words!(
    /// Vector instructions that kernels may use.
    IsaMax, "portable" => Portable, "avx2" => Avx2, "avx512" => Avx512;
    |word| format!("`{word}` is not portable, avx2 or avx512")
);
words!(LogFormat, "text" => Text, "json" => Json; |word| format!("`{word}` is not text or json"));
