//! What devices and drivers refuse.

use std::io;

/// A call that a device or its driver refused.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {source}")]
pub(in crate::transport) struct VerbsError {
    /// Which call.
    pub(in crate::transport) call: &'static str,
    /// The system's reason.
    pub(in crate::transport) source: io::Error,
}

impl VerbsError {
    /// The reason is in `errno`.
    pub(super) fn last(call: &'static str) -> Self {
        let source = io::Error::last_os_error();
        Self { call, source }
    }

    /// Of a call that returns the error's number, zero where there is none.
    pub(super) fn check(call: &'static str, number: i32) -> Result<(), Self> {
        match number {
            0 => Ok(()),
            number => Err(Self {
                call,
                source: io::Error::from_raw_os_error(number.abs()),
            }),
        }
    }

    /// Of a call that the driver does not have.
    pub(super) fn missing(call: &'static str) -> Self {
        Self {
            call,
            source: io::ErrorKind::Unsupported.into(),
        }
    }
}
