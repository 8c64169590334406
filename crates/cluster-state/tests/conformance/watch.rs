//! Watches: created first, from any revision that is still known, whole revisions in order.

use crate::backend::Backend;
use crate::on_both;
use crate::support::soon;
use etcd_client::{
    Client, DeleteOptions, Event, EventType, Txn, TxnOp, WatchFilterType, WatchOptions, WatchResponse, WatchStream,
};

on_both!(
    history_and_present_come_in_order,
    one_revision_is_never_split,
    deletions_and_previous_values_are_told,
    a_watch_from_a_compacted_revision_is_cancelled,
    progress_and_cancellation_are_answered,
    several_watches_share_a_stream,
    thousands_of_events_arrive_whole,
);

async fn next(watch: &mut WatchStream) -> WatchResponse {
    soon("a watch response", watch.message())
        .await
        .unwrap()
        .expect("the watch goes on")
}

async fn created(watch: &mut WatchStream) -> WatchResponse {
    let response = next(watch).await;
    assert!(
        response.created() && !response.canceled() && response.events().is_empty(),
        "{response:?}"
    );
    response
}

async fn put(client: &mut Client, key: &str, value: &str) -> i64 {
    client.put(key, value, None).await.unwrap().header().unwrap().revision()
}

fn text(event: &Event) -> (String, String, i64) {
    let kv = event.kv().unwrap();
    (
        kv.key_str().unwrap().to_owned(),
        kv.value_str().unwrap().to_owned(),
        kv.mod_revision(),
    )
}

async fn history_and_present_come_in_order(backend: Backend) {
    let mut client = backend.client().await;
    let first = put(&mut client, "k/1", "old").await;
    put(&mut client, "other", "x").await;
    put(&mut client, "k/1", "new").await;
    let options = WatchOptions::new().with_prefix().with_start_revision(first);
    let mut watch = client.watch("k/", Some(options)).await.unwrap();
    assert_eq!(created(&mut watch).await.header().unwrap().revision(), first + 2);
    put(&mut client, "k/2", "live").await;
    let mut seen = Vec::new();
    while seen.len() < 3 {
        seen.extend(next(&mut watch).await.events().iter().map(text));
    }
    let expected = [
        ("k/1", "old", first),
        ("k/1", "new", first + 2),
        ("k/2", "live", first + 3),
    ];
    assert_eq!(
        seen,
        expected.map(|(key, value, revision)| (key.to_owned(), value.to_owned(), revision))
    );

    let mut late = client
        .watch("k/", Some(WatchOptions::new().with_prefix()))
        .await
        .unwrap();
    created(&mut late).await;
    let live = put(&mut client, "k/3", "now").await;
    assert_eq!(text(&next(&mut late).await.events()[0]).2, live);
}

async fn one_revision_is_never_split(backend: Backend) {
    let mut client = backend.client().await;
    let start = put(&mut client, "start", "").await;
    let large = "x".repeat(10_000);
    for round in 0..20 {
        let puts: Vec<_> = (0..50)
            .map(|i| TxnOp::put(format!("k/{round}/{i}"), large.as_str(), None))
            .collect();
        client.txn(Txn::new().and_then(puts)).await.unwrap();
    }
    let options = WatchOptions::new().with_prefix().with_start_revision(start);
    // 10 MB of history: more than a default message.
    let mut watch = client
        .watch_client()
        .max_decoding_message_size(64 << 20)
        .watch("k/", Some(options))
        .await
        .unwrap();
    created(&mut watch).await;
    let mut last = start;
    while last < start + 20 {
        let response = next(&mut watch).await;
        let revisions: Vec<i64> = response
            .events()
            .iter()
            .map(|event| event.kv().unwrap().mod_revision())
            .collect();
        assert_eq!(
            revisions[0],
            last + 1,
            "a revision came in two responses, or not at all"
        );
        for revision in revisions[0]..=revisions[revisions.len() - 1] {
            assert_eq!(revisions.iter().filter(|seen| **seen == revision).count(), 50);
        }
        last = revisions[revisions.len() - 1];
    }
}

