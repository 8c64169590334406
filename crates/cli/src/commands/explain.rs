//! `baton explain`: why a request was placed where it was, and what it was like there.

use crate::endpoint::{EndpointOptions, explain};
use anyhow::{Context, Result, anyhow};
use baton_node_runtime::format_duration;
use baton_proto::v1::admin_client::AdminClient;
use baton_proto::v1::{ExplainRequest, ExplainResponse, RoutingCandidate, RoutingDecision, Timeline};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

/// Shows why a request was placed where it was: the candidates with their predicted times, and the actual ones.
#[derive(Debug, clap::Args)]
pub struct Explain {
    /// The request's name: x-request-id of its response
    request_id: String,
    #[command(flatten)]
    endpoint: EndpointOptions,
    /// Prints one line of JSON
    #[arg(long)]
    json: bool,
}

impl Explain {
    /// Asks and prints.
    pub async fn run(self) -> Result<ExitCode> {
        let (channel, address) = self.endpoint.connect().await?;
        let request_id = self.request_id.clone();
        let answer = AdminClient::new(channel).explain(ExplainRequest { request_id }).await;
        let known = answer
            .map_err(|status| anyhow!("{address}: {}", explain(&status)))?
            .into_inner();
        let text = if self.json {
            json(&self.request_id, &known).to_string()
        } else {
            picture(&self.request_id, &known)
        };
        writeln!(std::io::stdout(), "{}", text.trim_end()).context("write the explanation")?;
        Ok(ExitCode::SUCCESS)
    }
}

const HEAD: [&str; 12] = [
    "", "PREFILL", "DECODE", "COMPUTED", "SENT", "QUEUE", "PREFILL", "EXPOSED", "TTFT", "ITL", "COST", "NOTES",
];

fn show(us: u64) -> String {
    format_duration(Duration::from_micros(us))
}

/// The times of one candidate add up to its TTFT.
fn ttft_us(candidate: &RoutingCandidate) -> u64 {
    candidate.queue_us + candidate.prefill_us + candidate.handover_us
}

fn picture(request_id: &str, known: &ExplainResponse) -> String {
    let outcome = match known.outcome.as_str() {
        "" => "still runs",
        outcome => outcome,
    };
    let mut out = format!("request {request_id}: {outcome}\n");
    let last_placed = known
        .decisions
        .iter()
        .rposition(|decision| decision.decision == "place");
    for (index, decision) in known.decisions.iter().enumerate() {
        let because = match decision.reason.as_str() {
            "" => String::new(),
            reason => format!(": {reason}"),
        };
        let _ = writeln!(
            out,
            "\n{} after its arrival: {} ({}, {} tokens){because}",
            show(decision.at_us),
            decision.decision,
            decision.policy,
            decision.context_tokens
        );
        let actual = known.timeline.as_ref().filter(|_| Some(index) == last_placed);
        table(&mut out, decision, actual);
    }
    for fallback in known.timeline.iter().flat_map(|timeline| &timeline.fallbacks) {
        let _ = writeln!(out, "\nfell back: {fallback}");
    }
    out
}

fn table(out: &mut String, decision: &RoutingDecision, actual: Option<&Timeline>) {
    if decision.candidates.is_empty() {
        return;
    }
    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(decision.candidates.iter().map(predicted_row));
    rows.extend(actual.map(actual_row));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    for row in &rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let _ = if column < 3 || column == HEAD.len() - 1 {
                write!(line, "{cell:<width$}  ")
            } else {
                write!(line, "{cell:>width$}  ")
            };
        }
        let _ = writeln!(out, "{}", line.trim_end());
    }
}

fn predicted_row(candidate: &RoutingCandidate) -> [String; HEAD.len()] {
    let notes = [(!candidate.room, "no free blocks"), (!candidate.measured, "a guess")];
    let notes: Vec<&str> = notes.iter().filter(|(is, _)| *is).map(|(_, note)| *note).collect();
    let prefill = match candidate.prefill_node.as_str() {
        "" => "(local)",
        node => node,
    };
    [
        if candidate.chosen { "->" } else { "" }.to_owned(),
        prefill.to_owned(),
        candidate.decode_node.clone(),
        candidate.prefill_tokens.to_string(),
        candidate.handover_tokens.to_string(),
        show(candidate.queue_us),
        show(candidate.prefill_us),
        show(candidate.handover_us),
        show(ttft_us(candidate)),
        show(candidate.itl_us),
        format!("{:.3} s", candidate.cost_s),
        notes.join(", "),
    ]
}

