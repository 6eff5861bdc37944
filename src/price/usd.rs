//! Decimal US dollars as people write them, to nano-USD and back, exactly.

use thiserror::Error;

use crate::types::NanoUsd;

#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is not an amount in USD: write digits with at most nine decimals, such as \"0.15\"")]
pub struct ParseUsdError(String);

const NANO_DIGITS: usize = 9;
const NANO_PER_USD: u128 = 1_000_000_000;
/// Keeps amount times tokens far inside an i128.
const WHOLE_DIGITS_MAX: usize = 9;

/// Parses a non-negative decimal amount of US dollars. What does not fit nine decimals is refused,
/// never rounded.
pub fn parse(text: &str) -> Result<NanoUsd, ParseUsdError> {
    let refuse = || ParseUsdError(text.chars().take(64).collect());
    let (whole, fraction) = match text.split_once('.') {
        Some((whole, fraction)) if !fraction.is_empty() => (whole, fraction),
        Some(_) => return Err(refuse()),
        None => (text, ""),
    };
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    let sized =
        !whole.is_empty() && whole.len() <= WHOLE_DIGITS_MAX && fraction.len() <= NANO_DIGITS;
    if !sized || !digits(whole) || !digits(fraction) {
        return Err(refuse());
    }
    let scaled = format!("{whole}{fraction:0<NANO_DIGITS$}");
    scaled.parse().map(NanoUsd).map_err(|_| refuse())
}

/// The shortest decimal that parses to the same amount: `0.15`, `12`, `-0.000000001`.
pub fn format(amount: NanoUsd) -> String {
    let sign = if amount.0 < 0 { "-" } else { "" };
    let size = amount.0.unsigned_abs();
    let (whole, nano) = (size / NANO_PER_USD, size % NANO_PER_USD);
    if nano == 0 {
        return format!("{sign}{whole}");
    }
    let fraction = format!("{nano:0NANO_DIGITS$}");
    format!("{sign}{whole}.{}", fraction.trim_end_matches('0'))
}

/// An optional amount as a decimal string in JSON and TOML.
pub mod optional {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    use super::{NanoUsd, format, parse};

    pub fn serialize<S: Serializer>(amount: &Option<NanoUsd>, to: S) -> Result<S::Ok, S::Error> {
        amount.map(format).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<NanoUsd>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        text.map(|text| parse(&text).map_err(D::Error::custom)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Option<i128>) {
        assert_eq!(parse(text).ok(), expected.map(NanoUsd), "{text:?}");
        if let Some(amount) = expected {
            assert_eq!(format(NanoUsd(amount)), text);
        }
    }

    #[test]
    fn decimal_usd_is_exact_both_ways() {
        check("0", Some(0));
        check("0.15", Some(150_000_000));
        check("0.000000001", Some(1));
        check("12.3", Some(12_300_000_000));
        check("999999999.999999999", Some(999_999_999_999_999_999));
        assert_eq!(format(NanoUsd(-1)), "-0.000000001");
        assert_eq!(parse("1.50").map(format).as_deref(), Ok("1.5"));
    }

    #[test]
    fn anything_else_is_refused() {
        for text in ["", ".", "1.", ".5", "-1", "+1", "1e3", "1,5", " 1", "1 ", "0.0000000001"] {
            check(text, None);
        }
        for text in ["1.2.3", "NaN", "inf", "1_000", "٣", "1000000000", "0x1", "$1"] {
            check(text, None);
        }
    }
}
