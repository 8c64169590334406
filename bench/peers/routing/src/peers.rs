//! The block index beside the indexers of the crate `dynamo-kv-router`: 1,000 nodes, 1,000,000 block locations, prompts of
//! 512 hashed blocks, one core. All are asked the same question in turns, and must give the same answer: how many leading
//! blocks of the prompt each node holds.

use anyhow::{Result, ensure};
use baton_scheduling::BlockIndex;
use baton_types::{BlockHash, Instance};
use dynamo_kv_router::indexer::{KvIndexerInterface, SyncIndexer, ThreadPoolIndexer};
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheStoreData, KvCacheStoredBlockData,
    LocalBlockHash, OverlapScores, RouterEvent, compute_seq_hash_for_block,
};
use dynamo_kv_router::{ConcurrentRadixTreeCompressed, PositionalIndexer, RadixTree};
use std::hint::black_box;
use std::time::{Duration, Instant};

const NODES: u64 = 1000;
const LOCATIONS: u64 = 1_000_000;
const PROMPT_BLOCKS: u64 = 512;
/// Blocks of the prompts' common beginning, held by all nodes.
const COMMON_BLOCKS: u64 = 64;
/// Nodes that hold a conversation.
const HOLDERS: u64 = 2;
const PROMPTS: usize = 1000;
const ROUNDS: usize = 7;
const JUMP: usize = 32;

/// Numbers without pattern. Source: SplitMix64, Steele, Lea and Flood 2014.
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// One prompt as both sides name its blocks.
#[derive(Clone)]
struct Prompt {
    ours: Vec<BlockHash>,
    local: Vec<LocalBlockHash>,
    sequence: Vec<u64>,
}

fn prompt(conversation: u64) -> Prompt {
    let number = |block| {
        if block < COMMON_BLOCKS {
            block
        } else {
            (conversation + 1) << 16 | block
        }
    };
    let local: Vec<LocalBlockHash> = (0..PROMPT_BLOCKS)
        .map(|block| LocalBlockHash(mix(number(block))))
        .collect();
    let sequence = compute_seq_hash_for_block(&local);
    let ours = sequence
        .iter()
        .map(|hash| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&mix(*hash).to_le_bytes());
            bytes[8..].copy_from_slice(&mix(!hash).to_le_bytes());
            BlockHash(bytes)
        })
        .collect();
    Prompt { ours, local, sequence }
}

/// A node stores blocks of a prompt.
struct Stored {
    node: u64,
    conversation: u64,
    blocks: std::ops::Range<usize>,
}

impl Stored {
    fn event(&self, prompt: &Prompt, event_id: u64) -> RouterEvent {
        let parent = self
            .blocks
            .start
            .checked_sub(1)
            .map(|at| ExternalSequenceBlockHash(prompt.sequence[at]));
        let block = |at: usize| KvCacheStoredBlockData {
            block_hash: ExternalSequenceBlockHash(prompt.sequence[at]),
            tokens_hash: prompt.local[at],
            mm_extra_info: None,
        };
        let data = KvCacheEventData::Stored(KvCacheStoreData {
            parent_hash: parent,
            start_position: Some(self.blocks.start as u32),
            blocks: self.blocks.clone().map(block).collect(),
        });
        let event = KvCacheEvent {
            event_id,
            data,
            dp_rank: 0,
        };
        RouterEvent::new(self.node, event)
    }
}

/// What is stored where, in this order, and how many conversations there are.
fn world() -> (Vec<Stored>, u64) {
    let common = 0..COMMON_BLOCKS as usize;
    let mut all: Vec<Stored> = (0..NODES)
        .map(|node| Stored {
            node,
            conversation: 0,
            blocks: common.clone(),
        })
        .collect();
    let (mut locations, mut conversation) = (NODES * COMMON_BLOCKS, 0);
    while locations < LOCATIONS {
        for holder in 0..HOLDERS {
            let node = mix(conversation) % (NODES / HOLDERS) * HOLDERS + holder;
            all.push(Stored {
                node,
                conversation,
                blocks: COMMON_BLOCKS as usize..PROMPT_BLOCKS as usize,
            });
        }
        locations += HOLDERS * (PROMPT_BLOCKS - COMMON_BLOCKS);
        conversation += 1;
    }
    (all, conversation)
}

fn resident_bytes() -> Result<u64> {
    let pages = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = pages.split_whitespace().nth(1).unwrap_or("0").parse()?;
    Ok(pages * 4096)
}

/// Makes something and says by how many bytes for each location the process grew.
fn weighed<T>(name: &str, make: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = resident_bytes()?;
    let made = make()?;
    let grown = resident_bytes()?.saturating_sub(before) as f64 / LOCATIONS as f64;
    println!("{name}: the process grew by {grown:.1} bytes for each location");
    Ok(made)
}

