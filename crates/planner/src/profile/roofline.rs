//! Profiles of GPUs that nobody ran: the roofline of data sheets, at assumed efficiencies. Marked *estimated*.
//! Source of the model: Williams, Waterman and Patterson, *Roofline*, 2009.

use super::models::Shape;
use super::{FORMAT_VERSION, Gpu, Grid, HandoverPath, HandoverTail, Kind, ModelShape, Profile, ProfileError};

/// Share of peak operations that large matrix products are assumed to reach.
const COMPUTE_EFFICIENCY: f64 = 0.5;
/// Share of peak memory bandwidth that is assumed to be reached.
const MEMORY_EFFICIENCY: f64 = 0.7;
/// Share of the network's bandwidth that is assumed to be reached.
const NETWORK_EFFICIENCY: f64 = 0.8;
/// Assumed launch and scheduling time of a step.
const STEP_OVERHEAD_S: f64 = 0.001;
/// Assumed set-up time of one push.
const PUSH_OVERHEAD_S: f64 = 50e-6;
/// Assumed time by which coordinator and network delay a first token.
const REQUEST_OVERHEAD_S: f64 = 0.002;
/// Share of memory that an engine may use.
const MEMORY_USABLE: f64 = 0.9;
/// Bytes of a bf16 element.
const ELEMENT_BYTES: f64 = 2.0;
const BLOCK_TOKENS: u32 = 16;
const CHUNK_TOKENS: u32 = 8192;
const BATCH_MAX: f64 = 1024.0;
/// Tokens that a batch may attend to, over those that fit: what is shared counts once for each.
const SHARED_MAX: f64 = 8.0;

/// The roofline's profile of one GPU that serves a model by itself.
///
/// # Errors
/// Where the weights do not fit.
pub fn estimate(gpu: &Gpu, shape: &Shape) -> Result<Profile, ProfileError> {
    let weight_bytes = shape.weights() * ELEMENT_BYTES;
    let usable = gpu.memory * MEMORY_USABLE;
    let kv_bytes = shape.kv_elements() * ELEMENT_BYTES;
    let capacity = ((usable - weight_bytes) / kv_bytes).floor();
    if capacity < f64::from(CHUNK_TOKENS) {
        return Err(ProfileError::TooLarge {
            model: shape.name.to_owned(),
            gpu: gpu.name.to_owned(),
            weights_gb: weight_bytes / 1e9,
            usable_gb: usable / 1e9,
        });
    }
    let (flops, bytes_per_s) = (gpu.flops * COMPUTE_EFFICIENCY, gpu.bytes_per_s * MEMORY_EFFICIENCY);
    let read_weights = shape.active_weights() * ELEMENT_BYTES / bytes_per_s;
    // Two operations per weight and token; four per query element and pair of tokens (scores, and the sum of values).
    let linear = 2.0 * shape.active_weights() / flops;
    let attention = 4.0 * f64::from(shape.layers) * f64::from(shape.heads) * f64::from(shape.head_dim) / flops;
    let prefill = |new: f64, context: f64| {
        let compute = new * linear + new * (context + new / 2.0) * attention;
        let read = read_weights + context * kv_bytes / bytes_per_s;
        to_nanos(STEP_OVERHEAD_S + compute.max(read))
    };
    let decode = |batch: f64, context: f64| {
        let compute = batch * linear + context * attention;
        let read = read_weights + context * kv_bytes / bytes_per_s;
        to_nanos(STEP_OVERHEAD_S + compute.max(read))
    };
    let context_max = f64::from(shape.context_max);
    let network = gpu.network_bytes_per_s * NETWORK_EFFICIENCY;
    let sizes = [0.0, (context_max * kv_bytes * 2.0).max(1e9)];
    Ok(Profile {
        version: FORMAT_VERSION,
        name: format!("{}-{}-estimated", gpu.name, shape.name),
        kind: Kind::Estimated,
        sources: vec![
            gpu.source.to_owned(),
            format!("{}: published configuration, bf16", shape.name),
            format!(
                "assumed: {COMPUTE_EFFICIENCY} of peak FLOP/s, {MEMORY_EFFICIENCY} of memory and {NETWORK_EFFICIENCY} of \
                 network bandwidth, {STEP_OVERHEAD_S} s per step, {MEMORY_USABLE} of memory usable"
            ),
        ],
        hardware: gpu.name.to_owned(),
        model: ModelShape {
            name: shape.name.to_owned(),
            layers: shape.layers,
            kv_bytes_per_token: kv_bytes as u64,
        },
        block_tokens: BLOCK_TOKENS,
        chunk_tokens: CHUNK_TOKENS,
        kv_capacity_tokens: capacity as u64,
        queue_max: 64,
        prefill_running_max: 32,
        prefill: Grid::of(rising(1.0, f64::from(CHUNK_TOKENS)), contexts(context_max), prefill),
        // Sequences that share a prefix attend to more tokens than there are in memory.
        decode: Grid::of(rising(1.0, BATCH_MAX), contexts(SHARED_MAX * capacity), decode),
        mixed_saves_s: to_nanos(STEP_OVERHEAD_S + read_weights),
        handover: vec![HandoverPath {
            path: "rdma".to_owned(),
            bytes: sizes.to_vec(),
            seconds: sizes.map(|bytes| to_nanos(PUSH_OVERHEAD_S + bytes / network)).to_vec(),
        }],
        handover_tail: HandoverTail::always(0.0),
        contended: None,
        request_overhead_s: REQUEST_OVERHEAD_S,
        // Assumed: weights from local disks at 2 GB/s, and 20 s for the process.
        startup_s: 20.0 + weight_bytes / 2e9,
        role_change_s: 1.0,
        drain_s: 1.0,
        residuals: Vec::new(),
        error_bars: Vec::new(),
    })
}

