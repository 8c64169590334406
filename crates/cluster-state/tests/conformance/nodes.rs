//! Registration and the watch over it, while the store is well.

use crate::backend::{Backend, options_for};
use crate::on_both;
use crate::support::{View, record, soon, until};
use baton_cluster_state::keys::nodes;
use baton_cluster_state::{ClaimError, Credentials, MembershipEvent, NodeRecord, RegisterError, Store, StoreError};
use baton_node_runtime::{Clock, Supervisor};
use baton_types::{Instance, NodeId, NodeState};
use etcd_client::{GetOptions, PermissionType};
use std::time::{Duration, Instant};

on_both!(
    a_node_comes_changes_and_goes,
    a_living_nodes_name_is_taken,
    a_dead_nodes_name_is_free_once_its_lease_ends,
    a_lost_lease_is_replaced,
    a_deleted_record_is_written_again,
    a_record_that_cannot_be_read_is_no_member,
    a_snapshot_spans_pages,
    watches_are_gap_free_under_churn,
    an_embedded_store_serves_one_coordinator,
    everything_ends_with_its_supervisor,
);

async fn a_node_comes_changes_and_goes(backend: Backend) {
    let store = backend.store().await;
    let mut view = View::new(backend.store().await.watch_nodes());
    assert_eq!(view.step().await, MembershipEvent::Snapshot(Vec::new()));
    let mine = record("a");
    let registration = store.register(mine.clone()).await.unwrap();
    assert!(registration.is_published());
    assert_eq!(view.step().await, MembershipEvent::Put(mine.clone()));
    assert!(registration.update(|record| record.state = NodeState::Ready).await);
    let ready = NodeRecord {
        state: NodeState::Ready,
        ..mine.clone()
    };
    assert_eq!(registration.record(), ready);
    assert_eq!(view.step().await, MembershipEvent::Put(ready));
    let other = NodeId::new("b");
    registration.update(|record| record.node_id = other).await;
    assert_eq!(registration.record().node_id, mine.node_id, "a name is for life");
    registration.deregister().await;
    view.follow_until("the node goes", |members| members.is_empty()).await;
    let gone = MembershipEvent::Gone {
        node_id: mine.node_id,
        instance: mine.instance,
    };
    assert_eq!(view.events.last(), Some(&gone));
    assert_eq!(view.snapshots(), 1);
}

async fn a_living_nodes_name_is_taken(backend: Backend) {
    let store = backend.store().await;
    let first = store.register(record("a")).await.unwrap();
    let refused = soon("the refusal", backend.store().await.register(record("a"))).await;
    let error = refused.map(|_| ()).unwrap_err();
    assert!(matches!(&error, RegisterError::NameTaken { by, .. } if *by == first.record().instance));
    assert!(error.to_string().contains("--node-id") && !error.is_retryable());
    assert!(first.is_published());
    for name in ["", "a/b"] {
        let error = store.register(record(name)).await.map(|_| ()).unwrap_err();
        assert!(matches!(error, RegisterError::InvalidName { .. }));
    }
}

async fn a_dead_nodes_name_is_free_once_its_lease_ends(backend: Backend) {
    let store = backend.store().await;
    let mut view = View::new(store.watch_nodes());
    drop(store.register(record("a")).await.unwrap());
    let successor = record("a");
    let instance = successor.instance;
    let registration = soon("the successor", backend.store().await.register(successor))
        .await
        .unwrap();
    assert_eq!(registration.record().instance, instance);
    view.follow_until("the successor", |members| {
        members.get("a").is_some_and(|a| a.instance == instance)
    })
    .await;
}

async fn a_lost_lease_is_replaced(backend: Backend) {
    let store = backend.store().await;
    let mut view = View::new(store.watch_nodes());
    let registration = store.register(record("a")).await.unwrap();
    view.follow_until("the node", |members| members.len() == 1).await;
    let mut client = backend.client().await;
    for lease in client.leases().await.unwrap().leases() {
        client.lease_revoke(lease.id()).await.unwrap();
    }
    view.follow_until("the node goes", |members| members.is_empty()).await;
    view.follow_until("the node is back", |members| members.len() == 1)
        .await;
    until("the registration knows", || async { registration.is_published() }).await;
}

