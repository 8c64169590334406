//! Pure membership.
