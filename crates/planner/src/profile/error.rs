//! What can be wrong with a profile, or with what is asked of it.

use std::path::PathBuf;

/// A profile that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// Not to be read.
    #[error("cannot read the profile {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not to be written.
    #[error("cannot write the profile {path}: {source}")]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not a profile.
    #[error("{path} is no profile: {source}")]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Of another format.
    #[error("the profile {name} has format version {version}, this build reads {expected}")]
    Version {
        /// The profile.
        name: String,
        /// What it says.
        version: u32,
        /// What is read.
        expected: u32,
    },
    /// A field that makes no sense.
    #[error("the profile {name}: {field} {reason}")]
    Field {
        /// The profile.
        name: String,
        /// Which field.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Of another model than was asked for.
    #[error("the profile {name} is of the model {found}, but the plan is for {wanted}")]
    OtherModel {
        /// The profile.
        name: String,
        /// Its model.
        found: String,
        /// The one that is planned for.
        wanted: String,
    },
    /// No such GPU is built in.
    #[error("there is no built-in profile of the GPU `{name}`: {known} are there; measure others with `baton profile`")]
    UnknownGpu {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// No such model is built in.
    #[error("there is no built-in model `{name}`: {known} are there; measure others with `baton profile`")]
    UnknownModel {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// The weights leave no room for KV.
    #[error("{model} does not fit one {gpu}: weights of {weights_gb:.0} GB, and {usable_gb:.0} GB can be used")]
    TooLarge {
        /// The model.
        model: String,
        /// The GPU.
        gpu: String,
        /// Bytes of its weights / 1e9.
        weights_gb: f64,
        /// Bytes that can be used / 1e9.
        usable_gb: f64,
    },
}

impl ProfileError {
    /// A file does not mend itself.
    pub fn is_retryable(&self) -> bool {
        false
    }
}

/// Something was asked that the profile does not cover. Nothing is extrapolated.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("{field} of {value} is outside the profile, which covers {low} to {high}")]
pub struct OutOfRange {
    /// Which field of the profile.
    pub field: &'static str,
    /// What was asked.
    pub value: f64,
    /// From.
    pub low: f64,
    /// To.
    pub high: f64,
}
