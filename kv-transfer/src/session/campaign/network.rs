//! What is under way: control lines, connections, and the writes of one-sided paths, which land when they like.

use super::super::planted::{self, Planted};
use super::*;

impl World {
    /// The sender's path to a receiver, opened where there is none.
    pub(super) fn path(&mut self, at: usize, to: usize, kind: PathKind) -> Option<u64> {
        let instance = self.senders[at].instance;
        let open =
            |path: &Path| (path.at, path.instance, path.to, path.kind, path.broken) == (at, instance, to, kind, false);
        if let Some((number, _)) = self.paths.iter().find(|(_, path)| open(path)) {
            return Some(*number);
        }
        // A one-sided transport takes no new connection of a process before what it had is proven over.
        let condemned = self.receivers[to]
            .condemned
            .iter()
            .any(|(gone, over, _)| (*gone, *over) == (instance, kind));
        if condemned && kind == PathKind::Shm {
            return None;
        }
        let connections = [self.number(), self.number()];
        for number in connections {
            let from = Connection {
                path: kind,
                writer: instance,
                number,
            };
            let wire = Wire {
                to,
                from,
                items: VecDeque::new(),
                receiving: None,
                closing: false,
            };
            self.wires.insert(number, wire);
        }
        let number = self.number();
        let path = Path {
            at,
            instance,
            to,
            kind,
            connections,
            broken: false,
        };
        self.paths.insert(number, path);
        Some(number)
    }

    /// The sender closes a path, for all hand-overs on it. What is on its way may still arrive, until the other end is closed.
    pub(super) fn break_path(&mut self, number: u64) {
        let Some(path) = self.paths.get_mut(&number) else {
            return;
        };
        path.broken = true;
        for connection in path.connections {
            if let Some(wire) = self.wires.get_mut(&connection) {
                wire.closing = true;
            }
        }
    }

    /// What the frame carries, as its source holds it now.
    fn value(&self, frame: &Frame) -> Option<(Ticket, u32)> {
        let (at, source) = frame.source;
        frame.remains.unwrap_or_else(|| self.senders[at].sources[source].value)
    }

    fn write(&mut self, to: usize, frame: &Frame, writer: Instance, block: BlockId, torn: bool) {
        let value = self.value(frame);
        let harmed = self.digests && !self.calm && self.dice.one_in(150);
        let by = (writer, frame.epoch);
        self.receivers[to].check_write(block, frame.epoch);
        for layer in frame.layers.clone() {
            let value = value.filter(|_| !harmed);
            self.receivers[to].cells[block.index()][layer as usize] = Cell { value, by, torn };
        }
    }

    /// The next item of a connection arrives, or what is being received is whole.
    pub(super) fn deliver(&mut self, number: u64) {
        let Some(wire) = self.wires.get_mut(&number) else {
            return;
        };
        let (to, from) = (wire.to, wire.from);
        if from.path == PathKind::Shm {
            return self.notify(number);
        }
        if let Some((claim, block, frame)) = wire.receiving.take() {
            self.write(to, &frame, from.writer, block, false);
            if let Some(claim) = claim {
                let _ = self.receivers[to].machine.land(self.now, claim, 1);
                self.settle(to);
            }
            return self.applied(frame);
        }
        match wire.items.pop_front() {
            None => {}
            Some(Item::Marker(epoch)) => self.tell(to, Event::Marker { from, epoch }),
            Some(Item::Frame(frame)) => {
                if !self.calm && self.dice.one_in(60) {
                    // Lost on the way.
                    return self.let_source_go(&frame);
                }
                self.begin(number, frame);
            }
        }
    }

