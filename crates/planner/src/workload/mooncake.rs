//! Mooncake's traces: JSON lines with times in milliseconds, lengths in tokens, and one id per prompt block.

use super::{Workload, WorkloadError};
use crate::Nanos;
use serde::Deserialize;
use std::path::Path;

/// Block sizes that are looked for, tokens.
const BLOCK_TOKENS: [u32; 9] = [512, 16, 32, 64, 128, 256, 1024, 8, 4];

#[derive(Deserialize)]
struct Row {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u32>,
    /// Where the ids' block size is said; else it is found from the lengths.
    #[serde(default)]
    block_tokens: Option<u32>,
}

pub(super) fn parse(path: &Path, text: &str) -> Result<Workload, WorkloadError> {
    let mut rows = Vec::new();
    for (line, at) in text.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty()) {
        rows.push(row(line).map_err(|reason| WorkloadError::Line {
            path: path.to_owned(),
            line: at,
            reason,
        })?);
    }
    let said = rows.iter().find_map(|row| row.block_tokens);
    let known = rows.iter().any(|row| !row.hash_ids.is_empty());
    let fits = |tokens: &u32| {
        rows.iter()
            .all(|row| row.hash_ids.is_empty() || row.input_length.div_ceil(*tokens) as usize == row.hash_ids.len())
    };
    let block_tokens = match (known, said) {
        (false, _) => None,
        (true, Some(said)) => Some(said.max(1)),
        (true, None) => match BLOCK_TOKENS.iter().copied().find(fits).or_else(|| full_only(&rows)) {
            None => return Err(WorkloadError::BlockSize { path: path.to_owned() }),
            found => found,
        },
    };
    let mut workload = Workload {
        block_tokens,
        ..Workload::default()
    };
    for row in rows {
        let at = Nanos::from_seconds(row.timestamp / 1e3);
        workload.push(at, row.input_length, row.output_length, &row.hash_ids);
    }
    Ok(workload)
}

/// Some traces have ids of full blocks only.
fn full_only(rows: &[Row]) -> Option<u32> {
    let fits = |tokens: &u32| {
        rows.iter()
            .all(|row| (row.input_length / tokens) as usize == row.hash_ids.len())
    };
    BLOCK_TOKENS.iter().copied().find(fits)
}

fn row(line: &str) -> Result<Row, String> {
    let row: Row = serde_json::from_str(line).map_err(|error| {
        let text = error.to_string();
        text.split(" at line").next().unwrap_or_default().to_owned()
    })?;
    if !row.timestamp.is_finite() || row.timestamp < 0.0 {
        return Err(format!(
            "timestamp is {}, expected milliseconds from the start",
            row.timestamp
        ));
    }
    for (name, tokens) in [("input_length", row.input_length), ("output_length", row.output_length)] {
        if tokens == 0 {
            return Err(format!("{name} is 0, expected at least 1 token"));
        }
    }
    Ok(row)
}
