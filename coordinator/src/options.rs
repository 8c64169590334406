//! The flags of a coordinator.

use crate::{ControlFlags, StartError};
use baton_cluster_state::{Credentials, InvalidAddress, StoreAddress, StoreOptions};
use baton_node_runtime::{ProcessOptions, parse_bytes, parse_duration};
use baton_scheduling::Policy;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Which store holds the cluster's members.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreChoice {
    /// One inside this process, for this coordinator only.
    Embedded,
    /// An etcd.
    At(StoreAddress),
}

impl FromStr for StoreChoice {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        match text {
            "embedded" => Ok(Self::Embedded),
            other => other.parse().map(Self::At),
        }
    }
}

impl fmt::Display for StoreChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded => f.write_str("embedded"),
            Self::At(address) => address.fmt(f),
        }
    }
}

/// Flags of a coordinator.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Where the OpenAI-compatible HTTP door listens; port 0 takes any free one
    #[arg(
        long,
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:8000",
        help_heading = "Network"
    )]
    pub http_listen: SocketAddr,
    /// Where the gRPC door listens; port 0 takes any free one
    #[arg(
        long,
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:8001",
        help_heading = "Network"
    )]
    pub grpc_listen: SocketAddr,
    /// Larger requests are refused, on either door
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, default_value = "4MiB", help_heading = "Network")]
    pub body_bytes_max: u64,
    /// How long a client may take to send its request's body over HTTP
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "30s", help_heading = "Network")]
    pub body_timeout: Duration,
    /// The store that holds the cluster's members: embedded, or etcd://HOST:PORT[,HOST:PORT...]
    #[arg(
        long,
        value_name = "embedded|URL",
        default_value = "embedded",
        help_heading = "Cluster"
    )]
    pub store: StoreChoice,
    /// Where the embedded store listens for nodes; port 0 takes any free one
    #[arg(
        long,
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:0",
        help_heading = "Cluster"
    )]
    pub store_listen: SocketAddr,
    /// The cluster's name in the store
    #[arg(long, value_name = "NAME", default_value = "default", help_heading = "Cluster")]
    pub cluster: String,
    /// A node that the store lost but that still answers is used for so long; the nodes' --lease-ttl
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "10s", help_heading = "Cluster")]
    pub lease_ttl: Duration,
    /// Between two load reports of a node
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "500ms", help_heading = "Cluster")]
    pub heartbeat: Duration,
    /// How long a node is left alone after a request failed on it
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "2s", help_heading = "Cluster")]
    pub inhibit: Duration,
    /// User of an etcd with authentication
    #[arg(long, value_name = "USER:PASSWORD", hide_env_values = true, help_heading = "Cluster")]
    pub etcd_user: Option<Credentials>,
    /// PEM file of the authority that signed etcd's certificate; turns TLS on
    #[arg(long, value_name = "FILE", help_heading = "Cluster")]
    pub etcd_ca: Option<PathBuf>,
    /// PEM file of the certificate to show to etcd
    #[arg(long, value_name = "FILE", requires = "etcd_key", help_heading = "Cluster")]
    pub etcd_cert: Option<PathBuf>,
    /// PEM file of that certificate's key
    #[arg(long, value_name = "FILE", requires = "etcd_cert", help_heading = "Cluster")]
    pub etcd_key: Option<PathBuf>,
    /// Time budget of requests that name none
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "120s", help_heading = "Requests")]
    pub default_timeout: Duration,
    /// The longest time budget that a request may name
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "1h", help_heading = "Requests")]
    pub timeout_max: Duration,
    /// Requests that may be under way at once; more are refused at once
    #[arg(long, value_name = "COUNT", default_value_t = 4096, help_heading = "Requests")]
    pub requests_max: u32,
    /// Of these, requests that may wait for a place on a node
    #[arg(long, value_name = "COUNT", default_value_t = 1024, help_heading = "Requests")]
    pub queue: u32,
    /// TOML file of tenants: their API keys (SHA-256), priorities, shares and limits; without it nobody needs a key
    #[arg(long, value_name = "FILE", help_heading = "Requests")]
    pub tenants: Option<PathBuf>,
    /// How nodes are chosen: predicted, least-loaded, round-robin or random-two
    #[arg(
        long,
        value_name = "POLICY",
        default_value_t = Policy::Predicted,
        help_heading = "Routing"
    )]
    pub routing_policy: Policy,
    /// Refuse a request at once where its first token is predicted to come later than this after its arrival
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, help_heading = "Routing")]
    pub slo_ttft: Option<Duration>,
    /// Hold a request back while one more sequence would make every decode node slower than this per token
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, help_heading = "Routing")]
    pub slo_itl: Option<Duration>,
    /// Block locations (one block on one node) that are indexed, at most 100 bytes each; more are counted and not used
    #[arg(long, value_name = "COUNT", default_value_t = 2_000_000, help_heading = "Routing")]
    pub index_locations_max: usize,
    /// Requests whose routing `baton explain` can show; the oldest give way
    #[arg(long, value_name = "COUNT", default_value_t = 4096, help_heading = "Routing")]
    pub decisions_max: usize,
    /// How long running requests may take once the process is told to end
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "30s", help_heading = "Requests")]
    pub drain_timeout: Duration,
    /// The controller.
    #[command(flatten)]
    pub control: ControlFlags,
    /// Logs, admin port, configuration file.
    #[command(flatten)]
    pub process: ProcessOptions,
}