fn answer(scores: &OverlapScores) -> Vec<(u64, u32)> {
    let mut all: Vec<_> = scores
        .scores
        .iter()
        .map(|(worker, blocks)| (worker.worker_id, *blocks))
        .collect();
    all.sort_unstable();
    all
}

fn pooled<T: SyncIndexer>(
    runtime: &tokio::runtime::Runtime,
    indexer: T,
    stored: &[Stored],
) -> Result<ThreadPoolIndexer<T>> {
    runtime.block_on(async {
        let pool = ThreadPoolIndexer::new(indexer, 1, 16);
        for (event_id, stored) in stored.iter().enumerate() {
            pool.apply_event(stored.event(&prompt(stored.conversation), event_id as u64))
                .await;
        }
        pool.flush().await;
        Ok(pool)
    })
}

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (stored, conversations) = world();
    let ours = weighed("baton BlockIndex", || {
        let mut index = BlockIndex::new(usize::MAX);
        for stored in &stored {
            index.add(
                Instance(stored.node),
                &prompt(stored.conversation).ours[stored.blocks.clone()],
            );
        }
        println!(
            "baton BlockIndex: {} locations, {:.1} bytes each by its own count",
            index.locations(),
            index.bytes() as f64 / index.locations() as f64
        );
        Ok(index)
    })?;
    let radix = weighed("dynamo RadixTree", || {
        let mut tree = RadixTree::new();
        for (event_id, stored) in stored.iter().enumerate() {
            tree.apply_event(stored.event(&prompt(stored.conversation), event_id as u64))
                .map_err(|error| anyhow::anyhow!("{error:?}"))?;
        }
        Ok(tree)
    })?;
    let concurrent = weighed("dynamo ConcurrentRadixTreeCompressed", || {
        pooled(&runtime, ConcurrentRadixTreeCompressed::new(), &stored)
    })?;
    let positional = weighed("dynamo PositionalIndexer", || {
        pooled(&runtime, PositionalIndexer::new(JUMP), &stored)
    })?;

    for kind in ["held", "common", "unknown"] {
        let prompts: Vec<Prompt> = (0..PROMPTS as u64)
            .map(|i| match kind {
                "held" => prompt(mix(i) % conversations),
                "common" => prompt(1_000_000 + i),
                _ => {
                    let mut unknown = prompt(2_000_000 + i);
                    unknown.local.iter_mut().for_each(|hash| hash.0 = mix(hash.0 ^ i));
                    unknown
                        .ours
                        .iter_mut()
                        .for_each(|hash| hash.0.iter_mut().for_each(|byte| *byte ^= 0x5a));
                    unknown
                }
            })
            .collect();
        for prompt in prompts.iter().take(100) {
            let held = ours.held(&prompt.ours);
            let expected: Vec<(u64, u32)> = (0..NODES)
                .map(|node| (node, held.blocks(Instance(node))))
                .filter(|(_, blocks)| *blocks > 0)
                .collect();
            ensure!(
                answer(&radix.find_matches(prompt.local.clone(), false)) == expected,
                "{kind}: RadixTree differs"
            );
            ensure!(
                answer(&concurrent.backend().find_matches(&prompt.local, false)) == expected,
                "{kind}: concurrent differs"
            );
            let positional = answer(&positional.backend().find_matches(&prompt.local, false));
            ensure!(positional == expected, "{kind}: PositionalIndexer differs");
        }
        let mut times: [(&str, Vec<Duration>); 4] =
            ["baton", "dynamo radix", "dynamo concurrent", "dynamo positional"].map(|name| (name, Vec::new()));
        for _ in 0..ROUNDS {
            for (which, (_, times)) in times.iter_mut().enumerate() {
                for prompt in &prompts {
                    let owned = prompt.local.clone();
                    let start = Instant::now();
                    match which {
                        0 => drop(black_box(ours.held(black_box(&prompt.ours)))),
                        1 => drop(black_box(radix.find_matches(black_box(owned), false))),
                        2 => drop(black_box(concurrent.backend().find_matches(black_box(&owned), false))),
                        _ => drop(black_box(positional.backend().find_matches(black_box(&owned), false))),
                    }
                    times.push(start.elapsed());
                }
            }
        }
        for (name, times) in &mut times {
            times.sort_unstable();
            let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize].as_nanos() as f64 / 1e3;
            println!("{kind:8} {name:18} p50 {:7.1} us  p99 {:7.1} us", at(0.5), at(0.99));
        }
    }
    Ok(())
}
