//! The embedded store's whole state and what each request does to it. No IO, no clock: every call is told the time.
//! A request is checked in full before anything of it is done.

use super::history::{History, Retention};
use super::leases::{LeaseView, Leases};
use super::range::KeyRange;
use super::refusal::Refusal;
use baton_node_runtime::Moment;
use etcd_client::proto::{
    PbCompare, PbCompareTarget, PbDeleteRequest, PbDeleteResponse, PbKeyValue, PbPutRequest, PbPutResponse,
    PbRangeRequest, PbRangeResponse, PbResponseOp, PbTargetUnion, PbTxnOpRequest, PbTxnOpResponse, PbTxnRequest,
    PbTxnRequestOp, PbTxnResponse,
};
use etcd_client::{CompareOp, SortOrder, SortTarget};
use std::sync::Arc;

/// As in etcd.
const TXN_OPS_MAX: usize = 128;
/// As in etcd.
const REQUEST_BYTES_MAX: usize = 3 << 19;

#[derive(Debug)]
pub(super) struct State {
    history: History,
    leases: Leases,
}

impl State {
    pub(super) fn new(retention: Retention) -> Self {
        Self {
            history: History::new(retention),
            leases: Leases::default(),
        }
    }

    pub(super) fn history(&self) -> &History {
        &self.history
    }

    pub(super) fn range(&self, request: &PbRangeRequest) -> Result<PbRangeResponse, Refusal> {
        self.check_range(request)?;
        Ok(self.do_range(request))
    }

    pub(super) fn put(&mut self, request: PbPutRequest) -> Result<PbPutResponse, Refusal> {
        self.check_put(&request)?;
        let response = self.do_put(request);
        self.history.commit();
        Ok(response)
    }

    pub(super) fn delete_range(&mut self, request: &PbDeleteRequest) -> Result<PbDeleteResponse, Refusal> {
        check_key(&request.key)?;
        let response = self.do_delete_range(request);
        self.history.commit();
        Ok(response)
    }

    pub(super) fn txn(&mut self, request: PbTxnRequest) -> Result<PbTxnResponse, Refusal> {
        let PbTxnRequest {
            compare,
            success,
            failure,
        } = request;
        if [compare.len(), success.len(), failure.len()]
            .into_iter()
            .any(|count| count > TXN_OPS_MAX)
        {
            return Err(Refusal::TooManyOps);
        }
        check_duplicates(&success)?;
        check_duplicates(&failure)?;
        let mut succeeded = true;
        for compare in &compare {
            succeeded &= self.holds(compare)?;
        }
        let ops: Vec<PbTxnOpRequest> = (if succeeded { success } else { failure })
            .into_iter()
            .map(|op| op.request.ok_or(Refusal::NestedTxn))
            .collect::<Result<_, _>>()?;
        for op in &ops {
            match op {
                PbTxnOpRequest::RequestRange(range) => self.check_range(range)?,
                PbTxnOpRequest::RequestPut(put) => self.check_put(put)?,
                PbTxnOpRequest::RequestDeleteRange(delete) => check_key(&delete.key)?,
                PbTxnOpRequest::RequestTxn(_) => return Err(Refusal::NestedTxn),
            }
        }
        let mut responses = Vec::with_capacity(ops.len());
        for op in ops {
            let response = match op {
                PbTxnOpRequest::RequestRange(range) => PbTxnOpResponse::ResponseRange(self.do_range(&range)),
                PbTxnOpRequest::RequestPut(put) => PbTxnOpResponse::ResponsePut(self.do_put(put)),
                PbTxnOpRequest::RequestDeleteRange(delete) => {
                    PbTxnOpResponse::ResponseDeleteRange(self.do_delete_range(&delete))
                }
                PbTxnOpRequest::RequestTxn(_) => return Err(Refusal::NestedTxn),
            };
            responses.push(PbResponseOp {
                response: Some(response),
            });
        }
        self.history.commit();
        Ok(PbTxnResponse {
            header: None,
            succeeded,
            responses,
        })
    }

