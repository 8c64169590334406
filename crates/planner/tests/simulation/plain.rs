//! Profiles as simple as the truths that are tested with them.

use baton_planner::profile::{FORMAT_VERSION, Grid, HandoverPath, HandoverTail, Kind, ModelShape, NodeModel, Profile};
use std::sync::Arc;

/// Prefill takes a millisecond per token and decoding `step_s` whatever the batch; hand-overs take next to nothing.
pub fn plain(step_s: f64) -> Profile {
    let axis = vec![0.0, 1e6];
    Profile {
        version: FORMAT_VERSION,
        name: "plain".to_owned(),
        kind: Kind::Estimated,
        sources: Vec::new(),
        hardware: "none".to_owned(),
        model: ModelShape {
            name: "plain".to_owned(),
            layers: 1,
            kv_bytes_per_token: 1,
        },
        block_tokens: 10,
        chunk_tokens: 100_000,
        kv_capacity_tokens: 10_000_000,
        queue_max: 1_000_000,
        prefill_running_max: 1,
        prefill: Grid::of(axis.clone(), axis.clone(), |new, _| new / 1e3),
        decode: Grid::of(vec![1.0, 1e4], vec![0.0, 1e9], |_, _| step_s),
        mixed_saves_s: 0.0,
        handover: vec![HandoverPath {
            path: "tcp".to_owned(),
            bytes: vec![0.0, 1e12],
            seconds: vec![0.0, 1e-3],
        }],
        handover_tail: HandoverTail::always(0.0),
        contended: None,
        request_overhead_s: 0.0,
        startup_s: 0.0,
        role_change_s: 0.0,
        drain_s: 0.0,
        residuals: Vec::new(),
        error_bars: Vec::new(),
    }
}

pub fn node(profile: &Profile) -> Arc<NodeModel> {
    profile.check().unwrap();
    Arc::new(NodeModel::new(profile))
}
