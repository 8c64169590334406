//! A path that errs by seed: it delays, reorders, duplicates, drops and tears what goes through it.

use baton_kv_transfer::PathKind;
use baton_kv_transfer::transport::{Extent, Path, PathError};
use baton_types::Epoch;
use futures::FutureExt;
use futures::future::BoxFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Numbers that only look random: the same for the same seed.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Less than `sides`.
    pub fn throw(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 11) % sides as u64) as usize
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.throw(i + 1));
        }
    }
}

/// One in so many extents (or writes, for tears) meets the fault; 0: none does.
#[derive(Debug, Clone, Copy)]
pub struct Faults {
    pub duplicate: usize,
    pub drop: usize,
    pub tear: usize,
}

/// The decorator.
pub struct FaultyPath {
    inner: Arc<dyn Path>,
    faults: Faults,
    seed: u64,
    writes: AtomicU64,
    harmed: Arc<AtomicBool>,
}

impl FaultyPath {
    pub fn new(inner: Arc<dyn Path>, faults: Faults, seed: u64) -> Self {
        Self {
            inner,
            faults,
            seed,
            writes: AtomicU64::new(0),
            harmed: Arc::default(),
        }
    }

    /// Something was dropped or torn: not everything can have arrived.
    pub fn harmed(&self) -> bool {
        self.harmed.load(Ordering::Relaxed)
    }
}

fn hit(dice: &mut Dice, one_in: usize) -> bool {
    one_in > 0 && dice.throw(one_in) == 0
}

impl Path for FaultyPath {
    fn kind(&self) -> PathKind {
        self.inner.kind()
    }

    fn connections(&self) -> u32 {
        self.inner.connections()
    }

    fn write(&self, epoch: Epoch, extents: Vec<Extent>) -> BoxFuture<'static, Result<(), PathError>> {
        let nth = self.writes.fetch_add(1, Ordering::Relaxed);
        let mut dice = Dice::new(self.seed ^ nth << 32);
        let (inner, faults, harmed) = (Arc::clone(&self.inner), self.faults, Arc::clone(&self.harmed));
        let mut sent = Vec::new();
        for extent in extents {
            if hit(&mut dice, faults.drop) {
                harmed.store(true, Ordering::Relaxed);
                continue;
            }
            if hit(&mut dice, faults.duplicate) {
                sent.push(extent.clone());
            }
            sent.push(extent);
        }
        dice.shuffle(&mut sent);
        async move {
            let tear = hit(&mut dice, faults.tear);
            while !sent.is_empty() {
                let piece = sent.split_off(sent.len() - 1 - dice.throw(sent.len()));
                let write = inner.write(epoch, piece);
                if tear && dice.throw(3) == 0 {
                    harmed.store(true, Ordering::Relaxed);
                    let (written, ()) = futures::join!(write, inner.close());
                    written?;
                } else {
                    write.await?;
                }
                for _ in 0..dice.throw(4) {
                    tokio::task::yield_now().await;
                }
            }
            Ok(())
        }
        .boxed()
    }

    fn fence(&self, epoch: Epoch) -> BoxFuture<'static, Result<(), PathError>> {
        self.inner.fence(epoch)
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        self.inner.close()
    }
}
