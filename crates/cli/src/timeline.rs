//! What became of one request, as a picture for people and as JSON for programs. Pure.

use baton_node_runtime::{format_bytes, format_duration};
use baton_proto::v1::{FinishReason, PathFallback, Timeline, Usage};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

/// Width of the longest bar, columns.
const BAR: u64 = 40;

/// An answer that came to its end.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// The generated text.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens.
    pub usage: Usage,
    /// When and where.
    pub timeline: Timeline,
}

/// The JSON form, its fields in this order.
#[derive(Serialize)]
struct Line<'a> {
    text: &'a str,
    completion_tokens: u32,
    finish_reason: &'static str,
    prefill_node: &'a str,
    decode_node: &'a str,
    pids: &'a BTreeMap<String, u32>,
    timeline: TimelineLine<'a>,
}

#[derive(Serialize)]
struct TimelineLine<'a> {
    queue_ms: f64,
    prefill_ms: f64,
    prefill_tokens: u32,
    cached_tokens: u32,
    held_tokens: u32,
    handover_bytes: u64,
    handover_path: &'a str,
    handover_gb_per_s: f64,
    path_fallbacks: Vec<PathFallbackLine<'a>>,
    exposed_ms: f64,
    ttft_ms: f64,
    decode_ms_per_token: f64,
}

#[derive(Serialize)]
struct PathFallbackLine<'a> {
    from: &'a str,
    to: &'a str,
    reason: &'a str,
}

/// One line of JSON; times in milliseconds.
///
/// # Errors
/// Never for an answer that came over the wire.
pub fn json(answer: &Answer, pids: &BTreeMap<String, u32>) -> serde_json::Result<String> {
    let timeline = &answer.timeline;
    let ms = |us: u64| us as f64 / 1000.0;
    serde_json::to_string(&Line {
        text: &answer.text,
        completion_tokens: answer.usage.completion_tokens,
        finish_reason: finish_reason(answer.finish_reason),
        prefill_node: &timeline.prefill_node,
        decode_node: &timeline.decode_node,
        pids,
        timeline: TimelineLine {
            queue_ms: ms(timeline.queue_us),
            prefill_ms: ms(timeline.prefill_us),
            prefill_tokens: timeline.prefill_tokens,
            cached_tokens: timeline.cached_tokens,
            held_tokens: timeline.held_tokens,
            handover_bytes: timeline.handover_bytes,
            handover_path: &timeline.handover_path,
            handover_gb_per_s: timeline.handover_bytes_per_second as f64 / 1e9,
            path_fallbacks: timeline.path_fallbacks.iter().map(path_fallback).collect(),
            exposed_ms: ms(timeline.exposed_us),
            ttft_ms: ms(timeline.ttft_us),
            decode_ms_per_token: ms(timeline.decode_us_per_token),
        },
    })
}

/// A few lines, phases in order, bars to one scale.
pub fn picture(answer: &Answer, pids: &BTreeMap<String, u32>) -> String {
    let (timeline, usage) = (&answer.timeline, &answer.usage);
    let node = |name: &str| match pids.get(name) {
        Some(pid) => format!("{name} (process {pid})"),
        None => name.to_owned(),
    };
    let decode_us = timeline.decode_us_per_token * u64::from(usage.completion_tokens.saturating_sub(1));
    let longest = [timeline.queue_us, timeline.prefill_us, timeline.exposed_us, decode_us]
        .into_iter()
        .max();
    let bar = |us: u64| "█".repeat(scaled(us, longest.unwrap_or(0)));
    let show = |us: u64| format_duration(Duration::from_micros(us));
    let mut out = String::from("\n\n");
    let mut row = |name: &str, us: u64, what: String| {
        let _ = writeln!(
            out,
            "  {name:<10} {:>8}  {:<width$}  {what}",
            show(us),
            bar(us),
            width = BAR as usize
        );
    };
    row("queue", timeline.queue_us, "wait before compute began".to_owned());
    let cached = match timeline.cached_tokens {
        0 => String::new(),
        cached => format!(" (and {cached} from its cache)"),
    };
    let rate = per_second(timeline.prefill_tokens.into(), timeline.prefill_us);
    let prefill = format!(
        "{} tokens{cached} on {}{rate}",
        timeline.prefill_tokens,
        node(&timeline.prefill_node)
    );
    row("prefill", timeline.prefill_us, prefill);
    let handover = match timeline.handover_bytes {
        0 => "none: one node does both".to_owned(),
        bytes => format!(
            "{} of KV over {}; time not hidden behind compute",
            format_bytes(bytes),
            paths(timeline)
        ),
    };
    row("hand-over", timeline.exposed_us, handover);
    let rate = per_second(1, timeline.decode_us_per_token);
    let decode = format!(
        "{} per token on {}{rate}",
        show(timeline.decode_us_per_token),
        node(&timeline.decode_node)
    );
    row("decode", decode_us, decode);
    for fallback in &timeline.fallbacks {
        let _ = writeln!(out, "  fell back  {fallback}");
    }
    let _ = write!(
        out,
        "\n  first token after {}; {} prompt tokens, {} generated (temperature 0), ended by {}",
        show(timeline.ttft_us),
        usage.prompt_tokens,
        usage.completion_tokens,
        match answer.finish_reason {
            FinishReason::Stop => "the model",
            FinishReason::Length => "--max-tokens or the context's end",
            FinishReason::Cancelled | FinishReason::Unspecified => "cancellation",
        }
    );
    out
}

