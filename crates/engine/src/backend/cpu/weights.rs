//! A model's weights, packed for the kernels.

use super::packed::PackedMatrix;
use super::pages::Pages;
use super::pool::Pool;
use crate::backend::Activations;
use crate::error::LoadError;
use crate::load::Checkpoint;
use crate::model::{ElementType, Tensor, TensorName};
use half::{bf16, f16};

/// Everything.
pub(super) struct Weights {
    /// `(vocab, hidden)`; also the head where the model ties them.
    pub embedding: PackedMatrix,
    pub layers: Vec<LayerWeights>,
    /// `(hidden,)`.
    pub final_norm: Vec<f32>,
    /// `(vocab, hidden)`; `None` where it is the embedding.
    pub head: Option<PackedMatrix>,
}

/// One layer's.
pub(super) struct LayerWeights {
    /// `(hidden,)`.
    pub attention_norm: Vec<f32>,
    /// `(heads * head_dim, hidden)`.
    pub query: PackedMatrix,
    /// `(kv_heads * head_dim, hidden)`.
    pub key: PackedMatrix,
    /// `(kv_heads * head_dim, hidden)`.
    pub value: PackedMatrix,
    /// Of q, k and v; empty where the model has none.
    pub biases: [Vec<f32>; 3],
    /// Of each head of q and of k, `(head_dim,)`; empty where the model has none.
    pub head_norms: [Vec<f32>; 2],
    /// `(hidden, heads * head_dim)`.
    pub attention_out: PackedMatrix,
    /// `(hidden,)`.
    pub ffn_norm: Vec<f32>,
    /// `(ffn, hidden)`.
    pub gate: PackedMatrix,
    /// `(ffn, hidden)`.
    pub up: PackedMatrix,
    /// `(hidden, ffn)`.
    pub down: PackedMatrix,
}

/// Takes weights from a checkpoint one by one, counting their bytes.
struct Taker<'a, 'b> {
    checkpoint: &'a Checkpoint,
    activations: Activations,
    pool: &'b mut Pool,
    pages: Pages,
    progress: &'b mut dyn FnMut(u64),
    done: u64,
}

impl Taker<'_, '_> {
    fn matrix(&mut self, name: TensorName) -> Result<PackedMatrix, LoadError> {
        let tensor = self.checkpoint.tensor(name)?;
        let packed = PackedMatrix::new(&tensor, self.activations, self.pool, &mut self.pages)
            .map_err(|source| self.checkpoint.no_memory(name, source))?;
        self.count(&tensor);
        self.checkpoint.release(name);
        Ok(packed)
    }

    fn vector(&mut self, name: TensorName) -> Result<Vec<f32>, LoadError> {
        let tensor = self.checkpoint.tensor(name)?;
        let vector = match tensor.element {
            ElementType::F32 => tensor
                .data
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
            ElementType::F16 => tensor
                .data
                .chunks_exact(2)
                .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect(),
            ElementType::Bf16 => tensor
                .data
                .chunks_exact(2)
                .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect(),
            ElementType::Q8_0 | ElementType::Q4_0 | ElementType::Q4_1 => {
                return Err(self.checkpoint.unsupported_vector(name, tensor.element));
            }
        };
        self.count(&tensor);
        Ok(vector)
    }

    fn count(&mut self, tensor: &Tensor<'_>) {
        self.done += tensor.data.len() as u64;
        (self.progress)(self.done);
    }

    fn layer(&mut self, layer: u32) -> Result<LayerWeights, LoadError> {
        use TensorName as N;
        let config = &self.checkpoint.config;
        let (bias, norm) = (config.qkv_bias, config.qk_norm);
        let mut some = |wanted, name| if wanted { self.vector(name) } else { Ok(Vec::new()) };
        let biases = [
            some(bias, N::QueryBias(layer))?,
            some(bias, N::KeyBias(layer))?,
            some(bias, N::ValueBias(layer))?,
        ];
        let head_norms = [some(norm, N::QueryNorm(layer))?, some(norm, N::KeyNorm(layer))?];
        Ok(LayerWeights {
            attention_norm: self.vector(N::AttentionNorm(layer))?,
            query: self.matrix(N::Query(layer))?,
            key: self.matrix(N::Key(layer))?,
            value: self.matrix(N::Value(layer))?,
            biases,
            head_norms,
            attention_out: self.matrix(N::AttentionOut(layer))?,
            ffn_norm: self.vector(N::FfnNorm(layer))?,
            gate: self.matrix(N::Gate(layer))?,
            up: self.matrix(N::Up(layer))?,
            down: self.matrix(N::Down(layer))?,
        })
    }
}

impl Weights {
    /// Packs all weights. `progress` counts their bytes.
    ///
    /// # Errors
    /// A weight that is missing, or has a wrong shape or type.
    pub(super) fn new(
        checkpoint: &Checkpoint,
        activations: Activations,
        pool: &mut Pool,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, LoadError> {
        let mut taker = Taker {
            checkpoint,
            activations,
            pool,
            pages: Pages::default(),
            progress,
            done: 0,
        };
        let embedding = taker.matrix(TensorName::Embedding)?;
        let final_norm = taker.vector(TensorName::FinalNorm)?;
        let head = match checkpoint.config.tied_embeddings {
            true => None,
            false => Some(taker.matrix(TensorName::Head)?),
        };
        let mut layers = Vec::new();
        for layer in 0..checkpoint.config.layers {
            layers.push(taker.layer(layer)?);
        }
        Ok(Self {
            embedding,
            layers,
            final_norm,
            head,
        })
    }

    /// What turns the last hidden state into logits: `(vocab, hidden)`.
    pub(super) fn output(&self) -> &PackedMatrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}
