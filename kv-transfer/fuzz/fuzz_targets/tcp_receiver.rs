//! Whatever a writer sends behind its handshake: nothing outside its grants is written, nothing false lands, no claim stays.
#![no_main]

use baton_kv_transfer::fuzzing::TcpVictim;
use libfuzzer_sys::fuzz_target;
use std::cell::{LazyCell, RefCell};

thread_local! {
    static VICTIM: LazyCell<RefCell<TcpVictim>> = LazyCell::new(|| RefCell::new(TcpVictim::start()));
}

fuzz_target!(|program: &[u8]| {
    VICTIM.with(|victim| victim.borrow_mut().feed(program));
});
