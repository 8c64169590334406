//! The real model against transformers in float32 (tests/golden/engine_logits.py): logits of twenty prompts, and the
//! likelihood of 2,000 tokens of text.

#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.

mod common;

use baton_engine::{LoadOptions, WantedLogits};
use baton_types::KvDtype;
use common::{Rig, exact_options, golden, options, real_model};
use serde_json::Value;

/// Largest difference of a logit with f16 KV. Logits span some 40; the rounding of keys and values makes 0.011.
const TOLERANCE_F16: f64 = 0.05;
/// With f32 KV only the order of additions differs: 0.00007.
const TOLERANCE_F32: f64 = 0.0005;
/// Relative difference of the perplexity.
const TOLERANCE_PERPLEXITY: f64 = 0.01;
/// Relative difference that KV in 8 bits makes: 0.0007 where all else is exact.
const TOLERANCE_KV: f64 = 0.005;
/// As the first, with activations in 8 bits: 0.005 to 0.007, by the order of additions alone.
const TOLERANCE_INT8: f64 = 0.01;

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

fn largest_difference(prompt: &Value, row: &[f32]) -> f64 {
    let pairs = prompt["top"]
        .as_array()
        .unwrap()
        .iter()
        .chain(prompt["fixed"].as_array().unwrap());
    let differences = pairs.map(|pair| {
        let ours = f64::from(row[pair[0].as_u64().unwrap() as usize]);
        (ours - pair[1].as_f64().unwrap()).abs()
    });
    differences.fold(0.0, f64::max)
}

fn compare(kv_dtype: KvDtype, tolerance: f64) {
    let golden = golden("engine_logits.json");
    let mut rig = Rig::new(&real_model(), &exact_options(0, kv_dtype, None), 2_048);
    let mut worst = 0.0f64;
    for prompt in golden["prompts"].as_array().unwrap() {
        let label = prompt["label"].as_str().unwrap();
        let row = rig.run(&ids(&prompt["tokens"]), &[512], WantedLogits::Last).remove(0);
        let difference = largest_difference(prompt, &row);
        worst = worst.max(difference);
        assert!(difference < tolerance, "{label}: a logit differs by {difference}");
        let n = row.len() as f64;
        let mean = row.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
        let square = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n;
        assert!(
            (mean - prompt["mean"].as_f64().unwrap()).abs() < tolerance,
            "{label}: mean {mean}"
        );
        let expected = prompt["mean_square"].as_f64().unwrap();
        assert!(
            (square.sqrt() - expected.sqrt()).abs() < tolerance,
            "{label}: mean square {square}, not {expected}"
        );
    }
    println!("largest difference of a logit, KV {kv_dtype:?}: {worst:.6}");
}

#[test]
fn logits_are_those_of_the_reference() {
    compare(KvDtype::F16, TOLERANCE_F16);
}

#[test]
fn logits_are_those_of_the_reference_with_exact_kv() {
    compare(KvDtype::F32, TOLERANCE_F32);
}

/// Perplexity of 2,000 tokens of text over the reference's.
fn perplexity_ratio(options: &LoadOptions) -> f64 {
    let golden = golden("engine_logits.json");
    let tokens = ids(&golden["text"]["tokens"]);
    assert_eq!(tokens.len(), 2_000);
    let mut rig = Rig::new(&real_model(), options, 2_048);
    let rows = rig.run(&tokens, &[256], WantedLogits::All);
    let losses: Vec<f64> = rows
        .iter()
        .zip(&tokens[1..])
        .map(|(row, next)| {
            let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f64 = row.iter().map(|x| f64::from(x - highest).exp()).sum();
            total.ln() - f64::from(row[*next as usize] - highest)
        })
        .collect();
    let loss = losses.iter().sum::<f64>() / losses.len() as f64;
    let reference = golden["text"]["nll"].as_f64().unwrap();
    let ratio = (loss - reference).exp();
    println!(
        "KV {:?}, activations {:?}: perplexity {:.4}, reference {:.4}, ratio {ratio:.6}",
        options.kv_dtype,
        options.activations,
        loss.exp(),
        reference.exp()
    );
    ratio
}

#[test]
fn perplexity_is_that_of_the_reference() {
    let ratio = perplexity_ratio(&exact_options(0, KvDtype::F16, None));
    assert!(
        (ratio - 1.0).abs() < TOLERANCE_PERPLEXITY,
        "perplexity is {ratio} times the reference's"
    );
}

#[test]
fn activations_in_8_bits_cost_little_perplexity() {
    let ratio = perplexity_ratio(&options(0, KvDtype::F16, None));
    assert!(
        (ratio - 1.0).abs() < TOLERANCE_INT8,
        "perplexity is {ratio} times the reference's"
    );
}

#[test]
fn kv_in_8_bits_costs_little_perplexity() {
    let [half, eight] = [KvDtype::F16, KvDtype::Q8].map(|dtype| perplexity_ratio(&options(0, dtype, None)));
    let cost = eight / half - 1.0;
    println!("KV in 8 bits: perplexity {:+.3}%", 100.0 * cost);
    assert!(cost.abs() < TOLERANCE_KV, "KV in 8 bits costs {cost} of the perplexity");
}
