//! Which processes a cluster is made of, and with which flags. Pure: the machine's figures are given.

use crate::models::ModelSource;
use anyhow::{Result, ensure};
use baton_node_host::CpuList;
use baton_node_runtime::format_bytes;
use std::net::SocketAddr;

/// A node's KV gets no more than this unless told: what a few long requests need, and quick to claim at the start.
const KV_PER_NODE_MAX: u64 = 1 << 30;
/// Below this a node holds no useful context.
const KV_PER_NODE_MIN: u64 = 16 << 20;

/// How long requests that run may take once the cluster is told to end.
const DRAIN_TIMEOUT: &str = "3s";

/// How many nodes of which kind.
#[derive(Debug, Clone, clap::Args)]
pub struct Shape {
    /// Prefill nodes; 0 runs colocated: decode nodes prefill too
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub prefill: usize,
    /// Decode nodes
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub decode: usize,
    /// smollm2, a .gguf file, a folder with config.json and *.safetensors, a Hugging Face repository, or stub
    #[arg(long, value_name = "MODEL", default_value = "smollm2")]
    pub model: ModelSource,
}

/// A cluster to start.
#[derive(Debug, Clone)]
pub struct ClusterOptions {
    /// The nodes.
    pub shape: Shape,
    /// What `shape.model` came to.
    pub model: String,
    /// KV memory of all nodes together, bytes; none: half of the memory available, within bounds.
    pub kv_bytes: Option<u64>,
    /// Compute threads of each node, 0 for one per core; none: the cores shared out.
    pub threads: Option<usize>,
    /// CPUs that are shared out to the nodes' compute threads, one each, in this order; none: not pinned.
    pub cpus: Vec<usize>,
    /// `embedded` or `etcd://...`.
    pub store: String,
    /// The cluster's name in the store.
    pub name: String,
    /// The coordinator's HTTP door.
    pub http_listen: SocketAddr,
    /// The coordinator's gRPC door.
    pub grpc_listen: SocketAddr,
    /// More flags of the coordinator.
    pub coordinator_flags: Vec<String>,
    /// More flags of all nodes.
    pub node_flags: Vec<String>,
    /// `--log-filter` of all.
    pub log_filter: String,
    /// Children's logs are shown as they come; else kept for when something goes wrong.
    pub show_logs: bool,
}

/// What the machine has to give.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// Bytes.
    pub available_memory: u64,
    /// Cores that this process may use.
    pub cores: usize,
}

/// A process to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildPlan {
    /// What it is called in logs.
    pub name: String,
    /// Its arguments, after the program's name.
    pub arguments: Vec<String>,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(0) => Err("a cluster needs at least 1".to_owned()),
        Ok(count) => Ok(count),
        Err(error) => Err(error.to_string()),
    }
}

impl ClusterOptions {
    /// The coordinator.
    pub fn coordinator(&self) -> ChildPlan {
        let flags = [
            ("--http-listen", self.http_listen.to_string()),
            ("--grpc-listen", self.grpc_listen.to_string()),
            ("--admin-listen", "127.0.0.1:0".to_owned()),
            ("--store", self.store.clone()),
            ("--cluster", self.name.clone()),
            ("--log-filter", self.log_filter.clone()),
            ("--drain-timeout", DRAIN_TIMEOUT.to_owned()),
        ];
        let mut plan = child("coordinator", &["coordinator", "--exit-with-parent"], &flags);
        plan.arguments.extend(self.coordinator_flags.iter().cloned());
        plan
    }

    /// The nodes, which find each other in the store at `store`.
    ///
    /// # Errors
    /// Where there is too little memory for all of them.
    pub fn nodes(&self, store: &str, machine: Machine) -> Result<Vec<ChildPlan>> {
        let count = self.shape.prefill + self.shape.decode;
        let kv_bytes = self.kv_bytes_per_node(count, machine)?;
        let threads = self.threads.unwrap_or_else(|| (machine.cores / count).max(1));
        let mut cpus = self.cpus.chunks_exact(threads.max(1));
        ensure!(
            self.cpus.is_empty() || threads > 0 && cpus.len() >= count,
            "--pin wants a CPU for each compute thread: {count} nodes with {} threads each do not fit on {} CPUs, give --threads \
             or start fewer nodes",
            if threads > 0 { threads } else { machine.cores },
            self.cpus.len()
        );
        let mut nodes = Vec::new();
        for (role, many) in [("prefill", self.shape.prefill), ("decode", self.shape.decode)] {
            for number in 1..=many {
                let name = format!("{role}-{number}");
                let mut flags = vec![
                    ("--role", role.to_owned()),
                    ("--model", self.model.clone()),
                    ("--store", store.to_owned()),
                    ("--cluster", self.name.clone()),
                    ("--kv-bytes", kv_bytes.to_string()),
                    ("--threads", threads.to_string()),
                    ("--drain-timeout", DRAIN_TIMEOUT.to_owned()),
                    ("--log-filter", self.log_filter.clone()),
                ];
                if let Some(cpus) = cpus.next() {
                    flags.push(("--cpus", CpuList(cpus.to_vec()).to_string()));
                }
                // On a store that others use too the names could be taken: there each node makes up its own.
                if self.store == "embedded" {
                    flags.push(("--node-id", name.clone()));
                }
                let mut plan = child(&name, &["node", "--exit-with-parent"], &flags);
                plan.arguments.extend(self.node_flags.iter().cloned());
                nodes.push(plan);
            }
        }
        Ok(nodes)
    }