    pub(super) fn compact(&mut self, revision: i64) -> Result<(), Refusal> {
        self.history.compact(revision)
    }

    pub(super) fn grant(&mut self, id: i64, ttl_seconds: i64, now: Moment) -> Result<(i64, i64), Refusal> {
        self.leases.grant(id, ttl_seconds, now)
    }

    /// The granted seconds; 0 where the lease is unknown.
    pub(super) fn keep_alive(&mut self, id: i64, now: Moment) -> i64 {
        self.leases.keep_alive(id, now).unwrap_or(0)
    }

    /// Ends a lease and deletes its keys, all at one revision.
    pub(super) fn revoke(&mut self, id: i64) -> Result<(), Refusal> {
        let keys = self.leases.revoke(id).ok_or(Refusal::LeaseNotFound)?;
        for key in keys {
            self.history.delete(&key);
        }
        self.history.commit();
        Ok(())
    }

    pub(super) fn lease(&self, id: i64, now: Moment) -> Option<LeaseView> {
        self.leases.view(id, now)
    }

    pub(super) fn lease_ids(&self) -> Vec<i64> {
        self.leases.ids().collect()
    }

    /// Ends the leases that have run out.
    pub(super) fn expire(&mut self, now: Moment) {
        for id in self.leases.expired(now) {
            // Listed a moment ago, so it is there.
            let _ = self.revoke(id);
        }
    }

    pub(super) fn next_expiry(&self) -> Option<Moment> {
        self.leases.next_expiry()
    }

    fn check_range(&self, request: &PbRangeRequest) -> Result<(), Refusal> {
        check_key(&request.key)?;
        self.history.check_readable(request.revision)
    }

    fn check_put(&self, request: &PbPutRequest) -> Result<(), Refusal> {
        check_key(&request.key)?;
        if request.key.len() + request.value.len() > REQUEST_BYTES_MAX {
            return Err(Refusal::TooLarge);
        }
        if request.ignore_value && !request.value.is_empty() {
            return Err(Refusal::ValueProvided);
        }
        if request.ignore_lease && request.lease != 0 {
            return Err(Refusal::LeaseProvided);
        }
        if request.lease != 0 && !self.leases.contains(request.lease) {
            return Err(Refusal::LeaseNotFound);
        }
        if (request.ignore_value || request.ignore_lease) && self.history.get(&request.key).is_none() {
            return Err(Refusal::KeyNotFound);
        }
        Ok(())
    }

    fn do_range(&self, request: &PbRangeRequest) -> PbRangeResponse {
        let range = KeyRange::new(&request.key, &request.range_end);
        let found = self.history.range(&range, request.revision);
        if request.count_only {
            return PbRangeResponse {
                count: count(found.count()),
                ..PbRangeResponse::default()
            };
        }
        let mut found: Vec<&Arc<PbKeyValue>> = found.collect();
        let count = count(found.len());
        let below = |bound: i64, value: i64| bound == 0 || value <= bound;
        found.retain(|kv| {
            kv.mod_revision >= request.min_mod_revision
                && below(request.max_mod_revision, kv.mod_revision)
                && kv.create_revision >= request.min_create_revision
                && below(request.max_create_revision, kv.create_revision)
        });
        sort(&mut found, request);
        let limit = usize::try_from(request.limit)
            .ok()
            .filter(|limit| *limit > 0)
            .unwrap_or(usize::MAX);
        let more = found.len() > limit;
        let kvs = found
            .into_iter()
            .take(limit)
            .map(|kv| {
                let value = if request.keys_only {
                    Vec::new()
                } else {
                    kv.value.clone()
                };
                PbKeyValue {
                    key: kv.key.clone(),
                    value,
                    ..**kv
                }
            })
            .collect();
        PbRangeResponse {
            header: None,
            kvs,
            more,
            count,
        }
    }

