//! What the store's outages may and may not do to members.

use crate::backend::{Backend, options_for};
use crate::on_both;
use crate::proxy::Proxy;
use crate::support::{View, record, soon, until};
use baton_cluster_state::keys::nodes;
use baton_cluster_state::{MembershipEvent, NodeRecord, Store};
use baton_node_runtime::{Clock, Supervisor};
use etcd_client::PutOptions;
use std::time::Duration;

on_both!(
    a_restart_loses_no_member,
    a_wipe_loses_only_the_dead,
    a_cut_wire_loses_no_change,
    a_compaction_behind_a_cut_wire_leads_to_a_snapshot,
    a_node_cut_off_for_longer_than_its_lease_comes_back,
    a_name_taken_meanwhile_is_not_taken_back,
    registering_waits_for_a_store_that_is_away,
    a_dead_nodes_name_is_free_even_where_a_restart_renewed_its_lease,
);

async fn through(proxy: &Proxy) -> Store {
    Store::connect(options_for(proxy.endpoint()), Clock::new(), Supervisor::new())
        .await
        .unwrap()
}

async fn a_restart_loses_no_member(mut backend: Backend) {
    let mut view = View::new(backend.store().await.watch_nodes());
    let store = backend.store().await;
    let (a, b) = (
        store.register(record("a")).await.unwrap(),
        store.register(record("b")).await.unwrap(),
    );
    view.follow_until("both nodes", |members| members.len() == 2).await;
    backend.stop().await;
    until("the outage is noticed", || async { !store.reachable() }).await;
    assert!(
        !a.update(|record| record.blocks = 7).await,
        "nobody can have taken this in"
    );
    // Longer than a lease.
    view.drain_for(Duration::from_millis(2_500)).await;
    assert_eq!((view.names(), view.gone()), (vec!["a", "b"], 0));
    backend.start().await;
    view.follow_until("the change made meanwhile", |members| members["a"].blocks == 7)
        .await;
    until("both are registered again", || async {
        a.is_published() && b.is_published() && store.reachable()
    })
    .await;
    // Long enough for a doubted member, or one whose lease did not survive, to go.
    view.drain_for(Duration::from_millis(2_500)).await;
    assert_eq!((view.names(), view.gone()), (vec!["a", "b"], 0));
    assert_eq!(view.snapshots(), if backend.keeps_data() { 1 } else { 2 });
}

async fn a_wipe_loses_only_the_dead(mut backend: Backend) {
    let watching = backend.store().await;
    let mut view = View::new(watching.watch_nodes());
    let store = backend.store().await;
    let alive = store.register(record("alive")).await.unwrap();
    let dead = store.register(record("dead")).await.unwrap();
    view.follow_until("both nodes", |members| members.len() == 2).await;
    let data_before = watching.store_id();
    drop(dead);
    backend.wipe().await;
    view.follow_until("the dead one goes", |members| members.len() == 1)
        .await;
    assert_ne!(watching.store_id(), data_before);
    assert_eq!((view.names(), view.gone(), view.snapshots()), (vec!["alive"], 1, 2));
    until("the living one is registered", || async { alive.is_published() }).await;
    assert!(alive.update(|record| record.blocks = 1).await);
    view.follow_until("its change", |members| members["alive"].blocks == 1)
        .await;
}

