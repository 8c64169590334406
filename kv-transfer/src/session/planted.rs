//! Bugs that tests plant, to see that they are caught. Nothing of this is in what is built.

/// Whether a test planted this bug here.
#[cfg(test)]
macro_rules! planted {
    ($bug:ident) => {
        $crate::session::planted::is($crate::session::planted::Planted::$bug)
    };
}
#[cfg(not(test))]
macro_rules! planted {
    ($bug:ident) => {
        false
    };
}

#[cfg(test)]
pub(crate) use in_tests::{Planted, is, with};

#[cfg(test)]
mod in_tests {
    use std::cell::Cell;

    /// One bug each.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Planted {
        /// A dead epoch's blocks go back to the pool at once.
        NoQuarantine,
        /// The sender's word that it sent its markers is taken for proof, without the markers.
        FlushIsProof,
        /// An extent of a dead epoch gets a claim.
        OldEpoch,
        /// Another life of the process, or another process, writes under an epoch.
        RestartedPeer,
        /// A duplicate counts as an arrival.
        DuplicateCounts,
        /// The last extent is not waited for.
        EarlyCommit,
        /// The sender lets its source blocks go when its lease runs out, whatever is still being sent.
        SourceFreed,
        /// The epoch is looked at before a payload only: nothing holds the block while it comes.
        CheckedBeforeOnly,
    }

    thread_local! {
        static PLANTED: Cell<Option<Planted>> = const { Cell::new(None) };
    }

    pub(crate) fn is(bug: Planted) -> bool {
        PLANTED.get() == Some(bug)
    }

    /// Runs something with a bug in this thread's machines.
    pub(crate) fn with<T>(bug: Option<Planted>, run: impl FnOnce() -> T) -> T {
        struct Healed;
        impl Drop for Healed {
            fn drop(&mut self) {
                PLANTED.set(None);
            }
        }
        PLANTED.set(bug);
        let _healed = Healed;
        run()
    }
}
