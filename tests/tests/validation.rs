//! Profile, plan, predict, replay, compare: the whole way, with a model of random weights. How near predictions are is measured with
//! the real model (docs/planner.md), not asserted here.

#![allow(clippy::unwrap_used)] // a test that panics fails, which is what is wanted

use baton_tests::{RandomLlama, baton_binary};
use serde_json::Value;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

fn baton(arguments: &[&str], folder: &Path) -> (bool, String, String) {
    let output = Command::new(baton_binary())
        .args(arguments)
        .env("XDG_RUNTIME_DIR", folder)
        .current_dir(folder)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn what_is_predicted_first_is_replayed_and_the_error_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("tiny");
    std::fs::create_dir(&model).unwrap();
    RandomLlama::TINY.write(&model).unwrap();
    let model = model.to_str().unwrap();
    let mut lines = String::new();
    for index in 0..40 {
        let (at, ids) = (index * 25, [0, 2 * index + 1, 2 * index + 2]);
        let _ = writeln!(
            lines,
            "{{\"timestamp\": {at}, \"input_length\": 48, \"output_length\": 6, \"hash_ids\": {ids:?}, \"block_tokens\": 16}}"
        );
    }
    std::fs::write(folder.path().join("trace.jsonl"), lines).unwrap();

    let measure = [
        "profile",
        "--model",
        model,
        "--repeat",
        "1",
        "--batch-max",
        "4",
        "--context-max",
        "1024",
    ];
    let (done, said, errors) = baton(
        &[&measure[..], &["--kv-bytes", "64MiB", "--out", "p.json"]].concat(),
        folder.path(),
    );
    assert!(done, "{said}{errors}");
    assert!(said.contains("request overhead") && said.contains("tiny"), "{said}");
    let profile = json(&folder.path().join("p.json"));
    assert_eq!(
        (&profile["kind"], &profile["model"]["name"]),
        (&"measured".into(), &"tiny".into())
    );
    let above_zero = |value: &Value| value.as_f64().is_some_and(|seconds| seconds > 0.0);
    for field in [
        "request_overhead_s",
        "startup_s",
        "role_change_s",
        "drain_s",
        "kv_capacity_tokens",
    ] {
        assert!(above_zero(&profile[field]), "{field}: {}", profile[field]);
    }
    assert!(above_zero(&profile["contended"]["decoding"]["decode"]["seconds"][0][1]));
    assert!(
        profile["handover"][0]["bytes"].as_array().unwrap().len() >= 3,
        "{}",
        profile["handover"]
    );

    let slo = "ttft_p90=20s,e2e_p90=60s";
    let workload = [
        "--profile",
        "p.json",
        "--trace",
        "trace.jsonl",
        "--slo",
        slo,
        "--requests",
        "10",
    ];
    let validate = [
        "validate",
        "--model",
        model,
        "--divisions",
        "1+1,0+1",
        "--loads",
        "1/1000",
        "--runs",
        "1",
        "--out",
        "v",
    ];
    let validate = [&validate[..], &workload[..]].concat();
    let (done, _, errors) = baton(&[&validate[..], &["--predict-only"]].concat(), folder.path());
    assert!(done, "{errors}");
    let kept = json(&folder.path().join("v/predictions.json"));
    let (_, said, errors) = baton(&validate, folder.path());
    assert!(
        said.contains("| 1P+1D |") && said.contains("ttft_p90"),
        "{said}{errors}"
    );
    assert!(errors.contains("nothing is predicted anew"), "{errors}");
    assert_eq!(json(&folder.path().join("v/predictions.json")), kept);
    let results = json(&folder.path().join("v/results.json"));
    assert_eq!(
        (results.as_array().unwrap().len(), &results[0]["runs"][0]["served"]),
        (2, &10.into())
    );
    for when in [0, 1] {
        let speed = &results[1]["machine"][0][when];
        assert!(above_zero(&speed["prompts"]) && above_zero(&speed["steps"]), "{speed}");
    }
    assert!(said.contains("against the profile, before and after"), "{said}");
    let bars = json(&folder.path().join("p.json"))["error_bars"]
        .as_array()
        .unwrap()
        .len();
    assert_eq!(bars, 5);
    // Of another question nothing is taken over.
    let (done, _, errors) = baton(&[&validate[..], &["--seed", "9"]].concat(), folder.path());
    assert!(
        !done && errors.contains("seed 9") && errors.contains("--out"),
        "{errors}"
    );
    // Plans show what was found.
    let (_, said, errors) = baton(
        &[&["plan", "--budget", "2", "--json"], &workload[..]].concat(),
        folder.path(),
    );
    let plan: Value = serde_json::from_str(&said).unwrap_or_else(|_| panic!("{said}{errors}"));
    assert!(plan["error_bar"]["ttft_p90"].is_number(), "{plan}");
}
