//! Follows the store and listens to every member's heart, each in a supervised task.

use super::heartbeat::{HeartbeatOptions, listen};
use super::{Members, NewMember};
use baton_cluster_state::MembershipEvent;
use baton_node_runtime::{Clock, Supervisor};
use baton_types::Instance;
use futures::stream::{Stream, StreamExt};
use std::pin::pin;
use std::time::Duration;

/// What the tasks need.
#[derive(Clone)]
pub(crate) struct WatchOptions {
    pub(crate) members: Members,
    /// This coordinator.
    pub(crate) instance: Instance,
    /// Between two heartbeats.
    pub(crate) heartbeat: Duration,
    pub(crate) clock: Clock,
    pub(crate) supervisor: Supervisor,
}

/// Starts following what the store says of its nodes. It ends with the supervisor.
pub(crate) fn watch(nodes: impl Stream<Item = MembershipEvent> + Send + 'static, options: WatchOptions) {
    let supervisor = options.supervisor.clone();
    let shutdown = supervisor.shutdown_token();
    supervisor.spawn("membership", async move {
        let mut nodes = pin!(nodes);
        let listen_to = |new: NewMember| {
            let heartbeat = HeartbeatOptions {
                members: options.members.clone(),
                instance: options.instance,
                interval: options.heartbeat,
                clock: options.clock,
                supervisor: options.supervisor.clone(),
            };
            let shutdown = options.supervisor.shutdown_token();
            options.supervisor.spawn("heartbeat", async move {
                let cancel = new.cancel.clone();
                tokio::select! {
                    biased;
                    () = cancel.cancelled() => {}
                    () = shutdown.cancelled() => {}
                    () = listen(new, heartbeat) => {}
                }
            });
        };
        loop {
            let event = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                event = nodes.next() => event,
            };
            match event {
                // The store's watch has no end.
                None => return,
                Some(MembershipEvent::Snapshot(records)) => {
                    options.members.snapshot(records).into_iter().for_each(&listen_to);
                }
                Some(MembershipEvent::Put(record)) => options.members.put(record).into_iter().for_each(&listen_to),
                Some(MembershipEvent::Gone { node_id, instance }) => options.members.gone(&node_id, instance),
            }
        }
    });
}