async fn deletions_and_previous_values_are_told(backend: Backend) {
    let mut client = backend.client().await;
    let options = WatchOptions::new().with_prefix().with_prev_key();
    let mut watch = client.watch("k/", Some(options)).await.unwrap();
    created(&mut watch).await;
    let no_puts = WatchOptions::new().with_prefix().with_filters([WatchFilterType::NoPut]);
    let mut deletions = client.watch("k/", Some(no_puts)).await.unwrap();
    created(&mut deletions).await;
    put(&mut client, "k/1", "1").await;
    put(&mut client, "k/1", "2").await;
    client
        .delete("k/", Some(DeleteOptions::new().with_prefix()))
        .await
        .unwrap();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        seen.extend(next(&mut watch).await.events().to_vec());
    }
    let before: Vec<_> = seen
        .iter()
        .map(|event| event.prev_kv().map(|kv| kv.value().to_vec()))
        .collect();
    assert_eq!(before, [None, Some(b"1".to_vec()), Some(b"2".to_vec())]);
    assert_eq!(seen[2].event_type(), EventType::Delete);
    let gone = seen[2].kv().unwrap();
    assert_eq!(
        (gone.key(), gone.value(), gone.create_revision(), gone.version()),
        (b"k/1".as_slice(), b"".as_slice(), 0, 0)
    );
    let only = next(&mut deletions).await;
    assert_eq!(only.events().len(), 1);
    assert_eq!(only.events()[0].event_type(), EventType::Delete);
}

async fn a_watch_from_a_compacted_revision_is_cancelled(backend: Backend) {
    let mut client = backend.client().await;
    let first = put(&mut client, "k", "1").await;
    for value in ["2", "3", "4"] {
        put(&mut client, "k", value).await;
    }
    client.compact(first + 2, None).await.unwrap();
    let from = |revision| Some(WatchOptions::new().with_start_revision(revision));
    let mut watch = client.watch("k", from(first)).await.unwrap();
    let id = created(&mut watch).await.watch_id();
    let cancelled = next(&mut watch).await;
    assert!(cancelled.canceled());
    assert_eq!((cancelled.watch_id(), cancelled.compact_revision()), (id, first + 2));
    let mut watch = client.watch("k", from(first + 2)).await.unwrap();
    created(&mut watch).await;
    assert_eq!(text(&next(&mut watch).await.events()[0]).1, "3");
}

async fn progress_and_cancellation_are_answered(backend: Backend) {
    let mut client = backend.client().await;
    let mut watch = client.watch("k", None).await.unwrap();
    let id = created(&mut watch).await.watch_id();
    let now = put(&mut client, "other", "x").await;
    soon("progress", async {
        // etcd answers with the revision that the watch has reached, which may trail for a moment.
        loop {
            watch.request_progress().await.unwrap();
            let response = next(&mut watch).await;
            assert!(response.events().is_empty() && !response.canceled());
            if response.header().unwrap().revision() == now {
                return;
            }
        }
    })
    .await;
    watch.cancel(id).await.unwrap();
    let cancelled = next(&mut watch).await;
    assert!(cancelled.canceled() && cancelled.compact_revision() == 0);
    assert_eq!(cancelled.watch_id(), id);
}

async fn several_watches_share_a_stream(backend: Backend) {
    let mut client = backend.client().await;
    let mut watch = client.watch("a", None).await.unwrap();
    let first = created(&mut watch).await.watch_id();
    watch
        .watch("b", Some(WatchOptions::new().with_watch_id(77)))
        .await
        .unwrap();
    assert_eq!(created(&mut watch).await.watch_id(), 77);
    watch
        .watch("c", Some(WatchOptions::new().with_watch_id(77)))
        .await
        .unwrap();
    assert!(next(&mut watch).await.canceled());
    put(&mut client, "c", "").await;
    put(&mut client, "a", "").await;
    assert_eq!(next(&mut watch).await.watch_id(), first);
    put(&mut client, "b", "").await;
    assert_eq!(next(&mut watch).await.watch_id(), 77);
}

async fn thousands_of_events_arrive_whole(backend: Backend) {
    let mut client = backend.client().await;
    let mut watch = client
        .watch("k/", Some(WatchOptions::new().with_prefix()))
        .await
        .unwrap();
    created(&mut watch).await;
    let mut writer = client.clone();
    let writing = tokio::spawn(async move {
        for i in 0..40 {
            let puts: Vec<_> = (0..100)
                .map(|j| TxnOp::put(format!("k/{j}"), i.to_string(), None))
                .collect();
            writer.txn(Txn::new().and_then(puts)).await.unwrap();
        }
    });
    let mut revisions = Vec::new();
    while revisions.len() < 4_000 {
        revisions.extend(
            next(&mut watch)
                .await
                .events()
                .iter()
                .map(|event| event.kv().unwrap().mod_revision()),
        );
    }
    writing.await.unwrap();
    assert!(revisions.is_sorted());
    assert_eq!(revisions[3_999] - revisions[0], 39);
}
