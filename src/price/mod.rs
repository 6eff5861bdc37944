//! Money: decimal USD strings to integer nano-USD, exactly.

use thiserror::Error;

use crate::types::NanoUsd;

/// Prices in nano-USD per million tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prices {
    pub input: NanoUsd,
    pub cached_input: NanoUsd,
    pub output: NanoUsd,
}

#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is not an amount in USD: write digits with at most nine decimals, such as \"0.15\"")]
pub struct ParseUsdError(String);

const NANO_DIGITS: usize = 9;
/// Keeps amount times tokens far inside an i128.
const WHOLE_DIGITS_MAX: usize = 9;

/// Parses a non-negative decimal amount of US dollars. What does not fit nine decimals is refused,
/// never rounded.
pub fn parse_usd(text: &str) -> Result<NanoUsd, ParseUsdError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Option<i128>) {
        assert_eq!(parse_usd(text).ok(), expected.map(NanoUsd), "{text:?}");
    }

    #[test]
    fn decimal_usd_is_exact() {
        check("0", Some(0));
        check("0.15", Some(150_000_000));
        check("0.000000001", Some(1));
        check("12.3", Some(12_300_000_000));
        check("999999999.999999999", Some(999_999_999_999_999_999));
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
