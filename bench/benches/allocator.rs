//! The block pool: 64 blocks (1,024 tokens) taken and given back, out of 8,192.

use baton_engine::BlockPool;
use baton_types::BlockHash;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

const POOL: u32 = 8192;
const BLOCKS: usize = 64;

fn hashes(first: u64) -> Vec<BlockHash> {
    (first..first + BLOCKS as u64)
        .map(|number| {
            let mut hash = [0; 16];
            hash[..8].copy_from_slice(&number.to_le_bytes());
            BlockHash(hash)
        })
        .collect()
}

fn allocator(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("block_pool");
    group.throughput(Throughput::Elements(BLOCKS as u64));
    let pool = BlockPool::new(POOL);
    group.bench_function("acquire_release", |bench| {
        bench.iter(|| drop(black_box(pool.acquire(&[], 0, BLOCKS))));
    });
    group.bench_function("reserve_commit_release", |bench| {
        bench.iter(|| pool.reserve(&[], 0, BLOCKS).map(|reserved| drop(reserved.commit())));
    });
    group.bench_function("reserve_quarantine_release", |bench| {
        bench.iter(|| {
            pool.reserve(&[], 0, BLOCKS)
                .map(|reserved| reserved.quarantine().release())
        });
    });
    // Every block is cached: each acquire finds nothing, evicts, and publishes what will be evicted later.
    group.bench_function("acquire_evicting_publish_release", |bench| {
        let mut first = 0;
        bench.iter(|| {
            let hashes = hashes(first);
            first += BLOCKS as u64;
            let table = pool
                .acquire(&hashes, BLOCKS, BLOCKS)
                .expect("all of the pool is free or cached");
            for (ordinal, hash) in hashes.iter().enumerate() {
                table.publish(ordinal, *hash);
            }
        });
    });
    group.bench_function("acquire_cached_release", |bench| {
        let hashes = hashes(u64::MAX / 2);
        let table = pool
            .acquire(&hashes, BLOCKS, BLOCKS)
            .expect("all of the pool is free or cached");
        for (ordinal, hash) in hashes.iter().enumerate() {
            table.publish(ordinal, *hash);
        }
        drop(table);
        bench.iter(|| {
            let table = pool.acquire(&hashes, BLOCKS, BLOCKS).expect("all of it is cached");
            assert_eq!(table.held(), BLOCKS);
        });
    });
}

criterion_group!(benches, allocator);
criterion_main!(benches);
