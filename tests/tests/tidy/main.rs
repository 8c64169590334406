//! Hygiene that a compiler does not check: which crate may know which, how large files are, where unsafe code and reads of
//! the environment stand, that metrics are documented. Each check looks at everything and names all offenders at once.

mod arrows;
mod files;
mod metrics;
mod source;
mod workspace;

use std::fmt::Display;

/// Fails naming every offender.
fn nothing<T: Display>(rule: &str, offenders: Vec<T>) {
    let list: Vec<String> = offenders.iter().map(|offender| format!("  {offender}")).collect();
    assert!(list.is_empty(), "{rule}:\n{}", list.join("\n"));
}
