//! Where models come from: a file, a known name, a Hugging Face repository, or the scripted stub. Whoever takes a
//! `--model` resolves it here; what is not on this machine is fetched, checked and cached first.

mod cache;
mod hub;
mod progress;
mod smollm2;
mod source;

pub use source::ModelSource;
