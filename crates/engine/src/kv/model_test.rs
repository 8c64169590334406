//! Random operations against a model that knows only which guard holds what, with integrity checked after each.

use super::{BlockPool, BlockTable, Quarantined, Reservation};
use baton_types::{BlockHash, BlockId};
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

const BLOCKS: u32 = 12;

#[derive(Debug, Clone)]
enum Op {
    Acquire {
        chain: u8,
        hashes: usize,
        max_held: usize,
        total: usize,
    },
    Reserve {
        chain: u8,
        hashes: usize,
        max_held: usize,
        total: usize,
    },
    PublishAll {
        pick: usize,
        chain: u8,
    },
    Grow {
        pick: usize,
        more: usize,
    },
    DropTable {
        pick: usize,
    },
    Commit {
        pick: usize,
    },
    Quarantine {
        pick: usize,
    },
    ReleaseReservation {
        pick: usize,
    },
    ReleaseQuarantined {
        pick: usize,
    },
    ClearCache,
    TakeChanges,
}

fn op() -> impl Strategy<Value = Op> {
    let ask = || (0u8..3, 0usize..6, 0usize..6, 0usize..8);
    prop_oneof![
        4 => ask().prop_map(|(chain, hashes, max_held, total)| Op::Acquire { chain, hashes, max_held, total }),
        3 => ask().prop_map(|(chain, hashes, max_held, total)| Op::Reserve { chain, hashes, max_held, total }),
        4 => (any::<usize>(), 0u8..3).prop_map(|(pick, chain)| Op::PublishAll { pick, chain }),
        2 => (any::<usize>(), 0usize..4).prop_map(|(pick, more)| Op::Grow { pick, more }),
        4 => any::<usize>().prop_map(|pick| Op::DropTable { pick }),
        2 => any::<usize>().prop_map(|pick| Op::Commit { pick }),
        2 => any::<usize>().prop_map(|pick| Op::Quarantine { pick }),
        1 => any::<usize>().prop_map(|pick| Op::ReleaseReservation { pick }),
        2 => any::<usize>().prop_map(|pick| Op::ReleaseQuarantined { pick }),
        1 => Just(Op::ClearCache),
        2 => Just(Op::TakeChanges),
    ]
}

/// The identity of block `ordinal` of a chain.
fn identity(chain: u8, ordinal: usize) -> BlockHash {
    let mut bytes = [chain; 16];
    bytes[0] = u8::try_from(ordinal).unwrap();
    BlockHash(bytes)
}

fn chain(chain: u8, len: usize) -> Vec<BlockHash> {
    (0..len).map(|ordinal| identity(chain, ordinal)).collect()
}

#[derive(Default)]
struct Model {
    tables: Vec<BlockTable>,
    reservations: Vec<Reservation>,
    quarantined: Vec<Quarantined>,
    /// What a block was published as, and in which of its lives.
    published: HashMap<BlockId, (BlockHash, u64)>,
    /// What the changes that were taken add up to.
    told: HashSet<BlockHash>,
}

fn take<T>(from: &mut Vec<T>, pick: usize) -> Option<T> {
    if from.is_empty() {
        None
    } else {
        Some(from.swap_remove(pick % from.len()))
    }
}

impl Model {
    fn owned(&self) -> Vec<BlockId> {
        let tables = self.tables.iter().flat_map(|t| t.blocks().iter());
        let reservations = self.reservations.iter().flat_map(|r| r.held().iter().chain(r.fresh()));
        tables
            .chain(reservations)
            .chain(self.quarantined.iter().flat_map(|q| q.blocks().iter()))
            .copied()
            .collect()
    }

    fn check_taken(
        &self,
        pool: &BlockPool,
        before: &[BlockId],
        held: &[BlockId],
        fresh: &[BlockId],
        hashes: &[BlockHash],
    ) {
        for (id, hash) in held.iter().zip(hashes) {
            let known = self.published.get(id).copied();
            assert_eq!(
                known,
                Some((*hash, pool.generation(*id))),
                "a held block has the contents of its identity"
            );
        }
        for (i, id) in fresh.iter().enumerate() {
            assert!(!before.contains(id), "a fresh block had an owner");
            assert!(
                !held.contains(id) && !fresh[..i].contains(id),
                "a block was given out twice"
            );
        }
    }

