//! The flags of a node, whatever its role.

use crate::cpus::CpuList;
use crate::engine::Speculation;
use crate::error::BringUpError;
use baton_cluster_state::{Credentials, LocationBudget, StoreAddress, StoreOptions};
use baton_kv_transfer::{EndpointOptions, PathKind};
use baton_node_runtime::{ProcessOptions, parse_bytes, parse_duration};
use baton_types::{KvDtype, NodeRole};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Element type of KV, as a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum KvDtypeFlag {
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE single precision.
    F32,
    /// Eight-bit integers with a scale per row: half the memory and hand-over of f16, and slightly other tokens.
    Q8,
}

impl From<KvDtypeFlag> for KvDtype {
    fn from(flag: KvDtypeFlag) -> Self {
        match flag {
            KvDtypeFlag::F16 => Self::F16,
            KvDtypeFlag::Bf16 => Self::Bf16,
            KvDtypeFlag::F32 => Self::F32,
            KvDtypeFlag::Q8 => Self::Q8,
        }
    }
}

/// Offered unless the flag says otherwise. Never memory: the roles are processes of their own.
const DEFAULT_PATHS: [PathKind; 3] = [PathKind::Shm, PathKind::Rdma, PathKind::Tcp];

/// Flags that every node has.
#[derive(Debug, Clone, clap::Args)]
pub struct NodeOptions {
    /// A .gguf file, a folder with config.json and *.safetensors, or `stub[:KEY=NUMBER,...]` for scripted tokens
    #[arg(long, value_name = "PATH|stub", help_heading = "Model")]
    pub model: String,
    /// The model's name for clients [default: the file's name]
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    pub model_name: Option<String>,
    /// Compute threads; 0 takes all cores, or one for each of --cpus
    #[arg(long, value_name = "COUNT", default_value_t = 0, help_heading = "Model")]
    pub threads: usize,
    /// CPUs that compute threads stay on, one each, such as 0-3,8; no other node should have them [default: not pinned]
    #[arg(long, value_name = "LIST", help_heading = "Model")]
    pub cpus: Option<CpuList>,
    /// Memory for KV blocks, such as 2GiB [default: half of what the machine and its control group leave]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, help_heading = "KV cache")]
    pub kv_bytes: Option<u64>,
    /// Tokens per KV block; the same on all nodes of a model
    #[arg(long, value_name = "TOKENS", default_value_t = 16, help_heading = "KV cache")]
    pub block_tokens: u32,
    /// Element type of KV; the same on all nodes of a model. q8 takes half the memory and hand-over of f16
    #[arg(
        long,
        value_name = "TYPE",
        value_enum,
        default_value = "f16",
        help_heading = "KV cache"
    )]
    pub kv_dtype: KvDtypeFlag,
    /// This node's name, unique in the cluster [default: the role and a random number]
    #[arg(long, value_name = "NAME", help_heading = "Cluster")]
    pub node_id: Option<String>,
    /// The store that holds the cluster's members: etcd://HOST:PORT[,HOST:PORT...]
    #[arg(long, value_name = "URL", help_heading = "Cluster")]
    pub store: StoreAddress,
    /// The cluster's name in that store
    #[arg(long, value_name = "NAME", default_value = "default", help_heading = "Cluster")]
    pub cluster: String,
    /// After this long without a sign of life the node is gone for others; at least 2s
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "10s", help_heading = "Cluster")]
    pub lease_ttl: Duration,
    /// Writes per second that all nodes of the cluster together may make to the store to tell which blocks they hold; the
    /// same on all nodes
    #[arg(long, value_name = "COUNT", default_value_t = LocationBudget::default().writes_per_s, help_heading = "Cluster")]
    pub location_writes: u32,
    /// Bytes per second of the same
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, default_value = "2MiB", help_heading = "Cluster")]
    pub location_bytes: u64,
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
    /// Where gRPC is served to coordinators; port 0 takes any free one
    #[arg(
        long,
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:0",
        help_heading = "Network"
    )]
    pub listen: SocketAddr,
    /// The host or address that others reach this node by [default: the one listened on]
    #[arg(long, value_name = "HOST", help_heading = "Network")]
    pub advertise: Option<String>,
    /// Where KV hand-overs arrive; port 0 takes any free one
    #[arg(
        long,
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:0",
        help_heading = "Network"
    )]
    pub transfer_listen: SocketAddr,
    /// Transports to send and receive hand-overs by: shm (same host), rdma, tcp, memory (roles within one process); the
    /// sender takes the fastest that both ends have [default: shm, rdma and tcp, as far as build and host have them]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', help_heading = "Network")]
    pub transports: Vec<PathKind>,
    /// Send hand-overs by this transport only: fail rather than fall back to another
    #[arg(long, value_name = "NAME", help_heading = "Network")]
    pub require_path: Option<PathKind>,
    /// Do not check the CRC32C of each extent on tcp
    #[arg(long, help_heading = "Network")]
    pub no_crc: bool,
    /// Send a digest of each whole hand-over, which the receiver checks before it uses it, whatever the transport
    #[arg(long, help_heading = "Network")]
    pub transfer_digest: bool,
    /// Data connections to each node that hand-overs are sent to; one for each four cores, at most four, if not given
    #[arg(long, value_name = "COUNT", default_value_t = baton_kv_transfer::default_connections(), hide_default_value = true, help_heading = "Network")]
    pub transfer_connections: usize,
    /// Bytes under way on one path at once; more wait, and the most urgent hand-over goes first
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, default_value = "32MiB", help_heading = "Network")]
    pub transfer_in_flight: u64,
    /// RDMA devices to use, such as mlx5_0 [default: all that are active]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', help_heading = "Network")]
    pub rdma_device: Vec<String>,
    /// Prompt tokens computed in one step; a multiple of --block-tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 256, help_heading = "Scheduling")]
    pub chunk_tokens: usize,
    /// Requests that may wait here; more are refused at once
    #[arg(long, value_name = "COUNT", default_value_t = 64, help_heading = "Scheduling")]
    pub queue: usize,
    /// Requests that may be computed at once [default: 32 on a prefill node, 256 on a decode node]
    #[arg(long, value_name = "COUNT", help_heading = "Scheduling")]
    pub running: Option<usize>,
    /// Whether decoding sequences guess at the tokens to come from their own text, to draw several from one step; the same
    /// tokens come out either way
    #[arg(
        long,
        value_name = "WHEN",
        value_enum,
        default_value = "auto",
        help_heading = "Scheduling"
    )]
    pub speculation: Speculation,
    /// A hand-over that makes no progress for this long gives its blocks back
    #[arg(
        long,
        value_name = "DURATION",
        value_parser = parse_duration,
        default_value = "10s",
        help_heading = "Scheduling"
    )]
    pub reservation_lease: Duration,
    /// How long running requests may take once the node is told to end
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "30s", help_heading = "Scheduling")]
    pub drain_timeout: Duration,
    /// Logs, admin port, configuration file.
    #[command(flatten)]
    pub process: ProcessOptions,
}

