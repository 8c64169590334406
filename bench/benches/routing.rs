//! One routing decision: what each node holds of an 8k-token prompt whose blocks are hashed already, every node's view, and
//! the choice of the predicting policy. 1,000 nodes, 1,000,000 indexed block locations, one core.
//!
//! Views are made as the coordinator makes them: by the fleet, from what nodes said last and what was placed on them since.
//! Beside criterion's means it prints how single decisions are distributed, and the index's memory. Hashing is apart.

use baton_node_runtime::process::resident_bytes;
use baton_scheduling::{
    BlockIndex, Decision, Fleet, FleetNode, HandoverTimes, Load, NodeView, Placed, Policy, Reported, RouteRequest,
    Routed, Side, Slo, StepModel, route,
};
use baton_types::{
    BlockCounts, BlockHash, BlockHashChain, CacheScope, Instance, KvDtype, ModelFingerprint, NumericsId,
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

const NODES: u64 = 1000;
const LOCATIONS: usize = 1_000_000;
const BLOCK_TOKENS: u32 = 16;
const PROMPT_BLOCKS: u64 = 512;
/// Blocks of the prompts' common beginning, held by all nodes.
const COMMON_BLOCKS: u64 = 64;
/// Nodes that hold a conversation: one of each role.
const HOLDERS: u64 = 2;
const DECISIONS: usize = 200_000;

/// Numbers without pattern. Source: SplitMix64, Steele, Lea and Flood 2014.
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn hash(conversation: u64, block: u64) -> BlockHash {
    let number = if block < COMMON_BLOCKS {
        block
    } else {
        (conversation + 1) << 16 | block
    };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&mix(number).to_le_bytes());
    bytes[8..].copy_from_slice(&mix(!number).to_le_bytes());
    BlockHash(bytes)
}

fn chain(conversation: u64) -> Vec<BlockHash> {
    (0..PROMPT_BLOCKS).map(|block| hash(conversation, block)).collect()
}

fn instance(node: u64) -> Instance {
    Instance(mix(node << 32))
}

fn node(node: u64) -> FleetNode {
    let mut model = StepModel::default();
    let busy = mix(node);
    for step in 0..20 {
        let tokens = 64 << (step % 8);
        model.prefilled(
            tokens,
            0,
            Duration::from_micros(5000 + u64::from(tokens) * (40 + busy % 30)),
        );
        model.reported(0.0, 9000.0 + (busy % 2000) as f32 + 50.0 * step as f32, step + 1);
    }
    let placed = Arc::new(Placed::default());
    (0..(busy >> 8) % 4).for_each(|_| placed.comes(3000));
    let reported = Reported {
        running_requests: ((busy >> 16) % 48) as u32,
        blocks: BlockCounts {
            total: 20_000,
            free: ((busy >> 24) % 8000) as u32,
            cached: 1000,
            ..BlockCounts::default()
        },
        ..Reported::default()
    };
    FleetNode {
        view: NodeView {
            instance: instance(node),
            queued_requests: 0,
            queue_capacity: 64,
            queued_tokens: 0,
            running_requests: 0,
            times: model.times(),
            blocks: reported.blocks,
            block_tokens: BLOCK_TOKENS,
            held_tokens: 0,
        },
        load: Load::new(reported, Default::default()),
        placed,
        full: false,
    }
}

struct World {
    index: BlockIndex,
    fleet: Fleet,
    handovers: HandoverTimes,
    conversations: Vec<Vec<BlockHash>>,
}

impl World {
    fn new() -> Self {
        let mut index = BlockIndex::new(LOCATIONS);
        let common = &chain(0)[..COMMON_BLOCKS as usize];
        (0..NODES).for_each(|node| index.add(instance(node), common));
        let mut conversations = Vec::new();
        while index.locations() < LOCATIONS {
            let conversation = conversations.len() as u64;
            let blocks = chain(conversation);
            for holder in 0..HOLDERS {
                let node = mix(conversation) % (NODES / HOLDERS) * HOLDERS + holder;
                index.add(instance(node), &blocks[COMMON_BLOCKS as usize..]);
            }
            conversations.push(blocks);
        }
        let mut handovers = HandoverTimes::new(65_536);
        for pair in 0..40_000 {
            let (from, to) = ((mix(pair) % NODES) & !1, (mix(!pair) % NODES) | 1);
            handovers.handed_over(
                instance(from),
                instance(to),
                8192,
                Duration::from_micros(900 + pair % 2000),
            );
        }
        let mut fleet = Fleet::default();
        for number in 0..NODES {
            let side = if number % 2 == 0 { Side::Prefill } else { Side::Decode };
            fleet.add(side, node(number));
        }
        Self {
            index,
            fleet,
            handovers,
            conversations,
        }
    }

