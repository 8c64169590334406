//! The life of nodes: they start, change their role, are stopped and fail, as live ones do. A node that is to be empty takes
//! nothing new; its prompts end, its sequences move or end, and what is left at the deadline is done anew elsewhere.

use super::cluster::Cluster;
use super::event::Event;
use super::run::{DECODE_RUNNING_MAX, seat};
use crate::Nanos;
use crate::profile::OutOfRange;
use baton_scheduling::{Figures, Side};

/// What is done to a node. An order that does not fit the node's state does nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// It becomes empty and takes up the other role.
    Role {
        /// Which node.
        node: usize,
        /// What it does from then on.
        side: Side,
    },
    /// One that is not there starts.
    Start {
        /// Which node.
        node: usize,
        /// What it does.
        side: Side,
    },
    /// It becomes empty and is there no more.
    Stop {
        /// Which node.
        node: usize,
    },
    /// It is gone at once, and what it held with it.
    Fail {
        /// Which node.
        node: usize,
    },
}

impl Order {
    /// Which node it is for.
    pub fn node(&self) -> usize {
        match *self {
            Self::Role { node, .. } | Self::Start { node, .. } | Self::Stop { node } | Self::Fail { node } => node,
        }
    }
}

/// Where a node is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Not there: not started yet, stopped, or failed.
    Away,
    /// It will take work soon: it starts, or takes up its other role.
    Coming,
    /// It takes work.
    Ready,
    /// It takes nothing new.
    Draining,
}

/// One node's life.
#[derive(Debug)]
pub(super) struct Life {
    pub state: State,
    pub side: Side,
    /// Changes with everything that happens to it.
    pub number: u32,
    /// What it does once it is empty; none: it stops.
    then: Option<Side>,
    deadline: Nanos,
    /// When it became ready last.
    pub ready_since: Nanos,
    paid_since: Option<Nanos>,
    paid: Nanos,
}

impl Life {
    pub fn new(side: Side, there: bool) -> Self {
        Self {
            state: if there { State::Ready } else { State::Away },
            side,
            number: 0,
            then: None,
            deadline: Nanos::ZERO,
            ready_since: Nanos::ZERO,
            paid_since: there.then_some(Nanos::ZERO),
            paid: Nanos::ZERO,
        }
    }

    /// For how long it was paid, where the end is at `ended`.
    pub fn paid(&self, ended: Nanos) -> Nanos {
        let now = self.paid_since.map_or(Nanos::ZERO, |since| ended.saturating_sub(since));
        self.paid + now
    }

    fn goes(&mut self, now: Nanos) {
        self.paid = self.paid(now);
        (self.state, self.paid_since) = (State::Away, None);
        self.number += 1;
    }
}

impl Cluster<'_> {
    pub fn order(&mut self, order: Order) -> Result<(), OutOfRange> {
        let (now, node) = (self.events.now, order.node());
        let Some(life) = self.lives.get_mut(node) else {
            return Ok(());
        };
        match (order, life.state) {
            (Order::Role { side, .. }, State::Ready) if life.side != side => {
                (life.then, life.deadline) = (Some(side), now + self.options.drain);
                self.drain(node);
            }
            (Order::Stop { .. }, State::Ready) => {
                (life.then, life.deadline) = (None, now + self.options.drain);
                self.drain(node);
            }
            (Order::Start { side, .. }, State::Away) => {
                (life.side, life.paid_since) = (side, Some(now));
                self.comes(node, self.engines[node].model.startup_s);
            }
            (Order::Fail { .. }, State::Ready | State::Draining | State::Coming) => {
                life.goes(now);
                self.given.push((now, order));
                return self.fail(node as u32);
            }
            (Order::Role { .. } | Order::Start { .. } | Order::Stop { .. } | Order::Fail { .. }, _) => return Ok(()),
        }
        self.given.push((now, order));
        Ok(())
    }

    fn drain(&mut self, node: usize) {
        self.lives[node].state = State::Draining;
        self.lives[node].number += 1;
        self.seat_all();
    }

    fn comes(&mut self, node: usize, after_s: f64) {
        let life = &mut self.lives[node];
        life.state = State::Coming;
        life.number += 1;
        let number = life.number;
        let at = self.events.now + Nanos::from_seconds(after_s);
        let node = node as u32;
        self.events.at(at, Event::Ready { node, life: number });
    }

    /// It takes work from now on.
    pub fn ready(&mut self, node: u32, number: u32) {
        let life = &mut self.lives[node as usize];
        if life.number != number {
            return;
        }
        (life.state, life.ready_since) = (State::Ready, self.events.now);
        let side = life.side;
        let engine = &mut self.engines[node as usize];
        engine.running_max = match side {
            Side::Prefill => engine.model.prefill_running_max as usize,
            Side::Decode => DECODE_RUNNING_MAX,
        };
        self.seat_all();
        self.changed = true;
    }

    /// The nodes that take work are those that are ready.
    fn seat_all(&mut self) {
        self.fleet.clear();
        for node in 0..self.engines.len() {
            self.places[node] = None;
            if self.lives[node].state == State::Ready {
                seat(self, node);
            }
        }
    }

    /// Those that are to be empty come closer to it.
    pub fn drains(&mut self) -> Result<(), OutOfRange> {
        for node in 0..self.engines.len() {
            if self.lives[node].state != State::Draining {
                continue;
            }
            self.hand_on_all(node as u32)?;
            if self.events.now >= self.lives[node].deadline {
                self.give_up_all(node as u32)?;
            }
            if self.is_empty(node) {
                match self.lives[node].then {
                    Some(side) => {
                        self.lives[node].side = side;
                        self.comes(node, self.engines[node].model.role_change_s);
                    }
                    None => {
                        let ends = self.events.now + Nanos::from_seconds(self.engines[node].model.drain_s);
                        self.lives[node].goes(ends);
                        self.forget(node as u32);
                    }
                }
            }
        }
        Ok(())
    }

    fn is_empty(&self, node: usize) -> bool {
        let engine = &self.engines[node];
        self.placed[node].figures() == Figures::default() && engine.pool.used() == 0 && engine.computing.is_none()
    }

    /// What it held is gone, and who asked for it knows.
    pub(super) fn forget(&mut self, node: u32) {
        let engine = &mut self.engines[node as usize];
        engine.reset();
        self.index.drop_node(Self::instance(node));
        self.speeds[node as usize] = baton_scheduling::StepModel::default();
        self.seat_all();
    }
}
