//! From `--model` to a loaded backend with its card, and from `--kv-bytes` to an arena.

use crate::error::BringUpError;
use crate::options::NodeOptions;
use baton_engine::{Activations, Backend, LoadOptions, StubSpec};
use baton_kv_transfer::Arena;
use baton_node_runtime::{Clock, Moment, format_bytes, process};
use baton_text::{EngineFacts, ModelCard};
use baton_types::{KvDtype, KvGeometry};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How often loading says how far it is; shorter loads say nothing.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);
/// A stub's blocks are tiny: so many (a million tokens with the default block) serve every test of it.
const STUB_BLOCKS_MOST: u64 = 65_536;
/// A node with fewer blocks serves nothing of use.
const BLOCKS_LEAST: u64 = 4;

/// A model, ready to compute.
pub struct LoadedModel {
    /// What computes.
    pub backend: Box<dyn Backend>,
    /// What coordinators need of it.
    pub card: ModelCard,
}

/// Whether this names the scripted stand-in.
fn is_stub(model: &str) -> bool {
    model == "stub" || model.starts_with("stub:")
}

/// Checks what can be known of `--model` before anything long is begun.
///
/// # Errors
/// A stub's description that is none, a path that leads nowhere.
pub fn check_model(options: &NodeOptions) -> Result<(), BringUpError> {
    if is_stub(&options.model) {
        options.model.parse::<StubSpec>()?;
        return Ok(());
    }
    let path = Path::new(&options.model);
    match std::fs::metadata(path) {
        Ok(_) => Ok(()),
        Err(source) => Err(BringUpError::ModelPath {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Loads the model. Blocks for as long as that takes.
///
/// # Errors
/// Whatever is wrong with the file, with its name and a remedy.
pub fn load(options: &NodeOptions, clock: Clock) -> Result<LoadedModel, BringUpError> {
    let kv_dtype = KvDtype::from(options.kv_dtype);
    let (backend, text) = if is_stub(&options.model) {
        (baton_engine::stub(options.model.parse::<StubSpec>()?), None)
    } else {
        let path = Path::new(&options.model);
        // The small part first: a missing tokenizer should not cost a long load.
        let text = ModelCard::text_of(path)?;
        let load_options = LoadOptions {
            threads: options.threads,
            cpus: options.cpus.clone().map_or(Vec::new(), |list| list.0),
            kv_dtype,
            isa: None,
            activations: Activations::Int8,
        };
        let mut progress = Progress::new(clock);
        let backend = baton_engine::load(path, &load_options, &mut |done, total| progress.show(done, total))?;
        (backend, Some(text))
    };
    let facts = EngineFacts {
        fingerprint: backend.fingerprint(),
        numerics: backend.numerics().clone(),
        block_tokens: options.block_tokens,
        kv_dtype,
    };
    let context_tokens = backend.config().context_tokens;
    let mut card = match text {
        None => ModelCard::stub(&backend.config().name, context_tokens, facts),
        Some(text) => ModelCard::new(text, facts),
    };
    card.context_tokens = context_tokens;
    if let Some(name) = &options.model_name {
        card.name.clone_from(name);
    }
    Ok(LoadedModel { backend, card })
}

/// Says how far loading is, where it takes long.
struct Progress {
    clock: Clock,
    shown: Moment,
}

impl Progress {
    fn new(clock: Clock) -> Self {
        Self {
            clock,
            shown: clock.now(),
        }
    }

    fn show(&mut self, done: u64, total: u64) {
        let now = self.clock.now();
        if now.saturating_since(self.shown) < PROGRESS_EVERY {
            return;
        }
        self.shown = now;
        let percent = (100 * done).checked_div(total).unwrap_or(100);
        tracing::info!(percent, bytes = done, total_bytes = total, "loading the model");
    }
}

/// Checks `--kv-bytes` against the memory that there is, before anything long is begun.
///
/// # Errors
/// Where there is not so much.
pub fn check_kv_bytes(options: &NodeOptions) -> Result<(), BringUpError> {
    let available = process::available_memory();
    match options.kv_bytes {
        Some(wanted) if wanted > available => Err(BringUpError::KvMemory { wanted, available }),
        Some(_) | None => Ok(()),
    }
}

/// Maps the KV memory and makes it present. Blocks for as long as that takes.
///
/// # Errors
/// Where the memory is not there, or holds too few blocks.
pub fn arena(options: &NodeOptions, geometry: KvGeometry) -> Result<Arc<Arena>, BringUpError> {
    check_kv_bytes(options)?;
    let given = options.kv_bytes.unwrap_or_else(|| process::available_memory() / 2);
    let block_bytes = geometry.block_bytes() as u64;
    let most = if is_stub(&options.model) {
        STUB_BLOCKS_MOST
    } else {
        u64::from(u32::MAX)
    };
    let blocks = (given / block_bytes).min(most);
    if blocks < BLOCKS_LEAST {
        return Err(BringUpError::KvTooSmall {
            given,
            blocks,
            block_bytes,
            least: BLOCKS_LEAST,
        });
    }
    let count = u32::try_from(blocks).unwrap_or(u32::MAX);
    let arena = Arena::allocate(geometry, count, &mut |_, _| {})?;
    let bytes = arena.bytes();
    tracing::info!(blocks, bytes, size = format_bytes(bytes as u64), "kv memory is ready");
    Ok(arena)
}
