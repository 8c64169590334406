//! What `baton status --advise` says of the controller.

use baton_proto::v1::{AdviseResponse, ControlAdvice, ControlChange, ControlDecision, ControlRehearsal, NodeCounts};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// How to switch it on, where it is off.
const OFF: &str = "the controller is off: start the coordinator (or `baton up`) with --control advise --control-slo ttft_p90=2s,itl_p99=50ms \
                   and, to rehearse changes before they are advised, --control-profile FILE (from `baton profile`)";

fn counts(counts: Option<NodeCounts>) -> NodeCounts {
    counts.unwrap_or_default()
}

fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

/// For people.
pub fn text(answer: &AdviseResponse) -> String {
    if answer.mode == "off" {
        return format!("{OFF}\n");
    }
    let mut out = format!("controller: {}; ", answer.mode);
    out += &match answer.standing.as_str() {
        "leads" => "this coordinator leads".to_owned(),
        "follows" => format!("coordinator {} leads", answer.leader_instance),
        _ => "nobody is known to lead (yet): see whether the store answers".to_owned(),
    };
    out.push('\n');
    let Some(advice) = &answer.advice else {
        out.push_str("nobody has looked yet: see --control-every\n");
        return out;
    };
    let (ready, target) = (counts(advice.ready), counts(advice.target));
    let _ = writeln!(
        out,
        "seen {} s ago: {} prefill and {} decode nodes of {} are ready, {} prefill and {} decode nodes are wanted",
        advice.age_s,
        ready.prefill,
        ready.decode,
        if advice.model.is_empty() {
            "no model"
        } else {
            &advice.model
        },
        target.prefill,
        target.decode
    );
    let kept = match advice.attainment {
        Some(share) => format!(
            "{} of {} that could be judged were within it",
            percent(share),
            advice.judged
        ),
        None => "none of them could be judged yet".to_owned(),
    };
    let _ = writeln!(
        out,
        "SLO {}: {} requests in the window, {kept}",
        advice.slo, advice.requests
    );
    for reason in &advice.reasons {
        let _ = writeln!(out, "wrong: {reason}");
    }
    for tried in &advice.rehearsed {
        let _ = writeln!(
            out,
            "rehearsed: {}: {} within the SLO, {} without it; better: {}",
            tried.text,
            percent(tried.with),
            percent(tried.without),
            tried.better
        );
    }
    let nodes = |change: &ControlChange| match change.nodes.as_slice() {
        [] => String::new(),
        nodes => format!(" ({})", nodes.join(", ")),
    };
    match &advice.change {
        Some(change) => {
            let _ = writeln!(out, "advice: {}{}", change.text, nodes(change));
        }
        None => out.push_str("advice: no change\n"),
    }
    if !advice.hold.is_empty() {
        let _ = writeln!(out, "nothing is done now: {}", advice.hold);
    }
    if let Some((last, change)) = advice
        .last
        .as_ref()
        .and_then(|last| Some((last, last.change.as_ref()?)))
    {
        let promised = match &last.rehearsed {
            Some(tried) => format!("; rehearsed: {} for {}", percent(tried.with), percent(tried.without)),
            None => String::new(),
        };
        let (text, nodes) = (&change.text, nodes(change));
        let _ = writeln!(
            out,
            "last change, {} s ago: {text}{nodes}: {}{promised}",
            last.age_s, last.outcome
        );
    }
    out
}

/// For programs.
pub fn json(answer: &AdviseResponse) -> Value {
    json!({
        "mode": answer.mode,
        "standing": answer.standing,
        "leader_instance": answer.leader_instance,
        "looked": answer.advice.as_ref().map(looked),
    })
}

