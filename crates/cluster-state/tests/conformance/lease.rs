//! Leases: granted, renewed, ended by time and by request.

use crate::backend::Backend;
use crate::on_both;
use crate::support::{soon, until};
use etcd_client::{Error, EventType, LeaseGrantOptions, LeaseTimeToLiveOptions, PutOptions, WatchOptions};
use std::time::Duration;
use tonic::Code;

on_both!(
    a_lease_that_is_not_renewed_takes_its_keys_along,
    a_renewed_lease_lives_on,
    unknown_leases_are_told_apart,
    a_revoked_lease_takes_all_its_keys_at_one_revision,
);

async fn a_lease_that_is_not_renewed_takes_its_keys_along(backend: Backend) {
    let mut client = backend.client().await;
    let lease = client.lease_grant(1, None).await.unwrap();
    assert_eq!(lease.ttl(), 1);
    let put = client
        .put("k", "v", Some(PutOptions::new().with_lease(lease.id())))
        .await
        .unwrap();
    let from = put.header().unwrap().revision() + 1;
    let mut watch = client
        .watch("k", Some(WatchOptions::new().with_start_revision(from)))
        .await
        .unwrap();
    let deleted = soon("the deletion", async {
        loop {
            let response = watch.message().await.unwrap().unwrap();
            if let Some(event) = response.events().first() {
                return event.clone();
            }
        }
    })
    .await;
    assert_eq!(deleted.event_type(), EventType::Delete);
    assert!(client.get("k", None).await.unwrap().kvs().is_empty());
    assert_eq!(client.lease_time_to_live(lease.id(), None).await.unwrap().ttl(), -1);
}

async fn a_renewed_lease_lives_on(backend: Backend) {
    let mut client = backend.client().await;
    let lease = client.lease_grant(2, None).await.unwrap().id();
    client
        .put("k", "v", Some(PutOptions::new().with_lease(lease)))
        .await
        .unwrap();
    let (mut keeper, mut answers) = client.lease_keep_alive(lease).await.unwrap();
    // Twice its life, renewed each fourth of it.
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        keeper.keep_alive().await.unwrap();
        let answer = answers.message().await.unwrap().unwrap();
        assert_eq!((answer.id(), answer.ttl()), (lease, 2));
    }
    assert_eq!(client.get("k", None).await.unwrap().kvs()[0].lease(), lease);
    let view = client
        .lease_time_to_live(lease, Some(LeaseTimeToLiveOptions::new().with_keys()))
        .await
        .unwrap();
    assert_eq!((view.granted_ttl(), view.keys()), (2, [b"k".to_vec()].as_slice()));
    assert!((1..=2).contains(&view.ttl()), "{}", view.ttl());
    until("the lease ends once it is not renewed", || async {
        client.clone().get("k", None).await.unwrap().kvs().is_empty()
    })
    .await;
    keeper.keep_alive().await.unwrap();
    assert_eq!(answers.message().await.unwrap().unwrap().ttl(), 0);
}

async fn unknown_leases_are_told_apart(backend: Backend) {
    let mut client = backend.client().await;
    assert!(matches!(
        client.lease_keep_alive(99).await,
        Err(Error::LeaseKeepAliveError(_))
    ));
    assert_eq!(client.lease_time_to_live(99, None).await.unwrap().ttl(), -1);
    match client.lease_revoke(99).await {
        Err(Error::GRpcStatus(status)) => assert_eq!(status.code(), Code::NotFound),
        other => panic!("{other:?}"),
    }
    let granted = client
        .lease_grant(10, Some(LeaseGrantOptions::new().with_id(99)))
        .await
        .unwrap();
    assert_eq!(granted.id(), 99);
    match client.lease_grant(10, Some(LeaseGrantOptions::new().with_id(99))).await {
        Err(Error::GRpcStatus(status)) => assert_eq!(status.code(), Code::FailedPrecondition),
        other => panic!("{other:?}"),
    }
    let all = client.leases().await.unwrap();
    assert_eq!(all.leases().iter().map(|lease| lease.id()).collect::<Vec<_>>(), [99]);
}

async fn a_revoked_lease_takes_all_its_keys_at_one_revision(backend: Backend) {
    let mut client = backend.client().await;
    let lease = client.lease_grant(60, None).await.unwrap().id();
    let other = client.lease_grant(60, None).await.unwrap().id();
    let under = |lease| Some(PutOptions::new().with_lease(lease));
    for key in ["k/1", "k/2", "k/3", "k/4"] {
        client.put(key, "v", under(lease)).await.unwrap();
    }
    client.put("k/3", "v", under(other)).await.unwrap();
    let last = client.put("k/4", "v", None).await.unwrap().header().unwrap().revision();
    let watch = WatchOptions::new().with_prefix().with_start_revision(last + 1);
    let mut watch = client.watch("k/", Some(watch)).await.unwrap();
    assert!(soon("created", watch.message()).await.unwrap().unwrap().created());
    let revoked = client.lease_revoke(lease).await.unwrap();
    assert!(revoked.header().unwrap().revision() >= last);
    let response = soon("the deletions", watch.message()).await.unwrap().unwrap();
    let mut deleted: Vec<_> = response
        .events()
        .iter()
        .map(|event| {
            (
                event.kv().unwrap().key_str().unwrap().to_owned(),
                event.kv().unwrap().mod_revision(),
            )
        })
        .collect();
    deleted.sort();
    assert_eq!(deleted, [("k/1".to_owned(), last + 1), ("k/2".to_owned(), last + 1)]);
}
