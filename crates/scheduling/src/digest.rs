//! Hash tables whose keys are random numbers already: digests of blocks, instances.

use std::hash::{BuildHasherDefault, Hasher};

/// Takes the numbers as they are; of several, each counts.
#[derive(Default)]
pub(crate) struct Digest(u64);

impl Hasher for Digest {
    fn write(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(8) {
            let mut number = [0; 8];
            number[..part.len()].copy_from_slice(part);
            self.write_u64(u64::from_le_bytes(number));
        }
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = self.0.rotate_left(32) ^ number;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

pub(crate) type Digests = BuildHasherDefault<Digest>;
