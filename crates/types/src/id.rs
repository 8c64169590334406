//! Identities. Each is its own type so that one cannot be passed for another.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Fills `bytes` from the system's random source.
///
/// # Panics
/// Where the system has no random source: nothing that Baton names would be unique then.
pub fn fill_random(bytes: &mut [u8]) {
    getrandom::fill(bytes).expect("the operating system provides random bytes");
}

/// A text that is no identity of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no {kind}: expected {digits} hexadecimal digits")]
pub struct ParseIdError {
    /// What was wanted.
    pub kind: &'static str,
    /// How many digits it has.
    pub digits: usize,
    /// What was given.
    pub text: String,
}

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub $inner);

        impl $name {
            /// A new one, at random.
            pub fn random() -> Self {
                let mut bytes = [0; size_of::<$inner>()];
                fill_random(&mut bytes);
                Self(<$inner>::from_be_bytes(bytes))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:0width$x}", self.0, width = 2 * size_of::<$inner>())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let digits = 2 * size_of::<$inner>();
                let fail = || ParseIdError { kind: $kind, digits, text: text.to_owned() };
                if text.len() != digits || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(fail());
                }
                <$inner>::from_str_radix(text, 16).map(Self).map_err(|_| fail())
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

random_id!(
    /// One client request, for its whole life, whatever attempts it takes.
    RequestId(u128), "request id"
);
random_id!(
    /// The decode side's name for one hand-over. Unguessable: who does not know it cannot write for it.
    Ticket(u128), "ticket"
);
random_id!(
    /// One life of one process. A restarted process has another one.
    Instance(u64), "process instance"
);

/// A node's name, unique in the cluster, stable over restarts where the operator names it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub Arc<str>);

impl NodeId {
    /// Wraps a name.
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which try at handing a request over, from 1 within a ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Attempt(pub u32);

impl Attempt {
    /// The first try.
    pub const FIRST: Self = Self(1);

    /// The one after this.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// One grant of blocks to one writer over one path. Never reused by a receiver's instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// A block's place in one node's arena, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockId(pub u32);

impl BlockId {
    /// As an index into per-block tables.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// BLAKE3 over what makes two models the same: architecture, hyperparameters, weights' names, shapes, types and bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ModelFingerprint(pub [u8; 32]);

impl fmt::Display for ModelFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for ModelFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ModelFingerprint {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| ParseIdError {
            kind: "model fingerprint",
            digits: 64,
            text: text.to_owned(),
        })?;
        Ok(Self(bytes))
    }
}

impl Serialize for ModelFingerprint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ModelFingerprint {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_ids_survive_text() {
        let id = Ticket::random();
        assert_eq!(id.to_string().parse::<Ticket>(), Ok(id));
        assert_eq!(id.to_string().len(), 32);
        assert!("12".parse::<Ticket>().is_err());
        assert!("+2345678901234567890123456789012".parse::<Ticket>().is_err());
        assert_ne!(Instance::random(), Instance::random());
    }
}
