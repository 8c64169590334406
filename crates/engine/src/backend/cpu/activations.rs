//! Per-token arithmetic between the products. Plain Rust without fusing: the same bits on every machine.

/// Partial sums of a norm: fixed, so that the order of addition is.
const PARTS: usize = 16;

/// `out = x / sqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich 2019).
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let factor = rms_factor(x, eps);
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * factor * weight;
    }
}

/// As [`rms_norm`], in place.
pub(super) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    let factor = rms_factor(x, eps);
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = *x * factor * weight;
    }
}

fn rms_factor(x: &[f32], eps: f32) -> f32 {
    let mut parts = [0.0f32; PARTS];
    for piece in x.chunks(PARTS) {
        for (part, x) in parts.iter_mut().zip(piece) {
            *part += x * x;
        }
    }
    let sum: f32 = parts.iter().sum();
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

/// `x += bias`; an empty bias adds nothing.
pub(super) fn add_bias(x: &mut [f32], bias: &[f32]) {
    for (x, bias) in x.iter_mut().zip(bias) {
        *x += bias;
    }
}