impl Options {
    /// Checks what clap cannot.
    ///
    /// # Errors
    /// The first flag that does not fit, by name.
    pub fn validate(&self) -> Result<(), StartError> {
        let check = |ok: bool, flag, value: String, expected| {
            if ok {
                Ok(())
            } else {
                Err(StartError::Option { flag, value, expected })
            }
        };
        let duration = |flag, value: Duration| {
            let (low, high) = (Duration::from_millis(10), Duration::from_secs(30 * 24 * 3600));
            check(
                (low..=high).contains(&value),
                flag,
                format!("{value:?}"),
                "between 10ms and 30 days",
            )
        };
        duration("--heartbeat", self.heartbeat)?;
        duration("--default-timeout", self.default_timeout)?;
        duration("--timeout-max", self.timeout_max)?;
        duration("--body-timeout", self.body_timeout)?;
        let bound = |bound: Option<Duration>| bound.is_none_or(|bound| !bound.is_zero());
        check(bound(self.slo_ttft), "--slo-ttft", "0".to_owned(), "more than 0")?;
        check(bound(self.slo_itl), "--slo-itl", "0".to_owned(), "more than 0")?;
        let within = self.default_timeout <= self.timeout_max;
        check(
            within,
            "--default-timeout",
            format!("{:?}", self.default_timeout),
            "at most --timeout-max",
        )?;
        check(self.requests_max > 0, "--requests-max", "0".to_owned(), "at least 1")?;
        check(self.queue > 0, "--queue", "0".to_owned(), "at least 1")?;
        let bytes = self.body_bytes_max;
        check(
            (1024..=1 << 30).contains(&bytes),
            "--body-bytes-max",
            bytes.to_string(),
            "between 1KiB and 1GiB",
        )
    }

    pub(crate) fn store_options(&self, address: StoreAddress) -> StoreOptions {
        StoreOptions {
            cluster: self.cluster.clone(),
            user: self.etcd_user.clone(),
            ca: self.etcd_ca.clone(),
            cert: self.etcd_cert.clone(),
            key: self.etcd_key.clone(),
            lease_ttl: self.lease_ttl,
            ..StoreOptions::new(address)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        options: Options,
    }

    fn options(arguments: &[&str]) -> Options {
        Command::parse_from(std::iter::once("coordinator").chain(arguments.iter().copied())).options
    }

    #[test]
    fn defaults_are_valid_and_local() {
        let options = options(&[]);
        assert!(options.validate().is_ok());
        assert!(options.http_listen.ip().is_loopback() && options.grpc_listen.ip().is_loopback());
        assert_eq!(options.store, StoreChoice::Embedded);
        assert_eq!(options.routing_policy, Policy::Predicted);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let refused = |arguments: &[&str]| options(arguments).validate().unwrap_err().to_string();
        assert!(refused(&["--queue", "0"]).contains("--queue"));
        assert!(refused(&["--default-timeout", "2h"]).contains("--timeout-max"));
        assert!(refused(&["--heartbeat", "1ms"]).contains("--heartbeat"));
        assert!(refused(&["--slo-ttft", "0s"]).contains("--slo-ttft"));
        assert!("etcd:/x".parse::<StoreChoice>().is_err());
        assert_eq!("etcd://a:1".parse::<StoreChoice>().unwrap().to_string(), "etcd://a:1");
    }
}