async fn a_deleted_record_is_written_again(backend: Backend) {
    let store = backend.store().await;
    let mut view = View::new(store.watch_nodes());
    let registration = store.register(record("a")).await.unwrap();
    view.follow_until("the node", |members| members.len() == 1).await;
    backend
        .client()
        .await
        .delete(nodes::key("default", &registration.record().node_id), None)
        .await
        .unwrap();
    view.follow_until("the node goes", |members| members.is_empty()).await;
    view.follow_until("the node is back", |members| members.len() == 1)
        .await;
}

async fn a_record_that_cannot_be_read_is_no_member(backend: Backend) {
    let mut client = backend.client().await;
    client.put("/baton/v1/default/nodes/noise", "{", None).await.unwrap();
    client
        .put("/baton/v1/default/nodes/lie", nodes::encode(&record("other")), None)
        .await
        .unwrap();
    client
        .put("/baton/v1/elsewhere/nodes/a", nodes::encode(&record("a")), None)
        .await
        .unwrap();
    let store = backend.store().await;
    let mut view = View::new(store.watch_nodes());
    assert_eq!(view.step().await, MembershipEvent::Snapshot(Vec::new()));
    client.put("/baton/v1/default/nodes/noise", "]", None).await.unwrap();
    client.delete("/baton/v1/default/nodes/noise", None).await.unwrap();
    let registration = store.register(record("noise")).await.unwrap();
    assert_eq!(view.step().await, MembershipEvent::Put(registration.record()));
    // A name whose record cannot be read is free.
    let registration = store.register(record("lie")).await.unwrap();
    assert_eq!(view.step().await, MembershipEvent::Put(registration.record()));
}

async fn a_snapshot_spans_pages(backend: Backend) {
    let mut client = backend.client().await;
    for chunk in 0..25 {
        let puts: Vec<_> = (0..100)
            .map(|i| record(&format!("n{:04}", 100 * chunk + i)))
            .map(|record| etcd_client::TxnOp::put(nodes::key("default", &record.node_id), nodes::encode(&record), None))
            .collect();
        client.txn(etcd_client::Txn::new().and_then(puts)).await.unwrap();
    }
    let mut view = View::new(backend.store().await.watch_nodes());
    view.step().await;
    assert_eq!((view.members.len(), view.snapshots()), (2_500, 1));
}

async fn watches_are_gap_free_under_churn(backend: Backend) {
    let mut view = View::new(backend.store().await.watch_nodes());
    view.step().await;
    let mut churning = Vec::new();
    for name in ["a", "b", "c", "d"] {
        let store = backend.store().await;
        churning.push(tokio::spawn(async move {
            for _ in 0..5 {
                let registration = store.register(record(name)).await.unwrap();
                for _ in 0..5 {
                    assert!(registration.update(|record| record.blocks += 1).await);
                }
                registration.deregister().await;
            }
            store.register(record(name)).await.unwrap()
        }));
    }
    let mut last = Vec::new();
    for task in churning {
        last.push(task.await.unwrap());
    }
    let settled: Vec<Instance> = last.iter().map(|registration| registration.record().instance).collect();
    view.follow_until("the last lives", |members| {
        members.values().map(|member| member.instance).collect::<Vec<_>>() == settled
    })
    .await;
    assert_eq!((view.snapshots(), view.gone()), (1, 20));
    for name in ["a", "b", "c", "d"] {
        let counts: Vec<u32> = view
            .events
            .iter()
            .filter_map(|event| match event {
                MembershipEvent::Put(record) if record.node_id.as_str() == name => Some(record.blocks),
                _ => None,
            })
            .collect();
        let lives = [0, 1, 2, 3, 4, 5].repeat(5);
        assert_eq!(
            counts,
            [lives, vec![0]].concat(),
            "every change of {name}, in order, once"
        );
    }
}