async fn a_cut_wire_loses_no_change(backend: Backend) {
    let proxy = Proxy::to(backend.endpoint()).await;
    let mut view = View::new(through(&proxy).await.watch_nodes());
    view.step().await;
    let mut client = backend.client().await;
    let mine = record("a");
    let writing = tokio::spawn(async move {
        for blocks in 1..=300 {
            let value = nodes::encode(&NodeRecord { blocks, ..mine.clone() });
            client
                .put(nodes::key("default", &mine.node_id), value, None)
                .await
                .unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    for cut_at in [30, 90, 150, 210, 270] {
        view.follow_until("some changes", |members| {
            members.get("a").is_some_and(|a| a.blocks >= cut_at)
        })
        .await;
        proxy.cut();
        view.drain_for(Duration::from_millis(100)).await;
        proxy.mend();
    }
    view.follow_until("the last change", |members| members["a"].blocks == 300)
        .await;
    writing.await.unwrap();
    let counts: Vec<u32> = view
        .events
        .iter()
        .filter_map(|event| match event {
            MembershipEvent::Put(record) => Some(record.blocks),
            MembershipEvent::Snapshot(_) | MembershipEvent::Gone { .. } => None,
        })
        .collect();
    assert_eq!(counts, (1..=300).collect::<Vec<_>>(), "every change once, in order");
    assert_eq!(view.snapshots(), 1);
}

async fn a_compaction_behind_a_cut_wire_leads_to_a_snapshot(backend: Backend) {
    let proxy = Proxy::to(backend.endpoint()).await;
    let mut view = View::new(through(&proxy).await.watch_nodes());
    let mut client = backend.client().await;
    for name in ["a", "b"] {
        let record = record(name);
        client
            .put(nodes::key("default", &record.node_id), nodes::encode(&record), None)
            .await
            .unwrap();
    }
    view.follow_until("both nodes", |members| members.len() == 2).await;
    proxy.cut();
    client
        .delete(nodes::key("default", &record("b").node_id), None)
        .await
        .unwrap();
    let late = record("c");
    client
        .put(nodes::key("default", &late.node_id), nodes::encode(&late), None)
        .await
        .unwrap();
    let now = client
        .put("unrelated", "", None)
        .await
        .unwrap()
        .header()
        .unwrap()
        .revision();
    client.compact(now, None).await.unwrap();
    proxy.mend();
    view.follow_until("the snapshot", |members| members.contains_key("c"))
        .await;
    assert_eq!((view.names(), view.snapshots()), (vec!["a", "c"], 2));
    let node = backend.store().await.register(record("d")).await.unwrap();
    view.follow_until("later changes", |members| members.contains_key("d"))
        .await;
    assert!(node.is_published());
}

async fn a_node_cut_off_for_longer_than_its_lease_comes_back(backend: Backend) {
    let proxy = Proxy::to(backend.endpoint()).await;
    let mut view = View::new(backend.store().await.watch_nodes());
    let node = through(&proxy).await.register(record("a")).await.unwrap();
    view.follow_until("the node", |members| members.len() == 1).await;
    proxy.cut();
    view.follow_until("its lease ends", |members| members.is_empty()).await;
    until("it knows", || async { !node.is_published() }).await;
    proxy.mend();
    view.follow_until("it is back", |members| members.len() == 1).await;
    until("it knows", || async { node.is_published() }).await;
}

async fn a_name_taken_meanwhile_is_not_taken_back(backend: Backend) {
    let proxy = Proxy::to(backend.endpoint()).await;
    let old = through(&proxy).await.register(record("a")).await.unwrap();
    proxy.cut();
    let new = soon("the successor", backend.store().await.register(record("a")))
        .await
        .unwrap();
    proxy.mend();
    until("the old one knows that it lost the name", || async {
        !old.is_published()
    })
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(new.is_published() && !old.is_published());
    let found = backend
        .client()
        .await
        .get(nodes::key("default", &new.record().node_id), None)
        .await
        .unwrap();
    assert_eq!(found.kvs()[0].value(), nodes::encode(&new.record()));
    new.deregister().await;
    until("the old one has its name again", || async { old.is_published() }).await;
}

async fn registering_waits_for_a_store_that_is_away(backend: Backend) {
    let proxy = Proxy::to(backend.endpoint()).await;
    let store = through(&proxy).await;
    proxy.cut();
    let registering = tokio::spawn(async move { store.register(record("a")).await });
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!registering.is_finished());
    proxy.mend();
    let node = soon("the registration", registering).await.unwrap().unwrap();
    assert!(node.is_published());
    // Not under a lease of its own making.
    let lease = backend.client().await.lease_grant(60, None).await.unwrap().id();
    let key = nodes::key("default", &node.record().node_id);
    let value = nodes::encode(&node.record());
    backend
        .client()
        .await
        .put(key, value, Some(PutOptions::new().with_lease(lease)))
        .await
        .unwrap();
    until("the record is back under the node's own lease", || async {
        let key = nodes::key("default", &node.record().node_id);
        backend.client().await.get(key, None).await.unwrap().kvs()[0].lease() != lease
    })
    .await;
}

async fn a_dead_nodes_name_is_free_even_where_a_restart_renewed_its_lease(mut backend: Backend) {
    let store = backend.store().await;
    drop(store.register(record("a")).await.unwrap());
    let successor = record("a");
    let instance = successor.instance;
    let registering = tokio::spawn(async move { store.register(successor).await });
    tokio::time::sleep(Duration::from_millis(500)).await;
    backend.stop().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    backend.start().await;
    let node = soon("the registration", registering).await.unwrap().unwrap();
    assert_eq!(node.record().instance, instance);
}