    /// A frame's header came: may its payload be received?
    fn begin(&mut self, number: u64, frame: Frame) {
        let wire = &self.wires[&number];
        let (to, from) = (wire.to, wire.from);
        let claim = self.receivers[to]
            .machine
            .claim(self.now, from, frame.epoch, frame.ordinal, &frame.layers);
        self.settle(to);
        let Ok(claim) = claim else {
            return self.applied(frame);
        };
        let block = claim.block();
        let node = &self.receivers[to];
        assert_eq!(
            node.writers.get(&frame.epoch),
            Some(&from.writer),
            "a foreign writer got a claim"
        );
        assert!(
            !node.over.contains(&frame.epoch),
            "{:?} got a claim when it was over",
            frame.epoch
        );
        let same = |wire: &&Wire| match &wire.receiving {
            Some((_, other, f)) => {
                wire.to == to
                    && *other == block
                    && f.layers.start < frame.layers.end
                    && frame.layers.start < f.layers.end
            }
            None => false,
        };
        assert!(self.wires.values().find(same).is_none(), "two frames into one place");
        let mut claim = Some(claim);
        if planted::is(Planted::CheckedBeforeOnly)
            && let Some(checked) = claim.take()
        {
            let _ = self.receivers[to].machine.land(self.now, checked, 1);
            self.settle(to);
        }
        if claim.is_some() {
            self.write(to, &frame, from.writer, block, true);
        }
        if let Some(wire) = self.wires.get_mut(&number) {
            wire.receiving = Some((claim, block, frame));
        } else {
            self.let_source_go(&frame);
        }
    }

    /// A one-sided write lands, whatever the receiver thinks of it now.
    pub(super) fn land_one_sided(&mut self, number: u64) {
        let Some(wire) = self.wires.get_mut(&number) else {
            return;
        };
        let (to, writer) = (wire.to, wire.from.writer);
        let waiting: Vec<usize> = wire
            .items
            .iter()
            .enumerate()
            .filter(|(_, item)| matches!(item, Item::Frame(frame) if !frame.applied))
            .map(|(at, _)| at)
            .collect();
        let Some(at) = self.dice.pick(&waiting) else { return };
        let Some(Item::Frame(mut frame)) = self.wires.get_mut(&number).and_then(|wire| wire.items.remove(at)) else {
            return;
        };
        frame.applied = true;
        let block = frame.destination;
        self.write(to, &frame, writer, block, false);
        if let Some(wire) = self.wires.get_mut(&number) {
            wire.items.insert(at, Item::Frame(frame));
        }
    }

    /// The receiver sees the next notification of a one-sided path.
    fn notify(&mut self, number: u64) {
        let Some(wire) = self.wires.get_mut(&number) else {
            return;
        };
        let (to, from) = (wire.to, wire.from);
        match wire.items.front() {
            None => {}
            Some(Item::Frame(frame)) if !frame.applied => self.land_one_sided(number),
            Some(Item::Marker(epoch)) => {
                let epoch = *epoch;
                wire.items.pop_front();
                self.tell(to, Event::Marker { from, epoch });
            }
            Some(Item::Frame(_)) => {
                let Some(Item::Frame(frame)) = wire.items.pop_front() else {
                    return;
                };
                let claim = self.receivers[to]
                    .machine
                    .claim(self.now, from, frame.epoch, frame.ordinal, &frame.layers);
                if let Ok(claim) = claim {
                    let node = &self.receivers[to];
                    assert_eq!(
                        node.writers.get(&frame.epoch),
                        Some(&from.writer),
                        "a foreign writer got a claim"
                    );
                    assert!(
                        !node.over.contains(&frame.epoch),
                        "{:?} got a claim when it was over",
                        frame.epoch
                    );
                    assert_eq!(claim.block(), frame.destination, "it was written elsewhere");
                    let _ = self.receivers[to].machine.land(self.now, claim, 1);
                }
                self.settle(to);
                self.applied(frame);
            }
        }
    }

    /// The frame is done with: its sender hears of it.
    fn applied(&mut self, frame: Frame) {
        self.let_source_go(&frame);
        if let Some(hand) = self.hands.get_mut(&frame.hand) {
            hand.in_flight.remove(&frame.number);
        }
    }

    pub(super) fn let_source_go(&mut self, frame: &Frame) {
        let (at, source) = frame.source;
        if frame.remains.is_none() {
            let source = &mut self.senders[at].sources[source];
            source.claims = source.claims.saturating_sub(1);
        }
    }

