//! A running sequence's full blocks on their way to somebody who reads them while it goes on.
//!
//! Only full blocks are shared: a sequence never writes into one again, so that its reader and the engine never meet. They
//! are pinned by a guard of their own: the sequence may grow, give way or end meanwhile.

use super::Control;
use super::sequence::{ShareWish, SharedBlocks};
use baton_engine::BlockTable;
use tokio::sync::mpsc::error::TrySendError;

/// What was shared, of what is wished for.
#[derive(Debug, Default)]
pub(super) struct Sharing(Option<Begun>);

#[derive(Debug)]
struct Begun {
    wish: ShareWish,
    /// Leading blocks that were sent.
    sent: usize,
}

impl Sharing {
    /// Sends what is wished for, full and not yet sent; `full` leading blocks of `table` are. A sequence that began anew has
    /// the same contents in other blocks, so that it goes on where it was.
    pub fn go_on(&mut self, control: &Control, table: Option<&BlockTable>, full: usize) {
        if let Some(wish) = control.take_wish() {
            self.0 = Some(Begun { wish, sent: 0 });
        }
        let (Some(begun), Some(table)) = (&mut self.0, table) else {
            return;
        };
        let (first, end) = (begun.sent, full.min(begun.wish.blocks));
        if end > first {
            let shared = SharedBlocks {
                first,
                table: table.share(first..end),
            };
            match begun.wish.to.try_send(shared) {
                Ok(()) => begun.sent = end,
                Err(TrySendError::Full(_)) => {}
                Err(TrySendError::Closed(_)) => begun.sent = begun.wish.blocks,
            }
        }
        if begun.sent == begun.wish.blocks {
            self.0 = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_engine::BlockPool;
    use tokio::sync::mpsc;

    #[test]
    fn full_blocks_go_in_order_and_only_once() {
        let pool = BlockPool::new(8);
        let table = pool.acquire(&[], 0, 5).unwrap();
        let (control, mut sharing) = (Control::new(true), Sharing::default());
        sharing.go_on(&control, Some(&table), 3);
        let (to, mut from) = mpsc::channel(2);
        control.share(ShareWish { blocks: 4, to });
        sharing.go_on(&control, None, 0);
        sharing.go_on(&control, Some(&table), 2);
        sharing.go_on(&control, Some(&table), 2);
        sharing.go_on(&control, Some(&table), 3);
        // Its place is taken, so it comes with the next.
        sharing.go_on(&control, Some(&table), 4);
        let mut next = || {
            from.try_recv()
                .map(|shared| (shared.first, shared.table.blocks().to_vec()))
        };
        assert_eq!(next(), Ok((0, table.blocks()[..2].to_vec())));
        sharing.go_on(&control, Some(&table), 5);
        assert_eq!(next(), Ok((2, table.blocks()[2..3].to_vec())));
        assert_eq!(next(), Ok((3, table.blocks()[3..4].to_vec())));
        assert!(
            matches!(next(), Err(mpsc::error::TryRecvError::Disconnected)),
            "it is done"
        );
        drop(table);
        pool.check_integrity().unwrap();
        assert_eq!(pool.counts().free, 8);
    }
}