impl NodeOptions {
    /// Checks what clap cannot.
    ///
    /// # Errors
    /// The first flag that does not fit, by name.
    pub fn validate(&self) -> Result<(), BringUpError> {
        let check = |ok: bool, flag, value: String, expected: &str| {
            if ok {
                Ok(())
            } else {
                Err(BringUpError::Option {
                    flag,
                    value,
                    expected: expected.to_owned(),
                })
            }
        };
        let block = self.block_tokens;
        check(
            (1..=1024).contains(&block),
            "--block-tokens",
            block.to_string(),
            "1 to 1024",
        )?;
        let (chunk, block) = (self.chunk_tokens, block as usize);
        let expected = format!("a multiple of --block-tokens ({block})");
        check(
            chunk >= block && chunk.is_multiple_of(block),
            "--chunk-tokens",
            chunk.to_string(),
            &expected,
        )?;
        check(
            (1..=65_536).contains(&self.queue),
            "--queue",
            self.queue.to_string(),
            "1 to 65536",
        )?;
        let running = self.running.unwrap_or(1);
        check(
            (1..=65_536).contains(&running),
            "--running",
            running.to_string(),
            "1 to 65536",
        )?;
        check(
            self.threads <= 4096,
            "--threads",
            self.threads.to_string(),
            "at most 4096",
        )?;
        let cpus = self.cpus.as_ref().map_or(self.threads, |cpus| cpus.0.len());
        check(
            self.threads == 0 || self.threads == cpus,
            "--threads",
            self.threads.to_string(),
            "0, or as many as --cpus names",
        )?;
        check(
            self.location_writes > 0,
            "--location-writes",
            "0".to_owned(),
            "at least 1",
        )?;
        check(
            self.location_bytes >= 64 << 10,
            "--location-bytes",
            self.location_bytes.to_string(),
            "at least 64KiB",
        )?;
        check(
            (1..=64).contains(&self.transfer_connections),
            "--transfer-connections",
            self.transfer_connections.to_string(),
            "1 to 64",
        )?;
        check(
            (64 << 10..=16 << 30).contains(&self.transfer_in_flight),
            "--transfer-in-flight",
            self.transfer_in_flight.to_string(),
            "64KiB to 16GiB",
        )?;
        self.validate_paths()?;
        for (flag, listen) in [("--listen", self.listen), ("--transfer-listen", self.transfer_listen)] {
            let reachable = self.advertise.is_some() || !listen.ip().is_unspecified();
            check(
                reachable,
                flag,
                listen.to_string(),
                "one address, or --advertise HOST beside it",
            )?;
        }
        Ok(())
    }

