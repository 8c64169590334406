//! Block identity: a BLAKE3 chain over token ids, begun from everything that changes what the KV of those tokens is.

use crate::ModelFingerprint;
use crate::kv::KvDtype;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What decides the bits that a node computes: engine build, instruction-set path, weights, memory and wire dtype.
/// Nodes of equal numerics id give identical greedy output; others promise only no gap and no repeat.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NumericsId(pub String);

impl fmt::Display for NumericsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Published identity of a full block: the chain's value at its end, cut to 128 bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub [u8; 16]);

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// Which blocks came into a node's prefix cache and which left it. No hash is in both.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BlockChanges {
    /// Came.
    pub stored: Vec<BlockHash>,
    /// Left.
    pub evicted: Vec<BlockHash>,
}

impl BlockChanges {
    /// How many blocks changed.
    pub fn len(&self) -> usize {
        self.stored.len() + self.evicted.len()
    }

    /// Nothing changed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Who may share blocks with whom: the start of every chain.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CacheScope {
    /// Which weights.
    pub fingerprint: ModelFingerprint,
    /// Which arithmetic.
    pub numerics: NumericsId,
    /// Which element type.
    pub dtype: KvDtype,
    /// Adapter's name; empty for none.
    pub adapter: String,
    /// Keeps tenants apart; empty where they share.
    pub salt: String,
}

/// The running chain over one request's tokens.
#[derive(Debug, Clone)]
pub struct BlockHashChain {
    state: [u8; 32],
}

fn field(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

impl BlockHashChain {
    /// `h[-1]`: the value before the first block.
    pub fn new(scope: &CacheScope) -> Self {
        let mut hasher = blake3::Hasher::new();
        field(&mut hasher, &scope.fingerprint.0);
        field(&mut hasher, scope.numerics.0.as_bytes());
        field(&mut hasher, format!("{:?}", scope.dtype).as_bytes());
        field(&mut hasher, scope.adapter.as_bytes());
        field(&mut hasher, scope.salt.as_bytes());
        Self {
            state: *hasher.finalize().as_bytes(),
        }
    }

    /// Moves over one full block of token ids and gives its identity.
    pub fn push_block(&mut self, tokens: &[u32]) -> BlockHash {
        let mut hasher = blake3::Hasher::new();
        field(&mut hasher, &self.state);
        hasher.update(&(4 * tokens.len() as u64).to_le_bytes());
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        self.state = *hasher.finalize().as_bytes();
        let mut cut = [0; 16];
        cut.copy_from_slice(&self.state[..16]);
        BlockHash(cut)
    }

    /// The identities of all full blocks of `tokens`; a partial block has none.
    pub fn full_blocks(scope: &CacheScope, tokens: &[u32], block_tokens: usize) -> Vec<BlockHash> {
        let mut chain = Self::new(scope);
        tokens
            .chunks_exact(block_tokens)
            .map(|block| chain.push_block(block))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(salt: &str) -> CacheScope {
        CacheScope {
            fingerprint: ModelFingerprint([7; 32]),
            numerics: NumericsId("avx2".into()),
            dtype: KvDtype::F16,
            adapter: String::new(),
            salt: salt.into(),
        }
    }

    #[test]
    fn identity_depends_on_all_that_precedes() {
        let a = BlockHashChain::full_blocks(&scope(""), &[1, 2, 3, 4, 5], 2);
        let b = BlockHashChain::full_blocks(&scope(""), &[9, 2, 3, 4, 5], 2);
        assert_eq!(a.len(), 2);
        assert_ne!(a[0], b[0]);
        assert_ne!(a[1], b[1]);
        assert_eq!(a, BlockHashChain::full_blocks(&scope(""), &[1, 2, 3, 4], 2));
        assert_ne!(a, BlockHashChain::full_blocks(&scope("tenant"), &[1, 2, 3, 4], 2));
    }
}