fn looked(advice: &ControlAdvice) -> Value {
    let nodes = |of: Option<NodeCounts>| json!({"prefill": counts(of).prefill, "decode": counts(of).decode});
    json!({
        "age_s": advice.age_s,
        "leader_instance": advice.leader_instance,
        "mode": advice.mode,
        "model": advice.model,
        "slo": advice.slo,
        "ready": nodes(advice.ready),
        "target": nodes(advice.target),
        "requests": advice.requests,
        "judged": advice.judged,
        "attainment": advice.attainment,
        "reasons": advice.reasons,
        "change": advice.change.as_ref().map(change),
        "hold": Some(&advice.hold).filter(|hold| !hold.is_empty()),
        "rehearsed": advice.rehearsed.iter().map(rehearsal).collect::<Vec<_>>(),
        "last": advice.last.as_ref().map(decision),
    })
}

fn change(change: &ControlChange) -> Value {
    json!({"kind": change.kind, "text": change.text, "nodes": change.nodes})
}

fn rehearsal(tried: &ControlRehearsal) -> Value {
    json!({
        "kind": tried.kind, "text": tried.text, "without": tried.without, "with": tried.with, "better": tried.better,
    })
}

fn decision(last: &ControlDecision) -> Value {
    json!({
        "age_s": last.age_s,
        "outcome": last.outcome,
        "change": last.change.as_ref().map(change),
        "rehearsed": last.rehearsed.as_ref().map(rehearsal),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> AdviseResponse {
        let change = ControlChange {
            kind: "to_prefill".to_owned(),
            text: "one decode node becomes a prefill node".to_owned(),
            nodes: vec!["decode-1".to_owned()],
        };
        let tried = ControlRehearsal {
            kind: change.kind.clone(),
            text: change.text.clone(),
            without: 0.412,
            with: 0.953,
            better: "yes".to_owned(),
        };
        let advice = ControlAdvice {
            age_s: 3,
            model: "tiny".to_owned(),
            slo: "ttft_p90=2000ms".to_owned(),
            ready: Some(NodeCounts { prefill: 1, decode: 3 }),
            target: Some(NodeCounts { prefill: 2, decode: 2 }),
            requests: 120,
            judged: 90,
            attainment: Some(0.5),
            reasons: vec!["prompts that wait take 9.0 s".to_owned()],
            change: Some(change.clone()),
            hold: "waits whether the next look says the same".to_owned(),
            rehearsed: vec![tried.clone()],
            last: Some(ControlDecision {
                change: Some(change),
                outcome: "applied".to_owned(),
                age_s: 300,
                rehearsed: Some(tried),
            }),
            ..ControlAdvice::default()
        };
        AdviseResponse {
            mode: "apply".to_owned(),
            standing: "leads".to_owned(),
            advice: Some(advice),
            ..AdviseResponse::default()
        }
    }

    #[test]
    fn it_says_what_is_seen_what_would_change_and_why_not() {
        let text = text(&answer());
        for words in [
            "this coordinator leads",
            "1 prefill and 3 decode nodes of tiny are ready, 2 prefill and 2 decode nodes are wanted",
            "50.0% of 90 that could be judged were within it",
            "wrong: prompts that wait take 9.0 s",
            "rehearsed: one decode node becomes a prefill node: 95.3% within the SLO, 41.2% without it; better: yes",
            "advice: one decode node becomes a prefill node (decode-1)",
            "nothing is done now: waits whether",
            "last change, 300 s ago: one decode node becomes a prefill node (decode-1): applied; rehearsed: 95.3% for 41.2%",
        ] {
            assert!(text.contains(words), "`{words}` is not in:\n{text}");
        }
    }

    #[test]
    fn where_it_is_off_it_says_how_to_switch_it_on() {
        let off = AdviseResponse {
            mode: "off".to_owned(),
            ..AdviseResponse::default()
        };
        assert!(text(&off).contains("--control advise --control-slo"));
        assert_eq!(json(&off)["looked"], Value::Null);
    }

    #[test]
    fn json_has_all_of_it() {
        let value = json(&answer());
        assert_eq!(value["looked"]["target"]["prefill"], 2);
        assert_eq!(value["looked"]["rehearsed"][0]["better"], "yes");
        assert_eq!(value["looked"]["last"]["change"]["nodes"][0], "decode-1");
    }
}
