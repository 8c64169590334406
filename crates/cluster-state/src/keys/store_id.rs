//! `/baton/v1/{cluster}/store_id`: names one life of the store's data.
//!
//! - Value: 32 hexadecimal digits, drawn at random.
//! - Writer: whoever connects first, by a txn "absent"; never changed afterwards.
//! - Lifetime: that of the data. Another value means that the data was wiped or replaced, so everyone takes a fresh
//!   snapshot and publishes again.

use super::{UnreadableValue, cluster_prefix};
use baton_types::fill_random;
use std::fmt;

/// One life of a store's data.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct StoreId(pub u128);

impl StoreId {
    /// A new one, at random.
    pub fn random() -> Self {
        let mut bytes = [0; 16];
        fill_random(&mut bytes);
        Self(u128::from_be_bytes(bytes))
    }
}

impl fmt::Display for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The key.
pub fn key(cluster: &str) -> String {
    format!("{}store_id", cluster_prefix(cluster))
}

/// The value.
pub fn encode(id: StoreId) -> Vec<u8> {
    id.to_string().into_bytes()
}

/// Reads a value.
///
/// # Errors
/// Where it is not 32 hexadecimal digits.
pub fn decode(key: &str, value: &[u8]) -> Result<StoreId, UnreadableValue> {
    let fail = || UnreadableValue {
        key: key.to_owned(),
        problem: "expected 32 hexadecimal digits".to_owned(),
    };
    let text = std::str::from_utf8(value).map_err(|_| fail())?;
    if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(fail());
    }
    u128::from_str_radix(text, 16).map(StoreId).map_err(|_| fail())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn survives_its_codec(id: u128) {
            let id = StoreId(id);
            prop_assert_eq!(decode("k", &encode(id)).unwrap(), id);
        }

        #[test]
        fn noise_is_refused_without_a_panic(bytes: Vec<u8>) {
            prop_assume!(bytes.len() != 32);
            prop_assert!(decode("k", &bytes).is_err());
        }
    }

    #[test]
    fn stands_under_its_cluster() {
        assert_eq!(key("default"), "/baton/v1/default/store_id");
    }
}