    /// As the coordinator does it for each request.
    fn decide(&mut self, chain: &[BlockHash], turn: u64) -> Routed {
        let held = self.index.held(chain);
        let request = RouteRequest {
            context_tokens: PROMPT_BLOCKS as u32 * BLOCK_TOKENS,
            excluded: &[],
            keep_decode: None,
            policy: Policy::Predicted,
            slo: Slo::default(),
            turn,
            handovers: &self.handovers,
        };
        self.fleet
            .choose(&held, |prefill, decode| route(&request, prefill, decode))
    }
}

/// Prompts of one kind, in an order without pattern.
fn prompts(world: &World, kind: &str) -> Vec<Vec<BlockHash>> {
    let count = world.conversations.len() as u64;
    let known = |i: u64| world.conversations[(mix(i) % count) as usize].clone();
    let unknown = |i: u64| chain(1_000_000 + i);
    match kind {
        "held" => (0..1000).map(known).collect(),
        "common" => (0..1000).map(unknown).collect(),
        _ => (0..1000)
            .map(|i| unknown(i).split_off(COMMON_BLOCKS as usize))
            .collect(),
    }
}

fn distribution(world: &mut World, kind: &str) {
    let prompts = prompts(world, kind);
    let mut times: Vec<Duration> = Vec::with_capacity(DECISIONS);
    let begun = Instant::now();
    for turn in 0..DECISIONS {
        let start = Instant::now();
        let routed = black_box(world.decide(&prompts[turn % prompts.len()], turn as u64));
        times.push(start.elapsed());
        assert!(matches!(routed.decision, Decision::Place(_)), "{:?}", routed.decision);
    }
    let rate = DECISIONS as f64 / begun.elapsed().as_secs_f64();
    times.sort_unstable();
    let at = |part: f64| times[((DECISIONS - 1) as f64 * part) as usize].as_nanos() as f64 / 1e3;
    println!(
        "{kind}: {DECISIONS} decisions, p50 {:.1} us, p99 {:.1} us, p99.9 {:.1} us, {rate:.0} per second",
        at(0.5),
        at(0.99),
        at(0.999)
    );
}

fn routing(criterion: &mut Criterion) {
    let before = resident_bytes();
    let mut world = World::new();
    let (resident, index) = (resident_bytes() - before, &world.index);
    let known = world.conversations.len() * PROMPT_BLOCKS as usize * size_of::<BlockHash>();
    println!(
        "index: {} locations, {:.1} bytes each by its own count; the process grew by {} MiB, {} MiB of it test data",
        index.locations(),
        index.bytes() as f64 / index.locations() as f64,
        resident >> 20,
        known >> 20
    );
    let mut group = criterion.benchmark_group("routing");
    group.throughput(Throughput::Elements(1));
    for kind in ["held", "common", "unknown"] {
        distribution(&mut world, kind);
        let prompts = prompts(&world, kind);
        let mut turn = 0;
        group.bench_function(format!("decide_{kind}"), |bench| {
            bench.iter(|| {
                turn += 1;
                world.decide(&prompts[turn % prompts.len()], turn as u64)
            });
        });
    }
    let prompts = prompts(&world, "held");
    let mut turn = 0;
    group.bench_function("index_held", |bench| {
        bench.iter(|| {
            turn += 1;
            world.index.held(&prompts[turn % prompts.len()])
        });
    });
    let scope = CacheScope {
        fingerprint: ModelFingerprint([1; 32]),
        numerics: NumericsId("bench".into()),
        dtype: KvDtype::F16,
        adapter: String::new(),
        salt: String::new(),
    };
    let tokens: Vec<u32> = (0..PROMPT_BLOCKS * u64::from(BLOCK_TOKENS))
        .map(|i| (mix(i) % 50_000) as u32)
        .collect();
    group.bench_function("hash_prompt", |bench| {
        bench.iter(|| BlockHashChain::full_blocks(&scope, black_box(&tokens), BLOCK_TOKENS as usize));
    });
    group.finish();
}

criterion_group!(benches, routing);
criterion_main!(benches);
