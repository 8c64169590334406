//! What a node computes next.
