//! The command line.

use crate::case::{Case, PAGES};
use anyhow::{Result, ensure};
use baton_kv_transfer::PathKind;
use clap::{Parser, ValueEnum};
use std::ffi::OsString;

/// Which of the two processes this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Role {
    Initiator,
    Target,
}

/// A switch that is said aloud.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    On,
    Off,
}

impl Switch {
    pub fn is_on(self) -> bool {
        self == Self::On
    }
}

/// Measures writes of scattered KV blocks from one process into another.
#[derive(Parser)]
pub struct Options {
    /// tcp, shm, rdma, or memory (which has both ends in one process).
    #[arg(long, default_value = "tcp")]
    pub transport: PathKind,
    /// Sizes of a block, bytes, multiples of 64.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "4096,16384,65536,262144,1048576,4194304"
    )]
    pub block_bytes: Vec<u32>,
    /// Whole blocks of real models instead: Llama-3.1-8B and 70B, a TP8 rank of it, Qwen3-8B and 235B, DeepSeek MLA, of 16
    /// and 64 tokens.
    #[arg(long)]
    pub pages: bool,
    /// Check each extent's CRC32C (tcp only).
    #[arg(long, value_enum, default_value = "on")]
    pub crc: Switch,
    /// Measure a digest over all bytes (CRC-64/NVME) at both ends too: a pass of its own after each round.
    #[arg(long, value_enum, default_value = "off")]
    pub digest: Switch,
    /// Connections of the path; the transport's default if not given.
    #[arg(long)]
    pub connections: Option<usize>,
    /// Timed rounds; the median of them counts. Rounds beside another load are repeated, to three times as many.
    #[arg(long, default_value_t = 9)]
    pub rounds: usize,
    /// Rounds before them.
    #[arg(long, default_value_t = 2)]
    pub warmup: usize,
    /// Bytes written in a round, MiB.
    #[arg(long, default_value_t = 256)]
    pub total_mib: usize,
    /// Bytes of each arena, MiB.
    #[arg(long, default_value_t = 512)]
    pub pool_mib: usize,
    /// Writes of a single block, one at a time, for the latency.
    #[arg(long, default_value_t = 200)]
    pub lat_iters: usize,
    /// Rounds end after this long, seconds, once there are seven.
    #[arg(long, default_value_t = 20)]
    pub max_s: u64,
    /// Makes the random slots.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The address that the target listens on, without a port (tcp and rdma).
    #[arg(long, default_value = "127.0.0.1")]
    pub host: std::net::IpAddr,
    /// The rdma devices of the initiator and of the target; all of them where none is named.
    #[arg(long, value_delimiter = ',')]
    pub devices: Vec<String>,
    /// Lines of JSON instead of a table.
    #[arg(long)]
    pub json: bool,
    #[arg(long, hide = true, value_enum, default_value = "initiator")]
    pub role: Role,
}

impl Options {
    /// What is to be measured.
    pub fn cases(&self) -> Result<Vec<Case>> {
        ensure!(self.rounds > 0, "--rounds must be at least 1");
        ensure!(
            self.total_mib <= self.pool_mib,
            "--total-mib {} does not fit into --pool-mib {}",
            self.total_mib,
            self.pool_mib
        );
        let cases: Vec<Case> = match self.pages {
            true => PAGES.iter().flat_map(Case::pages).collect(),
            false => self.block_bytes.iter().map(|bytes| Case::block(*bytes)).collect(),
        };
        for case in &cases {
            let (bytes, total) = (case.geometry.block_bytes(), self.total_mib << 20);
            ensure!(
                bytes > 0 && bytes == case.bytes && bytes <= total,
                "a block of {} bytes: it must be a multiple of 64 and at most --total-mib",
                case.bytes
            );
        }
        Ok(cases)
    }

    /// The command line of the target: the same, in the other role.
    pub fn of_target() -> Vec<OsString> {
        let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
        arguments.extend(["--role".into(), "target".into()]);
        arguments
    }
}