    /// Which transports there are is known before anything is loaded; whether this host has them, once they are started.
    fn validate_paths(&self) -> Result<(), BringUpError> {
        let refuse = |flag, value: String, expected: String| Err(BringUpError::Option { flag, value, expected });
        let named = self.transports.iter().map(|path| ("--transports", path));
        let required = self.require_path.iter().map(|path| ("--require-path", path));
        if let Some((flag, path)) = named.chain(required).find(|(_, path)| !path.is_built()) {
            let built: Vec<&str> = PathKind::ALL
                .iter()
                .filter(|path| path.is_built())
                .map(|path| path.name())
                .collect();
            let how = match path {
                PathKind::Rdma => "; rdma needs a build with `--features rdma`",
                PathKind::Memory | PathKind::Tcp | PathKind::Shm | PathKind::Cuda => "",
            };
            return refuse(
                flag,
                path.to_string(),
                format!("what this build has: {}{how}", built.join(", ")),
            );
        }
        match self.require_path {
            Some(path) if !self.transports.is_empty() && !self.transports.contains(&path) => refuse(
                "--require-path",
                path.to_string(),
                format!("one of --transports, or {path} among those"),
            ),
            Some(_) | None => Ok(()),
        }
    }

    /// Requests that may be computed at once.
    pub fn running_max(&self, role: NodeRole) -> usize {
        self.running.unwrap_or(match role {
            NodeRole::Prefill => 32,
            NodeRole::Decode => 256,
        })
    }

    /// How to reach the store.
    pub fn store_options(&self) -> StoreOptions {
        StoreOptions {
            cluster: self.cluster.clone(),
            user: self.etcd_user.clone(),
            ca: self.etcd_ca.clone(),
            cert: self.etcd_cert.clone(),
            key: self.etcd_key.clone(),
            lease_ttl: self.lease_ttl,
            ..StoreOptions::new(self.store.clone())
        }
    }

    /// What all nodes together may write of their block locations.
    pub fn location_budget(&self) -> LocationBudget {
        LocationBudget {
            writes_per_s: self.location_writes,
            bytes_per_s: self.location_bytes,
        }
    }

