//! In which form activations meet quantised weights.

/// How activations are multiplied by quantised weights (Q8_0, Q4_0, Q4_1). Weights in f32, f16 or bf16 always meet f32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Activations {
    /// Rounded to 8 bits in blocks of 32 with a scale each, as llama.cpp does: integer products, the fast way.
    #[default]
    Int8,
    /// As they are: weights are decoded to f32. The exact way, against which the other is measured.
    F32,
}
