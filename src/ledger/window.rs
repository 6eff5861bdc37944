//! The windows that budgets count in. Nothing resets one: its start follows from a time.

use jiff::{
    Timestamp, ToSpan,
    civil::{Date, Weekday},
    tz::TimeZone,
};
use serde::{Deserialize, Serialize};

const NS_PER_S: i64 = 1_000_000_000;

/// How long a budget lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Span {
    Hour,
    Day,
    /// From Monday.
    Week,
    Month,
    /// For ever.
    Total,
}

impl Span {
    pub const ALL: [Self; 5] = [Self::Hour, Self::Day, Self::Week, Self::Month, Self::Total];

    pub fn name(self) -> &'static str {
        match self {
            Self::Hour => "hour",
            Self::Day => "day",
            Self::Week => "week",
            Self::Month => "month",
            Self::Total => "total",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|span| span.name() == name)
    }
}

/// A time zone of the IANA database.
#[derive(Clone, Debug, PartialEq)]
pub struct Zone(TimeZone);

impl Zone {
    pub fn utc() -> Self {
        Self(TimeZone::UTC)
    }

    /// `None` where there is no such zone.
    pub fn parse(name: &str) -> Option<Self> {
        TimeZone::get(name).ok().map(Self)
    }

    pub fn name(&self) -> &str {
        self.0.iana_name().unwrap_or("UTC")
    }
}

/// Seconds since 1970 at which the window that holds `at_ns` starts, and at which the next does
/// (`None` for one without end). Days, weeks and months follow the zone's civil time, so that a day
/// with a change of the clock has 23 or 25 hours; hours are those of the zone's clock.
pub fn bounds_s(span: Span, zone: &Zone, at_ns: i64) -> (i64, Option<i64>) {
    if span == Span::Total {
        return (0, None);
    }
    let computed = civil_bounds(span, zone, at_ns);
    // Only years far outside a ledger's life are out of the calendar's range.
    computed.map_or((0, None), |(start_s, end_s)| (start_s, Some(end_s)))
}

/// Start of the window that holds `at_ns`.
pub fn start_s(span: Span, zone: &Zone, at_ns: i64) -> i64 {
    bounds_s(span, zone, at_ns).0
}

fn civil_bounds(span: Span, zone: &Zone, at_ns: i64) -> Result<(i64, i64), jiff::Error> {
    let at_s = at_ns.div_euclid(NS_PER_S);
    let local = Timestamp::from_second(at_s)?.to_zoned_datetime(zone.0.clone());
    if span == Span::Hour {
        let offset_s = i64::from(local.offset().seconds());
        let start_s = (at_s + offset_s).div_euclid(3600) * 3600 - offset_s;
        return Ok((start_s, start_s + 3600));
    }
    let today = local.date();
    let (first, next) = match span {
        Span::Week => {
            let since = today.weekday().since(Weekday::Monday);
            let monday = today.checked_sub(i64::from(since).days())?;
            (monday, monday.checked_add(7.days())?)
        }
        Span::Month => {
            let first = today.first_of_month();
            (first, first.checked_add(1.month())?)
        }
        _ => (today, today.checked_add(1.day())?),
    };
    let start = |date: Date| {
        date.to_zoned_datetime(zone.0.clone()).map(|midnight| midnight.timestamp().as_second())
    };
    Ok((start(first)?, start(next)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(span: Span, zone: &str, at: &str, start: &str, end: &str) {
        let ns = |text: &str| text.parse::<Timestamp>().expect("a time").as_second() * NS_PER_S;
        let zone = Zone::parse(zone).expect("a zone");
        let (start_s, end_s) = bounds_s(span, &zone, ns(at) + 17);
        assert_eq!(start_s * NS_PER_S, ns(start), "{span:?} {at}");
        assert_eq!(end_s.expect("an end") * NS_PER_S, ns(end), "{span:?} {at}");
        assert_eq!(bounds_s(span, &zone, start_s * NS_PER_S), (start_s, end_s), "the first ns");
        let last = end_s.expect("an end") * NS_PER_S - 1;
        assert_eq!(bounds_s(span, &zone, last), (start_s, end_s), "the last ns");
    }

    #[test]
    fn windows_follow_the_zone() {
        let (berlin, kolkata) = ("Europe/Berlin", "Asia/Kolkata");
        let at = "2026-11-24T20:58:49Z";
        check(Span::Hour, "UTC", at, "2026-11-24T20:00:00Z", "2026-11-24T21:00:00Z");
        check(Span::Hour, kolkata, at, "2026-11-24T20:30:00Z", "2026-11-24T21:30:00Z");
        check(Span::Day, "UTC", at, "2026-11-24T00:00:00Z", "2026-11-25T00:00:00Z");
        check(Span::Day, kolkata, at, "2026-11-24T18:30:00Z", "2026-11-25T18:30:00Z");
        check(Span::Week, berlin, at, "2026-11-22T23:00:00Z", "2026-11-29T23:00:00Z");
        check(Span::Month, berlin, at, "2026-10-31T23:00:00Z", "2026-11-30T23:00:00Z");
        check(
            Span::Month,
            "UTC",
            "2024-02-29T12:00:00Z",
            "2024-02-01T00:00:00Z",
            "2024-03-01T00:00:00Z",
        );
    }

    #[test]
    fn a_day_may_have_23_or_25_hours() {
        let zone = "Europe/Berlin";
        check(
            Span::Day,
            zone,
            "2026-03-29T12:00:00Z",
            "2026-03-28T23:00:00Z",
            "2026-03-29T22:00:00Z",
        );
        check(
            Span::Day,
            zone,
            "2026-10-25T12:00:00Z",
            "2026-10-24T22:00:00Z",
            "2026-10-25T23:00:00Z",
        );
    }

    #[test]
    fn the_total_has_one_window_and_unknown_zones_none() {
        for at_ns in [0, i64::MAX, 1_800_000_000 * NS_PER_S] {
            assert_eq!(bounds_s(Span::Total, &Zone::utc(), at_ns), (0, None));
        }
        for name in ["Mars/Olympus", "", "Europe"] {
            assert!(Zone::parse(name).is_none(), "{name}");
        }
    }
}
