//! `baton replay` against a running stub cluster, over gRPC and over HTTP, and what goes wrong with it.

#![allow(clippy::unwrap_used)] // a test that panics fails, which is what is wanted

mod support;

use serde_json::Value;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use support::{Up, baton, signal_process, succeeded, text};

/// Requests 10 ms apart, three blocks each, of which the first is in all of them; one more after `pause_s`, where there is one.
fn trace(folder: &Path, requests: u32, pause_s: Option<u32>) -> PathBuf {
    let mut lines = String::new();
    let mut row = |at: u32, index: u32| {
        let ids = [0, 2 * index + 1, 2 * index + 2];
        let _ = writeln!(
            lines,
            "{{\"timestamp\": {at}, \"input_length\": 48, \"output_length\": 7, \"hash_ids\": {ids:?}, \"block_tokens\": 16}}"
        );
    };
    (0..requests).for_each(|index| row(index * 10, index));
    if let Some(pause) = pause_s {
        row(pause * 1000, requests);
    }
    let path = folder.join(format!("trace-{requests}.jsonl"));
    std::fs::write(&path, lines).unwrap();
    path
}

#[test]
fn a_trace_is_replayed_over_both_doors() {
    let folder = tempfile::tempdir().unwrap();
    let up = Up::start(&[], folder.path());
    let trace = trace(folder.path(), 20, None);
    let replay = |arguments: &[&str]| -> Value {
        let mut command = baton(folder.path());
        command.args(["replay", "--json", "--slo", "ttft_p90=60s,itl_p99=60s", "--trace"]);
        let line = succeeded(&command.arg(&trace).args(arguments).output().unwrap());
        serde_json::from_str(&line).unwrap()
    };
    let url = format!("http://{}/v1", up.ready["http"].as_str().unwrap());
    for arguments in [&[][..], &["--url", &url, "--seed", "7"]] {
        let said = replay(arguments);
        assert_eq!((&said["served"], &said["errors"]), (&20.into(), &0.into()), "{said}");
        assert_eq!(
            (&said["tokens"], &said["prompt_tokens"]),
            (&140.into(), &960.into()),
            "{said}"
        );
        assert_eq!(said["itl"]["count"], 120, "a gap for each token but the first");
        assert_eq!(said["goodput"]["share"], 1.0);
        assert!((said["offered_rps"].as_f64().unwrap() - 100.0).abs() < 1e-6, "{said}");
        assert_eq!(
            (&said["interrupted"], &said["model"]),
            (&false.into(), &up.ready["model"])
        );
    }
    // Other arrivals, and a table for people.
    let bursts = replay(&["--arrivals", "burst", "--burst", "5", "--rate", "200"]);
    assert_eq!(bursts["served"], 20);
    let table = baton(folder.path())
        .args(["replay", "--arrivals", "poisson", "--rate", "300", "--trace"])
        .arg(&trace)
        .output();
    let table = succeeded(&table.unwrap());
    assert!(
        table.contains("TTFT") && table.contains("p99.9") && table.contains("20 served"),
        "{table}"
    );
}

#[test]
fn what_cannot_be_replayed_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let up = Up::start(&["--prefill", "0"], folder.path());
    let good = trace(folder.path(), 2, None);
    let empty = folder.path().join("empty.jsonl");
    std::fs::write(&empty, "").unwrap();
    let wrong = folder.path().join("wrong.jsonl");
    std::fs::write(&wrong, "{\"timestamp\": 0, \"input_length\": 5}\n").unwrap();
    let refused = |trace: &Path, arguments: &[&str]| {
        let output = baton(folder.path())
            .args(["replay", "--trace"])
            .arg(trace)
            .args(arguments)
            .output()
            .unwrap();
        assert!(!output.status.success(), "{}", text(&output.stdout));
        text(&output.stderr)
    };
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    assert!(refused(&good, &["--endpoint", &nobody]).contains(&nobody));
    assert!(refused(&good, &["--url", &format!("http://{nobody}")]).contains(&nobody));
    let other = refused(&good, &["--model", "other"]);
    assert!(
        other.contains("`other`") && other.contains(up.ready["model"].as_str().unwrap()),
        "{other}"
    );
    assert!(refused(&empty, &[]).contains("is empty"));
    assert!(refused(&wrong, &[]).contains("line 1"));
    assert!(refused(&good, &["--lengths", "4096"]).contains("--lengths"));
    assert!(refused(&good, &["--rate", "5/s"]).contains("requests per second"));
    assert!(refused(&good, &["--slo", "ttft_p90=1"]).contains("give it with its unit"));
    let stub = baton(folder.path())
        .args(["profile", "--model", "stub"])
        .output()
        .unwrap();
    assert!(!stub.status.success() && text(&stub.stderr).contains("nothing to measure"));
}

#[test]
fn an_interrupted_replay_tells_what_was_measured() {
    let folder = tempfile::tempdir().unwrap();
    let _up = Up::start(&["--prefill", "0"], folder.path());
    let trace = trace(folder.path(), 3, Some(3600));
    let mut child = baton(folder.path())
        .args(["replay", "--json", "--trace"])
        .arg(&trace)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A line of progress says that all but the last have ended.
    let lines = BufReader::new(child.stderr.take().unwrap())
        .lines()
        .map_while(Result::ok);
    let told = lines.into_iter().find(|line| line.contains("3 ended"));
    assert!(told.is_some());
    signal_process(child.id(), rustix::process::Signal::INT);
    let mut line = String::new();
    child.stdout.take().unwrap().read_to_string(&mut line).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let said: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        (&said["served"], &said["unfinished"], &said["interrupted"]),
        (&3.into(), &1.into(), &true.into()),
        "{said}"
    );
}
