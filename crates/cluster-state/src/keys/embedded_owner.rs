//! `/baton/v1/embedded_owner`: the one coordinator that an embedded store serves.
//!
//! - Value: the coordinator's process instance, 16 hexadecimal digits.
//! - Writer: that coordinator, by a txn "absent or own instance", before anyone learns the store's address. Exists only in
//!   embedded stores; coordinators on a shared etcd are equals and write nothing.
//! - Lifetime: that of the embedded store, which is that of the coordinator's process.

use super::UnreadableValue;
use baton_types::Instance;

/// The key. It names no cluster: a second coordinator is refused whatever cluster it asks for.
pub const KEY: &str = "/baton/v1/embedded_owner";

/// The value.
pub fn encode(owner: Instance) -> Vec<u8> {
    owner.to_string().into_bytes()
}

/// Reads a value.
///
/// # Errors
/// Where it is no instance.
pub fn decode(value: &[u8]) -> Result<Instance, UnreadableValue> {
    let fail = |problem: String| UnreadableValue {
        key: KEY.to_owned(),
        problem,
    };
    let text = std::str::from_utf8(value).map_err(|error| fail(error.to_string()))?;
    text.parse()
        .map_err(|error: baton_types::ParseIdError| fail(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn survives_its_codec(instance: u64) {
            let owner = Instance(instance);
            prop_assert_eq!(decode(&encode(owner)).unwrap(), owner);
        }

        #[test]
        fn noise_is_refused_without_a_panic(bytes: Vec<u8>) {
            prop_assume!(bytes.len() != 16);
            prop_assert!(decode(&bytes).is_err());
        }
    }
}