    /// The receiver's end of a connection closes: what is being received is torn, what was posted cannot land any more.
    pub(super) fn close_wire(&mut self, number: u64) {
        let Some(wire) = self.wires.get_mut(&number) else {
            return;
        };
        let (to, from) = (wire.to, wire.from);
        if let Some((claim, _, frame)) = wire.receiving.take() {
            if let Some(claim) = claim {
                self.receivers[to].machine.release(self.now, &claim);
                self.settle(to);
            }
            self.let_source_go(&frame);
        }
        self.drop_wire(number);
        self.tell(to, Event::ConnectionClosed { from });
    }

    pub(super) fn drop_wire(&mut self, number: u64) {
        let Some(wire) = self.wires.remove(&number) else { return };
        for path in self
            .paths
            .values_mut()
            .filter(|path| path.connections.contains(&number))
        {
            path.broken = true;
        }
        let frames = wire.items.into_iter().filter_map(|item| match item {
            Item::Frame(frame) => Some(frame),
            Item::Marker(_) => None,
        });
        for frame in frames.chain(wire.receiving.map(|(_, _, frame)| frame)) {
            self.let_source_go(&frame);
        }
        // The others of its path follow.
        let broken: Vec<u64> = self
            .paths
            .iter()
            .filter(|(_, path)| path.connections.contains(&number))
            .map(|(at, _)| *at)
            .collect();
        for path in broken {
            self.break_path(path);
        }
    }

    /// Whether the other end of this connection can be closed with proof: never against a writer that is stopped, where it
    /// writes one-sidedly.
    pub(super) fn can_close(&self, kind: PathKind, instance: Instance) -> bool {
        let stopped = self
            .senders
            .iter()
            .any(|sender| sender.instance == instance && sender.stopped);
        kind == PathKind::Tcp || !stopped
    }

    /// A receiver has destroyed what it was asked to.
    pub(super) fn disconnected(&mut self, to: usize, which: usize) {
        let (instance, path, through) = self.receivers[to].condemned[which];
        if !self.can_close(path, instance) {
            return;
        }
        self.receivers[to].condemned.swap_remove(which);
        let its = |wire: &Wire| (wire.to, wire.from.writer, wire.from.path) == (to, instance, path);
        let wires: Vec<u64> = self
            .wires
            .iter()
            .filter(|(_, wire)| its(wire))
            .map(|(number, _)| *number)
            .collect();
        for number in wires {
            self.close_wire(number);
        }
        self.note(&[20, to as u64, instance.0, through.0]);
        self.tell(
            to,
            Event::Disconnected {
                instance,
                path,
                through,
            },
        );
    }

    /// A control line breaks; each end sees it in its time.
    pub(super) fn break_line(&mut self, key: (usize, usize)) {
        if let Some(line) = self.lines.remove(&key) {
            self.unseen_by_sender.push((key.0, key.1, line.instance));
            self.unseen_by_receiver.push((key.1, line.instance));
        }
    }

    pub(super) fn receiver_sees(&mut self, which: usize) {
        let (to, instance) = self.unseen_by_receiver.swap_remove(which);
        self.tell(to, Event::PeerLost { instance });
    }

    pub(super) fn sender_sees(&mut self, which: usize) {
        let (at, to, instance) = self.unseen_by_sender.swap_remove(which);
        if self.senders[at].instance != instance {
            return;
        }
        let hands: Vec<u64> = self
            .hands
            .iter()
            .filter(|(_, hand)| (hand.at, hand.to, hand.linked) == (at, to, true))
            .map(|(n, _)| *n)
            .collect();
        for number in hands {
            let reason = "the line broke".to_owned();
            let error = TransferError::PeerGone { reason };
            self.bring(number, SenderEvent::LinkLost { error });
        }
        let paths: Vec<u64> = self
            .paths
            .iter()
            .filter(|(_, path)| (path.at, path.to) == (at, to))
            .map(|(n, _)| *n)
            .collect();
        for path in paths {
            self.break_path(path);
        }
    }
}