fn path_fallback(fallback: &PathFallback) -> PathFallbackLine<'_> {
    let PathFallback { from, to, reason } = fallback;
    PathFallbackLine { from, to, reason }
}

/// `shm`, `tcp at 1.2 GB/s`, or `rdma, then tcp (rdma failed: the link is down)`.
fn paths(timeline: &Timeline) -> String {
    let mut out = String::new();
    for fallback in &timeline.path_fallbacks {
        let _ = write!(out, "{}, then ", fallback.from);
    }
    out.push_str(&timeline.handover_path);
    let rate = timeline.handover_bytes_per_second;
    if rate > 0 {
        let _ = write!(out, " at {}", format_rate(rate));
    }
    let whys = timeline.path_fallbacks.iter();
    let whys: Vec<String> = whys.map(|why| format!("{} failed: {}", why.from, why.reason)).collect();
    if !whys.is_empty() {
        let _ = write!(out, " ({})", whys.join("; "));
    }
    out
}

/// Bytes per second, decimal, as networks count.
pub fn format_rate(bytes_per_second: u64) -> String {
    match bytes_per_second as f64 {
        rate if rate >= 1e9 => format!("{:.1} GB/s", rate / 1e9),
        rate if rate >= 1e6 => format!("{:.0} MB/s", rate / 1e6),
        rate => format!("{:.0} kB/s", rate / 1e3),
    }
}

/// As OpenAI and the gRPC door write it.
pub fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Cancelled => "cancelled",
        FinishReason::Unspecified => "unspecified",
    }
}

/// Columns of a bar; anything that took time has one.
fn scaled(us: u64, longest: u64) -> usize {
    let columns = (us * BAR).checked_div(longest).unwrap_or(0).max(u64::from(us > 0));
    usize::try_from(columns).unwrap_or(0)
}

fn per_second(count: u64, us: u64) -> String {
    match (count * 1_000_000).checked_div(us) {
        Some(rate) if rate > 0 => format!(", {rate} tokens/s"),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> Answer {
        Answer {
            text: "Because.".to_owned(),
            finish_reason: FinishReason::Length,
            usage: Usage {
                prompt_tokens: 36,
                completion_tokens: 11,
                cached_tokens: 0,
            },
            timeline: Timeline {
                queue_us: 800,
                prefill_us: 90_000,
                prefill_tokens: 36,
                handover_bytes: 1_105_920,
                handover_path: "tcp".to_owned(),
                handover_bytes_per_second: 1_200_000_000,
                exposed_us: 1_300,
                ttft_us: 92_000,
                decode_us_per_token: 20_000,
                prefill_node: "prefill-1".to_owned(),
                decode_node: "decode-1".to_owned(),
                attempts: 1,
                ..Timeline::default()
            },
        }
    }

    #[test]
    fn the_picture_names_every_phase() {
        let pids = BTreeMap::from([("prefill-1".to_owned(), 7), ("decode-1".to_owned(), 8)]);
        let picture = picture(&answer(), &pids);
        for words in [
            "36 tokens on prefill-1 (process 7), 400 tokens/s",
            "1.1 MiB of KV over tcp at 1.2 GB/s;",
            "1.30 ms",
            "20.0 ms per token on decode-1 (process 8), 50 tokens/s",
            "first token after 92.0 ms",
            "11 generated",
        ] {
            assert!(picture.contains(words), "`{words}` is not in {picture}");
        }
        let longest = picture.lines().map(|line| line.matches('█').count()).max();
        assert_eq!(longest, Some(40));
    }

    #[test]
    fn a_fallback_is_shown_with_its_reason() {
        let mut answer = answer();
        answer.timeline.path_fallbacks = vec![PathFallback {
            from: "rdma".to_owned(),
            to: "tcp".to_owned(),
            reason: "the link is down".to_owned(),
        }];
        let picture = picture(&answer, &BTreeMap::new());
        let words = "over rdma, then tcp at 1.2 GB/s (rdma failed: the link is down);";
        assert!(picture.contains(words), "{picture}");
        let line = json(&answer, &BTreeMap::new()).unwrap();
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["timeline"]["path_fallbacks"][0]["from"], "rdma");
    }

    #[test]
    fn one_node_hands_nothing_over() {
        let mut answer = answer();
        answer.timeline.handover_bytes = 0;
        assert!(picture(&answer, &BTreeMap::new()).contains("none: one node does both"));
    }

    #[test]
    fn json_is_one_line_in_milliseconds() {
        let line = json(&answer(), &BTreeMap::from([("coordinator".to_owned(), 1)])).unwrap();
        assert!(
            line.starts_with(r#"{"text":"Because.","completion_tokens":11"#),
            "{line}"
        );
        assert!(!line.contains('\n'));
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["timeline"]["queue_ms"], 0.8);
        assert_eq!(value["timeline"]["handover_path"], "tcp");
        assert_eq!(value["finish_reason"], "length");
        assert_eq!(value["pids"]["coordinator"], 1);
    }

    #[test]
    fn bars_keep_to_their_width() {
        assert_eq!(scaled(0, 0), 0);
        assert_eq!(scaled(1, 1_000_000), 1);
        assert_eq!(scaled(5, 5), 40);
    }
}