    fn do_put(&mut self, request: PbPutRequest) -> PbPutResponse {
        let present = self.history.get(&request.key).cloned();
        let lease_before = present.as_ref().map_or(0, |kv| kv.lease);
        let lease = if request.ignore_lease {
            lease_before
        } else {
            request.lease
        };
        let value = match &present {
            Some(kv) if request.ignore_value => kv.value.clone(),
            Some(_) | None => request.value,
        };
        self.leases.attach(&request.key, lease_before, lease);
        let before = self.history.put(&request.key, value, lease);
        PbPutResponse {
            header: None,
            prev_kv: before.filter(|_| request.prev_kv).map(|kv| kv.as_ref().clone()),
        }
    }

    fn do_delete_range(&mut self, request: &PbDeleteRequest) -> PbDeleteResponse {
        let range = KeyRange::new(&request.key, &request.range_end);
        let doomed: Vec<Vec<u8>> = self.history.range(&range, 0).map(|kv| kv.key.clone()).collect();
        let mut response = PbDeleteResponse {
            deleted: count(doomed.len()),
            ..PbDeleteResponse::default()
        };
        for key in doomed {
            if let Some(before) = self.history.delete(&key) {
                self.leases.attach(&key, before.lease, 0);
                if request.prev_kv {
                    response.prev_kvs.push(before.as_ref().clone());
                }
            }
        }
        response
    }

    /// An absent key has version, revisions and lease 0, and no value: a comparison of its value fails.
    fn holds(&self, compare: &PbCompare) -> Result<bool, Refusal> {
        check_key(&compare.key)?;
        if !compare.range_end.is_empty() {
            return Err(Refusal::UnservedCompare);
        }
        let kv = self.history.get(&compare.key);
        let number = |of: fn(&PbKeyValue) -> i64| kv.map_or(0, |kv| of(kv));
        let target = PbCompareTarget::try_from(compare.target).map_err(|_| Refusal::UnservedCompare)?;
        let ordering = match (target, &compare.target_union) {
            (PbCompareTarget::Version, Some(PbTargetUnion::Version(than))) => number(|kv| kv.version).cmp(than),
            (PbCompareTarget::Create, Some(PbTargetUnion::CreateRevision(than))) => {
                number(|kv| kv.create_revision).cmp(than)
            }
            (PbCompareTarget::Mod, Some(PbTargetUnion::ModRevision(than))) => number(|kv| kv.mod_revision).cmp(than),
            (PbCompareTarget::Lease, Some(PbTargetUnion::Lease(than))) => number(|kv| kv.lease).cmp(than),
            (PbCompareTarget::Value, Some(PbTargetUnion::Value(than))) => match kv {
                Some(kv) => kv.value.cmp(than),
                None => return Ok(false),
            },
            _ => return Err(Refusal::UnservedCompare),
        };
        let result = CompareOp::try_from(compare.result).map_err(|_| Refusal::UnservedCompare)?;
        Ok(match result {
            CompareOp::Equal => ordering.is_eq(),
            CompareOp::Greater => ordering.is_gt(),
            CompareOp::Less => ordering.is_lt(),
            CompareOp::NotEqual => ordering.is_ne(),
        })
    }
}

fn count(of: usize) -> i64 {
    i64::try_from(of).unwrap_or(i64::MAX)
}

fn check_key(key: &[u8]) -> Result<(), Refusal> {
    if key.is_empty() { Err(Refusal::EmptyKey) } else { Ok(()) }
}

/// No key may be written twice by one txn.
fn check_duplicates(ops: &[PbTxnRequestOp]) -> Result<(), Refusal> {
    let mut puts: Vec<&[u8]> = Vec::new();
    let mut deletes = Vec::new();
    for op in ops {
        match &op.request {
            Some(PbTxnOpRequest::RequestPut(put)) => puts.push(&put.key),
            Some(PbTxnOpRequest::RequestDeleteRange(delete)) => {
                deletes.push(KeyRange::new(&delete.key, &delete.range_end));
            }
            Some(PbTxnOpRequest::RequestRange(_) | PbTxnOpRequest::RequestTxn(_)) | None => {}
        }
    }
    puts.sort_unstable();
    let twice = puts.windows(2).any(|pair| pair[0] == pair[1]);
    let deleted = puts.iter().any(|key| deletes.iter().any(|range| range.contains(key)));
    if twice || deleted {
        Err(Refusal::DuplicateKey)
    } else {
        Ok(())
    }
}

