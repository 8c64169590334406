//! Learns from the store where blocks are: follows what nodes publish, keeps the index, and measures how late it is.
//!
//! What is known may be late or, once the index is full, incomplete; routing guesses by it and nodes answer by their own
//! books. Locations go with their node's lease, whatever its heartbeat says: they come back with its registration.

use super::Members;
use baton_cluster_state::LocationEvent;
use baton_node_runtime::{Clock, Supervisor};
use baton_scheduling::BlockIndex;
use baton_types::Instance;
use futures::FutureExt;
use futures::stream::{Stream, StreamExt};
use std::collections::HashSet;
use std::pin::pin;
use std::time::Duration;

/// Events that are taken in under one lock of the index, which routing waits for: at most 4,096 blocks each.
const BATCH_MAX: usize = 16;
/// Between two looks at what the index takes.
const SHOW_EVERY: Duration = Duration::from_secs(1);

/// Starts following what the store says of locations. It ends with the supervisor.
pub(crate) fn watch_locations(
    events: impl Stream<Item = LocationEvent> + Send + 'static,
    members: Members,
    clock: Clock,
    supervisor: &Supervisor,
) {
    let shutdown = supervisor.shutdown_token();
    let shown = members.clone();
    supervisor.spawn("block-locations", async move {
        let (mut known, mut events) = (Known::default(), pin!(events));
        loop {
            let batch = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                batch = next_batch(&mut events) => batch,
            };
            members.index(|index| batch.iter().for_each(|event| known.take_in(index, event)));
            batch.iter().for_each(|event| measure(event, clock));
        }
    });
    let shutdown = supervisor.shutdown_token();
    supervisor.spawn("show-locations", async move {
        loop {
            shown.show_index();
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = clock.sleep(SHOW_EVERY) => {}
            }
        }
    });
}

/// The next event, and those that have come already behind it.
async fn next_batch(events: &mut (impl Stream<Item = LocationEvent> + Unpin)) -> Vec<LocationEvent> {
    let Some(first) = events.next().await else {
        // The store's watch has no end.
        return std::future::pending().await;
    };
    let mut batch = vec![first];
    while batch.len() < BATCH_MAX
        && let Some(Some(event)) = events.next().now_or_never()
    {
        batch.push(event);
    }
    batch
}

/// How old a node's oldest change was when the index knew it. Wall clocks of two machines: good to their difference.
fn measure(event: &LocationEvent, clock: Clock) {
    if let LocationEvent::Segment {
        segment, is_live: true, ..
    } = event
    {
        let age = Duration::from_micros(clock.unix_us().saturating_sub(segment.since_unix_us));
        metrics::histogram!("baton_coordinator_location_staleness_seconds").record(age);
    }
}

/// Whom anything is known of.
#[derive(Debug, Default)]
struct Known(HashSet<Instance>);

impl Known {
    fn take_in(&mut self, index: &mut BlockIndex, event: &LocationEvent) {
        match event {
            LocationEvent::Restart => self.0.drain().for_each(|instance| index.drop_node(instance)),
            LocationEvent::Segment { instance, segment, .. } => {
                self.0.insert(*instance);
                index.remove(*instance, &segment.changes.evicted);
                index.add(*instance, &segment.changes.stored);
            }
            LocationEvent::Gone { instance } => {
                self.0.remove(instance);
                index.drop_node(*instance);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_cluster_state::BlockSegment;
    use baton_types::{BlockChanges, BlockHash};

    fn segment(instance: u64, evicted: &[u8], stored: &[u8]) -> LocationEvent {
        let hashes = |of: &[u8]| of.iter().map(|n| BlockHash([*n; 16])).collect();
        LocationEvent::Segment {
            instance: Instance(instance),
            segment: BlockSegment {
                since_unix_us: 0,
                changes: BlockChanges {
                    stored: hashes(stored),
                    evicted: hashes(evicted),
                },
            },
            is_live: true,
        }
    }

    #[test]
    fn the_index_follows_what_is_told() {
        let (mut index, mut known) = (BlockIndex::new(100), Known::default());
        let mut tell = |event: LocationEvent| {
            known.take_in(&mut index, &event);
            (index.locations(), known.0.len())
        };
        assert_eq!(tell(LocationEvent::Restart), (0, 0));
        assert_eq!(tell(segment(1, &[], &[1, 2, 3])), (3, 1));
        assert_eq!(tell(segment(2, &[9], &[1, 2])), (5, 2));
        // A segment that took over an eviction and what was stored again.
        assert_eq!(tell(segment(1, &[2, 3], &[2, 4])), (5, 2));
        let gone = LocationEvent::Gone { instance: Instance(2) };
        assert_eq!(tell(gone), (3, 1));
        assert_eq!(tell(LocationEvent::Restart), (0, 0));
        assert_eq!(tell(segment(1, &[], &[7])), (1, 1));
    }
}
