//! Sizes and durations as people write them.

use std::time::Duration;

/// A value that is no size or duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidValue {
    /// Not a size.
    #[error("expected a size such as 512MiB, 2GiB, 1.5GB or a plain number of bytes")]
    Bytes,
    /// Not a duration.
    #[error("expected a duration with its unit, such as 500us, 250ms, 10s, 5m or 2h")]
    Duration,
    /// More than can be counted.
    #[error("too large")]
    TooLarge,
}

const SIZES: [(&str, u64); 10] = [
    ("B", 1),
    ("KIB", 1 << 10),
    ("MIB", 1 << 20),
    ("GIB", 1 << 30),
    ("TIB", 1 << 40),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("", 1),
];

const DURATIONS: [(&str, u64); 6] = [
    ("us", 1),
    ("µs", 1),
    ("ms", 1_000),
    ("s", 1_000_000),
    ("m", 60_000_000),
    ("h", 3_600_000_000),
];

/// Bytes from `2GiB`, `512 MiB`, `1.5GB` or `1000000`; for clap's `value_parser`.
///
/// # Errors
/// Says what is expected.
pub fn parse_bytes(text: &str) -> Result<u64, InvalidValue> {
    let (number, unit) = split(text);
    let unit = unit.to_ascii_uppercase();
    let (_, scale) = SIZES
        .iter()
        .find(|(name, _)| *name == unit)
        .ok_or(InvalidValue::Bytes)?;
    scaled(number, *scale, InvalidValue::Bytes)
}

/// A duration from `500ms`, `2s`, `1.5m`; zero needs no unit; for clap's `value_parser`.
///
/// # Errors
/// Says what is expected.
pub fn parse_duration(text: &str) -> Result<Duration, InvalidValue> {
    let (number, unit) = split(text);
    if unit.is_empty() && number == "0" {
        return Ok(Duration::ZERO);
    }
    let (_, scale) = DURATIONS
        .iter()
        .find(|(name, _)| *name == unit)
        .ok_or(InvalidValue::Duration)?;
    scaled(number, *scale, InvalidValue::Duration).map(Duration::from_micros)
}

/// Bytes in the largest binary unit that fits, such as `1.5 GiB`.
pub fn format_bytes(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let Some(unit) = (0..units.len()).rev().find(|unit| bytes >= 1 << (10 * (unit + 1))) else {
        return format!("{bytes} B");
    };
    format!(
        "{:.1} {}",
        bytes as f64 / (1_u64 << (10 * (unit + 1))) as f64,
        units[unit]
    )
}

/// A duration with three digits, such as `1.25 s` or `310 us`.
pub fn format_duration(duration: Duration) -> String {
    let us = duration.as_secs_f64() * 1e6;
    let (value, unit) = match us {
        us if us < 1e3 => (us, "us"),
        us if us < 1e6 => (us / 1e3, "ms"),
        us => (us / 1e6, "s"),
    };
    let decimals = match value {
        v if unit == "us" || v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.decimals$} {unit}")
}

fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_')
        .unwrap_or(text.len());
    (&text[..end], text[end..].trim())
}

fn scaled(number: &str, scale: u64, invalid: InvalidValue) -> Result<u64, InvalidValue> {
    let number = number.replace('_', "");
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(scale).ok_or(InvalidValue::TooLarge);
    }
    if number.bytes().all(|b| b.is_ascii_digit()) && !number.is_empty() {
        return Err(InvalidValue::TooLarge);
    }
    let value: f64 = number.parse().map_err(|_| invalid)?;
    let value = value * scale as f64;
    if value < 9e18 {
        Ok(value.round() as u64)
    } else {
        Err(InvalidValue::TooLarge)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes() {
        assert_eq!(parse_bytes("2GiB"), Ok(2 << 30));
        assert_eq!(parse_bytes("512 mib"), Ok(512 << 20));
        assert_eq!(parse_bytes("1.5GB"), Ok(1_500_000_000));
        assert_eq!(parse_bytes("1_000_000"), Ok(1_000_000));
        for bad in ["", "GiB", "1G", "-1", "1.2.3MB", "one", "."] {
            assert_eq!(parse_bytes(bad), Err(InvalidValue::Bytes), "{bad}");
        }
        assert_eq!(parse_bytes("99999999999TiB"), Err(InvalidValue::TooLarge));
        assert_eq!(parse_bytes("99999999999999999999999"), Err(InvalidValue::TooLarge));
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("2s"), Ok(Duration::from_secs(2)));
        assert_eq!(parse_duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(parse_duration("0"), Ok(Duration::ZERO));
        for bad in ["", "10", "s", "1 day", "-1s"] {
            assert_eq!(parse_duration(bad), Err(InvalidValue::Duration), "{bad}");
        }
    }

    #[test]
    fn shown_for_people() {
        assert_eq!(format_bytes(17), "17 B");
        assert_eq!(format_bytes(3 << 29), "1.5 GiB");
        assert_eq!(format_duration(Duration::from_micros(310)), "310 us");
        assert_eq!(format_duration(Duration::from_micros(12_345)), "12.3 ms");
        assert_eq!(format_duration(Duration::from_millis(1250)), "1.25 s");
    }
}
