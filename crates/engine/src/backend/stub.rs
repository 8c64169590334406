//! The scripted backend: deterministic tokens and latencies for tests of everything else.

use super::Backend;

/// What the stand-in pretends to be.
#[derive(Debug, Clone, PartialEq)]
pub struct StubSpec {}

/// Makes one.
pub fn stub(_spec: StubSpec) -> Box<dyn Backend> {
    todo!()
}
