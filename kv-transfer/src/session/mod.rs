//! The hand-over as pure state machines: state + event -> state + effects. No IO, no clock, no tasks.
//!
//! `receiver` is one machine per endpoint, since room, shares and fencing concern all hand-overs of a peer; `sender` is one
//! machine per hand-over. Time arrives with each event, as the time since the endpoint started. The driver in `endpoint`
//! owns the machines, and performs their effects in order before it brings the next event.

#[macro_use]
mod planted;

mod arrival;
#[cfg(test)]
mod campaign;
mod digest;
mod message;
mod receiver;
mod sender;

pub(crate) use digest::mix;
pub(crate) use message::{Header, ToReceiver, ToSender};
pub(crate) use receiver::{ClaimTicket, Connection, Effect, Event, Limits, NotExpected, Receiver};
pub(crate) use sender::{Outcome, Push, Sender, SenderEffect, SenderEvent, SenderLimits};
