//! The blocks of one request on their way out: which are finished, which were pushed, which the receiver wants.

use baton_engine::BlockTable;
use baton_kv_transfer::{Granted, Outgoing, TransferError};
use baton_types::KvGeometry;
use std::sync::Arc;

/// What was pushed of one grant.
pub(crate) struct Pushed {
    granted: Granted,
    geometry: KvGeometry,
    /// Ordinals below it were pushed, or are not wanted.
    next: u32,
}

impl Pushed {
    pub fn new(granted: Granted, geometry: KvGeometry) -> Self {
        Self {
            next: granted.wanted.start,
            granted,
            geometry,
        }
    }

    /// Pushes every wanted block that is finished: all those below token `computed`, and with `whole_context` the last,
    /// partly filled one too. Each push claims the table, so that its blocks stay as they are until they were sent.
    pub fn push_finished(
        &mut self,
        outgoing: &Outgoing,
        table: &Arc<BlockTable>,
        computed: usize,
        whole_context: bool,
    ) -> Result<(), TransferError> {
        let block_tokens = self.geometry.block_tokens as usize;
        let finished = if whole_context {
            self.geometry.blocks_for(computed)
        } else {
            computed / block_tokens
        };
        let end = self.granted.wanted.end.min(u32::try_from(finished).unwrap_or(u32::MAX));
        while self.next < end {
            let Some(source) = table.blocks().get(self.next as usize) else {
                return Ok(());
            };
            outgoing.push(self.next, 0..self.geometry.layers, *source, table.clone())?;
            self.next += 1;
        }
        Ok(())
    }
}
