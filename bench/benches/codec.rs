//! Heads of tcp frames: the bytes that travel for 1, 100 and 1,000 extents, and back.

use baton_kv_transfer::transport::{ExtentHeader, inside};
use baton_types::{Epoch, KvDtype, KvGeometry};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

/// SmolLM2-135M.
const GEOMETRY: KvGeometry = KvGeometry {
    layers: 30,
    kv_heads: 3,
    head_dim: 64,
    block_tokens: 16,
    dtype: KvDtype::F16,
};

fn heads(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frame_head");
    for extents in [1_u32, 100, 1000] {
        let headers: Vec<ExtentHeader> = (0..extents)
            .map(|ordinal| ExtentHeader {
                epoch: Epoch(9),
                ordinal,
                layers: 0..GEOMETRY.layers,
                len: u32::try_from(GEOMETRY.block_bytes()).expect("a block has fewer bytes than 4 GiB"),
            })
            .collect();
        let mut head = Vec::new();
        inside::encode_head(&headers, &mut head);
        group.throughput(Throughput::Elements(u64::from(extents)));
        group.bench_function(BenchmarkId::new("encode", extents), |bench| {
            let mut out = Vec::new();
            bench.iter(|| {
                out.clear();
                inside::encode_head(black_box(&headers), &mut out);
            });
        });
        group.bench_function(BenchmarkId::new("decode", extents), |bench| {
            bench.iter(|| {
                let count = inside::decode_head(black_box(&head), &GEOMETRY);
                assert_eq!(count, Some(headers.len()));
            });
        });
    }
}

criterion_group!(benches, heads);
criterion_main!(benches);
