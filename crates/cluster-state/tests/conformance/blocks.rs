//! Block locations: what a node writes of its blocks, and the watch over what all wrote, also through outages.

use crate::backend::{Backend, options_for};
use crate::on_both;
use crate::proxy::Proxy;
use crate::support::{record, soon, until};
use baton_cluster_state::keys::blocks;
use baton_cluster_state::{LocationBudget, LocationEvent, LocationWatch, Store};
use baton_node_runtime::{Clock, Supervisor};
use baton_types::{BlockChanges, BlockHash, Instance};
use etcd_client::GetOptions;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

on_both!(
    locations_come_change_and_go_with_the_node,
    a_watch_begins_with_what_stands,
    large_changes_are_cut_and_small_ones_gathered,
    a_node_keeps_to_its_share,
    a_lost_lease_publishes_all_anew,
    a_wipe_publishes_all_anew,
    cut_wires_lose_no_location,
    segments_that_cannot_be_read_are_ignored,
);

fn hash(n: u32) -> BlockHash {
    let mut hash = [0; 16];
    hash[..4].copy_from_slice(&n.to_le_bytes());
    BlockHash(hash)
}

/// A node's cache, changed by the test.
#[derive(Clone, Default)]
struct Cache(Arc<Mutex<(BTreeSet<BlockHash>, BTreeSet<BlockHash>)>>);

impl Cache {
    fn hold(&self, numbers: impl IntoIterator<Item = u32>) {
        self.0.lock().unwrap().0 = numbers.into_iter().map(hash).collect();
    }

    fn held(&self) -> BTreeSet<BlockHash> {
        self.0.lock().unwrap().0.clone()
    }

    fn source(&self) -> impl FnMut() -> BlockChanges + Send + Sync + 'static {
        let cache = self.clone();
        move || {
            let (held, told) = &mut *cache.0.lock().unwrap();
            let changes = BlockChanges {
                stored: held.difference(told).copied().collect(),
                evicted: told.difference(held).copied().collect(),
            };
            told.clone_from(held);
            changes
        }
    }
}

/// Locations as a watch tells them.
struct Index {
    watch: LocationWatch,
    held: BTreeMap<Instance, BTreeSet<BlockHash>>,
    restarts: usize,
    gone: usize,
    /// Sizes of live segments.
    live: Vec<usize>,
}

impl Index {
    fn new(store: &Store) -> Self {
        Self {
            watch: store.watch_blocks(),
            held: BTreeMap::new(),
            restarts: 0,
            gone: 0,
            live: Vec::new(),
        }
    }

    async fn step(&mut self) {
        match soon("the next event", self.watch.next()).await {
            LocationEvent::Restart => {
                self.held.clear();
                self.restarts += 1;
            }
            LocationEvent::Segment {
                instance,
                segment,
                is_live,
            } => {
                assert!(blocks::encode(&segment).len() <= blocks::VALUE_BYTES_MAX);
                if is_live {
                    self.live.push(segment.changes.len());
                    let age = Clock::new().unix_us().checked_sub(segment.since_unix_us);
                    assert!(age.is_some_and(|age| age < 120_000_000), "{age:?}");
                }
                let held = self.held.entry(instance).or_default();
                for hash in &segment.changes.evicted {
                    held.remove(hash);
                }
                held.extend(segment.changes.stored);
            }
            LocationEvent::Gone { instance } => {
                self.held.remove(&instance);
                self.gone += 1;
            }
        }
    }

    async fn follow_until(&mut self, what: &str, wanted: impl Fn(&Self) -> bool) {
        soon(what, async {
            while !wanted(self) {
                self.step().await;
            }
        })
        .await;
    }

    async fn follow_to(&mut self, instance: Instance, cache: &Cache) {
        let wanted = cache.held();
        self.follow_until("the cache", |index| {
            index.held.get(&instance).cloned().unwrap_or_default() == wanted
        })
        .await;
    }
}

