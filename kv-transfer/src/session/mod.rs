//! The hand-over as pure state machines: state + event -> state + effects. No IO, no clock, no tasks.
//!
//! `receiver` is one machine per endpoint, since room, shares and fencing concern all hand-overs of a peer; `sender` is one
//! machine per hand-over. Time arrives with each event, as the time since the endpoint started. The driver in `endpoint`
//! owns the machines, and performs their effects in order before it brings the next event.

/// Whether a test planted this bug here: never in what is built.
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

mod arrival;
mod digest;
mod message;
#[cfg(test)]
mod planted;
mod receiver;
mod sender;

pub(crate) use digest::mix;
pub(crate) use message::{Header, ToReceiver, ToSender};
pub(crate) use receiver::{ClaimTicket, Connection, Effect, Event, Limits, NotExpected, Receiver};
pub(crate) use sender::{Outcome, Push, Sender, SenderEffect, SenderEvent, SenderLimits};
