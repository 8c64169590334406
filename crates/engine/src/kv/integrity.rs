//! The check that every block is in exactly one state. Heartbeats carry its verdict; anything found is a bug.

use super::state::{Book, Place};
use baton_types::BlockId;

/// Two parts of the pool's book that disagree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IntegrityFault {
    /// A list names a block that is in another state, or names it twice.
    #[error("the {list} list names block {block:?} wrongly")]
    List {
        /// Which list.
        list: &'static str,
        /// Which block.
        block: BlockId,
    },
    /// A counter differs from what counting gives.
    #[error("{count} blocks are counted as {what}, {found} were found")]
    Count {
        /// What is counted.
        what: &'static str,
        /// The counter.
        count: usize,
        /// The truth.
        found: usize,
    },
    /// The prefix index and a block's identity differ.
    #[error("block {block:?} and the prefix index disagree about its identity")]
    Identity {
        /// Which block.
        block: BlockId,
    },
    /// A block in a state that has no identity has one, or a cached one has none.
    #[error("block {block:?} has or lacks an identity that its state forbids or demands")]
    State {
        /// Which block.
        block: BlockId,
    },
}

pub(super) fn check(book: &Book) -> Result<(), IntegrityFault> {
    let mut listed = vec![false; book.blocks.len()];
    let mut list = |name: &'static str, id: BlockId, right: bool| {
        let seen = listed
            .get_mut(id.index())
            .is_none_or(|seen| std::mem::replace(seen, true));
        if right && !seen {
            Ok(())
        } else {
            Err(IntegrityFault::List { list: name, block: id })
        }
    };
    for id in &book.free {
        list(
            "free",
            *id,
            book.blocks.get(id.index()).is_some_and(|b| b.place == Place::Free),
        )?;
    }
    for (tick, id) in &book.lru {
        list(
            "cached",
            *id,
            book.blocks
                .get(id.index())
                .is_some_and(|b| b.place == Place::Cached(*tick)),
        )?;
    }
    let (mut free, mut cached, mut reserved, mut quarantined, mut pins, mut identities) = (0, 0, 0, 0, 0, 0);
    for (block, number) in book.blocks.iter().zip(0..) {
        let id = BlockId(number);
        let mut may_be_named = false;
        match block.place {
            Place::Free => free += 1,
            Place::Cached(_) => {
                cached += 1;
                may_be_named = true;
                if block.identity.is_none() {
                    return Err(IntegrityFault::State { block: id });
                }
            }
            Place::Referenced(count) => {
                pins += count as usize;
                may_be_named = true;
                if count == 0 {
                    return Err(IntegrityFault::State { block: id });
                }
            }
            Place::Reserved => reserved += 1,
            Place::Quarantined => quarantined += 1,
        }
        if let Some(hash) = &block.identity {
            identities += 1;
            if !may_be_named {
                return Err(IntegrityFault::State { block: id });
            }
            if book.index.get(hash) != Some(&id) {
                return Err(IntegrityFault::Identity { block: id });
            }
        }
    }
    let counters = [
        ("free", book.free.len(), free),
        ("cached", book.lru.len(), cached),
        ("reserved", book.reserved, reserved),
        ("quarantined", book.quarantined, quarantined),
        ("references", book.pins, pins),
        ("identities", book.index.len(), identities),
    ];
    match counters.into_iter().find(|(_, count, found)| count != found) {
        Some((what, count, found)) => Err(IntegrityFault::Count { what, count, found }),
        None => Ok(()),
    }
}