async fn keys(backend: &Backend) -> usize {
    let options = GetOptions::new().with_prefix().with_keys_only();
    let found = backend
        .client()
        .await
        .get(blocks::prefix("default"), Some(options))
        .await;
    found.unwrap().kvs().len()
}

async fn locations_come_change_and_go_with_the_node(backend: Backend) {
    let store = backend.store().await;
    let mut index = Index::new(&store);
    let (a, b) = (
        store.register(record("a")).await.unwrap(),
        store.register(record("b")).await.unwrap(),
    );
    let (in_a, in_b) = (Cache::default(), Cache::default());
    a.publish_blocks(LocationBudget::default(), in_a.source());
    b.publish_blocks(LocationBudget::default(), in_b.source());
    let (a_is, b_is) = (a.record().instance, b.record().instance);
    in_a.hold(0..10);
    index.follow_to(a_is, &in_a).await;
    in_b.hold(5..8);
    index.follow_to(b_is, &in_b).await;
    in_a.hold(8..14);
    index.follow_to(a_is, &in_a).await;
    a.deregister().await;
    index.follow_until("a goes", |index| index.gone == 1).await;
    assert_eq!(index.held.keys().collect::<Vec<_>>(), [&b_is]);
    drop(b);
    index.follow_until("b's lease ends", |index| index.gone == 2).await;
    assert_eq!((keys(&backend).await, index.restarts), (0, 1));
}

async fn a_watch_begins_with_what_stands(backend: Backend) {
    let store = backend.store().await;
    let node = store.register(record("a")).await.unwrap();
    let (cache, instance) = (Cache::default(), node.record().instance);
    node.publish_blocks(LocationBudget::default(), cache.source());
    let mut early = Index::new(&store);
    // More than one page of them.
    for n in 0..40 {
        cache.hold((0..4000).map(|i| i + 4000 * n));
        early.follow_to(instance, &cache).await;
    }
    let mut late = Index::new(&backend.store().await);
    late.follow_to(instance, &cache).await;
    assert_eq!((late.live.len(), late.restarts), (0, 1));
    cache.hold(1..2);
    late.follow_to(instance, &cache).await;
    assert!(!late.live.is_empty());
}

async fn large_changes_are_cut_and_small_ones_gathered(backend: Backend) {
    let store = backend.store().await;
    let mut index = Index::new(&store);
    let node = store.register(record("a")).await.unwrap();
    let (cache, instance) = (Cache::default(), node.record().instance);
    node.publish_blocks(LocationBudget::default(), cache.source());
    cache.hold(0..10_000);
    index.follow_to(instance, &cache).await;
    assert_eq!(index.live.len(), 3, "{:?}", index.live);
    for n in 0..25 {
        cache.hold(n..10_000 + n);
        index.follow_to(instance, &cache).await;
    }
    // The 17th small one gathers them, the first of which is what was left of the 10,000.
    let gathered = index.live[3..].iter().filter(|size| **size > 1800).count();
    assert_eq!(gathered, 1, "{:?}", index.live);
    assert!(keys(&backend).await <= 2 + 16);
    assert_eq!(index.gone, 0);
}

