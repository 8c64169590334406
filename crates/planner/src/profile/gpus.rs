//! What data sheets say of GPUs.

use super::ProfileError;

/// One GPU by its data sheet.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gpu {
    /// Short name.
    pub name: &'static str,
    /// Dense bf16 tensor operations per second.
    pub flops: f64,
    /// Memory bandwidth, bytes per second.
    pub bytes_per_s: f64,
    /// Memory, bytes.
    pub memory: f64,
    /// Network of one GPU in the usual server, bytes per second.
    pub network_bytes_per_s: f64,
    /// Where that is said.
    pub source: &'static str,
}

/// Those that are known. FLOP/s are without sparsity.
pub const GPUS: [Gpu; 6] = [
    Gpu {
        name: "a100",
        flops: 312e12,
        bytes_per_s: 2.039e12,
        memory: 80e9,
        network_bytes_per_s: 25e9,
        source: "NVIDIA A100 80GB SXM data sheet; DGX A100: one 200 Gb/s adapter per GPU",
    },
    Gpu {
        name: "h100",
        flops: 989.4e12,
        bytes_per_s: 3.35e12,
        memory: 80e9,
        network_bytes_per_s: 50e9,
        source: "NVIDIA H100 SXM data sheet; DGX H100: one 400 Gb/s adapter per GPU",
    },
    Gpu {
        name: "h200",
        flops: 989.4e12,
        bytes_per_s: 4.8e12,
        memory: 141e9,
        network_bytes_per_s: 50e9,
        source: "NVIDIA H200 SXM data sheet; DGX H200: one 400 Gb/s adapter per GPU",
    },
    Gpu {
        name: "b200",
        flops: 2250e12,
        bytes_per_s: 8e12,
        memory: 180e9,
        network_bytes_per_s: 50e9,
        source: "NVIDIA DGX B200 data sheet, an eighth of it",
    },
    Gpu {
        name: "l40s",
        flops: 362e12,
        bytes_per_s: 0.864e12,
        memory: 48e9,
        network_bytes_per_s: 25e9,
        source: "NVIDIA L40S data sheet; network assumed: one 200 Gb/s adapter per GPU",
    },
    Gpu {
        name: "mi300x",
        flops: 1307.4e12,
        bytes_per_s: 5.3e12,
        memory: 192e9,
        network_bytes_per_s: 50e9,
        source: "AMD Instinct MI300X data sheet; network assumed: one 400 Gb/s adapter per GPU",
    },
];

/// The one of this name.
///
/// # Errors
/// Names those that are known.
pub fn gpu(name: &str) -> Result<&'static Gpu, ProfileError> {
    GPUS.iter()
        .find(|gpu| gpu.name.eq_ignore_ascii_case(name))
        .ok_or_else(|| ProfileError::UnknownGpu {
            name: name.to_owned(),
            known: GPUS.map(|gpu| gpu.name).join(", "),
        })
}