async fn an_embedded_store_serves_one_coordinator(backend: Backend) {
    let (mine, other) = (Instance::random(), Instance::random());
    let store = backend.store().await;
    store.claim_coordinator(mine).await.unwrap();
    store.claim_coordinator(mine).await.unwrap();
    let options = baton_cluster_state::StoreOptions {
        cluster: "another".to_owned(),
        ..backend.options()
    };
    let second = Store::connect(options, Clock::new(), Supervisor::new()).await.unwrap();
    let claimed = second.claim_coordinator(other).await;
    if backend.is_etcd() {
        claimed.unwrap();
        let found = backend
            .client()
            .await
            .get("", Some(GetOptions::new().with_all_keys()))
            .await
            .unwrap();
        let keys: Vec<_> = found.kvs().iter().map(|kv| kv.key_str().unwrap()).collect();
        assert_eq!(keys, ["/baton/v1/another/store_id", "/baton/v1/default/store_id"]);
    } else {
        let error = claimed.unwrap_err();
        assert!(
            matches!(&error, ClaimError::EmbeddedElsewhere { owner, .. } if *owner == mine),
            "{error}"
        );
        assert!(error.to_string().contains("--store"));
    }
}

async fn everything_ends_with_its_supervisor(backend: Backend) {
    let supervisor = Supervisor::new();
    let store = Store::connect(backend.options(), Clock::new(), supervisor.clone())
        .await
        .unwrap();
    let mut view = View::new(store.watch_nodes());
    let dropped = store.watch_nodes();
    let registration = store.register(record("a")).await.unwrap();
    view.follow_until("the node", |members| members.len() == 1).await;
    drop(dropped);
    until("a dropped watch ends", || async { supervisor.tasks() == 2 }).await;
    supervisor.begin_shutdown();
    registration.deregister().await;
    supervisor.join(Duration::from_secs(10)).await.unwrap();
    let found = backend
        .client()
        .await
        .get(nodes::prefix("default"), Some(GetOptions::new().with_prefix()))
        .await;
    assert!(found.unwrap().kvs().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_not_there_is_named_quickly() {
    // Bound and never listened on, so that nobody else takes the port.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let endpoint = socket.local_addr().unwrap().to_string();
    let started = Instant::now();
    let options = baton_cluster_state::StoreOptions {
        connect_timeout: Duration::from_secs(1),
        ..options_for(endpoint.clone())
    };
    let error = Store::connect(options, Clock::new(), Supervisor::new())
        .await
        .map(|_| ())
        .unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(10));
    assert!(error.is_retryable());
    let text = error.to_string();
    assert!(
        text.contains("--store") && text.contains(&endpoint) && text.contains("refused"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_with_users_wants_the_right_one() {
    let mut backend = Backend::etcd().await;
    let mut client = backend.client().await;
    client.user_add("root", "secret", None).await.unwrap();
    client
        .user_grant_role("root", "root")
        .await
        .unwrap_or_else(|error| panic!("{error}"));
    client.role_add("baton").await.unwrap();
    let all = etcd_client::Permission::new(PermissionType::Readwrite, "/baton/").with_prefix();
    client.role_grant_permission("baton", all).await.unwrap();
    client.user_add("baton", "p:w", None).await.unwrap();
    client.user_grant_role("baton", "baton").await.unwrap();
    client.auth_enable().await.unwrap();

    let with_user = |user: Option<&str>| baton_cluster_state::StoreOptions {
        user: user.map(|user| user.parse::<Credentials>().unwrap()),
        ..backend.options()
    };
    for wrong in [None, Some("baton:wrong"), Some("nobody:p:w")] {
        let error = Store::connect(with_user(wrong), Clock::new(), Supervisor::new())
            .await
            .map(|_| ())
            .unwrap_err();
        assert!(matches!(error, StoreError::Denied { .. }), "{wrong:?}: {error}");
        assert!(error.to_string().contains("--etcd-user"));
    }
    let store = Store::connect(with_user(Some("baton:p:w")), Clock::new(), Supervisor::new())
        .await
        .unwrap();
    let mut view = View::new(store.watch_nodes());
    let registration = store.register(record("a")).await.unwrap();
    view.follow_until("the node", |members| members.len() == 1).await;
    backend.stop().await;
    backend.start_without_probe().await;
    until("the registration is renewed after a restart", || async {
        store.reachable() && registration.update(|record| record.blocks += 1).await
    })
    .await;
    view.follow_until("the change", |members| members.values().any(|member| member.blocks > 0))
        .await;
}
