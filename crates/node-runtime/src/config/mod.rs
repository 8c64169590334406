//! Configuration: flags over environment over a TOML file over defaults, all through clap, so that `--help` shows
//! everything there is. A command is configurable by file where it flattens [`ConfigOptions`].

mod file;
mod layers;
mod print;
mod values;

pub use file::ConfigFileError;
pub use layers::{ConfigError, ConfigOptions, parse, parse_from};
pub use values::{InvalidValue, format_bytes, format_duration, parse_bytes, parse_duration};
