//! Times as people type and read them.

use anyhow::{Result, bail};
use jiff::{Timestamp, civil::Date, tz::TimeZone};

const UNITS: [(char, i64); 5] =
    [('s', 1), ('m', 60), ('h', 3600), ('d', 24 * 3600), ('w', 7 * 24 * 3600)];
/// Longer ones are mistakes, and do not fit.
const SECONDS_MAX: i64 = 100 * 366 * 24 * 3600;

/// Seconds since 1970 as UTC, to the minute.
pub fn shown_time(at_s: i64) -> String {
    match Timestamp::from_second(at_s) {
        Ok(at) => at.strftime("%Y-%m-%d %H:%MZ").to_string(),
        Err(_) => at_s.to_string(),
    }
}

/// `90s`, `15m`, `12h`, `30d`, `2w`.
pub fn seconds(text: &str) -> Result<i64> {
    let unit = text.chars().last().and_then(|last| UNITS.iter().find(|(unit, _)| *unit == last));
    let parsed = unit.and_then(|(unit, factor)| {
        let number = text.strip_suffix(*unit)?.parse::<i64>().ok()?;
        number.checked_mul(*factor).filter(|seconds| (0..=SECONDS_MAX).contains(seconds))
    });
    match parsed {
        Some(seconds) => Ok(seconds),
        None => bail!("`{text}` is no length of time: write for example 90s, 12h or 30d"),
    }
}

/// A length of time from now, backwards if `sign` is -1; or a date or time of UTC.
pub fn moment(text: &str, now_s: i64, sign: i64) -> Result<i64> {
    if let Ok(at) = text.parse::<Timestamp>() {
        return Ok(at.as_second());
    }
    if let Ok(day) = text.parse::<Date>() {
        return Ok(day.to_zoned_datetime(TimeZone::UTC)?.timestamp().as_second());
    }
    match seconds(text) {
        Ok(seconds) => Ok(now_s.saturating_add(sign * seconds)),
        Err(_) => {
            bail!("`{text}` is no time: write for example 30d, 2026-12-31 or 2026-12-31T12:00:00Z")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_lengths_dates_or_times() {
        for (text, expected) in [
            ("30d", Some(1_000 - 30 * 86_400)),
            ("0s", Some(1_000)),
            ("1970-01-02", Some(86_400)),
            ("1970-01-01T00:00:01Z", Some(1)),
            ("1970-01-01T01:00:01+01:00", Some(1)),
        ] {
            assert_eq!(moment(text, 1_000, -1).ok(), expected, "{text}");
        }
        for text in ["", "d", "-1d", "30", "1y", "30 d", "1970-13-01", "99999999999w", "1é"] {
            assert!(moment(text, 1_000, -1).is_err(), "{text}");
        }
    }
}