    fn kv_bytes_per_node(&self, nodes: usize, machine: Machine) -> Result<u64> {
        let nodes = nodes as u64;
        let (bytes, source) = match self.kv_bytes {
            Some(total) => (total / nodes, "--kv-bytes"),
            None => (
                (machine.available_memory / 2 / nodes).min(KV_PER_NODE_MAX),
                "half of the memory available",
            ),
        };
        ensure!(
            bytes >= KV_PER_NODE_MIN,
            "{source} gives each of {nodes} nodes {} of KV memory, less than the {} that a node needs: start fewer nodes, \
             free memory, or raise --kv-bytes",
            format_bytes(bytes),
            format_bytes(KV_PER_NODE_MIN)
        );
        Ok(bytes)
    }
}

fn child(name: &str, words: &[&str], flags: &[(&str, String)]) -> ChildPlan {
    let words = words.iter().map(|&word| word.to_owned());
    let flags = flags
        .iter()
        .flat_map(|(flag, value)| [(*flag).to_owned(), value.clone()]);
    ChildPlan {
        name: name.to_owned(),
        arguments: words.chain(flags).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: Machine = Machine {
        available_memory: 1 << 30,
        cores: 4,
    };

    fn options(prefill: usize, decode: usize, kv_bytes: Option<u64>) -> ClusterOptions {
        let model = ModelSource::Stub("stub".to_owned());
        ClusterOptions {
            shape: Shape { prefill, decode, model },
            model: "stub".to_owned(),
            kv_bytes,
            threads: None,
            cpus: Vec::new(),
            store: "embedded".to_owned(),
            name: "default".to_owned(),
            http_listen: "127.0.0.1:0".parse().unwrap(),
            grpc_listen: "127.0.0.1:0".parse().unwrap(),
            coordinator_flags: Vec::new(),
            node_flags: Vec::new(),
            log_filter: "info".to_owned(),
            show_logs: false,
        }
    }

    fn value<'a>(plan: &'a ChildPlan, flag: &str) -> Option<&'a str> {
        let place = plan.arguments.iter().position(|argument| argument == flag)?;
        plan.arguments.get(place + 1).map(String::as_str)
    }

    #[test]
    fn memory_and_threads_are_shared_out() {
        let nodes = options(1, 1, None).nodes("etcd://s", MACHINE).unwrap();
        let names: Vec<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
        assert_eq!(names, ["prefill-1", "decode-1"]);
        assert_eq!(value(&nodes[0], "--kv-bytes"), Some("268435456"));
        assert_eq!(value(&nodes[0], "--threads"), Some("2"));
        assert_eq!(value(&nodes[1], "--role"), Some("decode"));
        assert_eq!(value(&nodes[1], "--node-id"), Some("decode-1"));
        assert_eq!(value(&nodes[1], "--store"), Some("etcd://s"));
        let six = options(3, 3, Some(6 << 30)).nodes("etcd://s", MACHINE).unwrap();
        assert_eq!(value(&six[5], "--kv-bytes"), Some("1073741824"));
        assert_eq!(value(&six[5], "--threads"), Some("1"));
        let big = Machine {
            available_memory: 1 << 40,
            cores: 4,
        };
        assert_eq!(
            value(&options(0, 1, None).nodes("s", big).unwrap()[0], "--kv-bytes"),
            Some("1073741824")
        );
    }

    #[test]
    fn cpus_are_shared_out_where_threads_are_pinned() {
        let pinned = |threads, cpus: &[usize]| {
            let (threads, cpus) = (Some(threads), cpus.to_vec());
            let options = ClusterOptions {
                threads,
                cpus,
                ..options(1, 1, None)
            };
            options.nodes("s", MACHINE)
        };
        let nodes = pinned(2, &[0, 2, 4, 6, 7]).unwrap();
        assert_eq!(value(&nodes[0], "--cpus"), Some("0,2"));
        assert_eq!(value(&nodes[1], "--cpus"), Some("4,6"));
        let free = options(1, 1, None).nodes("s", MACHINE).unwrap();
        assert_eq!(value(&free[0], "--cpus"), None);
        for threads in [0, 3] {
            let error = pinned(threads, &[0, 1, 2, 3]).unwrap_err().to_string();
            assert!(error.contains("do not fit on 4 CPUs"), "{error}");
        }
    }

    #[test]
    fn too_little_memory_names_the_remedy() {
        let error = options(8, 8, Some(100 << 20))
            .nodes("s", MACHINE)
            .unwrap_err()
            .to_string();
        assert!(error.contains("--kv-bytes") && error.contains("16 nodes"), "{error}");
    }

    #[test]
    fn on_a_shared_store_nodes_name_themselves() {
        let mut options = options(1, 1, None);
        options.store = "etcd://a:1".to_owned();
        assert_eq!(
            value(&options.nodes("etcd://a:1", MACHINE).unwrap()[0], "--node-id"),
            None
        );
        assert_eq!(value(&options.coordinator(), "--store"), Some("etcd://a:1"));
    }
}