    fn apply(&mut self, pool: &Arc<BlockPool>, op: &Op) {
        let before = self.owned();
        let room = pool.room();
        match *op {
            Op::Acquire {
                chain: c,
                hashes,
                max_held,
                total,
            } => {
                let hashes = chain(c, hashes);
                match pool.acquire(&hashes, max_held, total) {
                    Ok(table) => {
                        assert!(table.held() <= max_held && table.blocks().len() == total);
                        let (held, fresh) = table.blocks().split_at(table.held());
                        self.check_taken(pool, &before, held, fresh, &hashes);
                        self.tables.push(table);
                    }
                    Err(refused) => {
                        assert!(
                            total > room.saturating_sub(hashes.len()),
                            "{refused} although there was room"
                        );
                        assert_eq!(pool.room(), room);
                    }
                }
            }
            Op::Reserve {
                chain: c,
                hashes,
                max_held,
                total,
            } => {
                let hashes = chain(c, hashes);
                if let Ok(reservation) = pool.reserve(&hashes, max_held, total) {
                    assert_eq!(reservation.held().len() + reservation.fresh().len(), total);
                    self.check_taken(pool, &before, reservation.held(), reservation.fresh(), &hashes);
                    self.reservations.push(reservation);
                }
            }
            Op::PublishAll { pick, chain: c } => {
                if self.tables.is_empty() {
                    return;
                }
                let pick = pick % self.tables.len();
                let table = &self.tables[pick];
                for (ordinal, id) in table.blocks().iter().enumerate() {
                    let hash = identity(c, ordinal);
                    let known = pool.held(&[hash]) == 1;
                    table.publish(ordinal, hash);
                    let named = self
                        .published
                        .get(id)
                        .is_some_and(|(_, life)| *life == pool.generation(*id));
                    if !known && !named {
                        self.published.insert(*id, (hash, pool.generation(*id)));
                    }
                }
            }
            Op::Grow { pick, more } => {
                if self.tables.is_empty() {
                    return;
                }
                let pick = pick % self.tables.len();
                let old = self.tables[pick].blocks().len();
                match self.tables[pick].grow(more) {
                    Ok(()) => {
                        let fresh = self.tables[pick].blocks()[old..].to_vec();
                        assert_eq!(fresh.len(), more);
                        self.check_taken(pool, &before, &[], &fresh, &[]);
                    }
                    Err(_) => assert!(more > room),
                }
            }
            Op::DropTable { pick } => drop(take(&mut self.tables, pick)),
            Op::Commit { pick } => self
                .tables
                .extend(take(&mut self.reservations, pick).map(Reservation::commit)),
            Op::Quarantine { pick } => {
                self.quarantined
                    .extend(take(&mut self.reservations, pick).map(Reservation::quarantine));
            }
            Op::ReleaseReservation { pick } => {
                if let Some(reservation) = take(&mut self.reservations, pick) {
                    reservation.release();
                }
            }
            Op::ReleaseQuarantined { pick } => {
                if let Some(quarantined) = take(&mut self.quarantined, pick) {
                    quarantined.release();
                }
            }
            Op::ClearCache => {
                pool.clear_cache();
                self.published.clear();
            }
            Op::TakeChanges => self.take_changes(pool),
        }
    }

    fn take_changes(&mut self, pool: &BlockPool) {
        let changes = pool.take_changes();
        for hash in &changes.evicted {
            assert!(
                self.told.remove(hash),
                "{hash:?} was told as gone and had not been told"
            );
        }
        for hash in &changes.stored {
            assert!(self.told.insert(*hash), "{hash:?} was told twice");
        }
        for hash in (0..3).flat_map(|c| chain(c, 8)) {
            assert_eq!(self.told.contains(&hash), pool.held(&[hash]) == 1, "{hash:?}");
        }
    }

    fn check_counts(&self, pool: &BlockPool) {
        let counts = pool.counts();
        let mut named: Vec<BlockId> = self.tables.iter().flat_map(|t| t.blocks().iter().copied()).collect();
        named.extend(self.reservations.iter().flat_map(|r| r.held().iter().copied()));
        named.sort_unstable();
        named.dedup();
        let reserved: usize = self.reservations.iter().map(|r| r.fresh().len()).sum();
        let quarantined: usize = self.quarantined.iter().map(|q| q.blocks().len()).sum();
        assert_eq!(counts.referenced as usize, named.len());
        assert_eq!(counts.reserved as usize, reserved);
        assert_eq!(counts.quarantined as usize, quarantined);
        assert_eq!(
            counts.free + counts.cached + counts.referenced + counts.reserved + counts.quarantined,
            BLOCKS
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_operations_keep_every_block_in_one_state(ops in prop::collection::vec(op(), 1..120)) {
        let pool = BlockPool::new(BLOCKS);
        let mut model = Model::default();
        for op in &ops {
            model.apply(&pool, op);
            if let Err(fault) = pool.check_integrity() {
                panic!("after {op:?}: {fault}");
            }
            model.check_counts(&pool);
        }
        model.take_changes(&pool);
        model.tables.clear();
        for reservation in model.reservations.drain(..) {
            reservation.release();
        }
        for quarantined in model.quarantined.drain(..) {
            quarantined.release();
        }
        let counts = pool.counts();
        prop_assert_eq!(counts.free + counts.cached, BLOCKS);
        prop_assert!(pool.check_integrity().is_ok());
    }
}
