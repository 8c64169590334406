//! What a process tells the program that started it: one line of JSON on standard output, which carries
//! nothing else. Logs go to standard error.

use serde::{Deserialize, Serialize};
use std::io::Write;

/// Where a process that is ready can be reached. Addresses are `host:port`; absent ones are not served.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// `coordinator`, `prefill` or `decode`.
    pub role: String,
    /// The node's name; a coordinator has its instance here.
    pub node_id: String,
    /// Process id.
    pub pid: u32,
    /// gRPC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grpc: Option<String>,
    /// OpenAI-compatible HTTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<String>,
    /// Metrics and health.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin: Option<String>,
    /// The embedded store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event {
    Ready(Announcement),
}

/// Tells that the process serves. Call it once, when it does.
pub fn ready(announcement: &Announcement) {
    if let Ok(mut line) = serde_json::to_string(&Event::Ready(announcement.clone())) {
        line.push('\n');
        let mut stdout = std::io::stdout().lock();
        // Nobody may be listening, which is no reason to stop serving.
        let _ = stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush());
    }
}

/// The announcement in a line of a child's standard output; none where the line is something else.
pub fn parse(line: &str) -> Option<Announcement> {
    serde_json::from_str(line)
        .ok()
        .map(|Event::Ready(announcement)| announcement)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_line_leaves_out_what_is_not_served() {
        let announcement = Announcement {
            role: "prefill".to_owned(),
            node_id: "prefill-1".to_owned(),
            pid: 7,
            grpc: Some("127.0.0.1:1".to_owned()),
            ..Announcement::default()
        };
        let line = serde_json::to_string(&Event::Ready(announcement.clone())).unwrap();
        assert_eq!(
            line,
            r#"{"event":"ready","role":"prefill","node_id":"prefill-1","pid":7,"grpc":"127.0.0.1:1"}"#
        );
        assert_eq!(parse(&line), Some(announcement));
        assert_eq!(parse("hello"), None);
        assert_eq!(parse("{\"event\":\"other\"}"), None);
    }
}