fn actual_row(timeline: &Timeline) -> [String; HEAD.len()] {
    let local = timeline.prefill_node == timeline.decode_node;
    let sent = (timeline.prefill_tokens + timeline.cached_tokens).saturating_sub(timeline.held_tokens);
    [
        "actual".to_owned(),
        if local { "(local)" } else { &timeline.prefill_node }.to_owned(),
        timeline.decode_node.clone(),
        timeline.prefill_tokens.to_string(),
        if local { 0 } else { sent }.to_string(),
        show(timeline.queue_us),
        show(timeline.prefill_us),
        show(timeline.exposed_us),
        show(timeline.ttft_us),
        show(timeline.decode_us_per_token),
        String::new(),
        String::new(),
    ]
}

fn json(request_id: &str, known: &ExplainResponse) -> Value {
    let candidate = |c: &RoutingCandidate| {
        json!({
            "prefill_node": c.prefill_node, "decode_node": c.decode_node, "chosen": c.chosen,
            "prefill_tokens": c.prefill_tokens, "handover_tokens": c.handover_tokens, "room": c.room,
            "measured": c.measured, "queue_us": c.queue_us, "prefill_us": c.prefill_us, "handover_us": c.handover_us,
            "ttft_us": ttft_us(c), "itl_us": c.itl_us, "cost_s": c.cost_s,
        })
    };
    let decision = |d: &RoutingDecision| {
        json!({
            "at_us": d.at_us, "policy": d.policy, "context_tokens": d.context_tokens, "decision": d.decision,
            "reason": d.reason, "candidates": d.candidates.iter().map(candidate).collect::<Vec<_>>(),
        })
    };
    let actual = |t: &Timeline| {
        json!({
            "prefill_node": t.prefill_node, "decode_node": t.decode_node, "prefill_tokens": t.prefill_tokens,
            "cached_tokens": t.cached_tokens, "held_tokens": t.held_tokens, "handover_bytes": t.handover_bytes,
            "queue_us": t.queue_us, "prefill_us": t.prefill_us, "exposed_us": t.exposed_us, "ttft_us": t.ttft_us,
            "decode_us_per_token": t.decode_us_per_token, "fallbacks": t.fallbacks,
        })
    };
    json!({
        "request_id": request_id,
        "outcome": known.outcome,
        "decisions": known.decisions.iter().map(decision).collect::<Vec<_>>(),
        "actual": known.timeline.as_ref().map(actual),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> ExplainResponse {
        let pair = RoutingCandidate {
            prefill_node: "prefill-1".to_owned(),
            decode_node: "decode-1".to_owned(),
            chosen: true,
            prefill_tokens: 512,
            handover_tokens: 500,
            room: true,
            measured: true,
            queue_us: 1000,
            prefill_us: 40_000,
            handover_us: 2000,
            itl_us: 20_000,
            cost_s: 1.3231,
        };
        let alone = RoutingCandidate {
            prefill_node: String::new(),
            chosen: false,
            room: false,
            measured: false,
            ..pair.clone()
        };
        let decision = RoutingDecision {
            at_us: 300,
            policy: "predicted".to_owned(),
            context_tokens: 512,
            decision: "place".to_owned(),
            candidates: vec![pair, alone],
            ..RoutingDecision::default()
        };
        let hold = RoutingDecision {
            decision: "hold".to_owned(),
            reason: "every queue is full".to_owned(),
            candidates: Vec::new(),
            ..decision.clone()
        };
        ExplainResponse {
            decisions: vec![hold, decision],
            outcome: "stop".to_owned(),
            timeline: Some(Timeline {
                prefill_node: "prefill-1".to_owned(),
                decode_node: "decode-1".to_owned(),
                prefill_tokens: 512,
                ttft_us: 47_000,
                fallbacks: vec!["p0 died".to_owned()],
                ..Timeline::default()
            }),
        }
    }

    #[test]
    fn the_table_shows_predicted_beside_actual() {
        let picture = picture("ab", &known());
        for words in [
            "request ab: stop",
            "hold (predicted, 512 tokens): every queue is full",
            "->      prefill-1  decode-1       512   500",
            "43.0 ms",
            "no free blocks, a guess",
            "(local)",
            "actual  prefill-1",
            "47.0 ms",
            "fell back: p0 died",
        ] {
            assert!(picture.contains(words), "`{words}` is not in:\n{picture}");
        }
        assert_eq!(picture.matches("actual").count(), 1, "{picture}");
        let runs = super::picture("ab", &ExplainResponse::default());
        assert!(runs.contains("still runs"), "{runs}");
    }

    #[test]
    fn json_has_both_too() {
        let value = json("ab", &known());
        assert_eq!(value["decisions"][1]["candidates"][0]["ttft_us"], 43_000);
        assert_eq!(value["actual"]["ttft_us"], 47_000);
    }
}
