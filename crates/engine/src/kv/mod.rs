//! Who owns which block of one arena.
//!
//! The pool knows only ids: the bytes live in the arena, and holding a guard ([`BlockTable`], [`Reservation`],
//! [`Quarantined`]) is the proof that its holder may use them. Invariants: each block is in exactly one state; a block
//! that a guard names is never given out again; only full blocks with final contents have an identity.

mod guards;
mod integrity;
mod journal;
mod pool;
mod state;
mod zero;

#[cfg(test)]
mod model_test;

pub use guards::{BlockTable, Quarantined, Reservation};
pub use integrity::IntegrityFault;
pub use pool::BlockPool;
pub use state::NoRoom;
