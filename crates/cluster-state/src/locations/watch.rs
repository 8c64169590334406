//! A watch over the block locations of all nodes without a gap.

use crate::Store;
use crate::feed::{self, Follower};
use crate::keys::blocks::{self, BlockSegment, SegmentName};
use baton_node_runtime::Moment;
use baton_types::Instance;
use etcd_client::KeyValue;
use std::collections::{BTreeSet, HashMap};
use tokio::sync::mpsc;

/// A change of where blocks are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LocationEvent {
    /// All is told again: forget what was told before.
    Restart,
    /// Some of the blocks that a node holds changed. Without a gap: after all of them one knows what the node holds.
    Segment {
        /// Which life of a node.
        instance: Instance,
        /// What left, and then what came. Repeats of what is known may be among it.
        segment: BlockSegment,
        /// It was just written, and not read from a snapshot.
        is_live: bool,
    },
    /// A node's lease ended: it holds nothing.
    Gone {
        /// Which life.
        instance: Instance,
    },
}

/// A watch over block locations. Begins with [`LocationEvent::Restart`]. Dropping it ends it.
pub struct LocationWatch {
    events: mpsc::Receiver<LocationEvent>,
}

impl Store {
    /// Watches the locations for as long as the process lives.
    pub fn watch_blocks(&self) -> LocationWatch {
        let follower = Locations {
            cluster: self.options().cluster.clone(),
            segments: HashMap::new(),
        };
        LocationWatch {
            events: feed::follow(self, follower),
        }
    }
}

impl LocationWatch {
    /// The next change. May be dropped without losing one. Never returns once the process shuts down.
    pub async fn next(&mut self) -> LocationEvent {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}

struct Locations {
    cluster: String,
    /// The segments that stand, of each life that has any.
    segments: HashMap<Instance, BTreeSet<u64>>,
}

impl Locations {
    /// A segment that cannot be read is not there: it was written by hand or by another version. A node's other segments
    /// still hold, since the worst that a missing one does is a wrong guess about a cache.
    fn read(&mut self, kv: &KeyValue, is_live: bool) -> Option<LocationEvent> {
        let name = blocks::name_of(&self.cluster, kv.key());
        let segment = blocks::decode(kv.key(), kv.value());
        let (SegmentName { instance, seq, .. }, segment) = match (name, segment) {
            (Some(name), Ok(segment)) => (name, segment),
            (None, _) => return None,
            (_, Err(error)) => {
                tracing::warn!(%error, "block segment is ignored");
                return None;
            }
        };
        self.segments.entry(instance).or_default().insert(seq);
        Some(LocationEvent::Segment {
            instance,
            segment,
            is_live,
        })
    }
}

impl Follower for Locations {
    type Event = LocationEvent;

    const TASK: &'static str = "block-watch";
    /// At most 2 MiB.
    const PAGE_KEYS: i64 = 32;

    fn prefix(cluster: &str) -> String {
        blocks::prefix(cluster)
    }

    fn begin_snapshot(&mut self, _is_fresh: bool, out: &mut Vec<LocationEvent>) {
        self.segments.clear();
        out.push(LocationEvent::Restart);
    }

    fn page(&mut self, page: &[KeyValue], out: &mut Vec<LocationEvent>) {
        out.extend(page.iter().filter_map(|kv| self.read(kv, false)));
    }

    fn end_snapshot(&mut self, _now: Moment, _out: &mut Vec<LocationEvent>) {}

    fn put(&mut self, kv: &KeyValue, out: &mut Vec<LocationEvent>) {
        out.extend(self.read(kv, true));
    }

    fn delete(&mut self, key: &[u8], out: &mut Vec<LocationEvent>) {
        let Some(SegmentName { instance, seq, .. }) = blocks::name_of(&self.cluster, key) else {
            return;
        };
        // Segments that another one replaced are removed behind it, so that only a node that is gone comes to have none.
        if let Some(left) = self.segments.get_mut(&instance) {
            left.remove(&seq);
            if left.is_empty() {
                self.segments.remove(&instance);
                out.push(LocationEvent::Gone { instance });
            }
        }
    }
}