async fn a_node_keeps_to_its_share(backend: Backend) {
    let store = backend.store().await;
    let mut index = Index::new(&store);
    let node = store.register(record("a")).await.unwrap();
    let _others = (
        store.register(record("b")).await.unwrap(),
        store.register(record("c")).await.unwrap(),
    );
    let (cache, instance) = (Cache::default(), node.record().instance);
    // A third of 6 writes per second.
    let budget = LocationBudget {
        writes_per_s: 6,
        ..LocationBudget::default()
    };
    cache.hold(0..1);
    node.publish_blocks(budget, cache.source());
    index.follow_to(instance, &cache).await;
    let began = Instant::now();
    let mut n = 1;
    while began.elapsed() < Duration::from_secs(3) {
        n += 1;
        cache.hold(0..n);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    index.follow_to(instance, &cache).await;
    let (writes, most) = (index.live.len() as f64, began.elapsed().as_secs_f64() * 2.0 + 2.0);
    assert!(writes <= most, "{writes} writes, {most} allowed");
}

async fn a_lost_lease_publishes_all_anew(backend: Backend) {
    let store = backend.store().await;
    let mut index = Index::new(&store);
    let node = store.register(record("a")).await.unwrap();
    let (cache, instance) = (Cache::default(), node.record().instance);
    node.publish_blocks(LocationBudget::default(), cache.source());
    cache.hold(0..5000);
    index.follow_to(instance, &cache).await;
    let mut client = backend.client().await;
    for lease in client.leases().await.unwrap().leases() {
        client.lease_revoke(lease.id()).await.unwrap();
    }
    index.follow_until("the locations go", |index| index.gone == 1).await;
    cache.hold(100..5001);
    index.follow_to(instance, &cache).await;
}

async fn a_wipe_publishes_all_anew(mut backend: Backend) {
    let mut index = Index::new(&backend.store().await);
    let node = backend.store().await.register(record("a")).await.unwrap();
    let (cache, instance) = (Cache::default(), node.record().instance);
    node.publish_blocks(LocationBudget::default(), cache.source());
    cache.hold(0..5000);
    index.follow_to(instance, &cache).await;
    backend.wipe().await;
    index.follow_until("fresh data", |index| index.restarts >= 2).await;
    cache.hold(7..5005);
    index.follow_to(instance, &cache).await;
    until("the record stands", || async { node.is_published() }).await;
}

async fn cut_wires_lose_no_location(backend: Backend) {
    let through = async |proxy: &Proxy| {
        Store::connect(options_for(proxy.endpoint()), Clock::new(), Supervisor::new())
            .await
            .unwrap()
    };
    let (writes, reads) = (Proxy::to(backend.endpoint()).await, Proxy::to(backend.endpoint()).await);
    let node = through(&writes).await.register(record("a")).await.unwrap();
    let mut index = Index::new(&through(&reads).await);
    let (cache, instance) = (Cache::default(), node.record().instance);
    node.publish_blocks(LocationBudget::default(), cache.source());
    for n in 0..12 {
        cache.hold((0..300).map(|i| i * (n + 1)));
        index.follow_to(instance, &cache).await;
        // A txn may be under way in either direction.
        cache.hold((0..300).map(|i| i * (n + 2)));
        tokio::time::sleep(Duration::from_millis(u64::from(n) * 17)).await;
        if n % 2 == 0 {
            writes.cut()
        } else {
            reads.cut()
        }
        tokio::time::sleep(Duration::from_millis(60)).await;
        cache.hold((0..300).map(|i| i * (n + 3)));
        if n % 2 == 0 {
            writes.mend()
        } else {
            reads.mend()
        }
        index.follow_to(instance, &cache).await;
    }
    assert_eq!((index.restarts, index.gone), (1, 0));
    let mut late = Index::new(&backend.store().await);
    late.follow_to(instance, &cache).await;
}

async fn segments_that_cannot_be_read_are_ignored(backend: Backend) {
    let mut client = backend.client().await;
    let name = blocks::SegmentName {
        node_id: record("a").node_id,
        instance: Instance(5),
        seq: 0,
    };
    let noise = [
        ("default", vec![9]),
        ("elsewhere", blocks::encode(&blocks::BlockSegment::default())),
    ];
    for (cluster, value) in noise {
        client.put(blocks::key(cluster, &name), value, None).await.unwrap();
    }
    client.put("/baton/v1/default/blocks/x", "", None).await.unwrap();
    let store = backend.store().await;
    let mut index = Index::new(&store);
    let node = store.register(record("b")).await.unwrap();
    let (cache, instance) = (Cache::default(), node.record().instance);
    node.publish_blocks(LocationBudget::default(), cache.source());
    cache.hold(0..3);
    index.follow_to(instance, &cache).await;
    assert_eq!(index.held.len(), 1);
}
