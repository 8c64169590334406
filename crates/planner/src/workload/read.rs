//! Reads a trace of either format, told by its first line.

use super::{Workload, WorkloadError, azure, mooncake};
use std::path::Path;

/// Reads a trace: Mooncake's JSON lines (which our own replays use as well) or Azure's CSV. Times are left as they are.
///
/// # Errors
/// Names the line that is wrong.
pub fn read(path: &Path) -> Result<Workload, WorkloadError> {
    let text = std::fs::read_to_string(path).map_err(|source| WorkloadError::Read {
        path: path.to_owned(),
        source,
    })?;
    let first = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
    let mut workload = if first.trim_start().starts_with('{') {
        mooncake::parse(path, &text)?
    } else if azure::is_header(first) {
        azure::parse(path, &text)?
    } else if first.is_empty() {
        Workload::default()
    } else {
        return Err(WorkloadError::Format { path: path.to_owned() });
    };
    if workload.is_empty() {
        return Err(WorkloadError::Empty { path: path.to_owned() });
    }
    workload.sort();
    Ok(workload)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Workload, String> {
        let path = Path::new("t");
        let parsed = if text.starts_with('{') {
            mooncake::parse(path, text)
        } else {
            azure::parse(path, text)
        };
        parsed.map_err(|error| error.to_string())
    }

    #[test]
    fn both_formats_are_read() {
        let lines = "{\"timestamp\": 3000, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [0, 9]}\n\n\
                     {\"timestamp\": 0, \"input_length\": 1024, \"output_length\": 7, \"hash_ids\": [0, 4]}\n";
        let mut mooncake = parse(lines).unwrap();
        mooncake.sort();
        assert_eq!(mooncake.block_tokens(), Some(512));
        let [first, second] = mooncake.requests() else { panic!() };
        assert_eq!((first.input, first.output, first.at.0), (1024, 7, 0));
        assert_eq!(mooncake.chain(first), [0, 4]);
        assert_eq!(mooncake.chain(second), [0], "the last block is not full");
        assert_eq!(second.at.seconds(), 3.0);
        let azure = parse(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n",
        );
        let azure = azure.unwrap();
        assert_eq!((azure.len(), azure.block_tokens()), (2, None));
        assert_eq!(azure.requests()[1].at.0 - azure.requests()[0].at.0, 52_000_000);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        fn wrong(text: &str) -> String {
            parse(text).unwrap_err()
        }
        assert!(wrong("{\"timestamp\": 0, \"input_length\": 5}\n").contains("line 1: missing field `output_length`"));
        assert!(wrong("{\"timestamp\": 0, \"input_length\": 0, \"output_length\": 5}").contains("input_length is 0"));
        assert!(wrong("{\"timestamp\": -1, \"input_length\": 1, \"output_length\": 5}").contains("timestamp is -1"));
        let sizes = "{\"timestamp\": 0, \"input_length\": 5000, \"output_length\": 5, \"hash_ids\": [1]}\n\
                     {\"timestamp\": 0, \"input_length\": 5000, \"output_length\": 5, \"hash_ids\": [1,2,3]}";
        assert!(wrong(sizes).contains("no block size"));
        let head = "TIMESTAMP,ContextTokens,GeneratedTokens\n";
        assert!(wrong(&format!("{head}2023-11-16 18:17:03,x,10\n")).contains("line 2"));
        assert!(wrong(&format!("{head}yesterday,3,10\n")).contains("line 2: TIMESTAMP"));
    }

    #[test]
    fn a_file_without_requests_or_of_another_format_is_refused() {
        let folder = std::env::temp_dir().join(format!("baton-planner-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let file = |text: &str| {
            let path = folder.join("trace");
            std::fs::write(&path, text).unwrap();
            read(&path).unwrap_err().to_string()
        };
        assert!(file("\n").contains("is empty"));
        assert!(file("TIMESTAMP,ContextTokens,GeneratedTokens\n").contains("is empty"));
        assert!(file("time,tokens\n1,2\n").contains("is no trace"));
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(read(&folder).unwrap_err().to_string().contains("cannot read"));
    }
}
