//! Rotary position embedding (Su et al. 2021): the angles of each position, and the rotation.
//!
//! Angles are computed as Hugging Face does (frequency and angle in f32) with `libm`, so that they are the same bits on
//! every machine whatever its C library.

use super::{ModelConfig, RopeScaling, RopeStyle};

/// Frequencies of one model.
#[derive(Debug, Clone)]
pub(crate) struct RopeTable {
    /// Radians per position: `(head_dim / 2,)`.
    frequencies: Vec<f32>,
    style: RopeStyle,
}

impl RopeTable {
    /// Frequencies after scaling.
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let dim = config.head_dim as usize;
        let base = f64::from(config.rope_theta);
        let frequencies = (0..dim / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / dim as f32;
                let frequency = 1.0 / libm::pow(base, f64::from(exponent)) as f32;
                scaled(frequency, i, &config.rope_scaling)
            })
            .collect();
        Self {
            frequencies,
            style: config.rope_style,
        }
    }

    /// Cosines, then sines, of one position: `(2, head_dim / 2)`.
    pub(crate) fn angles(&self, position: usize, out: &mut [f32]) {
        let (cosines, sines) = out.split_at_mut(self.frequencies.len());
        for ((cosine, sine), frequency) in cosines.iter_mut().zip(sines).zip(&self.frequencies) {
            let angle = f64::from(position as f32 * frequency);
            *cosine = libm::cos(angle) as f32;
            *sine = libm::sin(angle) as f32;
        }
    }

    /// Length of [`Self::angles`]' output.
    pub(crate) fn angles_len(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// Rotates one head: `(head_dim,)`.
    pub(crate) fn rotate(&self, head: &mut [f32], angles: &[f32]) {
        let half = self.frequencies.len();
        let (cosines, sines) = angles.split_at(half);
        for i in 0..half {
            let (a, b) = match self.style {
                RopeStyle::Interleaved => (2 * i, 2 * i + 1),
                RopeStyle::HalfSplit => (i, i + half),
            };
            let (x, y) = (head[a], head[b]);
            head[a] = x * cosines[i] - y * sines[i];
            head[b] = y * cosines[i] + x * sines[i];
        }
    }
}

/// Llama 3.1's rule is `_compute_llama3_parameters` of Hugging Face transformers.
fn scaled(frequency: f32, index: usize, scaling: &RopeScaling) -> f32 {
    match scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Factors(factors) => frequency / factors[index],
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        } => {
            let original = *original_context as f32;
            let wavelength = 2.0 * std::f32::consts::PI / frequency;
            if wavelength > original / low_freq_factor {
                frequency / factor
            } else if wavelength < original / high_freq_factor {
                frequency
            } else {
                let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}
