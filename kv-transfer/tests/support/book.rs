//! A book of grants as an endpoint keeps it, which also watches the transport keep its promises.

use baton_kv_transfer::transport::{Claim, ExtentHeader, Landing, Reject, WriterConnection};
use baton_types::{BlockId, Epoch, Instance, KvGeometry};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::Notify;

/// What a transport told the book.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Rejected(Reject),
    Fenced(WriterConnection, Epoch),
    Corrupt(u32),
    Closed(WriterConnection),
}

struct Grant {
    writer: Instance,
    blocks: Vec<BlockId>,
    live: bool,
    /// (ordinal, layer) that are being received, and those that landed.
    arriving: HashSet<(u32, u32)>,
    arrived: HashSet<(u32, u32)>,
}

#[derive(Default)]
struct State {
    grants: HashMap<Epoch, Grant>,
    events: Vec<Event>,
    claims: Vec<(WriterConnection, Epoch)>,
    claims_ever: usize,
    gate_closed: bool,
    waiting_at_gate: usize,
    /// Epochs die as soon as an extent of theirs was claimed.
    kill_claimed: bool,
    broken: Option<String>,
}

/// The book of one receiver.
pub struct Book {
    geometry: KvGeometry,
    state: Mutex<State>,
    gate: Condvar,
    changed: Notify,
    this: std::sync::Weak<Book>,
}

impl Book {
    pub fn new(geometry: KvGeometry) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            geometry,
            state: Mutex::default(),
            gate: Condvar::new(),
            changed: Notify::new(),
            this: this.clone(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn grant(&self, epoch: Epoch, writer: Instance, blocks: Vec<BlockId>) {
        let grant = Grant {
            writer,
            blocks,
            live: true,
            arriving: HashSet::new(),
            arrived: HashSet::new(),
        };
        assert!(self.state().grants.insert(epoch, grant).is_none());
    }

    pub fn kill_claimed(&self) {
        self.state().kill_claimed = true;
    }

    /// From now on every claim waits at the gate, holding its receiving task.
    pub fn close_gate(&self) {
        self.state().gate_closed = true;
    }

    pub fn open_gate(&self) {
        self.state().gate_closed = false;
        self.gate.notify_all();
    }

    pub fn arrived(&self, epoch: Epoch) -> HashSet<(u32, u32)> {
        self.state().grants[&epoch].arrived.clone()
    }

    pub fn events(&self) -> Vec<Event> {
        self.state().events.clone()
    }

    pub fn claims(&self) -> usize {
        self.state().claims.len()
    }

    pub fn claims_ever(&self) -> usize {
        self.state().claims_ever
    }

    /// The transport broke a promise.
    pub fn assert_sound(&self) {
        assert_eq!(self.state().broken, None);
    }

    pub async fn wait_arrived(&self, epoch: Epoch, count: usize) {
        self.wait("extents to arrive", |state| state.grants[&epoch].arrived.len() >= count)
            .await;
    }

    pub async fn wait_events(&self, what: &str, enough: impl Fn(&[Event]) -> bool) {
        self.wait(what, |state| enough(&state.events)).await;
    }

    pub async fn wait_at_gate(&self) {
        self.wait("a claim at the gate", |state| state.waiting_at_gate > 0)
            .await;
    }

    async fn wait(&self, what: &str, enough: impl Fn(&State) -> bool) {
        let until = async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if enough(&self.state()) {
                    return;
                }
                changed.await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(60), until).await.is_err() {
            let state = self.state();
            let arrived: HashMap<_, _> = state
                .grants
                .iter()
                .map(|(epoch, grant)| (epoch, grant.arrived.len()))
                .collect();
            panic!(
                "waited in vain for {what}; arrived {arrived:?}, events {:?}",
                state.events
            );
        }
    }

    fn told(&self, event: Event) {
        let mut state = self.state();
        match &event {
            Event::Fenced(from, epoch) if state.claims.contains(&(*from, *epoch)) => {
                state.broken = Some(format!("{epoch:?} was fenced on {from:?}, which holds a claim of it"));
            }
            Event::Closed(from) if state.claims.iter().any(|(holder, _)| holder == from) => {
                state.broken = Some(format!("{from:?} closed but holds a claim"));
            }
            Event::Closed(from) if state.events.contains(&event) => {
                state.broken = Some(format!("{from:?} closed twice"));
            }
            Event::Rejected(_) | Event::Fenced(..) | Event::Corrupt(_) | Event::Closed(_) => {}
        }
        state.events.push(event);
        drop(state);
        self.changed.notify_waiters();
    }