    /// How hand-overs are sent and arrive. Without `--transports`, what this host lacks is left out, save what is required.
    pub fn endpoint_options(&self) -> EndpointOptions {
        let named = !self.transports.is_empty();
        let mut transports = match named {
            true => self.transports.clone(),
            false => DEFAULT_PATHS.into_iter().filter(|path| path.is_built()).collect(),
        };
        transports.extend(self.require_path.filter(|path| !transports.contains(path)));
        EndpointOptions {
            listen: self.transfer_listen,
            transports,
            skip_unavailable: !named,
            require_path: self.require_path,
            advertise: self.advertise.clone(),
            connections_per_peer: self.transfer_connections,
            crc: !self.no_crc,
            digest: self.transfer_digest,
            rdma_devices: self.rdma_device.clone(),
            bytes_in_flight_max: usize::try_from(self.transfer_in_flight).unwrap_or(usize::MAX),
            reservation_lease: self.reservation_lease,
            ..EndpointOptions::default()
        }
    }

    /// The address that others reach a listener by.
    pub fn advertised(&self, listener: SocketAddr) -> String {
        match &self.advertise {
            Some(host) if host.contains(':') && !host.starts_with('[') => format!("[{host}]:{}", listener.port()),
            Some(host) => format!("{host}:{}", listener.port()),
            None => listener.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        node: NodeOptions,
    }

    fn parse(more: &[&str]) -> NodeOptions {
        let line = ["node", "--model", "stub", "--store", "etcd://127.0.0.1:2379"];
        Line::try_parse_from(line.iter().chain(more)).unwrap().node
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let refused = |more: &[&str]| match parse(more).validate() {
            Ok(()) => "nothing",
            Err(BringUpError::Option { flag, .. }) => flag,
            Err(_) => "another",
        };
        assert_eq!(refused(&[]), "nothing");
        assert_eq!(refused(&["--chunk-tokens", "100"]), "--chunk-tokens");
        assert_eq!(refused(&["--block-tokens", "0"]), "--block-tokens");
        assert_eq!(refused(&["--queue", "0"]), "--queue");
        assert_eq!(refused(&["--location-writes", "0"]), "--location-writes");
        assert_eq!(refused(&["--location-bytes", "1KiB"]), "--location-bytes");
        assert_eq!(refused(&["--running", "0"]), "--running");
        assert_eq!(refused(&["--listen", "0.0.0.0:0"]), "--listen");
        assert_eq!(refused(&["--listen", "0.0.0.0:0", "--advertise", "node1"]), "nothing");
        assert_eq!(refused(&["--transfer-connections", "0"]), "--transfer-connections");
        assert_eq!(refused(&["--transfer-in-flight", "1KiB"]), "--transfer-in-flight");
        assert_eq!(refused(&["--transports", "tcp,cuda"]), "--transports");
        assert_eq!(refused(&["--require-path", "cuda"]), "--require-path");
        assert_eq!(
            refused(&["--require-path", "memory", "--transports", "tcp"]),
            "--require-path"
        );
        assert_eq!(refused(&["--require-path", "tcp"]), "nothing");
        if !PathKind::Rdma.is_built() {
            let error = parse(&["--require-path", "rdma"]).validate().unwrap_err().to_string();
            assert!(
                error.contains("--require-path") && error.contains("--features rdma"),
                "{error}"
            );
        }
    }

    #[test]
    fn paths_are_what_the_build_has_unless_they_are_named() {
        let all = parse(&[]).endpoint_options();
        assert!(all.skip_unavailable && all.transports.contains(&PathKind::Tcp) && all.crc);
        assert!(!all.transports.contains(&PathKind::Memory));
        let named = parse(&["--transports", "tcp,memory", "--no-crc"]).endpoint_options();
        assert_eq!(named.transports, [PathKind::Tcp, PathKind::Memory]);
        assert!(!named.skip_unavailable && !named.crc);
        let required = parse(&["--require-path", "memory"]).endpoint_options();
        assert_eq!(required.require_path, Some(PathKind::Memory));
        assert!(required.transports.contains(&PathKind::Memory));
    }

    #[test]
    fn the_advertised_address_has_the_listener_s_port() {
        let listener = "127.0.0.1:7000".parse().unwrap();
        assert_eq!(parse(&[]).advertised(listener), "127.0.0.1:7000");
        assert_eq!(parse(&["--advertise", "node1"]).advertised(listener), "node1:7000");
        assert_eq!(
            parse(&["--advertise", "fd00::1"]).advertised(listener),
            "[fd00::1]:7000"
        );
    }
}