fn sort(found: &mut [&Arc<PbKeyValue>], request: &PbRangeRequest) {
    let target = SortTarget::try_from(request.sort_target).unwrap_or(SortTarget::Key);
    match target {
        SortTarget::Key => {}
        SortTarget::Version => found.sort_by_key(|kv| kv.version),
        SortTarget::Create => found.sort_by_key(|kv| kv.create_revision),
        SortTarget::Mod => found.sort_by_key(|kv| kv.mod_revision),
        SortTarget::Value => found.sort_by(|a, b| a.value.cmp(&b.value)),
    }
    if SortOrder::try_from(request.sort_order) == Ok(SortOrder::Descend) {
        found.reverse();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_node_runtime::Clock;
    use std::time::Duration;

    fn put(key: &str, lease: i64) -> PbPutRequest {
        PbPutRequest {
            key: key.into(),
            value: b"v".to_vec(),
            lease,
            ..PbPutRequest::default()
        }
    }

    fn keys(state: &State) -> Vec<String> {
        let all = PbRangeRequest {
            key: vec![0],
            range_end: vec![0],
            ..PbRangeRequest::default()
        };
        let found = state.range(&all).unwrap().kvs;
        found.into_iter().map(|kv| String::from_utf8(kv.key).unwrap()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_goes_with_the_lease_it_hangs_on_last() {
        let now = Clock::new().now();
        let mut state = State::new(Retention::default());
        state.grant(1, 5, now).unwrap();
        state.grant(2, 50, now).unwrap();
        for key in ["a", "b", "c", "d"] {
            state.put(put(key, 1)).unwrap();
        }
        state.put(put("b", 2)).unwrap();
        state.put(put("c", 0)).unwrap();
        state
            .delete_range(&PbDeleteRequest {
                key: b"d".to_vec(),
                ..PbDeleteRequest::default()
            })
            .unwrap();
        state.put(put("d", 0)).unwrap();
        let revision = state.history().revision();
        state.expire(now + Duration::from_secs(4));
        assert_eq!(state.history().revision(), revision);
        state.expire(now + Duration::from_secs(5));
        assert_eq!(keys(&state), ["b", "c", "d"]);
        assert_eq!(state.history().revision(), revision + 1);
        assert_eq!(state.keep_alive(1, now), 0);
        assert_eq!(state.put(put("a", 1)), Err(Refusal::LeaseNotFound));
        state.revoke(2).unwrap();
        assert_eq!(keys(&state), ["c", "d"]);
    }

    #[test]
    fn a_refused_txn_changes_nothing() {
        let mut state = State::new(Retention::default());
        let op = |request| PbTxnRequestOp { request: Some(request) };
        let twice = PbTxnRequest {
            success: vec![
                op(PbTxnOpRequest::RequestPut(put("a", 0))),
                op(PbTxnOpRequest::RequestPut(put("a", 0))),
            ],
            ..PbTxnRequest::default()
        };
        assert_eq!(state.txn(twice), Err(Refusal::DuplicateKey));
        let late_fault = PbTxnRequest {
            success: vec![
                op(PbTxnOpRequest::RequestPut(put("a", 0))),
                op(PbTxnOpRequest::RequestPut(put("b", 9))),
            ],
            ..PbTxnRequest::default()
        };
        assert_eq!(state.txn(late_fault), Err(Refusal::LeaseNotFound));
        assert!(keys(&state).is_empty());
        assert_eq!(state.history().revision(), 1);
    }
}
