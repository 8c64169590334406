//! Bit-identity: a token's logits do not depend on chunking, batch, block placement, block size or threads, on any path.

#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.

mod common;

use baton_engine::{Isa, LoadOptions, Slice, StepObserver, Unobserved, WantedLogits};
use baton_types::{BlockId, KvDtype};
use common::{Rig, assert_bits, exact_options, golden, options, paths, random_model, real_model};
use std::ops::ControlFlow;
use std::path::Path;

fn tokens(seed: u32, len: usize, vocab: u32) -> Vec<u32> {
    (0..len as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(40_503)) >> 7) % vocab)
        .collect()
}

/// Eight sequences of mixed lengths, advancing together with chunks of different sizes (prefill beside decode).
fn run_together(rig: &mut Rig, sequences: &[Vec<u32>]) -> Vec<Vec<Vec<f32>>> {
    let tables: Vec<Vec<BlockId>> = sequences.iter().map(|tokens| rig.blocks(tokens.len())).collect();
    let mut done = vec![0; sequences.len()];
    let mut rows: Vec<Vec<Vec<f32>>> = vec![Vec::new(); sequences.len()];
    for round in 0.. {
        let mut who = Vec::new();
        let mut slices = Vec::new();
        for (i, tokens) in sequences.iter().enumerate() {
            // Every sequence has its own rhythm: single tokens, small and large chunks.
            let size = [1, 3, 16, 29, 64, 2, 1, 200][(i + round) % 8].min(tokens.len() - done[i]);
            if size > 0 {
                let part = &tokens[done[i]..done[i] + size];
                slices.push(Slice {
                    tokens: part,
                    start: done[i],
                    blocks: &tables[i],
                    logits: WantedLogits::All,
                });
                who.push((i, size));
            }
        }
        if slices.is_empty() {
            break;
        }
        let output = rig.backend.step(&rig.arena, &slices, &mut Unobserved).unwrap();
        let mut row = 0;
        for (i, size) in who {
            rows[i].extend((row..row + size).map(|r| output.row(r).to_vec()));
            row += size;
            done[i] += size;
        }
    }
    tables.into_iter().for_each(|table| rig.give_back(table));
    rows
}

fn check_small(folder: &Path, vocab: u32, dtype: KvDtype, isa: Isa) {
    let sequences: Vec<Vec<u32>> = [200, 1, 17, 64, 33, 150, 5, 97]
        .iter()
        .zip(0..)
        .map(|(len, seed)| tokens(seed, *len, vocab))
        .collect();
    let mut alone: Vec<Vec<Vec<f32>>> = Vec::new();
    for (threads, block_tokens) in [(1, 16), (2, 16), (3, 8), (2, 5)] {
        let mut rig = Rig::with_block_tokens(folder, &options(threads, dtype, Some(isa)), 1_200, block_tokens);
        let what = |kind: &str| format!("{isa} {dtype:?}, {threads} threads, blocks of {block_tokens}: {kind}");
        let whole: Vec<_> = sequences
            .iter()
            .map(|tokens| rig.run(tokens, &[512], WantedLogits::All))
            .collect();
        if alone.is_empty() {
            alone = whole;
        } else {
            for (ours, first) in whole.iter().zip(&alone) {
                assert_bits(&what("whole"), ours, first);
            }
        }
        for chunks in [&[1][..], &[16], &[64], &[7, 1, 30, 13], &[199, 1], &[33]] {
            let rows = rig.run(&sequences[0], chunks, WantedLogits::All);
            assert_bits(&what(&format!("chunks of {chunks:?}")), &rows, &alone[0]);
        }
        for (ours, first) in run_together(&mut rig, &sequences).iter().zip(&alone) {
            assert_bits(&what("in a batch of eight"), ours, first);
        }
    }
}

#[test]
fn small_models_on_every_path() {
    for model in golden("engine_random.json").as_array().unwrap() {
        let folder = tempfile::tempdir().unwrap();
        random_model::write(folder.path(), model);
        let vocab = model["config"]["vocab_size"].as_u64().unwrap() as u32;
        for isa in paths() {
            check_small(folder.path(), vocab, KvDtype::F16, isa);
            check_small(folder.path(), vocab, KvDtype::Q8, isa);
        }
        check_small(folder.path(), vocab, KvDtype::Bf16, Isa::best());
        check_small(folder.path(), vocab, KvDtype::F32, Isa::best());
    }
}

/// Contexts over several segments, which single tokens and large chunks walk differently.
#[test]
fn a_long_context_on_every_path() {
    const LONG: usize = 1_150;
    let mut model = golden("engine_random.json")[0].clone();
    model["config"]["max_position_embeddings"] = LONG.into();
    let folder = tempfile::tempdir().unwrap();
    random_model::write(folder.path(), &model);
    let prompt = tokens(9, LONG, model["config"]["vocab_size"].as_u64().unwrap() as u32);
    for (isa, dtype) in paths().flat_map(|isa| [(isa, KvDtype::F16), (isa, KvDtype::Q8)]) {
        let mut rig = Rig::new(folder.path(), &options(2, dtype, Some(isa)), 2 * LONG);
        let first = rig.run(&prompt, &[512], WantedLogits::All);
        for chunks in [&[LONG][..], &[LONG / 2 - 20, 1, 8, 9, 3], &[33]] {
            let rows = rig.run(&prompt, chunks, WantedLogits::All);
            assert_bits(&format!("{isa} {dtype:?}: chunks of {chunks:?}"), &rows, &first);
        }
    }
}

