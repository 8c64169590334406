//! Range, put, delete range, txn, compact.

use crate::backend::Backend;
use crate::on_both;
use etcd_client::{
    Client, Compare, CompareOp, DeleteOptions, Error, GetOptions, KeyValue, PutOptions, SortOrder, SortTarget, Txn,
    TxnOp, TxnOpResponse,
};
use tonic::Code;

on_both!(
    pairs_have_versions_and_revisions,
    ranges_page_sort_and_look_back,
    deletes_tell_what_they_took,
    txns_are_all_or_nothing,
    txns_compare_every_target,
    txns_refuse_a_key_written_twice,
    compacted_and_future_revisions_are_refused,
    malformed_requests_are_refused,
);

fn code<T: std::fmt::Debug>(result: Result<T, Error>) -> Code {
    match result {
        Err(Error::GRpcStatus(status)) => status.code(),
        other => panic!("expected a status, got {other:?}"),
    }
}

async fn revision(client: &mut Client) -> i64 {
    client.get("any", None).await.unwrap().header().unwrap().revision()
}

fn keys(kvs: &[KeyValue]) -> Vec<&str> {
    kvs.iter().map(|kv| kv.key_str().unwrap()).collect()
}

async fn pairs_have_versions_and_revisions(backend: Backend) {
    let mut client = backend.client().await;
    let start = revision(&mut client).await;
    let first = client.put("k", "1", None).await.unwrap();
    assert_eq!(first.header().unwrap().revision(), start + 1);
    assert!(first.prev_key().is_none());
    let second = client
        .put("k", "2", Some(PutOptions::new().with_prev_key()))
        .await
        .unwrap();
    assert_eq!(second.prev_key().unwrap().value(), b"1");
    let found = client.get("k", None).await.unwrap();
    assert_eq!(found.header().unwrap().revision(), start + 2);
    let kv = &found.kvs()[0];
    assert_eq!((kv.value(), kv.version()), (b"2".as_slice(), 2));
    assert_eq!(
        (kv.create_revision(), kv.mod_revision(), kv.lease()),
        (start + 1, start + 2, 0)
    );
    client.delete("k", None).await.unwrap();
    client.put("k", "3", None).await.unwrap();
    let kv = client.get("k", None).await.unwrap().kvs()[0].clone();
    assert_eq!((kv.version(), kv.create_revision()), (1, start + 4));
    let kept = client
        .put("k", "", Some(PutOptions::new().with_ignore_value()))
        .await
        .unwrap();
    assert_eq!(kept.header().unwrap().revision(), start + 5);
    assert_eq!(client.get("k", None).await.unwrap().kvs()[0].value(), b"3");
}

async fn ranges_page_sort_and_look_back(backend: Backend) {
    let mut client = backend.client().await;
    for key in ["a/1", "a/2", "a/3", "a/4", "b/1"] {
        client.put(key, format!("v{key}"), None).await.unwrap();
    }
    let then = revision(&mut client).await;
    client.put("a/5", "late", None).await.unwrap();
    client.delete("a/1", None).await.unwrap();

    let prefix = GetOptions::new().with_prefix();
    let now = client.get("a/", Some(prefix.clone())).await.unwrap();
    assert_eq!(keys(now.kvs()), ["a/2", "a/3", "a/4", "a/5"]);
    let back = client
        .get("a/", Some(prefix.clone().with_revision(then)))
        .await
        .unwrap();
    assert_eq!(keys(back.kvs()), ["a/1", "a/2", "a/3", "a/4"]);
    assert_eq!(back.header().unwrap().revision(), then + 2);

    let page = client
        .get("a/", Some(prefix.clone().with_limit(3).with_revision(then)))
        .await
        .unwrap();
    assert_eq!(
        (keys(page.kvs()), page.more(), page.count()),
        (vec!["a/1", "a/2", "a/3"], true, 4)
    );
    let options = GetOptions::new().with_range("a0").with_limit(3).with_revision(then);
    let page = client.get("a/3\0", Some(options)).await.unwrap();
    assert_eq!((keys(page.kvs()), page.more(), page.count()), (vec!["a/4"], false, 1));

    let counted = client.get("a/", Some(prefix.clone().with_count_only())).await.unwrap();
    assert_eq!((counted.count(), counted.kvs().len()), (4, 0));
    let bare = client.get("a/", Some(prefix.clone().with_keys_only())).await.unwrap();
    assert_eq!(keys(bare.kvs()).len(), 4);
    assert!(
        bare.kvs()
            .iter()
            .all(|kv| kv.value().is_empty() && kv.mod_revision() > 0)
    );

    let sorted = prefix
        .clone()
        .with_sort(SortTarget::Mod, SortOrder::Descend)
        .with_limit(2);
    let sorted = client.get("a/", Some(sorted)).await.unwrap();
    assert_eq!((keys(sorted.kvs()), sorted.more()), (vec!["a/5", "a/4"], true));
    let from = client
        .get("a/4", Some(GetOptions::new().with_from_key()))
        .await
        .unwrap();
    assert_eq!(keys(from.kvs()), ["a/4", "a/5", "b/1"]);
    let recent = client
        .get("a/", Some(prefix.with_min_mod_revision(then + 1)))
        .await
        .unwrap();
    assert_eq!(keys(recent.kvs()), ["a/5"]);
}