/// Whole nanoseconds: files stay readable, and survive being written and read.
fn to_nanos(seconds: f64) -> f64 {
    (seconds * 1e9).round() / 1e9
}

/// Powers of two and what is between them, up to `last`.
fn rising(first: f64, last: f64) -> Vec<f64> {
    let mut points = Vec::new();
    let mut point = first;
    while point < last {
        points.push(point);
        if point >= 4.0 {
            points.extend(
                [1.25, 1.5, 1.75]
                    .map(|part| point * part)
                    .into_iter()
                    .filter(|p| *p < last),
            );
        }
        point *= 2.0;
    }
    points.push(last);
    points
}

fn contexts(last: f64) -> Vec<f64> {
    let mut points = vec![0.0];
    points.extend(rising(1024.0, last));
    points
}

#[cfg(test)]
mod tests {
    use super::super::{gpu, model};
    use super::*;

    #[test]
    fn an_h100_reads_8b_weights_in_some_milliseconds_and_is_compute_bound_in_prefill() {
        let profile = estimate(gpu("h100").unwrap(), model("llama-3.1-8b").unwrap()).unwrap();
        profile.check().unwrap();
        let step = profile.decode.at(1.0, 100.0, ["x", "y"]).unwrap();
        assert!((0.0065..0.0085).contains(&step), "{step}");
        let chunk = profile.prefill.at(8192.0, 0.0, ["x", "y"]).unwrap();
        let tokens_per_s = 8192.0 / chunk;
        assert!((25_000.0..33_000.0).contains(&tokens_per_s), "{tokens_per_s}");
        assert!(
            (400_000..440_000).contains(&profile.kv_capacity_tokens),
            "{}",
            profile.kv_capacity_tokens
        );
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let error = estimate(gpu("h100").unwrap(), model("llama-3.1-70b").unwrap()).unwrap_err();
        assert!(error.to_string().contains("weights of 141 GB"), "{error}");
        assert!(gpu("h900").unwrap_err().to_string().contains("h100"));
    }
}