fn check_real(options: impl Fn(usize) -> LoadOptions, what: &str, len: usize) {
    let prompt = tokens(1, len, 49_152);
    let others: Vec<Vec<u32>> = (2..9)
        .map(|seed| tokens(seed, 9 * seed as usize * len / 150, 49_152))
        .collect();
    let mut rig = Rig::new(&real_model(), &options(2), 1_024);
    let first = rig.run(&prompt, &[512], WantedLogits::All);
    for chunks in [&[16][..], &[64], &[len - 10, 1]] {
        let rows = rig.run(&prompt, chunks, WantedLogits::All);
        assert_bits(&format!("{what}: {chunks:?}"), &rows, &first);
    }
    let mut together = vec![prompt.clone()];
    together.extend(others);
    assert_bits(
        &format!("{what}: in a batch of eight"),
        &run_together(&mut rig, &together)[0],
        &first,
    );
    let mut single = Rig::new(&real_model(), &options(1), 256);
    assert_bits(
        &format!("{what}: one thread"),
        &single.run(&prompt, &[len], WantedLogits::Last),
        &first[len - 1..],
    );
}

#[test]
fn the_real_model() {
    for isa in paths() {
        // The portable path is slow.
        let len = if isa == Isa::Portable { 50 } else { 150 };
        let int8 = |threads| options(threads, KvDtype::F16, Some(isa));
        check_real(int8, &format!("{isa}"), len);
        let q8 = |threads| options(threads, KvDtype::Q8, Some(isa));
        check_real(q8, &format!("{isa}, KV in 8 bits"), len / 2);
        if isa != Isa::Portable {
            let exact = |threads| exact_options(threads, KvDtype::F16, Some(isa));
            check_real(exact, &format!("{isa}, activations in f32"), len);
        }
    }
}

/// Breaks after some layer, and counts.
struct StopAfter(u32, Vec<u32>);

impl StepObserver for StopAfter {
    fn layer_done(&mut self, layer: u32) -> ControlFlow<()> {
        self.1.push(layer);
        if layer == self.0 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}

#[test]
fn an_aborted_step_can_be_done_again() {
    let models = golden("engine_random.json");
    let folder = tempfile::tempdir().unwrap();
    random_model::write(folder.path(), &models[3]);
    let mut rig = Rig::new(folder.path(), &options(2, KvDtype::F16, None), 256);
    let prompt = tokens(5, 40, 256);
    let first = rig.run(&prompt, &[40], WantedLogits::All);
    let blocks = rig.blocks(40);
    let slice = Slice {
        tokens: &prompt,
        start: 0,
        blocks: &blocks,
        logits: WantedLogits::All,
    };
    let mut stop = StopAfter(1, Vec::new());
    let error = rig.backend.step(&rig.arena, &[slice], &mut stop).unwrap_err();
    assert_eq!(error, baton_engine::StepError::Aborted { layer: 1 });
    assert!(error.is_retryable());
    assert_eq!(stop.1, [0, 1]);
    let mut watch = StopAfter(u32::MAX, Vec::new());
    let output = rig.backend.step(&rig.arena, &[slice], &mut watch).unwrap();
    assert_eq!(watch.1, [0, 1, 2]);
    let again: Vec<Vec<f32>> = (0..output.rows()).map(|i| output.row(i).to_vec()).collect();
    assert_bits("after an abort", &again, &first);
}

#[test]
fn logits_come_for_the_wanted_tokens_only() {
    let models = golden("engine_random.json");
    let folder = tempfile::tempdir().unwrap();
    random_model::write(folder.path(), &models[0]);
    let mut rig = Rig::new(folder.path(), &options(2, KvDtype::F16, None), 256);
    let prompt = tokens(6, 20, 256);
    let all = rig.run(&prompt, &[20], WantedLogits::All);
    let tables = [rig.blocks(20), rig.blocks(20), rig.blocks(20)];
    let slice = |table: usize, logits| Slice {
        tokens: &prompt,
        start: 0,
        blocks: &tables[table],
        logits,
    };
    let batch = [
        slice(0, WantedLogits::Last),
        slice(1, WantedLogits::None),
        slice(2, WantedLogits::Last),
    ];
    let output = rig.backend.step(&rig.arena, &batch, &mut Unobserved).unwrap();
    assert_eq!(output.rows(), 2);
    assert_bits(
        "last",
        &[output.row(0).to_vec(), output.row(1).to_vec()],
        &[all[19].clone(), all[19].clone()],
    );
    let none = rig
        .backend
        .step(&rig.arena, &[slice(1, WantedLogits::None)], &mut Unobserved)
        .unwrap();
    assert_eq!(none.rows(), 0);
}