async fn deletes_tell_what_they_took(backend: Backend) {
    let mut client = backend.client().await;
    for key in ["a/1", "a/2", "b"] {
        client.put(key, key, None).await.unwrap();
    }
    let before = revision(&mut client).await;
    let taken = client
        .delete("a/", Some(DeleteOptions::new().with_prefix().with_prev_key()))
        .await
        .unwrap();
    assert_eq!((taken.deleted(), keys(taken.prev_kvs())), (2, vec!["a/1", "a/2"]));
    assert_eq!(taken.header().unwrap().revision(), before + 1);
    let nothing = client
        .delete("a/", Some(DeleteOptions::new().with_prefix()))
        .await
        .unwrap();
    assert_eq!(
        (nothing.deleted(), nothing.header().unwrap().revision()),
        (0, before + 1)
    );
}

async fn txns_are_all_or_nothing(backend: Backend) {
    let mut client = backend.client().await;
    let absent = Compare::create_revision("k", CompareOp::Equal, 0);
    let create = Txn::new()
        .when([absent.clone()])
        .and_then([
            TxnOp::put("k", "1", None),
            TxnOp::put("l", "1", None),
            TxnOp::get("k", None),
        ])
        .or_else([TxnOp::get("k", None)]);
    let before = revision(&mut client).await;
    let done = client.txn(create.clone()).await.unwrap();
    assert!(done.succeeded());
    assert_eq!(done.header().unwrap().revision(), before + 1);
    match &done.op_responses()[2] {
        TxnOpResponse::Get(found) => assert_eq!(found.kvs()[0].value(), b"1"),
        other => panic!("{other:?}"),
    }
    let both = client.get("k", Some(GetOptions::new().with_range("m"))).await.unwrap();
    assert!(both.kvs().iter().all(|kv| kv.mod_revision() == before + 1));

    let failed = client.txn(create).await.unwrap();
    assert!(!failed.succeeded());
    assert_eq!(failed.header().unwrap().revision(), before + 1);
    match &failed.op_responses()[0] {
        TxnOpResponse::Get(found) => assert_eq!(found.kvs()[0].mod_revision(), before + 1),
        other => panic!("{other:?}"),
    }
    let unknown_lease = PutOptions::new().with_lease(0x7777);
    let half = Txn::new().and_then([TxnOp::put("x", "1", None), TxnOp::put("y", "1", Some(unknown_lease))]);
    assert_eq!(code(client.txn(half).await), Code::NotFound);
    assert!(client.get("x", None).await.unwrap().kvs().is_empty());
}

