//! Who asks: tenants by API key, with a priority, a share, and limits each. Without a tenants file there is one, `default`,
//! that needs no key.
//!
//! Keys are kept as SHA-256 digests only. They are random and long, so that a plain digest is as good as a slow one.

use crate::{ApiCode, ApiError};
use baton_node_runtime::{Clock, Moment};
use baton_scheduling::{Priority, RateLimit};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A digest's bytes.
type KeyHash = [u8; 32];

/// When to come again after too many at once: when one ends, which nobody knows.
const RETRY_CONCURRENT: Duration = Duration::from_secs(1);

/// A tenants file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TenantsError {
    /// It cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no TOML, or has other fields than it should.
    #[error("{path}: {source}")]
    Parse {
        /// Which.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A tenant's entry contradicts itself or another one.
    #[error("tenant `{tenant}`: {field} {problem}")]
    Entry {
        /// Whose.
        tenant: String,
        /// Of what.
        field: &'static str,
        /// What is wrong.
        problem: &'static str,
    },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    tenant: Vec<FileTenant>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileTenant {
    name: String,
    /// SHA-256 digests of its keys, 64 hexadecimal digits each.
    key_sha256: Vec<String>,
    #[serde(default)]
    priority: FilePriority,
    /// Its share of tokens beside others of its priority.
    #[serde(default = "one")]
    weight: u32,
    /// Requests per second on average; absent: no limit of its own.
    requests_per_s: Option<f64>,
    /// Requests at once above that average; absent: one second's worth.
    burst: Option<f64>,
    /// Requests under way; absent: no limit of its own.
    concurrent_max: Option<u32>,
    /// Of these, requests that wait for a place; absent: no limit of its own.
    queued_max: Option<u32>,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FilePriority {
    High,
    #[default]
    Normal,
    Low,
}

fn one() -> u32 {
    1
}

/// One tenant.
#[derive(Debug)]
pub(crate) struct Tenant {
    pub(crate) name: String,
    /// Its place in the file.
    pub(crate) index: usize,
    pub(crate) weight: u32,
    pub(crate) priority: Priority,
    /// Its blocks are its own: others can neither use nor time them.
    pub(crate) salted: bool,
    rate: Option<Mutex<RateLimit>>,
    concurrent_max: u32,
    queued_max: u32,
    concurrent: AtomicU32,
    queued: AtomicU32,
}

/// Counts a request as its tenant's while it lives.
#[derive(Debug)]
pub(crate) struct TenantEntry(Arc<Tenant>);

/// Counts a request as waiting among its tenant's while it lives.
#[derive(Debug)]
pub(crate) struct TenantWait(Arc<Tenant>);

impl Drop for TenantEntry {
    fn drop(&mut self) {
        self.0.concurrent.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for TenantWait {
    fn drop(&mut self) {
        self.0.queued.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Tenants {
    /// `None`: there is no file, and no key is asked for.
    by_key: Option<HashMap<KeyHash, Arc<Tenant>>>,
    default: Arc<Tenant>,
    clock: Clock,
    started: Moment,
}

/// Adds one to a count that may not pass a bound.
fn count_up(count: &AtomicU32, max: u32) -> bool {
    let below = |count| (count < max).then_some(count + 1);
    count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, below).is_ok()
}

impl Tenants {
    /// Reads the tenants file, where there is one.
    ///
    /// # Errors
    /// It cannot be read or used.
    pub(crate) fn load(file: Option<&Path>, clock: Clock) -> Result<Self, TenantsError> {
        let by_key = match file {
            None => None,
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|source| TenantsError::Read {
                    path: path.to_owned(),
                    source,
                })?;
                let file: File = toml::from_str(&text).map_err(|source| TenantsError::Parse {
                    path: path.to_owned(),
                    source: Box::new(source),
                })?;
                Some(by_key(file)?)
            }
        };
        Ok(Self {
            by_key,
            default: Arc::new(Tenant {
                name: "default".to_owned(),
                index: 0,
                weight: 1,
                priority: Priority::Normal,
                salted: false,
                rate: None,
                concurrent_max: u32::MAX,
                queued_max: u32::MAX,
                concurrent: AtomicU32::new(0),
                queued: AtomicU32::new(0),
            }),
            clock,
            started: clock.now(),
        })
    }

    /// Whose key this is.
    ///
    /// # Errors
    /// There are tenants, and it is nobody's.
    pub(crate) fn of_key(&self, key: Option<&str>) -> Result<Arc<Tenant>, ApiError> {
        let Some(by_key) = &self.by_key else {
            return Ok(Arc::clone(&self.default));
        };
        let Some(key) = key else {
            let message = "no API key: send `authorization: Bearer KEY`";
            return Err(ApiError::new(ApiCode::Unauthenticated, message));
        };
        let hash: KeyHash = Sha256::digest(key.as_bytes()).into();
        let unknown = || ApiError::new(ApiCode::Unauthenticated, "the API key is not known here");
        by_key.get(&hash).cloned().ok_or_else(unknown)
    }

    /// Lets one more request of a tenant in.
    ///
    /// # Errors
    /// One of its limits is reached.
    pub(crate) fn admit(&self, tenant: &Arc<Tenant>) -> Result<(TenantEntry, TenantWait), ApiError> {
        let refused = |message: String, wait| Err(ApiError::new(ApiCode::ResourceExhausted, message).retry_after(wait));
        let name = &tenant.name;
        if !count_up(&tenant.concurrent, tenant.concurrent_max) {
            let message = format!(
                "tenant `{name}` has {} requests under way, its limit",
                tenant.concurrent_max
            );
            return refused(message, RETRY_CONCURRENT);
        }
        let entry = TenantEntry(Arc::clone(tenant));
        if !count_up(&tenant.queued, tenant.queued_max) {
            let message = format!("tenant `{name}` has {} requests waiting, its limit", tenant.queued_max);
            return refused(message, RETRY_CONCURRENT);
        }
        let wait = TenantWait(Arc::clone(tenant));
        if let Some(rate) = &tenant.rate {
            let now = self.clock.elapsed(self.started);
            let mut rate = rate.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(wait) = rate.take(now) {
                return refused(
                    format!("tenant `{name}` sends more requests per second than it may"),
                    wait,
                );
            }
        }
        Ok((entry, wait))
    }
}

fn by_key(file: File) -> Result<HashMap<KeyHash, Arc<Tenant>>, TenantsError> {
    let mut by_key = HashMap::new();
    let mut names = std::collections::HashSet::new();
    for (index, entry) in file.tenant.into_iter().enumerate() {
        let wrong = |field, problem| TenantsError::Entry {
            tenant: entry.name.clone(),
            field,
            problem,
        };
        let positive = |number: Option<f64>| number.is_none_or(|number| number.is_finite() && number > 0.0);
        if entry.name.is_empty() || !names.insert(entry.name.clone()) {
            return Err(wrong("name", "is empty or another one's too"));
        }
        if entry.key_sha256.is_empty() {
            return Err(wrong("key_sha256", "names no key: nobody could use it"));
        }
        if !(1..=1000).contains(&entry.weight) {
            return Err(wrong("weight", "must be between 1 and 1000"));
        }
        if !positive(entry.requests_per_s) {
            return Err(wrong("requests_per_s", "must be more than 0"));
        }
        if !positive(entry.burst) || (entry.burst.is_some() && entry.requests_per_s.is_none()) {
            return Err(wrong("burst", "must be more than 0 and stand beside requests_per_s"));
        }
        if entry.concurrent_max == Some(0) || entry.queued_max == Some(0) {
            return Err(wrong("concurrent_max or queued_max", "must be at least 1"));
        }
        let mut hashes: Vec<KeyHash> = Vec::new();
        for text in &entry.key_sha256 {
            let mut hash = KeyHash::default();
            hex::decode_to_slice(text, &mut hash).map_err(|_| wrong("key_sha256", "must be 64 hexadecimal digits"))?;
            hashes.push(hash);
        }
        let rate = entry.requests_per_s.map(|rate| {
            let burst = entry.burst.unwrap_or(rate);
            Mutex::new(RateLimit::new(rate, burst))
        });
        let tenant = Arc::new(Tenant {
            name: entry.name.clone(),
            index,
            weight: entry.weight,
            priority: match entry.priority {
                FilePriority::High => Priority::High,
                FilePriority::Normal => Priority::Normal,
                FilePriority::Low => Priority::Low,
            },
            salted: true,
            rate,
            concurrent_max: entry.concurrent_max.unwrap_or(u32::MAX),
            queued_max: entry.queued_max.unwrap_or(u32::MAX),
            concurrent: AtomicU32::new(0),
            queued: AtomicU32::new(0),
        });
        for hash in hashes {
            if by_key.insert(hash, Arc::clone(&tenant)).is_some() {
                return Err(wrong("key_sha256", "names a key twice, or another tenant's"));
            }
        }
    }
    Ok(by_key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_hash(key: &str) -> String {
        hex::encode(Sha256::digest(key.as_bytes()))
    }

    fn load(text: &str) -> Result<Tenants, TenantsError> {
        let file = toml::from_str(text).map_err(|source| TenantsError::Parse {
            path: "test".into(),
            source: Box::new(source),
        })?;
        let clock = Clock::new();
        let mut tenants = Tenants::load(None, clock)?;
        tenants.by_key = Some(by_key(file)?);
        Ok(tenants)
    }

    #[tokio::test(start_paused = true)]
    async fn keys_tell_tenants_and_each_has_its_limits() {
        let (a, b) = (key_hash("a-key"), key_hash("b-key"));
        let text = format!(
            "[[tenant]]\nname = 'a'\nkey_sha256 = ['{a}']\nconcurrent_max = 2\nqueued_max = 1\npriority = 'high'\n\
             [[tenant]]\nname = 'b'\nkey_sha256 = ['{b}']\nrequests_per_s = 1.0\nburst = 2.0\nweight = 3"
        );
        let tenants = load(&text).unwrap();
        let code = |key| tenants.of_key(key).unwrap_err().code;
        assert_eq!(
            (code(None), code(Some("c"))),
            (ApiCode::Unauthenticated, ApiCode::Unauthenticated)
        );
        let a = tenants.of_key(Some("a-key")).unwrap();
        assert_eq!((a.name.as_str(), a.priority, a.salted), ("a", Priority::High, true));
        let message = |tenant: &Arc<Tenant>| tenants.admit(tenant).unwrap_err().message;
        let (first, waiting) = tenants.admit(&a).unwrap();
        assert!(message(&a).contains("waiting"));
        drop(waiting);
        let _second = tenants.admit(&a).unwrap();
        assert!(message(&a).contains("under way"));
        drop(first);
        assert!(message(&a).contains("waiting"), "what was refused gave its place back");
        let b = tenants.of_key(Some("b-key")).unwrap();
        assert_eq!((b.weight, b.index), (3, 1));
        (0..2).for_each(|_| drop(tenants.admit(&b).unwrap()));
        let late = tenants.admit(&b).unwrap_err();
        assert_eq!(
            (late.code, late.retry_after),
            (ApiCode::ResourceExhausted, Some(Duration::from_secs(1)))
        );
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(tenants.admit(&b).is_ok());
    }

    #[tokio::test]
    async fn without_a_file_nobody_needs_a_key() {
        let tenants = Tenants::load(None, Clock::new()).unwrap();
        let tenant = tenants.of_key(None).unwrap();
        assert_eq!((tenant.name.as_str(), tenant.salted), ("default", false));
        assert!(tenants.admit(&tenant).is_ok() && tenants.of_key(Some("any")).is_ok());
        assert!(Tenants::load(Some(Path::new("/nowhere/tenants.toml")), Clock::new()).is_err());
    }

    #[tokio::test]
    async fn bad_files_name_the_tenant_and_the_field() {
        let key = key_hash("k");
        let refused = |more: &str| {
            let text = format!("[[tenant]]\nname = 'a'\nkey_sha256 = ['{key}']\n{more}");
            load(&text).unwrap_err().to_string()
        };
        assert!(refused("weight = 0").contains("`a`: weight"));
        assert!(refused("requests_per_s = -1.0").contains("requests_per_s"));
        assert!(refused("burst = 3.0").contains("burst"));
        assert!(refused("concurrent_max = 0").contains("concurrent_max"));
        assert!(refused("wieght = 2").contains("wieght"));
        assert!(refused(&format!("[[tenant]]\nname = 'b'\nkey_sha256 = ['{key}']")).contains("`b`: key_sha256"));
        assert!(refused("[[tenant]]\nname = 'b'\nkey_sha256 = ['zz']").contains("64 hexadecimal"));
    }
}
