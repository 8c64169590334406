//! Azure's traces: CSV of wall-clock times, prompt and answer tokens. Prefixes are not known.

use super::{Workload, WorkloadError};
use crate::Nanos;
use jiff::civil::DateTime;
use serde::Deserialize;
use std::path::Path;

#[derive(Deserialize)]
struct Row {
    #[serde(rename = "TIMESTAMP")]
    timestamp: String,
    #[serde(rename = "ContextTokens")]
    context_tokens: u32,
    #[serde(rename = "GeneratedTokens")]
    generated_tokens: u32,
}

pub(super) fn is_header(line: &str) -> bool {
    ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
        .iter()
        .all(|column| line.split(',').any(|name| name.trim() == *column))
}

pub(super) fn parse(path: &Path, text: &str) -> Result<Workload, WorkloadError> {
    let mut workload = Workload::default();
    let mut start: Option<DateTime> = None;
    let mut reader = csv::ReaderBuilder::new()
        .trim(csv::Trim::All)
        .from_reader(text.as_bytes());
    for (row, index) in reader.deserialize::<Row>().zip(0..) {
        let wrong = |reason: String| WorkloadError::Line {
            path: path.to_owned(),
            line: index + 2,
            reason,
        };
        let row = row.map_err(|error| wrong(error.to_string()))?;
        let moment: DateTime = row
            .timestamp
            .parse()
            .map_err(|error| wrong(format!("TIMESTAMP `{}` is no date and time: {error}", row.timestamp)))?;
        let start = *start.get_or_insert(moment);
        let since = moment.duration_since(start).as_nanos();
        // Rows may be out of order; the earliest becomes the start once all are known.
        let at = u64::try_from(since + DAY_NANOS).map_err(|_| wrong("a day before the first".to_owned()))?;
        if row.context_tokens == 0 {
            return Err(wrong("ContextTokens is 0, expected at least 1 token".to_owned()));
        }
        workload.push(Nanos(at), row.context_tokens, row.generated_tokens.max(1), &[]);
    }
    Ok(workload)
}

const DAY_NANOS: i128 = 86_400_000_000_000;