async fn txns_compare_every_target(backend: Backend) {
    let mut client = backend.client().await;
    let lease = client.lease_grant(60, None).await.unwrap().id();
    client.put("k", "m", None).await.unwrap();
    let second = client
        .put("k", "m", Some(PutOptions::new().with_lease(lease)))
        .await
        .unwrap();
    let modified = second.header().unwrap().revision();
    let holds = async |compare: Compare| {
        let mut client = client.clone();
        client.txn(Txn::new().when([compare])).await.unwrap().succeeded()
    };
    assert!(holds(Compare::version("k", CompareOp::Equal, 2)).await);
    assert!(!holds(Compare::version("k", CompareOp::Less, 2)).await);
    assert!(holds(Compare::version("none", CompareOp::Equal, 0)).await);
    assert!(holds(Compare::create_revision("k", CompareOp::Equal, modified - 1)).await);
    assert!(holds(Compare::mod_revision("k", CompareOp::Greater, modified - 1)).await);
    assert!(!holds(Compare::mod_revision("k", CompareOp::NotEqual, modified)).await);
    assert!(holds(Compare::value("k", CompareOp::Less, "n")).await);
    assert!(!holds(Compare::value("none", CompareOp::NotEqual, "n")).await);
    assert!(holds(Compare::lease("k", CompareOp::Equal, lease)).await);
    assert!(!holds(Compare::lease("none", CompareOp::NotEqual, 0)).await);
    let (yes, no) = (
        Compare::version("k", CompareOp::Equal, 2),
        Compare::version("k", CompareOp::Equal, 3),
    );
    assert!(!client.txn(Txn::new().when([yes, no])).await.unwrap().succeeded());
}

async fn txns_refuse_a_key_written_twice(backend: Backend) {
    let mut client = backend.client().await;
    let twice = Txn::new().and_then([TxnOp::put("k", "1", None), TxnOp::put("k", "2", None)]);
    assert_eq!(code(client.txn(twice).await), Code::InvalidArgument);
    let range = Some(DeleteOptions::new().with_prefix());
    let both = Txn::new().and_then([TxnOp::put("k/1", "1", None), TxnOp::delete("k/", range)]);
    assert_eq!(code(client.txn(both).await), Code::InvalidArgument);
    let many: Vec<_> = (0..129).map(|i| TxnOp::put(format!("k{i}"), "1", None)).collect();
    assert_eq!(code(client.txn(Txn::new().and_then(many)).await), Code::InvalidArgument);
    assert!(
        client
            .get("k", Some(GetOptions::new().with_prefix()))
            .await
            .unwrap()
            .kvs()
            .is_empty()
    );
}

async fn compacted_and_future_revisions_are_refused(backend: Backend) {
    let mut client = backend.client().await;
    for value in ["1", "2", "3"] {
        client.put("k", value, None).await.unwrap();
    }
    let now = revision(&mut client).await;
    client.compact(now - 1, None).await.unwrap();
    let at = |revision| Some(GetOptions::new().with_revision(revision));
    assert_eq!(code(client.get("k", at(now - 2)).await), Code::OutOfRange);
    assert_eq!(client.get("k", at(now - 1)).await.unwrap().kvs()[0].value(), b"2");
    assert_eq!(client.get("k", at(now)).await.unwrap().kvs()[0].value(), b"3");
    assert_eq!(code(client.get("k", at(now + 1)).await), Code::OutOfRange);
    assert_eq!(code(client.compact(now - 1, None).await), Code::OutOfRange);
    assert_eq!(code(client.compact(now + 1, None).await), Code::OutOfRange);
}

async fn malformed_requests_are_refused(backend: Backend) {
    let mut client = backend.client().await;
    assert_eq!(code(client.put("", "v", None).await), Code::InvalidArgument);
    assert_eq!(code(client.get("", None).await), Code::InvalidArgument);
    assert_eq!(code(client.delete("", None).await), Code::InvalidArgument);
    let ignore = Some(PutOptions::new().with_ignore_value());
    assert_eq!(
        code(client.put("none", "", ignore.clone()).await),
        Code::InvalidArgument
    );
    assert_eq!(code(client.put("none", "v", ignore).await), Code::InvalidArgument);
    let lease = Some(PutOptions::new().with_lease(0x1234));
    assert_eq!(code(client.put("k", "v", lease).await), Code::NotFound);
    assert_eq!(
        code(client.put("k", vec![0; 7 << 18], None).await),
        Code::InvalidArgument
    );
    if !backend.is_etcd() {
        assert_eq!(code(client.status().await), Code::Unimplemented);
        assert_eq!(code(client.member_list().await), Code::Unimplemented);
        let nested = Txn::new().and_then([TxnOp::txn(Txn::new())]);
        assert_eq!(code(client.txn(nested).await), Code::Unimplemented);
    }
}
