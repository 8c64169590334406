//! What makes two models the same: BLAKE3 over architecture, hyperparameters, and every weight's name, shape, type, bytes.

use super::checkpoint::{Checkpoint, Entry};
use crate::model::{ModelConfig, RopeScaling};
use baton_types::ModelFingerprint;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};

type Digest = [u8; 32];

impl Checkpoint {
    /// Bytes of all weights.
    pub(super) fn weight_bytes(&self) -> u64 {
        self.entries.values().map(|entry| entry.bytes.len() as u64).sum()
    }

    /// Hashes everything, on all cores. `progress` counts bytes of weights.
    pub(super) fn fingerprint(&self, progress: &mut dyn FnMut(u64)) -> ModelFingerprint {
        let entries: Vec<(&String, &Entry)> = self.entries.iter().collect();
        let digests = self.digests(&entries, progress);
        let mut hasher = blake3::Hasher::new();
        field(&mut hasher, b"baton model fingerprint 1");
        field(&mut hasher, hyperparameters(&self.config).as_bytes());
        for ((name, entry), digest) in entries.iter().zip(digests) {
            field(&mut hasher, name.as_bytes());
            let element = entry
                .element
                .as_ref()
                .map_or_else(String::clone, |element| element.name().to_owned());
            field(&mut hasher, element.as_bytes());
            field(&mut hasher, format!("{:?}", entry.shape).as_bytes());
            field(&mut hasher, &digest);
        }
        ModelFingerprint(*hasher.finalize().as_bytes())
    }

    fn digests(&self, entries: &[(&String, &Entry)], progress: &mut dyn FnMut(u64)) -> Vec<Digest> {
        let next = AtomicUsize::new(0);
        let digests = Mutex::new(vec![[0; 32]; entries.len()]);
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
        std::thread::scope(|scope| {
            let (done_tx, done_rx) = mpsc::channel();
            for _ in 0..threads {
                let done_tx = done_tx.clone();
                scope.spawn(|| {
                    let done_tx = done_tx;
                    loop {
                        let mine = next.fetch_add(1, Ordering::Relaxed);
                        let Some((_, entry)) = entries.get(mine) else { return };
                        let file = &self.files[entry.file];
                        let bytes = &file.bytes()[entry.bytes.clone()];
                        let digest = *blake3::hash(bytes).as_bytes();
                        file.release(entry.bytes.clone());
                        digests.lock().unwrap_or_else(PoisonError::into_inner)[mine] = digest;
                        // The receiver outlives the threads; a failed send could only mean that nobody counts any more.
                        let _ = done_tx.send(bytes.len() as u64);
                    }
                });
            }
            drop(done_tx);
            let mut done = 0;
            for bytes in done_rx {
                done += bytes;
                progress(done);
            }
        });
        digests.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

fn field(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

/// Everything of the configuration that changes what is computed. Neither the name nor the end tokens do.
fn hyperparameters(config: &ModelConfig) -> String {
    let bits = |x: f32| x.to_bits();
    let scaling = match &config.rope_scaling {
        RopeScaling::None => "none".to_owned(),
        RopeScaling::Linear { factor } => format!("linear {}", bits(*factor)),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        } => {
            let [a, b, c] = [*factor, *low_freq_factor, *high_freq_factor].map(bits);
            format!("llama3 {a} {b} {c} {original_context}")
        }
        RopeScaling::Factors(factors) => format!("factors {:?}", factors.iter().map(|x| bits(*x)).collect::<Vec<_>>()),
    };
    format!(
        "{} layers {} hidden {} heads {} kv_heads {} head_dim {} ffn {} vocab {} context {} theta {} rope {:?} scaling {} \
         eps {} bias {} qk_norm {} tied {}",
        config.architecture.name(),
        config.layers,
        config.hidden,
        config.heads,
        config.kv_heads,
        config.head_dim,
        config.ffn,
        config.vocab,
        config.context_tokens,
        bits(config.rope_theta),
        config.rope_style,
        scaling,
        bits(config.rms_eps),
        config.qkv_bias,
        config.qk_norm,
        config.tied_embeddings,
    )
}
