//! The life of a request as a pure state machine: state + event -> effects. No IO, no clock, no text: the driver performs
//! the effects and tells what came of them, in any order the network makes.

mod event;
mod request;
#[cfg(test)]
mod request_test;
#[cfg(test)]
mod simulation_test;
mod times;

pub(crate) use event::{
    DecodeEvent, Effect, Event, Failure, FailureKind, FirstToken, Handover, Leg, LocalPrefill, Node, Outcome, Peer,
    Placement, PrefillEvent, TokenBatch,
};
pub(crate) use request::{Request, RequestSpec};