    fn check(&self, state: &mut State, from: &WriterConnection, header: &ExtentHeader) -> Result<BlockId, Reject> {
        let kill = state.kill_claimed;
        let grant = state
            .grants
            .get_mut(&header.epoch)
            .filter(|grant| grant.live)
            .ok_or(Reject::DeadEpoch)?;
        if grant.writer != from.instance {
            return Err(Reject::WrongWriter);
        }
        let block = *grant.blocks.get(header.ordinal as usize).ok_or(Reject::OutsideGrant)?;
        let parts = || header.layers.clone().map(|layer| (header.ordinal, layer));
        if parts().any(|part| grant.arriving.contains(&part) || grant.arrived.contains(&part)) {
            return Err(Reject::Duplicate);
        }
        grant.arriving.extend(parts());
        grant.live = !kill;
        state.claims.push((*from, header.epoch));
        state.claims_ever += 1;
        Ok(block)
    }
}

impl Landing for Book {
    fn claim(&self, from: &WriterConnection, header: &ExtentHeader) -> Result<Box<dyn Claim>, Reject> {
        let mut state = self.state();
        state.waiting_at_gate += 1;
        self.changed.notify_waiters();
        while state.gate_closed {
            state = self.gate.wait(state).unwrap();
        }
        state.waiting_at_gate -= 1;
        let checked = self.check(&mut state, from, header);
        drop(state);
        self.changed.notify_waiters();
        match checked {
            Ok(block) => {
                let offset = header.layers.start as usize * self.geometry.layer_bytes();
                let book = self.this.upgrade().unwrap();
                let len = header.len as usize;
                let (epoch, ordinal, layers) = (header.epoch, header.ordinal, header.layers.clone());
                Ok(Box::new(TestClaim {
                    book,
                    from: *from,
                    epoch,
                    ordinal,
                    layers,
                    block,
                    offset,
                    len,
                }))
            }
            Err(reject) => {
                self.told(Event::Rejected(reject));
                Err(reject)
            }
        }
    }

    fn fenced(&self, from: &WriterConnection, epoch: Epoch) {
        self.told(Event::Fenced(*from, epoch));
    }

    fn corrupt(&self, _from: &WriterConnection, header: &ExtentHeader) {
        self.told(Event::Corrupt(header.ordinal));
    }

    fn closed(&self, from: &WriterConnection) {
        self.told(Event::Closed(*from));
    }
}

struct TestClaim {
    book: Arc<Book>,
    from: WriterConnection,
    epoch: Epoch,
    ordinal: u32,
    layers: Range<u32>,
    block: BlockId,
    offset: usize,
    len: usize,
}

impl Claim for TestClaim {
    fn block(&self) -> BlockId {
        self.block
    }

    fn offset(&self) -> usize {
        self.offset
    }

    fn len(&self) -> usize {
        self.len
    }

    fn land(self: Box<Self>) -> Result<(), Reject> {
        let mut state = self.book.state();
        let grant = state.grants.get_mut(&self.epoch).unwrap();
        if !grant.live {
            drop(state);
            self.book.told(Event::Rejected(Reject::DeadEpoch));
            return Err(Reject::DeadEpoch);
        }
        grant
            .arrived
            .extend(self.layers.clone().map(|layer| (self.ordinal, layer)));
        Ok(())
    }
}

impl Drop for TestClaim {
    fn drop(&mut self) {
        let mut state = self.book.state();
        let mine = (self.from, self.epoch);
        let at = state
            .claims
            .iter()
            .position(|claim| *claim == mine)
            .expect("a claim is on the book");
        state.claims.swap_remove(at);
        let grant = state.grants.get_mut(&self.epoch).unwrap();
        for layer in self.layers.clone() {
            grant.arriving.remove(&(self.ordinal, layer));
        }
        drop(state);
        self.book.changed.notify_waiters();
    }
}
