//! Follows the store and listens to every member's heart, each in a supervised task.

use super::heartbeat::{HeartbeatOptions, listen};
use super::{Members, NewMember};
use baton_cluster_state::{MembershipEvent, Store};
use baton_node_runtime::{Clock, Supervisor};
use baton_types::Instance;
use std::time::Duration;

/// What the tasks need.
#[derive(Clone)]
pub(crate) struct WatchOptions {
    pub(crate) store: Store,
    pub(crate) members: Members,
    /// This coordinator.
    pub(crate) instance: Instance,
    /// Between two heartbeats.
    pub(crate) heartbeat: Duration,
    pub(crate) clock: Clock,
    pub(crate) supervisor: Supervisor,
}

/// Starts following. It ends with the supervisor.
pub(crate) fn watch(options: WatchOptions) {
    let supervisor = options.supervisor.clone();
    let shutdown = supervisor.shutdown_token();
    supervisor.spawn("membership", async move {
        let mut nodes = options.store.watch_nodes();
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
                    () = cancel.cancelled() => {}
                    () = shutdown.cancelled() => {}
                    () = listen(new, heartbeat) => {}
                }
            });
        };
        loop {
            let event = tokio::select! {
                () = shutdown.cancelled() => return,
                event = nodes.next() => event,
            };
            match event {
                MembershipEvent::Snapshot(records) => {
                    options.members.snapshot(records).into_iter().for_each(&listen_to);
                }
                MembershipEvent::Put(record) => options.members.put(record).into_iter().for_each(&listen_to),
                MembershipEvent::Gone { node_id, instance } => options.members.gone(&node_id, instance),
            }
        }
    });
}
