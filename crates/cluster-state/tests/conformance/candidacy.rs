//! Who leads: one at a time, whatever happens to it.

use crate::backend::Backend;
use crate::on_both;
use crate::support::until;
use baton_cluster_state::{AdviceRecord, Candidacy, NodeCounts, Standing};
use baton_types::Instance;

on_both!(
    one_leads_and_the_next_one_takes_over,
    a_dead_leader_is_followed_once_its_lease_ends,
    a_wiped_store_has_a_leader_again,
);

fn advice(leader: Instance, prefill: u32) -> AdviceRecord {
    AdviceRecord {
        leader,
        mode: "apply".to_owned(),
        unix_s: 1,
        model: "stub".to_owned(),
        slo: "ttft_p90=1000ms".to_owned(),
        ready: NodeCounts { prefill: 1, decode: 1 },
        target: NodeCounts { prefill, decode: 1 },
        requests: 0,
        judged: 0,
        attainment: None,
        reasons: Vec::new(),
        change: None,
        hold: None,
        rehearsed: Vec::new(),
        last: None,
    }
}

fn term(candidacy: &Candidacy) -> Option<i64> {
    match candidacy.standing() {
        Standing::Leads { term } => Some(term),
        Standing::Follows(_) | Standing::Unknown => None,
    }
}

async fn leads(candidacy: &Candidacy) -> i64 {
    until("it leads", || async { term(candidacy).is_some() }).await;
    term(candidacy).unwrap()
}

async fn one_leads_and_the_next_one_takes_over(backend: Backend) {
    let (a, b) = (Instance(1), Instance(2));
    let store = backend.store().await;
    assert_eq!(store.advice().await.unwrap(), None);
    let first = store.stand(a);
    let of_first = leads(&first).await;
    let second = backend.store().await.stand(b);
    until("it follows", || async { second.standing() == Standing::Follows(a) }).await;
    assert!(first.publish(of_first, &advice(a, 2)).await.unwrap());
    assert!(!second.publish(of_first - 1, &advice(b, 9)).await.unwrap());
    first.resign().await;
    let of_second = leads(&second).await;
    assert!(of_second > of_first);
    // What a leader of the past still wants to say is not heard, and what it said stands.
    let late = backend.store().await.stand(Instance(3));
    assert!(!late.publish(of_first, &advice(a, 9)).await.unwrap());
    assert_eq!(store.advice().await.unwrap(), Some(advice(a, 2)));
    assert!(second.publish(of_second, &advice(b, 3)).await.unwrap());
    assert_eq!(store.advice().await.unwrap(), Some(advice(b, 3)));
}

async fn a_dead_leader_is_followed_once_its_lease_ends(backend: Backend) {
    let first = backend.store().await.stand(Instance(1));
    leads(&first).await;
    let second = backend.store().await.stand(Instance(2));
    until("it follows", || async {
        second.standing() == Standing::Follows(Instance(1))
    })
    .await;
    drop(first);
    leads(&second).await;
}

async fn a_wiped_store_has_a_leader_again(mut backend: Backend) {
    let candidacy = backend.store().await.stand(Instance(1));
    let before = leads(&candidacy).await;
    backend.stop().await;
    until("it counts itself out", || async {
        candidacy.standing() == Standing::Unknown
    })
    .await;
    backend.wipe().await;
    leads(&candidacy).await;
    assert!(before > 0);
}
