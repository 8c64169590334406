//! `baton plan` as it is typed: what it answers, and what it says to input that it cannot plan for.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        let line = |i: usize| {
            let (at, input) = (i * 400, 2000 + i % 7 * 900);
            format!(
                "{{\"timestamp\": {at}, \"input_length\": {input}, \"output_length\": {}, \"hash_ids\": []}}\n",
                40 + i % 3 * 30
            )
        };
        folder.write("trace.jsonl", &(0..200).map(line).collect::<String>());
        folder
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Runs `baton plan` with these words, in this folder.
    fn plan(&self, words: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_baton"))
            .arg("plan")
            .args(words.split_whitespace())
            .current_dir(self.0.path())
            .output()
            .unwrap()
    }

    /// It fails, and says this on standard error.
    fn refused(&self, words: &str, expected: &str) {
        let output = self.plan(words);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{words}: planned");
        assert!(said.contains(expected), "{words}: expected `{expected}` in: {said}");
        assert!(output.stdout.is_empty(), "{words}: nothing is answered");
        assert!(!said.contains("panicked"), "{said}");
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

const MODEL: &str = "--model llama-3.1-8b --trace trace.jsonl";

#[test]
fn a_plan_is_a_table_a_line_and_a_page_of_the_same_figures() {
    let folder = Folder::new();
    let asked = format!("{MODEL} --slo ttft_p90=2s,itl_p99=50ms --budget 3xh100 --price prefill=2.5,decode=2");
    let output = folder.plan(&format!("{asked} --json --report plan.html"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let line = String::from_utf8(output.stdout).unwrap();
    assert_eq!(line.lines().count(), 1);
    let value: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(value["feasible"], true);
    assert_eq!(
        value["prefill"].as_u64().unwrap() + value["decode"].as_u64().unwrap(),
        3
    );
    assert!(value["goodput_rps"]["mid"].as_f64().unwrap() > 0.0 && value["cost_per_mtok"].as_f64().unwrap() > 0.0);
    let page = std::fs::read_to_string(folder.path().join("plan.html")).unwrap();
    assert!(
        page.contains(line.trim_end().replace('<', "\\u003c").as_str()),
        "the page holds the line"
    );
    let table = folder.plan(&asked);
    let table = String::from_utf8(table.stdout).unwrap();
    let name = value["name"].as_str().unwrap();
    for words in [name, "next-cheapest fix", "per million tokens", "ESTIMATED", "regret"] {
        assert!(table.contains(words), "`{words}` in: {table}");
    }
}

#[test]
fn kinds_of_nodes_are_planned_by_price() {
    let folder = Folder::new();
    let text = "[[nodes]]\ngpu = \"h100\"\nprice = 3.0\ncount = 2\n[[nodes]]\ngpu = \"l40s\"\nprice = 0.8\ncount = 4\n";
    folder.write("mixed.toml", text);
    let output = folder.plan(&format!("{MODEL} --nodes mixed.toml --slo ttft_p90=3s --rate 2 --json"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["nodes"].as_array().unwrap().len(), 2);
    assert!(value["cost_per_hour"].as_f64().unwrap() <= 6.0 + 3.2);
    folder.refused(
        &format!("{MODEL} --nodes mixed.toml --slo ttft_p90=3s --budget 4xh100"),
        "--nodes says which nodes there are",
    );
    folder.refused(
        "--nodes mixed.toml --trace trace.jsonl --slo ttft_p90=3s",
        "give --model",
    );
    folder.write("mixed.toml", "[[nodes]]\ngpu = \"h100\"\n");
    folder.refused(
        &format!("{MODEL} --nodes mixed.toml --slo ttft_p90=3s"),
        "missing field `price`",
    );
}

#[test]
fn what_cannot_be_planned_is_said_clearly() {
    let folder = Folder::new();
    let slo = "--slo ttft_p90=2s";
    folder.refused(&format!("{MODEL} --budget 3 --slo ttft_p90=2"), "give it with its unit");
    folder.refused(
        &format!("{MODEL} --budget 3 --slo ttft_p90=2kg"),
        "such as 50ms or 1.5s",
    );
    folder.refused(
        &format!("{MODEL} --rate 12/s {slo}"),
        "requests per second, without a unit",
    );
    folder.refused(&format!("{MODEL} --budget 3gpus {slo}"), "such as 32, or 32xh100");
    folder.refused(
        &format!("{MODEL} --budget 3 {slo} --price 2.5"),
        "prefill=COST,decode=COST",
    );
    folder.refused(
        &format!("{MODEL} --budget 3 {slo} --report none/plan.html"),
        "cannot write the report none/plan.html",
    );
    folder.write("trace.jsonl", "");
    folder.refused(
        &format!("{MODEL} --budget 3 {slo}"),
        "is empty: there is nothing to plan for",
    );
    folder.write(
        "trace.jsonl",
        "{\"timestamp\": 0, \"input_length\": 10, \"output_length\": 1, \"hash_ids\": []}\n",
    );
    folder.refused(
        &format!("{MODEL} --budget 3 {slo}"),
        "at least two requests at different times",
    );
    folder.write("trace.jsonl", "one,two\n3,4\n");
    folder.refused(&format!("{MODEL} --budget 3 {slo}"), "is no trace: expected JSON lines");
    folder.refused(
        &format!("--model llama-3.1-8b --trace none.jsonl --budget 3 {slo}"),
        "cannot read the trace none.jsonl",
    );
}

#[test]
fn a_profile_of_another_model_or_of_nothing_is_refused() {
    use baton_planner::profile::{estimate, gpu, model};
    let folder = Folder::new();
    let profile = estimate(gpu("h100").unwrap(), model("smollm2-135m").unwrap()).unwrap();
    folder.write("p.json", &profile.to_json());
    let asked = "--profile p.json --trace trace.jsonl --slo ttft_p90=2s";
    folder.refused(
        &format!("{asked} --model llama-3.1-8b --budget 3"),
        "is of the model smollm2-135m, but the plan is for llama-3.1-8b",
    );
    folder.refused(
        &format!("{asked} --budget 3xl40s"),
        "l40s is asked for, but the profile",
    );
    let short = estimate(gpu("h100").unwrap(), model("smollm2-135m").unwrap()).unwrap();
    folder.write(
        "p.json",
        &short.to_json().replace("\"kv_capacity_tokens\"", "\"kv_capacity\""),
    );
    folder.refused(&format!("{asked} --budget 3"), "unknown field `kv_capacity`");
    folder.write("p.json", "{}");
    folder.refused(&format!("{asked} --budget 3"), "p.json is no profile");
    // Prompts beyond what it covers: the field and its range.
    folder.write("p.json", &profile.to_json());
    let long = "{\"timestamp\": 0, \"input_length\": 30000, \"output_length\": 5, \"hash_ids\": []}\n";
    folder.write("trace.jsonl", &format!("{long}{}", long.replace("\": 0", "\": 900")));
    folder.refused(&format!("{asked} --budget 3"), "prefill.context_tokens of");
}

#[test]
fn what_is_infeasible_is_answered_with_what_is_not() {
    let folder = Folder::new();
    let output = folder.plan(&format!("{MODEL} --budget 3 --slo ttft_p90=5ms"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        !output.status.success() && said.starts_with("infeasible: nearest feasible is --slo ttft_p90="),
        "{said}"
    );
    // What it names is feasible.
    let slo = said
        .split_whitespace()
        .find(|word| word.starts_with("ttft_p90="))
        .unwrap()
        .trim_end_matches(',');
    let again = folder.plan(&format!("{MODEL} --budget 3 --slo {slo} --json"));
    let value: serde_json::Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!(value["feasible"], true, "{slo}");
    folder.write("few.toml", "[[nodes]]\ngpu = \"l40s\"\nprice = 1.0\ncount = 2\n");
    let output = folder.plan(&format!("{MODEL} --nodes few.toml --slo ttft_p90=2s --rate 500"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        said.starts_with("infeasible: nearest feasible is --rate ") && !output.status.success(),
        "{said}"
    );
}
