//! How to reach a store. One form serves etcd and the embedded store: `etcd://host:port,host:port`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Where the store listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreAddress {
    /// The members of one etcd cluster, or one embedded store, as `host:port` each.
    Etcd(Vec<String>),
}

/// A text that names no store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` names no store: {problem}; expected etcd://HOST:PORT[,HOST:PORT...]")]
pub struct InvalidAddress {
    /// What was given.
    pub text: String,
    /// What is wrong with it.
    pub problem: String,
}

impl StoreAddress {
    /// The endpoints, as `host:port` each.
    pub fn endpoints(&self) -> &[String] {
        match self {
            Self::Etcd(endpoints) => endpoints,
        }
    }
}

impl fmt::Display for StoreAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "etcd://{}", self.endpoints().join(","))
    }
}

impl FromStr for StoreAddress {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let fail = |problem: String| InvalidAddress {
            text: text.to_owned(),
            problem,
        };
        let rest = text
            .strip_prefix("etcd://")
            .ok_or_else(|| fail("it does not begin with etcd://".into()))?;
        let mut endpoints = Vec::new();
        for endpoint in rest.split(',').map(|part| part.trim().trim_end_matches('/')) {
            let Some((host, port)) = endpoint.rsplit_once(':') else {
                return Err(fail(format!("`{endpoint}` has no port")));
            };
            if host.is_empty() || host.contains('/') {
                return Err(fail(format!("`{endpoint}` has no host")));
            }
            if port.parse::<u16>().map_or(true, |port| port == 0) {
                return Err(fail(format!("`{port}` is no port")));
            }
            endpoints.push(endpoint.to_owned());
        }
        Ok(Self::Etcd(endpoints))
    }
}

/// A user of an etcd with authentication. Its password never appears in `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user's name.
    pub user: String,
    /// The user's password.
    pub password: String,
}

impl FromStr for Credentials {
    type Err = InvalidAddress;

    /// From `USER:PASSWORD`, as `--etcd-user` takes it.
    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        match text.split_once(':') {
            Some((user, password)) if !user.is_empty() => Ok(Self {
                user: user.to_owned(),
                password: password.to_owned(),
            }),
            _ => Err(InvalidAddress {
                text: "***".to_owned(),
                problem: "expected USER:PASSWORD".to_owned(),
            }),
        }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

/// How to reach a store and what to keep there.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Where it is.
    pub address: StoreAddress,
    /// The cluster's name: part of every key, so that clusters can share one etcd. No `/`.
    pub cluster: String,
    /// Who asks, where the etcd has authentication.
    pub user: Option<Credentials>,
    /// PEM file of the authority that signed the etcd's certificate. Its presence turns TLS on.
    pub ca: Option<PathBuf>,
    /// PEM file of the client's certificate.
    pub cert: Option<PathBuf>,
    /// PEM file of the client certificate's key.
    pub key: Option<PathBuf>,
    /// A node that does not answer for this long is gone. Whole seconds; etcd grants no less than 2 s by default.
    pub lease_ttl: Duration,
    /// How long `Store::connect` tries before it gives up; five times as long where calls go unanswered rather than fail.
    pub connect_timeout: Duration,
}

impl StoreOptions {
    /// Plain text, no user, the default cluster, a lease of 10 s.
    pub fn new(address: StoreAddress) -> Self {
        Self {
            address,
            cluster: "default".to_owned(),
            user: None,
            ca: None,
            cert: None,
            key: None,
            lease_ttl: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(4),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_text() {
        let address: StoreAddress = "etcd://a:2379,10.0.0.2:2379".parse().unwrap();
        assert_eq!(address.endpoints(), ["a:2379", "10.0.0.2:2379"]);
        assert_eq!(address.to_string(), "etcd://a:2379,10.0.0.2:2379");
        assert_eq!(
            "etcd://[::1]:2379/".parse::<StoreAddress>().unwrap().endpoints(),
            ["[::1]:2379"]
        );
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "a:2379",
            "http://a:2379",
            "etcd://",
            "etcd://a",
            "etcd://a:0",
            "etcd://a:b",
            "etcd://a:1,",
        ] {
            let error = text.parse::<StoreAddress>().unwrap_err();
            assert!(error.to_string().contains("etcd://HOST:PORT"), "{error}");
        }
    }

    #[test]
    fn a_password_is_never_shown() {
        let user: Credentials = "root:se:cret".parse().unwrap();
        assert_eq!(user.password, "se:cret");
        assert!(!format!("{user:?}").contains("se:cret"));
        assert!(
            !"secret"
                .parse::<Credentials>()
                .unwrap_err()
                .to_string()
                .contains("secret")
        );
    }
}
